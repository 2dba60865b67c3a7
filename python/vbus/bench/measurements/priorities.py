"""An urgent network and channel of a guest beside a bulk disk and a bulk network at full load, against an idle bus.

Questions and answers of 64 bytes go over a network that is the most urgent of the bus, or over an event channel that
is, one at a time: alone, and while the same guest reads a disk and streams over another network, both the least
urgent, as fast as they can. All devices are served by native engines; who answers on the channel is Python. Behind a
function of ivshmem priorities go all the way: an event ring, a doorbell and a vector each; virtio-pci is told of none,
and the bus alone prefers what is urgent.

Whoever asks in the guest has a real-time priority there, since the guest's scheduler is not what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import guest_machine
from vbus.bench.guest_machine import GuestMachine, Load
from vbus.bench.guest_side import DIRECT, PCI, TUNNELLED
from vbus.bench.measure import check_same_work
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Row, Sample
from vbus.bench.measurements import exits
from vbus.errors import UsageError

MOST_P99 = 2.0
ENDLESS = 2_000_000
"""Requests of bulk load: more than there is time for."""
IDLE, BULK = "nothing", "bulk"
NETWORK, CHANNEL = "network", "channel"


@dataclass(frozen=True)
class PrioritiesPlan(Plan):
    """How much is measured."""

    requests: int = 3000
    depth: int = 16
    """Reads of the bulk disk that are under way."""


@dataclass(frozen=True)
class Case(Factors):
    """How the guest has its devices, and which of them is asked."""

    signal: str
    asked: str = NETWORK


@dataclass(frozen=True)
class Variant(Factors):
    """What goes on meanwhile."""

    beside: str


class Priorities(Measurement[PrioritiesPlan, Case, Variant]):
    """An urgent network and channel."""

    name = "priorities"
    title = "Priorities: an urgent network and channel of a guest beside bulk load"
    page_head = """\
# Priorities in a guest

What an urgent device or channel of a guest notices of bulk load, measured by `vbus bench priorities`. This page is
generated (`vbus bench report`) from the JSON beside it.
"""
    template = """\
Questions of 64 bytes go over the most urgent network of the bus, and come back from the host, one at a time; meanwhile
the guest reads a disk with {depth} reads under way and streams over another network, both the least urgent, as fast as
they can. The 99th percentile of a question and its answer is {tunnelled:.2f} times that of an idle bus behind tunnelled
signals, {direct:.2f} times behind direct ones, and {pci:.2f} times on virtio-pci. Over an event channel that is as
urgent, and that a program in Python answers, it is {channel:.2f} and {channel_direct:.2f} times. At most {bar:g} times
was wanted.

Guest, hypervisor, the bus and the other end of TCP share the machine's CPUs here, and bulk load takes all that there
are: so the figures hold the wait for a CPU, too.
"""
    figures = (
        Figure("p50_us", "P50", "microseconds", compared=True, plotted=True),
        Figure("p99_us", "P99", "microseconds", compared=True, plotted=True),
        Figure("per_second", "REQUESTS/S", "requests a second"),
        Figure("bulk_reads", "BULK READS/S", "reads a second"),
        Figure("bulk_mb", "BULK MB/S", "MB a second", 1),
    )
    needs = exits.Exits.needs

    def __init__(self) -> None:
        self._machine: GuestMachine | None = None

    def plan(self, quick: bool) -> PrioritiesPlan:
        """How much is measured. UsageError: networks cannot be made here."""
        if not guest_machine.namespace():
            raise UsageError("a network namespace with a tap in it cannot be made here: run as root")
        return PrioritiesPlan(requests=100) if quick else PrioritiesPlan()

    def cases(self, plan: PrioritiesPlan) -> list[Case]:
        """The ways that a guest has devices."""
        return [Case(TUNNELLED), Case(DIRECT), Case(PCI), Case(TUNNELLED, CHANNEL), Case(DIRECT, CHANNEL)]

    def variants(self, plan: PrioritiesPlan, case: Case) -> list[Variant]:
        """Alone, and beside bulk load."""
        return [Variant(IDLE), Variant(BULK)]

    def comparisons(self, plan: PrioritiesPlan, case: Case) -> list[Comparison[Variant]]:
        """What bulk load makes of it; virtio-pci knows no priorities, so that there is no bar."""
        bars = () if case.signal == PCI else (Bar("p99_us", "p99", MOST_P99),)
        return [Comparison(Variant(BULK), Variant(IDLE), bars)]

    def prepare(self, plan: PrioritiesPlan, folder: Path) -> None:
        """Start the guest."""
        self._machine = GuestMachine(folder, 1, 2, urgent=True)

    def finish(self) -> None:
        """End the guest."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def sample(self, plan: PrioritiesPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Ask, with or without something else."""
        assert self._machine is not None
        bulk = [Load("read", 1, plan.depth, ENDLESS), Load("stream", 1, 1, ENDLESS)]
        asked = Load("ask" if case.asked == NETWORK else "tell", 1, 1, plan.requests)
        told = self._machine.run(case.signal, asked, bulk if variant.beside == BULK else [])
        work = {key: told[key] for key in ("requests", "bytes", "wrong")}
        check_same_work(str(case), [("the guest", work), ("what is right", {**work, "wrong": 0})])
        work |= {"accelerator": self._machine.accelerator, "guest_kernel": self._machine.kernel}
        # Bulk load begins before, and ends a little after.
        seconds = told["seconds"]
        values = {
            "seconds": seconds,
            "per_second": told["requests"] / seconds,
            "p50_us": told["p50_us"],
            "p99_us": told["p99_us"],
            "bulk_reads": told["bus"]["reads"] / told["wall_seconds"],
            "bulk_mb": told["bus"]["sent_bytes"] / told["wall_seconds"] / 1e6,
        }
        return Sample(work, values)

    def notes(self, result: Row) -> list[str]:
        """The accelerator."""
        return [exits.about_guest(result)]

    def numbers(self, result: Row) -> Mapping[str, Any]:
        """Of the comparisons."""
        found = {tuple(row["case"].values()): row["ratios"]["p99_us"] for row in result["comparisons"]}
        return {
            "depth": result["options"]["depth"],
            "tunnelled": found[TUNNELLED, NETWORK],
            "direct": found[DIRECT, NETWORK],
            "pci": found[PCI, NETWORK],
            "channel": found[TUNNELLED, CHANNEL],
            "channel_direct": found[DIRECT, CHANNEL],
            "bar": MOST_P99,
        }


MEASUREMENT = Priorities()
