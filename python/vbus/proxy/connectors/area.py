"""The driver's side of a shared area, wherever the area lies: messages, channels, rings in an arena, tunnelled signals.

What a kind of guest connector adds is how the area and its doorbells are found, and how the bus sees the arena.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from vbus import _core, msg
from vbus.channel import Mirror
from vbus.errors import DriverError, Violation
from vbus.proxy.connector import GuestConnector
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.shmem.area import Area
from vbus.shmem.arena import Arena
from vbus.shmem.channels import ChannelRings
from vbus.shmem.link import Link
from vbus.virtio import features


@dataclass
class Sources:
    """A device's event sources in its present generation, and what was opened of them."""

    first: int
    generation: int
    priorities: bytes
    places: dict[int, int] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    signals: dict[int, _core.Signal] = field(default_factory=dict)


class AreaConnector(GuestConnector):
    """The driver's end of an area."""

    def __init__(self, loop: Loop, timeout: float, arena: Arena | None = None) -> None:
        super().__init__(loop, timeout, arena)
        self.sources: dict[int, Sources] = {}
        self.link: Link | None = None

    def connect(
        self,
        area: Area,
        link_bells: tuple[_core.Doorbell, _core.Doorbell],
        to_device: Sequence[_core.Doorbell],
        to_driver: Sequence[_core.Doorbell],
    ) -> None:
        """Listen to the doorbells of the link (to the device, to the driver) and of events, one a priority."""
        self.area = area
        self.link = Link(area, device_side=False, bell_in=link_bells[1], bell_out=link_bells[0])
        self.sender = area.sender(list(to_device), to_device=True)
        self.receiver = area.receiver(to_device=False)
        self.rings = ChannelRings(area, device_side=False)
        self.rings.listen(self.receiver, self._rings_key)
        self.rings.speak(self.sender)
        self._link_key = self.loop.key(self._link_turn, 0)
        self._fault_key = self.loop.key(self._faulted, 0)
        self._link_bell = link_bells[1].fileno()
        self.loop.scheduler.add_fd(self._link_bell, self._link_key)
        self.loop.scheduler.add_events(self.receiver, list(to_driver), self._fault_key)

    # Turns.

    def transmit(self, message: bytes, priority: int) -> None:
        """Send through the area, in order: nothing but control travels there. DriverError ESHUTDOWN once parted."""
        link = self.link
        if link is None:
            raise DriverError(errno.ESHUTDOWN, "detached")
        link.send(message)

    def _link_turn(self) -> bool:
        link = self.link
        if self.lost is not None or link is None:
            return False
        try:
            for message in link.receive():
                self.received(message)
        except Violation as violation:
            self.broken(f"the bus broke the link: {violation}")
            return False
        return link.more

    def _rings_key(self, priority: int) -> int:
        return self.loop.key(lambda: self._rings_turn(priority), priority)

    def _rings_turn(self, priority: int) -> bool:
        if self.lost is not None or self.link is None:
            return False
        try:
            for message in self.rings.receive(priority):
                self.received_on_channel(message)
        except Violation as violation:
            self.broken(f"the bus broke the rings of channels: {violation}")
            return False
        self.channels.room(priority)
        return self.rings.more

    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Send through the ring of this priority."""
        # Looked up once: another thread may be closing this side.
        rings = self.__dict__.get("rings")
        if rings is None:
            return False
        try:
            return bool(rings.send(priority, message))
        except Violation as violation:
            self.broken(f"the bus broke the rings of channels: {violation}")
            return False

    def has_room(self) -> bool:
        """The rings say so themselves."""
        return True

    def map_region(self, offset: int, size: int) -> memoryview | Mirror:
        """A part of the area."""
        return self.area.region(offset, size)

    def _faulted(self) -> bool:
        if self.receiver.fault is not None:
            self.broken(f"the bus broke the event rings: {self.receiver.fault}")
        return False

    def broken(self, reason: str) -> None:
        """The link is at its end."""
        # What the bus said before it went is still in the link: the answers that it gave shall be heard.
        self.end(DriverError(errno.ECONNRESET, reason))

    # Queues.

    def prepare(self, device: RemoteDevice) -> None:
        """Ask for the device's event sources in its present generation."""
        answer = self.call(msg.Sources(), msg.SourcesResponse, device.address)
        if answer.first_source + len(answer.priorities) > self.area.geometry.max_sources:
            raise DriverError(errno.EPROTO, "the bus gives event sources that it has not")
        device.priorities = answer.priorities
        self.sources[device.address] = Sources(answer.first_source, answer.generation, answer.priorities)

    def open_queue(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a ring in the arena, signal it by events or by doorbells of its own, and tell the bus."""
        sources = self.sources[device.address]
        if index >= len(sources.priorities):
            raise DriverError(errno.EPROTO, f"the bus gives no event source for queue {index}")
        source, priority = sources.first + index, device.queue_priority(index)
        queues: list[RemoteQueue] = []
        key = self.loop.key(lambda: queues[0].reap() if queues else False, priority)
        sources.keys.append(key)
        sources.signals[index] = self.new_signal(device, index, source, key, queues)
        ring = self._make_ring(device, index, size)
        self._tell_ring(device, index, ring)
        queues.append(RemoteQueue(device, index, self.arena, self.arena_lock, ring))
        return queues[0]

    def new_signal(
        self, device: RemoteDevice, index: int, source: int, key: int, queues: list[RemoteQueue]
    ) -> _core.Signal:
        """How this side tells the bus of a queue, and hears of it: here by events. DriverError.

        `key` is to be marked when the bus says something of `queues`, which is one, as soon as it is there.
        """
        generation = self.sources[device.address].generation
        signal = self.sender.open(source, generation, device.queue_priority(index))
        self.receiver.open(source, generation, key)
        return signal

    def _make_ring(self, device: RemoteDevice, index: int, size: int) -> _core.DriverQueue:
        sources = self.sources[device.address]
        ring_features = features.of_ring(device.negotiated)
        with self.arena_lock:
            place = self.arena.take(_core.DriverQueue.bytes_needed(size, packed=ring_features["packed"]))
        if place is None:
            raise DriverError(errno.ENOMEM, f"no room for a queue of {size} in the arena")
        sources.places[index] = place
        return _core.DriverQueue(
            self.arena.mapping, place, self.arena.address, size, signal=sources.signals[index], **ring_features
        )

    def _tell_ring(self, device: RemoteDevice, index: int, ring: _core.DriverQueue) -> None:
        body = msg.SetVqueue(index, ring.size, ring.desc, ring.driver, ring.device)
        self.call(body, msg.SetVqueueResponse, device.address)

    def stop_queue(self, device: RemoteDevice, queue: RemoteQueue) -> None:
        """What is in the ring, the device has already."""

    def renew_queue(self, device: RemoteDevice, queue: RemoteQueue, size: int) -> None:
        """Make another ring in the arena; its signals stay."""
        with self.arena_lock:
            self.arena.give_back(self.sources[device.address].places.pop(queue.index))
        ring = self._make_ring(device, queue.index, size)
        queue.renew(ring)
        self._tell_ring(device, queue.index, ring)

    def close_queues(self, device: RemoteDevice) -> None:
        """Forget keys and signals, and give the rings' memory back."""
        sources = self.sources.pop(device.address, None)
        if sources is None:
            return
        for key in sources.keys:
            self.loop.drop_key(key)
        for index, place in sources.places.items():
            self.sender.close(sources.first + index)
            self.receiver.close(sources.first + index)
            with self.arena_lock:
                self.arena.give_back(place)

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """What this side's signal counted."""
        sources = self.sources.get(device.address)
        signal = sources.signals.get(index) if sources is not None else None
        return signal.counters if signal is not None else (0, 0, 0)

    def close(self) -> None:
        """Listen no more, and forget the area."""
        if self.link is not None:
            self.loop.scheduler.remove_events(self.receiver)
            self.loop.scheduler.remove_fd(self._link_bell)
        self.loop.close()
        # Descriptors and mappings go now, not when some cycle of this side's objects is collected.
        self.sources.clear()
        self.arena.close()
        if self.link is not None:
            self.link = None
            del self.sender, self.receiver, self.rings, self.area
