"""Priorities: what is urgent is handled, signalled and answered first, on both sides of every connector."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import vbus
from conftest import Attached, wait_until
from models import ECHO_ID, Echo, EchoDriver
from vbus import msg
from vbus.bus import Bus
from vbus.bus.pool import THREADS
from vbus.errors import UsageError
from vbus.msg.wire import MAX_WRITE, WireWriter

MakeBus = Callable[..., Bus]


class Gated(vbus.Device):
    """Two queues; handlers wait at a gate, and note who went through."""

    device_id = ECHO_ID
    queues = ("bulk", "urgent")

    def __init__(self, order: list[str], gate: threading.Event, entered: threading.Semaphore) -> None:
        self.order, self.gate, self.entered = order, gate, entered

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.entered.release()
        assert self.gate.wait(20)
        # Long enough for the other threads to get the interpreter.
        time.sleep(0.002)
        self.order.append(f"{self.name} {queue.name}")
        request.write(request.read())


class TwoQueues(EchoDriver):
    queue_count = 2


@pytest.fixture
def gated() -> tuple[list[str], threading.Event, threading.Semaphore]:
    return [], threading.Event(), threading.Semaphore(0)


def test_an_urgent_queue_waits_for_one_handler_of_its_device(
    attached: Attached, gated: tuple[list[str], threading.Event, threading.Semaphore]
) -> None:
    order, gate, entered = gated
    bus, remote = attached()
    bus.plug(Gated(*gated), "dev", priority=7, queue_priorities={"urgent": 0})
    remote.wait_for("dev")
    driver = remote.driver("dev", TwoQueues)
    bulk = [driver.queue(0).submit([b"bulk"], 10) for _ in range(60)]
    assert entered.acquire(timeout=10)
    urgent = driver.queue(1).submit([b"now"], 10)
    # It has to arrive before the gate opens; that it has is nowhere to be seen but in the scheduler.
    slot = bus.slot("dev")
    assert wait_until(lambda: slot.is_something_more_urgent(slot.queues[0]))
    gate.set()
    assert urgent.result(20) == b"now"
    for future in bulk:
        assert future.result(20) == b"bulk"
    assert order.index("dev urgent") == 1
    assert len(order) == 61


def test_an_urgent_device_waits_for_one_handler_a_thread(
    attached: Attached, connector_kind: str, gated: tuple[list[str], threading.Event, threading.Semaphore]
) -> None:
    order, gate, entered = gated
    bus, remote = attached()
    names = [f"bulk{n}" for n in range(THREADS)]
    for name in names:
        bus.plug(Gated(*gated), name, priority=7)
        remote.wait_for(name)
    bus.plug(Gated(*gated), "fast", priority=0)
    remote.wait_for("fast")
    fast = remote.driver("fast", EchoDriver)
    drivers = [remote.driver(name, EchoDriver) for name in names]
    bulk = [driver.queue(0).submit([b"bulk"], 10) for driver in drivers for _ in range(30)]
    for _ in names:
        assert entered.acquire(timeout=10)
    now = fast.queue(0).submit([b"now"], 10)
    slot = bus.slot("bulk0")
    if connector_kind.startswith("stream"):
        # Nobody is free to read the stream: the pool grows by a thread, which then takes the urgent one.
        assert entered.acquire(timeout=10)
    else:
        assert wait_until(lambda: slot.is_something_more_urgent(slot.queues[0]))
    gate.set()
    assert now.result(20) == b"now"
    for future in bulk:
        assert future.result(20) == b"bulk"
    if connector_kind.startswith("process"):
        # One handler of each thread, and some for threads that wait for a processor; of the others there are 120.
        assert order.index("fast bulk") <= 8 * THREADS


def test_handlers_on_an_event_loop_begin_in_the_order_of_urgency(make_bus: MakeBus) -> None:
    bus = make_bus()
    loop = bus.loop.get()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(10)

    loop.call_soon_threadsafe(hold)
    assert held.wait(10)
    order: list[int] = []
    starts = bus.loop.starts()
    for priority in (7, 3, 7, 0, 3, 5):
        starts.call_soon(priority, lambda p=priority: order.append(p))  # type: ignore[misc]
    release.set()
    assert wait_until(lambda: len(order) == 6)
    assert order == [0, 3, 3, 5, 7, 7]


# Over a stream the requests themselves wait in the thread that is held.
@pytest.mark.parametrize("connector_kind", ["process-tunnelled", "process-direct"], indirect=True)
def test_answers_to_the_urgent_come_first(attached: Attached) -> None:
    bus, remote = attached()
    for name, priority in (("bulk", 7), ("fast", 0)):
        bus.plug(Echo(), name, priority=priority)
        remote.wait_for(name)
    bulk, fast = remote.driver("bulk", EchoDriver), remote.driver("fast", EchoDriver)
    order: list[str] = []
    held, release = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        held.set()
        release.wait(10)

    # The thread that tells futures is held; meanwhile both devices finish.
    bulk.queue(0).submit([b"x"], 1).add_done_callback(hold)
    assert held.wait(10)
    for _ in range(100):
        bulk.queue(0).submit([b"x"], 1).add_done_callback(lambda _: order.append("bulk"))
    fast.queue(0).submit([b"x"], 1).add_done_callback(lambda _: order.append("fast"))
    assert wait_until(lambda: [row["requests"] for row in bus.stat()] == [101, 1])
    release.set()
    assert wait_until(lambda: len(order) == 101)
    # What the held turn had taken already is told first.
    assert order.index("fast") <= 40


def test_a_stream_writes_the_urgent_first() -> None:
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    writer = WireWriter(here, "test", lambda why: None)
    size = 1000
    try:
        bulk = [msg.encode(msg.Frame(msg.ChannelEvent(n, bytes(size)))) for n in range(2000)]
        for message in bulk:
            assert writer.send(message, 7)
        for n in range(3):
            assert writer.send(msg.encode(msg.Frame(msg.ChannelEvent(10_000 + n, b"now"))), 0)
        splitter = msg.Splitter()
        order: list[int] = []
        there.settimeout(10)
        while len(order) < 2003:
            for piece in splitter.feed(there.recv(1 << 16)):
                frame = msg.decode(piece) if isinstance(piece, bytes) else piece
                assert isinstance(frame, msg.Frame)
                assert isinstance(frame.body, msg.ChannelEvent)
                order.append(frame.body.channel)
    finally:
        writer.close()
        here.close()
        there.close()
    urgent = [order.index(10_000 + n) for n in range(3)]
    assert urgent == [urgent[0], urgent[0] + 1, urgent[0] + 2]
    assert urgent[0] <= 2 * MAX_WRITE // size + 2
    assert [n for n in order if n < 10_000] == list(range(2000))


def test_a_writer_says_when_there_is_room_again() -> None:
    here, there = socket.socketpair()
    room = threading.Event()
    writer = WireWriter(here, "test", lambda why: None, room.set)
    try:
        message = msg.encode(msg.Frame(msg.ChannelEvent(1, bytes(60_000))))
        while writer.has_room:
            assert writer.send(message)
        assert not room.is_set()
        there.settimeout(10)
        while not room.is_set():
            there.recv(1 << 20)
        assert writer.has_room
    finally:
        writer.close()
        here.close()
        there.close()


def test_a_priority_changes_when_the_driver_begins_anew(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    assert bus.set("echo", "priority", "2") == 2
    assert wait_until(lambda: bus.describe()[0]["queues"][0]["priority"] == 2)
    driver = remote.driver("echo", EchoDriver)
    assert driver.device.queue_priority(0) == 2
    assert driver.echo(b"as urgent as two") == b"as urgent as two"
    assert bus.set("echo", "priority.requests", "6") == 6
    assert bus.describe()[0]["queues"][0]["priority"] == 2
    assert driver.echo(b"still two") == b"still two"
    driver.close()
    again = remote.driver("echo", EchoDriver)
    assert again.device.queue_priority(0) == 6
    assert again.echo(b"six") == b"six"
    for name, text, why in (
        ("priority", "8", r"0 \(the most urgent\) to 7"),
        ("priority", "high", "whole number"),
        ("priority.nonsense", "1", "nonsense"),
    ):
        with pytest.raises(UsageError, match=why):
            bus.set("echo", name, text)


def test_priorities_that_are_none_are_refused(make_bus: MakeBus) -> None:
    bus = make_bus()
    with pytest.raises(UsageError, match=r"0 \(the most urgent\) to 7"):
        bus.plug(Echo(), priority=8)
    with pytest.raises(UsageError, match="priority of queue requests"):
        bus.plug(Echo(), queue_priorities={"requests": -1})
    with pytest.raises(UsageError, match="no queue 'request'"):
        bus.plug(Echo(), queue_priorities={"request": 1})
    assert bus.slots() == []


@pytest.mark.parametrize("connector_kind", ["stream-unix", "stream-tcp"], indirect=True)
def test_an_answer_to_a_reset_overtakes_no_completion_whatever_the_priority_was(attached: Attached) -> None:
    class Fills(vbus.Device):
        device_id = ECHO_ID
        queues = ("requests",)
        life = 1

        def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            request.read()
            request.write(bytes([self.life]) * request.writable)

    device = Fills()
    bus, remote = attached()
    bus.plug(device, "fills", priority=7)
    remote.wait_for("fills")
    driver = remote.driver("fills", EchoDriver)
    link: Any = remote.connector
    look = link.loop._callbacks[link._key]

    def slowly() -> bool:
        time.sleep(0.01)
        return bool(look())

    # A driver's side that reads slowly, so that completions of its first life wait on the bus's.
    link.loop._callbacks[link._key] = slowly
    for _ in range(30):
        driver.queue(0).submit([b"?"], 1 << 20)
    (connector,) = bus.connectors.values()
    (peer,) = connector.peers  # type: ignore[attr-defined]
    assert wait_until(lambda: peer._writer.queued > 10 << 20)
    bus.set("fills", "priority", "0")
    driver.close()
    device.life = 2
    again = remote.driver("fills", EchoDriver)
    for future in [again.queue(0).submit([b"?"], 1 << 20) for _ in range(5)]:
        assert set(future.result(20)) == {2}
    assert remote.lost is None


def test_what_waits_to_begin_begins_no_more_after_a_reset(make_bus: MakeBus) -> None:
    class Notes(vbus.Device):
        device_id = ECHO_ID
        queues = ("requests",)

        def __init__(self) -> None:
            self.seen: list[str] = []

        async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            self.seen.append("handle")

        def reset(self) -> None:
            self.seen.append("reset")

    bus = make_bus()
    device = bus.plug(Notes(), "notes", priority=7)
    connector = bus.connect(vbus.connectors.Process())
    with vbus.attach(connector.address) as remote:
        driver = remote.driver("notes", EchoDriver)
        loop, starts = bus.loop.get(), bus.loop.starts()
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            release.wait(10)

        loop.call_soon_threadsafe(hold)
        assert held.wait(10)
        driver.queue(0).submit([b"x"], 1)
        assert wait_until(lambda: starts._waiting.qsize() == 1)
        # The reset is asked for while the handler still waits to begin, and something urgent is always before it.
        closing = threading.Thread(target=driver.close)
        closing.start()
        for _ in range(50):
            starts.call_soon(0, lambda: None)
        release.set()
        closing.join(20)
        assert not closing.is_alive()
        assert wait_until(lambda: starts._waiting.qsize() == 0)
    assert device.seen in (["reset"], ["handle", "reset"])
