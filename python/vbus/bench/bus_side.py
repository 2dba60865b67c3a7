"""The side of a measurement that serves: a bus with devices that answer with what they were asked.

Run as a process of its own: `python -m vbus.bench.bus_side`, told what to do by `children`.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vbus import _core
from vbus.bench import children
from vbus.bench.work import DEVICE_ID, Usage, names_checksum, resident_bytes, usage, used_between
from vbus.bus import Bus, Device, Queue, Request, runner
from vbus.connectors import Process

SETTLE_SECONDS = 5.0
LOOK_SECONDS = 0.01
MAX_SOURCES = 16384
"""Room for ten thousand devices; what is not used takes no memory."""


class Echo(Device):
    """Writes back what it reads."""

    device_id = DEVICE_ID
    queues = ("requests",)

    def handle(self, queue: Queue, request: Request) -> None:
        """Answer one request."""
        request.write(request.read())


class Each(Device):
    """Does nothing with a request."""

    device_id = DEVICE_ID
    queues = ("requests",)

    def handle(self, queue: Queue, request: Request) -> None:
        """Do nothing."""


class Together(Device):
    """Does nothing with several requests."""

    device_id = DEVICE_ID
    queues = ("requests",)

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Do nothing."""


class Alone(Device):
    """Has nobody who could do anything: requests are completed without Python."""

    device_id = DEVICE_ID
    queues = ("requests",)
    handle_batch: Any = None


class LookedAt(Device):
    """Looks at each of several requests, and does nothing with it."""

    device_id = DEVICE_ID
    queues = ("requests",)

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Come by each."""
        for _ in requests:
            pass


MODELS: Mapping[str, type[Device]] = {model.__name__: model for model in (Echo, Each, Together, Alone, LookedAt)}


class BusSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._bus: Bus | None = None

    def serve(
        self,
        socket: str,
        signal: Literal["direct", "tunnelled"],
        event_idx: bool,
        devices: Mapping[str, int],
        model: str = "Echo",
        budget: int = runner.BUDGET,
    ) -> str:
        """Serve devices of a model, given by name with their priority, at a socket; the address to attach to.

        `budget`: how many requests are taken together, at most.
        """
        runner.BUDGET = budget
        bus = Bus("bench", max_sources=MAX_SOURCES)
        self._closing.callback(bus.stop)
        for name, priority in devices.items():
            bus.plug(MODELS[model](), name, priority=priority, mask=() if event_idx else ["RING_EVENT_IDX"])
        connector = bus.connect(Process(socket, signal=signal))
        bus.start()
        self._bus = bus
        return connector.address

    def begin(self) -> dict[str, Any]:
        """Counters of every device, and what this process has used: at the beginning of a window, when all is idle."""
        rows = self._settled()
        return {"rows": rows, "usage": usage()}

    def end(self) -> dict[str, Any]:
        """The same at the end of a window: what is used by looking does not belong to it."""
        used: Usage = usage()
        return {"rows": self._settled(), "usage": used}

    def populate(self, count: int) -> dict[str, Any]:
        """Plug so many devices more, which nobody drives; a checksum of all names, and the memory that each takes."""
        assert self._bus is not None
        gc.collect()
        before = resident_bytes()
        for number in range(count):
            self._bus.plug(Echo(), f"idle{number}")
        gc.collect()
        after = resident_bytes()
        names = names_checksum(slot.name for slot in self._bus.slots())
        return {"devices": len(self._bus.slots()), "names": names, "bytes": (after - before) / max(count, 1)}

    def replug(self, cycles: int) -> dict[str, Any]:
        """Plug one device and unplug it, `cycles` times; the median microseconds of each, and how many were there."""
        assert self._bus is not None
        plugs, unplugs = [], []
        for _ in range(cycles):
            began = time.perf_counter_ns()
            self._bus.plug(Echo(), "comer")
            plugged = time.perf_counter_ns()
            self._bus.unplug("comer")
            ended = time.perf_counter_ns()
            plugs.append(plugged - began)
            unplugs.append(ended - plugged)
        return {
            "cycles": len(plugs),
            "plug_us": statistics.median(plugs) / 1000,
            "unplug_us": statistics.median(unplugs) / 1000,
        }

    def calls(self, model: str, count: int, batch: int) -> dict[str, Any]:
        """Call the handler of a model `count` times, or with `batch` requests at once, from native code alone."""
        device = MODELS[model]()
        handler = device.handle_batch if batch else device.handle
        before = usage()
        seconds = _core.bench_calls(handler, device.queue("requests"), count, batch)
        return {"requests": count, "seconds": seconds, "usage": used_between(before, usage())}

    def _settled(self) -> dict[str, Any]:
        """Counters once they stand still: the driver hears its last doorbell a little before that is counted."""
        assert self._bus is not None
        deadline = time.monotonic() + SETTLE_SECONDS
        rows = self._bus.stat()
        while time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            again = self._bus.stat()
            if again == rows:
                return {row["device"]: row for row in rows}
            rows = again
        raise children.SideError(f"the bus is not idle {SETTLE_SECONDS:g} seconds after its last request")

    def close(self) -> None:
        """Stop the bus."""
        self._closing.close()


def main() -> None:
    """Serve until standard input ends."""
    side = BusSide()
    try:
        names = ("serve", "begin", "end", "calls", "populate", "replug")
        children.serve({name: getattr(side, name) for name in names})
    finally:
        side.close()


if __name__ == "__main__":
    main()
