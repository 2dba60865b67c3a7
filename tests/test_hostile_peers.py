"""Peers that send garbage, lie, flood, or die: the bus goes on, says why each went, and keeps nothing of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vbus
from conftest import wait_until
from models import Echo, EchoDriver, Lamp, LampDriver
from vbus import _core, msg
from vbus.bus import Bus, Connector
from vbus.shmem import handshake
from vbus.shmem.area import Area, sealed_memfd
from vbus.shmem.link import Link
from vbus.virtio import Status

PAGE = 4096
READ_WRITE = 3


class RawPeer:
    """A driver's side with no manners: the socket, the area and the link, by hand."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        packet, fds = handshake.receive_packet(self.sock, 19)
        self.greeting = handshake.Greeting.unpack(packet)
        self.bells = [_core.Doorbell(fd) for fd in fds[1:]]
        self.area = Area.open(fds[0])
        handshake.close_all(fds[1:])
        self.link = Link(self.area, device_side=False, bell_in=self.bells[1], bell_out=self.bells[0])

    def send(self, body: Any, dev_num: int = 0, token: int = 1) -> None:
        self.link.send(msg.encode(msg.Frame(body=body, dev_num=dev_num, token=token)))

    def ask(self, body: Any, dev_num: int = 0) -> Any:
        self.send(body, dev_num)
        answers: list[Any] = []

        def look() -> bool:
            for data in self.link.receive():
                frame = msg.decode(data)
                assert isinstance(frame, msg.Frame)
                if frame.token == 1:
                    answers.append(frame.body)
            return bool(answers)

        assert wait_until(look, 10), f"no answer to {body}"
        return answers[0]

    def hello(self, takes: int = 8192) -> None:
        self.ask(msg.Hello(1, takes, 0))

    def send_fd(self, fd: int, cookie: int = 1) -> None:
        handshake.send_packet(self.sock, handshake.pack_cookie(cookie), [fd])

    def share(self, size: int = 16 * PAGE, address: int = 0x10000, cookie: int = 1) -> _core.Mapping:
        """Give the bus memory, honestly."""
        fd = sealed_memfd("test", size)
        self.send_fd(fd, cookie)
        mapping = _core.Mapping(fd, size)
        os.close(fd)
        assert self.ask(msg.MemoryAdd(address, size, 0, READ_WRITE, cookie)).errno == 0
        return mapping

    def is_parted(self) -> bool:
        """Whether the bus has closed the socket."""
        self.sock.setblocking(False)
        try:
            return self.sock.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()
        self.area.close()


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    bus = make_bus()
    bus.plug(Echo(), "echo")
    bus.plug(Lamp(), "lamp")
    return bus


@pytest.fixture
def connector(bus: Bus, tmp_path: Path) -> Connector:
    return bus.connect(vbus.connectors.Process(tmp_path / "c.sock"), "c")


@pytest.fixture
def path(connector: Connector) -> Path:
    return Path(connector.address.removeprefix("process:"))


@pytest.fixture
def raw(path: Path) -> Iterator[RawPeer]:
    peer = RawPeer(path)
    yield peer
    peer.close()


def why(connector: Connector) -> str:
    """Why the last peer went."""
    departed = connector.describe()["departed"]
    return str(departed[-1]["reason"]) if departed else ""


def assert_serves(path: Path) -> None:
    """An honest driver is served."""
    with vbus.attach(f"process:{path}") as remote:
        driver = remote.driver("echo", EchoDriver)
        assert driver.echo(b"still here") == b"still here"


def garbage_message(peer: RawPeer) -> None:
    peer.hello()
    body = random.Random(3).randbytes(56)
    peer.link._out.send(b"\xff\xff\x00\x00\x00\x00" + struct.pack("<H", 64) + body)
    peer.bells[0].ring()


def half_message(peer: RawPeer) -> None:
    peer.hello()
    message = bytearray(msg.encode(msg.Frame(body=msg.GetConfig(0, 8), dev_num=1, token=1)))
    message = message[:-4]
    message[6:8] = struct.pack("<H", len(message))
    peer.link._out.send(bytes(message))
    peer.bells[0].ring()


def _poke(peer: RawPeer, offset: int, value: int) -> None:
    with memoryview(peer.area.mapping) as view:
        view[offset : offset + 4] = struct.pack("<I", value)
    peer.bells[0].ring()


def link_tail_jumps(peer: RawPeer) -> None:
    peer.hello()
    _poke(peer, peer.area.geometry.link_to_device, 0x7FFF_FFF8)


def link_length_lies(peer: RawPeer) -> None:
    g = peer.area.geometry
    with memoryview(peer.area.mapping) as view:
        view[g.link_to_device + 128 : g.link_to_device + 136] = b"\x02\x80\x00\x00\x01\x00\xff\xff"
    _poke(peer, g.link_to_device, 8)


def event_source_out_of_range(peer: RawPeer) -> None:
    peer.hello()
    g = peer.area.geometry
    with memoryview(peer.area.mapping) as view:
        slot = g.events_to_device.slots + 4 * g.max_sources * 16
        view[slot + 4 : slot + 16] = struct.pack("<III", 0xFFFF_FFFF, 1, 0)
        view[slot : slot + 4] = struct.pack("<I", 1)
    peer.bells[2 + 4].ring()


def too_many_descriptors(peer: RawPeer) -> None:
    fds = [os.eventfd(0) for _ in range(20)]
    handshake.send_packet(peer.sock, handshake.pack_cookie(1), fds)
    handshake.close_all(fds)


def descriptors_without_end(peer: RawPeer) -> None:
    fd = os.eventfd(0)
    with contextlib.suppress(OSError):
        for cookie in range(100):
            peer.send_fd(fd, cookie)
    os.close(fd)


def junk_on_the_socket(peer: RawPeer) -> None:
    peer.sock.send(b"hello?")


def region_that_may_shrink(peer: RawPeer) -> None:
    peer.hello()
    fd = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE)
    peer.send_fd(fd)
    os.close(fd)
    peer.send(msg.MemoryAdd(0x10000, 16 * PAGE, 0, READ_WRITE, 1))


def region_that_is_no_memfd(peer: RawPeer) -> None:
    peer.hello()
    with Path(__file__).open() as file:
        peer.send_fd(file.fileno())
    peer.send(msg.MemoryAdd(0x10000, PAGE, 0, READ_WRITE, 1))


def region_beyond_its_file(peer: RawPeer) -> None:
    peer.hello()
    fd = sealed_memfd("short", PAGE)
    peer.send_fd(fd)
    os.close(fd)
    peer.send(msg.MemoryAdd(0x10000, 16 * PAGE, 0, READ_WRITE, 1))


def region_that_wraps(peer: RawPeer) -> None:
    peer.hello()
    fd = sealed_memfd("wraps", 16 * PAGE)
    peer.send_fd(fd)
    os.close(fd)
    peer.send(msg.MemoryAdd(2**64 - PAGE, 16 * PAGE, 0, READ_WRITE, 1))


def region_of_a_size_that_wraps(peer: RawPeer) -> None:
    peer.hello()
    fd = sealed_memfd("wraps", 16 * PAGE)
    peer.send_fd(fd)
    os.close(fd)
    peer.send(msg.MemoryAdd(0x10000, 2**64 - PAGE, PAGE, READ_WRITE, 1))


def regions_that_overlap(peer: RawPeer) -> None:
    peer.hello()
    peer.share()
    fd = sealed_memfd("overlaps", 16 * PAGE)
    peer.send_fd(fd, 2)
    os.close(fd)
    peer.send(msg.MemoryAdd(0x10000 + PAGE, PAGE, 0, READ_WRITE, 2))


def write_asked_of_a_sealed_file(peer: RawPeer) -> None:
    peer.hello()
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE)
    peer.send_fd(fd)
    os.close(fd)
    peer.send(msg.MemoryAdd(0x10000, PAGE, 0, READ_WRITE, 1))


def a_cookie_that_never_came(peer: RawPeer) -> None:
    peer.hello()
    peer.send(msg.MemoryAdd(0x10000, PAGE, 0, READ_WRITE, 77))


def regions_without_end(peer: RawPeer) -> None:
    peer.hello()
    fd = sealed_memfd("many", PAGE)
    with contextlib.suppress(OSError):
        for n in range(200):
            peer.send_fd(fd, n)
            peer.send(msg.MemoryAdd(0x10000 * (n + 1), PAGE, 0, READ_WRITE, n), token=2)
            list(peer.link.receive())
            time.sleep(0.001)
    os.close(fd)


def doorbells_unasked(peer: RawPeer) -> None:
    peer.hello()
    peer.send(msg.Doorbell(0, 1, 2), 1)


def messages_too_small(peer: RawPeer) -> None:
    peer.send(msg.Hello(1, 100, 0))


def no_hello(peer: RawPeer) -> None:
    peer.send(msg.GetDevices(0, 100))


ATTACKS: list[tuple[Callable[[RawPeer], None], str]] = [
    (garbage_message, "malformed-message"),
    (half_message, "malformed-message"),
    (link_tail_jumps, "link-index"),
    (link_length_lies, "link-message-size"),
    (event_source_out_of_range, "event-source-out-of-range"),
    (too_many_descriptors, "too-many-descriptors"),
    (descriptors_without_end, "too-many-descriptors"),
    (junk_on_the_socket, "bad-packet"),
    (region_that_may_shrink, "memory-not-sealed"),
    (region_that_is_no_memfd, "memory-not-sealed"),
    (region_beyond_its_file, "region-outside-file"),
    (region_that_wraps, "region-wraps"),
    (region_of_a_size_that_wraps, "region-outside-file"),
    (regions_that_overlap, "region-overlaps"),
    (write_asked_of_a_sealed_file, "region-not-mappable"),
    (a_cookie_that_never_came, "descriptor-missing"),
    (regions_without_end, "too-many-regions"),
    (doorbells_unasked, "doorbell-unasked"),
    (messages_too_small, "message-limit"),
    (no_hello, "the first message was not HELLO"),
]


@pytest.mark.parametrize(("attack", "reason"), ATTACKS, ids=[attack.__name__ for attack, _ in ATTACKS])
def test_a_peer_that_breaks_a_rule_is_parted_from_by_name(
    raw: RawPeer, connector: Connector, path: Path, attack: Callable[[RawPeer], None], reason: str
) -> None:
    attack(raw)
    assert wait_until(lambda: why(connector)), "the peer is still there"
    assert why(connector).startswith(reason), why(connector)
    assert wait_until(raw.is_parted)
    assert_serves(path)


def test_a_flood_of_messages_disturbs_nobody(raw: RawPeer, connector: Connector, path: Path) -> None:
    raw.hello()
    deadline = time.monotonic() + 1.5
    with contextlib.suppress(Exception):
        while time.monotonic() < deadline:
            raw.send(msg.Ping(1), token=3)
    assert_serves(path)


def test_a_peer_that_reads_nothing_is_parted_from(raw: RawPeer, connector: Connector, path: Path) -> None:
    raw.hello()
    ping = msg.encode(msg.Frame(body=msg.Ping(1), dev_num=0, token=3))
    deadline = time.monotonic() + 20
    while connector.describe()["peers"] and time.monotonic() < deadline:
        if not raw.link._out.send(ping):
            time.sleep(0.001)
        raw.bells[0].ring()
    assert why(connector).startswith("link-not-read")
    assert_serves(path)


def test_a_thousand_peers_that_die_leave_nothing(bus: Bus, connector: Connector, path: Path, leftovers: type) -> None:
    def visit(n: int) -> None:
        attack = ATTACKS[n % len(ATTACKS)][0] if n % 3 == 0 else None
        if n % 7 == 0:
            # One that dies at once, perhaps before it is greeted.
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect(str(path))
            sock.close()
            return
        peer = RawPeer(path)
        with contextlib.suppress(Exception):
            if attack is not None and attack is not regions_without_end:
                attack(peer)
            elif n % 2:
                peer.hello()
                peer.share()
        peer.close()

    for n in range(40):
        visit(n)
    assert wait_until(lambda: not connector.describe()["peers"])
    before = leftovers()
    for n in range(1000):
        visit(n)
    assert wait_until(lambda: not connector.describe()["peers"])
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"
    assert_serves(path)


def test_peers_that_stay_silent_do_not_take_every_place(
    connector: Connector, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vbus.connectors.peer_host.GREETING_SECONDS", 0)
    silent = []
    for _ in range(64):
        silent.append(RawPeer(path))
    assert wait_until(lambda: len(connector.describe()["peers"]) == 64)
    assert_serves(path)
    talkative = []
    monkeypatch.setattr("vbus.connectors.peer_host.GREETING_SECONDS", 1000)
    for _ in range(64):
        with contextlib.suppress(Exception):
            talkative.append(RawPeer(path))
    with pytest.raises(vbus.DriverError, match="has no place"):
        vbus.attach(f"process:{path}")
    for peer in (*silent, *talkative):
        peer.close()


DRIVER = """
import os, signal, sys, vbus
sys.path.insert(0, {tests!r})
from models import EchoDriver
remote = vbus.attach({address!r})
driver = remote.driver("echo", EchoDriver)
driver.echo(b"x")
for n in range(1000):
    driver.queue(0).submit([b"y" * 1000], 1000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_driver_process_that_is_killed_frees_its_device(bus: Bus, connector: Connector, path: Path) -> None:
    code = DRIVER.format(address=connector.address, tests=str(Path(__file__).parent))
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
        assert done.returncode == -9
        assert wait_until(lambda: bus.slot("echo").owner is None)
        assert "closed the socket" in why(connector)
        assert_serves(path)


# A hostile ring: the driver's side builds the ring by hand, in memory that it shares.

DESC, AVAIL, USED, DATA = 0x0000, 0x2000, 0x3000, 0x8000
BASE = 0x10000
SIZE = 8


class HandRing:
    """A split ring written byte by byte."""

    def __init__(
        self, peer: RawPeer, number: int, *, size: int = SIZE, features: int = 1 << 32, desc: int = BASE
    ) -> None:
        self.peer, self.number = peer, number
        self.memory = peer.share()
        self.view = memoryview(self.memory)
        for status in (0, 1, 3):
            peer.ask(msg.SetDeviceStatus(status), number)
        blocks = (features & 0xFFFF_FFFF, features >> 32)
        peer.ask(msg.SetDriverFeatures(0, 2, blocks), number)
        status = peer.ask(msg.SetDeviceStatus(11), number).status
        assert status & Status.FEATURES_OK
        sources = peer.ask(msg.Sources(), number)
        sender = peer.area.sender(peer.bells[2:10], to_device=True)
        self.signal = sender.open(sources.first_source, sources.generation, sources.priorities[0])
        self.answer = peer.ask(msg.SetVqueue(0, size, desc, BASE + AVAIL, BASE + USED), number)
        peer.ask(msg.SetDeviceStatus(15), number)
        self.count = 0

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, next_: int = 0) -> None:
        struct.pack_into("<QIHH", self.view, DESC + 16 * index, address, length, flags, next_)

    def offer(self, head: int, jump: int = 1) -> None:
        struct.pack_into("<H", self.view, AVAIL + 4 + 2 * (self.count % SIZE), head)
        self.count += jump
        struct.pack_into("<H", self.view, AVAIL + 2, self.count & 0xFFFF)
        self.signal.notify()


def jump(ring: HandRing) -> None:
    ring.offer(0, jump=SIZE + 1)


def loop(ring: HandRing) -> None:
    ring.descriptor(0, BASE + DATA, 16, 1, 1)
    ring.descriptor(1, BASE + DATA, 16, 1, 0)
    ring.offer(0)


def next_out_of_range(ring: HandRing) -> None:
    ring.descriptor(0, BASE + DATA, 16, 1, SIZE)
    ring.offer(0)


def head_out_of_range(ring: HandRing) -> None:
    ring.offer(SIZE)


def outside_memory(ring: HandRing) -> None:
    ring.descriptor(0, 0x9999_0000, 16)
    ring.offer(0)


def wraps(ring: HandRing) -> None:
    ring.descriptor(0, 2**64 - 8, 16)
    ring.offer(0)


def zero_length(ring: HandRing) -> None:
    ring.descriptor(0, BASE + DATA, 0)
    ring.offer(0)


def readable_after_writable(ring: HandRing) -> None:
    ring.descriptor(0, BASE + DATA, 16, 1 | 2, 1)
    ring.descriptor(1, BASE + DATA, 16)
    ring.offer(0)


def indirect_unasked(ring: HandRing) -> None:
    ring.descriptor(0, BASE + DATA, 16, 4)
    ring.offer(0)


HOSTILE_RINGS: list[tuple[Callable[[HandRing], None], str]] = [
    (jump, "index-jump"),
    (loop, "descriptor-loop"),
    (next_out_of_range, "descriptor-out-of-range"),
    (head_out_of_range, "descriptor-out-of-range"),
    (outside_memory, "address-outside-memory"),
    (wraps, "address-outside-memory"),
    (zero_length, "zero-length-descriptor"),
    (readable_after_writable, "readable-after-writable"),
    (indirect_unasked, "indirect-not-negotiated"),
]


@pytest.mark.parametrize(("attack", "name"), HOSTILE_RINGS, ids=[attack.__name__ for attack, _ in HOSTILE_RINGS])
def test_a_hostile_ring_is_a_named_violation_of_that_device_alone(
    raw: RawPeer, bus: Bus, path: Path, attack: Callable[[HandRing], None], name: str
) -> None:
    with vbus.attach(f"process:{path}") as remote:
        lamp = remote.driver("lamp", LampDriver)
        raw.hello()
        number = bus.slot("echo").number
        ring = HandRing(raw, number)
        attack(ring)
        assert wait_until(lambda: bus.describe()[0]["violations"]), "no violation was counted"
        (counted,) = bus.describe()[0]["violations"].items()
        assert counted == (name, 1) or name == "descriptor-loop", counted
        assert "DEVICE_NEEDS_RESET" in bus.describe()[0]["status"]
        assert raw.ask(msg.GetDeviceStatus(), number).status & Status.DEVICE_NEEDS_RESET
        lamp.queue(0).submit([b"on"], 0).result(10)
        assert raw.ask(msg.SetDeviceStatus(0), number).status == 0
        raw.close()
        assert wait_until(lambda: bus.slot("echo").owner is None)
        assert remote.driver("echo", EchoDriver).echo(b"back") == b"back"


def test_a_ring_outside_memory_or_of_no_size_needs_a_reset(raw: RawPeer, bus: Bus) -> None:
    raw.hello()
    number = bus.slot("echo").number
    HandRing(raw, number, desc=0x7777_0000)
    assert wait_until(lambda: bus.describe()[0]["violations"] == {"ring-outside-memory": 1})
    raw.ask(msg.MemoryRemove(BASE))
    HandRing(raw, number, size=0)
    assert wait_until(lambda: bus.describe()[0]["violations"] == {"ring-outside-memory": 1, "queue-size": 1})


def test_a_driver_that_flaps_its_sleep_word_harms_only_itself(raw: RawPeer, path: Path) -> None:
    raw.hello()
    g = raw.area.geometry
    stop = time.monotonic() + 1
    with memoryview(raw.area.mapping) as view:
        n = 0
        while time.monotonic() < stop:
            n += 1
            for priority in range(8):
                struct.pack_into("<I", view, g.events_to_driver.sleep + 64 * priority, n)
            struct.pack_into("<I", view, g.events_to_driver.taken + 4 * (n % g.max_sources), n)
    assert_serves(path)


# The same over a byte stream.


@pytest.fixture
def stream(bus: Bus) -> Connector:
    return bus.connect(vbus.connectors.Stream("tcp:127.0.0.1:0"), "s")


def dial(connector: Connector) -> socket.socket:
    host, _, port = connector.address.removeprefix("tcp:").rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def frames(*bodies: tuple[Any, int]) -> bytes:
    return b"".join(msg.encode(msg.Frame(body=body, dev_num=number, token=1)) for body, number in bodies)


def claimed(bus: Bus, size: int = 4) -> bytes:
    """The messages that make the echo device serve one queue."""
    number = bus.slot("echo").number
    return frames(
        (msg.Hello(1, 65528, 0), 0),
        (msg.SetDeviceStatus(0), number),
        (msg.SetDeviceStatus(3), number),
        (msg.SetDriverFeatures(0, 2, (0, 1)), number),
        (msg.SetDeviceStatus(11), number),
        (msg.SetVqueue(0, size, 0, 0, 0), number),
        (msg.SetDeviceStatus(15), number),
    )


STREAM_ATTACKS: list[tuple[str, Callable[[Bus], bytes], str]] = [
    ("garbage", lambda bus: random.Random(5).randbytes(5000), "malformed-message"),
    ("http", lambda bus: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4, "malformed-message"),
    ("no hello", lambda bus: frames((msg.GetDevices(0, 8), 0)), "the first message was not HELLO"),
    (
        "twice",
        lambda bus: claimed(bus) + frames(*[(msg.Request(0, 7, 100, 8, b"x"), bus.slot("echo").number)] * 2),
        "request-id-twice",
    ),
    (
        "too many",
        lambda bus: (
            claimed(bus) + frames(*[(msg.Request(0, n, 100, 8, b"x"), bus.slot("echo").number) for n in range(9)])
        ),
        "too-many-requests",
    ),
    (
        "too large",
        lambda bus: claimed(bus) + frames((msg.Request(0, 7, 2**31, 8, b"x"), bus.slot("echo").number)),
        "request-size",
    ),
    (
        "more than said",
        lambda bus: claimed(bus) + frames((msg.Request(0, 7, 2, 8, b"xxx"), bus.slot("echo").number)),
        "request-size",
    ),
    (
        "data unasked",
        lambda bus: claimed(bus) + frames((msg.Data(0, 7, 0, 0, b"x"), bus.slot("echo").number)),
        "data-unasked",
    ),
    (
        "data elsewhere",
        lambda bus: (
            claimed(bus)
            + frames(
                (msg.Request(0, 7, 100, 8, b"x"), bus.slot("echo").number),
                (msg.Data(0, 7, 0, 50, b"x"), bus.slot("echo").number),
            )
        ),
        "data-offset",
    ),
    (
        "a queue twice",
        lambda bus: claimed(bus) + frames((msg.SetVqueue(0, 4, 0, 0, 0), bus.slot("echo").number)),
        "queue-twice",
    ),
]


@pytest.mark.parametrize(("send", "reason"), [a[1:] for a in STREAM_ATTACKS], ids=[a[0] for a in STREAM_ATTACKS])
def test_a_stream_that_breaks_a_rule_is_parted_from_by_name(
    bus: Bus, stream: Connector, send: Callable[[Bus], bytes], reason: str
) -> None:
    with dial(stream) as sock:
        sock.sendall(send(bus))
        assert wait_until(lambda: stream.describe()["departed"])
        assert why(stream).startswith(reason), why(stream)
    with vbus.attach(stream.address) as remote:
        assert remote.driver("echo", EchoDriver).echo(b"still here") == b"still here"


def test_a_thousand_streams_that_die_leave_nothing(bus: Bus, stream: Connector, leftovers: type) -> None:
    def visit(n: int) -> None:
        with dial(stream) as sock, contextlib.suppress(OSError):
            data = STREAM_ATTACKS[n % len(STREAM_ATTACKS)][1](bus)
            sock.sendall(data[: len(data) if n % 3 else len(data) * (n % 10) // 10])

    for n in range(30):
        visit(n)
    assert wait_until(lambda: not stream.describe()["peers"])
    before = leftovers()
    for n in range(1000):
        visit(n)
    assert wait_until(lambda: not stream.describe()["peers"])
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"


def test_a_driver_that_never_lets_go_of_removed_devices_is_parted_from(
    bus: Bus, raw: RawPeer, connector: Connector, path: Path
) -> None:
    raw.hello()
    for n in range(300):
        bus.plug(Echo(), f"guest{n}")
        bus.unplug(f"guest{n}", surprise=True)
        list(raw.link.receive())
        if raw.is_parted():
            break
    assert why(connector).startswith("removed-devices-held")
    assert_serves(path)


def test_what_wants_no_answer_gets_none_and_a_kick_in_band_is_one(bus: Bus, raw: RawPeer) -> None:
    raw.hello()
    number = bus.slot("echo").number
    ring = HandRing(raw, number)
    ring.descriptor(0, BASE + DATA, 16)
    struct.pack_into("<HHH", ring.view, AVAIL, 0, 1, 0)
    for body in (msg.EventUsed(0), msg.PingResponse(3), msg.GetConfigResponse(0, 0, 0, b""), msg.EventAvail(0, 0)):
        raw.send(body, number, token=9)
    assert raw.ask(msg.Ping(5)).data == 5
    assert wait_until(lambda: bus.stat()[0]["requests"] == 1 or bus.describe()[0]["violations"])


def test_feature_blocks_that_do_not_exist_are_zero(bus: Bus, raw: RawPeer) -> None:
    raw.hello()
    number = bus.slot("lamp").number
    assert raw.ask(msg.GetDeviceFeatures(0, 8), number).features[4:] == (0, 0, 0, 0)
    assert raw.ask(msg.GetDeviceFeatures(0xFFFF_FFFF, 1), number).features == (0,)
    assert raw.ask(msg.GetDeviceFeatures(1, 1), number).features == (bus.slot("lamp").exposed >> 32,)
