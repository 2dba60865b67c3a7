"""Which event sources of a bus are taken: rows of numbers, one number a queue."""

from __future__ import annotations

from bisect import bisect_left


class Sources:
    """Numbers from 0 up to `size`, given out in rows, the first that fits. Not for several threads at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)] if size else []
        """(first, how many) of every row that is free, ascending, no two of them adjacent."""

    def take(self, count: int) -> int | None:
        """The first of `count` numbers in a row, none of which is taken; None when there are no such."""
        if count == 0:
            return 0
        for place, (first, length) in enumerate(self._free):
            if length == count:
                del self._free[place]
                return first
            if length > count:
                self._free[place] = first + count, length - count
                return first
        return None

    def give_back(self, first: int, count: int) -> None:
        """Let others have a row that was taken."""
        if count == 0:
            return
        place = bisect_left(self._free, (first, 0))
        if place < len(self._free) and self._free[place][0] == first + count:
            count += self._free.pop(place)[1]
        if place > 0 and sum(self._free[place - 1]) == first:
            place -= 1
            before, length = self._free.pop(place)
            first, count = before, count + length
        self._free.insert(place, (first, count))
