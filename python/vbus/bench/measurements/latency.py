"""How long one request takes that is alone: from a native driver's process to a device in Python, and back.

The driver polls for the answer, or sleeps on the queue's doorbell; the device's side sleeps while it has nothing, for
nothing in Python polls. So either way each request wakes the device's side, and rings a doorbell to do so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children, harness, measure
from vbus.bench.measurement import Comparison, Factors, Figure, Measurement, Plan, Sample

Row = dict[str, Any]
NAME = "echo"
SIZE = 64
"""Bytes of a request, and of its answer."""
NOTIFIED, POLLED = "notified", "polled"
SPLIT, PACKED = "split", "packed"


@dataclass(frozen=True)
class LatencyPlan(Plan):
    """How much is measured."""

    requests: int = 20_000
    warm_up: int = 1000


@dataclass(frozen=True)
class Case(Factors):
    """How the driver waits for an answer."""

    wait: str


@dataclass(frozen=True)
class Variant(Factors):
    """The ring's layout."""

    ring: str


class Latency(Measurement[LatencyPlan, Case, Variant]):
    """One request at a time."""

    name = "latency"
    title = "Latency: one request at a time"
    template = """\
A request of {size} bytes to a device in another process, written in Python, is answered after {notified:.1f} us
(median; 99 of 100 within {notified_p99:.1f} us) when both sides sleep while they wait, and after {polled:.1f} us
({polled_p99:.1f} us) when the driver polls. Most of it is the kernel's, which wakes a sleeper: one on the way there,
and when the driver sleeps, one on the way back. Through a packed ring it takes {packed:.2f} times as long as through a
split one.
"""
    figures = (
        Figure("p50_us", "P50", "microseconds", digits=1, compared=True, plotted=True),
        Figure("p99_us", "P99", "microseconds", digits=1, compared=True, plotted=True),
    )

    def plan(self, quick: bool) -> LatencyPlan:
        """How much is measured."""
        return LatencyPlan(requests=500, warm_up=50) if quick else LatencyPlan()

    def cases(self, plan: LatencyPlan) -> list[Case]:
        """Both ways of waiting."""
        return [Case(NOTIFIED), Case(POLLED)]

    def variants(self, plan: LatencyPlan, case: Case) -> list[Variant]:
        """Both layouts."""
        return [Variant(SPLIT), Variant(PACKED)]

    def comparisons(self, plan: LatencyPlan, case: Case) -> list[Comparison[Variant]]:
        """One layout against the other."""
        return [Comparison(Variant(PACKED), Variant(SPLIT))]

    def sample(self, plan: LatencyPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """A bus with one device, and its driver."""
        with children.Child("vbus.bench.bus_side") as bus, children.Child("vbus.bench.driver_side") as driver:
            address = bus.ask(
                "serve", socket=str(folder / "bench.sock"), signal="direct", event_idx=True, devices={NAME: 0}
            )
            driver.ask("attach", address=address, packed=variant.ring == PACKED)
            shape = {"name": NAME, "depth": 1, "readable": SIZE, "writable": SIZE, "written": SIZE}
            driver.ask("load", total=plan.warm_up, polled=case.wait == POLLED, **shape)
            before = bus.ask("begin")["rows"][NAME]
            told = driver.ask("load", total=plan.requests, polled=case.wait == POLLED, **shape)
            after = bus.ask("end")["rows"][NAME]
        names = {"requests": "requests", "bytes_sent": "bytes_read", "bytes_received": "bytes_written"}
        done = {said: after[counted] - before[counted] for said, counted in names.items()}
        asked = {said: told[said] for said in names}
        measure.check_same_work(f"{case}, {variant}", [("the bus", done), ("the driver", asked)])
        work = asked | {"checksum": told["checksum"]}
        return Sample(work, {key: told[key] for key in ("p50_us", "p99_us", "max_us")})

    def numbers(self, result: Row) -> dict[str, float]:
        """What the page says: of split rings, and of both when notified."""
        numbers: dict[str, float] = {"size": SIZE}
        for wait in (NOTIFIED, POLLED):
            median = harness.find(result["rows"], wait=wait, ring=SPLIT)["median"]
            numbers[wait], numbers[f"{wait}_p99"] = median["p50_us"], median["p99_us"]
        [row] = [row for row in result["comparisons"] if row["case"]["wait"] == NOTIFIED]
        return numbers | {"packed": row["ratios"]["p50_us"]}


MEASUREMENT = Latency()
