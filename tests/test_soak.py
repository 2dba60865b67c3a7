"""A long life in short: everything comes and goes at random, and in the end nothing is lost and nothing is left.

A bus runs as users run it, in a process of its own. Driver processes attach over every connector, write and verify
disks, talk over channels, and are killed at random; devices are plugged and unplugged meanwhile. Where there may be
namespaces and taps, a container's interface comes and goes too. `VBUS_SOAK_SECONDS` says how long.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SECONDS = float(os.environ.get("VBUS_SOAK_SECONDS", "180"))

NET = """
[device.net0]
type = "net"
backend = "tap:eth0"
"""

BUS = """
[bus]
name = "soak"

[device.disk0]
type = "blk"
memory = "8 MiB"

[device.disk1]
type = "blk"
path = "disk1.img"

[device.disk2]
type = "blk"
memory = "8 MiB"

[device.rng0]
type = "rng"

[channel.chat]
priority = 1

[channel.board]
memory = "64 KiB"

[connector.tunnelled]
type = "process"
socket = "tunnelled.sock"

[connector.direct]
type = "process"
socket = "direct.sock"
signal = "direct"

[connector.far]
type = "stream"
listen = "unix:{folder}/far.sock"
"""

DRIVER = """
# Writes blocks that say where they are and how often they were written, and checks what it reads back.
import errno, random, struct, sys, time
import vbus
address, disk, seed, log = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
chance = random.Random(seed)
remote = vbus.attach(address, timeout=20)
device = remote.driver(disk, vbus.drivers.Blk)
blocks = device.size // 4096
known = {}
verified = 0
out = open(log, "w")
chat = remote.open_channel("chat")
board = remote.open_channel("board")
mine = remote.open_channel(f"job.{seed}", create=True, priority=seed % 8, memory="64 KiB")
last = {}
said = 0
def talk():
    # What the others say comes in order; what one writes beside an event is there with it.
    global said, verified
    if chat.is_writable:
        chat.send(struct.pack("<QQ", seed, said))
        said += 1
    board.memory[said % 65536] = 1
    if board.is_writable:
        board.send()
    mine.memory[:8] = struct.pack("<Q", said)
    if mine.is_writable:
        mine.send(b"progress")
    while (event := chat.receive(0)) is not None:
        who, number = struct.unpack("<QQ", event.data)
        if number <= last.get(who, -1) or who == seed:
            print(f"event {number} of {who} after {last.get(who)}", file=out, flush=True)
            sys.exit(3)
        last[who] = number
        verified += 1
while True:
    talk()
    batch = []
    for _ in range(16):
        at = chance.randrange(blocks)
        if chance.random() < 0.5:
            data = struct.pack("<QQ", at, chance.getrandbits(64)) * 256
            device.pwrite(data, at * 4096)
            known[at] = data
        elif at in known:
            # What it must give is what was written before: a queue's requests are handled in ring order.
            batch.append((at, known[at], device.submit_read(4096, at * 4096)))
    for at, wanted, future in batch:
        if future.result(20) != wanted:
            print(f"block {at} of {disk} differs", file=out, flush=True)
            sys.exit(3)
        verified += 1
    remote.driver("rng0", vbus.drivers.Rng).read(100) if chance.random() < 0.02 and disk == "disk0" else None
    print(verified, file=out, flush=True)
"""


def held_by(pid: int) -> dict[str, int]:
    """What a process holds."""
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
    return {
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "memfd mappings": sum("memfd:" in line for line in (proc / "maps").read_text().splitlines()),
        "MiB": int(status["VmRSS"].split()[0]) // 1024,
    }


def _namespaces() -> list[str]:
    """Two namespaces' names, where there may be some: the bus's, and a container's."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        return []
    return [f"vb{os.getpid() % 100000}soak{n}" for n in range(2)]


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """The two, with nothing in them but `lo`; none where that cannot be."""
    names = _namespaces()
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.timeout(SECONDS + 120)
def test_everything_comes_and_goes_and_nothing_is_lost(
    tmp_path: Path, runtime_dir: Path, namespaces: list[str]
) -> None:
    chance = random.Random(int(time.time()))
    (tmp_path / "disk1.img").write_bytes(bytes(8 << 20))
    (tmp_path / "bus.toml").write_text(BUS.format(folder=tmp_path) + (NET if namespaces else ""))
    (tmp_path / "driver.py").write_text(DRIVER)
    addresses = [f"process:{tmp_path}/tunnelled.sock", f"process:{tmp_path}/direct.sock", f"unix:{tmp_path}/far.sock"]
    bus_log = (tmp_path / "bus.log").open("w")
    bus = subprocess.Popen(
        [*_inside(namespaces[:1]), sys.executable, "-m", "vbus", "run", str(tmp_path / "bus.toml")],
        stdout=bus_log,
        stderr=bus_log,
    )
    container: subprocess.Popen[bytes] | None = None
    pings = 0
    drivers: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    kills = plugs = verified = started = 0

    def vbus(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "vbus", *words], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def launch(disk: str) -> None:
        nonlocal started
        started += 1
        log = tmp_path / f"driver{started}.log"
        with (tmp_path / f"driver{started}.err").open("w") as errors:
            drivers[disk] = (
                subprocess.Popen(
                    [
                        sys.executable,
                        str(tmp_path / "driver.py"),
                        chance.choice(addresses),
                        disk,
                        str(started),
                        str(log),
                    ],
                    stderr=errors,
                ),
                log,
            )

    def end(disk: str, number: signal.Signals) -> None:
        nonlocal verified
        process, log = drivers.pop(disk)
        process.send_signal(number)
        process.wait(20)
        lines = log.read_text().split() if log.exists() else []
        verified += int(lines[-1]) if lines and lines[-1].isdecimal() else 0

    def come_and_go() -> None:
        """Give the container its interface, or kill what gives it; while it is there, the other end is reached."""
        nonlocal container, pings
        if container is None:
            with (tmp_path / "container.log").open("w") as log:
                container = subprocess.Popen(
                    [
                        *_inside(namespaces[1:]),
                        *(sys.executable, "-m", "vbus", "driver", chance.choice(addresses), "net0"),
                        *("--tap", "eth0", "--address", "10.79.0.2/24"),
                    ],
                    stdout=log,
                    stderr=log,
                )
            deadline = time.monotonic() + 20
            while "is up" not in (said := (tmp_path / "container.log").read_text()):
                # It may be that the bus has not noticed yet that the one before was killed.
                if container.poll() is not None and "in use" in said:
                    container = None
                    return
                assert time.monotonic() < deadline, said
                time.sleep(0.05)
            pinged = subprocess.run(
                [*_inside(namespaces[1:]), "ping", "-q", "-c", "2", "-i", "0.2", "-w", "20", "10.79.0.1"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert pinged.returncode == 0, pinged.stdout
            pings += 1
        else:
            container.send_signal(chance.choice((signal.SIGKILL, signal.SIGTERM)))
            container.wait(20)
            container = None
            done = subprocess.run(["ip", "-n", namespaces[1], "link", "show", "eth0"], capture_output=True, check=False)
            assert done.returncode != 0

    def owners() -> list[object]:
        return [row["owner"] for row in json.loads(vbus("ls", "--json"))]

    try:
        deadline = time.monotonic() + 30
        # The last line that it says: sockets of connectors are there before it can be asked by `vbus`.
        while "far.sock" not in (said := (tmp_path / "bus.log").read_text()):
            assert bus.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        if namespaces:
            subprocess.run(["ip", "-n", namespaces[0], "addr", "add", "10.79.0.1/24", "dev", "eth0"], check=True)
        began = time.monotonic()
        baseline: dict[str, int] | None = None
        while time.monotonic() - began < SECONDS:
            for disk in ("disk0", "disk1", "disk2"):
                if disk not in drivers:
                    launch(disk)
                process, log = drivers[disk]
                if process.poll() is not None:
                    errors = log.with_suffix(".err").read_text()
                    # A driver may find its disk still held by the one that was killed, or lose it: nothing else.
                    assert process.returncode != 3, log.read_text()
                    assert any(word in errors for word in ("in use", "removed", "needs a reset")), errors
                    drivers.pop(disk)
            action = chance.random()
            if action < 0.4:
                end(chance.choice(list(drivers)), signal.SIGKILL) if drivers else None
                kills += 1
            elif action < 0.7:
                vbus("plug", "guest", "--type", "blk", "--memory", "1 MiB")
                guest = chance.choice(addresses)
                vbus("driver", guest, "guest", "--read", "4096")
                vbus("unplug", "guest", *(["--surprise"] if chance.random() < 0.5 else []))
                plugs += 1
            elif action < 0.85 and namespaces:
                come_and_go()
            time.sleep(chance.random() * 0.5)
            assert bus.poll() is None, (tmp_path / "bus.log").read_text()
            if baseline is None and time.monotonic() - began > min(20, SECONDS / 3):
                for disk in list(drivers):
                    end(disk, signal.SIGKILL)
                if container is not None:
                    come_and_go()
                _wait_for_peace(owners)
                baseline = held_by(bus.pid)
        for disk in list(drivers):
            end(disk, signal.SIGTERM)
        if container is not None:
            come_and_go()
        _wait_for_peace(owners)
        after = held_by(bus.pid)
        print(f"soak: {kills} kills, {plugs} plugs, {pings} interfaces, {verified} blocks and events verified")
        print(f"soak: {baseline} then {after}")
        assert baseline is not None
        assert verified > 0
        assert after["descriptors"] <= baseline["descriptors"]
        assert after["threads"] <= baseline["threads"]
        assert after["memfd mappings"] <= baseline["memfd mappings"]
        assert after["MiB"] <= baseline["MiB"] + 32
        rows = json.loads(vbus("channel", "ls", "--json"))
        assert [(row["name"], row["drivers"]) for row in rows] == [("board", []), ("chat", [])]
        assert all(row["received"] > 0 for row in rows)
        for row in json.loads(vbus("ls", "--json")):
            assert row["violations"] == {}, row
        bus.send_signal(signal.SIGTERM)
        assert bus.wait(20) == 0
    finally:
        for process in (*(process for process, _ in drivers.values()), *([container] if container else [])):
            process.kill()
            process.wait()
        if bus.poll() is None:
            bus.kill()
            bus.wait()
        bus_log.close()


def _inside(namespace: list[str]) -> list[str]:
    """What runs a command in a namespace, if there is one."""
    return ["ip", "netns", "exec", *namespace] if namespace else []


def _wait_for_peace(owners: object) -> None:
    """Wait until no device has a driver, and the bus has had time to give things back."""
    assert callable(owners)
    deadline = time.monotonic() + 20
    while any(owner is not None for owner in owners()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
