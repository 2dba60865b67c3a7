"""The verb `bench`: what vbus measures about itself on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vbus.cli import output
from vbus.errors import UsageError

Row = dict[str, Any]
QUIET_SECONDS = 2.0
"""How long a command may say nothing."""
LINE_SECONDS = 10.0
"""Between lines of progress where they cannot be written over each other."""


@click.group("bench", short_help="Measure vbus on this machine.")
def bench_command() -> None:
    """Measure vbus on this machine."""


@bench_command.command("signal", short_help="Doorbells, CPU time and latency: tunnelled against direct signals.")
@click.option("--quick", is_flag=True, help="A few requests in one round: whether it works, no figures to believe.")
@click.option("--rounds", type=click.IntRange(min=1), help="How often everything is measured.  [default: 5]")
@click.option(
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write signal.json and signal.svg there.",
)
@output.json_option
def signal_command(quick: bool, rounds: int | None, folder: Path | None, as_json: bool) -> None:
    """Measure doorbells and CPU time a request, and latency: tunnelled signals against direct ones.

    With 1, 4 and 16 devices under load, and with requests that come now and then; EVENT_IDX off and on; and an urgent
    request on an idle bus and beside bulk load. It takes about five minutes; the machine should do nothing else. Where
    tunnelled signals cost throughput or latency, a comparison "does not count". --json and signal.json have every
    round's values.
    """
    from dataclasses import replace

    from vbus.bench import plot, signal

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{folder}: not writable")
    plan = signal.quick_plan(rounds or 1) if quick else replace(signal.Plan(), rounds=rounds or signal.Plan.rounds)
    progress = Progress()
    try:
        result = signal.run(plan, progress.say)
    finally:
        progress.end()
    if folder is not None:
        (folder / "signal.json").write_text(json.dumps([result], indent=2, ensure_ascii=False) + "\n")
        (folder / "signal.svg").write_text(plot.draw(result))
    if as_json:
        output.print_json([result])
    else:
        _print_result(result)
    if result["load_average"]["before"] > result["machine"]["cpus"] / 2:
        busy = result["load_average"]["before"]
        click.echo(f"the machine was busy before (load average {busy:g}): expect more spread", err=True)


class Progress:
    """Says on standard error how far a long measurement is."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._over = self._stream.isatty()
        self._next = time.monotonic() + QUIET_SECONDS
        self._written = False

    def say(self, number: int, count: int, what: str) -> None:
        """What is about to be measured, and how many before it of how many."""
        if time.monotonic() < self._next:
            return
        text = f"{number}/{count} {what}"
        if self._over:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
            self._written = True
        else:
            click.echo(text, file=self._stream)
            self._next = time.monotonic() + LINE_SECONDS

    def end(self) -> None:
        """Nothing more to say."""
        if self._written:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


# Tables.


def _print_result(result: Row) -> None:
    options, machine = result["options"], result["machine"]
    click.echo(f"{machine['cpu']}, {machine['cpus']} CPUs; {machine['kernel']}; {machine['python']}")
    click.echo(
        f"medians of {options['rounds']} rounds; doorbells (BELLS) and CPU microseconds a request; latency in us\n"
    )
    _print_aligned(
        (
            *("LOAD", "DEVICES", "SIGNAL", "EVENT_IDX", "REQUESTS", "REQUESTS/S"),
            *("BELLS TO DEVICE", "TO DRIVER", "CPU OF BUS", "OF DRIVER", "P50", "P99"),
        ),
        [
            [
                *(row["load"], row["devices"], row["signal"], _on(row["event_idx"]), row["requests"]),
                f"{row['median']['requests_per_second']:.0f}",
                f"{row['median']['doorbells_to_device']:.3f}",
                f"{row['median']['doorbells_to_driver']:.3f}",
                f"{row['median']['cpu_us_bus']:.1f}",
                f"{row['median']['cpu_us_driver']:.1f}",
                f"{row['median']['p50_us']:.0f}",
                f"{row['median']['p99_us']:.0f}",
            ]
            for row in result["rows"]
            if row["load"] != "urgent"
        ],
    )
    click.echo("\none device is asked now and then, beside others under load")
    _print_aligned(
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
                *(row["priority"], row["devices"], 7 if row["devices"] else "-", row["signal"], row["requests"]),
                *(f"{row['median'][key]:.0f}" for key in ("p50_us", "p99_us")),
                *(f"{value:.0f}" for value in row["spread"]["p99_us"]),
                f"{row['median']['bulk_requests_per_second']:.0f}",
            ]
            for row in result["rows"]
            if row["load"] == "urgent"
        ],
    )
    click.echo("\ntunnelled / direct: median ratio, and the smallest and largest of the rounds")
    _print_aligned(
        ("LOAD", "DEVICES", "EVENT_IDX", "BELLS TO DEVICE", "TO DRIVER", "BOTH", "CPU", "REQUESTS/S", "P99", "VERDICT"),
        [
            [
                _load(row),
                row["devices"],
                _on(row["event_idx"]),
                *(_ratio(row, key) for key in ("doorbells_to_device", "doorbells_to_driver", "doorbells")),
                *(_ratio(row, key) for key in ("cpu_us", "requests_per_second", "p99_us")),
                "counts" if row["counts"] else f"does not count: {', '.join(row['why'])}",
            ]
            for row in result["comparisons"]
        ],
    )


def _load(row: Row) -> str:
    return f"urgent, priority {row['priority']}" if row["load"] == "urgent" else str(row["load"])


def _on(event_idx: bool) -> str:
    return "on" if event_idx else "off"


def _ratio(row: Row, key: str) -> str:
    ratio = row["ratios"].get(key)
    if ratio is None:
        return "-"
    low, high = row["spread"][key]
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def _print_aligned(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table whose cells that begin with a digit are aligned on the right, fractions too."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = []
    for heading, *column in zip(headings, *cells, strict=True):
        width = max(map(len, (heading, *column)))
        right = all(cell[:1].isdigit() or cell == "-" for cell in column)
        columns.append([text.rjust(width) if right else text for text in (heading, *column)])
    first, *others = zip(*columns, strict=True)
    output.print_table(first, others)
