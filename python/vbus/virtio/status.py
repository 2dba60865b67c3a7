"""Device status (virtio 1.4, section 2.1): how far a driver has come, and whether something broke."""

from __future__ import annotations

from enum import IntFlag


class Status(IntFlag):
    """The bits of the device status field."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128

    @property
    def names(self) -> list[str]:
        """The names of the bits that are set, in the order in which a driver sets them; unknown ones as `bit N`."""
        known = [bit for bit in _ORDER if bit & self]
        unknown = [f"bit {n}" for n in range(8) if int(self) >> n & 1 and 1 << n not in {int(bit) for bit in _ORDER}]
        return [str(bit.name) for bit in known] + unknown


_ORDER = (
    Status.ACKNOWLEDGE,
    Status.DRIVER,
    Status.FEATURES_OK,
    Status.DRIVER_OK,
    Status.SUSPEND,
    Status.DEVICE_NEEDS_RESET,
    Status.FAILED,
)
