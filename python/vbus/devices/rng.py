"""An entropy device (virtio 1.3, section 5.4): every buffer of the driver comes back with random bytes in it.

The bytes are the kernel's, or those of a file that the operator names: a hardware generator (`/dev/hwrng`), or a
regular file in a test. A file that ends is an error of the device, never a reason to give the same bytes again.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vbus import virtio
from vbus.bus import Device, Queue, Request, attribute
from vbus.errors import UsageError

MOST = 64 << 10
"""Bytes that one request gets at most, however large its buffers are (a device may use less than it is given)."""


class Rng(Device):
    """An entropy device (virtio 1.3, section 5.4).

    `source`: a character device or a regular file to read instead of the kernel's generator. Reading it may wait.
    """

    device_id = virtio.DeviceID.ENTROPY
    features = virtio.entropy.FEATURES
    queues = ("requests",)

    source = attribute(str, get=lambda rng: rng._path or "os.urandom", doc="Where the random bytes come from.")

    def __init__(self, source: Path | str | None = None) -> None:
        self._path = os.fspath(source) if source is not None else ""
        self._fd = -1

    def plugged(self) -> None:
        """Open the source. UsageError when it is not there, or is neither a character device nor a file."""
        if not self._path:
            return
        try:
            mode = os.stat(self._path).st_mode
            if not (stat.S_ISCHR(mode) or stat.S_ISREG(mode)):
                raise UsageError(f"{self._path} is neither a character device nor a file: name one as the rng's source")
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"cannot open {self._path}: {error.strerror}; check the rng's source") from None

    def unplugged(self) -> None:
        """Close the source."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def handle(self, queue: Queue, request: Request) -> None:
        """Fill the driver's buffer, up to `MOST` bytes. OSError when the source fails or ends."""
        request.write(self._random(min(request.writable, MOST)))

    def _random(self, size: int) -> bytes:
        if self._fd < 0:
            return os.urandom(size)
        data = os.read(self._fd, size)
        if not data and size:
            raise EOFError(f"{self._path} has no more bytes")
        return data
