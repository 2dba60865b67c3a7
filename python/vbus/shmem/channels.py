"""The messages of event channels in a shared area: a ring each way and priority, announced by the area's event rings.

A channel's events do not travel on the link: there the urgent would wait behind the bulk. All channels of a priority
share a ring and an event source; a ring that is full refuses, and its reader announces when it has made room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from vbus import _core
from vbus.shmem.area import CHANNEL_RING_SIZE, PRIORITIES, Area

GENERATION = 1
"""The sources live as long as the area: there is no reset."""
READ_BUDGET = 32
"""Messages read in one turn: what is more urgent waits for no more of them."""


class _Lane:
    """The rings of one priority."""

    def __init__(self, area: Area, priority: int, device_side: bool) -> None:
        self.inward = area.channel_ring(priority, to_device=device_side)
        self.outward = area.channel_ring(priority, to_device=not device_side)
        self.signal: _core.Signal | None = None
        self.lock = threading.Lock()
        self.read = 0


class ChannelRings:
    """One side's ends of all rings of an area's channels."""

    def __init__(self, area: Area, *, device_side: bool) -> None:
        self._area = area
        self._lanes = [_Lane(area, priority, device_side) for priority in range(PRIORITIES)]

    def listen(self, receiver: _core.EventReceiver, key_of: Callable[[int], int]) -> None:
        """Have the scheduler's key `key_of(priority)` marked when there is something to read, or room again.

        Before the other side may speak: what is signalled before anybody listens is dropped.
        """
        for priority in range(PRIORITIES):
            receiver.open(self._area.channel_source(priority), GENERATION, key_of(priority))

    def speak(self, sender: _core.EventSender) -> None:
        """Signal from now on: the other side listens."""
        for priority, lane in enumerate(self._lanes):
            with lane.lock:
                lane.signal = sender.open(self._area.channel_source(priority), GENERATION, priority)

    def send(self, priority: int, message: bytes) -> bool:
        """Send one message; False when there is no room now. From any thread. Violation: link-index."""
        lane = self._lanes[priority]
        with lane.lock:
            if lane.signal is None or not lane.outward.send(message):
                return False
            lane.signal.notify()
            return True

    def receive(self, priority: int) -> Iterator[bytes]:
        """The messages that are here, at most a budget; see `more`. Violation: link-index, link-message-size."""
        lane = self._lanes[priority]
        self.more = True
        for _ in range(READ_BUDGET):
            message = lane.inward.receive()
            if message is None:
                self.more = False
                break
            lane.read += len(message)
            yield message
        # A sender that found the ring full waits for this: a full ring holds more than a quarter of its size.
        if lane.read >= CHANNEL_RING_SIZE // 4:
            lane.read = 0
            with lane.lock:
                if lane.signal is not None:
                    lane.signal.notify()

    more = False
    """Whether the last `receive` left messages behind."""
