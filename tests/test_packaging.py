"""The wheel and the sdist: what is in them, and that each works in a clean environment outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import environments
import readme

ROOT = readme.ROOT
BIN = Path(sys.executable).parent
TRACKED = subprocess.run(
    ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "python", "crates"],
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
BUILT = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
# What is built of the sdist must not pass for what is built of the checkout.
TARGET = BUILT / "packaging"
LIMIT = 600
"""Seconds that a build may take: on a slow machine that has built nothing yet."""

IMPORT_ALL = """
import importlib, pkgutil, vbus
for module in pkgutil.walk_packages(vbus.__path__, "vbus."):
    if module.name != "vbus.__main__":
        importlib.import_module(module.name)
"""

pytestmark = pytest.mark.timeout(LIMIT)


def run(*words: str | Path, cwd: Path, **env: str) -> str:
    """The standard output of a command that succeeds, told nothing of this checkout or its environment."""
    foreign = ("PYTHON", "VIRTUAL_ENV", "MAKE", "MFLAGS", "CARGO_TARGET_DIR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Outside the checkout, and short, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="vbus-dist-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    """The wheel, built from the checkout."""
    run(
        BIN / "maturin", "build", "--release", "--out", folder / "wheel", cwd=ROOT,
        CARGO_TARGET_DIR=str(BUILT),
    )  # fmt: skip
    [path] = (folder / "wheel").iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(folder: Path) -> Path:
    """The sdist."""
    run(BIN / "maturin", "sdist", "--out", folder / "sdist", cwd=ROOT)
    [path] = (folder / "sdist").iterdir()
    return path


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, folder: Path) -> Path:
    """A wheel that was built from the sdist alone, by the build backend that it names."""
    words = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    out = folder / "from-sdist"
    path = f"{BIN}:{os.environ['PATH']}"
    # The times of an sdist's files are all the same: Cargo would take what it built of another for this one's.
    for fingerprint in TARGET.glob("*/.fingerprint/vbus-*"):
        shutil.rmtree(fingerprint)
    run(sys.executable, *words, "--wheel-dir", out, sdist, cwd=folder, CARGO_TARGET_DIR=str(TARGET), PATH=path)
    [path_of_wheel] = out.iterdir()
    return path_of_wheel


def test_the_sdist_has_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    alone = {"Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "guest/linux/COPYING"}
    assert alone | set(TRACKED) <= names
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_the_wheel_has_the_package_and_its_licences(wheel: Path) -> None:
    assert re.fullmatch(r"vbus-[0-9.]+-cp311-abi3-\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name.removeprefix("python/") for name in TRACKED if name.startswith("python/")}
    assert package | {"vbus/_core.abi3.so", "vbus/py.typed"} <= names
    [information] = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert {f"{information}/licenses/LICENSE", f"{information}/licenses/guest/linux/COPYING"} <= names
    assert {name.partition("/")[0] for name in names} == {"vbus", information}


@pytest.mark.parametrize("kind", ["wheel", "wheel_of_sdist"])
def test_it_works_outside_of_the_checkout(kind: str, folder: Path, request: pytest.FixtureRequest) -> None:
    python = environments.create(folder / f"venv-{kind}", request.getfixturevalue(kind))
    user = folder / f"user-{kind}"
    user.mkdir()
    for name, text in readme.files().items():
        (user / name).write_text(text)

    where = run(python, "-c", "import vbus; from vbus import _core; print(vbus.__file__, _core.__file__)", cwd=user)
    assert all(path.startswith(str(folder / f"venv-{kind}")) for path in where.split())
    # Everything can be imported: no module needs what only the tests have.
    run(python, "-c", IMPORT_ALL, cwd=user)
    command = python.parent / "vbus"
    assert re.search(r"\b\d+\.\d+\.\d+\b", run(command, "--version", cwd=user))

    words = (command, "run", "rng.py:Rng", "--listen", "./rng.sock")
    with subprocess.Popen(words, cwd=user, stdout=subprocess.PIPE, text=True) as bus:
        try:
            assert bus.stdout is not None
            assert bus.stdout.readline() == f"bus rng: process:{user}/rng.sock\n"
            drive = (command, "driver", "./rng.sock", "rng", "--read", "16")
            done = subprocess.run(drive, cwd=user, capture_output=True, timeout=60, check=False)
            assert (done.returncode, len(done.stdout), done.stderr) == (0, 16, b"")
            bus.terminate()
            assert bus.wait(30) == 0
        finally:
            bus.kill()

    said = run(command, "demo", cwd=user, PATH=f"{os.environ['PATH']}:/usr/sbin:/sbin", TMPDIR=str(user))
    assert re.fullmatch(r"demo: ok( \(\d replaced\))?", said.splitlines()[-1])
