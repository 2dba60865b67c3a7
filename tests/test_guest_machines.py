"""The same bus in guests of four kinds: behind PCI, memory-mapped and behind channels, little- and big-endian."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from conftest import wait_until
from guests import file_served, guest, namespace, running
from vbus.devices import Blk, Input, Net
from vbus.virtio import features

MIB = 1 << 20

RNG = """
[device.rng0]
type = "rng"
[connector.rng0]
type = "vhost-user"
device = "rng0"
socket = "rng0.sock"
"""
DISK = """
[device.disk0]
type = "blk"
memory = "32 MiB"
queues = 2
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "disk0.sock"
"""
NET = """
[device.net0]
type = "net"
backend = "tap:{tap}"
queue_pairs = 2
[connector.net0]
type = "vhost-user"
device = "net0"
socket = "net0.sock"
"""
MORE = """
[device.disk1]
type = "blk"
memory = "1 MiB"
read_only = true
[connector.disk1]
type = "vhost-user"
device = "disk1"
socket = "disk1.sock"
[device.keys0]
type = "input"
[connector.keys0]
type = "vhost-user"
device = "keys0"
socket = "keys0.sock"
"""
CARRIED = {"q35": RNG + DISK + NET, "microvm": RNG + DISK + NET + MORE, "s390x": NET, "pseries": RNG + DISK + NET}
"""What QEMU has a front-end for, by the machine."""
SCATTERED = """
head -c 1048576 /dev/urandom >/tmp/pages
exec 3</dev/{disk}
for n in $(seq 0 2 254) $(seq 1 2 255); do
    dd if=/tmp/pages of=/dev/{disk} bs=4k count=1 skip=$n seek=$n 2>/dev/null
done
sync
exec 3<&-
echo 3 >/proc/sys/vm/drop_caches
"""
CPUS = 2
TAP = f"vb{os.getpid() % 100000}m"
HERE, THERE = "10.254.93.1", "10.254.93.2"


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root")
@pytest.mark.parametrize(
    ("machine", "packed"), [*((machine, False) for machine in CARRIED), ("q35", True)], ids=[*CARRIED, "q35 packed"]
)
def test_devices_work_in_a_stock_guest(machine: str, packed: bool, tmp_path: Path) -> None:
    subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap", "multi_queue"], check=True)
    try:
        with (
            namespace(f"{TAP}s") as inside,
            running('[bus]\nname = "guest"\n' + CARRIED[machine].format(tap=TAP), tmp_path) as bus,
        ):
            subprocess.run(["ip", "link", "set", TAP, "netns", f"{TAP}s"], check=True)
            subprocess.run([*inside, "ip", "address", "add", f"{HERE}/24", "dev", TAP], check=True)
            subprocess.run([*inside, "ip", "link", "set", TAP, "up"], check=True)
            with (
                file_served(tmp_path, 8 * MIB, HERE, inside) as digest,
                guest(bus, machine, packed=packed, cpus=CPUS) as vm,
            ):
                vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
                vm.wait_for(f"wget -q -O /tmp/file http://{HERE}:8000/file", seconds=120)
                assert vm.run("sha256sum </tmp/file").split()[0] == digest
                assert bus.get("net0", Net).rx_bytes > 8 * MIB
                if machine == "q35":
                    # Every queue stops, buffers that the network has put by for packets among them, and goes on.
                    vm.qmp("stop")
                    assert wait_until(lambda: not any(q.core.running for slot in bus.slots() for q in slot.queues))
                    vm.qmp("cont")
                    vm.run(f"rm /tmp/file && wget -q -O /tmp/file http://{HERE}:8000/file", seconds=120)
                    assert vm.run("sha256sum </tmp/file").split()[0] == digest
                for device in (bus.slot(name).device for name in ("net0", "disk0") if name in CARRIED[machine]):
                    assert bool(device.negotiated >> features.RING_PACKED & 1) == packed
                if "disk0" in CARRIED[machine]:
                    disk = vm.run("grep -lx 65536 /sys/block/vd?/size").split("/")[3]
                    assert len(vm.run(f"ls /sys/block/{disk}/mq").split()) == 2
                    vm.run(f"dd if=/tmp/file of=/dev/{disk} bs=64k conv=fsync && echo 3 >/proc/sys/vm/drop_caches")
                    assert vm.run(f"head -c 8388608 /dev/{disk} | sha256sum").split()[0] == digest
                    # No two pages that follow each other on the disk do so in memory: requests of as many segments as
                    # there may be. They are written when nobody has the disk open any more.
                    vm.run(SCATTERED.format(disk=disk))
                    assert vm.run(f"head -c {MIB} /dev/{disk} | sha256sum") == vm.run("sha256sum </tmp/pages")
                    assert bus.get("disk0", Blk).writes
                if "disk1" in CARRIED[machine]:
                    # Which is which is up to the kernel.
                    assert sorted(vm.run("cat /sys/block/vd?/ro").split()) == ["0", "1"]
                    # It is open when this returns: what is typed before that is lost.
                    vm.run("exec 3</dev/input/event0; cat <&3 >/tmp/keys &")
                    assert wait_until(lambda: bus.get("keys0", Input).type("a"))
                    # Down, report, up, report: 24 bytes each.
                    vm.wait_for("test $(wc -c </tmp/keys) = 96")
                    vm.run("killall cat")
                if "rng0" in CARRIED[machine]:
                    assert vm.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
                    assert vm.run("head -c 65536 /dev/hwrng | wc -c") == "65536\n"
                assert [dict(slot.violations) for slot in bus.slots()] == [{}] * len(bus.slots())
                assert vm.errors == ""
            # The guest is gone: its devices are free.
            assert wait_until(lambda: not any(slot.queues[0].core.running for slot in bus.slots()))
    finally:
        subprocess.run(["ip", "link", "del", TAP], check=False, capture_output=True)
