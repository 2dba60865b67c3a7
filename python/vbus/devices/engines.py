"""Which of its two engines serves a device: a native one of the core, or the model's own code in Python."""

from __future__ import annotations

from vbus.bus import Device
from vbus.errors import UsageError

ENGINES = ("native", "python")


def check_engine(kind: str, engine: str | None) -> str | None:
    """What was asked for: "native", "python", or None for native where that is possible. UsageError."""
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"{kind}: engine {engine!r}: it is native or python")
    return engine


def not_native(device: Device, wanted: str | None, reason: str) -> None:
    """A device cannot have native engines, or shall not; says so. UsageError when they were asked for."""
    if wanted == "native":
        raise UsageError(f"{device.name}: engine native: {reason}")
    device.no_engine = reason
