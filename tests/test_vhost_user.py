"""The vhost-user connector, driven message by message: what no stock front-end does, and what none should."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vbus
from conftest import WITHOUT_IO_URING
from guests import Served
from models import Echo, Lamp
from vbus import _core
from vbus.connectors import VhostUser
from vbus.devices.blk import Blk
from vbus.devices.net import Net
from vbus.vhost_user import codec, wire
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from vbus.virtio import features
from vbus.virtio.blk import HEADER, SECTOR, RequestType

GUEST = 0x1000_0000
USER = 0x7F00_0000_0000
SIZE = 1 << 20
DATA = 0x8_0000
MY_FEATURES = 1 << features.VERSION_1 | 1 << m.PROTOCOL_FEATURES
PACKED = MY_FEATURES | 1 << features.RING_PACKED
FIRST = 0x8000_8000
"""Where a packed ring begins."""
LAYOUTS = pytest.mark.parametrize(("bits", "base"), [(MY_FEATURES, 0), (PACKED, FIRST)], ids=["split", "packed"])
DEADLINE = 20.0


class Slow(vbus.Device):
    """Answers when it is let."""

    device_id = 0x7E09
    queues = ("requests",)

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.begun.set()
        self.go.wait(DEADLINE)
        request.write(b"slow")


class Keeper(vbus.Device):
    """Keeps what it takes, until it is told to answer."""

    device_id = 0x7E0A
    queues = (vbus.Queue("requests", pull=True),)

    def __init__(self) -> None:
        self.kept: list[vbus.Request] = []
        self.answers = self.lets_go = False
        self.asked = 0

    def queue_stopping(self, queue: vbus.Queue) -> bool:
        self.asked += 1
        return self.lets_go

    def available(self, queue: vbus.Queue) -> None:
        while (request := queue.take()) is not None:
            if self.answers:
                request.write(b"slow")
                queue.complete(request)
            else:
                self.kept.append(request)


class Front:
    """A front-end that does what a test tells it, and believes nothing."""

    def __init__(self, path: Path) -> None:
        self.connect(path)
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, SIZE)
        self.arena = _core.Mapping(self.fd, SIZE)
        self.bytes = memoryview(self.arena)
        self.kick = os.eventfd(0)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.ring: _core.DriverQueue
        self.inflight: tuple[m.Inflight, int] | None = None

    def connect(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(path))
        self.reader = wire.Reader(self.sock)

    def hang_up(self) -> None:
        self.reader.close()
        self.sock.close()

    def close(self) -> None:
        for fd in (self.fd, self.kick, self.call, *([self.inflight[1]] if self.inflight else [])):
            os.close(fd)
        self.hang_up()

    def say(self, request: Request, payload: m.Payload | None = None, *fds: int, ack: bool = False) -> None:
        wire.send(self.sock, codec.encode(request, payload or m.Empty(), need_reply=ack), list(fds))

    def hear(self) -> m.Payload:
        got = self.reader.read()
        assert got is not None, "the connection was closed"
        message = codec.decode(got[0])
        assert isinstance(message, codec.Message), message
        assert message.reply
        return message.payload

    def ask(self, request: Request, payload: m.Payload | None = None, *fds: int) -> m.Payload:
        self.say(request, payload, *fds)
        return self.hear()

    def number(self, request: Request) -> int:
        answer = self.ask(request)
        assert isinstance(answer, m.U64)
        return answer.value

    def is_closed(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def greet(self, protocol: ProtocolFeature = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG) -> Front:
        offered = self.number(Request.GET_FEATURES)
        assert offered >> m.PROTOCOL_FEATURES & 1
        known = ProtocolFeature(self.number(Request.GET_PROTOCOL_FEATURES))
        self.say(Request.SET_PROTOCOL_FEATURES, m.U64(int(known & (protocol | ProtocolFeature.REPLY_ACK))))
        self.say(Request.SET_OWNER)
        return self

    def acked(self, request: Request, payload: m.Payload | None = None, *fds: int) -> None:
        self.say(request, payload, *fds, ack=True)
        assert self.hear() == m.U64(0)

    def share(self) -> None:
        self.acked(Request.SET_MEM_TABLE, m.MemTable((m.Region(GUEST, SIZE, USER, 0),)), self.fd)

    def set_up(
        self, index: int = 0, *, bits: int = MY_FEATURES, base: int = 0, fresh: bool = True, call: bool = True
    ) -> None:
        self.acked(Request.SET_FEATURES, m.U64(bits))
        self.share()
        if fresh:
            ring = features.of_ring(bits)
            self.ring = _core.DriverQueue(self.arena, 0, GUEST, 7 if ring["packed"] else 8, **ring)
        self.acked(Request.SET_VRING_NUM, m.VringState(index, self.ring.size))
        self.acked(Request.SET_VRING_BASE, m.VringState(index, base))
        places = (self.ring.desc, self.ring.device, self.ring.driver)
        desc, used, avail = (place - GUEST + USER for place in places)
        self.acked(Request.SET_VRING_ADDR, m.VringAddr(index, 0, desc, used, avail, 0))
        if call:
            self.acked(Request.SET_VRING_CALL, m.U64(index), self.call)

    def ask_inflight(self, asked: int) -> None:
        """Have memory made for what is in flight of one queue."""
        self.say(Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 1, asked))
        got = self.reader.read()
        assert got is not None
        message, fds = codec.decode(got[0]), got[1]
        assert isinstance(message, codec.Message)
        inflight = message.payload
        assert isinstance(inflight, m.Inflight)
        assert (inflight.num_queues, inflight.queue_size) == (1, asked)
        assert os.fstat(fds[0]).st_size == inflight.mmap_size
        self.inflight = inflight, fds[0]
        self.give_inflight()

    def give_inflight(self) -> None:
        assert self.inflight is not None
        self.acked(Request.SET_INFLIGHT_FD, *self.inflight)

    def start(self, index: int = 0) -> None:
        self.acked(Request.SET_VRING_KICK, m.U64(index), self.kick)
        self.acked(Request.SET_VRING_ENABLE, m.VringState(index, 1))

    def submit(self, data: bytes, room: int = 64) -> None:
        self.bytes[DATA : DATA + len(data)] = data
        assert self.ring.add([(GUEST + DATA, len(data))], [(GUEST + DATA + 4096, room)]) is not None
        self.ring.publish()

    def ring_kick(self) -> None:
        os.eventfd_write(self.kick, 1)

    def reap(self, count: int) -> list[tuple[int, int]]:
        """Wait for so many answers."""
        found: list[tuple[int, int]] = []

        def reaped() -> bool:
            found.extend(self.ring.reap(8))
            return len(found) >= count

        wait_until(reaped)
        return found

    def answered(self) -> bytes:
        found = self.reap(1)
        return bytes(self.bytes[DATA + 4096 : DATA + 4096 + found[0][1]])


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def bus() -> Iterator[vbus.Bus]:
    with vbus.Bus("vhost") as bus:
        yield bus


@pytest.fixture
def fronts(tmp_path: Path, bus: vbus.Bus) -> Iterator[Callable[..., Front]]:
    made: list[Front] = []

    def front(device: vbus.Device | None = None) -> Front:
        if device is not None:
            bus.plug(device, "d0")
            bus.connect(VhostUser("d0", tmp_path / "d0.sock"), "vm")
        made.append(Front(tmp_path / "d0.sock"))
        return made[-1]

    yield front
    for one in made:
        one.close()


def reasons(bus: vbus.Bus) -> list[str]:
    return [row["reason"] for row in bus.connectors["vm"].describe()["departed"]]


def test_a_request_is_answered_and_the_call_rings(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    front.submit(b"hello")
    front.ring_kick()
    assert front.answered() == b"hello"
    wait_until(lambda: _drained(front.call) > 0)
    assert bus.slot("d0").owner is not None


def _drained(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_a_kick_before_enable_is_not_lost(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.submit(b"early")
    front.ring_kick()
    front.acked(Request.SET_VRING_KICK, m.U64(0), front.kick)
    assert front.ring.reap(8) == []
    front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    assert front.answered() == b"early"


def test_enable_before_a_kick(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.submit(b"early")
    front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    front.acked(Request.SET_VRING_KICK, m.U64(0), front.kick)
    assert front.answered() == b"early"


def test_a_disabled_queue_waits(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 0))
    front.submit(b"later")
    front.ring_kick()
    # An answer that comes after whatever the kick could have done.
    front.acked(Request.SET_VRING_CALL, m.U64(0), front.call)
    assert front.ring.reap(8) == []
    front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    assert front.answered() == b"later"


def test_without_protocol_features_every_queue_is_enabled(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up(bits=1 << features.VERSION_1)
    front.submit(b"plain")
    front.acked(Request.SET_VRING_KICK, m.U64(0), front.kick)
    assert front.answered() == b"plain"


def test_get_vring_base_waits_for_what_is_in_flight(fronts: Callable[..., Front]) -> None:
    device = Slow()
    front = fronts(device).greet()
    front.set_up()
    front.start()
    front.submit(b"x")
    front.ring_kick()
    assert device.begun.wait(DEADLINE)
    front.say(Request.GET_VRING_BASE, m.VringState(0, 0))
    front.sock.settimeout(0.1)
    with pytest.raises(TimeoutError):
        front.sock.recv(1, socket.MSG_PEEK)
    front.sock.settimeout(DEADLINE)
    device.go.set()
    assert front.hear() == m.VringState(0, 1)
    assert front.answered() == b"slow"


def test_a_queue_goes_on_where_it_stopped(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    front.submit(b"one")
    front.ring_kick()
    assert front.answered() == b"one"
    assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, 1)
    front.submit(b"two")
    front.set_up(base=1, fresh=False)
    front.start()
    assert front.answered() == b"two"


def test_what_a_device_has_taken_ahead_holds_up_no_stop(
    fronts: Callable[..., Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vbus.bus.slot.PULLED_SECONDS", 1e9)
    device = Keeper()
    front = fronts(device).greet()
    front.set_up()
    front.start()
    front.submit(b"x")
    front.ring_kick()
    wait_until(lambda: len(device.kept) == 1)
    front.say(Request.GET_VRING_BASE, m.VringState(0, 0))
    wait_until(lambda: device.asked > 2)
    device.lets_go = True
    # It was taken, and is given back: it comes again when the queue does.
    assert front.hear() == m.VringState(0, 0)
    device.answers = True
    front.set_up(base=0, fresh=False)
    front.start()
    assert front.answered() == b"slow"


def test_a_driver_whose_call_was_never_made_is_called_by_whoever_goes_on(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    front.submit(b"one")
    front.ring_kick()
    assert front.answered() == b"one"
    assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, 1)
    # As if it had died between the used index and the call.
    _drained(front.call)
    front.set_up(base=1, fresh=False)
    front.start()
    wait_until(lambda: _drained(front.call) > 0)


@pytest.mark.parametrize("base", [FIRST, 0x8000], ids=hex)
def test_a_packed_queue_goes_on_where_it_stopped(fronts: Callable[..., Front], base: int) -> None:
    front = fronts(Echo()).greet()
    # A request has two descriptors here, so that every other one goes over the end of the ring.
    places = [(2 * n % 7 | (0 if 2 * n // 7 % 2 else 0x8000)) for n in range(12)]
    front.set_up(bits=PACKED, base=base)
    front.start()
    for n in range(1, 12):
        front.submit(b"request %d" % n)
        front.ring_kick()
        assert front.answered() == b"request %d" % n
        assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, places[n] * 0x1_0001)
        # Some front-ends say all of it, and some only the half that is about what comes next.
        front.set_up(bits=PACKED, base=places[n] * (0x1_0001 if base == FIRST else 1), fresh=False)
        front.start()


@pytest.mark.parametrize("answered", [0, 1, 3, 6, 7, 8, 20])
def test_a_packed_queue_that_nobody_keeps_goes_on_where_it_was(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, answered: int
) -> None:
    bits = PACKED | 1 << features.RING_INDIRECT_DESC
    front = fronts(Echo()).greet()
    front.set_up(bits=bits, base=FIRST)
    front.start()
    for n in range(answered):
        front.submit(b"request %d" % n)
        front.ring_kick()
        assert front.answered() == b"request %d" % n
    # As a kill is seen from here; QEMU knows no more of a network's rings then than where they began.
    front.hang_up()
    wait_until(lambda: bus.slot("d0").owner is None)
    for _ in range(2):
        front.submit(b"and on")
    front.connect(tmp_path / "d0.sock")
    front.greet()
    front.set_up(bits=bits, base=FIRST, fresh=False)
    front.start()
    for _ in range(8):
        assert front.answered() == b"and on"
        front.submit(b"and on")
        front.ring_kick()
    wait_until(lambda: front.ring.reap(8) != [] or front.ring.outstanding == 0)
    place = (answered + 10) % 7 | (0 if (answered + 10) // 7 % 2 else 0x8000)
    assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, place * 0x1_0001)


def test_a_packed_queue_that_never_ran_begins_at_its_beginning(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.acked(Request.SET_FEATURES, m.U64(PACKED))
    assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, FIRST)


@LAYOUTS
def test_buffers_that_a_device_keeps_are_given_again(
    fronts: Callable[..., Front], monkeypatch: pytest.MonkeyPatch, bits: int, base: int
) -> None:
    monkeypatch.setattr("vbus.bus.slot.PULLED_SECONDS", 0.2)
    device = Keeper()
    front = fronts(device).greet()
    front.set_up(bits=bits, base=base)
    front.start()
    for _ in range(3):
        front.submit(b"x")
    front.ring_kick()
    wait_until(lambda: len(device.kept) == 3)
    assert front.ask(Request.GET_VRING_BASE, m.VringState(0, 0)) == m.VringState(0, base)
    device.answers = True
    front.set_up(bits=bits, base=base, fresh=False)
    front.start()
    assert front.answered() == b"slow"
    wait_until(lambda: front.ring.reap(8) != [] or front.ring.outstanding == 0)


def test_one_queue_cannot_be_reset_by_a_front_end(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo())
    offered = features.TRANSPORT.names_of(front.number(Request.GET_FEATURES))
    assert ("RING_PACKED" in offered, "IN_ORDER" in offered, "RING_RESET" in offered) == (True, True, False)


def test_a_guest_that_begins_anew(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet(ProtocolFeature.STATUS | ProtocolFeature.RESET_DEVICE)
    for request in (Request.RESET_DEVICE, Request.SET_STATUS):
        front.set_up()
        front.start()
        front.submit(b"again")
        front.ring_kick()
        assert front.answered() == b"again"
        front.ask(Request.GET_VRING_BASE, m.VringState(0, 0))
        front.acked(request, m.U64(0) if request is Request.SET_STATUS else None)
        assert bus.slot("d0").owner is None


def test_a_call_descriptor_is_replaced_while_the_ring_goes_on(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    # A call that nobody waited for might have been one that somebody should have heard: so each begins with one.
    assert _drained(front.call) == 1
    other = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        front.acked(Request.SET_VRING_CALL, m.U64(0), other)
        assert _drained(other) == 1
        front.submit(b"x")
        front.ring_kick()
        wait_until(lambda: _drained(other) > 0)
        assert _drained(front.call) == 0
        front.acked(Request.SET_VRING_CALL, m.U64(0 | m.NO_FD))
        front.ring.reap(8)
        front.submit(b"y")
        front.ring_kick()
        assert front.answered() == b"y"
        assert _drained(other) == 0
    finally:
        os.close(other)


def test_memory_comes_and_goes_region_by_region(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet(ProtocolFeature.CONFIGURE_MEM_SLOTS)
    assert front.number(Request.GET_MAX_MEM_SLOTS) == 509
    front.set_up()
    front.start()
    more = m.MemRegion(GUEST + SIZE, SIZE, USER + 4 * SIZE, 0)
    for _ in range(3):
        front.acked(Request.ADD_MEM_REG, more, front.fd)
        front.acked(Request.REM_MEM_REG, more)
    front.submit(b"still")
    front.ring_kick()
    assert front.answered() == b"still"


def test_config_space_is_read_and_a_change_is_told(bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    front = fronts(Blk(path=image)).greet(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE)
        front.acked(Request.SET_BACKEND_REQ_FD, None, theirs.fileno())
        answer = front.ask(Request.GET_CONFIG, m.Config(0, 0, bytes(200)))
        assert isinstance(answer, m.Config)
        assert struct.unpack_from("<Q", answer.data) == (2048,)
        assert len(answer.data) == 200
        front.set_up()
        front.start()
        image.write_bytes(bytes(2 << 20))
        bus.get("d0", Blk).capacity = 4096
        assert ours.recv(100) == codec.encode(BackendRequest.CONFIG_CHANGE_MSG, m.Empty())
        answer = front.ask(Request.GET_CONFIG, m.Config(0, 0, bytes(8)))
        assert isinstance(answer, m.Config)
        assert struct.unpack("<Q", answer.data) == (4096,)


def test_a_network_counts_pairs(fronts: Callable[..., Front]) -> None:
    front = fronts(Net(queue_pairs=3)).greet(ProtocolFeature.MQ)
    assert front.number(Request.GET_QUEUE_NUM) == 3


def test_what_cannot_reach_the_guest_is_refused_with_the_reason(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Net()).greet(ProtocolFeature.MQ)
    bus.set("d0", "link", "off")
    front.set_up()
    front.start()
    with pytest.raises(vbus.UsageError, match=r"link cannot reach the driver now.*set_link"):
        bus.set("d0", "link", "on")
    front.sock.close()
    wait_until(lambda: bus.slot("d0").owner is None)
    bus.set("d0", "link", "on")


def test_another_front_end_on_the_same_socket_is_refused(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    first = fronts(Echo()).greet()
    second = fronts()
    assert second.is_closed()
    wait_until(lambda: len(reasons(bus)) == 1)
    assert "has a front-end already" in reasons(bus)[0]
    first.set_up()
    first.start()
    first.submit(b"mine")
    first.ring_kick()
    assert first.answered() == b"mine"


INFLIGHT = ProtocolFeature.INFLIGHT_SHMFD


# A front-end asks before its guest has chosen: the ring may become larger than it thought, or another.
@pytest.mark.parametrize("asked", [8, 2])
@pytest.mark.parametrize("early", [True, False], ids=["before features", "after features"])
@pytest.mark.parametrize(("bits", "bases"), [(MY_FEATURES, [0, 1]), (PACKED, [FIRST, 0x8002])], ids=["split", "packed"])
def test_requests_under_way_are_served_again_by_whoever_comes_next(
    bus: vbus.Bus,
    fronts: Callable[..., Front],
    tmp_path: Path,
    bits: int,
    bases: list[int],
    early: bool,
    asked: int,
) -> None:
    device = Keeper()
    front = fronts(device).greet(INFLIGHT)
    if not early:
        front.acked(Request.SET_FEATURES, m.U64(bits))
    front.ask_inflight(asked)
    front.set_up(bits=bits, base=bases[0])
    front.start()
    front.submit(b"x")
    front.ring_kick()
    wait_until(lambda: len(device.kept) == 1)
    # As a kill is seen from here: it is gone, with a request in its hands.
    front.hang_up()
    device.answers = True
    wait_until(lambda: bus.slot("d0").owner is None)
    assert front.ring.reap(8) == []
    front.connect(tmp_path / "d0.sock")
    front.greet(INFLIGHT)
    front.give_inflight()
    # The ring was read up to its first entry, which nobody answered: that it comes back is due to the region alone.
    front.set_up(bits=bits, base=bases[1], fresh=False)
    front.start()
    assert front.answered() == b"slow"


@LAYOUTS
def test_requests_that_were_overtaken_are_served_again(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, bits: int, base: int
) -> None:
    device = Keeper()
    front = fronts(device).greet(INFLIGHT)
    front.acked(Request.SET_FEATURES, m.U64(bits))
    front.ask_inflight(8)
    front.set_up(bits=bits, base=base)
    front.start()
    tokens: list[int] = []

    def submit(number: int) -> None:
        """A request that says its number, and has a place of its own for the answer."""
        at = DATA + 64 * number
        front.bytes[at] = number
        token = front.ring.add([(GUEST + at, 1)], [(GUEST + at + 8, 8)])
        assert token is not None
        tokens.append(token)
        front.ring.publish()
        front.ring_kick()

    for number in range(3):
        submit(number)
    wait_until(lambda: len(device.kept) == 3)
    queue = bus.slot("d0").queues[0]
    second = device.kept[1]
    second.write(b"early")
    queue.complete(second)
    assert front.reap(1) == [(tokens[1], 5)]
    # In a packed ring, it lies where what was overtaken did.
    submit(3)
    wait_until(lambda: len(device.kept) == 4)
    front.hang_up()
    wait_until(lambda: bus.slot("d0").owner is None)
    device.kept.clear()
    front.connect(tmp_path / "d0.sock")
    front.greet(INFLIGHT)
    front.give_inflight()
    front.set_up(bits=bits, base=base, fresh=False)
    front.start()
    wait_until(lambda: len(device.kept) == 3)
    assert [request.read() for request in device.kept] == [b"\0", b"\2", b"\3"]
    for request in reversed(device.kept):
        request.write(b"late %d" % request.readable_total)
        queue.complete(request)
    assert front.reap(3) == [(tokens[number], 6) for number in (3, 2, 0)]
    assert bytes(front.bytes[DATA + 8 : DATA + 14]) == b"late 1"
    assert front.ring.outstanding == 0


def logged(log: memoryview) -> set[int]:
    return {page for page in range(len(log) * 8) if log[page // 8] >> page % 8 & 1}


@pytest.mark.parametrize("bits", [MY_FEATURES, PACKED], ids=["split", "packed"])
def test_pages_are_logged_while_the_features_say_so(bus: vbus.Bus, fronts: Callable[..., Front], bits: int) -> None:
    front = fronts(Echo()).greet(ProtocolFeature.LOG_SHMFD)
    front.set_up(bits=bits, base=FIRST if bits == PACKED else 0)
    front.start()
    fd = os.memfd_create("log")
    size = (GUEST + SIZE) // 4096 // 8
    os.ftruncate(fd, size)
    mapping = _core.Mapping(fd, size)
    log = memoryview(mapping)
    front.say(Request.SET_LOG_BASE, m.Log(size, 0), fd)
    assert front.hear() == m.U64(0)
    front.submit(b"one")
    front.ring_kick()
    assert front.answered() == b"one"
    assert logged(log) == set()
    # A migration begins: the features change under a device that goes on.
    front.acked(Request.SET_FEATURES, m.U64(bits | 1 << m.LOG_ALL))
    front.submit(b"two")
    front.ring_kick()
    assert front.answered() == b"two"
    used = front.ring.desc if bits == PACKED else front.ring.device
    pages = {(GUEST + DATA + 4096) // 4096, used // 4096}
    wait_until(lambda: pages <= logged(log))
    assert (GUEST + DATA) // 4096 not in logged(log)
    # And it fails.
    front.acked(Request.SET_FEATURES, m.U64(bits))
    log[:] = bytes(size)
    front.submit(b"three")
    front.ring_kick()
    assert front.answered() == b"three"
    assert logged(log) == set()
    assert bus.slot("d0").owner is not None
    os.close(fd)


def test_calls_in_band(fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet(ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE)
        front.acked(Request.SET_BACKEND_REQ_FD, None, theirs.fileno())
        front.set_up()
        front.acked(Request.SET_VRING_CALL, m.U64(m.NO_FD))
        front.acked(Request.SET_VRING_KICK, m.U64(m.NO_FD))
        front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
        front.submit(b"in band")
        front.say(Request.VRING_KICK, m.VringState(0, 0))
        assert front.answered() == b"in band"
        # One for the ring that runs, one for the answer, unless both were said at once.
        said = codec.encode(BackendRequest.VRING_CALL, m.VringState(0, 0))
        assert ours.recv(100) in (said, said + said)
        # Descriptors are possible all the same.
        front.acked(Request.SET_VRING_CALL, m.U64(0), front.call)
        front.submit(b"out")
        front.say(Request.VRING_KICK, m.VringState(0, 0))
        assert front.answered() == b"out"
        wait_until(lambda: bool(select.select([front.call], [], [], 0)[0]))


def test_who_kicks_by_descriptor_is_not_called_in_band(fronts: Callable[..., Front]) -> None:
    """QEMU accepts in-band notifications, and does not know the messages."""
    front = fronts(Echo()).greet(ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        front.acked(Request.SET_BACKEND_REQ_FD, None, theirs.fileno())
        front.set_up()
        # A guest that wants no interrupt for this queue.
        front.acked(Request.SET_VRING_CALL, m.U64(m.NO_FD))
        front.start()
        front.submit(b"x")
        front.ring_kick()
        assert front.answered() == b"x"
        front.ask(Request.GET_VRING_BASE, m.VringState(0, 0))
        front.sock.close()
        # Whatever it would have said, it said before it closed the channel.
        theirs.close()
        ours.settimeout(DEADLINE)
        assert ours.recv(100) == b""


def test_memory_that_its_owner_truncates_is_lost_and_nobody_else_notices(
    bus: vbus.Bus, fronts: Callable[..., Front]
) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    front.submit(b"x")
    os.ftruncate(front.fd, 0)
    front.ring_kick()
    wait_until(lambda: bus.slot("d0").violations["region-lost"] == 1)
    front.sock.close()
    wait_until(lambda: bus.slot("d0").owner is None)
    again = fronts().greet()
    again.set_up()
    again.start()
    again.submit(b"here")
    again.ring_kick()
    assert again.answered() == b"here"


BAD_PROTOCOL = ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.LOG_SHMFD
LOG_SIZE = (GUEST + SIZE) // 4096 // 8


@pytest.mark.parametrize(
    ("name", "request_", "payload"),
    [
        ("inflight-size", Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 2, 8)),
        ("inflight-size", Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 1, 7)),
        ("inflight-size", Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 0, 8)),
        ("inflight-size", Request.SET_INFLIGHT_FD, m.Inflight(64, 0, 1, 256)),
        ("inflight-size", Request.SET_INFLIGHT_FD, m.Inflight(1 << 63, 1 << 63, 1, 8)),
        ("inflight-size", Request.SET_INFLIGHT_FD, m.Inflight(SIZE, 0, 2, 8)),
        ("inflight-not-mappable", Request.SET_INFLIGHT_FD, m.Inflight(SIZE, SIZE, 1, 8)),
        ("log-too-small", Request.SET_LOG_BASE, m.Log(LOG_SIZE - 1, 0)),
        ("log-not-mappable", Request.SET_LOG_BASE, m.Log(LOG_SIZE, SIZE)),
        ("log-not-mappable", Request.SET_LOG_BASE, m.Log(LOG_SIZE, 1)),
        ("log-not-mappable", Request.SET_LOG_BASE, m.Log(1 << 63, 0)),
    ],
)
def test_a_region_that_does_not_fit_is_named(
    bus: vbus.Bus, fronts: Callable[..., Front], name: str, request_: Request, payload: m.Payload
) -> None:
    front = fronts(Echo()).greet(BAD_PROTOCOL)
    front.share()
    front.say(request_, payload, *([front.fd] if request_ != Request.GET_INFLIGHT_FD else []))
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert name in reasons(bus)[0]


def test_a_queue_larger_than_its_place_is_named(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet(BAD_PROTOCOL)
    front.acked(Request.SET_INFLIGHT_FD, m.Inflight(SIZE, 0, 1, 4), front.fd)
    front.set_up()
    front.say(Request.SET_VRING_KICK, m.U64(0), front.kick)
    front.say(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert "inflight-size" in reasons(bus)[0]


def test_a_front_end_comes_back(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo())
    for n in range(1, 6):
        front.greet()
        front.set_up()
        front.start()
        front.submit(b"back")
        front.ring_kick()
        assert front.answered() == b"back"
        front.sock.close()
        wait_until(lambda n=n: len(reasons(bus)) == n)  # type: ignore[misc]
        wait_until(lambda: bus.slot("d0").owner is None)
        front = fronts()


def test_vbus_goes_to_a_front_end_that_listens(bus: vbus.Bus, tmp_path: Path) -> None:
    path = tmp_path / "front.sock"
    bus.plug(Echo(), "d0")
    connector = bus.connect(VhostUser("d0", path, connect=True), "vm")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE)
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(DEADLINE)
                wire.send(sock, codec.encode(Request.GET_FEATURES, m.Empty()))
                assert sock.recv(100)
    assert connector.address == f"vhost-user:{path}"


def test_unplugging_parts_from_the_front_end(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.start()
    bus.unplug("d0")
    assert front.is_closed()
    wait_until(lambda: reasons(bus) == ["the device was unplugged"])


def raw(request: int, payload: bytes = b"", flags: int = 1, size: int | None = None) -> bytes:
    return codec.HEADER.pack(request, flags, len(payload) if size is None else size) + payload


REGION = m.Region(GUEST, SIZE, USER, 0)


@pytest.mark.parametrize(
    ("name", "data", "fds"),
    [
        ("unknown-request", raw(999), 0),
        ("vhost-user-version", raw(1, flags=2), 0),
        ("message-size", raw(1, size=1 << 20), 0),
        ("bad-payload", raw(Request.SET_FEATURES, b"x"), 0),
        ("answer-unasked", raw(Request.SET_FEATURES, bytes(8), flags=5), 0),
        ("descriptor-count", raw(Request.GET_FEATURES), 1),
        ("descriptor-count", raw(Request.SET_MEM_TABLE, m.MemTable((REGION,)).pack()), 0),
        ("descriptor-count", raw(Request.SET_MEM_TABLE, m.MemTable((REGION,)).pack()), 2),
        ("too-many-descriptors", raw(Request.SET_MEM_TABLE, m.MemTable((REGION,)).pack()), 9),
        ("region-overlaps", raw(Request.SET_MEM_TABLE, m.MemTable((REGION, REGION)).pack()), 2),
        (
            "region-overlaps",
            raw(Request.SET_MEM_TABLE, m.MemTable((REGION, m.Region(GUEST + SIZE, SIZE, USER + 4096, 0))).pack()),
            2,
        ),
        ("region-wraps", raw(Request.SET_MEM_TABLE, m.MemTable((m.Region(2**64 - 4096, SIZE, USER, 0),)).pack()), 1),
        ("region-wraps", raw(Request.SET_MEM_TABLE, m.MemTable((m.Region(GUEST, SIZE, 2**64 - 4096, 0),)).pack()), 1),
        ("region-not-mappable", raw(Request.SET_MEM_TABLE, m.MemTable((m.Region(GUEST, 0, USER, 0),)).pack()), 1),
        (
            "region-not-mappable",
            raw(Request.SET_MEM_TABLE, m.MemTable((m.Region(GUEST, 2 * SIZE, USER, 0),)).pack()),
            1,
        ),
        ("features-not-offered", raw(Request.SET_FEATURES, m.U64(1 << 40).pack()), 0),
        ("protocol-features", raw(Request.SET_PROTOCOL_FEATURES, m.U64(1 << 63).pack()), 0),
        ("not-negotiated", raw(Request.GET_STATUS), 0),
        ("not-negotiated", raw(Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 1, 8).pack()), 0),
        ("not-negotiated", raw(Request.CHECK_DEVICE_STATE), 0),
        ("unknown-request", raw(Request.POSTCOPY_ADVISE), 0),
        ("queue-index", raw(Request.SET_VRING_NUM, m.VringState(1, 8).pack()), 0),
        ("queue-index", raw(Request.GET_VRING_BASE, m.VringState(1 << 31, 0).pack()), 0),
        ("queue-size", raw(Request.SET_VRING_NUM, m.VringState(0, 7).pack()), 0),
        ("queue-size", raw(Request.SET_VRING_NUM, m.VringState(0, 1 << 16).pack()), 0),
        ("vring-base", raw(Request.SET_VRING_BASE, m.VringState(0, 1 << 16).pack()), 0),
        ("vring-enable", raw(Request.SET_VRING_ENABLE, m.VringState(0, 2).pack()), 0),
        ("doorbell-kind", raw(Request.SET_VRING_KICK, m.U64(0).pack()), 1),
        ("ring-not-set-up", raw(Request.SET_VRING_KICK, m.U64(m.NO_FD).pack()), 0),
    ],
)
def test_a_wrong_message_ends_the_connection_by_name(
    bus: vbus.Bus, fronts: Callable[..., Front], name: str, data: bytes, fds: int
) -> None:
    front = fronts(Echo()).greet()
    before = len(os.listdir("/proc/self/fd"))
    wire.send(front.sock, data, [front.fd] * fds)
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert name in reasons(bus)[0]
    # Its socket is closed, and nothing that came with the message is left.
    assert len(os.listdir("/proc/self/fd")) < before
    again = fronts().greet()
    again.set_up()
    again.start()
    again.submit(b"alive")
    again.ring_kick()
    assert again.answered() == b"alive"


class Stateful(Echo):
    """Has what it was told."""

    def __init__(self) -> None:
        self.told = b"nothing yet"

    def save_state(self) -> bytes:
        return self.told

    def load_state(self, data: bytes) -> None:
        self.told = data


SAVE, LOAD = m.DeviceState(0, 0), m.DeviceState(1, 0)


def ask_state(front: Front, direction: m.DeviceState) -> int:
    """The channel that the back-end wants instead of the one that it is offered."""
    ours, theirs = os.pipe()
    front.say(Request.SET_DEVICE_STATE_FD, direction, theirs)
    os.close(ours)
    os.close(theirs)
    got = front.reader.read()
    assert got is not None
    message, fds = codec.decode(got[0]), got[1]
    assert isinstance(message, codec.Message)
    assert message.payload == m.U64(0)
    assert len(fds) == 1
    return fds[0]


def test_state_is_read_and_written_while_no_queue_runs(fronts: Callable[..., Front]) -> None:
    device = Stateful()
    front = fronts(device).greet(ProtocolFeature.DEVICE_STATE)
    fd = ask_state(front, SAVE)
    with open(fd, "rb") as file:
        assert file.read() == b"nothing yet"
    assert front.number(Request.CHECK_DEVICE_STATE) == 0
    fd = ask_state(front, LOAD)
    with open(fd, "wb") as file:
        file.write(b"something" * 100_000)
    assert front.number(Request.CHECK_DEVICE_STATE) == 0
    assert device.told == b"something" * 100_000


def test_a_front_end_that_does_not_end_its_state_has_loaded_none(fronts: Callable[..., Front]) -> None:
    device = Stateful()
    front = fronts(device).greet(ProtocolFeature.DEVICE_STATE)
    fd = ask_state(front, LOAD)
    os.write(fd, b"half of it")
    assert front.number(Request.CHECK_DEVICE_STATE) == 1
    with pytest.raises(BrokenPipeError):
        os.write(fd, b"more")
    os.close(fd)
    # One that begins again gives up what was under way.
    first, second = ask_state(front, LOAD), ask_state(front, LOAD)
    os.write(second, b"whole")
    os.close(first)
    os.close(second)
    assert front.number(Request.CHECK_DEVICE_STATE) == 0
    assert device.told == b"whole"


def test_a_state_that_does_not_end_is_not_kept(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    device = Stateful()
    front = fronts(device).greet(ProtocolFeature.DEVICE_STATE)
    fd = ask_state(front, LOAD)
    with pytest.raises(BrokenPipeError), open(fd, "wb", buffering=0) as file:
        file.writelines(itertools.repeat(bytes(1 << 20)))
    assert front.number(Request.CHECK_DEVICE_STATE) == 1
    assert device.told == b"nothing yet"
    before = len(os.listdir("/proc/self/fd"))
    fd = ask_state(front, LOAD)
    front.sock.close()
    wait_until(lambda: bool(reasons(bus)))
    os.close(fd)
    # Gone in the middle of it: the near end of the pipe went too.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) < before)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("device-state-direction", m.DeviceState(2, 0)),
        ("device-state-phase", m.DeviceState(0, 1)),
        ("device-state-none", None),
    ],
)
def test_a_wrong_word_about_state_is_named(
    bus: vbus.Bus, fronts: Callable[..., Front], name: str, state: m.DeviceState | None
) -> None:
    front = fronts(Stateful()).greet(ProtocolFeature.DEVICE_STATE)
    if state is not None:
        front.say(Request.SET_DEVICE_STATE_FD, state, front.fd)
    else:
        front.say(Request.CHECK_DEVICE_STATE)
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert name in reasons(bus)[0]


@pytest.mark.parametrize("request_", [Request.SET_DEVICE_STATE_FD, Request.CHECK_DEVICE_STATE])
def test_state_of_a_device_whose_queues_run_is_a_violation(
    bus: vbus.Bus, fronts: Callable[..., Front], request_: Request
) -> None:
    front = fronts(Stateful()).greet(ProtocolFeature.DEVICE_STATE)
    if request_ is Request.CHECK_DEVICE_STATE:
        os.close(ask_state(front, LOAD))
    front.set_up()
    front.start()
    if request_ is Request.CHECK_DEVICE_STATE:
        front.say(request_)
    else:
        front.say(request_, SAVE, front.fd)
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert "device-state-running: queues run: requests" in reasons(bus)[0]


def test_in_band_needs_no_word_about_calls_and_says_errors(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet(ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE)
        front.acked(Request.SET_BACKEND_REQ_FD, None, theirs.fileno())
        front.set_up(call=False)
        front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
        front.submit(b"in band")
        front.acked(Request.VRING_KICK, m.VringState(0, 0))
        assert front.answered() == b"in band"
        call = codec.encode(BackendRequest.VRING_CALL, m.VringState(0, 0))
        assert ours.recv(len(call), socket.MSG_WAITALL) == call
        at = front.ring.driver - GUEST
        front.bytes[at + 2 : at + 4] = struct.pack("<H", 5000)
        front.acked(Request.VRING_KICK, m.VringState(0, 0))
        err = codec.encode(BackendRequest.VRING_ERR, m.VringState(0, 0))
        # The ring that began may have been called for by itself.
        while (said := ours.recv(len(err), socket.MSG_WAITALL)) == call:
            pass
        assert said == err


def test_in_band_without_what_it_needs_is_named(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.say(Request.SET_PROTOCOL_FEATURES, m.U64(int(ProtocolFeature.INBAND_NOTIFICATIONS)))
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert "protocol-features: in-band notifications without" in reasons(bus)[0]


def test_config_space_that_may_not_be_written_is_a_refusal(fronts: Callable[..., Front]) -> None:
    front = fronts(Lamp()).greet()
    front.acked(Request.SET_CONFIG, m.Config(4, 0, b"\x03"))
    front.say(Request.SET_CONFIG, m.Config(0, 0, b"\x03"), ack=True)
    assert front.hear() == m.U64(1)


def test_a_ring_outside_memory_is_named(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    front.say(Request.SET_VRING_ADDR, m.VringAddr(0, 0, USER - 4096, USER, USER, 0))
    wire.send(front.sock, codec.encode(Request.SET_VRING_KICK, m.U64(0)), [front.kick])
    front.say(Request.SET_VRING_ENABLE, m.VringState(0, 1))
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert "ring-outside-memory" in reasons(bus)[0]


def test_junk_in_a_ring_stops_the_queue_and_rings_its_error(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    front = fronts(Echo()).greet()
    front.set_up()
    err = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        front.acked(Request.SET_VRING_ERR, m.U64(0), err)
        front.start()
        at = front.ring.driver - GUEST
        front.bytes[at + 2 : at + 4] = struct.pack("<H", 5000)
        front.ring_kick()
        wait_until(lambda: _drained(err) > 0)
        assert bus.slot("d0").violations["index-jump"] == 1
        assert bus.slot("d0").status & vbus.virtio.Status.DEVICE_NEEDS_RESET
    finally:
        os.close(err)


def test_who_is_no_member_is_refused(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    bus.members.owner = -5
    bus.members._uids.clear()
    front = fronts(Echo())
    assert front.is_closed()
    wait_until(lambda: bool(reasons(bus)))
    assert "is not a member" in reasons(bus)[0]


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.GET_VRING_BASE, m.VringState(0, 0)),
        (Request.SET_VRING_ENABLE, m.VringState(0, 0)),
        (Request.SET_VRING_KICK, m.U64(0)),
    ],
)
def test_the_queues_of_another_driver_are_out_of_reach(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, request_: Request, payload: m.Payload
) -> None:
    first = fronts(Echo()).greet()
    first.set_up()
    first.start()
    bus.connect(VhostUser("d0", tmp_path / "other.sock"), "other")
    second = Front(tmp_path / "other.sock")
    try:
        second.greet()
        second.set_up()
        second.say(request_, payload, *([second.kick] if request_ is Request.SET_VRING_KICK else []))
        if request_ is Request.GET_VRING_BASE:
            assert second.hear() == payload
        # What was said has had its effect.
        second.number(Request.GET_FEATURES)
        first.submit(b"mine")
        first.ring_kick()
        assert first.answered() == b"mine"
    finally:
        second.close()


def test_a_backend_channel_that_is_made_to_block_holds_up_nobody(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    lamp = Lamp()
    front = fronts(lamp).greet(ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        front.acked(Request.SET_BACKEND_REQ_FD, None, theirs.fileno())
        front.set_up()
        front.start()
        # It is shared with whoever sent it.
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(4096))
        theirs.setblocking(True)
        bus.slot("d0").config_changed()
        front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))


def test_a_front_end_leaves_no_descriptors(bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path) -> None:
    fronts(Echo()).sock.close()
    made = bus.connectors["vm"]
    gc.disable()
    try:
        counts = []
        for _ in range(12):
            front = Front(tmp_path / "d0.sock").greet()
            front.set_up()
            front.acked(Request.SET_VRING_ERR, m.U64(0), front.kick)
            front.start()
            front.close()
            wait_until(lambda: made.describe()["peers"] == [])
            counts.append(len(os.listdir("/proc/self/fd")))
        assert counts[-1] - counts[1] < 5, counts
    finally:
        gc.enable()


class Never(vbus.Device):
    """Begins with what it is given, and is done with it when it is reset."""

    device_id = 0x7E0C
    queues = ("requests",)

    def __init__(self) -> None:
        self.begun = threading.Event()

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.begun.set()
        await asyncio.Event().wait()


def test_who_goes_while_a_queue_is_to_stop_is_parted_from(bus: vbus.Bus, fronts: Callable[..., Front]) -> None:
    device = Never()
    front = fronts(device).greet()
    front.set_up()
    front.start()
    front.submit(b"x")
    front.ring_kick()
    assert device.begun.wait(DEADLINE)
    front.say(Request.GET_VRING_BASE, m.VringState(0, 0))
    wait_until(lambda: bus.slot("d0").queues[0].paused)
    front.sock.close()
    wait_until(lambda: reasons(bus) == ["it closed the connection"])
    # Whoever comes next has the device.
    device.begun.clear()
    after = fronts().greet()
    after.set_up()
    after.start()
    after.submit(b"y")
    after.ring_kick()
    assert device.begun.wait(DEADLINE)


def test_config_space_of_another_driver_is_refused_by_name(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path
) -> None:
    first = fronts(Lamp()).greet()
    first.set_up()
    first.start()
    bus.connect(VhostUser("d0", tmp_path / "other.sock"), "other")
    second = Front(tmp_path / "other.sock")
    try:
        second.greet()
        second.say(Request.SET_CONFIG, m.Config(0, 0, b"\0"))
        departed = bus.connectors["other"].describe
        wait_until(lambda: bool(departed()["departed"]))
        assert "in use by vm: " in departed()["departed"][0]["reason"]
    finally:
        second.close()


# Served natively: by a worker, which hears kicks itself.


class Reader:
    """A front-end that reads a disk of 64 blocks."""

    def __init__(self, front: Front, path: Path, bits: int, base: int) -> None:
        path.write_bytes(b"".join(bytes([n]) * SECTOR for n in range(64)))
        self.front = front
        self.bits = bits
        self.read: list[int] = []
        """Blocks that were asked for and not looked at."""
        self.tokens: set[int] = set()
        self.begin(base, fresh=True)

    def begin(self, base: int, *, fresh: bool = False) -> None:
        self.front.set_up(bits=self.bits, base=base, fresh=fresh)
        self.front.start()

    @staticmethod
    def place(block: int) -> int:
        return DATA + 4096 + block * 1024

    def ask(self, *blocks: int) -> None:
        front = self.front
        for n in blocks:
            front.bytes[DATA + n * 16 : DATA + n * 16 + 16] = HEADER.pack(RequestType.IN, 0, n)
            front.bytes[self.place(n) : self.place(n) + SECTOR + 1] = b"\xff" * (SECTOR + 1)
            token = front.ring.add([(GUEST + DATA + n * 16, 16)], [(GUEST + self.place(n), SECTOR + 1)])
            assert token is not None
            self.tokens.add(token)
            self.read.append(n)
        front.ring.publish()
        front.ring_kick()

    def reap(self) -> int:
        """How many answers there are; each is of a request that had none."""
        done = self.front.ring.reap(8)
        for token, written in done:
            assert written == SECTOR + 1
            self.tokens.remove(token)
        return len(done)

    def look(self) -> int:
        """Wait for all answers, which are right; how many there were."""
        count = len(self.tokens)
        wait_until(lambda: self.reap() >= 0 and not self.tokens)
        for n in self.read:
            assert bytes(self.front.bytes[self.place(n) : self.place(n) + SECTOR + 1]) == bytes([n]) * SECTOR + b"\0"
        self.read.clear()
        return count


class Disk(Reader):
    """The disk as well, which an engine serves."""

    def __init__(self, bus: vbus.Bus, fronts: Callable[..., Front], path: Path, bits: int, base: int) -> None:
        if WITHOUT_IO_URING:
            pytest.skip(WITHOUT_IO_URING)
        path.touch()
        os.truncate(path, 64 * SECTOR)
        self.device = Blk(path=path, engine="native")
        front = fronts(self.device).greet(ProtocolFeature.LOG_SHMFD)
        assert bus.slot("d0").engine == "native"
        super().__init__(front, path, bits, base)


@LAYOUTS
def test_a_native_queue_that_is_stopped_under_load_loses_nothing(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, bits: int, base: int
) -> None:
    disk = Disk(bus, fronts, tmp_path / "disk.img", bits, base)
    front = disk.front
    taken = asked = 0
    for _ in range(150):
        # It is let go on, and stopped at once: the first takes effect later than the second is said.
        front.say(Request.SET_VRING_ENABLE, m.VringState(0, 1))
        front.say(Request.GET_VRING_BASE, m.VringState(0, 0))
        while not select.select([front.sock], [], [], 0)[0]:
            taken += disk.reap()
            while len(disk.tokens) < 3:
                disk.ask(asked % 64)
                asked += 1
        stopped = front.hear()
        taken += disk.reap()
        # Whatever was taken is answered. A request has two descriptors, of a packed ring's seven.
        wrapped = 0 if 2 * taken // 7 % 2 else 0x8000
        place = taken & 0xFFFF if bits == MY_FEATURES else (2 * taken % 7 | wrapped) * 0x1_0001
        assert stopped == m.VringState(0, place)
        disk.begin(place)
    taken += disk.look()
    assert taken == asked == disk.device.reads
    assert not bus.slot("d0").violations


KILLED = """
[bus]
name = "killed-front"
[device.d0]
type = "blk"
path = "disk.img"
engine = "{engine}"
[connector.d0]
type = "vhost-user"
device = "d0"
socket = "d0.sock"
"""


@LAYOUTS
@pytest.mark.parametrize("engine", ["native", "python"])
def test_a_process_that_is_killed_under_load_loses_nothing(tmp_path: Path, engine: str, bits: int, base: int) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(64 * SECTOR))
    (tmp_path / "bus.toml").write_text(KILLED.format(engine=engine))
    chance = random.Random(engine + str(bits))
    with (
        Served(tmp_path / "bus.toml", "killed-front") as served,
        contextlib.closing(Front(tmp_path / "d0.sock").greet(INFLIGHT)) as front,
    ):
        front.acked(Request.SET_FEATURES, m.U64(bits))
        front.ask_inflight(8)
        disk = Reader(front, tmp_path / "disk.img", bits, base)
        asked = answered = 0
        for _ in range(5):
            end = answered + chance.randrange(20, 100)
            while answered < end:
                while len(disk.tokens) < 3:
                    disk.ask(asked % 64)
                    asked += 1
                answered += disk.reap()
            served.end(signal.SIGKILL)
            front.hang_up()
            served.start()
            front.connect(tmp_path / "d0.sock")
            front.greet(INFLIGHT)
            front.give_inflight()
            # What a front-end knows of a ring that nobody stopped: where it began.
            disk.begin(base)
        assert answered + disk.look() == asked


@LAYOUTS
def test_a_native_queue_that_is_disabled_waits(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, bits: int, base: int
) -> None:
    disk = Disk(bus, fronts, tmp_path / "disk.img", bits, base)
    for n in range(20):
        disk.front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 0))
        disk.ask(n)
        # An answer that comes after whatever the kick could have done.
        disk.front.acked(Request.SET_VRING_CALL, m.U64(0), disk.front.call)
        assert disk.reap() == 0
        disk.front.acked(Request.SET_VRING_ENABLE, m.VringState(0, 1))
        disk.look()


@LAYOUTS
def test_pages_that_an_engine_writes_are_logged(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, bits: int, base: int
) -> None:
    disk = Disk(bus, fronts, tmp_path / "disk.img", bits, base)
    front = disk.front
    fd = os.memfd_create("log")
    size = (GUEST + SIZE) // 4096 // 8
    os.ftruncate(fd, size)
    log = memoryview(_core.Mapping(fd, size))
    front.say(Request.SET_LOG_BASE, m.Log(size, 0), fd)
    assert front.hear() == m.U64(0)
    disk.ask(1)
    disk.look()
    assert logged(log) == set()
    # A migration begins: the features change under a device that goes on.
    front.acked(Request.SET_FEATURES, m.U64(bits | 1 << m.LOG_ALL))
    disk.ask(9)
    disk.look()
    used = front.ring.desc if bits == PACKED else front.ring.device
    pages = {(GUEST + disk.place(9)) // 4096, used // 4096}
    wait_until(lambda: pages <= logged(log))
    assert (GUEST + DATA) // 4096 not in logged(log)
    # And it fails.
    front.acked(Request.SET_FEATURES, m.U64(bits))
    log[:] = bytes(size)
    disk.ask(17)
    disk.look()
    assert logged(log) == set()
    os.close(fd)


@LAYOUTS
def test_memory_that_is_truncated_under_an_engine_stops_no_worker(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, bits: int, base: int
) -> None:
    disk = Disk(bus, fronts, tmp_path / "disk.img", bits, base)
    front = disk.front
    disk.ask(1)
    disk.look()
    os.ftruncate(front.fd, 0)
    front.ring_kick()
    wait_until(lambda: bus.slot("d0").violations["region-lost"] == 1)
    front.sock.close()
    wait_until(lambda: bus.slot("d0").owner is None)
    again = fronts().greet(ProtocolFeature.LOG_SHMFD)
    disk.front = again
    disk.begin(base, fresh=True)
    disk.ask(2, 3)
    disk.look()
