"""Unix sockets that connectors listen at: bound where nobody listens any more, and refused in one line elsewhere."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from vbus.errors import UsageError

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path (unix(7))."""


def unix_listener(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A bound Unix socket at `path`; one that nobody listens on any more is replaced. UsageError."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise UsageError(f"socket path {str(path)!r} has over {MAX_SOCKET_PATH} bytes: choose a shorter one")
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        if path.exists() or path.is_symlink():
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise UsageError(f"socket path {str(path)!r} is there already and is no socket: choose another")
            if _is_alive(path):
                raise UsageError(f"socket {str(path)!r} is in use: choose another, or end what listens there")
            path.unlink()
        sock.bind(str(path))
        # Anybody may knock: who is let in is decided by the credentials of the peer, which cannot be forged.
        path.chmod(0o666)
    except OSError as error:
        sock.close()
        what = f"make the directory {str(path.parent)!r}" if error.errno == errno.ENOENT else "choose another path"
        raise UsageError(f"socket {str(path)!r}: {error.strerror}; {what}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _is_alive(path: Path) -> bool:
    """Whether some process listens at this socket, of whichever kind."""
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with socket.socket(socket.AF_UNIX, kind) as probe:
            try:
                probe.connect(str(path))
            except OSError as error:
                if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                    return False
                continue
            return True
    return True
