"""Messages over a byte stream: a thread that writes, so that nobody who sends ever waits for the other side.

Messages follow each other without anything between them; `msg_size` delimits. What is queued is limited in bytes: a
reader that does not read is told apart from a slow one by that limit alone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable

MAX_QUEUED = 192 << 20
"""Bytes that may wait for the other side: more than all requests that a link may have outstanding."""
MAX_PIECES = 64


class WireWriter:
    """Writes queued messages to a connected socket, several with one system call. `broken` hears why it ended."""

    def __init__(self, sock: socket.socket, name: str, broken: Callable[[str], None]) -> None:
        self._sock = sock
        self._broken = broken
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"vbus-writer-{name}"[:15], daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Bytes that wait for the other side."""
        return self._queued

    def send(self, message: bytes) -> bool:
        """Queue a message; False when too much waits already, or the writer has ended."""
        with self._wake:
            if self._closed or self._queued + len(message) > MAX_QUEUED:
                return False
            self._queue.append(message)
            self._queued += len(message)
            self._wake.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                pieces = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_PIECES))]
            try:
                self._write(pieces)
            except OSError as error:
                with self._wake:
                    closed, self._closed = self._closed, True
                    self._forget()
                if not closed:
                    self._broken(error.strerror or str(error))
                return
            with self._wake:
                if not self._closed:
                    self._queued -= sum(map(len, pieces))

    def _forget(self) -> None:
        """What can no longer be sent holds no memory. With the lock."""
        self._queue.clear()
        self._queued = 0

    def _write(self, pieces: list[bytes]) -> None:
        """Write all of it; the socket is blocking for its writer (readers ask for MSG_DONTWAIT)."""
        left = [memoryview(piece) for piece in pieces]
        while left:
            sent = self._sock.sendmsg(left, [], socket.MSG_NOSIGNAL)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]

    def close(self) -> None:
        """End the thread; what is queued is lost. The caller closes the socket afterwards."""
        with self._wake:
            self._closed = True
            self._forget()
            self._wake.notify()
        # A write that waits for the other side ends when the socket is shut down under it.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        # Whoever is told holds this writer: let go, so that neither outlives the link.
        self._broken = lambda _why: None


def tune(sock: socket.socket) -> None:
    """Set a stream socket up for messages: no delay, and an end for peers whose machine vanished."""
    sock.setblocking(True)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
