"""The same bus in guests of four kinds: behind PCI, memory-mapped and behind channels, little- and big-endian."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import wait_until
from guests import guest, running
from vbus.devices import Blk, Net
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
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "disk0.sock"
"""
NET = """
[device.net0]
type = "net"
backend = "tap:{tap}"
[connector.net0]
type = "vhost-user"
device = "net0"
socket = "net0.sock"
"""
CARRIED = {"q35": RNG + DISK + NET, "microvm": RNG + DISK + NET, "s390x": NET, "pseries": RNG + DISK + NET}
"""What QEMU has a front-end for, by the machine."""
TAP = f"vb{os.getpid() % 100000}m"
HERE, THERE = "10.254.93.1", "10.254.93.2"


@pytest.mark.timeout(400)
@pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root")
@pytest.mark.parametrize(
    ("machine", "packed"), [*((machine, False) for machine in CARRIED), ("q35", True)], ids=[*CARRIED, "q35 packed"]
)
def test_devices_work_in_a_stock_guest(machine: str, packed: bool, tmp_path: Path) -> None:
    namespace = f"{TAP}s"
    subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap", "multi_queue"], check=True)
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    server: subprocess.Popen[bytes] | None = None
    try:
        with running('[bus]\nname = "guest"\n' + CARRIED[machine].format(tap=TAP), tmp_path) as bus:
            subprocess.run(["ip", "link", "set", TAP, "netns", namespace], check=True)
            subprocess.run(["ip", "-n", namespace, "address", "add", f"{HERE}/24", "dev", TAP], check=True)
            subprocess.run(["ip", "-n", namespace, "link", "set", TAP, "up"], check=True)
            (tmp_path / "served").mkdir()
            (tmp_path / "served/file").write_bytes(os.urandom(8 * MIB))
            digest = hashlib.sha256((tmp_path / "served/file").read_bytes()).hexdigest()
            server = subprocess.Popen(
                [
                    *("ip", "netns", "exec", namespace, sys.executable, "-m", "http.server"),
                    *("--bind", HERE, "--directory", str(tmp_path / "served"), "8000"),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            with guest(bus, machine, packed=packed) as vm:
                vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
                vm.wait_for(f"wget -q -O /tmp/file http://{HERE}:8000/file", seconds=60)
                assert vm.run("sha256sum </tmp/file").split()[0] == digest
                assert bus.get("net0", Net).rx_bytes > 8 * MIB
                if machine == "q35":
                    # Every queue stops, buffers that the network has put by for packets among them, and goes on.
                    vm.qmp("stop")
                    assert wait_until(lambda: not any(q.core.running for slot in bus.slots() for q in slot.queues))
                    vm.qmp("cont")
                    vm.run(f"rm /tmp/file && wget -q -O /tmp/file http://{HERE}:8000/file", seconds=60)
                    assert vm.run("sha256sum </tmp/file").split()[0] == digest
                for device in (bus.slot(name).device for name in ("net0", "disk0") if name in CARRIED[machine]):
                    assert bool(device.negotiated >> features.RING_PACKED & 1) == packed
                if "disk0" in CARRIED[machine]:
                    vm.run("dd if=/tmp/file of=/dev/vda bs=64k conv=fsync && echo 3 >/proc/sys/vm/drop_caches")
                    assert vm.run("head -c 8388608 /dev/vda | sha256sum").split()[0] == digest
                    assert bus.get("disk0", Blk).writes
                if "rng0" in CARRIED[machine]:
                    assert vm.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
                    assert vm.run("head -c 65536 /dev/hwrng | wc -c") == "65536\n"
                assert [dict(slot.violations) for slot in bus.slots()] == [{}] * len(bus.slots())
            # The guest is gone: its devices are free.
            assert wait_until(lambda: not any(slot.queues[0].core.running for slot in bus.slots()))
    finally:
        if server is not None:
            server.terminate()
            server.wait(20)
        subprocess.run(["ip", "netns", "del", namespace], check=False)
        subprocess.run(["ip", "link", "del", TAP], check=False, capture_output=True)
