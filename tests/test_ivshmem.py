"""One function, a whole bus: guests that begin anew, lie, and go; QEMU itself takes the function, too."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import vbus
from command import VBUS, out
from command import vbus as command
from conftest import wait_until
from models import Echo, EchoDriver
from vbus import msg
from vbus.bus import Bus
from vbus.connectors import Ivshmem
from vbus.connectors.ivshmem import SESSION_PAUSE
from vbus.errors import DriverError, UsageError
from vbus.proxy import Remote
from vbus.proxy.connectors.ivshmem import Function, IvshmemConnector
from vbus.proxy.loop import Loop
from vbus.shmem import ivshmem
from vbus.shmem.area import HEADER_SIZE, SESSION, SESSION_REQUEST, Area, Geometry
from vbus.shmem.link import Link

QEMU = shutil.which("qemu-system-x86_64")
SOURCES = 64
"""A small area: what is tested is not its size."""


@pytest.fixture
def served(make_bus: Callable[..., Bus], tmp_path: Path) -> tuple[Bus, Ivshmem]:
    """A bus with an echo behind a function."""
    bus = make_bus(max_sources=SOURCES)
    bus.plug(Echo(), "echo")
    return bus, bus.connect(Ivshmem(tmp_path / "guest.sock", keep=False))


@pytest.fixture
def function(served: tuple[Bus, Ivshmem]) -> Iterator[Function]:
    """What its guest has."""
    _, connector = served
    assert connector.socket is not None
    function = Function(connector.socket, 10)
    yield function
    function.close()


def drive(function: Function) -> Remote:
    """Begin a session on a function that is open already, and look around."""
    connector = IvshmemConnector(function, Loop("driver"))
    hello = connector.call(msg.Hello(1, 65528, 0), msg.HelloResponse)
    connector.max_message = hello.max_msg_size
    connector.accept(hello)
    remote = Remote(connector, hello)
    remote.discover()
    return remote


def is_lost(remote: Remote) -> bool:
    """Whether its bus has ended the session."""
    return remote.connector.lost is not None


def abandon(remote: Remote) -> None:
    """The kernel ends without a word: nobody listens any more."""
    remote.connector.loop.close()


class Again(Function):
    """The same memory and doorbells, for another kernel: the first one ended without a word."""

    def __init__(self, first: Function) -> None:
        self.__dict__.update(first.__dict__)
        self.sock = first.sock.dup()
        self.fd = os.dup(first.fd)


def departed(connector: Ivshmem) -> list[str]:
    """Why sessions ended."""
    return [row["reason"] for row in connector.describe()["departed"]]


def test_a_guest_that_begins_anew_finds_everything_as_at_first(served: tuple[Bus, Ivshmem], function: Function) -> None:
    bus, connector = served
    for session in range(5):
        remote = drive(Again(function))
        assert [device.name for device in remote] == ["echo"]
        driver = remote.driver("echo", EchoDriver)
        assert driver.echo(b"hello %d" % session) == b"hello %d" % session
        assert len(connector.peers) == 1
        owner = bus.slot("echo").owner
        assert owner is connector.peers[0]
        abandon(remote)
    assert departed(connector) == ["its guest begins anew"] * 4


def test_a_guest_that_is_still_there_hears_that_its_session_ended(
    served: tuple[Bus, Ivshmem], function: Function
) -> None:
    remote = drive(Again(function))
    driver = remote.driver("echo", EchoDriver)
    function.begin()
    assert wait_until(partial(is_lost, remote))
    with pytest.raises(DriverError):
        driver.echo(b"x")
    remote.close()


def test_nothing_of_one_session_is_seen_in_the_next(served: tuple[Bus, Ivshmem], function: Function) -> None:
    area = function.begin()
    total = area.geometry.total
    view = memoryview(function.memory)
    view[HEADER_SIZE:total] = random.randbytes(total - HEADER_SIZE)
    assert Area.sessions(view)[0]
    function.begin()
    header = len(area.geometry.pack())
    assert not any(view[header:SESSION_REQUEST])
    sleep = area.geometry.events_to_device.sleep
    assert not any(view[SESSION + 4 : sleep])
    # There the bus has said that it sleeps.
    assert not any(view[sleep + 8 * 64 : total])


def test_a_bus_that_parts_from_a_guest_says_so_and_takes_it_back(
    served: tuple[Bus, Ivshmem], function: Function
) -> None:
    _, connector = served
    area = function.begin()
    link = Link(area, device_side=False, bell_in=function.inward[0], bell_out=function.outward[0])
    # A header with a reserved bit.
    link.send(bytes.fromhex("060300000300 0c0004030201"))
    assert wait_until(lambda: not function.has_session)
    assert [reason.split(":")[0] for reason in departed(connector)] == ["malformed-message"]
    assert Area.sessions(memoryview(function.memory))[1] == 0
    with drive(Again(function)) as remote:
        assert remote.driver("echo", EchoDriver).echo(b"again") == b"again"


def test_whatever_a_guest_writes_the_bus_and_its_others_go_on(
    served: tuple[Bus, Ivshmem], function: Function, tmp_path: Path
) -> None:
    bus, _ = served
    bus.plug(Echo(), "other")
    near = bus.connect(vbus.connectors.Process(tmp_path / "near.sock"), "near")
    rng = random.Random("hostile guest")
    view = memoryview(function.memory)
    places = Geometry.plan(SOURCES)
    events = places.events_to_device
    with vbus.attach(near.address) as remote:
        other = remote.driver("other", EchoDriver)
        for round_ in range(60):
            match rng.randrange(5):
                case 0:
                    Area.request_session(view, rng.getrandbits(32))
                case 1:
                    at = places.link_to_device + rng.randrange(0, 400, 4)
                    struct.pack_into("<I", view, at, rng.getrandbits(32))
                case 2:
                    at = events.slots + rng.randrange(0, 8 * SOURCES * 16, 4)
                    struct.pack_into("<I", view, at, rng.choice([1, 2, 3, rng.getrandbits(32)]))
                case 3:
                    struct.pack_into("<I", view, places.events_to_driver.sleep + 64 * rng.randrange(8), round_)
                case 4:
                    at = rng.randrange(0, places.total - 64)
                    view[at : at + 64] = rng.randbytes(64)
            for bell in rng.sample(function.outward, 4):
                bell.ring()
            assert other.echo(b"%d" % round_) == b"%d" % round_
    with drive(Again(function)) as again:
        assert again.driver("echo", EchoDriver).echo(b"after all") == b"after all"
    assert not bus.slot("other").violations


def test_a_guest_that_asks_for_sessions_without_pause_gets_them_with_pauses(
    served: tuple[Bus, Ivshmem], function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connector = served
    renew, renewed = Area.renew, []

    def counted(area: Area, session: int) -> None:
        renewed.append(session)
        renew(area, session)

    monkeypatch.setattr(Area, "renew", counted)
    view = memoryview(function.memory)
    began = time.monotonic()
    asked = 0
    while time.monotonic() - began < 1:
        asked += 1
        Area.request_session(view, asked)
        function.outward[ivshmem.SESSION_VECTOR].ring()
    function.begin()
    assert asked > 100
    # However slow this machine is: no two of them began sooner one after the other.
    assert 1 < len(renewed) <= (time.monotonic() - began) / SESSION_PAUSE + 1
    assert set(departed(connector)) == {"its guest begins anew"}


def test_whoever_speaks_on_the_socket_or_leaves_is_parted_from(served: tuple[Bus, Ivshmem]) -> None:
    bus, connector = served
    for last_words, reason in ((b"x", "it spoke, which no client does"), (b"", "the machine is gone")):
        assert connector.socket is not None
        function = Function(connector.socket, 10)
        drive(function).driver("echo", EchoDriver)
        if last_words:
            function.sock.send(last_words)
        else:
            function.sock.shutdown(socket.SHUT_RDWR)
        assert wait_until(lambda: not connector.peers)
        assert departed(connector)[-1] == reason
        assert wait_until(lambda: bus.slot("echo").owner is None)
        function.close()


def test_one_notification_is_one_doorbell_where_signals_are_direct(
    make_bus: Callable[..., Bus], tmp_path: Path
) -> None:
    for signal in ("direct", "tunnelled"):
        bus = make_bus(signal, max_sources=SOURCES)
        bus.plug(Echo(), "echo")
        connector = bus.connect(Ivshmem(tmp_path / f"{signal}.sock", signal=signal, keep=False))
        with vbus.attach(connector.address) as remote:
            driver = remote.driver("echo", EchoDriver)
            futures = [driver.queue(0).submit([b"x"], 1) for _ in range(2000)]
            assert {future.result(30) for future in futures} == {b"x"}

            def settled(bus: Bus = bus, signal: str = signal) -> bool:
                [row] = bus.stat()
                ways = row["to_device"], row["to_driver"]
                rung = [way["rung"] for way in ways]
                least = [way["signalled"] for way in ways] if signal == "direct" else [1, 1]
                return rung >= least and all(way["rung"] <= way["signalled"] for way in ways)

            assert wait_until(settled), bus.stat()


def test_what_cannot_be_is_said_in_a_line(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    for memory in (1 << 20, "48 MiB", "lots"):
        with pytest.raises(UsageError, match="memory"):
            Ivshmem(memory=memory)
    with pytest.raises(UsageError, match="signal"):
        Ivshmem(signal="shouted")  # type: ignore[arg-type]
    bus = make_bus(max_sources=65536)
    with pytest.raises(UsageError, match="give it more"):
        bus.connect(Ivshmem(tmp_path / "s", memory="32 MiB"))


def test_what_a_machine_may_have_mapped_is_limited(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = make_bus(max_sources=SOURCES)
    bus.set_member(f"uid:{os.getuid()}", "limit.memory", "100 MiB")
    connector = bus.connect(Ivshmem(tmp_path / "guest.sock", memory="64 MiB", keep=False))
    assert connector.socket is not None
    first = Function(connector.socket, 10)
    first.begin()
    with pytest.raises(DriverError):
        Function(connector.socket, 2)
    assert "may have 100 MiB of memory" in departed(connector)[-1]
    first.close()
    assert wait_until(lambda: not connector.peers)

    def another() -> bool:
        try:
            second = Function(tmp_path / "guest.sock", 10)
        except DriverError:
            return False
        second.close()
        return True

    assert wait_until(another), "what the first had was given back"


FILE = """
[bus]
name = "machine"

[device.rng0]
type = "rng"

[connector.guest]
type = "ivshmem"
memory = "32 MiB"
"""


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64: apt-get install qemu-system-x86")
def test_qemu_takes_the_function_as_it_is_told(tmp_path: Path) -> None:
    assert QEMU is not None
    file = tmp_path / "machine.toml"
    file.write_text(FILE)
    bus = subprocess.Popen([*VBUS, "run", str(file)], stdout=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: command("ls", "machine", cwd=tmp_path).returncode == 0)
        words = json.loads(out("qemu-args", str(file), "--json", "--root-ports", "0", cwd=tmp_path))
        assert words == json.loads(out("qemu-args", "machine", "--json", "--root-ports", "0", cwd=tmp_path))
        monitor = "info qtree\ninfo pci\nquit\n"
        done = subprocess.run(
            [QEMU, *words, "-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"],
            input=monitor,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "ivshmem-doorbell" in done.stdout
        assert "1af4:1110" in done.stdout
        assert f"vectors = {ivshmem.VECTORS}" in done.stdout
    finally:
        bus.terminate()
        assert bus.wait(20) == 0


def serve(folder: Path, **options: object) -> tuple[Bus, Ivshmem]:
    """A bus with an echo, whose guests outlive it."""
    bus = Bus("lasting", max_sources=SOURCES)
    bus.plug(Echo(), "echo")
    connector = bus.connect(Ivshmem(folder / "guest.sock", **options))  # type: ignore[arg-type]
    bus.start()
    return bus, connector


def keepers(folder: Path) -> list[int]:
    """The processes that keep something for the connector here."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"vbus.shmem.keeper" not in (entry / "cmdline").read_bytes():
                continue
            held = {os.readlink(link) for link in (entry / "fd").iterdir()}
            if held & sockets(folder):
                found.append(int(entry.name))
    return found


def sockets(folder: Path) -> set[str]:
    """The Unix sockets with a path in this folder, as /proc has them."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return {f"socket:[{line.split()[6]}]" for line in lines if line.endswith(f"{folder}/guest.sock.keeper")}


def test_a_guest_outlives_the_process_that_serves_it(tmp_path: Path) -> None:
    bus, connector = serve(tmp_path)
    assert connector.socket is not None
    function = Function(connector.socket, 10)
    remote = drive(Again(function))
    assert remote.driver("echo", EchoDriver).echo(b"first") == b"first"
    for life in range(3):
        bus.stop()
        assert wait_until(partial(is_lost, remote))
        abandon(remote)
        assert len(keepers(tmp_path)) == 1
        bus, connector = serve(tmp_path)
        remote = drive(Again(function))
        assert remote.driver("echo", EchoDriver).echo(b"%d" % life) == b"%d" % life
    bus.stop()
    abandon(remote)
    remote.close()
    function.sock.shutdown(socket.SHUT_RDWR)
    function.close()
    assert wait_until(lambda: not keepers(tmp_path)), "it ends when there is nothing to keep"
    assert not (tmp_path / "guest.sock.keeper").exists()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the bus of the file in a process of its own, which is not left behind."""
    file = tmp_path / "machine.toml"
    file.write_text(FILE + f'socket = "{tmp_path}/guest.sock"\n')
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([*VBUS, "run", str(file)], stdout=subprocess.DEVNULL))
        assert wait_until(lambda: command("ls", "machine", cwd=tmp_path).returncode == 0)
        return started[-1]

    yield start
    for served in started:
        served.kill()
        served.wait()


def test_a_process_that_is_killed_is_followed_by_another(
    tmp_path: Path, run: Callable[[], subprocess.Popen[bytes]]
) -> None:
    served = run()
    function = Function(tmp_path / "guest.sock", 10)
    function.timeout = 30
    abandon(drive(Again(function)))
    for _ in range(3):
        served.kill()
        served.wait()
        # Asked for while nobody serves: it is heard as soon as somebody does.
        Area.request_session(memoryview(function.memory), 7)
        function.outward[ivshmem.SESSION_VECTOR].ring()
        served = run()
        assert wait_until(lambda: Area.sessions(memoryview(function.memory))[1] == 7)
        remote = drive(Again(function))
        assert [device.name for device in remote] == ["rng0"]
        abandon(remote)
    served.terminate()
    assert served.wait(20) == 0
    function.sock.shutdown(socket.SHUT_RDWR)
    function.close()
    assert wait_until(lambda: not keepers(tmp_path))


def test_a_bus_of_another_shape_does_not_go_on_with_a_guest(tmp_path: Path) -> None:
    bus, connector = serve(tmp_path)
    assert connector.socket is not None
    function = Function(connector.socket, 10)
    function.begin()
    bus.stop()
    bus, connector = serve(tmp_path, memory="128 MiB")
    try:
        assert "start its guest anew" in departed(connector)[-1]
        # The keeper has let go, and so has the bus.
        assert function.sock.recv(1) == b""
    finally:
        bus.stop()
        function.close()
    assert wait_until(lambda: not keepers(tmp_path))
