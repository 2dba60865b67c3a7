"""The process behind a guest's function is killed, at any moment, and comes again: so do the guest's devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import wait_until
from guests import BACKPORTS, Served, bus_modules, reads_again_and_again
from vbus.shmem import ivshmem
from vbus.vm import Guest
from vbus.vm.options import function_options

pytestmark = pytest.mark.timeout(900)

MIB = 1 << 20
KILLS = 3
BUS = """
[bus]
name = "killed"
[device.rng0]
type = "rng"
[device.disk0]
type = "blk"
path = "disk.img"
[connector.vm]
type = "ivshmem"
socket = "vm.sock"
"""
CONCERNS = ("BUG", "WARNING", "Oops", "Call Trace", "hung task")


def test_devices_come_back_with_the_bus(tmp_path: Path) -> None:
    (tmp_path / "bus.toml").write_text(BUS)
    data = os.urandom(2 * MIB)
    (tmp_path / "disk.img").write_bytes(data + bytes(14 * MIB))
    with Served(tmp_path / "bus.toml", "killed") as served:
        args = function_options("vm", tmp_path / "vm.sock", ivshmem.VECTORS)
        modules: list[str | Path] = ["virtio_rng", "virtio_blk", *bus_modules()]
        with Guest(args=args, modules=modules, cpus=2, backports=BACKPORTS) as vm:
            for kill in range(KILLS):
                vm.wait_for("true 2>/dev/null </dev/vda && head -c 64 /dev/hwrng >/dev/null", seconds=120)
                # What the kernel's name for it is does not matter: it has one disk at a time.
                vm.run(
                    f"dd if=/dev/urandom of=/tmp/new bs=64k count=16 && dd if=/tmp/new of=/dev/vda bs=64k "
                    f"seek={32 + 16 * kill} conv=fsync"
                )
                nobody_waits = reads_again_and_again(vm, "vda")
                served.end()
                served.start()
                # The disk that was may be there for a while yet, but whoever served it is gone: it is not read.
                written = f"dd if=/dev/vda bs=64k skip={32 + 16 * kill} count=16 iflag=direct"
                vm.wait_for(f"{written} | cmp - /tmp/new", seconds=120)
                # Nobody waits for the disk that was.
                nobody_waits()
            vm.run("dd if=/dev/vda of=/tmp/old bs=64k count=32")
            told = vm.run("dmesg")
            assert [line for line in told.splitlines() if any(word in line for word in CONCERNS)] == []
            assert told.count("is bus killed") == KILLS + 1
            vm.run("rmmod vbus_ivshmem", seconds=120)
            assert vm.errors == ""
    assert (tmp_path / "disk.img").read_bytes()[: 2 * MIB] == data
    assert wait_until(lambda: not (tmp_path / "vm.sock.keeper").exists(), 120)
