"""The messages of the bus protocol: bytes of any kind, and messages of any values, through codec and splitter.

What must hold: nothing raises; what is no message has one of the names that there are; what is read is made again, and
read as the same; a stream is cut into the same messages however it arrives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from harness.values import Values

from vbus import msg
from vbus.msg.codec import TABLE
from vbus.msg.generation import HEADER, TYPE_RESPONSE

NAMES = {"short-header", "message-size", "reserved-type", "unknown-message", "bad-body"}
CLASSES = [cls for row in TABLE for cls in (row.message, row.response) if cls is not None]
HEADS = [(row.header_type | kind, row.id) for row in TABLE for kind in (0, TYPE_RESPONSE) if row.response or not kind]
COUNTED = {"num_blocks": "features", "length": "data"}
"""Fields that say how many there are of another."""


def one(data: bytes) -> None:
    """An input: what to do with it, and the bytes for that."""
    kinds = (read, framed, made, streamed)
    kinds[data[0] % len(kinds) if data else 0](data[1:])


def read(data: bytes) -> msg.Frame | None:
    """Bytes of any kind."""
    found = msg.decode(data)
    assert found == msg.decode(bytearray(data)) == msg.decode(memoryview(data))
    if isinstance(found, msg.Malformed):
        assert found.name in NAMES, found
        assert str(found).isprintable(), found
        return None
    assert isinstance(found, msg.Frame)
    again = msg.encode(found)
    assert len(again) == len(data)
    assert msg.decode(again) == found
    assert msg.encode(found) == again
    if isinstance(found.body, msg.GetDevicesResponse):
        assert all(0 <= number <= 0xFFFF for number in found.body.numbers())
    return found


def framed(data: bytes) -> None:
    """Any body behind a good header."""
    values = Values(data)
    header_type, number = values.one_of(HEADS)
    dev_num, token, body = values.number(2), values.number(2), values.rest()
    read(HEADER.pack(header_type, number, dev_num, token, HEADER.size + len(body)) + body)


def made(data: bytes) -> None:
    """A message of any values: it is refused by a ValueError, or comes back."""
    values = Values(data)
    cls = values.one_of(CLASSES)
    counts = values.number() & 1 == 0
    frame = msg.Frame(body_of(cls, values, counts=counts), values.any_number(), values.any_number())
    try:
        encoded = msg.encode(frame)
    except ValueError:
        return
    assert read(encoded) == frame


def body_of(cls: type[msg.Body], values: Values, *, counts: bool) -> msg.Body:
    """A body of any values; `counts`: with as many of a thing as it says."""
    fields: dict[str, Any] = values.fields(cls)
    for count, counted in COUNTED.items():
        if counts and count in fields and counted in fields:
            fields[count] = len(fields[counted])
    if counts and cls is msg.GetDevicesResponse:
        fields["count"] = 8 * len(fields["bitmap"])
    return cls(**fields)


def streamed(data: bytes) -> None:
    """A stream in pieces, and the same at once."""
    values = Values(data)
    limit = values.number(2)
    cuts = [values.number() for _ in range(values.number() & 15)]
    stream = values.rest()
    whole = msg.Splitter(limit).feed(stream)
    splitter = msg.Splitter(limit)
    found: list[bytes | msg.Malformed] = []
    at = 0
    for cut in [*cuts, len(stream)]:
        more = splitter.feed(stream[at : at + cut])
        at += cut
        # Once it is broken, it says so each time.
        if found and isinstance(found[-1], msg.Malformed):
            assert more == found[-1:]
        else:
            found += more
    assert found == whole
    pieces = [piece for piece in found if isinstance(piece, bytes)]
    assert stream.startswith(b"".join(pieces))
    for piece in pieces:
        assert HEADER.size <= len(piece) <= limit
        read(piece)
    for broken in found[len(pieces) :]:
        assert isinstance(broken, msg.Malformed)
        assert broken.name in NAMES


def seeds() -> Iterator[bytes]:
    """Every message, with zeroes and with something; as bytes, as a body, as values, and in a stream."""
    for place, cls in enumerate(CLASSES):
        assert dataclasses.is_dataclass(cls)
        yield b"\2" + place.to_bytes(2, "little") + b"\0" + bytes(range(1, 40))
        data = msg.encode(msg.Frame(body_of(cls, Values(b""), counts=True)))
        yield b"\0" + data
        head = HEADS.index((data[0], data[1]))
        yield b"\1" + head.to_bytes(2, "little") + bytes(4) + data[HEADER.size :]
        yield b"\3\xff\xff" + bytes([2, 3, len(data)]) + data + data
