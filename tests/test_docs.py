"""The programs and commands in the documentation's pages, each run as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
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


@pytest.mark.timeout(400)
def test_a_device_is_written_step_by_step() -> None:
    """Files, programs and commands of the page, in its order and in one directory, as its reader goes through it."""
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        _entry_point(Path(folder), blocks("write-a-device.md", "toml")[0])
        done = subprocess.run(
            ["bash", "-c", session("write-a-device.md") + "\ncat log*"],
            cwd=folder,
            env=os.environ | {"PATH": PATH, "VBUS_RUNTIME_DIR": f"{folder}/run", "PYTHONPATH": folder},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=380,
            check=False,
        )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "vbus: level 300: a lamp takes 0 to 100\n" in done.stderr
    assert "level 10\nlevel 30\n" in said
    assert re.search(r"^attributes\n  level +30$", said, re.MULTILINE)
    assert re.search(r"^lamp .* DEVICE_NEEDS_RESET .* device-error: 1$", said, re.MULTILINE)
    assert re.search(r"^reasons\n.* error: unpack requires a buffer of 4 bytes$", said, re.MULTILINE)
    assert re.search(r"^lamp .* free .* device-error: 1$", said, re.MULTILINE)
    assert 'N: Name="mute button"\n' in said
    assert "Options of lamp:\n  --level" in said
    assert re.search(r"^4 passed ", said, re.MULTILINE)


def _entry_point(folder: Path, toml: str) -> None:
    """What an installed package says of itself, whose pyproject.toml has this block."""
    [(group, points)] = tomllib.loads(toml)["project"]["entry-points"].items()
    info = folder / "lamp-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamp\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {place}" for name, place in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


def session(page: str) -> str:
    """All of a page as one session of a shell: files are written, programs and commands are run."""
    lines = PROLOGUE[:]
    found = re.findall(r"^```(python|console)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    for number, (kind, block) in enumerate(found):
        if kind == "console":
            lines += commands(block, f"{number}.")
            continue
        named = re.match(r"# (\w+\.py)\n", block)
        name = named[1] if named else f"program{number}.py"
        lines += [f"cat >{name} <<'THE END'", block + "THE END"]
        if not named:
            lines += [f"echo 'program {number}'", f"python {name}"]
    return "\n".join(lines)


def run_page(folder: Path, page: str, *, timeout: float, inside: Sequence[str] = ()) -> str:
    """What a page's commands say, which are run in a folder that has the page's file; they succeed."""
    (folder / "bus.toml").write_text(blocks(page, "toml")[0])
    done = subprocess.run(
        [*inside, "bash", "-c", script(page) + "\ncat log*"],
        cwd=folder,
        env=os.environ | {"PATH": PATH, "VBUS_RUNTIME_DIR": f"{folder}/run", "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_page_has_programs() -> None:
    assert {page for page, _, _ in PROGRAMS} == set(PAGES)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace for the machine of a page: nothing of it touches this machine's own."""
    name = f"vb{os.getpid() % 100000}docs"
    subprocess.run(["ip", "netns", "add", name], check=True, env=os.environ | {"PATH": PATH})
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True, env=os.environ | {"PATH": PATH})


@pytest.mark.timeout(300)
def test_the_commands_of_channels() -> None:
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        said = run_page(Path(folder), "channels.md", timeout=280)
    assert re.search(r"^bus +alarm +0 +65536 +- +1 ", said, re.MULTILINE)
    assert "1 driver heard it" in said
    assert re.search(r"bus: fire\n.*bus: all clear\n", said)


@pytest.mark.timeout(900)
def test_the_commands_of_the_kvm_connector() -> None:
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        shutil.copy(DOCS.parent / "examples" / "rng.py", folder)
        said = run_page(Path(folder), "kvm-connector.md", timeout=880)
    assert re.search(r"==> /sys/bus/vbus/devices/vbus0-2/name <==\ndisk0\n", said)
    assert re.search(r"==> /sys/bus/vbus/devices/vbus0-1/priority <==\n2\n", said)
    assert re.search(r"^00000000: ([0-9a-f]{4} ){8}", said, re.MULTILINE)
    assert re.search(r" vbus-\S+-2$", said, re.MULTILINE)
    assert "appeared" in said


PROLOGUE = ["set -e -o pipefail -m", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]


def script(page: str) -> str:
    """A page's commands as one session of a shell."""
    return "\n".join([*PROLOGUE, *commands("".join(blocks(page, "console")))])


def commands(block: str, label: str = "") -> list[str]:
    """Commands for a session; what goes on behind is waited for until it has said something, and shown at its end."""
    lines = []
    for number, line in enumerate(block.splitlines()):
        assert line.startswith("$ "), line
        command = line[2:]
        lines.append(f"echo {'$ ' + command!r}")
        if command.endswith("&"):
            log = f"log{label}{number}"
            lines += [f"{command[:-1]} >{log} 2>&1 &", f"until [ -s {log} ]; do sleep 0.05; done"]
        else:
            lines.append(f"{{ {command}; }} || {{ tail -n 50 log*; exit 1; }}")
    return lines


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip", path=PATH) is None,
    reason="namespaces and taps are root's",
)
@pytest.mark.timeout(300)
def test_the_commands_of_containers(namespace: str) -> None:
    # A short path, for the socket in it.
    with tempfile.TemporaryDirectory(prefix="vbus-docs-") as folder:
        said = run_page(Path(folder), "containers.md", timeout=280, inside=["ip", "netns", "exec", namespace])
    assert re.search(r"^eth0 ", said, re.MULTILINE)
    assert "3 packets transmitted, 3 received, 0% packet loss" in said
    assert re.search(r"carrier; .*\n0\n", said)
    assert "1 packets transmitted, 1 received, 0% packet loss" in said
    assert "mtu 1400" in said
    assert re.search(r"net0 +0 receive0", said)
