"""The one place that says which generation of virtio-msg is spoken.

Several layouts circulate that do not understand each other and do not negotiate on the wire. Ours is the one of the
committee's draft of December 2025 ("generation C"): an 8-byte header with a token, queue structures padded to 40 bytes.
Another generation would be another module like this one, and another `codec.TABLE`; the messages would stay.
"""

from __future__ import annotations

import struct

NAME = "C"
REVISION = 1
"""Of the transport, as HELLO says it."""

HEADER_FORMAT = "<BBHHH"
HEADER = struct.Struct(HEADER_FORMAT)
"""type, msg_id, dev_num, token, msg_size (the header included)."""
FRAME_HEADER_SIZE = HEADER.size
MAX_MESSAGE = 0xFFFF
"""Bytes of a message, header included: what msg_size can say."""

TYPE_RESPONSE = 1
TYPE_BUS = 2
TYPE_RESERVED = 0xFF & ~(TYPE_BUS | TYPE_RESPONSE)
EVENT_BIT = 0x40
"""Ids with this bit are events: they want no response and carry token 0."""
