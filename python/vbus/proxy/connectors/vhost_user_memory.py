"""The memory of a front-end of vhost-user: an arena that a back-end is shown part by part, as it is needed.

The arena is one sealed memfd whose pages take no memory until they are touched. What a back-end has to map of it grows
and shrinks with what is given out, where it takes regions one at a time; else it is shown the whole at once.
"""

from __future__ import annotations

from collections.abc import Callable

from vbus.shmem.arena import DEFAULT_SIZE, DRIVER_ADDRESS, SMALLEST, Arena
from vbus.shmem.buddy import Buddy
from vbus.vhost_user import messages as m

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
