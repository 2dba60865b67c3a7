"""A console with one port (virtio 1.3, section 5.3), joined to a terminal, a socket, a file or this process's stdio.

Both queues are pull queues, and the device holds no bytes of its own. Input is read from the backend straight into the
driver's next receive buffer; while there is none, nothing is read. Output is written to the backend straight from the
driver's transmit buffer, which is given back when its last byte went out; so a backend that is slow slows the driver
down, and never the bus.
"""

from __future__ import annotations

from collections.abc import Iterable

from vbus import virtio
from vbus.bus import Device, Queue, Request, attribute
from vbus.devices.backends import make_backend
from vbus.devices.buffers import skip
from vbus.errors import Violation

BUDGET = 64
"""Buffers of one direction in one turn; then whatever else waits for this device gets its turn."""


class Console(Device):
    """A console device with one port (virtio 1.3, section 5.3).

    `backend`: `pty` (a new pseudo-terminal, whose name is the attribute `path`), `unix:PATH` (a listening Unix stream
    socket, one client at a time), `file:PATH` (output is appended), or `stdio`. `columns` and `rows`: the window.
    """

    device_id = virtio.DeviceID.CONSOLE
    features = virtio.console.FEATURES
    queues = (Queue("receive", pull=True), Queue("transmit", pull=True))
    Config = virtio.console.Config
    config: virtio.console.Config
    config_writable = ("emerg_wr",)

    columns = attribute(int, config="cols", doc="Width of the window, in characters, 0 to 65535.")
    rows = attribute(int, config="rows", doc="Height of the window, in characters, 0 to 65535.")
    backend = attribute(str, get=lambda console: str(console._backend), doc="What the console is joined to.")
    path = attribute(str, get=lambda console: console._backend.path, doc="The terminal, socket or file of the backend.")
    connected = attribute(
        bool, get=lambda console: console._backend.connected, doc="Whether anybody could read output."
    )
    dropped = attribute(int, get=lambda console: console._backend.dropped, doc="Bytes of output that nobody took.")

    def __init__(self, backend: str = "pty", *, columns: int = 80, rows: int = 24) -> None:
        self._backend = make_backend(backend)
        self.columns = columns
        self.rows = rows
        self._receiving: Request | None = None
        self._transmitting: Request | None = None
        self._rest: list[memoryview] = []

    def offered_features(self) -> Iterable[str]:
        """One port: everything but MULTIPORT."""
        return ("SIZE", "EMERG_WRITE")

    def plugged(self) -> None:
        """Open the backend. UsageError when it cannot be opened."""
        self._backend.open(self.log)
        self.watch(self._backend.fileno(), self._turn)

    def unplugged(self) -> None:
        """Close the backend."""
        if self._backend.is_open:
            self.unwatch(self._backend.fileno())
            self._backend.close()
        self.reset()

    def reset(self) -> None:
        """Forget the driver's buffers. Input that it did not take waits for the next driver."""
        self._receiving = self._transmitting = None
        self._rest = []

    def queue_stopping(self, queue: Queue) -> bool:
        """A buffer that waits for input is let go of; output of which a part may be written is not."""
        if queue.name == "receive":
            self._receiving = None
        return self._transmitting is None or queue.name == "receive"

    def available(self, queue: Queue) -> None:
        """The driver wants to receive, or to transmit. Violation: console-no-room."""
        if queue.name == "receive":
            self._receive()
        else:
            self._transmit()

    def config_written(self, fields: frozenset[str]) -> None:
        """One character of a driver that may not be able to use its queues any more; dropped if it has to wait."""
        if "emerg_wr" in fields:
            self._backend.write([memoryview(bytes([self.config.emerg_wr & 0xFF]))])

    def _turn(self) -> None:
        """Something happened at the backend."""
        self._backend.wake()
        self._receive()
        self._transmit()

    def _receive(self) -> None:
        """Move input to the driver until there is no more of it, or no more buffers."""
        queue = self.queue("receive")
        for _ in range(BUDGET):
            if self._receiving is None or self._receiving.done:
                self._receiving = queue.take()
            request = self._receiving
            if request is None:
                return
            if request.writable_total == 0:
                self._receiving = None
                raise Violation("console-no-room", "a receive buffer without room")
            count = self._backend.read_into(request.views()[1])
            if count == 0:
                return
            request.written = count
            self._receiving = None
            queue.complete(request)
        self.slot.mark(queue)

    def _transmit(self) -> None:
        """Move output to the backend until there is no more of it, or the backend takes no more now."""
        queue = self.queue("transmit")
        for _ in range(BUDGET):
            if self._transmitting is None or self._transmitting.done:
                self._transmitting = queue.take()
                if self._transmitting is None:
                    return
                self._rest = skip(self._transmitting.views()[0], 0)
            if self._rest:
                count = self._backend.write(self._rest)
                if count == 0:
                    return
                self._rest = skip(self._rest, count)
            if not self._rest:
                queue.complete(self._transmitting)
                self._transmitting = None
        self.slot.mark(queue)
