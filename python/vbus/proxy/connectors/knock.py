"""Connecting to a Unix socket that a bus, or a back-end, should listen at; what is wrong is said in one line."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

from vbus.errors import DriverError


def connected(
    kind: str, path: Path, type_: socket.SocketKind, timeout: float, *, running: str, otherwise: str
) -> socket.socket:
    """A socket of this type, connected, with a time limit in seconds. DriverError.

    For people: `kind` of address; `running`: what to look at when nobody listens; `otherwise`: what to do when the
    socket is of another type.
    """
    sock = socket.socket(socket.AF_UNIX, type_ | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        reason = {
            errno.ENOENT: f"there is no such socket; {running}",
            errno.ECONNREFUSED: f"nobody listens there; {running}",
            errno.EPROTOTYPE: otherwise,
        }.get(error.errno or 0, error.strerror or str(error))
        raise DriverError(error.errno or errno.ECONNREFUSED, f"{kind}:{path}: {reason}") from None
    return sock
