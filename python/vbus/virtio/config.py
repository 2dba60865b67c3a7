"""Config space (virtio 1.3, section 2.5): a layout is a class with annotated fields, little-endian, without padding.

    class Config(vbus.Config):
        level: le32 = 100
        flags: u8
        mac: Annotated[bytes, 6]

Declaring the class turns each annotation into a `Field`, one after the other: a layout that the specification pads has
the padding as a field. An instance holds only the bytes that a driver sees; reading an attribute unpacks them, setting
one packs into them, so that there is nothing to keep in step. To a type checker the fields are ints or bytes.
"""

from __future__ import annotations

import inspect
import typing
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

u8 = Annotated[int, 1]
le16 = Annotated[int, 2]
le32 = Annotated[int, 4]
le64 = Annotated[int, 8]

INT_SIZES = (1, 2, 4, 8)


class Field:
    """One field: where it is, in bytes, and what it takes. A descriptor: it is what its attribute reads and writes."""

    def __init__(self, name: str, kind: type, size: int, offset: int) -> None:
        self.name, self.kind, self.size, self.offset = name, kind, size, offset

    def __get__(self, config: Config | None, owner: type) -> Any:
        if config is None:
            return self
        data = config._bytes[self.offset : self.offset + self.size]
        return bytes(data) if self.kind is bytes else int.from_bytes(data, "little")

    def __set__(self, config: Config, value: Any) -> None:
        config._bytes[self.offset : self.offset + self.size] = self.pack(value)

    def pack(self, value: Any) -> bytes:
        """The field's bytes. ValueError, with the field's name, for a value that it does not take."""
        if self.kind is bytes:
            if not isinstance(value, (bytes, bytearray)) or len(value) != self.size:
                raise ValueError(f"{self.name} takes {self.size} bytes, not {value!r}")
            return bytes(value)
        if not isinstance(value, int) or not 0 <= value < 1 << 8 * self.size:
            raise ValueError(f"{self.name} takes a whole number from 0 to {(1 << 8 * self.size) - 1}, not {value!r}")
        return value.to_bytes(self.size, "little")


class Config:
    """The config space of a device class; empty unless a subclass declares fields."""

    __slots__ = ("_bytes",)

    _fields: ClassVar[dict[str, Field]] = {}
    _initial: ClassVar[bytes] = b""
    _bytes: bytearray

    def __init_subclass__(cls) -> None:
        fields = dict(cls._fields)
        initial = bytearray(cls._initial)
        for name, hint in _own_hints(cls).items():
            if name in fields or hasattr(Config, name):
                raise TypeError(f"{cls.__name__}.{name}: this name is taken; choose another one")
            field = Field(name, *_kind_and_size(cls, name, hint), offset=len(initial))
            initial += field.pack(cls.__dict__[name]) if name in cls.__dict__ else bytes(field.size)
            fields[name] = field
            setattr(cls, name, field)
        cls._fields, cls._initial = fields, bytes(initial)

    def __init__(self, **values: int | bytes) -> None:
        """The class's defaults, else zeros, and these values. ValueError; TypeError for a field that there is not."""
        object.__setattr__(self, "_bytes", bytearray(self._initial))
        for name, value in values.items():
            if name not in self._fields:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    if not TYPE_CHECKING:
        # Hidden from type checkers, which would otherwise let every misspelt name pass.
        def __setattr__(self, name: str, value: Any) -> None:
            field = self._fields.get(name)
            if field is None:
                raise AttributeError(f"{type(self).__name__} has no field {name!r}")
            field.__set__(self, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    @property
    def size(self) -> int:
        """Bytes of config space."""
        return len(self._bytes)

    @classmethod
    def offset_of(cls, field: str) -> int:
        """Where a field begins, in bytes. KeyError."""
        return cls._fields[field].offset

    @classmethod
    def size_of(cls, field: str) -> int:
        """Bytes of a field. KeyError."""
        return cls._fields[field].size

    def to_bytes(self) -> bytes:
        """What a driver reads."""
        return bytes(self._bytes)

    @classmethod
    def from_bytes(cls, data: bytes) -> typing.Self:
        """From what a driver read: a shorter space leaves the rest 0, more than is known is left out."""
        config = cls()
        known = data[: config.size]
        config._bytes[:] = known + bytes(config.size - len(known))
        return config

    def to_dict(self) -> dict[str, int | str]:
        """Values by name; bytes in hexadecimal."""
        values = {name: getattr(self, name) for name in self._fields}
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}

    def write(self, offset: int, data: bytes) -> frozenset[str]:
        """Write bytes; the names of the fields that they lie in, changed or not. ValueError outside of config space."""
        end = offset + len(data)
        if offset < 0 or end > self.size:
            raise ValueError(f"bytes {offset} to {end} of a config space of {self.size}")
        self._bytes[offset:end] = data
        return frozenset(
            field.name
            for field in self._fields.values()
            if max(offset, field.offset) < min(end, field.offset + field.size)
        )


def _own_hints(cls: type) -> dict[str, Any]:
    """The annotations that this very class declares, evaluated, with the field kinds known by name."""
    own = [name for name in inspect.get_annotations(cls) if not name.startswith("_")]
    if not own:
        return {}
    known = {"u8": u8, "le16": le16, "le32": le32, "le64": le64}
    hints = typing.get_type_hints(cls, localns=known, include_extras=True)
    return {name: hints[name] for name in own if typing.get_origin(hints[name]) is not ClassVar}


def _kind_and_size(cls: type, name: str, hint: Any) -> tuple[type, int]:
    """What an annotation asks for. TypeError when it is not one of the kinds of fields."""
    if typing.get_origin(hint) is Annotated:
        kind, size = typing.get_args(hint)[:2]
        if (kind is int and size in INT_SIZES) or (kind is bytes and isinstance(size, int) and size > 0):
            return kind, size
    raise TypeError(f"{cls.__name__}.{name}: annotate it with u8, le16, le32, le64 or Annotated[bytes, SIZE]")
