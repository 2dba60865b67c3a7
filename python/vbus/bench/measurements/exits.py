"""Doorbells and interrupts of a guest for the same work: virtio-pci, `ivshmem` direct, and `ivshmem` tunnelled.

A guest has the same disks and networks several times, in one boot: as functions of virtio-pci behind vhost-user, each
queue with an eventfd and a vector; behind a function of ivshmem with direct signals; and behind one with tunnelled
signals. One process serves all of them with the same threads and the same models. Ways take turns, within a round.

Behind those functions the guest shares its memory, as vhost-user has it, so that one thing differs: how the two sides
tell each other that there is something to do. What it costs to copy into a window is measured by a last function.

A *case* is some load: reads of so many disks, requests and answers or streams over so many networks. The count of
requests is found once, on virtio-pci, and is the same for all. A disk's service time is set: how often somebody sleeps
depends on which side is faster, so reads are measured as fast as can be, and with disks that serve 10% to 100% of what
the guest was found to ask for.

Interrupts are what the guest's kernel counted (/proc/interrupts), doorbells what the bus heard: for a queue of its own
the sum of its eventfd, for event rings what the guest's modules counted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import guest_machine
from vbus.bench.guest_machine import GuestMachine, Load
from vbus.bench.guest_side import DIRECT, KINDS, PCI, SIGNALS, TUNNELLED, WINDOW
from vbus.bench.measure import check_same_work
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Row, Sample
from vbus.bench.measurements import exits_picture, exits_words
from vbus.bench.peers import Peer

LEAST_THROUGHPUT = 0.95
MOST_P99 = 1.1
MOST_CPU = 1.1
"""Of CPU time a request: who polls to save signals pays with that."""
MANY = 16
"""Disks at which tunnelled signals shall save."""
OF_MANY = 0.25
OF_OTHERS = 1.05
FULL = "full"
GUARDS = (
    Bar("per_second", "requests/s", LEAST_THROUGHPUT, at_least=True),
    Bar("p99_us", "p99", MOST_P99),
    Bar("cpu_us", "CPU time", MOST_CPU),
)
TRIAL = 300
"""Requests of a disk or connection by which its speed is found."""


@dataclass(frozen=True)
class ExitsPlan(Plan):
    """How much is measured."""

    disks: tuple[int, ...] = (1, 4, MANY)
    depths: tuple[int, ...] = (1, 4, 16)
    """Reads under way of each disk."""
    loads: tuple[int, ...] = (10, 25, 50, 75, 100)
    """What disks serve, in percent of what the guest asks for when they take no time."""
    load_depth: int = 1
    nets: tuple[int, ...] = (1, 4)
    connections: tuple[int, ...] = (1, 8)
    """Of each network, that ask and wait for an answer."""
    streams: int = 1
    seconds: float = 0.8
    """How long a run takes, about: all rows are measured in one go, while the machine is quiet."""


@dataclass(frozen=True)
class Case(Factors):
    """So many devices that do something, so much of it at once; `offered` is what disks serve of what is asked for."""

    work: str
    devices: int
    depth: int
    offered: str = FULL


@dataclass(frozen=True)
class Variant(Factors):
    """How the guest has the devices."""

    signal: str

    def __str__(self) -> str:
        return self.signal


class Exits(Measurement[ExitsPlan, Case, Variant]):
    """Doorbells and interrupts of a guest."""

    name = "exits"
    title = "Exits: doorbells and interrupts of a guest"
    template = "{words}"
    page_head = exits_words.HEAD
    figures = (
        Figure("per_second", "REQUESTS/S", "requests a second", compared=True),
        Figure("interrupts", "INTERRUPTS", "interrupts of the guest a request", 3, compared=True, plotted=True),
        Figure("doorbells", "DOORBELLS", "doorbells of the guest a request", 3, compared=True, plotted=True),
        Figure("p50_us", "P50", "microseconds"),
        Figure("p99_us", "P99", "microseconds", compared=True),
        Figure("cpu_us", "CPU", "microseconds of CPU time a request, of QEMU and the bus", compared=True),
    )
    needs = (
        Peer("qemu-system-x86_64", "qemu-system-x86"),
        Peer("gcc", "gcc"),
        Peer("make", "make"),
        Peer("apt-get", "apt"),
    )

    def __init__(self) -> None:
        self._machine: GuestMachine | None = None
        self._rates: dict[tuple[str, int, int], float] = {}
        """Requests a second of virtio-pci, at full speed, by work, devices and depth."""
        self._about: Row = {}

    def plan(self, quick: bool) -> ExitsPlan:
        """How much is measured; without networks where none can be made."""
        nets = bool(guest_machine.namespace())
        if quick:
            return ExitsPlan(
                disks=(1, 2), depths=(2,), loads=(50,), nets=(1,) if nets else (), connections=(1,), seconds=0.1
            )
        return ExitsPlan() if nets else ExitsPlan(nets=())

    def cases(self, plan: ExitsPlan) -> list[Case]:
        """Reads at full speed, reads against what is offered, and TCP."""
        most = max(plan.disks)
        return [
            *(Case("read", disks, depth) for disks in plan.disks for depth in plan.depths),
            *(Case("read", most, plan.load_depth, f"{load}%") for load in plan.loads),
            *(Case("ask", nets, depth) for nets in plan.nets for depth in plan.connections),
            *(Case("stream", nets, plan.streams) for nets in plan.nets),
        ]

    def variants(self, plan: ExitsPlan, case: Case) -> list[Variant]:
        """All of them; what copying costs is seen with the most disks, as fast as can be."""
        return [Variant(kind) for kind in KINDS if kind != WINDOW or _copies(plan, case)]

    def comparisons(self, plan: ExitsPlan, case: Case) -> list[Comparison[Variant]]:
        """Both ways of the bus against virtio-pci, and tunnelled against direct; bars are for tunnelled signals."""
        limit = OF_MANY if case.work == "read" and case.devices == MANY and case.offered == FULL else OF_OTHERS
        bars = (Bar("interrupts", "interrupts", limit), Bar("doorbells", "doorbells", limit))
        pci, direct, tunnelled, window = map(Variant, (PCI, DIRECT, TUNNELLED, WINDOW))
        found: list[Comparison[Variant]] = [
            Comparison(tunnelled, pci, bars, GUARDS),
            Comparison(tunnelled, direct, guards=GUARDS),
            Comparison(direct, pci, guards=GUARDS),
        ]
        return [*found, Comparison(window, tunnelled)] if _copies(plan, case) else found

    def prepare(self, plan: ExitsPlan, folder: Path) -> None:
        """Start the guest, and find out how fast it is."""
        self._machine = machine = GuestMachine(folder, max(plan.disks), max(plan.nets, default=0))
        self._about = {"accelerator": machine.accelerator, "guest_kernel": machine.kernel}
        self._rates.clear()
        for case in self.cases(plan):
            key = (case.work, case.devices, case.depth)
            if key not in self._rates:
                count = max(TRIAL if not plan.quick else 50, 4 * case.depth if case.work == "read" else 0)
                told = machine.run(PCI, Load(case.work, case.devices, case.depth, count))
                self._rates[key] = told["requests"] / told["seconds"]

    def finish(self) -> None:
        """End the guest."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def load_of(self, plan: ExitsPlan, case: Case) -> Load:
        """What a case asks for: for about so many seconds."""
        rate = self._rates[case.work, case.devices, case.depth]
        service = 0.0
        if case.offered != FULL:
            rate *= int(case.offered.rstrip("%")) / 100
            service = case.devices / rate
        jobs = case.devices * (1 if case.work == "read" else case.depth)
        return Load(case.work, case.devices, case.depth, max(int(rate * plan.seconds / jobs), 8), service)

    def sample(self, plan: ExitsPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Run the load once on devices of a kind."""
        assert self._machine is not None
        load = self.load_of(plan, case)
        return sample_of(case, variant.signal, load, self._machine.run(variant.signal, load), self._about)

    def draw(self, result: Row) -> str:
        """The picture."""
        return exits_picture.draw(result)

    def notes(self, result: Row) -> list[str]:
        """The accelerator, since counts depend on how fast the guest is; and what is missing."""
        notes = [about_guest(result["rows"][0]["work"], f"{guest_machine.CPUS} CPUs")]
        if not result["options"]["nets"]:
            notes.append("Networks are left out: a network namespace with a tap in it cannot be made here.")
        return notes

    def numbers(self, result: Row) -> dict[str, Any]:
        """The words."""
        return {"words": exits_words.words(result)}


def _copies(plan: ExitsPlan, case: Case) -> bool:
    """Whether devices behind a window are measured, too."""
    return case.work == "read" and case.devices == max(plan.disks) and case.offered == FULL


def about_guest(work: Row, cpus: str) -> str:
    """What the guest of a measurement is, by what one of its rows says."""
    slow = ": emulated, so that it is slow beside the bus" if work["accelerator"] == "tcg" else ""
    return f"The guest: Linux {work['guest_kernel']}, {cpus}, accelerator {work['accelerator']}{slow}."


def sample_of(case: Case, kind: str, load: Load, told: Row, about: Mapping[str, Any]) -> Sample:
    """What a run says. UnequalWorkError when something was wrong, or the bus did not do what the guest asked for."""
    requests = told["requests"]
    work = {"requests": requests, "bytes": told["bytes"], "wrong": told["wrong"], **about}
    works: list[tuple[str, Mapping[str, Any]]] = [("the guest", work), ("what is right", {**work, "wrong": 0})]
    if case.work == "read":
        works.append(("the bus", {**work, "requests": told["bus"]["reads"]}))
    check_same_work(f"{case}, {kind}", works)
    vectors = {name: count for name, count in told["interrupts"].items() if name.startswith(("virtio", "vbus"))}
    others = {name: told["interrupts"].get(name, 0) for name in ("RES", "CAL")}
    values = {
        "seconds": told["seconds"],
        "per_second": requests / told["seconds"],
        "p50_us": told["p50_us"],
        "p99_us": told["p99_us"],
        "interrupts": sum(vectors.values()) / requests,
        "doorbells": told["bus"]["rung_to_device"] / requests,
        "cpu_us": (told["qemu_seconds"] + told["bus_seconds"]) * 1e6 / requests,
        "cpu_us_qemu": told["qemu_seconds"] * 1e6 / requests,
        "cpu_us_bus": told["bus_seconds"] * 1e6 / requests,
        "between_processors": sum(others.values()) / requests,
        **{f"bus_{name}": told["bus"][name] / requests for name in guest_machine.COUNTERS},
    }
    if kind in SIGNALS:
        values |= {f"guest_{name}": count / requests for name, count in told["counted"].items()}
    if load.service:
        values["service_us"] = load.service * 1e6
    return Sample(work, values)


MEASUREMENT = Exits()
