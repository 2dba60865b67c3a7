"""The link of a shared area: whole messages each way, with a doorbell for each direction.

Control messages are few, so that every message rings. A sender never waits: what finds no room is kept, up to a limit,
and goes out when the reader has made room; a reader that takes much rings back for that. Whoever does not read its link
is parted from.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from vbus import _core
from vbus.errors import Violation
from vbus.shmem.area import LINK_SIZE, Area

MAX_KEPT = 1024
"""Messages that are kept for a reader that has no room; the next is a violation of that reader."""
READ_BUDGET = 64
"""Messages read in one turn, so that a flood on one link leaves the others theirs."""


class Link:
    """One side's end of the two message rings."""

    def __init__(self, area: Area, *, device_side: bool, bell_in: _core.Doorbell, bell_out: _core.Doorbell) -> None:
        self._in = area.link_ring(to_device=device_side)
        self._out = area.link_ring(to_device=not device_side)
        self.bell_in = bell_in
        self.bell_out = bell_out
        self._kept: deque[bytes] = deque()
        self._read_since_ring = 0
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """Send, or keep until there is room. From any thread. Violation: link-not-read, link-index."""
        with self._lock:
            if len(self._kept) >= MAX_KEPT:
                raise Violation("link-not-read", f"{MAX_KEPT} messages wait for a reader that takes none")
            self._kept.append(message)
            self._flush()

    def _flush(self) -> None:
        sent = False
        while self._kept and self._out.send(self._kept[0]):
            self._kept.popleft()
            sent = True
        if sent:
            self.bell_out.ring()

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits here for the reader to make room."""
        return not self._kept

    def receive(self) -> Iterator[bytes]:
        """The messages that are here, at most a budget; see `more`. Violation: link-index, link-message-size."""
        self.bell_in.drain()
        for _ in range(READ_BUDGET):
            message = self._in.receive()
            if message is None:
                self.more = False
                break
            self._read_since_ring += len(message)
            yield message
        else:
            self.more = True
        with self._lock:
            # A sender that found the ring full waits for this: a full ring holds more than a quarter of its size.
            if self._read_since_ring >= LINK_SIZE // 4:
                self._read_since_ring = 0
                self.bell_out.ring()
            if self._kept:
                self._flush()

    more = False
    """Whether the last `receive` left messages behind."""
