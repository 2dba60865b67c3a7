"""A keyboard or a tablet (virtio 1.3, section 5.8) whose keys are pressed from Python.

What the device is (its name, its keys, its axes) a driver asks of config space question by question: it writes what it
wants to know, and the answer stands behind it. What happens is a series of events, one buffer each, that ends with a
report. It waits for buffers, since a driver may have very few; a series that finds too many waiting is missed whole:
half of one would leave a key down.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable
from typing import Literal

from vbus import virtio
from vbus.bus import Device, Queue, Request, attribute
from vbus.errors import UsageError, Violation
from vbus.hints import did_you_mean
from vbus.virtio.input import ABS_INFO, BUS_VIRTUAL, BUTTONS, DEVIDS, EVENT, KEYS, Abs, EventType, Led, Select, bits

AXIS_MAX = 32767
"""The far end of both axes of a tablet."""
BACKLOG = 1024
"""Events that may wait for the driver's buffers."""

STATE = struct.Struct("<BBBI")
"""Version, select, subsel, lights by number: what a saved state begins with; events follow."""
STATE_VERSION = 1

Event = tuple[int, int, int]
"""type, code, value."""
REPORT: Event = (EventType.SYN, 0, 0)


class Input(Device):
    """An input device (virtio 1.3, section 5.8).

    `kind`: `keyboard`, or `tablet`, a pointer that is told where it is. `label`: the name that the driver is told.
    """

    device_id = virtio.DeviceID.INPUT
    features = virtio.input.FEATURES
    queues = (Queue("events", pull=True, size=64), Queue("status", size=64))
    Config = virtio.input.Config
    config: virtio.input.Config
    config_writable = ("select", "subsel")

    kind = attribute(str, get=lambda device: device._kind, doc="keyboard or tablet.")
    label = attribute(str, get=lambda device: device._label, doc="The name that the driver is told.")
    leds = attribute(str, get=lambda device: " ".join(sorted(device._leds)), doc="Lights that the driver switched on.")
    events = attribute(int, get=lambda device: device._events, doc="Events that the driver was given.")
    missed = attribute(int, get=lambda device: device._missed, doc="Events that nobody would take.")

    def __init__(self, kind: Literal["keyboard", "tablet"] = "keyboard", *, label: str | None = None) -> None:
        if kind not in ("keyboard", "tablet"):
            raise UsageError(f"input: kind {kind!r}: {did_you_mean(kind, ('keyboard', 'tablet'))}")
        self._kind = kind
        self._label = f"vbus {kind}" if label is None else label
        if len(self._label.encode()) > virtio.input.MAX_DATA:
            raise UsageError(f"input: label has over {virtio.input.MAX_DATA} bytes: choose a shorter one")
        self._leds: set[str] = set()
        self._waiting: deque[Event] = deque()
        self._events = self._missed = 0

    # What the device is.

    def config_written(self, fields: frozenset[str]) -> None:
        """The driver asks: put the answer behind its question."""
        answer = self._answer(self.config.select, self.config.subsel)
        self.config.size_of_data = len(answer)
        self.config.data = answer.ljust(virtio.input.MAX_DATA, b"\0")

    def _answer(self, select: int, subsel: int) -> bytes:
        """Section 5.8.5; nothing for what this device has not."""
        tablet = self._kind == "tablet"
        match select, subsel:
            case Select.ID_NAME, 0:
                return self._label.encode()
            case Select.ID_SERIAL, 0:
                return self.name.encode()
            case Select.ID_DEVIDS, 0:
                return DEVIDS.pack(BUS_VIRTUAL, self.vendor_id, self.device_id, 1)
            case Select.EV_BITS, EventType.KEY:
                return bits((BUTTONS if tablet else KEYS).values())
            case Select.EV_BITS, EventType.ABS if tablet:
                return bits(Abs)
            case Select.EV_BITS, EventType.LED if not tablet:
                return bits(Led)
            case Select.EV_BITS, EventType.REP if not tablet:
                # The kernel repeats keys by itself when the device says that it may; there is no bit to name.
                return b"\0"
            case Select.ABS_INFO, (Abs.X | Abs.Y) if tablet:
                return ABS_INFO.pack(0, AXIS_MAX, 0, 0, 0)
        return b""

    # What happens.

    def press(self, *names: str) -> bool:
        """Press keys (or a tablet's buttons) and let them go, in the order of a chord. From any thread.

        False when too much waits for the driver already, or there is none. UsageError for a key that there is not.
        """
        codes = [self._code(name) for name in names]
        down = [(EventType.KEY, code, 1) for code in codes]
        return self.emit([*down, REPORT, *((EventType.KEY, code, 0) for code in reversed(codes))])

    def type(self, text: str) -> bool:
        """Press one key after the other: small letters, digits, spaces and new lines. UsageError; as `press`."""
        names = {" ": "space", "\n": "enter", "\t": "tab", ".": "dot", ",": "comma", "/": "slash", "-": "minus"}
        return all(self.press(names.get(letter, letter)) for letter in text)

    def move(self, x: int, y: int) -> bool:
        """Point to a place, each 0 to 32767. UsageError for a keyboard, or a place that there is not; as `press`."""
        if self._kind != "tablet" or not (0 <= x <= AXIS_MAX and 0 <= y <= AXIS_MAX):
            raise UsageError(f"{self.name}: a tablet points to 0 to {AXIS_MAX} twice, not to {x} {y}")
        return self.emit([(EventType.ABS, Abs.X, x), (EventType.ABS, Abs.Y, y)])

    def _code(self, name: str) -> int:
        known = BUTTONS if self._kind == "tablet" else KEYS
        if name not in known:
            raise UsageError(f"{self.name}: no key {name!r}: {did_you_mean(name, known)}")
        return known[name]

    def emit(self, events: Iterable[Event]) -> bool:
        """Give the driver events and the report that ends them, all or none, now or as it makes room.

        False when `BACKLOG` events wait already, or there is no driver.
        """
        series = [*events, REPORT]
        with self._lock:
            if not self.queue("events").served or len(self._waiting) + len(series) > BACKLOG:
                self._missed += len(series)
                return False
            self._waiting.extend(series)
        self._give()
        return True

    def available(self, queue: Queue) -> None:
        """The driver has made room."""
        self._give()

    def _give(self) -> None:
        with self._lock:
            queue = self.queue("events")
            # Until there is nothing to take: it is then that the driver is asked to say when there is.
            while self._waiting and (requests := queue.take_batch(len(self._waiting))):
                for request in requests:
                    request.write(EVENT.pack(*self._waiting.popleft()))
                queue.complete(*requests)
                self._events += len(requests)

    def handle(self, queue: Queue, request: Request) -> None:
        """The driver switches a light. Violation: status-size."""
        if request.readable != EVENT.size:
            raise Violation("status-size", f"{request.readable} bytes; an event has {EVENT.size}")
        kind, code, value = EVENT.unpack(request.read())
        if kind == EventType.LED and code in list(Led):
            (self._leds.add if value else self._leds.discard)(Led(code).name.lower())

    def save_state(self) -> bytes:
        """The driver's last question, the lights that it switched on, and the events that it has not been given yet.

        Half a series may have been given already: without the rest, a key would stay down.
        """
        with self._lock:
            leds = sum(1 << Led[name.upper()] for name in self._leds)
            head = STATE.pack(STATE_VERSION, self.config.select, self.config.subsel, leds)
            return head + b"".join(EVENT.pack(*event) for event in self._waiting)

    def load_state(self, data: bytes) -> None:
        """Go on where another one was. Violation: input-state."""
        events = data[STATE.size :]
        if len(data) < STATE.size or data[0] != STATE_VERSION or len(events) % EVENT.size:
            raise Violation("input-state", f"{len(data)} bytes are no state of version {STATE_VERSION}")
        if len(events) > BACKLOG * EVENT.size:
            raise Violation("input-state", f"{len(events) // EVENT.size} events wait; {BACKLOG} are the most")
        _, select, subsel, leds = STATE.unpack_from(data)
        with self._lock:
            self.config.select, self.config.subsel = select, subsel
            self._leds = {led.name.lower() for led in Led if leds >> led & 1}
            self._waiting = deque(EVENT.iter_unpack(events))
        self.config_written(frozenset({"select", "subsel"}))

    def reset(self) -> None:
        """Forget what the driver was not given, and what it switched on."""
        with self._lock:
            self._waiting.clear()
            self._leds.clear()
