"""Sizes as people write them: "64 MiB" in a file or on the command line, bytes everywhere else."""

from __future__ import annotations

import re

from vbus.errors import UsageError

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
LARGEST = (1 << 63) - 1
"""The largest offset that a file can have."""

_SIZE = re.compile(r"\s*([0-9]+)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str, what: str = "size") -> int:
    """The bytes that a number or a text such as "64 MiB" means. `what` names the value in errors.

    UsageError: not a whole number with B, KiB, MiB, GiB or TiB behind it, or more than a file can hold.
    """
    if isinstance(value, bool):
        raise UsageError(f"{what}: {value} is no size: write a number of bytes, or a text such as '64 MiB'")
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.fullmatch(value)
        if match is None:
            raise UsageError(f"{what}: {value!r} is no size: write a number of bytes, or a text such as '64 MiB'")
        number, unit = match.groups()
        if unit and unit not in UNITS:
            raise UsageError(f"{what}: {value!r}: {unit!r} is no unit here: use one of {', '.join(UNITS)}")
        # Digits beyond any size are refused before Python would turn them into a number of that length.
        size = int(number) * UNITS[unit or "B"] if len(number) <= 20 else LARGEST + 1
    if not 0 <= size <= LARGEST:
        raise UsageError(f"{what}: {value!r} is out of range: 0 to {format_size(LARGEST)}")
    return size


def format_size(size: int) -> str:
    """The shortest exact way to write a number of bytes: "64 MiB", "1000 B"."""
    for unit, factor in reversed(UNITS.items()):
        if size >= factor and size % factor == 0:
            return f"{size // factor} {unit}"
    return f"{size} B"
