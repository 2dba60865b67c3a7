"""The console device (virtio 1.3, section 5.3)."""

from __future__ import annotations

import struct
from enum import IntEnum

from vbus.virtio import config
from vbus.virtio.config import le16, le32
from vbus.virtio.features import features

FEATURES = features(SIZE=0, MULTIPORT=1, EMERG_WRITE=2)
RECEIVEQ, TRANSMITQ = 0, 1
"""The queues of port 0."""
CONTROL_RECEIVEQ, CONTROL_TRANSMITQ = 2, 3
"""They are there with MULTIPORT only."""


def port_queues(port: int) -> tuple[int, int]:
    """The receive and the transmit queue of a port: the control queues are between those of port 0 and port 1."""
    return (RECEIVEQ, TRANSMITQ) if port == 0 else (2 * port + 2, 2 * port + 3)


class Config(config.Config):
    """Section 5.3.4: 12 bytes."""

    cols: le16
    rows: le16
    max_nr_ports: le32
    emerg_wr: le32


CONTROL = struct.Struct("<IHH")
"""A control message: port id, event, value (section 5.3.6.2). RESIZE and PORT_NAME have more behind it."""
RESIZE = struct.Struct("<HH")
"""cols, rows: what follows RESIZE. Most releases of Linux take the rows first, against the specification."""


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
