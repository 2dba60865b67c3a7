"""The input device (virtio 1.3, section 5.8); event types and codes are those of Linux's evdev."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import Annotated

from vbus.virtio import config
from vbus.virtio.config import u8
from vbus.virtio.features import features

FEATURES = features()
EVENTQ, STATUSQ = 0, 1
MAX_DATA = 128
"""Bytes of one answer in config space."""


class Select(IntEnum):
    """What a driver asks config space for (section 5.8.4)."""

    UNSET = 0x00
    ID_NAME = 0x01
    ID_SERIAL = 0x02
    ID_DEVIDS = 0x03
    PROP_BITS = 0x10
    EV_BITS = 0x11
    ABS_INFO = 0x12


class Config(config.Config):
    """Section 5.8.4: 136 bytes. The driver writes `select` and `subsel`, then reads `size` bytes of `data`."""

    select: u8
    subsel: u8
    size_of_data: u8
    reserved: Annotated[bytes, 5]
    data: Annotated[bytes, MAX_DATA]


EVENT = struct.Struct("<HHi")
"""type, code, value (section 5.8.6): one buffer of a queue."""
ABS_INFO = struct.Struct("<IIIII")
"""min, max, fuzz, flat, resolution of an axis."""
DEVIDS = struct.Struct("<HHHH")
"""bustype, vendor, product, version."""
BUS_VIRTUAL = 0x06


class EventType(IntEnum):
    """Kinds of events."""

    SYN = 0x00
    KEY = 0x01
    REL = 0x02
    ABS = 0x03
    LED = 0x11
    REP = 0x14


class Abs(IntEnum):
    """Axes that have a place, not a movement."""

    X = 0x00
    Y = 0x01


class Led(IntEnum):
    """Lights of a keyboard."""

    NUM_LOCK = 0
    CAPS_LOCK = 1
    SCROLL_LOCK = 2


def _row(first: int, names: str) -> dict[str, int]:
    return {name: first + n for n, name in enumerate(names.split())}


KEYS: dict[str, int] = {
    **_row(1, "esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace"),
    **_row(15, "tab q w e r t y u i o p leftbrace rightbrace enter leftctrl"),
    **_row(30, "a s d f g h j k l semicolon apostrophe grave leftshift backslash"),
    **_row(44, "z x c v b n m comma dot slash rightshift"),
    **_row(56, "leftalt space capslock f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 numlock scrolllock"),
    **_row(87, "f11 f12"),
    **_row(102, "home up pageup left right end down pagedown insert delete"),
    "rightctrl": 97,
    "rightalt": 100,
}
"""Keys of a keyboard by name."""

BUTTONS: dict[str, int] = _row(0x110, "left right middle")
"""Buttons of a pointer by name."""


def bits(codes: Iterable[int]) -> bytes:
    """A bitmap with these codes, as short as it can be."""
    bitmap = sum(1 << code for code in set(codes))
    return bitmap.to_bytes((bitmap.bit_length() + 7) // 8, "little")
