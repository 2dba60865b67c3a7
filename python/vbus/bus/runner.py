"""How requests reach a device's handlers: one runner for plain functions, one for coroutines.

Both are called in turns of the device's actor. A plain handler runs right there, in a thread of the pool. The code of
an `async` device runs on an event loop, all of it, hooks too, so that it overlaps only at its own awaits; the runner
takes no more off the ring than the device may have under way.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import PriorityQueue
from typing import TYPE_CHECKING, Any

from vbus.bus.device import Device, handles_batches
from vbus.bus.queue import Queue, Request
from vbus.errors import Violation

if TYPE_CHECKING:
    from vbus.bus.slot import Slot

BUDGET = 64
"""Requests of one queue that are handled in one turn; then its neighbours get theirs."""


class SyncRunner:
    """Runs plain handlers and hooks in the calling thread, which holds the device's turn."""

    is_here = False
    """Nobody runs on a loop here."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._batch = handles_batches(slot.device)

    def turn(self, queue: Queue, *, finish: bool = False) -> bool:
        """Handle what the queue holds, within the budget; True when there may be more.

        With `finish`, only what was taken off the ring before.
        """
        device: Device = self.slot.device
        if queue.pull:
            queue.wake()
            self.hook(device.available, queue, of=queue)
            return False
        try:
            return queue.serve(
                device.handle_batch if self._batch else device.handle, self._batch, 0 if finish else BUDGET
            )
        except Violation as violation:
            self.slot.violated(violation, queue)
        except Exception as error:
            self.slot.failed(error, queue)
        return False

    def serve(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Handle requests that somebody else took off the ring."""
        device: Device = self.slot.device
        try:
            if self._batch:
                device.handle_batch(queue, requests)
                queue.complete(*requests)
            else:
                for request in requests:
                    device.handle(queue, request)
                    queue.complete(request)
        except Violation as violation:
            self.slot.violated(violation, queue)
        except Exception as error:
            self.slot.failed(error, queue)

    def hook(self, hook: Callable[..., Any], *args: Any, of: Queue | None = None) -> None:
        """Call one of the device's hooks; what it raises is the device's failure, on the queue that it is about."""
        try:
            hook(*args)
        except Violation as violation:
            self.slot.violated(violation, of)
        except Exception as error:
            self.slot.failed(error, of)

    def call(self, function: Callable[[], Any]) -> None:
        """Call the device's own callback (a watched descriptor, a post)."""
        self.hook(function)

    def plugged(self) -> None:
        """Run the `plugged` hook; what it raises goes to whoever plugs."""
        self.slot.device.plugged()
        self.slot.adopt(self.slot.device.engines())

    def cancel(self, queue: Queue | None = None) -> None:
        """Nothing is under way: a ring that stops forgets what was taken and not begun."""

    def stop(self) -> None:
        """Nothing of a plain device outlives its turns."""


class AsyncRunner:
    """Runs an `async` device on an event loop; a turn waits there only for hooks, never for handlers."""

    def __init__(self, slot: Slot, starts: UrgentFirst) -> None:
        self.slot = slot
        self.starts = starts
        self.loop = starts.loop
        self._tasks: dict[asyncio.Task[None], Queue] = {}
        self._room = slot.device.concurrency
        self._lock = threading.Lock()
        self._starved: set[Queue] = set()
        self._lives = [0] * len(slot.queues)
        """Counts resets of each queue: what was to begin before one begins no more."""
        self._main: Future[None] | None = None

    def turn(self, queue: Queue, *, finish: bool = False) -> bool:
        """Start handlers for what the queue holds, as far as there is room; True when there may be more."""
        if finish:
            return False
        if queue.pull:
            queue.wake()
            self.hook(self.slot.device.available, queue, of=queue)
            return False
        with self._lock:
            limit = min(BUDGET, self._room)
            if limit <= 0:
                self._starved.add(queue)
                return False
            self._room -= limit
        requests = queue.take_batch(limit)
        self._give_back(limit - len(requests))
        if not requests:
            return False
        priority = self.slot.queue_priorities[queue.index]
        if handles_batches(self.slot.device):
            self.starts.call_soon(priority, partial(self._start, self._lives[queue.index], queue, requests))
        else:
            for request in requests:
                self.starts.call_soon(priority, partial(self._start, self._lives[queue.index], queue, [request]))
        return True

    def _give_back(self, room: int) -> None:
        with self._lock:
            self._room += room
            starved, self._starved = (self._starved, set()) if self._room > 0 else (set(), self._starved)
        for queue in starved:
            self.slot.mark(queue)

    def _start(self, life: int, queue: Queue, requests: Sequence[Request]) -> None:
        if life != self._lives[queue.index]:
            self._give_back(len(requests))
            return
        task = self.loop.create_task(self._handle(queue, requests))
        self._tasks[task] = queue
        task.add_done_callback(self._tasks.pop)

    async def _handle(self, queue: Queue, requests: Sequence[Request]) -> None:
        device: Device = self.slot.device
        try:
            if handles_batches(device):
                result = device.handle_batch(queue, requests)
            else:
                result = device.handle(queue, requests[0])
            if isinstance(result, Awaitable):
                await result
            queue.complete(*requests)
        except Violation as violation:
            self.slot.violated(violation, queue)
        except Exception as error:
            self.slot.failed(error, queue)
        finally:
            self._give_back(len(requests))

    @property
    def is_here(self) -> bool:
        """Whether the caller runs on the device's loop, which must not wait for itself."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def _on_loop(self, function: Callable[[], Any]) -> Any:
        """Run `function` on the loop and wait for it."""
        if self.is_here:
            return function()

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result()

    def hook(self, hook: Callable[..., Any], *args: Any, of: Queue | None = None) -> None:
        """Call one of the device's hooks on the loop; what it raises is the device's failure."""
        try:
            self._on_loop(lambda: hook(*args))
        except Violation as violation:
            self.slot.violated(violation, of)
        except Exception as error:
            self.slot.failed(error, of)

    def call(self, function: Callable[[], Any]) -> None:
        """Call the device's own callback on the loop."""
        self.hook(function)

    def plugged(self) -> None:
        """Run the `plugged` hook, and start the device's own task when it has one."""
        device: Device = self.slot.device
        self._on_loop(device.plugged)
        if type(device).run is not Device.run:
            self._main = asyncio.run_coroutine_threadsafe(self._beside(device), self.loop)

    async def _beside(self, device: Device) -> None:
        try:
            await device.run()
        except Violation as violation:
            self.slot.violated(violation)
        except Exception as error:
            self.slot.failed(error)

    def cancel(self, queue: Queue | None = None) -> None:
        """Cancel the handlers that are under way, of one queue or of all, and wait until they have ended; none that
        waits begins.
        """

        async def cancel() -> None:
            for one in self.slot.queues if queue is None else [queue]:
                self._lives[one.index] += 1
            tasks = [task for task, of in self._tasks.items() if queue is None or of is queue]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        if not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(cancel(), self.loop).result()

    def stop(self) -> None:
        """End the device's own task."""
        if self._main is not None:
            self._main.cancel()


class UrgentFirst:
    """Calls on an event loop, of which each time the most urgent is next."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: PriorityQueue[tuple[int, int, Callable[[], None]]] = PriorityQueue()
        self._order = itertools.count()

    def call_soon(self, priority: int, call: Callable[[], None]) -> None:
        """Call on the loop, before what is less urgent. From any thread."""
        self._waiting.put((priority, next(self._order), call))
        self.loop.call_soon_threadsafe(self._next)

    def _next(self) -> None:
        self._waiting.get_nowait()[2]()


class BusLoop:
    """The event loop that `async` devices run on: the caller's under `async with`, else a thread's own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starts: UrgentFirst | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run devices on the caller's loop."""
        self._loop = loop

    def starts(self) -> UrgentFirst:
        """Where handlers of all devices on the loop begin."""
        loop = self.get()
        with self._lock:
            if self._starts is None or self._starts.loop is not loop:
                self._starts = UrgentFirst(loop)
            return self._starts

    def get(self) -> asyncio.AbstractEventLoop:
        """The loop, started when this is the first that asks for it."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(self._loop,), name="vbus-loop", daemon=True)
                self._thread.start()
            return self._loop

    @staticmethod
    def _serve(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.close()

    def close(self, timeout: float) -> bool:
        """Stop a loop of our own; False when something on it does not let go within `timeout` seconds."""
        with self._lock:
            thread, loop = self._thread, self._loop
            self._thread = self._loop = None
        if thread is None or loop is None:
            return True
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout)
        return not thread.is_alive()
