"""An urgent network and channel of a guest beside a bulk disk and a bulk network at full load, against an idle bus.

Questions and answers of 64 bytes go over a network that is the most urgent of the bus, or over an event channel that
is, one at a time: alone, and while the same guest reads a disk and streams over another network, both the least
urgent, as fast as they can. All devices are served by native engines; who answers on the channel is Python. Behind a
function of ivshmem priorities go all the way: an event ring, a doorbell and a vector each; virtio-pci is told of none,
and the bus alone prefers what is urgent.

Whoever asks in the guest has a real-time priority there, and who answers on the host, since schedulers are not what is
measured. For the same reason the guest's kernel may be preempted, and the guest has one processor: so that on a machine
of two, bulk load leaves one to the bus, the hypervisor and the other end of TCP. What each of these makes of it is
measured, too, one at a time: a kernel as Debian starts it, a guest of two processors, and bulk that is as urgent.
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
from vbus.bench.work import LEAST_URGENT
from vbus.errors import UsageError

MOST_P99 = 2.0
MOST_URGENT = 0
ENDLESS = 2_000_000
"""Requests of bulk load: more than there is time for."""
IDLE, BULK = "nothing", "bulk"
NETWORK, CHANNEL = "network", "channel"
PREEMPTIBLE, STOCK = "preemptible", "stock"
KERNELS = {PREEMPTIBLE: "preempt=full", STOCK: ""}
"""What the guest's kernel is told."""


@dataclass(frozen=True)
class PrioritiesPlan(Plan):
    """How much is measured."""

    requests: int = 3000
    depth: int = 16
    """Reads of the bulk disk that are under way."""


@dataclass(frozen=True)
class Case(Factors):
    """How the guest has its devices, which of them is asked, and what else matters: the guest, and bulk's priority."""

    signal: str
    asked: str = NETWORK
    cpus: int = 1
    kernel: str = PREEMPTIBLE
    bulk: int = LEAST_URGENT

    @property
    def guest(self) -> tuple[int, str, int]:
        """What a guest of its own is started for."""
        return self.cpus, self.kernel, self.bulk


OTHERS = {
    "equal": Case(TUNNELLED, bulk=MOST_URGENT),
    "equal_channel": Case(TUNNELLED, CHANNEL, bulk=MOST_URGENT),
    "stock": Case(TUNNELLED, kernel=STOCK),
    "stock_channel": Case(TUNNELLED, CHANNEL, kernel=STOCK),
    "two": Case(TUNNELLED, cpus=2),
    "two_channel": Case(TUNNELLED, CHANNEL, cpus=2),
}
"""What else matters, one at a time: a guest for each two."""


@dataclass(frozen=True)
class Variant(Factors):
    """What goes on meanwhile."""

    beside: str


FACTORS = """
That is a guest of one processor, all of which bulk load takes, with a kernel that may be preempted. One factor at a
time, behind tunnelled signals:

- **Bulk that is as urgent**: {equal:.2f} times over the network, {equal_channel:.2f} over the channel. That is what
  priorities are there against.
- **A kernel as Debian starts it** (`preempt=voluntary`): {stock:.2f} and {stock_channel:.2f} times. Whoever is in the
  middle of bulk work in the kernel ends that first, whatever has become ready meanwhile; no bus can do anything about
  it. `preempt=full` on the kernel's command line can.
- **A guest of two processors** on this machine of {host_cpus}: {two:.2f} and {two_channel:.2f} times. Bulk load takes
  both, and on them the guest's processors, the threads of the hypervisor, the bus and the other end of TCP wait for
  each other for a turn of the host's scheduler, which is milliseconds. Whoever serves something urgent should leave a
  CPU to it.
"""


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
it can. The 99th percentile of a question and its answer is {tunnelled:.2f} times that of an idle bus behind tunnelled
signals, {direct:.2f} times behind direct ones, and {pci:.2f} times on virtio-pci, where a queue's doorbell wakes its
worker itself, and that of a function the bus, which wakes the worker. Over an event channel that is as urgent, and that
a program in Python answers, it is {channel:.2f} and {channel_direct:.2f} times. At most {bar:g} times was wanted.
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
        self._guest: tuple[int, str, int] | None = None

    def plan(self, quick: bool) -> PrioritiesPlan:
        """How much is measured. UsageError: networks cannot be made here."""
        if not guest_machine.namespace():
            raise UsageError("a network namespace with a tap in it cannot be made here: run as root")
        return PrioritiesPlan(requests=100) if quick else PrioritiesPlan()

    def cases(self, plan: PrioritiesPlan) -> list[Case]:
        """The ways that a guest has devices, and behind one of them what else matters: a guest after the other."""
        ways = [Case(TUNNELLED), Case(DIRECT), Case(PCI), Case(TUNNELLED, CHANNEL), Case(DIRECT, CHANNEL)]
        return ways if plan.quick else [*ways, *OTHERS.values()]

    def variants(self, plan: PrioritiesPlan, case: Case) -> list[Variant]:
        """Alone, and beside bulk load."""
        return [Variant(IDLE), Variant(BULK)]

    def comparisons(self, plan: PrioritiesPlan, case: Case) -> list[Comparison[Variant]]:
        """What bulk load makes of it; virtio-pci knows no priorities, and who has the same none, so that there is no
        bar.
        """
        known = case.signal != PCI and case.bulk != MOST_URGENT
        bars = (Bar("p99_us", "p99", MOST_P99),) if known else ()
        return [Comparison(Variant(BULK), Variant(IDLE), bars)]

    def prepare(self, plan: PrioritiesPlan, folder: Path) -> None:
        """Where guests are; one is started when a case wants it."""
        self._folder = folder

    def _started(self, case: Case) -> GuestMachine:
        if self._machine is None or self._guest != case.guest:
            self.finish()
            append = KERNELS[case.kernel]
            self._machine = GuestMachine(self._folder, 1, 2, bulk=case.bulk, cpus=case.cpus, append=append)
            self._guest = case.guest
        return self._machine

    def finish(self) -> None:
        """End the guest."""
        if self._machine is not None:
            self._machine.close()
            self._machine = None

    def sample(self, plan: PrioritiesPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Ask, with or without something else."""
        machine = self._started(case)
        bulk = [Load("read", 1, plan.depth, ENDLESS), Load("stream", 1, 1, ENDLESS)]
        asked = Load("ask" if case.asked == NETWORK else "tell", 1, 1, plan.requests)
        told = machine.run(case.signal, asked, bulk if variant.beside == BULK else [])
        work = {key: told[key] for key in ("requests", "bytes", "wrong")}
        check_same_work(str(case), [("the guest", work), ("what is right", {**work, "wrong": 0})])
        work |= {"accelerator": machine.accelerator, "guest_kernel": machine.kernel}
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
        return [exits.about_guest(result["rows"][0]["work"], "as many CPUs as the tables say")]

    def numbers(self, result: Row) -> Mapping[str, Any]:
        """Of the comparisons."""
        ratios = _ratios(result)
        return {
            "depth": result["options"]["depth"],
            "tunnelled": ratios[Case(TUNNELLED)],
            "direct": ratios[Case(DIRECT)],
            "pci": ratios[Case(PCI)],
            "channel": ratios[Case(TUNNELLED, CHANNEL)],
            "channel_direct": ratios[Case(DIRECT, CHANNEL)],
            "bar": MOST_P99,
        }

    def words(self, result: Row) -> str:
        """Of the ways that a guest has devices, and of what else matters where that was measured."""
        words = super().words(result)
        ratios = _ratios(result)
        if not all(case in ratios for case in OTHERS.values()):
            return words
        return words + FACTORS.format(
            host_cpus=result["machine"]["cpus"], **{name: ratios[case] for name, case in OTHERS.items()}
        )


def _ratios(result: Row) -> dict[Case, float]:
    """What bulk load makes of the 99th percentile, by case."""
    return {Case(**row["case"]): row["ratios"]["p99_us"] for row in result["comparisons"]}


MEASUREMENT = Priorities()
