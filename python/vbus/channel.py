"""One end of an event channel: what a program sends, hears and shares, on either side of a link.

A channel joins a bus with the drivers' sides that opened it. Each such pair has two ends, which are alike, and which
this module makes; what carries them (rings in a shared area, messages on a stream) is a `Carrier`. An end's events:

    send()    -> window -> carrier ~~~~~> other side: arrived() -> inbox -> receive(), async for, on_event()
    credited() <- carrier <~~~~~~~~~~~~~ told when half a window has been taken out of the inbox

The window is the flow control: whoever does not take its events hears no more of them, and costs a window of memory. A
sender never waits; it is told that there is no room.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from vbus.errors import Error, Violation

if TYPE_CHECKING:
    # Only a program that awaits pays for it.
    import asyncio

MAX_EVENT = 4096
"""Bytes of one event."""
EVENT_COST = 64
"""What an event costs beside its bytes."""
WINDOW = 16384
"""Bytes that events may cost which were sent and not yet consumed, before the last of them."""
PRIORITIES = 8
PAGE = 4096
_MOD = 1 << 32
_CHANGED = re.compile(rb"[^\0]+")


class ChannelFullError(Error, BlockingIOError):
    """The other side has not taken enough of what was sent before (EAGAIN): `wait_writable` waits until it has."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.EAGAIN, f"channel {name}: the other side has not taken what was sent before")


class ChannelClosedError(Error, BrokenPipeError):
    """The channel was closed, here or there (EPIPE)."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(errno.EPIPE, f"channel {name}: {reason}")


class Event(NamedTuple):
    """Something that was said on a channel, and the end that heard it."""

    data: bytes
    end: ChannelEnd

    def reply(self, data: bytes = b"") -> None:
        """Send to whoever sent this. ChannelFullError, ChannelClosedError."""
        self.end.send(data)


class Carrier(Protocol):
    """What brings an end's messages to the other side. Nothing here waits."""

    def carry(self, end: ChannelEnd, data: bytes) -> bool:
        """Take an event, and what was written to a copied region before it; False when there is no room now."""

    def carry_credit(self, end: ChannelEnd) -> None:
        """Tell `end.take_credit()`, now or as soon as there is room."""

    def leave(self, end: ChannelEnd) -> None:
        """Tell the other side that this one closes the channel."""


class _Nowhere:
    """The carrier of an end that is closed: events that nobody took yet must not keep a link's memory."""

    def carry(self, end: ChannelEnd, data: bytes) -> bool:
        """Take nothing."""
        return False

    def carry_credit(self, end: ChannelEnd) -> None:
        """Nobody is there to be told."""

    def leave(self, end: ChannelEnd) -> None:
        """Nobody is there to be told."""


_NOWHERE = _Nowhere()


class Waiters:
    """Threads and coroutines that wait until something may have become so."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def wake(self) -> None:
        """Let all of them look again. From any thread."""
        with self._changed:
            self._changed.notify_all()
            futures, self._futures = self._futures, []
        for loop, future in futures:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_finish, future)

    def wait(self, condition: Callable[[], object], timeout: float | None) -> bool:
        """Wait in this thread until `condition`; False when `timeout` seconds were not enough."""
        with self._changed:
            return bool(self._changed.wait_for(condition, timeout))

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait on this event loop until `condition`."""
        import asyncio

        while not condition():
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            entry = loop, future
            with self._changed:
                self._futures.append(entry)
            try:
                # It may have become so between the look above and the registration.
                if condition():
                    return
                await future
            finally:
                # Whoever gave up waiting is not remembered.
                with self._changed, contextlib.suppress(ValueError):
                    self._futures.remove(entry)


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _never(turn: Callable[[], bool]) -> None:
    """Schedule nothing."""


def _drop(event: Event) -> None:
    """Deliver to nobody."""


class Inbox:
    """Events that wait for the program: taken one by one, iterated over, or handed to a callback."""

    def __init__(self, schedule: Callable[[Callable[[], bool]], None]) -> None:
        """`schedule` has a function called soon, in the thread and priority of callbacks, again while it gives True."""
        self._schedule = schedule
        self._events: deque[Event] = deque()
        self._callback: Callable[[Event], object] | None = None
        self._waiters = Waiters()
        self._trimming = threading.Lock()
        self.closed = False

    def __len__(self) -> int:
        return len(self._events)

    def deliver(self, event: Event) -> None:
        """An event came. From any thread; one end's events come from one thread at a time."""
        self._events.append(event)
        if self._callback is not None:
            self._schedule(self._call)
        else:
            self._waiters.wake()

    def forget_left(self, limit: int) -> int:
        """Keep, of what closed ends said, the latest that costs up to `limit` bytes with its regions; how many went.

        Whoever opens, speaks and leaves again and again would else fill this side's memory.
        """
        seen: set[int] = set()
        gone = cost = 0
        with self._trimming:
            events = list(self._events)
            for event in reversed(events):
                end = event.end
                if end.closed:
                    cost += len(event.data) + EVENT_COST + (end.region_size if id(end) not in seen else 0)
                    seen.add(id(end))
                    if cost > limit:
                        gone += 1
                        with contextlib.suppress(ValueError):
                            self._events.remove(event)
        return gone

    def close(self) -> None:
        """Nothing more comes. What is here may still be taken, or is still handed to the callback."""
        self.closed = True
        self._waiters.wake()
        if self._callback is not None:
            self._schedule(self._call)
        else:
            self._schedule = _never

    def on_event(self, callback: Callable[[Event], object]) -> None:
        """Hand every event to `callback`, those that wait first."""
        self._callback = callback
        self._schedule(self._call)

    def _call(self) -> bool:
        """One event a turn, so that what is more urgent waits for one callback at most."""
        event = self._take() if self._callback is not None else None
        if event is not None and self._callback is not None:
            self._callback(event)
        if self.closed and not self._events:
            # A closed channel keeps nobody alive.
            self._callback = None
            self._schedule = _never
        return bool(self._events)

    def _take(self) -> Event | None:
        try:
            event = self._events.popleft()
        except IndexError:
            return None
        event.end.consumed(len(event.data) + EVENT_COST)
        return event

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event; None when none came in `timeout` seconds (None: without limit), or none comes any more."""
        while True:
            event = self._take()
            if event is not None or self.closed:
                return event
            if not self._waiters.wait(lambda: self._events or self.closed, timeout):
                return None

    def __iter__(self) -> Iterator[Event]:
        while (event := self.receive()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            await self._waiters.until(lambda: self._events or self.closed)
            event = self._take()
            if event is not None:
                yield event
            elif self.closed:
                return


class ChannelEnd:
    """One of the two ends of a channel between a bus and one driver's side. Any thread may use it."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        number: int,
        name: str,
        priority: int,
        window: int,
        deliver: Callable[[Event], None],
        memory: memoryview | None = None,
        mirror: Mirror | None = None,
        label: str = "",
    ) -> None:
        self.number = number
        self.name = name
        self.priority = priority
        self.label = label
        """Who is at the other end, for people."""
        self._deliver = deliver
        self.mirror = mirror
        """What keeps a copied region like the other side's."""
        self._memory = mirror.view if mirror is not None else memory
        self._carrier: Carrier = carrier
        self._window = window
        self._lock = threading.RLock()
        self._room = Waiters()
        self._full = False
        """Whether the carrier had no room, and has not said since that it has."""
        # Costs, in all: sent here and consumed there; received and consumed here, and what was told of it.
        self._sent = self._credited = 0
        self._received = self._consumed = self._told = 0
        self.closed = ""
        """Why the channel is closed; empty while it is open."""
        self.sent = self.received = self.missed = 0

    def __repr__(self) -> str:
        return f"<ChannelEnd {self.name} {self.label}>"

    @property
    def region_size(self) -> int:
        """Bytes of the region; 0 without one."""
        return len(self._memory) if self._memory is not None else 0

    @property
    def memory(self) -> memoryview:
        """The region that both ends see. ValueError when the channel was opened without one."""
        if self._memory is None:
            raise ValueError(f"channel {self.name} has no region: open it with memory")
        return self._memory

    # What a program does.

    def send(self, data: bytes = b"") -> None:
        """Say something; never waits. ChannelFullError, ChannelClosedError; ValueError beyond 4096 bytes."""
        # A copy, of bytes whatever the items are, before anything is counted.
        data = bytes(memoryview(data))
        if len(data) > MAX_EVENT:
            raise ValueError(f"an event of {len(data)} bytes; {MAX_EVENT} are the most: put more into a region")
        cost = len(data) + EVENT_COST
        with self._lock:
            if self.closed:
                raise ChannelClosedError(self.name, self.closed)
            if self._sent - self._credited >= self._window:
                raise ChannelFullError(self.name)
            # Counted first: the other side may have consumed it before `carry` returns. Full first, too: that there is
            # room again may be heard before it returns.
            self._sent += cost
            self._full = True
            carried = False
            try:
                carried = self._carrier.carry(self, data)
            finally:
                if not carried:
                    self._sent -= cost
            if not carried:
                if self.closed:
                    raise ChannelClosedError(self.name, self.closed)
                raise ChannelFullError(self.name)
            self._full = False
            self.sent += 1

    @property
    def is_writable(self) -> bool:
        """Whether window and carrier have room, or the channel is closed, so that `send` says so."""
        return bool(self.closed) or (not self._full and self._sent - self._credited < self._window)

    def wait_writable(self, timeout: float | None = None) -> bool:
        """Wait until there is room, or the channel is closed; False when `timeout` seconds were not enough."""
        return self._room.wait(lambda: self.is_writable, timeout)

    async def writable(self) -> None:
        """Wait until there is room, or the channel is closed."""
        await self._room.until(lambda: self.is_writable)

    def close(self, reason: str = "closed here") -> None:
        """Leave the channel; the other side hears what was sent before."""
        carrier = self._carrier
        if self.ended(reason):
            carrier.leave(self)

    def held(self) -> AbstractContextManager[object]:
        """For the carrier: keep every thread from sending for a moment."""
        return self._lock

    # What carries it says. `arrived` and `credited` check what the other side wrote.

    def arrived(self, data: bytes) -> None:
        """An event came. Violation: channel-window, channel-event-size."""
        if len(data) > MAX_EVENT:
            raise Violation("channel-event-size", f"an event of {len(data)} bytes; {MAX_EVENT} are the most")
        with self._lock:
            if self._received - self._told >= self._window:
                raise Violation("channel-window", f"channel {self.name}: more than {self._window} bytes outstanding")
            self._received += len(data) + EVENT_COST
            self.received += 1
        self._deliver(Event(data, self))

    def credited(self, consumed: int) -> None:
        """The other side has consumed so much in all, modulo 2^32. Violation: channel-credit."""
        with self._lock:
            more = (consumed - self._credited) % _MOD
            if more > self._sent - self._credited:
                raise Violation("channel-credit", f"channel {self.name}: more was consumed than was sent")
            self._credited += more
        self._room.wake()

    def has_room(self) -> None:
        """The carrier has room again."""
        self._full = False
        self._room.wake()

    def consumed(self, cost: int) -> None:
        """The program took events of this cost."""
        with self._lock:
            self._consumed += cost
            if self.closed or self._consumed - self._told < self._window // 2:
                return
        self._carrier.carry_credit(self)

    def take_credit(self) -> int:
        """What to tell the other side: all that was consumed, modulo 2^32. From now on it counts as told."""
        with self._lock:
            self._told = self._consumed
            return self._told % _MOD

    def ended(self, reason: str) -> bool:
        """The channel is closed; False when it was already."""
        with self._lock:
            if self.closed:
                return False
            self.closed = reason
            self._carrier = _NOWHERE
            self._deliver = _drop
        self._room.wake()
        return True


class Channel(ChannelEnd):
    """A channel as the driver's side has it: an end with an inbox of its own."""

    def __init__(self, carrier: Carrier, inbox: Inbox, **rest: Any) -> None:
        super().__init__(carrier, deliver=inbox.deliver, **rest)
        self.inbox = inbox

    def ended(self, reason: str) -> bool:
        """Nothing more comes: whoever iterates ends."""
        first = super().ended(reason)
        self.inbox.close()
        return first

    def receive(self, timeout: float | None = None) -> Event | None:
        """The next event; None when none came in `timeout` seconds, or the channel is closed."""
        return self.inbox.receive(timeout)

    def on_event(self, callback: Callable[[Event], object]) -> None:
        """Hand every event to `callback`, in the thread of hooks, the more urgent channels' first."""
        self.inbox.on_event(callback)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.inbox)

    def __aiter__(self) -> AsyncIterator[Event]:
        return aiter(self.inbox)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mirror:
    """A region where no memory is shared: a copy here, and what was written to it since the last look.

    Both sides may write; bytes that only one of them wrote are never lost, those that both wrote have one of the two.
    """

    def __init__(self, size: int) -> None:
        self._bytes = bytearray(size)
        self._shadow = bytearray(size)
        self._lock = threading.Lock()
        self.view = memoryview(self._bytes)

    def changes(self) -> list[tuple[int, bytes]]:
        """(offset, bytes) of what this side wrote since the last call."""
        found: list[tuple[int, bytes]] = []
        with self._lock:
            for at in range(0, len(self._bytes), PAGE):
                now, before = bytes(self.view[at : at + PAGE]), self._shadow[at : at + PAGE]
                if now == before:
                    continue
                differing = int.from_bytes(now, "little") ^ int.from_bytes(before, "little")
                for run in _CHANGED.finditer(differing.to_bytes(len(now), "little")):
                    found.append((at + run.start(), now[run.start() : run.end()]))
                self._shadow[at : at + PAGE] = now
        return found

    def write(self, offset: int, data: bytes) -> None:
        """The other side wrote this. Violation: channel-memory."""
        if offset + len(data) > len(self._bytes):
            raise Violation("channel-memory", f"{len(data)} bytes at {offset} of a region of {len(self._bytes)}")
        with self._lock:
            self.view[offset : offset + len(data)] = data
            self._shadow[offset : offset + len(data)] = data
