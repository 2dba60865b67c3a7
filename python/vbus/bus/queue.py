"""A queue as a device sees it: a place where requests come from, whatever carries them.

A device class declares its queues; every device gets live ones of its own. A *handled* queue gives each request to the
device's `handle`; on a *pull* queue the driver's buffers wait until the device has something to say. The ring itself
decides whether to notify (sections 2.7 and 2.8 of the specification); nothing here does.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vbus import _core
from vbus.errors import UsageError, Violation

if TYPE_CHECKING:
    from vbus.bus.slot import Slot

Request = _core.Request
Sequence.register(_core.Batch)

MAX_QUEUE_SIZE = 32768


class Queue:
    """One virtqueue: declared in a class (`Queue("events", pull=True)`), live in a device.

    `size` is the largest number of descriptors that a driver is offered, a power of two up to 32768.
    """

    def __init__(self, name: str, *, pull: bool = False, size: int = 256) -> None:
        if size < 1 or size > MAX_QUEUE_SIZE or size & (size - 1):
            raise UsageError(f"queue {name!r}: size {size} is not a power of two up to {MAX_QUEUE_SIZE}")
        self.name = name
        self.pull = pull
        self.max_size = size
        self.index = -1
        # Connectors hold drivers to `max_size` where they can tell them of it: vhost-user's front-ends cannot be told.
        self.core = _core.DeviceQueue(MAX_QUEUE_SIZE)
        self._slot: Slot | None = None
        self._getters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Queue {self.index} {self.name}>"

    def live(self, index: int) -> Queue:
        """A fresh queue of the same declaration, for one device."""
        queue = Queue(self.name, pull=self.pull, size=self.max_size)
        queue.index = index
        return queue

    @property
    def paused(self) -> bool:
        """Nothing more is taken off the ring for now; what was taken is handled."""
        return self.core.paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self.core.paused = paused

    @property
    def served(self) -> bool:
        """Whether the driver has set the queue up, and it is not paused."""
        return self.core.running and not self.paused

    def bind(self, slot: Slot | None) -> None:
        """Tell the queue which place on a bus its violations belong to."""
        self._slot = slot

    def take(self) -> Request | None:
        """The next buffer of a pull queue, or None when the driver has given none.

        A violation of the ring stops the queue and gives None: the device need not know.
        """
        taken = self.take_batch(1)
        return taken[0] if taken else None

    def take_batch(self, limit: int) -> list[Request]:
        """Up to `limit` buffers, in ring order; none while a limit that an operator set is reached."""
        if self.paused:
            return []
        slot = self._slot
        gate = slot.gate if slot is not None and not slot.gate.is_open else None
        if gate is not None and slot is not None:
            limit = slot.admit(self, limit)
            if limit == 0:
                return []
        try:
            requests = self.core.take(limit)
        except Violation as violation:
            if slot is not None:
                slot.violated(violation, self)
            return []
        if gate is not None and not self.pull:
            gate.charge(len(requests), sum(request.readable + request.writable for request in requests))
        return requests

    def serve(self, handler: Callable[..., object] | None, batch: bool, limit: int) -> bool:
        """Let `handler` answer requests in a turn of the device, `limit` at most; True when there were some.

        Those that were taken before come first. A violation, of the driver or of the handler, is raised, and so is
        whatever else the handler raises: it ends the turn.
        """
        slot = self._slot
        if slot is None:
            return False
        others = (slot.actor.pool.scheduler, slot.actor.id, slot.queue_priorities[self.index])
        if slot.gate.is_open:
            return self.core.serve(handler, self, limit, batch=batch, others=others)
        limit = slot.admit(self, limit) if limit else 0
        try:
            return self.core.serve(handler, self, limit, batch=batch, charge=slot.gate.charge, others=others)
        finally:
            slot.completed()

    async def get(self) -> Request:
        """The next buffer of a pull queue, as soon as there is one."""
        while (request := self.take()) is None:
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._getters.append((loop, waiter))
            # The driver may have added a buffer between the look above and the registration.
            if (request := self.take()) is not None:
                waiter.cancel()
                return request
            await waiter
        return request

    def wake(self) -> None:
        """The driver has added buffers: let every `get` look again."""
        with self._lock:
            getters, self._getters = self._getters, deque()
        for loop, waiter in getters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_finish, waiter)

    def complete(self, *requests: Request) -> None:
        """Give requests back to the driver, published together (merged receive buffers show all at once)."""
        slot = self._slot
        gate = slot.gate if slot is not None and not slot.gate.is_open else None
        if gate is not None and self.pull:
            # How much a waiting buffer is used for is known only now.
            gate.charge(len(requests), sum(request.written for request in requests))
        try:
            self.core.complete(requests)
        except Violation as violation:
            if slot is not None:
                slot.violated(violation, self)
        if gate is not None and slot is not None:
            slot.completed()


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
