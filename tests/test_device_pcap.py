"""A network that writes what is sent to a file, natively and in Python: the same frames, and whole records only."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

import vbus
from conftest import CONNECTORS, wait_until
from test_device_net import read_pcap
from test_disk_failures import Hanging, hanging, needs_fuse  # noqa: F401
from test_engines import LIMIT, MAC, Both, RawNet, _counts, cut, held, pair, result, some_frame  # noqa: F401
from vbus.bus import Bus
from vbus.devices import Net
from vbus.errors import DriverError, UsageError

ENGINES = ("native", "python")


def send(end: RawNet, *frames: bytes, header: bytes = bytes(12), queue: int = 1) -> list[Future[bytes]]:
    return [end.queue(queue).submit([header, frame], 0) for frame in frames]


def frame(fill: int, size: int = 60) -> bytes:
    return b"\xff" * 6 + MAC + bytes([8, 0]) + bytes([fill]) * (size - 14)


def frames_of(path: Path) -> list[bytes]:
    return [found for _, found in read_pcap(path)]


def records_of(path: Path) -> list[bytes]:
    """The file's header, and all records without their times."""
    data = path.read_bytes()
    parts, data = [data[:24]], data[24:]
    while data:
        size = 16 + struct.unpack_from("<I", data, 8)[0]
        parts.append(data[8:size])
        data = data[size:]
    return parts


@pytest.mark.parametrize("connector", [*CONNECTORS, "vhost-user"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_two_files_hold_the_same(pair: Both, tmp_path: Path, connector: str, packed: bool) -> None:  # noqa: F811
    rng = random.Random(f"{connector} {packed}")
    files = [tmp_path / f"{engine}.pcap" for engine in ENGINES]
    nets = [Net(f"pcap:{file}", mac=MAC.hex(":"), engine=engine) for file, engine in zip(files, ENGINES, strict=True)]
    bus, remote = pair(connector, native=nets[0], python=nets[1])
    assert [bus.slot(name).engine for name in ENGINES] == ["native", "python (as it was asked for)"]
    ends = [remote.driver(name, RawNet, packed=packed) for name in ENGINES]
    posted = [[end.queue(0).submit([], 1526) for _ in range(8)] for end in ends]
    for step in range(100):
        frames = [some_frame(rng) for _ in range(rng.choice([1, 5, 40]))]
        if rng.random() < 0.02:
            frames.append((bytes(12), bytes(70000)))
        for end in ends:
            sent = [end.queue(1).submit(cut(random.Random(step), b"".join(both)), 0) for both in frames]
            assert {result(future) for future in sent} == {b""}
        if rng.random() < 0.2:
            for net in nets:
                net.link = not net.link
        assert records_of(files[0]) == records_of(files[1]), step
        assert wait_until(lambda: _counts(nets[0]) == _counts(nets[1])), [_counts(net) for net in nets]
    found = read_pcap(files[0])
    assert [when for when, _ in found] == sorted(when for when, _ in found)
    assert len(found) == nets[0].tx_packets == nets[0]._counted("tx_packets") > 0, "the engine served"
    assert nets[0].tx_bytes == sum(len(one) for _, one in found)
    assert min(nets[0].tx_dropped, nets[0].tx_too_short, nets[0].tx_bad_checksum, nets[0].tx_bad_segments) > 0
    assert not any(future.done() for futures in posted for future in futures), "nothing comes"
    assert [dict(bus.slot(name).violations) for name in ENGINES] == [{}, {}]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_came_before_a_violation_is_written(pair: Both, tmp_path: Path, engine: str) -> None:  # noqa: F811
    file = tmp_path / "sent.pcap"
    net = Net(f"pcap:{file}", engine=engine)
    bus, remote = pair(net0=net)
    end = remote.driver("net0", RawNet)
    with held(bus, "net0"):
        sent = send(end, *(frame(n) for n in range(5)))
        sent.append(end.queue(1).submit([b"short"], 0))
        sent += send(end, *(frame(n) for n in range(5, 8)))
    assert [result(future) for future in sent] == [b""] * 5 + [errno.EIO] * 4
    assert wait_until(lambda: bus.slot("net0").violations["tx-header-short"] == 1)
    assert frames_of(file) == [frame(n) for n in range(5)]
    assert (net.tx_packets, net.tx_bytes) == (5, 300)
    end.close()
    assert {result(future) for future in send(remote.driver("net0", RawNet), frame(9))} == {b""}
    assert frames_of(file)[5:] == [frame(9)]


def test_a_limit_has_the_model_write_behind_what_the_engine_wrote(pair: Both, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "sent.pcap"
    net = Net(f"pcap:{file}")
    bus, remote = pair(net0=net)
    end = remote.driver("net0", RawNet)
    sent = send(end, *(frame(n) for n in range(200)))
    bus.set("net0", "limit.iops", "1000000")
    assert bus.show("net0")["engine"] == "python (limits are set)"
    sent += send(end, *(frame(n) for n in range(200, 250)))
    assert {result(future) for future in sent} == {b""}
    assert frames_of(file) == [frame(n) for n in range(250)]
    assert (net.tx_packets, net.tx_bytes) == (250, 250 * 60)
    assert net._counted("tx_packets") <= 200
    bus.set("net0", "limit.iops", "none")
    end.close()
    before = net._counted("tx_packets")
    assert {result(future) for future in send(remote.driver("net0", RawNet), frame(3))} == {b""}
    assert (bus.show("net0")["engine"], net._counted("tx_packets")) == ("native", before + 1)
    assert len(frames_of(file)) == 251


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_is_let_go_of_and_begins_anew_with_the_next_device(
    pair: Both,  # noqa: F811
    tmp_path: Path,
    engine: str,
) -> None:
    file = tmp_path / "sent.pcap"
    bus, remote = pair(net0=Net(f"pcap:{file}", engine=engine))
    assert {result(future) for future in send(remote.driver("net0", RawNet), frame(1))} == {b""}
    with pytest.raises(UsageError, match="is in use"):
        bus.plug(Net(f"pcap:{file}"), "net1")
    assert bus.unplug("net0", surprise=True)
    assert frames_of(file) == [frame(1)]
    bus.plug(Net(f"pcap:{file}", engine=engine), "net1")
    assert frames_of(file) == []


# Disks that take no more, or not now.


@pytest.mark.parametrize("engine", ENGINES)
def test_of_a_write_that_is_cut_short_whole_records_stay(
    pair: Both,  # noqa: F811
    tmp_path: Path,
    engine: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = tmp_path / "full.pcap"
    net = Net(f"pcap:{file}", engine=engine)
    bus, remote = pair(net0=net)
    end = remote.driver("net0", RawNet)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # For a record and a half.
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 + 76 + 30, limits[1]))
    try:
        with held(bus, "net0"):
            sent = send(end, frame(1), frame(2), frame(3))
        assert {result(future) for future in sent} == {b""}
        assert {result(future) for future in send(end, frame(4))} == {b""}
        assert frames_of(file) == [frame(1)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {result(future) for future in send(end, frame(5))} == {b""}
    assert frames_of(file) == [frame(1), frame(5)]
    assert (net.tx_packets, net.tx_bytes, net.tx_dropped) == (2, 120, 3)
    said = f"pcap file {file} takes no more: {os.strerror(errno.EFBIG)}"
    assert wait_until(lambda: said in caplog.text)
    assert caplog.text.count("takes no more") == 1, "told once"
    assert (net.link, net.tap_lost) == (True, 0)
    assert not bus.slot("net0").violations


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes CAP_SYS_ADMIN: run as root")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_is_told_and_takes_what_it_can_when_it_has_room_again(
    make_bus: Callable[..., Bus], tmp_path: Path, engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)), check=True)
    bus = make_bus()
    try:
        file = folder / "full.pcap"
        net = Net(f"pcap:{file}", engine=engine)
        bus.plug(net, "net0")
        at = bus.connect(vbus.connectors.Process(tmp_path / "bus.sock")).address
        with vbus.attach(at) as remote:
            end = remote.driver("net0", RawNet)
            with held(bus, "net0"):
                sent = send(end, *(frame(n, 1514) for n in range(100)))
            assert {result(future) for future in sent} == {b""}
            found = frames_of(file)
            assert (len(found), net.tx_dropped) == (net.tx_packets, 100 - net.tx_packets)
            assert 0 < len(found) < 64
            assert found == [frame(n, 1514) for n in range(len(found))]
            assert wait_until(lambda: os.strerror(errno.ENOSPC) in caplog.text)
            subprocess.run(("mount", "-o", "remount,size=1m", str(folder)), check=True)
            assert {result(future) for future in send(end, frame(7))} == {b""}
            assert frames_of(file) == [*found, frame(7)]
            assert caplog.text.count("takes no more") == 1
            assert net.tx_bytes == sum(map(len, frames_of(file)))
        bus.unplug("net0")
    finally:
        bus.stop()
        subprocess.run(("umount", str(folder)), check=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_cut_off_begins_anew(pair: Both, tmp_path: Path, engine: str) -> None:  # noqa: F811
    file = tmp_path / "sent.pcap"
    net = Net(f"pcap:{file}", engine=engine)
    _, remote = pair(net0=net)
    end = remote.driver("net0", RawNet)
    for size in (0, 10, 50):
        assert {result(future) for future in send(end, frame(1), frame(2))} == {b""}
        os.truncate(file, size)
        assert {result(future) for future in send(end, frame(3))} == {b""}
        assert frames_of(file) == [frame(3)], size
    assert (net.tx_packets, net.tx_dropped) == (9, 0)


@needs_fuse
def test_a_file_that_hangs_holds_nobody_else(
    make_bus: Callable[..., Bus],
    tmp_path: Path,
    hanging: Hanging,  # noqa: F811
) -> None:
    bus = make_bus(workers=1)
    with attached(bus, tmp_path, f"pcap:{hanging.held}", "loopback") as (end, other):
        hanging.tell("hold")
        sent = send(end, frame(1))
        hanging.wait_held(1)
        # Taken, and given back by nobody yet: it is only its own.
        sent += send(end, frame(2))
        for _ in range(3):
            buffer = other.queue(0).submit([], 100)
            assert {result(future) for future in send(other, frame(3))} == {b""}
            assert buffer.result(LIMIT)[12:] == frame(3)
        assert bus.show("net0")["engine"] == "native"
        assert not any(future.done() for future in sent)
        net = bus.slot("net0").device
        assert isinstance(net, Net)
        net.link = False
        assert net.tx_packets == 0
        with pytest.raises(DriverError) as stuck:
            end.close()
        assert stuck.value.errno == errno.ETIMEDOUT
        slot = bus.slot("net0")
        assert slot.violations == {"io-hangs": 1}
        assert {future.exception(LIMIT).errno for future in sent} == {errno.ESHUTDOWN}  # type: ignore[union-attr]
        assert {result(future) for future in send(other, frame(3))} == {b""}
        hanging.tell("go")
        # The reset that was asked for comes about by itself; what was under way is in the file.
        assert wait_until(lambda: slot.status == 0, LIMIT)
        assert net.tx_packets == 1
        assert slot.violations == {"io-hangs": 1}


@contextlib.contextmanager
def attached(bus: Bus, tmp_path: Path, *backends: str) -> Iterator[list[RawNet]]:
    for n, backend in enumerate(backends):
        bus.plug(Net(backend, engine="native"), f"net{n}")
    with vbus.attach(bus.connect(vbus.connectors.Process(tmp_path / "bus.sock")).address) as remote:
        yield [remote.driver(f"net{n}", RawNet) for n in range(len(backends))]
