"""Devices that come into a running guest and go: on the bus and in QEMU at once, or in neither."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command import fails, out
from conftest import wait_until
from guests import running
from vbus.bus import Bus
from vbus.cli import hotplug
from vbus.control import client
from vbus.devices import Net
from vbus.errors import Error
from vbus.vm import Guest
from vbus.vm.hotplug import HotplugError, Monitor
from vbus.vm.options import VhostUserDevice

pytestmark = pytest.mark.timeout(300)

BUS = """
[bus]
name = "hot"
[device.rng0]
type = "rng"
[device.disk0]
type = "blk"
memory = "16 MiB"
queues = 2
[device.net0]
type = "net"
[connector.local]
type = "process"
[connector.rng0]
type = "vhost-user"
device = "rng0"
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "a disk, of a file.sock"
[connector.net0]
type = "vhost-user"
device = "net0"
"""
TAP = f"vb{os.getpid() % 100000}h"
HERE, THERE = "10.254.94.1", "10.254.94.2"
TAPS = pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root")


def in_qemu(monitor: Monitor) -> dict[str, Any]:
    """All that a device of ours could leave in QEMU."""
    return {
        "chardevs": sorted(row["label"] for row in monitor.execute("query-chardev")),
        "devices": sorted(row["name"] for row in monitor.execute("qom-list", path="/machine/peripheral")),
        "networks": monitor.execute("human-monitor-command", command_line="info network"),
    }


def on_bus(bus: Bus) -> dict[str, Any]:
    """All that a device could leave on its bus."""
    sockets = Path(os.environ["VBUS_RUNTIME_DIR"]) / "sock"
    return {
        "devices": [row["name"] for row in bus.describe()],
        "connectors": sorted(bus.connectors),
        "sockets": sorted(path.name for path in sockets.iterdir()),
    }


@dataclass
class Running:
    """The guest of these tests, and its bus."""

    vm: Guest
    bus: Bus
    folder: Path

    @property
    def qmp(self) -> tuple[str, Path]:
        """What the command is told."""
        return "--qmp", self.vm.qmp_socket

    def everything(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is on the bus and in QEMU."""
        with Monitor(self.vm.qmp_socket) as monitor:
            return on_bus(self.bus), in_qemu(monitor)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VBUS_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        with running(BUS, folder) as bus:
            printed = out_of("qemu-args", "bus.toml", "--memory", "none", "--root-ports", "3", cwd=folder)
            with Guest(args=shlex.split(printed), modules=["virtio_rng", "virtio_blk", "virtio_net"], cpus=2) as vm:
                yield Running(vm, bus, folder)


@pytest.fixture(autouse=True)
def same_place(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bus of these tests outlives each of them."""
    monkeypatch.setenv("VBUS_RUNTIME_DIR", str(Path(here.bus.connectors["local"].address.split(":")[1]).parent.parent))


def out_of(*words: str, cwd: Path) -> str:
    """What a command prints, whatever it notes beside."""
    command = [sys.executable, "-m", "vbus", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=60).stdout


def test_a_guest_has_what_was_printed(here: Running) -> None:
    vm = here.vm
    assert vm.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
    assert vm.run("head -c 4096 /dev/hwrng | wc -c") == "4096\n"
    vm.run("dd if=/dev/urandom of=/tmp/data bs=64k count=64 && dd if=/tmp/data of=/dev/vda bs=64k conv=fsync")
    vm.run("echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/vda of=/tmp/back bs=64k count=64 && cmp /tmp/data /tmp/back")
    assert vm.run("ls /sys/block/vda/mq | wc -l") == "2\n"
    assert vm.run("cat /sys/class/net/eth0/address").strip() == here.bus.get("net0", Net).mac
    assert [row["violations"] for row in here.bus.describe()] == [{}, {}, {}]


def test_a_disk_comes_and_goes(here: Running) -> None:
    before = here.everything()
    said = out("plug", "disk1", "--type", "blk", "--memory", "8 MiB", *here.qmp, cwd=here.folder)
    number = here.bus.slot("disk1").number
    assert said == f"disk1 is plugged into bus hot, at address {number}, and in QEMU on vbus-port1\n"
    listed = out("ls", "--connectors", cwd=here.folder)
    assert "vhost-user:" in next(line for line in listed.splitlines() if " disk1 " in line)
    here.vm.wait_for("test -b /dev/vdb")
    here.vm.run("mkdir -p /disks/hot && dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync")
    here.vm.run("echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/vdb of=/tmp/back bs=64k count=64")
    here.vm.run("cmp /tmp/data /tmp/back")
    assert out("unplug", "disk1", *here.qmp, cwd=here.folder) == "disk1 is out of QEMU and off bus hot\n"
    assert here.vm.ask("test -e /dev/vdb").status == 1
    assert here.everything() == before


def test_entropy_comes_and_goes_with_the_name_of_a_number(here: Running) -> None:
    before = here.everything()
    out("plug", "1st", "--type", "rng", "--qmp-bus", "vbus-port2", *here.qmp, cwd=here.folder)
    here.vm.wait_for("grep -q virtio_rng.1 /sys/class/misc/hw_random/rng_available")
    here.vm.run("echo virtio_rng.1 >/sys/class/misc/hw_random/rng_current && head -c 16 /dev/hwrng >/dev/null")
    assert here.bus.slot("1st").queues[0].core.counters[0] > 0
    assert out("unplug", "hot/1st", *here.qmp, cwd=here.folder) == "1st is out of QEMU and off bus hot\n"
    assert "virtio_rng.1" not in here.vm.run("cat /sys/class/misc/hw_random/rng_available")
    assert here.everything() == before


@TAPS
def test_a_network_comes_and_goes(here: Running) -> None:
    before = here.everything()
    namespace = f"{TAP}s"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    ip("netns", "add", namespace)
    try:
        ip("tuntap", "add", TAP, "mode", "tap", "multi_queue")
        words = ("--backend", f"tap:{TAP}", "--queue-pairs", "2")
        out("plug", "net1", "--type", "net", *words, *here.qmp, cwd=here.folder)
        ip("link", "set", TAP, "netns", namespace)
        ip("-n", namespace, "address", "add", f"{HERE}/24", "dev", TAP)
        ip("-n", namespace, "link", "set", TAP, "up")
        here.vm.wait_for("test -e /sys/class/net/eth1")
        assert here.vm.run("cat /sys/class/net/eth1/address").strip() == here.bus.get("net1", Net).mac
        here.vm.run(f"ip addr add {THERE}/24 dev eth1 && ip link set eth1 up")
        here.vm.wait_for(f"ping -c 3 -W 2 {HERE}", seconds=60)
        assert here.vm.run("ls -d /sys/class/net/eth1/queues/rx-* | wc -l") == "2\n"
        assert out("unplug", "net1", *here.qmp, cwd=here.folder) == "net1 is out of QEMU and off bus hot\n"
        assert here.vm.ask("test -e /sys/class/net/eth1").status == 1
        assert here.everything() == before
    finally:
        ip("netns", "del", namespace)
        subprocess.run(["ip", "link", "del", TAP], check=False, capture_output=True)


def test_a_guest_that_does_not_release(here: Running) -> None:
    before = here.everything()
    out("plug", "disk2", "--type", "blk", "--memory", "8 MiB", *here.qmp, cwd=here.folder)
    here.vm.wait_for("test -b /dev/vdb")
    there = here.everything()
    here.vm.qmp("stop")
    assert fails("unplug", "disk2", *here.qmp, "--timeout", "0.5", cwd=here.folder, status=1) == [
        "vbus: the guest did not release disk2 within 0.5 s: it stays where it is. Does the guest run, and know "
        "hotplug? Say it again, or with --surprise"
    ]
    assert here.everything() == there
    # Asked a second time, it is told, and released by the guest; and then the rest goes, too.
    here.vm.qmp("cont")
    assert out("unplug", "disk2", *here.qmp, cwd=here.folder) == "disk2 is out of QEMU and off bus hot\n"
    assert here.everything() == before


def test_by_surprise_the_bus_does_not_wait_for_the_guest(here: Running) -> None:
    before = here.everything()
    out("plug", "disk3", "--type", "blk", "--memory", "8 MiB", *here.qmp, cwd=here.folder)
    here.vm.wait_for("test -b /dev/vdb")
    here.vm.qmp("stop")
    words = ("unplug", "disk3", *here.qmp, "--timeout", "0.5")
    said = out(*words, "--surprise", cwd=here.folder)
    assert said.startswith("disk3 is off bus hot; the guest did not release disk3 within 0.5 s, so say it again later")
    assert on_bus(here.bus) == before[0]
    assert fails(*words, cwd=here.folder, status=1) == [
        "vbus: the guest did not release disk3 within 0.5 s: it is on no bus any more; say it again when the guest runs"
    ]
    here.vm.qmp("cont")
    assert out("unplug", "disk3", *here.qmp, cwd=here.folder) == "disk3 is out of QEMU; it was on no bus any more\n"
    assert here.everything() == before
    assert "virtio" in here.vm.run("ls /sys/bus/virtio/devices")


def test_a_device_that_is_taken_off_the_bus_alone(here: Running) -> None:
    before = here.everything()
    out("plug", "disk4", "--type", "blk", "--memory", "8 MiB", *here.qmp, cwd=here.folder)
    here.vm.wait_for("test -b /dev/vdb")
    assert out("unplug", "disk4", cwd=here.folder) == "disk4 is off bus hot\n"
    gone = next(row for row in here.bus.describe_connectors() if row["name"] == "disk4")["departed"]
    assert gone[-1]["reason"] == "the device was unplugged"
    # The connector is there still, so that the device may be plugged again, and QEMU comes back to it.
    out("plug", "disk4", "--type", "blk", "--memory", "8 MiB", cwd=here.folder)
    assert wait_until(lambda: here.bus.slot("disk4").queues[0].core.running, 20)
    here.vm.run("dd if=/dev/vdb of=/dev/null bs=64k count=4", seconds=30)
    out("unplug", "disk4", *here.qmp, cwd=here.folder)
    assert here.everything() == before


# What goes wrong. QEMU needs no guest for that.


class Qemu:
    """A QEMU whose guest never starts."""

    def __init__(self, folder: Path, *words: str, memory: bool = True, before: tuple[str, ...] = ()) -> None:
        self.socket = folder / "qmp.sock"
        self._command = [
            *(*before, "qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-accel", "tcg"),
            *(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"] if memory else ["-m", "64M"]),
            *("-qmp", f"unix:{self.socket},server=on,wait=off", *(words or self.q35(2))),
        ]

    @staticmethod
    def q35(ports: int) -> tuple[str, ...]:
        """A machine with root ports, one without an id among them."""
        named = [word for n in range(ports) for word in ("-device", f"pcie-root-port,id=p{n},chassis={n + 1}")]
        return ("-M", "q35,memory-backend=mem", *named, "-device", "pcie-root-port,chassis=99")

    def __enter__(self) -> Qemu:
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE)
        assert wait_until(lambda: self.socket.exists() or self.process.poll() is not None, 20)
        assert self.process.poll() is None, self.process.stderr.read()  # type: ignore[union-attr]
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=20)

    def __str__(self) -> str:
        return str(self.socket)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where another user gets at."""
    for path in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


def plugging(here: Running, qemu: Qemu | Path, *words: str, status: int = 1) -> str:
    """The line of a plug that fails, behind which nothing is left on the bus."""
    before = on_bus(here.bus)
    said = fails("plug", "x", *(words or ("--type", "rng")), "--qmp", str(qemu), cwd=here.folder, status=status)
    assert on_bus(here.bus) == before
    assert len(said) == 1
    return said[0].removeprefix("vbus: ")


def test_a_socket_that_is_none(here: Running, folder: Path) -> None:
    (folder / "file").write_text("")
    assert plugging(here, folder / "none") == (
        f"QMP at '{folder}/none': there is no such socket: name that of QEMU's -qmp unix:..."
    )
    assert plugging(here, folder / "file").startswith(f"QMP at '{folder}/file': nobody listens there: is QEMU ")
    control = Path(os.environ["VBUS_RUNTIME_DIR"]) / "hot" / "control.sock"
    # Whoever listens there waits for a request, as QMP waits for none.
    with pytest.raises(HotplugError, match="says nothing: a monitor has one client at a time"):
        Monitor(control, seconds=0.5)


def test_a_socket_of_something_else(here: Running, folder: Path) -> None:
    said = folder / "greeting"
    said.write_text("SSH-2.0-OpenSSH\n")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "other.sock"))
        listening.listen()

        def answer() -> None:
            with listening.accept()[0] as sock:
                sock.sendall(said.read_bytes())
                sock.recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        line = plugging(here, folder / "other.sock")
        thread.join(20)
    assert "is no QMP socket of QEMU's" in line


def test_a_monitor_that_somebody_else_has(here: Running, folder: Path) -> None:
    with (
        Qemu(folder) as qemu,
        Monitor(qemu.socket),
        pytest.raises(HotplugError, match="one client at a time"),
    ):
        Monitor(qemu.socket, seconds=0.5)


UNFIT: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "pc": (("-M", "pc,memory-backend=mem"), True, "QEMU's machine is a pc-i440fx-"),
    "microvm": (("-M", "microvm,memory-backend=mem"), True, "a microvm takes no device while it runs"),
    "memory": (("-M", "q35"), False, "QEMU shares none of its memory: start it with what vbus qemu-args prints"),
    "ports": (Qemu.q35(0), True, "QEMU has no free root port with an id (0 are taken)"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_machine_that_takes_no_device(what: str, here: Running, folder: Path) -> None:
    words, memory, line = UNFIT[what]
    with Qemu(folder, *words, memory=memory) as qemu:
        assert plugging(here, qemu, status=2).startswith(line)


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, dict[str, Any]], str]] = {
    "socket": ((), ("chardev-add", {"id": "c-x", "backend": {"type": "null", "data": {}}}), "QEMU refuses chardev-add"),
    "network": (("--type", "net"), ("netdev_add", {"id": "n-x", "type": "hubport", "hubid": 0}), "refuses netdev_add"),
    "device": ((), ("device_add", {"id": "x", "driver": "virtio-rng-pci", "bus": "p0"}), "QEMU refuses device_add"),
    "net device": (
        ("--type", "net", "--queue-pairs", "2"),
        ("device_add", {"id": "x", "driver": "virtio-rng-pci", "bus": "p0"}),
        "QEMU refuses device_add",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_qemu_refuses_is_undone(what: str, here: Running, folder: Path) -> None:
    words, (command, arguments), line = REFUSED[what]
    with Qemu(folder) as qemu:
        with Monitor(qemu.socket) as monitor:
            monitor._execute(command, dict(arguments))
            before = in_qemu(monitor)
        said = plugging(here, qemu, *words)
        assert said.startswith("x is not plugged: ")
        assert line in said
        with Monitor(qemu.socket) as monitor:
            assert in_qemu(monitor) == before


def test_more_that_qemu_does_not_take(here: Running, folder: Path) -> None:
    with Qemu(folder) as qemu:
        with Monitor(qemu.socket) as monitor:
            before = in_qemu(monitor)
        said = plugging(here, qemu, "--type", "rng", "--qmp-bus", "nowhere")
        assert said == "x is not plugged: QEMU refuses device_add: Bus 'nowhere' not found"
        assert "does not support hotplugging" in plugging(here, qemu, "--type", "rng", "--qmp-bus", "pcie.0")
        said = plugging(here, qemu, "--type", "console", status=2)
        assert said.startswith("x: QEMU has no vhost-user front-end for console")
        assert plugging(here, qemu, "--type", "blk", status=2).startswith("blk: give either path")
        with Monitor(qemu.socket) as monitor:
            assert in_qemu(monitor) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_qemu_that_is_no_member(here: Running, folder: Path) -> None:
    folder.chmod(0o777)
    with Qemu(folder, before=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")) as qemu:
        with Monitor(qemu.socket) as monitor:
            before = in_qemu(monitor)
        # It cannot even get at the sockets of this test's bus.
        root = Path(os.environ["VBUS_RUNTIME_DIR"])
        modes = {path: path.stat().st_mode for path in (root, *root.parents)}
        root.chmod(0o700)
        said = plugging(here, qemu)
        assert said.startswith("x is not plugged: QEMU refuses chardev-add: Failed to add chardev 'k-x': Failed to ")
        assert "Permission denied: QEMU's user must get at this directory: open it, or set VBUS_RUNTIME_DIR" in said
        try:
            for path, mode in modes.items():
                path.chmod(mode | 0o011)
            said = plugging(here, qemu)
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        assert said.startswith("x is not plugged: the bus turns QEMU away (x: uid 65534 pid ")
        assert said.endswith("): it is not a member of this bus: name its user in [bus] members")
        with Monitor(qemu.socket) as monitor:
            assert in_qemu(monitor) == before


def test_a_qemu_that_dies_in_the_middle(here: Running, folder: Path) -> None:
    before = on_bus(here.bus)
    bus = next(bus for bus in client.running() if bus.name == "hot")

    def plugged_then(act: Callable[[], None]) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            row = bus.plug("rng", "x")
            act()
            return row

        return make

    with Qemu(folder) as qemu:

        def die() -> None:
            qemu.process.kill()
            qemu.process.wait()

        with pytest.raises(Error, match=r"x is not plugged: QEMU at .* went away at chardev-add"):
            hotplug.plug(bus, "x", plugged_then(die), qemu.socket, None)
        assert on_bus(here.bus) == before


def test_a_qemu_that_dies_while_the_guest_is_asked(
    here: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = on_bus(here.bus)
    with Qemu(folder) as qemu:
        out("plug", "x", "--type", "blk", "--memory", "1 MiB", "--qmp", str(qemu), cwd=here.folder)
        there = on_bus(here.bus)
        wait = Monitor._wait_deleted

        def wait_and_kill(self: Monitor, device: VhostUserDevice, seconds: float) -> None:
            threading.Timer(0.2, qemu.process.kill).start()
            wait(self, device, seconds)

        monkeypatch.setattr(Monitor, "_wait_deleted", wait_and_kill)
        with pytest.raises(
            Error, match=r"went away before the guest released x; without --qmp, x is taken off its bus"
        ):
            hotplug.unplug("x", qemu.socket, surprise=False, seconds=60)
        assert on_bus(here.bus) == there
    out("unplug", "x", cwd=here.folder)
    here.bus.disconnect("x")
    assert on_bus(here.bus) == before


def test_an_unplug_from_a_qemu_that_has_no_such_device(here: Running, folder: Path) -> None:
    before = on_bus(here.bus)
    with Qemu(folder) as qemu:
        said = fails("unplug", "rng0", "--qmp", str(qemu), cwd=here.folder)
        assert said == [
            f"vbus: QEMU at '{qemu}' has no device 'rng0': is it another QEMU? Without --qmp, rng0 is taken "
            "off its bus alone"
        ]
        assert fails("unplug", "rgn0", "--qmp", str(qemu), cwd=here.folder) == [
            "vbus: bus hot has no device 'rgn0': did you mean 'rng0'?"
        ]
    assert fails("unplug", "rng0", "--timeout", "3", cwd=here.folder)[0].startswith("vbus: --timeout is for the guest")
    assert fails("plug", "x", "--type", "rng", "--qmp-bus", "p0", cwd=here.folder)[0].startswith(
        "vbus: --qmp-bus is a "
    )
    assert on_bus(here.bus) == before


def test_a_front_end_that_would_abort_is_spared(here: Running, folder: Path) -> None:
    before = on_bus(here.bus)
    with Qemu(folder) as qemu:
        out("plug", "x", "--type", "rng", "--qmp", str(qemu), cwd=here.folder)
        said = fails("unplug", "x", "--surprise", "--timeout", "0.2", "--qmp", str(qemu), cwd=here.folder)
        assert said[0].startswith("vbus: x: no driver has begun with it, and QEMU aborts when such a rng goes")
        assert qemu.process.poll() is None
    out("unplug", "x", cwd=here.folder)
    here.bus.disconnect("x")
    assert on_bus(here.bus) == before


def test_nothing_is_left(here: Running) -> None:
    assert here.vm.running
    assert {row["name"]: row["violations"] for row in here.bus.describe()} == {"rng0": {}, "disk0": {}, "net0": {}}
    assert here.vm.run("echo well") == "well\n"
