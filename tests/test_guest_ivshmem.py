"""A guest that sees a bus through one function, with the modules of `guest/linux`, at real work. It is booted once.

The bus has two functions there: one whose events are tunnelled, and one, with less memory, whose signals are direct.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from guests import BACKPORTS, bus_modules, files_each_way, function_args, namespace, reads_again_and_again
from vbus.bus import Bus, Queue, Request
from vbus.connectors import Ivshmem
from vbus.devices import Blk, Console, Net, Rng
from vbus.vm import Guest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root"),
]

TAP = f"vb{os.getpid() % 100000}i"
HERE, THERE = "10.254.95.1", "10.254.95.2"
"""The host's address, and the guest's."""
MIB = 1 << 20
TREE = Path(__file__).parent

TUNNELLED = ("rng0", "disk0", "disk1", "net0", "console0")
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup")
FAULTY = "the handler fails, as it shall"


class OwnBlk(Blk):
    """A disk that fails, or that does nothing for a while, when it is told to."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fails = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Answer requests, or do what a good disk does not."""
        assert self.may_go_on.wait(60)
        if self.fails:
            raise RuntimeError(FAULTY)
        super().handle_batch(queue, requests)


@dataclass
class Running:
    """The guest of these tests, and what it runs on."""

    vm: Guest
    bus: Bus
    folder: Path
    tree: dict[str, str]
    """SHA-256 of each file on the read-only disk."""
    inside: tuple[str, ...]
    """The words that run a command where the host's end of the network is."""

    def path(self, name: str) -> str:
        """The directory in sysfs of a device, by its name on the bus."""
        return self.vm.run(f"realpath $(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name))").strip()

    def read(self, name: str, attribute: str) -> str:
        """What an attribute of a device says in the guest."""
        return self.vm.run(f"cat {self.path(name)}/{attribute}").strip()

    def block(self, name: str) -> str:
        """The kernel's name of a disk, once it can be opened: its folder is there before it, and its file behind it."""
        return self.vm.wait_for(
            f"d=$(grep -lx {name} /sys/bus/vbus/devices/*/name) && b=$(ls $(dirname $d)/virtio*/block) && "
            "test -b /dev/$b && true 2>/dev/null </dev/$b && echo $b"
        ).strip()

    def counters(self, name: str) -> dict[str, dict[str, int]]:
        """What was counted for a device, by direction."""
        kinds = ("signalled", "sent", "rung", "taken")
        path = self.path(name)
        return {
            way: dict(
                zip(kinds, map(int, self.vm.run(f"cd {path}/{way} && cat {' '.join(kinds)}").split()), strict=True)
            )
            for way in ("to_device", "to_driver")
        }

    def interrupts(self) -> dict[str, int]:
        """Interrupts by the name of their vector."""
        said = self.vm.run("cat /proc/interrupts")
        rows = [line.split() for line in said.splitlines() if "vbus" in line]
        return {row[-1]: sum(int(word) for word in row[1:3]) for row in rows}

    def settled(self) -> None:
        """Every device of the bus is there, with its driver."""
        names = " ".join([*TUNNELLED, "direct0"])
        self.vm.wait_for(
            f"for n in {names}; do d=$(dirname $(grep -lx $n /sys/bus/vbus/devices/*/name)) || exit 1; "
            "test -e $d/virtio*/driver || exit 1; done"
        )


def plug_all(bus: Bus, folder: Path) -> None:
    """The devices of these tests, and both functions."""
    bus.plug(Rng(), "rng0", priority=6)
    bus.plug(Blk(folder / "disk.img", queues=2), "disk0")
    bus.plug(Blk(folder / "tree.img", read_only=True), "disk1")
    bus.plug(Net(f"tap:{TAP}"), "net0", priority=2)
    bus.plug(Console(f"unix:{folder}/console.sock"), "console0", priority=0)
    bus.plug(OwnBlk(folder / "direct.img", engine="python"), "direct0")
    bus.connect(Ivshmem(folder / "whole.sock", devices=[*TUNNELLED, "hot0", "flaky0"]), "tunnelled")
    bus.connect(Ivshmem(folder / "direct.sock", devices=["direct0"], signal="direct", memory="32 MiB"), "direct")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guest")
    files = folder / "tree"
    files.mkdir()
    for path in sorted(TREE.glob("*.py")):
        shutil.copy(path, files)
    (files / "deep" / "er").mkdir(parents=True)
    (files / "deep" / "er" / "random").write_bytes(os.urandom(3 * MIB + 77))
    sums = {
        str(path.relative_to(files)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files.rglob("*")
        if path.is_file()
    }
    for name, size in (("disk", 64), ("tree", 24), ("direct", 64)):
        with (folder / f"{name}.img").open("wb") as disk:
            disk.truncate(size * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(files), str(folder / "tree.img")], check=True)
    # What somebody else keeps in such a function must stay as it is.
    (folder / "stray.mem").write_bytes(b"somebody else's" + bytes(MIB - 15))
    stray = [
        *("-object", f"memory-backend-file,id=stray,size=1M,share=on,mem-path={folder / 'stray.mem'}"),
        *("-device", "ivshmem-plain,memdev=stray"),
    ]
    with pytest.MonkeyPatch.context() as patch, namespace(f"{TAP}s") as inside:
        patch.setenv("VBUS_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        subprocess.run(["ip", "tuntap", "add", TAP, "mode", "tap"], check=True)
        try:
            with Bus("whole") as bus:
                plug_all(bus, folder)
                subprocess.run(["ip", "link", "set", TAP, "netns", f"{TAP}s"], check=True)
                for words in (["address", "add", f"{HERE}/24", "dev", TAP], ["link", "set", TAP, "up"]):
                    subprocess.run(["ip", "-n", f"{TAP}s", *words], check=True)
                functions = [connector for connector in bus.connectors.values() if isinstance(connector, Ivshmem)]
                args = [word for connector in functions for word in function_args(connector)]
                drivers = ["virtio_rng", "virtio_blk", "virtio_net", "virtio_console", "crc32c_generic", "ext4"]
                with Guest(
                    args=[*args, *stray],
                    modules=[*drivers, *bus_modules()],
                    packages=["e2fsprogs"],
                    memory=512,
                    cpus=2,
                    append="slub_debug=FZPU",
                    backports=BACKPORTS,
                ) as vm:
                    running = Running(vm, bus, folder, sums, inside)
                    running.settled()
                    yield running
        finally:
            subprocess.run(["ip", "link", "del", TAP], capture_output=True, check=False)


def test_every_device_is_there_as_the_bus_has_it(here: Running) -> None:
    for name in (*TUNNELLED, "direct0"):
        slot = here.bus.slot(name)
        assert here.read(name, "address") == str(slot.number)
        assert here.read(name, "uuid") == str(slot.uuid)
        assert here.read(name, "device_id") == str(int(slot.device.device_id))
        assert here.read(name, "priority") == " ".join(str(priority) for priority in slot.queue_priorities)
        assert slot.owner is not None
    used = {int(name.rsplit("-", 1)[1]) for name in here.interrupts() if name.startswith("vbus-0")}
    # A vector for each priority that is in use, and no other.
    assert used == {0, 2, 4, 6}


def test_somebody_elses_function_is_left_alone(here: Running) -> None:
    said = here.vm.run("dmesg")
    stray = here.vm.run("grep -l 0x1110 /sys/bus/pci/devices/*/device").split()
    assert len(stray) == 3
    unbound = [path for path in stray if here.vm.ask(f"test -e {Path(path).parent}/driver").status]
    assert len(unbound) == 1
    assert f"vbus_ivshmem {Path(unbound[0]).parent.name}" not in said
    assert (here.folder / "stray.mem").read_bytes() == b"somebody else's" + bytes(MIB - 15)


def test_entropy(here: Running) -> None:
    before = here.counters("rng0")
    assert here.vm.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    said = here.vm.run("head -c 65536 /dev/hwrng | gzip | wc -c", seconds=120)
    # Random bytes do not get smaller.
    assert int(said) > 65536
    after = here.counters("rng0")
    for way in ("to_device", "to_driver"):
        assert after[way]["sent"] > before[way]["sent"]
        assert after[way]["signalled"] >= after[way]["sent"] >= after[way]["rung"]
    # The driver has asked for more by now; what was sent is taken a little later.
    assert wait_until(
        lambda: all(counted["sent"] == counted["taken"] for counted in here.counters("rng0").values()), 120
    )


def test_both_sides_count_the_same(here: Running) -> None:
    queues = here.bus.slot("rng0").queues
    owner = here.bus.slot("rng0").owner
    assert owner is not None
    slot = here.bus.slot("rng0")

    def same() -> bool:
        # The kernel asks for entropy when it likes, between these two as well.
        sides = owner.counters(slot, queues[0])
        counted = here.counters("rng0")
        return all(
            tuple(counted[way].values())[:3] == side
            for way, side in zip(("to_device", "to_driver"), sides, strict=True)
        )

    assert wait_until(same, 120)


def test_a_tree_is_copied_and_found_whole(here: Running) -> None:
    vm, disk, tree = here.vm, here.block("disk0"), here.block("disk1")
    vm.run(f"mkfs.ext4 -q /dev/{disk} && mkdir -p /disks/a /disks/b")
    vm.run(f"mount /dev/{disk} /disks/a && mount -o ro /dev/{tree} /disks/b")
    vm.run("cp -a /disks/b/. /disks/a && sync && echo 3 >/proc/sys/vm/drop_caches")
    listed = vm.run("cd /disks/a && find . -type f | xargs sha256sum", seconds=120)
    found = {line.split("  ./")[1]: line.split("  ")[0] for line in listed.splitlines()}
    assert found == here.tree
    assert vm.ask("echo x >/disks/b/new").status != 0
    vm.run(f"umount /disks/a /disks/b && e2fsck -fn /dev/{disk}")
    # And the host finds it whole, too.
    subprocess.run(["e2fsck", "-fn", str(here.folder / "disk.img")], check=True, capture_output=True)
    assert vm.run(f"ls /sys/block/{disk}/mq | wc -l") == "2\n"
    assert vm.run(f"cat /sys/block/{disk}/ro /sys/block/{tree}/ro") == "0\n1\n"


def test_a_disk_that_grows(here: Running) -> None:
    sectors = here.bus.get("disk0", Blk).capacity * 2
    here.bus.set("disk0", "capacity", str(sectors))
    here.vm.wait_for(f"test $(cat /sys/block/{here.block('disk0')}/size) = {sectors}", seconds=120)


def test_a_window_that_is_full_loses_nothing(here: Running) -> None:
    """Writes that are under way want more than the 14 MiB that the direct function's window has."""
    vm, disk, device = here.vm, here.block("direct0"), here.bus.get("direct0", OwnBlk)
    full = f"$(dirname {here.path('direct0')})/window/full"
    before = int(vm.run(f"cat {full}"))
    vm.run("head -c 32m /dev/urandom >/tmp/whole", seconds=120)
    device.may_go_on.clear()
    try:
        vm.run(
            f"(for i in 0 1 2 3 4 5 6 7; do dd if=/tmp/whole of=/dev/{disk} bs=4M skip=$i seek=$i count=1 "
            "oflag=direct conv=notrunc & done; wait; touch /tmp/done) >/dev/null 2>&1 &"
        )
        vm.wait_for(f"test $(cat {full}) -gt {before}", seconds=120)
    finally:
        device.may_go_on.set()
    vm.wait_for("test -e /tmp/done")
    vm.run(f"dd if=/dev/{disk} bs=4M count=8 iflag=direct | cmp - /tmp/whole && rm /tmp/whole", seconds=120)


def test_direct_is_one_notification_one_doorbell(here: Running) -> None:
    counted = here.counters("direct0")
    for way in ("to_device", "to_driver"):
        assert counted[way]["signalled"] == counted[way]["rung"] >= counted[way]["sent"] > 0, way


def test_a_network_each_way(here: Running) -> None:
    net = here.bus.get("net0", Net)
    files_each_way(here.vm, here.folder, 8 * MIB, HERE, THERE, here.inside)
    assert net.rx_packets > 0
    assert net.tx_packets > 0


def test_a_console(here: Running) -> None:
    terminal = here.vm.run("ls -d /dev/hvc*").split()[0]
    here.vm.run(f"stty -F {terminal} raw -echo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(here.folder / "console.sock"))
        here.vm.run(f"(head -c 5 {terminal} | rev >{terminal}) >/dev/null 2>&1 &")
        sock.sendall(b"abcd\n")
        heard = b""
        while b"dcba" not in heard:
            heard += sock.recv(100)


def plug(here: Running, name: str = "hot0", **options: object) -> str:
    """Plug a disk of 16 MiB; its name in the guest."""
    here.bus.plug(OwnBlk(memory="16 MiB", **options), name)
    return here.block(name)


def is_gone(here: Running, name: str = "hot0") -> bool:
    """Whether the guest has let go of a device; only then its number is free."""
    return here.vm.ask(f"grep -qx {name} /sys/bus/vbus/devices/*/name").status != 0


def test_disks_come_and_go(here: Running) -> None:
    for number in range(10):
        disk = plug(here)
        here.vm.run(f"dd if=/dev/urandom of=/dev/{disk} bs=64k count=8 conv=fsync")
        here.bus.unplug("hot0", surprise=number % 2 == 1)
        assert wait_until(lambda: is_gone(here), 120)
        # The kernel takes the name away before it takes the driver off, and the disk with it.
        here.vm.wait_for(f"! test -e /sys/block/{disk}", seconds=120)


def test_a_disk_goes_by_surprise_while_it_works(here: Running) -> None:
    for _ in range(3):
        disk = plug(here)
        # A node of our own: /dev loses its one, and dd would make a file there.
        here.vm.run(f"rm -f /tmp/hot; mknod /tmp/hot b $(tr : ' ' </sys/block/{disk}/dev)")
        here.vm.run(
            "for i in 1 2; do (while dd if=/tmp/hot of=/dev/null bs=256k iflag=direct; do :; done) & done "
            ">/dev/null 2>&1; (while dd if=/dev/zero of=/tmp/hot bs=256k count=40; do :; done) >/dev/null 2>&1 &"
        )
        served = here.bus.get("hot0", Blk)
        before = served.reads
        assert wait_until(lambda: served.reads > before + 20, 120)  # noqa: B023
        here.bus.unplug("hot0", surprise=True)
        assert wait_until(lambda: is_gone(here), 120)
        # Nobody waits for it.
        here.vm.wait_for("! ps | grep -q '[d]d if'", seconds=120)


def test_a_disk_that_fails_and_is_bound_again(here: Running) -> None:
    disk = plug(here, "flaky0", engine="python")
    flaky = here.bus.get("flaky0", OwnBlk)
    flaky.fails = True
    assert here.vm.ask(f"dd if=/dev/{disk} of=/dev/null bs=64k count=4 iflag=direct", seconds=30).status != 0
    assert "flaky0 failed and needs a reset" in here.vm.run("dmesg")
    flaky.fails = False
    virtio = here.vm.run(f"basename {here.path('flaky0')}/virtio*").strip()
    driver = "/sys/bus/virtio/drivers/virtio_blk"
    here.vm.run(f"echo {virtio} >{driver}/unbind && echo {virtio} >{driver}/bind")
    disk = here.block("flaky0")
    here.vm.run(f"dd if=/dev/{disk} of=/dev/null bs=64k count=4 iflag=direct")
    here.bus.unplug("flaky0")
    assert wait_until(lambda: is_gone(here, "flaky0"), 120)


def test_modules_are_unloaded_and_loaded_under_load(here: Running) -> None:
    vm = here.vm
    for gone, back in (
        (("virtio_vbus",), ("virtio_vbus",)),
        (("vbus_ivshmem",), ("vbus_ivshmem",)),
        (("vbus_ivshmem", "virtio_vbus", "vbus_proxy"), ("vbus_proxy", "virtio_vbus", "vbus_ivshmem")),
    ):
        here.settled()
        disk = here.block("disk1")
        nobody_waits = reads_again_and_again(vm, disk)
        vm.run("".join(f"rmmod {name} && " for name in gone) + "true", seconds=120)
        nobody_waits()
        assert vm.run("ls /sys/bus/virtio/devices") == ""
        assert wait_until(lambda: all(here.bus.slot(name).status == 0 for name in TUNNELLED))
        vm.run("".join(f"insmod /modules/{name}.ko && " for name in back) + "true")
    here.settled()
    vm.run(f"dd if=/dev/{here.block('disk1')} of=/dev/null bs=64k")


def test_a_session_that_the_bus_ends_is_followed_by_another(here: Running) -> None:
    connector = here.bus.connectors["tunnelled"]
    assert isinstance(connector, Ivshmem)
    here.settled()
    for _ in range(3):
        (peer,) = connector.peers
        peer.part("the test ends it")
        # Until the guest begins anew, it has the devices that were.
        assert wait_until(lambda: any(new.greeted and new is not peer for new in connector.peers), 120)  # noqa: B023
        here.settled()
    here.vm.run(f"dd if=/dev/{here.block('disk1')} of=/dev/null bs=64k")
    # The other function heard nothing of it.
    here.vm.run(f"dd if=/dev/{here.block('direct0')} of=/dev/null bs=64k count=16")


def test_nothing_was_wrong_in_the_kernel(here: Running) -> None:
    assert [line for line in here.vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []


def test_a_guest_that_is_reset_starts_with_its_devices(here: Running) -> None:
    here.vm.reset()
    here.settled()
    here.vm.run("head -c 4096 /dev/hwrng >/dev/null")
    here.vm.run(f"dd if=/dev/{here.block('disk0')} of=/dev/null bs=64k count=4")
    here.vm.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
    here.vm.wait_for(f"ping -c 1 -W 1 {HERE}")


def test_the_bus_goes_and_the_guest_goes_on(here: Running) -> None:
    here.bus.disconnect("tunnelled")
    here.vm.wait_for("test $(ls /sys/bus/vbus/devices | wc -l) = 1", seconds=120)
    # The other function has its own.
    here.vm.run(f"dd if=/dev/{here.block('direct0')} of=/dev/null bs=64k count=16")
    here.vm.run("rmmod vbus_ivshmem", seconds=120)
    assert [line for line in here.vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []
    assert here.vm.errors == ""
