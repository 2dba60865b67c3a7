"""The verb `bench`: what vbus measures about itself on this machine."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vbus.cli import output
from vbus.errors import UsageError
from vbus.hints import did_you_mean

if TYPE_CHECKING:
    from vbus.bench.measurement import AnyMeasurement
    from vbus.bench.tables import Table

Row = dict[str, Any]
QUIET_SECONDS = 2.0
"""How long a command may say nothing."""
LINE_SECONDS = 10.0
"""Between lines of progress where they cannot be written over each other."""


@dataclass(frozen=True)
class About:
    """A measurement, for whoever asks for help: it is loaded only when it is run."""

    short: str
    long: str
    has_peer: bool = False
    in_guest: bool = False
    """Whether it starts a guest, and is no part of `all`."""


ABOUT = {
    "ring": About(
        "A round trip through a ring, against what it is made of.",
        """Measure round trips through rings of both layouts, one at a time, between two processes.

        Notified, against two eventfds without a ring; polled, against a cache line in each direction, and against rings
        that check nothing. It needs two CPUs.
        """,
    ),
    "net": About(
        "A network's loopback at full speed, in frames a second.",
        """Measure a network's loopback behind vhost-user, driven by DPDK (dpdk-testpmd) as fast as it can.

        Served natively and in Python, through split and packed rings, notified, adaptive and always polling; and how
        long the first frame of a burst is held back for the others. It takes about five minutes. With --peer, against
        DPDK's own back-end. It needs two CPUs.
        """,
        has_peer=True,
    ),
    "latency": About(
        "How long one request takes that is alone.",
        """Measure how long a request takes from a native driver to a device in Python and back, one at a time.

        Through split and packed rings; the driver polls for the answer, or sleeps.
        """,
    ),
    "python": About(
        "Devices in Python, against bare calls of Python from native code.",
        """Measure a device in Python that does nothing, against bare calls of the same handler from native code.

        One request at a time (`handle`), and 1, 8 and 64 at once (`handle_batch`), which the device looks at or not.
        """,
    ),
    "blk": About(
        "A disk in another process: random reads through vhost-user.",
        """Measure random reads of 4 KiB from a file in the page cache, through vhost-user, each side on its own CPU.

        Served natively and in Python, through split and packed rings, notified and polling; 32 reads under way, and one
        at a time, with a driver that sleeps and one that polls. The limit beside it is io_uring alone in the same
        batches, and what fio finds where it is installed. With --peer, qemu-storage-daemon serves the same file. It
        takes about five minutes.
        """,
        has_peer=True,
    ),
    "scale": About(
        "Many devices on one bus: to find them, to plug one, to have one.",
        """Measure a bus with ten thousand devices.

        How long a driver's side needs to find all of them, against as many PING round trips; what it costs to plug and
        unplug one, against a bus without devices; and how much memory a device takes that nobody drives.
        """,
    ),
    "signal": About(
        "Doorbells, CPU time and latency: tunnelled against direct signals.",
        """Measure doorbells and CPU time a request, and latency: tunnelled signals against direct ones.

        With 1, 4 and 16 devices under load, and with requests that come now and then; EVENT_IDX off and on; and an
        urgent request on an idle bus and beside bulk load. It takes about five minutes. Where tunnelled signals cost
        throughput or latency, a comparison "does not count".
        """,
    ),
    "exits": About(
        "Doorbells and interrupts of a guest: virtio-pci against ivshmem.",
        """Measure doorbells and interrupts of a guest: virtio-pci over vhost-user, ivshmem direct or tunnelled.

        Random reads of 1, 4 and 16 disks at several depths, and with disks that serve 10% to 100% of what the guest
        asks for; TCP requests and streams over 1 and 4 networks. The guest is Debian's kernel in QEMU, with the modules
        of a checkout (guest/linux), and has its devices in all ways at once. It takes about ten minutes, and needs gcc,
        make, apt-get and QEMU; networks need a network namespace of one's own. It is no part of `all`.
        """,
        in_guest=True,
    ),
    "priorities": About(
        "An urgent network of a guest beside bulk load.",
        """Measure how long a question takes over an urgent network of a guest, alone and beside bulk load.

        The bulk is a disk that is read and a network that is streamed over, as fast as they can; native engines serve
        all of them. The guest is that of `exits`, and it is no part of `all` either.
        """,
        in_guest=True,
    ),
}
"""In the order in which `all` measures them, but for those in guests."""
QUIETLY = "The machine should do nothing else meanwhile."


class Measurements(click.Group):
    """A verb for each measurement, and those for all of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The measurements first."""
        return [*ABOUT, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command that measures this."""
        if cmd_name in ABOUT:
            return _command([cmd_name], cmd_name, ABOUT[cmd_name])
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but what cannot be measured is answered with the nearest."""
        known = self.list_commands(ctx)
        if not args[0].startswith("-") and args[0] not in known and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no measurement {args[0]!r}: {did_you_mean(args[0], known)}")
        return super().resolve_command(ctx, args)


@click.group("bench", cls=Measurements, short_help="Measure vbus on this machine.")
def bench_command() -> None:
    """Measure vbus on this machine: one thing at a time, both sides in one run, medians of alternating rounds."""


def _command(names: Sequence[str], name: str, about: About) -> click.Command:
    """The command that measures these."""

    def run(plot: Path | None = None, peer: bool = False, **options: Any) -> None:
        _measure(names, plot=plot, peer=peer, **options)

    path = click.Path(dir_okay=False, path_type=Path)
    params: list[click.Parameter] = [
        click.Option(["--quick"], is_flag=True, help="A little, once: whether it works, no figures to believe."),
        click.Option(["--rounds"], type=click.IntRange(min=1), help="How often.  [default: 5, or more]"),
        click.Option(
            ["--json", "json_file"],
            is_flag=False,
            flag_value="-",
            metavar="[FILE]",
            help="Write an array of objects to FILE, or print it in place of tables.",
        ),
        click.Option(["--plot"], type=path, metavar="FILE", help="Write a picture (SVG)."),
        click.Option(
            ["--output", "folder"],
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Write NAME.json and NAME.svg there.",
        ),
    ]
    if len(names) > 1:
        params = [param for param in params if param.name != "plot"]
    if about.has_peer:
        params.append(click.Option(["--peer"], is_flag=True, help="Other people's programs beside it, in one run."))
    words = f"{inspect.cleandoc(about.long)}\n\n{QUIETLY}"
    return click.Command(name, params=params, callback=run, help=words, short_help=about.short)


bench_command.add_command(
    _command(
        [name for name, about in ABOUT.items() if not about.in_guest],
        "all",
        About(
            "All of them but those in guests, one after the other.",
            "Measure everything, one after the other, but what starts a guest or needs a program that is not there.",
            has_peer=True,
        ),
    )
)


@bench_command.command("report", short_help="The page of benchmarks, from what was written with --output.")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option(
    "--output", "target", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write it there."
)
def report_command(folder: Path, target: Path | None) -> None:
    """Print the page of benchmarks: Markdown, with words, tables and pictures, from what is in DIR."""
    from vbus.bench import report

    page = report.page(folder)
    if target is None:
        click.echo(page, nl=False)
    else:
        target.write_text(page)


def _measure(
    names: Sequence[str],
    *,
    quick: bool,
    rounds: int | None,
    json_file: str | None,
    plot: Path | None,
    folder: Path | None,
    peer: bool,
) -> None:
    from vbus.bench import harness
    from vbus.bench.peers import MissingError

    for target in (Path(json_file) if json_file not in (None, "-") else None, plot):
        if target is not None and not os.access(target.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{target}: its folder is not there, or not writable")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{folder}: not writable")
    results = []
    for name in names:
        measurement = harness.load(name)
        try:
            # Of all of them, those that somebody else does, too.
            beside = peer and (len(names) == 1 or bool(measurement.peers))
            plan = harness.plan_of(measurement, quick=quick, rounds=rounds, peer=beside)
        except MissingError as missing:
            if len(names) == 1:
                raise
            click.echo(f"{name} is left out: {missing}", err=True)
            continue
        progress = Progress(f"{name} " if len(names) > 1 else "")
        try:
            result = harness.run(measurement, plan, progress.say)
        finally:
            progress.end()
        results.append(result)
        if folder is not None:
            (folder / f"{name}.json").write_text(_json([result]))
            (folder / f"{name}.svg").write_text(measurement.draw(result))
        if plot is not None:
            plot.write_text(measurement.draw(result))
        if json_file is None:
            _print_result(measurement, result)
    if json_file == "-":
        output.print_json(results)
    elif json_file is not None:
        Path(json_file).write_text(_json(results))
    busy = max(result["load_average"]["before"] for result in results[:1])
    if busy > results[0]["machine"]["cpus"] / 2:
        click.echo(f"the machine was busy before (load average {busy:g}): expect more spread", err=True)


def _json(results: list[Row]) -> str:
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


class Progress:
    """Says on standard error how far a long measurement is."""

    def __init__(self, before: str = "") -> None:
        self._before = before
        self._stream = sys.stderr
        self._over = self._stream.isatty()
        self._next = time.monotonic() + QUIET_SECONDS
        self._written = False

    def say(self, number: int, count: int, what: str) -> None:
        """What is about to be measured, and how many before it of how many."""
        if time.monotonic() < self._next:
            return
        text = f"{self._before}{number}/{count} {what}"
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


def _print_result(measurement: AnyMeasurement, result: Row) -> None:
    machine = result["machine"]
    click.echo(output.paint(measurement.title, bold=True))
    click.echo(f"{machine['cpu']}, {machine['cpus']} CPUs; {machine['kernel']}; {machine['python']}")
    for peer in result["peers"]:
        click.echo(f"beside {peer['program']} {peer['version']}")
        for command in peer["commands"]:
            click.echo(f"  {command}")
    for note in measurement.notes(result):
        click.echo(note)
    for table in measurement.tables(result):
        _print_table(table)
    click.echo()


def _print_table(table: Table) -> None:
    if table.rows:
        headings, rows = table.aligned()
        click.echo(f"\n{table.title}")
        output.print_table(headings, rows)
