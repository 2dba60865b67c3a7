"""Many devices on one bus: what it costs to find them, to plug one more, and to have one that nobody drives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus.bench import children, harness, measure
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Sample

Row = dict[str, Any]
PING, DISCOVER = "PING", "discover all"
EMPTY = "empty bus"
IDLE = "idle device"
MOST_BYTES = 64 << 10


@dataclass(frozen=True)
class ScalePlan(Plan):
    """How much is measured."""

    devices: int = 10_000
    cycles: int = 200
    """How often one device is plugged and unplugged."""


@dataclass(frozen=True)
class Case(Factors):
    """What is done on a bus."""

    what: str


@dataclass(frozen=True)
class Variant(Factors):
    """What is compared."""

    on: str


class Scale(Measurement[ScalePlan, Case, Variant]):
    """Ten thousand devices."""

    name = "scale"
    title = "Scale: many devices on one bus"
    template = """\
A driver's side attaches to a bus of {devices:.0f} devices and knows all of them after {seconds:.2f} s, which is
{discover:.2f} times as long as as many PING round trips take, one after the other. Plugging one more takes {plug:.2f}
times as long as on a bus without devices, unplugging it {unplug:.2f} times, each with a driver's side attached that
hears of it. A device that nobody drives takes {kib:.1f} KiB of the bus's memory.
"""
    figures = (
        Figure("seconds", "SECONDS", "seconds", digits=3, compared=True, plotted=True),
        Figure("plug_us", "PLUG", "microseconds", compared=True, plotted=True),
        Figure("unplug_us", "UNPLUG", "microseconds", compared=True, plotted=True),
        Figure("bytes", "BYTES A DEVICE", "bytes", compared=True),
    )

    def plan(self, quick: bool) -> ScalePlan:
        """How much is measured."""
        return ScalePlan(devices=200, cycles=10) if quick else ScalePlan()

    def cases(self, plan: ScalePlan) -> list[Case]:
        """Find all, come and go, and be there."""
        return [Case("discover"), Case("plug and unplug"), Case("memory")]

    def variants(self, plan: ScalePlan, case: Case) -> list[Variant]:
        """What is compared."""
        return {
            "discover": [Variant(DISCOVER), Variant(PING)],
            "plug and unplug": [Variant(_full(plan)), Variant(EMPTY)],
            "memory": [Variant(IDLE)],
        }[case.what]

    def comparisons(self, plan: ScalePlan, case: Case) -> list[Comparison[Variant]]:
        """What is held against what."""
        return {
            "discover": [Comparison(Variant(DISCOVER), Variant(PING), (Bar("seconds", "time", 3),))],
            "plug and unplug": [
                Comparison(
                    Variant(_full(plan)),
                    Variant(EMPTY),
                    (Bar("plug_us", "time to plug", 3), Bar("unplug_us", "time to unplug", 3)),
                )
            ],
            "memory": [Comparison(Variant(IDLE), None, (Bar("bytes", "memory", MOST_BYTES, unit=" bytes"),))],
        }[case.what]

    def sample(self, plan: ScalePlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """A bus, and a driver's side of it."""
        with children.Child("vbus.bench.bus_side") as bus, children.Child("vbus.bench.driver_side") as driver:
            address = bus.ask(
                "serve", socket=str(folder / "bench.sock"), signal="tunnelled", event_idx=True, devices={}
            )
            wanted = 0 if variant.on in (EMPTY, PING) else plan.devices
            there = bus.ask("populate", count=wanted)
            found = driver.ask("discover", address=address)
            keys = ("devices", "names")
            works = [
                (side, {key: said[key] for key in keys}) for side, said in (("the bus", there), ("the driver", found))
            ]
            measure.check_same_work(f"{case}, {variant}", works)
            if variant.on == PING:
                told = driver.ask("ping", count=plan.devices)
                return Sample({"count": told["round_trips"]}, {"seconds": told["seconds"]})
            if case.what == "discover":
                return Sample({"count": found["devices"]}, {"seconds": found["seconds"]})
            if case.what == "memory":
                return Sample({"count": there["devices"]}, {"bytes": there["bytes"]})
            told = bus.ask("replug", cycles=plan.cycles)
            return Sample({"count": told.pop("cycles")}, told)

    def numbers(self, result: Row) -> dict[str, float]:
        """What the page says."""
        ratios = {row["case"]["what"]: row["ratios"] for row in result["comparisons"]}
        return {
            "devices": result["options"]["devices"],
            "seconds": harness.find(result["rows"], on=DISCOVER)["median"]["seconds"],
            "discover": ratios["discover"]["seconds"],
            "plug": ratios["plug and unplug"]["plug_us"],
            "unplug": ratios["plug and unplug"]["unplug_us"],
            "kib": ratios["memory"]["bytes"] / 1024,
        }


def _full(plan: ScalePlan) -> str:
    return f"{plan.devices} devices"


MEASUREMENT = Scale()
