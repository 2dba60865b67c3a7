"""The Python face of memory and rings: requests and their views, violations by name, lifetimes, limits."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from vbus import _core
from vbus.errors import Violation

BASE = 0x1000_0000
SIZE = 1 << 20
DATA = 0x8_0000  # offset of the buffers in the arena; the ring is at its start
NEXT, WRITE, INDIRECT = 1, 2, 4


def memfd(size: int) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    return fd


def mapping(size: int = SIZE, *, writable: bool = True) -> _core.Mapping:
    fd = memfd(size)
    try:
        return _core.Mapping(fd, size, writable=writable)
    finally:
        os.close(fd)


def mapped_files() -> int:
    """How often files of these tests are mapped into this process."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:test")


class Pair:
    """Both sides of a ring; the driver's memory is one arena, of which `data` is the part for buffers."""

    def __init__(
        self,
        size: int = 8,
        *,
        event_idx: bool = True,
        indirect: bool = True,
        packed: bool = False,
        in_order: bool = False,
        max_size: int = 256,
    ) -> None:
        self.arena = mapping()
        self.bytes = memoryview(self.arena)
        self.data = self.bytes[DATA:]
        self.memory = _core.Memory()
        self.memory.add(BASE, self.arena)
        self.to_device = _core.Signal.direct(_core.Doorbell(os.eventfd(0)))
        self.to_driver = _core.Signal.direct(_core.Doorbell(os.eventfd(0)))
        self.event_idx, self.indirect = event_idx, indirect
        self.packed, self.in_order = packed, in_order
        self.queue = _core.DeviceQueue(max_size)
        self.driver = self.new_driver(size)
        self.start()

    def new_driver(self, size: int = 8) -> _core.DriverQueue:
        return _core.DriverQueue(
            self.arena,
            0,
            BASE,
            size,
            event_idx=self.event_idx,
            indirect=self.indirect,
            packed=self.packed,
            in_order=self.in_order,
            signal=self.to_device,
        )

    def start(
        self,
        *,
        resume: int | None = None,
        inflight: tuple[_core.Mapping, int] | None = None,
        changed: dict[str, int] | None = None,
    ) -> None:
        driver = self.driver
        places = {"size": driver.size, "desc": driver.desc, "driver": driver.driver, "device": driver.device}
        places |= changed or {}
        self.queue.start(
            self.memory,
            places["size"],
            places["desc"],
            places["driver"],
            places["device"],
            event_idx=self.event_idx,
            indirect=self.indirect,
            signal=self.to_driver,
            packed=self.packed,
            in_order=self.in_order,
            resume=resume,
            inflight=inflight,
        )

    def add(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> int:
        """Buffers are (offset in data, size)."""
        token = self.driver.add(
            [(BASE + DATA + at, size) for at, size in readable], [(BASE + DATA + at, size) for at, size in writable]
        )
        assert token is not None
        self.driver.publish()
        return token

    def request(self, readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> _core.Request:
        self.add(readable, writable)
        (request,) = self.queue.take(10)
        return request

    def desc(self, index: int, address: int, size: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor as a driver without manners would."""
        struct.pack_into("<QIHH", self.bytes, index * 16, address, size, flags, following)

    def offer(self, *heads: int) -> None:
        """Make heads available from index 0 on."""
        at = self.driver.driver - BASE
        for place, head in enumerate(heads):
            struct.pack_into("<H", self.bytes, at + 4 + 2 * place, head)
        struct.pack_into("<H", self.bytes, at + 2, len(heads))


@pytest.fixture(params=list(itertools.product((True, False), repeat=3)), ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    event_idx, indirect, packed = request.param
    return Pair(event_idx=event_idx, indirect=indirect, packed=packed)


@pytest.fixture(params=list(itertools.product((True, False), repeat=2)), ids=str)
def split(request: pytest.FixtureRequest) -> Pair:
    event_idx, indirect = request.param
    return Pair(event_idx=event_idx, indirect=indirect)


def violation(call: Callable[[], object]) -> str:
    with pytest.raises(Violation) as caught:
        call()
    assert str(caught.value).startswith(caught.value.name)
    return caught.value.name


class TestMapping:
    def test_it_shares_the_file_and_outlives_the_descriptor(self) -> None:
        fd = memfd(SIZE)
        one, two = _core.Mapping(fd, SIZE), _core.Mapping(fd, mmap.PAGESIZE, mmap.PAGESIZE)
        os.close(fd)
        memoryview(one)[mmap.PAGESIZE + 3] = 7
        assert (two.size, memoryview(two)[3]) == (mmap.PAGESIZE, 7)

    def test_it_is_refused_when_the_file_does_not_hold_it(self) -> None:
        fd = memfd(mmap.PAGESIZE)
        for size, offset in [(0, 0), (mmap.PAGESIZE + 1, 0), (1, mmap.PAGESIZE), (1, 1 << 62)]:
            with pytest.raises(ValueError, match=r"."):
                _core.Mapping(fd, size, offset)
        with pytest.raises(OSError, match=r".") as caught:
            _core.Mapping(fd, 1, 1)
        assert caught.value.errno == errno.EINVAL
        os.close(fd)
        for closed in (fd, -1):
            with pytest.raises(OSError, match=r".") as caught:
                _core.Mapping(closed, 1)
            assert caught.value.errno == errno.EBADF

    def test_a_read_only_one_gives_read_only_bytes(self) -> None:
        one = mapping(writable=False)
        assert memoryview(one).readonly
        with pytest.raises(TypeError, match="read-write"):
            struct.pack_into("<I", one, 0, 1)
        with pytest.raises(ValueError, match="writable"):
            _core.DriverQueue(one, 0, BASE, 8, event_idx=True, indirect=True)

    def test_a_mapping_goes_with_its_last_user(self) -> None:
        before = mapped_files()
        one = mapping()
        view = memoryview(one)
        memory = _core.Memory()
        memory.add(0, one)
        del one
        assert mapped_files() == before + 1
        memory.clear()
        assert mapped_files() == before + 1
        del view
        assert mapped_files() == before


class TestMemory:
    def test_regions(self) -> None:
        memory = _core.Memory(max_regions=3, max_bytes=3 * SIZE)
        one = mapping()
        memory.add(SIZE, one)
        memory.add(0, one, SIZE // 2, writable=False)
        memory.add(1 << 40, one, 16, 32)
        assert memory.regions() == [(0, SIZE // 2, False), (SIZE, SIZE, True), (1 << 40, 32, True)]
        memory.remove(SIZE)
        assert memory.regions() == [(0, SIZE // 2, False), (1 << 40, 32, True)]
        memory.clear()
        assert memory.regions() == []

    def test_what_a_region_may_not_be(self) -> None:
        memory = _core.Memory(max_regions=2, max_bytes=2 * SIZE)
        one = mapping()
        assert violation(lambda: memory.add(0, one, 0, 0)) == "region-empty"
        assert violation(lambda: memory.add(0, one, SIZE)) == "region-empty"
        assert violation(lambda: memory.add((1 << 64) - 1, one, 0, 2)) == "region-wraps"
        assert violation(lambda: memory.add(0, one, 0, SIZE + 1)) == "region-outside-file"
        assert violation(lambda: memory.add(0, one, (1 << 64) - 1, 2)) == "region-outside-file"
        assert violation(lambda: memory.add(0, mapping(writable=False))) == "region-read-only"
        assert violation(lambda: memory.remove(0)) == "region-unknown"
        memory.add(SIZE, one)
        assert violation(lambda: memory.add(2 * SIZE - 1, one, 0, 1)) == "region-overlaps"
        assert violation(lambda: memory.add(0, mapping(2 * SIZE), 0, SIZE + 1)) == "region-overlaps"
        assert violation(lambda: memory.add(8 * SIZE, mapping(2 * SIZE))) == "too-much-memory"
        memory.add(0, one, 0, 1)
        assert violation(lambda: memory.add(8 * SIZE, one, 0, 1)) == "too-many-regions"

    def test_bytes_run_over_adjacent_regions(self) -> None:
        memory = _core.Memory()
        memory.add(SIZE, mapping())
        memory.add(2 * SIZE, mapping())
        memory.write(2 * SIZE - 2, b"abcd")
        assert memory.read(2 * SIZE - 3, 6) == b"\0abcd\0"
        memory.write(SIZE, memoryview(bytearray(b"xyz")))
        assert memory.read(SIZE, 3) == b"xyz"
        assert memory.read(SIZE, 0) == memory.read(0, 0) == b""

    def test_what_is_outside(self) -> None:
        memory = _core.Memory()
        memory.add(SIZE, mapping())
        memory.add(2 * SIZE, mapping(), writable=False)
        for address, size in [(0, 1), (SIZE - 1, 2), (3 * SIZE - 1, 2), (SIZE, 1 << 63), ((1 << 64) - 1, 2)]:
            with pytest.raises(Violation, match="address-outside-memory"):
                memory.read(address, size)
        assert violation(lambda: memory.write(0, b"x")) == "address-outside-memory"
        assert violation(lambda: memory.write(2 * SIZE - 1, b"xy")) == "region-read-only"
        assert memory.read(2 * SIZE - 1, 1) == b"\0", "nothing of it was written"


class TestRequests:
    def test_read_and_write_over_several_buffers(self, pair: Pair) -> None:
        pair.data[0:3] = b"abc"
        pair.data[10:15] = b"defgh"
        token = pair.add([(0, 3), (10, 5)], [(100, 2), (200, 4)])
        (request,) = pair.queue.take(1)
        assert (request.index, request.readable_total, request.writable_total) == (token, 8, 6)
        assert request.read(2) == b"ab"
        assert request.readable == 6
        buffer = bytearray(3)
        assert request.readinto(buffer) == 3
        assert buffer == b"cde"
        assert request.read(0) == b""
        assert request.read() == b"fgh"
        assert (request.read(), request.read(5), request.readinto(bytearray(4)), request.readable) == (b"", b"", 0, 0)

        assert request.write(b"1") == 1
        assert request.write(memoryview(b"x2345x")[1:-1]) == 4
        assert (request.written, request.writable) == (5, 1)
        assert violation(lambda: request.write(b"67")) == "buffer-too-small"
        assert (request.written, bytes(pair.data[200:204])) == (5, b"345\0")
        assert request.write(bytearray(b"6")) == 1
        assert request.write(b"") == 0
        assert (bytes(pair.data[100:102]), bytes(pair.data[200:204])) == (b"12", b"3456")

        assert not request.done
        assert pair.queue.in_flight == 1
        pair.queue.complete([request])
        assert request.done
        assert pair.queue.in_flight == 0
        assert pair.driver.reap(10) == [(token, 6)]
        assert pair.queue.counters == (1, 8, 6)

    def test_views_are_the_drivers_own_memory(self, pair: Pair) -> None:
        pair.data[0:3] = b"abc"
        request = pair.request([(0, 3), (8, 1)], [(16, 4), (32, 4)])
        readable, writable = request.views()
        assert [view.nbytes for view in readable] == [3, 1]
        assert [view.nbytes for view in writable] == [4, 4]
        assert all(view.readonly for view in readable)
        assert not any(view.readonly for view in writable)
        pair.data[1] = ord("X")
        assert bytes(readable[0]) == b"aXc", "the driver's later write shows"
        writable[1][1:3] = b"yo"
        assert bytes(pair.data[32:36]) == b"\0yo\0", "the device's write shows"
        with pytest.raises(TypeError):
            readable[0][0] = 1
        assert request.written == 0
        request.written = 7
        pair.queue.complete([request])
        assert pair.driver.reap(1) == [(request.index, 7)]

    def test_views_end_with_their_request(self, pair: Pair) -> None:
        request = pair.request([(0, 4)], [(8, 4)])
        readable, writable = request.views()
        part = writable[0][1:3]
        assert request.views() == (readable, writable), "the same ones"
        pair.queue.complete([request])
        with pytest.raises(ValueError, match="released memoryview"):
            bytes(readable[0])
        with pytest.raises(ValueError, match="released memoryview"):
            writable[0][0] = 1
        with pytest.raises(ValueError, match="completed"):
            request.views()
        pair.data[9:11] = b"on"
        assert bytes(part) == b"on", "what was made of one never faults"

    def test_numpy_works_on_views_without_a_copy(self, pair: Pair) -> None:
        request = pair.request([(0, 8)], [(16, 16), (40, 3)])
        readable, writable = request.views()
        samples = numpy.frombuffer(readable[0], dtype="<i2")
        assert not samples.flags.writeable
        struct.pack_into("<4h", pair.data, 0, 1, -2, 300, -400)
        assert samples.tolist() == [1, -2, 300, -400], "the driver's later write shows"
        with pytest.raises(ValueError, match="read-only"):
            samples[0] = 1

        scaled = numpy.frombuffer(writable[0], dtype="<f4")
        numpy.multiply(samples, 0.5, out=scaled, casting="unsafe")
        assert struct.unpack_from("<4f", pair.data, 16) == (0.5, -1.0, 150.0, -200.0), "in its place at once"
        scaled.view("<u4")[:] ^= 0x8000_0000
        assert struct.unpack_from("<4f", pair.data, 16) == (-0.5, 1.0, -150.0, 200.0)
        with pytest.raises(ValueError, match="multiple of element size"):
            numpy.frombuffer(writable[1], dtype="<i2")
        request.written = scaled.nbytes
        pair.queue.complete([request])
        assert pair.driver.reap(1) == [(request.index, 16)]
        struct.pack_into("<f", pair.data, 16, 7.0)
        assert scaled[0] == 7.0, "an array keeps its memory"

    def test_the_written_length_is_checked(self, pair: Pair) -> None:
        request = pair.request([], [(0, 4)])
        for wrong in (-1, 5, 1 << 64, -(1 << 70)):
            with pytest.raises(ValueError, match="0 to 4"):
                request.written = wrong
        with pytest.raises(TypeError):
            request.written = "4"  # type: ignore[assignment]
        request.written = 3
        assert request.writable == 1
        request.write(b"z")
        assert bytes(pair.data[0:4]) == b"\0\0\0z"
        request.written = 0
        assert request.writable == 4

    def test_views_outlive_their_region_their_queue_and_everything_else(self, pair: Pair) -> None:
        before = mapped_files()
        request = pair.request([(0, 4)], [(8, 4)])
        readable, writable = request.views()
        pair.queue.stop()
        pair.memory.remove(BASE)
        del request
        pair.data[0:4] = b"here"
        writable[0][:] = b"too!"
        assert (bytes(readable[0]), bytes(pair.data[8:12])) == (b"here", b"too!")
        pair.__dict__.clear()
        assert mapped_files() == before
        assert bytes(readable[0]) == b"here"
        del readable, writable
        assert mapped_files() == before - 1

    def test_a_request_keeps_its_memory(self) -> None:
        pair = Pair()
        pair.data[0:4] = b"kept"
        request = pair.request([(0, 4)], [(8, 4)])
        pair.memory.clear()
        pair.__dict__.clear()
        assert request.read() == b"kept"
        assert request.write(b"fine") == 4
        assert bytes(request.views()[1][0]) == b"fine"

    def test_readable_and_writable_may_be_the_same_memory(self, pair: Pair) -> None:
        pair.data[0:8] = b"01234567"
        request = pair.request([(0, 8)], [(2, 8)])
        request.write(request.views()[0][0])
        assert bytes(pair.data[0:10]) == b"0101234567"

    def test_what_is_no_buffer_is_refused(self, pair: Pair) -> None:
        request = pair.request([(0, 8)], [(8, 8)])
        with pytest.raises(BufferError):
            request.readinto(b"12345678")  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            request.write(memoryview(b"12345678")[::2])
        with pytest.raises(TypeError):
            request.write("text")  # type: ignore[arg-type]
        assert (request.readable, request.writable) == (8, 8)

    def test_a_buffer_that_reads_while_it_is_asked_for_its_bytes(self, pair: Pair) -> None:
        request = pair.request([(0, 8)], [(8, 8)])

        class Sly(bytearray):
            def __buffer__(self, flags: int) -> memoryview:
                request.read(6)
                request.write(b"123456")
                return memoryview(b"abcd")

        # Where Python calls it (3.12 and later), and where it does not, nothing is counted twice.
        calls: list[Callable[[], int]] = [lambda: request.write(Sly(b"abcd")), lambda: request.readinto(Sly(4))]
        for call in calls:
            with contextlib.suppress(Violation, BufferError):
                call()
            assert request.written + request.writable == 8
            assert 0 <= request.readable <= 8

    def test_a_completed_request_is_the_drivers_again(self, pair: Pair) -> None:
        request = pair.request([(0, 4)], [(8, 4)])
        pair.queue.complete([request, request])
        pair.queue.complete([request])
        assert pair.driver.reap(10) == [(request.index, 0)]
        assert pair.queue.counters == (1, 4, 0)
        with pytest.raises(ValueError, match="completed"):
            request.write(b"late")
        assert bytes(pair.data[8:12]) == bytes(4)


class TestTurn:
    """Requests that are served where they are taken, which share what was taken together."""

    def test_they_read_and_write_over_several_buffers(self, pair: Pair) -> None:
        pair.data[0:3], pair.data[10:15], pair.data[20:21] = b"abc", b"defgh", b"i"

        def handle(queue: object, request: _core.Request) -> None:
            assert (request.readable_total, request.writable_total) == (9, 6)
            assert request.read(2) == b"ab"
            rest = bytearray(4)
            assert request.readinto(rest) == 4
            assert (bytes(rest), request.readable) == (b"cdef", 3)
            assert request.read() == b"ghi"
            assert request.read() == b""
            assert request.write(b"1") == 1
            assert request.write(memoryview(b"x2345x")[1:-1]) == 4
            assert violation(lambda: request.write(b"67")) == "buffer-too-small"
            readable, writable = request.views()
            assert [bytes(view) for view in readable] == [b"abc", b"defgh", b"i"]
            assert [bytes(view) for view in writable] == [b"12", b"345\0"]
            with pytest.raises(TypeError):
                readable[0][0] = 1
            writable[1][3:4] = b"6"
            request.written = 6

        token = pair.add([(0, 3), (10, 5), (20, 1)], [(100, 2), (200, 4)])
        assert pair.queue.serve(handle, None, 8, batch=False)
        assert pair.driver.reap(10) == [(token, 6)]
        assert (bytes(pair.data[100:102]), bytes(pair.data[200:204])) == (b"12", b"3456")
        assert pair.queue.counters == (1, 9, 6)
        assert not pair.queue.serve(handle, None, 8, batch=False)

    @pytest.mark.parametrize("batch", [False, True])
    def test_one_that_is_kept_stays_what_it_is(self, pair: Pair, batch: bool) -> None:
        """Requests share objects only while nobody knows them: one that is kept, or its views, is its own."""
        pair.data[0:8] = b"01234567"
        kept: list[_core.Request] = []
        views: list[memoryview] = []
        seen: list[bytes] = []

        def handle(queue: object, request: _core.Request) -> None:
            assert (request.written, request.readable, request.done) == (0, 1, False)
            seen.append(request.read())
            if len(seen) % 3 == 0:
                kept.append(request)
            if len(seen) % 3 == 1:
                views.append(memoryview(request.views()[0][0])[:])
            request.written = request.writable_total

        def handle_batch(queue: object, requests: _core.Batch) -> None:
            assert requests[0] is requests[0]
            for request in requests:
                handle(queue, request)

        tokens = [pair.add([(at, 1)], []) for at in range(7)]
        assert pair.queue.serve(handle_batch if batch else handle, None, 8, batch=batch)
        assert pair.driver.reap(8) == [(token, 0) for token in tokens]
        assert seen == [b"0", b"1", b"2", b"3", b"4", b"5", b"6"]
        assert [request.index for request in kept] == [tokens[2], tokens[5]]
        assert all(request.done and request.readable == 0 for request in kept)
        assert [bytes(view) for view in views] == [b"0", b"3", b"6"]

    def test_those_behind_one_that_raises_wait_for_another_turn(self, pair: Pair) -> None:
        tokens = [pair.add([(at, 1)], []) for at in range(4)]
        seen: list[int] = []

        def handle(queue: object, request: _core.Request) -> None:
            seen.append(request.index)
            if len(seen) == 2:
                raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            pair.queue.serve(handle, None, 8, batch=False)
        assert pair.queue.in_flight == 3
        assert pair.queue.serve(handle, None, 0, batch=False), "they were taken before"
        assert seen == tokens
        assert pair.driver.reap(8) == [(token, 0) for token in (tokens[0], *tokens[2:])]

    def test_it_goes_on_while_nobody_waits(self, pair: Pair) -> None:
        """With a scheduler that has nothing else, all is served in one turn; with something, a share of it."""
        scheduler = _core.Scheduler()
        actor, other = scheduler.actor(), scheduler.actor()
        key, waiting = scheduler.key(actor, 3), scheduler.key(other, 7)
        scheduler.mark(key)
        assert scheduler.next(0) == (actor, key)
        seen: list[int] = []

        def serve() -> bool:
            for at in range(6):
                pair.add([(at, 1)], [])
            return pair.queue.serve(
                lambda queue, request: seen.append(request.index), None, 2, batch=False, others=(scheduler, actor, 3)
            )

        assert not serve()
        assert (len(seen), pair.queue.in_flight) == (6, 0)
        pair.driver.reap(8)
        scheduler.mark(waiting)
        assert serve()
        assert (len(seen), pair.queue.in_flight) == (8, 0), "others wait, even if they are less urgent"
        scheduler.close()

    def test_a_batch_that_nobody_looks_at_is_answered(self, pair: Pair) -> None:
        tokens = [pair.add([(at, 1)], []) for at in range(5)]
        sizes: list[int] = []
        assert pair.queue.serve(lambda queue, requests: sizes.append(len(requests)), None, 4, batch=True)
        assert sizes == [4]
        assert pair.driver.reap(8) == [(token, 0) for token in tokens[:4]]
        assert pair.queue.counters == (4, 4, 0)


class TestDeviceQueue:
    @pytest.mark.parametrize("size", [0, 3, 65536])
    def test_sizes_that_no_queue_has(self, size: int) -> None:
        with pytest.raises(ValueError, match="power of two"):
            _core.DeviceQueue(size)

    def test_it_runs_between_start_and_stop(self, pair: Pair) -> None:
        queue = pair.queue
        assert (queue.max_size, queue.size, queue.running) == (256, 8, True)
        queue.stop()
        assert (queue.size, queue.running, queue.in_flight, queue.take(1)) == (0, False, 0, [])
        queue.stop()

    def test_stopping_ends_the_requests(self, pair: Pair) -> None:
        pair.data[0:4] = b"left"
        request = pair.request([(0, 4)], [(8, 4)])
        pair.queue.stop()
        assert request.done
        assert request.read() == b"left"
        assert request.write(b"none") == 4
        assert bytes(pair.data[8:12]) == bytes(4), "memory of a driver that has reset its device is not touched"
        pair.queue.complete([request])
        pair.start()
        assert request.done
        pair.queue.complete([request])
        assert pair.driver.reap(10) == []
        assert pair.queue.counters == (0, 0, 0)

    def test_counters_outlive_a_restart(self, pair: Pair) -> None:
        pair.queue.complete([pair.request([(0, 4)], [])])
        pair.queue.stop()
        pair.driver = pair.new_driver()
        pair.start()
        pair.queue.complete([pair.request([(0, 2)], [])])
        assert pair.queue.counters == (2, 6, 0)

    def test_a_request_of_another_queue_is_a_mistake(self, pair: Pair) -> None:
        other = Pair()
        mine, theirs = pair.request([(0, 1)], []), other.request([(0, 1)], [])
        with pytest.raises(ValueError, match="another queue"):
            pair.queue.complete([mine, theirs])
        assert not mine.done
        assert not theirs.done
        assert pair.driver.reap(1) == []

    def test_the_order_and_the_limit(self, pair: Pair) -> None:
        tokens = [pair.add([(at, 1)], []) for at in range(8)]
        assert pair.driver.add([(BASE, 1)], []) is None, "full"
        assert pair.driver.free == 0
        assert pair.queue.take(0) == []
        requests = pair.queue.take(3)
        requests += pair.queue.take(100)
        assert [request.index for request in requests] == tokens
        assert pair.queue.take(1) == []
        pair.queue.complete(requests[::-1])
        assert pair.driver.reap(5) == [(token, 0) for token in tokens[:2:-1]]
        assert pair.driver.reap(5) == [(token, 0) for token in tokens[2::-1]]
        assert (pair.driver.free, pair.driver.outstanding) == (8, 0)

    def test_it_notifies_when_it_is_asked_to(self, pair: Pair) -> None:
        for at in range(4):
            pair.add([(at, 1)], [])
        assert pair.to_device.counters[0] == (1 if pair.event_idx else 4)
        one, two, three, four = pair.queue.take(10)
        pair.queue.complete([one, two])
        assert pair.to_driver.counters[0] == 1, "published together"
        pair.driver.reap(1)
        pair.queue.complete([three])
        assert pair.to_driver.counters[0] == 1, "the driver knows that there is more"
        pair.driver.reap(10)
        pair.queue.complete([four])
        assert pair.to_driver.counters[0] == 2

        told = pair.to_device.counters[0]
        pair.add([(0, 1)], [])
        assert pair.to_device.counters[0] == told, "the device did not find its ring empty yet"
        assert len(pair.queue.take(10)) == 1
        assert pair.queue.take(10) == []
        pair.add([(0, 1)], [])
        assert pair.to_device.counters[0] == told + 1

    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"size": 0}, "queue-size"),
            ({"size": 6}, "queue-size"),
            ({"size": 512}, "queue-size"),
            ({"size": 1 << 31}, "queue-size"),
            ({"desc": BASE + 8}, "ring-misaligned"),
            ({"driver": BASE + 1}, "ring-misaligned"),
            ({"device": BASE + 2}, "ring-misaligned"),
            ({"desc": 0}, "ring-outside-memory"),
            ({"driver": BASE + SIZE - 2}, "ring-outside-memory"),
            ({"device": (1 << 64) - 4}, "ring-outside-memory"),
        ],
        ids=str,
    )
    def test_rings_that_are_none(self, split: Pair, changed: dict[str, int], name: str) -> None:
        assert violation(lambda: split.start(changed=changed)) == name
        assert not split.queue.running
        split.start()
        assert split.queue.running

    @pytest.mark.parametrize(
        ("changed", "name"),
        [
            ({"size": 0}, "queue-size"),
            ({"size": 257}, "queue-size"),
            ({"size": 1 << 31}, "queue-size"),
            ({"desc": BASE + 8}, "ring-misaligned"),
            ({"driver": BASE + 2}, "ring-misaligned"),
            ({"device": BASE + 2}, "ring-misaligned"),
            ({"desc": 0}, "ring-outside-memory"),
            ({"driver": BASE + SIZE}, "ring-outside-memory"),
            ({"device": (1 << 64) - 4}, "ring-outside-memory"),
        ],
        ids=str,
    )
    def test_packed_rings_that_are_none(self, changed: dict[str, int], name: str) -> None:
        pair = Pair(packed=True)
        assert violation(lambda: pair.start(changed=changed)) == name
        assert not pair.queue.running
        pair.start(changed={"size": 6})
        assert pair.queue.size == 6

    @pytest.mark.parametrize("packed", [False, True])
    def test_in_order_what_is_completed_early_is_shown_late(self, packed: bool) -> None:
        pair = Pair(packed=packed, in_order=True)
        tokens = [pair.add([], [(at, 1)]) for at in range(4)]
        one, two, three, four = pair.queue.take(10)
        for request in (one, two, three, four):
            request.write(b"x")
        told = pair.to_driver.counters[0]
        pair.queue.complete([three, two])
        assert (three.done, pair.queue.in_flight, pair.driver.reap(10)) == (True, 4, [])
        assert pair.to_driver.counters[0] == told, "there is nothing to be told of"
        pair.queue.complete([one])
        assert (pair.queue.in_flight, pair.queue.counters) == (1, (3, 0, 3))
        assert pair.driver.reap(10) == [(token, 1) for token in tokens[:3]]
        pair.queue.complete([four])
        assert pair.driver.reap(10) == [(tokens[3], 1)]
        assert pair.to_driver.counters[0] == told + 2

    @pytest.mark.parametrize(
        ("descs", "heads", "name"),
        [
            ([(BASE, 4)], (8,), "descriptor-out-of-range"),
            ([(BASE, 4, NEXT, 9)], (0,), "descriptor-out-of-range"),
            ([(BASE, 4, NEXT, 0)], (0,), "descriptor-loop"),
            ([(BASE, 0)], (0,), "zero-length-descriptor"),
            ([(0, 4)], (0,), "address-outside-memory"),
            ([(BASE + SIZE - 2, 4, WRITE)], (0,), "address-outside-memory"),
            ([(0xF000, 4, WRITE)], (0,), "region-read-only"),
            ([(BASE, 4, WRITE | NEXT, 1), (BASE, 4)], (0,), "readable-after-writable"),
            ([(BASE, 4)], (0, 0), "descriptor-in-use"),
            ([(BASE, 4)], (0,) * 9, "index-jump"),
            ([(BASE + DATA, 8, INDIRECT)], (0,), "indirect-table-size"),
            ([(BASE + DATA, 16 * 9, INDIRECT)], (0,), "indirect-table-too-long"),
            ([(BASE + DATA, 16, INDIRECT | NEXT, 1)], (0,), "indirect-next"),
            ([(BASE + DATA, 16, INDIRECT)], (0,), "indirect-nested"),
            ([(BASE, 4, NEXT, 1), (BASE + DATA + 16, 16 * 8, INDIRECT)], (0,), "chain-too-long"),
        ],
        ids=str,
    )
    def test_chains_that_are_none(self, descs: list[tuple[int, ...]], heads: tuple[int, ...], name: str) -> None:
        pair = Pair()
        pair.memory.add(0xF000, mapping(mmap.PAGESIZE, writable=False), writable=False)
        # At DATA a table with a table in it, behind that one of eight buffers.
        struct.pack_into("<QIHH", pair.data, 0, BASE + DATA, 16, INDIRECT, 0)
        for entry in range(8):
            struct.pack_into("<QIHH", pair.data, 16 + 16 * entry, BASE, 4, NEXT if entry < 7 else 0, entry + 1)
        for index, desc in enumerate(descs):
            pair.desc(index, *desc)
        if name == "index-jump":
            pair.offer(*heads)
        else:
            pair.desc(7, BASE, 4)
            pair.offer(7, *heads)
            first = pair.queue.take(1 if name == "descriptor-in-use" else 10)
            assert first[0].index == 7, "the good ones come first"
            if name == "descriptor-in-use":
                assert [request.index for request in pair.queue.take(10)] == [0]
        assert violation(lambda: pair.queue.take(10)) == name
        assert pair.queue.take(10) == []
        assert pair.queue.running

    def test_an_indirect_descriptor_without_the_feature(self) -> None:
        pair = Pair(indirect=False)
        pair.desc(0, BASE + DATA, 16, INDIRECT)
        pair.offer(0)
        assert violation(lambda: pair.queue.take(1)) == "indirect-not-negotiated"

    def test_a_restart_brings_a_broken_queue_back(self) -> None:
        pair = Pair()
        pair.desc(0, 0, 4)
        pair.offer(0)
        assert violation(lambda: pair.queue.take(1)) == "address-outside-memory"
        pair.queue.stop()
        pair.driver = _core.DriverQueue(pair.arena, 0, BASE, 8, event_idx=True, indirect=True)
        pair.start()
        pair.data[0:2] = b"ok"
        assert pair.request([(0, 2)], []).read() == b"ok"

    def test_memory_that_goes_away_under_the_ring(self, pair: Pair) -> None:
        request = pair.request([(0, 4)], [(8, 4)])
        pair.memory.clear()
        assert violation(lambda: pair.queue.complete([request])) == "ring-outside-memory"
        assert pair.queue.take(1) == []
        assert pair.queue.counters == (0, 0, 0)

    def test_threads_may_share_a_queue(self) -> None:
        pair = Pair(256)
        total, numbers = 20_000, list[int]()
        lock = threading.Lock()
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                for request in pair.queue.take(7):
                    number = int.from_bytes(request.read(), "little")
                    request.write((number * 3).to_bytes(8, "little"))
                    with lock:
                        numbers.append(number)
                    pair.queue.complete([request])

        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            sent, asked, answered = 0, dict[int, tuple[int, int]](), 0
            places = list(range(0, 16 * 256, 16))
            while answered < total:
                while sent < total and places:
                    at = places.pop()
                    pair.data[at : at + 8] = sent.to_bytes(8, "little")
                    asked[pair.add([(at, 8)], [(at + 8, 8)])] = sent, at
                    sent += 1
                for token, written in pair.driver.reap(64):
                    number, at = asked.pop(token)
                    assert (written, int.from_bytes(pair.data[at + 8 : at + 16], "little")) == (8, number * 3)
                    places.append(at)
                    answered += 1
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert sorted(numbers) == list(range(total))
        assert pair.queue.counters == (total, 8 * total, 8 * total)


class TestDriverQueue:
    def test_where_it_lies(self) -> None:
        arena = mapping()
        queue = _core.DriverQueue(arena, 4096, BASE, 64, event_idx=True, indirect=True)
        assert queue.desc == BASE + 4096
        assert queue.desc + 64 * 16 <= queue.driver < queue.device < BASE + 4096 + queue.bytes_needed(64)
        assert (queue.size, queue.free, queue.outstanding) == (64, 64, 0)

    @pytest.mark.parametrize(
        ("offset", "address", "size"),
        [(8, BASE, 8), (SIZE - 64, BASE, 8), (0, BASE + 1, 8), (0, (1 << 64) - 16, 8), (0, BASE, 0), (0, BASE, 12)],
    )
    def test_where_it_cannot_lie(self, offset: int, address: int, size: int) -> None:
        with pytest.raises(ValueError, match=r"."):
            _core.DriverQueue(mapping(), offset, address, size, event_idx=True, indirect=True)

    def test_sizes_that_no_ring_has(self) -> None:
        for size in (0, 5, 65536):
            with pytest.raises(ValueError, match="power of two"):
                _core.DriverQueue.bytes_needed(size)

    def test_buffers_that_are_none(self, pair: Pair) -> None:
        for readable, writable in [
            ([], []),
            ([(BASE, 0)], []),
            ([], [(BASE, 1 << 32)]),
            ([(BASE, (1 << 32) - 1)], [(BASE, 1)]),
            ([(BASE, 1)] * 9, []),
        ]:
            with pytest.raises(ValueError, match=r"."):
                pair.driver.add(readable, writable)
        assert pair.driver.free == 8

    def test_an_indirect_request_takes_one_descriptor(self, pair: Pair) -> None:
        pair.add([(0, 1), (1, 1)], [(2, 1)])
        assert pair.driver.free == (7 if pair.indirect else 5)
        (request,) = pair.queue.take(1)
        assert (request.readable_total, request.writable_total) == (2, 1)

    def test_what_is_not_published_is_not_seen(self, pair: Pair) -> None:
        assert pair.driver.add([(BASE + DATA, 1)], []) is not None
        assert pair.queue.take(1) == []
        assert pair.driver.outstanding == 0
        pair.driver.publish()
        assert len(pair.queue.take(1)) == 1
        assert pair.driver.outstanding == 1

    @pytest.mark.parametrize(
        ("used", "index", "name"),
        [
            ((0, 5), 1, "used-length"),
            ((0, 4), 3, "used-index-jump"),
            ((0, 4), 65535, "used-index-jump"),
            ((5, 0), 1, "used-id-unknown"),
            ((1 << 31, 0), 1, "used-id-unknown"),
        ],
        ids=str,
    )
    def test_a_device_that_lies(self, used: tuple[int, int], index: int, name: str) -> None:
        pair = Pair()
        assert pair.add([(0, 4)], [(8, 4)]) == 0
        at = pair.driver.device - BASE
        struct.pack_into("<HHII", pair.bytes, at, 0, index, *used)
        assert violation(lambda: pair.driver.reap(10)) == name
        assert pair.driver.reap(10) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_ring_that_was_in_use_is_gone_on_with(packed: bool) -> None:
    pair = Pair(packed=packed)
    for n in range(1, 21):
        request = pair.request([(0, 4)], [])
        pair.queue.complete([request])
        assert len(pair.driver.reap(8)) == 1
        where = pair.queue.next
        assert where == pair.queue.unused
        assert where == ((n % 8 | (0 if n // 8 % 2 else 0x8000)) * 0x10001 if packed else n)
        pair.queue.stop()
        assert (pair.queue.next, pair.queue.unused) == (None, None)
        pair.start(resume=where)
    tokens = [pair.add([(0, 4)], []) for _ in range(4)]
    one, two, three = pair.queue.take(3)
    pair.queue.complete([one])
    where = pair.queue.unused
    pair.queue.complete([three])
    assert pair.queue.unused is None, "the second is in flight still, and the third is not"
    pair.queue.complete([two])
    assert pair.queue.unused == pair.queue.next != where
    assert [request.index for request in pair.queue.take(3)] == tokens[3:]

    with pytest.raises(OverflowError):
        pair.start(resume=1 << 32)
    with pytest.raises(Violation, match="ring-position"):
        pair.start(resume=(1 << 16) + 8)
    if not packed:
        pair.start(resume=5000)
        with pytest.raises(Violation, match="index-jump"):
            pair.queue.take(1)


class TestInflight:
    """What is in flight, kept in a region that outlives the queue: vhost-user's layouts."""

    def test_what_is_in_flight_is_given_to_the_next(self, split: Pair) -> None:
        pair = split
        size = _core.DeviceQueue.inflight_size(8)
        assert (size, _core.DeviceQueue.inflight_size(1)) == (192, 64)
        region = mapping(4096)
        at = memoryview(region)[size:]
        pair.start(inflight=(region, size))
        assert struct.unpack_from("<QHHHH", at) == (0, 1, 8, 0, 0)
        tokens = [pair.add([(0, 4)], [(8, 4)]) for _ in range(4)]
        first, second, third = pair.queue.take(3)
        second.write(b"done")
        pair.queue.complete([second])
        assert [at[16 + 16 * request.index] for request in (first, second, third)] == [1, 0, 1]

        # As if the process had ended: the next one knows the region and nothing else.
        pair.queue = _core.DeviceQueue(8)
        pair.start(resume=77, inflight=(region, size))
        assert pair.queue.next == 1
        requests = pair.queue.take(10)
        assert [request.index for request in requests] == [tokens[0], tokens[2], tokens[3]]
        assert [request.read() for request in requests] == [bytes(4)] * 3
        pair.queue.complete(requests)
        assert sorted(pair.driver.reap(10)) == sorted([(tokens[1], 4), *((tokens[n], 0) for n in (0, 2, 3))])
        assert (pair.queue.next, struct.unpack_from("<H", at, 14)) == (4, (4,))

    @pytest.mark.parametrize("event_idx", [True, False])
    @pytest.mark.parametrize("indirect", [True, False])
    def test_of_a_packed_ring(self, event_idx: bool, indirect: bool) -> None:
        pair = Pair(size=7, event_idx=event_idx, indirect=indirect, packed=True)
        size = _core.DeviceQueue.inflight_size(7, packed=True)
        assert (size, _core.DeviceQueue.inflight_size(1, packed=True)) == (256, 64)
        region = mapping(4096)
        at = memoryview(region)[size:]
        pair.start(inflight=(region, size))
        assert struct.unpack_from("<QHHHHHHBB", at) == (0, 1, 7, 0, 0, 0, 0, 1, 1)
        given: list[int] = []
        for turn in range(10):
            tokens = [pair.add([(0, 4)], [(8, 4)]) for _ in range(3)]
            first, second, third = pair.queue.take(3)
            second.write(b"done")
            pair.queue.complete([second])
            assert pair.queue.in_flight == 2
            del first, second, third

            # As if the process had ended: the next one knows the region and nothing else.
            pair.queue = _core.DeviceQueue(8)
            pair.start(resume=77, inflight=(region, size))
            requests = pair.queue.take(10)
            assert [(request.readable_total, request.writable_total) for request in requests] == [(4, 4)] * 2
            given += [request.index for request in requests]
            pair.queue.complete(requests)
            assert sorted(pair.driver.reap(10)) == sorted([(tokens[1], 4), (tokens[0], 0), (tokens[2], 0)])
            taken = 3 * (turn + 1) * (1 if indirect else 2)
            wrap = taken // 7 % 2 == 0
            assert pair.queue.next == (taken % 7 | wrap << 15) * 0x1_0001
            assert struct.unpack_from("<HHBB", at, 16) == (taken % 7, taken % 7, wrap, wrap)
        assert len(given) == 20

    def test_what_a_region_of_a_packed_ring_may_not_be(self) -> None:
        pair = Pair(packed=True)
        region = mapping(4096)
        pair.start(inflight=(region, 0))
        for place, number, name in [
            (0, 1, "inflight-features"),
            (8, 2, "inflight-version"),
            (10, 16, "inflight-size"),
            (14, 8, "inflight-next"),
            (18, 8, "inflight-used-index"),
            (34, 0, "inflight-loop"),
        ]:
            before = struct.unpack_from("<H", region, place)
            struct.pack_into("<H", region, place, number)
            assert violation(lambda: pair.start(inflight=(region, 0))) == name
            assert not pair.queue.running
            struct.pack_into("<H", region, place, *before)
        pair.start(inflight=(region, 0))

    def test_what_a_region_may_not_be(self, split: Pair) -> None:
        pair = split
        region = mapping(4096)
        for header, name in [
            ((1, 0, 2, 8, 0, 0), "inflight-version"),
            ((0, 0, 1, 16, 0, 0), "inflight-size"),
            ((1, 0, 1, 8, 0, 0), "inflight-features"),
            ((0, 0, 1, 8, 0, 9), "inflight-used-index"),
            ((0, 0, 1, 8, 8, 65535), "inflight-next"),
            ((0, 0, 1, 8, 0, 65534), "inflight-loop"),
        ]:
            struct.pack_into("<IIHHHH", region, 0, *header)
            assert violation(lambda: pair.start(inflight=(region, 0))) == name
            assert not pair.queue.running
        assert violation(lambda: pair.start(inflight=(region, 4096 - 128))) == "inflight-size"
        assert violation(lambda: pair.start(inflight=(region, 2))) == "inflight-misaligned"
        with pytest.raises(ValueError, match="writable"):
            pair.start(inflight=(mapping(4096, writable=False), 0))
        for size in (0, 32769):
            with pytest.raises(ValueError, match="32768"):
                _core.DeviceQueue.inflight_size(size)


class TestLog:
    """The log of written pages, which a hypervisor reads while it moves its guest."""

    def test_what_is_written_is_said(self, pair: Pair) -> None:
        log = mapping((BASE + SIZE) // 4096 // 8)
        bits = memoryview(log)

        def pages() -> set[int]:
            found = {8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}
            bits[:] = bytes(log.size)
            return found

        data, ring = (BASE + DATA) // 4096, pair.driver.device // 4096
        pair.memory.write(BASE + DATA, b"before")
        request = pair.request([(0, 4)], [(4096, 4), (8192, 4097)])
        pair.memory.log(log)
        assert pages() == set()
        pair.memory.write(BASE + DATA + 4095, b"xy")
        assert pages() == {data, data + 1}
        request.views()[1][1][4096] = 1
        assert pages() == set(), "not before it is completed"
        pair.queue.complete([request])
        assert pages() == {data + 1, data + 2, data + 3, ring}
        pair.memory.log(None)
        pair.queue.complete([pair.request([], [(4096, 4)])])
        assert pages() == set()

        pair.memory.log(log)
        request = pair.request([], [(4096, 4)])
        pair.queue.stop()
        pages()
        pair.queue.complete([request])
        assert pages() == set(), "a driver does not look at what it does not get back"

    def test_what_a_log_may_not_be(self, pair: Pair) -> None:
        request = pair.request([], [(0, 4)])
        pair.memory.log(mapping(4096))
        assert violation(lambda: pair.memory.write(BASE, b"x")) == "log-too-small"
        assert violation(lambda: pair.queue.complete([request])) == "log-too-small"
        assert pair.queue.take(1) == []
        assert violation(pair.start) == "log-too-small"
        with pytest.raises(ValueError, match="writable"):
            pair.memory.log(mapping(4096, writable=False))


class TestGuarded:
    """Files that their owner truncates while they are mapped here."""

    def guarded(self, size: int = SIZE) -> tuple[int, _core.Mapping]:
        fd = memfd(size)
        return fd, _core.Mapping(fd, size, guarded=True)

    def test_python_that_copies_through_a_view_lives(self) -> None:
        fd, one = self.guarded()
        view = memoryview(one)
        view[:4] = b"here"
        os.ftruncate(fd, 0)
        assert not one.lost
        reading, writing = os.pipe()
        with pytest.raises(OSError, match=r".") as caught:
            os.write(writing, view[:64])
        assert (caught.value.errno, one.lost) == (errno.EFAULT, False)
        assert bytes(view) == bytes(SIZE)
        assert one.lost
        view[:4] = b"gone"
        assert bytes(view[:4]) == b"gone"
        assert not mapping().lost
        for end in (fd, reading, writing):
            os.close(end)

    def test_a_write_through_a_view_lives_as_well(self) -> None:
        fd, one = self.guarded()
        os.ftruncate(fd, 4096)
        memoryview(one)[SIZE - 8 :] = b"too late"
        assert (one.lost, bytes(memoryview(one)[-8:])) == (True, b"too late")
        os.close(fd)

    def test_a_queue_says_what_happened(self) -> None:
        pair = Pair()
        first, second = self.guarded(), self.guarded()
        pair.memory.add(0, first[1])
        pair.memory.add(SIZE, second[1])
        request = pair.request([(0, 4)], [])
        pair.driver.add([(0, 4)], [(SIZE, 4)])
        pair.driver.publish()
        (other,) = pair.queue.take(1)
        assert other.read() == bytes(4)
        os.ftruncate(second[0], 0)
        other.write(b"lost")
        assert (first[1].lost, second[1].lost) == (False, True)
        assert violation(lambda: pair.queue.complete([other])) == "region-lost"
        assert pair.queue.take(1) == []
        assert violation(lambda: pair.memory.read(BASE, 1)) == "region-lost"
        assert violation(lambda: pair.memory.write(BASE, b"x")) == "region-lost"
        assert violation(pair.start) == "region-lost"
        assert request.read() == bytes(4)
        pair.memory.remove(SIZE)
        pair.start()
        assert pair.memory.read(0, 1) == b"\0"
        for fd, _ in (first, second):
            os.close(fd)

    def test_a_ring_that_is_truncated(self) -> None:
        pair = Pair()
        fd, one = self.guarded()
        pair.memory.clear()
        pair.memory.add(BASE, one)
        pair.start()
        os.ftruncate(fd, 0)
        assert violation(lambda: pair.queue.take(1)) == "region-lost"
        assert one.lost
        os.close(fd)

    @pytest.mark.parametrize("options", [[], ["-X", "faulthandler"]], ids=str)
    def test_another_bus_error_still_kills(self, options: list[str]) -> None:
        code = """if True:
            import mmap, os
            from vbus import _core

            fd = os.memfd_create("test")
            os.ftruncate(fd, 4096)
            one, other = _core.Mapping(fd, 4096, guarded=True), mmap.mmap(fd, 4096)
            os.ftruncate(fd, 0)
            assert bytes(memoryview(one)) == bytes(4096) and one.lost
            print("alive", flush=True)
            other[0]
        """
        child = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, timeout=60, check=False)
        assert (child.returncode, child.stdout) == (-signal.SIGBUS, b"alive\n")
        assert (b"Bus error" in child.stderr) == bool(options), "who was there before hears of it"
