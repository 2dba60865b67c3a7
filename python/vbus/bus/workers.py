"""Native threads that serve queues, and the engines that they run for them.

An engine does natively what the device model does in Python for the same queues: it takes requests off the ring, does
the work and gives them back, without the interpreter. The model goes on to decide everything else, tells the engine
what holds, and hears from it what went wrong.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vbus import _core
from vbus.errors import UsageError

if TYPE_CHECKING:
    from vbus.bus.queue import Queue

POLLING = ("notified", "adaptive", "always")
MAX_WORKERS = 64
DEFAULT_WORKERS = 4
"""Or as many as there are CPUs, when those are fewer. A worker is started when there is an engine for it."""
LEAST_URGENT = 3
"""Of the priorities that are more urgent than what devices have by default."""
URGENT_NICE = -10
"""What whoever serves urgent devices wants of the system's scheduler: to run as soon as there is something to do."""


@dataclass(frozen=True)
class Engine:
    """A native engine, and the queues that it serves, in the order in which it was made with them."""

    core: _core.Engine
    queues: tuple[Queue, ...]
    may_wait: bool = False
    """Whether a turn may have to wait, for a file system: then its worker has no engines of other devices."""


class Workers:
    """The workers of one bus.

    `count`: how many at most; 0: devices are served in Python. `polling`: "notified" (sleep when there is nothing to
    do), "adaptive" (wait a little first, as the load suggests) or "always". `affinity`: CPUs; each worker has one of
    them, in turn. UsageError.
    """

    def __init__(
        self, name: str, count: int | None = None, polling: str = "notified", affinity: Sequence[int] = ()
    ) -> None:
        cpus = os.sched_getaffinity(0)
        if count is None:
            count = min(DEFAULT_WORKERS, len(cpus))
        if not 0 <= count <= MAX_WORKERS:
            raise UsageError(f"workers {count} is out of range: 0 (none) to {MAX_WORKERS}")
        if polling not in POLLING:
            raise UsageError(f"polling {polling!r} is none of {', '.join(POLLING)}")
        for cpu in affinity:
            if cpu not in cpus:
                raise UsageError(f"affinity: there is no CPU {cpu} here; there are {', '.join(map(str, sorted(cpus)))}")
        self.name = name
        self.count = count
        self.polling = polling
        self.affinity = tuple(affinity)
        self._workers: list[_core.Worker] = []
        self._urgent: _core.Worker | None = None
        self._lock = threading.Lock()

    def add(self, engine: _core.Engine, priority: int) -> _core.Task:
        """Have a worker run an engine: one that is not started yet, or that with the fewest.

        Urgent engines have one beside those, which the system's scheduler prefers where that is permitted: they wait
        for nobody's turn to end. Not where workers never sleep, since each takes a CPU there. UsageError when a worker
        cannot be started.
        """
        with self._lock:
            if priority <= LEAST_URGENT and self.polling != "always":
                if self._urgent is None:
                    self._urgent = self._start("vbus-native-urg", list(self.affinity), self.polling, URGENT_NICE)
                return self._urgent.add(engine, priority)
            if len(self._workers) < self.count:
                number = len(self._workers)
                cpus = [self.affinity[number % len(self.affinity)]] if self.affinity else []
                name = f"vbus-native-{number}"
                self._workers.append(self._start(name, cpus, self.polling))
            worker = min(self._workers, key=lambda worker: worker.tasks)
            return worker.add(engine, priority)

    def start_own(self) -> _core.Worker:
        """A worker beside those that all devices share, and not one of `count`, for engines that may wait; it sleeps
        when there is nothing to do. Whoever asks for it closes it. UsageError when it cannot be started.
        """
        return self._start("vbus-native-own", [], "notified")

    def _start(self, name: str, cpus: list[int], polling: str, nice: int = 0) -> _core.Worker:
        try:
            return _core.Worker(name, polling=polling, cpus=cpus, nice=nice)
        except OSError as error:
            where = f" on CPU {cpus[0]}" if cpus else ""
            raise UsageError(f"bus {self.name}: no worker can be started{where}: {error.strerror}") from None

    def counters(self) -> list[tuple[int, int, int, int]]:
        """(turns with work, turns without, times asleep, nanoseconds in turns with work) of each worker."""
        urgent = [self._urgent] if self._urgent is not None else []
        return [worker.counters for worker in [*self._workers, *urgent]]

    def close(self) -> None:
        """End all of them, with their engines."""
        with self._lock:
            workers, self._workers = self._workers, []
            if self._urgent is not None:
                workers.append(self._urgent)
                self._urgent = None
        for worker in workers:
            worker.close()
