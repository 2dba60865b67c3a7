"""The programs and commands in the documentation's pages, each run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["concepts.md", "channels.md", "virtual-machines.md"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"


def blocks(page: str, kind: str) -> list[str]:
    """The insides of a page's fenced blocks of one kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


PROGRAMS = [(page, number, program) for page in PAGES for number, program in enumerate(blocks(page, "python"))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("program", [p for _, _, p in PROGRAMS], ids=[f"{page}-{n}" for page, n, _ in PROGRAMS])
def test_a_program_of_a_page_runs(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    # What a guest is made of is fetched the first time.
    errors = [line for line in done.stderr.splitlines() if not line.startswith("vbus: fetching ")]
    assert (done.returncode, errors) == (0, []), done.stderr


def test_every_page_has_programs() -> None:
    assert {page for page, _, _ in PROGRAMS} == set(PAGES)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace for the machine of a page: nothing of it touches this machine's own."""
    name = f"vb{os.getpid() % 100000}docs"
    subprocess.run(["ip", "netns", "add", name], check=True, env=os.environ | {"PATH": PATH})
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True, env=os.environ | {"PATH": PATH})


def test_the_commands_of_channels() -> None:
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        (Path(folder) / "bus.toml").write_text(blocks("channels.md", "toml")[0])
        done = subprocess.run(
            ["bash", "-c", script("channels.md") + "\ncat log*"],
            cwd=folder,
            env=os.environ | {"PATH": PATH, "VBUS_RUNTIME_DIR": f"{folder}/run", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^bus +alarm +0 +65536 +- +1 ", done.stdout, re.MULTILINE)
    assert "1 driver heard it" in done.stdout
    assert re.search(r"bus: fire\n.*bus: all clear\n", done.stdout)


def script(page: str) -> str:
    """A page's commands as one session of a shell; what goes on behind is waited for until it has said something."""
    lines = ["set -e -o pipefail -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, line in enumerate(line for block in blocks(page, "console") for line in block.splitlines()):
        assert line.startswith("$ "), line
        command = line[2:]
        lines.append(f"echo {'$ ' + command!r}")
        if command.endswith("&"):
            lines += [f"{command[:-1]} >log{number} 2>&1 &", f"until [ -s log{number} ]; do sleep 0.05; done"]
        else:
            lines.append(f"{{ {command}; }} || {{ tail -n 50 log*; exit 1; }}")
    return "\n".join(lines)


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip", path=PATH) is None,
    reason="namespaces and taps are root's",
)
def test_the_commands_of_containers(namespace: str) -> None:
    # A short path, for the socket in it.
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        (Path(folder) / "bus.toml").write_text(blocks("containers.md", "toml")[0])
        done = subprocess.run(
            ["ip", "netns", "exec", namespace, "bash", "-c", script("containers.md")],
            cwd=folder,
            env=os.environ | {"PATH": PATH, "VBUS_RUNTIME_DIR": f"{folder}/run", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert re.search(r"^eth0 ", said, re.MULTILINE)
    assert "3 packets transmitted, 3 received, 0% packet loss" in said
    assert re.search(r"carrier\n0\n", said)
    assert "1 packets transmitted, 1 received, 0% packet loss" in said
    assert "mtu 1400" in said
    assert re.search(r"net0 +0 receive0", said)
