"""The plugin that turns skips into failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import skips

SUITE = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("a tool is missing")

@pytest.mark.skipif(True, reason="another tool is missing")
def test_is_skipped():
    pass

@pytest.fixture
def absent():
    pytest.skip("a right is missing")

def test_with_a_fixture_that_skips(absent):
    pass

@pytest.mark.xfail(reason="expected")
def test_expected_to_fail():
    assert False
"""
MODULE = "import pytest\npytest.importorskip('no_such_module_of_anybody')\n"


def run(folder: Path, **env: str) -> tuple[int, str]:
    """A suite of its own, with the plugin; its exit status, and what it says."""
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "test_module.py").write_text(MODULE)
    words = ["-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    clean = {name: value for name, value in os.environ.items() if name not in ("VBUS_ALLOW_SKIPS", "PYTEST_ADDOPTS")}
    done = subprocess.run(
        [sys.executable, *words, "--continue-on-collection-errors"],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(Path(__file__).parent)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("uid", "debian", "environ", "expected"),
    [
        (0, True, {}, True),
        (0, True, {"VBUS_ALLOW_SKIPS": "0"}, True),
        (0, True, {"VBUS_ALLOW_SKIPS": "1"}, False),
        (0, False, {}, False),
        (1000, True, {}, False),
    ],
)
def test_who_may_skip(uid: int, debian: bool, environ: dict[str, str], expected: bool) -> None:
    assert skips.forbidden(uid, debian, environ) is expected


def test_a_skip_fails_where_it_is_forbidden(tmp_path: Path) -> None:
    status, said = run(tmp_path)
    if skips.forbidden_here():
        assert status == 1
        assert "1 failed, 1 passed, 1 xfailed, 3 errors" in said
        for reason in ("a tool is missing", "another tool is missing", "a right is missing", "no_such_module"):
            assert reason in said
        assert "VBUS_ALLOW_SKIPS=1" in said
    else:
        assert (status, "1 passed, 4 skipped, 1 xfailed" in said) == (0, True)


def test_skips_can_be_allowed(tmp_path: Path) -> None:
    status, said = run(tmp_path, VBUS_ALLOW_SKIPS="1")
    assert (status, "1 passed, 4 skipped, 1 xfailed" in said) == (0, True)
