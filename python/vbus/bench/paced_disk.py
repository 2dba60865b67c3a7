"""A disk in memory whose service time can be set: what a measurement needs that shows counts against offered load.

Every disk serves one request at a time, in the order of its queue, and each takes as long as was set, on average: times
are distributed exponentially, or disks that begin together would stay in step and answer together. So a disk serves at
most `1 / seconds` requests a second, however many wait, and one that waits for nobody is answered after `seconds`.
With a time of 0 a request is answered in the turn that took it, as fast as can be. All disks of one clock are completed
by one thread, which sleeps until the next is due: nobody polls.
"""

from __future__ import annotations

import heapq
import os
import random
import struct
import threading
import time
from collections.abc import Sequence

from vbus.bus import Queue, Request
from vbus.devices import Blk

BLOCK = 4096


class Clock:
    """When requests are over that take time."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of each request."""
        self._due: list[tuple[float, int, Queue, Request]] = []
        self._order = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
        self._thread.start()

    def add(self, when: float, queue: Queue, request: Request) -> None:
        """Complete a request at a time of `time.monotonic()`."""
        with self._changed:
            self._order += 1
            heapq.heappush(self._due, (when, self._order, queue, request))
            if self._due[0][1] == self._order:
                self._changed.notify()

    def close(self) -> None:
        """End the thread; what is not over by now never is."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                _, _, queue, request = heapq.heappop(self._due)
            queue.complete(request)


class NumberedDisk(Blk):
    """A disk whose blocks of 4 KiB begin with their number, so that a driver can tell whether it got the right one."""

    def __init__(self, blocks: int, engine: str | None = None) -> None:
        super().__init__(memory=blocks * BLOCK, engine=engine)

    def plugged(self) -> None:
        """Number the blocks."""
        super().plugged()
        for number in range(self.config.capacity * 512 // BLOCK):
            os.pwrite(self._fd, struct.pack("<Q", number), number * BLOCK)


class PacedDisk(NumberedDisk):
    """One whose requests take as long as a clock says, on average; `seed`: of what is random."""

    def __init__(self, clock: Clock, blocks: int, seed: int = 0) -> None:
        super().__init__(blocks, "python")
        # What is taken off the ring is given back when its time has come, not at the end of a turn.
        self.declare_queues([Queue("requests", pull=True)])
        self._clock = clock
        self._random = random.Random(seed)
        self._free = 0.0
        """When the disk has served all that it was given."""

    def available(self, queue: Queue) -> None:
        """Serve what there is."""
        while requests := queue.take_batch(64):
            self._serve_each(queue, requests)

    def _serve_each(self, queue: Queue, requests: Sequence[Request]) -> None:
        for request in requests:
            self.handle(queue, request)
        seconds = self._clock.seconds
        if not seconds:
            queue.complete(*requests)
            return
        for request in requests:
            self._free = max(self._free, time.monotonic()) + self._random.expovariate(1 / seconds)
            self._clock.add(self._free, queue, request)
