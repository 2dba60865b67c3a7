"""The benchmark of networks: its books, not its figures; and how DPDK's forwarder is spoken to."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from command import fails, vbus
from conftest import wait_until
from vbus.bench import children, harness, testpmd
from vbus.bench.measure import UnequalWorkError
from vbus.bench.measurements import net as bench
from vbus.bench.work import Threads, threads_of
from vbus.cli import main

NEEDS_DPDK = pytest.mark.skipif(
    shutil.which("dpdk-testpmd") is None, reason="no dpdk-testpmd: apt-get install dpdk-dev"
)
UNDER_WAY = bench.NetPlan().bursts * testpmd.BURST
SENT = 1000


# Both sides count the same, or there is no figure.


@dataclass
class Side:
    """A driver or a back-end that says what it is told to say."""

    counted: tuple[int, ...]
    waited: list[int] = field(default_factory=lambda: [0])
    rates: list[float] = field(default_factory=lambda: [2e6])
    asked: list[str] = field(default_factory=list)
    windows: int = 0
    looks: int = 0

    def ask(self, command: str) -> str:
        self.asked.append(command)
        return ""

    def clear(self) -> None:
        self.windows += 1

    def rate(self) -> float:
        return self.rates[min(self.windows, len(self.rates)) - 1]

    def busy(self) -> float:
        return 100.0

    def frames(self) -> int:
        self.looks += 1
        return 1000 * self.looks

    def threads(self) -> Threads:
        """Runs a millisecond from look to look, and waits as long as it is told for each window."""
        self.looks += 1
        waited = sum(self.waited[: self.windows]) if self.looks % 2 == 0 else sum(self.waited[: self.windows - 1])
        return {"ran": 1_000_000 * self.looks, "waited": waited}

    def totals(self) -> tuple[int, ...]:
        return self.counted


def measured(monkeypatch: pytest.MonkeyPatch, driver: Side, served: Side) -> Any:
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0.0)
    plan = bench.NetPlan(warm_up=0, window=0.001)
    return bench.Net()._round_and_round(plan, "a case", driver, served)  # type: ignore[arg-type]


def test_what_was_sent_was_served_but_for_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Side((SENT - UNDER_WAY, SENT))
    sample = measured(monkeypatch, driver, Side((SENT, SENT, 0)))
    assert sample.work == {"frames_under_way": UNDER_WAY, "bytes_a_frame": 64, "lost": 0}
    assert driver.asked == [f"start tx_first {UNDER_WAY // 32}", "stop"]
    assert sample.values["mpps"] == 2


@pytest.mark.parametrize(
    ("driver", "served", "said"),
    [
        ((SENT - UNDER_WAY, SENT), (SENT + 1, SENT, 0), "sent is 1000 (the driver) and 1001 (the back-end)"),
        ((SENT - UNDER_WAY - 1, SENT), (SENT, SENT, 0), "came back, or are under way is 999 (the driver) and 1000"),
        ((SENT - UNDER_WAY, SENT), (SENT, SENT - 1, 1), "came back, or are under way is 1000 (the driver) and 999"),
        ((SENT - UNDER_WAY, SENT), (SENT, SENT, 1), "lost is 0 (the driver) and 1 (the back-end)"),
    ],
)
def test_sides_that_disagree_give_no_figure(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int], served: tuple[int, int, int], said: str
) -> None:
    with pytest.raises(UnequalWorkError) as caught:
        measured(monkeypatch, Side(driver), Side(served))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("waited", "windows", "rate"),
    [
        ([0], 1, 1),
        ([10**12, 0], 2, 2),
        # Never undisturbed: that of the least disturbance.
        ([10**12, 10**11, 10**10, 10**11, 10**12, 10**12], 6, 3),
    ],
)
def test_a_window_in_which_a_side_waited_for_its_cpu_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, waited: list[int], windows: int, rate: float
) -> None:
    driver = Side((SENT - UNDER_WAY, SENT), waited, rates=[1e6, 2e6, 3e6, 4e6, 5e6, 6e6])
    sample = measured(monkeypatch, driver, Side((SENT, SENT, 0)))
    assert driver.windows == windows
    assert sample.values["mpps"] == rate
    # Of its busy time, the part that it had the CPU: a millisecond, and not what it waited.
    part = 1e6 / (1e6 + waited[windows - 1 if windows < 6 else 2])
    assert sample.values["driver_ns"] == pytest.approx(100 * part)


def test_threads_are_counted_together() -> None:
    before = threads_of(os.getpid())
    assert before["ran"] > 0

    def ran() -> bool:
        sum(range(10_000))
        return threads_of(os.getpid())["ran"] > before["ran"]

    assert wait_until(ran, 30)
    assert threads_of(os.getpid())["waited"] >= before["waited"] >= 0


# What the page says.


def compared(ring: str, against: str, polling: str, **ratios: float) -> dict[str, Any]:
    of = {"by": "native", "ring": ring, "polling": polling}
    return {"case": {"what": "throughput"}, "of": of, "against": of | {"by": against}, "ratios": ratios}


@pytest.mark.parametrize(
    ("split", "packed", "lost"),
    [
        ((1.0, 1.0), (1.3, 0.7), "We lose in neither."),
        ((0.99, 1.0), (1.0, 1.1), "We lose in frames a second through split rings, time a frame through packed rings."),
    ],
)
def test_where_we_lose_is_said(split: tuple[float, float], packed: tuple[float, float], lost: str) -> None:
    ratios = {"split": split, "packed": packed}
    comparisons = [compared(ring, "dpdk", "always", mpps=rate, busy_ns=busy) for ring, (rate, busy) in ratios.items()]
    result: dict[str, Any] = {
        "rows": [],
        "comparisons": comparisons,
        "options": {"peer": True, "bursts": 4, "burst": 64},
    }
    words = bench.MEASUREMENT.words(result)
    assert lost in words
    assert f"the same driver gets {split[0]:.2f} times as" in words
    assert "DPDK's own back-end" not in bench.MEASUREMENT.words(
        result | {"options": result["options"] | {"peer": False}}
    )


# DPDK's forwarder.


def test_without_the_forwarder_there_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "dpdk-testpmd is not installed: install it (Debian's package dpdk-dev), to measure net"
    for words in (("bench", "net"), ("bench", "net", "--peer")):
        assert main([*words]) == 2
        assert capsys.readouterr().err == f"vbus: {missing}\n"
    # All the others are measured.
    ran: list[str] = []

    def run(measurement: Any, plan: Any, say: Any) -> dict[str, Any]:
        ran.append(measurement.name)
        return {"benchmark": measurement.name, "load_average": {"before": 0}, "machine": {"cpus": 2}}

    monkeypatch.setattr(harness, "run", run)
    assert main(["bench", "all", "--quick", "--json"]) == 0
    assert f"net is left out: {missing}\n" in capsys.readouterr().err
    assert "net" not in ran
    assert set(ran) <= {*harness.NAMES} - {"net"}
    assert "signal" in ran


def test_what_it_says_is_looked_for() -> None:
    said = "  RX-packets: 6854688    RX-missed: 0\r\n  Rx-pps:      4899800          Rx-bps:   2508697720\r\n"
    assert testpmd.number(said, r"Rx-pps:\s*(\d+)") == 4899800
    with pytest.raises(children.SideError, match=r"says nothing of 'Tx-pps.*RX-packets: 6854688 RX-missed"):
        testpmd.number(said, r"Tx-pps:\s*(\d+)")


@NEEDS_DPDK
def test_one_that_cannot_start_says_why() -> None:
    with pytest.raises(children.SideError, match=r"the front-end ended: .*EAL: FATAL: Invalid 'command line'"):
        testpmd.Testpmd(["--no-such-option"], "the front-end")


@NEEDS_DPDK
@pytest.mark.timeout(400)
def test_a_peer_serves_the_same_and_all_its_options_are_told(tmp_path: Path) -> None:
    done = vbus("bench", "net", "--quick", "--peer", "--json", cwd=tmp_path, timeout=380)
    assert done.returncode == 0, done.stderr.decode()
    [result] = json.loads(done.stdout)
    by = {(row["case"]["what"], row["variant"]["by"]) for row in result["rows"]}
    assert by == {(what, by) for what in ("throughput", "held back") for by in ("native", "dpdk")} | {
        ("throughput", "python")
    }
    [peer] = result["peers"]
    assert (peer["program"], peer["version"][:1].isdigit()) == ("dpdk-testpmd", True)
    for words, port in zip(peer["commands"], ("net_virtio_user0,path=SOCKET", "net_vhost0,iface=SOCKET"), strict=True):
        assert words.startswith("dpdk-testpmd --no-huge ")
        assert port in words
        assert "--forward-mode=io" in words
    for row in result["rows"]:
        expected = {"mpps", "cpu_ns", "driver_ns", "waited"} if row["case"]["what"] == "throughput" else {"alone_ns"}
        assert expected <= {*row["median"]}
        assert ("busy_ns" in row["median"]) == (
            row["case"]["what"] == "throughput" and row["variant"]["by"] != "python"
        )
    bars = [bar["value"] for row in result["comparisons"] for bar in row["bars"]]
    assert bars == ["mpps", "busy_ns", "held_ns", "held_ns"]


def test_nothing_is_compared_with_a_peer_that_does_not_take_part() -> None:
    for peer in (False, True):
        plan = bench.NetPlan(peer=peer)
        for case in bench.MEASUREMENT.cases(plan):
            there = bench.MEASUREMENT.variants(plan, case)
            assert any(variant.by == "dpdk" for variant in there) == peer
            for comparison in bench.MEASUREMENT.comparisons(plan, case):
                assert {comparison.of, comparison.against or comparison.of} <= {*there}
                if comparison.against is not None:
                    ours, theirs = comparison.of.factors(), comparison.against.factors()
                    # One factor at a time.
                    assert sum(ours[key] != theirs[key] for key in ours) == 1
    assert fails("bench", "ring", "--peer", cwd=Path.cwd())
