"""Disks whose files fail, or hang: their drivers hear of it, and nobody else does."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, ClassVar

import pytest

import vbus
from conftest import make_connector, needs_io_uring, wait_until
from hanging_disk import sectors
from vbus.bus import Bus
from vbus.bus.slot import SETTLE_SECONDS
from vbus.devices import Blk
from vbus.errors import DriverError, UsageError
from vbus.proxy import Remote, drivers
from vbus.virtio import Status
from vbus.virtio.blk import HEADER, SECTOR, RequestType

LIMIT = 30
"""Seconds after which a test that waits has failed."""
SIZE = 8 << 20
FAR = 256 << 10
"""Bytes between two reads that the kernel does not make one of by reading ahead."""
MANY = 24
"""Reads that hang: more than the kernel gives threads by itself on a few CPUs."""
TESTS = Path(__file__).parent


needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="a file system of one's own takes root and /dev/fuse"
)
ENGINES = [pytest.param("native", marks=needs_io_uring), "python"]


class RawDisk(drivers.Blk):
    """Requests as the test says."""

    queue_count: ClassVar[int] = 1


# Files that hang.


class Hanging:
    """Two files; one hangs while it is told to."""

    def __init__(self, point: Path) -> None:
        point.mkdir()
        self.held, self.free = point / "held", point / "free"
        self._process = subprocess.Popen(
            [sys.executable, TESTS / "hanging_disk.py", point, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._heard().readline() == b"mounted\n"

    def _heard(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()
        while self._heard().readline() != b"told\n":
            pass

    def wait_held(self, count: int) -> None:
        """Until so many reads hang."""
        for _ in range(count):
            assert self._heard().readline() == b"held\n"

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(LIMIT)
        self._heard().close()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    files = Hanging(tmp_path / "hanging")
    yield files
    files.end()


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[[Bus], Remote]]:
    """Driver's sides; each in an area of its own."""
    with contextlib.ExitStack() as stack:
        addresses: dict[str, str] = {}

        def make(bus: Bus) -> Remote:
            if bus.name not in addresses:
                addresses[bus.name] = bus.connect(make_connector("process-direct", tmp_path)).address
            return stack.enter_context(vbus.attach(addresses[bus.name]))

        yield make


def read(disk: drivers.Blk, offset: int, size: int = 4096) -> Future[bytes]:
    return disk.queue(0).submit([HEADER.pack(RequestType.IN, 0, offset // SECTOR)], size + 1)


def hang(files: Hanging, disk: drivers.Blk) -> list[Future[bytes]]:
    """Have many reads of the held file under way."""
    files.tell("hold")
    reads = [read(disk, n * FAR) for n in range(MANY)]
    files.wait_held(MANY)
    return reads


def check_neighbours(*disks: drivers.Blk) -> None:
    """They are served, also where the kernel needs a thread for it."""
    for disk in disks:
        for n in range(4):
            assert disk.pread(4096, n * FAR) == sectors(n * FAR // SECTOR, 8)


def ended_by(future: Future[bytes]) -> int | None:
    error = future.exception(LIMIT)
    assert isinstance(error, DriverError)
    return error.errno


@needs_io_uring
@needs_fuse
def test_a_disk_that_hangs_does_not_hold_its_reset(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], hanging: Hanging
) -> None:
    bus = make_bus(workers=1)
    for name, path in (("disk0", hanging.held), ("disk1", hanging.free)):
        bus.plug(Blk(path=path, read_only=True, engine="native"), name)
    remote, other = attach(bus), attach(bus)
    disk, neighbour = remote.driver("disk0", RawDisk), remote.driver("disk1", RawDisk)
    slot = bus.slot("disk0")
    reads = hang(hanging, disk)
    check_neighbours(neighbour)
    arena = remote.connector.arena
    assert arena is not None
    taken = arena.in_use
    with pytest.raises(DriverError) as stuck:
        disk.close()
    assert stuck.value.errno == errno.ETIMEDOUT
    assert "does not end" in str(stuck.value)
    # Their buffers stay theirs: the kernel writes there when the file answers.
    assert [ended_by(future) for future in reads] == [errno.ESHUTDOWN] * MANY
    assert arena.in_use == taken
    assert slot.status & Status.DEVICE_NEEDS_RESET
    assert slot.violations == {"io-hangs": 1}
    assert f"has not ended within {SETTLE_SECONDS:g} s" in bus.show("disk0")["reasons"][-1]["reason"]
    with pytest.raises(DriverError) as busy:
        other.driver("disk0", RawDisk)
    assert busy.value.errno == errno.EBUSY
    check_neighbours(neighbour)
    assert not bus.slot("disk1").violations
    hanging.tell("go")
    # The reset that was asked for comes about by itself, and is one.
    assert wait_until(lambda: slot.status == 0, LIMIT)
    again = remote.driver("disk0", RawDisk)
    check_neighbours(again, neighbour)
    assert slot.violations == {"io-hangs": 1}


@needs_io_uring
@needs_fuse
def test_a_driver_that_leaves_a_hanging_disk_leaves_it_to_the_next_when_it_answers(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], hanging: Hanging
) -> None:
    bus = make_bus(workers=1)
    bus.plug(Blk(path=hanging.held, read_only=True, engine="native"), "disk0")
    slot = bus.slot("disk0")
    remote, other = attach(bus), attach(bus)
    reads = hang(hanging, remote.driver("disk0", RawDisk))
    remote.close()
    assert {ended_by(future) for future in reads} <= {errno.ESHUTDOWN, errno.ECONNRESET}
    assert wait_until(lambda: slot.violations["io-hangs"] == 1, LIMIT)
    with pytest.raises(DriverError) as busy:
        other.driver("disk0", RawDisk)
    assert busy.value.errno == errno.EBUSY
    hanging.tell("go")
    assert wait_until(lambda: slot.owner is None, LIMIT)
    check_neighbours(other.driver("disk0", RawDisk))


@needs_io_uring
@needs_fuse
def test_a_front_end_waits_for_the_end_of_what_hangs_and_goes_on_then(
    make_bus: Callable[..., Bus], tmp_path: Path, hanging: Hanging
) -> None:
    bus = make_bus(workers=1)
    bus.plug(Blk(path=hanging.held, read_only=True, engine="native"), "disk0")
    bus.connect(vbus.connectors.VhostUser("disk0", tmp_path / "disk.sock"))
    slot = bus.slot("disk0")
    with vbus.attach(f"vhost-user:{tmp_path / 'disk.sock'}", timeout=2, device_id=2, name="disk0") as remote:
        disk = remote.driver("disk0", RawDisk)
        reads = hang(hanging, disk)
        with pytest.raises(DriverError) as late:
            disk.close()
        assert late.value.errno == errno.ETIMEDOUT
        assert {ended_by(future) for future in reads} == {errno.ESHUTDOWN}
        assert wait_until(lambda: slot.violations == {"io-hangs": 1}, LIMIT)
        # It waits on: for longer than one try of a reset takes.
        with pytest.raises(DriverError):
            remote.driver("disk0", RawDisk)
        assert slot.status & Status.DEVICE_NEEDS_RESET
        hanging.tell("go")
        assert wait_until(lambda: slot.status == 0, LIMIT)
        check_neighbours(remote.driver("disk0", RawDisk))
    assert slot.violations == {"io-hangs": 1}


@needs_io_uring
@needs_fuse
def test_a_disk_that_hangs_is_unplugged_and_left_behind(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], hanging: Hanging
) -> None:
    bus = make_bus(workers=1)
    for name, path in (("disk0", hanging.held), ("disk1", hanging.free)):
        bus.plug(Blk(path=path, read_only=True, engine="native"), name)
    remote = attach(bus)
    disk, neighbour = remote.driver("disk0", RawDisk), remote.driver("disk1", RawDisk)
    reads = hang(hanging, disk)
    arena = remote.connector.arena
    assert arena is not None
    taken = arena.in_use
    assert not bus.unplug("disk0", timeout=1)
    assert [slot.name for slot in bus.slots()] == ["disk1"]
    check_neighbours(neighbour)
    # Its driver does not hear of it yet: the kernel is about to write into its buffers.
    assert (arena.in_use, [future.done() for future in reads]) == (taken, [False] * MANY)
    hanging.tell("go")
    assert {ended_by(future) for future in reads} == {errno.ENODEV}
    assert wait_until(lambda: [device.name for device in remote] == ["disk1"], LIMIT)
    # And its file is locked no more.
    assert wait_until(lambda: _plugs(bus, hanging.held, "disk2"), LIMIT)
    assert wait_until(lambda: "disk2" in [device.name for device in remote], LIMIT)
    check_neighbours(remote.driver("disk2", RawDisk), neighbour)


@needs_io_uring
@needs_fuse
def test_a_bus_stops_although_disks_of_it_hang(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], hanging: Hanging
) -> None:
    bus = make_bus(workers=1)
    bus.plug(Blk(path=hanging.held, read_only=True, engine="native"), "disk0")
    reads = hang(hanging, attach(bus).driver("disk0", RawDisk))
    assert not bus.unplug("disk0", surprise=True)
    assert bus.stop() == ["disk0"]
    assert {ended_by(future) for future in reads} <= {errno.ECONNRESET, errno.ENODEV}


def _plugs(bus: Bus, path: Path, name: str) -> bool:
    """Plug a disk; False while another has its file."""
    with contextlib.suppress(UsageError):
        bus.plug(Blk(path=path, read_only=False, engine="native"), name)
        return True
    return False


# Files that fail.


def status_of(future: Future[bytes]) -> int:
    return future.result(LIMIT)[-1]


def write(disk: drivers.Blk, offset: int, data: bytes) -> Future[bytes]:
    return disk.queue(0).submit([HEADER.pack(RequestType.OUT, 0, offset // SECTOR), data], 1)


def flush(disk: drivers.Blk) -> Future[bytes]:
    return disk.queue(0).submit([HEADER.pack(RequestType.FLUSH, 0, 0)], 1)


@needs_fuse
@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_that_fails_is_an_error_of_the_disk(
    make_bus: Callable[..., Bus],
    attach: Callable[[Bus], Remote],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    engine: str,
) -> None:
    files = Hanging(tmp_path / "dies")
    try:
        bus = make_bus()
        device = Blk(path=files.held, read_only=True, engine=engine)
        bus.plug(device, "disk0")
        disk = attach(bus).driver("disk0", RawDisk)
        assert read(disk, 0).result(LIMIT) == sectors(0, 8) + b"\0"
    finally:
        # Whoever asks from here on hears that nobody answers.
        files.end()
    answers = [read(disk, n * FAR).result(LIMIT) for n in (4, 8)]
    assert answers == [bytes(4096) + b"\1"] * 2, "nothing of a buffer is left as it was"
    assert (device.reads, device.io_errors) == (1, 2)
    assert wait_until(lambda: os.strerror(errno.ENOTCONN) in caplog.text, LIMIT)
    assert not bus.slot("disk0").violations
    bus.unplug("disk0")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("writeback", [True, False], ids=["writeback", "through"])
def test_a_write_beyond_what_a_file_may_be_is_an_error_of_the_disk(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], tmp_path: Path, engine: str, writeback: bool
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    bus = make_bus()
    device = Blk(path=image, engine=engine, writeback=writeback)
    bus.plug(device, "disk0")
    disk = attach(bus).driver("disk0", RawDisk)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Of this process: the file is longer already.
        resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, before[1]))
        assert status_of(write(disk, 0, b"a" * 4096)) == 0
        assert status_of(write(disk, 768 << 10, b"b" * 4096)) == 1
        # Half of it is written, and the whole is an error.
        assert status_of(write(disk, (512 << 10) - 4096, b"c" * 8192)) == 1
        assert status_of(flush(disk)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status_of(write(disk, 768 << 10, b"d" * 4096)) == 0
    assert (device.writes, device.flushes, device.io_errors) == (2, 1, 2)
    content = image.read_bytes()
    assert (content[:4096], content[768 << 10 : 772 << 10]) == (b"a" * 4096, b"d" * 4096)
    assert not bus.slot("disk0").violations


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes CAP_SYS_ADMIN: run as root")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_file_system_is_an_error_of_the_disk_until_there_is_room_again(
    make_bus: Callable[..., Bus],
    attach: Callable[[Bus], Remote],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    engine: str,
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)), check=True)
    bus = make_bus()
    try:
        image = folder / "disk.img"
        image.touch()
        os.truncate(image, 1 << 20)
        device = Blk(path=image, engine=engine, writeback=False)
        bus.plug(device, "disk0")
        disk = attach(bus).driver("disk0", RawDisk)
        assert [status_of(write(disk, n << 16, bytes([n]) * 65536)) for n in range(3)] == [0, 1, 1]
        assert read(disk, 0).result(LIMIT) == bytes(4096) + b"\0"
        assert status_of(flush(disk)) == 0
        subprocess.run(("mount", "-o", "remount,size=1m", str(folder)), check=True)
        assert status_of(write(disk, 1 << 16, b"1" * 65536)) == 0
        assert (device.writes, device.io_errors) == (2, 2)
        assert wait_until(lambda: os.strerror(errno.ENOSPC) in caplog.text, LIMIT)
        assert caplog.text.count(os.strerror(errno.ENOSPC)) == 1, "told once"
        assert not bus.slot("disk0").violations
        bus.unplug("disk0")
    finally:
        bus.stop()
        subprocess.run(("umount", str(folder)), check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_truncated_under_a_disk_reads_as_zeros_and_grows_again(
    make_bus: Callable[..., Bus], attach: Callable[[Bus], Remote], tmp_path: Path, engine: str
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * (1 << 20))
    bus = make_bus()
    device = Blk(path=image, engine=engine)
    bus.plug(device, "disk0")
    disk = attach(bus).driver("disk0", RawDisk)
    os.truncate(image, 6000)
    assert read(disk, 4096).result(LIMIT) == (b"x" * (6000 - 4096)).ljust(4096, b"\0") + b"\0"
    assert read(disk, 1 << 19).result(LIMIT) == bytes(4096) + b"\0"
    assert status_of(write(disk, 1 << 19, b"y" * 4096)) == 0
    assert image.stat().st_size == (1 << 19) + 4096
    assert (device.reads, device.writes, device.io_errors) == (2, 1, 0)
