"""Doorbells, CPU time and latency a request: `tunnelled` signals against `direct` ones, EVENT_IDX off and on.

What is measured is a list of *cases*: so much load on so many devices, or an urgent device beside a bulk load. A case
has its *variants*, which differ in how signals travel and in nothing else, and each run of a variant is a *sample*: two
fresh processes, a bus with devices and a driver of all of them, a warm-up, and a window in which both count. Consumers
of both kinds sleep when they are idle: neither polls.

A doorbell is a write to an eventfd that the other side sleeps on: in a virtual machine, an exit or an interrupt. Fewer
of them are worth nothing when they were saved by making requests wait. So a comparison counts only where `tunnelled`
does at least 0.95 of the requests a second that `direct` does, with a 99th percentile of at most 1.1 of its latency,
and no more CPU time a request.

Bars are set where nothing but the way of signals can save a doorbell: many devices, each with one request outstanding.
There EVENT_IDX has nothing to suppress, for a queue that has just been served is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children, measure
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Sample
from vbus.bench.measurements import signal_picture
from vbus.bench.tables import Table, cell, spread, verdict
from vbus.bench.work import LEAST_URGENT, URGENT, load_names, used_between

LEAST_THROUGHPUT = 0.95
MOST_P99 = 1.1
KINDS = ("direct", "tunnelled")
PRIORITY = 4
"""Of devices where none is more urgent than another."""
SEED = 20090716
"""Of what happens at random: the same in all samples."""

GUARDS = (
    Bar("requests_per_second", "requests/s", LEAST_THROUGHPUT, at_least=True),
    Bar("bulk_requests_per_second", "bulk requests/s", LEAST_THROUGHPUT, at_least=True),
    Bar("p99_us", "p99", MOST_P99),
)
SINGLE_GUARDS = (*GUARDS, Bar("cpu_us", "CPU time", 1.0))
SINGLE_BARS = {
    "tunnelled, EVENT_IDX off": (Bar("doorbells", "doorbells", 0.1),),
    "tunnelled, EVENT_IDX on": (Bar("doorbells", "doorbells", 0.5),),
}
"""Against `direct` with the same EVENT_IDX."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SignalPlan(Plan):
    """How much is measured. Sizes in bytes; counts are of all devices together unless said."""

    devices: tuple[int, ...] = (1, 4, 16)
    depth: int = 16
    """Requests of each device that are outstanding under load."""
    size: int = 64
    """Bytes of a request, and of its answer."""
    requests: int = 131072
    """In a window under load; a multiple of every number of devices."""
    single_devices: int = 16
    """How many have one request outstanding each."""
    single_requests: int = 65536
    """In that window; a multiple of `single_devices`."""
    warm_up: int = 8192
    paced_requests: int = 2000
    paced_rate: float = 2000
    """A second."""
    urgent_requests: int = 500
    urgent_pause: float = 0.002
    """Seconds between an answer and the next request, on average."""
    bulk_devices: int = 16


def quick_plan() -> SignalPlan:
    """Enough to see that everything works, and too little to believe the figures."""
    return SignalPlan(
        devices=(1, 4),
        requests=1024,
        single_devices=4,
        single_requests=512,
        warm_up=64,
        paced_requests=100,
        urgent_requests=20,
        urgent_pause=0.001,
        bulk_devices=4,
    )


@dataclass(frozen=True)
class Variant(Factors):
    """How signals travel."""

    signal: str
    event_idx: bool

    def __str__(self) -> str:
        return f"{self.signal}, EVENT_IDX {'on' if self.event_idx else 'off'}"


@dataclass(frozen=True)
class Case(Factors):
    """What is asked of the devices, alike for all variants.

    `load` is "saturated", "single" (one request of each outstanding) or "paced", with `devices` of one priority; or
    "urgent", with an urgent device of `priority` beside `devices` that are the least urgent, and saturated.
    """

    load: str
    devices: int
    priority: int = PRIORITY

    def factors(self) -> Row:
        """Without a priority where all have the same."""
        found = asdict(self)
        return found if self.load == "urgent" else {key: found[key] for key in ("load", "devices")}

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


# One sample.


def take_sample(plan: SignalPlan, case: Case, variant: Variant, folder: Path) -> Sample:
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
        depth = 1 if case.load == "single" else plan.depth
        driver.ask("saturate", each=each, depth=depth, size=plan.size)
        before = bus.ask("begin")
        told = _offer(plan, case, driver)
        after = bus.ask("end")
    return sample_of(case, before, told, after)


def _offer(plan: SignalPlan, case: Case, driver: children.Child) -> dict[str, Any]:
    if case.load == "saturated":
        each = plan.requests // case.devices
        told = driver.ask("saturate", each=each, depth=plan.depth, size=plan.size)
    elif case.load == "single":
        told = driver.ask("saturate", each=plan.single_requests // case.devices, depth=1, size=plan.size)
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
    done_by_driver = told["work"].values()
    totals = {key: sum(work[key] for work in done_by_driver) for key in ("requests", "bytes_sent", "bytes_received")}
    return Sample(totals | told["work"], values)


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


# The measurement.


class Signal(Measurement[SignalPlan, Case, Variant]):
    """Tunnelled signals against direct ones."""

    name = "signal"
    title = "Signals: tunnelled against direct"
    template = """\
A doorbell is a write to an eventfd that the other side sleeps on: in a virtual machine, an exit or an interrupt. Here
devices and drivers in Python exchange requests of {size} bytes through split rings. What differs is how one side tells
the other: by an eventfd a queue (`direct`), or by events in rings of shared memory that wake a sleeper once
(`tunnelled`). Consumers of both kinds sleep when they are idle.

With {singles} devices of which each has one request outstanding, tunnelled signals ring {single_plain:.3f} times as
often as direct ones without EVENT_IDX, and {single_event_idx:.3f} times as often with it, which has nothing to suppress
there. With {devices} devices that have {depth} outstanding each, it is {plain:.3f} and {event_idx:.2f}.

A saving counts only where throughput is at least {throughput:g}x and the 99th percentile at most {p99:g}x of the other
side's; where it does not, we lose, and the table says so.
"""
    figures = (
        Figure("requests_per_second", "REQUESTS/S"),
        Figure("doorbells_to_device", "BELLS TO DEVICE", digits=3),
        Figure("doorbells_to_driver", "TO DRIVER", digits=3),
        Figure("cpu_us_bus", "CPU OF BUS", digits=1),
        Figure("cpu_us_driver", "OF DRIVER", digits=1),
        Figure("p50_us", "P50"),
        Figure("p99_us", "P99"),
    )

    def plan(self, quick: bool) -> SignalPlan:
        """How much is measured."""
        return quick_plan() if quick else SignalPlan()

    def cases(self, plan: SignalPlan) -> list[Case]:
        """What is measured. The last case is a control: it tells what priorities alone are good for."""
        return [
            *(Case("saturated", devices) for devices in plan.devices),
            Case("single", plan.single_devices),
            *(Case("paced", devices) for devices in plan.devices),
            Case("urgent", 0, 0),
            Case("urgent", plan.bulk_devices, 0),
            Case("urgent", plan.bulk_devices, LEAST_URGENT),
        ]

    def variants(self, plan: SignalPlan, case: Case) -> tuple[Variant, ...]:
        """Both ways of signals, EVENT_IDX off and on."""
        return case.variants

    def comparisons(self, plan: SignalPlan, case: Case) -> list[Comparison[Variant]]:
        """Tunnelled against direct, for each setting of EVENT_IDX."""
        single = case.load == "single"
        return [
            Comparison(
                variant,
                Variant("direct", variant.event_idx),
                bars=SINGLE_BARS[str(variant)] if single else (),
                guards=SINGLE_GUARDS if single else GUARDS,
            )
            for variant in case.variants
            if variant.signal == "tunnelled"
        ]

    def sample(self, plan: SignalPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Run one variant once."""
        return take_sample(plan, case, variant, folder)

    def draw(self, result: Row) -> str:
        """The picture."""
        return signal_picture.draw(result)

    def tables(self, result: Row) -> list[Table]:
        """Load, an urgent request, and ratios."""
        return [_load_table(result), _urgent_table(result), _ratio_table(result)]

    def numbers(self, result: Row) -> dict[str, float]:
        """Of the most devices under load."""
        saturated = [row for row in result["comparisons"] if row["case"]["load"] == "saturated"]
        most = max(row["case"]["devices"] for row in saturated)
        busy = {row["of"]["event_idx"]: row["ratios"] for row in saturated if row["case"]["devices"] == most}
        singles = [row for row in result["comparisons"] if row["case"]["load"] == "single"]
        single = {row["of"]["event_idx"]: row["ratios"] for row in singles}
        return {
            "depth": result["options"]["depth"],
            "singles": result["options"]["single_devices"],
            "single_plain": single[False]["doorbells"],
            "single_event_idx": single[True]["doorbells"],
            "size": result["options"]["size"],
            "devices": most,
            "plain": busy[False]["doorbells"],
            "event_idx": busy[True]["doorbells"],
            "throughput": LEAST_THROUGHPUT,
            "p99": MOST_P99,
        }


def _load_table(result: Row) -> Table:
    rows = [row for row in result["rows"] if row["case"]["load"] != "urgent"]
    keys = [figure for figure in MEASUREMENT.figures if any(figure.key in row["median"] for row in rows)]
    return Table(
        f"medians of {result['options']['rounds']} rounds; doorbells (BELLS) and CPU microseconds a request; "
        "latency in us",
        ("LOAD", "DEVICES", "SIGNAL", "EVENT_IDX", "REQUESTS", *(figure.heading for figure in keys)),
        [
            [
                *(cell(row["case"][key]) for key in ("load", "devices")),
                *(cell(row["variant"][key]) for key in ("signal", "event_idx")),
                cell(row["work"]["requests"]),
                *(f"{row['median'][figure.key]:.{figure.digits}f}" for figure in keys),
            ]
            for row in rows
        ],
    )


def _urgent_table(result: Row) -> Table:
    return Table(
        "one device is asked now and then, beside others under load",
        (
            "PRIORITY",
            "BESIDE",
            "THEIR PRIORITY",
            "SIGNAL",
            "REQUESTS",
            "P50",
            "P99",
            "P99 FROM",
            "TO",
            "THEIR REQUESTS/S",
        ),
        [
            [
                cell(row["case"]["priority"]),
                cell(row["case"]["devices"]),
                cell(LEAST_URGENT if row["case"]["devices"] else None),
                row["variant"]["signal"],
                cell(row["work"]["requests"]),
                *(f"{row['median'][key]:.0f}" for key in ("p50_us", "p99_us")),
                *(f"{value:.0f}" for value in row["spread"]["p99_us"]),
                f"{row['median']['bulk_requests_per_second']:.0f}",
            ]
            for row in result["rows"]
            if row["case"]["load"] == "urgent"
        ],
    )


def _ratio_table(result: Row) -> Table:
    keys = ("doorbells_to_device", "doorbells_to_driver", "doorbells", "cpu_us", "requests_per_second", "p99_us")
    return Table(
        "tunnelled / direct: median ratio, and the smallest and largest of the rounds",
        ("LOAD", "DEVICES", "EVENT_IDX", "BELLS TO DEVICE", "TO DRIVER", "BOTH", "CPU", "REQUESTS/S", "P99", "VERDICT"),
        [
            [
                _load(row["case"]),
                cell(row["case"]["devices"]),
                cell(row["of"]["event_idx"]),
                *(spread(row["ratios"].get(key), row["spread"].get(key)) for key in keys),
                verdict(row),
            ]
            for row in result["comparisons"]
        ],
    )


def _load(case: Row) -> str:
    return f"urgent, priority {case['priority']}" if case["load"] == "urgent" else str(case["load"])


MEASUREMENT = Signal()
