"""Guests whose devices are a bus's: for a test, a file for the bus and a `with` block.

with running(BUS) as bus, guest(bus, modules=["virtio_rng"]) as vm:
    vm.run("head -c 16 /dev/hwrng")
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from vbus import config
from vbus.bus import Bus, Device
from vbus.connectors import Ivshmem, VhostUser
from vbus.control.server import Control
from vbus.devices import Blk, Net
from vbus.rundir import BusDirectory
from vbus.shmem import ivshmem
from vbus.vm import Guest, build
from vbus.vm.options import VhostUserDevice, device_options, function_options

MODULES = {"Net": ["virtio_net"], "Blk": ["virtio_blk"], "Rng": ["virtio_rng"], "Input": ["virtio_input", "evdev"]}
"""The guest's modules, by the class of the device."""
READERS = itertools.count()
BACKPORTS = os.environ.get("VBUS_GUEST_BACKPORTS") == "1"
"""Whether guests with these modules have the newer kernel of Debian's backports."""


def bus_modules() -> list[Path]:
    """Those modules, for the kernel that guests have, each after what it needs."""
    return build.bus_modules(backports=BACKPORTS)


def programs(folder: Path, *names: str) -> dict[str, bytes | str]:
    """Programs beside the tests, `NAME.c`, as a guest's files, made in a folder: they need nothing but a kernel."""
    made: dict[str, bytes | str] = {}
    for name in names:
        source = Path(__file__).with_name(f"{name}.c")
        words = ["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(folder / name), str(source)]
        subprocess.run(words, check=True)
        made[f"usr/bin/{name}"] = (folder / name).read_bytes()
    return made


def function_args(connector: Ivshmem) -> list[str]:
    """QEMU's options for the function that a connector serves."""
    assert connector.socket is not None
    return function_options(connector.name, connector.socket, ivshmem.VECTORS)


def device_args(
    machine: str, name: str, device: Device, path: Path, *, reconnect: bool = False, packed: bool = False
) -> list[str]:
    """QEMU's options for a device whose connector listens at a path. `packed`: with packed rings, if the class can."""
    mac = device.mac if isinstance(device, Net) else None
    served = VhostUserDevice(name, int(device.device_id), path, queues=len(device._queues), mac=mac)
    words = device_options(served, machine, "ms" if reconnect else "no")
    if packed and isinstance(device, Net | Blk):
        words[-1] += ",packed=on"
    return words


@contextlib.contextmanager
def namespace(name: str) -> Iterator[tuple[str, ...]]:
    """A network namespace of this name: the words that run a command in it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield ("ip", "netns", "exec", name)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@contextlib.contextmanager
def file_served(folder: Path, size: int, address: str, inside: Sequence[str]) -> Iterator[str]:
    """Random bytes at `http://ADDRESS:8000/file`, served inside: their SHA-256."""
    place = folder / "served"
    place.mkdir()
    data = os.urandom(size)
    (place / "file").write_bytes(data)
    with served(place, address, inside):
        yield hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def served(folder: Path, address: str, inside: Sequence[str]) -> Iterator[None]:
    """The files of a folder at `http://ADDRESS:8000/`, served inside."""
    server = subprocess.Popen(
        [
            *(*inside, sys.executable, "-m", "http.server"),
            *("--bind", address, "--directory", str(folder), "8000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        server.terminate()
        server.wait(20)


def reads_again_and_again(vm: Guest, disk: str) -> Callable[[], None]:
    """A program in a guest reads a disk without an end. Call what is returned to end it: it waits for no disk that was.

    To look for the program among the processes would not do: between two reads there is none.
    """
    mark = f"/tmp/reader{next(READERS)}"
    read = f"dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct || sleep 0.1"
    vm.run(f"(until test -e {mark}.stop; do {read}; done; touch {mark}.over) >/dev/null 2>&1 &")

    def end() -> None:
        vm.run(f"touch {mark}.stop")
        vm.wait_for(f"test -e {mark}.over", seconds=120)

    return end


def files_each_way(vm: Guest, folder: Path, size: int, here: str, there: str, inside: Sequence[str]) -> None:
    """A file goes over HTTP from the host, which has the address `here` inside, to the guest, and back; whole."""
    vm.run(f"ip addr add {there}/24 dev eth0 && ip link set eth0 up")
    with file_served(folder, size, here, inside) as digest:
        vm.wait_for(f"wget -q -O /tmp/file http://{here}:8000/file", seconds=120)
        assert vm.run("sha256sum /tmp/file").split()[0] == digest
    vm.run("httpd -p 8000 -h /tmp")
    program = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())"
    fetched = subprocess.run(
        [*inside, sys.executable, "-c", program, f"http://{there}:8000/file"], capture_output=True, check=True
    )
    assert hashlib.sha256(fetched.stdout).hexdigest() == digest
    vm.run("killall httpd; rm /tmp/file")


@contextlib.contextmanager
def running(text: str, folder: Path) -> Iterator[Bus]:
    """The bus of a file's text, served and controlled as `vbus run` does."""
    (folder / "bus.toml").write_text(text)
    bus = config.make(config.load(folder / "bus.toml"))
    with contextlib.ExitStack() as stack:
        stack.callback(bus.stop)
        directory = stack.enter_context(BusDirectory(bus.name))
        bus.start()
        stack.enter_context(Control(bus, directory))
        yield bus


class Served:
    """A bus of a file in a process of its own, which can be killed and started again."""

    def __init__(self, file: Path, bus: str, inside: Sequence[str] = ()) -> None:
        self._command = [*inside, sys.executable, "-m", "vbus", "run", str(file)]
        self._said = file.with_suffix(".log")
        self._bus = bus
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start it, and wait until it serves."""
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(self._command, stdout=said, stderr=said)
        while f"bus {self._bus}: " not in self.said():
            assert self._process.poll() is None, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        """What it has said since it was started."""
        return self._said.read_text()

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and wait for that."""
        self._process.send_signal(number)
        self._process.wait(30)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.end()


@contextlib.contextmanager
def guest(
    bus: Bus,
    machine: str = "q35",
    *,
    modules: Sequence[str] = (),
    reconnect: bool = False,
    packed: bool = False,
    **options: Any,
) -> Iterator[Guest]:
    """A guest with every device of a bus that is reached by vhost-user."""
    args: list[str] = []
    wanted = list(modules)
    for connector in bus.connectors.values():
        if isinstance(connector, VhostUser):
            device = bus.slot(connector.device_name).device
            assert connector.socket is not None
            args += device_args(machine, device.name, device, connector.socket, reconnect=reconnect, packed=packed)
            wanted += MODULES[type(device).__name__]
    with Guest(machine, args=args, modules=wanted, **options) as vm:
        yield vm
