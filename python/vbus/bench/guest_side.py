"""The side of a guest's measurements that serves: one bus, whose devices one guest has in several ways at once.

Run as a process of its own, in a network namespace of its own: `python -m vbus.bench.guest_side`, told what to do by
`children`. Disks and networks of all kinds are alike, and served by the same threads: what differs is how the guest
and the bus tell each other that there is something to do.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Any, Literal

from vbus.bench import children
from vbus.bench.paced_disk import Clock, NumberedDisk, PacedDisk
from vbus.bus import Bus
from vbus.connectors import Ivshmem, VhostUser
from vbus.devices import Net
from vbus.shmem import ivshmem
from vbus.vm.options import VhostUserDevice, device_options, function_options, monitor_options

PCI, DIRECT, TUNNELLED, WINDOW = KINDS = ("virtio-pci", "direct", "tunnelled", "window")
"""How the guest has a device: as a function of virtio-pci; behind a function of ivshmem, with direct or with tunnelled
signals, and buffers where the guest has them, as behind virtio-pci; with tunnelled signals, and buffers in a window.
"""
SIGNALS: dict[str, Literal["direct", "tunnelled"]] = {DIRECT: "direct", TUNNELLED: "tunnelled", WINDOW: "tunnelled"}
"""Of the function, where the devices are behind one."""
PRIORITY = 4
"""Where none is more urgent than another."""
CHANNEL = "urgent"
FUNCTIONS = 8
"""Of a slot of PCI."""
FIRST_SLOT = 0x10
GUEST_OPTIONS = "ipv6.disable=1"
"""Of the guest's kernel: no packets of IPv6."""
SPLIT = ("RING_PACKED",)
"""What is not offered: QEMU does not take packed rings unless it is told to, and all ways shall have the same."""


def disk_name(kind: str, number: int) -> str:
    """On the bus."""
    return f"{kind}-disk{number}"


def net_name(kind: str, number: int) -> str:
    """On the bus."""
    return f"{kind}-net{number}"


def mac_of(kind: str, number: int) -> str:
    """Of a network in the guest."""
    return f"52:54:00:00:{KINDS.index(kind):02x}:{number:02x}"


def subnet_of(kind: str, number: int) -> str:
    """The first three numbers of a network's addresses; the host is 1 there, the guest 2."""
    return f"10.{90 + KINDS.index(kind)}.{number}"


class GuestSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._bus: Bus | None = None
        self._functions = 0
        self._answers_first = False
        self._clock = Clock()
        self._closing.callback(self._clock.close)

    def serve(self, folder: str, ram: str, disks: int, nets: int, blocks: int, bulk: int | None = None) -> list[str]:
        """Serve so many disks and networks of each kind; QEMU's options for all of them. `ram`: its guest's memory.

        With `bulk`, the first network of a kind is the most urgent, all other devices have that priority, and disks are
        served natively and take no time of their own; and a channel, the most urgent, too, answers what it is told.
        """
        bus = Bus("bench", polling="notified")
        self._closing.callback(bus.stop)
        self._bus = bus
        self._answers_first = bulk is not None
        words: list[str] = []
        for kind in KINDS:
            names = [disk_name(kind, number) for number in range(disks)]
            for number, name in enumerate(names):
                if bulk is not None:
                    bus.plug(NumberedDisk(blocks), name, priority=bulk, mask=SPLIT)
                else:
                    bus.plug(PacedDisk(self._clock, blocks, number), name, mask=SPLIT)
            for number in range(nets):
                name = net_name(kind, number)
                names.append(name)
                priority = PRIORITY if bulk is None else bulk if number else 0
                net = Net(f"tap:{_tap(kind, number)}", mac=mac_of(kind, number))
                bus.plug(net, name, priority=priority, mask=SPLIT)
            if kind not in SIGNALS:
                for name in names:
                    words += self._device(bus, name, Path(folder))
            else:
                socket, qmp = Path(folder) / f"{kind}.sock", Path(folder) / "qmp"
                shares = (Path(ram), qmp) if kind != WINDOW else (None, None)
                signal = SIGNALS[kind]
                function = Ivshmem(socket, devices=names, signal=signal, ram=shares[0], qmp=shares[1], keep=False)
                bus.connect(function, kind)
                words += function_options(kind, socket, ivshmem.VECTORS)
        words += monitor_options(Path(folder) / "qmp")
        if bulk is not None:
            bus.open_channel(CHANNEL, priority=0).on_event(lambda event: event.reply(event.data))
        bus.start()
        for kind in KINDS:
            for number in range(nets):
                tap = _tap(kind, number)
                subprocess.run(["ip", "address", "add", f"{subnet_of(kind, number)}.1/24", "dev", tap], check=True)
                subprocess.run(["ip", "link", "set", tap, "up"], check=True)
        return words

    def _device(self, bus: Bus, name: str, folder: Path) -> list[str]:
        """A function of a slot that several share: a root bus has fewer slots than there are devices."""
        socket = folder / f"{name}.sock"
        slot = bus.slot(name)
        device, number = slot.device, self._functions
        self._functions += 1
        bus.connect(VhostUser(name, socket))
        mac = device.mac if isinstance(device, Net) else None
        served = VhostUserDevice(name, int(device.device_id), socket, queues=len(device._queues), mac=mac)
        words = device_options(served, reconnect="no")
        place = f"{FIRST_SLOT + number // FUNCTIONS:#x}.{number % FUNCTIONS}"
        words[-1] += f",addr={place},multifunction=on,disable-legacy=on"
        return words

    def answer(self, program: str) -> None:
        """Start the other end of TCP."""
        # Of the host's own scheduler nothing shall be measured.
        first = ["-u"] if self._answers_first else []
        served = subprocess.Popen([program, *first, "serve"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._closing.callback(_end, served)
        assert served.stdout is not None
        if served.stdout.readline() != b"ready\n":
            raise children.SideError("the other end of TCP did not start")

    def memory(self) -> dict[str, str]:
        """How buffers behind each function are reached: `shared` or `window`, and why not otherwise."""
        assert self._bus is not None
        found = {}
        for kind in SIGNALS:
            [peer] = self._bus.connectors[kind].describe()["peers"]
            found[kind] = peer["memory"] if peer["not_shared"] is None else f"{peer['memory']}: {peer['not_shared']}"
        return found

    def set_service(self, seconds: float) -> None:
        """How long each disk takes for a request from now on."""
        self._clock.seconds = seconds

    def counters(self) -> dict[str, Any]:
        """Of every kind: signals of all its devices together, and reads of its disks."""
        assert self._bus is not None
        found: dict[str, Any] = {}
        for row in self._bus.stat():
            kind = next(kind for kind in KINDS if row["device"].startswith(kind))
            sums = found.setdefault(kind, {})
            for key, value in row.items():
                if isinstance(value, dict):
                    for counter, count in value.items():
                        sums[f"{counter}_{key}"] = sums.get(f"{counter}_{key}", 0) + count
            if row["queue"] == "requests":
                sums["reads"] = sums.get("reads", 0) + row["requests"]
            if row["queue"] == "transmit0":
                sums["sent_bytes"] = sums.get("sent_bytes", 0) + row["bytes_read"]
        return found

    def close(self) -> None:
        """Stop everything."""
        self._closing.close()


def _tap(kind: str, number: int) -> str:
    return f"vb{KINDS.index(kind)}n{number}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def main() -> None:
    """Serve until standard input ends."""
    side = GuestSide()
    try:
        names = ("serve", "answer", "memory", "set_service", "counters")
        children.serve({name: getattr(side, name) for name in names})
    finally:
        side.close()


if __name__ == "__main__":
    main()
