"""A guest's modules, and functions whose other side is somebody else's, another version's, or hostile.

The kernel's own checks of its memory are on, and whatever it finds wrong ends the test.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from guests import BACKPORTS, bus_modules, function_args, programs
from vbus import msg
from vbus.bus import Bus
from vbus.channel import ChannelClosedError, ChannelFullError, Event
from vbus.connectors import Ivshmem
from vbus.connectors.ivshmem_peer import IvshmemPeer
from vbus.devices import Blk, Console, Rng
from vbus.shmem import ivshmem
from vbus.shmem.area import CHANNEL_RING_STRIDE, MAGIC, SESSION, SESSION_REQUEST, sealed_memfd
from vbus.vm import Guest
from vbus.vm.options import function_options, monitor_options

pytestmark = pytest.mark.timeout(900)

SECONDS = float(os.environ.get("VBUS_HOSTILE_SECONDS", "25"))
MIB = 1 << 20
CONCERNS = re.compile(
    r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup|Redzone|Poison overwritten"
)


class Stranger:
    """Serves a function to one QEMU, with memory that begins with `content`, and never says a word."""

    def __init__(self, path: Path, content: bytes, size: int = 32 * MIB) -> None:
        self.path = path
        self.content = content
        self.fd = sealed_memfd("stranger", size)
        os.pwrite(self.fd, content, 0)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        bells = [os.eventfd(0) for _ in range(2 * ivshmem.VECTORS)]
        with sock, contextlib.ExitStack() as stack:
            for bell in bells:
                stack.callback(os.close, bell)
            ivshmem.send(sock, ivshmem.VERSION)
            ivshmem.send(sock, ivshmem.DRIVER_SIDE)
            ivshmem.send(sock, ivshmem.MEMORY, self.fd)
            for place, bell in enumerate(bells):
                ivshmem.send(sock, place // ivshmem.VECTORS, bell)
            # Until QEMU ends.
            sock.recv(1)

    @property
    def args(self) -> list[str]:
        """QEMU's options."""
        return function_options(self.path.stem, self.path, ivshmem.VECTORS)

    @property
    def page(self) -> bytes:
        """What the first page holds."""
        return os.pread(self.fd, 4096, 0)

    def close(self) -> None:
        """After QEMU."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(30)
        os.close(self.fd)


class Hostile:
    """Changes what the bus writes into the area of a function, and rings as it likes, while it is on."""

    def __init__(self, connector: Ivshmem, seed: int) -> None:
        self._connector = connector
        self._random = random.Random(seed)
        self._on = threading.Event()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.done: dict[str, int] = {}
        """How often it did what."""

    def __enter__(self) -> Hostile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._on.set()
        self._thread.join(30)

    def be(self, on: bool) -> None:
        """On or off."""
        self._on.set() if on else self._on.clear()

    def message(self, message: bytes) -> bytes:
        """What becomes of a message to the guest: it keeps a length that its ring can carry."""
        roll = self._random.random()
        if not self._on.is_set() or roll > 0.15:
            return message
        self._count("messages")
        changed = bytearray(message)
        if roll < 0.02:
            del changed[8 + self._random.randrange(max(1, len(changed) - 7)) :]
        elif roll < 0.04:
            changed += self._random.randbytes(self._random.choice((1, 4, 100, 5000)))
        else:
            for _ in range(self._random.choice((1, 1, 2, 8))):
                changed[self._random.randrange(len(changed))] = self._random.choice((0, 1, *b"./", 0x7F, 0x80, 0xFF))
        struct.pack_into("<H", changed, 6, len(changed))
        return bytes(changed)

    def _count(self, what: str) -> None:
        self.done[what] = self.done.get(what, 0) + 1

    def _run(self) -> None:
        while not self._end.is_set():
            self._on.wait()
            time.sleep(self._random.choice((0.001, 0.01, 0.05)))
            machine = next(iter(self._connector._machines), None)
            if machine is None or not self._on.is_set():
                continue
            deeds = (
                self._slots,
                self._slots,
                self._words,
                self._link,
                self._lanes,
                self._lanes,
                self._header,
                self._ring,
            )
            deed = self._random.choice(deeds)
            deed(machine)
            self._count(deed.__name__)

    def _value(self) -> int:
        return self._random.choice((0, 1, 2, 0x40, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, self._random.getrandbits(32)))

    def _slots(self, machine: Any) -> None:
        g = machine.area.geometry
        places = g.events_to_driver
        priority = self._random.choice((0, 4, 6, self._random.randrange(8)))
        sources = (*range(64), *range(g.max_sources - 8, g.max_sources))
        for _ in range(self._random.choice((1, 8, 64))):
            # What comes next is somewhere among the first slots of a ring.
            at = places.slots + (priority * g.max_sources + self._random.randrange(48)) * 16
            sequence = self._random.choice((self._random.randrange(64), self._value()))
            source = self._random.choice((self._random.choice(sources), self._value()))
            words = (sequence, source, self._value() & 7, 0)
            struct.pack_into("<IIII", machine.area._view, at, *words)
        machine.outward[1 + priority].ring()

    def _words(self, machine: Any) -> None:
        g = machine.area.geometry
        where = self._random.choice(
            (
                g.events_to_device.taken + 4 * self._random.randrange(64),
                g.events_to_device.sleep + 64 * self._random.randrange(8),
                g.events_to_driver.stats + 8 * self._random.randrange(64),
            )
        )
        struct.pack_into("<I", machine.area._view, where, self._value())

    def _link(self, machine: Any) -> None:
        g = machine.area.geometry
        where = self._random.choice(
            (g.link_to_driver, g.link_to_device + 64, g.link_to_driver + 128 + 8 * self._random.randrange(64))
        )
        struct.pack_into("<I", machine.area._view, where, self._value())
        machine.outward[0].ring()

    def _lanes(self, machine: Any) -> None:
        """The rings of channels, with events that make the guest look there."""
        g = machine.area.geometry
        for _ in range(self._random.choice((1, 4))):
            lane = self._random.randrange(8) * CHANNEL_RING_STRIDE
            inward, outward = g.channels_to_driver + lane, g.channels_to_device + lane
            where = self._random.choice((inward, outward + 64, *(inward + 128 + 4 * n for n in range(64))))
            struct.pack_into("<I", machine.area._view, where, self._value())
        for peer in self._connector.peers:
            assert isinstance(peer, IvshmemPeer)
            for rings in peer.rings._lanes:
                if rings.signal is not None and self._random.random() < 0.5:
                    rings.signal.notify()

    def _header(self, machine: Any) -> None:
        if self._random.random() < 0.2:
            where = self._random.choice((SESSION, SESSION_REQUEST, *range(0, 0x98, 4)))
            struct.pack_into("<I", machine.area._view, where, self._value())
        machine.outward[0].ring()

    def _ring(self, machine: Any) -> None:
        for _ in range(self._random.choice((1, 100))):
            machine.outward[self._random.randrange(9)].ring()


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[Callable[[str, bytes], Stranger]]:
    """Functions of somebody else, by name and what their memory begins with."""
    made: list[Stranger] = []

    def make(name: str, content: bytes) -> Stranger:
        made.append(Stranger(tmp_path / f"{name}.sock", content))
        return made[-1]

    yield make
    for one in made:
        one.close()


def bound(vm: Guest) -> int:
    """Functions that the modules have."""
    return int(vm.run("ls -d /sys/bus/pci/drivers/vbus_ivshmem/0* 2>/dev/null | wc -l"))


def test_functions_that_are_not_ours(stranger: Callable[[str, bytes], Stranger]) -> None:
    """One with other content, one that is empty and stays silent, one with an area of another version."""
    foreign = stranger("foreign", b"somebody else's")
    empty = stranger("empty", b"")
    newer = stranger("newer", struct.pack("<QII", MAGIC, 77, 0x98))
    args = [*foreign.args, *empty.args, *newer.args]
    with Guest(args=args, modules=bus_modules(), backports=BACKPORTS) as vm:
        assert bound(vm) == 0
        told = [line for line in vm.run("dmesg").splitlines() if "vbus_ivshmem" in line]
        assert [line.partition(": ")[2] for line in told] == [
            "the bus has an area of version 77, these modules know version 1"
        ], told
        for one in (foreign, empty, newer):
            assert one.page == one.content.ljust(4096, b"\0")
        vm.run("rmmod vbus_ivshmem")


def answer(event: Event, heard: list[int], place: int) -> None:
    """Count an event, and answer it while there is room."""
    heard[place] += 1
    with contextlib.suppress(ChannelFullError, ChannelClosedError):
        event.reply(event.data)


def test_a_hostile_bus_harms_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("VBUS_HOSTILE_SEED", "0")) or random.getrandbits(32)
    print(f"VBUS_HOSTILE_SEED={seed}")
    (tmp_path / "disk.img").write_bytes(bytes(16 * MIB))
    with Bus("hostile") as bus:
        bus.plug(Rng(), "rng0", priority=6)
        bus.plug(Blk(tmp_path / "disk.img"), "disk0")
        bus.plug(Console(f"unix:{tmp_path}/console.sock"), "console0", priority=0)
        talk = [bus.open_channel(f"talk{n}", priority=n, memory="64 KiB") for n in (0, 4, 7)]
        heard = [0, 0, 0]
        for n, channel in enumerate(talk):
            channel.on_event(lambda event, n=n: answer(event, heard, n))  # type: ignore[misc]
        connector = bus.connect(Ivshmem(tmp_path / "bus.sock"), "function")
        honest = IvshmemPeer.transmit
        honest_on_channel = IvshmemPeer.transmit_on_channel
        with Hostile(connector, seed) as hostile:
            monkeypatch.setattr(
                IvshmemPeer,
                "transmit",
                lambda peer, message, priority: honest(peer, hostile.message(message), priority),
            )
            monkeypatch.setattr(
                IvshmemPeer,
                "transmit_on_channel",
                lambda peer, priority, message: honest_on_channel(peer, priority, hostile.message(message)),
            )
            modules: list[str | Path] = ["virtio_rng", "virtio_blk", "virtio_console", *bus_modules()]
            with Guest(
                args=function_args(connector),
                modules=modules,
                files=programs(tmp_path, "channel_steps"),
                cpus=2,
                append="slub_debug=FZPU",
                backports=BACKPORTS,
            ) as vm:
                vm.run(
                    "(while :; do timeout 2 head -c 512 /dev/hwrng; timeout 2 dd if=/dev/vda of=/dev/null bs=64k "
                    "count=8 iflag=direct; sleep 0.05; done) >/dev/null 2>&1 &"
                )
                steps = "map=65536 put=0,x nonblock fill=4000 hear pollin=100 hear hear get=0,4"
                vm.run(
                    "for c in talk0 talk4 talk7; do (while ! test -e /tmp/stop; do "
                    f"timeout 2 channel_steps /dev/vbus/$c {steps}; sleep 0.02; done) & done >/dev/null 2>&1; "
                    "(while ! test -e /tmp/stop; do timeout 2 cat /dev/vbus/talk4; sleep 0.1; done) >/dev/null 2>&1 &"
                )
                deadline = time.monotonic() + SECONDS
                while time.monotonic() < deadline:
                    hostile.be(True)
                    time.sleep(2)
                    hostile.be(False)
                    # A while to attach again, so that there is something to be hostile to.
                    wait_until(lambda: any(peer.greeted for peer in connector.peers), 10)
                    bus.plug(Blk(memory="1 MiB"), "hot0")
                    coming = bus.open_channel("hot.channel", memory=5000)
                    vm.run("true")
                    coming.close()
                    bus.unplug("hot0", surprise=True)
                assert {"_slots", "_words", "_link", "_lanes", "_header", "_ring", "messages"} <= set(hostile.done)
                assert all(heard), heard
                hostile.be(False)
                parted = list(connector.peers)
                for peer in parted:
                    peer.part("from here on it is honest")
                # Until the guest begins anew, it has the devices that were.
                assert wait_until(lambda: any(peer.greeted and peer not in parted for peer in connector.peers), 120)
                for name in ("rng0", "disk0", "console0"):
                    vm.wait_for(
                        f"d=$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name)) && test -e $d/virtio*/driver",
                        seconds=120,
                    )
                vm.run("ls /sys/bus/vbus/devices/*/virtio*/block && head -c 64 /dev/hwrng >/dev/null")
                vm.wait_for('test "$(echo $(ls /dev/vbus))" = "talk0 talk4 talk7"', seconds=120)
                before = list(heard)
                for name in ("talk0", "talk4", "talk7"):
                    vm.run(f"printf honest >/dev/vbus/{name}")
                assert wait_until(lambda: all(now > then for now, then in zip(heard, before, strict=True)), 120)
                vm.run("touch /tmp/stop")
                said = vm.run("dmesg")
                assert [line for line in said.splitlines() if CONCERNS.search(line)] == []
                assert "the bus broke the protocol" in said
                vm.run("rmmod vbus_ivshmem virtio_vbus", seconds=120)
                # Whoever has a channel open, if only for a moment more, needs what its file is.
                vm.wait_for("rmmod vbus_proxy", seconds=120)


def lies(chance: random.Random) -> tuple[int, ...]:
    """What a bus may say of a range: index, count, address, size, nonce."""
    words = (0, 1, 2, 64, 65, 0xFFFFFFFF)
    places = (0, 1, 0x1000, 0xA0000, 1 << 20, 0xFEE00000, 1 << 32, 1 << 52, (1 << 63) + 1, (1 << 64) - 1)
    return (
        chance.choice(words),
        chance.choice(words),
        chance.choice((*places, chance.getrandbits(40) & ~0xFFF)),
        chance.choice((*places, chance.getrandbits(32))),
        chance.getrandbits(64),
    )


def test_a_bus_that_lies_of_memory_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("VBUS_HOSTILE_SEED", "0")) or random.getrandbits(32)
    print(f"VBUS_HOSTILE_SEED={seed}")
    chance = random.Random(seed)
    lying, told = True, 0
    honest = IvshmemPeer.transmit

    def transmit(peer: IvshmemPeer, message: bytes, priority: int) -> None:
        nonlocal told
        frame = msg.decode(message)
        if lying and isinstance(frame, msg.Frame) and isinstance(frame.body, msg.RamRangeResponse):
            told += 1
            said = list(lies(chance))
            if chance.random() < 0.7:
                # So that the guest goes on to the range itself.
                said[:2] = frame.body.index, frame.body.count
            message = msg.encode(msg.Frame(msg.RamRangeResponse(*said), frame.dev_num, frame.token))
        honest(peer, message, priority)

    monkeypatch.setattr(IvshmemPeer, "transmit", transmit)
    with Bus("liar") as bus:
        bus.plug(Rng(), "rng0")
        connector = bus.connect(Ivshmem(tmp_path / "bus.sock", ram=tmp_path / "ram", qmp=tmp_path / "qmp"), "function")
        with Guest(
            args=[*monitor_options(tmp_path / "qmp"), *function_args(connector)],
            modules=["virtio_rng", *bus_modules()],
            memory_file=tmp_path / "ram",
            append="slub_debug=FZPU page_poison=1",
            backports=BACKPORTS,
        ) as vm:
            for _ in range(12):
                before = told
                vm.run("rmmod vbus_ivshmem; insmod /modules/vbus_ivshmem.ko", seconds=120)
                assert wait_until(lambda: told > before, 120)  # noqa: B023
                assert not any(peer.describe()["memory"] == "shared" for peer in list(connector.peers))
            lying = False
            vm.run("rmmod vbus_ivshmem; insmod /modules/vbus_ivshmem.ko", seconds=120)
            vm.wait_for("head -c 64 /dev/hwrng >/dev/null", seconds=120)
            assert vm.run("cat /sys/bus/pci/drivers/vbus_ivshmem/0*/memory") == "shared\n"
            said = vm.run("dmesg")
            assert [line for line in said.splitlines() if CONCERNS.search(line)] == []
