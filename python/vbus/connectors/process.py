"""The `process` connector: drivers in other processes and containers of this machine.

Link: message rings in a shared area. Memory: the driver's own sealed memfds, mapped here. Signal: `tunnelled` through
the area's event rings, or `direct`, a pair of eventfds a queue. The Unix socket passes descriptors and shows that the
other side is alive; no message ever travels on it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from vbus import _core, msg, rundir
from vbus.bus import Account, Bus, Queue, Slot, reserve_all
from vbus.connectors.area_peer import AreaPeer
from vbus.connectors.eventfd import is_eventfd
from vbus.connectors.peer import MAX_DRIVER_MEMORY
from vbus.connectors.peer_host import PeerHost
from vbus.errors import UsageError, Violation
from vbus.shmem import handshake
from vbus.shmem.area import PRIORITIES, Area, check_sealed
from vbus.shmem.handshake import Greeting
from vbus.units import format_size

MAX_WAITING_FDS = 32
"""Descriptors that a driver may have sent ahead of the messages that name them."""
SIGNAL_KINDS = {"direct": msg.SignalKind.DIRECT, "tunnelled": msg.SignalKind.TUNNELLED}


class Process(PeerHost):
    """Lets processes of this machine drive the bus's devices, through memory that both sides map.

    `socket` is where drivers attach; by default a path that is printed. UsageError for a `signal` other than
    `tunnelled` or `direct`.
    """

    type_name: ClassVar[str] = "process"

    def __init__(
        self,
        socket: Path | str | None = None,
        *,
        devices: Iterable[str] | None = None,
        signal: Literal["tunnelled", "direct"] = "tunnelled",
    ) -> None:
        super().__init__(devices=devices)
        if signal not in SIGNAL_KINDS:
            raise UsageError(f"signal {signal!r}: tunnelled or direct")
        self.signal = signal
        self.socket = Path(socket) if socket is not None else None

    @property
    def address(self) -> str:
        """`process:PATH`."""
        return f"process:{self.socket}"

    def listen(self, bus: Bus, name: str) -> socket.socket:
        """Bind the socket."""
        if self.socket is None:
            self.socket = rundir.socket_path(bus.name, name)
        return self.unix_listener(self.socket, socket.SOCK_SEQPACKET)

    def greet(self, sock: socket.socket, bus: Bus, label: str, accounts: list[Account]) -> ProcessPeer:
        """Make the area and the doorbells, and send them."""
        return ProcessPeer(self, bus, label, accounts, sock)

    def refuse(self, sock: socket.socket, reason: str) -> None:
        """Greet with the reason and nothing else."""
        sock.setblocking(False)
        handshake.send_packet(sock, Greeting(0, 0, errno.EACCES, reason).pack(), [])


class ProcessPeer(AreaPeer):
    """One process on the other side of an area."""

    memory_kind = msg.MemoryKind.SHARED

    def __init__(self, host: Process, bus: Bus, label: str, accounts: list[Account], sock: socket.socket) -> None:
        raw = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2 + 2 * PRIORITIES)]
        try:
            area = Area.create(bus.name, bus.max_sources)
            try:
                bells = [_core.Doorbell(fd) for fd in raw]
                super().__init__(host, bus, label, accounts, area)
                self.signal_kind = SIGNAL_KINDS[host.signal]
                self._direct = host.signal == "direct"
                self._sock = sock
                self._fds: dict[int, int] = {}
                self._mapped: dict[int, int] = {}
                """Bytes of each region that are on the members' accounts, by its address."""
                self._bells: dict[tuple[int, int], tuple[_core.Doorbell, _core.Doorbell]] = {}
                sock.setblocking(False)
                try:
                    handshake.send_packet(sock, Greeting(self.signal_kind, PRIORITIES).pack(), [area.fd, *raw])
                except BaseException:
                    # It died before it was greeted. Its keys must not keep the area.
                    self.actor.close()
                    raise
            finally:
                area.close()
        finally:
            handshake.close_all(raw)
        self.connect((bells[0], bells[1]), bells[2 : 2 + PRIORITIES], bells[2 + PRIORITIES :])
        self.actor.watch(sock.fileno(), self._socket_turn)

    # The socket.

    def _socket_turn(self) -> None:
        """Take descriptors that the driver sent; the end of the socket is the end of the driver."""
        while not self.parted:
            try:
                packet, fds = handshake.receive_packet(self._sock, 1)
            except BlockingIOError:
                return
            except OSError as error:
                self.part(f"the socket broke: {error.strerror}")
                return
            except Violation as violation:
                self.part(str(violation))
                return
            if not packet and not fds:
                self.part("the driver closed the socket")
                return
            self._take_descriptor(packet, fds)

    def _take_descriptor(self, packet: bytes, fds: list[int]) -> None:
        cookie = handshake.read_cookie(packet)
        problem = None
        if cookie is None or len(fds) != 1:
            problem = "bad-packet: not one descriptor with its cookie"
        elif cookie in self._fds:
            problem = f"bad-packet: cookie {cookie} twice"
        elif len(self._fds) >= MAX_WAITING_FDS:
            problem = f"too-many-descriptors: {MAX_WAITING_FDS} wait for their messages"
        if problem is not None or cookie is None:
            handshake.close_all(fds)
            self.part(problem or "bad-packet")
        else:
            self._fds[cookie] = fds[0]

    def _claim_descriptor(self, cookie: int) -> int:
        """The descriptor of a cookie. It was sent before the message that names it, so that it is here by now."""
        self._socket_turn()
        fd = self._fds.pop(cookie, None)
        if fd is None:
            raise Violation("descriptor-missing", f"no descriptor came with cookie {cookie}")
        return fd

    # Memory.

    def bodied(self, frame: msg.Frame) -> bool:
        """Memory and doorbells."""
        match frame.body:
            case msg.MemoryAdd(size=size) as region:
                refusing = reserve_all(self.accounts, "memory", size)
                if refusing is not None:
                    os.close(self._claim_descriptor(region.cookie))
                    limit = format_size(refusing.limits["memory"])
                    self.refuse(frame, errno.ENOMEM, f"{refusing.name} may have {limit} of memory mapped here")
                    return True
                # Counted from now on, so that whatever fails below is given back at the end of the link.
                self._mapped[region.address] = self._mapped.get(region.address, 0) + size
                self._add_memory(region.address, size, region.offset, region.protection, region.cookie)
                self.send(msg.MemoryAddResponse(0), token=frame.token)
            case msg.MemoryRemove(address=address):
                self.memory.remove(address)
                self._unmapped(self._mapped.pop(address, 0))
                self.send(msg.MemoryRemoveResponse(0), token=frame.token)
            case msg.Doorbell(vq_index=index, kick_cookie=kick, call_cookie=call):
                self._pair_doorbells(frame.dev_num, index, kick, call)
                self.send(msg.DoorbellResponse(0), frame.dev_num, frame.token)
            case _:
                return False
        return True

    def _unmapped(self, size: int) -> None:
        for account in self.accounts:
            account.give_back("memory", size)

    def _add_memory(self, address: int, size: int, offset: int, protection: int, cookie: int) -> None:
        fd = self._claim_descriptor(cookie)
        try:
            length = check_sealed(fd, MAX_DRIVER_MEMORY)
            if size == 0 or offset + size > length:
                raise Violation("region-outside-file", f"{offset:#x} + {size:#x} of a file of {length:#x} bytes")
            writable = bool(protection & msg.Protection.WRITE)
            try:
                mapping = _core.Mapping(fd, size, offset, writable=writable)
            except (OSError, ValueError) as error:
                raise Violation("region-not-mappable", str(error)) from None
            self.memory.add(address, mapping, writable=writable)
        finally:
            os.close(fd)

    # Signals.

    def open_sources(self, slot: Slot) -> None:
        """Listen to the slot's event sources, where signals are tunnelled."""
        if not self._direct:
            super().open_sources(slot)

    def _pair_doorbells(self, number: int, index: int, kick: int, call: int) -> None:
        slot = self.bus.slot_at(number)
        if slot is None or slot.owner is not self or not self._direct:
            raise Violation("doorbell-unasked", f"a doorbell for queue {index} of device {number}")
        queue = slot.queue_at(index)
        fds = [self._claim_descriptor(kick)]
        try:
            fds.append(self._claim_descriptor(call))
            if not all(is_eventfd(fd) for fd in fds):
                raise Violation("doorbell-kind", "a doorbell that is no eventfd")
            bells = _core.Doorbell(fds[0]), _core.Doorbell(fds[1])
        finally:
            handshake.close_all(fds)
        self._bells[number, index] = bells
        self._signals.pop((number, index), None)
        slot.attach_doorbell(queue, bells[0])

    def new_signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """An event in the rings, or the queue's own doorbell. Violation: doorbell-missing."""
        if not self._direct:
            return super().new_signal(slot, queue)
        try:
            bell = self._bells[slot.number, queue.index][1]
        except KeyError:
            raise Violation("doorbell-missing", f"queue {queue.index} has no doorbell") from None
        return _core.Signal.direct(bell, self.area.stats_place(slot.first_source + queue.index, to_device=False))

    def slot_reset(self, slot: Slot) -> None:
        """Forget the signals of a slot."""
        super().slot_reset(slot)
        for queue in slot.queues:
            self._bells.pop((slot.number, queue.index), None)

    def close(self) -> None:
        """Give descriptors, doorbells and memory back."""
        super().close()
        self.actor.unwatch(self._sock.fileno())
        self._sock.close()
        handshake.close_all(list(self._fds.values()))
        self._fds.clear()
        self._unmapped(sum(self._mapped.values()))
        self._mapped.clear()
        self._bells.clear()
