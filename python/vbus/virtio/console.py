"""The console device (virtio 1.3, section 5.3)."""

from __future__ import annotations

import struct
from enum import IntEnum

from vbus.virtio import config
from vbus.virtio.config import le16, le32
from vbus.virtio.features import features

FEATURES = features(SIZE=0, MULTIPORT=1, EMERG_WRITE=2)
RECEIVEQ, TRANSMITQ = 0, 1


class Config(config.Config):
    """Section 5.3.4."""

    cols: le16
    rows: le16
    max_nr_ports: le32
    emerg_wr: le32


CONTROL = struct.Struct("<IHH")
"""A control message: port id, event, value (section 5.3.6.2)."""


class ControlEvent(IntEnum):
    """Events of the control queues."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7
