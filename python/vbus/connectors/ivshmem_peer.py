"""One session of a guest behind a function: a driver's side like any other, and what its memory is.

It begins with the window. Where the connector was told of the guest's own memory, the guest asks where that may be,
proves it range by range, and says which of the two it uses: see `guest_ram`, and docs/protocol.md. Whatever fails
leaves the window, and one line that says why.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

from vbus import _core, msg
from vbus.bus import reserve_all
from vbus.connectors.area_peer import AreaPeer
from vbus.connectors.guest_monitor import ASK_SECONDS
from vbus.connectors.guest_ram import MAX_GUEST_RAM, GuestRam, RamError
from vbus.errors import Violation
from vbus.shmem import ivshmem
from vbus.shmem.area import PRIORITIES
from vbus.units import format_size
from vbus.virtio import features

if TYPE_CHECKING:
    from vbus.connectors.ivshmem import Machine

log = logging.getLogger("vbus.connector")

MAX_QUESTIONS = 8
"""Questions for ranges of memory that wait until QEMU has answered."""


class IvshmemPeer(AreaPeer):
    """One session of a guest."""

    memory_kind = msg.MemoryKind.WINDOW
    extra_features = 1 << features.ACCESS_PLATFORM

    def __init__(self, machine: Machine, session: int) -> None:
        super().__init__(machine.host, machine.bus, machine.label, machine.accounts, machine.area)
        direct = machine.host.signal == "direct"
        self.signal_kind = msg.SignalKind.DIRECT if direct else msg.SignalKind.TUNNELLED
        self.machine = machine
        self.session = session
        self.shares = False
        """Whether devices reach the guest's own memory, and no window."""
        self.why_window: str | None = None
        """Why they do not, though they should."""
        self._settled = False
        self._ram: GuestRam | None = None
        self._asked = False
        self._questions: list[msg.Frame] = []
        self._reserved = 0
        if machine.finder is not None:
            self.memory = _core.Memory(max_bytes=MAX_GUEST_RAM)
        self.memory.add(machine.window_at, machine.window, writable=True)
        first = ivshmem.FIRST_EVENT_VECTOR
        self.connect(
            (machine.inward[ivshmem.LINK_VECTOR], machine.outward[ivshmem.LINK_VECTOR]),
            machine.inward[first : first + PRIORITIES],
            machine.outward[first : first + PRIORITIES],
            always=direct,
        )

    @property
    def is_over(self) -> bool:
        """Whether it has parted, and no device writes to its memory any more."""
        return self.actor.closed and not self.bus.has_devices(self)

    # The guest's own memory.

    def memory_kind_for(self, flags: int) -> int:
        """Shared, for a guest that can prove its memory, where the connector has been told of it."""
        if self.machine.finder is None:
            return msg.MemoryKind.WINDOW
        if flags & msg.HelloFlags.RAM:
            return msg.MemoryKind.SHARED
        self._stay_with_window("its guest's modules cannot share memory")
        return msg.MemoryKind.WINDOW

    def bodied(self, frame: msg.Frame) -> bool:
        """Where the guest's memory is, and which kind is used."""
        match frame.body:
            case msg.RamRange():
                self._tell_range(frame)
            case msg.RamProof(index=index, address=address):
                self._prove(frame, index, address)
            case msg.UseMemory(memory_kind=kind):
                self._use(frame, kind)
            case _:
                return False
        return True

    def _tell_range(self, frame: msg.Frame) -> None:
        finder = self.machine.finder
        if self._ram is not None:
            self._answer_range(frame, self._ram)
        elif finder is None or self.why_window is not None:
            self.refuse(frame, errno.EOPNOTSUPP, self.why_window or "this connector has no ram")
        elif len(self._questions) == MAX_QUESTIONS:
            raise Violation("too-many-questions", f"{MAX_QUESTIONS} for ranges of memory wait already")
        else:
            self._questions.append(frame)
            if not self._asked:
                self._asked = True
                finder.ask(lambda found: self.actor.post(lambda: self._found(found)))
                # Whatever keeps whoever asks: a guest that waits for an answer does nothing else.
                late = RamError(f"QEMU was not asked within {2 * ASK_SECONDS:g} s")
                self.actor.mark_later(self.actor.key(lambda: self._found(late), 0), 2 * ASK_SECONDS)

    def _found(self, found: GuestRam | RamError) -> bool:
        if self._ram is not None or self.why_window is not None or self.parted:
            if isinstance(found, GuestRam):
                found.close()
        elif isinstance(found, GuestRam):
            self._ram = found
        else:
            self._stay_with_window(str(found))
        questions, self._questions = self._questions, []
        for frame in questions:
            self._tell_range(frame)
        return False

    def _answer_range(self, frame: msg.Frame, ram: GuestRam) -> None:
        assert isinstance(frame.body, msg.RamRange)
        index = frame.body.index
        if index >= len(ram.ranges):
            self.refuse(frame, errno.EINVAL, f"there is no range {index} of guest memory")
            return
        found = ram.ranges[index]
        answer = msg.RamRangeResponse(index, len(ram.ranges), found.address, found.size, ram.nonces[index])
        self.send(answer, token=frame.token)

    def _prove(self, frame: msg.Frame, index: int, address: int) -> None:
        if self._ram is None or self._settled:
            self.refuse(frame, errno.EINVAL, "nobody asked where guest memory is")
            return
        try:
            if self._ram.prove(index, address):
                self.send(msg.RamProofResponse(), token=frame.token)
                return
            raise RamError(self._ram.failed)
        except RamError as error:
            self._stay_with_window(str(error))
            self.refuse(frame, errno.EINVAL, str(error))

    def _use(self, frame: msg.Frame, kind: int) -> None:
        if kind not in (msg.MemoryKind.SHARED, msg.MemoryKind.WINDOW):
            raise Violation("memory-kind", f"memory of kind {kind}")
        if self._settled or self.bus.has_devices(self):
            self.refuse(frame, errno.EINVAL, "how memory is reached does not change any more")
            return
        if kind == msg.MemoryKind.SHARED:
            number, text = self._share()
            if number:
                self._stay_with_window(text)
                self.refuse(frame, number, text)
                return
        elif self.why_window is None and self.machine.finder is not None:
            self._stay_with_window("its guest wants the window: the kernel's log there says why")
        self._settled = True
        self.send(msg.UseMemoryResponse(), token=frame.token)

    def _share(self) -> tuple[int, str]:
        """Have the guest's proven memory mapped, and no window. An error's number and text; 0 when it came to be."""
        try:
            if self._ram is None:
                raise RamError("nobody asked where guest memory is")
            proven = self._ram.proven
        except RamError as error:
            return errno.EINVAL, str(error)
        total = sum(found.size for found in proven)
        refusing = reserve_all(self.accounts, "memory", total)
        if refusing is not None:
            limit = format_size(refusing.limits["memory"])
            return errno.ENOMEM, f"{refusing.name} may have {limit} of memory mapped here, guest memory takes more"
        self._reserved = total
        self.memory.clear()
        for found in proven:
            self.memory.add(found.address, found.mapping, found.before, found.size, writable=True)
        self.shares = True
        ranges = "one range" if len(proven) == 1 else f"{len(proven)} ranges"
        log.info("%s/%s: shares its memory: %s in %s", self.bus.name, self.label, format_size(total), ranges)
        return 0, ""

    def _stay_with_window(self, why: str) -> None:
        if self.why_window is None:
            self.why_window = why
            log.warning("%s/%s: its memory is not shared, a window is used: %s", self.bus.name, self.label, why)

    def describe(self) -> dict[str, Any]:
        """The peer's row in a listing."""
        row = super().describe()
        return row | {"memory": "shared" if self.shares else "window", "not_shared": self.why_window}

    # The end.

    def close(self) -> None:
        """Listen no more, and let the guest know."""
        super().close()
        if self._ram is not None:
            self._ram.close()
            self._ram = None
        for account in self.accounts:
            account.give_back("memory", self._reserved)
        self._reserved = 0
        self.machine.ended(self)
