"""A queue as a driver uses it: submit buffers, get a future of what the device wrote.

The queue copies what the device shall read into the arena, adds the chain to its ring, and resolves the future when the
ring gives it back. More requests than the ring or the arena takes wait here, in order; nothing blocks.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from vbus import _core
from vbus.errors import DriverError, Violation

if TYPE_CHECKING:
    from vbus.proxy.remote import RemoteDevice
    from vbus.shmem.arena import Arena

Buffer = bytes | bytearray | memoryview
BATCH = 32
"""Requests that are finished in one turn: what is more urgent waits for no more callbacks than theirs."""


class Answer(Protocol):
    """Where what becomes of a request goes: a future, or whatever else has these two. Neither may wait for the bus."""

    def set_result(self, result: bytes, /) -> None:
        """The device has finished, and written these bytes. In the ring's order."""

    def set_exception(self, exception: BaseException, /) -> None:
        """The request failed, with a DriverError. On any thread."""


class RemoteQueue:
    """One virtqueue from the driver's side. Any thread may submit."""

    def __init__(
        self, device: RemoteDevice, index: int, arena: Arena, arena_lock: threading.Lock, ring: _core.DriverQueue
    ) -> None:
        self.device = device
        self.index = index
        self._arena = arena
        self._arena_lock = arena_lock
        self._ring = ring
        self._lock = threading.Lock()
        # Futures are resolved in the ring's order, whichever threads find that they can be.
        self._reaping = threading.Lock()
        self._pending: dict[int, tuple[Answer, int, int, int]] = {}
        self._waiting: deque[tuple[Answer, Sequence[Buffer], int]] = deque()
        self._error: DriverError | None = None
        self.requests = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def size(self) -> int:
        """Descriptors of the ring."""
        return self._ring.size

    @contextlib.contextmanager
    def lent(self, size: int) -> Iterator[tuple[_core.DriverQueue, Arena, int]]:
        """The ring, the arena, and the offset of `size` bytes in it, for who drives the ring in this queue's place.

        Nothing may be submitted here meanwhile. DriverError ENOMEM.
        """
        with self._arena_lock:
            place = self._arena.take(size)
        if place is None:
            raise DriverError(errno.ENOMEM, f"no room for {size} bytes in the arena")
        try:
            yield self._ring, self._arena, place
        finally:
            self._give_back(place)

    @property
    def outstanding(self) -> int:
        """Requests that the device has, and that wait here for room."""
        return len(self._pending) + len(self._waiting)

    def submit(self, readable: Sequence[Buffer], writable: int) -> Future[bytes]:
        """Ask the device: it may read `readable`, each a descriptor of its own, and write `writable` bytes.

        The future gives the bytes that the device wrote (its used length), or raises DriverError: ENODEV, EIO,
        ECONNRESET, ESHUTDOWN (the device was reset here). The future's callbacks must not wait for the bus.
        ValueError when there is nothing to send, EMSGSIZE when it is more than the link or the arena ever takes.
        """
        future: Future[bytes] = Future()
        future.set_running_or_notify_cancel()
        self.submit_many([(future, readable, writable)])
        return future

    def submit_many(self, requests: Iterable[tuple[Answer, Sequence[Buffer], int]]) -> None:
        """Submit several, shown to the device together: (what is told the outcome, readable, writable) each.

        Raises what `submit` raises, and then none of them is submitted.
        """
        limit = min(self._arena.largest, self.device.max_request or self._arena.largest)
        checked = []
        for answer, parts, writable in requests:
            readable = [part for part in parts if len(part)]
            total = sum(map(len, readable)) + writable
            if total == 0:
                raise ValueError("a request needs bytes to read or room to write")
            if total > limit:
                raise DriverError(errno.EMSGSIZE, f"a request of {total} bytes; {limit} is the most here")
            checked.append((answer, readable, writable, total))
        with self._lock:
            if self._error is not None:
                raise DriverError(self._error.errno or errno.EIO, self._error.strerror)
            added = False
            for answer, readable, writable, total in checked:
                if self._waiting or not self._add(answer, readable, writable, total):
                    self._waiting.append((answer, [bytes(part) for part in readable], writable))
                else:
                    added = True
            if added:
                self._ring.publish()

    def _add(self, future: Answer, readable: Sequence[Buffer], writable: int, total: int) -> bool:
        """Put a request on the ring, unpublished; False when there is no room now."""
        with self._arena_lock:
            start = self._arena.take(total)
        if start is None:
            return False
        view, base = self._arena.view, self._arena.address
        at = start
        places = []
        for part in readable:
            view[at : at + len(part)] = part
            places.append((base + at, len(part)))
            at += len(part)
        token = self._ring.add(places, [(base + at, writable)] if writable else [])
        if token is None:
            self._give_back(start)
            return False
        self._pending[token] = (future, start, at, writable)
        self.requests += 1
        self.bytes_sent += at - start
        return True

    def _give_back(self, start: int) -> None:
        with self._arena_lock:
            self._arena.give_back(start)

    def reap(self) -> bool:
        """Resolve what the device has finished, and add what waited for room. True when there may be more."""
        with self._reaping:
            return self._reap()

    def _reap(self) -> bool:
        finished: list[tuple[Answer, bytes]] = []
        with self._lock:
            if self._error is not None:
                return False
            try:
                used = self._ring.reap(BATCH)
            except Violation as violation:
                # The device lied about its used ring: nothing that this queue says can be believed any more.
                self.device.broken(f"the device broke its ring: {violation}")
                return False
            for token, written in used:
                future, start, at, writable = self._pending.pop(token)
                finished.append((future, bytes(self._arena.view[at : at + min(written, writable)])))
                self._give_back(start)
                self.bytes_received += min(written, writable)
            added = False
            while self._waiting:
                future, readable, writable = self._waiting[0]
                if not self._add(future, readable, writable, sum(map(len, readable)) + writable):
                    break
                self._waiting.popleft()
                added = True
            if added:
                self._ring.publish()
        for future, data in finished:
            future.set_result(data)
        return len(used) == BATCH

    def fail(self, error: DriverError) -> None:
        """End every outstanding request with this error, and refuse new ones."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            futures = [pending[0] for pending in self._pending.values()] + [waiting[0] for waiting in self._waiting]
            starts = [pending[1] for pending in self._pending.values()]
            self._pending.clear()
            self._waiting.clear()
        self._orphans = starts
        for future in futures:
            future.set_exception(DriverError(error.errno or errno.EIO, error.strerror))

    _orphans: Sequence[int] = ()

    def renew(self, ring: _core.DriverQueue) -> None:
        """Go on with a new ring, after `fail` and `free_buffers`."""
        with self._lock:
            self._ring = ring
            self._error = None

    def free_buffers(self) -> None:
        """Give the buffers of failed requests back to the arena: only once the device cannot write to them any more."""
        starts, self._orphans = self._orphans, ()
        for start in starts:
            self._give_back(start)
