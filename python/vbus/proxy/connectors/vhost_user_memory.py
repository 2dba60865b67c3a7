"""The memory of a front-end of vhost-user: an arena that a back-end is shown part by part, as it is needed.

The arena is one sealed memfd whose pages take no memory until they are touched. What a back-end has to map of it grows
and shrinks with what is given out, where it takes regions one at a time; else it is shown the whole at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable

from vbus.errors import DriverError
from vbus.proxy.connectors.vhost_user_link import BackEndLink
from vbus.proxy.loop import Loop
from vbus.shmem.arena import DEFAULT_SIZE, DRIVER_ADDRESS, SMALLEST, Arena
from vbus.shmem.buddy import Buddy
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import Request

log = logging.getLogger("vbus.proxy")

PART = 16 << 20
"""Bytes of a region: as much as the largest buffer, so that none lies in two of them."""
USER_ADDRESS = 1 << 44
"""Where the arena begins in what a back-end takes for our own addresses. Not the driver's: one mistaken shows."""


class PartedArena(Arena):
    """An arena in parts, of which the first `shown` give out buffers.

    `full` is called when the shown parts have no room, `spare` when the last one is not needed any more: both with the
    arena's lock held, so that they may only make a note of it.
    """

    def __init__(self, size: int = DEFAULT_SIZE, part: int = PART) -> None:
        super().__init__(size)
        self.part = min(part, size)
        self.parts = [Buddy(self.part, SMALLEST) for _ in range(size // self.part)]
        self.shown = 0
        self.full: Callable[[], None] | None = None
        self.spare: Callable[[], None] | None = None

    @property
    def largest(self) -> int:
        """The largest buffer that is ever given out: a part."""
        return self.part

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes in a part that is shown; None when there is no room now."""
        for number in range(self.shown):
            found = self.parts[number].take(size)
            if found is not None:
                return number * self.part + found
        if self.full is not None:
            self.full()
        return None

    def give_back(self, offset: int) -> None:
        """Take a buffer back. KeyError when `offset` is none."""
        number, place = divmod(offset, self.part)
        self.parts[number].give_back(place)
        if self.is_spare and self.spare is not None:
            self.spare()

    @property
    def in_use(self) -> int:
        """Bytes that are given out, as rounded."""
        return sum(part.in_use for part in self.parts)

    @property
    def is_spare(self) -> bool:
        """Whether the last part that is shown is empty, and the one before it has room for what may soon come."""
        if self.shown < 2:
            return False
        last, before = self.parts[self.shown - 1], self.parts[self.shown - 2]
        return last.in_use == 0 and before.in_use <= self.part // 2

    def region(self, number: int) -> m.MemRegion:
        """A part as a back-end is told of it."""
        at = number * self.part
        return m.MemRegion(DRIVER_ADDRESS + at, self.part, USER_ADDRESS + at, at)

    def whole(self) -> m.MemTable:
        """All parts as one region."""
        return m.MemTable((m.Region(DRIVER_ADDRESS, self.size, USER_ADDRESS, 0),))

    @staticmethod
    def user_address(address: int) -> int:
        """What a back-end is told of a driver address."""
        return address - DRIVER_ADDRESS + USER_ADDRESS


class SharedArena:
    """What a back-end is shown of an arena. `grown` is called on the loop's thread when it has been shown more."""

    def __init__(
        self, arena: PartedArena, lock: threading.Lock, link: BackEndLink, loop: Loop, grown: Callable[[], None]
    ) -> None:
        self.arena = arena
        self.lock = lock
        self._link = link
        self._loop = loop
        self._tell_grown = grown
        self._most = 0
        """Parts that the back-end takes."""
        self._growing = False
        self._lost = False
        self._grow_key = loop.key(self._grow, 0)
        self._shrink_key = loop.key(self._shrink, 0)

    def share(self, *, by_regions: bool) -> None:
        """Show the first part, where regions can be added, or all of it. DriverError; EPROTO when none is taken."""
        arena, link = self.arena, self._link
        if by_regions:
            slots = link.number(Request.GET_MAX_MEM_SLOTS)
            if not slots:
                raise DriverError(errno.EPROTO, "the back-end takes no memory at all")
            self._most = min(slots, len(arena.parts))
            arena.full = lambda: self._loop.scheduler.mark(self._grow_key)
            arena.spare = lambda: self._loop.scheduler.mark(self._shrink_key)
            link.tell(Request.ADD_MEM_REG, arena.region(0), [arena.fd])
            shown = 1
        else:
            link.tell(Request.SET_MEM_TABLE, arena.whole(), [arena.fd])
            self._most = shown = len(arena.parts)
        link.settle()
        with self.lock:
            arena.shown = shown

    def take(self, size: int) -> int:
        """Room for a ring, of which the back-end may have to be shown more first. DriverError ENOMEM."""
        deadline = time.monotonic() + self._link.timeout
        while True:
            with self.lock:
                place = self.arena.take(size)
                may_grow = self.arena.shown < self._most
            if place is not None:
                return place
            if not may_grow or self._lost or time.monotonic() > deadline:
                raise DriverError(errno.ENOMEM, f"no room for {size} bytes of rings in the arena")
            time.sleep(0.002)

    def give_back(self, place: int) -> None:
        """Take a ring's room back."""
        with self.lock:
            self.arena.give_back(place)

    def end(self) -> None:
        """The back-end is gone: it is shown no more."""
        self._lost = True
        self.arena.full = self.arena.spare = None

    # On the loop's thread.

    def _grow(self) -> bool:
        """Show one more part; who waits for room is looked at when the back-end has it."""
        with self.lock:
            if self._growing or self.arena.shown >= self._most or self._lost:
                return False
            self._growing = True
            number = self.arena.shown
        with contextlib.suppress(DriverError):
            self._link.tell_later(Request.ADD_MEM_REG, self.arena.region(number), [self.arena.fd], self._grown)
        return False

    def _grown(self, taken: bool) -> None:
        with self.lock:
            self._growing = False
            if taken:
                self.arena.shown += 1
            else:
                self._most = self.arena.shown
                log.warning("the back-end takes no more than %d regions", self._most)
        self._tell_grown()

    def _shrink(self) -> bool:
        """Take a part back that nobody needs."""
        with self.lock:
            if self._growing or not self.arena.is_spare or self._lost:
                return False
            self.arena.shown -= 1
            number = self.arena.shown
        with contextlib.suppress(DriverError):
            self._link.tell_later(Request.REM_MEM_REG, self.arena.region(number), (), lambda _: None)
        return False
