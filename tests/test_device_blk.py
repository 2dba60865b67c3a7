"""The block device and its driver, over every connector: real file systems, random I/O, every status, resizing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from conftest import Attached, Leftovers, wait_until
from vbus import virtio
from vbus.bus import Bus, Device, Queue, Request
from vbus.devices import Blk
from vbus.errors import DriverError, UsageError
from vbus.proxy import drivers
from vbus.virtio.blk import HEADER, RequestStatus, RequestType

pytestmark = pytest.mark.usefixtures("both_engines")
LIMIT = 20
"""Seconds after which a test that waits has failed."""
MIB = 1 << 20
SECTOR = 512
OK, IOERR, UNSUPP = (bytes([status]) for status in (RequestStatus.OK, RequestStatus.IOERR, RequestStatus.UNSUPP))


class Plain(drivers.Blk):
    """A driver that knows reads, writes and flushes."""

    wanted: ClassVar[tuple[str, ...]] = ("RO", "BLK_SIZE", "FLUSH")


class WriteThrough(drivers.Blk):
    """A driver that cannot flush."""

    wanted: ClassVar[tuple[str, ...]] = ("RO", "BLK_SIZE")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of a mebibyte of random bytes."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


def header(kind: int, sector: int = 0) -> bytes:
    return HEADER.pack(kind, 0, sector)


def ask(disk: drivers.Blk, readable: Sequence[bytes], writable: int) -> bytes:
    """What the device answers to a request as it stands."""
    return disk.queue(0).submit(readable, writable).result(LIMIT)


def fails_with(number: int, function: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(DriverError) as failed:
        function(*args)
    assert failed.value.errno == number, failed.value


# Data.


def test_random_io_gives_what_a_bytearray_gives(attached: Attached, image: Path) -> None:
    _, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    oracle = bytearray(image.read_bytes())
    rng = random.Random(2)
    for step in range(400):
        offset = rng.choice([rng.randrange(MIB), rng.randrange(MIB // SECTOR) * SECTOR, MIB - rng.randrange(1, 2000)])
        length = min(rng.choice([1, rng.randrange(2000), SECTOR, 4096, rng.randrange(200_000)]), MIB - offset)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            assert disk.pwrite(data, offset) == length
            oracle[offset : offset + length] = data
        else:
            assert disk.pread(length, offset) == oracle[offset : offset + length], f"step {step}"
    assert disk.pread(MIB, 0) == oracle
    disk.flush()
    assert image.read_bytes() == oracle


@pytest.mark.parametrize("block_size", [512, 4096])
def test_random_io_in_memory(attached: Attached, block_size: int) -> None:
    size = 64 * 4096
    _, remote = attached(disk0=Blk(memory=size, block_size=block_size))
    disk = remote.driver("disk0", drivers.Blk)
    assert disk.block_size == block_size
    oracle = bytearray(size)
    rng = random.Random(block_size)
    for _ in range(200):
        offset = rng.randrange(size)
        data = rng.randbytes(rng.randrange(min(9000, size - offset) + 1))
        disk.pwrite(data, offset)
        oracle[offset : offset + len(data)] = data
    assert disk.pread(size, 0) == oracle


def test_many_requests_at_once(attached: Attached, image: Path) -> None:
    _, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    data = image.read_bytes()
    reads = [(disk.submit_read(1024, at), at) for at in range(0, MIB, 1024)]
    for read, at in reads:
        assert read.result(LIMIT) == data[at : at + 1024]
    order = list(range(0, MIB, 2048))
    random.Random(3).shuffle(order)
    writes = [disk.submit_write(data[at : at + 2048][::-1], at) for at in order]
    assert [write.result(LIMIT) for write in writes] == [2048] * len(order)
    disk.submit_flush().result(LIMIT)
    assert image.read_bytes() == b"".join(data[at : at + 2048][::-1] for at in range(0, MIB, 2048))


def test_what_is_large_is_split(attached: Attached) -> None:
    device = Blk(memory="20 MiB")
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    data = random.Random(4).randbytes(12 * MIB)
    assert disk.pwrite(data, MIB + 1) == len(data)
    assert device.writes >= 12
    assert hashlib.sha256(disk.pread(len(data), MIB + 1)).digest() == hashlib.sha256(data).digest()
    assert device.reads >= 12
    assert disk.submit_write(data[:SECTOR] * 8192, 0).result(LIMIT) == 8192 * SECTOR
    assert disk.submit_read(8192 * SECTOR, 0).result(LIMIT) == data[:SECTOR] * 8192


def test_threads_share_a_block(attached: Attached) -> None:
    _, remote = attached(disk0=Blk(memory="1 MiB"))
    disk = remote.driver("disk0", drivers.Blk)
    failures: list[BaseException] = []
    cell, rounds = 100, 100

    def work(n: int) -> None:
        # Cells of several threads lie in one block, and some lie over two.
        try:
            for step in range(rounds):
                data = bytes([n, step]) * (cell // 2)
                disk.pwrite(data, n * cell)
                assert disk.pread(cell, n * cell) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not failures, failures
    assert disk.pread(8 * cell, 0) == b"".join(bytes([n, rounds - 1]) * (cell // 2) for n in range(8))


@pytest.mark.skipif(not (shutil.which("mkfs.ext4") and shutil.which("e2fsck")), reason="needs e2fsprogs")
def test_a_file_system_copied_through_two_disks_is_whole(attached: Attached, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(Path(__file__).parent, tree, ignore=shutil.ignore_patterns("__pycache__"))
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, source, "8M"], check=True)
    with target.open("wb") as file:
        file.truncate(source.stat().st_size)
    _, remote = attached(disk0=Blk(path=source, read_only=True), disk1=Blk(path=target))
    from_disk, to_disk = remote.driver("disk0", drivers.Blk), remote.driver("disk1", drivers.Blk)
    with from_disk.open("rb") as reading, to_disk.open("r+b") as writing:
        shutil.copyfileobj(reading, writing, 100_000)
    assert target.read_bytes() == source.read_bytes()
    check = subprocess.run(["e2fsck", "-fn", target], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


# What a request may look like.


def test_every_layout_of_a_request_is_understood(attached: Attached, image: Path) -> None:
    _, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    data = image.read_bytes()[5 * SECTOR : 7 * SECTOR]
    read, write = header(RequestType.IN, 5), header(RequestType.OUT, 5)
    assert ask(disk, [read[n : n + 1] for n in range(16)], 2 * SECTOR + 1) == data + OK
    assert ask(disk, [read[:3], read[3:11], read[11:]], 2 * SECTOR + 1) == data + OK
    assert ask(disk, [write + data[::-1]], 1) == OK
    assert ask(disk, [read], 2 * SECTOR + 1) == data[::-1] + OK
    assert ask(disk, [write[:9], write[9:] + data[:1], data[1:600], data[600:]], 1) == OK
    assert ask(disk, [read], 2 * SECTOR + 1) == data + OK
    assert image.read_bytes()[5 * SECTOR : 7 * SECTOR] == data


def test_no_data_is_no_error(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    end = MIB // SECTOR
    for kind in (RequestType.IN, RequestType.OUT):
        assert ask(disk, [header(kind, 0)], 1) == OK
        assert ask(disk, [header(kind, end)], 1) == OK
        assert ask(disk, [header(kind, end + 1)], 1) == IOERR
    assert (device.reads, device.writes, device.refused) == (2, 2, 2)
    assert bus.describe()[0]["violations"] == {}


def test_what_cannot_be_is_answered_and_tells_nothing(attached: Attached, image: Path) -> None:
    device = Blk(path=image, serial="vbus-disk0")
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", Plain)
    before = image.read_bytes()
    end = MIB // SECTOR
    ask(disk, [header(RequestType.IN)], 4 * SECTOR + 1)  # fills the memory that later answers use
    for sector in (end, end - 1, end + 1, (1 << 55) - 1, 1 << 55, (1 << 63) - 1, (1 << 64) - 1):
        assert ask(disk, [header(RequestType.IN, sector)], 2 * SECTOR + 1) == bytes(2 * SECTOR) + IOERR
        assert ask(disk, [header(RequestType.OUT, sector), bytes(2 * SECTOR)], 1) == IOERR
    for size in (1, 511, 513, 1000):
        assert ask(disk, [header(RequestType.IN)], size + 1) == bytes(size) + IOERR
        assert ask(disk, [header(RequestType.OUT), bytes(size)], 1) == IOERR
    for kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES, RequestType.SECURE_ERASE, 2, 3, 99, 0xFFFF_FFFF):
        assert ask(disk, [header(kind), bytes(16)], 1) == UNSUPP
        assert ask(disk, [header(kind)], 21) == bytes(20) + UNSUPP
    assert ask(disk, [header(RequestType.GET_ID)], 20) == bytes(19) + IOERR
    assert ask(disk, [header(RequestType.GET_ID)], 1) == IOERR
    assert device.refused == 14 + 8 + 14 + 2
    assert device.io_errors == 0
    assert bus.describe()[0]["violations"] == {}
    assert image.read_bytes() == before


def test_the_serial_is_padded(attached: Attached) -> None:
    bus, remote = attached(disk0=Blk(memory=4096, serial="vbus-disk0"), disk1=Blk(memory=4096, serial="x" * 20))
    one, two = (remote.driver(name, drivers.Blk) for name in ("disk0", "disk1"))
    assert ask(one, [header(RequestType.GET_ID)], 21) == b"vbus-disk0" + bytes(10) + OK
    assert ask(one, [header(RequestType.GET_ID)], 33) == b"vbus-disk0" + bytes(22) + OK
    assert one.serial == "vbus-disk0"
    assert two.serial == "x" * 20
    bus.plug(Blk(memory=4096), "unnamed")
    remote.wait_for("unnamed")
    assert remote.driver("unnamed", drivers.Blk).serial == "unnamed"


@pytest.mark.parametrize(
    ("readable", "writable", "name"),
    [
        ([header(RequestType.IN)[:15]], 513, "blk-header-short"),
        ([], 513, "blk-header-short"),
        ([header(RequestType.OUT) + bytes(512)], 0, "blk-no-status"),
        ([header(RequestType.FLUSH)], 0, "blk-no-status"),
    ],
)
def test_a_request_that_is_none_is_the_drivers_violation(
    attached: Attached, readable: list[bytes], writable: int, name: str
) -> None:
    bus, remote = attached(disk0=Blk(memory="1 MiB"), disk1=Blk(memory="1 MiB"))
    disk, other = (remote.driver(each, drivers.Blk) for each in ("disk0", "disk1"))
    disk.pwrite(b"kept", 0)
    broken = disk.queue(0).submit(readable, writable)
    fails_with(errno.EIO, broken.result, LIMIT)
    assert bus.describe()[0]["violations"] == {name: 1}
    assert "DEVICE_NEEDS_RESET" in bus.describe()[0]["status"]
    assert other.pread(1, 0) == b"\0"
    assert bus.describe()[1]["violations"] == {}
    assert remote.driver("disk0", drivers.Blk).pread(4, 0) == b"kept"


def test_requests_before_a_bad_one_are_answered(attached: Attached) -> None:
    device = Blk(memory="1 MiB")
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    good = [disk.submit_write(bytes([n]) * SECTOR, n * SECTOR) for n in range(20)]
    bad = disk.queue(0).submit([b"x"], 1)
    fails_with(errno.EIO, bad.result, LIMIT)
    for future in good:
        # Answered by the device, though the driver may hear of the end of the queue first.
        assert future.exception(LIMIT) is None or isinstance(future.exception(), DriverError)
    assert device.writes == bus.stat()[0]["requests"] == 20
    again = remote.driver("disk0", drivers.Blk)
    assert again.pread(20 * SECTOR, 0) == b"".join(bytes([n]) * SECTOR for n in range(20))


# Read-only disks, flushing, failing disks.


def test_a_read_only_disk_is_not_written(attached: Attached, image: Path) -> None:
    device = Blk(path=image, read_only=True)
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    before = image.read_bytes()
    assert disk.read_only
    assert disk.pread(1000, 100) == before[100:1100]
    fails_with(errno.EROFS, disk.pwrite, b"x", 0)
    fails_with(errno.EROFS, disk.submit_write, bytes(SECTOR), 0)
    fails_with(errno.EROFS, disk.open, "r+b")
    assert ask(disk, [header(RequestType.OUT), bytes(SECTOR)], 1) == IOERR
    assert (device.refused, device.io_errors) == (1, 0)
    disk.flush()
    assert image.read_bytes() == before
    assert bus.attributes("disk0")["read_only"] is True
    with pytest.raises(UsageError, match="read-only"):
        device.capacity = device.capacity + 8
    assert disk.open("rb").read(16) == before[:16]


def test_flushes_reach_the_disk(attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    device = Blk(path=image, engine="python")
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    disk.pwrite(b"x", 0)
    assert not synced
    disk.flush()
    assert len(synced) == 1
    assert device.flushes == 1
    assert ask(disk, [header(RequestType.FLUSH), b"data that means nothing"], 5) == bytes(4) + OK
    assert "FLUSH" in bus.describe()[0]["features"]["negotiated"]


def test_a_driver_that_cannot_flush_gets_its_writes_through(
    attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    pwritev = os.pwritev

    def record(fd: int, buffers: Sequence[memoryview], offset: int, how: int = 0) -> int:
        flags.append(how)
        return pwritev(fd, buffers, offset, how)

    monkeypatch.setattr(os, "pwritev", record)
    _, remote = attached(disk0=Blk(path=image, engine="python"))
    disk = remote.driver("disk0", WriteThrough)
    disk.pwrite(b"through", 0)
    disk.flush()  # nothing to do
    assert ask(disk, [header(RequestType.FLUSH)], 1) == UNSUPP
    remote.driver("disk0", drivers.Blk).pwrite(b"cached", 0)
    assert flags == [os.RWF_DSYNC, 0]


def test_a_disk_that_fails_is_told_in_the_status(
    attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Blk(path=image, engine="python")
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        for name in ("preadv", "pwritev", "fdatasync"):
            patch.setattr(os, name, fail)
        for _ in range(3):
            fails_with(errno.EIO, disk.pread, 100, 0)
            fails_with(errno.EIO, disk.pwrite, bytes(SECTOR), 0)
            fails_with(errno.EIO, disk.flush)
        assert ask(disk, [header(RequestType.IN)], SECTOR + 1) == bytes(SECTOR) + IOERR
    assert device.io_errors == 10
    assert len([record for record in caplog.records if record.name == "vbus.device.disk0"]) == 1
    assert str(image) in caplog.text
    assert disk.pread(100, 0) == image.read_bytes()[:100]
    assert bus.describe()[0]["violations"] == {}


def test_transfers_that_come_in_pieces_are_gone_on_with(
    attached: Attached, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, pwritev = os.preadv, os.pwritev

    def short_read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:300]], offset)

    def short_write(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return pwritev(fd, [buffers[0][:700]], offset, flags)

    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwritev", short_write)
    _, remote = attached(disk0=Blk(path=image, engine="python"))
    disk = remote.driver("disk0", drivers.Blk)
    data = os.urandom(10 * SECTOR)
    disk.pwrite(data, 3 * SECTOR)
    assert disk.pread(len(data), 3 * SECTOR) == data
    assert image.read_bytes()[3 * SECTOR : 13 * SECTOR] == data


def test_beyond_the_end_of_a_file_there_are_zeros(attached: Attached, tmp_path: Path) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"\xff" * 1000)
    device = Blk(path=path)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    assert device.capacity == 2
    assert disk.pread(2000, 0) == b"\xff" * 1000 + bytes(24)
    os.truncate(path, 100)  # by somebody else
    assert disk.pread(1024, 0) == b"\xff" * 100 + bytes(924)
    disk.pwrite(b"end", 1021)
    assert path.read_bytes() == b"\xff" * 100 + bytes(921) + b"end"


# Sizes.


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_disk_that_grows_is_noticed(attached: Attached, image: Path, kind: str) -> None:
    device = Blk(path=image) if kind == "file" else Blk(memory=MIB)
    bus, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    assert disk.size == MIB
    fails_with(errno.ENOSPC, disk.pwrite, b"x", MIB)
    assert bus.set("disk0", "capacity", "4096") == 4096
    assert disk.wait_for_size(MIB, timeout=LIMIT) == disk.size == 2 * MIB
    assert disk.pread(100, MIB) == bytes(100)
    if kind == "file":
        assert image.stat().st_size == 2 * MIB
    disk.pwrite(b"at the new end", 2 * MIB - 14)
    assert disk.pread(100, 2 * MIB - 14) == b"at the new end"


def test_a_disk_that_shrinks_hides_its_end_and_keeps_it(attached: Attached, image: Path) -> None:
    data = image.read_bytes()
    bus, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    bus.set("disk0", "capacity", "1024")
    assert disk.wait_for_size(MIB, timeout=LIMIT) == MIB // 2
    fails_with(errno.EINVAL, disk.submit_read, SECTOR, MIB // 2)
    assert ask(disk, [header(RequestType.IN, 1024)], SECTOR + 1) == bytes(SECTOR) + IOERR
    assert disk.pread(1000, MIB // 2 - 10) == data[MIB // 2 - 10 : MIB // 2]
    bus.set("disk0", "capacity", "2048")
    disk.wait_for_size(MIB // 2, timeout=LIMIT)
    assert disk.pread(MIB, 0) == data


def test_sizes_that_cannot_be_are_refused(attached: Attached, image: Path) -> None:
    bus, remote = attached(disk0=Blk(path=image, block_size=4096))
    disk = remote.driver("disk0", drivers.Blk)
    for text in ("1", "2049", "-8", str(1 << 60), "much"):
        with pytest.raises(UsageError) as refused:
            bus.set("disk0", "capacity", text)
        assert "\n" not in str(refused.value)
    assert disk.size == MIB
    assert image.stat().st_size == MIB
    for name in ("reads", "io_errors", "path", "serial", "block_size"):
        with pytest.raises(UsageError, match="cannot be set"):
            bus.set("disk0", name, "1")


def test_waiting_for_a_size_ends(attached: Attached) -> None:
    bus, remote = attached(disk0=Blk(memory=MIB))
    disk = remote.driver("disk0", drivers.Blk)
    with pytest.raises(DriverError) as late:
        disk.wait_for_size(timeout=0)
    assert late.value.errno == errno.ETIMEDOUT
    assert disk.wait_for_size(0, timeout=0) == MIB
    unplug = threading.Timer(0.05, bus.unplug, ["disk0"])
    unplug.start()
    with pytest.raises(DriverError) as gone:
        disk.wait_for_size(timeout=LIMIT)
    assert gone.value.errno == errno.ENODEV
    unplug.join()


def test_a_disk_pulled_out_under_load_ends_every_request(attached: Attached, image: Path) -> None:
    bus, remote = attached(disk0=Blk(path=image))
    disk = remote.driver("disk0", drivers.Blk)
    stop = threading.Event()
    ended: list[int | None] = []

    def load(n: int) -> None:
        while not stop.is_set():
            try:
                disk.pread(64 << 10, n * 4096)
            except DriverError as error:
                ended.append(error.errno)
                return

    threads = [threading.Thread(target=load, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    device = bus.get("disk0", Blk)
    assert wait_until(lambda: device.reads > 50)
    bus.unplug("disk0", surprise=True)
    for thread in threads:
        thread.join(LIMIT)
    stop.set()
    assert ended == [errno.ENODEV] * 4
    with Bus("second") as second:  # the lock is free again
        second.plug(Blk(path=image))


# The driver's checks, and the disk as a file.


def test_the_driver_refuses_what_makes_no_sense(attached: Attached) -> None:
    device = Blk(memory=MIB)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    fails_with(errno.EINVAL, disk.pread, -1, 0)
    fails_with(errno.EINVAL, disk.pread, 1, -1)
    fails_with(errno.EINVAL, disk.pwrite, b"x", -1)
    fails_with(errno.ENOSPC, disk.pwrite, b"xy", MIB - 1)
    fails_with(errno.EINVAL, disk.submit_read, 100, 0)
    fails_with(errno.EINVAL, disk.submit_read, SECTOR, 100)
    fails_with(errno.EINVAL, disk.submit_read, SECTOR, MIB)
    fails_with(errno.ENOSPC, disk.submit_write, bytes(SECTOR), MIB)
    fails_with(errno.EOPNOTSUPP, disk.submit(99).result, LIMIT)
    assert disk.pread(10, MIB) == disk.pread(0, 0) == disk.submit_read(0, 0).result(LIMIT) == b""
    assert disk.pread(10, MIB - 4) == bytes(4)
    assert disk.pwrite(b"", 5) == disk.submit_write(b"", 0).result(LIMIT) == 0
    assert (device.reads, device.writes) == (1, 0)


class Liar(Device):
    """A disk that says what a disk should not."""

    device_id = virtio.DeviceID.BLOCK
    features = virtio.blk.FEATURES
    queues = ("requests",)
    Config = virtio.blk.Config

    def __init__(self, answer: bytes, **config: int) -> None:
        self.answer = answer
        for field, value in config.items():
            setattr(self.config, field, value)

    def offered_features(self) -> Sequence[str]:
        return ["BLK_SIZE"]

    def handle(self, queue: Queue, request: Request) -> None:
        request.write(self.answer[: request.writable])


def test_a_device_that_lies_is_not_believed(attached: Attached) -> None:
    _, remote = attached(
        short=Liar(b"\0", capacity=8, blk_size=512),
        strange=Liar(bytes(512) + b"\7", capacity=8, blk_size=512),
        vast=Liar(bytes(512) + b"\0", capacity=(1 << 64) - 1, blk_size=512),
        blockless=Liar(b"", capacity=8, blk_size=0),
        odd=Liar(b"", capacity=8, blk_size=1000),
    )
    fails_with(errno.EIO, remote.driver("short", drivers.Blk).pread, 512, 0)
    fails_with(errno.EIO, remote.driver("strange", drivers.Blk).pread, 512, 0)
    for name in ("blockless", "odd"):
        fails_with(errno.EIO, remote.driver, name, drivers.Blk)
    vast = remote.driver("vast", drivers.Blk)
    with vast.open() as file:
        assert file.seek(-512, io.SEEK_END) == vast.size - 512
        assert file.read(512) == bytes(512)


def test_the_disk_as_a_file(attached: Attached, image: Path) -> None:
    device = Blk(path=image)
    _, remote = attached(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    oracle = bytearray(image.read_bytes())
    with disk.open() as file:
        assert file.seek(-10, io.SEEK_END) == MIB - 10
        assert file.read() == oracle[-10:]
        assert file.read(1) == b""
        file.seek(777)
        file.write(b"in the middle")
        oracle[777:790] = b"in the middle"
        assert file.tell() == 790
        assert file.read(10) == oracle[790:800]
        file.seek(0)
        assert file.readline() == bytes(oracle[: oracle.index(b"\n") + 1])
    assert image.read_bytes() == oracle
    assert device.flushes == 1
    with disk.open("rb") as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
    with disk.open("wb") as file:
        file.write(b"begin")
    with disk.open("r+b", buffering=0) as raw:
        assert raw.read(5) == b"begin"
        assert raw.name == "disk0"
        raw.seek(-3, io.SEEK_END)
        assert raw.write(b"abcdef") == 3
        fails_with(errno.ENOSPC, raw.write, b"def")
        with pytest.raises(OSError, match="Invalid"):
            raw.seek(-1)
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)
    with pytest.raises(ValueError, match="mode"):
        disk.open("a")
    oracle[:5], oracle[-3:] = b"begin", b"abc"
    assert image.read_bytes() == oracle


# Options, and opening.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either path"),
        ({"path": ""}, "either path"),
        ({"path": "x", "memory": 512}, "either path"),
        ({"memory": 0}, "multiple"),
        ({"memory": 1000}, "multiple"),
        ({"memory": 512, "block_size": 4096}, "multiple"),
        ({"memory": "64 MB"}, "'MB' is no unit"),
        ({"memory": 4096, "block_size": 1000}, "512, 1024, 2048, 4096"),
        ({"memory": 4096, "serial": "x" * 21}, "20 ASCII"),
        ({"memory": 4096, "serial": "ä"}, "20 ASCII"),
        ({"memory": 4096, "seg_max": 0}, "1 to 254"),
        ({"memory": 4096, "seg_max": 255}, "1 to 254"),
    ],
)
def test_options_that_make_no_disk_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        Blk(**options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_no_disk_is_refused_in_one_line(tmp_path: Path, image: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Bus("test") as bus:
        for path, message in [
            (tmp_path / "missing.img", "does not exist"),
            (tmp_path, "is a directory"),
            (tmp_path / "fifo", "neither a file nor a block device"),
            (Path("/dev/null"), "neither a file nor a block device"),
            (image / "below", "Not a directory"),
        ]:
            with pytest.raises(UsageError) as refused:
                bus.plug(Blk(path=path), "disk0")
            assert str(path) in str(refused.value)
            assert message in str(refused.value)
            assert "\n" not in str(refused.value)
        assert bus.slots() == []


def test_a_disk_in_use_is_not_shared_with_a_writer(image: Path) -> None:
    with Bus("test") as bus:
        bus.plug(Blk(path=image), "writer")
        for read_only in (True, False):
            with pytest.raises(UsageError, match="in use"):
                bus.plug(Blk(path=image, read_only=read_only), "second")
        bus.unplug("writer")
        bus.plug(Blk(path=image, read_only=True), "reader0")
        bus.plug(Blk(path=image, read_only=True), "reader1")
        with pytest.raises(UsageError, match="in use"):
            bus.plug(Blk(path=image), "writer")
        with image.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with image.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_disk_is_closed_when_it_goes(image: Path, leftovers: type[Leftovers]) -> None:
    with Bus("test", workers=1) as bus:
        bus.plug(Blk(memory=512), "stays")
        before = leftovers()
        for _ in range(3):
            disk = Blk(path=image)
            bus.plug(disk, "disk0")
            bus.unplug("disk0")
            with pytest.raises(UsageError, match="plug the disk"):
                disk.capacity = 8
            bus.plug(Blk(memory="1 GiB"), "disk1")
            bus.unplug("disk1")
        assert not leftovers().exceeds(before)


def test_the_operator_sees_the_disk(image: Path) -> None:
    with Bus("test") as bus:
        bus.plug(Blk(path=image, serial="s1", block_size=4096), "disk0")
        assert bus.attributes("disk0") == {
            "capacity": 2048,
            "path": str(image),
            "serial": "s1",
            "read_only": False,
            "block_size": 4096,
            "writeback": True,
            "reads": 0,
            "writes": 0,
            "discards": 0,
            "zeroes": 0,
            "erasures": 0,
            "flushes": 0,
            "refused": 0,
            "io_errors": 0,
        }
        features = bus.describe()[0]["features"]["available"]
        assert {"FLUSH", "BLK_SIZE", "SEG_MAX"} <= set(features)
        assert not {"RO", "MQ", "LIFETIME", "ZONED", "SECURE_ERASE"} & set(features)
