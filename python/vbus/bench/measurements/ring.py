"""Round trips through a ring, one at a time, against what they are made of.

Two processes, each on a CPU of its own, hand a value to and fro: the driver writes it into a line of data and makes a
request of it, the device reads it and uses the request. *Notified*, both sides sleep on an eventfd while there is
nothing, and the measure is two eventfds without a ring. *Polled*, the measures are a cache line in each direction, and
rings of both layouts that touch the same lines, check nothing and ask for nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus import _core
from vbus.bench import children, harness, measure
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Sample
from vbus.errors import UsageError
from vbus.shmem.area import sealed_memfd

Row = dict[str, Any]
NOTIFIED, POLLED = "notified", "polled"
EVENTFD, LINE = "eventfd", "line"
SPLIT, PACKED = "split", "packed"
BARE = {SPLIT: "bare split", PACKED: "bare packed"}
MOST_NOTIFIED = 1.5
MOST_OF_A_LINE = {SPLIT: 5.0, PACKED: 4.0}
MOST_OF_BARE = 1.4


@dataclass(frozen=True)
class RingPlan(Plan):
    """How much is measured."""

    rounds: int = 15
    """More, and shorter ones: on two CPUs that are not always the same two of their machine, a round trip takes one of
    several times, and the next run another.
    """
    notified: int = 20_000
    """Round trips; each is timed."""
    polled: int = 1_000_000
    block: int = 100
    """Polled round trips that are timed together: one is not much longer than a look at the clock."""
    warm_up: int = 10
    """One of so many round trips more, before."""


@dataclass(frozen=True)
class Case(Factors):
    """How a side waits for the other."""

    wait: str


@dataclass(frozen=True)
class Variant(Factors):
    """What a value travels through."""

    through: str


class Ring(Measurement[RingPlan, Case, Variant]):
    """A ring against what it is made of."""

    name = "ring"
    title = "Rings: a round trip against what it is made of"
    template = """\
A round trip between two processes takes {eventfd:.0f} ns through two eventfds and nothing else, and through a ring,
with its checks, its memory barriers and its suppression of notifications, {split_notified:.2f} times as long (split) or
{packed_notified:.2f} times (packed). Where both sides poll, a cache line to and fro takes {line:.0f} ns, and a ring
{split_line:.1f} times as long (split) or {packed_line:.1f} times (packed): it has more lines to move, those of the
descriptor, of both indices and of the data. That much is the layout's; what we add by checking everything, and by
asking for silence, shows against rings that move the same lines and believe what they read: {split_bare:.2f} times
(split) and {packed_bare:.2f} times (packed).
"""
    figures = (
        Figure("p50_ns", "P50", "nanoseconds", compared=True, plotted=True),
        Figure("p99_ns", "P99", "nanoseconds", compared=True),
        Figure("mean_ns", "MEAN", "nanoseconds"),
    )

    def plan(self, quick: bool) -> RingPlan:
        """How much is measured."""
        return RingPlan(notified=2000, polled=20_000) if quick else RingPlan()

    def cases(self, plan: RingPlan) -> list[Case]:
        """Both ways of waiting."""
        return [Case(NOTIFIED), Case(POLLED)]

    def variants(self, plan: RingPlan, case: Case) -> list[Variant]:
        """Rings, and what they are held against."""
        bare = [EVENTFD] if case.wait == NOTIFIED else [LINE, *BARE.values()]
        return [Variant(through) for through in (*bare, SPLIT, PACKED)]

    def comparisons(self, plan: RingPlan, case: Case) -> list[Comparison[Variant]]:
        """Each ring against the bare exchange, and against the bare ring of its layout."""
        found = []
        for layout in (SPLIT, PACKED):
            ring = Variant(layout)
            if case.wait == NOTIFIED:
                found.append(Comparison(ring, Variant(EVENTFD), (_bar(MOST_NOTIFIED),)))
            else:
                found.append(Comparison(ring, Variant(LINE), (_bar(MOST_OF_A_LINE[layout]),)))
                found.append(Comparison(ring, Variant(BARE[layout]), (_bar(MOST_OF_BARE),)))
        return found

    def sample(self, plan: RingPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Two processes, a warm-up, and the round trips. UsageError: one CPU is not enough."""
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise UsageError("round trips between two processes need two CPUs: let this process run on more than one")
        fds = [sealed_memfd("vbus-bench", _core.PingSide.bytes_needed()), os.eventfd(0), os.eventfd(0)]
        told = {"way": variant.through, "notified": case.wait == NOTIFIED}
        told |= dict(zip(("area", "kick", "call"), fds, strict=True))
        count, block = (plan.notified, 1) if case.wait == NOTIFIED else (plan.polled, plan.block)
        try:
            with (
                children.Child("vbus.bench.ring_side", fds) as driver,
                children.Child("vbus.bench.ring_side", fds) as device,
            ):
                places = driver.ask("begin", cpu=cpus[0], **told)
                device.ask("answer", cpu=cpus[1], places=places, **told)
                for rounds in (count // plan.warm_up // block * block, count):
                    device.tell("run", count=rounds, block=block)
                    driver.tell("run", count=rounds, block=block)
                    said, heard = driver.hear(), device.hear()
        finally:
            for fd in fds:
                os.close(fd)
        keys = ("round_trips", "checksum")
        works = [(side, {key: did[key] for key in keys}) for side, did in (("the driver", said), ("the device", heard))]
        measure.check_same_work(f"{case}, {variant}", works)
        values = {key: said[key] for key in ("p50_ns", "p99_ns")}
        return Sample(works[0][1], values | {"mean_ns": said["seconds"] / said["round_trips"] * 1e9})

    def numbers(self, result: Row) -> dict[str, float]:
        """What the page says."""
        numbers = {name: harness.find(result["rows"], through=name)["median"]["p50_ns"] for name in (EVENTFD, LINE)}
        names = {EVENTFD: "notified", LINE: "line", BARE[SPLIT]: "bare", BARE[PACKED]: "bare"}
        for row in result["comparisons"]:
            numbers[f"{row['of']['through']}_{names[row['against']['through']]}"] = row["ratios"]["p50_ns"]
        return numbers


def _bar(most: float) -> Bar:
    return Bar("p50_ns", "median", most)


MEASUREMENT = Ring()
