"""A network's loopback behind vhost-user, driven by DPDK as fast as it can, against DPDK's own back-end.

The driver is always the same: `dpdk-testpmd` sends what it gets, so that a fixed number of frames goes round and round.
In one case that is what is measured: frames a second, and the time that the back-end has for each. Both sides count,
and must have counted the same. The other case tells what a back-end's batches cost whoever is first: a driver of ours
sends a frame alone and then a burst, in turns; what the first of a burst takes more than the frame before it, it was
held back for those behind it.

Both sides are processes on a CPU each. A window in which others had those CPUs is measured again, a few times at most.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vbus.bench import children, harness, measure, testpmd
from vbus.bench.measurement import Bar, Comparison, Factors, Figure, Measurement, Plan, Sample
from vbus.bench.peers import Peer
from vbus.bench.testpmd import TESTPMD, Testpmd
from vbus.bench.work import Threads
from vbus.errors import UsageError

Row = dict[str, Any]
PYTHON, NATIVE, DPDK = "python", "native", "dpdk"
SPLIT, PACKED = "split", "packed"
NOTIFIED, ADAPTIVE, ALWAYS = "notified", "adaptive", "always"
THROUGHPUT, HELD = "throughput", "held back"
SETTLE_SECONDS = 10.0
MOST_CPU = 1.0
LEAST_RATE = 1.0
MOST_HELD_NS = 2000
SIZE = 64
"""Bytes of a frame, which is what DPDK sends."""


@dataclass(frozen=True)
class NetPlan(Plan):
    """How much is measured."""

    rounds: int = 9
    """More, as the driver comes to one of several speeds, and stays there for the run."""
    ring_size: int = 256
    """Descriptors of each ring, which is virtio-user's own choice."""
    bursts: int = 4
    """Bursts of 32 frames that are on their way: half of what a ring holds, so that none is ever full."""
    warm_up: float = 0.3
    """Seconds."""
    window: float = 0.5
    windows: int = 6
    """How often a window is measured, at most."""
    disturbed: float = 0.01
    """The part of a window that either side may wait for its CPU, or it is measured again."""
    pairs: int = 20_000
    """Frames that are alone, each followed by a burst."""
    burst: int = 64
    """Frames of those: twice as many as either back-end takes at once."""


@dataclass(frozen=True)
class Case(Factors):
    """What is looked at."""

    what: str


@dataclass(frozen=True)
class Variant(Factors):
    """Who serves, through which rings, and what it does while it has nothing to do."""

    by: str
    ring: str
    polling: str


class BackEnd(Protocol):
    """Who serves."""

    def clear(self) -> None:
        """Begin to count anew."""

    def busy(self) -> float | None:
        """Nanoseconds for a frame since then, without looks in vain; None when it does not know."""

    def frames(self) -> int:
        """Frames that were given back so far."""

    def threads(self) -> Threads:
        """What its threads have used."""

    def totals(self) -> tuple[int, int, int]:
        """Frames taken from the driver, given back, and lost, since it began."""


class Ours:
    """A bus of ours."""

    def __init__(self, child: children.Child) -> None:
        self._child = child
        self._before: Row = {}

    def clear(self) -> None:
        """Begin to count anew."""
        self._before = self._child.ask("look")

    def busy(self) -> float | None:
        """By the worker's own clock; None without a worker."""
        now = self._child.ask("look")
        taken = now["taken"] - self._before["taken"]
        busy = now["busy"] - self._before["busy"]
        return busy / taken if busy and taken else None

    def frames(self) -> int:
        """Frames that were given back so far."""
        return int(self._child.ask("look")["given"])

    def threads(self) -> Threads:
        """What its threads have used."""
        threads: Threads = self._child.ask("look")["threads"]
        return threads

    def totals(self) -> tuple[int, int, int]:
        """Frames taken from the driver, given back, and lost, since it began. UnequalWorkError: not of their length."""
        now = self._child.ask("look")
        works = [("the frames", {"bytes": now["taken"] * SIZE}), ("their bytes", {"bytes": now["taken_bytes"]})]
        measure.check_same_work("the back-end", works)
        return now["taken"], now["given"], now["dropped"]


class Theirs:
    """DPDK's."""

    def __init__(self, program: Testpmd) -> None:
        self._program = program
        self.clear = program.clear
        self.threads = program.threads

    def busy(self) -> float | None:
        """By its own count of cycles."""
        return self._program.busy()

    def frames(self) -> int:
        """Frames that were given back so far."""
        return self._program.totals()[1]

    def totals(self) -> tuple[int, int, int]:
        """Frames taken from the driver, given back, and lost, since it began."""
        taken, given = self._program.totals()
        return taken, given, taken - given


class Net(Measurement[NetPlan, Case, Variant]):
    """A loopback at full speed."""

    name = "net"
    title = "Networks: a loopback at full speed"
    figures = (
        Figure("mpps", "MPPS", "million frames a second", digits=2, compared=True, plotted=True),
        Figure("busy_ns", "BUSY NS/FRAME", "nanoseconds", digits=1, compared=True, plotted=True),
        Figure("cpu_ns", "CPU NS/FRAME", "nanoseconds", digits=1, compared=True),
        Figure("driver_ns", "DRIVER NS/FRAME", "nanoseconds", digits=1),
        Figure("waited", "WAITED %", "percent", digits=1),
        Figure("alone_ns", "ALONE", "nanoseconds", compared=True, plotted=True),
        Figure("held_ns", "HELD BACK", "nanoseconds", compared=True, plotted=True),
        Figure("held_p99_ns", "P99", "nanoseconds"),
    )
    template = """\
`dpdk-testpmd` (virtio-user) sends frames of {size:.0f} bytes, gets them back and sends them again, {under_way:.0f} of
them at a time, on one CPU; a back-end on the other has a loopback. {best:.2f} million frames a second go round through
split rings with the native engine, always polling.

What each factor contributes, all others being equal: the native engine {engine:.1f} times what the model in Python
does, both notified; packed rings {packed:.2f} times what split ones do; a worker that waits a little before it sleeps
{adaptive:.2f} times what one does that always sleeps, and one that never sleeps {always:.2f} times.

A frame costs a worker {busy:.0f} ns (BUSY): the time of all turns in which it found something, which worker and DPDK
count by themselves, less the part of it that others had the CPU. Cycles and instructions would say more, but processor
counters are not to be had in most virtual machines. CPU is what the system says that all threads of the back-end ran,
looks in vain included. DRIVER is what BUSY is, of the driver; WAITED the part of the window that either side was kept
from its CPU.

The worker shows frames in batches, so the first of a burst waits for others: {held:.0f} ns longer than a frame that is
alone takes there and back (median; 99 of 100 within {held_p99:.0f} ns). A driver of ours that sends one frame alone and
then {burst:.0f} at once, again and again, takes the time of the first of each.
"""
    peer_template = """
Against DPDK's own back-end (`net_vhost`, forwarding mode `io`), the same driver gets {rate_split:.2f} times as many
frames a second through split rings and {rate_packed:.2f} times through packed ones, for {busy_split:.2f} and
{busy_packed:.2f} times the back-end's time a frame (both count turns in which they found something alone). {lost}
[Where the time of a frame goes](benchmarks/profile.md).
"""
    needs = (TESTPMD,)
    peers = (TESTPMD,)

    def plan(self, quick: bool) -> NetPlan:
        """How much is measured."""
        return NetPlan(warm_up=0.05, window=0.1, windows=1, pairs=500) if quick else NetPlan()

    def taking_part(self, plan: NetPlan) -> list[Peer]:
        """DPDK is the driver always, and a back-end when it is asked for."""
        ends = [_driver_words(plan, Path("SOCKET"), "CPU", "PACKED")]
        ends += [_back_end_words(Path("SOCKET"), "CPU")] if plan.peer else []
        return [replace(TESTPMD, commands=tuple(" ".join([TESTPMD.program, *words]) for words in ends))]

    def cases(self, plan: NetPlan) -> list[Case]:
        """Many frames, and the first of a burst."""
        return [Case(THROUGHPUT), Case(HELD)]

    def variants(self, plan: NetPlan, case: Case) -> list[Variant]:
        """Who serves. What is held against each other is measured one after the other."""
        rings = (SPLIT, PACKED)
        peers = [DPDK] if plan.peer else []
        if case.what == HELD:
            return [Variant(by, ring, ALWAYS) for ring in rings for by in (NATIVE, *peers)]
        slow = [Variant(by, ring, NOTIFIED) for ring in rings for by in (PYTHON, NATIVE)]
        if plan.quick:
            return [*slow[:2], Variant(NATIVE, PACKED, ALWAYS), *(Variant(by, PACKED, ALWAYS) for by in peers)]
        adaptive = [Variant(NATIVE, ring, ADAPTIVE) for ring in rings]
        return [*slow, *adaptive, *(Variant(by, ring, ALWAYS) for ring in rings for by in (NATIVE, *peers))]

    def comparisons(self, plan: NetPlan, case: Case) -> list[Comparison[Variant]]:
        """One factor each."""
        there = self.variants(plan, case)
        found = []
        if case.what == HELD:
            for variant in there:
                bar = Bar("held_ns", "held back", MOST_HELD_NS, unit=" ns")
                found.append(Comparison(variant, None, (bar,) if variant.by == NATIVE else ()))
            return found
        bars = (Bar("mpps", "frames/s", LEAST_RATE, at_least=True), Bar("busy_ns", "busy time a frame", MOST_CPU))
        for ring in (SPLIT, PACKED):
            notified = Variant(NATIVE, ring, NOTIFIED)
            always = Variant(NATIVE, ring, ALWAYS)
            pairs: list[tuple[Variant, Variant, tuple[Bar, ...]]] = [
                (notified, Variant(PYTHON, ring, NOTIFIED), ()),
                (Variant(NATIVE, ring, ADAPTIVE), notified, ()),
                (always, notified, ()),
                (always, Variant(DPDK, ring, ALWAYS), bars),
            ]
            if ring == PACKED:
                pairs.append((always, Variant(NATIVE, SPLIT, ALWAYS), ()))
            found += [Comparison(of, against, bars) for of, against, bars in pairs if {of, against} <= {*there}]
        return found

    def sample(self, plan: NetPlan, case: Case, variant: Variant, folder: Path) -> Sample:
        """A back-end, and a driver on the other CPU. UsageError: one CPU is not enough."""
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise UsageError("a driver and a back-end that poll need two CPUs: let this process run on more than one")
        socket = folder / "net.sock"
        with _back_end(variant, socket, cpus[1]) as back_end:
            if case.what == HELD:
                return self._bursts(plan, case, variant, (socket, cpus[0]), back_end)
            words = _driver_words(plan, socket, cpus[0], int(variant.ring == PACKED))
            with Testpmd(words, "the front-end") as front_end:
                return self._round_and_round(plan, f"{case}, {variant}", front_end, back_end)

    def _round_and_round(self, plan: NetPlan, what: str, front_end: Testpmd, back_end: BackEnd) -> Sample:
        front_end.ask(f"start tx_first {plan.bursts}")
        time.sleep(plan.warm_up)
        best = _window(plan, front_end, back_end)
        for _ in range(plan.windows - 1):
            if best["waited"] <= plan.disturbed * 100:
                break
            other = _window(plan, front_end, back_end)
            best = min(best, other, key=lambda values: values["waited"])
        front_end.ask("stop")
        under_way = plan.bursts * testpmd.BURST
        # What was on its way when the driver stopped is in its ring, and stays there.
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            (received, sent), (taken, given, lost) = front_end.totals(), back_end.totals()
            if (taken, given) == (sent, received + under_way) or time.monotonic() > deadline:
                break
        seen = {"sent": sent, "came back, or are under way": received + under_way, "lost": 0}
        counted = {"sent": taken, "came back, or are under way": given, "lost": lost}
        measure.check_same_work(what, [("the driver", seen), ("the back-end", counted)])
        return Sample({"frames_under_way": under_way, "bytes_a_frame": SIZE, "lost": lost}, best)

    def _bursts(
        self, plan: NetPlan, case: Case, variant: Variant, where: tuple[Path, int], back_end: BackEnd
    ) -> Sample:
        socket, cpu = where
        with children.Child("vbus.bench.net_side") as driver:
            shape = {"count": plan.pairs, "burst": plan.burst, "size": SIZE}
            told = driver.ask("bursts", socket=str(socket), packed=variant.ring == PACKED, cpu=cpu, **shape)
        taken, given, lost = back_end.totals()
        works = [
            ("the driver", {"sent": told["frames"], "came back": told["frames"], "lost": 0}),
            ("the back-end", {"sent": taken, "came back": given, "lost": lost}),
        ]
        measure.check_same_work(f"{case}, {variant}", works)
        values = {"alone": "alone_p50_ns", "held": "held_p50_ns", "held_p99": "held_p99_ns"}
        work = {"frames": told["frames"], "checksum": told["checksum"]}
        return Sample(work, {f"{key}_ns": told[value] for key, value in values.items()})

    def numbers(self, result: Row) -> dict[str, float]:
        """What the page says: of split rings, unless said; NaN of what a quick run leaves out."""
        always = {"by": NATIVE, "polling": ALWAYS}
        alone = _median(result, what=HELD, ring=SPLIT, **always)
        full = _median(result, what=THROUGHPUT, ring=SPLIT, **always)
        notified = {"by": NATIVE, "ring": SPLIT, "polling": NOTIFIED}
        nan = float("nan")
        return {
            "size": SIZE,
            "under_way": result["options"]["bursts"] * testpmd.BURST,
            "best": full.get("mpps", nan),
            "busy": full.get("busy_ns", nan),
            "engine": _ratio(result, notified, {"by": PYTHON}).get("mpps", nan),
            "packed": _ratio(result, always | {"ring": PACKED}, {"by": NATIVE, "ring": SPLIT}).get("mpps", nan),
            "adaptive": _ratio(result, notified | {"polling": ADAPTIVE}, notified).get("mpps", nan),
            "always": _ratio(result, notified | {"polling": ALWAYS}, notified).get("mpps", nan),
            "held": alone.get("held_ns", nan),
            "held_p99": alone.get("held_p99_ns", nan),
            "burst": result["options"]["burst"],
        }

    def words(self, result: Row) -> str:
        """What the figures say, and where we lose against DPDK, if it took part."""
        said = super().words(result)
        if not result["options"]["peer"]:
            return said
        numbers: dict[str, float] = {}
        losses: list[str] = []
        for ring in (SPLIT, PACKED):
            ratios = _ratio(result, {"by": NATIVE, "ring": ring, "polling": ALWAYS}, {"by": DPDK})
            rate, busy = (ratios.get(key, float("nan")) for key in ("mpps", "busy_ns"))
            numbers |= {f"rate_{ring}": rate, f"busy_{ring}": busy}
            losses += [f"frames a second through {ring} rings"] if rate < LEAST_RATE else []
            losses += [f"time a frame through {ring} rings"] if busy > MOST_CPU else []
        lost = f"We lose in {', '.join(losses)}." if losses else "We lose in neither."
        return said + self.peer_template.format(**numbers, lost=lost)


def _driver_words(plan: NetPlan, socket: Path, cpu: int | str, packed: int | str) -> list[str]:
    """What DPDK's driver is started with."""
    port = testpmd.frontend_port(socket, packed=packed, size=plan.ring_size)
    return testpmd.options(port, cpu=cpu, prefix="vbus-driver", size=plan.ring_size)


def _back_end_words(socket: Path, cpu: int | str) -> list[str]:
    """What DPDK's back-end is started with."""
    return testpmd.options(testpmd.backend_port(socket), cpu=cpu, prefix="vbus-back-end")


@contextlib.contextmanager
def _back_end(variant: Variant, socket: Path, cpu: int) -> Iterator[BackEnd]:
    if variant.by == DPDK:
        with Testpmd(_back_end_words(socket, cpu), "the back-end") as program:
            program.ask("start")
            yield Theirs(program)
        return
    with children.Child("vbus.bench.net_side") as child:
        child.ask("serve", socket=str(socket), engine=variant.by, polling=variant.polling, cpu=cpu)
        yield Ours(child)


def _window(plan: NetPlan, front_end: Testpmd, back_end: BackEnd) -> dict[str, float]:
    """What happens in one window, by the driver's clock and count; the back-end's own of its time."""
    back_end.clear()
    front_end.clear()
    sides = front_end, back_end
    before = [side.threads() for side in sides]
    frames, began = back_end.frames(), time.monotonic_ns()
    time.sleep(plan.window)
    rate = front_end.rate()
    after = [side.threads() for side in sides]
    frames, elapsed = back_end.frames() - frames, time.monotonic_ns() - began
    if not frames:
        raise children.SideError("no frame comes back")
    ran = [now["ran"] - then["ran"] for now, then in zip(after, before, strict=True)]
    waited = [now["waited"] - then["waited"] for now, then in zip(after, before, strict=True)]
    # By clocks that go on while others have the CPU: as much of it is not theirs.
    own = [there / max(there + away, 1) for there, away in zip(ran, waited, strict=True)]
    busy = back_end.busy()
    return {
        "mpps": rate / 1e6,
        **({"busy_ns": busy * own[1]} if busy is not None else {}),
        "cpu_ns": ran[1] / frames,
        "driver_ns": front_end.busy() * own[0],
        "waited": max(waited) / elapsed * 100,
    }


def _median(result: Row, **factors: Any) -> dict[str, float]:
    """Of the one row with these factors; nothing when there is none."""
    try:
        median: dict[str, float] = harness.find(result["rows"], **factors)["median"]
    except LookupError:
        return {}
    return median


def _ratio(result: Row, of: Row, against: Row) -> dict[str, float]:
    """Of the one comparison of two with these factors; nothing when there is none."""
    for row in result["comparisons"]:
        other = row["against"] or {}
        if (
            all(row["of"][key] == of[key] for key in of)
            and other
            and all(other[key] == against[key] for key in against)
        ):
            ratios: dict[str, float] = {key: value for key, value in row["ratios"].items() if value is not None}
            return ratios
    return {}


MEASUREMENT = Net()
