"""The command answers at once, because it loads only what the verb needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("pydantic", "pydantic_core", "uvicorn", "starlette", "anyio", "h11", "asyncio", "pyroute2", "rich")
BUS = ("vbus._core", "vbus.bus", "vbus.connectors", "vbus.proxy", "vbus.devices", "vbus.bench", "vbus.demo")
COMMAND = """
import contextlib, io, sys
from vbus.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    status = main({words!r})
print(status, *sorted(sys.modules))
"""


def loaded(code: str, **env: str) -> list[str]:
    """What a new interpreter prints, in words."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | env,
    )
    return done.stdout.split()


def test_importing_vbus_loads_nothing_else() -> None:
    modules = loaded("import sys, vbus; print(*sys.modules)")
    assert not {*HEAVY, *BUS, "click"} & set(modules)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["ls"], "0"),
        (["ls", "--connectors", "--json"], "0"),
        (["--help"], "0"),
        (["run", "--help"], "0"),
        (["show", "x"], "1"),
        (["stat"], "1"),
        (["unplug", "x"], "1"),
        (["set", "x", "a=b"], "1"),
        (["plug", "x", "--type", "blk"], "1"),
        (["completion", "zsh"], "0"),
        (["channel", "ls"], "0"),
        (["qemu-args", "--help"], "0"),
        (["qemu-args"], "1"),
        (["libvirt-xml"], "1"),
        (["bench", "signal", "--help"], "0"),
        (["guest", "--help"], "0"),
        (["guest", "--", "true"], "1"),
        (["nothing"], "2"),
    ],
)
def test_verbs_that_only_talk_to_a_bus_load_no_bus(words: list[str], status: str) -> None:
    got, *modules = loaded(COMMAND.format(words=words))
    assert got == status
    assert not {*HEAVY, *BUS} & set(modules)
    assert "click" in modules


def test_a_driver_needs_no_configuration(tmp_path: Path) -> None:
    got, *modules = loaded(COMMAND.format(words=["driver", str(tmp_path / "none.sock")]))
    assert got == "1"
    assert "vbus.proxy" in modules
    assert not {"pydantic", "uvicorn", "starlette", "vbus.bus", "vbus.config"} & set(modules)


@pytest.mark.parametrize(("words", "index"), [("vbus sh", "1"), ("vbus show ", "2"), ("vbus ls --", "2")])
def test_completion_loads_no_bus(words: str, index: str) -> None:
    code = """
import atexit, sys
atexit.register(lambda: print(*sorted(sys.modules)))
from vbus.cli import main
main([])
"""
    modules = loaded(code, _VBUS_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=index)
    assert "click.shell_completion" in modules
    assert not {*HEAVY, *BUS} & set(modules)
