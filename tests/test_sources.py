"""Event sources are given out in rows, and found again when they are given back."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from vbus.bus.sources import Sources


@given(st.integers(0, 40), st.lists(st.one_of(st.integers(0, 6), st.just(-1)), max_size=60), st.randoms())
def test_rows_never_overlap_and_come_back_whole(size: int, steps: list[int], chance: Random) -> None:
    sources = Sources(size)
    taken: list[tuple[int, int]] = []
    for step in steps:
        if step >= 0:
            first = sources.take(step)
            used = {number for start, count in taken for number in range(start, start + count)}
            rows = [start for start in range(size - step + 1) if not used & set(range(start, start + step))]
            # The first that fits, as long as there is one.
            assert first == (0 if step == 0 else min(rows, default=None))
            if first is not None:
                taken.append((first, step))
        elif taken:
            sources.give_back(*taken.pop(chance.randrange(len(taken))))
    for row in taken:
        sources.give_back(*row)
    assert sources.take(size) == 0
    assert sources.take(1) is None
