"""The shared area from both of its sides: arena, header, handshake and link."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vbus import _core, msg
from vbus.errors import Violation
from vbus.shmem import handshake
from vbus.shmem.area import HEADER, LINK_SIZE, MAX_AREA, PRIORITIES, Area, Geometry, check_sealed, sealed_memfd
from vbus.shmem.arena import SMALLEST, Arena
from vbus.shmem.handshake import Greeting
from vbus.shmem.link import MAX_KEPT, Link

# The arena.


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1 << 17)), max_size=120), st.integers(0, 1 << 30))
def test_buffers_never_overlap_and_all_join_again(steps: list[tuple[bool, int]], seed: int) -> None:
    arena = Arena(1 << 20)
    chance = random.Random(seed)
    held: dict[int, int] = {}
    for give, size in steps:
        if give and held:
            old = chance.choice(list(held))
            arena.give_back(old)
            del held[old]
            continue
        taken = arena.take(size)
        if taken is None:
            continue
        offset, end = taken, taken + size
        assert 0 <= offset <= arena.size - size
        assert offset % min(4096, max(SMALLEST, 1 << (size - 1).bit_length())) == 0
        assert all(end <= other or other + length <= offset for other, length in held.items())
        held[offset] = size
    for offset in held:
        arena.give_back(offset)
    assert arena.in_use == 0
    assert arena.take(arena.size) == 0
    arena.close()


def test_a_buffer_is_given_back_once() -> None:
    arena = Arena(1 << 16)
    offset = arena.take(100)
    assert offset is not None
    arena.give_back(offset)
    with pytest.raises(KeyError):
        arena.give_back(offset)
    assert arena.take((1 << 16) + 1) is None
    arena.close()


# The area.


def test_a_header_is_believed_only_whole() -> None:
    good = Geometry.plan(64).pack()
    assert Geometry.unpack(good) == Geometry.plan(64)
    for at in range(0, HEADER.size, 4):
        (word,) = struct.unpack_from("<I", good, at)
        for value in {0, word ^ 1, word + 4096 & 0xFFFF_FFFF, 0xFFFF_FFFF} - {word}:
            bad = bytearray(good)
            struct.pack_into("<I", bad, at, value)
            with pytest.raises(Violation, match="area-"):
                Geometry.unpack(bytes(bad))


@settings(max_examples=200)
@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_no_header_raises_anything_but_a_violation(header: bytes) -> None:
    with pytest.raises(Violation):
        Geometry.unpack(header)


@pytest.mark.parametrize("sources", [1, 2, 1024, 1 << 16])
def test_the_parts_of_an_area_do_not_overlap(sources: int) -> None:
    plan = Geometry.plan(sources)
    parts = [(0, 4096), (plan.link_to_device, 128 + 65536), (plan.link_to_driver, 128 + 65536)]
    for places in (plan.events_to_device, plan.events_to_driver):
        parts += [
            (places.slots, PRIORITIES * sources * 16),
            (places.stats, sources * 32),
            (places.taken, sources * 4),
            (places.sleep, PRIORITIES * 64),
        ]
    parts.sort()
    for (start, size), (following, _) in itertools.pairwise(parts):
        assert start + size <= following
    assert parts[-1][0] + parts[-1][1] <= plan.total <= MAX_AREA
    assert plan.total % (64 * 1024) == 0


def test_an_area_opens_only_from_a_sealed_file_that_holds_it() -> None:
    area = Area.create("test", 16)
    Area.open(os.dup(area.fd)).close()
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.write(loose, os.pread(area.fd, area.geometry.total, 0))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Violation, match="memory-not-sealed"):
        Area.open(os.dup(loose))
    short = sealed_memfd("short", 8192)
    os.pwrite(short, os.pread(area.fd, 8192, 0), 0)
    with pytest.raises(Violation, match="area-geometry"):
        Area.open(os.dup(short))
    with pytest.raises(Violation, match="area-geometry"):
        Area.open(sealed_memfd("tiny", 100))
    with pytest.raises(Violation, match="area-magic"):
        Area.open(sealed_memfd("empty", 1 << 20))
    with pytest.raises(Violation, match="memory-too-large"):
        Area.open(sealed_memfd("large", MAX_AREA + 1))
    later = sealed_memfd("later", area.geometry.total)
    os.pwrite(later, os.pread(area.fd, 4096, 0), 0)
    os.pwrite(later, b"\x02", 8)
    with pytest.raises(Violation, match="area-version"):
        Area.open(later)
    os.close(short)
    os.close(loose)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    area.close()


def test_what_is_sealed_cannot_shrink() -> None:
    fd = sealed_memfd("sealed", 4096)
    assert check_sealed(fd, 4096) == 4096
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


# The socket.


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.setblocking(False)
    with left, right:
        yield left, right


def test_greetings_come_back_as_they_were() -> None:
    for greeting in (Greeting(1, 8), Greeting(0, 0, 13, "not a member"), Greeting(0, 0, 13, "x" * 2000)):
        back = Greeting.unpack(greeting.pack())
        assert (back.signal_kind, back.priorities, back.errno) == (
            greeting.signal_kind,
            greeting.priorities,
            greeting.errno,
        )
        assert greeting.text.startswith(back.text)
    for bad in (b"", b"vbus", b"x" * 24, Greeting(1, 8).pack()[:8] + b"\xff" * 20):
        with pytest.raises(Violation, match="greeting"):
            Greeting.unpack(bad)


def test_descriptors_beyond_what_is_allowed_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    fds = [os.eventfd(0) for _ in range(30)]
    before = len(os.listdir("/proc/self/fd"))
    handshake.send_packet(left, handshake.pack_cookie(7), fds[:1])
    packet, received = handshake.receive_packet(right, 1)
    assert handshake.read_cookie(packet) == 7
    assert len(received) == 1
    handshake.close_all(received)
    for count in (2, 30):
        handshake.send_packet(left, handshake.pack_cookie(7), fds[:count])
        with pytest.raises(Violation, match="too-many-descriptors"):
            handshake.receive_packet(right, 1)
    left.send(b"x" * 600)
    with pytest.raises(Violation, match="packet-too-long"):
        handshake.receive_packet(right, 1)
    with pytest.raises(BlockingIOError):
        handshake.receive_packet(right, 1)
    assert len(os.listdir("/proc/self/fd")) == before
    handshake.close_all(fds)


def test_only_a_cookie_is_a_cookie() -> None:
    for packet in (b"", b"fd\0\0", b"fd\0\0\x01\0\0\0\0", b"fx\0\0\x01\0\0\0"):
        assert handshake.read_cookie(packet) is None


# The link.


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    area = Area.create("test", 16)
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    bells = [_core.Doorbell(fd) for fd in fds]
    handshake.close_all(fds)
    yield (
        Link(area, device_side=True, bell_in=bells[0], bell_out=bells[1]),
        Link(area, device_side=False, bell_in=bells[1], bell_out=bells[0]),
    )
    area.close()


def message(number: int, size: int = 0) -> bytes:
    return msg.encode(msg.Frame(body=msg.ChannelEvent(number, bytes(size))))


def test_messages_arrive_in_order_and_ring(links: tuple[Link, Link]) -> None:
    device, driver = links
    for n in range(500):
        driver.send(message(n, n % 50))
        assert list(device.receive()) == [message(n, n % 50)]
        device.send(message(n))
        assert driver.bell_in.drain() >= 1
        assert list(driver.receive()) == [message(n)]


def test_what_finds_no_room_goes_out_when_the_reader_makes_some(links: tuple[Link, Link]) -> None:
    device, driver = links
    sent = [message(n, 1000) for n in range(200)]
    for each in sent:
        device.send(each)
    assert not device.is_idle
    arrived: list[bytes] = []
    for _ in range(50):
        arrived += driver.receive()
        # The reader rings back when it has made room; the sender's turn then sends what it kept.
        if device.bell_in.drain():
            list(device.receive())
    assert arrived == sent
    assert device.is_idle


def test_a_reader_that_never_reads_is_told_apart(links: tuple[Link, Link]) -> None:
    device, _ = links
    room = LINK_SIZE // len(message(0, 1000))
    for n in range(room + MAX_KEPT):
        device.send(message(n, 1000))
    with pytest.raises(Violation, match="link-not-read"):
        device.send(message(0, 1000))


def test_a_flood_is_read_a_budget_at_a_time(links: tuple[Link, Link]) -> None:
    device, driver = links
    for n in range(100):
        driver.send(message(n))
    first = list(device.receive())
    assert 0 < len(first) < 100
    assert device.more
    rest = list(device.receive())
    assert not device.more
    assert first + rest == [message(n) for n in range(100)]
