"""The buddy method: who has which part of a piece of memory.

Sizes are rounded up to powers of two and freed halves join again, so that a long life of mixed sizes never wears it
out. Places are aligned to their size.
"""

from __future__ import annotations


class Buddy:
    """Gives out parts of `size` bytes (a power of two), the smallest of `smallest`. Not for several threads at once."""

    def __init__(self, size: int, smallest: int) -> None:
        self.size = size
        self._smallest = smallest
        self._free: dict[int, set[int]] = {size: {0}}
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """The offset of `size` bytes; None when there is no room now."""
        wanted = max(self._smallest, 1 << (size - 1).bit_length())
        block = wanted
        while not self._free.get(block):
            block *= 2
            if block > self.size:
                return None
        offset = self._free[block].pop()
        while block > wanted:
            block //= 2
            self._free.setdefault(block, set()).add(offset + block)
        self._taken[offset] = wanted
        return offset

    def give_back(self, offset: int) -> None:
        """Take a part back. KeyError when `offset` is none."""
        block = self._taken.pop(offset)
        while block < self.size:
            buddy = offset ^ block
            free = self._free.setdefault(block, set())
            if buddy not in free:
                break
            free.remove(buddy)
            offset &= ~block
            block *= 2
        self._free.setdefault(block, set()).add(offset)

    @property
    def in_use(self) -> int:
        """Bytes that are given out, as rounded."""
        return sum(self._taken.values())
