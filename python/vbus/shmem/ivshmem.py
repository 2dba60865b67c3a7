"""What QEMU's `ivshmem-doorbell` and whoever serves it say to each other, and how vbus uses the function.

The server tells each client, over a stream socket, the memory and a doorbell a vector of every peer: 8 bytes a message,
little-endian, some with a descriptor (QEMU's specification of the ivshmem client-server protocol):

```text
 0                       the version
 id                      the client's own
 -1     + descriptor     the memory, which the client's guest sees as BAR2
 peer   + descriptor     one more vector of that peer, from 0 on; first those of others, then the client's own
```

A guest rings a vector of a peer through a register of BAR0; its own vectors are MSI-X interrupts. The memory is the
shared area of `vbus.shmem.area` with a *window* behind it. Device's side and driver's side have the same vectors, but
for the last, which asks the device's side for a session.
"""

from __future__ import annotations

import array
import socket
import struct

from vbus.errors import Violation
from vbus.shmem.area import PRIORITIES, Geometry

MESSAGE = struct.Struct("<q")
VERSION = 0
MEMORY = -1
DEVICE_SIDE, DRIVER_SIDE = 0, 1
"""The peers' ids."""
LINK_VECTOR = 0
FIRST_EVENT_VECTOR = 1
"""Events of priority p ring vector 1 + p."""
SESSION_VECTOR = 1 + PRIORITIES
VECTORS = SESSION_VECTOR + 1
LEAST_BAR, MOST_BAR = 32 << 20, 1 << 36
"""Bytes of BAR2."""
LEAST_WINDOW = 8 << 20
"""Bytes that an area must leave of it."""


def window_of(geometry: Geometry, bar: int) -> tuple[int, int]:
    """Where the window is in a BAR of `bar` bytes, and how long: all that is behind the area, which ends on 64 KiB."""
    return geometry.total, bar - geometry.total


def send(sock: socket.socket, value: int, fd: int | None = None) -> None:
    """One message. OSError; BlockingIOError from a client that does not read."""
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    data = MESSAGE.pack(value)
    if sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL) != len(data):
        raise BlockingIOError("half a message was sent")


def receive(sock: socket.socket) -> tuple[int, int | None]:
    """The next message and its descriptor, which the caller owns. EOFError at the end. Violation: ivshmem-message."""
    fds: list[int] = []
    data = b""
    while len(data) < MESSAGE.size:
        part, ancillary, flags, _ = sock.recvmsg(
            MESSAGE.size - len(data), socket.CMSG_SPACE(8), socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                fds.extend(received)
        if not part:
            raise EOFError
        data += part
        if len(fds) > 1 or flags & socket.MSG_CTRUNC:
            raise Violation("ivshmem-message", "a message with more than one descriptor")
    (value,) = MESSAGE.unpack(data)
    return value, fds[0] if fds else None
