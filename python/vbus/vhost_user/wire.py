"""Whole messages off a socket, with the descriptors that came with them.

A message and its descriptors are sent in one call, so that the descriptors come with its first byte. A reader never
reads beyond a message: what it would read of the next would take that one's descriptors with it.
"""

from __future__ import annotations

import array
import errno
import os
import socket

from vbus.errors import Violation
from vbus.vhost_user.codec import HEADER, Malformed, payload_size

MAX_FDS = 8
"""Descriptors of one message."""


class Reader:
    """Puts the messages of one socket together. Descriptors that nobody takes are closed by `close`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held = b""
        self._fds: list[int] = []

    def read(self) -> tuple[bytes, list[int]] | None:
        """The next message with its descriptors, which are the caller's then; None when the socket has ended.

        BlockingIOError when it is not whole yet, on a socket that does not block. Violation: malformed-message,
        too-many-descriptors, half-a-message; OSError.
        """
        while True:
            wanted = HEADER.size
            if len(self._held) >= HEADER.size:
                size = payload_size(self._held[: HEADER.size])
                if isinstance(size, Malformed):
                    raise Violation("malformed-message", str(size))
                wanted += size
                if len(self._held) == wanted:
                    message, self._held = self._held, b""
                    fds, self._fds = self._fds, []
                    return message, fds
            data = self._receive(wanted - len(self._held))
            if not data:
                if self._held:
                    raise Violation("half-a-message", f"{len(self._held)} bytes, and no more")
                return None
            self._held += data

    def _receive(self, size: int) -> bytes:
        room = socket.CMSG_SPACE((MAX_FDS + 1) * array.array("i").itemsize)
        data, ancillary, flags, _ = self._sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                self._fds.extend(found)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise Violation("too-many-descriptors", f"{MAX_FDS} come with a message at most")
        return data

    def close(self) -> None:
        """Close the descriptors of a message that never became whole."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def send(sock: socket.socket, message: bytes, fds: list[int] | None = None, *, wait: bool = True) -> None:
    """Send a message with its descriptors, whole. OSError.

    Without `wait` it never blocks, whatever the socket is set to: who sent us a socket shares that.
    """
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([message], rights, socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT))
    if sent < len(message):
        if not wait:
            raise BlockingIOError(errno.EAGAIN, "there is room for a part of it only")
        sock.sendall(message[sent:])
