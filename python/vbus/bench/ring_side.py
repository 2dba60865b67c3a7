"""A side of round trips through a shared area: native code in a process of its own, on a CPU of its own.

Run as a process: `python -m vbus.bench.ring_side`, told what to do by `children`. It has the area and the eventfds as
descriptors.
"""

from __future__ import annotations

import os
from typing import Any

from vbus import _core
from vbus.bench import children


class RingSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._ping: _core.PingSide | None = None
        self._echo: _core.EchoSide | None = None

    def begin(self, way: str, notified: bool, area: int, kick: int, call: int, cpu: int) -> list[int]:
        """Be the side that begins; where the parts of its ring are."""
        os.sched_setaffinity(0, {cpu})
        mapping = _core.Mapping(area, _core.PingSide.bytes_needed())
        self._ping = _core.PingSide(way, notified, mapping, kick, call)
        return list(self._ping.places)

    def answer(
        self, way: str, notified: bool, area: int, kick: int, call: int, cpu: int, places: tuple[int, int, int]
    ) -> None:
        """Be the side that answers."""
        os.sched_setaffinity(0, {cpu})
        mapping = _core.Mapping(area, _core.PingSide.bytes_needed())
        desc, driver, device = places
        self._echo = _core.EchoSide(way, notified, mapping, kick, call, (desc, driver, device))

    def run(self, count: int, block: int) -> dict[str, Any]:
        """`count` round trips."""
        if self._ping is not None:
            return dict(self._ping.run(count, block))
        assert self._echo is not None
        return dict(self._echo.run(count))


def main() -> None:
    """Do as told until standard input ends."""
    side = RingSide()
    children.serve({name: getattr(side, name) for name in ("begin", "answer", "run")})


if __name__ == "__main__":
    main()
