"""The driver side's threads: one that answers the bus, one that runs what may wait for it.

Everything that arrives (link messages, events, completions) is handled by the first, which therefore never waits for
the bus. Hooks of drivers and callbacks of users may ask the bus questions: they run on the second, in order.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable

from vbus import _core

log = logging.getLogger("vbus.proxy")
LAST = 8
"""Behind every priority: the end."""


class Loop:
    """A scheduler with one thread for turns and one for hooks."""

    def __init__(self, name: str) -> None:
        self.scheduler = _core.Scheduler()
        self._callbacks: dict[int, Callable[[], bool]] = {}
        self._actor = self.scheduler.actor()
        self._hooks: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._threads = [
            threading.Thread(target=self._turns, name=f"vbus-{name}", daemon=True),
            threading.Thread(target=self._run_hooks, name=f"vbus-{name}-hooks", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def key(self, callback: Callable[[], bool], priority: int = 4) -> int:
        """A key whose turns call back; True wants another turn."""
        key = self.scheduler.key(self._actor, priority)
        self._callbacks[key] = callback
        return key

    def drop_key(self, key: int) -> None:
        """Forget a key."""
        self.scheduler.drop_key(key)
        self._callbacks.pop(key, None)

    def hook(self, callback: Callable[[], None], priority: int = 4) -> None:
        """Run what may wait for the bus: the more urgent first, those of a priority in order."""
        self._hooks.put((priority, next(self._order), callback))

    @property
    def is_here(self) -> bool:
        """Whether the caller is the thread that answers the bus, which must not wait for it."""
        return threading.current_thread() is self._threads[0]

    def _turns(self) -> None:
        done: tuple[int, int, bool] | None = None
        while (turn := self.scheduler.next(done=done)) is not None:
            done = *turn, self._take_turn(turn[1])

    def _take_turn(self, key: int) -> bool:
        """Call back; whether the key wants another turn."""
        try:
            callback = self._callbacks.get(key)
            return callback() if callback is not None else False
        except Exception:
            log.exception("a turn of the driver side failed")
            return False

    def _run_hooks(self) -> None:
        while (callback := self._hooks.get()[2]) is not None:
            try:
                callback()
            except Exception:
                log.exception("a hook of a driver failed")

    def close(self) -> None:
        """End both threads."""
        self.scheduler.close()
        self._hooks.put((LAST, next(self._order), None))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)
        self._callbacks.clear()
