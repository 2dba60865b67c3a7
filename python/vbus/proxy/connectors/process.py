"""The guest connector of `process`: this process drives devices that another one serves, through shared memory."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from vbus import _core, msg
from vbus.channel import Mirror
from vbus.errors import DriverError, Violation
from vbus.proxy.connector import GuestConnector
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.shmem import handshake
from vbus.shmem.area import PRIORITIES, Area
from vbus.shmem.channels import ChannelRings
from vbus.shmem.handshake import Greeting
from vbus.shmem.link import Link
from vbus.virtio import features

DESCRIPTORS = 3 + 2 * PRIORITIES


@dataclass
class _Sources:
    """A device's event sources in its present generation, and what was opened of them."""

    first: int
    generation: int
    priorities: bytes
    places: dict[int, int] = field(default_factory=dict)
    keys: list[int] = field(default_factory=list)
    signals: dict[int, _core.Signal] = field(default_factory=dict)
    bells: list[_core.Doorbell] = field(default_factory=list)


class ProcessConnector(GuestConnector):
    """Attached to the socket of a `process` connector. DriverError when the bus refuses or is not there."""

    def __init__(self, path: Path, loop: Loop, timeout: float) -> None:
        super().__init__(loop, timeout)
        self._cookies = itertools.count(1)
        self._sources: dict[int, _Sources] = {}
        self._sock = _connect(path, timeout)
        try:
            greeting, fds = self._greeted()
            self._direct = greeting.signal_kind == msg.SignalKind.DIRECT
            try:
                bells = [_core.Doorbell(fd) for fd in fds[1:]]
                self.area = Area.open(fds.pop(0))
            finally:
                handshake.close_all(fds)
        except Violation as violation:
            self._sock.close()
            raise DriverError(errno.EPROTO, str(violation)) from None
        except BaseException:
            self._sock.close()
            raise
        self.area.close()
        to_device, to_driver = bells[2 : 2 + PRIORITIES], bells[2 + PRIORITIES :]
        self.link: Link | None = Link(self.area, device_side=False, bell_in=bells[1], bell_out=bells[0])
        self.sender = self.area.sender(to_device, to_device=True)
        self.receiver = self.area.receiver(to_device=False)
        self.rings = ChannelRings(self.area, device_side=False)
        self.rings.listen(self.receiver, self._rings_key)
        self.rings.speak(self.sender)
        scheduler = loop.scheduler
        self._link_key = loop.key(self._link_turn, 0)
        self._socket_key = loop.key(self._socket_turn, 0)
        self._fault_key = loop.key(self._faulted, 0)
        self._sock.setblocking(False)
        self._link_bell = bells[1].fileno()
        scheduler.add_fd(self._link_bell, self._link_key)
        scheduler.add_fd(self._sock.fileno(), self._socket_key)
        scheduler.add_events(self.receiver, to_driver, self._fault_key)

    def _greeted(self) -> tuple[Greeting, list[int]]:
        try:
            packet, fds = handshake.receive_packet(self._sock, DESCRIPTORS)
        except TimeoutError:
            raise DriverError(errno.ETIMEDOUT, "the bus does not greet") from None
        try:
            if not packet:
                raise DriverError(errno.ECONNRESET, "the bus closed the connection")
            greeting = Greeting.unpack(packet)
            if greeting.errno:
                raise DriverError(greeting.errno, greeting.text)
            if len(fds) != DESCRIPTORS or greeting.priorities != PRIORITIES:
                raise Violation("greeting", f"{len(fds)} descriptors for {greeting.priorities} priorities")
        except BaseException:
            handshake.close_all(fds)
            raise
        return greeting, fds

    def accept(self, hello: msg.HelloResponse) -> None:
        """Let the bus map this driver's memory."""
        cookie = self._send_descriptor(self.arena.fd)
        body = msg.MemoryAdd(self.arena.address, self.arena.size, 0, msg.Protection.READ | msg.Protection.WRITE, cookie)
        answer = self.call(body, msg.MemoryAddResponse)
        if answer.errno:
            raise DriverError(answer.errno, "the bus does not take this driver's memory")

    def _send_descriptor(self, fd: int) -> int:
        cookie = next(self._cookies)
        handshake.send_packet(self._sock, handshake.pack_cookie(cookie), [fd])
        return cookie

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
            self._broken(f"the bus broke the link: {violation}")
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
            self._broken(f"the bus broke the rings of channels: {violation}")
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
            self._broken(f"the bus broke the rings of channels: {violation}")
            return False

    def has_room(self) -> bool:
        """The rings say so themselves."""
        return True

    def map_region(self, offset: int, size: int) -> memoryview | Mirror:
        """A part of the area."""
        return self.area.region(offset, size)

    def _socket_turn(self) -> bool:
        """The socket only shows that the bus is alive."""
        if self.lost is not None:
            return False
        try:
            packet, fds = handshake.receive_packet(self._sock, 0)
        except BlockingIOError:
            return False
        except (OSError, Violation) as error:
            self._broken(str(error))
            return False
        handshake.close_all(fds)
        self._broken("the bus sent what it must not" if packet else "the bus is gone")
        return False

    def _faulted(self) -> bool:
        if self.receiver.fault is not None:
            self._broken(f"the bus broke the event rings: {self.receiver.fault}")
        return False

    def _broken(self, reason: str) -> None:
        # What the bus said before it went is still in the link: the answers that it gave shall be heard.
        self.end(DriverError(errno.ECONNRESET, reason))

    # Queues.

    def prepare(self, device: RemoteDevice) -> None:
        """Ask for the device's event sources in its present generation."""
        answer = self.call(msg.Sources(), msg.SourcesResponse, device.address)
        if answer.first_source + len(answer.priorities) > self.area.geometry.max_sources:
            raise DriverError(errno.EPROTO, "the bus gives event sources that it has not")
        device.priorities = answer.priorities
        self._sources[device.address] = _Sources(answer.first_source, answer.generation, answer.priorities)

    def open_queue(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a ring in the arena, signal it by events or by doorbells of its own, and tell the bus."""
        sources = self._sources[device.address]
        if index >= len(sources.priorities):
            raise DriverError(errno.EPROTO, f"the bus gives no event source for queue {index}")
        source, priority = sources.first + index, device.queue_priority(index)
        queues: list[RemoteQueue] = []
        key = self.loop.key(lambda: queues[0].reap() if queues else False, priority)
        sources.keys.append(key)
        if self._direct:
            signal = self._pair_doorbells(device, index, source, key, queues)
        else:
            signal = self.sender.open(source, sources.generation, priority)
            self.receiver.open(source, sources.generation, key)
        sources.signals[index] = signal
        ring = self._make_ring(device, index, size)
        self._tell_ring(device, index, ring)
        queues.append(RemoteQueue(device, index, self.arena, self.arena_lock, ring))
        return queues[0]

    def _make_ring(self, device: RemoteDevice, index: int, size: int) -> _core.DriverQueue:
        sources = self._sources[device.address]
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
            self.arena.give_back(self._sources[device.address].places.pop(queue.index))
        ring = self._make_ring(device, queue.index, size)
        queue.renew(ring)
        self._tell_ring(device, queue.index, ring)

    def _pair_doorbells(
        self, device: RemoteDevice, index: int, source: int, key: int, queues: list[RemoteQueue]
    ) -> _core.Signal:
        """Give a queue two eventfds of its own: one notification, one doorbell."""
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        try:
            kick, call = _core.Doorbell(fds[0]), _core.Doorbell(fds[1])
            cookies = [self._send_descriptor(fd) for fd in fds]
        finally:
            handshake.close_all(fds)
        self.call(msg.Doorbell(index, *cookies), msg.DoorbellResponse, device.address)

        def rung() -> bool:
            call.drain()
            return queues[0].reap() if queues else False

        bell_key = self.loop.key(rung, device.queue_priority(index))
        self._sources[device.address].keys.append(bell_key)
        self._sources[device.address].bells.append(call)
        self.loop.scheduler.add_fd(call.fileno(), bell_key)
        return _core.Signal.direct(kick, self.area.stats_place(source, to_device=True))

    def close_queues(self, device: RemoteDevice) -> None:
        """Forget keys and signals, and give the rings' memory back."""
        sources = self._sources.pop(device.address, None)
        if sources is None:
            return
        for bell in sources.bells:
            self.loop.scheduler.remove_fd(bell.fileno())
        for key in sources.keys:
            self.loop.drop_key(key)
        for index, place in sources.places.items():
            if not self._direct:
                self.sender.close(sources.first + index)
                self.receiver.close(sources.first + index)
            with self.arena_lock:
                self.arena.give_back(place)

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """What this side's signal counted."""
        sources = self._sources.get(device.address)
        signal = sources.signals.get(index) if sources is not None else None
        return signal.counters if signal is not None else (0, 0, 0)

    def close(self) -> None:
        """Part from the bus, which notices that the socket is closed."""
        self.loop.scheduler.remove_events(self.receiver)
        self.loop.scheduler.remove_fd(self._sock.fileno())
        self.loop.scheduler.remove_fd(self._link_bell)
        for sources in self._sources.values():
            for bell in sources.bells:
                self.loop.scheduler.remove_fd(bell.fileno())
        self._sock.close()
        self.loop.close()
        # Descriptors and mappings go now, not when some cycle of this side's objects is collected.
        self._sources.clear()
        self.arena.close()
        self.link = None
        del self.sender, self.receiver, self.rings, self.area


def _connect(path: Path, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        reason = {
            errno.ENOENT: "there is no such socket; is the bus running? see vbus ls",
            errno.ECONNREFUSED: "nobody listens there; is the bus running? see vbus ls",
            errno.EPROTOTYPE: f"it is a stream socket: attach to unix:{path}",
        }.get(error.errno or 0, error.strerror or str(error))
        raise DriverError(error.errno or errno.ECONNREFUSED, f"process:{path}: {reason}") from None
    return sock
