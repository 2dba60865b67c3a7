"""A keeper: a small process that holds descriptors for one that may die, and gives them to the one that comes next.

What cannot connect again (QEMU's ivshmem) goes on with the memory and the doorbells that it has. So these must outlive
whoever serves it: the serving process gives copies to the keeper, which is nobody's child, does nothing else, and ends
when all that it keeps is of no use and nobody is connected.

```text
 Keeper (in the serving process) ── packets over a Unix socket, descriptors beside them ──> main, in the keeper
   keep KEY WORDS + descriptors        hold them, until the first, a socket, hangs up
   drop KEY
   tell                               kept KEY WORDS + descriptors, for each set; then done
```
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import UsageError, Violation
from vbus.shmem import handshake

log = logging.getLogger("vbus.keeper")

KEY_SIZE = 16
MAX_FDS = 64
MAX_SETS = 64
TIMEOUT = 10
TRIES = 3
KEEP, DROP, TELL, KEPT, DONE = b"keep", b"drop", b"tell", b"kept", b"done"
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True)
class Kept:
    """A set of descriptors, the first of which is a socket, and words that only its owner understands."""

    key: bytes
    words: bytes
    fds: list[int]


class Keeper:
    """The serving process's end. OSError from all that it does, once the keeper is gone."""

    def __init__(self, path: Path) -> None:
        """Find the keeper of this path, or start one. UsageError."""
        for _ in range(TRIES):
            self._sock = _connected(path) or _started(path)
            self._sock.settimeout(TIMEOUT)
            try:
                self.kept = self.tell()
            except OSError:
                # It had nothing to keep, and ended just now.
                self._sock.close()
                continue
            return
        raise UsageError(f"{path}: the keeper ends as soon as it is started; keep = false goes without")

    kept: list[Kept]
    """What was held when this began. The descriptors are the caller's."""

    def keep(self, kept: Kept) -> None:
        """Hold copies of these descriptors."""
        handshake.send_packet(self._sock, KEEP + kept.key + kept.words, kept.fds)

    def drop(self, key: bytes) -> None:
        """Hold a set no more."""
        handshake.send_packet(self._sock, DROP + key, [])

    def tell(self) -> list[Kept]:
        """What is held. The descriptors are the caller's."""
        handshake.send_packet(self._sock, TELL, [])
        sets: list[Kept] = []
        while True:
            packet, fds = handshake.receive_packet(self._sock, MAX_FDS)
            if packet[:4] != KEPT:
                handshake.close_all(fds)
                if packet != DONE:
                    raise OSError("the keeper speaks in tongues")
                return sets
            sets.append(Kept(packet[4 : 4 + KEY_SIZE], packet[4 + KEY_SIZE :], fds))

    def close(self) -> None:
        """Part from it; it goes on as long as something is kept."""
        self._sock.close()


def _connected(path: Path) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(os.fspath(path))
        pid, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if user not in (0, os.geteuid()):
            raise UsageError(f"{path}: process {pid} of user {user} listens there, who is not to be trusted: remove it")
    except OSError:
        sock.close()
        return None
    except UsageError:
        sock.close()
        raise
    return sock


def _started(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    with listener:
        try:
            path.unlink(missing_ok=True)
            listener.bind(os.fspath(path))
            path.chmod(0o600)
            listener.listen(4)
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}: no keeper can listen there; keep = false goes without"
            ) from None
        command = [sys.executable, "-m", "vbus.shmem.keeper", str(listener.fileno())]
        # It begins in a session of its own, and leaves its first process at once: nobody waits for it, nor ends it.
        subprocess.run(
            command,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
            cwd="/",
        )
        sock = _connected(path)
    if sock is None:
        raise UsageError(f"{path}: the keeper ended as soon as it was started; keep = false goes without")
    return sock


# The keeper itself.


class _Process:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._clients: dict[int, socket.socket] = {}
        self._sets: dict[bytes, Kept] = {}
        self._poll = select.poll()
        self._poll.register(listener.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until there is nothing to keep and nobody to keep it for."""
        idle = TIMEOUT * 1000
        while True:
            waiting = self._clients or self._sets
            found = self._poll.poll(None if waiting else idle)
            if not found and not waiting:
                return
            # Somebody was here: from now on the last one to go ends it.
            idle = 0
            for fd, _ in found:
                self._serve(fd)

    def _serve(self, fd: int) -> None:
        if fd == self._listener.fileno():
            comer, _ = self._listener.accept()
            comer.setblocking(False)
            self._clients[comer.fileno()] = comer
            self._poll.register(comer.fileno(), select.POLLIN)
            return
        client = self._clients.get(fd)
        if client is None:
            # Whoever the descriptors are for has gone.
            for kept in [kept for kept in self._sets.values() if kept.fds[0] == fd]:
                self._forget(kept.key)
            return
        try:
            packet, fds = handshake.receive_packet(client, MAX_FDS)
            if not packet or not self._obey(client, packet, fds):
                raise EOFError
        except (OSError, EOFError, Violation):
            self._poll.unregister(fd)
            self._clients.pop(fd).close()

    def _obey(self, client: socket.socket, packet: bytes, fds: list[int]) -> bool:
        what, key, words = packet[:4], packet[4 : 4 + KEY_SIZE], packet[4 + KEY_SIZE :]
        if what == KEEP and len(key) == KEY_SIZE and fds and len(self._sets) < MAX_SETS:
            self._forget(key)
            self._sets[key] = Kept(key, words, fds)
            # Not for what it says, which is for whoever serves it.
            self._poll.register(fds[0], select.POLLRDHUP)
            return True
        handshake.close_all(fds)
        match what:
            case b"drop":
                self._forget(key)
            case b"tell":
                for kept in self._sets.values():
                    handshake.send_packet(client, KEPT + kept.key + kept.words, kept.fds)
                handshake.send_packet(client, DONE, [])
            case _:
                return False
        return True

    def _forget(self, key: bytes) -> None:
        kept = self._sets.pop(key, None)
        if kept is not None:
            self._poll.unregister(kept.fds[0])
            handshake.close_all(kept.fds)


def main(fd: int) -> None:
    """Leave whoever started this, and keep. `fd` listens."""
    if os.fork():
        os._exit(0)
    listener = socket.socket(fileno=fd)
    path = listener.getsockname()
    try:
        _Process(listener).run()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


if __name__ == "__main__":
    main(int(sys.argv[1]))
