"""A device in Python that does nothing, against bare calls from native code to the same handler, and to a ring alone.

Both enter Python as often, with as many requests. The device's come off a ring that a native driver of another process
keeps full; a bare call makes the smallest object that there is for each request, and hands it over, or a list of them.
The difference is what the ring, the turn and the completion cost. That is measured, too: `ring` is the same device, to
which nothing is handed over. It needs no Python, so whatever it takes no device in Python can do without.

Rates are by the clock, which also runs while a side waits for a CPU: bare calls need one, a device and its driver need
two. So on a machine that is busy with something else the rate says more about that than about the device. CPU time does
not: that of the process of the device is counted, what it takes to sleep and to wake up included, and has a bar of its
own, which says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children, harness, measure
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Sample
from vbus.bench.work import Usage, used_between

Row = dict[str, Any]
NAME = "nothing"
BATCH = 64
READABLE = 64
"""Bytes of a request, which the device does not look at."""
DEPTH = 128
"""As many as the ring takes: there is always a whole batch."""
ONE, ALL, LOOKED_AT = "handle", "handle_batch", "handle_batch, looked at"
MODELS = {ONE: "Each", ALL: "Together", LOOKED_AT: "LookedAt"}
"""How requests are handed over: the model that takes them so."""
SHAPES = ((ONE, 1), (ALL, 1), (ALL, 8), (ALL, BATCH), (LOOKED_AT, BATCH))
"""And how many there are at once, at most."""
TIMES = {(ONE, 1): 3, (ALL, BATCH): 2}
"""How many times as much as a bare call they may cost."""


@dataclass(frozen=True)
class PythonPlan(Plan):
    """How much is measured."""

    requests: int = 2_097_152
    """A multiple of the batch."""


@dataclass(frozen=True)
class Case(Factors):
    """How requests are handed over."""

    handler: str
    batch: int


@dataclass(frozen=True)
class Variant(Factors):
    """Who hands them over: `device`, a turn of a queue; `call`, a loop of native calls; or nobody, of a `ring`."""

    by: str


class Python(Measurement[PythonPlan, Case, Variant]):
    """Devices in Python against native calls of Python."""

    name = "python"
    title = "Devices in Python: against a bare call"
    template = """\
A device whose handler does nothing answers {handle:.0f} requests a second through a ring, and {batch:.0f} when it
takes {size} at once, {looked:.0f} when it also looks at each. Bare calls of the same handlers from native code, with
the smallest object for each request and neither ring nor completion, are the measure: the device reaches
{handle_ratio:.2f}, {batch_ratio:.2f} and {looked_ratio:.2f} of their rate, and takes {handle_cpu:.1f},
{batch_cpu:.1f} and {looked_cpu:.1f} times their CPU time. A batch makes objects of Python only once somebody looks at
one; that is where its gain comes from, and it is small as long as batches are: {small:.0f} requests a second come one
by one. With {size} at once it reaches {alone:.0f} percent of what the ring does alone, with the same driver and with no
Python: what is missing to a bare call is the way of requests between two processors, and not Python.
"""
    figures = (
        Figure("requests_per_second", "REQUESTS/S", "a second", compared=True, plotted=True),
        Figure("ns", "NS A REQUEST"),
        Figure("cpu_ns", "NS OF CPU", "nanoseconds of CPU a request", compared=True),
    )

    def plan(self, quick: bool) -> PythonPlan:
        """How much is measured."""
        return PythonPlan(requests=4096) if quick else PythonPlan()

    def cases(self, plan: PythonPlan) -> list[Case]:
        """Every way of handing requests over."""
        return [Case(handler, batch) for handler, batch in SHAPES]

    def variants(self, plan: PythonPlan, case: Case) -> tuple[Variant, ...]:
        """A device, bare calls, and where batches are, a ring alone."""
        alone = (Variant("ring"),) if case.handler == ALL else ()
        return Variant("device"), Variant("call"), *alone

    def comparisons(self, plan: PythonPlan, case: Case) -> list[Comparison[Variant]]:
        """The one against the other."""
        times = TIMES.get((case.handler, case.batch))
        bars: tuple[Bar, ...] = ()
        if times is not None:
            rate = Bar("requests_per_second", "requests/s", 1 / times, at_least=True)
            bars = (rate, Bar("cpu_ns", "CPU time", times))
        found = [Comparison(Variant("device"), Variant("call"), bars)]
        if case.handler == ALL:
            found += [Comparison(Variant("device"), Variant("ring")), Comparison(Variant("ring"), Variant("call"))]
        return found

    def sample(self, plan: PythonPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Run one of them."""
        model = "Alone" if variant.by == "ring" else MODELS[case.handler]
        with children.Child("vbus.bench.bus_side") as bus:
            if variant.by == "call":
                batch = 0 if case.handler == ONE else case.batch
                told = bus.ask("calls", model=model, count=plan.requests, batch=batch)
                return _sample(told["requests"], told["seconds"], told["usage"])
            with children.Child("vbus.bench.driver_side") as driver:
                address = bus.ask(
                    "serve",
                    socket=str(folder / "bench.sock"),
                    signal="tunnelled",
                    event_idx=True,
                    devices={NAME: 0},
                    model=model,
                    budget=BATCH if case.handler == ONE else case.batch,
                )
                driver.ask("attach", address=address)
                begin = bus.ask("begin")
                told = driver.ask(
                    "load", name=NAME, total=plan.requests, depth=DEPTH, readable=READABLE, writable=0, written=0
                )
                end = bus.ask("end")
        before, after = begin["rows"][NAME], end["rows"][NAME]
        done = {key: after[key] - before[key] for key in ("requests", "bytes_read", "bytes_written")}
        asked = {
            "requests": told["requests"],
            "bytes_read": told["bytes_sent"],
            "bytes_written": told["bytes_received"],
        }
        measure.check_same_work(str(case), [("the bus", done), ("the driver", asked)])
        return _sample(told["requests"], told["seconds"], used_between(begin["usage"], end["usage"]))

    def numbers(self, result: Row) -> dict[str, float]:
        """Rates and their ratios."""
        found: dict[str, float] = {"size": BATCH}
        for name, handler, batch in (("handle", ONE, 1), ("batch", ALL, BATCH), ("looked", LOOKED_AT, BATCH)):
            found[name] = _rate(result, handler, batch)
            case = {"handler": handler, "batch": batch}
            row = _compared(result, case, "call")
            found[f"{name}_ratio"] = row["ratios"]["requests_per_second"]
            found[f"{name}_cpu"] = row["ratios"]["cpu_ns"]
        found["small"] = _rate(result, ALL, 1)
        alone = _compared(result, {"handler": ALL, "batch": BATCH}, "ring")
        found["alone"] = 100 * alone["ratios"]["requests_per_second"]
        return found


def _compared(result: Row, case: Row, against: str) -> Row:
    """The device against another, in a case."""
    rows = [row for row in result["comparisons"] if row["case"] == case and row["of"] == {"by": "device"}]
    [row] = [row for row in rows if row["against"] == {"by": against}]
    return dict(row)


def _rate(result: Row, handler: str, batch: int) -> float:
    row = harness.find(result["rows"], handler=handler, batch=batch, by="device")
    return float(row["median"]["requests_per_second"])


def _sample(requests: int, seconds: float, used: Usage) -> Sample:
    values = {
        "requests_per_second": requests / seconds,
        "ns": seconds / requests * 1e9,
        "cpu_ns": (used["user"] + used["system"]) / requests * 1e9,
    }
    return Sample({"requests": requests}, values)


MEASUREMENT = Python()
