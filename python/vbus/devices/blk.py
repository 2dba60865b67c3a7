"""A disk (virtio 1.3, section 5.2): requests that name a sector, served from a file, a block device or memory.

A request is a header of 16 bytes, data, and one status byte at the very end, laid over descriptors in any way. Data
moves between the driver's memory and the file in system calls on that memory itself; nothing is copied here. Whatever
goes wrong with the disk, or is asked of it in vain, is told in the status byte; only a request without room for a
header or a status is a violation of the driver.

This is the readable reference of the device: one request at a time, in ring order of each queue. Where io_uring is
permitted, an engine of the core serves reads, writes and flushes in its place, many at a time, and leaves the rest to
it: other requests, and all that is wrong. It offers neither LIFETIME, for it knows nothing of wear, nor ZONED.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from vbus import _core, virtio
from vbus.bus import Device, Engine, Queue, Request, attribute
from vbus.devices.buffers import clear, move, scatter, skip, split_last
from vbus.devices.engines import check_engine, not_native
from vbus.devices.ranges import discard, is_block_device, make_zeros, overwrite, topology
from vbus.errors import UsageError, Violation
from vbus.units import LARGEST, format_size, parse_size
from vbus.virtio.blk import HEADER, ID_BYTES, RANGE, SECTOR, RangeFlags, RequestStatus, RequestType

QUEUE_SIZE = 256
SEG_MAX = 126
"""Segments that a request may have, beside its header and its status, where a queue has 128 descriptors.

Hypervisors choose the size of the queue, and that is what QEMU chooses for a disk; its guest is told of the segments by
the device alone, and Linux makes requests of as many.
"""
MAX_QUEUES = 8
MAX_DISCARD = 1 << 30
"""Bytes of one segment of DISCARD."""
MAX_ZEROES = 32 << 20
"""Bytes of one segment of WRITE_ZEROES and SECURE_ERASE: they may have to be written, and others wait."""
MAX_SEGMENTS = 16
BLOCK_SIZES = (512, 1024, 2048, 4096)


class Blk(Device):
    """A block device (virtio 1.3, section 5.2).

    Either `path` (a file or a block device) or `memory` (a size such as "64 MiB": a disk that is empty at plug and gone
    at unplug). `serial`: up to 20 ASCII characters, by default the device's name. `block_size`: what the driver should
    align to. `seg_max`: data segments of a request, 1 to 254, and at least two less than the queue of a hypervisor has
    descriptors. `queues`: 1 to 8 for the driver to use at once.
    `writeback`: whether a completed write may still be on its way to the disk until a flush; the driver may change it.
    `engine`: "native" or "python", by default native where io_uring is permitted.

    A writable disk can be told that ranges are not needed (DISCARD) or shall be zeros (WRITE_ZEROES). Only a disk in
    memory can promise that what was there is gone (SECURE_ERASE): a file system, or a drive below, may keep copies.

    A writable file is locked against other users, a read-only one against writers, a `shared` one against those who do
    not share it: for a guest that migrates, or a file system that is made for it. Growing `capacity` extends a regular
    file or memory; lowering it hides the end of the disk and keeps its bytes.
    """

    device_id = virtio.DeviceID.BLOCK
    features = virtio.blk.FEATURES
    queues = (Queue("requests", size=QUEUE_SIZE),)
    in_order = False
    Config = virtio.blk.Config
    config_writable = ("writeback",)
    config: virtio.blk.Config

    capacity = attribute(
        int,
        config="capacity",
        set=lambda disk, sectors: disk._resize(sectors),
        doc="Size in sectors of 512 bytes. Growing it extends a regular file or memory.",
    )
    path = attribute(str, get=lambda disk: disk._path, doc="The file or block device; empty for memory.")
    serial = attribute(str, get=lambda disk: disk._serial or disk.name[:ID_BYTES], doc="What GET_ID answers.")
    read_only = attribute(bool, get=lambda disk: disk._read_only, doc="Whether writes are refused.")
    block_size = attribute(int, get=lambda disk: disk.config.blk_size, doc="Bytes that the driver should align to.")
    writeback = attribute(
        bool,
        config="writeback",
        set=lambda disk, on: disk._set_writeback(on),
        doc="Whether a completed write may still be on its way to the disk until a flush.",
    )
    reads = attribute(int, get=lambda disk: disk._reads + disk._counted("reads"), doc="Read requests that succeeded.")
    writes = attribute(
        int, get=lambda disk: disk._writes + disk._counted("writes"), doc="Write requests that succeeded."
    )
    discards = attribute(int, get=lambda disk: disk._ranges[RequestType.DISCARD], doc="Ranges that were given back.")
    zeroes = attribute(int, get=lambda disk: disk._ranges[RequestType.WRITE_ZEROES], doc="Ranges that became zeros.")
    erasures = attribute(int, get=lambda disk: disk._ranges[RequestType.SECURE_ERASE], doc="Ranges that were erased.")
    flushes = attribute(int, get=lambda disk: disk._flushes + disk._counted("flushes"), doc="Flush requests.")
    refused = attribute(int, get=lambda disk: disk._refused, doc="Requests that asked for something that cannot be.")
    io_errors = attribute(
        int,
        get=lambda disk: disk._io_errors + disk._counted("io_errors"),
        doc="Requests that failed because the disk failed.",
    )

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        memory: int | str | None = None,
        read_only: bool = False,
        serial: str = "",
        block_size: int = SECTOR,
        seg_max: int = SEG_MAX,
        queues: int = 1,
        writeback: bool = True,
        shared: bool = False,
        engine: str | None = None,
    ) -> None:
        if (path is None) == (memory is None) or path == "":
            raise UsageError("blk: give either path (a file or a block device) or memory (a size)")
        if len(serial) > ID_BYTES or not serial.isascii() or "\0" in serial:
            raise UsageError(f"blk: serial {serial!r} is not up to {ID_BYTES} ASCII characters")
        if block_size not in BLOCK_SIZES:
            raise UsageError(f"blk: block_size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if not 1 <= seg_max <= QUEUE_SIZE - 2:
            raise UsageError(f"blk: seg_max {seg_max} is out of range: 1 to {QUEUE_SIZE - 2}")
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"blk: queues {queues} is out of range: 1 to {MAX_QUEUES}")
        if queues > 1:
            self.declare_queues([Queue(f"requests{n}", size=QUEUE_SIZE) for n in range(queues)])
        self._wanted_engine = check_engine("blk", engine)
        self._engines: list[_core.BlkEngine] = []
        self._path = os.fspath(path) if path is not None else ""
        self._memory = parse_size(memory, "blk: memory") if memory is not None else 0
        if memory is not None and (self._memory == 0 or self._memory % block_size):
            raise UsageError(f"blk: memory {memory!r} is no positive multiple of the block size {block_size}")
        self._read_only = read_only
        self._shared = shared
        self._serial = serial
        self.config.blk_size = block_size
        self.config.seg_max = seg_max
        self.config.num_queues = queues
        self.config.writeback = int(writeback)
        self._operators_writeback = writeback
        sectors = block_size // SECTOR
        self.config.max_discard_sectors = MAX_DISCARD // SECTOR
        self.config.max_write_zeroes_sectors = self.config.max_secure_erase_sectors = MAX_ZEROES // SECTOR
        self.config.max_discard_seg = self.config.max_write_zeroes_seg = self.config.max_secure_erase_seg = MAX_SEGMENTS
        self.config.discard_sector_alignment = self.config.secure_erase_sector_alignment = sectors
        self.config.write_zeroes_may_unmap = 1
        self._fd = -1
        self._reads = self._writes = self._flushes = self._refused = self._io_errors = 0
        self._ranges: Counter[int] = Counter()
        self._write_flags = 0
        self._told: set[int] = set()
        # A resize runs in its caller's thread: it must not meet a descriptor that was closed and given out again.
        self._resizing = threading.Lock()

    def offered_features(self) -> Iterable[str]:
        """Which of the class's bits this disk has."""
        names = ["SEG_MAX", "BLK_SIZE", "FLUSH", "CONFIG_WCE", "TOPOLOGY"]
        if len(self._queues) > 1:
            names.append("MQ")
        if self._read_only:
            return [*names, "RO"]
        return [*names, "DISCARD", "WRITE_ZEROES", *(["SECURE_ERASE"] if not self._path else [])]

    # What is behind the disk.

    def plugged(self) -> None:
        """Open the disk. UsageError when it is missing, is no disk, or is in use."""
        self._fd = self._open_file() if self._path else self._open_memory()
        size = os.lseek(self._fd, 0, os.SEEK_END)
        block = self.config.blk_size
        # The tail of a file beyond its last whole block reads as if zeros followed; a block device has no such tail.
        blocks = size // block if self._is_block_device() else -(-size // block)
        self.config.capacity = blocks * block // SECTOR
        (
            self.config.physical_block_exp,
            self.config.alignment_offset,
            self.config.min_io_size,
            self.config.opt_io_size,
        ) = topology(self._fd, block)

    def engines(self) -> Sequence[Engine]:
        """One for each queue. UsageError when they were asked for and cannot be had."""
        if self._wanted_engine == "python":
            not_native(self, None, "as it was asked for")
            return []
        if self.bus.workers.count == 0:
            not_native(self, self._wanted_engine, "the bus has no workers")
            return []
        signal = self.slot.engine_signal()
        try:
            made = [_core.BlkEngine(queue.core, self._fd, signal) for queue in self._queues]
        except OSError as error:
            not_native(self, self._wanted_engine, f"io_uring is not permitted here: {error.strerror}")
            return []
        self._engines = made
        self._tell_engines(self.config.capacity)
        return [Engine(engine, (queue,)) for engine, queue in zip(made, self._queues, strict=True)]

    def _tell_engines(self, capacity: int) -> None:
        """What holds now, for requests that are made available from now on."""
        for engine in self._engines:
            engine.set(capacity, self._read_only, bool(self._write_flags), self.has("FLUSH"))

    def _counted(self, name: str) -> int:
        """What engines counted of this."""
        return sum(engine.counters[name] for engine in self._engines)

    def engine_failed(self, error: OSError) -> None:
        """Tell the operator; it is counted."""
        self._log_error(error)

    def unplugged(self) -> None:
        """Close the disk, which lets go of its lock; what was written is on its way to the disk as after any close."""
        with self._resizing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _open_memory(self) -> int:
        fd = os.memfd_create(f"vbus-{self.name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self._memory)
        except OSError as error:
            os.close(fd)
            raise UsageError(f"{self.name}: no memory of {format_size(self._memory)}: {error.strerror}") from None
        return fd

    def _open_file(self) -> int:
        path = self._path
        try:
            mode = os.stat(path).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
                raise UsageError(f"disk {path} is {what}: name a disk image or a block device")
            fd = _open(path, (os.O_RDONLY if self._read_only else os.O_RDWR) | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UsageError(f"disk {path} does not exist: create it first (truncate -s 64M {path})") from None
        except PermissionError:
            hint = "check its permissions" if self._read_only else "check its permissions, or set read_only"
            raise UsageError(f"disk {path} cannot be opened: permission denied; {hint}") from None
        except OSError as error:
            raise UsageError(f"disk {path} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self._read_only or self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"disk {path} is in use by another process or disk: stop that one, or open both read_only, or shared"
            ) from None
        except OSError as error:
            self.log.warning("disk %s cannot be locked (%s): see that nobody else writes to it", path, error.strerror)
        return fd

    def _is_block_device(self) -> bool:
        return is_block_device(self._fd)

    def _resize(self, sectors: int) -> int:
        """Make the disk `sectors` long, if what is behind it can be; in the thread of whoever sets `capacity`."""
        block = self.config.blk_size
        size = sectors * SECTOR
        if sectors < 0 or size > LARGEST or size % block:
            raise UsageError(f"{self.name}: {sectors} sectors are no size of a disk with blocks of {block} bytes")
        with self._resizing:
            self._make_room(size)
        self._tell_engines(sectors)
        return sectors

    def _make_room(self, size: int) -> None:
        """Extend what is behind the disk when it is shorter than `size` bytes. UsageError when it cannot be."""
        if self._fd < 0:
            raise UsageError(f"{self.name}: plug the disk before you resize it")
        there = os.lseek(self._fd, 0, os.SEEK_END)
        if size > there:
            if self._is_block_device():
                raise UsageError(f"{self.name}: {self._path} has {there // SECTOR} sectors: grow that device first")
            if self._read_only:
                raise UsageError(f"{self.name}: the disk is read-only: it cannot grow beyond {there // SECTOR} sectors")
            try:
                os.ftruncate(self._fd, size)
            except OSError as error:
                raise UsageError(f"{self.name}: cannot grow to {format_size(size)}: {error.strerror}") from None

    # Requests.

    def ready(self) -> None:
        """A driver begins: the cache is as it and the operator want it."""
        self._choose_cache()
        self._told.clear()

    def reset(self) -> None:
        """What the driver chose ends with it."""
        with self._lock:
            self.config.writeback = int(self._operators_writeback)

    def config_written(self, fields: frozenset[str]) -> None:
        """The driver switched the cache (section 5.2.5)."""
        with self._lock:
            self.config.writeback = int(bool(self.config.writeback))
        self._choose_cache()

    def _set_writeback(self, on: bool) -> bool:
        self._operators_writeback = on
        if self._slot is not None:
            self.post(self._choose_cache)
        return on

    def _choose_cache(self) -> None:
        """Whether a write is completed before it is on the disk.

        A driver that cannot flush is promised that it is there (section 5.2.6.2); one that does not know of the switch
        is promised nothing as long as it can flush.
        """
        through = not self.has("FLUSH") or (self.has("CONFIG_WCE") and not self.config.writeback)
        before, self._write_flags = self._write_flags, os.RWF_DSYNC if through else 0
        self._tell_engines(self.config.capacity)
        if through and not before and self._fd >= 0 and not self._read_only:
            # What was completed before counts too, and what is under way.
            self.slot.undisturbed(self._sync)

    def _sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed(error)

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Answer requests in order; they are given back together. Violation: blk-header-short, blk-no-status."""
        done = 0
        try:
            for request in requests:
                self.handle(queue, request)
                done += 1
        finally:
            # Those before a bad one are answered, whatever it was.
            queue.complete(*requests[:done])

    def handle(self, queue: Queue, request: Request) -> None:
        """Answer one request. Violation: blk-header-short, blk-no-status."""
        if request.readable_total < HEADER.size:
            raise Violation("blk-header-short", f"{request.readable_total} readable bytes; a header is {HEADER.size}")
        if request.writable_total == 0:
            raise Violation("blk-no-status", "no writable byte for the status")
        kind, _, sector = HEADER.unpack(request.read(HEADER.size))
        readable, writable = request.views()
        from_driver = skip(readable, HEADER.size)
        to_driver, status = split_last(writable)
        gone = False
        try:
            result = self._serve(kind, sector, from_driver, to_driver)
        except OSError as error:
            result = RequestStatus.IOERR
            # Memory that its driver has taken away: what is in its place when it is touched is this process's own.
            gone = error.errno == errno.EFAULT
            self._failed(error)
        if not gone and (result != RequestStatus.OK or kind not in (RequestType.IN, RequestType.GET_ID)):
            # The used length covers the status byte, so also the bytes before it: none of them may be left as it was.
            clear(to_driver)
        status[0] = result
        request.written = request.writable_total

    def _serve(
        self, kind: int, sector: int, from_driver: list[memoryview], to_driver: list[memoryview]
    ) -> RequestStatus:
        """Do what a request asks. OSError when the disk fails."""
        match kind:
            case RequestType.IN:
                return self._read(sector, to_driver)
            case RequestType.OUT:
                return self._write(sector, from_driver)
            case RequestType.FLUSH if self.has("FLUSH"):
                os.fdatasync(self._fd)
                self._flushes += 1
                return RequestStatus.OK
            case RequestType.GET_ID:
                return self._identify(to_driver)
            case RequestType.DISCARD | RequestType.WRITE_ZEROES | RequestType.SECURE_ERASE if self.has(
                RequestType(kind).name
            ):
                return self._change_ranges(RequestType(kind), from_driver)
        self._refused += 1
        return RequestStatus.UNSUPP

    def _read(self, sector: int, buffers: list[memoryview]) -> RequestStatus:
        if not self._in_range(sector, buffers):
            return self._refuse()
        rest = move(os.preadv, self._fd, buffers, sector * SECTOR)
        clear(rest)  # beyond the end of a file that is shorter than the disk
        self._reads += 1
        return RequestStatus.OK

    def _write(self, sector: int, buffers: list[memoryview]) -> RequestStatus:
        if self._read_only or not self._in_range(sector, buffers):
            return self._refuse()
        rest = move(self._pwritev, self._fd, buffers, sector * SECTOR)
        if rest:
            raise OSError(errno.EIO, "a write ended short")
        self._writes += 1
        return RequestStatus.OK

    def _change_ranges(self, kind: RequestType, buffers: list[memoryview]) -> RequestStatus:
        """DISCARD, WRITE_ZEROES, SECURE_ERASE: all of the ranges are checked before the first is touched."""
        most = {
            RequestType.DISCARD: self.config.max_discard_sectors,
            RequestType.WRITE_ZEROES: self.config.max_write_zeroes_sectors,
            RequestType.SECURE_ERASE: self.config.max_secure_erase_sectors,
        }[kind]
        size = sum(map(len, buffers))
        if self._read_only or not 0 < size <= MAX_SEGMENTS * RANGE.size or size % RANGE.size:
            return self._refuse()
        # Taken once, from memory that the driver may change.
        segments = list(RANGE.iter_unpack(b"".join(buffers)))
        allowed = int(RangeFlags.UNMAP) if kind == RequestType.WRITE_ZEROES else 0
        if any(flags & ~allowed for _, _, flags in segments):
            self._refused += 1
            return RequestStatus.UNSUPP
        aligned = 1 if kind == RequestType.WRITE_ZEROES else self.config.blk_size // SECTOR
        for sector, sectors, _ in segments:
            if sectors > most or sector + sectors > self.config.capacity or sector % aligned or sectors % aligned:
                return self._refuse()
        for sector, sectors, flags in segments:
            if sectors:
                self._change_range(kind, sector * SECTOR, sectors * SECTOR, unmap=bool(flags & RangeFlags.UNMAP))
        self._ranges[kind] += len(segments)
        return RequestStatus.OK

    def _change_range(self, kind: RequestType, offset: int, length: int, *, unmap: bool) -> None:
        match kind:
            case RequestType.DISCARD:
                discard(self._fd, offset, length)
            case RequestType.WRITE_ZEROES:
                make_zeros(self._fd, offset, length, unmap=unmap, write=self._pwritev)
                if self._write_flags:
                    os.fdatasync(self._fd)
            case _:
                # The very pages, before they are given back: what has only been unmapped may be found again.
                overwrite(self._fd, offset, length, write=self._pwritev)
                discard(self._fd, offset, length)

    def _pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset, self._write_flags)

    def _identify(self, buffers: list[memoryview]) -> RequestStatus:
        room = sum(map(len, buffers))
        if room < ID_BYTES:
            return self._refuse()
        scatter(self.serial.encode("ascii").ljust(room, b"\0"), buffers)
        return RequestStatus.OK

    def _in_range(self, sector: int, buffers: list[memoryview]) -> bool:
        """Whether whole sectors are asked for that the disk has."""
        size = sum(map(len, buffers))
        return size % SECTOR == 0 and sector + size // SECTOR <= self.config.capacity

    def _refuse(self) -> RequestStatus:
        self._refused += 1
        return RequestStatus.IOERR

    def _failed(self, error: OSError) -> None:
        """Count an error of the disk; log it once of each kind for each driver, which could fill the log otherwise."""
        self._io_errors += 1
        self._log_error(error)

    def _log_error(self, error: OSError) -> None:
        if error.errno not in self._told:
            self._told.add(error.errno or 0)
            self.log.error("%s: %s", self._path or "memory", error.strerror)


def _open(path: str, flags: int) -> int:
    """Open a file, and have reads not write down when they were: which only its owner may ask for."""
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)
