"""An input cut into values: numbers, bytes, and whole messages whose classes say what they hold.

The values come from the input's first byte on; behind its last byte, all are zero or empty.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from uuid import UUID

T = TypeVar("T")


class Values:
    """The values of one input."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        found = self._data[self._at : self._at + size]
        self._at += len(found)
        return found

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))

    def number(self, size: int = 1) -> int:
        """A number of so many bytes."""
        return int.from_bytes(self.take(size), "little")

    def any_number(self) -> int:
        """A number of 1 to 9 bytes: any that fits somewhere, and some that fit nowhere."""
        return self.number((1, 2, 4, 8, 1, 2, 4, 9)[self.number() & 7])

    def one_of(self, choices: Sequence[T]) -> T:
        """One of these."""
        return choices[self.number(2) % len(choices)]

    def left(self) -> bool:
        """Whether there are bytes left."""
        return self._at < len(self._data)

    def fields(self, cls: type[Any]) -> dict[str, Any]:
        """Values for the fields of a dataclass, each of its type, whatever the class makes of them."""
        return {name: self._of(kind) for name, kind in _kinds(cls).items()}

    def _of(self, kind: Any) -> Any:
        if dataclasses.is_dataclass(kind):
            return typing.cast(Callable[..., Any], kind)(**self.fields(typing.cast(type[Any], kind)))
        if typing.get_origin(kind) is tuple:
            return tuple(self._of(typing.get_args(kind)[0]) for _ in range(self.number() & 15))
        if kind is int:
            return self.any_number()
        if kind is UUID:
            return UUID(bytes=self.take(16).ljust(16, b"\0"))
        if kind is str:
            return self.take(self.number()).decode(errors="replace")
        if kind is bytes:
            return self.take(self.number(2) & 0x3FF)
        raise TypeError(f"no values of {kind}: say here how to make them")


_KINDS: dict[type[Any], dict[str, Any]] = {}


def _kinds(cls: type[Any]) -> dict[str, Any]:
    """The names and types of a class's fields; resolved once, as that takes longer than an input."""
    if cls not in _KINDS:
        hints = typing.get_type_hints(cls)
        _KINDS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _KINDS[cls]
