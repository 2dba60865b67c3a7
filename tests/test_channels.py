"""Event channels: the same over every connector, from both sides."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import sys
import threading
import time

import pytest

import vbus
from conftest import Attached, Leftovers, wait_until
from vbus.bus import Channel
from vbus.channel import MAX_EVENT, ChannelClosedError, ChannelFullError, Event
from vbus.errors import DriverError, NoSuchNameError, UsageError


def said(events: list[Event]) -> list[bytes]:
    return [event.data for event in events]


def test_what_one_side_says_the_other_hears(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("alarm", priority=0)
    there = remote.open_channel("alarm")
    assert there.priority == 0
    assert here.send(b"smoke") == 1
    event = there.receive(10)
    assert event is not None
    assert event.data == b"smoke"
    event.reply(b"where?")
    asked = here.receive(10)
    assert asked is not None
    assert asked.data == b"where?"
    asked.reply(b"")
    empty = there.receive(10)
    assert empty is not None
    assert empty.data == b""


def test_events_come_in_order_and_none_is_lost(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("feed")
    there = remote.open_channel("feed")
    count = 3000

    def speak() -> None:
        for n in range(count):
            there.wait_writable(20)
            there.send(n.to_bytes(4, "little") * (1 + n % 50))

    speaker = threading.Thread(target=speak)
    speaker.start()
    heard = [here.receive(20) for _ in range(count)]
    speaker.join()
    assert [int.from_bytes(event.data[:4], "little") for event in heard if event is not None] == list(range(count))
    assert here.receive(0) is None


@pytest.mark.parametrize("size", [1, 100, MAX_EVENT])
def test_every_size_of_event_goes_both_ways(attached: Attached, size: int) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("sizes"), remote.open_channel("sizes")
    data = bytes(n % 251 for n in range(size))
    assert here.send(data) == 1
    event = there.receive(10)
    assert event is not None
    assert event.data == data
    event.reply(data[::-1])
    back = here.receive(10)
    assert back is not None
    assert back.data == data[::-1]
    with pytest.raises(ValueError, match="4096 are the most"):
        there.send(bytes(MAX_EVENT + 1))
    with pytest.raises(ValueError, match="4096 are the most"):
        here.send(bytes(MAX_EVENT + 1))


def test_a_driver_makes_a_channel_that_is_its_alone(attached: Attached) -> None:
    bus, remote = attached()
    opened: list[Channel] = []
    bus.channels.on_open(opened.append)
    there = remote.open_channel("job.1", create=True, priority=6, memory="64 KiB")
    (here,) = opened
    assert (here.name, here.priority, here.memory_size) == ("job.1", 6, 65536)
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as other:
        with pytest.raises(DriverError, match="alone") as refused:
            other.open_channel("job.1")
        assert refused.value.errno == errno.EBUSY
        assert [info.name for info in other.channels()] == []
        with pytest.raises(DriverError) as refused:
            other.open_channel("job.1", create=True)
        assert refused.value.errno == errno.EEXIST
    there.send(b"last words")
    there.close()
    event = here.receive(10)
    assert event is not None
    assert event.data == b"last words"
    assert here.receive(10) is None
    assert wait_until(lambda: len(bus.channels) == 0)
    with pytest.raises(ChannelClosedError):
        here.send(b"anybody?")
    with pytest.raises(ChannelClosedError, match="closed here"):
        there.send(b"too late")


def test_channels_that_are_there_are_listed_and_waited_for(attached: Attached) -> None:
    bus, remote = attached()
    assert remote.channels() == []
    for name in ("b", "a", "c"):
        bus.open_channel(name, priority=2, memory=100 if name == "b" else 0)
    assert [(info.name, info.priority, info.memory) for info in remote.channels()] == [
        ("a", 2, 0),
        ("b", 2, 100),
        ("c", 2, 0),
    ]
    bus.channel("a").close()
    assert [info.name for info in remote.channels()] == ["b", "c"]
    with pytest.raises(DriverError) as refused:
        remote.open_channel("later")
    assert refused.value.errno == errno.ENOENT
    timer = threading.Timer(0.1, lambda: bus.open_channel("later"))
    timer.start()
    assert remote.open_channel("later", wait=20).name == "later"
    timer.join()


def test_a_region_is_seen_by_both(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("board", memory="64 KiB")
    there = remote.open_channel("board")
    assert len(there.memory) == len(here.memory) == 65536
    assert bytes(there.memory) == bytes(65536)
    there.memory[10:15] = b"hello"
    there.memory[65535] = 7
    there.send(b"look")
    assert here.receive(10) is not None
    assert bytes(here.memory[9:16]) == b"\0hello\0"
    assert here.memory[65535] == 7
    here.memory[0:4] = b"back"
    here.send(b"look")
    assert there.receive(10) is not None
    assert bytes(there.memory[0:15]) == b"back" + bytes(6) + b"hello"
    # Neighbours that the two sides write, a byte each: nobody's byte is lost.
    for n in range(200):
        here.memory[1000 + 2 * n] = 1
        there.memory[1001 + 2 * n] = 2
    here.send()
    there.send()
    assert here.receive(10) is not None
    assert there.receive(10) is not None
    assert bytes(here.memory[1000:1400]) == bytes(there.memory[1000:1400]) == b"\1\2" * 200


def test_a_region_is_zero_again_for_the_next(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("board", memory=5000)
    there = remote.open_channel("board")
    there.memory[:] = b"x" * 5000
    there.send()
    assert here.receive(10) is not None
    there.close()
    assert wait_until(lambda: not here.ends)
    again = remote.open_channel("board")
    assert bytes(again.memory) == bytes(5000)
    assert bytes(here.memory) == bytes(5000)


def test_one_without_a_region_has_none(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("plain"), remote.open_channel("plain")
    for end in (here, there):
        with pytest.raises(ValueError, match="no region"):
            _ = end.memory
    there.close()
    assert wait_until(lambda: not here.ends)
    with pytest.raises(UsageError, match="0 drivers"):
        _ = here.memory


def test_several_drivers_hear_one_channel_and_answer_apart(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("all", memory=64)
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as other:
        first, second = remote.open_channel("all"), other.open_channel("all")
        assert here.send(b"hi") == 2
        for n, channel in enumerate((first, second)):
            assert channel.receive(10) is not None
            channel.memory[0] = n + 1
            channel.send(b"%d" % n)
        events = [here.receive(10) for _ in range(2)]
        assert {event.data: event.end.memory[0] for event in events if event is not None} == {b"0": 1, b"1": 2}
        with pytest.raises(UsageError, match="2 drivers"):
            _ = here.memory
    assert wait_until(lambda: len(here.ends) == 1)
    assert here.send(b"still there?") == 1


def test_relayed_events_reach_the_other_drivers(attached: Attached) -> None:
    bus, remote = attached()
    bus.open_channel("chat", relay=True)
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as other:
        mine, theirs = remote.open_channel("chat"), other.open_channel("chat")
        mine.send(b"hello")
        event = theirs.receive(10)
        assert event is not None
        assert event.data == b"hello"
        assert mine.receive(0) is None


def test_who_does_not_listen_fills_only_its_window(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("deaf"), remote.open_channel("deaf")
    while there.is_writable:
        there.send(bytes(100))
    with pytest.raises(ChannelFullError):
        there.send(bytes(100))
    assert 50 <= there.sent <= 101
    assert not there.is_writable
    heard = [here.receive(10) for _ in range(there.sent)]
    assert None not in heard
    assert there.wait_writable(10)
    there.send(b"again")
    event = here.receive(10)
    assert event is not None
    assert event.data == b"again"
    told = [here.send(bytes(1000)) for _ in range(100)]
    assert told[0] == 1
    assert told[-1] == 0
    row = here.describe()
    assert row["missed"] == told.count(0)
    assert [there.receive(10) is not None for _ in range(sum(told))] == [True] * sum(told)


def test_callbacks_run_one_at_a_time_in_order(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("calls"), remote.open_channel("calls")
    there.send(b"early")
    heard: list[bytes] = []
    busy = threading.Lock()

    def callback(event: Event) -> None:
        assert busy.acquire(blocking=False)
        heard.append(event.data)
        busy.release()
        assert event.end.wait_writable(10)
        event.reply(event.data.upper())

    assert wait_until(lambda: len(here.inbox) == 1)
    here.on_event(callback)
    answers: list[bytes] = []
    there.on_event(lambda event: answers.append(event.data))
    for n in range(500):
        assert there.wait_writable(10)
        there.send(b"n%d" % n)
    assert wait_until(lambda: len(answers) == 501, 20)
    assert heard == [b"early", *(b"n%d" % n for n in range(500))]
    assert answers == [data.upper() for data in heard]


def test_a_callback_that_raises_is_logged_and_the_next_event_comes(
    attached: Attached, caplog: pytest.LogCaptureFixture
) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("raises"), remote.open_channel("raises")
    heard: list[bytes] = []

    def callback(event: Event) -> None:
        heard.append(event.data)
        if event.data == b"bad":
            raise RuntimeError("as it should")

    here.on_event(callback)
    there.send(b"bad")
    there.send(b"good")
    assert wait_until(lambda: heard == [b"bad", b"good"])
    assert "as it should" in caplog.text


def test_coroutines_hear_and_wait_for_room(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("async"), remote.open_channel("async")

    async def serve() -> int:
        count = 0
        async for event in here:
            count += 1
            if event.data == b"end":
                break
        return count

    async def speak() -> None:
        for _ in range(1000):
            await there.writable()
            there.send(b"x")
        await there.writable()
        there.send(b"end")

    async def both() -> int:
        count, _ = await asyncio.wait_for(asyncio.gather(serve(), speak()), 30)
        return count

    assert asyncio.run(both()) == 1001


def test_iteration_ends_when_the_channel_is_closed(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("ends"), remote.open_channel("ends")
    here.send(b"one")
    here.send(b"two")
    here.close()
    assert said(list(there)) == [b"one", b"two"]
    with pytest.raises(ChannelClosedError, match="the bus closed it"):
        there.send(b"x")

    async def wait() -> list[bytes]:
        return [event.data async for event in there]

    assert asyncio.run(wait()) == []
    with pytest.raises(NoSuchNameError):
        bus.channel("ends")


def test_a_bus_that_stops_closes_its_channels(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("stops"), remote.open_channel("stops")
    done = threading.Event()

    def hear() -> None:
        list(there)
        done.set()

    threading.Thread(target=hear).start()
    bus.stop()
    assert done.wait(10)
    assert here.closed
    with pytest.raises(ChannelClosedError):
        there.send(b"x")


def test_a_driver_that_goes_frees_what_it_had(attached: Attached) -> None:
    bus, _ = attached()
    here = bus.open_channel("stays", memory="64 KiB")
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as other:
        other.open_channel("stays")
        other.open_channel("goes", create=True)
        assert len(bus.channels) == 2
    assert wait_until(lambda: len(bus.channels) == 1 and not here.ends)
    assert bus.describe_channels()[0]["drivers"] == []


def test_a_name_twice_and_names_that_are_none(attached: Attached) -> None:
    bus, remote = attached()
    bus.open_channel("once")
    with pytest.raises(UsageError, match="already"):
        bus.open_channel("once")
    remote.open_channel("once")
    with pytest.raises(DriverError) as refused:
        remote.open_channel("once")
    assert refused.value.errno == errno.EALREADY
    for name in ("", "Upper", "a b", "x" * 64):
        with pytest.raises(UsageError):
            bus.open_channel(name)
    for name in ("Upper", "a b"):
        with pytest.raises(DriverError) as refused:
            remote.open_channel(name, create=True)
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(UsageError, match="priority 8"):
        bus.open_channel("p", priority=8)
    with pytest.raises(DriverError, match="priority 9"):
        remote.open_channel("p", create=True, priority=9)
    with pytest.raises(UsageError, match="memory"):
        bus.open_channel("m", memory="1 GiB")
    with pytest.raises(DriverError, match="memory"):
        remote.open_channel("m", create=True, memory=1 << 30)
    assert [channel.name for channel in bus.channels] == ["once"]


def test_regions_of_one_driver_have_an_end(attached: Attached) -> None:
    bus, remote = attached()
    held = [remote.open_channel(f"big{n}", create=True, memory="4 MiB") for n in range(4)]
    with pytest.raises(DriverError) as refused:
        remote.open_channel("big4", create=True, memory="4 MiB")
    assert refused.value.errno == errno.ENOMEM
    assert len(bus.channels) == 4
    held.pop().close()
    assert remote.open_channel("again", create=True, memory="4 MiB").memory[0] == 0


def test_thousands_of_channels_work_and_one_more_is_refused(attached: Attached, leftovers: type[Leftovers]) -> None:
    bus, remote = attached()
    opened = [remote.open_channel(f"c{n}", create=True, priority=n % 8) for n in range(4096)]
    for n in range(10):
        with pytest.raises(DriverError) as refused:
            remote.open_channel(f"more{n}", create=True)
        assert refused.value.errno == errno.EMFILE
    assert len(bus.channels) == 4096
    for channel in opened[::64]:
        channel.send(channel.name.encode())
        event = bus.channel(channel.name).receive(10)
        assert event is not None
        assert event.data == channel.name.encode()
    assert len(remote.channels()) == 4096
    # As many as there are, they are events: no descriptors, no threads.
    before = leftovers()
    for channel in opened:
        channel.close()
    assert wait_until(lambda: len(bus.channels) == 0, 20)
    # Nothing was held for them: what there is more than now is none of them.
    assert wait_until(lambda: leftovers().fds == before.fds and not before.exceeds(leftovers()))


def test_the_urgent_overtakes_the_bulk(attached: Attached) -> None:
    bus, remote = attached()
    bulk, urgent = bus.open_channel("bulk", priority=7), bus.open_channel("urgent", priority=0)
    far_bulk, far_urgent = remote.open_channel("bulk"), remote.open_channel("urgent")
    order: list[str] = []
    started, release = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        started.set()
        release.wait(10)
        order.append("bulk")
        time.sleep(0.002)

    bulk.on_event(slow)
    urgent.on_event(lambda _: order.append("urgent"))
    far_bulk.send(b"first")
    assert started.wait(10)
    for _ in range(100):
        far_bulk.send(b"more")
    far_urgent.send(b"now")
    release.set()
    assert wait_until(lambda: len(order) == 102)
    assert order.index("urgent") <= 3


def test_an_operator_sees_channels(attached: Attached) -> None:
    bus, remote = attached()
    here = bus.open_channel("seen", priority=1, memory="64 KiB")
    watched: list[tuple[str, bytes]] = []
    end_watching = here.tap(lambda direction, _who, data: watched.append((direction, data)))
    there = remote.open_channel("seen")
    there.send(b"up")
    assert here.receive(10) is not None
    here.send(b"down")
    (row,) = bus.describe_channels()
    assert (row["name"], row["priority"], row["memory"], row["owner"]) == ("seen", 1, 65536, None)
    assert (row["sent"], row["received"], row["missed"], row["waiting"]) == (1, 1, 0, 0)
    assert len(row["drivers"]) == 1
    assert watched == [("received", b"up"), ("sent", b"down")]
    end_watching()
    here.send(b"unwatched")
    assert len(watched) == 2
    peers = [peer for row in bus.describe_connectors() for peer in row["peers"]]
    assert peers[0]["channels"] == ["seen"]


def test_several_threads_may_take_from_one_channel(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("shared"), remote.open_channel("shared")
    (end,) = here.ends
    taken: list[bytes] = []

    def take() -> None:
        while (event := there.receive(20)) is not None:
            taken.append(event.data)

    threads = [threading.Thread(target=take) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for n in range(500):
            assert end.wait_writable(20)
            end.send(n.to_bytes(2, "little") * 2000)
        assert wait_until(lambda: len(taken) == 500, 20)
    finally:
        sys.setswitchinterval(interval)
    here.close()
    for thread in threads:
        thread.join(20)
    assert len(set(taken)) == 500


def test_a_callback_that_raises_over_a_backlog_gets_the_rest(
    attached: Attached, caplog: pytest.LogCaptureFixture
) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("backlog"), remote.open_channel("backlog")
    for n in range(5):
        here.send(b"%d" % n)
    assert wait_until(lambda: len(there.inbox) == 5)
    heard: list[bytes] = []

    def callback(event: Event) -> None:
        heard.append(event.data)
        if event.data == b"0":
            raise RuntimeError("once")

    there.on_event(callback)
    assert wait_until(lambda: heard == [b"0", b"1", b"2", b"3", b"4"])
    assert "once" in caplog.text


def test_what_is_no_bytes_is_refused_and_costs_nothing(attached: Attached) -> None:
    bus, remote = attached()
    here, there = bus.open_channel("kinds"), remote.open_channel("kinds")
    for _ in range(10):
        with pytest.raises(TypeError):
            there.send("text" * 1000)  # type: ignore[arg-type]
    words = array.array("I", range(1000))
    there.send(words)  # type: ignore[arg-type]
    event = here.receive(10)
    assert event is not None
    assert event.data == words.tobytes()
    with pytest.raises(ValueError, match="8000 bytes"):
        there.send(array.array("I", range(2000)))  # type: ignore[arg-type]


def test_one_that_hears_of_new_channels_may_fail(attached: Attached, caplog: pytest.LogCaptureFixture) -> None:
    bus, remote = attached()

    def fails(channel: Channel) -> None:
        raise RuntimeError("as it should")

    bus.channels.on_open(fails)
    channel = remote.open_channel("new", create=True)
    channel.send(b"still works")
    event = bus.channel("new").receive(10)
    assert event is not None
    assert "as it should" in caplog.text
    channel.close()
    assert wait_until(lambda: len(bus.channels) == 0)


def test_who_waited_in_vain_is_not_remembered(attached: Attached) -> None:
    bus, _ = attached()
    here = bus.open_channel("quiet")

    async def wait() -> None:
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(aiter(here)), 0.001)

    asyncio.run(wait())
    assert here.inbox._waiters._futures == []
