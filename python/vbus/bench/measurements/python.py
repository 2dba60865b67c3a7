"""A device in Python that does nothing, against bare calls from native code to the same handler.

Both enter Python as often, with as many requests. The device's come off a ring that a native driver of another process
keeps full; a bare call makes the smallest object that there is for each request, and hands it over, or a list of them.
The difference is what the ring, the turn and the completion cost.
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
SHAPES = {"handle": ("Each", 0), "handle_batch": ("Together", BATCH), "handle_batch, looked at": ("LookedAt", BATCH)}
"""How requests are handed over: the model, and how many there are at once."""
BARS = {
    "handle": Bar("requests_per_second", "requests/s", 1 / 3, at_least=True),
    "handle_batch": Bar("requests_per_second", "requests/s", 1 / 2, at_least=True),
}


@dataclass(frozen=True)
class PythonPlan(Plan):
    """How much is measured."""

    requests: int = 2_097_152
    """A multiple of the batch."""


@dataclass(frozen=True)
class Case(Factors):
    """How requests are handed over."""

    handler: str


@dataclass(frozen=True)
class Variant(Factors):
    """Who hands them over: `device`, a turn of a queue; or `call`, a loop of native calls."""

    by: str


class Python(Measurement[PythonPlan, Case, Variant]):
    """Devices in Python against native calls of Python."""

    name = "python"
    title = "Devices in Python: against a bare call"
    template = """\
A device whose handler does nothing answers {handle:.0f} requests a second through a ring, and {batch:.0f} when it
takes {size} at once, {looked:.0f} when it also looks at each. Bare calls of the same handlers from native code, with
the smallest object for each request and neither ring nor completion, are the measure: the device reaches
{handle_ratio:.2f}, {batch_ratio:.2f} and {looked_ratio:.2f} of their rate. A batch makes objects of Python only once
somebody looks at one; that is where its gain comes from.
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
        return [Case(handler) for handler in SHAPES]

    def variants(self, plan: PythonPlan, case: Case) -> tuple[Variant, Variant]:
        """A device, and bare calls."""
        return Variant("device"), Variant("call")

    def comparisons(self, plan: PythonPlan, case: Case) -> list[Comparison[Variant]]:
        """The one against the other."""
        bars = (BARS[case.handler],) if case.handler in BARS else ()
        return [Comparison(Variant("device"), Variant("call"), bars)]

    def sample(self, plan: PythonPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """Run one of them."""
        model, batch = SHAPES[case.handler]
        with children.Child("vbus.bench.bus_side") as bus:
            if variant.by == "call":
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
        for name, handler in (("handle", "handle"), ("batch", "handle_batch"), ("looked", "handle_batch, looked at")):
            found[name] = harness.find(result["rows"], handler=handler, by="device")["median"]["requests_per_second"]
            [row] = [row for row in result["comparisons"] if row["case"]["handler"] == handler]
            found[f"{name}_ratio"] = row["ratios"]["requests_per_second"]
        return found


def _sample(requests: int, seconds: float, used: Usage) -> Sample:
    values = {
        "requests_per_second": requests / seconds,
        "ns": seconds / requests * 1e9,
        "cpu_ns": (used["user"] + used["system"]) / requests * 1e9,
    }
    return Sample({"requests": requests}, values)


MEASUREMENT = Python()
