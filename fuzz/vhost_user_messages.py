"""The messages of vhost-user, both ends': bytes of any kind, and messages of any values, through codec and socket.

What must hold: nothing raises; what is no message has one of the names that there are; what is read is made again, and
read as the same; off a socket come whole messages in their order, and no descriptor is left behind.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

from harness.values import Values

from vbus.errors import Violation
from vbus.vhost_user.codec import HEADER, MAX_PAYLOAD, Malformed, Message, decode, encode, payload_size, table_of
from vbus.vhost_user.messages import U64
from vbus.vhost_user.wire import MAX_FDS, Reader, send

NAMES = {
    "short-header",
    "vhost-user-version",
    "message-flags",
    "message-size",
    "unknown-request",
    "bad-payload",
}
BROKEN = {"malformed-message", "too-many-descriptors", "half-a-message"}
FD = os.open("/dev/null", os.O_RDONLY)
CHUNKS = 64
"""Pieces that a stream comes in: few enough to wait in a socket that nobody reads."""


def one(data: bytes) -> None:
    """An input: what to do with it, and the bytes for that."""
    kinds = (read, framed, made, streamed)
    kinds[data[0] % len(kinds) if data else 0](data[1:])


def read(data: bytes) -> None:
    """Bytes of any kind."""
    for backend in (False, True):
        found = decode(data, backend=backend)
        size = payload_size(data[: HEADER.size])
        if isinstance(found, Malformed):
            assert found.name in NAMES, found
            assert str(found).isprintable(), found
            assert isinstance(size, Malformed) or 0 <= size <= MAX_PAYLOAD
            continue
        assert isinstance(found, Message)
        assert size == len(data) - HEADER.size
        again = bytes_of(found)
        # Some front-ends send more of a memory table than is used.
        assert len(again) <= len(data)
        assert decode(again, backend=backend) == found
        assert bytes_of(found) == again


def framed(data: bytes) -> None:
    """Any payload behind a header that is good, or nearly."""
    read(HEADER.pack(*data[:1] or [0], *data[1:2] or [1], len(data[2:])) + data[2:])


def made(data: bytes) -> None:
    """A message of any values: it is refused by a ValueError, or comes back."""
    values = Values(data)
    flags = values.number()
    backend, reply, need_reply = bool(flags & 1), bool(flags & 2), bool(flags & 4)
    kinds, table = table_of(backend=backend)
    request: Any = values.one_of(sorted(table))
    row = table[request]
    kind = (row.answer or U64) if reply else row.payload
    message = Message(kinds(request), kind(**values.fields(kind)), reply, need_reply)  # type: ignore[arg-type]
    try:
        encoded = bytes_of(message)
    except ValueError:
        return
    assert decode(encoded, backend=backend) == message
    read(encoded)


def streamed(data: bytes) -> None:
    """Pieces of a stream, each sent at once and with some descriptors, read while they come."""
    values = Values(data)
    before = len(os.listdir("/proc/self/fd"))
    here, there = socket.socketpair()
    with here, there:
        there.setblocking(False)
        reader = Reader(there)
        sent, found, fds, broken = b"", b"", 0, None
        try:
            for _ in range(CHUNKS):
                piece, count = values.take(values.number()), values.number() & 15
                if piece:
                    send(here, piece, [FD] * count)
                sent, fds = sent + piece, fds + count
                more, taken = messages(reader)
                found, fds = found + more, fds - taken
                if not values.left():
                    break
            here.shutdown(socket.SHUT_WR)
            more, taken = messages(reader)
            assert reader.read() is None, "the end stays the end"
            assert found + more == sent, "all of it was messages"
        except Violation as violation:
            broken = violation.name
        finally:
            reader.close()
    assert broken is None or broken in BROKEN
    assert fds >= 0
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left"


def messages(reader: Reader) -> tuple[bytes, int]:
    """What is there by now, and how many descriptors came with it; those are closed."""
    found, count = b"", 0
    while True:
        try:
            message = reader.read()
        except BlockingIOError:
            return found, count
        if message is None:
            return found, count
        data, fds = message
        for fd in fds:
            os.close(fd)
        assert len(fds) <= MAX_FDS
        assert payload_size(data[: HEADER.size]) == len(data) - HEADER.size
        found, count = found + data, count + len(fds)


def bytes_of(message: Message) -> bytes:
    """A message as it is sent."""
    return encode(message.request, message.payload, reply=message.reply, need_reply=message.need_reply)


def seeds() -> Iterator[bytes]:
    """Every message, with zeroes and with something; as bytes, as a payload, as values, and on a socket."""
    for backend in (False, True):
        kinds, table = table_of(backend=backend)
        for place, (request, row) in enumerate(sorted(table.items())):
            for reply, kind in ((False, row.payload), (True, row.answer)):
                if kind is None:
                    continue
                yield bytes([2, backend | reply << 1]) + place.to_bytes(2, "little") + bytes(range(1, 40))
                payload: Any = kind(**Values(b"").fields(kind))
                data = encode(kinds(request), payload, reply=reply)  # type: ignore[arg-type]
                yield b"\0" + data
                yield bytes([1, request, 1 | reply << 2]) + data[HEADER.size :]
                # In one piece with a descriptor, then in two.
                yield bytes([3, len(data)]) + data + bytes([1, 4]) + data[:4] + bytes([0, 255]) + data[4:]
