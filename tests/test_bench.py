"""The benchmark's harness: its books, not its figures. Nothing here depends on how long something takes."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal as signals
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from command import VBUS, fails, out, vbus
from conftest import needs_io_uring, wait_until
from vbus.bench import children, harness, measure, measurements, plot, report, tables
from vbus.bench.driver_side import Window, arrivals_of
from vbus.bench.measure import Summary, UnequalWorkError
from vbus.bench.measurement import Bar, Comparison, Sample
from vbus.bench.measurements import blk, signal_picture
from vbus.bench.measurements import signal as bench
from vbus.bench.peers import Peer
from vbus.cli import bench as cli_bench
from vbus.cli import main
from vbus.errors import DriverError, UsageError

COUNTERS = {"signalled": 10, "sent": 8, "rung": 4}
VALUES = ("requests_per_second", "p50_us", "p99_us")
COUNTED = ("doorbells_to_device", "doorbells_to_driver", "doorbells", "cpu_us_bus", "cpu_us_driver", "cpu_us")
MODULES = "vbus.bench.measurements"
DOCS = Path(__file__).parent.parent / "docs"
SVG = "{http://www.w3.org/2000/svg}"


# What the command gives, end to end.


@dataclass(frozen=True)
class Quick:
    """What a quick run of everything gave."""

    results: dict[str, dict[str, Any]]
    folder: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Everything, small, as a user runs it."""
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    done = vbus("bench", "all", "--quick", "--json", "--output", folder, cwd=folder.parent.parent, timeout=380)
    assert done.returncode == 0, done.stderr.decode()
    return Quick({result["benchmark"]: result for result in json.loads(done.stdout)}, folder)


def is_there(name: str) -> bool:
    """Whether all programs are that a measurement cannot do without."""
    return all(shutil.which(one.program) for one in harness.load(name).needs)


def result_of(quick: Quick, name: str) -> dict[str, Any]:
    """What was measured."""
    if not is_there(name):
        pytest.skip(f"{name} needs {', '.join(one.package for one in harness.load(name).needs)}")
    return quick.results[name]


# Whichever test is first waits for the run.
@pytest.mark.timeout(400)
def test_all_that_can_be_measured_is(quick: Quick) -> None:
    assert [*harness.NAMES, *harness.IN_GUESTS] == list(cli_bench.ABOUT)
    assert [name for name, about in cli_bench.ABOUT.items() if about.in_guest] == list(harness.IN_GUESTS)
    assert list(quick.results) == [name for name in harness.NAMES if is_there(name)]
    modules = {path.stem for path in Path(measurements.__file__).parent.glob("*.py")}
    assert {name for name in modules if hasattr(importlib.import_module(f"{MODULES}.{name}"), "MEASUREMENT")} == {
        *harness.NAMES,
        *harness.IN_GUESTS,
    }


@pytest.mark.parametrize("name", harness.NAMES)
def test_a_quick_run_has_every_row_of_its_plan(quick: Quick, name: str) -> None:
    result = result_of(quick, name)
    assert list(result) == [
        *("benchmark", "machine", "peers", "load_average", "began", "seconds", "options", "rows", "comparisons"),
    ]
    assert list(result["machine"]) == ["cpu", "cpus", "architecture", "memory_bytes", "kernel", "python", "vbus"]
    measurement = harness.load(name)
    plan = harness.plan_of(measurement, quick=True)
    assert measurement.name == name
    assert result["peers"] == json.loads(json.dumps([one.describe() for one in measurement.taking_part(plan)]))
    assert result["options"] == json.loads(json.dumps(asdict(plan)))
    assert (plan.rounds, plan.quick) == (1, True)
    cases = measurement.cases(plan)
    assert [(row["case"], row["variant"]) for row in result["rows"]] == [
        (case.factors(), variant.factors()) for case in cases for variant in measurement.variants(plan, case)
    ]
    assert [(row["case"], row["of"], row["against"]) for row in result["comparisons"]] == [
        (case.factors(), one.of.factors(), one.against and one.against.factors())
        for case in cases
        for one in measurement.comparisons(plan, case)
    ]
    for row in result["rows"]:
        assert len(row["rounds"]) == plan.rounds
        assert row["work"]
        assert all(isinstance(count, int) for count in row["work"].values())
        for key, median in row["median"].items():
            low, high = row["spread"][key]
            assert low <= median <= high
            assert median in [values[key] for values in row["rounds"]]
    for row in result["comparisons"]:
        assert row["counts"] == (not row["why"])
        assert not any(bar["met"] for bar in row["bars"]) or row["counts"]


@pytest.mark.parametrize("name", harness.NAMES)
def test_what_is_written_is_what_is_printed_and_can_be_looked_at(quick: Quick, name: str) -> None:
    result = result_of(quick, name)
    assert json.loads((quick.folder / f"{name}.json").read_text()) == [result]
    text = (quick.folder / f"{name}.svg").read_text()
    assert text == harness.load(name).draw(result)
    for group in ElementTree.fromstring(text.encode()).iter(f"{SVG}g"):
        left, top = map(float, group.attrib["transform"][len("translate(") : -1].split())
        for element in group.iter():
            places = element.attrib
            if "x" in places:
                assert 0 <= left + float(places["x"]) + float(places.get("width", 0)) <= plot.WIDTH
                assert top + float(places["y"]) >= 0


@pytest.mark.parametrize("name", harness.NAMES)
def test_tables_have_every_row_and_every_verdict(
    quick: Quick, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    result = result_of(quick, name)
    monkeypatch.setattr(harness, "run", lambda measurement, plan, say: result)
    target, picture = tmp_path / "file.json", tmp_path / "file.svg"
    assert main(["bench", name, "--quick", "--json", str(target), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text()) == [result]
    assert picture.read_text() == (quick.folder / f"{name}.svg").read_text()
    assert main(["bench", name, "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    measurement = harness.load(name)
    assert lines[0] == measurement.title
    for table in measurement.tables(result):
        assert table.title in lines
        first = lines.index(table.title) + 1
        assert lines[first].split() == " ".join(table.headings).split()
        for row, line in zip(table.rows, lines[first + 1 :], strict=False):
            assert line.split() == " ".join(row).split()
    verdicts = [row[-1] for row in measurement.tables(result)[-1].rows]
    assert [verdict.startswith("does not count: ") for verdict in verdicts] == [
        not row["counts"] for row in result["comparisons"]
    ]


def test_the_page_has_a_section_a_measurement_and_all_its_numbers(quick: Quick) -> None:
    page = report.page(quick.folder)
    for name, result in quick.results.items():
        measurement = harness.load(name)
        assert f"\n## {measurement.title}\n" in page
        assert f"]({quick.folder.name}/{name}.svg)" in page
        assert measurement.words(result).strip() in page
        for table in measurement.tables(result):
            assert table.markdown() in page
    bars = [bar for result in quick.results.values() for row in result["comparisons"] for bar in row["bars"]]
    assert len(
        [line for line in page.splitlines() if line.endswith((" met |", " missed |", " does not count |"))]
    ) == len(bars)
    assert page.count("not to be believed") == len(quick.results)


def test_the_page_that_is_committed_is_what_the_figures_beside_it_give() -> None:
    results = sorted((DOCS / "benchmarks").glob("*.json"))
    assert (DOCS / "benchmarks.md").is_file() == bool(results)
    for path in results:
        [result] = json.loads(path.read_text())
        assert not result["options"]["quick"]
        assert result["options"]["rounds"] >= 5
        assert path.with_suffix(".svg").read_text() == harness.load(path.stem).draw(result)
    if results:
        # make bench-page
        assert (DOCS / "benchmarks.md").read_text() == report.page(DOCS / "benchmarks")


def test_a_page_of_nothing_is_none(tmp_path: Path) -> None:
    assert fails("bench", "report", ".", cwd=tmp_path) == [
        "vbus: .: no results: write them there with vbus bench all --output ."
    ]


# Signals.


def test_signals_are_measured_on_every_number_of_devices(quick: Quick) -> None:
    plan = bench.quick_plan()
    rows = quick.results["signal"]["rows"]
    asked = {
        "saturated": plan.requests,
        "single": plan.single_requests,
        "paced": plan.paced_requests,
        "urgent": plan.urgent_requests,
    }
    for row in rows:
        load = row["case"]["load"]
        assert row["work"]["requests"] == asked[load]
        assert row["work"]["bytes_sent"] == row["work"]["bytes_received"] == plan.size * row["work"]["requests"]
        assert {*VALUES, *(() if load == "urgent" else COUNTED)} <= set(row["median"])
        if load != "urgent":
            check_counters(row)
        elif row["case"]["devices"]:
            assert row["median"]["bulk_requests_per_second"] > 0
    check_picture((quick.folder / "signal.svg").read_text(), quick.results["signal"])


def check_counters(row: dict[str, Any]) -> None:
    """What holds of signals, whatever the machine does meanwhile."""
    for values in row["rounds"]:
        for way in ("to_device", "to_driver"):
            assert values[f"signals_{way}"] > 0
            assert values[f"doorbells_{way}"] <= values[f"events_{way}"] <= values[f"signals_{way}"]
            if row["variant"]["signal"] == "direct":
                # One signal, one doorbell, unless the bell is full.
                assert values[f"doorbells_{way}"] == values[f"signals_{way}"]
        # A request that is alone on its way is answered with a signal of its own; more never are.
        assert values["signals_to_driver"] <= 1
        assert values["doorbells"] == values["doorbells_to_device"] + values["doorbells_to_driver"]


def check_picture(text: str, result: dict[str, Any]) -> None:
    """Well-formed; each point, bar and label is there, and within the page."""
    svg = ElementTree.fromstring(text.encode())
    loads = [row["case"]["load"] for row in result["rows"]]
    points = loads.count("saturated") * 3 + loads.count("paced") * 2
    assert len(list(svg.iter(f"{SVG}circle"))) == points + 4  # the legend's
    assert len(list(svg.iter(f"{SVG}rect"))) == 2 * loads.count("urgent") + 1  # the page's
    words = [element.text for element in svg.iter(f"{SVG}text")]
    for word in (
        "devices",
        "a request",
        "µs a request",
        "tunnelled, EVENT_IDX on",
        "idle bus",
        "Under load: doorbells to the device",
    ):
        assert word in words
    for group in svg.iter(f"{SVG}g"):
        left, top = map(float, group.attrib["transform"][len("translate(") : -1].split())
        for circle in group.iter(f"{SVG}circle"):
            assert 0 <= left + float(circle.attrib["cx"]) <= plot.WIDTH
            assert 0 <= top + float(circle.attrib["cy"]) <= signal_picture.HEIGHT


def test_wrong_usage(tmp_path: Path) -> None:
    assert fails("bench", "signal", "--rounds", "0", cwd=tmp_path)[0].startswith("vbus: invalid value for '--rounds'")
    (tmp_path / "file").write_text("")
    assert "'--output'" in fails("bench", "signal", "--output", "file", cwd=tmp_path)[0]
    assert fails("bench", "singal", cwd=tmp_path)[0].endswith("'singal': did you mean 'signal'?")
    assert fails("bench", "signal", "--plot", "none/x.svg", cwd=tmp_path) == [
        "vbus: none/x.svg: its folder is not there, or not writable"
    ]
    assert "--quick" in out("bench", "signal", "--help", cwd=tmp_path)


def test_an_interrupt_leaves_nothing_running(tmp_path: Path) -> None:
    process = subprocess.Popen([*VBUS, "bench", "signal"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        children_of = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def both() -> list[int]:
            found = [int(pid) for pid in children_of.read_text().split()]
            return found if len(found) == 2 else []

        assert wait_until(both, 30)
        sides = both()
        process.send_signal(signals.SIGINT)
        stdout, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert (process.returncode, stdout) == (130, b"")
    # A side that was about to begin notices the end of its input once it has begun.
    assert wait_until(lambda: not any(map(runs, sides)), 30)


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# Disks.

QSD = pytest.mark.skipif(shutil.which(blk.QSD) is None, reason="no qemu-storage-daemon: apt-get install qemu-utils")
HAS_FIO = pytest.mark.skipif(shutil.which(blk.FIO) is None, reason="no fio: apt-get install fio")


def sample_of(variant: blk.Variant, case: blk.Case, folder: Path, **changes: Any) -> Sample:
    """One run of a small plan."""
    plan = replace(blk.MEASUREMENT.plan(quick=True), quick=True, **changes)
    blk.MEASUREMENT.prepare(plan, folder)
    run = folder / variant.server.replace(" ", "-")
    run.mkdir()
    return blk.MEASUREMENT.sample(plan, case, variant, run)


def test_every_server_of_a_disk_reads_the_same(quick: Quick) -> None:
    result = quick.results["blk"]
    for case in {json.dumps(row["case"]) for row in result["rows"]}:
        works = [row["work"] for row in result["rows"] if row["case"] == json.loads(case)]
        assert len(works) > 1
        assert all(work == works[0] for work in works)
        assert works[0]["bytes_read"] == blk.SIZE * works[0]["requests"]
        assert works[0]["checksum"]


def _read(path: Path) -> bytes:
    """What is in a file, as long as it is there."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@QSD
@needs_io_uring
def test_the_daemon_of_qemu_reads_the_same_as_io_uring_alone(tmp_path: Path) -> None:
    deep = blk.CASES[0]
    alone = sample_of(blk.ALONE, deep, tmp_path)
    peer = sample_of(blk.PEER_POLLS, deep, tmp_path, peer=True)
    assert peer.work == alone.work
    assert set(peer.values) == set(alone.values)
    # That it has no packed rings is said, and is no figure of split ones.
    packed = replace(blk.PEER, ring="packed")
    with pytest.raises(children.SideError, match="qemu-storage-daemon has no packed rings"):
        blk.MEASUREMENT.sample(blk.MEASUREMENT.plan(quick=True), deep, packed, tmp_path / blk.QSD)
    # What a side has started ends with it, however that ends.
    commands = Path("/proc").glob
    assert wait_until(lambda: not any(str(tmp_path).encode() in _read(path) for path in commands("[0-9]*/cmdline")), 30)


@HAS_FIO
@needs_io_uring
def test_fio_reads_as_much_as_io_uring_alone(tmp_path: Path) -> None:
    bare = blk.CASES[-1]
    fio, alone = (sample_of(variant, bare, tmp_path) for variant in (blk.FIO_ALONE, blk.ALONE))
    assert fio.work == alone.work == {"requests": 4000, "bytes_read": 4000 * blk.SIZE}
    assert set(fio.values) < set(alone.values)


@needs_io_uring
def test_reads_of_a_file_itself_are_checked(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(8 * blk.SIZE))
    with children.Child("vbus.bench.disk_side") as side:
        shape = {"path": str(image), "total": 64, "depth": 4, "size": blk.SIZE, "seed": 1, "batch": 2}
        told = side.ask("bare", places=8, **shape)
        assert (told["requests"], told["bytes_received"]) == (64, 64 * blk.SIZE)
        assert side.ask("bare", places=8, **shape | {"depth": 1})["checksum"] == told["checksum"]
        assert side.ask("bare", places=8, **shape | {"seed": 2})["checksum"] != told["checksum"]
        with pytest.raises(children.SideError, match="0 bytes were read of 4096"):
            side.ask("bare", places=16, **shape)
        with pytest.raises(children.SideError, match="multiples of 512"):
            side.ask("bare", places=8, **shape | {"size": 100})


def test_a_server_that_ends_is_what_it_said(tmp_path: Path) -> None:
    with children.Child("vbus.bench.disk_side") as side:
        command = ["sh", "-c", "echo no such disk >&2; false"]
        with pytest.raises(children.SideError, match="sh does not serve: no such disk"):
            side.ask("start", command=command, socket=str(tmp_path / "none.sock"))
        with pytest.raises(children.SideError, match="sh failed: no such disk"):
            side.ask("run", command=command)


def test_what_takes_part_is_in_the_result_with_every_option() -> None:
    plan = replace(blk.MEASUREMENT.plan(quick=False), peer=True, io_uring=True, fio=True)
    qsd, fio = blk.MEASUREMENT.taking_part(plan)
    assert [command.split()[0] for command in (*qsd.commands, *fio.commands)] == [blk.QSD, blk.QSD, blk.FIO]
    assert [re.findall(r"poll-max-ns=(\d+)", command) for command in qsd.commands] == [["0"], ["100000"]]
    assert "/" not in "".join((*qsd.commands, *fio.commands))
    cases = blk.MEASUREMENT.cases(plan)
    assert [blk.FIO_ALONE in blk.MEASUREMENT.variants(plan, case) for case in cases] == [False, False, False, True]
    limits = [bar.limit for case in cases for one in blk.MEASUREMENT.comparisons(plan, case) for bar in one.bars]
    assert limits == [0.8, 1.5, 0.8, 1.5, 1, 1, 1, 1]


def test_without_io_uring_disks_are_measured_in_python_and_it_is_said(quick: Quick) -> None:
    plan = replace(blk.MEASUREMENT.plan(quick=True), quick=True, peer=True, io_uring=False)
    assert blk.MEASUREMENT.taking_part(plan) == ()
    cases = blk.MEASUREMENT.cases(plan)
    assert {one.engine for case in cases for one in blk.MEASUREMENT.variants(plan, case)} == {"python"}
    result = quick.results["blk"]
    python = [row for row in result["rows"] if row["variant"].get("engine") == "python"]
    without = result | {"options": asdict(plan), "rows": python, "comparisons": []}
    assert blk.MEASUREMENT.notes(result) == []
    [note] = blk.MEASUREMENT.notes(without)
    assert note.startswith("io_uring is not permitted here")
    words = blk.MEASUREMENT.words(without)
    assert "*The engine*" not in words
    assert words.rstrip().endswith("No bar is missed.")


@needs_io_uring
def test_words_are_of_what_was_measured(quick: Quick) -> None:
    result = quick.results["blk"]
    words = blk.MEASUREMENT.words(result)
    assert [part in words for part in ("*The engine*", "*The ring*", "*The limit*")] == [True] * 3
    assert [part in words for part in ("qemu-storage-daemon", "*fio*")] == [False] * 2
    [row] = [row for row in result["comparisons"] if row["of"] == blk.NATIVE.factors() and row["bars"]]
    missed = row | {"bars": [row["bars"][0] | {"met": False, "ratio": 0.25}]}
    said = blk.MEASUREMENT.words(result | {"comparisons": [missed]})
    assert said.rstrip().endswith(
        "Where we lose: 32, polls: vbus, native, split, notified against io_uring alone: reads a second 0.25x."
    )


def test_a_peer_that_is_missing_is_one_line(tmp_path: Path) -> None:
    [line] = fails("bench", "blk", "--peer", "--quick", cwd=tmp_path, env={"PATH": str(tmp_path)})
    assert line == (
        "vbus: qemu-storage-daemon is not installed: install it (Debian's package qemu-utils), "
        "or measure without --peer"
    )


@QSD
def test_of_everything_what_has_a_peer_is_measured_beside_it(
    quick: Quick, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    beside = {}

    def run(measurement: Any, plan: Any, say: Any) -> dict[str, Any]:
        beside[measurement.name] = plan.peer
        return quick.results[measurement.name]

    monkeypatch.setattr(harness, "run", run)
    assert main(["bench", "all", "--quick", "--peer", "--json"]) == 0
    assert beside == {name: bool(harness.load(name).peers) for name in harness.NAMES}
    assert beside["blk"]
    capsys.readouterr()


# The same work, or no figure.


def told(requests: int = 8, *, sent: int = 512, received: int = 512, wrong: int = 0) -> dict[str, Any]:
    work = {"requests": requests, "bytes_sent": sent, "bytes_received": received, "wrong": wrong}
    used = {"user": 0.5, "system": 0.25, "sleeps": 4}
    return {"work": {"load0": work}, "seconds": 2.0, "usage": used, "p50_us": 10, "p99_us": 30, "max_us": 40}


def looked(requests: int, size: int, used: float, **rung: int) -> dict[str, Any]:
    row: dict[str, Any] = {"requests": requests, "bytes_read": size, "bytes_written": size}
    row |= {way: COUNTERS | {"rung": rung.get(way, 0)} for way in ("to_device", "to_driver")}
    return {"rows": {"load0": row}, "usage": {"user": used, "system": used, "sleeps": 0}}


CASE = bench.Case("saturated", 1)
BEFORE = looked(100, 6400, 1.0, to_device=3, to_driver=5)
AFTER = looked(108, 6912, 3.0, to_device=7, to_driver=6)


def test_a_sample_is_what_was_counted_in_its_window() -> None:
    sample = bench.sample_of(CASE, BEFORE, told(), AFTER)
    assert sample.values["requests_per_second"] == 4
    assert sample.values["doorbells_to_device"] == 0.5
    assert sample.values["doorbells_to_driver"] == 0.125
    assert sample.values["doorbells"] == 0.625
    assert sample.values["signals_to_device"] == sample.values["events_to_driver"] == 0
    assert sample.values["cpu_us_bus"] == 500_000
    assert sample.values["cpu_us_bus_system"] == 250_000
    assert sample.values["cpu_us_driver"] == 93_750
    assert sample.values["cpu_us"] == 593_750
    assert sample.values["sleeps_driver"] == 0.5


@pytest.mark.parametrize(
    ("driver", "key"),
    [
        (told(9), "requests is 8 (the bus) and 9 (the driver)"),
        (told(sent=513), "bytes_sent is 512 (the bus) and 513 (the driver)"),
        (told(received=500), "bytes_received is 512 (the bus) and 500 (the driver)"),
        (told(wrong=1), "wrong is 0 (the bus) and 1 (the driver)"),
        (told() | {"work": {}}, "is 512 (the bus) and None (the driver)"),
        (told() | {"work": {"load1": told()["work"]["load0"]}}, "load0: unequal work"),
    ],
)
def test_a_driver_and_a_bus_that_disagree_give_no_figure(driver: dict[str, Any], key: str) -> None:
    with pytest.raises(UnequalWorkError) as caught:
        bench.sample_of(CASE, BEFORE, driver, AFTER)
    assert key in str(caught.value)


def samples(**changes: dict[str, Any]) -> dict[bench.Variant, list[Sample]]:
    """Two rounds of each variant, all alike but for what the last of `changes` of a signal's work says."""
    work: dict[str, Any] = {"requests": 8, "bytes_sent": 512, "bytes_received": 512, "wrong": 0}
    return {
        variant: [
            Sample({"load0": work}, {"p99_us": 10.0}),
            Sample({"load0": work | changes.get(variant.signal, {})}, {"p99_us": 20.0}),
        ]
        for variant in CASE.variants
    }


@pytest.mark.parametrize("change", [{"requests": 7}, {"bytes_sent": 0}, {"bytes_received": 513}])
def test_variants_that_did_different_work_are_not_compared(change: dict[str, int]) -> None:
    harness.check_samples(CASE, samples())
    with pytest.raises(UnequalWorkError, match=r"saturated, devices: 1: unequal work, so no figures: load0 .*round 2"):
        harness.check_samples(CASE, samples(tunnelled=change))


def test_an_unequal_run_ends_the_command_without_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fabricated(plan: bench.SignalPlan, case: bench.Case, variant: bench.Variant, folder: Path) -> Sample:
        requests = 8 if variant.signal == "direct" else 4
        work = {"requests": requests, "bytes_sent": 64, "bytes_received": 64, "wrong": 0}
        return Sample({"load0": work}, {"requests_per_second": 1.0, "p99_us": 1.0})

    monkeypatch.setattr(bench, "take_sample", fabricated)
    assert main(["bench", "signal", "--quick", "--json", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "unequal work, so no figures: load0 requests is 8" in said.err
    assert list(tmp_path.iterdir()) == []


# Sums.


def test_summaries_are_medians_with_their_extremes() -> None:
    assert Summary.of([3, 1, 2]) == Summary(2, 1, 3)
    assert Summary.of([4, 1, 2, 3]) == Summary(2.5, 1, 4)
    assert measure.summarise([{"a": 1, "b": 6}, {"a": 3, "b": 5}, {"a": 2, "b": 4}]) == {
        "a": Summary(2, 1, 3),
        "b": Summary(5, 4, 6),
    }


def test_percentiles_are_values_that_were_measured() -> None:
    hundred = list(range(1, 101))
    assert [measure.percentile(hundred, p) for p in (0, 1, 50, 99, 100)] == [1, 1, 50, 99, 100]
    assert measure.percentile([7], 99) == 7
    assert measure.percentile([1, 2, 3], 50) == 2
    with pytest.raises(ValueError, match="nothing"):
        measure.percentile([], 50)


def test_ratios_are_of_one_round_and_then_their_median() -> None:
    ours = [{"a": 2.0, "b": 1.0}, {"a": 90.0, "b": 1.0}, {"a": 3.0, "b": 1.0}]
    base = [{"a": 1.0, "b": 1.0}, {"a": 30.0, "b": 0.0}, {"a": 6.0, "b": 1.0}]
    # The ratio of the medians would be 3 / 6.
    assert measure.ratios(ours, base) == {"a": Summary(2, 0.5, 3), "b": None}
    with pytest.raises(ValueError, match="shorter"):
        measure.ratios(ours, base[:2])


def test_variants_alternate_and_every_other_round_goes_backwards() -> None:
    assert list(measure.alternate("abc", 3)) == [
        *((0, "a"), (0, "b"), (0, "c")),
        *((1, "c"), (1, "b"), (1, "a")),
        *((2, "a"), (2, "b"), (2, "c")),
    ]
    ran: list[tuple[int, str]] = []

    def run(number: int, variant: str) -> str:
        ran.append((number, variant))
        return f"{variant}{number}"

    assert measure.run_alternately("ab", 2, run) == {"a": ["a0", "a1"], "b": ["b0", "b1"]}
    assert ran == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_load_that_arrives_at_random_is_the_same_in_every_run() -> None:
    names = ["load0", "load1", "load2"]
    arrivals = arrivals_of(names, 2000, 1000, 1)
    assert arrivals == arrivals_of(names, 2000, 1000, 1)
    assert arrivals != arrivals_of(names, 2000, 1000, 2)
    assert arrivals == sorted(arrivals)
    assert {name for _, name in arrivals} == set(names)
    # The mean of so many gaps, for this seed: a millisecond, nearly.
    assert arrivals[-1][0] / 2000 == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize(
    ("ratios", "why"),
    [
        ({"requests_per_second": 0.95, "p99_us": 1.1}, []),
        ({"requests_per_second": 0.94, "p99_us": 1.0}, ["requests/s 0.940x, less than 0.95x"]),
        ({"requests_per_second": 2.0, "p99_us": 1.11}, ["p99 1.110x, more than 1.1x"]),
        (
            {"requests_per_second": 0.5, "p99_us": 3.0},
            ["requests/s 0.500x, less than 0.95x", "p99 3.000x, more than 1.1x"],
        ),
        (
            {"requests_per_second": 1.0, "bulk_requests_per_second": 0.9, "p99_us": 1.0},
            ["bulk requests/s 0.900x, less than 0.95x"],
        ),
    ],
)
def test_what_was_saved_by_waiting_does_not_count(ratios: dict[str, float], why: list[str]) -> None:
    comparison = Comparison(CASE.variants[1], CASE.variants[0], guards=bench.GUARDS)
    assert comparison.judge({key: Summary(value, value, value) for key, value in ratios.items()}) == (why, [])


def test_a_comparison_is_of_one_setting_of_event_idx() -> None:
    values = {("direct", False): 8.0, ("tunnelled", False): 2.0, ("direct", True): 4.0, ("tunnelled", True): 5.0}
    taken = {variant: [Sample({}, {"p99_us": values[variant.signal, variant.event_idx]})] for variant in CASE.variants}
    rows = harness.comparisons_of(bench.MEASUREMENT, bench.SignalPlan(), CASE, taken)
    found = [(row["of"]["event_idx"], row["ratios"], row["counts"]) for row in rows]
    assert found == [(False, {"p99_us": 0.25}, True), (True, {"p99_us": 1.25}, False)]


@pytest.mark.parametrize(
    ("bar", "ratio", "met"),
    [
        (Bar("a", "a", 1.5), 1.5, True),
        (Bar("a", "a", 1.5), 1.51, False),
        (Bar("a", "a", 0.5, at_least=True), 0.5, True),
        (Bar("a", "a", 0.5, at_least=True), 0.49, False),
    ],
)
def test_a_bar_is_met_by_a_ratio_that_is_good_enough_and_counts(bar: Bar, ratio: float, met: bool) -> None:
    comparison = Comparison(CASE.variants[1], CASE.variants[0], bars=(bar,), guards=(Bar("b", "b", 1.0),))
    for other, counts in ((1.0, True), (2.0, False)):
        found = {"a": Summary(ratio, ratio, ratio), "b": Summary(other, other, other)}
        why, [row] = comparison.judge(found)
        assert (bool(why), row["met"], row["ratio"]) == (not counts, met and counts, ratio)
    # What was not measured is no bar.
    assert comparison.judge({"a": None}) == ([], [])
    said = tables.verdict({"counts": True, "why": [], "bars": [row | {"met": met}]})
    assert said == f"{'meets' if met else 'MISSES'} at {'least' if bar.at_least else 'most'} {bar.limit:g}x"


# Other people's programs.


def test_a_peer_that_is_not_there_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing, present = Peer("no-such-peer", "no-such-package"), Peer("qemu-img", "qemu-utils")
    with pytest.raises(UsageError) as caught:
        missing.find()
    assert str(caught.value) == (
        "no-such-peer is not installed: install it (Debian's package no-such-package), or measure without --peer"
    )
    assert re.fullmatch(r"\d+\.\d+.*", present.describe()["version"])
    measurement = bench.Signal()
    with pytest.raises(UsageError, match="signal has nobody to be compared with"):
        harness.plan_of(measurement, peer=True)
    monkeypatch.setattr(bench.Signal, "peers", (present, missing))
    with pytest.raises(UsageError, match="no-such-peer is not installed"):
        harness.plan_of(measurement, peer=True)
    monkeypatch.setattr(bench.Signal, "peers", (present,))
    assert harness.plan_of(measurement, peer=True).peer


# Processes.


def test_a_side_that_fails_says_why() -> None:
    with children.Child("vbus.bench.driver_side") as driver:
        with pytest.raises(children.SideError, match=r"driver_side: attach: .*there is no such socket") as caught:
            driver.ask("attach", address="process:/nowhere/bench.sock")
        assert "in attach" in caught.value.__notes__[0]
        # It goes on.
        with pytest.raises(children.SideError, match="driver_side: nothing"):
            driver.ask("nothing")


def test_a_side_that_says_nothing_is_not_waited_for_and_one_that_dies_is_noticed() -> None:
    with children.Child("vbus.bench.bus_side") as bus:
        with pytest.raises(children.SideError, match=r"bus_side says nothing for 0\.05 seconds"):
            bus.hear(0.05)
        os.kill(bus.pid, signals.SIGKILL)
        with pytest.raises(children.SideError, match="bus_side ended with status -9"):
            bus.ask("begin")


def test_a_request_that_fails_ends_its_window() -> None:
    window = Window(2)
    window.flow_ended()
    window.failed(DriverError(5, "as it was told"))
    with pytest.raises(children.SideError, match=r"a request failed: .*as it was told"):
        window.wait(10)
    with pytest.raises(children.SideError, match="not answered"):
        Window(1).wait(0.01)


# The picture.


@pytest.mark.parametrize("most", [0.001, 0.9, 1, 1.506, 3, 12.8, 99, 100, 4567])
def test_linear_scales_have_round_ticks_up_to_the_largest_value(most: float) -> None:
    scale = plot.linear(most, 200)
    assert scale.ticks[0] == 0
    assert scale.ticks[-1] >= most * (1 - 1e-9)
    assert 5 <= len(scale.ticks) <= 9
    assert scale.to_pixel(0) == 200
    assert scale.to_pixel(scale.ticks[-1]) == pytest.approx(0)


def test_logarithmic_scales_go_by_powers_of_ten() -> None:
    scale = plot.logarithmic(47, 4300, 300)
    assert scale.ticks == [10, 100, 1000, 10000]
    assert [scale.to_pixel(tick) for tick in scale.ticks] == pytest.approx([300, 200, 100, 0])
    assert plot.logarithmic(10, 10, 1).ticks == [10, 100]
