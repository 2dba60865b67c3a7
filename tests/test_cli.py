"""The command, run as a user runs it: what it prints, its exit status, and the bus that it changes."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from command import ONE_CLASS, VBUS, fails, files, out, serving, vbus
from conftest import wait_until
from vbus.cli import main
from vbus.proxy import attach, drivers

MIB = 1 << 20
FILE = """\
[bus]
name = "demo"

[device.disk0]
type = "blk"
path = "disk.img"
serial = "one"

[device.rng0]
type = "rng"

[device.con0]
type = "console"
backend = "unix:con.sock"

[connector.local]
type = "process"

[connector.far]
type = "stream"
listen = "unix:far.sock"
"""
RNG = """\
import os, vbus

class Rng(vbus.Device):
    \"\"\"An entropy device.\"\"\"
    device_id = vbus.DeviceID.ENTROPY
    queues = ("requests",)

    def handle(self, queue, request):
        request.write(os.urandom(request.writable))
"""
HANGS = """\
import threading, vbus

class Hangs(vbus.Device):
    \"\"\"Never answers.\"\"\"
    device_id = vbus.DeviceID.ENTROPY
    queues = ("requests",)

    def handle(self, queue, request):
        print("entered", flush=True)
        threading.Event().wait()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "disk.img").write_bytes(os.urandom(2 * MIB))
    (tmp_path / "lamp.py").write_text(ONE_CLASS)
    (tmp_path / "rng.py").write_text(RNG)
    (tmp_path / "demo.toml").write_text(FILE)
    return tmp_path


@pytest.fixture
def demo(folder: Path) -> Iterator[Path]:
    """A bus from a file runs; gives the folder."""
    with serving("demo.toml", cwd=folder, lines=2):
        yield folder


@pytest.fixture
def lamp(folder: Path) -> Iterator[Path]:
    """A bus with one device of a user's own class runs; gives the folder."""
    with serving("lamp.py:Lamp", "--level", "3", "--listen", "l.sock", cwd=folder, lines=2):
        yield folder


def rows(*words: str, cwd: Path) -> list[dict[str, Any]]:
    """What a listing gives with --json."""
    found = json.loads(out(*words, "--json", cwd=cwd))
    assert isinstance(found, list)
    return found


# Running.


def test_a_class_needs_no_file(folder: Path, runtime_dir: Path) -> None:
    with serving("rng.py:Rng", "--listen", "./rng.sock", cwd=folder, lines=2) as (_, said):
        assert said == [
            f"bus rng: process:{folder}/rng.sock",
            "try: vbus driver ./rng.sock rng --read 16 | xxd",
        ]
        done = vbus("driver", "./rng.sock", "rng", "--read", "16", cwd=folder)
        assert (done.returncode, len(done.stdout), done.stderr) == (0, 16, b"")
        [row] = rows("ls", cwd=folder)
        assert (row["bus"], row["name"], row["type"], row["device_id"]) == ("rng", "rng", "rng", 4)
    assert files(runtime_dir) == []
    assert not (folder / "rng.sock").exists()


def test_a_class_has_options_and_a_default_address(folder: Path, runtime_dir: Path) -> None:
    words = ("lamp.py:Lamp", "--bright", "--colour=red", "--name", "l0", "--bus", "house", "--mask", "COLOUR")
    with serving(*words, "--priority", "1", cwd=folder, lines=2) as (_, said):
        address = f"{runtime_dir}/sock/house-local.sock"
        assert said == [f"bus house: process:{address}", f"try: vbus driver {address} l0"]
        [row] = rows("show", "l0", cwd=folder)
        assert (row["attributes"], row["priority"]) == ({"level": 100}, 1)
        assert "COLOUR" not in row["features"]["exposed"]
    assert files(runtime_dir) == []


def test_help_for_a_class_shows_its_options(folder: Path) -> None:
    text = out("run", "lamp.py:Lamp", "--help", cwd=folder)
    assert "A lamp that can be set." in text
    assert re.search(r"--colour TEXT +default: white", text)
    assert re.search(r"--level INTEGER +default: 0", text)
    assert re.search(r"--bright BOOL +default: false", text)
    assert re.search(r"--path PATH\n", out("run", "blk", "--help", cwd=folder))
    assert "--listen ADDRESS" in out("run", "--help", cwd=folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_success(folder: Path, runtime_dir: Path, number: signal.Signals) -> None:
    with serving("demo.toml", cwd=folder, lines=2) as (process, said):
        assert said == [f"bus demo: process:{runtime_dir}/sock/demo-local.sock", f"bus demo: unix:{folder}/far.sock"]
        process.send_signal(number)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert files(runtime_dir) == []


def test_systemd_is_told(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(folder / "notify"))
        notified.settimeout(30)
        with serving("demo.toml", cwd=folder, lines=2, env={"NOTIFY_SOCKET": str(folder / "notify")}) as (process, _):
            assert notified.recv(1000).split(b"\n") == [b"READY=1", b"STATUS=serving demo"]
            process.send_signal(signal.SIGTERM)
            assert notified.recv(1000) == b"STOPPING=1"
            assert process.wait(30) == 0


def test_a_bus_that_was_killed_does_not_stand_in_the_way(folder: Path, runtime_dir: Path) -> None:
    with serving("demo.toml", cwd=folder, lines=2) as (process, _):
        process.kill()
        process.wait(30)
    assert "demo/lock" in files(runtime_dir)
    assert rows_with_note("ls", cwd=folder) == ([], [f"no bus runs in {runtime_dir}"])
    with serving("demo.toml", cwd=folder, lines=2):
        assert len(rows("ls", cwd=folder)) == 3
    assert files(runtime_dir) == []


def rows_with_note(*words: str, cwd: Path) -> tuple[list[dict[str, Any]], list[str]]:
    done = vbus(*words, "--json", cwd=cwd)
    assert done.returncode == 0
    return json.loads(done.stdout), done.stderr.decode().splitlines()


def test_a_bus_that_runs_is_left_alone(demo: Path) -> None:
    [line] = fails("run", "demo.toml", cwd=demo)
    assert re.fullmatch(
        r"vbus: demo\.toml: bus\.name: a bus 'demo' is running already \(process \d+\): "
        r"end that one, or choose another name",
        line,
    )
    (demo / "other.toml").write_text(FILE.replace('"demo"', '"other"'))
    lines = fails("run", "other.toml", cwd=demo)
    assert lines == [
        f"vbus: other.toml: connector.far.listen: socket '{demo}/far.sock' is in use: "
        "choose another, or end what listens there",
        f"vbus: other.toml: device.disk0.path: disk {demo}/disk.img is in use by another process or disk: "
        "stop that one, or open both read_only, or shared",
        f"vbus: other.toml: device.con0.backend: console backend: {demo}/con.sock is in use by another process: "
        "choose another path",
    ]
    assert len(rows("ls", cwd=demo)) == 3


def test_a_device_that_hangs_is_named_and_does_not_hold_the_stop(folder: Path) -> None:
    (folder / "hangs.py").write_text(HANGS)
    with serving("hangs.py:Hangs", "--listen", "h.sock", cwd=folder, lines=2) as (process, _):
        driver = subprocess.Popen(
            [*VBUS, "driver", "h.sock", "hangs", "--read", "1"], cwd=folder, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"entered\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read().decode().splitlines()[-1] == "vbus: device hangs/hangs hung and was left behind"
        assert driver.wait(30) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_it_serves_takes_down_what_is_half_made(
    folder: Path, runtime_dir: Path, number: signal.Signals
) -> None:
    (folder / "early.py").write_text(
        "import os, time, vbus\n\nclass Early(vbus.Device):\n    device_id = 1\n    queues = ('a',)\n"
        f"    def plugged(self):\n        os.kill(os.getpid(), {int(number)})\n        time.sleep(0.5)\n"
    )
    done = vbus("run", "early.py:Early", "--listen", "e.sock", cwd=folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert files(runtime_dir) == []
    assert not (folder / "e.sock").exists()


RUN_MISTAKES = [
    (("run",), "nothing to run: write vbus run FILE.toml, or vbus run CLASS; see vbus run --help"),
    (("run", "dmeo.toml"), "dmeo.toml: there is no such file: did you mean 'demo.toml'?"),
    (("run", "lamp.py"), "'lamp.py' is a file; name a class in it: 'lamp.py:Class'"),
    (("run", "lamp.py:Lapm"), "lamp.py has no class 'Lapm': did you mean 'Lamp'?"),
    (("run", "lamp.py:Lamp", "--colur", "red"), "lamp.py:Lamp: --colur: no such option: did you mean '--colour'?"),
    (("run", "lamp.py:Lamp", "--level", "x"), 'lamp.py:Lamp: --level: "x" does not fit: write a whole number'),
    (("run", "lamp.py:Lamp", "red"), "unexpected word 'red': an option of the device is written --name value"),
    (("run", "lamp.py:Lamp", "--mask", "X"), "--mask: no feature 'X': there are "),
    (("run", "lamp.py:Lamp", "--colour", "black"), "lamp.py:Lamp: --colour: colour 'black' is none: choose another"),
    (("run", "lamp.py:Lamp", "--bus", "Lamp"), "bus 'Lamp': a name is 1 to 63 of a-z 0-9 . _ - and begins with "),
    (
        ("run", "lamp.py:Lamp", "--listen", "no:x"),
        "address 'no:x': write process:PATH, unix:PATH, vhost-user:PATH, ivshmem:PATH, tcp:HOST:PORT or tls:HOST:PORT",
    ),
    (
        ("run", "rng", "--listen", "vhost-user:x"),
        "--listen vhost-user:x: a vhost-user connector has one device; ",
    ),
    (("run", "rng", "--source", "nothing"), "rng: --source: cannot open "),
    (("run", "blkk"), "no device type 'blkk': did you mean 'blk'?"),
    (("run", "demo.toml", "--name", "x"), "--name is not for a file: write it into the file as a key"),
    (("run", "demo.toml", "lamp.py:Lamp"), "unexpected 'lamp.py:Lamp': write files only, each ending in .toml, or "),
]


@pytest.mark.parametrize(("words", "line"), RUN_MISTAKES)
def test_what_cannot_run(folder: Path, runtime_dir: Path, words: tuple[str, ...], line: str) -> None:
    [said] = fails(*words, cwd=folder)
    assert said.startswith(f"vbus: {line}")
    assert files(runtime_dir) == []


# Looking.


def test_ls_lists_every_device(demo: Path) -> None:
    lines = out("ls", cwd=demo).splitlines()
    assert lines[0].split() == ["BUS", "ADDRESS", "NAME", "TYPE", "STATUS", "DRIVER", "VIOLATIONS"]
    assert [line.split() for line in lines[1:]] == [
        ["demo", "1", "disk0", "blk", "free", "-", "-"],
        ["demo", "2", "rng0", "rng", "free", "-", "-"],
        ["demo", "3", "con0", "console", "free", "-", "-"],
    ]
    assert out("ls", "demo", cwd=demo).splitlines() == lines
    assert fails("ls", "dmeo", cwd=demo) == ["vbus: no bus 'dmeo' runs: did you mean 'demo'?"]


def test_the_keys_of_every_row_are_those_of_the_reference(demo: Path) -> None:
    reference = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    (demo / "x.img").write_bytes(bytes(MIB))
    address = f"unix:{demo}/far.sock"
    listings = {
        "ls": rows("ls", cwd=demo),
        "show": rows("show", "disk0", cwd=demo),
        "stat": rows("stat", cwd=demo),
        "ls --connectors": rows("ls", "--connectors", cwd=demo),
        "plug": rows("plug", "disk1", "--type", "blk", "--path", "x.img", cwd=demo),
        "set": rows("set", "disk1", "capacity=4096", cwd=demo),
        "driver": rows("driver", address, cwd=demo),
        "driver DEVICE": rows("driver", address, "disk0", cwd=demo),
        "doctor": rows("doctor", cwd=demo),
    }
    for verb, found in listings.items():
        section = re.search(rf"^### `vbus {re.escape(verb)} --json`$(.*?)(?=^##)", reference, re.S | re.M)
        assert section is not None, f"docs/cli.md has no section for {verb}"
        documented = re.findall(r"^\| `(\w+)` \|", section[1], re.M)
        assert found
        for row in found:
            assert list(row) == documented, verb


def test_show_and_stat_tell_what_a_driver_did(demo: Path, runtime_dir: Path) -> None:
    with attach(f"{runtime_dir}/sock/demo-local.sock") as remote:
        disk = remote.driver("disk0", drivers.Blk)
        disk.pread(4096, 0)
        [row] = [row for row in rows("ls", cwd=demo) if row["name"] == "disk0"]
        assert (row["connector"], row["status"][-1]) == ("local", "DRIVER_OK")
        assert str(os.getpid()) in row["owner"]
        assert "FLUSH" in row["features"]["negotiated"]
        [stat] = rows("stat", "disk0", cwd=demo)
        assert (stat["requests"], stat["bytes_read"], stat["bytes_written"]) == (1, 16, 4097)
        text = out("show", "disk0", cwd=demo)
        assert re.search(r"status +ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK", text)
        assert re.search(r"reads +1", text)
        assert re.search(r"demo +disk0 +0 requests +1 +16 +4097 ", out("stat", "demo/disk0", cwd=demo))
        [local] = [row for row in rows("ls", "--connectors", cwd=demo) if row["name"] == "local"]
        assert local["peers"][0]["devices"] == ["disk0"]


def test_ls_tells_why_a_driver_went(demo: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(demo / "far.sock"))
        sock.sendall(bytes(64))
        assert sock.recv(1 << 16) == b""
    [far] = [row for row in rows("ls", "--connectors", cwd=demo) if row["name"] == "far"]
    assert far["peers"] == []
    assert "malformed-message" in far["departed"][-1]["reason"]
    text = out("ls", "--connectors", cwd=demo)
    assert re.search(r"drivers that went\n.*\n +demo .* far: uid \d+ pid \d+ +malformed-message", text)


def test_stat_watches_until_it_is_interrupted(demo: Path) -> None:
    watching = subprocess.Popen(
        [*VBUS, "stat", "rng0", "--watch", "--interval", "0.05", "--json"], cwd=demo, stdout=subprocess.PIPE
    )
    assert watching.stdout is not None
    with watching.stdout as lines:
        first, second = json.loads(lines.readline()), json.loads(lines.readline())
        assert first == second == rows("stat", "rng0", cwd=demo)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0


def test_nobody_runs(folder: Path, runtime_dir: Path) -> None:
    note = [f"no bus runs in {runtime_dir}"]
    assert rows_with_note("ls", cwd=folder) == ([], note)
    assert rows_with_note("ls", "--connectors", cwd=folder) == ([], note)
    line = f"vbus: no bus runs in {runtime_dir}: start one with vbus run FILE.toml"
    for words in (("show", "x"), ("stat",), ("unplug", "x"), ("set", "x", "a=1"), ("plug", "x", "--type", "rng")):
        assert fails(*words, cwd=folder, status=1) == [line]


# Changing.


def test_devices_come_and_go(demo: Path, runtime_dir: Path) -> None:
    (demo / "sub").mkdir()
    (demo / "sub" / "more.img").write_bytes(bytes(MIB))
    with attach(f"{runtime_dir}/sock/demo-local.sock") as remote:
        said = out("plug", "disk1", "--type", "blk", "--path", "more.img", "--read-only", cwd=demo / "sub")
        assert said == "disk1 is plugged into bus demo, at address 4\n"
        disk = remote.driver(remote.wait_for("disk1").name, drivers.Blk)
        assert (disk.size, disk.read_only) == (MIB, True)
        said = out("plug", "lamp0", "--type", "lamp.py:Lamp", "--level=7", "--bus", "demo", cwd=demo)
        assert said == "lamp0 is plugged into bus demo, at address 5\n"
        assert out("set", "lamp0", "level=0x10", cwd=demo) == "level  16\n"
        assert remote.wait_for("lamp0").config() == (16).to_bytes(4, "little")
        assert out("unplug", "disk1", cwd=demo) == "disk1 is off bus demo\n"
        assert out("unplug", "lamp0", "--surprise", cwd=demo) == "lamp0 is off bus demo\n"
        assert wait_until(lambda: [device.name for device in remote] == ["disk0", "rng0", "con0"])


def test_a_disk_grows_under_its_driver(demo: Path, runtime_dir: Path) -> None:
    with attach(f"{runtime_dir}/sock/demo-local.sock") as remote:
        disk = remote.driver("disk0", drivers.Blk)
        assert out("set", "disk0", "capacity=8192", cwd=demo) == "capacity  8192\n"
        assert disk.wait_for_size(2 * MIB, timeout=30) == 4 * MIB


CHANGE_MISTAKES = [
    (("plug", "x"), 2, "missing option '--type': see vbus plug --help"),
    (("plug", "x", "--type", "blkk"), 2, "no device type 'blkk': did you mean 'blk'?"),
    (("plug", "x", "--type", "blk"), 2, "blk: give either path (a file or a block device) or memory (a size)"),
    (("plug", "x", "--type", "blk", "--memry", "1"), 2, "--memry: no such option: did you mean '--memory'?"),
    (("plug", "--memory", "x", "--type", "blk"), 2, "unexpected '--memory': write the device's name before its "),
    (("plug", "X", "--type", "rng"), 2, "device 'X': a name is 1 to 63 of a-z 0-9 . _ - and begins with a letter"),
    (("plug", "rng0", "--type", "rng"), 2, "bus demo has a device 'rng0' already: choose another name"),
    (("plug", "x", "--type", "rng", "--bus", "dem"), 2, "no bus 'dem' runs: did you mean 'demo'?"),
    (("plug", "x", "--type", "rng", "--mask", "Y"), 2, "--mask: no feature 'Y': there are "),
    (("plug", "x", "--type", "rng", "--priority", "8"), 2, "invalid value for '--priority': 8 is not in the range "),
    (("unplug", "rgn0"), 2, "bus demo has no device 'rgn0': did you mean 'rng0'?"),
    (("unplug", "dmeo/rng0"), 2, "no bus 'dmeo' runs: did you mean 'demo'?"),
    (("set", "disk0", "capaciy=1"), 2, "device disk0 has no attribute 'capaciy': did you mean 'capacity'?"),
    (("set", "disk0", "capacity"), 2, "unexpected 'capacity': write ATTRIBUTE=VALUE"),
    (("set", "disk0", "capacity=big"), 2, "capacity: 'big' is not a whole number"),
    (("set", "disk0", "serial=x"), 2, "disk0: serial cannot be set"),
    (("set", "disk0", "capacity=0", "capacity=1"), 2, "attribute 'capacity' is given twice"),
]


def test_changes_that_cannot_be(demo: Path) -> None:
    before = rows("ls", cwd=demo)
    for words, status, line in CHANGE_MISTAKES:
        [said] = fails(*words, cwd=demo, status=status)
        assert said.startswith(f"vbus: {line}")
    [said] = fails("set", "disk0", "capacity=0", "capaciy=1", cwd=demo)
    assert rows("ls", cwd=demo) == before
    assert rows("show", "disk0", cwd=demo)[0]["attributes"]["capacity"] == 4096


def test_a_device_that_no_connector_carries_is_refused(folder: Path) -> None:
    (folder / "one.toml").write_text(
        '[device.rng0]\ntype = "rng"\n[connector.c]\ntype = "process"\ndevices = ["rng0"]\n'
    )
    with serving("one.toml", cwd=folder):
        assert fails("plug", "x", "--type", "rng", cwd=folder) == [
            "vbus: no connector of bus one would carry the device: it needs a connector without a list of 'devices'"
        ]
        assert [row["name"] for row in rows("ls", cwd=folder)] == ["rng0"]


def test_several_buses(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.toml").write_text('[device.rng0]\ntype = "rng"\n')
    with serving("a.toml", "b.toml", cwd=folder, lines=2) as (_, said):
        assert [line.split(":")[0] for line in said] == ["bus a", "bus b"]
        assert [row["bus"] for row in rows("ls", cwd=folder)] == ["a", "b"]
        assert [row["bus"] for row in rows("ls", "b", cwd=folder)] == ["b"]
        assert fails("show", "rng0", cwd=folder) == ["vbus: device 'rng0' is on several buses: write a/rng0 or b/rng0"]
        assert fails("plug", "x", "--type", "rng", cwd=folder) == [
            "vbus: several buses run (a, b): say which one with --bus NAME"
        ]
        out("plug", "x", "--type", "rng", "--bus", "b", cwd=folder)
        assert rows("show", "b/rng0", cwd=folder)[0]["bus"] == "b"
        out("unplug", "a/rng0", cwd=folder)
        assert [(row["bus"], row["name"]) for row in rows("ls", cwd=folder)] == [("b", "rng0"), ("b", "x")]
        assert fails("show", "y", cwd=folder) == ["vbus: there is no device 'y': there is rng0, x"]


# Driving.


@pytest.fixture(params=["process", "stream"])
def address(request: pytest.FixtureRequest, demo: Path, runtime_dir: Path) -> str:
    return f"{runtime_dir}/sock/demo-local.sock" if request.param == "process" else "unix:far.sock"


def test_the_driver_lists_what_there_is(demo: Path, address: str) -> None:
    lines = out("driver", address, cwd=demo).splitlines()
    assert lines[0].split() == ["ADDRESS", "NAME", "TYPE", "STATUS", "UUID"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["1", "disk0", "blk", "free"],
        ["2", "rng0", "rng", "free"],
        ["3", "con0", "console", "free"],
    ]


def test_the_driver_uses_a_disk(demo: Path, address: str) -> None:
    image = demo / "disk.img"
    before = image.read_bytes()
    assert vbus("driver", address, "disk0", "--read", "5000", "--offset", "777", cwd=demo).stdout == before[777:5777]
    (demo / "new").write_bytes(b"new bytes")
    assert out("driver", address, "disk0", "--write", "new", "--offset", "1 KiB", cwd=demo) == (
        "9 bytes written to disk0 at 1024\n"
    )
    assert out("driver", address, "disk0", "--write", "-", cwd=demo, stdin=b"first") == (
        "5 bytes written to disk0 at 0\n"
    )
    after = b"first" + before[5:1024] + b"new bytes" + before[1033:]
    assert image.read_bytes() == after
    assert out("driver", address, "disk0", "--copy-to", "copy", cwd=demo) == (
        f"{2 * MIB} bytes of disk0 copied to copy\n"
    )
    assert (demo / "copy").read_bytes() == after
    assert vbus("driver", address, "disk0", "--copy-to", "-", cwd=demo).stdout == after
    [row] = rows("driver", address, "disk0", cwd=demo)
    assert row["facts"] == {
        "size": 2 * MIB,
        "block_size": 512,
        "read_only": False,
        "serial": "one",
        "in_use": False,
    }
    text = out("driver", address, "disk0", cwd=demo)
    assert re.search(r"size +2097152", text)
    assert re.search(r"serial +one", text)


def test_facts_of_a_disk_that_somebody_else_has(demo: Path, runtime_dir: Path) -> None:
    with attach(f"{runtime_dir}/sock/demo-local.sock") as remote:
        remote.driver("disk0", drivers.Blk)
        [row] = rows("driver", "unix:far.sock", "disk0", cwd=demo)
        assert row["facts"] == {
            "size": 2 * MIB,
            "block_size": 512,
            "read_only": False,
            "serial": None,
            "in_use": True,
        }
        [line] = fails("driver", "unix:far.sock", "disk0", "--read", "1", cwd=demo, status=1)
        assert "disk0 is in use by local: uid " in line


def test_the_driver_reads_entropy_in_pieces(demo: Path, address: str) -> None:
    data = vbus("driver", address, "rng0", "--read", "200 KiB", cwd=demo).stdout
    assert len(data) == 200 << 10
    assert len(set(data)) == 256


def test_the_driver_is_a_pipe_to_a_console(demo: Path, address: str) -> None:
    process = subprocess.Popen(
        [*VBUS, "driver", address, "con0", "--read", "11"],
        cwd=demo,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as person:
        person.connect(str(demo / "con.sock"))
        person.settimeout(30)
        # Output is dropped while nobody is there, so the person first says something that comes out.
        person.sendall(b"who is")
        assert process.stdout is not None
        assert process.stdin is not None
        assert os.read(process.stdout.fileno(), 100) == b"who is"
        process.stdin.write(b"it is me\n")
        process.stdin.flush()
        assert person.recv(100) == b"it is me\n"
        person.sendall(b"\x00\xffend, and more")
        assert process.wait(30) == 0
        assert process.communicate() == (b"\x00\xffend", b"")


def test_the_driver_leaves_a_console_when_it_is_told(demo: Path, runtime_dir: Path) -> None:
    address = f"{runtime_dir}/sock/demo-local.sock"
    assert vbus("driver", address, "con0", "--quit", "0", cwd=demo).returncode == 0
    process = subprocess.Popen(
        [*VBUS, "driver", address, "con0"], cwd=demo, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert wait_until(lambda: rows("show", "con0", cwd=demo)[0]["owner"], 30)
    out("unplug", "con0", cwd=demo)
    assert process.wait(30) == 1
    assert process.communicate()[1] == b"vbus: con0 was removed\n"


def test_a_terminal_gives_its_keys_to_the_console_and_leaves_with_one(demo: Path, runtime_dir: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(demo)
        os.execv(VBUS[0], [*VBUS, "driver", f"{runtime_dir}/sock/demo-local.sock", "con0"])
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as person:
            assert b"Control-] leaves" in read_until(terminal, b"leaves")
            person.connect(str(demo / "con.sock"))
            person.settimeout(30)
            person.sendall(b"login: ")
            assert read_until(terminal, b"login: ")
            os.write(terminal, b"me\x03\r")
            assert person.recv(100) == b"me\x03\r"
            os.write(terminal, b"!\x1d")
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert person.recv(100) == b"!"
    finally:
        os.close(terminal)


def read_until(fd: int, end: bytes) -> bytes:
    """What a terminal shows, up to `end`."""
    data = b""
    while end not in data:
        assert select.select([fd], [], [], 30)[0], data
        data += os.read(fd, 1000)
    return data


DRIVER_MISTAKES = [
    (("driver",), 2, "missing argument 'ADDRESS': see vbus driver --help"),
    (("driver", "none.sock"), 1, "process:none.sock: there is no such socket; is the bus running? see vbus ls"),
    (
        ("driver", "foo:bar"),
        2,
        "address 'foo:bar': write process:PATH, unix:PATH, vhost-user:PATH, ",
    ),
    (("driver", "vhost-user:x.sock", "disk0"), 2, "vhost-user:x.sock: say of which class the device there is, as "),
    (("driver", "vhost-user:x.sock", "--device-id", "blkk"), 2, "--device-id 'blkk': did you mean 'blk'?"),
    (("driver", "vhost-user:x.sock", "blk"), 1, "vhost-user:x.sock: there is no such socket; is the back-end running?"),
    (("driver", "unix:far.sock", "--device-id", "2"), 2, "--device-id is for vhost-user:PATH: the devices of a bus "),
    (("driver", "unix:far.sock", "dsk0"), 2, "bus demo has no device 'dsk0': "),
    (("driver", "unix:far.sock", "--read", "1"), 2, "--read needs a device: vbus driver ADDRESS lists them"),
    (("driver", "unix:far.sock", "disk0", "--read", "1x"), 2, "invalid value for '--read': '1x': 'x' is no unit"),
    (("driver", "unix:far.sock", "disk0", "--read", "3 MiB"), 1, "disk0 ends at 2097152: there are no 3145728 bytes"),
    (("driver", "unix:far.sock", "disk0", "--write", "none"), 1, "none: No such file or directory"),
    (("driver", "unix:far.sock", "disk0", "--offset", "1"), 2, "write one of --read LENGTH [--offset N], --write "),
    (("driver", "unix:far.sock", "rng0", "--write", "x"), 2, "--write is not for rng0, a device of type rng: see "),
    (("driver", "unix:far.sock", "con0", "--copy-to", "x"), 2, "--copy-to is not for con0, a device of type console"),
]


def test_what_cannot_be_driven(demo: Path) -> None:
    for words, status, line in DRIVER_MISTAKES:
        [said] = fails(*words, cwd=demo, status=status)
        assert said.startswith(f"vbus: {line}")
    done = vbus("driver", "unix:far.sock", "disk0", "--write", "-", "--offset", "2 MiB", cwd=demo, stdin=b"x")
    assert done.returncode == 1
    assert done.stderr.startswith(b"vbus: disk0 ends at 2097152")


# Manners.


def test_what_is_no_verb_and_no_option(folder: Path) -> None:
    assert fails("lss", cwd=folder) == ["vbus: there is no verb 'lss': did you mean 'ls'?"]
    assert fails("ls", "--jsn", cwd=folder) == ["vbus: no such option --jsn: did you mean '--json'?"]
    assert fails("ls", "a", "b", cwd=folder) == ["vbus: got unexpected extra argument (b): see vbus ls --help"]
    usage = vbus(cwd=folder)
    assert (usage.returncode, usage.stdout) == (2, b"")
    assert usage.stderr.startswith(b"Usage: vbus ")
    assert out("--help", cwd=folder).startswith("Usage: vbus ")
    assert re.fullmatch(r"vbus \d+\.\d+\.\d+\n", out("--version", cwd=folder))


def test_a_traceback_only_when_it_is_wanted(folder: Path) -> None:
    assert len(fails("show", "x", cwd=folder, status=1)) == 1
    lines = fails("--debug", "show", "x", cwd=folder, status=1)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("vbus: no bus runs in ")


def test_a_reader_that_has_enough_is_no_error(demo: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [*VBUS, "ls", "--json"], cwd=demo, stdout=pipe, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


def test_colour_is_for_terminals(demo: Path) -> None:
    def seen(**env: str) -> bytes:
        master, slave = os.openpty()
        with os.fdopen(master, "rb", buffering=0) as screen:
            process = subprocess.Popen([*VBUS, "ls"], cwd=demo, stdout=slave, env=os.environ | {"TERM": "xterm", **env})
            os.close(slave)
            data = b""
            with contextlib.suppress(OSError):  # EIO is the end of a terminal
                while piece := screen.read(1000):
                    data += piece
            assert process.wait(30) == 0
        return data

    assert b"\x1b[1mBUS" in seen(NO_COLOR="")
    assert b"\x1b" not in seen(NO_COLOR="1")
    assert b"\x1b" not in seen(NO_COLOR="", TERM="dumb")
    assert "\x1b" not in out("ls", cwd=demo)


def test_completion(demo: Path) -> None:
    def completed(words: str) -> list[str]:
        done = subprocess.run(
            VBUS,
            cwd=demo,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ
            | {"_VBUS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed("vbus sh") == ["show"]
    assert completed("vbus show ") == ["disk0", "rng0", "con0"]
    assert completed("vbus unplug demo/d") == ["demo/disk0"]
    assert completed("vbus ls ") == ["demo"]
    assert "--surprise" in completed("vbus unplug --s")
    assert {"blk", "console", "rng"} <= set(completed("vbus plug x --type "))
    for shell in ("bash", "zsh", "fish"):
        assert "_VBUS_COMPLETE" in out("completion", shell, cwd=demo)


def test_doctor(folder: Path) -> None:
    found = {row["check"]: row for row in rows("doctor", cwd=folder)}
    assert all(row["ok"] for row in found.values() if row["required"])
    assert found["native module"]["detail"].startswith("_core")
    text = out("doctor", cwd=folder)
    assert re.search(r"^sealed memory +ok ", text, re.M)
    (folder / "file").touch()
    done = vbus("doctor", cwd=folder, env={"VBUS_RUNTIME_DIR": str(folder / "file"), "PATH": "/nonexistent"})
    assert done.returncode == 1
    assert re.search(r"^run directory +missing +.*set VBUS_RUNTIME_DIR", done.stdout.decode(), re.M)
    assert re.search(
        r"^guests +missing \(not required\) +not found +install QEMU 9 or newer", done.stdout.decode(), re.M
    )


def test_names_from_the_other_side_cannot_speak_to_the_terminal() -> None:
    from vbus.cli.output import plain

    assert plain("a\x1b[2Jb\n\u202e") == "a\\x1b[2Jb\\x0a\\x202e"


def test_several_commands_at_once(demo: Path) -> None:
    """The bus answers each of many clients with what it asked for."""
    answers: list[list[str]] = []

    def ask(name: str) -> None:
        answers.append([row["name"] for row in rows("show", name, cwd=demo)] + [name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("disk0", "rng0", "con0") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert all(given == wanted for given, wanted in answers)


def test_the_installed_command_is_this_one() -> None:
    [script] = entry_points(group="console_scripts", name="vbus")
    assert script.load() is main
