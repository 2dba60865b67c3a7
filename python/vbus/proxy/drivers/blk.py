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
from typing import TYPE_CHECKING, ClassVar, Literal, overload

from vbus import virtio
from vbus.errors import DriverError
from vbus.proxy.driver import Driver
from vbus.proxy.drivers.waiting import gather, in_order, then, wait
from vbus.proxy.remote import RemoteDevice
from vbus.virtio.blk import HEADER, ID_BYTES, SECTOR, RequestStatus, RequestType

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

Buffer = bytes | bytearray | memoryview

MOST = 1 << 20
"""Bytes of data in one request."""
WINDOW = 8
"""Requests under way for one call of `pread` or `pwrite`."""
BLOCK_MAX = 64 << 10
SIZE_MAX = (1 << 63) - SECTOR
"""The largest disk that offsets of files can address; what a device claims beyond it is not used."""


class Blk(Driver):
    """A disk. Offsets and lengths are bytes. Any thread may use it.

    Errors are `DriverError`s, chosen as the kernel chooses them for a block device: EROFS for a write to a read-only
    disk, ENOSPC for a write beyond its end, EINVAL for a request that makes no sense, EIO when the disk failed,
    EOPNOTSUPP for what the device does not know, ETIMEDOUT after `timeout` seconds of one request.
    """

    device_id = virtio.DeviceID.BLOCK
    features = virtio.blk.FEATURES
    wanted: ClassVar[tuple[str, ...]] = ("RO", "BLK_SIZE", "FLUSH")
    queue_count = 1
    Config = virtio.blk.Config

    def __init__(self, device: RemoteDevice) -> None:
        self._resized = threading.Condition()
        self._size = 0
        self._gone = False
        self._changing = threading.Lock()
        self._serial: str | None = None
        self.block_size = SECTOR
        """What requests are aligned to."""
        super().__init__(device)

    def started(self) -> None:
        """Read what the disk is like. DriverError EIO when that cannot be."""
        if self.has("BLK_SIZE"):
            self.block_size = self._read_config().blk_size
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
        answered = self.queue(0).submit([header, memoryview(data).cast("B")], room + 1)
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
