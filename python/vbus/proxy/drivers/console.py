"""A driver for the console device (virtio 1.3, section 5.3): the port as a stream of bytes.

Receive buffers are always with the device while the reader keeps up; what arrives is appended, in the order in which
the device gave it, to a buffer that readers take from. When that is full, no more receive buffers are given, and the
input waits at the device's side.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from vbus import virtio
from vbus.errors import DriverError
from vbus.proxy.driver import Driver
from vbus.proxy.drivers.waiting import in_order
from vbus.proxy.remote import RemoteDevice
from vbus.virtio.console import RECEIVEQ, TRANSMITQ

BUFFER = 4096
"""Bytes of a receive buffer."""
BUFFERS = 16
"""Receive buffers that the device has."""
UNREAD = 64 << 10
"""Bytes that may wait here for a reader before the device gets no more buffers."""
LINE = 1 << 20
"""Bytes of the longest line."""
CHUNK = 16 << 10
"""Bytes of a transmit buffer."""
WINDOW = 8
"""Transmit buffers under way."""


class Console(Driver):
    """The port of a console: readable, writable, iterable by lines. Any thread may read, and any may write.

    A `timeout` is in seconds; None waits for as long as the device is there. DriverError: ETIMEDOUT, ENODEV, EIO,
    ECONNRESET, ESHUTDOWN; what arrived before an error is read first.
    """

    device_id = virtio.DeviceID.CONSOLE
    features = virtio.console.FEATURES
    wanted = ("SIZE", "EMERG_WRITE")
    queue_count = 2
    Config = virtio.console.Config

    def __init__(self, device: RemoteDevice) -> None:
        # Guards what follows. Held while a receive buffer is submitted and its callback is added, so that callbacks
        # append in the order in which the device finished the buffers, whatever thread they run in.
        self._arrived = threading.Condition()
        self._data = bytearray()
        self._posted = 0
        self._wanted = 0
        self._error: DriverError | None = None
        self._writing = threading.Lock()
        super().__init__(device)

    def started(self) -> None:
        """Give the device its first receive buffers."""
        self._post()

    # Receiving.

    def _post(self) -> None:
        """Give the device as many buffers as it should have."""
        most = min(BUFFER, self.device.max_request or BUFFER)
        with self._arrived:
            while self._error is None and self._posted < BUFFERS and len(self._data) < max(UNREAD, self._wanted):
                try:
                    future = self.queue(RECEIVEQ).submit([], most)
                except DriverError as error:
                    self._fail(error)
                    return
                self._posted += 1
                future.add_done_callback(self._received)

    def _received(self, future: Future[bytes]) -> None:
        with self._arrived:
            self._posted -= 1
            try:
                self._data += future.result()
            except DriverError as error:
                self._fail(error)
            else:
                self._arrived.notify_all()
                self._post()

    def _fail(self, error: DriverError) -> None:
        with self._arrived:
            if self._error is None:
                self._error = error
            self._arrived.notify_all()

    def _take(self, enough: Callable[[bytearray], int], wanted: int, timeout: float | None) -> bytes:
        """As many bytes as `enough` says, as soon as it says more than 0; up to `wanted` may wait here for that."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._arrived:
            self._wanted = wanted
            try:
                while not (count := enough(self._data)):
                    if self._error is not None:
                        raise DriverError(self._error.errno or errno.EIO, self._error.strerror or "")
                    self._post()
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0:
                        raise DriverError(errno.ETIMEDOUT, f"{self.device.name}: nothing to read within {timeout} s")
                    self._arrived.wait(left)
            finally:
                self._wanted = 0
            data = bytes(self._data[:count])
            del self._data[:count]
            self._post()
        return data

    def read(self, size: int = -1, timeout: float | None = None) -> bytes:
        """What there is, up to `size` bytes (-1: all of it); waits until there is at least one byte."""
        if size == 0:
            return b""
        return self._take(lambda data: len(data) if size < 0 else min(size, len(data)), 0, timeout)

    def read_exactly(self, size: int, timeout: float | None = None) -> bytes:
        """`size` bytes. When it fails, what had arrived of them can still be read."""
        if size <= 0:
            return b""
        return self._take(lambda data: size if len(data) >= size else 0, size, timeout)

    def read_until(self, end: bytes, timeout: float | None = None) -> bytes:
        """Everything up to and with `end`. DriverError EMSGSIZE when it does not come within 1 MiB."""
        if not end:
            raise ValueError("nothing to read up to")

        def enough(data: bytearray) -> int:
            at = data.find(end)
            if at < 0 and len(data) >= LINE:
                raise DriverError(errno.EMSGSIZE, f"{self.device.name}: no {end!r} within {LINE} bytes")
            return at + len(end) if at >= 0 else 0

        return self._take(enough, LINE, timeout)

    def readline(self, timeout: float | None = None) -> bytes:
        """A line with its newline."""
        return self.read_until(b"\n", timeout)

    def __iter__(self) -> Iterator[bytes]:
        """Line by line, until the device is gone, which raises."""
        while True:
            yield self.readline()

    # Transmitting.

    def write(self, data: bytes | bytearray | memoryview, timeout: float | None = None) -> int:
        """Send all of `data`, in order, and wait until the device has passed it on; returns its length.

        `timeout` is how long nothing may move. What was handed over before ETIMEDOUT may still go out.
        """
        view = memoryview(data).cast("B")
        size = min(CHUNK, self.device.max_request or CHUNK)
        with self._writing:
            chunks = (self.queue(TRANSMITQ).submit([view[at : at + size]], 0) for at in range(0, len(view), size))
            for _ in in_order(chunks, WINDOW, timeout, "output"):
                pass
        return len(view)

    def flush(self) -> None:
        """Nothing to do: `write` has waited."""

    def emergency_write(self, character: int) -> None:
        """Show one character without a queue (section 5.3.5). DriverError EOPNOTSUPP when the device cannot."""
        if not self.has("EMERG_WRITE"):
            raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} has no emergency write")
        config = self.Config()
        config.emerg_wr = character & 0xFF
        at, size = config.offset_of("emerg_wr"), config.size_of("emerg_wr")
        self.device.write_config(at, config.to_bytes()[at : at + size])

    @property
    def window(self) -> os.terminal_size:
        """(columns, lines) of the console now; zeros when the device does not tell."""
        if not self.has("SIZE"):
            return os.terminal_size((0, 0))
        config = self.Config.from_bytes(self.device.config())
        return os.terminal_size((config.cols, config.rows))
