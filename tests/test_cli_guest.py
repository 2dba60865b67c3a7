"""`vbus guest`: a stock guest for a command, or for somebody at a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import readme
from command import ONE_CLASS, VBUS, fails, serving, vbus
from vbus.cli.guest import MACHINES
from vbus.vm.machine import MACHINES as KINDS

pytestmark = pytest.mark.timeout(300)
SOME = """
[bus]
name = "some"
[device.rng0]
type = "rng"
[device.disk0]
type = "blk"
memory = "16 MiB"
[device.lamp0]
type = "lamp.py:Lamp"
[connector.rng0]
type = "vhost-user"
device = "rng0"
socket = "rng0.sock"
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "disk0.sock"
[connector.lamp0]
type = "vhost-user"
device = "lamp0"
socket = "lamp0.sock"
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with some files, short for the sockets in it; nothing is left in it."""
    with tempfile.TemporaryDirectory(prefix="vbus-test-") as name:
        path = Path(name)
        (path / "rng.py").write_text(readme.files()["rng.py"])
        (path / "lamp.py").write_text(ONE_CLASS)
        (path / "some.toml").write_text(SOME)
        (path / "lamps.toml").write_text('[bus]\nname = "lamps"\n[device.lamp0]\ntype = "lamp.py:Lamp"\n')
        (path / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(path / "tmp"))
        monkeypatch.setenv("VBUS_RUNTIME_DIR", str(path / "run"))
        yield path
        assert list((path / "tmp").iterdir()) == []
        assert [found for found in (path / "run").glob("*") if found.name != "sock"] == []
        assert list((path / "run" / "sock").glob("*")) == []


def test_the_machines_are_those_that_there_are() -> None:
    assert set(MACHINES) == set(KINDS)


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ((), 2, "there is no terminal for a shell: write a command, vbus guest ... -- COMMAND"),
        (("--",), 2, "there is no command behind --: write one, or leave out -- for a shell"),
        (("--", "true"), 1, "no bus runs: start one with vbus run FILE.toml, or name a class"),
        (("--bus", "x", "rng.py:Rng", "--", "true"), 2, "--bus is for buses that run"),
        (("--function", "--", "true"), 2, "--function is for a file or a class"),
        (("--memory", "1 MiB", "--", "true"), 2, "invalid value for '--memory': 1 MiB: a guest needs 128 MiB"),
        (("--machine", "p35", "--", "true"), 2, "invalid value for '--machine'"),
        (("rng.py:Rgn", "--", "true"), 2, "rng.py has no class 'Rgn': did you mean 'Rng'?"),
        (("rng.py:Rng", "--fast", "--", "true"), 2, "rng.py:Rng: --fast: no such option"),
        (("some.toml", "--cpus", "2", "--", "true"), 2, "--cpus stands behind a file: write options of the guest"),
        (("some.toml", "rng", "--", "true"), 2, "unexpected 'rng': write files, each ending in .toml, or one CLASS"),
        (("none.toml", "--", "true"), 2, "none.toml: "),
    ],
)
def test_a_mistake_is_a_line(folder: Path, words: tuple[str, ...], status: int, line: str) -> None:
    [said] = fails("guest", *words, cwd=folder, status=status)
    assert said.startswith(f"vbus: {line}")


def test_a_module_that_there_is_not(folder: Path) -> None:
    [said] = fails("guest", "--module", "virtio_nonsense", "rng.py:Rng", "--", "true", cwd=folder, status=1)
    assert re.fullmatch(r"vbus: [\w.-]+ has no module virtio_nonsense", said)


def test_what_no_guest_can_have_is_said(folder: Path) -> None:
    left_out, said = fails("guest", "lamps.toml", "--", "true", cwd=folder)
    assert re.match(r"vbus: left out: lamp0: QEMU has no vhost-user front-end for ", left_out)
    assert said == "vbus: lamps.toml has no device that a guest could have"
    left_out, said = fails("guest", "--machine", "s390x", "rng.py:Rng", "--", "true", cwd=folder)
    assert "on s390x, only for" in left_out
    assert said == "vbus: rng.py:Rng has no device that a guest could have"


def steps(stderr: bytes) -> list[str]:
    """What a command said on its standard error, less what it says when something takes its time."""
    lines = stderr.decode().splitlines()
    return [line for line in lines if not re.match("vbus: (fetching |booting |building )", line)]


def test_a_command_is_as_if_it_ran_here(folder: Path) -> None:
    done = vbus(
        *("guest", "--cpus", "2", "--memory", "128 MiB", "--module", "loop", "rng.py:Rng"),
        *("--", "nproc; ls /sys/module | grep loop; head -c 64 /dev/hwrng; echo 'not good' >&2; exit 7"),
        cwd=folder,
        timeout=200,
    )
    assert (done.returncode, steps(done.stderr)) == (7, ["not good"])
    assert done.stdout.startswith(b"2\nloop\n")
    assert len(done.stdout) == 7 + 64


def test_a_whole_bus_behind_one_function(folder: Path) -> None:
    listed = "cat /sys/bus/vbus/devices/*/name; head -c 4096 /dev/vda | wc -c; head -c 64 /dev/hwrng | wc -c"
    done = vbus("guest", "--function", "some.toml", "--", listed, cwd=folder, timeout=200)
    assert (done.returncode, steps(done.stderr)) == (0, [])
    # A device of a class that the kernel has no driver for is on the guest's bus, too.
    assert done.stdout.decode().split() == ["rng0", "disk0", "lamp0", "4096", "64"]


def test_a_function_of_a_bus_that_runs(folder: Path) -> None:
    # What is behind a function needs no other connector.
    (folder / "one.toml").write_text(
        SOME.partition("[device.lamp0]")[0].replace('"some"', '"one"')
        + '[connector.guests]\ntype = "ivshmem"\nsocket = "guests.sock"\nram = "one.ram"\nqmp = "one.qmp"\n'
    )
    shown = "cat /sys/bus/vbus/devices/*/name /sys/bus/pci/drivers/vbus_ivshmem/*/memory"
    done = vbus("guest", "one.toml", "--", shown, cwd=folder, timeout=200)
    assert (done.returncode, steps(done.stderr)) == (0, [])
    assert done.stdout.split() == [b"rng0", b"disk0", b"shared"]
    with serving("one.toml", cwd=folder, lines=1):
        done = vbus("guest", "--", "dd if=/dev/vda bs=64k count=1 | wc -c", cwd=folder, timeout=200)
        assert (done.returncode, done.stdout) == (0, b"65536\n"), done.stderr
    # A machine that goes takes its keeper with it.
    deadline = time.monotonic() + 20
    while (folder / "guests.sock.keeper").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (folder / "guests.sock.keeper").exists()


class Person:
    """Somebody at a terminal."""

    def __init__(self, *words: str, cwd: Path) -> None:
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen([*VBUS, *words], cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.said = ""

    def reads(self, pattern: str, seconds: float = 150) -> re.Match[str]:
        """Wait for something on the screen, behind what was read before."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.said)) is None:
            assert select.select([self._end], [], [], deadline - time.monotonic())[0], self.said
            self.said += os.read(self._end, 1 << 12).decode(errors="replace")
        self.said = self.said[found.end() :]
        return found

    def types(self, text: str) -> None:
        os.write(self._end, text.encode())

    def leaves(self) -> int:
        """The command's exit status."""
        try:
            return self.process.wait(60)
        finally:
            # With the guest, unless it ended by itself.
            self.process.terminate()
            self.process.wait()
            os.close(self._end)


def test_a_shell_in_a_guest_of_a_running_bus(folder: Path) -> None:
    with serving("some.toml", cwd=folder, lines=3):
        person = Person("guest", "--bus", "some", cwd=folder)
        try:
            person.reads("left out: lamp0: ")
            person.reads("a shell in the guest, which has rng0, disk0; exit, or Control-], leaves")
            person.reads("# ")
            person.types("head -c 4096 /dev/vda | tr '\\0' z | wc -c\n")
            person.reads("4096\r?\n")
            listed = subprocess.run([*VBUS, "ls", "--json"], cwd=folder, capture_output=True, check=True)
            rows = {row["name"]: row for row in json.loads(listed.stdout)}
            assert [rows[name]["connector"] for name in ("rng0", "disk0", "lamp0")] == ["rng0", "disk0", None]
            # Another guest finds nothing that is free.
            *left_out, said = fails("guest", "--", "true", cwd=folder)
            assert len(left_out) == 3
            assert re.match(r"vbus: left out: rng0: rng0: uid \d+ pid \d+ has it", left_out[0])
            assert said == "vbus: bus some has no device for a guest: give it a connector of type vhost-user for one"
            # What looks like the agent's answer is none, and Control-C is the guest's.
            # One process says it and sleeps: it has the terminal by then, and so gets the Control-C.
            person.types("sh -c \"echo '@answer 1 0 0'; exec sleep 1000\"\n")
            person.reads("\n@answer 1 0 0\r?\n")
            person.types("\x03")
            person.types("exit 5\n")
        finally:
            status = person.leaves()
        assert status == 5


def test_control_bracket_leaves(folder: Path) -> None:
    person = Person("guest", "--machine", "microvm", "rng.py:Rng", cwd=folder)
    try:
        person.reads("# ")
        person.types("\x1d")
    finally:
        assert person.leaves() == 0


def test_a_signal_ends_all_of_it(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vbus", "guest", "rng.py:Rng", "--", "sleep 1000"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        while "booting" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
