"""A side of a measurement of networks: one that serves a loopback behind vhost-user, or a driver of such a device.

Run as a process of its own: `python -m vbus.bench.net_side`, told what to do by `children`.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, ClassVar, Literal

from vbus import _core, virtio
from vbus.bench import children
from vbus.bench.work import threads_of
from vbus.bus import Bus
from vbus.connectors import VhostUser
from vbus.devices.net import Net
from vbus.proxy import Driver, attach

RECEIVE, TRANSMIT = 0, 1


class Pair(Driver):
    """Drives one pair of queues, and nothing else of the card."""

    device_id = virtio.DeviceID.NETWORK
    features = virtio.net.FEATURES
    wanted: ClassVar[tuple[str, ...]] = ("MRG_RXBUF",)
    queue_count = 2


class NetSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._bus: Bus | None = None
        self._net = Net()

    def serve(self, socket: str, engine: Literal["native", "python"], polling: str, cpu: int) -> dict[str, Any]:
        """Serve a loopback at a socket, with all threads on one CPU; what it is made with."""
        os.sched_setaffinity(0, {cpu})
        bus = Bus("bench", workers=1, polling=polling, affinity=[cpu])
        self._closing.callback(bus.stop)
        self._net = bus.plug(Net(backend="loopback", engine=engine), "net0")
        bus.connect(VhostUser(self._net, socket), "vm")
        bus.start()
        self._bus = bus
        return {"backend": "loopback", "engine": engine, "workers": 1, "polling": polling, "affinity": [cpu]}

    def look(self) -> dict[str, Any]:
        """Frames taken, given back and dropped so far, and the nanoseconds that threads and workers have used."""
        assert self._bus is not None
        net = self._net
        return {
            "taken": net.tx_packets,
            "taken_bytes": net.tx_bytes,
            "given": net.rx_packets,
            "dropped": net.rx_dropped + net.tx_dropped,
            "busy": sum(busy for *_, busy in self._bus.workers.counters()),
            "threads": threads_of(os.getpid()),
        }

    def bursts(self, socket: str, packed: bool, count: int, burst: int, size: int, cpu: int) -> dict[str, Any]:
        """Drive the device at a socket: a frame of `size` bytes alone, and `burst` of them at once, `count` times."""
        os.sched_setaffinity(0, {cpu})
        needed = _core.Frames.bytes_needed(burst, size)
        with attach(f"vhost-user:{socket}", device_id=Pair.device_id) as remote, contextlib.ExitStack() as stack:
            [device] = remote
            driver = remote.driver(device.name, Pair, packed=packed)
            if bool(driver.device.negotiated >> virtio.features.RING_PACKED & 1) != packed:
                raise children.SideError("the back-end has no such rings")
            lent = []
            for index in (RECEIVE, TRANSMIT):
                ring, arena, place = stack.enter_context(driver.queue(index).lent(needed))
                stack.enter_context(remote.connector.lent_bell(device, index))
                lent.append((ring, arena.mapping, arena.address, place))
            return dict(_core.Frames(*lent).run(count, burst, size))

    def close(self) -> None:
        """Stop the bus."""
        self._closing.close()


def main() -> None:
    """Serve until standard input ends."""
    side = NetSide()
    try:
        children.serve({name: getattr(side, name) for name in ("serve", "look", "bursts")})
    finally:
        side.close()


if __name__ == "__main__":
    main()
