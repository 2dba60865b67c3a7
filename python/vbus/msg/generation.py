"""The one place that says which generation of virtio-msg is spoken.

Several layouts circulate that do not understand each other and do not negotiate on the wire. Ours is the one of the
committee's draft of December 2025 ("generation C"): an 8-byte header with a token, queue structures padded to 40 bytes.
A later generation would change this module and the layouts in `messages`, and nothing else.
"""

from __future__ import annotations

import struct

NAME = "C"
REVISION = 1
HEADER = struct.Struct("<BBHHH")
"""type, msg_id, dev_num, token, msg_size (the header included)."""
TYPE_RESPONSE = 1
TYPE_BUS = 2
EVENT_BIT = 0x40
"""Ids with this bit are events: they want no response and carry token 0."""
FRAME_HEADER_SIZE = HEADER.size
MAX_MESSAGE = 0xFFFF
