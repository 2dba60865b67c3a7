"""A disk in another process: random reads of a file in the page cache, through vhost-user.

Every server is a process of its own, on a CPU of its own, and has the same client on another: our front-end with the
native load generator. One thing is changed at a time: the engine, the ring, and whether the server polls. What nobody
can exceed is the file itself, read by io_uring in the engine's batches without a ring and without a driver. With
`--peer`, the export of qemu-storage-daemon serves the same file; fio, where it is installed, says what it finds the
limit to be.
"""

from __future__ import annotations

import os
import random
import shutil
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vbus import _core
from vbus.bench import children, measure
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Row, Sample
from vbus.bench.peers import Peer
from vbus.bench.tables import named
from vbus.errors import UsageError

SIZE = 4096
"""Bytes of a read."""
DEEP = 32
BATCH = 16
"""Operations that the engine submits together."""
SEED = 7
IMAGE = "disk.img"
POLLS, SLEEPS, NOBODY = "polls", "sleeps", "nobody"
VBUS, QSD, BARE, FIO = "vbus", "qemu-storage-daemon", "io_uring alone", "fio"
NOTIFIED, ALWAYS = "notified", "always"
PEER_POLLS_NS = 100_000
"""How long the peer's thread may poll: longer than a read takes that is alone, and three times its default."""
OF_PEER, OF_LIMIT = 1.5, 0.8


@dataclass(frozen=True)
class BlkPlan(Plan):
    """How much is measured."""

    deep: int = 400_000
    """Reads with many under way."""
    single: int = 20_000
    """Reads one at a time."""
    warm_up: int = 20
    """One of so many reads more, before."""
    image_bytes: int = 64 << 20
    io_uring: bool = True
    """Whether it is permitted here."""
    fio: bool = False
    """Whether it takes part, because it is installed."""


@dataclass(frozen=True)
class Case(Factors):
    """How many reads are under way, and what their driver does while it waits for answers."""

    depth: int
    client: str


@dataclass(frozen=True)
class Variant(Factors):
    """Who serves the reads, and how."""

    server: str
    engine: str | None = None
    ring: str | None = None
    polling: str | None = None

    def factors(self) -> Row:
        """Those that it has."""
        return {key: value for key, value in super().factors().items() if value is not None}


NATIVE = Variant(VBUS, "native", "split", NOTIFIED)
NATIVE_PACKED = Variant(VBUS, "native", "packed", NOTIFIED)
NATIVE_POLLS = Variant(VBUS, "native", "split", ALWAYS)
PYTHON = Variant(VBUS, "python", "split", NOTIFIED)
PYTHON_PACKED = Variant(VBUS, "python", "packed", NOTIFIED)
PEER = Variant(QSD, None, "split", "poll-max-ns=0")
PEER_POLLS = Variant(QSD, None, "split", f"poll-max-ns={PEER_POLLS_NS}")
ALONE = Variant(BARE)
FIO_ALONE = Variant(FIO)
CASES = (Case(DEEP, POLLS), Case(1, SLEEPS), Case(1, POLLS), Case(DEEP, NOBODY))
QUICK = CASES[:2]
FACTORS = (
    (NATIVE, PYTHON),
    (NATIVE_PACKED, NATIVE),
    (NATIVE_POLLS, NATIVE),
    (PYTHON_PACKED, PYTHON),
    (FIO_ALONE, ALONE),
)
"""What one thing makes of another."""


def peer_command(image: str, socket: str, polling: str) -> list[str]:
    """The peer, which serves a file at a socket."""
    disk = f"driver=file,node-name=disk,filename={image},read-only=on,aio=io_uring,cache.direct=off"
    export = f"type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path={socket},writable=off,num-queues=1"
    return [
        QSD,
        *("--object", f"iothread,id=serve,{polling}"),
        *("--blockdev", disk),
        *("--export", f"{export},iothread=serve"),
    ]


def fio_command(image: str, plan: BlkPlan) -> list[str]:
    """The same reads, as fio makes them: one job, of as many bytes."""
    return [
        *(FIO, "--name=reads", f"--filename={image}", "--readonly", "--rw=randread", f"--bs={SIZE}"),
        *(
            "--ioengine=io_uring",
            f"--iodepth={DEEP}",
            f"--iodepth_batch_submit={BATCH}",
            "--direct=0",
            "--invalidate=0",
        ),
        *("--numjobs=1", f"--size={plan.image_bytes}", f"--io_size={plan.deep * SIZE}", "--norandommap"),
        *("--randrepeat=1", "--output-format=json"),
    ]


class Blk(Measurement[BlkPlan, Case, Variant]):
    """Random reads of a disk."""

    name = "blk"
    title = "Disks: random reads of a file in the page cache"
    template = """\
A driver in another process reads 4 KiB at a time through vhost-user, at random places of a file in the page cache. The
server has one CPU, the driver another.

*The engine*: with {depth} reads under way the model in Python serves {python:,.0f} of them a second. The native engine
serves {native:,.0f}, {engine:.1f} times as many; it takes {native_cpu:.2f} us of CPU time for one, the model
{python_cpu:.2f} us. A read that is alone takes {engine_single:.2f} of the time that it takes in Python.

*The ring*: packed, it serves {ring:.2f} times as many as split, and a read that is alone takes {ring_single:.2f} times
as long.

*Polling*: a worker that never sleeps serves {polling:.2f} times as many as one that is notified. A read that is alone
takes {polls_single:.1f} us in place of {single:.1f} us when the driver sleeps, and {polls_polled:.1f} us in place of
{polled:.1f} us when it polls, too. It costs all of a CPU.

*The limit*: io_uring alone, in the same batches, reads {alone:,.0f} times a second. Of that the native engine has
{of_limit:.2f} when it is notified, and {of_limit_polls:.2f} when it polls: the rest goes into descriptors and answers,
which travel between the caches of two CPUs, and into checking them.

*fio* finds the limit to be {fio:,.0f} reads a second, {of_alone:.2f} times what io_uring alone gives us.

*Beside qemu-storage-daemon*, the native engine serves {peer:.2f} times as many reads with {depth} under way, notified,
and {peer_polls:.2f} times as many when both poll. A read that is alone takes {peer_single:.2f} times as long as there
when both sides sleep, and {peer_single_polls:.2f} times when the server polls; {peer_polled:.2f} and
{peer_polled_polls:.2f} times when the driver polls.

{losses}
"""
    figures = (
        Figure("iops", "READS/S", "reads a second", compared=True, plotted=True),
        Figure("p50_us", "P50", "microseconds", digits=1, compared=True, plotted=True),
        Figure("p99_us", "P99", "microseconds", digits=1),
        Figure("cpu_us", "CPU", "microseconds of the server's CPU time a read", digits=2, plotted=True),
    )
    peers = (
        Peer(
            QSD,
            "qemu-utils",
            commands=tuple(
                " ".join(peer_command("FILE", "SOCKET", variant.polling or "")) for variant in (PEER, PEER_POLLS)
            ),
        ),
    )

    def plan(self, quick: bool) -> BlkPlan:
        """How much is measured, of what there is here."""
        io_uring = is_permitted()
        if quick:
            return BlkPlan(deep=4000, single=300, image_bytes=4 << 20, io_uring=io_uring)
        return BlkPlan(io_uring=io_uring, fio=shutil.which(FIO) is not None)

    def taking_part(self, plan: BlkPlan) -> Sequence[Peer]:
        """The peer, when it is asked for, and fio, when it is there; neither without io_uring."""
        if not plan.io_uring:
            return ()
        fio = Peer(FIO, "fio", commands=(" ".join(fio_command("FILE", plan)),))
        return (*super().taking_part(plan), *([fio] if plan.fio else []))

    def cases(self, plan: BlkPlan) -> list[Case]:
        """Many reads under way, and one; and what the file itself gives."""
        return [case for case in (QUICK if plan.quick else CASES) if self.variants(plan, case)]

    def variants(self, plan: BlkPlan, case: Case) -> list[Variant]:
        """One thing at a time, from the native engine that is notified and has split rings."""
        if not plan.io_uring:
            return [] if case.client == NOBODY else [PYTHON, PYTHON_PACKED]
        if case.client == NOBODY:
            return [ALONE, FIO_ALONE] if plan.fio else []
        peers = [PEER, PEER_POLLS] if plan.peer else []
        alone = [ALONE] if case.client == POLLS else []
        return [NATIVE, PYTHON, NATIVE_PACKED, NATIVE_POLLS, *alone, *peers]

    def comparisons(self, plan: BlkPlan, case: Case) -> list[Comparison[Variant]]:
        """What each thing makes; and us against the limit, and against the peer."""
        there = self.variants(plan, case)
        found = [Comparison(of, against) for of, against in FACTORS if of in there and against in there]
        for ours, theirs in ((NATIVE, PEER), (NATIVE_POLLS, PEER_POLLS)):
            if ALONE in there and ours in there:
                bars = (Bar("iops", "reads a second", OF_LIMIT, at_least=True),) if case.depth == DEEP else ()
                found.append(Comparison(ours, ALONE, bars))
            if theirs in there:
                many = Bar("iops", "reads a second", OF_PEER, at_least=True)
                found.append(Comparison(ours, theirs, (many if case.depth == DEEP else Bar("p50_us", "median", 1),)))
        return found

    def prepare(self, plan: BlkPlan, folder: Path) -> None:
        """The file, in the page cache."""
        (folder / IMAGE).write_bytes(random.Random(SEED).randbytes(plan.image_bytes))

    def sample(self, plan: BlkPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """A server and its driver; or neither. UsageError: one CPU is not enough."""
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise UsageError("a server and its driver need a CPU each: let this process run on two")
        image = str(folder.parent / IMAGE)
        total = plan.deep if case.depth == DEEP else plan.single
        shape = {"depth": case.depth, "size": SIZE, "places": plan.image_bytes // SIZE, "seed": SEED}
        if variant in (ALONE, FIO_ALONE):
            with children.Child("vbus.bench.disk_side") as reader:
                reader.ask("stay", cpu=cpus[1])
                if variant == FIO_ALONE:
                    return _of_fio(reader.ask("run", command=fio_command(image, plan)))
                for count in (total // plan.warm_up, total):
                    told = reader.ask("bare", path=image, total=count, batch=min(BATCH, case.depth), **shape)
                return _sample(case, told, told["bytes_received"], told["seconds"])
        # Both begin to begin before either is waited for.
        with children.Child("vbus.bench.disk_side") as server, children.Child("vbus.bench.disk_side") as driver:
            server.ask("stay", cpu=cpus[1])
            driver.ask("stay", cpu=cpus[0])
            return _driven(plan, case, variant, folder, server, driver, {"total": total, **shape})

    def numbers(self, result: Row) -> dict[str, float]:
        """What the page says, of what was measured."""
        numbers: dict[str, float] = {"depth": DEEP}
        deep, single, polled, nobody = CASES
        for name, case, variant, key in (
            ("python", deep, PYTHON, "iops"),
            ("native", deep, NATIVE, "iops"),
            ("native_cpu", deep, NATIVE, "cpu_us"),
            ("python_cpu", deep, PYTHON, "cpu_us"),
            ("single", single, NATIVE, "p50_us"),
            ("polls_single", single, NATIVE_POLLS, "p50_us"),
            ("polled", polled, NATIVE, "p50_us"),
            ("polls_polled", polled, NATIVE_POLLS, "p50_us"),
            ("alone", deep, ALONE, "iops"),
            ("fio", nobody, FIO_ALONE, "iops"),
        ):
            rows = [r for r in result["rows"] if (r["case"], r["variant"]) == (case.factors(), variant.factors())]
            numbers.update((name, row["median"][key]) for row in rows)
        for name, case, of, against, key in (
            ("engine", deep, NATIVE, PYTHON, "iops"),
            ("engine_single", single, NATIVE, PYTHON, "p50_us"),
            ("ring", deep, NATIVE_PACKED, NATIVE, "iops"),
            ("ring_single", single, NATIVE_PACKED, NATIVE, "p50_us"),
            ("polling", deep, NATIVE_POLLS, NATIVE, "iops"),
            ("of_limit", deep, NATIVE, ALONE, "iops"),
            ("of_limit_polls", deep, NATIVE_POLLS, ALONE, "iops"),
            ("of_alone", nobody, FIO_ALONE, ALONE, "iops"),
            ("peer", deep, NATIVE, PEER, "iops"),
            ("peer_polls", deep, NATIVE_POLLS, PEER_POLLS, "iops"),
            ("peer_single", single, NATIVE, PEER, "p50_us"),
            ("peer_single_polls", single, NATIVE_POLLS, PEER_POLLS, "p50_us"),
            ("peer_polled", polled, NATIVE, PEER, "p50_us"),
            ("peer_polled_polls", polled, NATIVE_POLLS, PEER_POLLS, "p50_us"),
        ):
            compared = (case.factors(), of.factors(), against.factors())
            rows = [r for r in result["comparisons"] if (r["case"], r["of"], r["against"]) == compared]
            numbers.update((name, row["ratios"][key]) for row in rows)
        return numbers

    def words(self, result: Row) -> str:
        """Those paragraphs of the template whose numbers there are, and where we lose."""
        said: dict[str, Any] = {**self.numbers(result), "losses": _losses(result)}
        paragraphs = [
            paragraph.format(**said)
            for paragraph in self.template.split("\n\n")
            if {name for _, name, _, _ in string.Formatter().parse(paragraph) if name} <= said.keys()
        ]
        return "\n\n".join(paragraphs)

    def notes(self, result: Row) -> list[str]:
        """What is missing here."""
        if result["options"]["io_uring"]:
            return []
        return ["io_uring is not permitted here: the native engine, and what it is held against, are left out."]


def is_permitted() -> bool:
    """Whether this process may use io_uring."""
    try:
        _core.BlkEngine.permitted()
    except OSError:
        return False
    return True


def _driven(
    plan: BlkPlan,
    case: Case,
    variant: Variant,
    folder: Path,
    server: children.Child,
    driver: children.Child,
    shape: Mapping[str, Any],
) -> Sample:
    """Reads of a server by a driver. UnequalWorkError, SideError."""
    image, socket = str(folder.parent / IMAGE), str(folder / "disk.sock")
    ours = variant.server == VBUS
    if ours:
        server.ask("serve", path=image, socket=socket, engine=variant.engine, polling=variant.polling)
    else:
        server.ask("start", command=peer_command(image, socket, variant.polling or ""), socket=socket)
    agreed = driver.ask("attach", socket=socket, packed=variant.ring == "packed")
    if agreed["packed"] != (variant.ring == "packed"):
        raise children.SideError(f"{variant.server} has no {variant.ring} rings")
    driver.ask("read", polls=case.client == POLLS, **{**shape, "total": shape["total"] // plan.warm_up})
    before = server.ask("served") if ours else None
    used = server.ask("cpu_seconds")
    told = driver.ask("read", polls=case.client == POLLS, **shape)
    used = server.ask("cpu_seconds") - used
    if before is not None:
        after = server.ask("served")
        served = {key: after[key] - before[key] for key in after}
        works = [("the disk", served), ("the driver", {"requests": told["requests"], "failed": 0})]
        measure.check_same_work(f"{case}, {variant}", works)
    # Without the byte that says how a read ended.
    return _sample(case, told, told["bytes_received"] - told["requests"], used)


def _sample(case: Case, told: Mapping[str, Any], read: int, used: float) -> Sample:
    work = {"requests": told["requests"], "bytes_read": read}
    if case.client != NOBODY:
        work["checksum"] = told["checksum"]
    values = {
        "iops": told["requests"] / told["seconds"],
        "p50_us": told["p50_us"],
        "p99_us": told["p99_us"],
        "cpu_us": used / told["requests"] * 1e6,
    }
    return Sample(work, values)


def _of_fio(said: Mapping[str, Any]) -> Sample:
    """Of what fio says of its only job. Its reads are at other places, so there is no checksum."""
    [job] = said["jobs"]
    reads = job["read"]
    times = reads["clat_ns"]["percentile"]
    values = {"iops": reads["iops"], "p50_us": times["50.000000"] / 1000, "p99_us": times["99.000000"] / 1000}
    return Sample({"requests": reads["total_ios"], "bytes_read": reads["io_bytes"]}, values)


def _losses(result: Row) -> str:
    """Where we lose: bars that are missed, and where another is better than us."""
    missed = [
        f"{named(row['case'])}: {named(row['of'])} against {named(row['against'])}: "
        f"{bar['what']} {bar['ratio']:.2f}{bar['unit']}"
        for row in result["comparisons"]
        for bar in row["bars"]
        if not bar["met"]
    ]
    return f"Where we lose: {'; '.join(missed)}." if missed else "No bar is missed."


MEASUREMENT = Blk()
