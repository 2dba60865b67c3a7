"""What a bus's devices and channels are to whoever drives them: one list of behaviours, for all drivers there are.

A behaviour is a function of a `Stage`: a bus, and a `Side` that is attached to it. It is written against the small
interface below, which has two backends: our own drivers, over each connector (`test_driver_interface.py`), and a
guest's kernel (`test_guest_driver_interface.py`), whose disks, networks, terminals and files are what its programs see.

    @behaviour
    def a_disk_is_as_large_as_it_was_made(stage: Stage) -> None:
        stage.plug(Blk(memory="1 MiB"), "disk0")
        assert stage.side.disk("disk0").size == 1 << 20

Whatever is refused or fails is an `OSError`; its number is the side's own where kernels choose another.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import pytest

import vbus
from conftest import wait_until
from vbus.bus import Bus, Channel, Device, Queue, Request, Slot
from vbus.channel import EVENT_COST, MAX_EVENT, WINDOW
from vbus.connectors import Process
from vbus.devices import Blk, Console, Net, Rng
from vbus.errors import DriverError
from vbus.proxy import drivers

MIB = 1 << 20
LIMIT = 120
"""Seconds after which whoever waits has failed."""
ETHERTYPE = b"\x88\xb5"
"""For experiments: nobody else's frames have it."""


class Disk(Protocol):
    """A disk. Offsets and lengths are bytes."""

    @property
    def size(self) -> int:
        """Now."""

    @property
    def block_size(self) -> int:
        """What requests are aligned to."""

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes."""

    @property
    def serial(self) -> str:
        """What it calls itself."""

    def read(self, length: int, offset: int) -> bytes:
        """What the device has there."""

    def begin_read(self, length: int, offset: int) -> Callable[[], bytes]:
        """Read without waiting; what is returned waits for the bytes."""

    def write(self, data: bytes, offset: int) -> None:
        """Give the device these bytes."""

    def flush(self) -> None:
        """Make what was written durable."""

    def discard(self, length: int, offset: int) -> None:
        """Say that this is not needed."""


class Network(Protocol):
    """A network interface, which is up."""

    @property
    def mac(self) -> str:
        """Its address, in hexadecimal with colons."""

    @property
    def mtu(self) -> int:
        """Bytes of the longest packet."""

    @property
    def link(self) -> bool:
        """Whether there is one."""

    def exchange(self, frames: Sequence[bytes]) -> list[bytes]:
        """Send frames, and receive as many of their type."""


class Entropy(Protocol):
    """A source of random bytes."""

    def read(self, size: int) -> bytes:
        """So many of them."""


class Terminal(Protocol):
    """The port of a console, raw."""

    @property
    def window(self) -> tuple[int, int]:
        """Columns and rows."""

    def write(self, data: bytes) -> None:
        """Say something there."""

    def read(self, size: int) -> bytes:
        """So many bytes of what was typed."""


class Talk(Protocol):
    """A channel that is open."""

    def say(self, data: bytes) -> None:
        """Send an event."""

    def hear(self) -> bytes:
        """The next one; waits for it."""

    def fill(self, size: int) -> int:
        """Send events of so many bytes until there is no room; how many."""

    def put(self, offset: int, data: bytes) -> None:
        """Write into the region."""

    def get(self, offset: int, size: int) -> bytes:
        """Read from it."""


class Side(Protocol):
    """Whoever drives the devices of a bus. What is asked for is waited for; a driver binds when it is first needed."""

    def identity(self, name: str) -> tuple[int, UUID, int]:
        """Address, UUID and class of a device."""

    def is_there(self, name: str) -> bool:
        """Whether there is a device of this name, or something is kept of it."""

    def disk(self, name: str) -> Disk:
        """The disk of this name."""

    def network(self, name: str) -> Network:
        """The network interface."""

    def entropy(self, name: str) -> Entropy:
        """The source of random bytes."""

    def terminal(self, name: str) -> Terminal:
        """The console."""

    def talk(self, name: str) -> contextlib.AbstractContextManager[Talk]:
        """A channel, open while inside."""

    def channels(self) -> list[str]:
        """The names of the channels that may be opened."""

    def let_go(self, name: str) -> None:
        """Have no driver for a device: it is reset. The next that is asked of it binds one anew."""

    def priorities(self, name: str) -> list[int]:
        """Of the queues of a device that has a driver."""

    def counters(self, name: str) -> tuple[int, int, int]:
        """Signals towards a device that has a driver, events, doorbells; of all queues together."""


@dataclass
class Stage:
    """Where a behaviour is shown: a bus, and whoever drives its devices."""

    bus: Bus
    side: Side
    folder: Path
    plugged: list[str] = field(default_factory=list)

    def plug(self, device: Device, name: str, **options: Any) -> Slot:
        """Plug a device, until the behaviour was shown."""
        self.bus.plug(device, name, **options)
        self.plugged.append(name)
        return self.bus.slot(name)

    def unplug(self, name: str, *, surprise: bool = False) -> None:
        """Take a device off, and wait until the side has let go of it."""
        self.plugged.remove(name)
        self.bus.unplug(name, surprise=surprise)
        assert wait_until(lambda: not self.side.is_there(name), LIMIT)

    def image(self, data: bytes) -> Path:
        """A file with this content, for a disk."""
        path = self.folder / f"disk{len(list(self.folder.iterdir()))}.img"
        path.write_bytes(data)
        return path

    @contextlib.contextmanager
    def channel(self, name: str, **options: Any) -> Iterator[Channel]:
        """A channel of the bus, while inside."""
        channel = self.bus.open_channel(name, **options)
        try:
            yield channel
        finally:
            channel.close()

    def row(self, name: str) -> dict[str, Any]:
        """What an operator sees of a device."""
        return next(row for row in self.bus.describe() if row["name"] == name)

    def clear(self) -> None:
        """Take everything off again."""
        while self.plugged:
            self.unplug(self.plugged[-1], surprise=True)


Behaviour = Callable[[Stage], None]
BEHAVIOURS: list[Behaviour] = []
"""In the order of this file."""


def behaviour(function: Behaviour) -> Behaviour:
    """Add a function to the list."""
    BEHAVIOURS.append(function)
    return function


each_behaviour = pytest.mark.parametrize("shown", BEHAVIOURS, ids=lambda function: function.__name__)


class Moody(Blk):
    """A disk that fails, or does nothing for a while, when it is told to."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, engine="python", **options)
        self.fails = False
        self.stands = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Answer requests, or do what a good disk does not."""
        self.stands += 1
        assert self.may_go_on.wait(60)
        self.stands -= 1
        if self.fails:
            raise RuntimeError("the handler fails, as it shall")
        super().handle_batch(queue, requests)


# Devices as the bus has them.


@behaviour
def devices_are_found_as_the_bus_has_them(stage: Stage) -> None:
    for device, name in ((Rng(), "rng0"), (Blk(memory="1 MiB"), "disk0"), (Net(), "net0")):
        slot = stage.plug(device, name)
        assert stage.side.identity(name) == (slot.number, slot.uuid, int(device.device_id))


@behaviour
def devices_come_and_go_beside_one_that_stays(stage: Stage) -> None:
    stage.plug(Blk(memory="1 MiB"), "stays")
    stays = stage.side.disk("stays")
    for round_ in range(5):
        stage.plug(Blk(memory="2 MiB"), "guest")
        disk = stage.side.disk("guest")
        disk.write(b"guest %d" % round_, 4096)
        assert disk.read(7, 4096) == b"guest %d" % round_
        stays.write(bytes([round_]), round_)
        stage.unplug("guest", surprise=round_ % 2 == 1)
    assert stays.read(5, 0) == bytes(range(5))
    assert stage.row("stays")["violations"] == {}


@behaviour
def a_device_has_one_driver(stage: Stage) -> None:
    stage.plug(Blk(memory="1 MiB"), "disk0")
    disk = stage.side.disk("disk0")
    second = stage.bus.connect(Process(stage.folder / "second.sock"), "second")
    try:
        with vbus.attach(second.address) as other:
            with pytest.raises(DriverError, match="in use") as refused:
                other.driver("disk0", drivers.Blk)
            assert refused.value.errno == errno.EBUSY
            disk.write(b"mine", 0)
            assert disk.read(4, 0) == b"mine"
            stage.side.let_go("disk0")
            theirs = other.driver("disk0", drivers.Blk)
            assert theirs.pread(4, 0) == b"mine"
            theirs.close()
    finally:
        stage.bus.disconnect("second")


@behaviour
def a_driver_that_lets_go_resets_the_device(stage: Stage) -> None:
    slot = stage.plug(Blk(memory="1 MiB"), "disk0")
    for round_ in range(5):
        disk = stage.side.disk("disk0")
        assert slot.owner is not None
        disk.write(b"%d" % round_, round_)
        disk.flush()
        stage.side.let_go("disk0")
        assert wait_until(lambda: slot.owner is None and stage.row("disk0")["status"] == [], LIMIT)
    assert stage.side.disk("disk0").read(5, 0) == b"01234"


@behaviour
def a_device_that_fails_needs_a_reset_and_gets_one(stage: Stage) -> None:
    moody = Moody(memory="1 MiB")
    stage.plug(moody, "moody")
    stage.plug(Blk(memory="1 MiB"), "other")
    disk, other = stage.side.disk("moody"), stage.side.disk("other")
    moody.fails = True
    with pytest.raises(OSError):
        disk.read(4096, 0)
    # A driver may have reset it already.
    assert stage.row("moody")["violations"] == {"device-error": 1}
    other.write(b"undisturbed", 0)
    moody.fails = False
    stage.side.let_go("moody")
    assert stage.side.disk("moody").read(4096, 0) == bytes(4096)
    assert "DEVICE_NEEDS_RESET" not in stage.row("moody")["status"]
    assert other.read(11, 0) == b"undisturbed"


@behaviour
def a_device_that_hangs_hangs_nobody_else(stage: Stage) -> None:
    moody = Moody(memory="1 MiB")
    stage.plug(moody, "moody")
    stage.plug(Blk(memory="1 MiB"), "other")
    disk, other = stage.side.disk("moody"), stage.side.disk("other")
    moody.may_go_on.clear()
    try:
        waits = disk.begin_read(4096, 0)
        assert wait_until(lambda: moody.stands, LIMIT)
        other.write(b"goes on", 0)
        assert other.read(7, 0) == b"goes on"
    finally:
        moody.may_go_on.set()
    assert waits() == bytes(4096)


@behaviour
def a_device_that_is_pulled_out_ends_what_waits_for_it(stage: Stage) -> None:
    moody = Moody(memory="1 MiB")
    stage.plug(moody, "moody")
    disk = stage.side.disk("moody")
    moody.may_go_on.clear()
    try:
        waits = disk.begin_read(4096, 0)
        assert wait_until(lambda: moody.stands, LIMIT)
        stage.plugged.remove("moody")
        going = threading.Thread(target=lambda: stage.bus.unplug("moody", surprise=True, timeout=0.5))
        going.start()
        with pytest.raises(OSError):
            waits()
    finally:
        moody.may_go_on.set()
    going.join(LIMIT)
    assert wait_until(lambda: not stage.side.is_there("moody"), LIMIT)


@behaviour
def what_was_counted_is_what_was_done(stage: Stage) -> None:
    stage.plug(Blk(memory="1 MiB"), "disk0")
    disk = stage.side.disk("disk0")
    for round_ in range(20):
        disk.write(bytes([round_]), 8192 * round_)
        disk.read(1, 8192 * round_)
    signalled, sent, rung = stage.side.counters("disk0")
    assert signalled >= sent >= rung > 0
    rows = [row for row in stage.bus.stat() if row["device"] == "disk0"]
    counted = tuple(sum(row["to_device"][key] for row in rows) for key in ("signalled", "sent", "rung"))
    assert counted == (signalled, sent, rung)
    for direction in ("to_device", "to_driver"):
        assert all(row[direction]["signalled"] >= row[direction]["sent"] for row in rows)
    assert sum(row["requests"] for row in rows) >= 40


@behaviour
def a_priority_holds_when_a_driver_begins(stage: Stage) -> None:
    stage.plug(Blk(memory="1 MiB"), "disk0", priority=2)
    assert stage.side.disk("disk0").size == MIB
    assert set(stage.side.priorities("disk0")) == {2}
    stage.bus.set("disk0", "priority", "6")
    stage.side.let_go("disk0")
    disk = stage.side.disk("disk0")
    assert set(stage.side.priorities("disk0")) == {6}
    disk.write(b"less urgent", 0)
    assert disk.read(11, 0) == b"less urgent"


@behaviour
def what_is_masked_is_not_negotiated(stage: Stage) -> None:
    stage.plug(Blk(stage.image(bytes(MIB))), "disk0", mask=["DISCARD"])
    disk = stage.side.disk("disk0")
    with pytest.raises(OSError) as refused:
        disk.discard(MIB // 2, 0)
    assert refused.value.errno == errno.EOPNOTSUPP
    features = stage.row("disk0")["features"]
    assert "DISCARD" in features["available"]
    assert "DISCARD" not in features["negotiated"]
    assert {"VERSION_1", "FLUSH"} <= set(features["negotiated"])


# Disks.


@behaviour
def a_disk_gives_back_what_was_written(stage: Stage) -> None:
    oracle = bytearray(random.Random(1).randbytes(MIB))
    image = stage.image(bytes(oracle))
    stage.plug(Blk(image), "disk0")
    disk = stage.side.disk("disk0")
    rng = random.Random(2)
    for step in range(40):
        offset = rng.choice([rng.randrange(MIB - 3000), rng.randrange(MIB // 512 - 8) * 512, MIB - 2000])
        length = rng.choice([1, rng.randrange(1, 2000), 512, 2000])
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            disk.write(data, offset)
            oracle[offset : offset + length] = data
        else:
            assert disk.read(length, offset) == oracle[offset : offset + length], f"step {step}"
    disk.flush()
    assert image.read_bytes() == oracle
    assert disk.read(200_000, 300_000) == oracle[300_000:500_000]


@behaviour
def a_flush_reaches_the_disk(stage: Stage) -> None:
    device = Blk(stage.image(bytes(MIB)))
    stage.plug(device, "disk0")
    disk = stage.side.disk("disk0")
    disk.write(b"written", 0)
    before = device.flushes
    disk.flush()
    assert device.flushes > before


@behaviour
def a_read_only_disk_is_not_written(stage: Stage) -> None:
    data = random.Random(3).randbytes(MIB)
    image = stage.image(data)
    stage.plug(Blk(image, read_only=True), "disk0")
    disk = stage.side.disk("disk0")
    assert disk.read_only
    assert disk.read(1000, 100) == data[100:1100]
    with pytest.raises(OSError) as refused:
        disk.write(b"x", 0)
    assert refused.value.errno in (errno.EROFS, errno.EPERM, errno.EACCES)
    assert image.read_bytes() == data


@behaviour
def a_disk_is_as_large_as_it_becomes(stage: Stage) -> None:
    stage.plug(Blk(stage.image(b"x" * MIB)), "disk0")
    disk = stage.side.disk("disk0")
    assert disk.size == MIB
    with pytest.raises(OSError) as refused:
        disk.write(b"x", MIB)
    assert refused.value.errno == errno.ENOSPC
    stage.bus.set("disk0", "capacity", "4096")
    assert wait_until(lambda: disk.size == 2 * MIB, LIMIT)
    disk.write(b"at the new end", 2 * MIB - 14)
    assert disk.read(100, 2 * MIB - 14) == b"at the new end"
    stage.bus.set("disk0", "capacity", "1024")
    assert wait_until(lambda: disk.size == MIB // 2, LIMIT)
    assert disk.read(1000, MIB // 2 - 10) == b"x" * 10


@behaviour
def discarded_blocks_are_given_back(stage: Stage) -> None:
    data = random.Random(4).randbytes(MIB)
    image = stage.image(data)
    device = Blk(image)
    stage.plug(device, "disk0")
    disk = stage.side.disk("disk0")
    before = image.stat().st_blocks
    disk.discard(MIB // 2, MIB // 4)
    disk.flush()
    assert device.discards >= 1
    assert image.stat().st_blocks <= before - MIB // 1024 + 16
    assert disk.read(MIB // 8, 0) == data[: MIB // 8]
    assert disk.read(1000, 3 * MIB // 4) == data[3 * MIB // 4 :][:1000]


@behaviour
def a_disk_says_what_it_is_like(stage: Stage) -> None:
    stage.plug(Blk(memory="1 MiB", block_size=4096, serial="vbus-disk"), "disk0")
    stage.plug(Blk(memory="1 MiB"), "disk1")
    one, two = stage.side.disk("disk0"), stage.side.disk("disk1")
    assert (one.block_size, one.serial, one.read_only) == (4096, "vbus-disk", False)
    assert (two.block_size, two.serial, two.read_only) == (512, "disk1", False)


# Entropy, consoles, networks.


@behaviour
def entropy_comes_as_much_as_was_asked_for(stage: Stage) -> None:
    stage.plug(Rng(), "rng0")
    rng = stage.side.entropy("rng0")
    for size in (1, 31, 4096, 20_000):
        assert len(rng.read(size)) == size
    assert rng.read(32) != rng.read(32)
    assert len(set(rng.read(4096))) > 200


@contextlib.contextmanager
def connected(device: Console) -> Iterator[socket.socket]:
    """Somebody at a console's socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(device.path)
        assert wait_until(lambda: device.connected)
        yield client


def received(client: socket.socket, size: int) -> bytes:
    """So many bytes of what a console says."""
    data = b""
    while len(data) < size:
        part = client.recv(65536)
        assert part
        data += part
    return data


@behaviour
def a_console_speaks_both_ways(stage: Stage) -> None:
    device = Console(f"unix:{stage.folder / 'tty.sock'}")
    stage.plug(device, "console0")
    terminal = stage.side.terminal("console0")
    up, down = os.urandom(3000), os.urandom(10_000)
    with connected(device) as client:
        terminal.write(b"login: ")
        assert received(client, 7) == b"login: "
        client.sendall(b"root\n")
        assert terminal.read(5) == b"root\n"
        client.sendall(down)
        assert terminal.read(len(down)) == down
        terminal.write(up)
        assert received(client, len(up)) == up


@behaviour
def a_consoles_window_follows_its_attributes(stage: Stage) -> None:
    stage.plug(Console(f"unix:{stage.folder / 'tty.sock'}", columns=132, rows=50), "console0")
    terminal = stage.side.terminal("console0")
    # Linux looks at it when it changes, and not before.
    stage.bus.set("console0", "rows", "43")
    assert wait_until(lambda: terminal.window == (132, 43), LIMIT)
    stage.bus.set("console0", "columns", "80")
    assert wait_until(lambda: terminal.window == (80, 43), LIMIT)


@behaviour
def frames_come_back_whole_and_in_order(stage: Stage) -> None:
    mac = "52:54:00:01:02:03"
    device = Net(mac=mac)
    stage.plug(device, "net0")
    net = stage.side.network("net0")
    assert (net.mac, net.mtu, net.link) == (mac, 1500, True)
    address = bytes.fromhex(mac.replace(":", ""))
    sizes = (60, 61, 100, 333, 1000, 1514)
    frames = [address + address + ETHERTYPE + bytes([size % 256]) * (size - 14) for size in sizes]
    before = device.tx_packets, device.rx_packets
    assert net.exchange(frames) == frames
    assert device.tx_packets >= before[0] + len(frames)
    assert device.rx_packets >= before[1] + len(frames)
    assert device.tx_errors == 0


@behaviour
def a_link_goes_and_returns(stage: Stage) -> None:
    stage.plug(Net(mac="52:54:00:01:02:04"), "net0")
    net = stage.side.network("net0")
    for state in ("off", "on", "off", "on"):
        stage.bus.set("net0", "link", state)
        assert wait_until(lambda: net.link == (state == "on"), LIMIT)  # noqa: B023
    address = bytes.fromhex("525400010204")
    frame = address + address + ETHERTYPE + bytes(50)
    assert net.exchange([frame]) == [frame]


# Channels.


def heard(channel: Channel) -> bytes:
    """The next event on the bus's side."""
    event = channel.receive(LIMIT)
    assert event is not None
    return event.data


@behaviour
def a_channel_speaks_both_ways(stage: Stage) -> None:
    with stage.channel("alarm", priority=0) as channel:
        assert wait_until(lambda: stage.side.channels() == ["alarm"], LIMIT)
        with stage.side.talk("alarm") as talk:
            for data in (b"s", b"smoke", b"x" * MAX_EVENT, b""):
                talk.say(data)
                event = channel.receive(LIMIT)
                assert event is not None
                assert event.data == data
                event.reply(data[::-1])
                assert talk.hear() == data[::-1]
            with pytest.raises((OSError, ValueError)):
                talk.say(bytes(MAX_EVENT + 1))
        assert wait_until(lambda: not channel.ends, LIMIT)
    assert wait_until(lambda: stage.side.channels() == [], LIMIT)


@behaviour
def a_channel_takes_no_more_than_its_window(stage: Stage) -> None:
    with stage.channel("full") as channel, stage.side.talk("full") as talk:
        most = WINDOW // (1000 + EVENT_COST) + 1
        assert talk.fill(1000) == most
        assert [heard(channel) for _ in range(most)] == [bytes(1000)] * most
        (end,) = channel.ends
        assert wait_until(lambda: talk.fill(1000) > 0, LIMIT)
        told = [channel.send(b"%1000d" % n) for n in range(40)]
        assert sum(told) == most
        assert end.missed == 40 - most
        assert [int(talk.hear()) for _ in range(most)] == list(range(most))


@behaviour
def a_region_is_seen_by_both(stage: Stage) -> None:
    with stage.channel("board", memory="64 KiB") as channel, stage.side.talk("board") as talk:
        assert talk.get(0, 16) == bytes(16)
        talk.put(10, b"hello")
        talk.put(65535, b"!")
        talk.say(b"look")
        event = channel.receive(LIMIT)
        assert event is not None
        memory = event.end.memory
        assert bytes(memory[9:16]) == b"\0hello\0"
        assert memory[65535] == ord("!")
        memory[9] = ord("<")
        event.reply(b"look")
        assert talk.hear() == b"look"
        assert talk.get(9, 7) == b"<hello\0"


@behaviour
def a_channel_that_is_closed_ends_behind_its_last_event(stage: Stage) -> None:
    with stage.channel("ends") as channel, stage.side.talk("ends") as talk:
        assert wait_until(lambda: channel.ends, LIMIT)
        channel.send(b"one")
        channel.send(b"two")
        channel.close()
        assert (talk.hear(), talk.hear()) == (b"one", b"two")
        with pytest.raises(OSError):
            talk.hear()
        with pytest.raises(OSError):
            talk.say(b"too late")
