"""A guest whose own memory is shared with the bus behind its function: nothing is copied. It is booted once.

It has three functions of one bus, which another process serves: one that shares the guest's memory, one that cannot ask
QEMU where that is, and one that is told of a file in which it is not. The last two have a window.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from command import out, vbus
from conftest import wait_until
from guests import BACKPORTS, Served, bus_modules, files_each_way, namespace, reads_again_and_again, served
from qmp_server import QmpServer, backend, tree
from vbus.shmem import ivshmem
from vbus.virtio.features import ACCESS_PLATFORM, RING_PACKED
from vbus.vm import Guest, kernel
from vbus.vm.options import function_options, monitor_options

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root"),
]

TAP = f"vb{os.getpid() % 100000}m"
HERE, THERE = "10.254.93.1", "10.254.93.2"
MIB = 1 << 20
MEMORY, BELOW = 512, 256
"""MiB of memory, and how many of them lie below 4 GiB."""
BUS = """
[bus]
name = "open"
[device.disk0]
type = "blk"
path = "disk.img"
queues = 2
[device.tree0]
type = "blk"
path = "tree.img"
read_only = true
[device.net0]
type = "net"
backend = "tap:{tap}"
priority = 2
[device.rng0]
type = "rng"
[device.mute0]
type = "blk"
memory = "8 MiB"
[device.other0]
type = "blk"
memory = "8 MiB"
[connector.shared]
type = "ivshmem"
socket = "shared.sock"
devices = ["disk0", "tree0", "net0", "rng0"]
ram = "ram"
qmp = "qmp"
[connector.mute]
type = "ivshmem"
socket = "mute.sock"
devices = ["mute0"]
memory = "32 MiB"
ram = "ram"
qmp = "nobody"
[connector.other]
type = "ivshmem"
socket = "other.sock"
devices = ["other0"]
memory = "32 MiB"
ram = "other"
qmp = "other.qmp"
"""
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup")


@dataclass
class Running:
    """The guest of these tests, and what it runs on."""

    vm: Guest
    served: Served
    folder: Path
    tree: dict[str, str]
    inside: tuple[str, ...]
    environment: dict[str, str]

    def path(self, name: str) -> str:
        """The directory in sysfs of a device, by its name on the bus, once it has a driver."""
        return self.vm.wait_for(
            f"d=$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name)) && test -e $d/virtio*/driver && realpath $d"
        ).strip()

    def block(self, name: str) -> str:
        """The kernel's name of a disk, once it can be opened."""
        path = self.path(name)
        return self.vm.wait_for(
            f"b=$(ls {path}/virtio*/block) && test -b /dev/$b && true 2>/dev/null </dev/$b && echo $b"
        ).strip()

    def memory(self, name: str) -> str:
        """How a device's buffers are reached, as the guest has it."""
        return self.vm.run(f"cat $(dirname {self.path(name)})/memory").strip()

    def connectors(self) -> dict[str, Any]:
        """The bus's own rows."""
        done = vbus("ls", "open", "--connectors", "--json", cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return {row["name"]: row for row in json.loads(done.stdout)}

    def peer(self, connector: str) -> dict[str, Any]:
        """What the bus says of the one session of a connector."""
        [peer] = self.connectors()[connector]["peers"]
        assert isinstance(peer, dict)
        return peer


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("shared")
    files = folder / "tree"
    (files / "deep").mkdir(parents=True)
    for number in range(40):
        (files / f"file{number}").write_bytes(os.urandom(number * 1777))
    (files / "deep" / "large").write_bytes(os.urandom(5 * MIB + 33))
    sums = {
        str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files.rglob("*")
        if path.is_file()
    }
    for name, size in (("disk.img", 64), ("tree.img", 24), ("other", MEMORY)):
        with (folder / name).open("wb") as file:
            file.truncate(size * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(files), str(folder / "tree.img")], check=True)
    (folder / "bus.toml").write_text(BUS.format(tap=TAP))
    layout = tree((MIB, (BELOW - 1) * MIB, MIB), (4 << 30, (MEMORY - BELOW) * MIB, BELOW * MIB))
    lies = {"query-memdev": [backend(MEMORY * MIB)], "human-monitor-command": layout}
    environment = {"VBUS_RUNTIME_DIR": str(tmp_path_factory.mktemp("run"))}
    with (
        pytest.MonkeyPatch.context() as patch,
        namespace(f"{TAP}s") as inside,
        QmpServer(folder / "other.qmp", lies),
    ):
        patch.setenv("VBUS_RUNTIME_DIR", environment["VBUS_RUNTIME_DIR"])
        subprocess.run([*inside, "ip", "tuntap", "add", TAP, "mode", "tap"], check=True)
        subprocess.run([*inside, "ip", "address", "add", f"{HERE}/24", "dev", TAP], check=True)
        subprocess.run([*inside, "ip", "link", "set", TAP, "up"], check=True)
        with Served(folder / "bus.toml", "open", inside) as served:
            args = [*monitor_options(folder / "qmp"), "-M", f"max-ram-below-4g={BELOW}M"]
            for name in ("shared", "mute", "other"):
                args += function_options(name, folder / f"{name}.sock", ivshmem.VECTORS)
            with Guest(
                args=args,
                modules=["virtio_rng", "virtio_blk", "virtio_net", "crc32c_generic", "ext4", *bus_modules()],
                packages=["e2fsprogs", "kexec-tools"],
                memory=MEMORY,
                memory_file=folder / "ram",
                cpus=2,
                append="slub_debug=FZPU",
                backports=BACKPORTS,
            ) as vm:
                yield Running(vm, served, folder, sums, inside, environment)


@pytest.fixture(autouse=True)
def same_place(here: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that serves is started anew where it was, and asked there."""
    for name, value in here.environment.items():
        monkeypatch.setenv(name, value)


def test_memory_is_shared_where_the_bus_finds_it(here: Running) -> None:
    assert [here.memory(name) for name in ("disk0", "net0", "rng0")] == ["shared"] * 3
    row = here.connectors()["shared"]
    assert (row["ram"], row["qmp"]) == (str(here.folder / "ram"), str(here.folder / "qmp"))
    assert (here.peer("shared")["memory"], here.peer("shared")["not_shared"]) == ("shared", None)
    assert f"memory is shared with the bus: {MEMORY - 1} MiB" in here.vm.run("dmesg")


def test_what_cannot_be_shared_is_a_window_and_says_why(here: Running) -> None:
    for name, why in (
        ("mute", f"QMP at '{here.folder}/nobody': No such file"),
        ("other", "the nonce of the guest mem"),
    ):
        assert here.memory(f"{name}0") == "window"
        here.vm.run(f"dd if=/dev/urandom of=/tmp/x bs=64k count=16; dd if=/tmp/x of=/dev/{here.block(f'{name}0')}")
        here.vm.run(f"sync; dd if=/dev/{here.block(f'{name}0')} bs=64k count=16 iflag=direct | cmp - /tmp/x")
        assert here.peer(name)["memory"] == "window"
        assert why in here.peer(name)["not_shared"]
        [line] = [line for line in here.served.said().splitlines() if f"/{name}: " in line and "not shared" in line]
        assert why in line
    assert here.vm.run("dmesg").count("memory is not shared, a window is used: ") == 2


def test_packed_rings_are_taken(here: Running) -> None:
    for name, packed in (("disk0", "1"), ("net0", "1"), ("mute0", "0")):
        features = here.vm.run(f"cat {here.path(name)}/virtio*/features").strip()
        assert (features[RING_PACKED], features[ACCESS_PLATFORM]) == (packed, "1"), name


def test_a_tree_is_copied_and_found_whole(here: Running) -> None:
    vm, disk, source = here.vm, here.block("disk0"), here.block("tree0")
    vm.run(f"mkfs.ext4 -q /dev/{disk} && mkdir -p /disks/a /disks/b")
    vm.run(f"mount /dev/{disk} /disks/a && mount -o ro /dev/{source} /disks/b")
    vm.run("cp -a /disks/b/. /disks/a && sync && echo 3 >/proc/sys/vm/drop_caches")
    listed = vm.run("cd /disks/a && find . -type f | xargs sha256sum", seconds=120)
    found = {line.split("  ./")[1]: line.split("  ")[0] for line in listed.splitlines()}
    assert found == here.tree
    vm.run(f"umount /disks/a /disks/b && e2fsck -fn /dev/{disk}")
    subprocess.run(["e2fsck", "-fn", str(here.folder / "disk.img")], check=True, capture_output=True)
    # Nothing of it went through the window.
    assert vm.run(f"cat $(dirname {here.path('disk0')})/window/used") == "0\n"


def test_a_network_each_way(here: Running) -> None:
    files_each_way(here.vm, here.folder, 8 * MIB, HERE, THERE, here.inside)


def test_the_process_is_killed_and_memory_is_shared_again(here: Running) -> None:
    for round_ in range(2):
        here.vm.run(
            f"dd if=/dev/urandom of=/tmp/new bs=64k count=16 && dd if=/tmp/new of=/dev/{here.block('disk0')} bs=64k "
            f"seek={32 + 16 * round_} conv=fsync"
        )
        nobody_waits = reads_again_and_again(here.vm, here.block("disk0"))
        here.served.end()
        here.served.start()
        # The disk that was may be there for a while yet, but whoever served it is gone: it is not read.
        here.vm.wait_for(
            "d=$(grep -lx disk0 /sys/bus/vbus/devices/*/name) && b=$(ls $(dirname $d)/virtio*/block) && "
            f"dd if=/dev/$b bs=64k skip={32 + 16 * round_} count=16 iflag=direct | cmp - /tmp/new",
            seconds=120,
        )
        # Nobody waits for the disk that was.
        nobody_waits()
        assert here.memory("disk0") == "shared"
        assert here.peer("shared")["memory"] == "shared"


def test_modules_are_unloaded_and_loaded_under_load(here: Running) -> None:
    nobody_waits = reads_again_and_again(here.vm, here.block("disk0"))
    here.vm.run("rmmod vbus_ivshmem", seconds=120)
    nobody_waits()
    assert here.vm.run("ls /sys/bus/virtio/devices") == ""
    here.vm.run("insmod /modules/vbus_ivshmem.ko")
    assert here.memory("disk0") == "shared"
    here.vm.run(f"dd if=/dev/{here.block('disk0')} of=/dev/null bs=64k count=16")


def test_a_disk_goes_by_surprise_while_it_works(here: Running) -> None:
    # A node of our own: /dev loses its one, and dd would make a file there.
    here.vm.run(f"mknod /tmp/hot b $(tr : ' ' </sys/block/{here.block('tree0')}/dev)")
    here.vm.run(
        "for i in 1 2; do (while :; do dd if=/tmp/hot of=/dev/null bs=256k iflag=direct || break; done; "
        "touch /tmp/ended$i) >/dev/null 2>&1 & done"
    )
    out("unplug", "open/tree0", "--surprise", cwd=here.folder)
    # Nobody waits for it, and nobody takes what it did not write for what it read.
    here.vm.wait_for("test -e /tmp/ended1 && test -e /tmp/ended2", seconds=120)
    here.vm.wait_for("! grep -qx tree0 /sys/bus/vbus/devices/*/name", seconds=120)


def test_nothing_was_wrong_in_the_kernel(here: Running) -> None:
    assert [line for line in here.vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []


def test_a_guest_that_starts_anew_shares_its_memory_again(here: Running) -> None:
    departed = len(here.connectors()["shared"]["departed"])
    here.vm.reset()
    assert here.memory("disk0") == "shared"
    here.vm.run(f"dd if=/dev/{here.block('disk0')} of=/dev/null bs=64k count=16")
    # It could not say so itself, and devices have let go of its memory nonetheless before it had a kernel again.
    [reason] = [row["reason"] for row in here.connectors()["shared"]["departed"][departed:]]
    assert reason == "its guest was reset"


@pytest.mark.parametrize("way", ["reboot -f", "echo c >/proc/sysrq-trigger"], ids=["restarts", "panics"])
def test_a_kernel_that_ends_takes_its_memory_back(here: Running, way: str) -> None:
    """Before the next one starts in that memory, its own says so to the bus."""
    here.vm.qmp("set-action", reboot="reset")
    assert here.memory("disk0") == "shared"
    sessions = len(here.connectors()["shared"]["departed"])
    said = len(here.vm.console)
    here.vm.run(f"(sleep 1; {way}) >/dev/null 2>&1 &")
    assert wait_until(lambda: "@ready" in here.vm.console[said:], 120), here.vm.console[said:]
    assert here.memory("disk0") == "shared"
    here.vm.run(f"dd if=/dev/{here.block('disk0')} of=/dev/null bs=64k count=16")
    [reason] = [row["reason"] for row in here.connectors()["shared"]["departed"][sessions:]]
    assert reason == "its guest ended the session"
    assert here.vm.errors == ""


def test_a_kernel_that_starts_another_takes_its_memory_back(here: Running) -> None:
    """As the one before, without a reset of the machine: the next kernel finds memory as it was left."""
    vm = here.vm
    name = vm.run("ls -d /sys/class/net/eth*").split()[0].rpartition("/")[2]
    vm.run(f"ip addr add {THERE}/24 dev {name} && ip link set {name} up")
    place = here.folder / "kernel"
    place.mkdir()
    shutil.copy(kernel.stock("amd64", backports=BACKPORTS).image, place / "image")
    shutil.copy(vm.directory / "initramfs", place / "initramfs")
    with served(place, HERE, here.inside):
        for file in ("image", "initramfs"):
            vm.wait_for(f"wget -q -O /tmp/{file} http://{HERE}:8000/{file}", seconds=120)
    vm.run('kexec -l /tmp/image --initrd=/tmp/initramfs --command-line="$(cat /proc/cmdline)"')
    sessions = len(here.connectors()["shared"]["departed"])
    said = len(vm.console)
    vm.run("(sleep 1; kexec -e) >/dev/null 2>&1 &")
    assert wait_until(lambda: "@ready" in vm.console[said:], 120), vm.console[said:]
    assert here.memory("disk0") == "shared"
    vm.run(f"dd if=/dev/{here.block('disk0')} of=/dev/null bs=64k count=16")
    [reason] = [row["reason"] for row in here.connectors()["shared"]["departed"][sessions:]]
    assert reason == "its guest ended the session"
