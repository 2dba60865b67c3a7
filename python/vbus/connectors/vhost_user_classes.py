"""What front-ends keep to themselves, by device class: so that neither devices nor the protocol have to know.

A hypervisor shows the guest a device of its own making, and asks the back-end for what it has not got. What it never
asks for, a change on our side cannot reach; who makes one hears why.
"""

from __future__ import annotations

from dataclasses import dataclass

from vbus import virtio
from vbus.virtio import DeviceID


@dataclass(frozen=True)
class FrontEndOwns:
    """A class as a front-end sees it.

    `config`: whether config space is asked for here at all. `forwarded`: the fields whose change reaches the guest;
    None: all of them. `why` is said of every other. `queues_each`: queues that count as one where queues are counted.
    `queues_own`: queues at the end that the front-end serves itself; `features_own`: bits that it answers for to its
    guest and need not tell, of which the device must know all the same.
    """

    config: bool = True
    forwarded: frozenset[str] | None = None
    why: str = ""
    queues_each: int = 1
    queues_own: int = 0
    features_own: int = 0


CLASSES: dict[int, FrontEndOwns] = {
    DeviceID.NETWORK: FrontEndOwns(
        config=False,
        forwarded=frozenset(),
        why="the hypervisor has a MAC, an MTU and a link of its own: set them there (QMP: set_link)",
        queues_each=2,
        queues_own=1,
        features_own=1 << virtio.net.FEATURES.bit("MQ"),
    ),
    DeviceID.BLOCK: FrontEndOwns(
        forwarded=frozenset({"capacity"}), why="of a disk, the hypervisor tells its guest a new capacity and no more"
    ),
    # A front-end of this class warns of config space that it did not expect.
    DeviceID.ENTROPY: FrontEndOwns(config=False),
}


def owns(device_id: int) -> FrontEndOwns:
    """The row of a class; one that nobody wrote down is forwarded whole."""
    return CLASSES.get(device_id, FrontEndOwns())
