"""What the tests share: a bus of their own behind each connector, and an eye on what they leave behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

import vbus
from vbus import _core
from vbus.bus import Bus, Connector, Device
from vbus.proxy import Remote

pytest_plugins = ["skips"] if (Path(__file__).parent / "skips.py").exists() else []

CONNECTORS = (
    "process-tunnelled",
    "process-direct",
    "stream-unix",
    "stream-tcp",
    "ivshmem-tunnelled",
    "ivshmem-direct",
)


def _without_io_uring() -> str:
    """Why nothing that uses it can be tested here; empty where it can."""
    try:
        _core.BlkEngine.permitted()
    except OSError as error:
        return f"io_uring is not permitted here: {error.strerror}"
    return ""


WITHOUT_IO_URING = _without_io_uring()
needs_io_uring = pytest.mark.skipif(bool(WITHOUT_IO_URING), reason=WITHOUT_IO_URING)


# Behind a shell's `&` an interrupt is ignored, and would be in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Attached(Protocol):
    """Plugs devices on a bus and attaches to it over the connector under test."""

    def __call__(self, **devices: Device) -> tuple[Bus, Remote]: ...


def make_connector(kind: str, folder: Path, name: str = "c") -> Connector:
    """A connector of the kind that a test is parametrised with."""
    match kind:
        case "process-tunnelled":
            return vbus.connectors.Process(folder / f"{name}.sock")
        case "process-direct":
            return vbus.connectors.Process(folder / f"{name}.sock", signal="direct")
        case "stream-unix":
            return vbus.connectors.Stream(f"unix:{folder / name}.sock")
        case "stream-tcp":
            return vbus.connectors.Stream("tcp:127.0.0.1:0")
        case "ivshmem-tunnelled":
            return vbus.connectors.Ivshmem(folder / f"{name}.sock", keep=False)
        case "ivshmem-direct":
            return vbus.connectors.Ivshmem(folder / f"{name}.sock", signal="direct", keep=False)
    raise ValueError(kind)


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test's sockets and locks apart, in a short path."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("VBUS_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture(params=CONNECTORS)
def connector_kind(request: pytest.FixtureRequest) -> str:
    """Each connector in turn."""
    return str(request.param)


@pytest.fixture
def make_bus() -> Iterator[Callable[..., Bus]]:
    """Buses that are stopped when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "test", **options: object) -> Bus:
            bus = Bus(name, **options)  # type: ignore[arg-type]
            stack.callback(bus.stop)
            bus.start()
            return bus

        yield make


@pytest.fixture(params=["native", "python"])
def both_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What serves devices that do not say: a native engine where there is one, or their own code in Python."""
    if request.param == "python":
        monkeypatch.setattr("vbus.bus.workers.DEFAULT_WORKERS", 0)
    return str(request.param)


@pytest.fixture
def attached(connector_kind: str, make_bus: Callable[..., Bus], tmp_path: Path) -> Iterator[Attached]:
    """A bus with devices, and a driver's side attached over the connector under test."""
    with contextlib.ExitStack() as stack:

        def make(**devices: Device) -> tuple[Bus, Remote]:
            bus = make_bus()
            for name, device in devices.items():
                bus.plug(device, name)
            connector = bus.connect(make_connector(connector_kind, tmp_path))
            remote = stack.enter_context(vbus.attach(connector.address))
            return bus, remote

        yield make


class Leftovers:
    """Counts what a process holds: descriptors, threads, mappings of memfds."""

    def __init__(self) -> None:
        gc.collect()
        self.fds = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()
        self.maps = sum("memfd:" in line for line in Path("/proc/self/maps").read_text().splitlines())

    def __repr__(self) -> str:
        return f"descriptors {self.fds}, threads {self.threads}, memfd mappings {self.maps}"

    def exceeds(self, other: Leftovers, slack: int = 0) -> bool:
        """Whether this holds more than `other`."""
        return self.fds > other.fds + slack or self.threads > other.threads + slack or self.maps > other.maps + slack


@pytest.fixture
def leftovers() -> type[Leftovers]:
    """For tests that count before and after."""
    return Leftovers


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> bool:
    """Wait until something is so; whether it came to be so in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
