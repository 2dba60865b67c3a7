"""The verb `channel`, the control API behind it, and the examples that talk over channels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import vbus
from command import VBUS, serving
from command import vbus as run
from conftest import wait_until
from vbus.channel import WINDOW
from vbus.control.client import BusClient, running
from vbus.errors import NoSuchNameError, UsageError

ROOT = Path(__file__).resolve().parent.parent
FILE = """
[channel.alarm]
priority = 0
memory = "64 KiB"

[channel.chat]
"""


def command(*words: str) -> subprocess.CompletedProcess[bytes]:
    return run(*words, cwd=ROOT)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, for the socket in it."""
    with tempfile.TemporaryDirectory(prefix="vbus-test-") as name:
        yield Path(name)


@pytest.fixture
def bus(folder: Path, runtime_dir: Path) -> Iterator[BusClient]:
    """A bus that runs from a file, as its operator sees it."""
    (folder / "talk.toml").write_text(FILE + f'[connector.local]\ntype = "process"\nsocket = "{folder}/talk.sock"\n')
    with serving(str(folder / "talk.toml"), cwd=folder):
        (client,) = running()
        yield client


def test_channels_are_listed_with_who_has_them_open(bus: BusClient, folder: Path) -> None:
    with vbus.attach(str(folder / "talk.sock")) as remote:
        remote.open_channel("chat")
        remote.open_channel("mine", create=True, priority=7)
        rows = json.loads(command("channel", "ls", "--json").stdout)
        assert [(r["name"], r["priority"], r["memory"], r["relay"], len(r["drivers"])) for r in rows] == [
            ("alarm", 0, 65536, True, 0),
            ("chat", 4, 0, True, 1),
            ("mine", 7, 0, False, 1),
        ]
        assert str(os.getpid()) in rows[2]["owner"]
        head, *lines = command("channel", "ls", "talk").stdout.decode().splitlines()
        assert head.split() == [
            "BUS",
            "NAME",
            "PRIORITY",
            "MEMORY",
            "OWNER",
            "DRIVERS",
            "SENT",
            "RECEIVED",
            "MISSED",
        ]
        assert len(lines) == 3
        there = command("channel", "ls", "--address", str(folder / "talk.sock"), "--json").stdout
        assert [row["name"] for row in json.loads(there)] == ["alarm", "chat"]


def test_what_an_operator_says_is_heard(bus: BusClient, folder: Path) -> None:
    with vbus.attach(str(folder / "talk.sock")) as remote:
        there = remote.open_channel("alarm")
        done = command("channel", "send", "alarm", "fire")
        assert (done.returncode, done.stdout) == (0, b"1 driver heard it\n")
        command("channel", "send", "talk/alarm", "00ff", "--hex")
        said = [there.receive(10), there.receive(10)]
        assert [event.data for event in said if event is not None] == [b"fire", b"\0\xff"]
        while there.name and bus.say("alarm", bytes(4000)):
            pass
        done = command("channel", "send", "alarm", "too much")
        assert done.returncode == 1
        assert b"nobody heard it" in done.stderr
        row = next(row for row in bus.channels() if row["name"] == "alarm")
        assert row["missed"] == 2
        assert row["sent"] >= WINDOW // 4064


def test_what_a_driver_says_is_watched(bus: BusClient, folder: Path) -> None:
    watching = subprocess.Popen(
        [*VBUS, "channel", "watch", "chat", "--json", "--count", "2"], stdout=subprocess.PIPE, text=True
    )
    listening = subprocess.Popen(
        [*VBUS, "channel", "watch", "chat", "--address", str(folder / "talk.sock"), "--count", "1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert wait_until(lambda: len(bus.channels()[1]["drivers"]) == 1)
        # That the operator watches is nowhere to be seen but in what comes of it.
        with vbus.attach(str(folder / "talk.sock")) as remote, remote.open_channel("chat") as there:
            while watching.poll() is None:
                there.wait_writable(10)
                there.send(b"hello\x1b[2J")
                wait_until(lambda: watching.poll() is not None, 0.1)
        rows = [json.loads(line) for line in watching.communicate(timeout=20)[0].splitlines()]
        heard = listening.communicate(timeout=20)[0]
    finally:
        for process in (watching, listening):
            process.kill()
            process.wait()
    assert [(row["direction"], row["text"], row["hex"]) for row in rows] == [
        ("received", None, b"hello\x1b[2J".hex())
    ] * 2
    assert str(os.getpid()) in rows[0]["driver"]
    assert "talk: hex 68656c6c6f1b" in heard
    assert (watching.returncode, listening.returncode) == (0, 0)


def test_watching_ends_with_the_channel_and_by_an_interrupt(bus: BusClient) -> None:
    first = subprocess.Popen([*VBUS, "channel", "watch", "chat"], stdout=subprocess.PIPE)
    second = subprocess.Popen([*VBUS, "channel", "watch", "alarm", "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert second.stdout is not None
        while True:
            bus.request("POST", "/v1/channels/alarm/events", {"text": "now"})
            if wait_until(lambda: _readable(second), 0.1):
                break
        second.send_signal(signal.SIGINT)
        assert second.wait(20) == 0
        bus.request("DELETE", "/v1/channels/chat")
        assert first.wait(20) in (0, 2)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def _readable(process: subprocess.Popen[str]) -> bool:
    import select

    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0)[0])


def test_the_control_api_of_channels(bus: BusClient) -> None:
    row = bus.request("POST", "/v1/channels", {"name": "new", "priority": 2, "memory": "4 KiB", "relay": False})
    assert (row["name"], row["priority"], row["memory"], row["relay"]) == ("new", 2, 4096, False)
    assert bus.request("DELETE", "/v1/channels/new") == {"bus": "talk", "name": "new"}
    with pytest.raises(NoSuchNameError):
        bus.request("DELETE", "/v1/channels/new")
    with pytest.raises(NoSuchNameError, match="did you mean 'alarm'"):
        bus.say("alram", b"x")
    with pytest.raises(NoSuchNameError):
        next(bus.watch("alram"))
    for body, why in (
        ({"name": "alarm"}, "already"),
        ({"name": "Bad"}, "a name is"),
        ({"name": "x", "priority": 8}, "0 .the most urgent. to 7"),
        ({"name": "x", "memory": "1 GiB"}, "4 MiB is the most"),
        ({"name": "x", "nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(UsageError, match=why):
            bus.request("POST", "/v1/channels", body)
    for body, why in (
        ({}, "either text or hex"),
        ({"text": "a", "hex": "00"}, "either text or hex"),
        ({"hex": "0"}, "even number"),
        ({"text": "x" * 5000}, "4096 are the most"),
    ):
        with pytest.raises(UsageError, match=why):
            bus.request("POST", "/v1/channels/alarm/events", body)


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        (("send", "alram", "x"), 2, "did you mean 'alarm'"),
        (("send", "alarm", "0", "--hex"), 2, "even number of hexadecimal digits"),
        (("watch", "nowhere/alarm"), 2, "no bus 'nowhere' runs"),
        (("watch", "x", "--address", "/nowhere.sock"), 1, "there is no such socket"),
        (("ls", "talk", "--address", "x"), 2, "two ways to say where"),
    ],
)
def test_mistakes_are_one_line(bus: BusClient, words: tuple[str, ...], status: int, line: str) -> None:
    done = command("channel", *words)
    assert done.returncode == status
    (said,) = done.stderr.decode().splitlines()
    assert line in said


def test_limits_are_set_and_listed(bus: BusClient, folder: Path) -> None:
    me = f"uid:{os.getuid()}"
    with vbus.attach(str(folder / "talk.sock")) as remote:
        done = command("set", me, "limit.channels=1", "limit.bps=1 MiB", "--json")
        assert json.loads(done.stdout)[0]["attributes"] == {"limit.channels": 1, "limit.bps": 1 << 20}
        remote.open_channel("chat")
        with pytest.raises(vbus.DriverError, match="may have 1 channels"):
            remote.open_channel("alarm")
        rows = json.loads(command("ls", "--members", "--json").stdout)
        mine = next(row for row in rows if row["member"] == me)
        assert list(mine) == ["bus", "member", "limits", "channels", "memory", "held"]
        assert (mine["limits"], mine["channels"]) == ({"channels": 1, "bps": 1 << 20}, 1)
        assert me in command("ls", "--members").stdout.decode()
    for words, line in (
        ((me, "limit.iops=0"), "from 1 on"),
        ((me, "limit.chanels=3"), "did you mean 'limit.channels'"),
        (("uid:nobody-of-this-name", "limit.iops=1"), "there is no user"),
    ):
        done = command("set", *words)
        assert done.returncode == 2
        assert line in done.stderr.decode()


def example(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """An example that serves."""
    path = folder / "x.sock"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / request.param), "serve", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"serving at process:{path}\n"
    yield path, process
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    process.stdout.close()


@pytest.mark.parametrize("served", ["kv.py"], indirect=True)
def test_the_key_value_service(served: tuple[Path, subprocess.Popen[str]]) -> None:
    path, _ = served
    assert example("kv.py", "put", path, "colour", "green").returncode == 0
    assert example("kv.py", "put", path, "long", "x" * 60_000).returncode == 0
    assert example("kv.py", "get", path, "colour").stdout == "green\n"
    assert example("kv.py", "get", path, "long").stdout == "x" * 60_000 + "\n"
    done = example("kv.py", "get", path, "color")
    assert (done.returncode, done.stderr) == (1, "kv: no such key\n")
    with vbus.attach(str(path)) as remote, remote.open_channel("kv") as channel:
        # What no client of its own would say.
        for nonsense in (b"", b"g", b"x" * 7, b"p\xff\xff\xff\xff\xff\xff", b"g\xff\xff\x00\x00\x00\x00"):
            channel.send(nonsense)
            answer = channel.receive(10)
            assert answer is not None
            assert answer.data.startswith(b"!")
    assert example("kv.py", "get", path, "colour").stdout == "green\n"


@pytest.mark.parametrize("served", ["progress.py"], indirect=True)
def test_the_progress_feed(served: tuple[Path, subprocess.Popen[str]]) -> None:
    path, process = served
    assert process.stdout is not None
    assert example("progress.py", "work", path, "indexing").returncode == 0
    assert [process.stdout.readline() for _ in range(5)] == [
        "indexing: 25 %\n",
        "indexing: 50 %\n",
        "indexing: 75 %\n",
        "indexing: 100 %\n",
        "indexing: over\n",
    ]
    with vbus.attach(str(path)) as remote, remote.open_channel("job.liar", create=True) as job:
        for nonsense in (b"101", b"-1", b"", b"\x1b[2J", b"9" * 4096):
            job.send(nonsense)
    assert process.stdout.readline() == "liar: over\n"
