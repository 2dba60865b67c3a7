"""What QEMU and libvirt are told: `vbus qemu-args`, `vbus libvirt-xml`, and the options of every class and machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

import vbus as library
from command import VBUS, fails, out, vbus
from conftest import wait_until
from vbus.bus import Bus, Queue
from vbus.connectors import VhostUser
from vbus.control.server import Control
from vbus.virtio import DeviceID, device_type_name
from vbus.vm import libvirt, machine
from vbus.vm.debian import unpacked
from vbus.vm.hotplug import HotplugError, Monitor
from vbus.vm.options import (
    MACHINE_KINDS,
    NoFrontEndError,
    VhostUserDevice,
    device_options,
    machine_options,
)

QUEUES = {
    DeviceID.NETWORK: 5,
    DeviceID.BLOCK: 2,
    DeviceID.ENTROPY: 1,
    DeviceID.SCSI: 4,
    DeviceID.INPUT: 2,
    DeviceID.SOCKET: 3,
    DeviceID.SOUND: 4,
    DeviceID.FILE_SYSTEM: 3,
    DeviceID.I2C: 1,
    DeviceID.GPIO: 2,
}
"""The classes that QEMU has a front-end for, with the queues that each has here."""
CARRIED = {"q35": QUEUES, "microvm": QUEUES, "s390x": (DeviceID.NETWORK, DeviceID.FILE_SYSTEM), "pseries": QUEUES}

FILE = """
[bus]
name = "machines"
[device.disk0]
type = "blk"
memory = "8 MiB"
queues = 2
[device.net0]
type = "net"
queue_pairs = 2
[device.net1]
type = "net"
mac = "52:54:00:01:02:03"
[device.rng0]
type = "rng"
[connector.local]
type = "process"
[connector.first]
type = "vhost-user"
device = "disk0"
socket = "sock/disk0.sock"
[connector.net0]
type = "vhost-user"
device = "net0"
[connector.net1]
type = "vhost-user"
device = "net1"
socket = "/tmp/net1.sock"
connect = true
[connector.rng0]
type = "vhost-user"
device = "rng0"
"""
NOTE = b"# connector local of type process has no options\n"


def any_device(number: int) -> library.Device:
    """A device of a class that answers nothing, with config space enough for any front-end."""

    class Config(library.Config):
        a: library.le64
        b: library.le64
        c: library.le64
        d: library.le64
        e: library.le64
        f: library.le64
        g: library.le64
        h: library.le64
        i: library.le64
        j: library.le64

    names = [Queue(f"queue{n}", pull=True) for n in range(QUEUES[DeviceID(number)])]
    members: dict[str, Any] = {"device_id": number, "queues": names, "Config": Config}
    cls: Callable[[], library.Device] = type("Any", (library.Device,), members)
    return cls()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", CARRIED)
def test_qemu_takes_the_options_of_every_class(kind: str, make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = make_bus()
    words = machine_options(kind, 256 << 20, ports=2)
    names = []
    for number in CARRIED[kind]:
        name = device_type_name(number)
        bus.plug(any_device(number), name)
        connector = bus.connect(VhostUser(name, tmp_path / f"{name}, its own.sock"), name)
        assert connector.socket is not None
        device = VhostUserDevice(name, number, connector.socket, queues=QUEUES[number], mac="52:54:00:01:02:03")
        words += device_options(device, kind)
        names.append(name)
    command = [machine.MACHINES[kind].qemu, *words, "-S", "-nodefaults", "-display", "none", "-accel", "tcg"]
    command += ["-qmp", f"unix:{tmp_path}/qmp.sock,server=on,wait=off"]
    qemu = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / "qmp.sock").exists() or qemu.poll() is not None, 30)
        assert qemu.poll() is None, qemu.stderr.read()  # type: ignore[union-attr]
        with Monitor(tmp_path / "qmp.sock") as monitor:
            there = {row["name"] for row in monitor.execute("qom-list", path="/machine/peripheral")}
            assert set(names) <= there
            assert ({"vbus-port1", "vbus-port2"} <= there) == (kind == "q35")
            if not MACHINE_KINDS[kind].hotplug:
                with pytest.raises(library.UsageError, match="takes no device while it runs"):
                    monitor.machine()
                return
            # And one that comes later, by the same names.
            assert monitor.machine() == kind
            port = monitor.free_port() if kind == "q35" else None
            bus.plug(any_device(DeviceID.NETWORK), "later")
            connector = bus.connect(VhostUser("later", tmp_path / "later.sock"), "later")
            device = VhostUserDevice("later", DeviceID.NETWORK, tmp_path / "later.sock", queues=5)
            monitor.add(device, kind, port)
            assert monitor.has_device(device)
            with pytest.raises(HotplugError, match=r"QEMU refuses chardev-add: .*already exists"):
                monitor.add(device, kind, port)
            assert monitor.has_device(device)
    finally:
        qemu.kill()
        qemu.communicate(timeout=20)


def test_what_qemu_has_no_front_end_for() -> None:
    for kind, carried in CARRIED.items():
        for number in DeviceID:
            device = VhostUserDevice("x", number, Path("/x"))
            if number in carried:
                assert device_options(device, kind)
                continue
            with pytest.raises(NoFrontEndError, match=f"x: QEMU has no vhost-user front-end for {device.type_name}"):
                device_options(device, kind)
    with pytest.raises(library.UsageError, match="machine 'pc' is not known: q35, microvm, s390x, pseries are"):
        device_options(VhostUserDevice("x", 1, Path("/x")), "pc")


def test_only_some_classes_reconnect() -> None:
    for number in QUEUES:
        able = number in (DeviceID.NETWORK, DeviceID.BLOCK)
        device = VhostUserDevice("x", number, Path("/x"))
        for how, option in {"ms": "reconnect-ms=100", "s": "reconnect=1", "no": "reconnect"}.items():
            words = " ".join(device_options(device, reconnect=how))  # type: ignore[arg-type]
            assert (option in words) == (able and how != "no")
        words = " ".join(device_options(VhostUserDevice("x", number, Path("/x"), connect=True)))
        assert "reconnect" not in words
        assert "path=/x,server=on,wait=off" in words


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "machines.toml").write_text(FILE)
    (tmp_path / "sock").mkdir()
    return tmp_path


def groups(words: list[str]) -> dict[str, list[str]]:
    """The values of each option."""
    values: dict[str, list[str]] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        values.setdefault(flag, []).append(value)
    return values


def test_the_options_of_a_file(file: Path, runtime_dir: Path) -> None:
    done = vbus("qemu-args", "machines.toml", cwd=file)
    assert (done.returncode, done.stderr) == (0, NOTE)
    text = done.stdout.decode()
    assert all(line.startswith("-") and line.count(" ") == 1 for line in text.splitlines())
    values = groups(text.split())
    assert values["-object"] == [f"memory-backend-memfd,id=mem,size={1 << 30},share=on"]
    assert values["-machine"] == ["q35,memory-backend=mem"]
    assert sum(value.startswith("pcie-root-port,") for value in values["-device"]) == 4
    assert values["-chardev"] == [
        f"socket,id=c-disk0,path={file}/sock/disk0.sock,reconnect-ms=100",
        f"socket,id=c-net0,path={runtime_dir}/sock/machines-net0.sock,reconnect-ms=100",
        "socket,id=c-net1,path=/tmp/net1.sock,server=on,wait=off",
        f"socket,id=c-rng0,path={runtime_dir}/sock/machines-rng0.sock",
    ]
    assert values["-netdev"][0] == "vhost-user,id=n-net0,chardev=c-net0,queues=2"
    assert "virtio-net-pci,id=net1,netdev=n-net1,mac=52:54:00:01:02:03,romfile=" in values["-device"]
    # What was only described is nowhere yet.
    assert list(runtime_dir.iterdir()) == []
    words = json.loads(vbus("qemu-args", "machines.toml", "--json", cwd=file).stdout)
    assert words == text.split()
    words = json.loads(
        vbus(
            *("qemu-args", "machines.toml", "--json", "--memory", "none", "--root-ports", "0", "--reconnect", "s"),
            cwd=file,
        ).stdout
    )
    assert set(groups(words)) == {"-chardev", "-netdev", "-device"}
    assert words[1].endswith("reconnect=1")


def test_a_running_bus_has_the_options_of_its_file(file: Path, make_bus: Callable[..., Bus]) -> None:
    from vbus import config

    spec = config.load(file / "machines.toml")
    bus = config.make(spec)
    try:
        bus.start()
        with Control(bus):
            of_file = vbus("qemu-args", "machines.toml", cwd=file)
            assert vbus("qemu-args", cwd=file).stdout == of_file.stdout
            assert vbus("qemu-args", "machines", cwd=file).stdout == of_file.stdout
            for connector in bus.connectors.values():
                if isinstance(connector, VhostUser) and not connector.connect:
                    assert f"path={connector.socket}" in of_file.stdout.decode()
                    assert connector.socket is not None
                    assert connector.socket.is_socket()
            xml = vbus("libvirt-xml", "machines.toml", cwd=file).stdout
            assert vbus("libvirt-xml", cwd=file).stdout == xml
            bus.unplug("rng0")
            done = vbus("qemu-args", cwd=file)
            assert done.stderr == NOTE + b"# connector rng0: there is no device rng0 now\n"
            assert b"rng0" not in done.stdout
    finally:
        bus.stop()


def test_a_path_with_spaces_goes_through_xargs(file: Path) -> None:
    odd = file / "it's, a path"
    odd.mkdir()
    (odd / "odd.toml").write_text(
        '[device.rng0]\ntype = "rng"\n[connector.a]\ntype = "vhost-user"\ndevice = "rng0"\nsocket = "a b.sock"\n'
    )
    done = vbus("qemu-args", "odd.toml", "--memory", "none", "--root-ports", "0", cwd=odd)
    assert done.stderr == b"# a path is quoted: $(...) would break it, use xargs; see vbus qemu-args --help\n"
    words = (
        subprocess.run(["xargs", "printf", "%s\\n"], input=done.stdout, capture_output=True, check=True)
        .stdout.decode()
        .splitlines()
    )
    assert words == shlex.split(done.stdout.decode())
    assert words[1] == f"socket,id=c-rng0,path={str(odd).replace(',', ',,')}/a b.sock"


MISTAKES = {
    ("qemu-args", "none.toml"): "none.toml: there is no such file",
    ("qemu-args", "machines.toml", "--machine", "pc"): "invalid value for '--machine': 'pc' is not one of ",
    ("qemu-args", "machines.toml", "--memory", "1 GB"): "--memory: '1 GB': 'GB' is no unit here: use one of ",
    (
        "qemu-args",
        "machines.toml",
        "--machine",
        "s390x",
    ): "machines.toml: disk0: QEMU has no vhost-user front-end for blk "
    "on s390x, only for net and fs: take another machine",
    (
        "libvirt-xml",
        "machines.toml",
        "--machine",
        "s390x",
    ): "machines.toml: disk0: QEMU has no vhost-user front-end for ",
    (
        "qemu-args",
        "plain.toml",
    ): "plain.toml: no connector of type vhost-user or ivshmem: write [connector.NAME] with type = ",
    ("qemu-args", "twice.toml"): "twice.toml: rng0 has two connectors of type vhost-user, and one front-end",
    ("qemu-args", "wrong.toml"): "wrong.toml: device.disk0: blk: give either path",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_a_line(words: tuple[str, ...], file: Path) -> None:
    (file / "plain.toml").write_text('[device.rng0]\ntype = "rng"\n')
    carried = '[connector.{}]\ntype = "vhost-user"\ndevice = "{}"\n'
    (file / "twice.toml").write_text(
        '[device.rng0]\ntype = "rng"\n' + carried.format("a", "rng0") + carried.format("b", "rng0")
    )
    (file / "wrong.toml").write_text('[device.disk0]\ntype = "blk"\n' + carried.format("a", "disk0"))
    assert fails(*words, cwd=file)[0].startswith(f"vbus: {MISTAKES[words]}")


def test_nobody_runs(tmp_path: Path) -> None:
    assert fails("qemu-args", cwd=tmp_path, status=1)[0].startswith("vbus: no bus runs in ")


# libvirt.


def test_the_parts_of_a_domain(file: Path, runtime_dir: Path) -> None:
    done = vbus("libvirt-xml", "machines.toml", cwd=file)
    assert (done.returncode, done.stderr) == (0, NOTE)
    root = ET.fromstring(done.stdout)
    assert root.find("memoryBacking/access").get("mode") == "shared"  # type: ignore[union-attr]
    assert root.find("memoryBacking/source").get("type") == "memfd"  # type: ignore[union-attr]
    [disk] = root.findall("devices/disk[@type='vhostuser']")
    assert disk.find("source").get("path") == f"{file}/sock/disk0.sock"  # type: ignore[union-attr]
    assert disk.find("driver").get("queues") == "2"  # type: ignore[union-attr]
    assert disk.find("source/reconnect").get("enabled") == "yes"  # type: ignore[union-attr]
    first, second = root.findall("devices/interface[@type='vhostuser']")
    assert first.find("source").get("mode") == "client"  # type: ignore[union-attr]
    assert first.find("driver").get("queues") == "2"  # type: ignore[union-attr]
    assert second.find("source").get("mode") == "server"  # type: ignore[union-attr]
    assert second.find("source/reconnect") is None
    assert second.find("mac").get("address") == "52:54:00:01:02:03"  # type: ignore[union-attr]
    words = [str(arg.get("value")) for arg in root.findall(f"{{{libvirt.QEMU}}}commandline/{{{libvirt.QEMU}}}arg")]
    assert words == [
        *("-chardev", f"socket,id=c-rng0,path={runtime_dir}/sock/machines-rng0.sock"),
        *("-device", "vhost-user-rng-pci,id=rng0,chardev=c-rng0"),
    ]
    plain = ET.fromstring(vbus("libvirt-xml", "machines.toml", "--no-reconnect", cwd=file).stdout)
    assert plain.findall(".//reconnect") == []


def test_libvirt_finds_the_parts_valid(tmp_path: Path) -> None:
    """In a whole domain, by libvirt's own schema; the path tries what XML must escape."""
    devices = [
        VhostUserDevice(f"d{number}", number, Path(f'/run/a <b> & "c"/{number}.sock'), queues, mac="52:54:00:01:02:03")
        for number, queues in QUEUES.items()
    ]
    devices += [VhostUserDevice(f"e{n}", n, Path("/e"), connect=True) for n in (DeviceID.NETWORK, DeviceID.BLOCK)]
    devices += [VhostUserDevice(f"disk{n}", DeviceID.BLOCK, Path(f"/run/{n}")) for n in range(30)]
    root = libvirt.domain(devices)
    targets = [str(target.get("dev")) for target in root.findall("devices/disk/target")]
    assert targets[:2] + targets[25:28] == ["vda", "vdb", "vdz", "vdaa", "vdab"]
    for element in (
        ET.fromstring("<name>guest</name>"),
        ET.fromstring("<memory>1048576</memory>"),
        ET.fromstring("<os><type arch='x86_64' machine='q35'>hvm</type></os>"),
    ):
        root.insert(0, element)
    (tmp_path / "domain.xml").write_text(libvirt.text(root))
    # Debian has moved it from one package to another.
    found = (
        path
        for package in ("libvirt0", "libvirt-common")
        for path in unpacked("amd64", [package], alone_without=True).glob("usr/share/libvirt/schemas/domain.rng")
    )
    command = ["xmllint", "--noout", "--relaxng", str(next(found)), str(tmp_path / "domain.xml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # It can fail.
    root.find("devices/disk/source").set("mode", "nonsense")  # type: ignore[union-attr]
    root.find("memoryBacking/access").set("mode", "nonsense")  # type: ignore[union-attr]
    (tmp_path / "domain.xml").write_text(libvirt.text(root))
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_the_shell_completes_them(file: Path) -> None:
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        env = os.environ | {"_VBUS_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        done = subprocess.run(VBUS, env=env, cwd=file, capture_output=True, text=True, check=False)
        return [row.partition(",")[2] for row in done.stdout.splitlines()]

    assert completed("vbus qemu-a") == ["qemu-args"]
    assert completed("vbus qemu-args --machine ") == ["q35", "microvm", "s390x", "pseries"]
    assert "--no-reconnect" in completed("vbus libvirt-xml --")
    assert {"--qmp", "--timeout"} <= set(completed("vbus unplug --"))
    assert {"--qmp", "--qmp-bus"} <= set(completed("vbus plug x --"))


def test_help_names_them(tmp_path: Path) -> None:
    assert {"qemu-args", "libvirt-xml"} <= set(out("--help", cwd=tmp_path).split())


SHARING = """
[bus]
name = "sharing"
[device.rng0]
type = "rng"
[connector.one]
type = "ivshmem"
socket = "one.sock"
ram = "guest.ram"
qmp = "guest.qmp"
[connector.two]
type = "ivshmem"
socket = "two.sock"
ram = "guest.ram"
qmp = "guest.qmp"
[connector.three]
type = "ivshmem"
socket = "three.sock"
"""


def test_a_guest_that_shares_its_memory_has_it_in_a_file(tmp_path: Path, runtime_dir: Path) -> None:
    (tmp_path / "sharing.toml").write_text(SHARING)
    values = groups(json.loads(out("qemu-args", "sharing.toml", "--json", "--memory", "2 GiB", cwd=tmp_path)))
    assert values["-object"] == [f"memory-backend-file,id=mem,size={2 << 30},share=on,mem-path={tmp_path}/guest.ram"]
    assert values["-machine"] == ["q35,memory-backend=mem"]
    assert values["-qmp"] == [f"unix:{tmp_path}/guest.qmp,server=on,wait=off"]
    assert sum(value.startswith("ivshmem-doorbell,") for value in values["-device"]) == 3
    done = vbus("qemu-args", "sharing.toml", "--json", "--memory", "none", cwd=tmp_path)
    assert done.stderr.decode() == (
        f"# your memory-backend-file with share=on must have mem-path={tmp_path}/guest.ram\n"
    )
    assert "-object" not in json.loads(done.stdout)
    said = fails("qemu-args", "sharing.toml", "--machine", "microvm", cwd=tmp_path)
    assert said == ["vbus: one: QEMU has ivshmem on PCI alone: take another machine than microvm"]
    other = SHARING.replace('two.sock"\nram = "guest.ram"', 'two.sock"\nram = "other.ram"')
    (tmp_path / "two.toml").write_text(other)
    assert "these are two guests, write a file for each" in fails("qemu-args", "two.toml", cwd=tmp_path)[0]
    (tmp_path / "half.toml").write_text(SHARING.replace('qmp = "guest.qmp"\n', "", 1))
    assert "ram and qmp go together" in fails("run", "half.toml", cwd=tmp_path)[0]


def test_the_options_of_a_running_bus_whose_guest_shares_its_memory(
    tmp_path: Path, make_bus: Callable[..., Bus], runtime_dir: Path
) -> None:
    (tmp_path / "sharing.toml").write_text(SHARING)
    served = subprocess.Popen([*VBUS, "run", "sharing.toml"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: vbus("ls", "sharing", cwd=tmp_path).returncode == 0)
        words = out("qemu-args", "sharing", cwd=tmp_path)
        assert words == out("qemu-args", "sharing.toml", cwd=tmp_path)
    finally:
        served.terminate()
        assert served.wait(20) == 0
