"""A thousand devices behind one function of a guest, and disks that come and go a thousand times beside one that works.

`VBUS_MANY` and `VBUS_CYCLES` are how many.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import wait_until
from guests import BACKPORTS, bus_modules, function_args
from vbus.bus import Bus
from vbus.connectors import Ivshmem
from vbus.devices import Blk, Rng
from vbus.vm import Guest

pytestmark = pytest.mark.timeout(900)

MANY = int(os.environ.get("VBUS_MANY", "1000"))
CYCLES = int(os.environ.get("VBUS_CYCLES", "1000"))
MIB = 1 << 20
AT_ONCE = 10
"""Disks that are there at the same time."""
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup")
DEVICES = "/sys/bus/vbus/devices"

# What is written is read again, past the cache.
WORKER = """#!/bin/sh
n=0
while :; do
    dd if=/dev/urandom of=/tmp/w bs=64k count=4 2>/dev/null || exit 1
    dd if=/tmp/w of=/dev/vda bs=64k seek=$((n % 60 * 4)) oflag=direct conv=notrunc 2>/dev/null || exit 2
    dd if=/dev/vda of=/tmp/r bs=64k skip=$((n % 60 * 4)) count=4 iflag=direct 2>/dev/null || exit 3
    cmp /tmp/w /tmp/r || exit 4
    n=$((n + 1))
    echo $n >/tmp/n.new && mv /tmp/n.new /tmp/n
done
"""


@dataclass
class Running:
    """The guest, and its bus."""

    vm: Guest
    bus: Bus

    def listed(self) -> int:
        """Devices on the guest's bus."""
        return int(self.vm.run(f"ls {DEVICES} | wc -l"))

    def driven(self) -> list[int]:
        """The addresses of the disks that the guest has, in order; of those that are on their way, none."""
        said = self.vm.ask(
            f"for b in {DEVICES}/*/virtio*/block/vd*; do "
            "true 2>/dev/null </dev/${b##*/} && cat ${b%/virtio*}/address; done"
        ).output
        return sorted(int(word) for word in said.split() if word.isdecimal())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("many")
    with Bus("many", max_sources=8192) as bus:
        bus.plug(Blk(memory="16 MiB"), "disk0")
        connector = Ivshmem(folder / "many.sock", memory="256 MiB", keep=False)
        bus.connect(connector, "many")
        with Guest(
            args=function_args(connector),
            modules=["virtio_rng", "virtio_blk", *bus_modules()],
            files={"/bin/worker": WORKER},
            memory=512,
            cpus=2,
            backports=BACKPORTS,
        ) as vm:
            vm.wait_for("true 2>/dev/null </dev/vda")
            yield Running(vm, bus)


def test_a_thousand_devices(here: Running) -> None:
    names = [f"many{number}" for number in range(MANY)]
    for name in names:
        here.bus.plug(Rng(), name)
    here.vm.wait_for(f"test $(ls {DEVICES} | wc -l) = {MANY + 1}", seconds=120)
    # Each with its driver, and each driven.
    here.vm.wait_for(f"test $(ls -d {DEVICES}/*/virtio*/driver | wc -l) = {MANY + 1}", seconds=120)
    assert wait_until(lambda: all(here.bus.slot(name).owner is not None for name in names), 120)
    found = sorted(here.vm.run(f"cat {DEVICES}/*/name").split())
    assert found == sorted(["disk0", *names])
    # The last of them answers.
    here.vm.run("d=/sys/class/misc/hw_random; tail -n 1 $d/rng_available | tr ' ' '\\n' | tail -n 1 >$d/rng_current")
    here.vm.run("head -c 64 /dev/hwrng >/dev/null")
    for number, name in enumerate(names):
        here.bus.unplug(name, surprise=number % 2 == 1)
    here.vm.wait_for(f"test $(ls {DEVICES} | wc -l) = 1", seconds=120)


def test_disks_come_and_go_a_thousand_times_under_load(here: Running) -> None:
    vm, bus = here.vm, here.bus
    vm.run("(worker; echo $? >/tmp/ended) >/dev/null 2>&1 &")
    vm.wait_for("test -e /tmp/n")
    before = int(vm.run("cat /tmp/n"))
    kept = [f"disk{1 + number % AT_ONCE}" for number in range(CYCLES)]
    for number, name in enumerate(kept):
        if number >= AT_ONCE:
            bus.unplug(name, surprise=number % 3 == 0)
        # Its name is free at once, and its number when the guest has let go.
        bus.plug(Blk(memory=MIB, read_only=number % 2 == 1), name)
        if number % 100 == 50:
            # Once the guest has caught up, each can be read.
            numbers = sorted(slot.number for slot in bus.slots())
            assert wait_until(lambda: here.driven() == numbers, 120)  # noqa: B023
            for disk in vm.run(f"cd / && ls -d {DEVICES}/*/virtio*/block/vd*").split():
                vm.run(f"dd if=/dev/{Path(disk).name} of=/dev/null bs=4k count=4 iflag=direct")
    for name in kept[-AT_ONCE:]:
        bus.unplug(name)
    vm.wait_for(f"test $(ls {DEVICES} | wc -l) = 1", seconds=120)
    assert wait_until(lambda: len(bus.slots()) == 1, 120)
    deadline = time.monotonic() + 240
    while int(vm.run("cat /tmp/n")) < before + 5:
        assert vm.ask("cat /tmp/ended").status != 0, "the worker has ended"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    vm.run("killall worker")
    assert bus.slot("disk0").violations == {}


def test_nothing_was_wrong(here: Running) -> None:
    assert [line for line in here.vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []
    assert here.vm.errors == ""
