"""Runs a measurement: its variants in turns, the same work by all of them, medians of ratios, and verdicts.

Nothing is summed up before all samples of a case were found to have done the same: a measurement gives all its figures
or none.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vbus.bench import machine, measure
from vbus.bench.measure import Summary
from vbus.bench.measurement import AnyMeasurement, C, Measurement, P, Row, Sample, Say, V
from vbus.errors import UsageError

NAMES = ("ring", "net", "latency", "python", "blk", "scale", "signal")
"""What can be measured: modules in `measurements`."""
IN_GUESTS = ("exits", "priorities")
"""What takes a guest, and a page of its own."""


def load(name: str) -> AnyMeasurement:
    """The measurement of this name."""
    found: AnyMeasurement = importlib.import_module(f"vbus.bench.measurements.{name}").MEASUREMENT
    return found


def plan_of(
    measurement: Measurement[P, C, V], *, quick: bool = False, rounds: int | None = None, peer: bool = False
) -> P:
    """How much is measured: by default one round when `quick`. MissingError: a program is not there; UsageError."""
    for one in measurement.needs:
        one.find(needed_by=measurement.name)
    plan = measurement.plan(quick)
    plan = replace(plan, rounds=rounds or (1 if quick else plan.rounds), quick=quick, peer=peer)
    if peer:
        if not measurement.peers:
            raise UsageError(f"{measurement.name} has nobody to be compared with: measure it without --peer")
        for one in measurement.peers:
            one.find()
    return plan


def run(measurement: Measurement[P, C, V], plan: P, say: Say = lambda number, count, what: None) -> Row:
    """Measure everything; what `vbus bench NAME --json` has. UnequalWorkError, SideError."""
    cases = measurement.cases(plan)
    variants = {case: measurement.variants(plan, case) for case in cases}
    count = sum(map(len, variants.values())) * plan.rounds
    began, busy = time.time(), machine.load_average()
    number = 0
    rows: list[Row] = []
    comparisons: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="vbus-bench-") as shared, contextlib.ExitStack() as stack:
        stack.callback(measurement.finish)
        measurement.prepare(plan, Path(shared))
        for case in cases:

            def sample(_: int, variant: V, case: C = case) -> Sample:
                nonlocal number
                say(number, count, f"{case}: {variant}")
                number += 1
                with tempfile.TemporaryDirectory(dir=shared) as folder:
                    return measurement.sample(plan, case, variant, Path(folder))

            samples = measure.run_alternately(variants[case], plan.rounds, sample)
            check_samples(case, samples)
            rows += rows_of(case, samples)
            comparisons += comparisons_of(measurement, plan, case, samples)
    return {
        "benchmark": measurement.name,
        "machine": machine.describe(),
        "peers": [peer.describe() for peer in measurement.taking_part(plan)],
        "load_average": {"before": busy, "after": machine.load_average()},
        "began": began,
        "seconds": time.time() - began,
        "options": asdict(plan),
        "rows": rows,
        "comparisons": comparisons,
    }


def check_samples(case: C, samples: Mapping[V, Sequence[Sample]]) -> None:
    """UnequalWorkError unless all samples of a case did the same."""
    works = [
        (f"{variant}, round {number}", measure.flat(sample.work))
        for variant, taken in samples.items()
        for number, sample in enumerate(taken, 1)
    ]
    measure.check_same_work(str(case), works)


def rows_of(case: C, samples: Mapping[V, Sequence[Sample]]) -> list[Row]:
    """A row a variant: what was done, medians, smallest and largest, and what every round gave."""
    rows = []
    for variant, taken in samples.items():
        summary = measure.summarise([sample.values for sample in taken])
        rows.append(
            {
                "case": case.factors(),
                "variant": variant.factors(),
                "work": {key: value for key, value in taken[0].work.items() if not isinstance(value, Mapping)},
                "median": {key: value.median for key, value in summary.items()},
                "spread": {key: [value.low, value.high] for key, value in summary.items()},
                "rounds": [dict(sample.values) for sample in taken],
            }
        )
    return rows


def comparisons_of(
    measurement: Measurement[P, C, V], plan: P, case: C, samples: Mapping[V, Sequence[Sample]]
) -> list[Row]:
    """A row a comparison: ratios, whether they count, and which bars they meet."""
    rows = []
    for comparison in measurement.comparisons(plan, case):
        ours = [sample.values for sample in samples[comparison.of]]
        against = comparison.against
        found: Mapping[str, Summary | None]
        if against is None:
            found = measure.summarise(ours)
        else:
            found = measure.ratios(ours, [sample.values for sample in samples[against]])
        why, bars = comparison.judge(found)
        rows.append(
            {
                "case": case.factors(),
                "of": comparison.of.factors(),
                "against": against.factors() if against is not None else None,
                "ratios": {key: value.median if value else None for key, value in found.items()},
                "spread": {key: [value.low, value.high] if value else None for key, value in found.items()},
                "counts": not why,
                "why": why,
                "bars": bars,
            }
        )
    return rows


def find(rows: Sequence[Row], **factors: Any) -> Row:
    """The one row whose case and variant have these factors. LookupError."""
    found = [row for row in rows if factors == {key: {**row["case"], **row["variant"]}.get(key) for key in factors}]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows have {factors}")
    return found[0]
