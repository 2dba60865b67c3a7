"""The front-end of vhost-user: our drivers over any back-end's socket, and what no stock front-end does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal as signals
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import pytest

import vbus
from command import serving
from conftest import Leftovers, wait_until
from models import ECHO_ID, Echo, EchoDriver, Hangs, Lamp, LampDriver, Raises
from vbus.connectors import VhostUser
from vbus.connectors.vhost_user_state import MAX_STATE
from vbus.devices.blk import Blk
from vbus.devices.console import Console
from vbus.devices.input import Input
from vbus.devices.net import Net
from vbus.devices.rng import Rng
from vbus.proxy import Driver, Remote, drivers
from vbus.proxy.connectors.vhost_user import VhostUserConnector
from vbus.vhost_user import codec, wire
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import ProtocolFeature, Request
from vbus.virtio import Status
from vbus.virtio.features import RING_PACKED

DEADLINE = 20.0
MIB = 1 << 20
SIGNALS: tuple[Literal["direct", "in-band"], ...] = ("direct", "in-band")

Attach = Callable[..., tuple[vbus.Bus, Remote]]


@pytest.fixture
def bus() -> Iterator[vbus.Bus]:
    with vbus.Bus("front") as bus:
        yield bus


@pytest.fixture
def front(bus: vbus.Bus, tmp_path: Path) -> Iterator[Callable[..., Remote]]:
    """Plugs a device behind a socket of its own, and attaches to it as a front-end; without one, attaches again."""
    with contextlib.ExitStack() as stack:

        def make(device: vbus.Device, name: str = "d0", **options: Any) -> Remote:
            path = tmp_path / f"{name}.sock"
            if name not in [slot.name for slot in bus.slots()]:
                bus.plug(device, name)
                bus.connect(VhostUser(name, path), f"vm-{name}")
            options.setdefault("device_id", device.device_id)
            return stack.enter_context(vbus.attach(f"vhost-user:{path}", timeout=DEADLINE, **options))

        yield make


def connector(remote: Remote) -> VhostUserConnector:
    assert isinstance(remote.connector, VhostUserConnector)
    return remote.connector


# The unchanged drivers, over eventfds and over messages.


@pytest.mark.parametrize("signal", SIGNALS)
def test_entropy(front: Callable[..., Remote], signal: str) -> None:
    remote = front(Rng(), "rng0", signal=signal)
    assert [device.name for device in remote] == ["rng0"]
    assert remote.channels() == []
    rng = remote.driver("rng0", drivers.Rng)
    assert len({rng.read(64) for _ in range(20)}) == 20


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_disk_with_several_queues(
    bus: vbus.Bus, front: Callable[..., Remote], tmp_path: Path, signal: str, packed: bool
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    remote = front(Blk(path=image, queues=4), "disk0", signal=signal)
    disk = remote.driver("disk0", drivers.Blk, packed=packed)
    assert bool(disk.device.negotiated >> RING_PACKED & 1) == packed
    assert (disk.size, len(disk.device.queues)) == (MIB, 4)
    data = random.Random(1).randbytes(300_000)
    disk.pwrite(data, 12_345)
    disk.flush()
    assert image.read_bytes()[12_345 : 12_345 + len(data)] == data
    assert disk.pread(len(data), 12_345) == data
    image.write_bytes(bytes(2 * MIB))
    bus.get("disk0", Blk).capacity = 4096
    assert wait_until(lambda: disk.size == 2 * MIB, DEADLINE)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_console(front: Callable[..., Remote], tmp_path: Path, signal: str) -> None:
    path = tmp_path / "con.sock"
    remote = front(Console(backend=f"unix:{path}"), "con0", signal=signal)
    console = remote.driver("con0", drivers.Console)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(DEADLINE)
        peer.connect(str(path))
        console.write(b"to the host")
        assert peer.recv(11, socket.MSG_WAITALL) == b"to the host"
        peer.sendall(b"to the guest")
        got = b""
        while len(got) < 12:
            got += console.read(12 - len(got))
        assert got == b"to the guest"


@pytest.mark.parametrize("signal", SIGNALS)
def test_config_space_of_a_class_of_ones_own(front: Callable[..., Remote], signal: str) -> None:
    lamp = Lamp()
    remote = front(lamp, "lamp0", signal=signal, config_size=5)
    driver = remote.driver("lamp0", LampDriver)
    assert len(driver.device.config()) == 5
    event = driver.queue(1).submit([], 64)
    driver.queue(0).submit([b"on"], 0).result(DEADLINE)
    assert event.result(DEADLINE) == b"got on"
    lamp.level = 77
    assert driver.changes.acquire(timeout=DEADLINE)
    assert driver.device.config()[0] == 77
    driver.device.write_config(4, b"\x03")
    assert driver.device.config()[4] == 3
    with pytest.raises(vbus.DriverError) as refused:
        driver.device.write_config(0, b"\x01")
    assert refused.value.errno == errno.EPERM
    assert driver.device.config()[0] == 77


def frames(pair: int, count: int = 8) -> list[bytes]:
    return [bytes([255] * 6 + [2, 0, 0, 0, 0, pair, 8, 0]) + bytes([n]) * 50 for n in range(count)]


def exchange(net: drivers.Net, pairs: int) -> None:
    """Every frame of every pair comes back from a loopback."""
    sent = [frame for pair in range(pairs) for frame in frames(pair)]
    for pair in range(pairs):
        net.send(frames(pair), pair=pair).result(DEADLINE)
    got: list[bytes] = []
    while len(got) < len(sent):
        got += net.recv(timeout=DEADLINE)
    assert sorted(got) == sorted(sent)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_a_network_whose_pairs_the_front_end_chooses(front: Callable[..., Remote], signal: str, packed: bool) -> None:
    device = Net(queue_pairs=2)
    remote = front(device, "net0", signal=signal, mac=bytes.fromhex("525400aabbcc"))
    net = remote.driver("net0", drivers.Net, packed=packed)
    assert (net.max_pairs, net.mac.hex(), net.link, device.pairs) == (2, "525400aabbcc", True, 1)
    exchange(net, 1)
    net.set_queue_pairs(2)
    assert wait_until(lambda: device.pairs == 2, DEADLINE)
    exchange(net, 2)
    net.set_queue_pairs(1)
    assert wait_until(lambda: device.pairs == 1, DEADLINE)
    exchange(net, 1)
    # What only a front-end that filters could promise is not promised.
    assert not net.has("CTRL_RX")
    assert not net.has("GUEST_ANNOUNCE")


@pytest.mark.parametrize("signal", SIGNALS)
def test_several_queues_are_begun_anew_and_come_back(
    bus: vbus.Bus, front: Callable[..., Remote], tmp_path: Path, signal: str
) -> None:
    net, disk = Net(queue_pairs=2), Blk(memory="1 MiB", queues=4)
    for n in range(3):
        with contextlib.ExitStack() as stack:
            one = stack.enter_context(front(net, "net0", signal=signal))
            other = stack.enter_context(front(disk, "disk0", signal=signal))
            for again in range(2):
                nic = one.driver("net0", drivers.Net)
                nic.set_queue_pairs(2)
                exchange(nic, 2)
                blk = other.driver("disk0", drivers.Blk)
                data = random.Random(2 * n + again).randbytes(64 << 10)
                writes = [blk.submit_write(data, at * len(data)) for at in range(8)]
                for write in writes:
                    write.result(DEADLINE)
                assert blk.pread(8 * len(data), 0) == 8 * data
                if again:
                    # Half the time a driver says that it ends.
                    nic.close()
                    blk.close()
        assert wait_until(lambda: bus.slot("net0").owner is None and bus.slot("disk0").owner is None, DEADLINE)
    assert not bus.slot("net0").violations
    assert not bus.slot("disk0").violations


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_device_that_fails_needs_a_reset_and_gets_one(front: Callable[..., Remote], signal: str) -> None:
    remote = front(Raises(), signal=signal)
    driver = remote.driver("d0", EchoDriver)
    assert driver.echo(b"well") == b"well"
    with pytest.raises(vbus.DriverError) as failed:
        driver.echo(b"fail")
    assert failed.value.errno == errno.EIO
    assert driver.device.status & Status.DEVICE_NEEDS_RESET
    assert remote.driver("d0", EchoDriver).echo(b"again") == b"again"


def test_notifications_in_band_are_messages(bus: vbus.Bus, front: Callable[..., Remote]) -> None:
    remote = front(Echo(), signal="in-band")
    driver = remote.driver("d0", EchoDriver)
    for n in range(50):
        assert driver.echo(b"%d" % n) == b"%d" % n
    kicks = connector(remote).counters(driver.device, 0)[2]
    assert 0 < kicks <= 51
    assert bus.slot("d0").kicks[0] == kicks
    # Both ends have a descriptor less a queue and direction: nothing but sockets carried it.
    assert not connector(remote).rings._vrings[0].bells


# Memory.


class Held(vbus.Device):
    """Echoes what it is given once it is let."""

    device_id = ECHO_ID
    queues = (vbus.Queue("held", pull=True), "echo")

    def __init__(self) -> None:
        self.kept: list[vbus.Request] = []
        self.going = False

    def available(self, queue: vbus.Queue) -> None:
        while (request := queue.take()) is not None:
            self.kept.append(request)
        if self.going:
            self.go()

    def go(self) -> None:
        self.going = True
        kept, self.kept = self.kept, []
        for request in kept:
            request.write(request.read())
            self.queue("held").complete(request)

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        request.write(request.read())


class HeldDriver(Driver):
    device_id = ECHO_ID
    features = vbus.features()
    queue_count = 2


def regions(bus: vbus.Bus) -> int:
    owner = bus.slot("d0").owner
    return 0 if owner is None else len(owner.memory.regions())


def test_memory_comes_and_goes_under_running_requests(bus: vbus.Bus, front: Callable[..., Remote]) -> None:
    device = Held()
    driver = front(device).driver("d0", HeldDriver)
    stop, wrong = threading.Event(), []

    def traffic() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            data = n.to_bytes(4, "little") * 1000
            if driver.queue(1).submit([data], len(data)).result(DEADLINE) != data:
                wrong.append(n)

    beside = threading.Thread(target=traffic)
    beside.start()
    try:
        assert wait_until(lambda: regions(bus) == 1, DEADLINE)
        for round_ in range(3):
            device.going = False
            asked: list[tuple[bytes, Future[bytes]]] = []
            for n in range(40):
                data = bytes([round_, n]) * (MIB // 4)
                asked.append((data, driver.queue(0).submit([data], len(data))))
            # They need 40 MiB, of which a region has 16.
            assert wait_until(lambda: regions(bus) >= 3, DEADLINE)
            assert wait_until(lambda: len(device.kept) == 40, DEADLINE)
            device.post(device.go)
            for data, answer in asked:
                assert answer.result(DEADLINE) == data
            assert wait_until(lambda: regions(bus) == 1, DEADLINE)
    finally:
        stop.set()
        beside.join(DEADLINE)
    assert not wrong
    assert not bus.slot("d0").violations


# What a device holds beside its rings.

TALLY = """\
import vbus


class Tally(vbus.Device):
    device_id = 0x7E01
    queues = ("requests",)

    def __init__(self) -> None:
        self.total = 0

    def handle(self, queue, request):
        self.total += len(request.read())
        request.write(self.total.to_bytes(8, "little"))

    def save_state(self):
        return b"tally" + self.total.to_bytes(8, "little")

    def load_state(self, data):
        if len(data) != 13 or data[:5] != b"tally":
            raise vbus.Violation("tally-state", f"{len(data)} bytes")
        self.total = int.from_bytes(data[5:], "little")
"""
TALLY_BUS = """
[bus]
name = "{name}"
[device.d0]
type = "tally.py:Tally"
[connector.d0]
type = "vhost-user"
device = "d0"
socket = "{name}.sock"
"""


@contextlib.contextmanager
def process(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that serves a tally, and its address."""
    (folder / "tally.py").write_text(TALLY)
    (folder / f"{name}.toml").write_text(TALLY_BUS.format(name=name))
    with serving(f"{name}.toml", cwd=folder) as (one, _):
        yield one, f"vhost-user:{folder / name}.sock"


def halt(pid: int) -> None:
    """Stop a process, so that what comes from now on is under way when it goes."""
    os.kill(pid, signals.SIGSTOP)

    def stopped() -> bool:
        # Behind the command's name in brackets.
        stats = [(one / "stat").read_text() for one in Path(f"/proc/{pid}/task").iterdir()]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    assert wait_until(stopped, DEADLINE)


def total(driver: EchoDriver, more: bytes) -> int:
    return int.from_bytes(driver.echo(more, 8), "little")


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_state_moves_from_one_process_to_another(tmp_path: Path, packed: bool) -> None:
    with (
        process(tmp_path, "source") as (_, here),
        process(tmp_path, "target") as (_, there),
        vbus.attach(here, device_id=ECHO_ID, name="d0") as source,
        vbus.attach(there, device_id=ECHO_ID, name="d0") as target,
    ):
        driver = source.driver("d0", EchoDriver, packed=packed)
        assert total(driver, b"12345") == 5
        state = connector(source).save_state()
        assert state == b"tally" + (5).to_bytes(8, "little")
        # The source goes on, as after a migration that failed, and can be asked again.
        assert total(driver, b"67") == 7
        connector(target).load_state(connector(source).save_state())
        other = target.driver("d0", EchoDriver, packed=packed)
        assert total(other, b"890") == 10
        # Also into one that is driven, whose rings stop for a while and go on.
        connector(target).load_state(state)
        assert total(other, b"6") == 6


def test_a_state_that_is_none_is_refused_by_name(bus: vbus.Bus, front: Callable[..., Remote], tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(TALLY, scope)
    tally = scope["Tally"]()
    remote = front(tally)
    for data in (b"", b"nonsense", bytes(MAX_STATE + 1)):
        with pytest.raises(vbus.DriverError) as refused:
            connector(remote).load_state(data)
        assert refused.value.errno == errno.EIO
    assert bus.slot("d0").violations["tally-state"] == 2
    assert total(remote.driver("d0", EchoDriver), b"x") == 1
    tally.total = 1 << 63
    tally.save_state = lambda: bytes(MAX_STATE + 1)
    with pytest.raises(vbus.DriverError) as refused:
        connector(remote).save_state()
    assert refused.value.errno == errno.EIO
    tally.save_state = lambda: bytes(MAX_STATE)
    assert connector(remote).save_state() == bytes(MAX_STATE)


def test_a_device_without_state_has_none_to_give(front: Callable[..., Remote]) -> None:
    remote = front(Echo())
    with pytest.raises(vbus.DriverError) as none:
        connector(remote).save_state()
    assert none.value.errno == errno.EOPNOTSUPP


class Keys(Driver):
    device_id = Input.device_id
    features = Input.features
    queue_count = 2


def test_a_key_that_is_half_pressed_is_let_go_elsewhere(front: Callable[..., Remote]) -> None:
    """A driver that moved with its guest gets the rest of what it was given the beginning of."""
    first, second = Input(), Input()
    source, target = front(first, "in0"), front(second, "in1")
    driver = source.driver("in0", Keys)
    pressed = driver.queue(0).submit([], 8)
    driver.queue(1).submit([bytes.fromhex("1100 0100 01000000")], 0).result(DEADLINE)
    assert wait_until(lambda: first.leds == "caps_lock", DEADLINE)
    assert wait_until(lambda: first.queue("events").served, DEADLINE)
    assert first.press("a")
    assert pressed.result(DEADLINE) == bytes.fromhex("0100 1e00 01000000")
    connector(target).load_state(connector(source).save_state())
    assert second.leds == "caps_lock"
    other = target.driver("in1", Keys)
    rest = [other.queue(0).submit([], 8) for _ in range(3)]
    assert [event.result(DEADLINE) for event in rest] == [
        bytes.fromhex("0000 0000 00000000"),
        bytes.fromhex("0100 1e00 00000000"),
        bytes.fromhex("0000 0000 00000000"),
    ]


# When it ends.


def test_an_unplugged_device_ends_what_is_under_way(bus: vbus.Bus, front: Callable[..., Remote]) -> None:
    device = Hangs()
    remote = front(device)
    driver = remote.driver("d0", EchoDriver)
    answers = [driver.queue(0).submit([b"x"], 8) for _ in range(5)]
    assert device.entered.wait(DEADLINE)
    bus.unplug("d0", surprise=True, timeout=0.1)
    for answer in answers:
        with pytest.raises(vbus.DriverError) as gone:
            answer.result(DEADLINE)
        assert gone.value.errno == errno.ECONNRESET
    device.let_go.set()
    with pytest.raises(vbus.DriverError):
        remote.driver("d0", EchoDriver)
    assert remote.lost is not None


def test_a_back_end_that_is_killed_ends_what_is_under_way(tmp_path: Path) -> None:
    with (
        process(tmp_path, "killed") as (one, address),
        vbus.attach(address, device_id=ECHO_ID, name="d0") as remote,
    ):
        driver = remote.driver("d0", EchoDriver)
        assert total(driver, b"1") == 1
        halt(one.pid)
        answers = [driver.queue(0).submit([b"x"], 8) for _ in range(200)]
        one.kill()
        one.wait(30)
        for answer in answers:
            with pytest.raises(vbus.DriverError) as gone:
                answer.result(DEADLINE)
            assert gone.value.errno == errno.ECONNRESET
        with pytest.raises(vbus.DriverError) as gone:
            driver.device.config()
        assert gone.value.errno in (errno.ENODEV, errno.ECONNRESET)


def test_who_comes_back_at_once_is_let_in(front: Callable[..., Remote]) -> None:
    device = Echo()
    for n in range(50):
        with front(device) as remote:
            assert remote.driver("d0", EchoDriver).echo(b"%d" % n) == b"%d" % n


def test_nothing_is_left_behind(bus: vbus.Bus, tmp_path: Path, leftovers: type[Leftovers]) -> None:
    bus.plug(Lamp(), "lamp0")
    bus.connect(VhostUser("lamp0", tmp_path / "lamp0.sock"))

    def once(signal: Literal["direct", "in-band"]) -> None:
        with vbus.attach(f"vhost-user:{tmp_path}/lamp0.sock", device_id=Lamp.device_id, signal=signal) as remote:
            driver = remote.driver("lamp0", LampDriver)
            driver.queue(0).submit([b"x"], 8).result(DEADLINE)
        assert wait_until(lambda: bus.slot("lamp0").owner is None, DEADLINE)

    for signal in SIGNALS:
        once(signal)
    before = leftovers()
    for _ in range(3):
        for signal in SIGNALS:
            once(signal)
    assert wait_until(lambda: not leftovers().exceeds(before), DEADLINE), f"{before} before, {leftovers()} now"


# Back-ends that offer less.


class Relay:
    """Stands between a front-end and a back-end, and hides some of what is offered."""

    def __init__(self, path: Path, behind: Path, features: int, protocol: ProtocolFeature) -> None:
        self.features, self.protocol = features, int(protocol)
        self.requests: list[Request] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run, args=(behind,))]
        self._threads[0].start()

    def _run(self, behind: Path) -> None:
        here, _ = self._listener.accept()
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        there.connect(str(behind))
        self._socks = [here, there]
        back = threading.Thread(target=self._copy, args=(there, here))
        self._threads.append(back)
        back.start()
        self._copy(here, there)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        reader = wire.Reader(source)
        with contextlib.suppress(OSError):
            while (got := reader.read()) is not None:
                data, fds = got
                message = codec.decode(data)
                assert isinstance(message, codec.Message)
                assert isinstance(message.request, Request)
                hidden = {Request.GET_FEATURES: self.features, Request.GET_PROTOCOL_FEATURES: self.protocol}
                if not message.reply:
                    self.requests.append(message.request)
                elif message.request in hidden and isinstance(message.payload, m.U64):
                    left = message.payload.value & ~hidden[message.request]
                    data = codec.encode(message.request, m.U64(left), reply=True)
                wire.send(target, data, fds)
                for fd in fds:
                    os.close(fd)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self._socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE)
        for sock in [*self._socks, self._listener]:
            sock.close()


ALL = ProtocolFeature((1 << 20) - 1)
NO_PROTOCOL = 1 << m.PROTOCOL_FEATURES


@pytest.mark.parametrize(
    ("features", "hidden", "missing"),
    [
        (NO_PROTOCOL, ALL, {Request.SET_VRING_ENABLE, Request.ADD_MEM_REG, Request.SET_STATUS, Request.GET_CONFIG}),
        (0, ProtocolFeature.REPLY_ACK, set()),
        (0, ProtocolFeature.RESET_DEVICE | ProtocolFeature.STATUS, {Request.RESET_DEVICE, Request.SET_STATUS}),
        (0, ProtocolFeature.STATUS, {Request.SET_STATUS, Request.GET_STATUS}),
        (0, ProtocolFeature.CONFIGURE_MEM_SLOTS, {Request.ADD_MEM_REG, Request.GET_MAX_MEM_SLOTS}),
        (0, ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS, {Request.ADD_MEM_REG}),
        (0, ProtocolFeature.MQ, {Request.GET_QUEUE_NUM}),
        (0, ProtocolFeature.BACKEND_REQ, {Request.SET_BACKEND_REQ_FD}),
        (0, ProtocolFeature.CONFIG, {Request.GET_CONFIG}),
    ],
)
def test_a_back_end_that_offers_less(
    bus: vbus.Bus, tmp_path: Path, features: int, hidden: ProtocolFeature, missing: set[Request]
) -> None:
    bus.plug(Held(), "d0")
    bus.connect(VhostUser("d0", tmp_path / "d0.sock"), "vm")
    device = bus.get("d0", Held)
    relay = Relay(tmp_path / "relay.sock", tmp_path / "d0.sock", features, hidden)
    try:
        with vbus.attach(f"vhost-user:{tmp_path}/relay.sock", device_id=ECHO_ID, name="d0") as remote:
            counted = not features and not hidden & ProtocolFeature.MQ
            assert remote.device("d0").max_queues == (2 if counted else 1)
            for _ in range(2):
                driver = remote.driver("d0", HeldDriver)
                device.going = False
                answers = [driver.queue(0).submit([bytes([n]) * MIB], MIB) for n in range(20)]
                assert wait_until(lambda: len(device.kept) == 20, DEADLINE)
                device.post(device.go)
                for n, answer in enumerate(answers):
                    assert answer.result(DEADLINE) == bytes([n]) * MIB
                driver.close()
                # None of it is under way any more, although not every back-end knows a reset.
                assert all(queue.core.in_flight == 0 and not queue.served for queue in device._queues)
    finally:
        relay.close()
    assert not bus.slot("d0").violations
    assert not missing & set(relay.requests)
    assert not features or not set(relay.requests) & {Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES}


# Back-ends that do what they must not.


class Hostile:
    """A back-end that answers as it should until it is asked one thing."""

    PROTOCOL = (
        ProtocolFeature.REPLY_ACK
        | ProtocolFeature.MQ
        | ProtocolFeature.CONFIG
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
        | ProtocolFeature.DEVICE_STATE
        | ProtocolFeature.INBAND_NOTIFICATIONS
    )

    def __init__(self, path: Path, at: Request, does: Callable[[Hostile, codec.Message], None]) -> None:
        self.at, self.does = at, does
        self.status = 0
        self.channel: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.sock, _ = self._listener.accept()
        reader = wire.Reader(self.sock)
        with contextlib.suppress(OSError, vbus.Violation):
            while (got := reader.read()) is not None:
                message = codec.decode(got[0])
                assert isinstance(message, codec.Message)
                assert isinstance(message.request, Request)
                if message.request is Request.SET_BACKEND_REQ_FD:
                    self.channel = socket.socket(fileno=got[1].pop())
                for fd in got[1]:
                    os.close(fd)
                if message.request is self.at:
                    self.does(self, message)
                else:
                    self._well(message)

    def _well(self, message: codec.Message) -> None:
        request, payload = message.request, message.payload
        assert isinstance(request, Request)
        if request is Request.SET_STATUS and isinstance(payload, m.U64):
            self.status = payload.value
        numbers = {
            Request.GET_FEATURES: 1 << m.PROTOCOL_FEATURES | 1 << vbus.virtio.features.VERSION_1,
            Request.GET_PROTOCOL_FEATURES: int(self.PROTOCOL),
            Request.GET_QUEUE_NUM: 1,
            Request.GET_MAX_MEM_SLOTS: 8,
            Request.GET_STATUS: self.status,
            Request.CHECK_DEVICE_STATE: 0,
            Request.SET_DEVICE_STATE_FD: m.NO_FD,
        }
        if request in numbers:
            self.answer(request, m.U64(numbers[request]))
        elif m.TABLE[request].answer is not None:
            self.answer(request, payload)
        elif message.need_reply:
            self.answer(request, m.U64(0))

    def answer(self, request: Request, payload: m.Payload, fds: int = 0) -> None:
        given = [os.open("/dev/null", os.O_RDONLY) for _ in range(fds)]
        wire.send(self.sock, codec.encode(request, payload, reply=True), given)
        for fd in given:
            os.close(fd)

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def say(self, data: bytes) -> None:
        assert self.channel is not None
        self.channel.sendall(data)

    def hang_up(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        for sock in (self._listener, getattr(self, "sock", None), self.channel):
            if sock is not None:
                sock.close()


def header(request: int, size: int, flags: int = 5) -> bytes:
    return codec.HEADER.pack(request, flags, size)


def half_an_answer(it: Hostile, _: codec.Message) -> None:
    it.raw(header(Request.GET_FEATURES, 8) + b"x")
    it.hang_up()


def two_answers(it: Hostile, message: codec.Message) -> None:
    for _ in range(2):
        it.answer(Request.GET_QUEUE_NUM, m.U64(1))


def none(it: Hostile, message: codec.Message) -> None:
    assert isinstance(message.request, Request)
    it.answer(message.request, m.U64(0))


HOSTILE: list[tuple[str, Request, Callable[[Hostile, codec.Message], None], int]] = [
    ("it hangs up", Request.GET_FEATURES, lambda it, _: it.hang_up(), errno.ECONNRESET),
    ("it hangs up later", Request.SET_VRING_NUM, lambda it, _: it.hang_up(), errno.ECONNRESET),
    ("it is silent", Request.GET_QUEUE_NUM, lambda it, _: None, errno.ETIMEDOUT),
    ("it is silent about a ring", Request.SET_VRING_ENABLE, lambda it, _: None, errno.ETIMEDOUT),
    ("half an answer", Request.GET_FEATURES, half_an_answer, errno.EPROTO),
    ("a short answer", Request.GET_FEATURES, lambda it, _: it.raw(header(1, 4) + bytes(4)), errno.EPROTO),
    ("a long answer", Request.GET_FEATURES, lambda it, _: it.raw(header(1, 1 << 20)), errno.EPROTO),
    ("of another version", Request.GET_FEATURES, lambda it, _: it.raw(header(1, 8, 6) + bytes(8)), errno.EPROTO),
    ("an answer to nothing known", Request.GET_FEATURES, lambda it, _: it.raw(header(99, 0)), errno.EPROTO),
    ("another answer", Request.SET_OWNER, lambda it, _: it.answer(Request.GET_FEATURES, m.U64(0)), errno.EPROTO),
    ("a question", Request.SET_OWNER, lambda it, _: it.raw(header(1, 0, 1)), errno.EPROTO),
    ("two answers", Request.GET_QUEUE_NUM, two_answers, errno.EPROTO),
    ("a descriptor", Request.GET_FEATURES, lambda it, _: it.answer(Request.GET_FEATURES, m.U64(1), 1), errno.EPROTO),
    ("nine of them", Request.GET_FEATURES, lambda it, _: it.answer(Request.GET_FEATURES, m.U64(1), 9), errno.EPROTO),
    ("a refusal", Request.SET_VRING_ADDR, lambda it, _: it.answer(Request.SET_VRING_ADDR, m.U64(1)), errno.EIO),
    ("no features", Request.SET_FEATURES, lambda it, _: it.answer(Request.SET_FEATURES, m.U64(1)), errno.EOPNOTSUPP),
    ("no memory", Request.ADD_MEM_REG, lambda it, _: it.answer(Request.ADD_MEM_REG, m.U64(1)), errno.EIO),
    ("no slots", Request.GET_MAX_MEM_SLOTS, none, errno.EPROTO),
    ("no queues", Request.GET_QUEUE_NUM, none, errno.EPROTO),
    (
        "another part of config space",
        Request.GET_CONFIG,
        lambda it, _: it.answer(Request.GET_CONFIG, m.Config(1, 0, bytes(60))),
        errno.EPROTO,
    ),
    ("junk on its channel", Request.SET_VRING_NUM, lambda it, _: it.say(bytes(12)), errno.EPROTO),
    (
        "a call of a queue that is not there",
        Request.SET_VRING_NUM,
        lambda it, _: it.say(codec.encode(m.BackendRequest.VRING_CALL, m.VringState(9, 0))),
        errno.EPROTO,
    ),
    (
        "an answer on its channel",
        Request.SET_VRING_NUM,
        lambda it, _: it.say(codec.encode(m.BackendRequest.VRING_CALL, m.U64(0), reply=True)),
        errno.EPROTO,
    ),
]


def use(address: str, timeout: float) -> int | None:
    """Ask everything of a device, and go on asking, as what is no answer may be heard after one; the errno."""
    try:
        with vbus.attach(address, device_id=ECHO_ID, name="d0", timeout=timeout, signal="in-band") as remote:
            driver = remote.driver("d0", EchoDriver)
            end = time.monotonic() + DEADLINE
            while time.monotonic() < end:
                driver.device.config()
    except vbus.DriverError as error:
        return error.errno
    return None


@pytest.mark.parametrize(("at", "does", "number"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_back_end_is_an_errno_and_leaves_nothing(
    tmp_path: Path,
    leftovers: type[Leftovers],
    at: Request,
    does: Callable[[Hostile, codec.Message], None],
    number: int,
) -> None:
    before = leftovers()
    back_end = Hostile(tmp_path / "it.sock", at, does)
    try:
        limit = 0.5 if number == errno.ETIMEDOUT else DEADLINE
        assert use(f"vhost-user:{tmp_path}/it.sock", limit) == number
    finally:
        back_end.close()
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} before, {leftovers()} now"


def transfer_state(address: str) -> list[int]:
    """The errnos of a transfer in each direction."""
    numbers = []
    with vbus.attach(address, device_id=ECHO_ID, timeout=DEADLINE) as remote:
        for transfer in (connector(remote).save_state, lambda: connector(remote).load_state(b"x")):
            with pytest.raises(vbus.DriverError) as told:
                transfer()
            numbers.append(told.value.errno)
    return numbers


@pytest.mark.parametrize(
    ("value", "fds", "number"),
    [(0, 0, errno.EPROTO), (m.NO_FD, 1, errno.EPROTO), (1 | m.NO_FD, 0, errno.EIO), (1, 1, errno.EIO)],
)
def test_a_channel_for_state_that_is_none(
    tmp_path: Path, leftovers: type[Leftovers], value: int, fds: int, number: int
) -> None:
    before = leftovers()
    request = Request.SET_DEVICE_STATE_FD
    back_end = Hostile(tmp_path / "it.sock", request, lambda it, _: it.answer(request, m.U64(value), fds))
    try:
        assert transfer_state(f"vhost-user:{tmp_path}/it.sock") == [number, number]
    finally:
        back_end.close()
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} before, {leftovers()} now"


def test_a_back_end_that_floods_its_channel_is_heard_once_at_a_time(tmp_path: Path) -> None:
    change = codec.encode(m.BackendRequest.CONFIG_CHANGE_MSG, m.Empty())

    def flood(it: Hostile, message: codec.Message) -> None:
        for _ in range(1000):
            it.say(change)
        it.answer(Request.SET_VRING_NUM, m.U64(0))

    back_end = Hostile(tmp_path / "it.sock", Request.SET_VRING_NUM, flood)
    try:
        with vbus.attach(f"vhost-user:{tmp_path}/it.sock", device_id=ECHO_ID, name="d0", timeout=DEADLINE) as remote:
            heard: list[str] = []
            remote.on_event(lambda kind, _: heard.append(kind))
            driver = remote.driver("d0", EchoDriver)
            assert wait_until(lambda: connector(remote)._generation == 1000, DEADLINE)
            assert wait_until(lambda: bool(heard), DEADLINE)
            assert len(driver.device.config()) == 256
            assert len(heard) < 1000
    finally:
        back_end.close()


def test_what_a_front_end_must_be_told(tmp_path: Path) -> None:
    address = f"vhost-user:{tmp_path}/none.sock"
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, "say which class of device is there"),
        ({"device_id": 4, "signal": "tunnelled"}, "write direct or in-band"),
        ({"device_id": 4, "queues": 0}, "there is at least one"),
        ({"device_id": 4, "config_size": 257}, "0 to 256 bytes"),
        ({"device_id": 1, "mac": b"\xff" * 6}, "the address of one station"),
    ]
    for options, said in mistakes:
        with pytest.raises(vbus.UsageError, match=said):
            vbus.attach(address, **options)
    with pytest.raises(vbus.UsageError, match="are for vhost-user:PATH"):
        vbus.attach(str(tmp_path / "none.sock"), device_id=4)
    with pytest.raises(vbus.DriverError) as none:
        vbus.attach(address, device_id=4)
    assert none.value.errno == errno.ENOENT


# Back-ends that nobody here wrote.

STORAGE_DAEMON = shutil.which("qemu-storage-daemon")
TESTPMD = shutil.which("dpdk-testpmd")


class StorageDaemon:
    """`qemu-storage-daemon`, which exports an image, with its monitor on standard input and output."""

    def __init__(self, folder: Path, image: Path, queues: int, *, writable: bool) -> None:
        assert STORAGE_DAEMON is not None
        self.socket = folder / "qsd.sock"
        export = f"type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={self.socket},num-queues={queues}"
        self.process = subprocess.Popen(
            [
                STORAGE_DAEMON,
                *("--chardev", "stdio,id=mon", "--monitor", "chardev=mon"),
                *("--blockdev", f"driver=file,node-name=n0,filename={image}"),
                *("--export", f"{export},writable={'on' if writable else 'off'}"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert "QMP" in self.process.stdout.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        while True:
            said: dict[str, Any] = json.loads(self.process.stdout.readline())
            if "event" not in said:
                return said

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def storage_daemon(tmp_path: Path) -> Iterator[Callable[..., StorageDaemon]]:
    with contextlib.ExitStack() as stack:

        def start(image: Path, queues: int = 1, *, writable: bool = True) -> StorageDaemon:
            daemon = StorageDaemon(tmp_path, image, queues, writable=writable)
            stack.callback(daemon.end)
            return daemon

        yield start


@pytest.mark.skipif(STORAGE_DAEMON is None, reason="no qemu-storage-daemon: apt-get install qemu-utils")
@pytest.mark.parametrize("queues", [1, 4])
def test_the_disk_of_a_storage_daemon(
    tmp_path: Path, storage_daemon: Callable[..., StorageDaemon], queues: int
) -> None:
    chance = random.Random(queues)
    image = tmp_path / "disk.img"
    before = chance.randbytes(4 * MIB)
    image.write_bytes(before)
    daemon = storage_daemon(image, queues)
    for _ in range(2):
        with vbus.attach(f"vhost-user:{daemon.socket}", device_id=vbus.DeviceID.BLOCK, name="disk") as remote:
            disk = remote.driver("disk", drivers.Blk)
            assert disk.size == 4 * MIB
            assert len(disk.device.queues) == queues
            assert disk.pread(4 * MIB, 0) == before
            data = chance.randbytes(MIB)
            at = chance.randrange(3 * MIB)
            disk.pwrite(data, at)
            disk.flush()
            before = before[:at] + data + before[at + len(data) :]
            assert image.read_bytes() == before
            # Another driver of the same front-end begins where nothing was.
            again = remote.driver("disk", drivers.Blk)
            writes = [again.submit_write(bytes([n]) * 4096, n * 4096) for n in range(64)]
            for write in writes:
                write.result(DEADLINE)
            before = b"".join(bytes([n]) * 4096 for n in range(64)) + before[64 * 4096 :]
            assert again.pread(4 * MIB, 0) == before
    assert image.read_bytes() == before


@pytest.mark.skipif(STORAGE_DAEMON is None, reason="no qemu-storage-daemon: apt-get install qemu-utils")
def test_a_storage_daemons_disk_that_grows_and_goes(
    tmp_path: Path, storage_daemon: Callable[..., StorageDaemon]
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    daemon = storage_daemon(image, 2)
    with vbus.attach(f"vhost-user:{daemon.socket}", device_id=2, name="disk") as remote:
        disk = remote.driver("disk", drivers.Blk)
        assert "return" in daemon.ask("block_resize", **{"node-name": "n0", "size": 2 * MIB})
        assert wait_until(lambda: disk.size == 2 * MIB, DEADLINE)
        disk.pwrite(b"beyond", 2 * MIB - 6)
        assert disk.pread(6, 2 * MIB - 6) == b"beyond"
        halt(daemon.process.pid)
        reads = [disk.submit_read(4096, 0) for _ in range(50)]
        daemon.end()
        for read in reads:
            with pytest.raises(vbus.DriverError) as gone:
                read.result(DEADLINE)
            assert gone.value.errno == errno.ECONNRESET


@pytest.mark.skipif(STORAGE_DAEMON is None, reason="no qemu-storage-daemon: apt-get install qemu-utils")
def test_a_storage_daemons_disk_that_is_read_only(tmp_path: Path, storage_daemon: Callable[..., StorageDaemon]) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"fixed" * 1000 + bytes(MIB - 5000))
    daemon = storage_daemon(image, writable=False)
    command = (sys.executable, "-m", "vbus", "driver", f"vhost-user:{daemon.socket}")
    done = subprocess.run([*command, "blk", "--read", "5000"], capture_output=True, timeout=60, check=True)
    assert done.stdout == b"fixed" * 1000
    listed = subprocess.run([*command, "--device-id", "2", "--json"], capture_output=True, timeout=60, check=True)
    [row] = json.loads(listed.stdout)
    assert (row["name"], row["type"], row["device_id"]) == ("qsd", "blk", 2)
    assert "RO" in row["offered"]
    with vbus.attach(f"vhost-user:{daemon.socket}", device_id=2, name="disk") as remote:
        disk = remote.driver("disk", drivers.Blk)
        with pytest.raises(vbus.DriverError) as refused:
            disk.pwrite(b"x", 0)
        assert refused.value.errno == errno.EROFS


@pytest.mark.skipif(TESTPMD is None, reason="no dpdk-testpmd: apt-get install dpdk-dev")
def test_a_network_of_dpdk(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    eal = ["--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "-l", "0-1", "--file-prefix", f"vbus-{os.getpid()}"]
    port = ["--vdev", f"net_vhost0,iface={path},queues=1"]
    assert TESTPMD is not None
    peer = subprocess.Popen(
        [TESTPMD, *eal, *port, "--", "--interactive", "--forward-mode=io", "--total-num-mbufs=4096"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert peer.stdin is not None
        peer.stdin.write("start\n")
        peer.stdin.flush()
        assert wait_until(lambda: path.exists() or peer.poll() is not None, 60)
        assert peer.poll() is None, peer.stdout.read() if peer.stdout else ""
        for _ in range(2):
            with vbus.attach(f"vhost-user:{path}", device_id=vbus.DeviceID.NETWORK, name="net") as remote:
                net = remote.driver("net", drivers.Net)
                for _ in range(5):
                    exchange(net, 1)
        peer.communicate("stop\nquit\n", timeout=60)
    finally:
        peer.kill()
        peer.wait()
