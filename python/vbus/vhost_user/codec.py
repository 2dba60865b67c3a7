"""Messages to bytes and back: a header of three words, and a payload whose shape its request says.

    data = encode(Request.SET_VRING_NUM, VringState(0, 256), need_reply=True)
    match decode(data):
        case Malformed(name=name): ...
        case Message(request=request, payload=payload): ...

Whether a reader gets a request or its answer, it knows by the header's flag. Whatever is wrong with a message is a
`Malformed` with a name, and never raises.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from vbus.vhost_user.messages import (
    BACKEND_TABLE,
    TABLE,
    U64,
    VERSION,
    BackendRequest,
    BadPayloadError,
    Empty,
    Flags,
    Payload,
    Request,
    Row,
)

HEADER = struct.Struct("=III")
"""request, flags, bytes of payload."""
MAX_PAYLOAD = 1024
"""Bytes: more than any request has."""
VERSION_MASK = 3
KNOWN_FLAGS = VERSION_MASK | int(Flags.REPLY) | int(Flags.NEED_REPLY)


@dataclass(frozen=True, slots=True)
class Message:
    """A message: what is asked or answered, and whether an acknowledgement is wanted."""

    request: Request | BackendRequest
    payload: Payload
    reply: bool = False
    need_reply: bool = False


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message: a stable name, and the details for people.

    The names: `short-header`, `vhost-user-version`, `message-flags`, `message-size`, `unknown-request`, `bad-payload`.
    """

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})"


def table_of(*, backend: bool) -> tuple[type[IntEnum], Mapping[Any, Row]]:
    """The requests of an end: those of the front-end, or on the other socket those of the back-end."""
    return (BackendRequest, BACKEND_TABLE) if backend else (Request, TABLE)


def encode(
    request: Request | BackendRequest, payload: Payload, *, reply: bool = False, need_reply: bool = False
) -> bytes:
    """The bytes of a message. ValueError when a field does not fit."""
    flags = VERSION | (Flags.REPLY if reply else 0) | (Flags.NEED_REPLY if need_reply else 0)
    data = payload.pack()
    return HEADER.pack(request, flags, len(data)) + data


def payload_size(header: bytes) -> int | Malformed:
    """How many bytes follow this header, before anything else of it is believed."""
    if len(header) != HEADER.size:
        return Malformed("short-header", f"{len(header)} bytes")
    flags: int
    size: int
    _, flags, size = HEADER.unpack(header)
    if flags & VERSION_MASK != VERSION:
        return Malformed("vhost-user-version", f"version {flags & VERSION_MASK}; {VERSION} is spoken")
    if flags & ~KNOWN_FLAGS:
        return Malformed("message-flags", f"{flags:#x}")
    if size > MAX_PAYLOAD:
        return Malformed("message-size", f"{size} bytes of payload; {MAX_PAYLOAD} are the most")
    return size


def decode(data: bytes, *, backend: bool = False) -> Message | Malformed:
    """The message of these bytes, which must be exactly one; `backend`: of the back-end's own requests."""
    size = payload_size(data[: HEADER.size])
    if isinstance(size, Malformed):
        return size
    number, flags, _ = HEADER.unpack_from(data)
    body = data[HEADER.size :]
    if len(body) != size:
        return Malformed("message-size", f"it says {size} bytes of payload and has {len(body)}")
    kinds, table = table_of(backend=backend)
    row = table.get(number)
    if row is None:
        return Malformed("unknown-request", f"request {number}")
    request: Any = kinds(number)
    reply, need_reply = bool(flags & Flags.REPLY), bool(flags & Flags.NEED_REPLY)
    # Without an answer of its own, a request is acknowledged by a number: 0, or what is wrong.
    kind = (row.answer or U64) if reply else row.payload
    if reply and request is Request.GET_CONFIG and not body:
        # Nothing at all: how a back-end refuses to tell.
        kind = Empty
    try:
        return Message(request, kind.unpack(body), reply, need_reply)
    except BadPayloadError as error:
        return Malformed("bad-payload", f"{request.name}: {error}")
