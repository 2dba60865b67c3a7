"""A stock x86 guest with one device of each class behind vhost-user, at real work. It is booted once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from guests import guest, running
from vbus.bus import Bus
from vbus.devices import Blk, Input, Net
from vbus.vm import Guest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root"),
]

TAP = f"vb{os.getpid() % 100000}g"
HERE, THERE = "10.254.92.1", "10.254.92.2"
"""The host's address, and the guest's."""
MIB = 1 << 20
TREE = Path(__file__).parent

BUS = """
[bus]
name = "guest"
[device.rng0]
type = "rng"
[device.disk0]
type = "blk"
path = "disk.img"
queues = 2
[device.disk1]
type = "blk"
path = "tree.img"
read_only = true
[device.net0]
type = "net"
backend = "tap:{tap}"
queue_pairs = 2
[device.keyboard]
type = "input"
[device.tablet]
type = "input"
kind = "tablet"
"""
NAMES = ("rng0", "disk0", "disk1", "net0", "keyboard", "tablet")
CONNECTOR = '[connector.{name}]\ntype = "vhost-user"\ndevice = "{name}"\nsocket = "{name}.sock"\n'


def ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout


@dataclass
class Running:
    """The guest of these tests, and what it runs on."""

    vm: Guest
    bus: Bus
    folder: Path
    tree: dict[str, str]
    """SHA-256 of each file on the read-only disk."""
    environment: dict[str, str]

    def listed(self, verb: str = "ls") -> list[dict[str, Any]]:
        """What `vbus` says of the bus."""
        command = [sys.executable, "-m", "vbus", verb, "--json"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def row(self, name: str) -> dict[str, Any]:
        """What `vbus ls` says of a device."""
        return next(row for row in self.listed() if row["name"] == name)

    def queue(self, name: str, queue: str) -> dict[str, Any]:
        """What `vbus stat` says of a queue."""
        return next(row for row in self.listed("stat") if (row["device"], row["queue"]) == (name, queue))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guest")
    files = folder / "tree"
    files.mkdir()
    for path in sorted(TREE.glob("*.py")):
        shutil.copy(path, files)
    (files / "deep" / "er").mkdir(parents=True)
    (files / "deep" / "er" / "random").write_bytes(os.urandom(5 * MIB + 77))
    sums = {
        str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files.rglob("*")
        if path.is_file()
    }
    with (folder / "disk.img").open("wb") as disk:
        disk.truncate(64 * MIB)
    with (folder / "tree.img").open("wb") as disk:
        disk.truncate(24 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(files), str(folder / "tree.img")], check=True)
    text = BUS.format(tap=TAP) + "".join(CONNECTOR.format(name=name) for name in NAMES)
    namespace = f"{TAP}s"
    with pytest.MonkeyPatch.context() as patch:
        run = tmp_path_factory.mktemp("run")
        patch.setenv("VBUS_RUNTIME_DIR", str(run))
        ip("tuntap", "add", TAP, "mode", "tap", "multi_queue")
        ip("netns", "add", namespace)
        try:
            with running(text, folder) as bus:
                ip("link", "set", TAP, "netns", namespace)
                ip("-n", namespace, "address", "add", f"{HERE}/24", "dev", TAP)
                ip("-n", namespace, "link", "set", TAP, "up")
                with guest(
                    bus, memory=512, cpus=2, modules=["crc32c_generic", "ext4"], packages=["e2fsprogs", "ethtool"]
                ) as vm:
                    yield Running(vm, bus, folder, sums, os.environ | {"VBUS_RUNTIME_DIR": str(run)})
        finally:
            ip("netns", "del", namespace)
            subprocess.run(("ip", "link", "del", TAP), capture_output=True, check=False)


def test_the_bus_says_who_drives_what(here: Running) -> None:
    rows = {row["name"]: row for row in here.listed()}
    assert set(rows) == set(NAMES)
    for name, row in rows.items():
        assert row["connector"] == name
        assert row["owner"].endswith(f"pid {here.vm.pid}")
        assert row["violations"] == {}
        assert [queue["running"] for queue in row["queues"]][:1] == [True], name
        assert "VERSION_1" in row["features"]["negotiated"]
    assert sum(queue["running"] for queue in rows["disk0"]["queues"]) == 2


def test_a_mebibyte_of_entropy(here: Running) -> None:
    before = here.queue("rng0", "requests")
    assert here.vm.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
    said = here.vm.run(f"head -c {MIB} /dev/hwrng | gzip | wc -c", seconds=120)
    # Random bytes do not get smaller.
    assert int(said) > MIB
    after = here.queue("rng0", "requests")
    assert after["bytes_written"] - before["bytes_written"] >= MIB
    assert after["to_driver"]["signalled"] > before["to_driver"]["signalled"]


def test_a_tree_is_copied_and_found_whole(here: Running) -> None:
    vm = here.vm
    vm.run("mkfs.ext4 -q /dev/vda && mkdir -p /disks/a /disks/b")
    vm.run("mount /dev/vda /disks/a && mount -o ro /dev/vdb /disks/b")
    vm.run("cp -a /disks/b/. /disks/a && sync && echo 3 >/proc/sys/vm/drop_caches")
    listed = vm.run("cd /disks/a && find . -type f | xargs sha256sum", seconds=120)
    found = {line.split("  ./")[1]: line.split("  ")[0] for line in listed.splitlines()}
    assert found == here.tree
    assert vm.ask("echo x >/disks/b/new").status != 0
    vm.run("umount /disks/a /disks/b && e2fsck -fn /dev/vda")
    assert here.bus.get("disk0", Blk).flushes > 0
    # And the host finds it whole, too.
    subprocess.run(["e2fsck", "-fn", str(here.folder / "disk.img")], check=True, capture_output=True)
    assert here.vm.run("ls /sys/block/vda/mq | wc -l") == "2\n"
    assert here.vm.run("cat /sys/block/vda/ro /sys/block/vdb/ro") == "0\n1\n"


def test_a_disk_that_grows_while_it_is_mounted(here: Running) -> None:
    vm = here.vm
    vm.run("mkfs.ext4 -q /dev/vda && mkdir -p /disks/g && mount /dev/vda /disks/g && echo kept >/disks/g/kept")
    sectors = here.bus.get("disk0", Blk).capacity * 2
    here.bus.set("disk0", "capacity", str(sectors))
    vm.wait_for(f"test $(cat /sys/block/vda/size) = {sectors}", seconds=120)
    before = int(vm.run("df -k /disks/g | tail -1 | awk '{print $2}'"))
    vm.run("resize2fs /dev/vda")
    assert int(vm.run("df -k /disks/g | tail -1 | awk '{print $2}'")) > 1.8 * before
    assert vm.run("cat /disks/g/kept && umount /disks/g && e2fsck -fn /dev/vda >/dev/null 2>&1") == "kept\n"


def inside(*words: str, **options: object) -> subprocess.Popen[str]:
    """A process in the host's namespace."""
    return subprocess.Popen(("ip", "netns", "exec", f"{TAP}s", *words), text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_transfer_each_way_with_offloads(here: Running) -> None:
    vm, net = here.vm, here.bus.get("net0", Net)
    vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
    served = here.folder / "served"
    served.mkdir(exist_ok=True)
    (served / "big").write_bytes(os.urandom(64 * MIB))
    digest = hashlib.sha256((served / "big").read_bytes()).hexdigest()
    server = inside(
        *(sys.executable, "-m", "http.server", "--bind", HERE, "--directory", str(served), "8000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        vm.wait_for(f"wget -q -O /dev/null http://{HERE}:8000/", seconds=120)
        before = (net.rx_packets, net.tx_packets, net.tx_bytes)
        vm.run(f"wget -q -O /tmp/big http://{HERE}:8000/big", seconds=120)
        assert vm.run("sha256sum /tmp/big").split()[0] == digest
    finally:
        server.terminate()
        server.wait(20)
    received = net.rx_packets - before[0]
    # Segments came whole: far fewer frames than 1,448 bytes each would need.
    assert received < 64 * MIB / 1448 / 2
    vm.run("httpd -p 8000 -h /tmp")
    fetched = inside(
        *(
            sys.executable,
            "-c",
            "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())",
        ),
        f"http://{THERE}:8000/big",
        stdout=(served / "back").open("wb"),
    )
    assert fetched.wait(120) == 0
    assert hashlib.sha256((served / "back").read_bytes()).hexdigest() == digest
    assert net.tx_packets - before[1] < 2 * 64 * MIB / 1448 / 2
    vm.run("killall httpd; rm /tmp/big")


def test_offloads_are_what_was_negotiated(here: Running) -> None:
    shown = dict(
        line.strip().split(": ")[:2] for line in here.vm.run("ethtool -k eth0").splitlines()[1:] if ": " in line
    )
    agreed = set(here.row("net0")["features"]["negotiated"])
    assert ("CSUM" in agreed) == (shown["tx-checksumming"] == "on")
    assert ("HOST_TSO4" in agreed) == (shown["tx-tcp-segmentation"] == "on")
    assert ("HOST_TSO6" in agreed) == (shown["tx-tcp6-segmentation"] == "on")
    assert {"CSUM", "HOST_TSO4", "MRG_RXBUF", "MQ"} <= agreed


def test_queue_pairs_come_and_go(here: Running) -> None:
    here.vm.run("ethtool -L eth0 combined 2")
    assert wait_until(lambda: here.bus.get("net0", Net).pairs == 2)
    here.vm.run("ethtool -L eth0 combined 1")
    assert wait_until(lambda: here.bus.get("net0", Net).pairs == 1)


def test_a_link_goes_down_and_up(here: Running) -> None:
    here.vm.run("ip link set eth0 up")
    for up in (False, True):
        here.vm.qmp("set_link", name="net0", up=up)
        here.vm.wait_for(f"test $(cat /sys/class/net/eth0/carrier) = {int(up)}", seconds=120)


def test_keys_arrive(here: Running) -> None:
    keyboard, tablet = here.bus.get("keyboard", Input), here.bus.get("tablet", Input)
    names = here.vm.run("cat /sys/class/input/event*/device/name").splitlines()
    assert {"vbus keyboard", "vbus tablet"} <= set(names)
    which = {name: here.vm.run(f"grep -l '{name}' /sys/class/input/event*/device/name").split("/")[4] for name in names}
    # Both are open when this returns: what is typed before that is lost.
    here.vm.run(
        f"exec 3</dev/input/{which['vbus keyboard']} 4</dev/input/{which['vbus tablet']}; "
        "cat <&3 >/tmp/keys & cat <&4 >/tmp/moves &"
    )
    assert wait_until(lambda: keyboard.type("hi"))
    assert wait_until(lambda: tablet.move(300, 400))
    # 24 bytes an event: two of the clock, type, code, value. Each key down, report, up, report.
    here.vm.wait_for("test $(wc -c </tmp/keys) = 192 && test $(wc -c </tmp/moves) = 72", seconds=120)
    keys = bytes.fromhex(here.vm.run("xxd -p /tmp/keys").replace("\n", ""))
    events = [keys[at + 16 : at + 24].hex() for at in range(0, len(keys), 24)]
    down, up, report = "01002300 01000000", "01002300 00000000", "00000000 00000000"
    assert events[:4] == [text.replace(" ", "") for text in (down, report, up, report)]
    assert events[4].startswith("01001700")
    moves = bytes.fromhex(here.vm.run("xxd -p /tmp/moves").replace("\n", ""))
    assert [moves[at + 16 : at + 24].hex() for at in (0, 24)] == ["030000002c010000", "0300010090010000"]
    here.vm.run("killall cat")


def test_a_driver_that_unbinds_and_comes_back(here: Running) -> None:
    here.vm.run("rmmod virtio_rng")
    assert wait_until(lambda: not here.row("rng0")["queues"][0]["running"])
    here.vm.run("insmod /modules/virtio_rng.ko && head -c 16 /dev/hwrng >/dev/null")
    assert here.row("rng0")["queues"][0]["running"]


def test_a_guest_that_is_reset_starts_with_its_devices(here: Running) -> None:
    before = here.queue("rng0", "requests")
    here.vm.reset()
    assert int(here.vm.run("cat /sys/block/vda/size")) == here.bus.get("disk0", Blk).capacity
    here.vm.run("head -c 4096 /dev/hwrng >/dev/null && dd if=/dev/vda of=/dev/null bs=64k count=4")
    here.vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
    here.vm.wait_for(f"ping -c 1 -W 1 {HERE}")
    assert here.queue("rng0", "requests")["bytes_written"] > before["bytes_written"]
    assert {row["name"] for row in here.listed() if row["owner"] is not None} == set(NAMES)


def test_nothing_was_violated(here: Running) -> None:
    assert {row["name"]: row["violations"] for row in here.listed()} == {name: {} for name in NAMES}
    assert here.vm.running
    assert here.vm.errors == ""
