"""The rest of the block device: ranges, the cache's switch, topology, several queues; and its driver's side of them."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vbus
from conftest import Attached, wait_until
from test_device_blk import IOERR, LIMIT, MIB, OK, SECTOR, UNSUPP, Plain, ask, fails_with, header
from vbus.bus import Bus
from vbus.devices import Blk, ranges
from vbus.devices.blk import MAX_SEGMENTS, MAX_ZEROES
from vbus.errors import UsageError
from vbus.proxy import drivers
from vbus.virtio.blk import RANGE, RequestType

pytestmark = pytest.mark.usefixtures("both_engines")
KINDS = (RequestType.DISCARD, RequestType.WRITE_ZEROES, RequestType.SECURE_ERASE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of a mebibyte of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


def used(path: Path) -> int:
    """Bytes that a file takes."""
    return path.stat().st_blocks * 512


# Ranges.


def test_zeros_are_where_they_were_asked_for_and_nowhere_else(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    oracle = bytearray(image.read_bytes())
    for offset, length, unmap in (
        (0, 512, True),
        (4096, 65536, True),
        (300 * 512, 77 * 512, False),
        (MIB - 512, 512, False),
    ):
        disk.write_zeroes(length, offset, unmap=unmap)
        oracle[offset : offset + length] = bytes(length)
        assert disk.pread(MIB, 0) == oracle
    assert image.read_bytes() == oracle
    assert device.zeroes == 4


def test_discarded_blocks_are_given_back(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    before, data = used(image), image.read_bytes()
    disk.discard(MIB // 2, MIB // 4)
    disk.flush()
    assert used(image) <= before - MIB // 2 + 8192
    assert image.stat().st_size == MIB
    assert disk.pread(MIB // 4, 0) == data[: MIB // 4]
    assert disk.pread(MIB // 4, 3 * MIB // 4) == data[3 * MIB // 4 :]
    assert device.discards == 1


def test_a_disk_in_memory_can_be_erased(attached: Attached) -> None:
    device = Blk(memory="1 MiB")
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    disk.pwrite(b"secret" * 1000, 8192)
    disk.secure_erase(8192, 8192)
    assert disk.pread(6000, 8192) == bytes(6000)
    assert device.erasures == 1


def test_a_file_promises_no_erasure(attached: Attached, image: Path) -> None:
    bus, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    assert not disk.has("SECURE_ERASE")
    fails_with(95, disk.secure_erase, 512, 0)
    assert "SECURE_ERASE" not in bus.describe()[0]["features"]["available"]


def test_what_was_not_negotiated_is_unknown(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", Plain)
    for kind in KINDS:
        assert ask(disk, [header(kind), RANGE.pack(0, 1, 0)], 1) == UNSUPP
    fails_with(95, disk.discard, 512, 0)
    fails_with(95, disk.write_zeroes, 512, 0)
    assert (device.discards, device.zeroes, device.refused) == (0, 0, 3)


def test_a_read_only_disk_keeps_its_ranges(attached: Attached, image: Path) -> None:
    before = image.read_bytes()
    bus, remote = attached(disk0=Blk(path=image, read_only=True))
    disk = remote.driver("disk0", drivers.Blk)
    assert not {"DISCARD", "WRITE_ZEROES", "SECURE_ERASE"} & set(bus.describe()[0]["features"]["available"])
    fails_with(95, disk.discard, 512, 0)
    assert ask(disk, [header(RequestType.WRITE_ZEROES), RANGE.pack(0, 1, 0)], 1) == UNSUPP
    assert image.read_bytes() == before


def test_ranges_that_make_no_sense_change_nothing(attached: Attached) -> None:
    device = Blk(memory="1 MiB")
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    data = random.Random(3).randbytes(MIB)
    disk.pwrite(data, 0)
    end = MIB // SECTOR
    good = RANGE.pack(0, 1, 0)
    for kind in KINDS:
        for bad in (b"", good[:-1], good + b"x", good * (MAX_SEGMENTS + 1)):
            assert ask(disk, [header(kind), bad] if bad else [header(kind)], 1) == IOERR
        for sector, sectors in ((end, 1), (end - 1, 2), (1 << 63, 1), ((1 << 64) - 1, 2), (0, (1 << 32) - 1)):
            # The first is good: even so nothing of it is done.
            assert ask(disk, [header(kind), good, RANGE.pack(sector, sectors, 0)], 1) == IOERR
        for flags in (2, 1 << 31, 3):
            assert ask(disk, [header(kind), RANGE.pack(0, 1, flags)], 1) == UNSUPP
    for kind in (RequestType.DISCARD, RequestType.SECURE_ERASE):
        assert ask(disk, [header(kind), RANGE.pack(0, 1, 1)], 1) == UNSUPP
    assert disk.pread(MIB, 0) == data
    assert bus.describe()[0]["violations"] == {}
    assert device.refused == 3 * (4 + 5 + 3) + 2
    for kind in KINDS:
        # Nothing is a range too.
        assert ask(disk, [header(kind), RANGE.pack(end, 0, 0)], 1) == OK
    assert disk.pread(MIB, 0) == data


def test_ranges_are_aligned_to_blocks(attached: Attached) -> None:
    _, remote = attached(disk0=Blk(memory="1 MiB", block_size=4096))
    disk = remote.driver("disk0", drivers.Blk)
    for kind in (RequestType.DISCARD, RequestType.SECURE_ERASE):
        assert ask(disk, [header(kind), RANGE.pack(8, 8, 0)], 1) == OK
        assert ask(disk, [header(kind), RANGE.pack(4, 8, 0)], 1) == IOERR
        assert ask(disk, [header(kind), RANGE.pack(8, 4, 0)], 1) == IOERR
    assert ask(disk, [header(RequestType.WRITE_ZEROES), RANGE.pack(3, 1, 0)], 1) == OK
    fails_with(22, disk.discard, 512, 0)
    fails_with(22, disk.write_zeroes, 4096, 512)


def test_long_ranges_are_split_into_what_the_device_takes(attached: Attached) -> None:
    size = 3 * MAX_ZEROES + 4096
    device = Blk(memory=size)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    for place in (0, size // 2, size - 6):
        disk.pwrite(b"abcdef", place)
    disk.write_zeroes(size, 0)
    assert all(disk.pread(6, place) == bytes(6) for place in (0, size // 2, size - 6))
    assert device.zeroes == 4
    disk.discard(size, 0)
    fails_with(28, disk.discard, size + 512, 0)


def test_a_file_system_that_cannot_make_holes_gets_zeros(
    attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(ranges, "_fallocate", cannot)
    _, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    oracle = bytearray(image.read_bytes())
    for unmap in (False, True):
        disk.write_zeroes(200 * 512, 512, unmap=unmap)
    oracle[512 : 512 + 200 * 512] = bytes(200 * 512)
    disk.discard(512, 0)
    assert disk.pread(MIB, 0) == oracle


def test_a_disk_that_fails_says_so(attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    with monkeypatch.context() as patch:
        patch.setattr(ranges, "_fallocate", fails)
        fails_with(5, disk.write_zeroes, 512, 0)
        fails_with(5, disk.discard, 512, 0)
    assert device.io_errors == 2
    disk.write_zeroes(512, 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "zero", "unmap", "discard", "read"]), st.integers(0, 255), st.integers(1, 64)
        ),
        min_size=1,
        max_size=30,
    )
)
def test_random_work_gives_what_a_bytearray_gives(
    steps: list[tuple[str, int, int]], tmp_path: Path, make_bus: Any
) -> None:
    size = 256 * SECTOR
    path = tmp_path / "random.img"
    path.write_bytes(bytes(size))
    bus = make_bus("random")
    bus.plug(Blk(path=path), "disk0")
    connector = bus.connect(vbus.connectors.Process())
    oracle = bytearray(size)
    known = bytearray(b"\1" * 256)
    with vbus.attach(connector.address) as remote:
        disk = remote.driver("disk0", drivers.Blk)
        for n, (what, sector, sectors) in enumerate(steps):
            sectors = min(sectors, 256 - sector)
            at, length = sector * SECTOR, sectors * SECTOR
            if what == "write":
                data = struct.pack("<I", n) * (length // 4)
                disk.pwrite(data, at)
                oracle[at : at + length] = data
                known[sector : sector + sectors] = b"\1" * sectors
            elif what in ("zero", "unmap"):
                disk.write_zeroes(length, at, unmap=what == "unmap")
                oracle[at : at + length] = bytes(length)
                known[sector : sector + sectors] = b"\1" * sectors
            elif what == "discard":
                disk.discard(length, at)
                known[sector : sector + sectors] = bytes(sectors)
            found = disk.pread(size, 0)
            for number in range(256):
                if known[number]:
                    assert (
                        found[number * SECTOR : (number + 1) * SECTOR]
                        == oracle[number * SECTOR : (number + 1) * SECTOR]
                    )
    bus.stop()


@pytest.mark.skipif(
    shutil.which("mkfs.ext4", path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None, reason="no e2fsprogs"
)
def test_a_file_system_stays_whole_when_its_free_blocks_are_given_back(attached: Attached, tmp_path: Path) -> None:
    env = os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    image, tree = tmp_path / "fs.img", tmp_path / "tree"
    tree.mkdir()
    for n in range(20):
        (tree / f"file{n}").write_bytes(random.Random(n).randbytes(50_000 + n))
    image.write_bytes(random.Random(0).randbytes(16 * MIB))
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-b", "4096", "-d", tree, image], check=True, env=env)
    before = used(image)
    listed = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True, env=env).stdout
    free = [
        tuple(map(int, (part.split("-") * 2)[:2]))
        for line in listed.splitlines()
        if line.startswith("  Free blocks: ")
        for part in line.removeprefix("  Free blocks: ").split(", ")
        if part
    ]
    assert free
    _, remote = attached(disk0=Blk(path=image, block_size=4096))
    disk = remote.driver("disk0", drivers.Blk)
    for first, last in free:
        disk.discard((last - first + 1) * 4096, first * 4096)
    disk.flush()
    assert used(image) < before - sum(last - first for first, last in free) * 4096 // 2
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, env=env, check=False)
    assert checked.returncode == 0, checked.stdout
    for n in range(20):
        dumped = tmp_path / "dumped"
        subprocess.run(["debugfs", "-R", f"dump /file{n} {dumped}", image], check=True, capture_output=True, env=env)
        assert dumped.read_bytes() == random.Random(n).randbytes(50_000 + n)


# The cache's switch.


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With which flags the disk was written."""
    seen: list[int] = []
    real: Callable[..., int] = os.pwritev

    def pwritev(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        seen.append(flags)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", pwritev)
    return seen


def test_a_driver_switches_the_cache_and_its_choice_ends_with_it(
    attached: Attached, image: Path, flags: list[int]
) -> None:
    device = Blk(engine="python", path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    assert disk.writeback
    disk.pwrite(bytes(512), 0)
    disk.writeback = False
    assert not disk.writeback
    assert device.writeback is False
    disk.pwrite(bytes(512), 0)
    disk.writeback = True
    disk.pwrite(bytes(512), 0)
    assert flags == [0, os.RWF_DSYNC, 0]
    disk.writeback = False
    disk.close()
    assert wait_until(lambda: device.writeback is True)


def test_an_operator_switches_the_cache(attached: Attached, image: Path, flags: list[int]) -> None:
    bus, remote = attached(disk0=Blk(engine="python", path=image, writeback=False))
    disk = remote.driver("disk0", drivers.Blk)
    assert not disk.writeback
    disk.pwrite(bytes(512), 0)
    assert bus.set("disk0", "writeback", "on") is True
    assert wait_until(lambda: disk.writeback)
    disk.pwrite(bytes(512), 0)
    assert flags == [os.RWF_DSYNC, 0]


def test_a_driver_without_the_switch_keeps_what_flush_promises(
    attached: Attached, image: Path, flags: list[int]
) -> None:
    _, remote = attached(disk0=Blk(engine="python", path=image, writeback=False))
    disk = remote.driver("disk0", Plain)
    assert disk.writeback
    with pytest.raises(vbus.DriverError) as refused:
        disk.writeback = True
    assert refused.value.errno == 95
    disk.pwrite(bytes(512), 0)
    assert flags == [0]


def test_only_the_switch_may_be_written(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    place = Blk.Config.offset_of("writeback")
    for offset, data in ((0, bytes(8)), (place - 1, b"\0\0"), (place, b"\0\0"), (place + 1, b"\0")):
        with pytest.raises(vbus.DriverError):
            disk.device.write_config(offset, data)
    disk.device.write_config(place, b"\x07")
    assert wait_until(lambda: disk.config.to_bytes()[place] == 1)
    assert device.capacity == MIB // SECTOR


# Topology, queues.


def test_what_suits_the_disk_is_said(attached: Attached, image: Path) -> None:
    _, remote = attached(disk0=Blk(path=image), disk1=Blk(memory="1 MiB", block_size=4096))
    disk = remote.driver("disk0", drivers.Blk)
    assert disk.topology == drivers.blk.Topology(512, 0, image.stat().st_blksize, 0)
    other = remote.driver("disk1", drivers.Blk).topology
    assert other is not None
    assert (other.physical_block, other.min_io) == (4096, 4096)
    assert remote.driver("disk0", Plain).topology is None


@pytest.mark.parametrize("queues", [2, 8])
def test_several_queues_serve_one_disk(attached: Attached, image: Path, queues: int) -> None:
    bus, remote = attached(disk0=Blk(path=image, queues=queues))
    disk = remote.driver("disk0", drivers.Blk)
    assert disk.has("MQ")
    assert len(disk.device.queues) == queues
    assert [queue["name"] for queue in bus.describe()[0]["queues"]] == [f"requests{n}" for n in range(queues)]
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            chance = random.Random(number)
            for _ in range(50):
                at = (number * 16 + chance.randrange(16)) * 4096
                data = chance.randbytes(4096)
                disk.pwrite(data, at)
                assert disk.pread(4096, at) == data
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for n in range(queues):
        assert len(disk.queue(n).submit([header(RequestType.IN)], 513).result(LIMIT)) == 513
    assert all(row["requests"] > 0 for row in bus.stat())


def test_a_driver_that_knows_one_queue_gets_one(attached: Attached, image: Path) -> None:
    _, remote = attached(disk0=Blk(path=image, queues=4))
    disk = remote.driver("disk0", Plain)
    assert len(disk.device.queues) == 1
    assert len(disk.pread(MIB, 0)) == MIB


@pytest.mark.parametrize("queues", [0, 9, -1])
def test_too_many_queues_are_refused(image: Path, queues: int) -> None:
    with pytest.raises(UsageError, match="1 to 8"):
        Blk(path=image, queues=queues)


class Odd(drivers.Blk):
    """A driver that believes nothing of what it is told about limits."""

    wanted: ClassVar[tuple[str, ...]] = drivers.Blk.wanted


def test_limits_of_zero_do_not_stop_the_driver(attached: Attached) -> None:
    device = Blk(memory="1 MiB")
    device.config.max_write_zeroes_sectors = 0
    device.config.max_write_zeroes_seg = 0
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", Odd)
    # The device, which lies about itself, refuses; the driver does not hang on it.
    fails_with(5, disk.write_zeroes, 4096, 0)


# A real block device, where the machine lends one.


def _loop_device(image: Path) -> str | None:
    """A loop device over a file; None where there are none."""
    losetup = shutil.which("losetup", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if losetup is None or os.geteuid() != 0:
        return None
    done = subprocess.run([losetup, "--find", "--show", image], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def test_a_block_device_or_its_calls(
    image: Path, make_bus: Callable[..., Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = _loop_device(image)
    calls: list[tuple[int, bytes]] = []

    def asked(fd: int, request: int, data: bytes) -> bytes:
        calls.append((request, data))
        return data

    if loop is None:
        # No loop devices here: what the kernel would be asked is compared instead.
        monkeypatch.setattr(ranges, "is_block_device", lambda fd: True)
        monkeypatch.setattr(fcntl, "ioctl", asked)
        with image.open("r+b") as file:
            ranges.discard(file.fileno(), 4096, 8192)
            ranges.make_zeros(file.fileno(), 0, 4096, unmap=False, write=os.pwritev)
            assert ranges.topology(file.fileno(), 512) == (0, 0, 1, 0)
        assert calls[:2] == [
            (ranges.BLKDISCARD, struct.pack("=QQ", 4096, 8192)),
            (ranges.BLKZEROOUT, struct.pack("=QQ", 0, 4096)),
        ]
        return
    try:
        bus = make_bus()
        bus.plug(Blk(path=loop), "disk0")
        connector = bus.connect(vbus.connectors.Process())
        with vbus.attach(connector.address) as remote:
            disk = remote.driver("disk0", drivers.Blk)
            disk.write_zeroes(4096, 4096, unmap=False)
            disk.write_zeroes(4096, 8192)
            disk.discard(4096, 65536)
            disk.flush()
            assert disk.pread(8192, 4096) == bytes(8192)
            assert disk.topology is not None
            disk.close()
        bus.stop()
    finally:
        subprocess.run(
            ["losetup", "--detach", loop], check=True, env=os.environ | {"PATH": os.environ["PATH"] + ":/usr/sbin"}
        )
