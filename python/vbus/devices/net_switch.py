"""A learning switch between network devices of one bus, as a backend: each of them is a port of it.

The switch itself is one of the core, and so is what it knows: who is where, who talks with whom, and how much goes to
all. A port's queues are served there too, by its engines, or by the device's model: then its frames are handed to the
core, and what comes for it waits there. Either way, and between both, the same things happen.

A driver may leave checksums and segments to whoever is at the other end. To one that takes them so they go as they are;
for one that does not, the core finishes them. So it does not matter what the driver at another port has negotiated.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from vbus import _core
from vbus.bus.bus import Bus, check_name
from vbus.devices.net_backends import Backend
from vbus.errors import UsageError
from vbus.virtio.net import HEADER

AGEING = 300.0
"""Seconds for which a station that says nothing is known: as of Linux's bridges."""
FLOOD_LIMIT = 10_000
"""Frames a second that a port may send to all, unless its operator says something else; a tenth of it at once."""
MAX_FLOOD_LIMIT = 1_000_000

_switches: WeakKeyDictionary[Bus, dict[str, Switch]] = WeakKeyDictionary()
_lock = threading.Lock()


class Switch:
    """A switch of a bus, which is there as long as it has a port."""

    def __init__(self) -> None:
        self.core = _core.Switch(AGEING)
        self.ports = 0


def _enter(bus: Bus, name: str) -> Switch:
    with _lock:
        switches = _switches.setdefault(bus, {})
        if name not in switches:
            switches[name] = Switch()
        switches[name].ports += 1
        return switches[name]


def _leave(bus: Bus, name: str) -> None:
    with _lock:
        switches = _switches[bus]
        switches[name].ports -= 1
        if not switches[name].ports:
            del switches[name]


def check_flood_limit(where: str, limit: int) -> int:
    """The limit, when it is one. UsageError."""
    if not 1 <= limit <= MAX_FLOOD_LIMIT:
        raise UsageError(f"{where}: flood_limit {limit} is out of range: 1 to {MAX_FLOOD_LIMIT} frames a second")
    return limit


class SwitchPort(Backend):
    """A port of the switch of this name. UsageError when that is no name."""

    features = (
        "CSUM",
        "HOST_TSO4",
        "HOST_TSO6",
        "HOST_ECN",
        "HOST_USO",
        "CTRL_GUEST_OFFLOADS",
        "GUEST_CSUM",
        "GUEST_TSO4",
        "GUEST_TSO6",
        "GUEST_ECN",
        "GUEST_USO4",
        "GUEST_USO6",
    )

    def __init__(self, name: str) -> None:
        self.name = check_name("switch", name)
        self.isolated = False
        self.flood_limit = FLOOD_LIMIT
        self._bus: Bus | None = None
        self._port: _core.SwitchPort | None = None
        self._past: Counter[str] = Counter()

    def __str__(self) -> str:
        return f"switch:{self.name}"

    def join(
        self,
        bus: Bus,
        pairs: Sequence[tuple[_core.DeviceQueue, _core.DeviceQueue, _core.Signal]],
        signal: _core.Signal,
    ) -> list[_core.SwitchEngine]:
        """Become a port, with a receive and a transmit queue for each pair, and what is called when there are frames
        that the model has to read. Gives the engines of the pairs, which make use of `signal`.
        """
        self._bus = bus
        self._port = _core.SwitchPort(_enter(bus, self.name).core, list(pairs), signal)
        self.isolate(self.isolated)
        self.limit_floods(self.flood_limit)
        return [_core.SwitchEngine(self._port, pair) for pair in range(len(pairs))]

    def open(self, log: logging.Logger, *, pairs: int, mtu: int, link: bool) -> None:
        """Nothing is to be opened: see `join`."""

    def close(self) -> None:
        """Leave the switch."""
        port, self._port = self._port, None
        if port is not None and self._bus is not None:
            self._past += Counter({name: count for name, count in port.counters.items() if name != "stations"})
            port.leave()
            _leave(self._bus, self.name)

    def counted(self, name: str) -> int:
        """What the port counted: flooded, flood_dropped, learned, moved; `stations` is how many are known there."""
        now = self._port.counters[name] if self._port is not None else 0
        return now + self._past[name]

    def isolate(self, isolated: bool) -> None:
        """Talk with no other port that is isolated."""
        self.isolated = isolated
        if self._port is not None:
            self._port.isolate(isolated)

    def limit_floods(self, limit: int) -> None:
        """Send as many frames a second to all, at most."""
        self.flood_limit = limit
        if self._port is not None:
            self._port.limit_floods(limit)

    def read(self, pair: int) -> memoryview | None:
        """The oldest packet that waits for this pair."""
        packet = self._port.read(pair) if self._port is not None else None
        return None if packet is None else memoryview(packet)

    def write(self, pair: int, header: bytes, frame: Sequence[memoryview]) -> None:
        """Have it switched. OSError ENOBUFS when it goes nowhere, EINVAL for a header that lies."""
        sent = self._port.send(pair, header[: HEADER.size], b"".join(frame)) if self._port is not None else False
        if not sent:
            code = errno.EINVAL if sent is None else errno.ENOBUFS
            raise OSError(code, os.strerror(code))
