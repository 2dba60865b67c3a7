"""The virtio specification (1.3) as data: ids, feature bits, config layouts, device status, ring geometry.

Nothing here does anything; both sides of a bus share it.
"""

from vbus.virtio import blk, console, entropy, features, input, net, ring
from vbus.virtio.config import Config, le16, le32, le64, u8
from vbus.virtio.features import FeatureSet
from vbus.virtio.ids import DeviceID, device_type_name
from vbus.virtio.status import Status

__all__ = [
    "Config",
    "DeviceID",
    "FeatureSet",
    "Status",
    "blk",
    "console",
    "device_type_name",
    "entropy",
    "features",
    "input",
    "le16",
    "le32",
    "le64",
    "net",
    "ring",
    "u8",
]
