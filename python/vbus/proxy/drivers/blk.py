"""A driver for the block device (virtio 1.3, section 5.2): a disk to read, write and flush, or to open as a file.

Three levels. `submit` is one request and a future. `submit_read`, `submit_write` and `submit_flush` are futures too,
for whole blocks of any length: they check, and split into requests. `pread`, `pwrite`, `flush` and `open` wait, and
take any offset and length: what does not begin and end at a block is read first, changed, and written back.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, overload

from vbus import virtio
from vbus.errors import DriverError
from vbus.proxy.driver import Driver
from vbus.proxy.drivers.waiting import gather, in_order, then, wait
from vbus.proxy.remote import RemoteDevice
from vbus.virtio.blk import HEADER, ID_BYTES, RANGE, SECTOR, RangeFlags, RequestStatus, RequestType

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Buffer = bytes | bytearray | memoryview

MOST = 1 << 20
"""Bytes of data in one request."""
WINDOW = 8
"""Requests under way for one call of `pread` or `pwrite`."""
BLOCK_MAX = 64 << 10
MAX_QUEUES = 8
MAX_SECTORS = 1 << 21
"""Of one segment, when the device allows more."""
MAX_SEGMENTS = 64
SIZE_MAX = (1 << 63) - SECTOR
"""The largest disk that offsets of files can address; what a device claims beyond it is not used."""


class Topology(NamedTuple):
    """What sizes of I/O suit a disk, in bytes; 0 for what it does not say."""

    physical_block: int
    alignment_offset: int
    min_io: int
    opt_io: int


class _Limits(dict[RequestType, tuple[int, int]]):
    """(sectors of a segment, segments of a request) of each kind of request about ranges."""

    @classmethod
    def of(cls, config: virtio.blk.Config) -> _Limits:
        """As the device says, but never so that nothing fits, nor more than a request holds."""
        said = {
            RequestType.DISCARD: (config.max_discard_sectors, config.max_discard_seg),
            RequestType.WRITE_ZEROES: (config.max_write_zeroes_sectors, config.max_write_zeroes_seg),
            RequestType.SECURE_ERASE: (config.max_secure_erase_sectors, config.max_secure_erase_seg),
        }
        return cls(
            (kind, (min(sectors, MAX_SECTORS) or MAX_SECTORS, min(segments, MAX_SEGMENTS) or 1))
            for kind, (sectors, segments) in said.items()
        )


class Blk(Driver):
    """A disk. Offsets and lengths are bytes. Any thread may use it.

    Errors are `DriverError`s, chosen as the kernel chooses them for a block device: EROFS for a write to a read-only
    disk, ENOSPC for a write beyond its end, EINVAL for a request that makes no sense, EIO when the disk failed,
    EOPNOTSUPP for what the device does not know, ETIMEDOUT after `timeout` seconds of one request.
    """

    device_id = virtio.DeviceID.BLOCK
    features = virtio.blk.FEATURES
    wanted: ClassVar[tuple[str, ...]] = (
        *("RO", "BLK_SIZE", "FLUSH", "CONFIG_WCE", "TOPOLOGY", "MQ", "DISCARD", "WRITE_ZEROES", "SECURE_ERASE"),
    )
    Config = virtio.blk.Config

    def __init__(self, device: RemoteDevice) -> None:
        self._resized = threading.Condition()
        self._size = 0
        self._gone = False
        self._changing = threading.Lock()
        self._serial: str | None = None
        self.block_size = SECTOR
        """What requests are aligned to."""
        several = "MQ" in self.wanted and device.max_queues > 1 and device.offered & self.features.mask(["MQ"])
        self.queue_count = min(device.max_queues, MAX_QUEUES) if several else 1  # type: ignore[misc]
        super().__init__(device)

    def started(self) -> None:
        """Read what the disk is like. DriverError EIO when that cannot be."""
        config = self._read_config()
        self._limits = _Limits.of(config)
        if self.has("BLK_SIZE"):
            self.block_size = config.blk_size
        size = self.block_size
        if not SECTOR <= size <= BLOCK_MAX or size & (size - 1):
            raise DriverError(errno.EIO, f"{self.device.name} says that its block size is {size}")
        most = MOST
        if self.device.max_request:
            most = min(MOST, (self.device.max_request - HEADER.size - 1) // size * size)
        if most < size:
            raise DriverError(errno.EMSGSIZE, f"{self.device.name}: the link takes no block of {size} bytes")
        self._most = most
        self._read_size()

    def config_changed(self) -> None:
        """Follow the capacity."""
        # An error here is one of the device or the link, which every request will tell.
        with contextlib.suppress(DriverError):
            self._read_size()

    def _read_config(self) -> virtio.blk.Config:
        return virtio.blk.Config.from_bytes(self.device.config())

    def _read_size(self) -> None:
        # Asked under the lock, so that of two answers the later one stays.
        with self._resized:
            self._size = min(self._read_config().capacity * SECTOR, SIZE_MAX)
            self._resized.notify_all()

    def removed(self) -> None:
        """Let nobody wait for a size any more."""
        with self._resized:
            self._gone = True
            self._resized.notify_all()

    # What the disk is like.

    @property
    def size(self) -> int:
        """Bytes of the disk; follows the device when it is resized."""
        return self._size

    @property
    def read_only(self) -> bool:
        """Whether the device refuses writes."""
        return self.has("RO")

    @property
    def writeback(self) -> bool:
        """Whether a completed write may still be on its way to the disk until a flush. Where the device has the switch
        (CONFIG_WCE) it may be set: DriverError EOPNOTSUPP where it has not.
        """
        if self.has("CONFIG_WCE"):
            return bool(self._read_config().writeback)
        return self.has("FLUSH")

    @writeback.setter
    def writeback(self, on: bool) -> None:
        if not self.has("CONFIG_WCE"):
            raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} has no switch for its cache")
        self.device.write_config(virtio.blk.Config.offset_of("writeback"), bytes([on]))

    @property
    def topology(self) -> Topology | None:
        """What sizes of I/O suit the disk; None when it does not say."""
        if not self.has("TOPOLOGY"):
            return None
        config, block = self._read_config(), self.block_size
        return Topology(
            physical_block=block << min(config.physical_block_exp, 16),
            alignment_offset=config.alignment_offset * block,
            min_io=config.min_io_size * block,
            opt_io=config.opt_io_size * block,
        )

    @property
    def serial(self) -> str:
        """What the device calls itself, up to 20 characters."""
        if self._serial is None:
            answer = wait(self.submit(RequestType.GET_ID, room=ID_BYTES), self.timeout, "a request for the serial")
            self._serial = answer.split(b"\0", 1)[0].decode("ascii", "replace")
        return self._serial

    def wait_for_size(self, previous: int | None = None, timeout: float | None = None) -> int:
        """The size, as soon as it is not `previous` (by default: what it is now). DriverError ETIMEDOUT, ENODEV."""
        limit = self.timeout if timeout is None else timeout
        with self._resized:
            before = self._size if previous is None else previous
            if not self._resized.wait_for(lambda: self._gone or self._size != before, limit):
                raise DriverError(errno.ETIMEDOUT, f"{self.device.name} kept its size for {limit} s")
            if self._size == before:
                raise DriverError(errno.ENODEV, f"{self.device.name} was removed")
            return self._size

    # Futures.

    def submit(self, kind: int, sector: int = 0, data: Buffer = b"", room: int = 0) -> Future[bytes]:
        """One request, as it is: `data` goes to the device, and the future gives the `room` bytes that come from it.

        The future fails with EIO or EOPNOTSUPP, as the status says. Nothing is checked before, except by the link.
        """
        header = HEADER.pack(kind, 0, sector)
        # A thread keeps to one queue, so that its requests are begun in their order.
        queue = threading.get_ident() % max(1, len(self.device.queues))
        answered = self.queue(queue).submit([header, memoryview(data).cast("B")], room + 1)
        return then(answered, lambda answer: self._checked(answer, kind, room))

    def _checked(self, answer: bytes, kind: int, room: int) -> bytes:
        """The data of an answer whose status is OK."""
        if len(answer) != room + 1:
            raise DriverError(errno.EIO, f"{self.device.name} answered {len(answer)} bytes, not {room + 1}")
        match answer[room]:
            case RequestStatus.OK:
                return answer[:room]
            case RequestStatus.UNSUPP:
                raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} does not know requests of type {kind}")
        raise DriverError(errno.EIO, f"{self.device.name}: a request of type {kind} failed")

    def submit_read(self, length: int, offset: int) -> Future[bytes]:
        """Read whole blocks. DriverError EINVAL at once: not whole blocks, or beyond the end."""
        self._check_blocks(length, offset)
        if offset + length > self._size:
            raise DriverError(errno.EINVAL, f"{self.device.name}: bytes {offset} to {offset + length} of {self._size}")
        parts = list(self._reads(length, offset))
        return parts[0] if len(parts) == 1 else then(gather(parts), b"".join)

    def submit_write(self, data: Buffer, offset: int) -> Future[int]:
        """Write whole blocks; the future gives their length. DriverError EROFS, EINVAL, ENOSPC at once."""
        view = memoryview(data).cast("B")
        self._check_blocks(len(view), offset)
        self._check_write(len(view), offset)
        parts = list(self._writes(view, offset))
        length = len(view)
        if len(parts) == 1:
            return then(parts[0], lambda _: length)
        return then(gather(parts), lambda _: length)

    def submit_flush(self) -> Future[None]:
        """Make what was written and answered before durable; at once done where the device keeps no cache."""
        if self.has("FLUSH"):
            return then(self.submit(RequestType.FLUSH), lambda _: None)
        return then(gather([]), lambda _: None)

    def submit_discard(self, length: int, offset: int) -> Future[None]:
        """Say that whole blocks are not needed: they hold anything afterwards. EOPNOTSUPP, EROFS, EINVAL, ENOSPC."""
        return self._submit_ranges(RequestType.DISCARD, length, offset)

    def submit_write_zeroes(self, length: int, offset: int, *, unmap: bool = True) -> Future[None]:
        """Have whole blocks read as zeros; with `unmap` they may be given back for it. Errors as `submit_discard`."""
        return self._submit_ranges(RequestType.WRITE_ZEROES, length, offset, RangeFlags.UNMAP if unmap else 0)

    def submit_secure_erase(self, length: int, offset: int) -> Future[None]:
        """Have nothing of what was in whole blocks be anywhere any more. Errors as `submit_discard`."""
        return self._submit_ranges(RequestType.SECURE_ERASE, length, offset)

    def _submit_ranges(self, kind: RequestType, length: int, offset: int, flags: int = 0) -> Future[None]:
        if not self.has(kind.name):
            raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} does not offer {kind.name}")
        self._check_blocks(length, offset)
        self._check_write(length, offset)
        most, segments = self._limits[kind]
        most = max(most * SECTOR // self.block_size, 1) * self.block_size
        ranges = [
            RANGE.pack((offset + at) // SECTOR, min(most, length - at) // SECTOR, flags)
            for at in range(0, length, most)
        ]
        return then(
            gather(
                [
                    self.submit(kind, 0, b"".join(ranges[first : first + segments]))
                    for first in range(0, len(ranges), segments)
                ]
            ),
            lambda _: None,
        )

    def _check_blocks(self, length: int, offset: int) -> None:
        if length < 0 or offset < 0 or (length | offset) & (self.block_size - 1):
            raise DriverError(
                errno.EINVAL, f"{self.device.name}: {length} bytes at {offset} are no whole blocks of {self.block_size}"
            )

    def _check_write(self, length: int, offset: int) -> None:
        if self.read_only:
            raise DriverError(errno.EROFS, f"{self.device.name} is read-only")
        if offset + length > self._size:
            raise DriverError(errno.ENOSPC, f"{self.device.name} ends at {self._size}: {length} bytes at {offset}")

    def _reads(self, length: int, offset: int) -> Iterator[Future[bytes]]:
        """Requests that read whole sectors, one after the other."""
        for at in range(0, length, self._most):
            room = min(self._most, length - at)
            yield self.submit(RequestType.IN, (offset + at) // SECTOR, room=room)

    def _writes(self, data: memoryview, offset: int) -> Iterator[Future[bytes]]:
        """Requests that write whole sectors, one after the other."""
        for at in range(0, len(data), self._most):
            yield self.submit(RequestType.OUT, (offset + at) // SECTOR, data[at : at + self._most])

    # Waiting.

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset`; fewer where the disk ends."""
        if length < 0 or offset < 0:
            raise DriverError(errno.EINVAL, f"{self.device.name}: {length} bytes at {offset}")
        size = self._size
        end = min(offset + length, size)
        if offset >= end:
            return b""
        first, last = self._whole_blocks(offset, end, size)
        parts = in_order(self._reads(last - first, first), WINDOW, self.timeout, "a read")
        data = b"".join(parts)
        return data if (first, last) == (offset, end) else data[offset - first : end - first]

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of `data` at `offset`; returns its length. Nothing is written that does not fit (ENOSPC).

        Data that does not begin and end at a block takes the rest of it from the disk first. Such writes wait for each
        other, but not for others: threads that write to one block at the same time must agree between themselves.
        """
        view = memoryview(data).cast("B")
        end = offset + len(view)
        if offset < 0:
            raise DriverError(errno.EINVAL, f"{self.device.name}: offset {offset}")
        self._check_write(len(view), offset)
        if not len(view):
            return 0
        first, last = self._whole_blocks(offset, end, self._size)
        if (first, last) == (offset, end):
            self._write(view, offset)
        else:
            with self._changing:
                whole = b"".join([self.pread(offset - first, first), view, self.pread(last - end, end)])
                self._write(memoryview(whole), first)
        return len(view)

    def _write(self, data: memoryview, offset: int) -> None:
        for _ in in_order(self._writes(data, offset), WINDOW, self.timeout, "a write"):
            pass

    def _whole_blocks(self, start: int, end: int, size: int) -> tuple[int, int]:
        """The blocks that `start` to `end` touch, as far as a disk of `size` bytes has them."""
        block = self.block_size
        return start // block * block, max(end, min(-(-end // block) * block, size))

    def discard(self, length: int, offset: int) -> None:
        """Say that whole blocks are not needed; see `submit_discard`."""
        wait(self.submit_discard(length, offset), self.timeout, "a discard")

    def write_zeroes(self, length: int, offset: int, *, unmap: bool = True) -> None:
        """Have whole blocks read as zeros; see `submit_write_zeroes`."""
        wait(self.submit_write_zeroes(length, offset, unmap=unmap), self.timeout, "writing zeros")

    def secure_erase(self, length: int, offset: int) -> None:
        """Have nothing of what was in whole blocks be anywhere any more; see `submit_secure_erase`."""
        wait(self.submit_secure_erase(length, offset), self.timeout, "an erasure")

    def flush(self) -> None:
        """Wait until everything that was written before is durable."""
        wait(self.submit_flush(), self.timeout, "a flush")

    # As a file.

    @overload
    def open(self, mode: Literal["r+b"] = ..., buffering: Literal[-1] = ...) -> io.BufferedRandom: ...
    @overload
    def open(self, mode: Literal["rb"], buffering: Literal[-1] = ...) -> io.BufferedReader: ...
    @overload
    def open(self, mode: Literal["wb"], buffering: Literal[-1] = ...) -> io.BufferedWriter: ...
    @overload
    def open(self, mode: Literal["r+b", "rb", "wb"] = ..., *, buffering: Literal[0]) -> DiskFile: ...
    @overload
    def open(
        self, mode: str, buffering: int = ...
    ) -> io.BufferedRandom | io.BufferedReader | io.BufferedWriter | DiskFile: ...
    def open(
        self, mode: str = "r+b", buffering: int = -1
    ) -> io.BufferedRandom | io.BufferedReader | io.BufferedWriter | DiskFile:
        """The disk as a binary file of a fixed size: mode "rb", "r+b", or "wb" (which does not erase it).

        `buffering` is bytes, 0 for none, -1 for 64 KiB. Closing it flushes the disk. EROFS as `pwrite`.
        """
        if mode not in ("rb", "r+b", "rb+", "wb"):
            raise ValueError(f"mode {mode!r}: a disk opens as 'rb', 'r+b' or 'wb'")
        raw = DiskFile(self, readable=mode != "wb", writable=mode != "rb")
        size = BLOCK_MAX if buffering < 0 else buffering
        if size == 0:
            return raw
        if mode == "rb":
            return io.BufferedReader(raw, size)
        return io.BufferedWriter(raw, size) if mode == "wb" else io.BufferedRandom(raw, size)


class DiskFile(io.RawIOBase):
    """A disk as an unbuffered file."""

    def __init__(self, disk: Blk, *, readable: bool, writable: bool) -> None:
        if writable and disk.read_only:
            raise DriverError(errno.EROFS, f"{disk.device.name} is read-only")
        self._disk = disk
        self._at = 0
        self._readable = readable
        self._writable = writable
        self._dirty = False

    @property
    def name(self) -> str:
        """The device's name."""
        return self._disk.device.name

    def readable(self) -> bool:
        """Whether it was opened to be read."""
        return self._readable

    def writable(self) -> bool:
        """Whether it was opened to be written."""
        return self._writable

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        self._check_open()
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; beyond the end is allowed, as in a file."""
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._disk.size}.get(whence)
        if base is None or base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = base + offset
        return self._at

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Read at the position; 0 at the end of the disk."""
        self._check_open()
        if not self._readable:
            raise io.UnsupportedOperation("not opened to be read")
        view = memoryview(buffer).cast("B")
        data = self._disk.pread(len(view), self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def write(self, data: ReadableBuffer, /) -> int:
        """Write at the position, as far as the disk goes; ENOSPC at its end."""
        self._check_open()
        if not self._writable:
            raise io.UnsupportedOperation("not opened to be written")
        view = memoryview(data).cast("B")
        room = max(0, self._disk.size - self._at)
        count = self._disk.pwrite(view[:room] if room else view, self._at)
        self._dirty = True
        self._at += count
        return count

    def close(self) -> None:
        """Close it, and flush the disk if anything was written."""
        if self.closed:
            return
        dirty, self._dirty = self._dirty, False
        try:
            if dirty:
                self._disk.flush()
        finally:
            super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
