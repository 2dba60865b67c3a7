"""vbus: a virtual bus for virtio. A device model is written once, in Python, and reached from any environment.

What a user types is here and loaded when it is first used, so that `import vbus` costs nothing that is not asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbus import connectors, devices, virtio
    from vbus.bus import Bus, Device, Queue, Request, attribute
    from vbus.errors import DriverError, Error, NoSuchNameError, UsageError, Violation
    from vbus.proxy import Driver, Remote, RemoteDevice, drivers
    from vbus.proxy.attach import attach
    from vbus.virtio import Config, DeviceID, Status, le16, le32, le64, u8
    from vbus.virtio.features import features

__version__ = "0.1.0"

_PLACES = {
    "vbus": ("connectors", "devices", "virtio"),
    "vbus.proxy": ("drivers",),
    "vbus.bus:": ("Bus", "Device", "Queue", "Request", "attribute"),
    "vbus.errors:": ("DriverError", "Error", "NoSuchNameError", "UsageError", "Violation"),
    "vbus.proxy:": ("Driver", "Remote", "RemoteDevice", "attach"),
    "vbus.virtio:": ("Config", "DeviceID", "Status", "le16", "le32", "le64", "u8"),
    "vbus.virtio.features:": ("features",),
}
_NAMES = {name: place for place, names in _PLACES.items() for name in names}

__all__ = [
    "Bus",
    "Config",
    "Device",
    "DeviceID",
    "Driver",
    "DriverError",
    "Error",
    "NoSuchNameError",
    "Queue",
    "Remote",
    "RemoteDevice",
    "Request",
    "Status",
    "UsageError",
    "Violation",
    "attach",
    "attribute",
    "connectors",
    "devices",
    "drivers",
    "features",
    "le16",
    "le32",
    "le64",
    "u8",
    "virtio",
]


def __getattr__(name: str) -> Any:
    place = _NAMES.get(name)
    if place is None:
        raise AttributeError(f"module 'vbus' has no attribute {name!r}")
    if place.endswith(":"):
        value = getattr(importlib.import_module(place[:-1]), name)
    else:
        value = importlib.import_module(f"{place}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
