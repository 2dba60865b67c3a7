"""The benchmark's harness: its books, not its figures. Nothing here depends on how long something takes."""

from __future__ import annotations

import json
import os
import signal as signals
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from command import VBUS, fails, out, vbus
from conftest import wait_until
from vbus.bench import children, measure, plot
from vbus.bench import signal as bench
from vbus.bench.driver_side import Window, arrivals_of
from vbus.bench.measure import Summary, UnequalWorkError
from vbus.cli import main
from vbus.errors import DriverError

COUNTERS = {"signalled": 10, "sent": 8, "rung": 4}
VALUES = ("requests_per_second", "p50_us", "p99_us")
COUNTED = ("doorbells_to_device", "doorbells_to_driver", "doorbells", "cpu_us_bus", "cpu_us_driver", "cpu_us")
SVG = "{http://www.w3.org/2000/svg}"


# What the command gives, end to end.


@dataclass(frozen=True)
class Quick:
    """What a quick run gave."""

    result: dict[str, Any]
    folder: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """The whole measurement, small, as a user runs it."""
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    done = vbus("bench", "signal", "--quick", "--json", "--output", folder, cwd=folder.parent.parent, timeout=110)
    assert done.returncode == 0, done.stderr.decode()
    [result] = json.loads(done.stdout)
    return Quick(result, folder)


def test_a_quick_run_does_the_same_work_on_all_sides(quick: Quick) -> None:
    result = quick.result
    assert list(result) == [
        *("benchmark", "machine", "load_average", "began", "seconds", "options", "rows", "comparisons"),
    ]
    assert list(result["machine"]) == ["cpu", "cpus", "architecture", "memory_bytes", "kernel", "python", "vbus"]
    plan = bench.quick_plan(1)
    assert result["options"] == json.loads(json.dumps(asdict(plan)))

    variants = [("direct", False), ("tunnelled", False), ("direct", True), ("tunnelled", True)]
    loads = [
        (load, count, *variant) for load in ("saturated", "paced") for count in plan.devices for variant in variants
    ]
    rows = result["rows"]
    assert [(r["load"], r["devices"], r["signal"], r["event_idx"]) for r in rows if r["load"] != "urgent"] == loads
    urgent = [(r["devices"], r["priority"], r["signal"], r["event_idx"]) for r in rows if r["load"] == "urgent"]
    assert urgent == [
        (count, priority, kind, True)
        for count, priority in ((0, 0), (plan.bulk_devices, 0), (plan.bulk_devices, 7))
        for kind in ("direct", "tunnelled")
    ]
    asked = {"saturated": plan.requests, "paced": plan.paced_requests, "urgent": plan.urgent_requests}
    for row in rows:
        assert row["requests"] == asked[row["load"]]
        assert row["bytes"] == 2 * plan.size * row["requests"]
        assert len(row["rounds"]) == plan.rounds
        assert {*VALUES, *(() if row["load"] == "urgent" else COUNTED)} <= set(row["median"])
        for key, median in row["median"].items():
            low, high = row["spread"][key]
            assert low <= median <= high
            assert median in [values[key] for values in row["rounds"]]
        if row["load"] != "urgent":
            check_counters(row)
    assert all(
        row["median"]["bulk_requests_per_second"] > 0 for row in rows if row["load"] == "urgent" and row["devices"]
    )


def test_what_is_written_is_what_is_printed_and_can_be_looked_at(quick: Quick) -> None:
    assert json.loads((quick.folder / "signal.json").read_text()) == [quick.result]
    check_picture((quick.folder / "signal.svg").read_text(), quick.result)


def check_counters(row: dict[str, Any]) -> None:
    """What holds of signals, whatever the machine does meanwhile."""
    for values in row["rounds"]:
        for way in ("to_device", "to_driver"):
            assert values[f"signals_{way}"] > 0
            assert values[f"doorbells_{way}"] <= values[f"events_{way}"] <= values[f"signals_{way}"]
            if row["signal"] == "direct":
                # One signal, one doorbell, unless the bell is full.
                assert values[f"doorbells_{way}"] == values[f"signals_{way}"]
        # A request that is alone on its way is answered with a signal of its own; more never are.
        assert values["signals_to_driver"] <= 1
        assert values["doorbells"] == values["doorbells_to_device"] + values["doorbells_to_driver"]


def check_picture(text: str, result: dict[str, Any]) -> None:
    """Well-formed; each point, bar and label is there, and within the page."""
    svg = ElementTree.fromstring(text.encode())
    lines = [row for row in result["rows"] if row["load"] != "urgent"]
    points = len([row for row in lines if row["load"] == "saturated"]) * 3
    points += len([row for row in lines if row["load"] == "paced"]) * 2
    assert len(list(svg.iter(f"{SVG}circle"))) == points + 4  # the legend's
    bars = [row for row in result["rows"] if row["load"] == "urgent"]
    assert len(list(svg.iter(f"{SVG}rect"))) == 2 * len(bars) + 1  # the page's
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
            assert 0 <= top + float(circle.attrib["cy"]) <= plot.HEIGHT


def test_the_tables_have_every_row_and_every_verdict(
    quick: Quick, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "run", lambda plan, say: quick.result)
    assert main(["bench", "signal", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for heading in ("BELLS TO DEVICE", "CPU OF BUS", "THEIR REQUESTS/S", "VERDICT"):
        assert any(heading in line for line in lines)
    rows, comparisons = quick.result["rows"], quick.result["comparisons"]
    loads = [line for line in lines if line.startswith(("saturated", "paced", "urgent"))]
    assert len(loads) == sum(row["load"] != "urgent" for row in rows) + len(comparisons)
    verdicts = [line for line in loads if line.endswith("  counts") or "  does not count: " in line]
    assert [line.endswith("  counts") for line in verdicts] == [row["counts"] for row in comparisons]
    for row in comparisons:
        assert row["counts"] == (not row["why"])


def test_wrong_usage(tmp_path: Path) -> None:
    assert fails("bench", "signal", "--rounds", "0", cwd=tmp_path)[0].startswith("vbus: invalid value for '--rounds'")
    (tmp_path / "file").write_text("")
    assert "'--output'" in fails("bench", "signal", "--output", "file", cwd=tmp_path)[0]
    assert "singal" in fails("bench", "singal", cwd=tmp_path)[0]
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


def samples(**changes: dict[str, Any]) -> dict[bench.Variant, list[bench.Sample]]:
    """Two rounds of each variant, all alike but for what the last of `changes` of a signal's work says."""
    work: dict[str, Any] = {"requests": 8, "bytes_sent": 512, "bytes_received": 512, "wrong": 0}
    return {
        variant: [
            bench.Sample({"load0": work}, {"p99_us": 10.0}),
            bench.Sample({"load0": work | changes.get(variant.signal, {})}, {"p99_us": 20.0}),
        ]
        for variant in CASE.variants
    }


@pytest.mark.parametrize("change", [{"requests": 7}, {"bytes_sent": 0}, {"bytes_received": 513}])
def test_variants_that_did_different_work_are_not_compared(change: dict[str, int]) -> None:
    bench.check_samples(CASE, samples())
    with pytest.raises(UnequalWorkError, match=r"saturated, devices: 1: unequal work, so no figures: load0 .*round 2"):
        bench.check_samples(CASE, samples(tunnelled=change))


def test_an_unequal_run_ends_the_command_without_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fabricated(plan: bench.Plan, case: bench.Case, variant: bench.Variant, folder: Path) -> bench.Sample:
        requests = 8 if variant.signal == "direct" else 4
        work = {"requests": requests, "bytes_sent": 64, "bytes_received": 64, "wrong": 0}
        return bench.Sample({"load0": work}, {"requests_per_second": 1.0, "p99_us": 1.0})

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
    assert bench.objections({key: Summary(value, value, value) for key, value in ratios.items()}) == why


def test_a_comparison_is_of_one_setting_of_event_idx() -> None:
    values = {("direct", False): 8.0, ("tunnelled", False): 2.0, ("direct", True): 4.0, ("tunnelled", True): 5.0}
    taken = {
        variant: [bench.Sample({}, {"p99_us": values[variant.signal, variant.event_idx]})] for variant in CASE.variants
    }
    found = [(row["event_idx"], row["ratios"], row["counts"]) for row in bench.comparisons_of(CASE, taken)]
    assert found == [(False, {"p99_us": 0.25}, True), (True, {"p99_us": 1.25}, False)]


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
