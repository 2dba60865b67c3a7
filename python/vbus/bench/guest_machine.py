"""A guest that has the same devices in several ways, the load that is put on them, and what that took of everybody.

    load.c ── gcc ──> a program of the guest, and of the host as the other end of TCP
    guest_side ─────> the bus, in a process of its own
    Guest ──────────> Debian's kernel with vbus's modules: `run` has the program put load on devices of one kind

Which device of the guest is which of the bus is learned once. Counters of the guest are read by the program itself,
just before and just after the load; those of the bus around it, when nothing else is under way. CPU time is that of the
load alone: the program says on the console when it begins and when it ends, and waits until that was looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children
from vbus.bench.guest_side import CHANNEL, GUEST_OPTIONS, KINDS, PCI, SIGNALS, WINDOW, disk_name, mac_of, subnet_of
from vbus.bench.work import threads_of
from vbus.errors import UsageError
from vbus.vm import Guest, GuestError, build
from vbus.vm.machine import fastest

SOURCE = Path(__file__).parent / "guest" / "load.c"
MEMORY = 512
"""MiB of the guest."""
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where a guest's memory is best: no disk is written to then."""
CPUS = 2
BLOCKS = 4096
"""Of 4 KiB, of each disk."""
SETTLE_SECONDS = 5.0
LOOK_SECONDS = 0.02
RUN_SECONDS = 60.0
STARTS = 3
START_SECONDS = 40.0
"""How often a guest is started, and how long that may take: a QEMU that emulates has seldom been seen to stop in the
middle of finding so many functions, or to end there.
"""
COUNTERS = [f"{counter}_{way}" for way in ("to_device", "to_driver") for counter in ("signalled", "sent", "rung")]


@dataclass(frozen=True)
class Load:
    """What is asked of devices: `count` requests of each (or of each connection), `depth` at once, of so many devices.

    `work` is "read" (4 KiB at random places of disks), "ask" (64 bytes there and back by TCP), "stream" (64 KiB each by
    TCP) or "tell" (64 bytes there and back over a channel). `service`: seconds that a disk takes for a request.
    """

    work: str
    devices: int
    depth: int
    count: int
    service: float = 0.0


def build_load(folder: Path) -> Path:
    """The program, for this machine and for any guest of its kind. UsageError."""
    program = folder / "load"
    command = ["gcc", "-O2", "-static", "-pthread", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no reason given"]
        raise UsageError(f"the load for the guest cannot be built by gcc (libc6-dev is needed, too): {lines[-1]}")
    return program


def namespace() -> list[str]:
    """The words that run a command in a network of its own; none where that is not permitted."""
    for words in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        with contextlib.suppress(OSError):
            made = [*words, "ip", "tuntap", "add", "vbtry", "mode", "tap"]
            if subprocess.run(made, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode == 0:
                return words
    return []


class GuestMachine:
    """The guest and its bus, for a `with` block."""

    def __init__(
        self, folder: Path, disks: int, nets: int, *, bulk: int | None = None, cpus: int = CPUS, append: str = ""
    ) -> None:
        """Make a bus with so many disks and networks of each kind, and start a guest of it. UsageError, SideError.

        `bulk`: the priority of all but the first network of each kind, as `guest_side` has it. `cpus`: of the guest.
        `append`: words for its kernel.
        """
        self._bulk = bulk
        self._cpus = cpus
        self._append = append
        self._loads = 0
        self._closing = contextlib.ExitStack()
        self._disks: dict[str, list[str]] = {}
        self._buses: dict[str, str] = {}
        program = build_load(folder)
        try:
            modules = build.bus_modules()
        except (build.BuildError, build.FetchError) as error:
            raise UsageError(f"the guest's modules: {error}") from None
        self.accelerator = fastest().partition(",")[0]
        for left in reversed(range(STARTS)):
            try:
                # Each start has sockets of its own.
                self._start(Path(tempfile.mkdtemp(dir=folder)), program, modules, disks, nets)
                return
            except GuestError as error:
                self.close()
                if not left:
                    raise children.SideError(f"the guest: {error}") from None
            except BaseException:
                self.close()
                raise

    def _start(self, folder: Path, program: Path, modules: Sequence[Path], disks: int, nets: int) -> None:
        within = namespace() if nets else []
        self._side = self._closing.enter_context(children.Child("vbus.bench.guest_side", within=within))
        memory = Path(self._closing.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY, prefix="vbus-"))) / "ram"
        devices = {"disks": disks, "nets": nets, "blocks": BLOCKS, "bulk": self._bulk}
        args = self._side.ask("serve", folder=str(folder), ram=str(memory), **devices)
        if nets:
            self._side.ask("answer", program=str(program))
        self._vm = self._closing.enter_context(
            Guest(
                args=args,
                modules=["virtio_blk", "virtio_net", *modules],
                files={"load": program.read_bytes()},
                memory=MEMORY,
                memory_file=memory,
                cpus=self._cpus,
                append=f"{GUEST_OPTIONS} {self._append}".rstrip(),
                wait=False,
            )
        )
        self._vm.wait(START_SECONDS)
        self._find(disks, nets)

    def _find(self, disks: int, nets: int) -> None:
        """Which device of the guest is which; networks get their addresses."""
        self._nets = nets
        self._vm.wait_for(f"test $(ls /sys/block | grep -c ^vd) = {len(KINDS) * disks}")
        self.kernel = self._vm.run("uname -r").strip()
        for kind, memory in self._side.ask("memory").items():
            if memory != ("window" if kind == WINDOW else "shared"):
                raise children.SideError(
                    f"buffers of {kind} devices are reached otherwise than they shall be: {memory}"
                )
        # One read, one request: neighbours that are under way together would become one.
        self._vm.run("for b in /sys/block/vd*; do echo 2 >$b/queue/nomerges; done")
        # The bus's names of disks that come through it; the others are in the order of their places.
        said = self._vm.run(
            "for b in /sys/block/vd*; do p=$(readlink -f $b); case $p in "
            "*/vbus*) cat ${p%/virtio*}/name; basename ${p%/virtio*} ;; *) echo pci; echo $p ;; esac; basename $b; done"
        ).split()
        found = {(name, where): disk for name, where, disk in zip(said[::3], said[1::3], said[2::3], strict=True)}
        in_order = [f"/dev/{found[key]}" for key in sorted(key for key in found if key[0] == "pci")]
        self._disks[PCI] = in_order
        places = {name: (where, disk) for (name, where), disk in found.items()}
        for kind in SIGNALS:
            self._disks[kind] = [f"/dev/{places[disk_name(kind, number)][1]}" for number in range(disks)]
            self._buses[kind] = places[disk_name(kind, 0)][0].partition("-")[0]
        for kind in KINDS:
            for number in range(nets):
                self._vm.run(
                    f"n=$(basename $(dirname $(grep -l {mac_of(kind, number)} /sys/class/net/*/address))) && "
                    f"ip address add {subnet_of(kind, number)}.2/24 dev $n && ip link set $n up"
                )

    def run(self, kind: str, load: Load, beside: Sequence[Load] = ()) -> dict[str, Any]:
        """Put load on devices of a kind; what the program says, and what the bus and both sides count. SideError.

        `beside`: what else is done meanwhile, to the last devices of the kind, and by whom is less urgent in the guest.
        """
        self._side.ask("set_service", seconds=load.service)
        counted = [
            f"-c '{name}=/sys/bus/vbus/devices/{self._buses[kind]}-*/{way}/{counter}'"
            for name in COUNTERS
            if kind in self._buses
            for counter, _, way in [name.partition("_")]
        ]
        self._loads += 1
        word = f"load {self._loads}"
        watched = ["-w", f"'{self._vm.terminal}={word}'"]
        # Of the guest's own scheduler nothing shall be measured.
        urgent = ["-u"] if self._bulk is not None else []
        command = " ".join(["/load", *urgent, *watched, *counted, *self._words(kind, load)])
        if beside:
            others = [" ".join(["/load", *self._words(kind, other, last=True)]) for other in beside]
            started = "".join(f'{other} >/dev/null & p="$p $!"; ' for other in others)
            # None of them ends by itself.
            command = f"{started} sleep 0.5; {command}; s=$?; kill $p; wait; exit $s"
        before = self._settled()
        used: list[Mapping[str, int]] = []
        # Not waited for when the load fails: then it has nothing to hear.
        watcher = threading.Thread(target=self._watch, args=(word, used), name="watches a load", daemon=True)
        watcher.start()
        began = time.monotonic()
        try:
            told: dict[str, Any] = json.loads(self._vm.run(command, seconds=RUN_SECONDS).splitlines()[0])
        except (GuestError, ValueError) as error:
            raise children.SideError(f"load in the guest: {error}") from None
        told["wall_seconds"] = time.monotonic() - began
        watcher.join()
        if len(used) != 2:
            raise children.SideError("load in the guest: the console did not say when it began and ended")
        after = self._settled()
        for who in ("qemu", "bus"):
            told[f"{who}_seconds"] = (used[1][who] - used[0][who]) / 1e9
        told["bus"] = {key: after[kind][key] - before[kind][key] for key in after[kind]}
        return told

    def _watch(self, word: str, used: list[Mapping[str, int]]) -> None:
        """Look at what CPU time was used before a load and after it: what the program does around it is not of it."""
        with contextlib.suppress(GuestError):
            for when in ("begins", "ends"):
                self._vm.hear(f"{word} {when}", seconds=RUN_SECONDS)
                used.append({"qemu": threads_of(self._vm.pid)["ran"], "bus": threads_of(self._side.pid)["ran"]})
                self._vm.type_keys(b"\n")

    def _words(self, kind: str, load: Load, *, last: bool = False) -> list[str]:
        """The program's words for a load, of the first devices of a kind, or of the last."""
        if load.work == "tell":
            # Of several channels of a name, all but the first are called by their bus, too.
            name = f"/dev/vbus/{CHANNEL}"
            where = [self._vm.run(f"ls {name}@{self._buses[kind]} 2>/dev/null || echo {name}").strip()]
            seed = []
        elif load.work == "read":
            where = self._disks[kind]
            seed = ["1"]
        else:
            where = [f"{subnet_of(kind, number)}.1" for number in range(self._nets)]
            seed = []
        where = where[-load.devices :] if last else where[: load.devices]
        return [load.work, str(load.count), str(load.depth), *seed, *where]

    def _settled(self) -> dict[str, Any]:
        """The bus's counters once they stand still."""
        deadline = time.monotonic() + SETTLE_SECONDS
        last: dict[str, Any] = self._side.ask("counters")
        while time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            again: dict[str, Any] = self._side.ask("counters")
            if again == last:
                return again
            last = again
        raise children.SideError(f"the bus is not idle {SETTLE_SECONDS:g} seconds after its last request")

    def close(self) -> None:
        """End the guest and the bus."""
        self._closing.close()
