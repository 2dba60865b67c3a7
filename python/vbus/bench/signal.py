"""Doorbells, CPU time and latency a request: `tunnelled` signals against `direct` ones, EVENT_IDX off and on.

What is measured is a list of *cases*: so much load on so many devices, or an urgent device beside a bulk load. A case
has its *variants*, which differ in how signals travel and in nothing else, and each run of a variant is a *sample*: two
fresh processes, a bus with devices and a driver of all of them, a warm-up, and a window in which both count. Consumers
of both kinds sleep when they are idle: neither polls.

A doorbell is a write to an eventfd that the other side sleeps on: in a virtual machine, an exit or an interrupt. Fewer
of them are worth nothing when they were saved by making requests wait. So a comparison counts only where `tunnelled`
does at least 0.95 of the requests a second that `direct` does, with a 99th percentile of at most 1.1 of its latency.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children, machine, measure
from vbus.bench.measure import Summary
from vbus.bench.work import LEAST_URGENT, URGENT, load_names, used_between

LEAST_THROUGHPUT = 0.95
MOST_P99 = 1.1
KINDS = ("direct", "tunnelled")
PRIORITY = 4
"""Of devices where none is more urgent than another."""
SEED = 20090716
"""Of what happens at random: the same in all samples."""

Row = dict[str, Any]
Say = Callable[[int, int, str], None]
"""Told before each sample: its number from 0, how many there are, what it is."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. Sizes in bytes; counts are of all devices together unless said."""

    rounds: int = 5
    devices: tuple[int, ...] = (1, 4, 16)
    depth: int = 16
    """Requests of each device that are outstanding under load."""
    size: int = 64
    """Bytes of a request, and of its answer."""
    requests: int = 131072
    """In a window under load; a multiple of every number of devices."""
    warm_up: int = 8192
    paced_requests: int = 2000
    paced_rate: float = 2000
    """A second."""
    urgent_requests: int = 500
    urgent_pause: float = 0.002
    """Seconds between an answer and the next request, on average."""
    bulk_devices: int = 16


def quick_plan(rounds: int) -> Plan:
    """Enough to see that everything works, and too little to believe the figures."""
    return Plan(
        rounds=rounds,
        devices=(1, 4),
        requests=1024,
        warm_up=64,
        paced_requests=100,
        urgent_requests=20,
        urgent_pause=0.001,
        bulk_devices=4,
    )


@dataclass(frozen=True)
class Variant:
    """How signals travel."""

    signal: str
    event_idx: bool

    def __str__(self) -> str:
        return f"{self.signal}, EVENT_IDX {'on' if self.event_idx else 'off'}"


@dataclass(frozen=True)
class Case:
    """What is asked of the devices, alike for all variants.

    `load` is "saturated" or "paced", with `devices` of one priority; or "urgent", with an urgent device of `priority`
    beside `devices` that are the least urgent, and saturated.
    """

    load: str
    devices: int
    priority: int = PRIORITY

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What is compared in this case."""
        masks = (True,) if self.load == "urgent" else (False, True)
        return tuple(Variant(kind, event_idx) for event_idx in masks for kind in KINDS)

    @property
    def priorities(self) -> dict[str, int]:
        """The devices on the bus, and how urgent they are."""
        if self.load != "urgent":
            return dict.fromkeys(load_names(self.devices), PRIORITY)
        return {URGENT: self.priority} | dict.fromkeys(load_names(self.devices), LEAST_URGENT)

    def __str__(self) -> str:
        if self.load != "urgent":
            return f"{self.load}, devices: {self.devices}"
        return f"urgent device of priority {self.priority} beside {self.devices} under load"


def cases_of(plan: Plan) -> list[Case]:
    """What is measured. The last case is a control: it tells what priorities alone are good for."""
    return [
        *(Case(load, devices) for load in ("saturated", "paced") for devices in plan.devices),
        Case("urgent", 0, 0),
        Case("urgent", plan.bulk_devices, 0),
        Case("urgent", plan.bulk_devices, LEAST_URGENT),
    ]


@dataclass(frozen=True)
class Sample:
    """One run of a variant: what was done, and what it took."""

    work: Mapping[str, Any]
    """Alike for all variants of a case, or there is no comparison."""
    values: Mapping[str, float]


# One sample.


def take_sample(plan: Plan, case: Case, variant: Variant, folder: Path) -> Sample:
    """Run one variant once. SideError when a side fails, UnequalWorkError when the sides counted different things."""
    with children.Child("vbus.bench.bus_side") as bus, children.Child("vbus.bench.driver_side") as driver:
        address = bus.ask(
            "serve",
            socket=str(folder / "bench.sock"),
            signal=variant.signal,
            event_idx=variant.event_idx,
            devices=case.priorities,
        )
        negotiated = driver.ask("attach", address=address)
        if negotiated != dict.fromkeys(case.priorities, variant.event_idx):
            raise children.SideError(f"EVENT_IDX was negotiated otherwise than asked for: {negotiated}")
        each = max(plan.warm_up // len(case.priorities), 1)
        driver.ask("saturate", each=each, depth=plan.depth, size=plan.size)
        before = bus.ask("begin")
        told = _offer(plan, case, driver)
        after = bus.ask("end")
    return sample_of(case, before, told, after)


def _offer(plan: Plan, case: Case, driver: children.Child) -> dict[str, Any]:
    if case.load == "saturated":
        each = plan.requests // case.devices
        told = driver.ask("saturate", each=each, depth=plan.depth, size=plan.size)
    elif case.load == "paced":
        total, rate = plan.paced_requests, plan.paced_rate
        told = driver.ask("pace", total=total, rate=rate, size=plan.size, seed=SEED)
    else:
        told = driver.ask(
            "urgent",
            total=plan.urgent_requests,
            pause=plan.urgent_pause,
            size=plan.size,
            depth=plan.depth if case.devices else 0,
            seed=SEED,
        )
    answer: dict[str, Any] = told
    return answer


def sample_of(case: Case, before: Row, told: Row, after: Row) -> Sample:
    """What a sample says, from the bus's counters before and after a window, and from the driver's account of it."""
    done = {
        name: {key: row[key] - before["rows"][name][key] for key in ("requests", "bytes_read", "bytes_written")}
        for name, row in after["rows"].items()
    }
    _check_both_sides(case, done, told["work"] | told.get("bulk", {}))
    requests = sum(work["requests"] for work in told["work"].values())
    values: dict[str, float] = {
        "seconds": told["seconds"],
        "requests_per_second": requests / told["seconds"],
        "p50_us": told["p50_us"],
        "p99_us": told["p99_us"],
        "max_us": told["max_us"],
    }
    if case.load == "urgent":
        values["bulk_requests_per_second"] = told["bulk_requests"] / told["seconds"]
    else:
        for way in ("to_device", "to_driver"):
            for counter, called in (("signalled", "signals"), ("sent", "events"), ("rung", "doorbells")):
                count = sum(
                    row[way][counter] - before["rows"][name][way][counter] for name, row in after["rows"].items()
                )
                values[f"{called}_{way}"] = count / requests
        values["doorbells"] = values["doorbells_to_device"] + values["doorbells_to_driver"]
        used = {"bus": used_between(before["usage"], after["usage"]), "driver": told["usage"]}
        for side, spent in used.items():
            values[f"cpu_us_{side}"] = (spent["user"] + spent["system"]) * 1e6 / requests
            values[f"cpu_us_{side}_system"] = spent["system"] * 1e6 / requests
            values[f"sleeps_{side}"] = spent["sleeps"] / requests
        values["cpu_us"] = values["cpu_us_bus"] + values["cpu_us_driver"]
    return Sample(told["work"], values)


def _check_both_sides(case: Case, done: Mapping[str, Row], asked: Mapping[str, Row]) -> None:
    """UnequalWorkError unless the bus did what the driver asked for, of every device, and every answer was right."""
    seen = {
        name: {"requests": row["requests"], "bytes_sent": row["bytes_read"], "bytes_received": row["bytes_written"]}
        for name, row in done.items()
        if row["requests"] or name in asked
    }
    for name in sorted({*seen, *asked}):
        right = dict(seen.get(name, {}), wrong=0)
        measure.check_same_work(f"{case}, {name}", [("the bus", right), ("the driver", asked.get(name, {}))])


# All samples.


def run(plan: Plan, say: Say = lambda number, count, what: None) -> Row:
    """Measure everything; what `vbus bench signal --json` prints. UnequalWorkError, SideError."""
    cases = cases_of(plan)
    count = sum(len(case.variants) for case in cases) * plan.rounds
    began, busy = time.time(), machine.load_average()
    number = 0
    results: dict[Case, dict[Variant, list[Sample]]] = {}
    with tempfile.TemporaryDirectory(prefix="vbus-bench-") as folder:
        for case in cases:

            def sample(_: int, variant: Variant, case: Case = case) -> Sample:
                nonlocal number
                say(number, count, f"{case}: {variant}")
                number += 1
                return take_sample(plan, case, variant, Path(folder))

            results[case] = measure.run_alternately(case.variants, plan.rounds, sample)
            check_samples(case, results[case])
    return {
        "benchmark": "signal",
        "machine": machine.describe(),
        "load_average": {"before": busy, "after": machine.load_average()},
        "began": began,
        "seconds": time.time() - began,
        "options": asdict(plan),
        "rows": [row for case, samples in results.items() for row in rows_of(case, samples)],
        "comparisons": [row for case, samples in results.items() for row in comparisons_of(case, samples)],
    }


def check_samples(case: Case, samples: Mapping[Variant, Sequence[Sample]]) -> None:
    """UnequalWorkError unless all samples of a case did the same."""
    works = [
        (
            f"{variant}, round {number}",
            {f"{name} {key}": n for name, done in sample.work.items() for key, n in done.items()},
        )
        for variant, taken in samples.items()
        for number, sample in enumerate(taken, 1)
    ]
    measure.check_same_work(str(case), works)


def _named(case: Case) -> Row:
    named: Row = {"load": case.load, "devices": case.devices}
    return named | ({"priority": case.priority} if case.load == "urgent" else {})


def rows_of(case: Case, samples: Mapping[Variant, Sequence[Sample]]) -> list[Row]:
    """A row a variant: medians, smallest and largest, and what every round gave."""
    rows = []
    for variant, taken in samples.items():
        summary = measure.summarise([sample.values for sample in taken])
        rows.append(
            {
                **_named(case),
                **asdict(variant),
                "requests": sum(done["requests"] for done in taken[0].work.values()),
                "bytes": sum(done["bytes_sent"] + done["bytes_received"] for done in taken[0].work.values()),
                "median": {key: value.median for key, value in summary.items()},
                "spread": {key: [value.low, value.high] for key, value in summary.items()},
                "rounds": [dict(sample.values) for sample in taken],
            }
        )
    return rows


def comparisons_of(case: Case, samples: Mapping[Variant, Sequence[Sample]]) -> list[Row]:
    """A row for each setting of EVENT_IDX: ratios of `tunnelled` to `direct`, and whether they count."""
    rows = []
    for variant, taken in samples.items():
        if variant.signal != "tunnelled":
            continue
        base = samples[Variant("direct", variant.event_idx)]
        found = measure.ratios([sample.values for sample in taken], [sample.values for sample in base])
        why = objections(found)
        rows.append(
            {
                **_named(case),
                "event_idx": variant.event_idx,
                "ratios": {key: value.median if value else None for key, value in found.items()},
                "spread": {key: [value.low, value.high] if value else None for key, value in found.items()},
                "counts": not why,
                "why": why,
            }
        )
    return rows


def objections(found: Mapping[str, Summary | None]) -> list[str]:
    """Why ratios do not count: what was lost for what they save."""
    why = []
    for key, what in (("requests_per_second", "requests/s"), ("bulk_requests_per_second", "bulk requests/s")):
        ratio = found.get(key)
        if ratio is not None and ratio.median < LEAST_THROUGHPUT:
            why.append(f"{what} {ratio.median:.3f}x, less than {LEAST_THROUGHPUT}x")
    p99 = found.get("p99_us")
    if p99 is not None and p99.median > MOST_P99:
        why.append(f"p99 {p99.median:.3f}x, more than {MOST_P99}x")
    return why
