"""An arena: memory that a driver's side owns, in one sealed memfd, and gives out as buffers and rings.

Both ends that drive a ring use it: the proxy, whose arena the device's side maps too, and a connector over a byte
stream, which drives a private ring of its own. Pages that were never touched take no memory.
"""

from __future__ import annotations

import os
import weakref

from vbus import _core
from vbus.shmem.area import sealed_memfd
from vbus.shmem.buddy import Buddy

DEFAULT_SIZE = 64 << 20
SMALLEST = 256
DRIVER_ADDRESS = 1 << 32
"""Where an arena begins in the driver's address space; not 0, so that an offset taken for an address shows."""


class Arena:
    """`size` bytes (a power of two), with driver addresses from `address` on. Not for several threads at once."""

    def __init__(
        self, size: int = DEFAULT_SIZE, address: int = DRIVER_ADDRESS, part: tuple[int, int] | None = None
    ) -> None:
        """`part`: a descriptor, which is taken, and where in it the arena is to be, instead of a memfd of its own."""
        self.size = size
        self.address = address
        self.fd, offset = (sealed_memfd("vbus-arena", size), 0) if part is None else part
        # Whoever fails half-way may forget to close.
        self._closer = weakref.finalize(self, os.close, self.fd)
        self.mapping = _core.Mapping(self.fd, size, offset)
        self.view = memoryview(self.mapping)
        self._buddy = Buddy(size, SMALLEST)

    @property
    def largest(self) -> int:
        """The largest buffer that is ever given out: a quarter of the arena."""
        return self.size // 4

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes, aligned to their size up to a page; None when there is no room now."""
        return self._buddy.take(size)

    def give_back(self, offset: int) -> None:
        """Take a buffer back. KeyError when `offset` is none."""
        self._buddy.give_back(offset)

    @property
    def in_use(self) -> int:
        """Bytes that are given out, as rounded."""
        return self._buddy.in_use

    def close(self) -> None:
        """Give the descriptor back; the memory lives on while a ring or a view uses it, but not for this arena."""
        if self.fd >= 0:
            self._closer()
            self.fd = -1
            self.view.release()
            del self.mapping
