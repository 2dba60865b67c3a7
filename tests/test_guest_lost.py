"""Guests of which a driver holds a processor until its device answers, when that answer does not come any more.

virtio_net looks for the answer to a command again and again, and lets nobody else have the processor meanwhile. What
ends that must need neither this processor nor, on another one, anything that waits until all of them have got on.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import wait_until
from guests import BACKPORTS, bus_modules, function_args
from vbus.bus import Bus, Queue, Request
from vbus.connectors import Ivshmem
from vbus.devices import Net, Rng
from vbus.vm import Guest

pytestmark = pytest.mark.timeout(600)

DEVICES = ("rng0", "net0")
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|hung task|soft lockup")


class SilentNet(Net):
    """A network device that answers no command for a while, when it is told so."""

    def __init__(self) -> None:
        super().__init__("loopback")
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.is_asked = threading.Event()

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Answer, at once or later."""
        if queue.name == "control" and not self.may_answer.is_set():
            self.is_asked.set()
            assert self.may_answer.wait(300)
        super().handle_batch(queue, requests)


@dataclass
class Running:
    """A guest whose network device does not answer, and whose processor is held by whoever asked it."""

    vm: Guest
    bus: Bus
    connector: Ivshmem
    net: SilentNet

    def settled(self) -> None:
        """Both devices are there, with their drivers."""
        for name in DEVICES:
            self.vm.wait_for(
                f"d=$(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name)) && test -e $d/virtio*/driver",
                seconds=120,
            )


@contextlib.contextmanager
def waiting(folder: Path, cpus: int) -> Iterator[Running]:
    """A guest whose driver waits for an answer when the block begins. In the end it has lost nothing but that."""
    net = SilentNet()
    with Bus("lost") as bus:
        bus.plug(Rng(), "rng0")
        bus.plug(net, "net0")
        connector = Ivshmem(folder / "lost.sock")
        bus.connect(connector, "guests")
        with Guest(
            args=function_args(connector),
            modules=["virtio_rng", "virtio_net", *bus_modules()],
            cpus=cpus,
            append="slub_debug=FZPU",
            backports=BACKPORTS,
        ) as vm:
            here = Running(vm, bus, connector, net)
            here.settled()
            vm.run("ip link set eth0 up")
            net.may_answer.clear()
            try:
                # Later, when it has said that it begins: it may not get to say anything then.
                vm.run("(sleep 0.5; ip link set eth0 promisc on) >/dev/null 2>&1 &")
                assert net.is_asked.wait(120)
                yield here
            finally:
                net.may_answer.set()
            assert [line for line in vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_session_ends_while_a_driver_waits(tmp_path: Path, cpus: int) -> None:
    with waiting(tmp_path, cpus) as here:
        (peer,) = here.connector.peers
        peer.part("the test ends it")
        here.vm.wait_for("test $(ls /sys/bus/vbus/devices | wc -l) = 0", seconds=120)
        # What a hung handler may still write into is not given to another session.
        assert not any(new.greeted for new in here.connector.peers)
        here.net.may_answer.set()
        assert wait_until(lambda: any(new.greeted and new is not peer for new in here.connector.peers), 120)
        here.settled()
        here.vm.run("ip link set eth0 up && ip link set eth0 promisc on && head -c 64 /dev/hwrng >/dev/null")


@pytest.mark.skipif(os.cpu_count() == 1, reason="a guest's processors would not work beside each other")
def test_devices_go_by_surprise_while_a_driver_waits(tmp_path: Path) -> None:
    """What the bus says after the first has gone must be heard, and not behind the one that waits for the second."""
    with waiting(tmp_path, cpus=2) as here:
        assert here.bus.unplug("rng0", surprise=True)
        # It hangs, and is left behind.
        assert not here.bus.unplug("net0", surprise=True, timeout=0.1)
        here.vm.wait_for("test $(ls /sys/bus/vbus/devices | wc -l) = 0", seconds=120)
