"""Drivers' sides that abuse channels: each is parted from with a name for it, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import gc
import struct
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vbus
from conftest import Leftovers, wait_until
from test_hostile_peers import RawPeer
from vbus import msg
from vbus.bus import Bus, Channel, Connector
from vbus.bus.channel import MAX_LEFT
from vbus.channel import EVENT_COST, MAX_EVENT, WINDOW, ChannelEnd, ChannelFullError, Event, Inbox, Mirror
from vbus.connectors import peer_channels
from vbus.errors import Violation
from vbus.shmem.channels import ChannelRings


class RawChannels(RawPeer):
    """A driver's side that can also say anything in the rings of channels."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.rings = ChannelRings(self.area, device_side=False)
        self.rings.speak(self.area.sender(self.bells[2:10], to_device=True))
        self.hello()

    def open(self, name: str = "c", number: int = 1) -> None:
        assert isinstance(self.ask(msg.ChannelOpen(0, 0, 0, number, name)), msg.ChannelOpenResponse)

    def say(self, body: msg.Body, priority: int = 4) -> bool:
        return self.rings.send(priority, msg.encode(msg.Frame(body)))


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    bus = make_bus()
    bus.open_channel("c", memory=4096)
    return bus


@pytest.fixture
def connector(bus: Bus, tmp_path: Path) -> Connector:
    return bus.connect(vbus.connectors.Process(tmp_path / "c.sock"), "c")


@pytest.fixture
def raw(connector: Connector) -> Iterator[RawChannels]:
    peer = RawChannels(Path(connector.address.removeprefix("process:")))
    peer.open()
    yield peer
    peer.close()


def flood(peer: RawChannels) -> None:
    """More than the window, to a bus that does not listen."""
    for _ in range(WINDOW // EVENT_COST + 2):
        assert wait_until(lambda: peer.say(msg.ChannelEvent(1, b"")))


def long_event(peer: RawChannels) -> None:
    assert peer.say(msg.ChannelEvent(1, bytes(MAX_EVENT + 1)))


def unearned_credit(peer: RawChannels) -> None:
    assert peer.say(msg.ChannelCredit(1, 1))


def control_in_a_ring(peer: RawChannels) -> None:
    assert peer.say(msg.GetDevices(0, 8))


def no_message(peer: RawChannels) -> None:
    assert peer.rings.send(0, b"\xff\xff\0\0\0\0" + struct.pack("<H", 16) + bytes(8))


def tail_beyond_the_ring(peer: RawChannels) -> None:
    start = peer.area.geometry.channels_to_device + 4 * 65664
    memoryview(peer.area.mapping)[start : start + 4] = struct.pack("<I", 1 << 24)
    lane = peer.rings._lanes[4]
    assert lane.signal is not None
    lane.signal.notify()


@pytest.mark.parametrize(
    ("misdeed", "name"),
    [
        (flood, "channel-window"),
        (long_event, "channel-event-size"),
        (unearned_credit, "channel-credit"),
        (control_in_a_ring, "not-on-channels"),
        (no_message, "malformed-message"),
        (tail_beyond_the_ring, "link-index"),
    ],
)
def test_each_misdeed_ends_its_link_by_name(
    bus: Bus, connector: Connector, raw: RawChannels, misdeed: Callable[[RawChannels], None], name: str
) -> None:
    with vbus.attach(connector.address) as remote:
        honest = remote.open_channel("c")
        misdeed(raw)
        assert wait_until(raw.is_parted)
        assert name in connector.describe()["departed"][-1]["reason"]
        assert wait_until(lambda: len(bus.channel("c").ends) == 1)
        channel = bus.channel("c")
        while (event := channel.receive(0)) is not None:
            assert event.end.closed
        honest.send(b"still here")
        event = channel.receive(10)
        assert event is not None
        event.reply(b"so am I")
        answer = honest.receive(10)
        assert answer is not None
        assert answer.data == b"so am I"


def test_what_names_no_channel_is_dropped(bus: Bus, connector: Connector, raw: RawChannels) -> None:
    for number in (0, 2, 2**32 - 1):
        assert raw.say(msg.ChannelEvent(number, b"lost"))
        assert raw.say(msg.ChannelCredit(number, 99))
        assert raw.say(msg.ChannelMemory(number, 2**32 - 1, b"x"))
        raw.send(msg.ChannelEvent(number, b"lost"), token=0)
    # Over shared memory, a region needs no messages; one that comes changes nothing.
    assert raw.say(msg.ChannelMemory(1, 2**32 - 1, b"x"))
    assert raw.say(msg.ChannelEvent(1, b"heard"))
    event = bus.channel("c").receive(10)
    assert event is not None
    assert event.data == b"heard"
    assert not raw.is_parted()


def test_events_need_room_in_messages(raw: RawChannels) -> None:
    for takes in (4107, 128):
        raw.hello(takes)
        answer = raw.ask(msg.ChannelOpen(0, 1, 0, 2, "other"))
        assert isinstance(answer, msg.Error)
        assert (answer.errno, answer.text) == (
            errno.EMSGSIZE,
            f"events come in messages of up to 4108 bytes; this link takes {takes}",
        )
    raw.hello(4108)
    assert isinstance(raw.ask(msg.ChannelOpen(0, 1, 0, 2, "other")), msg.ChannelOpenResponse)


def test_a_number_twice_is_refused(raw: RawChannels) -> None:
    answer = raw.ask(msg.ChannelOpen(0, 1, 0, 1, "other"))
    assert isinstance(answer, msg.Error)
    assert answer.errno == errno.EALREADY


def test_one_that_never_reads_costs_a_window_and_is_told_nothing_more(
    bus: Bus, connector: Connector, raw: RawChannels
) -> None:
    channel = bus.channel("c")
    with vbus.attach(connector.address) as remote:
        honest = remote.open_channel("c")
        told: list[int] = []

        def said() -> bool:
            """Whether anybody was told: what the honest one has taken is known when its word for it has come."""
            count = channel.send(bytes(500))
            if count:
                told.append(count)
            return count > 0

        for _ in range(2000):
            assert wait_until(said)
            event = honest.receive(10)
            assert event is not None
        deaf = next(row for row in channel.describe()["drivers"] if row["missed"])
        assert deaf["sent"] * (500 + EVENT_COST) <= WINDOW + 500 + EVENT_COST
        assert told.count(2) == deaf["sent"]
        assert told.count(1) == 2000 - deaf["sent"]
    assert not raw.is_parted()


def test_hundreds_of_drivers_that_open_and_die_leave_nothing(
    bus: Bus, connector: Connector, leftovers: type[Leftovers]
) -> None:
    path = Path(connector.address.removeprefix("process:"))
    RawChannels(path).close()
    assert wait_until(lambda: connector.describe()["peers"] == [])
    before = leftovers()
    for n in range(300):
        peer = RawChannels(path)
        peer.open()
        peer.send(msg.ChannelOpen(n % 8, 1, 65536, 2, f"mine{n}"))
        peer.say(msg.ChannelEvent(1, b"bye"))
        peer.close()
        del peer
    assert wait_until(lambda: connector.describe()["peers"] == [], 20)
    assert wait_until(lambda: not bus.channel("c").ends and len(bus.channels) == 1)
    while bus.channel("c").receive(0) is not None:
        pass
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"


class Nowhere:
    """A carrier that takes everything."""

    def carry(self, end: ChannelEnd, data: bytes) -> bool:
        return True

    def carry_credit(self, end: ChannelEnd) -> None:
        pass

    def leave(self, end: ChannelEnd) -> None:
        pass


def test_a_window_counts_across_the_wrap_of_32_bits() -> None:
    inbox = Inbox(lambda turn: None)
    end = ChannelEnd(Nowhere(), number=1, name="wraps", priority=0, window=WINDOW, deliver=inbox.deliver)
    start = 2**32 - 3 * WINDOW // 2
    end._sent = end._credited = end._received = end._consumed = end._told = start
    for n in range(1000):
        end.send(bytes(100))
        assert end._sent == start + (n + 1) * (100 + EVENT_COST)
        end.credited(end._sent % 2**32)
        end.arrived(bytes(100))
        assert isinstance(inbox.receive(0), Event)
        assert end.take_credit() == end._received % 2**32
    end.send(b"")
    with pytest.raises(Violation, match="channel-credit"):
        end.credited((end._sent + 1) % 2**32)
    with pytest.raises(Violation, match="channel-credit"):
        end.credited((end._credited - 1) % 2**32)


def test_a_copied_region_is_not_written_outside() -> None:
    mirror = Mirror(100)
    for offset, data in ((100, b"x"), (99, b"xy"), (2**32 - 1, b"x"), (0, bytes(101))):
        with pytest.raises(Violation, match="channel-memory"):
            mirror.write(offset, data)
    mirror.write(0, bytes(100))
    mirror.write(99, b"z")
    assert mirror.changes() == []
    assert mirror.view[99] == ord("z")


def test_what_nobody_took_keeps_nothing_of_its_link(bus: Bus, connector: Connector) -> None:
    """Without the collector of cycles: descriptors must not wait for it."""
    path = Path(connector.address.removeprefix("process:"))
    opened: list[Channel] = []
    bus.channels.on_open(opened.append)
    gc.collect()
    gc.disable()
    try:
        peer = RawChannels(path)
        assert isinstance(peer.ask(msg.ChannelOpen(4, 1, 65536, 2, "mine")), msg.ChannelOpenResponse)
        peer.open()
        for number in (1, 2):
            assert peer.say(msg.ChannelEvent(number, b"last words"))
        assert wait_until(lambda: all(len(channel.inbox) == 1 for channel in (bus.channel("c"), opened[0])))
        (here,) = connector.peers  # type: ignore[attr-defined]
        watched = weakref.ref(here)
        del here
        peer.close()
        assert wait_until(lambda: connector.describe()["peers"] == [])
        assert wait_until(lambda: watched() is None)
    finally:
        gc.enable()
    for channel in (bus.channel("c"), opened[0]):
        event = channel.receive(0)
        assert event is not None
        assert event.data == b"last words"


def test_what_those_who_left_said_has_an_end(bus: Bus, connector: Connector, leftovers: type[Leftovers]) -> None:
    channel = bus.open_channel("big", memory="4 MiB")
    far = bus.connect(vbus.connectors.Stream("tcp:127.0.0.1:0"), "far")
    with vbus.attach(far.address) as remote:
        for n in range(30):
            with remote.open_channel("big") as there:
                there.send(b"%d" % n)
        assert wait_until(lambda: not channel.ends)
    # The latest are kept, with regions of 4 MiB each.
    assert len(channel.inbox) <= MAX_LEFT // (4 << 20)
    event = channel.receive(0)
    assert event is not None
    assert int(event.data) > 20


def test_a_full_ring_is_waited_for(bus: Bus, connector: Connector) -> None:
    channels = [bus.open_channel(f"c{n}") for n in range(8)]
    peer = RawChannels(Path(connector.address.removeprefix("process:")))
    for n in range(8):
        peer.open(f"c{n}", n + 1)
    ends = [channel.ends[0] for channel in channels]
    for end in ends:
        # All share the ring of their priority, which is full before eight windows are.
        with contextlib.suppress(ChannelFullError):
            for _ in range(5):
                end.send(bytes(4000))
    full = next(end for end in ends if end._full)
    assert full._sent - full._credited < WINDOW
    assert not full.wait_writable(0.05)
    reading = iter(lambda: sum(1 for _ in peer.rings.receive(4)), 0)
    assert sum(reading) > 10
    assert full.wait_writable(10)
    full.send(b"room again")
    peer.close()


def test_a_bus_that_lies_about_the_window_is_not_believed(
    bus: Bus, connector: Connector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_channels, "WINDOW", 2**32 - 1)
    with vbus.attach(connector.address) as remote, pytest.raises(vbus.DriverError, match="channel-answer"):
        remote.open_channel("c")


def test_a_channel_that_closes_before_its_answer_is_closed(bus: Bus, connector: Connector) -> None:
    with vbus.attach(connector.address) as remote:
        link: Any = remote.connector
        look = link._link_turn
        once: list[int] = []

        def late() -> bool:
            if not once:
                once.append(1)
                bus.channel("c").close()
                # What is said on channels is looked at first, as the rings allow.
                assert wait_until(lambda: link._rings_turn(4) or bool(link.channels._early.get(1)))
            return bool(look())

        link.loop._callbacks[link._link_key] = late
        channel = remote.open_channel("c")
        assert channel.receive(10) is None
        assert channel.closed == "the bus closed it"
