"""The guest connector of `ivshmem`, without a guest: this process is the client that QEMU would be, and its kernel.

It has what a guest has: the memory of the function, doorbells each way, sessions. So what holds of it holds of guests,
and their modules have something to be compared with.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from pathlib import Path

from vbus import _core, msg
from vbus.errors import DriverError, Violation
from vbus.proxy.connectors.area import AreaConnector
from vbus.proxy.connectors.knock import connected
from vbus.proxy.loop import Loop
from vbus.shmem import ivshmem
from vbus.shmem.area import HEADER, PRIORITIES, Area, Geometry, check_sealed
from vbus.shmem.arena import Arena

LOOK_SECONDS = 0.01


class Function:
    """What a guest has of a bus: memory, and doorbells each way. DriverError when the bus is not there or refuses."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.timeout = timeout
        self.sock = connected(
            "ivshmem",
            path,
            socket.SOCK_STREAM,
            timeout,
            running="is the bus running? see vbus ls",
            otherwise=f"it is no socket of a function: attach to process:{path}",
        )
        self.fd = -1
        self.closed = False
        self._session = 0
        try:
            self.fd, bells = _introduced(self.sock)
            self.inward, self.outward = bells[ivshmem.DRIVER_SIDE], bells[ivshmem.DEVICE_SIDE]
            self.size = check_sealed(self.fd, ivshmem.MOST_BAR)
            self.memory = _core.Mapping(self.fd, self.size)
            self._view = memoryview(self.memory)
        except Violation as violation:
            self.close()
            raise DriverError(errno.EPROTO, str(violation)) from None
        except TimeoutError:
            self.close()
            raise DriverError(errno.ETIMEDOUT, f"ivshmem:{path}: the bus does not answer") from None
        except EOFError:
            self.close()
            raise DriverError(errno.EACCES, f"ivshmem:{path}: the bus does not let this side in") from None
        except BaseException:
            self.close()
            raise

    def begin(self) -> Area:
        """Ask for a session, and wait for it: the area, made anew. DriverError: ETIMEDOUT, EPROTO."""
        taken = (0, *Area.sessions(self._view))
        session = random.getrandbits(32)
        while session in taken:
            session = random.getrandbits(32)
        Area.request_session(self._view, session)
        self.outward[ivshmem.SESSION_VECTOR].ring()
        deadline = time.monotonic() + self.timeout
        while Area.sessions(self._view)[1] != session:
            if time.monotonic() > deadline:
                raise DriverError(errno.ETIMEDOUT, "the bus gives no session")
            time.sleep(LOOK_SECONDS)
        self._session = session
        try:
            geometry = Geometry.unpack(bytes(self._view[: HEADER.size]))
            if self.size - geometry.total < ivshmem.LEAST_WINDOW:
                raise Violation("area-geometry", f"{self.size} bytes of memory, and an area of {geometry.total}")
        except Violation as violation:
            raise DriverError(errno.EPROTO, str(violation)) from None
        return Area(os.dup(self.fd), self.memory, geometry)

    @property
    def has_session(self) -> bool:
        """Whether the bus has not ended it."""
        return Area.sessions(self._view)[1] == self._session

    def close(self) -> None:
        """Part from the bus, which notices that the socket is closed."""
        if not self.closed:
            self.closed = True
            self.sock.close()
            if self.fd >= 0:
                os.close(self.fd)


class IvshmemConnector(AreaConnector):
    """A session on a function, which is taken. DriverError, as `Function.begin`."""

    def __init__(self, function: Function, loop: Loop) -> None:
        self._function = function
        try:
            area = function.begin()
        except BaseException:
            function.close()
            raise
        super().__init__(loop, function.timeout, _arena(function.fd, area.geometry, function.size))
        area.close()
        link, first = ivshmem.LINK_VECTOR, ivshmem.FIRST_EVENT_VECTOR
        inward, outward = function.inward, function.outward
        self._to_device = outward[first : first + PRIORITIES]
        self.connect(area, (outward[link], inward[link]), self._to_device, inward[first : first + PRIORITIES])
        self._socket_key = loop.key(self._socket_turn, 0)
        function.sock.setblocking(False)
        loop.scheduler.add_fd(function.sock.fileno(), self._socket_key)

    def accept(self, hello: msg.HelloResponse) -> None:
        """Ring as the bus does. DriverError for memory of another kind."""
        if hello.memory_kind != msg.MemoryKind.WINDOW:
            raise DriverError(errno.EPROTO, f"the bus has memory of kind {hello.memory_kind} here")
        if hello.signal_kind == msg.SignalKind.DIRECT:
            # Nothing was signalled so far.
            self.sender = self.area.sender(self._to_device, to_device=True, always=True)
            self.rings.speak(self.sender)

    def _link_turn(self) -> bool:
        if self.lost is None and not self._function.has_session:
            self.broken("the bus ended the session")
        return super()._link_turn()

    def _socket_turn(self) -> bool:
        """The socket only shows that the bus is alive."""
        if self.lost is not None:
            return False
        try:
            said = self._function.sock.recv(64)
        except BlockingIOError:
            return False
        except OSError as error:
            self.broken(str(error))
            return False
        self.broken("the bus sent what it must not" if said else "the bus is gone")
        return False

    def close(self) -> None:
        """Part from the bus, which notices that the socket is closed."""
        self.loop.scheduler.remove_fd(self._function.sock.fileno())
        self._function.close()
        super().close()
        del self._function


def _arena(fd: int, geometry: Geometry, size: int) -> Arena:
    """The largest power of two of the window."""
    start, room = ivshmem.window_of(geometry, size)
    return Arena(1 << room.bit_length() - 1, start, (os.dup(fd), start))


def _introduced(sock: socket.socket) -> tuple[int, dict[int, list[_core.Doorbell]]]:
    """The memory, and the doorbells of both sides. Violation: ivshmem-message. EOFError, TimeoutError."""
    bells: dict[int, list[_core.Doorbell]] = {ivshmem.DEVICE_SIDE: [], ivshmem.DRIVER_SIDE: []}
    memory = -1
    try:
        for expected in (ivshmem.VERSION, ivshmem.DRIVER_SIDE):
            value, fd = ivshmem.receive(sock)
            if fd is not None:
                os.close(fd)
            if value != expected:
                raise Violation("ivshmem-message", f"{value} where {expected} was due")
        while len(bells[ivshmem.DRIVER_SIDE]) < ivshmem.VECTORS:
            value, fd = ivshmem.receive(sock)
            if fd is None or (value == ivshmem.MEMORY) != (memory < 0) or (memory >= 0 and value not in bells):
                if fd is not None:
                    os.close(fd)
                raise Violation("ivshmem-message", f"{value} where memory or a doorbell was due")
            if value == ivshmem.MEMORY:
                memory = fd
                continue
            bells[value].append(_core.Doorbell(fd))
            os.close(fd)
        if len(bells[ivshmem.DEVICE_SIDE]) != ivshmem.VECTORS:
            raise Violation("ivshmem-message", f"{len(bells[ivshmem.DEVICE_SIDE])} doorbells towards the bus")
    except BaseException:
        if memory >= 0:
            os.close(memory)
        raise
    return memory, bells
