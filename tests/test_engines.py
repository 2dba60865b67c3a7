"""Native engines: they do what the models in Python do, byte for byte, and leave to them what is not theirs."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vbus
from conftest import CONNECTORS, make_connector, needs_io_uring, wait_until
from vbus import _core, virtio
from vbus.bus import Bus
from vbus.bus.workers import URGENT_NICE, Workers
from vbus.devices import Blk, Net
from vbus.errors import DriverError, UsageError
from vbus.proxy import Driver, Remote, drivers
from vbus.virtio.blk import HEADER, RANGE, SECTOR, RequestType
from vbus.virtio.net import FEATURES
from vbus.virtio.net import HEADER as NET_HEADER

LIMIT = 20
"""Seconds after which a test that waits has failed."""
SECTORS = 256
MAC = b"\x52\x54\0\1\2\3"
POLLING = ("notified", "adaptive", "always")


class RawDisk(drivers.Blk):
    """Requests as the test says."""

    queue_count: ClassVar[int] = 1


class RawNet(Driver):
    """Buffers and frames as the test says."""

    device_id = virtio.DeviceID.NETWORK
    features = FEATURES
    wanted: ClassVar[tuple[str, ...]] = ("MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "STATUS")
    queue_count = 3


class Unmerged(RawNet):
    """A frame lies in one buffer, or in none."""

    wanted: ClassVar[tuple[str, ...]] = ("STATUS",)


class Remotes:
    """The driver's sides of hypervisors' devices, one each."""

    def __init__(self, remotes: dict[str, Remote]) -> None:
        self._remotes = remotes

    def driver(self, name: str, cls: type[Any], *, packed: bool = False) -> Any:
        return self._remotes[name].driver(name, cls, packed=packed)


Both = Callable[..., tuple[Bus, Any]]


@pytest.fixture
def pair(make_bus: Callable[..., Bus], tmp_path: Path) -> Iterator[Both]:
    """A bus of the test's devices, and a driver's side."""
    with contextlib.ExitStack() as stack:

        def make(connector: str = "process-direct", options: dict[str, Any] | None = None, **devices: Any) -> Any:
            bus = make_bus(**options or {})
            for name, device in devices.items():
                bus.plug(device, name)
            if connector != "vhost-user":
                at = bus.connect(make_connector(connector, tmp_path)).address
                return bus, stack.enter_context(vbus.attach(at))
            remotes = {}
            for name, device in devices.items():
                at = bus.connect(vbus.connectors.VhostUser(name, tmp_path / f"{name}.sock"), name).address
                remotes[name] = stack.enter_context(vbus.attach(at, device_id=device.device_id, name=name))
            return bus, Remotes(remotes)

        yield make


def result(future: Future[bytes]) -> bytes | int:
    """What came of a request: bytes, or the errno that it failed with."""
    try:
        return future.result(LIMIT)
    except DriverError as error:
        return error.errno or -1


def cut(rng: random.Random, data: bytes) -> list[bytes]:
    """The same bytes in several buffers."""
    parts = []
    while data:
        size = rng.choice([1, 7, 16, 500, 4096, len(data)])
        parts.append(data[:size])
        data = data[size:]
    return parts[:20] + ([b"".join(parts[20:])] if parts[20:] else [])


# Two disks.


def some_request(rng: random.Random) -> tuple[list[bytes], int]:
    """(readable, writable) of a request, good or bad; never one that leaves nobody to answer."""
    kind = rng.choice([RequestType.IN] * 6 + [RequestType.OUT] * 6 + [RequestType.FLUSH, RequestType.GET_ID, 99])
    if rng.random() < 0.15:
        kind = rng.choice([RequestType.DISCARD, RequestType.WRITE_ZEROES])
    sector = rng.randrange(SECTORS + 4) if rng.random() < 0.95 else rng.choice([1 << 40, (1 << 64) - 1])
    size = SECTOR * rng.choice([1, 1, 2, 8, 17]) + (rng.choice([1, 100]) if rng.random() < 0.05 else 0)
    data = b""
    room = rng.choice([0, 0, 0, 5])
    match kind:
        case RequestType.IN:
            room = size
        case RequestType.OUT:
            data = rng.randbytes(size if rng.random() < 0.97 else 0)
        case RequestType.GET_ID:
            room = rng.choice([20, 20, 3, 40])
        case RequestType.DISCARD | RequestType.WRITE_ZEROES:
            data = RANGE.pack(sector, rng.choice([1, 8, 300]), rng.choice([0, 0, 1]))
    return cut(rng, HEADER.pack(kind, 0, sector) + data), room + 1


@needs_io_uring
@pytest.mark.parametrize("connector", [*CONNECTORS, "vhost-user"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_two_disks_answer_alike(pair: Both, tmp_path: Path, connector: str, packed: bool) -> None:
    rng = random.Random(f"{connector} {packed}")
    images = [tmp_path / "native.img", tmp_path / "python.img"]
    content = rng.randbytes(SECTORS * SECTOR - 300)
    for image in images:
        image.write_bytes(content)
    disks = [Blk(path=images[0], serial="same", engine="native"), Blk(path=images[1], serial="same", engine="python")]
    bus, remote = pair(connector, native=disks[0], python=disks[1])
    assert [bus.slot(name).engine for name in ("native", "python")] == ["native", "python (as it was asked for)"]
    queues = [remote.driver(name, RawDisk, packed=packed).queue(0) for name in ("native", "python")]
    for step in range(60):
        # What is under way together has no order: of several, all read, or each is alone.
        burst = [some_request(rng) for _ in range(rng.choice([1, 1, 8]))]
        if len(burst) > 1:
            burst = [([HEADER.pack(RequestType.IN, 0, rng.randrange(SECTORS))], SECTOR + 1) for _ in burst]
        futures = [[queue.submit(readable, room) for readable, room in burst] for queue in queues]
        answers = [[result(future) for future in own] for own in futures]
        assert answers[0] == answers[1], (step, burst)
    assert images[0].read_bytes() == images[1].read_bytes()
    counted = ("reads", "writes", "flushes", "discards", "zeroes", "refused", "io_errors", "capacity")
    assert [getattr(disks[0], name) for name in counted] == [getattr(disks[1], name) for name in counted]
    assert disks[0]._counted("reads") == disks[0].reads > 0, "the engine served"
    assert [dict(bus.slot(name).violations) for name in ("native", "python")] == [{}, {}]


@needs_io_uring
def test_many_requests_are_under_way_and_none_is_lost(pair: Both, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4 << 20))
    device = Blk(path=image, engine="native", queues=2)
    bus, remote = pair(options={"workers": 2}, disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    blocks = {n: bytes([n & 0xFF, n >> 8]) * 2048 for n in range(1024)}
    for future in [disk.submit_write(block, n * 4096) for n, block in blocks.items()]:
        future.result(LIMIT)
    disk.flush()
    reads = {n: disk.submit_read(4096, n * 4096) for n in random.Random(3).sample(range(1024), 1024)}
    for n, read in reads.items():
        assert read.result(LIMIT) == blocks[n]
    assert (device.writes, device.reads) == (1024, 1024)
    assert image.read_bytes() == b"".join(blocks.values())
    assert all(queue.core.in_flight == 0 for queue in bus.slot("disk0").queues)


# Two networks.


def some_frame(rng: random.Random) -> tuple[bytes, bytes]:
    """(header, frame), of which some are wrong."""
    to = rng.choice([b"\xff" * 6, MAC, b"\x52\x54\0\1\2\4", b"\x33\x33\0\0\0\1"])
    kind = rng.choice([b"\x08\0", b"\x81\0\0\5\x08\0", b"\x81\0\0\6\x08\0"])
    frame = to + MAC + kind + rng.randbytes(rng.choice([0, 46, 46, 100, 1500, 4000]))
    if rng.random() < 0.1:
        frame = frame[: rng.randrange(1, 14)]
    header = bytes(12)
    if rng.random() < 0.2:
        fields = [rng.choice([0, 1, 2, 0xFF]), rng.choice([0, 1, 77]), rng.choice([0, 20, 9999]), 10, 34, 6, 7]
        header = NET_HEADER.pack(*fields)
    return header, frame


COUNTED = tuple(name for name in vbus.bus.attributes_of(Net) if name[:3] in ("rx_", "tx_"))


@pytest.mark.parametrize("connector", [*CONNECTORS, "vhost-user"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("cls", [RawNet, Unmerged])
def test_two_networks_give_back_alike(pair: Both, connector: str, packed: bool, cls: type[RawNet]) -> None:
    rng = random.Random(f"{connector} {packed} {cls.__name__}")
    nets = [Net(mac=MAC.hex(":"), engine=engine) for engine in ("native", "python")]
    bus, remote = pair(connector, native=nets[0], python=nets[1])
    ends = [remote.driver(name, cls, packed=packed) for name in ("native", "python")]
    posted: list[list[Future[bytes]]] = [[], []]
    for step in range(120):
        match rng.choice(["post", "send", "send", "send", "command", "link"]):
            case "post":
                sizes = [rng.choice([12, 26, 80, 1526, 1526, 5000]) for _ in range(rng.choice([1, 4, 16]))]
                if len(posted[0]) > 60:
                    continue
                for end, futures in zip(ends, posted, strict=True):
                    futures += [end.queue(0).submit([], size) for size in sizes]
            case "send":
                frames = [some_frame(rng) for _ in range(rng.choice([1, 5, 40]))]
                for end in ends:
                    sent = [end.queue(1).submit(cut(random.Random(step), b"".join(both)), 0) for both in frames]
                    assert {result(future) for future in sent} == {b""}
            case "command" if cls is RawNet and connector != "vhost-user" and step > 20:
                words = rng.choice([b"\0\0", b"\0\1", b"\0\2", b"\0\4"]) + bytes([rng.randrange(2)])
                if rng.random() < 0.3:
                    words = b"\2\0" + bytes([rng.choice([5, 6]), 0])
                settle(nets)
                acks = {end.queue(2).submit([words], 1).result(LIMIT) for end in ends}
                assert acks == {b"\0"}
            case "link" if rng.random() < 0.3:
                settle(nets)
                for net in nets:
                    net.link = not net.link
        assert wait_until(lambda: _counts(nets[0]) == _counts(nets[1])), [_counts(net) for net in nets]
        alike = partial(_alike, *posted)
        assert wait_until(alike)
        got = [[result(future) for future in own if future.done()] for own in posted]
        assert got[0] == got[1], step
        posted = [[future for future in own if not future.done()] for own in posted]
    assert nets[0].tx_packets == nets[0]._counted("tx_packets") > 0, "the engine served"
    assert [dict(bus.slot(name).violations) for name in ("native", "python")] == [{}, {}]


def settle(nets: list[Net]) -> None:
    """Wait until neither goes on with frames that waited: what filters them must not change in the middle of that."""

    def are_still() -> bool:
        before = [_counts(net) for net in nets]
        time.sleep(0.03)
        return before[0] == before[1] and before == [_counts(net) for net in nets]

    assert wait_until(are_still)


def _alike(some: list[Future[bytes]], others: list[Future[bytes]]) -> bool:
    return [future.done() for future in some] == [future.done() for future in others]


def _counts(net: Net) -> dict[str, int]:
    return {name: getattr(net, name) for name in COUNTED}


@needs_io_uring
@pytest.mark.parametrize("polling", POLLING)
@pytest.mark.parametrize("connector", ["process-tunnelled", "process-direct"])
def test_however_a_worker_waits_nothing_is_left_behind(pair: Both, connector: str, polling: str) -> None:
    options = {"workers": 1, "polling": polling}
    devices = {f"net{n}": Net(engine="native") for n in range(3)}
    bus, remote = pair(connector, options, **devices, disk0=Blk(memory="1 MiB", engine="native"))
    disk = remote.driver("disk0", drivers.Blk)
    ends = [remote.driver(name, RawNet) for name in devices]
    for n in range(200):
        futures = [end.queue(0).submit([], 100) for end in ends]
        for end in ends:
            end.queue(1).submit([bytes(12) + MAC * 2 + bytes([8, 0, n])], 0)
        disk.pwrite(bytes([n]) * SECTOR, n * SECTOR)
        assert {future.result(LIMIT)[-1] for future in futures} == {n}
        assert disk.pread(1, n * SECTOR) == bytes([n])
    ((turns, _, sleeps, busy),) = bus.workers.counters()
    assert turns > 0
    assert busy > 0
    # Before it had an engine, it had nothing to poll.
    assert sleeps <= 1 if polling == "always" else sleeps > 1


# What an engine does not change.


def test_a_driver_that_breaks_a_rule_disturbs_no_other(pair: Both) -> None:
    bus, remote = pair(options={"workers": 1}, net0=Net(engine="native"), net1=Net(engine="native"))
    bad, good = (remote.driver(name, RawNet) for name in ("net0", "net1"))
    assert result(bad.queue(1).submit([b"short"], 0)) == errno.EIO
    assert wait_until(lambda: bus.slot("net0").violations["tx-header-short"] == 1)
    future = good.queue(0).submit([], 100)
    good.queue(1).submit([bytes(12) + bytes(60)], 0).result(LIMIT)
    assert future.result(LIMIT) == bytes(10) + b"\1\0" + bytes(60)
    assert not bus.slot("net1").violations
    bad.close()
    again = remote.driver("net0", RawNet)
    future = again.queue(0).submit([], 100)
    again.queue(1).submit([bytes(12) + bytes(60)], 0).result(LIMIT)
    assert len(future.result(LIMIT)) == 72


@needs_io_uring
def test_a_limit_is_kept_by_the_model(pair: Both, caplog: pytest.LogCaptureFixture) -> None:
    device = Blk(memory="1 MiB")
    bus, remote = pair(disk0=device)
    disk = remote.driver("disk0", drivers.Blk)
    disk.pread(SECTOR, 0)
    assert (bus.show("disk0")["engine"], device._counted("reads")) == ("native", 1)
    bus.set("disk0", "limit.iops", "100000")
    assert bus.show("disk0")["engine"] == "python (limits are set)"
    assert "limits are set" in caplog.text
    for n in range(20):
        disk.pread(SECTOR, n * SECTOR)
    assert (device.reads, device._counted("reads")) == (21, 1)
    # It holds for as long as the driver is there: what the model keeps of a queue, an engine does not know.
    bus.set("disk0", "limit.iops", "none")
    disk.close()
    disk = remote.driver("disk0", drivers.Blk)
    disk.pread(SECTOR, 0)
    assert (bus.show("disk0")["engine"], device._counted("reads")) == ("native", 2)


@contextlib.contextmanager
def held(bus: Bus, name: str) -> Iterator[None]:
    """What is submitted meanwhile is seen by an engine at one look."""
    slot = bus.slot(name)
    for queue in slot.queues:
        queue.core.draining = True
    yield
    for queue in slot.queues:
        queue.core.draining = False
        slot.mark(queue)


def test_what_an_engine_keeps_is_handed_over_when_limits_are_set(pair: Both) -> None:
    device = Net(engine="native")
    bus, remote = pair(net0=device)
    end = remote.driver("net0", Unmerged)
    with held(bus, "net0"):
        buffers = [end.queue(0).submit([], 100) for _ in range(40)]
        sent = [end.queue(1).submit([bytes(12) + bytes(500)], 0) for _ in range(40)]
    assert {result(future) for future in sent} == {b""}
    assert wait_until(lambda: device.rx_too_long == 40)
    assert bus.slot("net0").queues[0].core.in_flight > 1, "taken ahead, and not filled"
    bus.set("net0", "limit.iops", "1000000")
    for n in range(40):
        end.queue(1).submit([bytes(12) + MAC * 2 + bytes([8, 0, n])], 0).result(LIMIT)
    assert [future.result(LIMIT)[-1] for future in buffers] == list(range(40))
    assert device.rx_packets == 40
    assert device._counted("rx_packets") == 0


def test_frames_that_wait_in_an_engine_go_first_in_the_model(pair: Both) -> None:
    device = Net(engine="native")
    bus, remote = pair(net0=device)
    end = remote.driver("net0", RawNet)

    def send(n: int, size: int = 40) -> None:
        end.queue(1).submit([bytes(12) + MAC * 2 + bytes([8, 0, n]) + bytes(size)], 0).result(LIMIT)

    # The first is known to be wanted, as it has some of the buffers that it needs.
    buffers = [end.queue(0).submit([], 50) for _ in range(2)]
    send(0, 150)
    for n in range(1, 4):
        send(n)
    assert wait_until(lambda: bus.slot("net0").queues[0].core.in_flight == 2)
    # From now on no other would be.
    end.queue(2).submit([b"\0\4\1"], 1).result(LIMIT)
    end.queue(2).submit([b"\0\0\0"], 1).result(LIMIT)
    bus.set("net0", "limit.iops", "1000000")
    buffers += [end.queue(0).submit([], 60) for _ in range(5)]
    send(4)
    first = [future.result(LIMIT) for future in buffers[:4]]
    whole = b"".join(first)
    assert (whole[10:12], whole[26], len(whole)) == (b"\4\0", 0, 12 + 15 + 150)
    assert wait_until(lambda: device.rx_filtered == 4)
    assert (device.rx_packets, device.rx_dropped, device.tx_packets) == (1, 0, 5)


def test_priorities_reach_an_engine(pair: Both) -> None:
    bus, remote = pair(net0=Net(engine="native"))
    bus.set("net0", "priority", "1")
    assert wait_until(lambda: bus.slot("net0").queue_priorities == [1, 1, 1])
    end = remote.driver("net0", RawNet)
    future = end.queue(0).submit([], 100)
    end.queue(1).submit([bytes(12) + bytes(60)], 0).result(LIMIT)
    assert len(future.result(LIMIT)) == 72


@needs_io_uring
@pytest.mark.parametrize("surprise", [False, True])
def test_a_disk_that_leaves_under_load_ends_every_request(pair: Both, tmp_path: Path, surprise: bool) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    bus, remote = pair(disk0=Blk(path=image, engine="native"))
    disk = remote.driver("disk0", drivers.Blk)
    futures: list[Future[Any]] = []
    over = threading.Event()

    def load() -> None:
        with contextlib.suppress(DriverError):
            while not over.is_set():
                futures.append(disk.submit_read(4096, 0))
                futures.append(disk.submit_write(bytes(4096), 8192))

    thread = threading.Thread(target=load)
    thread.start()
    wait_until(lambda: len(futures) > 500)
    assert bus.unplug("disk0", surprise=surprise)
    over.set()
    thread.join(LIMIT)
    for future in futures:
        assert future.exception(LIMIT) is None or isinstance(future.exception(), DriverError)
    # Nothing of it is held any more.
    bus.plug(Blk(path=image, engine="native"), "disk1")


def test_a_network_is_reset_under_load_and_begins_anew(pair: Both) -> None:
    _, remote = pair(options={"polling": "adaptive"}, net0=Net(engine="native"))
    for n in range(20):
        end = remote.driver("net0", RawNet)
        with contextlib.suppress(DriverError):
            for _ in range(50):
                end.queue(0).submit([], 100)
                end.queue(1).submit([bytes(12) + bytes(60) + bytes([n])], 0)
        end.close()
    end = remote.driver("net0", RawNet)
    future = end.queue(0).submit([], 100)
    end.queue(1).submit([bytes(12) + bytes(60) + b"!"], 0).result(LIMIT)
    assert future.result(LIMIT)[-1:] == b"!", "what an earlier driver sent reaches no other"


# Which engine, and where.


def test_an_engine_that_was_asked_for_is_there_or_said_to_be_missing(
    make_bus: Callable[..., Bus], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="it is native or python"):
        Net(engine="fast")
    with pytest.raises(UsageError, match="it is native or python"):
        Blk(memory=512, engine="fast")
    bus = make_bus(workers=0)
    with pytest.raises(UsageError, match=r"disk0: engine native: the bus has no workers"):
        bus.plug(Blk(memory=512, engine="native"), "disk0")
    bus.plug(Blk(memory=512), "disk0")
    assert bus.slot("disk0").engine == "python (the bus has no workers)"
    with pytest.raises(UsageError, match=r"net0: engine native: the bus has no workers"):
        bus.plug(Net(f"pcap:{tmp_path / 'file.pcap'}", engine="native"), "net0")
    # And let go of again.
    bus.plug(Net(f"pcap:{tmp_path / 'file.pcap'}"), "net0")
    assert bus.slot("net0").engine == "python (the bus has no workers)"


def test_without_io_uring_disks_are_served_in_python(
    make_bus: Callable[..., Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(_core, "BlkEngine", refused)
    bus = make_bus()
    bus.plug(Blk(memory=512), "disk0")
    assert bus.slot("disk0").engine == "python (io_uring is not permitted here: Operation not permitted)"
    with pytest.raises(UsageError, match="disk1: engine native: io_uring is not permitted"):
        bus.plug(Blk(memory=512, engine="native"), "disk1")


def test_a_worker_that_cannot_start_is_told_and_leaves_nothing(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SECTOR))
    bus = make_bus()
    # It was there when the bus began, and has gone since.
    bus.workers.affinity = (1023,)
    for _ in range(2):
        with pytest.raises(UsageError, match="bus test: no worker can be started on CPU 1023: Invalid argument"):
            bus.plug(Blk(path=image), "disk0")
    bus.workers.affinity = ()
    bus.plug(Blk(path=image), "disk0")
    assert bus.slot("disk0").engine == "native"


def test_workers_are_checked_and_share_the_load(make_bus: Callable[..., Bus]) -> None:
    for options, said in (
        ({"count": 65}, "workers 65 is out of range"),
        ({"polling": "never"}, "polling 'never' is none of"),
        ({"affinity": [9999]}, "there is no CPU 9999 here"),
    ):
        with pytest.raises(UsageError, match=said):
            Workers("test", **options)
    cpu = min(os.sched_getaffinity(0))
    bus = make_bus(workers=2, affinity=[cpu])
    for n in range(4):
        bus.plug(Net(), f"net{n}")
    assert [worker.tasks for worker in bus.workers._workers] == [2, 2]
    names = {Path(f"/proc/self/task/{t}/comm").read_text().strip(): int(t) for t in os.listdir("/proc/self/task")}
    for n in range(2):
        assert os.sched_getaffinity(names[f"vbus-native-{n}"]) == {cpu}
    bus.unplug("net0")
    bus.unplug("net2")
    assert sorted(worker.tasks for worker in bus.workers._workers) == [0, 2]


def test_what_is_urgent_has_a_worker_of_its_own(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=1)
    for n, priority in enumerate((4, 3, 7, 0)):
        bus.plug(Net(), f"net{n}", priority=priority)
    assert [worker.tasks for worker in bus.workers._workers] == [2]
    assert bus.workers._urgent is not None
    assert bus.workers._urgent.tasks == 2
    names = {Path(f"/proc/self/task/{t}/comm").read_text().strip(): int(t) for t in os.listdir("/proc/self/task")}
    # What the system gives whoever asks for it.
    own = os.getpriority(os.PRIO_PROCESS, 0)
    words = ["nice", "-n", str(URGENT_NICE - own), "nice"]
    given = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert os.getpriority(os.PRIO_PROCESS, names["vbus-native-urg"]) == int(given)
    assert os.getpriority(os.PRIO_PROCESS, names["vbus-native-0"]) == own
    assert len(bus.workers.counters()) == 2


def test_workers_that_never_sleep_are_not_more_than_was_asked_for(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=1, polling="always")
    bus.plug(Net(), "net0", priority=0)
    assert [worker.tasks for worker in bus.workers._workers] == [1]
    assert bus.workers._urgent is None
