"""What a network device is plugged into: itself, a file, or a tap of this machine's kernel.

A backend moves packets: an Ethernet frame behind the header of 12 bytes that virtio and taps share (section 5.1.6). It
never waits. What it gives is its own memory, which is good until it is asked again; what it is given goes out in one
system call straight from the driver's memory, or is copied. (A switch is one as well, in `net_switch`.)
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import stat
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar

from vbus import _core
from vbus import tap as taps
from vbus.devices.buffers import IOV_MAX
from vbus.errors import UsageError
from vbus.virtio.net import HEADER

LONGEST = 14 + 40 + 65535
"""Bytes of the longest frame: Ethernet's header, IPv6's, and its payload."""
BACKLOG_FRAMES, BACKLOG_BYTES = 1024, 4 << 20
"""What a pair of a loopback keeps for a driver that gives no buffers."""
USO_SINCE = (6, 2)
"""The first Linux whose taps know segments of UDP."""


class Backend:
    """Where frames go and come from: nowhere, until a subclass says more. Pairs of queues are numbered from 0."""

    features: Sequence[str] = ()
    """Names of feature bits that a device with this backend offers beside its own."""
    lost = False
    """Whether the other end is gone for good."""
    echoes = False
    """Whether something to read may be there as soon as something was written."""
    unread = 0
    """Frames that were dropped because the driver had no buffers for long."""

    def open(self, log: logging.Logger, *, pairs: int, mtu: int, link: bool) -> None:
        """Begin. UsageError in one line when it cannot be opened."""

    def close(self) -> None:
        """Give everything back. A second time does nothing."""

    def fileno(self, pair: int) -> int | None:
        """What becomes readable when there is something to read for this pair, or None."""
        return None

    def read(self, pair: int) -> memoryview | None:
        """The next packet of this pair, None when there is none now. OSError when the other end is gone."""
        return None

    def put_back(self, pair: int, packets: Sequence[bytes | bytearray]) -> None:
        """Packets for this pair that somebody else had, and that come before all others."""

    def write(self, pair: int, header: bytes, frame: Sequence[memoryview]) -> None:
        """Take a packet; `frame` has no empty part. OSError when it is refused, or the other end is gone."""

    def flush(self) -> tuple[int, int]:
        """A batch of packets has ended; gives how many of it were lost, and the bytes of their frames."""
        return 0, 0

    def survives(self, error: OSError) -> bool:
        """Whether it goes on after what an engine met with; then it is said here."""
        return False

    def forget(self) -> None:
        """The driver has gone: what it has sent must not reach the next one."""

    def set_link(self, up: bool) -> None:
        """Show the other end whether the link is up. OSError when the other end is gone."""

    def set_mtu(self, mtu: int) -> None:
        """Show the other end the longest packet in bytes. UsageError when it refuses."""

    def set_pairs(self, pairs: int) -> None:
        """Use the first `pairs`. OSError when the other end is gone."""

    def set_offloads(self, names: Sequence[str]) -> None:
        """The GUEST_* features whose work the driver does. OSError when the other end is gone."""


class Loopback(Backend):
    """Gives back on a pair what was sent on it."""

    echoes = True

    def __init__(self) -> None:
        self._backlog: dict[int, deque[bytearray]] = {}
        self._bytes: dict[int, int] = {}

    def __str__(self) -> str:
        return "loopback"

    def forget(self) -> None:
        """Empty the backlog; what was in it counts as unread."""
        self.unread += sum(map(len, self._backlog.values()))
        self._backlog.clear()
        self._bytes.clear()

    def read(self, pair: int) -> memoryview | None:
        """The oldest packet."""
        backlog = self._backlog.get(pair)
        if not backlog:
            return None
        packet = backlog.popleft()
        self._bytes[pair] -= len(packet)
        return memoryview(packet)

    def put_back(self, pair: int, packets: Sequence[bytes | bytearray]) -> None:
        """What an engine kept, within the same limits."""
        self._backlog.setdefault(pair, deque()).extendleft(map(bytearray, reversed(packets)))
        self._bytes[pair] = self._bytes.get(pair, 0) + sum(map(len, packets))

    def write(self, pair: int, header: bytes, frame: Sequence[memoryview]) -> None:
        """Keep a copy; one that there is no room for counts as unread."""
        packet = bytearray(HEADER.size)
        packet += b"".join(frame)
        backlog = self._backlog.setdefault(pair, deque())
        if len(backlog) >= BACKLOG_FRAMES or self._bytes.get(pair, 0) + len(packet) > BACKLOG_BYTES:
            self.unread += 1
            return
        backlog.append(packet)
        self._bytes[pair] = self._bytes.get(pair, 0) + len(packet)


class Pcap(Backend):
    """Writes what is sent to a file that Wireshark and tcpdump read; nothing comes from it.

    The file is one of the core, which keeps whole records in it and nothing else, whoever writes: engines, or this.
    """

    FILE = struct.Struct("<IHHiIII")
    RECORD = struct.Struct("<IIII")
    MAGIC_NANOSECONDS = 0xA1B23C4D
    LINKTYPE_ETHERNET = 1
    SNAPLEN = 262144

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._file: _core.PcapFile | None = None
        self._batch: list[bytes] = []
        self._told = False
        self.log = logging.getLogger("vbus.device")

    def __str__(self) -> str:
        return f"pcap:{self.path}"

    @property
    def file(self) -> _core.PcapFile:
        """What records go to. OSError when it is not open."""
        if self._file is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._file

    def open(self, log: logging.Logger, *, pairs: int, mtu: int, link: bool) -> None:
        """Begin the file anew. UsageError when it is none, or in use."""
        self.log = log
        self._told = False
        try:
            # Without O_NONBLOCK, a pipe that nobody reads would hold us here.
            flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = os.open(self.path, flags, 0o600)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise UsageError(f"pcap file {self.path} is no regular file: name a file to write to")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            header = self.FILE.pack(self.MAGIC_NANOSECONDS, 2, 4, 0, 0, self.SNAPLEN, self.LINKTYPE_ETHERNET)
            self._file = _core.PcapFile(self._fd, header)
        except BlockingIOError:
            self.close()
            raise UsageError(f"pcap file {self.path} is in use by another process or device: name another") from None
        except OSError as error:
            self.close()
            raise UsageError(f"pcap file {self.path} cannot be written: {error.strerror}") from None
        except UsageError:
            self.close()
            raise

    def close(self) -> None:
        """Write what is left, and let go of the file."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.close(fd)
            except OSError as error:
                # It is closed even so; a server may say only now what it did not take.
                self.survives(error)

    def write(self, pair: int, header: bytes, frame: Sequence[memoryview]) -> None:
        """Keep a copy until the batch ends."""
        data = b"".join(frame)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        self._batch.append(self.RECORD.pack(seconds & 0xFFFF_FFFF, nanoseconds, len(data), len(data)) + data)

    def flush(self) -> tuple[int, int]:
        """Write the batch; what the disk does not take of it is lost."""
        if not self._batch:
            return 0, 0
        batch, self._batch = self._batch, []
        written, code = self.file.write(batch)
        if code is not None:
            self.survives(OSError(code, os.strerror(code)))
        lost = batch[written:]
        return len(lost), sum(map(len, lost)) - len(lost) * self.RECORD.size

    def survives(self, error: OSError) -> bool:
        """A disk may have room again: it is told once, and tried again with each batch."""
        if not self._told:
            self._told = True
            self.log.error("pcap file %s takes no more: %s", self.path, error.strerror)
        return True


class TapBackend(Backend):
    """A tap: an interface of this machine, whose stack, bridge or container is the other end."""

    OFFLOADS: ClassVar[dict[str, int]] = {
        "GUEST_CSUM": taps.TUN_F_CSUM,
        "GUEST_TSO4": taps.TUN_F_TSO4,
        "GUEST_TSO6": taps.TUN_F_TSO6,
        "GUEST_ECN": taps.TUN_F_TSO_ECN,
        "GUEST_USO4": taps.TUN_F_USO4,
        "GUEST_USO6": taps.TUN_F_USO6,
    }

    def __init__(self, name: str) -> None:
        self.name = name
        self._tap: taps.Tap | None = None
        self._pairs = 0
        self._packet = bytearray(HEADER.size + LONGEST + 1)
        self._view = memoryview(self._packet)
        uso = ("GUEST_USO4", "GUEST_USO6", "HOST_USO") if _kernel() >= USO_SINCE else ()
        host = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "CTRL_GUEST_OFFLOADS")
        self.features = (*host, "GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", *uso)

    def __str__(self) -> str:
        return f"tap:{self.name}"

    @property
    def tap(self) -> taps.Tap:
        """The tap. OSError when there is none any more."""
        if self._tap is None or self.lost:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return self._tap

    def open(self, log: logging.Logger, *, pairs: int, mtu: int, link: bool) -> None:
        """Make the tap, or take it, and set it up; only its first pair gets frames."""
        self.lost = False
        self._tap = taps.Tap.open(self.name, queues=pairs)
        self._pairs = pairs
        try:
            self._tap.set_carrier(link)
            self._tap.configure(up=True, mtu=mtu)
            self.set_pairs(1)
        except OSError as error:
            raise UsageError(f"tap {self.name}: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the tap: one that was made here is gone."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def fileno(self, pair: int) -> int | None:
        """The descriptor of this pair."""
        return None if self._tap is None or self.lost else self._tap.fds[pair]

    def read(self, pair: int) -> memoryview | None:
        """The next packet that the kernel sends through the interface."""
        try:
            size = os.readv(self.tap.fds[pair], [self._packet])
        except BlockingIOError:
            return None
        return self._view[:size]

    def write(self, pair: int, header: bytes, frame: Sequence[memoryview]) -> None:
        """Let the kernel receive a packet. OSError EIO while the interface is down, EINVAL for a header that lies."""
        parts: list[bytes | memoryview] = [header, *frame]
        if len(parts) > IOV_MAX:
            parts = [header, b"".join(frame)]
        os.writev(self.tap.fds[pair], parts)

    def set_link(self, up: bool) -> None:
        """The interface's carrier."""
        self.tap.set_carrier(up)

    def set_mtu(self, mtu: int) -> None:
        """The interface's MTU."""
        if self._tap is not None and not self.lost:
            self._tap.configure(mtu=mtu)

    def set_pairs(self, pairs: int) -> None:
        """The kernel spreads flows over the queues that are attached."""
        for pair in range(1, self._pairs):
            self.tap.set_queue(pair, pair < pairs)

    def set_offloads(self, names: Sequence[str]) -> None:
        """What the kernel may leave undone."""
        self.tap.set_offloads(sum(bit for name, bit in self.OFFLOADS.items() if name in names))


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
