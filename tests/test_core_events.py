"""Doorbells, event rings, link rings and the scheduler, as Python sees them, on real shared memory and eventfds."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vbus._core import Doorbell, EventReceiver, EventSender, LinkRing, Mapping, Scheduler, Signal
from vbus.errors import Violation

SIZE = 65536
SLOTS, STATS, TAKEN, SLEEP = 0, 16384, 20480, 20992
SOURCES, PRIORITIES = 64, 3
FULL = 2**64 - 2
"""What an eventfd holds at most."""


def shared() -> tuple[Mapping, mmap.mmap]:
    """An area as the native side maps it, and as a peer does."""
    fd = os.memfd_create("area", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        return Mapping(fd, SIZE), mmap.mmap(fd, SIZE)
    finally:
        os.close(fd)


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def word(area: mmap.mmap, offset: int) -> int:
    return int(struct.unpack_from("<I", area, offset)[0])


class Rings:
    """Both sides of one direction, in one process."""

    def __init__(self) -> None:
        self.area, self.raw = shared()
        self.fds = [eventfd() for _ in range(PRIORITIES)]
        self.sender = EventSender(
            self.area,
            slots=SLOTS,
            stats=STATS,
            taken=TAKEN,
            sleep=SLEEP,
            max_sources=SOURCES,
            priorities=PRIORITIES,
            doorbells=[Doorbell(fd) for fd in self.fds],
        )
        self.receiver = EventReceiver(
            self.area, slots=SLOTS, taken=TAKEN, sleep=SLEEP, max_sources=SOURCES, priorities=PRIORITIES
        )
        self.bells = [Doorbell(fd) for fd in self.fds]

    def open(self, source: int, key: int, *, generation: int = 1, priority: int = 0) -> Signal:
        self.receiver.open(source, generation, key)
        return self.sender.open(source, generation, priority)

    def asleep(self) -> bool:
        return bool(word(self.raw, SLEEP) & 1)

    def slot(self, index: int, sequence: int, source: int, generation: int) -> None:
        """What a hostile producer writes."""
        struct.pack_into("<III", self.raw, SLOTS + index * 16 + 4, source, generation, 0)
        struct.pack_into("<I", self.raw, SLOTS + index * 16, sequence)


@pytest.fixture
def rings() -> Iterator[Rings]:
    rings = Rings()
    yield rings
    for fd in rings.fds:
        os.close(fd)


class Waiter:
    """A thread that takes one turn."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.turn: tuple[int, int] | None = None
        self._scheduler = scheduler
        self._thread = threading.Thread(target=self._take)
        self._thread.start()

    def _take(self) -> None:
        self.turn = self._scheduler.next()

    def join(self) -> tuple[int, int] | None:
        self._thread.join()
        return self.turn


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until something is so; the test's own timeout ends it if it never is."""
    while not condition():
        os.sched_yield()


# Doorbells


def test_a_doorbell_is_a_duplicate_and_counts() -> None:
    fd = eventfd()
    bell = Doorbell(fd)
    assert bell.fileno() != fd
    assert bell.drain() == 0
    assert bell.ring()
    assert bell.ring()
    os.close(fd)
    assert bell.drain() == 2
    assert not bell.jammed


def test_only_an_eventfd_is_a_doorbell() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="eventfd"):
        Doorbell(writer)
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError):  # noqa: PT011 -- EBADF has no class of its own
        Doorbell(writer)
    with pytest.raises(ValueError, match="-1"):
        Doorbell(-1)


def test_a_full_doorbell_refuses_and_recovers() -> None:
    fd = eventfd()
    bell = Doorbell(fd)
    os.eventfd_write(fd, FULL)
    assert not bell.ring()
    assert not bell.jammed
    assert bell.drain() == FULL
    assert bell.ring()
    os.close(fd)


def test_a_doorbell_that_the_peer_made_blocking_and_full_is_jammed() -> None:
    fd = eventfd()
    bell = Doorbell(fd)
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    assert bell.drain() == 0, "reading does not block either"
    os.eventfd_write(fd, FULL)
    assert not bell.ring()
    assert bell.jammed
    assert bell.drain() == FULL
    assert not bell.ring(), "never written again"
    assert bell.drain() == 0
    os.close(fd)


def test_a_peer_that_races_for_the_jam_stops_nobody() -> None:
    """Another process flips O_NONBLOCK and fills the counter as fast as it can, while we ring."""
    fd = eventfd()
    bell = Doorbell(fd)
    peer = """
import fcntl, os, sys
fd = int(sys.argv[1])
print("ready", flush=True)
while True:
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        pass
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        os.eventfd_write(fd, 2**64 - 2)
    except BlockingIOError:
        pass
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
"""
    with subprocess.Popen(
        [sys.executable, "-c", peer, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            until(lambda: not bell.ring() and bell.jammed)
        finally:
            process.kill()
    os.close(fd)


def test_a_forked_child_can_break_off_a_jam_too() -> None:
    """The child has no guard thread of its own until its first ring."""
    fd = eventfd()
    bell = Doorbell(fd)
    assert bell.ring()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = os.eventfd(0, os.EFD_NONBLOCK)
            other = Doorbell(mine)
            fcntl.fcntl(mine, fcntl.F_SETFL, 0)
            os.eventfd_write(mine, FULL)
            status = 0 if not other.ring() and other.jammed and bell.ring() else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bell.drain() == 2
    os.close(fd)


# Signals


def test_a_direct_signal_rings_each_time_and_shows_its_counters() -> None:
    area, raw = shared()
    fd = eventfd()
    signal = Signal.direct(Doorbell(fd), (area, 64))
    for _ in range(3):
        signal.notify()
    assert signal.counters == (3, 3, 3)
    assert os.eventfd_read(fd) == 3
    assert struct.unpack_from("<QQQQ", raw, 64) == (3, 3, 3, 0)
    os.eventfd_write(fd, FULL)
    signal.notify()
    assert signal.counters == (4, 4, 3)
    os.close(fd)
    plain = Signal.direct(Doorbell(eventfd()))
    plain.notify()
    assert plain.counters == (1, 1, 1)


@pytest.mark.parametrize("offset", [4, SIZE - 16, SIZE])
def test_counters_outside_the_area_are_refused(offset: int) -> None:
    area, _ = shared()
    with pytest.raises(ValueError, match="stats"):
        Signal.direct(Doorbell(eventfd()), (area, offset))


def test_a_local_signal_marks_its_key() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    signal = Signal.local(scheduler, key)
    for _ in range(5):
        signal.notify()
    assert signal.counters == (5, 1, 0)
    assert scheduler.next(0) == (actor, key)
    assert scheduler.next(0) is None


# Event rings


def test_many_signals_are_one_event_and_its_counters_are_visible(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    scheduler.add_events(rings.receiver, rings.bells, key)
    signal = rings.open(5, key)
    for _ in range(100):
        signal.notify()
    assert scheduler.next(0) == (actor, key)
    scheduler.done(actor, key)
    assert scheduler.next(0) is None
    signal.notify()
    assert scheduler.next(0) == (actor, key)
    assert signal.counters == rings.sender.counters == (101, 2, 0)
    assert struct.unpack_from("<QQQQ", rings.raw, STATS + 5 * 32) == (101, 2, 0, 0)
    assert (rings.receiver.taken, rings.receiver.dropped, rings.receiver.fault) == (2, 0, None)
    assert word(rings.raw, TAKEN + 5 * 4) == 2


def test_a_sleep_costs_one_doorbell_a_priority(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    keys = [scheduler.key(actor) for _ in range(6)]
    scheduler.add_events(rings.receiver, [], keys[0])
    signals = [rings.open(index, key, priority=index // 2) for index, key in enumerate(keys)]
    # Without doorbells in its scheduler, the sleeper stays asleep for as long as this test wants.
    waiter = Waiter(scheduler)
    until(rings.asleep)
    for signal in signals * 3:
        signal.notify()
    assert [bell.drain() for bell in rings.bells] == [1, 1, 1]
    assert rings.sender.counters == (18, 6, 3)
    scheduler.mark(keys[5])
    assert waiter.join() == (actor, keys[5])
    assert not rings.asleep()
    signals[5].notify()
    assert [bell.drain() for bell in rings.bells] == [0, 0, 0], "nobody sleeps"


def test_a_doorbell_wakes_the_sleeper(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    keys = [scheduler.key(actor, priority) for priority in range(PRIORITIES)]
    scheduler.add_events(rings.receiver, rings.bells, keys[0])
    signals = [rings.open(index, key, priority=index) for index, key in enumerate(keys)]
    for key, signal in zip(keys, signals, strict=True):
        waiter = Waiter(scheduler)
        until(rings.asleep)
        signal.notify()
        assert waiter.join() == (actor, key)
        scheduler.done(actor, key)
    assert rings.sender.counters == (3, 3, 3)


def test_urgent_events_come_first_and_order_holds_within_a_priority(rings: Rings) -> None:
    scheduler = Scheduler()
    keys = [scheduler.key(scheduler.actor(), source % PRIORITIES) for source in range(12)]
    scheduler.add_events(rings.receiver, rings.bells, keys[0])
    signals = [rings.open(source, key, priority=source % PRIORITIES) for source, key in enumerate(keys)]
    for signal in reversed(signals):
        signal.notify()
    turns = [scheduler.next(0) for _ in keys]
    expected = sorted(range(12), key=lambda source: (source % PRIORITIES, -source))
    assert [turn[1] for turn in turns if turn] == [keys[source] for source in expected]


def test_an_urgent_event_overtakes_what_is_ready_already(rings: Rings) -> None:
    scheduler = Scheduler()
    urgent, bulk = scheduler.key(scheduler.actor(), 0), [scheduler.key(scheduler.actor(), 7) for _ in range(3)]
    scheduler.add_events(rings.receiver, rings.bells, urgent)
    signal = rings.open(0, urgent)
    for key in bulk:
        scheduler.mark(key)
    assert (turn := scheduler.next()) is not None
    assert turn[1] == bulk[0]
    signal.notify()
    assert (turn := scheduler.next()) is not None
    assert turn[1] == urgent


def test_an_old_generation_and_a_closed_source_are_dropped(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    scheduler.add_events(rings.receiver, rings.bells, key)
    old = rings.open(2, key, generation=7)
    new = rings.open(2, key, generation=8)
    old.notify()
    assert old.counters == (0, 0, 0), "its generation is over"
    rings.slot(0, 1, 2, 7)
    assert scheduler.next(0) is None
    assert (rings.receiver.taken, rings.receiver.dropped) == (0, 1)
    assert word(rings.raw, TAKEN + 2 * 4) == 0
    rings.receiver.close(2)
    rings.slot(1, 2, 2, 8)
    assert scheduler.next(0) is None
    assert rings.receiver.dropped == 2
    rings.sender.close(2)
    new.notify()
    assert rings.sender.counters == (0, 0, 0)


def test_a_source_out_of_range_stops_that_receiver_alone(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key, fault, other_fault = scheduler.key(actor), scheduler.key(actor), scheduler.key(actor)
    other = Rings()
    scheduler.add_events(rings.receiver, rings.bells, fault)
    scheduler.add_events(other.receiver, other.bells, other_fault)
    rings.open(1, key)
    honest = other.open(1, key)
    rings.slot(0, 1, SOURCES, 1)
    rings.slot(1, 2, 1, 1)
    assert scheduler.next(0) == (actor, fault)
    scheduler.done(actor, fault)
    assert scheduler.next(0) is None
    violation = rings.receiver.fault
    assert isinstance(violation, Violation)
    assert violation.name == "event-source-out-of-range"
    assert rings.receiver.taken == 0
    honest.notify()
    assert scheduler.next(0) == (actor, key)
    assert other.receiver.fault is None
    # Its doorbells wake nobody any more, however often they ring.
    scheduler.done(actor, key)
    rings.bells[0].ring()
    waiter = Waiter(scheduler)
    until(other.asleep)
    assert not rings.asleep()
    honest.notify()
    assert waiter.join() == (actor, key)
    assert rings.bells[0].drain() == 1
    for fd in other.fds:
        os.close(fd)


def test_an_overrun_ring_is_named(rings: Rings) -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    fault = scheduler.key(actor)
    scheduler.add_events(rings.receiver, rings.bells, fault)
    rings.slot(0, SOURCES + 1, 0, 0)
    assert scheduler.next() == (actor, fault)
    assert rings.receiver.fault is not None
    assert rings.receiver.fault.name == "event-ring-overrun"


def test_lies_about_taken_and_sleep_cost_only_doorbells(rings: Rings) -> None:
    signal = rings.open(0, 1)
    for count in range(1000):
        struct.pack_into("<I", rings.raw, TAKEN, count)
        struct.pack_into("<I", rings.raw, SLEEP, 2 * count + 1)
        signal.notify()
    assert signal.counters == (1000, 1000, 1000)
    assert rings.bells[0].drain() == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"max_sources": 48},
        {"max_sources": 0},
        {"priorities": 0},
        {"priorities": 9},
        {"slots": 8},
        {"slots": SIZE - 16},
        {"taken": 2},
        {"taken": SIZE},
        {"sleep": 32},
        {"sleep": SIZE - 64},
    ],
    ids=str,
)
def test_a_geometry_that_does_not_fit_is_refused(change: dict[str, int]) -> None:
    area, _ = shared()
    geometry = {"slots": SLOTS, "taken": TAKEN, "sleep": SLEEP, "max_sources": SOURCES, "priorities": PRIORITIES}
    geometry |= change
    with pytest.raises(ValueError, match=r"slots|taken|sleep|max_sources|priorities"):
        EventReceiver(area, **geometry)
    bells = [Doorbell(eventfd()) for _ in range(geometry["priorities"])]
    with pytest.raises(ValueError, match=r"slots|taken|sleep|max_sources|priorities"):
        EventSender(area, stats=STATS, doorbells=bells, **geometry)  # type: ignore[arg-type]


def test_sources_and_priorities_out_of_range_are_refused(rings: Rings) -> None:
    with pytest.raises(ValueError, match="source 64"):
        rings.sender.open(SOURCES, 1, 0)
    with pytest.raises(ValueError, match="priority 3"):
        rings.sender.open(0, 1, PRIORITIES)
    with pytest.raises(ValueError, match="source 64"):
        rings.receiver.open(SOURCES, 1, 0)
    with pytest.raises(ValueError, match="source 64"):
        rings.receiver.close(SOURCES)


def test_a_read_only_area_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "area"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file:
        area = Mapping(file.fileno(), SIZE, writable=False)
    with pytest.raises(ValueError, match="writable"):
        LinkRing(area, 0, 4096)


# The scheduler


def test_turns_of_one_actor_never_overlap() -> None:
    scheduler = Scheduler()
    first, second = scheduler.actor(), scheduler.actor()
    a, b, c = scheduler.key(first, 0), scheduler.key(first, 1), scheduler.key(second, 2)
    for key in (c, b, a):
        scheduler.mark(key)
    assert scheduler.next(0) == (first, a)
    assert scheduler.next(0) == (second, c), "b waits for a's turn"
    assert scheduler.next(0) is None
    scheduler.done(first, a)
    assert scheduler.next(0) == (first, b)


def test_first_ready_first_out_and_again_goes_to_the_end() -> None:
    scheduler = Scheduler()
    actors = [scheduler.actor() for _ in range(3)]
    keys = [scheduler.key(actor) for actor in actors]
    for key in keys:
        scheduler.mark(key)
    assert scheduler.next(0) == (actors[0], keys[0])
    scheduler.done(actors[0], keys[0], again=True)
    assert [scheduler.next(0) for _ in range(4)] == [
        (actors[1], keys[1]),
        (actors[2], keys[2]),
        (actors[0], keys[0]),
        None,
    ]


def test_a_mark_during_the_own_turn_is_remembered_once() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    scheduler.mark(key)
    scheduler.mark(key)
    assert scheduler.next(0) == (actor, key)
    scheduler.mark(key)
    scheduler.mark(key)
    assert scheduler.next(0) is None
    scheduler.done(actor, key)
    assert scheduler.next(0) == (actor, key)
    scheduler.done(actor, key)
    assert scheduler.next(0) is None


def test_a_turn_ends_once_and_only_if_it_began() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    with pytest.raises(ValueError, match="no turn"):
        scheduler.done(actor, key)
    scheduler.mark(key)
    scheduler.next(0)
    scheduler.done(actor, key)
    with pytest.raises(ValueError, match="no turn"):
        scheduler.done(actor, key)


def test_dropped_keys_and_actors_are_not_handed_out() -> None:
    scheduler = Scheduler()
    actor, other = scheduler.actor(), scheduler.actor()
    keys = [scheduler.key(actor), scheduler.key(actor), scheduler.key(other)]
    for key in keys:
        scheduler.mark(key)
    scheduler.drop_key(keys[0])
    scheduler.drop_key(keys[0])
    scheduler.mark(keys[0])
    assert scheduler.next(0) == (actor, keys[1])
    scheduler.drop_actor(actor)
    scheduler.done(actor, keys[1], again=True)
    assert scheduler.next(0) == (other, keys[2])
    scheduler.drop_key(keys[2])
    scheduler.done(other, keys[2], again=True)
    assert scheduler.next(0) is None
    with pytest.raises(ValueError, match="no actor"):
        scheduler.key(actor)
    scheduler.drop_actor(actor)


def test_a_priority_out_of_range_and_a_timeout_that_is_no_number_are_refused() -> None:
    scheduler = Scheduler()
    with pytest.raises(ValueError, match="priority 8"):
        scheduler.key(scheduler.actor(), 8)
    with pytest.raises(ValueError, match="not a number"):
        scheduler.next(float("nan"))
    assert scheduler.next(-1) is None


def test_a_descriptor_marks_once_a_turn_and_is_looked_at_again_after_it() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    ours, theirs = socket.socketpair()
    second, far = socket.socketpair()
    with ours, theirs, second, far:
        scheduler.add_fd(ours.fileno(), key)
        scheduler.add_fd(second.fileno(), key)
        assert scheduler.next(0) is None
        theirs.send(b"x")
        assert scheduler.next() == (actor, key)
        assert scheduler.next(0) is None
        scheduler.done(actor, key)
        assert scheduler.next(0) == (actor, key), "still readable"
        ours.recv(1)
        far.send(b"y")
        scheduler.done(actor, key)
        assert scheduler.next() == (actor, key), "the other one"
        scheduler.remove_fd(second.fileno())
        scheduler.done(actor, key)
        assert scheduler.next(0) is None
        theirs.close()
        assert scheduler.next() == (actor, key), "hung up"
        number = ours.fileno()
        ours.close()
        scheduler.remove_fd(number)
        scheduler.done(actor, key)
        assert scheduler.next(0) is None
    scheduler.remove_fd(12345)
    with pytest.raises(OSError, match=r"."):
        scheduler.add_fd(number, key)
    with pytest.raises(ValueError, match="no key"):
        scheduler.add_fd(number, 999)


def test_a_closed_descriptor_that_was_not_removed_does_no_harm() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    ours, theirs = socket.socketpair()
    again, far = socket.socketpair()
    with again, far, theirs:
        scheduler.add_fd(ours.fileno(), key)
        theirs.send(b"x")
        assert scheduler.next() == (actor, key)
        number = ours.detach()
        os.close(number)
        scheduler.done(actor, key)
        assert scheduler.next(0) is None
        os.dup2(again.fileno(), number)
        scheduler.add_fd(number, key)
        far.send(b"z")
        assert scheduler.next() == (actor, key)
        scheduler.remove_fd(number)
        os.close(number)


def test_a_descriptor_wakes_a_waiting_thread() -> None:
    scheduler = Scheduler()
    actor = scheduler.actor()
    key = scheduler.key(actor)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        waiter = Waiter(scheduler)
        # Added while the thread waits.
        scheduler.add_fd(ours.fileno(), key)
        theirs.send(b"x")
        assert waiter.join() == (actor, key)


def test_a_mark_wakes_a_thread_whichever_way_it_waits(rings: Rings) -> None:
    scheduler = Scheduler()
    keys = [scheduler.key(scheduler.actor()) for _ in range(4)]
    scheduler.add_events(rings.receiver, rings.bells, keys[0])
    waiters = [Waiter(scheduler) for _ in keys]
    until(rings.asleep)
    for key in keys:
        scheduler.mark(key)
    turns = [waiter.join() for waiter in waiters]
    assert sorted(turn[1] for turn in turns if turn) == keys


def test_while_a_turn_runs_somebody_else_listens(rings: Rings) -> None:
    scheduler = Scheduler()
    keys = [scheduler.key(scheduler.actor()) for _ in range(3)]
    scheduler.add_events(rings.receiver, rings.bells, keys[0])
    signals = [rings.open(source, key) for source, key in enumerate(keys)]
    waiters = [Waiter(scheduler) for _ in keys]
    # No turn is ever over: each event must find one of the threads that are left.
    for count, signal in enumerate(signals):
        until(lambda count=count: rings.receiver.taken == count and rings.asleep())  # type: ignore[misc]
        signal.notify()
    turns = [waiter.join() for waiter in waiters]
    assert sorted(turn[1] for turn in turns if turn) == keys


def test_closing_wakes_all_and_for_good() -> None:
    scheduler = Scheduler()
    key = scheduler.key(scheduler.actor())
    waiters = [Waiter(scheduler) for _ in range(5)]
    assert not scheduler.closed
    scheduler.close()
    assert [waiter.join() for waiter in waiters] == [None] * 5
    assert scheduler.closed
    scheduler.mark(key)
    assert scheduler.next() is None


def test_a_receiver_belongs_to_one_scheduler_at_a_time(rings: Rings) -> None:
    first, second = Scheduler(), Scheduler()
    keys = [scheduler.key(scheduler.actor()) for scheduler in (first, second)]
    first.add_events(rings.receiver, rings.bells, keys[0])
    with pytest.raises(ValueError, match="scheduler already"):
        second.add_events(rings.receiver, rings.bells, keys[1])
    first.remove_events(rings.receiver)
    first.remove_events(rings.receiver)
    second.add_events(rings.receiver, rings.bells, keys[1])
    signal = rings.open(0, keys[1])
    signal.notify()
    assert first.next(0) is None
    assert second.next(0) is not None


def test_anything_may_go_first() -> None:
    def build() -> list[object]:
        rings = Rings()
        scheduler = Scheduler()
        key = scheduler.key(scheduler.actor())
        scheduler.add_events(rings.receiver, rings.bells, key)
        tunnelled, local = rings.open(0, key), Signal.local(scheduler, key)
        direct = Signal.direct(rings.bells[0], (rings.area, STATS))
        for fd in rings.fds:
            os.close(fd)
        return [rings.sender, rings.receiver, *rings.bells, rings.area, scheduler, tunnelled, local, direct]

    count = len(build())
    for first in range(count):
        things = build()
        for _ in range(count):
            del things[(first + len(things)) % len(things)]
            gc.collect()
            for thing in things:
                if isinstance(thing, Signal):
                    thing.notify()
                elif isinstance(thing, Scheduler):
                    thing.next(0)


def test_another_process_signals_through_the_area(rings: Rings) -> None:
    """A producer in a process of its own; every item that it counts in shared memory must be serviced."""
    scheduler = Scheduler()
    keys = {scheduler.key(scheduler.actor(), source % 2): source for source in range(4)}
    scheduler.add_events(rings.receiver, rings.bells, next(iter(keys)))
    fd = os.memfd_create("shared")
    os.ftruncate(fd, SIZE)
    area = Mapping(fd, SIZE)
    raw = mmap.mmap(fd, SIZE)
    receiver = EventReceiver(area, slots=SLOTS, taken=TAKEN, sleep=SLEEP, max_sources=SOURCES, priorities=PRIORITIES)
    scheduler.add_events(receiver, [Doorbell(bell) for bell in rings.fds], next(iter(keys)))
    for key, source in keys.items():
        receiver.open(source, 1, key)
    available, rounds = 32768, 5000
    peer = f"""
import mmap, struct, sys
from vbus._core import Doorbell, EventSender, Mapping
fd, *bells = map(int, sys.argv[1:])
sender = EventSender(
    Mapping(fd, {SIZE}), slots={SLOTS}, stats={STATS}, taken={TAKEN}, sleep={SLEEP},
    max_sources={SOURCES}, priorities={PRIORITIES}, doorbells=[Doorbell(bell) for bell in bells],
)
raw = mmap.mmap(fd, {SIZE})
signals = [sender.open(source, 1, source % 2) for source in range(4)]
for count in range(1, {rounds} + 1):
    for source, signal in enumerate(signals):
        struct.pack_into("<I", raw, {available} + source * 4, count)
        signal.notify()
"""
    arguments = [sys.executable, "-c", peer, str(fd), *map(str, rings.fds)]
    with subprocess.Popen(arguments, pass_fds=[fd, *rings.fds], stdin=subprocess.DEVNULL) as process:
        seen = [0] * 4
        while seen != [rounds] * 4:
            turn = scheduler.next()
            assert turn is not None
            source = keys[turn[1]]
            seen[source] = word(raw, available + source * 4)
            scheduler.done(*turn)
        assert process.wait() == 0
    signalled, sent, rung = (
        sum(struct.unpack_from("<Q", raw, STATS + source * 32 + which * 8)[0] for source in range(4))
        for which in range(3)
    )
    assert signalled == 4 * rounds
    assert receiver.taken <= sent <= signalled
    assert rung <= sent
    assert (receiver.dropped, receiver.fault) == (0, None)
    os.close(fd)


# Link rings


def message(length: int, fill: int = 0) -> bytes:
    return bytes([fill] * 6) + struct.pack("<H", length) + bytes([fill] * (length - 8))


def test_messages_come_out_whole_in_order_and_around_the_end() -> None:
    area, _ = shared()
    sender, receiver = LinkRing(area, 4096, 1024), LinkRing(area, 4096, 1024)
    assert receiver.receive() is None
    for count in range(200):
        sizes = [8, 9 + count, 48]
        for size in sizes:
            assert sender.send(message(size, count))
        for size in sizes:
            assert receiver.receive() == message(size, count)
        assert receiver.receive() is None
    assert LinkRing.HEADER == 128


def test_a_full_link_refuses_until_there_is_room() -> None:
    area, _ = shared()
    sender, receiver = LinkRing(area, 0, 256), LinkRing(area, 0, 256)
    assert sender.send(bytearray(message(128)))
    assert sender.send(memoryview(message(121)))
    assert not sender.send(message(8))
    assert receiver.receive() == message(128)
    assert sender.send(message(8))


@pytest.mark.parametrize("wrong", [b"", bytes(7), bytes(8), message(16) + b"x", message(136)], ids=len)
def test_a_message_that_is_none_is_refused(wrong: bytes) -> None:
    area, _ = shared()
    with pytest.raises(ValueError, match="message"):
        LinkRing(area, 0, 256).send(wrong)


@pytest.mark.parametrize(("offset", "size"), [(0, 100), (0, 8), (4, 256), (SIZE - 256, 256), (SIZE, 256)])
def test_a_link_that_does_not_fit_is_refused(offset: int, size: int) -> None:
    area, _ = shared()
    with pytest.raises(ValueError, match="link ring"):
        LinkRing(area, offset, size)


@pytest.mark.parametrize("index", [4, 264, 2**32 - 264])
def test_an_index_that_cannot_be_is_a_violation(index: int) -> None:
    area, raw = shared()
    struct.pack_into("<I", raw, 0, index)
    with pytest.raises(Violation, match="link-index"):
        LinkRing(area, 0, 256).receive()
    struct.pack_into("<I", raw, 64, index)
    with pytest.raises(Violation, match="link-index"):
        LinkRing(area, 0, 256).send(message(8))


@pytest.mark.parametrize("length", [0, 7, 17, 129, 65535])
def test_a_length_that_cannot_be_is_a_violation(length: int) -> None:
    area, raw = shared()
    struct.pack_into("<H", raw, 128 + 6, length)
    struct.pack_into("<I", raw, 0, 16)
    with pytest.raises(Violation, match="link-message-size"):
        LinkRing(area, 0, 256).receive()
