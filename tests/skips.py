"""A pytest plugin: where everything can be installed, a skipped test is a failed one.

Set-up installs what the tests need when it runs as root on Debian. There, a skip means that something was not tested
although it could have been, and a suite that passes would hide it. Elsewhere skips stay what they are. Setting
`VBUS_ALLOW_SKIPS=1` leaves them alone everywhere. An expected failure (xfail) is no skip.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path

import pytest


def forbidden(uid: int, debian: bool, environ: Mapping[str, str]) -> bool:
    """Whether a skip is a failure, for this user on this kind of system."""
    return uid == 0 and debian and environ.get("VBUS_ALLOW_SKIPS") != "1"


def forbidden_here() -> bool:
    """Whether a skip is a failure in this process."""
    return forbidden(os.geteuid(), Path("/etc/debian_version").exists(), os.environ)


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail") or not forbidden_here():
        return
    report.outcome = "failed"
    why = "as root on Debian nothing may be skipped (VBUS_ALLOW_SKIPS=1 allows it)"
    where = report.longrepr
    report.longrepr = f"{where[0]}:{where[1]}: {where[2]}: {why}" if isinstance(where, tuple) else f"{where}: {why}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skipped test, or a skip in a fixture, into a failure."""
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn a module that skips itself into a failure."""
    report = yield
    _fail(report)
    return report
