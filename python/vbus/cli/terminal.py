"""A terminal whose every key goes to the other side: for consoles of devices and of guests."""

from __future__ import annotations

import contextlib
import signal
import sys
import termios
import tty
from collections.abc import Iterator

LEAVE = b"\x1d"
"""Control-], which leaves a console from a terminal, as it leaves telnet and virsh."""


@contextlib.contextmanager
def raw_terminal() -> Iterator[bool]:
    """Give every key to the other side while stdin is a terminal; whether it is one."""
    if not sys.stdin.isatty():
        yield False
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        tty.setraw(stdin)
        yield True
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, old)
