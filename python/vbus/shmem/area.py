"""The shared area: the one piece of memory that both sides of a connector see, and where everything is in it.

The device's side makes it, the driver's side maps it. Each word is written by exactly one side. In order:

    header        magic (written last), version, geometry, offsets               device's side writes
    links         one ring of messages each way (`_core.LinkRing`)
    to device     event rings, one a priority, and their counters                driver's side writes
                  taken and sleep words                                           device's side writes
    to driver     the same, with the sides exchanged
    channels      rings of messages of event channels, one each way and priority
                  regions of event channels, 64 KiB aligned                      both sides write

Nobody trusts the other's words: the driver's side checks the header once, with the limits below, and keeps its copy.

Where an area lives longer than the driver's side (a guest's kernel begins anew, and the function that it sees is the
same), it is made anew in its place, and two words in the header's page say so: see `renew`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import weakref
from dataclasses import dataclass

from vbus import _core
from vbus.errors import Violation

MAGIC = 0x0031_6165_7261_6276
"""`vbarea1` in ASCII."""
VERSION = 1
HEADER = struct.Struct("<QIIQIIII" + "QQ" + "QQQQ" + "QQQQ" + "QQQQ")
HEADER_SIZE = 4096
SESSION_REQUEST = 0xF00
SESSION = 0xF40
"""Offsets of two words of 32 bits that are 0 where an area has one driver's side for all its life: what the driver's
side asks for, and what the area was made for."""
PRIORITIES = 8
LINK_SIZE = 64 * 1024
LINK_HEADER = 128
SLOT_SIZE = 16
STATS_SIZE = 32
LINE = 64
MAX_AREA = 64 << 20
MAX_SOURCES = 1 << 16
CHANNEL_SOURCES = PRIORITIES
"""The last sources of an area are those of its channels, one a priority."""
CHANNEL_RING_SIZE = 64 * 1024
CHANNEL_RING_STRIDE = LINK_HEADER + CHANNEL_RING_SIZE
REGION_ALIGN = 64 * 1024
REGIONS_SIZE = 16 << 20
"""Bytes for the regions of one driver's channels; they take memory when they are written."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class EventPlaces:
    """Where one direction's event rings are: offsets into the area."""

    slots: int
    stats: int
    taken: int
    sleep: int


@dataclass(frozen=True)
class Geometry:
    """Sizes and offsets of an area."""

    total: int
    max_sources: int
    link_to_device: int
    link_to_driver: int
    events_to_device: EventPlaces
    events_to_driver: EventPlaces
    channels_to_device: int
    channels_to_driver: int
    regions: int

    @classmethod
    def plan(cls, max_sources: int) -> Geometry:
        """Lay an area out for this many sources (a power of two)."""
        at = HEADER_SIZE

        def take(size: int, align: int = 4096) -> int:
            nonlocal at
            start = -(-at // align) * align
            at = start + size
            return start

        link_to_device = take(LINK_HEADER + LINK_SIZE)
        link_to_driver = take(LINK_HEADER + LINK_SIZE)

        def events() -> EventPlaces:
            return EventPlaces(
                slots=take(PRIORITIES * max_sources * SLOT_SIZE),
                stats=take(max_sources * STATS_SIZE, LINE),
                taken=take(max_sources * 4),
                sleep=take(PRIORITIES * LINE, LINE),
            )

        to_device, to_driver = events(), events()
        rings = PRIORITIES * CHANNEL_RING_STRIDE
        channels_to_device, channels_to_driver = take(rings), take(rings)
        regions = take(REGIONS_SIZE, REGION_ALIGN)
        return cls(
            at,
            max_sources,
            link_to_device,
            link_to_driver,
            to_device,
            to_driver,
            channels_to_device,
            channels_to_driver,
            regions,
        )

    def pack(self) -> bytes:
        """The header's bytes, magic included."""
        return HEADER.pack(
            MAGIC,
            VERSION,
            HEADER.size,
            self.total,
            PRIORITIES,
            1,
            self.max_sources,
            LINK_SIZE,
            self.link_to_device,
            self.link_to_driver,
            *_offsets(self.events_to_device),
            *_offsets(self.events_to_driver),
            self.channels_to_device,
            self.channels_to_driver,
            self.regions,
            REGIONS_SIZE,
        )

    @classmethod
    def unpack(cls, header: bytes) -> Geometry:
        """Read a header of the other side. Violation: area-magic, area-version, area-geometry.

        An area of this version has only one layout for a number of sources, so that the offsets are compared with what
        they must be instead of being believed.
        """
        magic, version, size, total, priorities, shards, max_sources, link_size, *offsets = HEADER.unpack(header)
        if magic != MAGIC:
            raise Violation("area-magic", f"the area begins with {magic:#x}, not {MAGIC:#x}")
        if version != VERSION or size != HEADER.size:
            raise Violation("area-version", f"the area has layout {version}, this side speaks {VERSION}")
        if not CHANNEL_SOURCES <= max_sources <= MAX_SOURCES or max_sources & (max_sources - 1):
            raise Violation("area-geometry", f"{max_sources} event sources")
        plan = cls.plan(max_sources)
        found = (total, priorities, shards, link_size, *offsets)
        wanted = (
            plan.total,
            PRIORITIES,
            1,
            LINK_SIZE,
            plan.link_to_device,
            plan.link_to_driver,
            *_offsets(plan.events_to_device),
            *_offsets(plan.events_to_driver),
            plan.channels_to_device,
            plan.channels_to_driver,
            plan.regions,
            REGIONS_SIZE,
        )
        if found != wanted:
            raise Violation("area-geometry", "sizes or offsets are not those of this layout")
        return plan


def _offsets(places: EventPlaces) -> tuple[int, int, int, int]:
    return places.slots, places.stats, places.taken, places.sleep


class Area:
    """A shared area, mapped."""

    def __init__(self, fd: int, mapping: _core.Mapping, geometry: Geometry) -> None:
        self.fd = fd
        # Whoever fails half-way may forget to close.
        self._closer = weakref.finalize(self, os.close, fd)
        self.mapping = mapping
        self.geometry = geometry
        self._view = memoryview(mapping)

    @classmethod
    def create(cls, name: str, max_sources: int) -> Area:
        """Make an area in a sealed memfd (the device's side). OSError when memory or descriptors run out."""
        geometry = Geometry.plan(max_sources)
        area = cls.blank(sealed_memfd(f"vbus-{name}", geometry.total), geometry)
        area._write_header()
        return area

    @classmethod
    def blank(cls, fd: int, geometry: Geometry) -> Area:
        """Where an area shall be, in a sealed memfd, which is taken: nobody finds one until `renew`. OSError."""
        try:
            return cls(fd, _core.Mapping(fd, geometry.total), geometry)
        except BaseException:
            os.close(fd)
            raise

    def _write_header(self) -> None:
        header = self.geometry.pack()
        self._view[8 : len(header)] = header[8:]
        self._view[:8] = header[:8]

    # Sessions: the device's side.

    @property
    def session_request(self) -> int:
        """The session that the driver's side asks for."""
        (value,) = struct.unpack_from("<I", self._view, SESSION_REQUEST)
        return int(value)

    def renew(self, session: int) -> None:
        """Make the area anew, all zeroes, for a session. Nobody of this side may use it meanwhile. OSError.

        The magic goes first and comes last, and the session behind it: whoever sees that has all of it. (Between these
        stores are system calls, and the processors that share memory with a guest keep the order of stores.)
        """
        self._view[:8] = bytes(8)
        with mmap.mmap(self.fd, self.geometry.total) as pages:
            # Pages that were used give their memory back, and read as zeroes for whoever has them mapped.
            pages.madvise(mmap.MADV_REMOVE, HEADER_SIZE, self.geometry.total - HEADER_SIZE)
        self._write_header()
        self._set_session(session)

    def end_session(self) -> None:
        """The device's side is going: what the driver's side asked for is no more."""
        self._view[:8] = bytes(8)
        self._set_session(0)

    def _set_session(self, session: int) -> None:
        struct.pack_into("<I", self._view, SESSION, session)

    # Sessions: the driver's side.

    @staticmethod
    def request_session(view: memoryview, session: int) -> None:
        """Ask for a session, in the header's page; the doorbell is rung by whoever asks."""
        struct.pack_into("<I", view, SESSION_REQUEST, session)

    @staticmethod
    def sessions(view: memoryview) -> tuple[int, int]:
        """What was asked for, and what the area was made for."""
        (asked,), (made,) = struct.unpack_from("<I", view, SESSION_REQUEST), struct.unpack_from("<I", view, SESSION)
        return int(asked), int(made)

    @classmethod
    def open(cls, fd: int) -> Area:
        """Map the other side's area; takes `fd`, which must be sealed. Violation: area-*, memory-not-sealed."""
        try:
            size = check_sealed(fd, MAX_AREA)
            if size < HEADER_SIZE:
                raise Violation("area-geometry", f"the area has {size} bytes")
            geometry = Geometry.unpack(os.pread(fd, HEADER.size, 0))
            if geometry.total > size:
                raise Violation("area-geometry", f"the area has {size} bytes, its header says {geometry.total}")
            mapping = _core.Mapping(fd, geometry.total)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, mapping, geometry)

    def link_ring(self, *, to_device: bool) -> _core.LinkRing:
        """The ring of messages of one direction."""
        g = self.geometry
        return _core.LinkRing(self.mapping, g.link_to_device if to_device else g.link_to_driver, LINK_SIZE)

    def channel_ring(self, priority: int, *, to_device: bool) -> _core.LinkRing:
        """The ring of the channels of one priority, in one direction."""
        g = self.geometry
        first = g.channels_to_device if to_device else g.channels_to_driver
        return _core.LinkRing(self.mapping, first + priority * CHANNEL_RING_STRIDE, CHANNEL_RING_SIZE)

    def channel_source(self, priority: int) -> int:
        """The event source of the channels of one priority."""
        return self.geometry.max_sources - CHANNEL_SOURCES + priority

    def region(self, offset: int, size: int) -> memoryview:
        """A channel's region. Violation: channel-region, when it lies elsewhere."""
        start = self.geometry.regions
        if offset % REGION_ALIGN or not start <= offset <= offset + size <= start + REGIONS_SIZE:
            raise Violation("channel-region", f"{offset:#x} + {size:#x} is no region of this area")
        return self._view[offset : offset + size]

    def _places(self, to_device: bool) -> EventPlaces:
        return self.geometry.events_to_device if to_device else self.geometry.events_to_driver

    def sender(self, doorbells: list[_core.Doorbell], *, to_device: bool, always: bool = False) -> _core.EventSender:
        """The producing end of one direction's event rings; `always`: ring for every event, not for sleepers alone."""
        p = self._places(to_device)
        return _core.EventSender(
            self.mapping,
            slots=p.slots,
            stats=p.stats,
            taken=p.taken,
            sleep=p.sleep,
            max_sources=self.geometry.max_sources,
            priorities=PRIORITIES,
            doorbells=doorbells,
            always=always,
        )

    def receiver(self, *, to_device: bool) -> _core.EventReceiver:
        """The consuming end of one direction's event rings."""
        p = self._places(to_device)
        return _core.EventReceiver(
            self.mapping,
            slots=p.slots,
            taken=p.taken,
            sleep=p.sleep,
            max_sources=self.geometry.max_sources,
            priorities=PRIORITIES,
        )

    def stats_place(self, source: int, *, to_device: bool) -> tuple[_core.Mapping, int]:
        """Where the counters of a source are that its producer keeps."""
        return self.mapping, self._places(to_device).stats + source * STATS_SIZE

    def read_stats(self, source: int, *, to_device: bool) -> tuple[int, int, int]:
        """(signalled, sent, rung) as the producer wrote them: for people, never for decisions."""
        at = self._places(to_device).stats + source * STATS_SIZE
        signalled, sent, rung = struct.unpack_from("<QQQ", self._view, at)
        return signalled, sent, rung

    def close(self) -> None:
        """Give the descriptor back; the memory stays mapped while anything uses it."""
        self._closer()
        self.fd = -1


def sealed_memfd(name: str, size: int) -> int:
    """A memfd of `size` bytes that nobody can shrink or grow, so that no access to it can fault. OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sealed(fd: int, limit: int) -> int:
    """The size of a descriptor that the other side sent, when it is a memfd that can never shrink.

    A file that its owner may truncate raises SIGBUS in whoever has it mapped, and one on a slow file system stalls it.
    Violation: memory-not-sealed, memory-too-large.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise Violation("memory-not-sealed", "the descriptor is not a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise Violation("memory-not-sealed", "the memfd may shrink: add F_SEAL_SHRINK")
    size = os.fstat(fd).st_size
    if size > limit:
        raise Violation("memory-too-large", f"{size} bytes, the limit is {limit}")
    return size
