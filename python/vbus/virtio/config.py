"""Config space (virtio 1.3, section 2.5): a layout is a class with annotated fields, little-endian, without padding.

    class Config(vbus.Config):
        level: le32
        flags: u8
        mac: raw6          # raw6 = Annotated[bytes, 6]

An instance holds the values; its bytes are what a driver sees. Fields are ints or bytes to a type checker.
"""

from __future__ import annotations

import inspect
import typing
from typing import Annotated, Any, ClassVar

u8 = Annotated[int, 1]
le16 = Annotated[int, 2]
le32 = Annotated[int, 4]
le64 = Annotated[int, 8]


class _Field:
    """Where a field is, and what it takes."""

    def __init__(self, name: str, kind: type, size: int, offset: int) -> None:
        self.name, self.kind, self.size, self.offset = name, kind, size, offset

    def pack(self, value: Any) -> bytes:
        if self.kind is bytes:
            if not isinstance(value, (bytes, bytearray)) or len(value) != self.size:
                raise ValueError(f"{self.name} takes {self.size} bytes")
            return bytes(value)
        if not isinstance(value, int) or not 0 <= value < 1 << 8 * self.size:
            raise ValueError(f"{self.name} takes a whole number from 0 to {(1 << 8 * self.size) - 1}, not {value!r}")
        return value.to_bytes(self.size, "little")

    def unpack(self, data: bytes) -> int | bytes:
        return data if self.kind is bytes else int.from_bytes(data, "little")


class Config:
    """The config space of a device class; empty unless a subclass declares fields."""

    _fields: ClassVar[dict[str, _Field]] = {}

    def __init_subclass__(cls) -> None:
        fields = dict(cls._fields)
        at = sum(field.size for field in fields.values())
        for name, hint in _own_hints(cls).items():
            if name.startswith("_"):
                continue
            if typing.get_origin(hint) is not Annotated:
                raise TypeError(f"{cls.__name__}.{name}: annotate it with u8, le16, le32, le64 or Annotated[bytes, SIZE]")
            kind, size = typing.get_args(hint)[:2]
            fields[name] = _Field(name, kind, size, at)
            at += size
        cls._fields = fields

    def __init__(self, **values: int | bytes) -> None:
        self._bytes = bytearray(sum(field.size for field in self._fields.values()))
        for name, value in values.items():
            if name not in self._fields:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        field = type(self)._fields.get(name)
        if field is None:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        return field.unpack(bytes(self._bytes[field.offset : field.offset + field.size]))

    def __setattr__(self, name: str, value: Any) -> None:
        field = type(self)._fields.get(name)
        if field is not None:
            self._bytes[field.offset : field.offset + field.size] = field.pack(value)
        elif name == "_bytes":
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")

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
        config._bytes[: len(known)] = known
        return config

    def to_dict(self) -> dict[str, int | str]:
        """Values by name; bytes in hexadecimal."""
        values = {name: getattr(self, name) for name in self._fields}
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}

    def write(self, offset: int, data: bytes) -> frozenset[str]:
        """Write bytes; the names of the fields that they touch. ValueError outside of config space."""
        end = offset + len(data)
        if offset < 0 or end > self.size:
            raise ValueError(f"bytes {offset} to {end} of a config space of {self.size}")
        self._bytes[offset:end] = data
        return frozenset(
            field.name for field in self._fields.values() if offset < field.offset + field.size and field.offset < end
        )


def _own_hints(cls: type) -> dict[str, Any]:
    """The annotations that this very class declares, evaluated, with the field kinds known by name."""
    own = inspect.get_annotations(cls)
    if not own:
        return {}
    known = {"u8": u8, "le16": le16, "le32": le32, "le64": le64}
    hints = typing.get_type_hints(cls, localns=known, include_extras=True)
    return {name: hints[name] for name in own if typing.get_origin(hints[name]) is not ClassVar}
