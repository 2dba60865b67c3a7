"""What a front-end of vhost-user has to know of a device class, because no message of the protocol tells it.

How many queues a class has where a back-end does not count them, how long its config space is, and which class is the
front-end's own in part: a network's back-end moves frames, and knows of no address, link or control queue.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from vbus import virtio
from vbus.vhost_user.messages import MAX_CONFIG
from vbus.virtio import DeviceID
from vbus.virtio.net import CONTROL, ControlClass, LinkStatus, MqCommand


@dataclass(frozen=True)
class DeviceClass:
    """A class as the protocol leaves it to be known.

    `queues`: how many there are when the back-end does not say. `config_size`: bytes of config space that are asked
    for. `queues_each`: queues that count as one where a back-end counts them.
    """

    queues: int = 1
    config_size: int = MAX_CONFIG
    queues_each: int = 1


CLASSES: dict[int, DeviceClass] = {
    DeviceID.NETWORK: DeviceClass(queues=2, config_size=virtio.net.Config().size, queues_each=2),
    DeviceID.BLOCK: DeviceClass(config_size=virtio.blk.Config().size),
    DeviceID.CONSOLE: DeviceClass(queues=2, config_size=virtio.console.Config().size),
    DeviceID.ENTROPY: DeviceClass(config_size=0),
    DeviceID.INPUT: DeviceClass(queues=2, config_size=virtio.input.Config().size),
}


def class_of(device_id: int) -> DeviceClass:
    """The row of a class; of one that nobody wrote down, as much config space as a message takes."""
    return CLASSES.get(device_id, DeviceClass())


_NET = virtio.net.FEATURES
_FRAMES = _NET.mask(
    [
        *("CSUM", "GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO", "GUEST_USO4", "GUEST_USO6"),
        *("HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_UFO", "HOST_USO", "MRG_RXBUF", "GUEST_HDRLEN"),
    ]
)
"""Bits about frames, which the back-end moves: these are its to offer. All others are about what the front-end has."""
_OWN = _NET.mask(["MAC", "STATUS"])
_SEVERAL = _NET.mask(["MQ", "CTRL_VQ"])
TRANSPORT = ((1 << 42) - 1) & ~((1 << 24) - 1)
"""Bits 24 to 41, which no class has for itself."""


class OwnNet:
    """The front-end's part of a network: config space, and the commands that choose how many pairs are in use."""

    def __init__(self, pairs: int, mac: bytes | None) -> None:
        self.pairs = pairs
        mac = mac if mac is not None else bytes([0x52, 0x54, 0x00]) + os.urandom(3)
        self.config = virtio.net.Config(mac=mac, status=int(LinkStatus.LINK_UP), max_virtqueue_pairs=pairs)

    def offered(self, by_back_end: int) -> int:
        """What drivers are offered of what the back-end offers."""
        own = _OWN | (_SEVERAL if self.pairs > 1 else 0)
        return by_back_end & (_FRAMES | TRANSPORT) | own

    @staticmethod
    def told(chosen: int, by_back_end: int) -> int:
        """What the back-end is told of a driver's choice: that there are several pairs, if it wants to know."""
        return chosen & by_back_end & (_FRAMES | TRANSPORT | _NET.mask(["MQ"]))

    def pairs_asked(self, command: bytes) -> int | None:
        """How many pairs a command of the control queue wants; None for a command that is not served here."""
        kind, value = command[: CONTROL.size], command[CONTROL.size :]
        if kind != CONTROL.pack(ControlClass.MQ, MqCommand.VQ_PAIRS_SET) or len(value) != 2:
            return None
        pairs = int.from_bytes(value, "little")
        return pairs if 1 <= pairs <= self.pairs else None
