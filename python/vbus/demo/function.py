"""What `vbus demo --kvm` shows: a whole bus behind one function of a guest, with the modules of `guest/linux`.

    this process: the bus, with one ivshmem connector    QEMU: ivshmem-doorbell    the guest: vbus_ivshmem, vbus_proxy,
                                                                                   virtio_vbus, the kernel's drivers

The guest does what it does in `vbus demo --vm`; the function has the devices in it that QEMU has options for there.
Besides, a disk comes and goes without QEMU being asked, and it is counted what the signals of all that work took. In
the end another guest reads from disks that it has in several ways, which `vbus bench exits` does at length.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil

from vbus.bench.guest_machine import GuestMachine, Load
from vbus.bench.guest_side import DIRECT, PCI, TUNNELLED
from vbus.connectors import Ivshmem
from vbus.demo.machine import NAMES, SETTLE_SECONDS, Machine, why_no_guest
from vbus.demo.machine import main as machine_main
from vbus.demo.steps import Step, StepFailed
from vbus.devices import Blk
from vbus.shmem import ivshmem
from vbus.vm.build import MODULES, SOURCES, BuildError, FetchError, bus_modules
from vbus.vm.modules import modules_for
from vbus.vm.options import function_options

CONNECTOR = '\n[connector.guest]\ntype = "ivshmem"\nsocket = "guest.sock"\n'
COMER = "disk2"
"""The disk that comes and goes."""
COMER_SIZE = 8 << 20
DISKS, DEPTH, READS = 4, 4, 500
"""Disks that are compared, reads of each at once, and in all."""
DEVICES = "/sys/bus/vbus/devices"
COUNTED = ("signalled", "sent", "rung")


def why_no_modules() -> str:
    """Why there can be no guest with the modules here; empty when there can. They are built, if they are not yet."""
    reason = why_no_guest()
    if reason:
        return reason
    if not SOURCES.is_dir():
        return "the sources of the guest's modules are not here (guest/linux of a checkout)"
    for tool in ("make", "gcc"):
        if shutil.which(tool) is None:
            return f"{tool} is missing (package {tool})"
    try:
        bus_modules()
    except (FetchError, BuildError) as error:
        return str(error).splitlines()[0].rstrip(":")
    return ""


class FunctionMachine(Machine):
    """One run, in which the guest has the bus and not its devices from QEMU."""

    name = "demo-kvm"

    def connectors(self) -> str:
        """One for all."""
        return CONNECTOR

    # Steps.

    def boot(self) -> str:
        """A guest with one function, and the modules."""
        connector = self._bus.connectors["guest"]
        assert isinstance(connector, Ivshmem)
        assert connector.socket is not None
        options = function_options(connector.name, connector.socket, ivshmem.VECTORS)
        drivers = [module for name in NAMES for module in modules_for(self._bus.show(name)["device_id"])]
        booted = self._boot(options, [*drivers, *bus_modules()])
        return f"{booted}, behind one function ({', '.join(MODULES)})"

    def arrival(self) -> str:
        """Each device is on the guest's bus, under its name, with a driver of the kernel's own."""
        found = []
        for name in NAMES:
            path = self._path(name)
            driver = self._guest.run(f"basename $(readlink {path}/virtio*/driver)").strip()
            found.append(f"{path.rpartition('/')[2]} is {name} ({driver})")
        return "; ".join(found)

    def hotplug(self) -> str:
        """A disk comes and goes: QEMU has no part in that."""
        content = bytes(range(256)) * (COMER_SIZE // 256)
        image = self.folder / "disk2.img"
        image.write_bytes(content)
        before = self._pci_functions()
        self._bus.plug(Blk(image), COMER)
        try:
            # It can be opened a little after it has a name.
            disk = self._guest.wait_for(
                f"grep -qx {COMER} {DEVICES}/*/name && b=$(ls $(dirname $(grep -lx {COMER} "
                f"{DEVICES}/*/name))/virtio*/block) && test -b /dev/$b && true 2>/dev/null </dev/$b && echo $b",
                seconds=SETTLE_SECONDS,
            ).strip()
            here = self._guest.run(f"sha256sum </dev/{disk}", seconds=60).split()[0]
        finally:
            self._bus.unplug(COMER)
        if here != hashlib.sha256(content).hexdigest():
            raise StepFailed(f"/dev/{disk} has another content than {image.name}")
        self._guest.wait_for(f"! grep -qx {COMER} {DEVICES}/*/name && ! test -e /sys/block/{disk}", seconds=20)
        if self._pci_functions() != before:
            raise StepFailed("PCI functions of the guest came or went with it")
        return f"{COMER} came as /dev/{disk}, was read and found whole, and went; {before} PCI functions all the while"

    def signals(self) -> str:
        """What the work so far took: signals that either side wanted to give, and doorbells that it came to."""
        requests = sum(row["requests"] for row in self._bus.stat())
        there = {way: self._counted(way) for way in ("to_device", "to_driver")}
        bells = self._interrupts()
        inward, outward = there["to_device"], there["to_driver"]
        for way, counted in there.items():
            if not counted["signalled"] >= counted["sent"] >= counted["rung"] > 0 or not bells:
                raise StepFailed(f"{way}: {counted}, {bells} interrupts")
        return (
            f"{requests} requests; towards the bus {inward['signalled']} signals rang {inward['rung']} doorbells, "
            f"towards the guest {outward['signalled']} rang {outward['rung']}: {bells} interrupts"
        )

    def compare(self) -> str:
        """What reads of several disks take of interrupts and doorbells, over virtio-pci and behind a function."""
        folder = self.folder / "compare"
        folder.mkdir()
        said = []
        with contextlib.closing(GuestMachine(folder, DISKS, 0)) as machine:
            for kind, name in ((PCI, "virtio-pci over vhost-user"), (DIRECT, "direct"), (TUNNELLED, "tunnelled")):
                told = machine.run(kind, Load("read", DISKS, DEPTH, READS))
                if told["wrong"] or told["requests"] != DISKS * READS:
                    raise StepFailed(f"{name}: {told['requests']} reads, {told['wrong']} of them wrong")
                vectors = [count for of, count in told["interrupts"].items() if of.startswith(("virtio", "vbus"))]
                bells = told["bus"]["rung_to_device"]
                each = f"{sum(vectors) / told['requests']:.2f} and {bells / told['requests']:.2f}"
                said.append(f"{name} {each}")
        return f"{DISKS} disks, {DEPTH} reads of each at once: interrupts and doorbells a read, {'; '.join(said)}"

    def set_link(self, up: bool) -> None:
        """The device's own word reaches the guest: nobody is between them."""
        self._bus.set("net0", "link", "on" if up else "off")

    def block(self, device: str) -> str:
        """The guest's name of a disk."""
        return self._guest.run(f"ls {self._path(device)}/virtio*/block").strip()

    def steps(self) -> list[Step]:
        """Those of every guest, and what only this way has."""
        steps = super().steps()
        at = [name for name, _ in steps].index("guest") + 1
        return [
            *steps[:at],
            ("arrival", self.arrival),
            *steps[at:-1],
            ("hotplug", self.hotplug),
            ("signals", self.signals),
            steps[-1],
            ("compare", self.compare),
        ]

    # What the guest's bus says.

    def _path(self, device: str) -> str:
        """A device's directory there."""
        return self._guest.run(f"dirname $(grep -lx {device} {DEVICES}/*/name)").strip()

    def _pci_functions(self) -> int:
        return int(self._guest.run("ls /sys/bus/pci/devices | wc -l"))

    def _counted(self, way: str) -> dict[str, int]:
        """What was counted one way, of all queues of all devices."""
        said = {kind: self._guest.run(f"cat {DEVICES}/*/{way}/{kind}").split() for kind in COUNTED}
        return {kind: sum(map(int, words)) for kind, words in said.items()}

    def _interrupts(self) -> int:
        """Interrupts for events so far, of every priority."""
        lines = self._guest.run("cat /proc/interrupts").splitlines()
        rows = [line.split() for line in lines if re.search(r"vbus-\S+-\d$", line)]
        return sum(int(word) for row in rows for word in row[1:] if word.isdecimal())


def main() -> int:
    """Run the demo; its exit status. Where there can be no such guest, the demo without a guest stands in."""
    return machine_main(FunctionMachine, why_no_modules)
