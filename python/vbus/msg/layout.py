"""How a message's body is laid out: a list of fields that pack and unpack themselves, little-endian.

A layout is fixed fields, then at most one tail (bytes, 32-bit words, UUID and name). Reading is strict: a body that is
longer or shorter than its fields say is no message. Reserved bytes (`x` in a format) are written as 0 and skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from uuid import UUID

from vbus.msg.generation import HEADER_FORMAT

MAX_NAME = 63
"""Bytes of a name."""


class BadBodyError(ValueError):
    """A body that does not fit its layout; the codec turns it into a value."""


class Layout:
    """Fixed fields by a struct format, then a tail."""

    def __init__(self, fmt: str, tail: Tail | None = None) -> None:
        self.fixed = struct.Struct("<" + fmt)
        self.framed = struct.Struct(HEADER_FORMAT + fmt)
        """The message's header and the fixed fields, so that both are packed at once."""
        self.tail = tail

    def split(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], bytes]:
        """The values of the fixed fields, and the tail's bytes. ValueError for values that do not fit."""
        if self.tail is None:
            return values, b""
        return values[: -self.tail.count], self.tail.pack(values[-self.tail.count :])

    def unpack(self, body: memoryview) -> tuple[Any, ...]:
        """The values. BadBodyError."""
        size = self.fixed.size
        if len(body) < size:
            raise BadBodyError(f"{len(body)} bytes, at least {size} are needed")
        fixed = self.fixed.unpack_from(body)
        if self.tail is None:
            if len(body) != size:
                raise BadBodyError(f"{len(body)} bytes, {size} are needed")
            return fixed
        return fixed + self.tail.unpack(body[size:])


class Tail:
    """What follows the fixed fields: `count` values, packed and unpacked together."""

    def __init__(
        self,
        count: int,
        pack: Callable[[tuple[Any, ...]], bytes],
        unpack: Callable[[memoryview], tuple[Any, ...]],
    ) -> None:
        self.count = count
        self.pack = pack
        self.unpack = unpack


def _words(body: memoryview) -> tuple[tuple[int, ...]]:
    if len(body) % 4:
        raise BadBodyError(f"{len(body)} bytes are no 32-bit words")
    return (struct.unpack(f"<{len(body) // 4}I", body),)


UNPRINTABLE = "the text has characters that cannot be printed"


def _pack_text(text: str) -> bytes:
    if not text.isprintable():
        raise ValueError(UNPRINTABLE)
    return text.encode()


def _text(body: memoryview) -> tuple[str]:
    """Text that may be shown to people: printable, so that it cannot steer a terminal or fake a line of a log."""
    try:
        text = str(body, "utf-8")
    except UnicodeDecodeError:
        raise BadBodyError("the text is not UTF-8") from None
    if not text.isprintable():
        raise BadBodyError(UNPRINTABLE)
    return (text,)


def _pack_name(name: str) -> bytes:
    data = _pack_text(name)
    if len(data) > MAX_NAME:
        raise ValueError(f"a name of {len(data)} bytes; {MAX_NAME} are the most")
    return bytes([len(data)]) + data


def _name(body: memoryview) -> tuple[str]:
    if not len(body) or body[0] > MAX_NAME or len(body) != 1 + body[0]:
        raise BadBodyError("the name's length is not its length")
    return _text(body[1:])


def _identity(body: memoryview) -> tuple[UUID, str]:
    if len(body) < 17:
        raise BadBodyError(f"{len(body)} bytes have no place for a UUID and a name")
    return (UUID(bytes=bytes(body[:16])), *_name(body[16:]))


DATA = Tail(1, lambda values: values[0], lambda body: (bytes(body),))
"""The rest as bytes: taken as they are, so that a memoryview is copied once, into the message."""
WORDS = Tail(1, lambda values: struct.pack(f"<{len(values[0])}I", *values[0]), _words)
"""The rest as 32-bit words."""
TEXT = Tail(1, lambda values: _pack_text(values[0]), _text)
"""The rest as printable UTF-8."""
NAME = Tail(1, lambda values: _pack_name(values[0]), _name)
"""A length byte and a name of up to 63 bytes."""
IDENTITY = Tail(2, lambda values: values[0].bytes + _pack_name(values[1]), _identity)
"""A UUID of 16 bytes, a length byte and a name."""
