"""A file system of two files (FUSE), one of which does not answer while it is told so: real input that hangs. What is
written to them is taken, and kept nowhere.

Run as a process of its own, by root: `python tests/hanging_disk.py MOUNTPOINT BYTES`. `held` hangs between the lines
`hold` and `go` on standard input, `free` never; each 512 bytes of them begin with their number. Whatever becomes of
this process, its end is the end of all that waits for it, with ENOTCONN.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
from enum import IntEnum

HEADER = struct.Struct("<IIQQIIIHH")
ANSWER = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<4Q2I")
INIT = struct.Struct("<IIIIHHIIHHI7I")
OPENED = struct.Struct("<QII")
READ = struct.Struct("<QQI")
WROTE = struct.Struct("<II")
MNT_DETACH = 2
ASYNC_READ = 1
FOREVER = 3600
"""Seconds that the kernel may believe what it was told."""
ROOT, HELD, FREE = 1, 2, 3
NAMES = {b"held": HELD, b"free": FREE}


class Op(IntEnum):
    """What the kernel asks, as include/uapi/linux/fuse.h has it."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    BATCH_FORGET = 42


def sectors(first: int, count: int) -> bytes:
    """What is in so many sectors."""
    return b"".join(number.to_bytes(8, "little") + bytes(504) for number in range(first, first + count))


class Server:
    """Answers the kernel."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self.holds = False
        self.waiting: list[tuple[int, bytes]] = []

    def answer(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        os.write(self.fd, ANSWER.pack(ANSWER.size + len(data), -error, unique) + data)

    def answer_late(self, node: int, unique: int, data: bytes) -> None:
        """Answer at once, or when it is told to."""
        if node == HELD and self.holds:
            self.waiting.append((unique, data))
            print("held", flush=True)
        else:
            self.answer(unique, data)

    def attr(self, node: int) -> bytes:
        mode = 0o40755 if node == ROOT else 0o100600
        return ATTR.pack(node, 0 if node == ROOT else self.size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def handle(self, message: bytes) -> None:
        _, code, unique, node, *_ = HEADER.unpack_from(message)
        body = message[HEADER.size :]
        match code:
            case Op.INIT:
                self.answer(unique, INIT.pack(7, 31, 0, ASYNC_READ, 1000, 1000, 65536, 1, 0, 0, 0, *[0] * 7))
            case Op.LOOKUP:
                found = NAMES.get(body.rstrip(b"\0"))
                if found is None:
                    self.answer(unique, error=errno.ENOENT)
                else:
                    self.answer(unique, ENTRY.pack(found, 0, FOREVER, FOREVER, 0, 0) + self.attr(found))
            case Op.GETATTR | Op.SETATTR:
                self.answer(unique, OPENED.pack(FOREVER, 0, 0) + self.attr(node))
            case Op.OPEN:
                self.answer(unique, OPENED.pack(0, 0, 0))
            case Op.READ:
                _, offset, size = READ.unpack_from(body)
                self.answer_late(node, unique, sectors(offset // 512, size // 512)[: max(self.size - offset, 0)])
            case Op.WRITE:
                _, _, size = READ.unpack_from(body)
                self.answer_late(node, unique, WROTE.pack(size, 0))
            case Op.FORGET | Op.INTERRUPT | Op.BATCH_FORGET:
                # No answer is wanted.
                pass
            case Op.RELEASE | Op.FLUSH:
                self.answer(unique)
            case _:
                self.answer(unique, error=errno.ENOSYS)

    def told(self, line: bytes) -> None:
        self.holds = line == b"hold"
        if not self.holds:
            for unique, data in self.waiting:
                self.answer(unique, data)
            self.waiting.clear()
        print("told", flush=True)

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.fd, 0], [], [])
            if self.fd in ready:
                self.handle(os.read(self.fd, 1 << 20))
            if 0 in ready:
                said = os.read(0, 4096)
                if not said:
                    return
                for line in said.splitlines():
                    self.told(line)


def main() -> None:
    """Mount, serve until standard input ends, and let go."""
    point, size = sys.argv[1].encode(), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"hanging", point, b"fuse", 6, options):
        raise OSError(ctypes.get_errno(), "mount")
    try:
        print("mounted", flush=True)
        Server(fd, size).run()
    finally:
        libc.umount2(point, MNT_DETACH)


if __name__ == "__main__":
    main()
