"""Every command of the README's first screen, run as it is printed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import readme
from command import serving

BIN = Path(sys.executable).parent
MAKE = [command for command in readme.commands() if command.startswith("make ")]
SERVE = [command for command in readme.commands() if command.startswith("vbus run ")]
GUEST = [command for command in readme.commands() if command.startswith("vbus guest ")]
OTHERS = [command for command in readme.commands() if command not in MAKE + SERVE + GUEST]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A directory with the files of the first screen; as short as a user's, for the socket in it."""
    with tempfile.TemporaryDirectory(prefix="vbus-readme-") as name:
        for file, text in readme.files().items():
            (Path(name) / file).write_text(text)
        yield Path(name)


def shell(command: str, folder: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command as an interactive shell would, with the environment's `bin` on the PATH, as the README wants it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=kept | {"PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_screen_has_what_it_must_have() -> None:
    assert list(readme.files()) == ["rng.py"]
    assert len(SERVE) == len(GUEST) == 1
    assert "dd if=/dev/hwrng" in GUEST[0]
    assert len(readme.programs()) == 1
    assert {"make demo", "make test"} <= set(MAKE)
    assert any(command.startswith("vbus driver ") for command in OTHERS)
    code = [line for line in readme.files()["rng.py"].splitlines() if line and not line.startswith("#")]
    assert len(code) <= 10


def test_the_example_in_the_repository_is_the_same_device() -> None:
    def shape(text: str) -> list[str]:
        tree = ast.parse(text)
        # Apart from what a type checker and a style checker want of a file in the repository.
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.returns = None
                node.body = [part for part in node.body if not _is_text(part)]
                for argument in node.args.args:
                    argument.annotation = None
        return [ast.unparse(node) for node in tree.body if isinstance(node, ast.ClassDef)]

    assert shape((readme.ROOT / "examples" / "rng.py").read_text()) == shape(readme.files()["rng.py"])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@pytest.mark.parametrize("command", MAKE)
def test_what_make_is_asked_for_exists(command: str) -> None:
    first, _, rest = command.partition(" && ")
    planned = shell(f"{first} --dry-run", readme.ROOT)
    assert planned.returncode == 0, planned.stderr
    if rest:
        # In the checkout, as the user is by then: the command is on the PATH, and it is the checkout's.
        done = shell(f"PATH=/usr/bin:/bin; {rest} && command -v vbus && vbus --version", readme.ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == str(readme.ROOT / ".venv" / "bin" / "vbus")


def test_other_pages_print_the_same_command() -> None:
    for page in ("virtual-machines.md", "cli.md"):
        assert f"$ {GUEST[0]}\n" in (readme.ROOT / "docs" / page).read_text(), page


@pytest.mark.timeout(900)
def test_a_guest_reads_from_the_device(folder: Path) -> None:
    done = shell(GUEST[0], folder, timeout=880)
    # What takes its time is said, and then what dd has to say.
    said = [line for line in done.stderr.splitlines() if not re.match("vbus: (fetching |booting )", line)]
    assert (done.returncode, said) == (0, ["1+0 records in", "1+0 records out"])
    assert re.fullmatch(r"( [0-9a-f]{2}){16}\n", done.stdout)


def test_two_terminals_and_a_program(folder: Path) -> None:
    with serving(*SERVE[0].split()[2:], cwd=folder) as (_, said):
        assert said == [f"bus rng: process:{folder}/rng.sock"]
        outputs = {}
        for command in OTHERS:
            done = shell(command, folder)
            assert (done.returncode, done.stderr) == (0, ""), command
            outputs[command.split()[1]] = done.stdout
        assert re.fullmatch(r"( [0-9a-f]{2}){16}\n", outputs["driver"])
        head, row = outputs["ls"].splitlines()
        assert head.split()[:4] == ["BUS", "ADDRESS", "NAME", "TYPE"]
        assert row.split()[:4] == ["rng", "1", "rng", "rng"]
        done = subprocess.run(
            [sys.executable, "-c", readme.programs()[0]],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"\['rng'\]\n[0-9a-f]{32}\n", done.stdout)
    assert not (folder / "rng.sock").exists()
