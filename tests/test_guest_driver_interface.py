"""The behaviours of `driver_interface.py` as a guest's programs see them: behind its kernel's drivers, booted once.

What a program has of a bus: disks are `/dev/vdX`, networks `ethN`, entropy `/dev/hwrng`, consoles `/dev/hvcN`, channels
`/dev/vbus/NAME`; a driver binds and lets go in sysfs. The device models are those of all other connectors.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from conftest import wait_until
from driver_interface import LIMIT, Behaviour, Stage, each_behaviour
from guests import BACKPORTS, bus_modules, function_args, programs
from vbus.bus import Bus
from vbus.connectors import Ivshmem
from vbus.vm import Guest

pytestmark = pytest.mark.timeout(900)

DRIVERS = ("virtio_net", "virtio_blk", "virtio_console", "virtio_rng")
TRANSPORT = "/sys/bus/vbus/drivers/virtio_vbus"
NUMBERS = itertools.count()
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup")


def failed(said: str) -> OSError:
    """The error whose name a program said last."""
    name = said.split()[-1] if said.split() else ""
    number = getattr(errno, name, errno.EIO)
    return OSError(number, said)


@dataclass
class KernelDisk:
    """A disk as `/dev/vdX`."""

    vm: Guest
    name: str

    def _read(self, attribute: str) -> str:
        return self.vm.run(f"cat /sys/block/{self.name}/{attribute}").strip()

    def _steps(self, step: str, *words: object) -> str:
        answer = self.vm.ask(f"device_steps {step} /dev/{self.name} {' '.join(map(str, words))} 2>&1", seconds=LIMIT)
        if answer.status:
            raise failed(answer.output)
        return answer.output

    @property
    def size(self) -> int:
        """In sectors of 512 bytes, whatever its blocks are."""
        return int(self._read("size")) * 512

    @property
    def block_size(self) -> int:
        """Of the queue."""
        return int(self._read("queue/logical_block_size"))

    @property
    def read_only(self) -> bool:
        """Of the disk."""
        return self._read("ro") == "1"

    @property
    def serial(self) -> str:
        """Asked of the device."""
        return self._read("serial")

    def read(self, length: int, offset: int) -> bytes:
        """Past the page cache."""
        return bytes.fromhex(self._steps("read", offset, length))

    def begin_read(self, length: int, offset: int) -> Callable[[], bytes]:
        """In the background."""
        said = f"/tmp/read.{self.name}"
        command = f"device_steps read /dev/{self.name} {offset} {length} >{said} 2>&1; echo $? >{said}.end"
        self.vm.run(f"rm -f {said} {said}.end; ({command}) >/dev/null 2>&1 &")

        def result() -> bytes:
            self.vm.wait_for(f"test -s {said}.end", seconds=LIMIT)
            status, output = self.vm.run(f"cat {said}.end {said}").split("\n", 1)
            if status != "0":
                raise failed(output)
            return bytes.fromhex(output)

        return result

    def write(self, data: bytes, offset: int) -> None:
        """Through the page cache, and out of it."""
        self._steps("write", offset, data.hex())

    def flush(self) -> None:
        """As fsync does it."""
        self._steps("flush")

    def discard(self, length: int, offset: int) -> None:
        """As blkdiscard does it."""
        self._steps("discard", offset, length)


@dataclass
class KernelNetwork:
    """A network as `ethN`."""

    vm: Guest
    name: str

    def _read(self, attribute: str) -> str:
        return self.vm.run(f"cat /sys/class/net/{self.name}/{attribute}").strip()

    @property
    def mac(self) -> str:
        """Of the interface."""
        return self._read("address")

    @property
    def mtu(self) -> int:
        """Of the interface."""
        return int(self._read("mtu"))

    @property
    def link(self) -> bool:
        """Whether it has a carrier."""
        return self._read("carrier") == "1"

    def exchange(self, frames: Sequence[bytes]) -> list[bytes]:
        """With a packet socket."""
        answer = self.vm.ask(f"device_steps exchange {self.name} {' '.join(frame.hex() for frame in frames)} 2>&1")
        if answer.status:
            raise failed(answer.output)
        return [bytes.fromhex(line) for line in answer.output.splitlines()]


@dataclass
class KernelEntropy:
    """Entropy as `/dev/hwrng`."""

    vm: Guest

    def read(self, size: int) -> bytes:
        """From whichever the kernel has."""
        return base64.b64decode(self.vm.run(f"head -c {size} /dev/hwrng | base64"))


@dataclass
class KernelTerminal:
    """A console as `/dev/hvcN`."""

    vm: Guest
    name: str

    @property
    def window(self) -> tuple[int, int]:
        """As programs are told."""
        columns, rows = self.vm.run(f"device_steps window /dev/{self.name}").split()
        return int(columns), int(rows)

    def write(self, data: bytes) -> None:
        """All of it."""
        self.vm.run(f"echo {base64.b64encode(data).decode()} | base64 -d >/dev/{self.name}", seconds=LIMIT)

    def read(self, size: int) -> bytes:
        """All of it."""
        # One byte more would be somebody else's.
        return base64.b64decode(self.vm.run(f"head -c {size} /dev/{self.name} | base64", seconds=LIMIT))


class KernelTalk:
    """A channel as `/dev/vbus/NAME`, which a program has open."""

    def __init__(self, vm: Guest, node: str) -> None:
        self._vm = vm
        self._asked = f"/tmp/talk{next(NUMBERS)}"
        self._said = 0
        vm.run(f"mkfifo {self._asked}; : >{self._asked}.said")
        # Open for both, so that the end of one who asks is not the end.
        vm.run(f"channel_steps {node} block input <>{self._asked} >{self._asked}.said 2>&1 &")
        assert self._answer() == "0"

    def _answer(self) -> str:
        self._said += 1
        said = f"{self._asked}.said"
        wait = f"while test $(wc -l <{said}) -lt {self._said}; do usleep 5000; done"
        return self._vm.run(f"{wait}; sed -n {self._said}p {said}", seconds=LIMIT).rstrip("\n")

    def _step(self, step: str) -> str:
        """What came of a step. OSError."""
        self._vm.run(f"echo {shlex.quote(step)} >{self._asked}")
        said = self._answer()
        if said.startswith("E") and hasattr(errno, said):
            raise failed(said)
        return said

    def say(self, data: bytes) -> None:
        """One write."""
        self._step(f"bytes={data.hex()}")

    def hear(self) -> bytes:
        """One read."""
        return bytes.fromhex(self._step("heard"))

    def fill(self, size: int) -> int:
        """Until a write would wait."""
        self._step("nonblock")
        count = int(self._step(f"fill={size}").split()[0])
        self._step("block")
        return count

    def put(self, offset: int, data: bytes) -> None:
        """Into what is mapped."""
        self._step("map=65536")
        self._step(f"put={offset},{data.decode()}")

    def get(self, offset: int, size: int) -> bytes:
        """From what is mapped."""
        self._step("map=65536")
        return self._step(f"get={offset},{size}").replace(".", "\0").encode()

    def close(self) -> None:
        """The program ends."""
        self._vm.run(f"echo end >{self._asked}")


class KernelSide:
    """A guest's kernel."""

    def __init__(self, vm: Guest) -> None:
        self._vm = vm
        self._holders: dict[str, str] = {}

    def _find(self, name: str, what: str) -> str:
        """What the shell says of a device, in whose directory it is asked, as soon as it says anything."""
        return self._vm.wait_for(f'cd "$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name))" && {what}').strip()

    def _bound(self, name: str, what: str) -> str:
        """The same of a device that has a driver."""
        bind = f"basename $PWD >{TRANSPORT}/bind"
        self._vm.run(f'cd "$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name))" && test -e driver || {bind}')
        return self._find(name, f"cd virtio* && test -e driver && {what}")

    def identity(self, name: str) -> tuple[int, UUID, int]:
        """In sysfs."""
        address, uuid, device_id = self._find(name, "cat address uuid device_id").split()
        return int(address), UUID(uuid), int(device_id)

    def is_there(self, name: str) -> bool:
        """In sysfs."""
        there = self._vm.ask(f"grep -qx {name} /sys/bus/vbus/devices/*/name").status == 0
        if not there and name in self._holders:
            self._vm.run(f"kill {self._holders.pop(name)}; true")
        return there

    def disk(self, name: str) -> KernelDisk:
        """`/dev/vdX`."""
        disk = self._bound(name, "ls block")
        self._vm.wait_for(f"true 2>/dev/null </dev/{disk}")
        return KernelDisk(self._vm, disk)

    def network(self, name: str) -> KernelNetwork:
        """`ethN`, up."""
        interface = self._bound(name, "ls net")
        self._vm.run(f"ip link set {interface} up")
        return KernelNetwork(self._vm, interface)

    def entropy(self, name: str) -> KernelEntropy:
        """`/dev/hwrng`; there is one device of the class at a time."""
        self._bound(name, "ls -d driver")
        self._vm.wait_for("grep -q virtio_rng /sys/class/misc/hw_random/rng_current")
        return KernelEntropy(self._vm)

    def terminal(self, name: str) -> KernelTerminal:
        """`/dev/hvcN`, raw for as long as it is there."""
        self._bound(name, "ls virtio-ports")
        # There are files for more than there are; the one that can be opened is the one that is there.
        find = "for t in /dev/hvc*; do stty -F $t >/dev/null 2>&1 && basename $t && exit; done; exit 1"
        terminal = self._vm.wait_for(find).strip()
        hold = f"stty raw -echo -F /dev/{terminal} && exec sleep 600"
        self._vm.run(f"sh -c '{hold}' <>/dev/{terminal} >/dev/null 2>&1 & echo $! >/tmp/holder")
        self._holders[name] = self._vm.run("cat /tmp/holder").strip()
        self._vm.wait_for(f"stty -F /dev/{terminal} -a | grep -q -e '-icanon'")
        return KernelTerminal(self._vm, terminal)

    @contextlib.contextmanager
    def talk(self, name: str) -> Iterator[KernelTalk]:
        """`/dev/vbus/NAME`."""
        self._vm.wait_for(f"test -c /dev/vbus/{name}")
        with contextlib.closing(KernelTalk(self._vm, f"/dev/vbus/{name}")) as talk:
            yield talk

    def channels(self) -> list[str]:
        """What is in `/dev/vbus`."""
        return self._vm.run("ls /dev/vbus 2>/dev/null || true").split()

    def let_go(self, name: str) -> None:
        """Unbind the transport: without a driver of its own, a virtio device is still the kernel's."""
        self._find(name, f"basename $PWD >{TRANSPORT}/unbind")

    def priorities(self, name: str) -> list[int]:
        """In sysfs."""
        return [int(word) for word in self._find(name, "cat priority").split()]

    def counters(self, name: str) -> tuple[int, int, int]:
        """In sysfs."""
        signalled, sent, rung = self._find(name, "cd to_device && cat signalled sent rung").split()
        return int(signalled), int(sent), int(rung)


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bus, Guest]]:
    folder = tmp_path_factory.mktemp("guest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VBUS_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        with Bus("interface") as bus:
            connector = bus.connect(Ivshmem(folder / "vm.sock"), "vm")
            with Guest(
                args=function_args(connector),
                modules=[*DRIVERS, *bus_modules()],
                files=programs(folder, "channel_steps", "device_steps"),
                cpus=2,
                append="slub_debug=FZPU",
                backports=BACKPORTS,
            ) as vm:
                yield bus, vm


@pytest.fixture
def stage(guest: tuple[Bus, Guest], tmp_path: Path) -> Iterator[Stage]:
    bus, vm = guest
    side = KernelSide(vm)
    stage = Stage(bus, side, tmp_path)
    yield stage
    stage.clear()
    assert wait_until(lambda: side.channels() == [], LIMIT)


@each_behaviour
def test_the_kernels_drivers(stage: Stage, shown: Behaviour) -> None:
    shown(stage)


def test_nothing_was_wrong_in_the_kernel(guest: tuple[Bus, Guest]) -> None:
    said = guest[1].run("dmesg")
    assert [line for line in said.splitlines() if CONCERNS.search(line)] == []
    assert "broke the protocol" not in said
    assert guest[1].errors == ""
