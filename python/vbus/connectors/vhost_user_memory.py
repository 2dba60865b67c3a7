"""What a front-end of vhost-user lets us map: its guest's memory, the dirty log, and what is in flight.

Each comes as a descriptor whose file belongs to the front-end and may be truncated at any time: mappings are guarded. A
front-end says where its rings are in its *own* addresses; they are translated to the guest's here, and the rest of vbus
knows only those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vbus import _core
from vbus.bus.queue import MAX_QUEUE_SIZE
from vbus.errors import Violation
from vbus.vhost_user import messages as m

MAX_MEMORY_SLOTS = 509
"""Regions of a guest's memory, as kernels and other back-ends have."""
MAX_GUEST_MEMORY = 1 << 46
"""Bytes of a guest's memory that may be mapped: address space, no memory of ours."""
_LOG_PAGE = 4096
MAX_LOG = MAX_GUEST_MEMORY // _LOG_PAGE // 8
"""Bytes of a dirty log, which has a bit for each page."""
INFLIGHT_ENTRIES = 1024
"""For how many entries of a queue there is room at least, where what is in flight is kept."""
_SIZES = frozenset(1 << shift for shift in range(MAX_QUEUE_SIZE.bit_length()))
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, eq=False)
class Place:
    """A region that is mapped here."""

    region: m.Region
    file: tuple[int, int]
    """Device and inode."""
    mapping: _core.Mapping
    before: int
    """Bytes of the mapping before the region, whose offset need not be a multiple of the page."""

    @classmethod
    def map(cls, region: m.Region, fd: int) -> Place:
        """Map a region of a descriptor, which the caller closes. Violation: region-wraps, region-not-mappable."""
        if max(region.user, region.guest, region.offset) + region.size > 1 << 64:
            raise Violation("region-wraps", f"{region}")
        before = region.offset % _PAGE
        try:
            mapping = _core.Mapping(fd, region.size + before, region.offset - before, guarded=True)
        except (OSError, ValueError, OverflowError) as error:
            raise Violation("region-not-mappable", str(error)) from None
        return cls(region, _identity(fd), mapping, before)


@dataclass(frozen=True)
class Inflight:
    """Where requests under way are kept for a successor of this process.

    A front-end asks with the queue size that it would choose, and passes that on with the memory; its guest may choose
    a larger one (QEMU's memory-mapped virtio lets it have 1024, whatever the device says). So what is made here has
    room for more than was asked for, and what comes is as large as its bytes say.

    It may ask before it says whether rings are packed: what is made has room for either layout, and which it is shows
    when a ring starts.
    """

    mapping: _core.Mapping
    before: int
    given: m.Inflight

    @classmethod
    def room(cls, queues: int, queue_size: int) -> int:
        """Bytes to make for so many queues. Violation: inflight-size."""
        # An entry of a packed ring takes more than one of a split ring.
        return cls._bytes(queues, max(queue_size, INFLIGHT_ENTRIES), packed=True)

    @staticmethod
    def _bytes(queues: int, queue_size: int, *, packed: bool) -> int:
        return queues * _core.DeviceQueue.inflight_size(queue_size, packed=packed)

    @classmethod
    def check(cls, queues: int, queue_size: int, most_queues: int, *, packed: bool) -> None:
        """Whether a front-end may ask for so much. Violation: inflight-size."""
        if not 0 < queues <= most_queues or not is_size(queue_size, packed=packed):
            raise Violation("inflight-size", f"{queues} queues, of {most_queues}, of {queue_size} entries")

    @classmethod
    def map(cls, given: m.Inflight, fd: int, most_queues: int, *, packed: bool) -> Inflight:
        """Map what a front-end kept, of a descriptor which the caller closes. Violation: inflight-*."""
        cls.check(given.num_queues, given.queue_size, most_queues, packed=packed)
        size = cls._bytes(given.num_queues, given.queue_size, packed=packed)
        if given.mmap_size < size:
            raise Violation("inflight-size", f"{given.mmap_size} bytes; {given.num_queues} queues take {size}")
        if given.mmap_size + given.mmap_offset > 1 << 63:
            raise Violation("inflight-size", f"{given.mmap_size} bytes at {given.mmap_offset:#x}")
        before = given.mmap_offset % _PAGE
        # Of what there is no use for there may be any number of bytes.
        size = min(given.mmap_size, cls._bytes(given.num_queues, MAX_QUEUE_SIZE, packed=True))
        try:
            mapping = _core.Mapping(fd, size + before, given.mmap_offset - before, guarded=True)
        except (OSError, ValueError) as error:
            raise Violation("inflight-not-mappable", str(error)) from None
        return cls(mapping, before, given)

    def of(self, index: int, size: int, *, packed: bool) -> tuple[_core.Mapping, int] | None:
        """The place of a queue whose ring is of this layout, if it has one. Violation: inflight-size."""
        given = self.given
        if index >= given.num_queues:
            return None
        # Exactly what another size takes is of that size; anything else has something behind it that nobody reads.
        larger = [room for room in _SIZES if given.mmap_size == self._bytes(given.num_queues, room, packed=packed)]
        entries = max([given.queue_size, *larger])
        each = self._bytes(1, entries, packed=packed)
        if size > entries or given.mmap_size < each * given.num_queues:
            raise Violation("inflight-size", f"queue {index} has {size} entries, and a place for {entries}")
        return self.mapping, self.before + index * each


def is_size(size: int, *, packed: bool) -> bool:
    """Whether a ring may have so many entries."""
    return 0 < size <= MAX_QUEUE_SIZE and (packed or size in _SIZES)


class GuestMemory:
    """The regions of one front-end, by both of their addresses, and the log of what is written there."""

    def __init__(self) -> None:
        self.core = _core.Memory(max_regions=MAX_MEMORY_SLOTS, max_bytes=MAX_GUEST_MEMORY)
        """What the rings translate with."""
        self._places: list[Place] = []
        self._dirty_log: _core.Mapping | None = None

    def replacing(self, regions: Sequence[m.Region], fds: Sequence[int]) -> Callable[[], None]:
        """What makes these all of the memory, when no queue looks for any: maps at once, changes when it is called.

        Violation: descriptor-count, region-*.
        """
        if len(regions) != len(fds):
            raise Violation("descriptor-count", f"{len(regions)} regions and {len(fds)} descriptors")
        known = {(place.region, place.file): place for place in self._places}
        # What is there already stays: rings and requests may be using it.
        files = [_identity(fd) for fd in fds]
        places = [
            known.get((region, file)) or Place.map(region, fd)
            for region, file, fd in zip(regions, files, fds, strict=True)
        ]

        def change() -> None:
            for old in [place for place in self._places if place not in places]:
                self._remove(old)
            for new in [place for place in places if place not in self._places]:
                self._add(new)

        return change

    def add(self, region: m.Region, fd: int) -> None:
        """One more region, of a descriptor which the caller closes. Violation: region-*."""
        self._add(Place.map(region, fd))

    def _add(self, place: Place) -> None:
        region = place.region
        for other in (known.region for known in self._places):
            if region.user < other.user + other.size and other.user < region.user + region.size:
                raise Violation("region-overlaps", f"{region.user:#x} + {region.size:#x} in the front-end's addresses")
        self.core.add(region.guest, place.mapping, place.before, region.size)
        self._places.append(place)

    def remove(self, wanted: m.MemRegion) -> None:
        """One region less. Violation: region-unknown."""
        for place in self._places:
            region = place.region
            if (region.guest, region.size, region.user) == (wanted.guest, wanted.size, wanted.user):
                self._remove(place)
                return
        raise Violation("region-unknown", f"{wanted.guest:#x} + {wanted.size:#x}")

    def _remove(self, place: Place) -> None:
        self.core.remove(place.region.guest)
        self._places.remove(place)

    def guest_address(self, what: str, user: int) -> int:
        """The guest's address of one of the front-end's. Violation: ring-outside-memory."""
        for region in (place.region for place in self._places):
            if region.user <= user < region.user + region.size:
                return user - region.user + region.guest
        raise Violation("ring-outside-memory", f"{what} at {user:#x}")

    def set_log(self, given: m.Log, fd: int) -> None:
        """Where pages that were written are marked, when `log_writes` says so. Violation: log-*."""
        last = max((place.region.guest + place.region.size for place in self._places), default=0)
        if given.size * 8 * _LOG_PAGE < last:
            raise Violation("log-too-small", f"{given.size} bytes for memory up to {last:#x}")
        if given.size > MAX_LOG or given.offset >= 1 << 62 or given.offset % _PAGE:
            raise Violation("log-not-mappable", f"{given.size} bytes at {given.offset:#x}")
        try:
            self._dirty_log = _core.Mapping(fd, given.size, given.offset, guarded=True)
        except (OSError, ValueError) as error:
            raise Violation("log-not-mappable", str(error)) from None

    def log_writes(self, wanted: bool) -> None:
        """Log from now on, where there is a log, or no more."""
        self.core.log(self._dirty_log if wanted else None)

    def clear(self) -> None:
        """Give everything back; what a request or a view uses lives on for so long."""
        self.core.log(None)
        self.core.clear()
        self._places.clear()
        self._dirty_log = None


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
