"""What `vbus demo --vm` shows: a bus's devices in a stock guest, at real work.

    this process: the bus, with a vhost-user connector a device    QEMU: Debian's kernel, which drives them

Each step lets the guest do something with a device, and checks what came of it on both sides. At the end stands what
the guest's kernel counted beside what the bus did. The host's end of the network is in a namespace of its own.

How the guest reaches the bus is one part of it, which another way of reaching it replaces (`vbus.demo.function`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vbus import config
from vbus.bus import Bus
from vbus.connectors import VhostUser
from vbus.demo import story
from vbus.demo.network import FETCH, Namespace, why_not
from vbus.demo.steps import Step, StepFailed, run_steps
from vbus.devices import Blk, Input
from vbus.virtio.input import KEYS, EventType
from vbus.vm import Guest, kernel
from vbus.vm.debian import FetchError, unpacked
from vbus.vm.modules import modules_for
from vbus.vm.options import VhostUserDevice, device_options

MIB = 1 << 20
ENTROPY = MIB
DISK = 96 * MIB
FILE_SIZE = 16 * MIB
"""Bytes that go over HTTP, each way."""
HOST, GUEST = "10.77.0.1", "10.77.0.2"
PORT = 8000
QEMU = "qemu-system-x86_64"
PACKAGES = ("e2fsprogs", "ethtool")
MODULES = ("crc32c_generic", "ext4")
TYPED = "vbus"
SETTLE_SECONDS = 20
"""How long frames may be under way that one side has counted."""
EVENT = struct.Struct("<QQHHi")
"""An event as the guest's kernel gives it: a time in two words, type, code, value."""

FILE = """\
[bus]
name = "{name}"

[device.rng0]
type = "rng"

[device.disk0]
type = "blk"
path = "disk0.img"
queues = 2

[device.disk1]
type = "blk"
path = "disk1.img"
read_only = true

[device.net0]
type = "net"
backend = "{backend}"

[device.keys0]
type = "input"
"""
CONNECTOR = '\n[connector.{name}]\ntype = "vhost-user"\ndevice = "{name}"\nsocket = "{name}.sock"\n'
NAMES = ("rng0", "disk0", "disk1", "net0", "keys0")


def why_no_guest() -> str:
    """Why there can be no guest here, once what it is made of was fetched; empty when there can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is missing (package qemu-system-x86)"
    try:
        kernel.stock("amd64")
        unpacked("amd64", PACKAGES)
    except FetchError as error:
        return str(error)
    return ""


class Machine:
    """One run, in a folder of its own."""

    name = "demo-vm"
    """The bus's."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.replaced: list[str] = []
        self.rows: list[tuple[str, str, str]] = []
        self._stack = contextlib.ExitStack()
        self._host: Namespace | None = None
        self._has_ext4 = True
        self._sums: dict[str, str] = {}
        self._bus: Bus
        self._guest: Guest

    # Steps.

    def make_disks(self) -> str:
        """An empty disk, and one that holds a tree of files."""
        with (self.folder / "disk0.img").open("wb") as disk:
            disk.truncate(DISK)
        tree, image = self.folder / "tree", self.folder / "disk1.img"
        files, size = story.copy_tree(tree)
        for path in tree.rglob("*"):
            if path.is_file():
                self._sums[str(path.relative_to(tree))] = hashlib.sha256(path.read_bytes()).hexdigest()
        if shutil.which("mkfs.ext4"):
            with image.open("wb") as disk:
                disk.truncate((2 * size + 16 * MIB) // MIB * MIB)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], check=True, capture_output=True)
            what = "ext4"
        else:
            import tarfile

            with tarfile.open(image, "w") as archive:
                archive.add(tree, arcname=".")
            os.truncate(image, -(-image.stat().st_size // MIB) * MIB)
            what = "a tar archive"
            self._has_ext4 = False
            self.replaced.append("mkfs.ext4 is missing: a tar archive stands in for the second disk's file system")
        return f"{DISK // MIB} MiB of nothing; {what} with {files} files"

    def start_bus(self) -> str:
        """The bus, with a tap for the guest's network if there may be one."""
        reason = why_not()
        if reason:
            self.replaced.append(f"{reason}: a loopback stands in for the host's network")
        tap = f"vb{os.getpid()}"
        if not reason:
            self._host = Namespace(f"vbus-vm-{os.getpid()}", self.folder, dict(os.environ))
            self._stack.callback(self._host.close)
            ip("tuntap", "add", tap, "mode", "tap")
            self._stack.callback(lambda: subprocess.run(["ip", "link", "del", tap], capture_output=True, check=False))
        path = self.folder / "demo.toml"
        text = FILE.format(name=self.name, backend="loopback" if reason else f"tap:{tap}")
        path.write_text(text + self.connectors())
        self._bus = config.make(config.load(path))
        self._stack.callback(self._bus.stop)
        self._bus.start()
        if self._host is not None:
            ip("link", "set", tap, "netns", self._host.name)
            self._host.ip("address", "add", f"{HOST}/24", "dev", tap)
            self._host.ip("link", "set", tap, "up")
        return f"serves {', '.join(NAMES)}; " + ("no tap here" if reason else f"the host's end is {tap}, {HOST}")

    def connectors(self) -> str:
        """The part of the bus's file about how the guest reaches it."""
        return "".join(CONNECTOR.format(name=name) for name in NAMES)

    def boot(self) -> str:
        """A guest with all of them."""
        options: list[str] = []
        modules: list[str] = []
        for connector in self._bus.connectors.values():
            assert isinstance(connector, VhostUser)
            assert connector.socket is not None
            row = self._bus.show(connector.device_name)
            device = VhostUserDevice(
                row["name"],
                row["device_id"],
                connector.socket,
                queues=len(row["queues"]),
                mac=row["attributes"].get("mac"),
            )
            options += device_options(device, "q35", "no")
            modules += modules_for(device.device_id)
        return self._boot(options, modules)

    def _boot(self, options: list[str], modules: Sequence[str | Path]) -> str:
        guest = Guest(args=options, modules=[*modules, *MODULES], packages=PACKAGES, memory=512, cpus=2)
        self._guest = self._stack.enter_context(guest)
        deadline = time.monotonic() + SETTLE_SECONDS
        while idle := [name for name in NAMES if not self._bus.show(name)["queues"][0]["running"]]:
            if time.monotonic() > deadline:
                raise StepFailed(f"the guest does not drive {', '.join(idle)}")
            time.sleep(0.05)
        return f"Linux {guest.run('uname -r').strip()} drives all of them"

    def block(self, device: str) -> str:
        """The guest's name of a disk."""
        return {"disk0": "vda", "disk1": "vdb"}[device]

    def entropy(self) -> str:
        """Random bytes, which do not get smaller."""
        packed = int(self._guest.run(f"head -c {ENTROPY} /dev/hwrng | gzip | wc -c", seconds=120))
        if packed < ENTROPY:
            raise StepFailed(f"{ENTROPY} bytes of /dev/hwrng are {packed} in a gzip file")
        written = self._count("rng0", "bytes_written")
        self._row("rng0", f"{ENTROPY} bytes of /dev/hwrng", written >= ENTROPY, f"{written} bytes written")
        return f"{ENTROPY // MIB} MiB from /dev/hwrng, which gzip cannot make smaller"

    def files(self) -> str:
        """mkfs, mount, a tree copied and found whole, unmount, check."""
        run, disk, tree = self._guest.run, f"/dev/{self.block('disk0')}", f"/dev/{self.block('disk1')}"
        run(f"mkfs.ext4 -q {disk} && mkdir -p /disks/a /disks/b && mount {disk} /disks/a")
        if self._has_ext4:
            run(f"mount -o ro {tree} /disks/b && cp -a /disks/b/. /disks/a", seconds=120)
        else:
            run(f"tar -xf {tree} -C /disks/a", seconds=120)
        run("sync && echo 3 >/proc/sys/vm/drop_caches")
        listed = run("cd /disks/a && find . -type f -print0 | xargs -0 sha256sum", seconds=120)
        found = {line.split("  ./")[1]: line.split("  ")[0] for line in listed.splitlines()}
        if found != self._sums:
            wrong = sorted(name for name in {*found, *self._sums} if found.get(name) != self._sums.get(name))
            raise StepFailed(f"{len(wrong)} files of the copy differ, {wrong[0]} is the first")
        if self._guest.ask(f"echo x | dd of={tree} bs=2 count=1").status == 0:
            raise StepFailed("a disk that is read-only could be written to")
        run(f"umount /disks/a; umount /disks/b 2>/dev/null; e2fsck -fn {disk}", seconds=120)
        return f"mkfs.ext4, {len(found)} files copied from disk1, checksums agree, e2fsck -fn finds it clean"

    def grow(self) -> str:
        """A disk grows while it is mounted."""
        run, disk = self._guest.run, self.block("disk0")
        run(f"mount /dev/{disk} /disks/a")
        before = self._free()
        sectors = 2 * self._bus.get("disk0", Blk).capacity
        self._bus.set("disk0", "capacity", str(sectors))
        self._guest.wait_for(f"test $(cat /sys/block/{disk}/size) = {sectors}", seconds=20)
        run(f"resize2fs /dev/{disk}", seconds=120)
        after = self._free()
        if after < 1.8 * before:
            raise StepFailed(f"the file system has {after} KiB, {before} before")
        run(f"umount /disks/a && e2fsck -fn /dev/{disk}", seconds=120)
        return f"mounted, from {DISK // MIB} to {sectors * 512 // MIB} MiB; resize2fs uses all of it, e2fsck is content"

    def _free(self) -> int:
        return int(self._guest.run("df -k /disks/a | tail -1 | awk '{print $2}'"))

    def offloads(self) -> str:
        """In the guest, ethtool shows what was negotiated."""
        lines = self._guest.run("ethtool -k eth0").splitlines()[1:]
        shown = dict(line.strip().split(": ")[:2] for line in lines if ": " in line)
        agreed = self._bus.show("net0")["features"]["negotiated"]
        said = []
        for feature, name in (("CSUM", "tx-checksumming"), ("HOST_TSO4", "tx-tcp-segmentation")):
            if (feature in agreed) != (shown[name].split()[0] == "on"):
                raise StepFailed(f"{feature} in {agreed}, and ethtool says {name}: {shown[name]}")
            said.append(f"{name} {shown[name].split()[0]}")
        return f"ethtool -k: {', '.join(said)}, as negotiated"

    def http(self) -> str:
        """A file each way between the guest's network stack and the host's."""
        if self._host is None:
            return self._loopback()
        run, served = self._guest.run, self.folder / "served"
        served.mkdir()
        data = os.urandom(FILE_SIZE)
        (served / "file").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        run(f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up")
        self._host.start("-m", "http.server", str(PORT), "--directory", str(served), expect="Serving")
        self._guest.wait_for(f"wget -q -O /dev/null http://{HOST}:{PORT}/", seconds=30)
        run(f"wget -q -O /tmp/file http://{HOST}:{PORT}/file", seconds=120)
        if run("sha256sum /tmp/file").split()[0] != digest:
            raise StepFailed("the guest got another file")
        run(f"httpd -p {PORT} -h /tmp")
        size, back = self._host.run("-c", FETCH, f"http://{GUEST}:{PORT}/file").split()
        if int(size) != FILE_SIZE or back != digest:
            raise StepFailed(f"the host got {size} bytes with checksum {back[:16]}")
        run("killall httpd")
        self._count_net()
        return f"{FILE_SIZE // MIB} MiB from the host and back, checksums agree"

    def _loopback(self) -> str:
        """Without a network to the host: what the guest sends comes back."""
        self._guest.run("ip link set eth0 up")
        self._guest.ask(f"arping -c 3 -w 3 -I eth0 {GUEST}")
        self._guest.wait_for("test $(cat /sys/class/net/eth0/statistics/rx_packets) -ge 3", seconds=20)
        self._count_net()
        return "what the guest asks the network comes back to it"

    def link(self) -> str:
        """Somebody pulls the plug and puts it back, and the guest notices both."""
        for up in (False, True):
            self.set_link(up)
            self._guest.wait_for(f"test $(cat /sys/class/net/eth0/carrier) = {int(up)}", seconds=20)
        return "off: carrier 0, on: carrier 1"

    def set_link(self, up: bool) -> None:
        """Whether the cable is in: of a device that the hypervisor makes up, the hypervisor says so."""
        self._guest.qmp("set_link", name="net0", up=up)

    def keys(self) -> str:
        """Somebody types, here, and the guest's programs read it."""
        run, keyboard = self._guest.run, self._bus.get("keys0", Input)
        event = run("cd /sys/class/input && grep -l 'vbus keyboard' event*/device/name").split("/")[0]
        run(f"cat /dev/input/{event} >/tmp/keys &")
        self._guest.wait_for("ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q /dev/input")
        if not keyboard.type(TYPED):
            raise StepFailed("the guest takes no keys")
        # A key goes down and up; each is an event, and one that ends the report.
        events = 4 * len(TYPED)
        self._guest.wait_for(f"test $(wc -c </tmp/keys) = {events * EVENT.size}", seconds=20)
        data = bytes.fromhex(run("xxd -p /tmp/keys").replace("\n", ""))
        names = {code: name for name, code in KEYS.items()}
        downs = [code for *_, kind, code, value in EVENT.iter_unpack(data) if (kind, value) == (EventType.KEY, 1)]
        read = "".join(names.get(code, "?") for code in downs)
        if read != TYPED:
            raise StepFailed(f"{TYPED!r} was typed, the guest read {read!r}")
        run("killall cat")
        given = keyboard.events
        self._row("keys0", f"{events} events, {read!r}", given == events, f"{given} events given")
        return f"{TYPED!r} typed here, read from /dev/input/{event} there"

    def end(self) -> str:
        """What both sides counted; nothing was violated; the guest goes."""
        self._count_disks()
        violations = {row["name"]: row["violations"] for row in self._bus.describe() if row["violations"]}
        if violations or self._guest.errors:
            raise StepFailed(f"violations {violations}, QEMU: {self._guest.errors}")
        self._guest.close()
        self._bus.stop()
        return f"no violations; the guest is gone; {self._checked()}"

    def _checked(self) -> str:
        """The host's own look at the disk that the guest wrote."""
        if shutil.which("e2fsck") is None:
            self.replaced.append("e2fsck is missing: the guest's check stands in for the host's")
            return "disk0.img was checked by the guest"
        image = str(self.folder / "disk0.img")
        done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise StepFailed(f"e2fsck -fn {image}: {done.stdout.strip()}")
        return "the host's e2fsck finds disk0.img clean, too"

    # What was counted.

    def _count(self, device: str, key: str) -> int:
        return sum(row[key] for row in self._bus.stat() if row["device"] == device)

    def _row(self, device: str, guest: str, agree: bool, bus: str) -> None:
        """A row of the table, if its two sides can both be true. StepFailed."""
        if not agree:
            raise StepFailed(f"{device}: the guest saw {guest}, the bus {bus}")
        self.rows.append((device, guest, bus))

    def _count_disks(self) -> None:
        for device in ("disk0", "disk1"):
            words = self._guest.run(f"cat /sys/block/{self.block(device)}/stat").split()
            reads, size = int(words[0]), 512 * int(words[2])
            served = self._bus.get(device, Blk).reads
            # Each request has a status of one byte.
            given = self._count(device, "bytes_written") - self._count(device, "requests")
            # The firmware reads, too, before there is a kernel that counts.
            agree = served >= reads > 0 and given >= size > 0
            self._row(device, f"{size} bytes in {reads} reads", agree, f"{given} bytes in {served} reads")

    def _count_net(self) -> None:
        """Before the link goes: what is sent meanwhile, the hypervisor throws away."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            folder = "/sys/class/net/eth0/statistics"
            rx, tx = map(int, self._guest.run(f"cat {folder}/rx_packets {folder}/tx_packets").split())
            shown = self._bus.show("net0")["attributes"]
            given, taken = shown["rx_packets"], shown["tx_packets"]
            # The guest counts what it sent when it hears that it is gone.
            agree = rx == given and 0 < tx <= taken
            if agree or time.monotonic() > deadline:
                break
        self._row("net0", f"{rx} frames received, {tx} sent", agree, f"{given} given, {taken} taken")

    def steps(self) -> list[Step]:
        """Every step, in order."""
        return [
            ("disks", self.make_disks),
            ("bus", self.start_bus),
            ("guest", self.boot),
            ("entropy", self.entropy),
            ("files", self.files),
            ("grow", self.grow),
            ("offloads", self.offloads),
            ("http", self.http),
            ("link", self.link),
            ("keys", self.keys),
            ("end", self.end),
        ]

    def run(self) -> None:
        """Take every step. StepFailed."""
        run_steps(self.steps(), self.say)

    def table(self) -> str:
        """What the guest saw, and beside it what the bus counted."""
        rows = [("device", "the guest saw", "the bus counted"), *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{device:<{widths[0]}}  {guest:<{widths[1]}}  {bus}" for device, guest, bus in rows)

    def close(self) -> None:
        """Leave nothing: neither the guest, nor the bus, nor the namespace."""
        self._stack.close()


def ip(*words: str) -> None:
    """Run `ip`. StepFailed."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepFailed(f"ip {' '.join(words)}: {done.stderr.strip()}")


def main(kind: type[Machine] = Machine, why_not: Callable[[], str] = why_no_guest) -> int:
    """Run the demo; its exit status. Where there can be no guest, the one without stands in."""
    reason = why_not()
    if reason:
        return story.main([f"{reason}: drivers in this process stand in for a guest"])
    with tempfile.TemporaryDirectory(prefix="vbus-demo-") as folder:
        machine = kind(Path(folder), lambda line: print(line, flush=True))
        return story.tell(machine.run, machine.close, machine.table, machine.replaced)
