"""The process that serves a guest is killed again and again, at any moment; the guest writes, reads and checks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guests import Served, device_args, file_served, namespace
from vbus.devices import Blk, Net, Rng
from vbus.virtio.features import RING_PACKED
from vbus.vm import Guest

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root"),
]

KILLS = int(os.environ.get("VBUS_KILLS", "10"))
TAP = f"vb{os.getpid() % 100000}k"
HERE, THERE = "10.254.94.1", "10.254.94.2"
MIB = 1 << 20

# Two of them at once, each in its own half of the disk: what was written is read again, past the cache.
WRITER = """#!/bin/sh
n=0
while :; do
    dd if=/dev/urandom of=/tmp/w$1 bs=64k count=8 2>/dev/null || exit 1
    at=$(( $1 * 256 + n % 30 * 8 ))
    dd if=/tmp/w$1 of=/dev/vda bs=64k seek=$at conv=fsync,notrunc 2>/tmp/e$1 || exit 2
    echo 1 >/proc/sys/vm/drop_caches
    dd if=/dev/vda of=/tmp/r$1 bs=64k skip=$at count=8 2>/tmp/e$1 || exit 3
    cmp /tmp/w$1 /tmp/r$1 || exit 4
    n=$((n + 1))
    echo $n >/tmp/n$1.new && mv /tmp/n$1.new /tmp/n$1
done
"""

DISK = """
[bus]
name = "killed"
[device.disk0]
type = "blk"
path = "disk.img"
queues = 2
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "disk0.sock"
"""

NET = """
[bus]
name = "killed"
[device.net0]
type = "net"
backend = "tap:{tap}"
queue_pairs = 2
[connector.net0]
type = "vhost-user"
device = "net0"
socket = "net0.sock"
"""

RNG = """
[bus]
name = "killed"
[device.rng0]
type = "rng"
[connector.rng0]
type = "vhost-user"
device = "rng0"
socket = "rng0.sock"
[device.disk0]
type = "blk"
memory = "8 MiB"
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "disk0.sock"
"""


def no_errors(vm: Guest) -> None:
    assert vm.ask("dmesg | grep -iE 'error|[^p]reset|timed out|hung'").output == ""
    assert vm.running


# Behind memory-mapped virtio, rings are larger than the front-end says beforehand.
@pytest.mark.parametrize(
    ("machine", "kills", "packed"),
    [("q35", KILLS, False), ("q35", KILLS, True), ("microvm", 3, False)],
    ids=["q35", "q35-packed", "microvm"],
)
def test_a_disk_loses_nothing(tmp_path: Path, machine: str, kills: int, packed: bool) -> None:
    with (tmp_path / "disk.img").open("wb") as disk:
        disk.truncate(32 * MIB)
    (tmp_path / "bus.toml").write_text(DISK)
    disk0 = Blk(tmp_path / "disk.img", queues=2)
    args = device_args(machine, "disk0", disk0, tmp_path / "disk0.sock", reconnect=True, packed=packed)
    chance = random.Random(int(time.time()))
    with (
        Served(tmp_path / "bus.toml", "killed") as served,
        Guest(machine, args=args, modules=["virtio_blk"], cpus=2, files={"/bin/writer": WRITER}) as vm,
    ):
        negotiated = vm.run("cat /sys/bus/virtio/devices/virtio0/features").strip()
        assert negotiated[RING_PACKED] == str(int(packed))
        vm.run("for i in 0 1; do (writer $i; echo $? >/tmp/ended$i) & done")
        for _ in range(kills):
            before = counts(vm)
            time.sleep(chance.random() * 0.5)
            served.end(signal.SIGKILL)
            served.start()
            deadline = time.monotonic() + 240
            while any(now < then + 2 for now, then in zip(counts(vm), before, strict=True)):
                found = vm.ask("cat /tmp/e* /tmp/ended*; dmesg | tail -20").output
                assert time.monotonic() < deadline, (found, vm.errors, served.said())
                time.sleep(0.1)
        assert vm.ask("cat /tmp/ended0 /tmp/ended1").status != 0, "a writer has ended"
        vm.run("killall writer; sleep 0.5; sync")
        no_errors(vm)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_transfer_goes_on(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "bus.toml").write_text(NET.format(tap=TAP))
    chance = random.Random(int(time.time()))
    args = device_args("q35", "net0", Net(queue_pairs=2), tmp_path / "net0.sock", reconnect=True, packed=packed)
    with namespace(f"{TAP}s") as inside:
        subprocess.run([*inside, "ip", "tuntap", "add", TAP, "mode", "tap", "multi_queue"], check=True)
        subprocess.run([*inside, "ip", "address", "add", f"{HERE}/24", "dev", TAP], check=True)
        subprocess.run([*inside, "ip", "link", "set", TAP, "up"], check=True)
        with (
            file_served(tmp_path, 16 * MIB, HERE, inside) as digest,
            Served(tmp_path / "bus.toml", "killed", inside) as served,
            Guest(args=args, modules=["virtio_net"], cpus=2) as vm,
        ):
            negotiated = vm.run("cat /sys/bus/virtio/devices/virtio0/features").strip()
            assert negotiated[RING_PACKED] == str(int(packed))
            vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
            fetch = f"wget -q -O - http://{HERE}:8000/file | sha256sum"
            vm.wait_for(fetch)
            vm.run(f"(while :; do {fetch}; done >/tmp/sums) &")
            for _ in range(KILLS):
                before = len(vm.run("cat /tmp/sums").split())
                time.sleep(chance.random() * 0.5)
                served.end(signal.SIGKILL)
                served.start()
                vm.wait_for(f"test $(wc -w </tmp/sums) -gt {before + 2}", seconds=120)
            sums = [line.split()[0] for line in vm.run("cat /tmp/sums").splitlines()]
            assert sums == [digest] * len(sums)
            no_errors(vm)


def test_what_cannot_come_back_is_lost_alone(tmp_path: Path) -> None:
    """QEMU's front-ends of other classes than blk and net do not reconnect."""
    (tmp_path / "bus.toml").write_text(RNG)
    args = device_args("q35", "rng0", Rng(), tmp_path / "rng0.sock")
    args += device_args("q35", "disk0", Blk(memory=8 * MIB), tmp_path / "disk0.sock", reconnect=True)
    with (
        Served(tmp_path / "bus.toml", "killed") as served,
        Guest(args=args, modules=["virtio_blk", "virtio_rng"]) as vm,
    ):
        vm.run("head -c 16 /dev/hwrng")
        served.end(signal.SIGKILL)
        served.start()
        vm.run("dd if=/dev/zero of=/dev/vda bs=64k count=4 conv=fsync")
        listed = subprocess.run(
            [sys.executable, "-m", "vbus", "ls", "--json"], capture_output=True, text=True, check=True
        )
        owners = {row["name"]: row["owner"] is not None for row in json.loads(listed.stdout)}
        assert owners == {"rng0": False, "disk0": True}
        assert vm.running


def counts(vm: Guest) -> list[int]:
    """How many rounds each writer has done."""
    said = vm.ask("cat /tmp/n0 /tmp/n1").output.split()
    return [int(word) for word in said] if len(said) == 2 and all(map(str.isdecimal, said)) else [0, 0]
