"""Ranges of what is behind a disk: given back, filled with zeros, or erased, each as well as the backend can.

For a file and for memory it is `fallocate` that punches holes and makes zeros without writing them; where a file system
does not know it, zeros are written, and giving back is left undone: it is a hint. A block device has calls of its own.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Callable, Sequence

# linux/falloc.h, linux/fs.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
BLKDISCARD, BLKZEROOUT = 0x1277, 0x127F
BLKIOMIN, BLKIOOPT, BLKALIGNOFF, BLKPBSZGET = 0x1278, 0x1279, 0x127A, 0x127B
UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
_ZEROS = bytes(1 << 20)
Write = Callable[[int, Sequence[memoryview], int], int]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """What the os module lacks. OSError."""
    while _libc().fallocate(fd, mode | KEEP_SIZE, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def is_block_device(fd: int) -> bool:
    """Whether it is a block device and no file."""
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def discard(fd: int, offset: int, length: int) -> None:
    """Give bytes back to what is behind the disk, if it wants them. OSError."""
    try:
        if is_block_device(fd):
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", offset, length))
        else:
            _fallocate(fd, PUNCH_HOLE, offset, length)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise


def make_zeros(fd: int, offset: int, length: int, *, unmap: bool, write: Write) -> None:
    """Have bytes read as zeros; with `unmap` they may be given back for it. `write` is `pwritev`. OSError."""
    try:
        if unmap:
            # Of a block device too: the kernel unmaps only what then reads as zeros.
            _fallocate(fd, PUNCH_HOLE, offset, length)
        elif is_block_device(fd):
            fcntl.ioctl(fd, BLKZEROOUT, struct.pack("=QQ", offset, length))
        else:
            _fallocate(fd, ZERO_RANGE, offset, length)
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        overwrite(fd, offset, length, write=write)


def overwrite(fd: int, offset: int, length: int, *, write: Write) -> None:
    """Write zeros over bytes. OSError."""
    while length:
        written = write(fd, [memoryview(_ZEROS)[: min(length, len(_ZEROS))]], offset)
        if written == 0:
            raise OSError(errno.EIO, "a write ended short")
        offset, length = offset + written, length - written


def topology(fd: int, block: int) -> tuple[int, int, int, int]:
    """(physical block as a power of two of blocks, offset of the first aligned block, least and best blocks of I/O)."""
    if not is_block_device(fd):
        least = max(1, os.fstat(fd).st_blksize // block)
        return 0, 0, min(least, 0xFFFF), 0
    physical, least_bytes, best_bytes, skewed = (
        _number(fd, request) for request in (BLKPBSZGET, BLKIOMIN, BLKIOOPT, BLKALIGNOFF)
    )
    exponent = max(0, (physical // block).bit_length() - 1)
    return exponent, max(0, skewed) // block & 0xFF, min(max(1, least_bytes // block), 0xFFFF), best_bytes // block


def _number(fd: int, request: int) -> int:
    try:
        value: int = struct.unpack("=i", fcntl.ioctl(fd, request, bytes(4)))[0]
    except OSError:
        return 0
    return value
