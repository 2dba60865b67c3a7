"""The `ivshmem` connector: a guest of an unmodified QEMU sees the whole bus through one PCI function.

Link and Signal: the shared area, in the function's BAR2. Memory: the *window* behind the area, into which the guest's
modules copy what devices shall see; or, where the guest's own memory is *shared*, that memory (`guest_ram`). Doorbells
towards the bus are eventfds that QEMU rings for the guest; those towards the guest are eventfds that QEMU, or the
kernel, turns into MSI-X interrupts: one a priority.

```text
 QEMU connects ──> Machine: the memory and its doorbells, for as long as QEMU lives
                      session vector rings: the guest's modules begin (at boot, loaded again, after a fault)
                      ──> what was there before is parted from, the area is made anew
                      ──> IvshmemPeer: the session, a driver's side like any other
                            HELLO, and where memory shall be shared the guest's proofs: window, or shared
                      the session ends ──> its guest hears of it; with shared memory, when no device uses that any more
```

QEMU cannot connect again, and goes on with the memory and the doorbells that it has. So a keeper (`vbus.shmem.keeper`)
has copies of them, and of the socket: whoever serves the connector next goes on with the machine, whose guest begins a
session then.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vbus import _core, rundir
from vbus.bus import Account, Actor, Bus, peer_credentials, reserve_all
from vbus.connectors.guest_monitor import Finder
from vbus.connectors.ivshmem_peer import IvshmemPeer
from vbus.connectors.peer_host import PeerHost
from vbus.errors import UsageError
from vbus.shmem import handshake, ivshmem
from vbus.shmem.area import VERSION, Area, Geometry, sealed_memfd
from vbus.shmem.keeper import KEY_SIZE, Keeper, Kept
from vbus.units import format_size, parse_size

log = logging.getLogger("vbus.connector")

DEFAULT_BAR = 64 << 20
MAX_MACHINES = 16
LOOK_AGAIN = 0.01
"""Seconds between two looks at devices that are still being reset."""
STOP_SECONDS = 2.0
"""How long guests may take to hear that the bus stops, whose devices hang."""
SESSION_PAUSE = 0.05
"""Seconds, at least, between the beginnings of two sessions: making an area anew takes time."""


class Ivshmem(PeerHost):
    """Lets a guest of QEMU drive the bus's devices through `-device ivshmem-doorbell`, with vbus's kernel modules.

    `socket` is where QEMU connects (`vbus qemu-args` says with which options); by default a path that is printed.
    `memory` is how large the function's memory is, in bytes or as "64 MiB": a power of two, 32 MiB or more; what the
    bus's own area leaves of it is the window for buffers. With `ram`, the file that QEMU has its guest's memory in, and
    `qmp`, a socket of QEMU's that nobody else uses, devices reach buffers where they are, and the window is
    for guests of which that cannot be. With `keep`, guests outlive this process: the one that serves the same socket
    next goes on with them. UsageError for a `signal` other than `tunnelled` or `direct`, a `memory` that cannot be, or
    one of `ram` and `qmp` without the other.
    """

    type_name: ClassVar[str] = "ivshmem"

    def __init__(
        self,
        socket: Path | str | None = None,
        *,
        devices: Iterable[str] | None = None,
        signal: Literal["tunnelled", "direct"] = "tunnelled",
        memory: int | str = DEFAULT_BAR,
        ram: Path | str | None = None,
        qmp: Path | str | None = None,
        keep: bool = True,
    ) -> None:
        super().__init__(devices=devices)
        if signal not in ("tunnelled", "direct"):
            raise UsageError(f"signal {signal!r}: tunnelled or direct")
        size = parse_size(memory, "memory")
        if size & (size - 1) or not ivshmem.LEAST_BAR <= size <= ivshmem.MOST_BAR:
            least, most = format_size(ivshmem.LEAST_BAR), format_size(ivshmem.MOST_BAR)
            raise UsageError(f"memory {memory}: a power of two from {least} to {most}")
        if (ram is None) != (qmp is None):
            raise UsageError("ram and qmp go together: where the guest's memory is in the file, QEMU is asked")
        self.signal = signal
        self.memory = size
        self.ram = Path(ram) if ram is not None else None
        self.qmp = Path(qmp) if qmp is not None else None
        self.socket = Path(socket) if socket is not None else None
        self.keep = keep
        self.keeper: Keeper | None = None
        self._machines: list[Machine] = []

    @property
    def address(self) -> str:
        """`ivshmem:PATH`."""
        return f"ivshmem:{self.socket}"

    def listen(self, bus: Bus, name: str) -> socket.socket:
        """Bind the socket. UsageError, too, when the bus's area leaves no window."""
        total = Geometry.plan(bus.max_sources).total
        if self.memory - total < ivshmem.LEAST_WINDOW:
            least = format_size(ivshmem.LEAST_WINDOW)
            raise UsageError(
                f"memory {format_size(self.memory)}: the area of this bus takes {format_size(total)}, "
                f"and buffers want {least} at least: give it more"
            )
        if self.socket is None:
            self.socket = rundir.socket_path(bus.name, name)
        listener = self.unix_listener(self.socket, socket.SOCK_STREAM)
        if self.keep:
            try:
                self.keeper = Keeper(rundir.check_socket_path(self.socket.with_name(f"{self.socket.name}.keeper")))
            except BaseException:
                listener.close()
                self.socket.unlink(missing_ok=True)
                raise
        return listener

    def start(self) -> None:
        """Go on with the machines that the last process had, and accept others."""
        super().start()
        for kept in self._take_kept():
            self._go_on(kept)

    def _take_kept(self) -> list[Kept]:
        """What the keeper had, once."""
        if self.keeper is None:
            return []
        kept, self.keeper.kept = self.keeper.kept, []
        return kept

    def _go_on(self, kept: Kept) -> None:
        bus = self.bus
        assert bus is not None
        try:
            parts = Parts.of(kept, bus, self.memory)
            with contextlib.ExitStack() as stack:
                stack.callback(parts.sock.close)
                who = peer_credentials(parts.sock)
                label = f"{self.name}: {who if who is not None else 'unknown'}"
                if not self.admits(bus, who):
                    parts.close()
                    raise OSError(f"{label} is not a member of this bus any more")
                self._add_machine(Machine(self, bus, label, bus.accounts_of(who), parts))
                stack.pop_all()
        except OSError as error:
            self._note(self.name, f"a machine cannot be gone on with: {error}")
            self.forget(kept.key)

    def _add_machine(self, machine: Machine) -> None:
        """As `add`."""
        with self._peers_lock:
            stopped = self._stopped
            if not stopped:
                self._machines.append(machine)
        if stopped:
            machine.part("the bus stopped", kept=True)

    def forget(self, key: bytes) -> None:
        """Have a machine kept no more."""
        if self.keeper is not None:
            try:
                self.keeper.drop(key)
            except OSError as error:
                log.warning("%s: the keeper is gone: %s", self.name, error)

    def has_place(self) -> bool:
        """Whether one more machine can be taken."""
        self._machines = [machine for machine in self._machines if not machine.gone]
        return len(self._machines) < MAX_MACHINES

    def greet(self, sock: socket.socket, bus: Bus, label: str, accounts: list[Account]) -> None:
        """Give QEMU the memory and the doorbells; the guest's sessions come as they like."""
        parts = Parts.new(bus, self.memory, sock)
        machine = Machine(self, bus, label, accounts, parts)
        try:
            parts.introduce()
        except OSError:
            machine.part("it does not take what it is told")
            raise
        self._add_machine(machine)
        if self.keeper is not None and not machine.gone:
            try:
                self.keeper.keep(parts.kept(bus))
            except OSError as error:
                log.warning("%s: the keeper is gone: this guest will not outlive this process: %s", self.name, error)

    def refuse(self, sock: socket.socket, reason: str) -> None:
        """There are no words for it: the connection is closed, and the reason is in the log."""

    def describe(self) -> dict[str, Any]:
        """The connector's row in a listing."""
        places = {"ram": self.ram, "qmp": self.qmp}
        return super().describe() | {key: None if path is None else str(path) for key, path in places.items()}

    def stop(self) -> None:
        """Part from all guests, and from their machines."""
        super().stop()
        for machine in self._machines:
            machine.part("the bus stopped", kept=True)
        # Their guests shall hear of it while there are threads to say it.
        deadline = time.monotonic() + STOP_SECONDS
        while any(not machine.actor.closed for machine in self._machines) and time.monotonic() < deadline:
            time.sleep(0.002)
        for kept in self._take_kept():
            handshake.close_all(kept.fds)
        if self.keeper is not None:
            self.keeper.close()
            self.keeper = None


@dataclass
class Parts:
    """What a machine is made of: its socket, the memory, doorbells towards the bus and doorbells towards the guest."""

    key: bytes
    sock: socket.socket
    memory: int
    bells: list[int]
    """Descriptors, as many each way as there are vectors."""

    @classmethod
    def new(cls, bus: Bus, memory: int, sock: socket.socket) -> Parts:
        """Memory, and doorbells that were not rung. OSError."""
        fd = sealed_memfd(f"vbus-{bus.name}-bar", memory)
        bells: list[int] = []
        try:
            while len(bells) < 2 * ivshmem.VECTORS:
                bells.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            handshake.close_all([fd, *bells])
            raise
        return cls(os.urandom(KEY_SIZE), sock, fd, bells)

    @classmethod
    def of(cls, kept: Kept, bus: Bus, memory: int) -> Parts:
        """Those of a machine that another process served. OSError when that was otherwise: they are closed then."""
        fds = list(kept.fds)
        words = _words(bus, memory)
        if kept.words != words or len(fds) != 2 + 2 * ivshmem.VECTORS:
            handshake.close_all(fds)
            raise OSError("the memory of the function or the bus's max_sources is another now: start its guest anew")
        return cls(kept.key, socket.socket(fileno=fds[0]), fds[1], fds[2:])

    def kept(self, bus: Bus) -> Kept:
        """What the keeper gets."""
        words = _words(bus, os.fstat(self.memory).st_size)
        return Kept(self.key, words, [self.sock.fileno(), self.memory, *self.bells])

    def introduce(self) -> None:
        """What the protocol has a client told, without waiting for one that does not read. OSError."""
        self.sock.setblocking(False)
        ivshmem.send(self.sock, ivshmem.VERSION)
        ivshmem.send(self.sock, ivshmem.DRIVER_SIDE)
        ivshmem.send(self.sock, ivshmem.MEMORY, self.memory)
        for side in (ivshmem.DEVICE_SIDE, ivshmem.DRIVER_SIDE):
            for vector in range(ivshmem.VECTORS):
                ivshmem.send(self.sock, side, self.bells[side * ivshmem.VECTORS + vector])

    def close(self, *, but_socket: bool = False) -> None:
        """Give all descriptors back."""
        if not but_socket:
            self.sock.close()
        handshake.close_all([self.memory, *self.bells])
        self.bells = []


def _words(bus: Bus, memory: int) -> bytes:
    """What must be the same for whoever goes on with a machine."""
    return struct.pack("<IIQ", VERSION, bus.max_sources, memory)


class Machine:
    """One QEMU: its function's memory and doorbells, and the session that its guest has."""

    def __init__(self, host: Ivshmem, bus: Bus, label: str, accounts: list[Account], parts: Parts) -> None:
        """Takes the parts. OSError."""
        self.host = host
        self.bus = bus
        self.label = label
        self.accounts = accounts
        self.gone = False
        self._parts = parts
        self._sock = parts.sock
        self._peer: IvshmemPeer | None = None
        self._began = 0.0
        refusing = reserve_all(accounts, "memory", host.memory)
        if refusing is not None:
            parts.close(but_socket=True)
            limit = format_size(refusing.limits["memory"])
            raise OSError(f"{refusing.name} may have {limit} of memory mapped here, {host.memory} bytes are wanted")
        geometry = Geometry.plan(bus.max_sources)
        self.actor = Actor(bus.pool, f"machine {label}")
        try:
            self.area = Area.blank(os.dup(parts.memory), geometry)
            self.window_at, size = ivshmem.window_of(geometry, host.memory)
            self.window = _core.Mapping(parts.memory, size, self.window_at)
            bells = [_core.Doorbell(fd) for fd in parts.bells]
        except BaseException:
            self._give_back()
            parts.close(but_socket=True)
            self.actor.close()
            raise
        self.finder: Finder | None = None
        if host.ram is not None and host.qmp is not None:
            self.finder = Finder(host.ram, host.qmp, lambda: self.actor.post(self._reset_turn))
        self.inward, self.outward = bells[: ivshmem.VECTORS], bells[ivshmem.VECTORS :]
        self._sock.setblocking(False)
        self._session_key = self.actor.key(self._session_turn, 0)
        self._over_key = self.actor.key(self._over_turn, 0)
        self._end_key = self.actor.key(self._end_turn, 0)
        # Of memory that another process served, the guest hears that its session is over, and asks for one.
        self.area.end_session()
        self.outward[ivshmem.LINK_VECTOR].ring()
        bus.pool.scheduler.add_fd(self.inward[ivshmem.SESSION_VECTOR].fileno(), self._session_key)
        self.actor.watch(self._sock.fileno(), self._socket_turn)

    def _socket_turn(self) -> None:
        """A client says nothing; the end of the socket is the end of the machine."""
        try:
            said = self._sock.recv(64)
        except BlockingIOError:
            return
        except OSError as error:
            self.part(f"the socket broke: {error.strerror}")
            return
        self.part("it spoke, which no client does" if said else "the machine is gone")

    # Sessions.

    def _session_turn(self) -> bool:
        """The guest asks for a session: begin it once nothing of the last one is left."""
        self.inward[ivshmem.SESSION_VECTOR].drain()
        wanted = self.area.session_request
        peer = self._peer
        if self.gone or (peer is not None and peer.session == wanted):
            return False
        if peer is not None:
            peer.part("its guest begins anew" if wanted else "its guest ended the session")
        if not wanted:
            return False
        early = SESSION_PAUSE - (time.monotonic() - self._began)
        if early > 0 or (peer is not None and not peer.is_over):
            self.actor.mark_later(self._session_key, max(early, LOOK_AGAIN))
            return False
        self._began = time.monotonic()
        self.area.renew(wanted)
        self._peer = IvshmemPeer(self, wanted)
        self.host.add(self._peer)
        self.outward[ivshmem.LINK_VECTOR].ring()
        return False

    def _reset_turn(self) -> None:
        """Its guest is no more, and could not say so: what devices write from now on is the next one's memory."""
        if self._peer is not None and not self.gone:
            self._peer.part("its guest was reset")

    def ended(self, peer: IvshmemPeer) -> None:
        """A session is over: its guest shall hear of it, unless it began another."""
        if peer.shares:
            self.actor.mark(self._over_key)
        elif self._peer is peer and not self.gone:
            self._tell_end()

    def _over_turn(self) -> bool:
        """With shared memory, what the guest hears means that its buffers are its own again."""
        peer = self._peer
        if peer is None or not peer.parted or self.gone:
            return False
        if peer.is_over:
            self._tell_end()
        else:
            self.actor.mark_later(self._over_key, LOOK_AGAIN)
        return False

    def _tell_end(self) -> None:
        self.area.end_session()
        self.outward[ivshmem.LINK_VECTOR].ring()

    # The end.

    def part(self, reason: str, *, kept: bool = False) -> None:
        """QEMU is gone, or shall be: so is its guest. Unless it is `kept`, and others go on with it."""
        if not self.gone:
            self.gone = True
            if not kept:
                self.host.forget(self._parts.key)
            if self.finder is not None:
                self.finder.close()
            if self._peer is not None:
                self._peer.part(reason)
            self.actor.mark(self._end_key)

    def _end_turn(self) -> bool:
        """Give everything back, once no device writes into the memory any more."""
        if self._peer is not None and not self._peer.is_over:
            # One that was being made while the machine parted.
            self._peer.part("the machine is gone")
            self.actor.mark_later(self._end_key, LOOK_AGAIN)
            return False
        self._tell_end()
        self.bus.pool.scheduler.remove_fd(self.inward[ivshmem.SESSION_VECTOR].fileno())
        self.actor.unwatch(self._sock.fileno())
        self._parts.close()
        self._peer = None
        self._give_back()
        self.actor.close()
        return False

    def _give_back(self) -> None:
        for account in self.accounts:
            account.give_back("memory", self.host.memory)
        if hasattr(self, "area"):
            self.area.close()
