"""The bus itself: names, numbers, sources, attributes, membership, and who runs when."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

import vbus
from conftest import make_connector, wait_until
from models import AsyncEcho, Echo, EchoDriver, Hangs, Lamp, LampDriver
from vbus.bus import Bus, Credentials, Members, pool
from vbus.errors import DriverError, NoSuchNameError, UsageError

MakeBus = Callable[..., Bus]


def test_names_are_checked_and_kept_apart(make_bus: MakeBus) -> None:
    bus = make_bus()
    bus.plug(Echo(), "one")
    with pytest.raises(UsageError, match="has a device 'one' already"):
        bus.plug(Echo(), "one")
    for bad in ("", "Upper", "a" * 64, "with space", "-x"):
        with pytest.raises(UsageError, match="a name is"):
            bus.plug(Echo(), bad)
    with pytest.raises(UsageError, match="plugged already"):
        bus.plug(bus.get("one", Echo), "two")
    with pytest.raises(NoSuchNameError, match="did you mean 'one'"):
        bus.slot("onee")
    with pytest.raises(UsageError, match="is a Echo, not a Lamp"):
        bus.get("one", Lamp)
    assert [slot.name for slot in bus.slots()] == ["one"]


def test_identities_outlast_a_restart(make_bus: MakeBus) -> None:
    first = Bus("steady")
    first.plug(Echo(), "one")
    second = Bus("steady")
    second.plug(Echo(), "zero")
    second.plug(Echo(), "one")
    assert first.uuid == second.uuid
    assert first.slot("one").uuid == second.slot("one").uuid
    wanted = UUID("12345678-1234-5678-1234-567812345678")
    second.plug(Echo(), "given", uuid=str(wanted))
    assert second.slot("given").uuid == wanted
    with pytest.raises(UsageError, match="hexadecimal"):
        second.plug(Echo(), "bad", uuid="nonsense")
    first.stop()
    second.stop()


def test_a_device_beyond_the_sources_is_refused_by_name(make_bus: MakeBus) -> None:
    bus = make_bus(max_sources=16)
    for n in range(8):
        bus.plug(Echo(), f"echo{n}")
    with pytest.raises(UsageError, match="device more: the bus has 8 event sources for queues"):
        bus.plug(Echo(), "more")
    assert len(bus.slots()) == 8
    bus.unplug("echo2")
    bus.plug(Echo(), "more")
    assert bus.slot("more").first_source == 2


def test_a_device_whose_plugging_fails_leaves_nothing(make_bus: MakeBus) -> None:
    class Fails(Echo):
        closed = False

        def plugged(self) -> None:
            raise UsageError("no such thing to serve")

        def unplugged(self) -> None:
            self.closed = True

    bus = make_bus()
    device = Fails()
    with pytest.raises(UsageError, match="no such thing"):
        bus.plug(device, "fails")
    assert device.closed
    assert bus.slots() == []
    bus.plug(Echo(), "fails")


def test_a_mask_names_features_that_exist(make_bus: MakeBus) -> None:
    bus = make_bus()
    with pytest.raises(UsageError, match="did you mean 'COLOUR'"):
        bus.plug(Lamp(), "lamp", mask=["COLOR"])
    assert bus.slots() == []


def test_attributes_are_typed_and_read_only_where_they_are(make_bus: MakeBus) -> None:
    class Counts(Echo):
        answer = vbus.attribute(int, get=lambda device: 42)
        on = vbus.attribute(bool, default=False)

    bus = make_bus()
    device = bus.plug(Counts(), "counts")
    assert bus.attributes("counts") == {"answer": 42, "on": False}
    with pytest.raises(UsageError, match="cannot be set"):
        device.answer = 3
    assert bus.set("counts", "on", "on") is True
    with pytest.raises(UsageError, match="on or off"):
        bus.set("counts", "on", "perhaps")


def test_a_value_outside_config_space_is_refused(make_bus: MakeBus) -> None:
    lamp = make_bus().plug(Lamp(), "lamp")
    with pytest.raises(UsageError, match="level"):
        lamp.level = 1 << 32
    assert lamp.level == 0


def test_an_unknown_attribute_raises(make_bus: MakeBus) -> None:
    assert not hasattr(make_bus().plug(Lamp(), "lamp"), "brightness")


# Threads.


def test_nothing_of_a_device_ever_overlaps(make_bus: MakeBus, tmp_path: Path) -> None:
    class Watched(Lamp):
        """Counts how many of its methods run at once."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = 0
            self.most = 0
            self.calls = 0

        def _enter(self) -> None:
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.0005)
            self.calls += 1
            self.inside -= 1

        def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            self._enter()

        def available(self, queue: vbus.Queue) -> None:
            self._enter()

        def config_written(self, fields: frozenset[str]) -> None:
            self._enter()

        def reset(self) -> None:
            self._enter()

        def ready(self) -> None:
            self._enter()

    bus = make_bus()
    lamp = bus.plug(Watched(), "lamp")
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    with vbus.attach(connector.address) as remote:
        for _ in range(5):
            driver = remote.driver("lamp", LampDriver)
            futures = [driver.queue(0).submit([b"x"], 0) for _ in range(60)]
            buffers = [driver.queue(1).submit([], 8) for _ in range(20)]
            for level in range(20):
                lamp.level = level
                lamp.post(lamp._enter)
                driver.device.write_config(4, bytes([level])) if level % 5 == 0 else None
            for future in futures:
                future.result(20)
            assert len(buffers) == 20
    assert lamp.calls > 400
    assert lamp.most == 1


def test_the_urgent_are_handled_first(make_bus: MakeBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Notes(Echo):
        def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            order.append(self.name)

    bus = make_bus()
    # None of them counts as stuck, for which the pool would grow.
    monkeypatch.setattr(pool, "STUCK_SECONDS", 60)
    hangers = []
    for n in range(pool.THREADS - 1):
        hangers.append(bus.plug(Hangs(), f"hang{n}"))
    blocker = bus.plug(Hangs(), "blocker")
    for priority in (7, 5, 3, 0):
        bus.plug(Notes(), f"p{priority}", priority=priority)
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    with vbus.attach(connector.address) as remote:
        drivers = {p: remote.driver(f"p{p}", EchoDriver) for p in (7, 5, 3, 0)}
        # All threads of the pool are held, so that everything is ready before any of it has a turn.
        for name, device in [*((f"hang{n}", h) for n, h in enumerate(hangers)), ("blocker", blocker)]:
            remote.driver(name, EchoDriver).queue(0).submit([b"x"], 1)
            assert device.entered.wait(20)
        futures = [drivers[p].queue(0).submit([b"x"], 0) for p in (7, 5, 3, 0)]
        blocker.let_go.set()
        for future in futures:
            future.result(20)
        for device in hangers:
            device.let_go.set()
    assert order == ["p0", "p3", "p5", "p7"]


def test_setters_work_from_any_thread_and_inside_a_handler(make_bus: MakeBus, tmp_path: Path) -> None:
    class SetsOthers(Echo):
        other: Lamp

        def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            self.other.level = int(request.read())

    bus = make_bus()
    lamp = bus.plug(Lamp(), "lamp")
    setter = bus.plug(SetsOthers(), "setter")
    setter.other = lamp
    connector = bus.connect(make_connector("stream-unix", tmp_path))
    with vbus.attach(connector.address) as remote:
        driver = remote.driver("setter", EchoDriver)
        driver.queue(0).submit([b"77"], 0).result(10)
        assert lamp.level == 77
        threads = [threading.Thread(target=setattr, args=(lamp, "level", n)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0 <= lamp.level < 20


def test_a_stop_names_what_hangs_and_goes_on(
    make_bus: MakeBus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entered = threading.Event()

    class HangsAsync(Echo):
        async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:  # type: ignore[override]
            entered.set()
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)

    bus = make_bus()
    device = bus.plug(Hangs(), "hangs")
    bus.plug(HangsAsync(), "never-ends")
    bus.plug(Echo(), "fine")
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    with vbus.attach(connector.address) as remote, caplog.at_level(logging.ERROR):
        for name in ("hangs", "never-ends"):
            remote.driver(name, EchoDriver).queue(0).submit([b"x"], 1)
        assert device.entered.wait(10)
        assert entered.wait(10)
        began = time.monotonic()
        assert sorted(bus.stop(timeout=0.5)) == ["hangs", "never-ends"]
        assert time.monotonic() - began < 20
    assert "test/hangs hangs" in caplog.text
    device.let_go.set()


def test_an_async_handler_that_is_under_way_is_cancelled_by_a_reset(make_bus: MakeBus, tmp_path: Path) -> None:
    class Sleeps(Echo):
        cancelled = 0

        async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:  # type: ignore[override]
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    bus = make_bus()
    device = bus.plug(Sleeps(), "sleeps")
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    with vbus.attach(connector.address) as remote:
        driver = remote.driver("sleeps", EchoDriver)
        futures = [driver.queue(0).submit([b"x"], 1) for _ in range(3)]
        time.sleep(0.1)
        driver.close()
        for future in futures:
            with pytest.raises(DriverError):
                future.result(10)
    assert device.cancelled == 3


def test_async_devices_run_on_the_callers_loop(tmp_path: Path) -> None:
    class Where(Echo):
        async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:  # type: ignore[override]
            self.loop = asyncio.get_running_loop()
            self.thread = threading.current_thread()
            request.write(request.read())

    class Says(Lamp):
        async def run(self) -> None:
            request = await self.queue("events").get()
            request.write(b"by itself")
            self.queue("events").complete(request)

    def drive(address: str) -> bytes:
        with vbus.attach(address) as remote:
            said = remote.driver("says", LampDriver).queue(1).submit([], 20).result(10)
            assert remote.driver("where", EchoDriver).echo(b"abc") == b"abc"
            return said

    async def main() -> None:
        async with Bus("test") as bus:
            device = bus.plug(Where(), "where")
            bus.plug(Says(), "says")
            connector = bus.connect(make_connector("process-tunnelled", tmp_path))
            assert await asyncio.to_thread(drive, connector.address) == b"by itself"
            assert device.loop is asyncio.get_running_loop()
            assert device.thread is threading.current_thread()
            with pytest.raises(UsageError, match="to_thread"):
                bus.unplug("where")
            await asyncio.to_thread(bus.unplug, "where")

    asyncio.run(main())


def test_a_bus_that_stopped_leaves_no_thread_and_no_descriptor(tmp_path: Path, leftovers: type) -> None:
    def live() -> None:
        with Bus("test") as bus:
            bus.plug(AsyncEcho(), "echo")
            connector = bus.connect(make_connector("stream-tcp", tmp_path))
            with vbus.attach(connector.address) as remote:
                assert remote.driver("echo", EchoDriver).echo(b"x") == b"x"

    live()
    before = leftovers()
    for _ in range(5):
        live()
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"


# Membership.


def test_members_are_users_and_groups() -> None:
    members = Members(["uid:1000", "gid:36", "uid:root"], owner=5)
    assert members.admits(Credentials(5))
    assert members.admits(Credentials(0))
    assert members.admits(Credentials(1000))
    assert members.admits(Credentials(7, frozenset({36})))
    assert not members.admits(Credentials(7, frozenset({37})))
    for bad in ("1000", "uid:", "user:me", "uid:no-such-user-here", "gid:no-such-group-here"):
        with pytest.raises(UsageError, match="member"):
            Members([bad])


OTHER = 61234
ATTACH = """
import sys, vbus
try:
    with vbus.attach(sys.argv[1]) as remote:
        print("in", len(list(remote)))
except vbus.DriverError as error:
    print("out", error.errno, error.strerror)
"""


def _as_other(address: str, *, group: int = OTHER) -> str:
    """What a process of another user sees."""
    words = ["setpriv", f"--reuid={OTHER}", f"--regid={group}", "--clear-groups", sys.executable, "-c", ATTACH, address]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def _others_can_import() -> bool:
    probe = [
        "setpriv",
        f"--reuid={OTHER}",
        f"--regid={OTHER}",
        "--clear-groups",
        sys.executable,
        "-c",
        "import vbus._core",
    ]
    return subprocess.run(probe, capture_output=True, check=False, cwd="/").returncode == 0


@pytest.mark.parametrize("kind", ["process-tunnelled", "stream-unix", "stream-tcp"])
def test_only_members_are_let_in(kind: str, make_bus: MakeBus, tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0 or not _others_can_import():
        # Becoming another user takes root, and an interpreter that the other user may run.
        who = Credentials(OTHER, frozenset({OTHER}))
        assert not make_bus().members.admits(who)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, members, group, admitted in (
            ("none", [], OTHER, False),
            ("user", [f"uid:{OTHER}"], OTHER, True),
            ("group", ["gid:61235"], 61235, kind != "stream-tcp"),
        ):
            bus = make_bus(f"bus-{name}", members=members)
            bus.plug(Echo(), "echo")
            connector = bus.connect(make_connector(kind, Path(folder), name))
            said = _as_other(connector.address, group=group)
            assert said.startswith("in 1" if admitted else "out 13"), said
            if not admitted:
                assert "is not a member" in connector.describe()["departed"][-1]["reason"]


def test_attaching_in_vain_leaves_nothing(tmp_path: Path, make_bus: MakeBus, leftovers: type) -> None:
    bus = make_bus()
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    path = connector.address.removeprefix("process:")

    def fail() -> None:
        for address in (f"{tmp_path}/nothing.sock", f"unix:{tmp_path}/nothing.sock", f"unix:{path}", "tcp:127.0.0.1:1"):
            with pytest.raises(DriverError):
                vbus.attach(address)

    fail()
    before = leftovers()
    for _ in range(10):
        fail()
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"
