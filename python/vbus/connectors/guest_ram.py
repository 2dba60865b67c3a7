"""The memory of QEMU's guest, proven: how `ivshmem` lets devices reach buffers where they are.

```text
 Finder.ask ──> GuestRam: candidates, as QEMU told them (guest_monitor), each with a nonce
 RAM_PROOF  ──> GuestRam.prove: maps the range, and finds the nonce where the guest says it wrote it, or not
 USE_MEMORY ──> GuestRam.proven: what the session's memory becomes
```

Nobody is trusted: what QEMU says is text for people, what the guest says is a guest's. A range counts when the guest
has written into it what nobody else was told, and it is seen here through the mapping that devices will use. So a
guest reaches pages of a file in which it can write anyway. The file may be truncated at any time: mappings are guarded.
"""

from __future__ import annotations

import os
import secrets
import struct
import weakref
from dataclasses import dataclass

from vbus import _core
from vbus.connectors.memory_tree import Range
from vbus.errors import Error

MAX_GUEST_RAM = 1 << 46
"""Bytes of a guest's memory that may be mapped: address space, no memory of ours."""
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
