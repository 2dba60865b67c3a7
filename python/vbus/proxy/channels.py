"""The event channels of a bus as a driver's side has them: opened by name, each one end (`vbus.channel.Channel`).

What is said on them comes in on the loop's thread and goes into each channel's inbox; programs take it from there, or
have it handed to them in the thread of hooks, the more urgent channels' first.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vbus import msg
from vbus.channel import EVENT_COST, PRIORITIES, WINDOW, Channel, ChannelEnd, Inbox, Mirror, Waiters
from vbus.errors import DriverError, Violation
from vbus.units import parse_size

if TYPE_CHECKING:
    from vbus.proxy.connector import GuestConnector
    from vbus.proxy.loop import Loop

MAX_WINDOW = 1 << 20
"""The largest window that a bus may give: what it says may be kept here."""
MAX_EARLY = WINDOW // EVENT_COST + 1
"""Events that can come before the answer that opens their channel."""
MEMORY_HEAD = 16
"""Bytes of CHANNEL_MEMORY before its data."""


@dataclass(frozen=True)
class ChannelInfo:
    """A channel that may be opened: its name, its priority (0 is the most urgent), and the bytes of its region."""

    name: str
    priority: int
    memory: int


def _call(loop: Loop, turn: Callable[[], bool], priority: int) -> None:
    """Have a callback called, and again as long as there is more."""
    more = True
    try:
        more = turn()
    finally:
        # Also behind a callback that raised, which the loop logs.
        if more:
            loop.hook(lambda: _call(loop, turn, priority), priority)


class RemoteChannels:
    """The channels of one link, and the carrier of their ends."""

    def __init__(self, connector: GuestConnector) -> None:
        self._connector = connector
        self._numbers = itertools.count(1)
        self._channels: dict[int, Channel] = {}
        self._early: dict[int, list[bytes | str]] = {}
        """What came on channels before the answer that opens them: events, and why one is closed already."""
        self._owing: set[ChannelEnd] = set()
        self._refused: set[ChannelEnd] = set()
        """Ends whose last event found no room: they alone are told when there is some."""
        self._lock = threading.Lock()
        self._changes = 0
        self._changed = Waiters()

    # What a program asks.

    def open(self, name: str, *, create: bool, priority: int, memory: int | str, wait: float) -> Channel:
        """Open, or make, a channel; see `Remote.open_channel`."""
        deadline_passed = False
        size = parse_size(memory, f"channel {name}: memory")
        while True:
            seen = self._changes
            try:
                return self._open(name, create, priority if create else 0, size if create else 0)
            except DriverError as error:
                if error.errno != errno.ENOENT or deadline_passed or wait <= 0:
                    raise
            # Once more after the last change, or after the time is over.
            deadline_passed = not self._changed.wait(
                lambda seen=seen: self._changes != seen or self._connector.lost,  # type: ignore[misc]
                wait,
            )

    def _open(self, name: str, create: bool, priority: int, size: int) -> Channel:
        number = next(self._numbers) & 0xFFFF_FFFF
        opened: list[Channel] = []

        def answered(answer: msg.ChannelOpenResponse) -> None:
            opened.append(self._opened(number, name, answer))

        with self._lock:
            self._early[number] = []
        try:
            flags = msg.ChannelFlags.CREATE if create else 0
            body = msg.ChannelOpen(priority, flags, size, number, name)
            self._connector.call(body, msg.ChannelOpenResponse, on_answer=answered)
        except DriverError as error:
            if error.errno == errno.ETIMEDOUT:
                # Should it be opened after all, nobody here knows of it: let it be closed.
                with contextlib.suppress(DriverError, OSError):
                    self._connector.send(msg.ChannelClose(number))
            raise
        finally:
            with self._lock:
                self._early.pop(number, None)
        return opened[0]

    def _opened(self, number: int, name: str, answer: msg.ChannelOpenResponse) -> Channel:
        """Make this side's end, on the loop's thread: what comes next on the link may be for it. Violation."""
        if answer.priority >= PRIORITIES or not EVENT_COST <= answer.window <= MAX_WINDOW:
            raise Violation("channel-answer", f"priority {answer.priority}, window {answer.window}")
        place = None
        if answer.memory_size:
            place = self._connector.map_region(answer.memory_offset, answer.memory_size)
        loop = self._connector.loop
        channel = Channel(
            self,
            Inbox(lambda turn: loop.hook(lambda: _call(loop, turn, answer.priority), answer.priority)),
            number=number,
            name=name,
            priority=answer.priority,
            window=answer.window,
            memory=place if isinstance(place, memoryview) else None,
            mirror=place if isinstance(place, Mirror) else None,
            label=self._connector.remote.bus_name if self._connector.remote is not None else "",
        )
        with self._lock:
            early = self._early.pop(number, [])
            self._channels[number] = channel
        for said in early:
            if isinstance(said, str):
                self._channels.pop(number, None)
                channel.ended(said)
            else:
                channel.arrived(said)
        if self._connector.lost is not None:
            # It was lost while this was registered: nobody else will say so.
            channel.ended(self._connector.lost.strerror)
        return channel

    def list(self) -> Iterator[ChannelInfo]:
        """The channels that this side may open, by name."""
        name = ""
        while True:
            answer = self._connector.call(msg.NextChannel(name), msg.NextChannelResponse)
            if not answer.name:
                return
            if answer.name.encode() <= name.encode():
                raise DriverError(errno.EPROTO, f"channel {answer.name!r} came after {name!r}")
            name = answer.name
            yield ChannelInfo(name, answer.priority, answer.memory)

    # What the bus says. On the loop's thread.

    def heard(self, body: msg.Body) -> bool:
        """Handle what is said about channels; False when it is about something else. Violation."""
        match body:
            case msg.ChannelEvent(channel=number, data=data):
                self._arrived(number, data)
            case msg.ChannelCredit(channel=number, consumed=consumed):
                channel = self._channels.get(number)
                if channel is not None:
                    channel.credited(consumed)
            case msg.ChannelMemory(channel=number, offset=offset, data=data):
                channel = self._channels.get(number)
                if channel is not None and channel.mirror is not None:
                    channel.mirror.write(offset, data)
            case msg.ChannelClosed(channel=number, text=text):
                with self._lock:
                    channel = self._channels.pop(number, None)
                    if channel is None and number in self._early:
                        self._early[number].append(text)
                if channel is not None:
                    channel.ended(text)
            case msg.EventChannels():
                self._changes += 1
                self._changed.wake()
            case _:
                return False
        return True

    def _arrived(self, number: int, data: bytes) -> None:
        channel = self._channels.get(number)
        if channel is None:
            with self._lock:
                early = self._early.get(number)
                channel = self._channels.get(number)
                if early is not None and channel is None:
                    if len(early) >= MAX_EARLY:
                        raise Violation("channel-window", f"over {MAX_EARLY} events before the channel is open")
                    early.append(data)
        if channel is not None:
            channel.arrived(data)

    # The carrier of the ends. From any thread.

    def carry(self, end: ChannelEnd, data: bytes) -> bool:
        """Send an event, and before it what was written to a copied region."""
        connector = self._connector
        if end.mirror is not None:
            if not connector.has_room():
                with self._lock:
                    self._refused.add(end)
                return False
            piece = connector.max_message - MEMORY_HEAD
            for offset, changed in end.mirror.changes():
                for at in range(0, len(changed), piece):
                    self._say(end, msg.ChannelMemory(end.number, offset + at, changed[at : at + piece]))
        if self._say(end, msg.ChannelEvent(end.number, data)):
            return True
        with self._lock:
            self._refused.add(end)
        return False

    def _say(self, end: ChannelEnd, body: msg.Body) -> bool:
        return self._connector.transmit_on_channel(end.priority, msg.encode(msg.Frame(body)))

    def carry_credit(self, end: ChannelEnd) -> None:
        """Tell what was consumed, or remember to."""
        # One at a time: a credit that was overtaken by a later one would take it back.
        with end.held():
            told = self._say(end, msg.ChannelCredit(end.number, end.take_credit()))
        if not told:
            with self._lock:
                self._owing.add(end)

    def leave(self, end: ChannelEnd) -> None:
        """Close the channel: say so behind what was said on it, and wait for the answer, if this thread may."""
        connector = self._connector
        self._channels.pop(end.number, None)
        with self._lock:
            self._owing.discard(end)
            self._refused.discard(end)
        if connector.lost is not None:
            return
        closing = msg.ChannelClose(end.number)
        if not connector.loop.is_here:
            with contextlib.suppress(DriverError):
                connector.call(closing, msg.ChannelCloseResponse, channel_priority=end.priority)
        elif not self._say(end, closing):
            connector.send(closing)

    def room(self, priority: int | None = None) -> None:
        """There is room again (for messages of one priority): pay what is owed, and let senders know."""
        with self._lock:
            owing = [end for end in self._owing if priority is None or end.priority == priority]
            self._owing.difference_update(owing)
            refused = [end for end in self._refused if priority is None or end.priority == priority]
            self._refused.difference_update(refused)
        for end in owing:
            self.carry_credit(end)
        for end in refused:
            end.has_room()

    def end(self, reason: str) -> None:
        """The bus is gone."""
        for channel in list(self._channels.values()):
            channel.ended(reason)
        self._channels.clear()
        self._changed.wake()
