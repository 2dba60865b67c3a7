"""Exits of a guest, counted: the harness's books, in a small run of all ways in one guest, and its page; no figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import vbus
from vbus.bench import harness, report
from vbus.bench.guest_machine import COUNTERS, Load
from vbus.bench.guest_side import KINDS, PCI, SIGNALS, WINDOW
from vbus.bench.measure import UnequalWorkError
from vbus.bench.measurements import exits
from vbus.bench.measurements.exits import Case, ExitsPlan

DOCS = Path(__file__).parent.parent / "docs"
READ = Case("read", 4, 1)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A small run of everything, as a user runs it: what it gave, and the folder with what it wrote."""
    folder = tmp_path_factory.mktemp("exits") / "exits"
    done = vbus("bench", "exits", "--quick", "--json", "--output", folder, cwd=folder.parent, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    [result] = json.loads(done.stdout)
    return result, folder


@pytest.mark.timeout(620)
def test_all_ways_do_the_same_work_and_are_counted_alike_on_both_sides(quick: tuple[dict[str, Any], Path]) -> None:
    result, _ = quick
    cases = {tuple(row["case"].values()) for row in result["rows"]}
    assert {("read", 2, 2, "full"), ("read", 2, 1, "50%"), ("ask", 1, 1, "full"), ("stream", 1, 1, "full")} <= cases
    for case in cases:
        rows = [row for row in result["rows"] if tuple(row["case"].values()) == case]
        copies = case == ("read", 2, 2, "full")
        assert [row["variant"]["signal"] for row in rows] == [kind for kind in KINDS if copies or kind != WINDOW]
        assert len({json.dumps(row["work"]) for row in rows}) == 1
        for row in rows:
            values = row["median"]
            assert row["work"]["wrong"] == 0
            assert values["doorbells"] > 0
            assert values["interrupts"] > 0
            # What one side says that it did is what the other side has heard of. (The guest begins to look when
            # connections are there, and networks go on while it reads one counter after the other.)
            if row["variant"]["signal"] in SIGNALS and case[0] == "read":
                assert values["doorbells"] == pytest.approx(values["guest_rung_to_device"])
                assert values["bus_rung_to_driver"] == pytest.approx(values["guest_rung_to_driver"])
            if row["variant"]["signal"] == "direct" and case[0] == "read":
                assert values["guest_rung_to_device"] == pytest.approx(values["guest_signalled_to_device"])


@pytest.mark.timeout(620)
def test_its_page_explains_each_step_and_names_the_accelerator(quick: tuple[dict[str, Any], Path]) -> None:
    result, folder = quick
    page = report.page(folder)
    assert page.startswith("# Exits\n")
    assert f"accelerator {result['rows'][0]['work']['accelerator']}" in page
    assert "![Exits: doorbells and interrupts of a guest](exits/exits.svg)" in page
    for word in ("doorbell", "interrupt", "EVENT_IDX", "NAPI", "Priorities"):
        assert word in page


@pytest.mark.timeout(620)
def test_an_urgent_network_is_measured_alone_and_beside_bulk_load(tmp_path: Path) -> None:
    done = vbus("bench", "priorities", "--quick", "--json", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    [result] = json.loads(done.stdout)
    for row in result["rows"]:
        assert row["work"]["requests"] == result["options"]["requests"]
        assert row["work"]["wrong"] == 0
        assert (row["median"]["bulk_reads"] > 0) == (row["variant"]["beside"] == "bulk")
        assert (row["median"]["bulk_mb"] > 1) == (row["variant"]["beside"] == "bulk")
    bars = [[bar["limit"] for bar in row["bars"]] for row in result["comparisons"]]
    assert bars == [[2.0], [2.0], [], [2.0], [2.0]]


def test_the_page_that_is_committed_is_what_the_figures_beside_it_give() -> None:
    paths = sorted((DOCS / "exits").glob("*.json"))
    assert "exits.json" in [path.name for path in paths]
    for path in paths:
        [result] = json.loads(path.read_text())
        assert not result["options"]["quick"]
        assert result["options"]["rounds"] >= 5
        assert path.with_suffix(".svg").read_text() == harness.load(path.stem).draw(result)
    # make bench-page
    assert (DOCS / "exits.md").read_text() == report.page(DOCS / "exits")


def told(**values: Any) -> dict[str, Any]:
    """What a run says, with some of it otherwise."""
    counters = dict.fromkeys(COUNTERS, 20)
    run: dict[str, Any] = {"requests": 100, "bytes": 409600, "wrong": 0, "seconds": 2.0, "p50_us": 1.0, "p99_us": 2.0}
    run |= {"qemu_seconds": 0.1, "bus_seconds": 0.1, "counted": counters, "bus": {"reads": 100, **counters}}
    return run | {"interrupts": {"vbus-0-4": 10, "virtio3-req.0": 5, "RES": 7, "LOC": 1000}} | values


def test_what_a_run_says_is_given_a_request() -> None:
    values = exits.sample_of(READ, "tunnelled", Load("read", 4, 1, 25), told(), {"accelerator": "tcg"}).values
    assert values["interrupts"] == 0.15
    assert values["doorbells"] == values["guest_rung_to_device"] == 0.2
    assert values["per_second"] == 50
    assert values["between_processors"] == 0.07
    assert values["cpu_us"] == pytest.approx(2000)
    assert "guest_rung_to_device" not in exits.sample_of(READ, PCI, Load("read", 4, 1, 25), told(), {}).values


@pytest.mark.parametrize(
    "values", [{"wrong": 1}, {"bus": {"reads": 99, **dict.fromkeys(COUNTERS, 20)}}], ids=["wrong", "not-served"]
)
def test_work_that_was_not_done_gives_no_figures(values: dict[str, Any]) -> None:
    with pytest.raises(UnequalWorkError):
        exits.sample_of(READ, "tunnelled", Load("read", 4, 1, 25), told(**values), {})


def test_service_times_are_those_of_what_is_offered() -> None:
    measurement = exits.Exits()
    measurement._rates = {("read", 4, 1): 10000.0, ("ask", 1, 8): 1000.0}
    plan = ExitsPlan(seconds=2)
    assert measurement.load_of(plan, READ) == Load("read", 4, 1, 5000, 0.0)
    slow = measurement.load_of(plan, Case("read", 4, 1, "10%"))
    # Four disks serve a thousand a second together: each takes four milliseconds for one.
    assert slow.count == 500
    assert slow.service == pytest.approx(0.004)
    assert measurement.load_of(plan, Case("ask", 1, 8)) == Load("ask", 1, 8, 250, 0.0)


def test_bars_are_lower_where_there_are_many_disks() -> None:
    measurement, plan = exits.Exits(), ExitsPlan()
    for case, limit in ((Case("read", 16, 4), 0.25), (Case("read", 16, 1, "10%"), 1.05), (Case("stream", 4, 1), 1.05)):
        first = measurement.comparisons(plan, case)[0]
        assert [(bar.value, bar.limit) for bar in first.bars] == [("interrupts", limit), ("doorbells", limit)]
        assert str(first.against) == PCI
