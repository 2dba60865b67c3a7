"""The guest connector of `stream`: drivers whose device is at the far end of a byte stream.

The drivers' rings are local and end here. This side is their device: it takes each request off the ring, sends the
bytes that the device may read and the room that it may write, and puts what comes back where the driver wants it.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vbus import _core, msg
from vbus.address import Address
from vbus.channel import Mirror
from vbus.errors import DriverError, TlsError, Violation
from vbus.msg.wire import WireWriter, tune
from vbus.proxy.connector import GuestConnector
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.virtio import features
from vbus.virtio.ring import MAX_SIZE

if TYPE_CHECKING:
    import ssl

    # A tenth of a second that only those pay who want it.
    from vbus.tls import Tls

MAX_MESSAGE = 65528
READ_SIZE = 1 << 18
TAKE = 64
MAX_REGION = 4 << 20
HEADROOM = 64
"""Bytes of a message that are not payload, at most."""


@dataclass
class _Outstanding:
    request: _core.Request
    received: int = 0


@dataclass
class _End:
    """One local ring, seen from the device's side."""

    device: RemoteDevice
    index: int
    queue: RemoteQueue
    core: _core.DeviceQueue
    place: int
    priority: int
    take: int
    reap: int
    """The scheduler's keys of its two sides."""
    outstanding: dict[int, _Outstanding] = field(default_factory=dict)
    sent: int = 0


class StreamConnector(GuestConnector):
    """Attached over TCP or a Unix stream socket. DriverError when the bus refuses or is not there."""

    def __init__(
        self,
        address: Address,
        loop: Loop,
        timeout: float,
        context: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        super().__init__(loop, timeout)
        self._memory = _core.Memory()
        self._memory.add(self.arena.address, self.arena.mapping)
        self._ends: dict[tuple[int, int], _End] = {}
        self._ends_lock = threading.Lock()
        self._fragment = MAX_MESSAGE - HEADROOM
        self._splitter = msg.Splitter(MAX_MESSAGE)
        self._sock = _connect(address, timeout)
        self._cannot_write = ""
        self._key = loop.key(self._readable, 0)
        self._tls = _shake_hands(self._sock, context, server_name or address.host) if context is not None else None
        tune(self._sock)
        self._writer = WireWriter(self._sock, "driver", self._write_failed, self.channels.room, self._tls)
        loop.scheduler.add_fd(self._sock.fileno(), self._key)

    def accept(self, hello: msg.HelloResponse) -> None:
        """Keep to what the bus said that it takes."""
        self.max_request = hello.max_request
        self._fragment = min(MAX_MESSAGE, hello.max_msg_size) - HEADROOM
        if self._fragment < HEADROOM:
            raise DriverError(errno.EPROTO, f"the bus takes messages of {hello.max_msg_size} bytes only")

    def transmit(self, message: bytes, priority: int) -> None:
        """Queue for the writer."""
        if not self._writer.send(message, priority) and not self._cannot_write:
            raise DriverError(errno.ECONNRESET, "the bus does not read, or is gone")

    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Queue for the writer."""
        return self._writer.send(message, priority)

    def has_room(self) -> bool:
        """Whether little waits for the bus."""
        return self._writer.has_room

    def map_region(self, offset: int, size: int) -> memoryview | Mirror:
        """A copy of the region."""
        if size > MAX_REGION:
            raise Violation("channel-region", f"a region of {size} bytes; {MAX_REGION} are the most")
        return Mirror(size)

    def _write_failed(self, why: str) -> None:
        """The bus is gone, or refused: what it said before is read first."""
        self._cannot_write = f"the stream broke: {why}"
        self.loop.scheduler.mark(self._key)

    def _readable(self) -> bool:
        if self.lost is not None:
            return False
        try:
            data = self._sock.recv(READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if self._cannot_write:
                self._broken(self._cannot_write)
            return False
        except OSError as error:
            self._broken(f"the stream broke: {error.strerror}")
            return False
        if not data:
            self._broken("the bus is gone")
            return False
        try:
            if self._tls is not None:
                data = self._tls.feed(data)
                self._writer.poke()
            for piece in self._splitter.feed(data):
                if isinstance(piece, msg.Malformed):
                    raise Violation("malformed-message", str(piece))
                self.received(piece)
        except Violation as violation:
            self._broken(f"the bus broke the link: {violation}")
        except TlsError as error:
            # A bus says what it thinks of our certificate only after it has let us finish (TLS 1.3).
            self.end(DriverError(errno.EACCES, f"tls: {error}"))
        return bool(self._cannot_write)

    def _broken(self, reason: str) -> None:
        self.end(DriverError(errno.ECONNRESET, reason))

    # The data path.

    def data_received(self, frame: msg.Frame) -> bool:
        """Take what the device has written."""
        match frame.body:
            case msg.Data(vq_index=index, id=number, direction=direction, offset=offset, data=data):
                self._written(frame.dev_num, index, number, direction, offset, data)
            case msg.Complete(vq_index=index, id=number, written=written, data=data):
                self._completed(frame.dev_num, index, number, written, data)
            case _:
                return False
        return True

    def _find(self, number: int, index: int, request: int) -> tuple[_End, _Outstanding] | None:
        """The request that a message names. None when its queue was reset while the message was on its way."""
        with self._ends_lock:
            end = self._ends.get((number, index))
        if end is None:
            return None
        found = end.outstanding.get(request)
        if found is None:
            raise Violation("request-unknown", f"request {request} of queue {index} is not outstanding")
        return end, found

    def _written(self, number: int, index: int, request: int, direction: int, offset: int, data: bytes) -> None:
        found = self._find(number, index, request)
        if found is None:
            return
        _, outstanding = found
        if direction != msg.Direction.TO_DRIVER or offset != outstanding.received:
            raise Violation("data-offset", f"bytes at {offset}, {outstanding.received} came before")
        outstanding.request.write(data)
        outstanding.received += len(data)

    def _completed(self, number: int, index: int, request: int, written: int, data: bytes) -> None:
        found = self._find(number, index, request)
        if found is None:
            return
        end, outstanding = found
        if outstanding.received + len(data) != written:
            raise Violation("data-missing", f"{outstanding.received + len(data)} bytes came of {written}")
        outstanding.request.write(data)
        del end.outstanding[request]
        end.core.complete([outstanding.request])

    def _take(self, end: _End) -> bool:
        """Send what the driver has put on its ring."""
        if self.lost is not None:
            return False
        requests = end.core.take(TAKE)
        for request in requests:
            end.outstanding[request.index] = _Outstanding(request)
            end.sent += 1
            total = request.readable
            first = request.read(self._fragment)
            body = msg.Request(end.index, request.index, total, request.writable, first)
            self.send(body, end.device.address, priority=end.priority)
            at = len(first)
            while at < total:
                part = request.read(self._fragment)
                more = msg.Data(end.index, request.index, msg.Direction.TO_DEVICE, at, part)
                self.send(more, end.device.address, priority=end.priority)
                at += len(part)
        # Once more after the last: the ring turns its notifications on when it gives none.
        return bool(requests)

    # Queues.

    def prepare(self, device: RemoteDevice) -> None:
        """Nothing is shared: the stream carries the signals. What is urgent is still asked for."""
        device.priorities = self.call(msg.Sources(), msg.SourcesResponse, device.address).priorities

    def open_queue(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a local ring with both its sides here, and tell the bus how much may be outstanding."""
        ends: list[_End] = []
        priority = device.queue_priority(index)
        take = self.loop.key(lambda: self._take(ends[0]) if ends else False, priority)
        reap = self.loop.key(lambda: ends[0].queue.reap() if ends else False, priority)
        place, ring, core = self._make_ring(device, size, take, reap)
        queue = RemoteQueue(device, index, self.arena, self.arena_lock, ring)
        end = _End(device, index, queue, core, place, priority, take, reap)
        ends.append(end)
        with self._ends_lock:
            self._ends[device.address, index] = end
        self.call(msg.SetVqueue(index, size, 0, 0, 0), msg.SetVqueueResponse, device.address)
        return queue

    def _make_ring(
        self, device: RemoteDevice, size: int, take: int, reap: int
    ) -> tuple[int, _core.DriverQueue, _core.DeviceQueue]:
        """Both sides of a ring, and its place in the arena; each marks the other's key."""
        ring_features = features.of_ring(device.negotiated)
        with self.arena_lock:
            place = self.arena.take(_core.DriverQueue.bytes_needed(size, packed=ring_features["packed"]))
        if place is None:
            raise DriverError(errno.ENOMEM, f"no room for a queue of {size} in the arena")
        to_take, to_reap = (_core.Signal.local(self.loop.scheduler, key) for key in (take, reap))
        ring = _core.DriverQueue(self.arena.mapping, place, self.arena.address, size, signal=to_take, **ring_features)
        core = _core.DeviceQueue(MAX_SIZE)
        core.start(self._memory, size, ring.desc, ring.driver, ring.device, signal=to_reap, **ring_features)
        return place, ring, core

    def stop_queue(self, device: RemoteDevice, queue: RemoteQueue) -> None:
        """Take nothing more off the local ring. What is on its way arrives before the bus is told of another ring."""
        self._ends[device.address, queue.index].core.stop()

    def renew_queue(self, device: RemoteDevice, queue: RemoteQueue, size: int) -> None:
        """Make another local ring in place of the old one."""
        end = self._ends[device.address, queue.index]
        with self.arena_lock:
            self.arena.give_back(end.place)
        end.outstanding.clear()
        end.place, ring, end.core = self._make_ring(device, size, end.take, end.reap)
        queue.renew(ring)
        self.call(msg.SetVqueue(queue.index, size, 0, 0, 0), msg.SetVqueueResponse, device.address)

    def close_queues(self, device: RemoteDevice) -> None:
        """Stop the local rings and give their memory back."""
        with self._ends_lock:
            ends = [self._ends.pop(key) for key in list(self._ends) if key[0] == device.address]
        for end in ends:
            end.core.stop()
            for key in (end.take, end.reap):
                self.loop.drop_key(key)
            with self.arena_lock:
                self.arena.give_back(end.place)

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """In band, every request is an event, sent, and a doorbell."""
        end = self._ends.get((device.address, index))
        return (end.sent,) * 3 if end is not None else (0, 0, 0)

    def close(self) -> None:
        """Part from the bus."""
        self.loop.scheduler.remove_fd(self._sock.fileno())
        self._writer.close()
        self._sock.close()
        self.loop.close()
        self._ends.clear()
        self.arena.close()
        self._memory.clear()


def _shake_hands(sock: socket.socket, context: ssl.SSLContext, name: str) -> Tls:
    """TLS on a connected socket, within its timeout. DriverError; the socket is closed then."""
    from vbus.tls import Tls

    deadline = time.monotonic() + (sock.gettimeout() or 0.0)
    tls = Tls(context, server_side=False, server_name=name)
    try:
        tls.start()
        while not tls.ready:
            # All of it together: who dribbles shall not hold this side for ever.
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            sock.sendall(tls.wrap([]))
            data = sock.recv(READ_SIZE)
            if not data:
                raise DriverError(errno.ECONNRESET, "tls: the bus closed the connection")
            if tls.feed(data):
                raise DriverError(errno.EPROTO, "tls: the bus speaks before it was asked")
    except DriverError:
        sock.close()
        raise
    except TlsError as error:
        with contextlib.suppress(OSError):
            sock.send(tls.wrap([]))
        sock.close()
        raise DriverError(errno.EACCES, f"tls: {error}") from None
    except TimeoutError:
        sock.close()
        raise DriverError(errno.ETIMEDOUT, "tls: the bus does not answer") from None
    except OSError as error:
        sock.close()
        raise DriverError(error.errno or errno.ECONNRESET, f"tls: {error.strerror}") from None
    return tls


def _connect(address: Address, timeout: float) -> socket.socket:
    try:
        if address.is_network:
            return socket.create_connection((address.host, address.port), timeout)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(timeout)
        try:
            sock.connect(str(address.path))
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        reason = {
            errno.ENOENT: "there is no such socket; is the bus running? see vbus ls",
            errno.ECONNREFUSED: "nobody listens there; is the bus running? see vbus ls",
            errno.EPROTOTYPE: f"it is the socket of a process connector: attach to process:{address.path}",
        }.get(error.errno or 0, error.strerror or str(error))
        raise DriverError(error.errno or errno.ECONNREFUSED, f"{address}: {reason}") from None
    return sock
