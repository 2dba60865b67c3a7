"""A guest of another architecture, with pages of 64 KiB and modules that were built across."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from guests import function_args
from vbus.bus import Bus
from vbus.connectors import Ivshmem
from vbus.devices import Blk, Rng
from vbus.vm import Guest
from vbus.vm.build import MODULES, SOURCES, build
from vbus.vm.options import monitor_options

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("powerpc64le-linux-gnu-gcc") is None, reason="no cross compiler for ppc64el"),
    pytest.mark.skipif(shutil.which("qemu-system-ppc64") is None, reason="no qemu-system-ppc64 on this machine"),
]

MIB = 1 << 20
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|hung task|soft lockup")


def test_devices_are_driven_in_a_window_and_in_memory(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = make_bus("power")
    ram, qmp = tmp_path / "ram", tmp_path / "qmp"
    bus.plug(Blk(memory="16 MiB"), "copied0")
    bus.plug(Blk(memory="16 MiB"), "shared0")
    bus.plug(Rng(), "rng0")
    copying = bus.connect(Ivshmem(tmp_path / "copying.sock", devices=["copied0"], keep=False), "copying")
    sharing = bus.connect(
        Ivshmem(tmp_path / "sharing.sock", devices=["shared0", "rng0"], ram=ram, qmp=qmp, keep=False), "sharing"
    )
    built = build(SOURCES, "ppc64el").modules
    with Guest(
        "pseries",
        args=[*monitor_options(qmp), *function_args(copying), *function_args(sharing)],
        modules=["virtio_blk", "virtio_rng", *(built[name] for name in MODULES)],
        memory=512,
        memory_file=ram,
    ) as vm:
        for name, memory in (("copied0", "window"), ("shared0", "shared")):
            place = f"$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name))"
            path = vm.wait_for(f"d={place} && test -d $d/virtio*/block && realpath $d", seconds=120).strip()
            assert vm.run(f"cat $(dirname {path})/memory").strip() == memory
            disk = vm.wait_for(
                f"b=$(ls {path}/virtio*/block) && test -b /dev/$b && true 2>/dev/null </dev/$b && echo $b"
            ).strip()
            vm.run(f"dd if=/dev/urandom of=/tmp/x bs=64k count=32; dd if=/tmp/x of=/dev/{disk} bs=64k conv=fsync")
            vm.run(f"dd if=/dev/{disk} bs=64k count=32 iflag=direct | cmp - /tmp/x")
        assert len(vm.ask("head -c 64 /dev/hwrng").data) == 64
        assert [line for line in vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []
    assert not any(bus.slot(name).violations for name in ("copied0", "shared0", "rng0"))
