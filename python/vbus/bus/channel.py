"""Event channels of a bus: named places where the bus's program and drivers' sides say something to each other.

A channel knows its name, its priority, and who has it open: one end (`vbus.channel`) for each driver's side, made by
that side's connector. What any of them says comes into one inbox; what the program says goes to all of them. A channel
that a driver's side made is its alone, and gone when it leaves.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from vbus import hints
from vbus.bus.pool import Actor
from vbus.channel import PRIORITIES, ChannelClosedError, ChannelEnd, ChannelFullError, Event, Inbox
from vbus.errors import Error, NoSuchNameError, UsageError
from vbus.units import format_size, parse_size

if TYPE_CHECKING:
    from vbus.bus.bus import Bus
    from vbus.bus.slot import Attachment

log = logging.getLogger("vbus.channel")

MAX_CHANNELS = 65536
"""Channels of one bus."""
MAX_LEFT = 16 << 20
"""Bytes that may wait of what drivers said that have left, their regions included."""
MAX_REGION = 4 << 20
"""Bytes of a channel's region."""

Tap = Callable[[str, str, bytes], None]
"""Called with "sent" or "received", whose end, and the bytes; from any thread."""


def check_region(memory: int | str, what: str = "memory") -> int:
    """The bytes of a region that somebody asked for. UsageError."""
    size = parse_size(memory, what)
    if size > MAX_REGION:
        raise UsageError(f"{what}: {format_size(size)} is too much: {format_size(MAX_REGION)} is the most")
    return size


class NoSuchChannelError(Error):
    """There is no channel of this name, for this driver's side."""


class ChannelTakenError(Error):
    """The channel is another driver's alone."""


class ChannelExistsError(UsageError):
    """There is a channel of this name already."""


class Channel:
    """A named channel of a bus. Any thread may use it."""

    def __init__(
        self, bus: Bus, name: str, *, priority: int, memory: int, owner: Attachment | None = None, relay: bool = False
    ) -> None:
        if not 0 <= priority < PRIORITIES:
            raise UsageError(f"channel {name}: priority {priority}: 0 (the most urgent) to {PRIORITIES - 1}")
        self.bus = bus
        self.name = name
        self.priority = priority
        self.memory_size = memory
        self.owner = owner
        """The driver's side that made it and has it alone; None for the bus's own."""
        self.closed = ""
        self._ends: list[ChannelEnd] = []
        self._past = [0, 0, 0]
        self._taps: list[Tap] = []
        self._lock = threading.Lock()
        self._actor: Actor | None = None
        self._inbox = Inbox(self._schedule)
        self._keys: dict[Callable[[], bool], int] = {}
        self.relays = relay
        if relay:
            self.on_event(self._relay)

    def __repr__(self) -> str:
        return f"<Channel {self.name}>"

    # What a program does.

    def send(self, data: bytes = b"") -> int:
        """Say something to everybody who has the channel open; gives how many take it. Never waits.

        For those that have not taken what was sent before it is lost, and counted as missed. ChannelClosedError;
        ValueError beyond 4096 bytes.
        """
        if self.closed:
            raise ChannelClosedError(self.name, self.closed)
        told = 0
        for end in self.ends:
            told += self._send_to(end, data)
        self._tap("sent", "", data)
        return told

    def _send_to(self, end: ChannelEnd, data: bytes) -> bool:
        try:
            end.send(data)
        except ChannelFullError:
            end.missed += 1
            return False
        except ChannelClosedError:
            return False
        return True

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event of anybody; None when none came in `timeout` seconds, or the channel is closed."""
        return self._inbox.receive(timeout)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._inbox)

    def __aiter__(self) -> AsyncIterator[Event]:
        return aiter(self._inbox)

    def on_event(self, callback: Callable[[Event], object]) -> None:
        """Hand every event to `callback`, in a thread of the pool, in the channel's priority, one at a time."""
        self._inbox.on_event(callback)

    @property
    def ends(self) -> list[ChannelEnd]:
        """An end for each driver's side that has the channel open."""
        with self._lock:
            return list(self._ends)

    @property
    def memory(self) -> memoryview:
        """The region of the only driver's side that has the channel open; each has its own, see `Event.end.memory`.

        UsageError when none has, or several have.
        """
        ends = self.ends
        if len(ends) != 1:
            raise UsageError(f"channel {self.name}: {len(ends)} drivers have it open, each with a region of its own")
        return ends[0].memory

    def close(self, reason: str = "the bus closed it") -> None:
        """Close it for everybody."""
        with self._lock:
            if self.closed:
                return
            self.closed = reason
        self.bus.channels.forget(self)
        for end in self.ends:
            end.close(reason)
        self._inbox.close()
        # Whoever keeps a closed channel keeps nothing of the link that it belonged to.
        self.owner = None

    # What connectors do.

    def joined(self, end: ChannelEnd) -> None:
        """A driver's side opened the channel. ChannelClosedError when it was closed meanwhile."""
        with self._lock:
            if self.closed:
                raise ChannelClosedError(self.name, self.closed)
            self._ends.append(end)

    def left(self, end: ChannelEnd) -> None:
        """A driver's side has the channel no more; with its owner the channel goes."""
        with self._lock:
            if end not in self._ends:
                return
            self._ends.remove(end)
            self._past = [a + b for a, b in zip(self._past, (end.sent, end.received, end.missed), strict=True)]
        gone = self._inbox.forget_left(MAX_LEFT)
        if gone:
            log.info("%s/%s: %d events of drivers that left were taken by nobody", self.bus.name, self.name, gone)
        if self.owner is not None:
            self.close("its driver left it")

    @property
    def inbox(self) -> Inbox:
        """Where the ends put what was said."""
        return self._inbox

    def heard(self, end: ChannelEnd, data: bytes) -> None:
        """Show an event that came to those who watch."""
        self._tap("received", end.label, data)

    def _schedule(self, turn: Callable[[], bool]) -> None:
        with self._lock:
            if self._actor is not None and self._actor.closed:
                return
            if self._actor is None:
                self._actor = Actor(self.bus.pool, f"channel {self.name}")
            key = self._keys.get(turn)
            if key is None:
                key = self._keys[turn] = self._actor.key(self._guarded(turn), self.priority)
            actor = self._actor
        actor.mark(key)

    def _guarded(self, turn: Callable[[], bool]) -> Callable[[], bool]:
        def run() -> bool:
            more = True
            try:
                more = turn()
            except Exception:
                log.exception("%s/%s: a callback failed", self.bus.name, self.name)
            if self.closed and not len(self._inbox) and self._actor is not None:
                # The last of what was said has been handed on.
                self._keys.clear()
                self._actor.close()
                return False
            return more

        return run

    def _relay(self, event: Event) -> None:
        for end in self.ends:
            if end is not event.end:
                self._send_to(end, event.data)

    # What an operator sees.

    def tap(self, tap: Tap) -> Callable[[], None]:
        """Show everything that is said from now on to `tap`; gives what ends that."""
        self._taps.append(tap)
        return lambda: self._taps.remove(tap)

    def _tap(self, direction: str, label: str, data: bytes) -> None:
        for tap in list(self._taps):
            try:
                tap(direction, label, data)
            except Exception:
                log.exception("%s/%s: one who watches failed", self.bus.name, self.name)

    def describe(self) -> dict[str, Any]:
        """The channel's row in a listing."""
        ends = self.ends
        sent, received, missed = self._past
        return {
            "bus": self.bus.name,
            "name": self.name,
            "priority": self.priority,
            "memory": self.memory_size,
            "owner": self.owner.label if self.owner is not None else None,
            "relay": self.relays,
            "drivers": [
                {"driver": end.label, "sent": end.sent, "received": end.received, "missed": end.missed} for end in ends
            ],
            "sent": sent + sum(end.sent for end in ends),
            "received": received + sum(end.received for end in ends),
            "missed": missed + sum(end.missed for end in ends),
            "waiting": len(self._inbox),
        }


class Channels:
    """The channels of one bus, by name."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._by_name: dict[str, Channel] = {}
        self._order: list[str] = []
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Channel], object]] = []

    def __iter__(self) -> Iterator[Channel]:
        with self._lock:
            return iter([self._by_name[name] for name in self._order])

    def __len__(self) -> int:
        return len(self._by_name)

    def open(
        self,
        name: str,
        *,
        priority: int = 4,
        memory: int | str = 0,
        owner: Attachment | None = None,
        relay: bool = False,
    ) -> Channel:
        """Make a channel. UsageError: no name, no priority, no size, too many; ChannelExistsError."""
        size = check_region(memory, f"channel {name}: memory")
        channel = Channel(self._bus, name, priority=priority, memory=size, owner=owner, relay=relay)
        with self._lock:
            if name in self._by_name:
                raise ChannelExistsError(f"bus {self._bus.name} has a channel {name!r} already: choose another name")
            if len(self._by_name) >= MAX_CHANNELS:
                raise UsageError(
                    f"channel {name}: bus {self._bus.name} has {MAX_CHANNELS} channels, the most there are"
                )
            self._by_name[name] = channel
            bisect.insort(self._order, name)
        self._bus.channels_changed()
        if owner is not None:
            for callback in list(self._callbacks):
                try:
                    callback(channel)
                except Exception:
                    log.exception("%s/%s: a callback failed", self._bus.name, name)
        return channel

    def on_open(self, callback: Callable[[Channel], object]) -> None:
        """Call back with every channel that a driver's side makes, before anything is said on it. It must not wait."""
        self._callbacks.append(callback)

    def get(self, name: str) -> Channel:
        """The channel of this name. NoSuchNameError."""
        channel = self._by_name.get(name)
        if channel is None:
            raise NoSuchNameError(hints.no_such("channel", name, self._order, f"bus {self._bus.name}"))
        return channel

    def for_driver(self, name: str, who: Attachment) -> Channel:
        """The channel of this name, if this driver's side may open it. NoSuchChannelError, ChannelTakenError."""
        channel = self._by_name.get(name)
        if channel is None:
            raise NoSuchChannelError(f"bus {self._bus.name} has no channel {name!r}")
        if channel.owner is not None and channel.owner is not who:
            raise ChannelTakenError(f"channel {name!r} is {channel.owner.label}'s alone")
        return channel

    def after(self, name: str, who: Attachment) -> Channel | None:
        """The first channel behind `name`, in the order of names, that this driver's side may open."""
        with self._lock:
            for later in self._order[bisect.bisect_right(self._order, name) :]:
                channel = self._by_name[later]
                if channel.owner is None or channel.owner is who:
                    return channel
        return None

    def forget(self, channel: Channel) -> None:
        """A channel was closed."""
        with self._lock:
            if self._by_name.get(channel.name) is not channel:
                return
            del self._by_name[channel.name]
            del self._order[bisect.bisect_left(self._order, channel.name)]
        self._bus.channels_changed()

    def close(self, reason: str) -> None:
        """Close all of them."""
        for channel in list(self):
            channel.close(reason)
