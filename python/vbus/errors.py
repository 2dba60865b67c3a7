"""The errors of vbus: one family, so that a caller can catch all of them with one name.

Three kinds of people meet an error, and each kind has a class. Whoever *uses* vbus (writes a file, types a command,
calls a function) gets a `UsageError` that says what is wrong, where, and what to do. Whoever *operates* a bus sees a
`Violation`: the other side of a ring or a link broke a rule, which is named, counted and shown. Whoever *drives* a
device gets an `OSError` with the errno of what happened (`DriverError`).
"""

from __future__ import annotations

import os


class Error(Exception):
    """The root of every error that vbus raises on purpose."""


class UsageError(Error):
    """A mistake of the user: one line that says what is wrong, where, and what to do."""


class NoSuchNameError(UsageError, LookupError):
    """No device, connector, attribute or type has this name; the message names the nearest one that exists."""


class Violation(Error):
    """The other side broke a rule of a ring, of the memory or of a link.

    Never a defect of this side. `name` is stable, for counters and tests (``"index-jump"``); `detail` is for people.
    """

    def __init__(self, name: str, detail: str = "") -> None:
        super().__init__(name, detail)
        self.name = name
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


class TlsError(Error):
    """The other side's certificate is not good, or it refused ours, or speaks no TLS."""


class DriverError(Error, OSError):
    """What a driver is told when its device, its link or its request failed; `errno` says which kind of failure.

    ENODEV: the device was removed. EBUSY: another driver has it. EIO: the device reported an error or needs a reset.
    ETIMEDOUT: no answer in time. ECONNRESET: the bus is gone. EMSGSIZE: larger than the device or the link takes.
    """

    errno: int
    strerror: str

    def __init__(self, errno: int, message: str = "") -> None:
        super().__init__(errno, message or os.strerror(errno))
