"""The side of a measurement that drives: it offers load, and times every answer.

Three ways of offering it. `saturate` keeps a number of requests of every device outstanding, each answer bringing the
next request, until a fixed number is done. `pace` lets a fixed number of requests arrive at random moments that are the
same in every run, whatever becomes of those before. `urgent` asks one device one thing at a time, with pauses, while
others may be saturated. All answers are compared with what was asked.

Run as a process of its own: `python -m vbus.bench.driver_side`, told what to do by `children`.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from vbus import _core
from vbus.bench import children
from vbus.bench.measure import percentile
from vbus.bench.work import DEVICE_ID, URGENT, Usage, usage, used_between
from vbus.proxy import Driver, Remote, RemoteQueue, attach
from vbus.virtio import features

NANOSECONDS = 1_000_000_000
WAIT_SECONDS = 90.0
"""How long a window may take."""


class Echo(Driver):
    """Drives a device that answers with what it was asked."""

    device_id = DEVICE_ID
    features = features.features()

    @property
    def has_event_idx(self) -> bool:
        """Whether EVENT_IDX was negotiated."""
        return bool(self.device.negotiated >> features.RING_EVENT_IDX & 1)


class Window:
    """Counts flows that are under way, and keeps what went wrong."""

    def __init__(self, flows: int) -> None:
        self._left = flows
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.last = 0
        """When the last answer came, in nanoseconds."""

    def flow_ended(self) -> None:
        """One flow has its last answer."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.last = time.perf_counter_ns()
                self._ended.set()

    def failed(self, error: BaseException) -> None:
        """A request failed: there is nothing to measure any more."""
        self._error = error
        self._ended.set()

    def wait(self, timeout: float = WAIT_SECONDS) -> None:
        """Wait for all flows. SideError when one failed, or does not end."""
        if not self._ended.wait(timeout):
            raise children.SideError(f"requests are not answered within {timeout:g} seconds")
        self.check()

    def check(self) -> None:
        """SideError when something went wrong so far."""
        if self._error is not None:
            raise children.SideError(f"a request failed: {self._error}")


class Answer:
    """What becomes of one request."""

    __slots__ = ("began", "flow")

    def __init__(self, flow: Flow, began: int = 0) -> None:
        self.flow = flow
        self.began = began

    def set_result(self, result: bytes, /) -> None:
        """The device answered. On the loop's thread."""
        self.flow.answered(self, result)

    def set_exception(self, exception: BaseException, /) -> None:
        """The request failed."""
        self.flow.window.failed(exception)


class Flow:
    """Requests of one device, `total` of them."""

    def __init__(self, queue: RemoteQueue, payload: bytes, window: Window, total: int) -> None:
        self.queue = queue
        self.payload = payload
        self.window = window
        self.total = total
        self.times: list[int] = []
        """Nanoseconds from when a request was due until its answer was here."""
        self.bytes_received = 0
        self.wrong = 0

    def submit(self, answers: Sequence[Answer]) -> None:
        """Ask the same thing once for every answer that is to come."""
        self.queue.submit_many([(answer, (self.payload,), len(self.payload)) for answer in answers])

    def answered(self, answer: Answer, result: bytes) -> None:
        """Take the time, and compare."""
        self.times.append(time.perf_counter_ns() - answer.began)
        self.bytes_received += len(result)
        if result != self.payload:
            self.wrong += 1
        self.next(answer)

    def next(self, answer: Answer) -> None:
        """An answer was taken: end, when it was the last."""
        if len(self.times) == self.total:
            self.window.flow_ended()

    def work(self) -> dict[str, int]:
        """What was done, for comparison."""
        done = len(self.times)
        sent = done * len(self.payload)
        return {"requests": done, "bytes_sent": sent, "bytes_received": self.bytes_received, "wrong": self.wrong}


class ClosedFlow(Flow):
    """Keeps `depth` requests outstanding: each answer brings the next request."""

    def __init__(self, queue: RemoteQueue, payload: bytes, window: Window, total: int, depth: int) -> None:
        super().__init__(queue, payload, window, total)
        self.depth = min(depth, total)
        self._submitted = 0

    def start(self) -> None:
        """Submit the first requests, shown to the device together."""
        self._submitted = self.depth
        now = time.perf_counter_ns()
        self.submit([Answer(self, now) for _ in range(self.depth)])

    def next(self, answer: Answer) -> None:
        """Submit the next request, or end."""
        if self._submitted < self.total:
            self._submitted += 1
            answer.began = time.perf_counter_ns()
            try:
                self.submit([answer])
            except Exception as error:
                self.window.failed(error)
        elif len(self.times) == self._submitted:
            self.window.flow_ended()

    def stop(self) -> None:
        """Let what is outstanding end, and no more."""
        self.total = 0


class SingleFlow(Flow):
    """One request at a time, each waited for."""

    def __init__(self, queue: RemoteQueue, payload: bytes, window: Window, total: int) -> None:
        super().__init__(queue, payload, window, total)
        self._answered = threading.Semaphore(0)

    def ask(self) -> None:
        """Ask, and wait for the answer. SideError."""
        self.submit([Answer(self, time.perf_counter_ns())])
        if not self._answered.acquire(timeout=WAIT_SECONDS):
            raise children.SideError(f"a request is not answered within {WAIT_SECONDS:g} seconds")

    def next(self, answer: Answer) -> None:
        """Let the one who waits go on."""
        self._answered.release()


class DriverSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._remote: Remote | None = None
        self._drivers: dict[str, Echo] = {}

    def attach(self, address: str) -> dict[str, bool]:
        """Attach, and drive every device; of each, whether EVENT_IDX was negotiated."""
        remote = self._closing.enter_context(attach(address))
        self._drivers = {device.name: Echo(device) for device in remote}
        return {name: driver.has_event_idx for name, driver in self._drivers.items()}

    def _queue(self, name: str) -> RemoteQueue:
        return self._drivers[name].queue(0)

    def _payload(self, name: str, size: int) -> bytes:
        """Bytes that differ between devices."""
        return bytes([sorted(self._drivers).index(name) + 1]) * size

    def saturate(self, each: int, depth: int, size: int) -> dict[str, Any]:
        """`each` requests of `size` bytes of every device, `depth` of them outstanding."""
        window = Window(len(self._drivers))
        flows = {
            name: ClosedFlow(self._queue(name), self._payload(name, size), window, each, depth)
            for name in self._drivers
        }

        def run() -> None:
            for flow in flows.values():
                flow.start()
            window.wait()

        return _measured(run, window, flows)

    def pace(self, total: int, rate: float, size: int, seed: int) -> dict[str, Any]:
        """`total` requests, `rate` a second on average, each of any device: the same ones in every run."""
        arrivals = arrivals_of(sorted(self._drivers), total, rate, seed)
        counts = {name: sum(name == other for _, other in arrivals) for name in self._drivers}
        window = Window(sum(count > 0 for count in counts.values()))
        flows = {
            name: Flow(self._queue(name), self._payload(name, size), window, count) for name, count in counts.items()
        }

        def run() -> None:
            began = time.perf_counter_ns()
            for offset, name in arrivals:
                due = began + offset
                wait = due - time.perf_counter_ns()
                if wait > 0:
                    time.sleep(wait / NANOSECONDS)
                # From when it was due: what waits because others are slow has waited.
                flows[name].submit([Answer(flows[name], due)])
            window.wait()

        return _measured(run, window, flows)

    def urgent(self, total: int, pause: float, size: int, depth: int, seed: int) -> dict[str, Any]:
        """`total` requests of the urgent device, one at a time, `pause` seconds apart on average.

        With a `depth`, all other devices are saturated from before the first until after the last.
        """
        others = [name for name in self._drivers if name != URGENT] if depth else []
        bulk = Window(len(others))
        flows = {
            name: ClosedFlow(self._queue(name), self._payload(name, size), bulk, 1 << 62, depth) for name in others
        }
        single = SingleFlow(self._queue(URGENT), self._payload(URGENT, size), Window(1), total)
        chance = random.Random(seed)
        for flow in flows.values():
            flow.start()
        _until_under_way(flows, bulk)
        before = {name: len(flow.times) for name, flow in flows.items()}

        def run() -> None:
            for _ in range(total):
                time.sleep(chance.uniform(0, 2 * pause))
                single.ask()
                single.window.check()
            single.window.flow_ended()

        measured = _measured(run, single.window, {URGENT: single})
        moved = sum(len(flow.times) - before[name] for name, flow in flows.items())
        for flow in flows.values():
            flow.stop()
        if flows:
            bulk.wait()
        work = {name: flow.work() for name, flow in flows.items()}
        return measured | {"bulk": work, "bulk_requests": moved}

    def load(self, name: str, total: int, depth: int, readable: int, writable: int, written: int) -> dict[str, Any]:
        """`total` requests of one device, `depth` of them outstanding, without Python, which polls for answers."""
        with self._queue(name).lent(_core.Load.bytes_needed(depth, readable + writable)) as (ring, arena, place):
            native = _core.Load(ring, arena.mapping, arena.address, place, depth)
            return dict(native.numbered(total, readable, writable, written))

    def close(self) -> None:
        """Part from the bus."""
        self._drivers = {}
        self._closing.close()


def arrivals_of(names: Sequence[str], total: int, rate: float, seed: int) -> list[tuple[int, str]]:
    """(nanoseconds from the beginning, device) of requests that come at random: the same for the same arguments."""
    chance = random.Random(seed)
    at = 0.0
    arrivals = []
    for _ in range(total):
        at += chance.expovariate(rate)
        arrivals.append((int(at * NANOSECONDS), chance.choice(names)))
    return arrivals


def _until_under_way(flows: dict[str, ClosedFlow], window: Window) -> None:
    """Wait until every flow has come round a few times."""
    deadline = time.monotonic() + WAIT_SECONDS
    while any(len(flow.times) < 4 * flow.depth for flow in flows.values()):
        window.check()
        if time.monotonic() > deadline:
            raise children.SideError("the bulk load does not get under way")
        time.sleep(0.005)


def _measured(run: Callable[[], None], window: Window, flows: dict[str, Any]) -> dict[str, Any]:
    """What was done in a window, how long it took, and what this process used for it."""
    used_before: Usage = usage()
    began = time.perf_counter_ns()
    run()
    used = used_between(used_before, usage())
    times = sorted(taken for flow in flows.values() for taken in flow.times)
    return {
        "work": {name: flow.work() for name, flow in flows.items()},
        "seconds": (window.last - began) / NANOSECONDS,
        "usage": used,
        "p50_us": percentile(times, 50) / 1000,
        "p99_us": percentile(times, 99) / 1000,
        "max_us": times[-1] / 1000,
    }


def main() -> None:
    """Drive until standard input ends."""
    side = DriverSide()
    try:
        commands = {name: getattr(side, name) for name in ("attach", "saturate", "pace", "urgent", "load")}
        children.serve(commands)
    finally:
        side.close()


if __name__ == "__main__":
    main()
