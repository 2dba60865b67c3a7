"""The memory of QEMU's guest, found and proven: how `ivshmem` lets devices reach buffers where they are.

```text
 Finder.ask ──> a thread: opens the file; asks QEMU at its QMP socket, once, within seconds
                 which backend is this file's? where has the guest its memory? (memory_tree)
            ──> GuestRam: candidates, each with a nonce
 RAM_PROOF  ──> GuestRam.prove: maps the range, and finds the nonce where the guest says it wrote it, or not
 USE_MEMORY ──> GuestRam.proven: what the session's memory becomes
```

Nobody is trusted: what QEMU says is text for people, what the guest says is a guest's. A range counts when the guest
has written into it what nobody else was told, and it is seen here through the mapping that devices will use. So a
guest reaches pages of a file in which it can write anyway. The file may be truncated at any time: mappings are guarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import stat
import struct
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vbus import _core
from vbus.connectors.memory_tree import COMMAND, Range, TreeError, backend_ranges
from vbus.errors import Error

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

ASK_SECONDS = 10.0
"""How long QEMU may take, all in all."""
MAX_GUEST_RAM = 1 << 46
"""Bytes of a guest's memory that may be mapped: address space, no memory of ours."""
MAX_BACKENDS = 64
_NONCE = struct.Struct("<Q")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class RamError(Error):
    """A guest's memory cannot be shared: one line that says why."""


@dataclass(frozen=True)
class Proven:
    """A range of a guest's memory, mapped here."""

    address: int
    size: int
    mapping: _core.Mapping
    before: int
    """Bytes of the mapping before the range, which need not begin where a mapping can."""


class GuestRam:
    """What may be one guest's memory, for one session: candidates, and those that it has proven."""

    def __init__(self, fd: int, ranges: list[Range]) -> None:
        """Takes the descriptor of the file."""
        self._fd = fd
        self._closer = weakref.finalize(self, os.close, fd)
        self.ranges = ranges
        self.nonces = [secrets.randbits(64) for _ in ranges]
        self._proven: dict[int, Proven] = {}
        self.failed: str | None = None
        """Why a proof failed, if one did: then the others are worth nothing."""

    def prove(self, index: int, address: int) -> bool:
        """Whether the guest's nonce is at this address of a range: then the range is proven. RamError for no range."""
        if not 0 <= index < len(self.ranges):
            raise RamError(f"there is no range {index} of guest memory")
        wanted = self.ranges[index]
        where = f"guest memory at {wanted.address:#x}"
        if not wanted.address <= address <= wanted.address + wanted.size - _NONCE.size:
            raise RamError(f"{address:#x} is not in the {where}")
        try:
            proven = self._map(wanted)
            at = proven.before + address - wanted.address
            (found,) = _NONCE.unpack(memoryview(proven.mapping)[at : at + _NONCE.size])
        except (OSError, ValueError) as error:
            self.failed = f"the {where} cannot be mapped: {error}"
            return False
        if found != self.nonces[index]:
            self.failed = f"the nonce of the {where} is not in the file: it is another's, or lies elsewhere"
            return False
        self._proven[index] = proven
        return True

    @property
    def proven(self) -> list[Proven]:
        """The ranges that were proven. RamError when there are none, or when a proof failed."""
        if self.failed is not None:
            raise RamError(self.failed)
        if not self._proven:
            raise RamError("the guest has proven none of its memory")
        return [self._proven[index] for index in sorted(self._proven)]

    def _map(self, wanted: Range) -> Proven:
        """Map a range. What the file system has no smaller pages for is mapped with it, and not shown. OSError."""
        block = os.fstatvfs(self._fd).f_bsize
        step = block if block and not block % _PAGE else _PAGE
        before = wanted.offset % step
        least = before + wanted.size
        end = os.fstat(self._fd).st_size - (wanted.offset - before)
        size = max(least, min(-(-least // step) * step, end))
        mapping = _core.Mapping(self._fd, size, wanted.offset - before, guarded=True)
        return Proven(wanted.address, wanted.size, mapping, before)

    def close(self) -> None:
        """Give the descriptor back, and what was mapped once nothing uses it."""
        self._closer()
        self._proven.clear()


class Finder:
    """Asks one QEMU where its guest's memory is, one question at a time, in a thread: QEMU may be slow, or be stuck."""

    def __init__(self, ram: Path, qmp: Path) -> None:
        self._ram = ram
        self._qmp = qmp
        self._lock = threading.Lock()
        self._next: Callable[[GuestRam | RamError], object] | None = None
        self._busy = False

    def ask(self, done: Callable[[GuestRam | RamError], object]) -> None:
        """Have `done` called with what was found, in a thread. Whoever asks next takes the place of one that waits."""
        with self._lock:
            self._next = done
            if self._busy:
                return
            self._busy = True
        threading.Thread(target=self._run, name="asks QEMU", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                done, self._next = self._next, None
                if done is None:
                    self._busy = False
                    return
            try:
                found: GuestRam | RamError = find(self._ram, self._qmp)
            except RamError as error:
                found = error
            done(found)


def find(ram: Path, qmp: Path) -> GuestRam:
    """Open the file that a guest's memory is in, and ask QEMU where the guest has it. RamError."""
    try:
        # Nothing that a path can lead to may keep us waiting.
        fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RamError(f"the guest's memory '{ram}': {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RamError(f"the guest's memory '{ram}' is no file")
        return GuestRam(fd, _asked(qmp, fd))
    except BaseException:
        os.close(fd)
        raise


def _asked(qmp: Path, fd: int) -> list[Range]:
    from qemu.qmp import QMPError

    # It writes of its own accord what is raised here, too.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
    try:
        return asyncio.run(_ask(qmp, fd))
    except TimeoutError:
        raise RamError(f"QMP at '{qmp}' does not answer within {ASK_SECONDS:g} s: has it another client?") from None
    except TreeError as error:
        raise RamError(f"QMP at '{qmp}': {error}") from None
    except (QMPError, EOFError, OSError, ValueError) as error:
        reason = getattr(error, "exc", error)
        text = getattr(reason, "strerror", None) or " ".join(str(reason).split()) or type(reason).__name__
        raise RamError(f"QMP at '{qmp}': {text}") from None


async def _ask(qmp: Path, fd: int) -> list[Range]:
    from qemu.qmp import QMPClient

    client = QMPClient("vbus")
    try:
        async with asyncio.timeout(ASK_SECONDS):
            await client.connect(str(qmp))
            name, size, offset = await _backend(client, fd)
            tree = await client.execute("human-monitor-command", {"command-line": COMMAND})
    finally:
        # A monitor has one client at a time: it is somebody else's again.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.disconnect(), 1)
    if not isinstance(tree, str):
        raise TreeError("the memory tree is no text")
    ranges = backend_ranges(tree, name, size)
    if offset + size > os.fstat(fd).st_size:
        raise TreeError(f"{name} has {size} bytes from {offset}, more than its file")
    if sum(found.size for found in ranges) > MAX_GUEST_RAM:
        raise TreeError(f"the guest has more than {MAX_GUEST_RAM} bytes of memory")
    return [Range(found.address, found.size, found.offset + offset) for found in ranges]


async def _backend(client: QMPClient, fd: int) -> tuple[str, int, int]:
    """The backend that this file is: its id, its bytes, and where in the file they begin. TreeError."""
    rows = await client.execute("query-memdev")
    if not isinstance(rows, list) or len(rows) > MAX_BACKENDS:
        raise TreeError("the list of memory backends is not understood")
    found: list[tuple[str, int, int]] = []
    for row in rows:
        match row:
            case {"id": str(name), "size": int(size), "share": True} if size > 0:
                # One of a descriptor has no path. Whether it is the right one shows when the guest proves it.
                path = await _property(client, name, "mem-path")
                if path is None or _is_file(path, fd):
                    offset = await _property(client, name, "offset")
                    found.append((name, size, offset if isinstance(offset, int) and offset >= 0 else 0))
            case {"share": False} | {"share": True}:
                pass
            case _:
                raise TreeError("a memory backend is not understood")
    if len(found) != 1:
        raise TreeError(f"{len(found)} shared memory backends may be the file: vbus qemu-args prints which it shall be")
    return found[0]


async def _property(client: QMPClient, name: str, wanted: str) -> Any:
    """A property of a backend; None when it has none of this name."""
    from qemu.qmp import ExecuteError

    try:
        return await client.execute("qom-get", {"path": f"/objects/{name}", "property": wanted})
    except ExecuteError:
        return None


def _is_file(path: object, fd: int) -> bool:
    """Whether a path, as QEMU has it, leads to the file here. One that is relative is relative to QEMU."""
    if not isinstance(path, str) or not os.path.isabs(path):
        return isinstance(path, str)
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        # QEMU may see other files than this process does.
        return True
