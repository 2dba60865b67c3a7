"""The fuzz targets and what runs them: seeds are good, a finding fails, is kept, named, and seen again."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = sorted(path.stem for path in (ROOT / "fuzz").glob("*.py"))

GOOD = """
def one(data):
    pass

def seeds():
    yield b"seed"
"""
# Reached by way of a comparison that no seed passes.
BAD = """
def one(data):
    if data[:1] == b"s" and data[1:2] == b"!":
        raise AssertionError("it is broken")

def seeds():
    yield b"seed"
"""
UNSOWN = "def one(data): pass\ndef seeds(): raise OSError('no seeds')\n"
LEAVING = "import os\ndef one(data): os._exit(3)\ndef seeds(): yield b'seed'\n"


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_many_and_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "fuzz"))
    target: Any = importlib.import_module(name)
    seeds = list(target.seeds())
    assert len(seeds) > 20
    assert len(set(seeds)) > len(seeds) // 2
    for seed in [*seeds, b""]:
        target.one(seed)


def test_the_targets_are_found() -> None:
    assert {"bus_messages", "vhost_user_messages"} <= set(TARGETS)
    done = harness(ROOT / "fuzz", "nothing")
    assert done.returncode == 2
    for name in (*TARGETS, "split_ring", "packed_ring", "driver_ring", "engine_loopback", "engine_blk"):
        assert name in done.stderr


def harness(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "fuzz"), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "harness", "--directory", str(directory), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")


@needs_atheris
def test_a_finding_fails_and_is_seen_again(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    done = harness(tmp_path, "--seconds", "60", "bad")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "it is broken" in done.stdout
    found = re.search(r"bad: FOUND SOMETHING, with the input (.*)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    path = Path(found[1])
    assert path.parent == tmp_path / "artifacts" / "bad"
    assert path.read_bytes()[:2] == b"s!"
    assert f"--input {path}" in done.stdout

    again = harness(tmp_path, "--input", str(path))
    assert again.returncode == 1
    assert "it is broken" in again.stdout
    (tmp_path / "bad.py").write_text(GOOD)
    mended = harness(tmp_path, "--input", str(path))
    assert mended.returncode == 0, mended.stdout


@needs_atheris
def test_what_finds_nothing_says_how_much_it_looked(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    done = harness(tmp_path, "--seconds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^good: [1-9]\d* inputs, nothing found \(\d+ edges", done.stdout, re.MULTILINE)
    assert list((tmp_path / "artifacts" / "good").iterdir()) == []


@needs_atheris
@pytest.mark.parametrize(("text", "said"), [(UNSOWN, "its seeds could not be made"), (LEAVING, "ended with 3")])
def test_a_target_that_cannot_look_has_not_found_nothing(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "blind.py").write_text(text)
    done = harness(tmp_path, "--seconds", "1")
    assert done.returncode == 1
    assert f"blind: {said}" in done.stdout
