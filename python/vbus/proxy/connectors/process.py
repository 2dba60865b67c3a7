"""The guest connector of `process`: this process drives devices that another one serves, through shared memory."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vbus import _core, msg
from vbus.errors import DriverError, Violation
from vbus.proxy.connectors.area import AreaConnector
from vbus.proxy.connectors.knock import connected
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.shmem import handshake
from vbus.shmem.area import PRIORITIES, Area
from vbus.shmem.handshake import Greeting

DESCRIPTORS = 3 + 2 * PRIORITIES


class ProcessConnector(AreaConnector):
    """Attached to the socket of a `process` connector. DriverError when the bus refuses or is not there."""

    def __init__(self, path: Path, loop: Loop, timeout: float) -> None:
        super().__init__(loop, timeout)
        self._cookies = itertools.count(1)
        self._bells: dict[tuple[int, int], tuple[_core.Doorbell, int]] = {}
        """By device and queue: what the bus rings, and the key that this marks."""
        self._sock = connected(
            "process",
            path,
            socket.SOCK_SEQPACKET,
            timeout,
            running="is the bus running? see vbus ls",
            otherwise=f"it is a stream socket: attach to unix:{path}",
        )
        try:
            greeting, fds = self._greeted()
            self._direct = greeting.signal_kind == msg.SignalKind.DIRECT
            try:
                bells = [_core.Doorbell(fd) for fd in fds[1:]]
                area = Area.open(fds.pop(0))
            finally:
                handshake.close_all(fds)
        except Violation as violation:
            self._sock.close()
            raise DriverError(errno.EPROTO, str(violation)) from None
        except BaseException:
            self._sock.close()
            raise
        area.close()
        self.connect(area, (bells[0], bells[1]), bells[2 : 2 + PRIORITIES], bells[2 + PRIORITIES :])
        self._socket_key = loop.key(self._socket_turn, 0)
        self._sock.setblocking(False)
        loop.scheduler.add_fd(self._sock.fileno(), self._socket_key)

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

    def _socket_turn(self) -> bool:
        """The socket only shows that the bus is alive."""
        if self.lost is not None:
            return False
        try:
            packet, fds = handshake.receive_packet(self._sock, 0)
        except BlockingIOError:
            return False
        except (OSError, Violation) as error:
            self.broken(str(error))
            return False
        handshake.close_all(fds)
        self.broken("the bus sent what it must not" if packet else "the bus is gone")
        return False

    # Signals.

    def new_signal(
        self, device: RemoteDevice, index: int, source: int, key: int, queues: list[RemoteQueue]
    ) -> _core.Signal:
        """An event, or two eventfds of the queue's own: one notification, one doorbell."""
        if not self._direct:
            return super().new_signal(device, index, source, key, queues)
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
        self.sources[device.address].keys.append(bell_key)
        self._bells[device.address, index] = call, bell_key
        self.loop.scheduler.add_fd(call.fileno(), bell_key)
        return _core.Signal.direct(kick, self.area.stats_place(source, to_device=True))

    @contextlib.contextmanager
    def lent_bell(self, device: RemoteDevice, index: int) -> Iterator[_core.Doorbell | None]:
        """A queue's own doorbell, which the loop does not listen to meanwhile; None where signals are tunnelled."""
        bell, key = self._bells.get((device.address, index), (None, 0))
        if bell is None:
            yield None
            return
        self.loop.scheduler.remove_fd(bell.fileno())
        try:
            yield bell
        finally:
            self.loop.scheduler.add_fd(bell.fileno(), key)

    def close_queues(self, device: RemoteDevice) -> None:
        """Listen to its doorbells no more, and forget its rings."""
        for address, index in [place for place in self._bells if place[0] == device.address]:
            bell, _ = self._bells.pop((address, index))
            self.loop.scheduler.remove_fd(bell.fileno())
        super().close_queues(device)

    def close(self) -> None:
        """Part from the bus, which notices that the socket is closed."""
        self.loop.scheduler.remove_fd(self._sock.fileno())
        for bell, _ in self._bells.values():
            self.loop.scheduler.remove_fd(bell.fileno())
        self._bells.clear()
        self._sock.close()
        super().close()
