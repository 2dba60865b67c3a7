"""A peer on the other side of a shared area, wherever the area lies: messages, channels and tunnelled signals.

```text
 link rings      received() <- messages; send() -> messages            each rings the link's doorbell
 event rings     a queue's event marks the key that serves the queue   one doorbell a priority, for sleepers
 channel rings   what channels say, announced by events of their own
```

What a kind of connector adds is how the area and its doorbells reach the other side, and where the driver's memory is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vbus import _core
from vbus.bus import Account, Bus, Queue, Slot
from vbus.bus.slot import SignalCounters
from vbus.channel import Mirror
from vbus.connectors.peer import MessagePeer
from vbus.errors import Violation
from vbus.shmem.area import Area
from vbus.shmem.channels import ChannelRings
from vbus.shmem.link import Link

if TYPE_CHECKING:
    from vbus.connectors.peer_host import PeerHost

MAX_MESSAGE = 16384


class AreaPeer(MessagePeer):
    """The driver's side of one area."""

    max_message = MAX_MESSAGE

    def __init__(self, host: PeerHost, bus: Bus, label: str, accounts: list[Account], area: Area) -> None:
        super().__init__(host, bus, label, accounts)
        self.area = area
        self.receiver = area.receiver(to_device=True)
        self.rings = ChannelRings(area, device_side=True)
        self.rings.listen(self.receiver, self._rings_key)
        self._signals: dict[tuple[int, int], _core.Signal] = {}

    def connect(
        self,
        link_bells: tuple[_core.Doorbell, _core.Doorbell],
        to_device: Sequence[_core.Doorbell],
        to_driver: Sequence[_core.Doorbell],
        *,
        always: bool = False,
    ) -> None:
        """Listen to the doorbells of the link (to the device, to the driver) and of events, one a priority.

        `always`: ring for every event.
        """
        self.link = Link(self.area, device_side=True, bell_in=link_bells[0], bell_out=link_bells[1])
        self.sender = self.area.sender(list(to_driver), to_device=False, always=always)
        self._link_key = self.actor.key(self._link_turn, 0)
        self._fault_key = self.actor.key(self._faulted, 0)
        scheduler = self.bus.pool.scheduler
        scheduler.add_fd(self.link.bell_in.fileno(), self._link_key)
        scheduler.add_events(self.receiver, list(to_device), self._fault_key)

    # Channels.

    def _rings_key(self, priority: int) -> int:
        return self.actor.key(lambda: self._rings_turn(priority), priority)

    def _rings_turn(self, priority: int) -> bool:
        if self.parted:
            return False
        try:
            for message in self.rings.receive(priority):
                self.received_on_channel(message)
                if self.parted:
                    return False
        except Violation as violation:
            self.part(str(violation))
            return False
        self.channels.room(priority)
        return self.rings.more

    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Send through the ring of this priority."""
        try:
            return self.rings.send(priority, message)
        except Violation as violation:
            self.part(str(violation))
            return False

    def map_region(self, place: int, size: int) -> tuple[int, memoryview | Mirror]:
        """A part of the area."""
        offset = self.area.geometry.regions + place
        memory = self.area.region(offset, size)
        memory[:] = bytes(size)
        return offset, memory

    def introduced(self) -> None:
        """The driver's side listens to events: from now on channels may speak."""
        self.rings.speak(self.sender)

    # The link.

    def transmit(self, message: bytes, priority: int) -> None:
        """Send through the area, in order: nothing but control travels there."""
        self.link.send(message)

    def has_room(self) -> bool:
        """Whether the driver has read what was sent before."""
        return self.link.is_idle

    def _link_turn(self) -> bool:
        if self.parted:
            return False
        try:
            for message in self.link.receive():
                self.received(message)
                if self.parted:
                    return False
        except Violation as violation:
            self.part(str(violation))
            return False
        self.flush_events()
        return self.link.more

    def _faulted(self) -> bool:
        fault = self.receiver.fault
        if fault is not None:
            self.part(str(fault))
        return False

    # Signals.

    def open_sources(self, slot: Slot) -> None:
        """Listen to the slot's event sources, in its present generation."""
        for queue in slot.queues:
            self.receiver.open(slot.first_source + queue.index, slot.generation, slot.key(queue))

    def signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """The queue's event; one that was reset goes on with its own."""
        known = self._signals.get((slot.number, queue.index))
        if known is None:
            known = self._signals[slot.number, queue.index] = self.new_signal(slot, queue)
        return known

    def new_signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """An event in the rings. Violation where a kind of signal was not prepared."""
        source = slot.first_source + queue.index
        return self.sender.open(source, slot.generation, slot.queue_priorities[queue.index])

    def slot_reset(self, slot: Slot) -> None:
        """Forget the signals of a slot."""
        for queue in slot.queues:
            source = slot.first_source + queue.index
            self._signals.pop((slot.number, queue.index), None)
            self.sender.close(source)
            self.receiver.close(source)

    def counters(self, slot: Slot, queue: Queue) -> SignalCounters:
        """Towards the device: what the driver says in the area. Towards the driver: what was counted here."""
        signal = self._signals.get((slot.number, queue.index))
        if signal is None:
            return (0, 0, 0), (0, 0, 0)
        return self.area.read_stats(slot.first_source + queue.index, to_device=True), signal.counters

    def close(self) -> None:
        """Listen to no doorbell any more."""
        scheduler = self.bus.pool.scheduler
        scheduler.remove_events(self.receiver)
        scheduler.remove_fd(self.link.bell_in.fileno())
        self._signals.clear()
