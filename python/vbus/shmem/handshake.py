"""What passes over the socket of a connector with shared memory: descriptors, and the news that a side is gone.

The socket is a Unix SEQPACKET one, so that a descriptor arrives with its packet or not at all. The device's side greets
with the area and the doorbells, or refuses in words. After that only the driver's side sends: one descriptor a packet,
with the cookie that a message on the link will name (memory, or a doorbell of a queue). Messages never travel here.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from dataclasses import dataclass

from vbus.errors import Violation

GREETING = struct.Struct("<8sHBBII")
"""magic, version, signal kind, priorities, errno, 0; then the words of a refusal."""
MAGIC = b"vbus-shm"
VERSION = 1
COOKIE = struct.Struct("<4sI")
COOKIE_MAGIC = b"fd\0\0"
MAX_PACKET = 512


@dataclass
class Greeting:
    """What the device's side says first."""

    signal_kind: int
    priorities: int
    errno: int = 0
    text: str = ""

    def pack(self) -> bytes:
        """The packet's bytes."""
        text = self.text.encode()[: MAX_PACKET - GREETING.size]
        return GREETING.pack(MAGIC, VERSION, self.signal_kind, self.priorities, self.errno, 0) + text

    @classmethod
    def unpack(cls, packet: bytes) -> Greeting:
        """Violation: greeting."""
        if len(packet) < GREETING.size or packet[:8] != MAGIC:
            raise Violation("greeting", "this is not the socket of a vbus process connector")
        _, version, signal_kind, priorities, errno, _ = GREETING.unpack_from(packet)
        if version != VERSION:
            raise Violation("greeting", f"the bus speaks version {version} here, this side {VERSION}")
        return cls(signal_kind, priorities, errno, packet[GREETING.size :].decode(errors="replace"))


def send_packet(sock: socket.socket, packet: bytes, fds: list[int]) -> None:
    """Send one packet with descriptors; they stay open here. OSError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([packet], ancillary, socket.MSG_NOSIGNAL)


def receive_packet(sock: socket.socket, max_fds: int) -> tuple[bytes, list[int]]:
    """The next packet and its descriptors, which the caller owns; (b"", []) when the other side is gone.

    BlockingIOError when there is none now. Violation: too-many-descriptors, packet-too-long; nothing is left open then.
    """
    # Room for one more than allowed: the kernel closes what does not fit and says so in the flags.
    space = socket.CMSG_SPACE((max_fds + 1) * 4)
    data, ancillary, flags, _ = sock.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            fds.extend(received)
    if len(fds) > max_fds or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        if flags & socket.MSG_TRUNC:
            raise Violation("packet-too-long", f"a packet of more than {MAX_PACKET} bytes")
        raise Violation("too-many-descriptors", f"a packet with more than {max_fds} descriptors")
    return data, fds


def pack_cookie(cookie: int) -> bytes:
    """The packet that carries one descriptor."""
    return COOKIE.pack(COOKIE_MAGIC, cookie)


def read_cookie(packet: bytes) -> int | None:
    """The cookie of a packet with a descriptor; None when it is no such packet."""
    if len(packet) != COOKIE.size or packet[:4] != COOKIE_MAGIC:
        return None
    return int(COOKIE.unpack(packet)[1])


def close_all(fds: list[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
