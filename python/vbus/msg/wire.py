"""Messages over a byte stream: a thread that writes, so that nobody who sends ever waits for the other side.

Messages follow each other without anything between them; `msg_size` delimits. Of what waits, the most urgent is written
first; messages of one priority keep their order. What is queued is limited in bytes: a reader that does not read is
told apart from a slow one by that limit alone.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

MAX_QUEUED = 192 << 20
"""Bytes that may wait for the other side: more than all requests that a link may have outstanding."""
TCP_NOTSENT_LOWAT = 25
LOW = 1 << 20
"""Bytes that may wait before whoever can do without sending should hold back."""
OVERHEAD = 64
"""What a message that waits takes beside its bytes, about: small ones must not pass for nothing."""
MAX_PIECES = 64
MAX_WRITE = 1 << 17
"""Bytes that are written in one go, about: what becomes urgent meanwhile waits for no more of them."""
PRIORITIES = 8


class Cipher(Protocol):
    """What a stream is encrypted with. Only the writer takes what goes out, so that its records keep their order."""

    ready: bool

    @property
    def has_output(self) -> bool:
        """Whether something of its own is to go out."""

    def wrap(self, pieces: Iterable[bytes]) -> bytes:
        """Encrypt; gives everything that is to go out."""


class WireWriter:
    """Writes queued messages to a connected socket, several with one system call.

    `broken` hears why it ended; `room`, from the writer's thread, that less than LOW waits again.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        broken: Callable[[str], None],
        room: Callable[[], None] = lambda: None,
        cipher: Cipher | None = None,
    ) -> None:
        self._sock = sock
        self._cipher = cipher
        self._broken = broken
        self._room = room
        self._queues: list[deque[bytes]] = [deque() for _ in range(PRIORITIES)]
        self._queued = 0
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"vbus-writer-{name}"[:15], daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Bytes that wait for the other side."""
        return self._queued

    @property
    def has_room(self) -> bool:
        """Whether little waits."""
        return self._queued < LOW

    def send(self, message: bytes, priority: int = 0) -> bool:
        """Queue a message of a priority from 0, the most urgent; False when too much waits, or the writer has ended."""
        with self._wake:
            if self._closed or self._queued + len(message) > MAX_QUEUED:
                return False
            self._queues[priority].append(message)
            self._queued += len(message) + OVERHEAD
            self._wake.notify()
        return True

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._closed:
                    return
                pieces = self._next()
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
                if self._closed:
                    return
                was_full = not self.has_room
                self._queued -= sum(map(len, pieces)) + OVERHEAD * len(pieces)
                room = self._room if was_full and self.has_room else None
            if room is not None:
                room()

    def _has_work(self) -> bool:
        cipher = self._cipher
        if self._closed or cipher is None:
            return self._closed or self._queued > 0
        return cipher.has_output or (self._queued > 0 and cipher.ready)

    def poke(self) -> None:
        """The cipher may have something to go out, or have become ready."""
        with self._wake:
            self._wake.notify()

    def _next(self) -> list[bytes]:
        """What to write now, the most urgent first. With the lock."""
        pieces: list[bytes] = []
        if self._cipher is not None and not self._cipher.ready:
            return pieces
        size = 0
        for waiting in self._queues:
            while waiting and len(pieces) < MAX_PIECES and size < MAX_WRITE:
                pieces.append(waiting.popleft())
                size += len(pieces[-1])
        return pieces

    def _forget(self) -> None:
        """What can no longer be sent holds no memory. With the lock."""
        for waiting in self._queues:
            waiting.clear()
        self._queued = 0

    def _write(self, pieces: list[bytes]) -> None:
        """Write all of it; the socket is blocking for its writer (readers ask for MSG_DONTWAIT)."""
        if self._cipher is not None:
            left = [memoryview(self._cipher.wrap(pieces))]
        else:
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
        self._room = lambda: None


def tune(sock: socket.socket) -> None:
    """Set a stream socket up for messages: no delay, and an end for peers whose machine vanished."""
    sock.setblocking(True)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What the kernel has taken cannot be overtaken: let it take little more than it can send at once.
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_WRITE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
