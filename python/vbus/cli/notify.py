"""Telling systemd how far a service is (sd_notify(3)); nothing happens where nobody wants to know."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state such as `READY=1` to the socket that `$NOTIFY_SOCKET` names."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        # An abstract address is written with an @ for the zero byte.
        sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
