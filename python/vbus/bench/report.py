"""The page of benchmarks, made of what measurements wrote: words from their templates, numbers from their JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vbus.bench import harness
from vbus.bench.measurement import AnyMeasurement
from vbus.bench.tables import Table, limit, named, spread
from vbus.errors import UsageError

Row = dict[str, Any]

HEAD = """\
# Benchmarks

`vbus bench NAME` measures one thing at a time, both sides in one run, and every variant in turns: a machine's speed
drifts, so that only runs that were close in time are compared. Figures are medians of the rounds; ratios are taken
within a round, and then their median. In brackets stand the smallest and the largest round. Two sides that did not do
the same work give no figure at all.

This page is generated (`vbus bench report`) from the JSON beside it.
"""


def page(folder: Path) -> str:
    """The page of all results in a folder, which has the pictures too, as Markdown. UsageError: there are none.

    What was measured in a guest has a page of its own, when nothing else is in its folder.
    """
    results = [
        (harness.load(name), json.loads(path.read_text())[0])
        for name in (*harness.NAMES, *harness.IN_GUESTS)
        if (path := folder / f"{name}.json").is_file()
    ]
    if not results:
        raise UsageError(f"{folder}: no results: write them there with vbus bench all --output {folder}")
    parts = [results[0][0].page_head or HEAD]
    bars = _bars([result for _, result in results])
    if bars.rows:
        parts.append(f"## The bars\n\n{bars.markdown()}\n")
    parts += [_section(measurement, result, folder) for measurement, result in results]
    return "\n".join(parts)


def _bars(results: list[Row]) -> Table:
    """What was to be reached, and what was."""
    rows = [
        [
            f"`{result['benchmark']}`",
            ": ".join(filter(None, (named(row["case"]), named(row["of"])))),
            named(row["against"]),
            f"{bar['what']} {limit(bar)}",
            spread(bar["ratio"], row["spread"][bar["value"]]),
            "met" if bar["met"] else "missed" if row["counts"] else "does not count",
        ]
        for result in results
        for row in result["comparisons"]
        for bar in row["bars"]
    ]
    return Table("", ("MEASURED", "OF", "AGAINST", "BAR", "RATIO", "VERDICT"), rows)


def _section(measurement: AnyMeasurement, result: Row, folder: Path) -> str:
    machine = result["machine"]
    busy = result["load_average"]["before"]
    peers = "".join(f", {peer['program']} {peer['version']}" for peer in result["peers"])
    parts = [
        f"## {measurement.title}",
        measurement.words(result).strip(),
        *(["These are of a quick run, and not to be believed."] if result["options"]["quick"] else []),
        f"Measured with `vbus bench {measurement.name}{' --peer' if result['options']['peer'] else ''}` on "
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}, {machine['python']}, "
        f"vbus {machine['vbus']}{peers}; load average before: {busy:g}.",
        *measurement.notes(result),
        *(f"{table.title}:\n\n{table.markdown()}" for table in measurement.tables(result) if table.rows),
        *(f"How {peer['program']} is run: `{command}`." for peer in result["peers"] for command in peer["commands"]),
        f"![{measurement.title}]({folder.name}/{measurement.name}.svg)",
    ]
    return "\n\n".join(parts) + "\n"
