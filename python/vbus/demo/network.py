"""The demo's network: two namespaces, two stacks of the kernel, and between them a bus.

In the one namespace runs a bus whose network device has a tap behind it, as in a machine that serves containers. The
other is the container: it has no interface but the one that `vbus driver --tap` gives it. Files go through over HTTP,
and meanwhile an urgent event on a channel of the same bus is measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vbus.errors import Error
from vbus.proxy import attach

SIZE = 64 << 20
FAR, NEAR = "10.77.0.1", "10.77.0.2"
PORT = 8000
EVENTS = 200
"""Urgent events that are measured while a file goes through, about."""

FILE = """\
[bus]
name = "demo-net"

[device.net0]
type = "net"
backend = "tap:eth0"
priority = 6

[channel.alarm]
priority = 0

[connector.tunnelled]
type = "process"
socket = "net.sock"

[connector.far]
type = "stream"
listen = "unix:{folder}/net-far.sock"
"""

FETCH = """
import hashlib, sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
digest = hashlib.sha256()
size = 0
with opener.open(sys.argv[1], timeout=60) as answer:
    while data := answer.read(1 << 20):
        digest.update(data)
        size += len(data)
print(size, digest.hexdigest())
"""


class NetworkError(Error):
    """The network did not do what it should."""


def why_not() -> str:
    """Why there can be no namespaces and taps here; empty when there can."""
    if shutil.which("ip") is None:
        return "ip is missing (package iproute2)"
    if not Path("/dev/net/tun").exists():
        return "this kernel has no /dev/net/tun"
    probe = f"vbus-demo-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return "no right to make network namespaces (run as root)"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


class Namespace:
    """A network namespace with nothing but `lo`, and the processes that were started in it."""

    def __init__(self, name: str, folder: Path, env: dict[str, str]) -> None:
        self.name = name
        self._folder = folder
        self._env = env
        self._running: list[subprocess.Popen[str]] = []
        self._ip("netns", "add", name)

    def _ip(self, *words: str) -> str:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NetworkError(f"ip {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, *words: str) -> str:
        """`ip` in here; its output."""
        return self._ip("-n", self.name, *words)

    def run(self, *words: str) -> str:
        """A Python process in here; its output."""
        done = subprocess.run(
            self._command(words), env=self._env, capture_output=True, text=True, timeout=90, check=False
        )
        if done.returncode:
            raise NetworkError(f"{words[0]}: {done.stderr.strip()}")
        return done.stdout

    def _command(self, words: tuple[str, ...]) -> list[str]:
        return ["ip", "netns", "exec", self.name, sys.executable, *words]

    def start(self, *words: str, expect: str) -> subprocess.Popen[str]:
        """A Python process in here that goes on; its first line has `expect` in it."""
        process = subprocess.Popen(
            self._command(words),
            cwd=self._folder,
            env=self._env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if expect not in line:
            process.kill()
            raise NetworkError(f"{' '.join(words[:4])}: {line.strip()} {process.stdout.read().strip()}")
        return process

    def end(self, process: subprocess.Popen[str]) -> None:
        """End a process that goes on."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def close(self) -> None:
        """End what runs in here, then the namespace."""
        for process in reversed(self._running):
            self.end(process)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)


class Network:
    """A bus with a tap in one namespace, a container in the other."""

    def __init__(self, folder: Path, env: dict[str, str], vbus: Callable[..., str]) -> None:
        self.folder = folder
        self._vbus = vbus
        self._stack = contextlib.ExitStack()
        self._driver: subprocess.Popen[str] | None = None
        self._files: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            self.far = Namespace(f"vbus-far-{os.getpid()}", folder, env)
            stack.callback(self.far.close)
            self.near = Namespace(f"vbus-near-{os.getpid()}", folder, env)
            stack.callback(self.near.close)
            self._stack = stack.pop_all()

    def begin(self) -> str:
        """Start the bus beside one stack, and serve a file on each side."""
        file = self.folder / "net.toml"
        file.write_text(FILE.format(folder=self.folder))
        self.far.start("-m", "vbus", "run", str(file), expect="bus demo-net")
        self.far.ip("address", "add", f"{FAR}/24", "dev", "eth0")
        for side in (self.far, self.near):
            folder = self.folder / side.name
            folder.mkdir()
            data = os.urandom(SIZE)
            (folder / "file").write_bytes(data)
            self._files[side.name] = hashlib.sha256(data).hexdigest()
            server = ("-m", "http.server", str(PORT), "--directory", str(folder))
            side.start(*server, expect="Serving")
        interfaces = [link["ifname"] for link in json.loads(self.near.ip("-json", "link"))]
        if interfaces != ["lo"]:
            raise NetworkError(f"the container has {interfaces}")
        return "a bus with a tap in one namespace; the other has nothing but lo"

    def connect(self, connector: str) -> str:
        """Give the container its interface, over one of the connectors."""
        if self._driver is not None:
            self.near.end(self._driver)
        address = f"unix:{self.folder}/net-far.sock" if connector == "far" else f"{self.folder}/net.sock"
        self._driver = self.near.start(
            "-m", "vbus", "driver", address, "net0", "--tap", "eth0", "--address", f"{NEAR}/24", expect="eth0 is up"
        )
        interfaces = [link["ifname"] for link in json.loads(self.near.ip("-json", "link"))]
        if interfaces != ["lo", "eth0"]:
            raise NetworkError(f"the container has {interfaces}")
        return ", ".join(interfaces)

    def _fetch(self, source: Namespace, address: str, to: Namespace) -> None:
        size, digest = to.run("-c", FETCH, f"http://{address}:{PORT}/file").split()
        if int(size) != SIZE or digest != self._files[source.name]:
            raise NetworkError(f"{size} bytes came from {source.name}, with checksum {digest[:16]}")

    def transfer(self) -> tuple[int, list[float], list[float]]:
        """A file each way, checked; the bytes, and the seconds that urgent events took before and meanwhile."""
        with Alarm(self.folder) as alarm:
            idle = alarm.measure(EVENTS)
            busy: list[float] = []
            done = threading.Event()

            def meanwhile() -> None:
                while not done.is_set():
                    busy.extend(alarm.measure(1))

            thread = threading.Thread(target=meanwhile)
            thread.start()
            try:
                self._fetch(self.far, FAR, self.near)
                self._fetch(self.near, NEAR, self.far)
            finally:
                done.set()
                thread.join(30)
        if not busy:
            raise NetworkError("no urgent event came through meanwhile")
        return 2 * SIZE, idle, busy

    def link(self) -> str:
        """Pull the plug and put it back: the container's kernel notices both."""
        seen = []
        for state, carrier in (("off", "0"), ("on", "1")):
            self._vbus("set", "net0", f"link={state}")
            deadline = time.monotonic() + 20
            while (now := self._carrier()) != carrier:
                if time.monotonic() > deadline:
                    raise NetworkError(f"link={state}, and the container's kernel says carrier {now}")
                time.sleep(0.02)
            seen.append(f"carrier {now}")
        self._fetch(self.far, FAR, self.near)
        return f"off: {seen[0]}, on: {seen[1]}, and a file comes through again"

    def _carrier(self) -> str:
        return self.near.run("-c", "print(open('/sys/class/net/eth0/carrier').read().strip())").strip()

    def counters(self) -> dict[str, Any]:
        """What the bus counted of net0: its data queues together."""
        rows = [row for row in json.loads(self._vbus("stat", "net0", "--json")) if row["queue"] != "control"]
        return {
            "requests": sum(row["requests"] for row in rows),
            "bytes": sum(row["bytes_read"] + row["bytes_written"] for row in rows),
            "doorbells": sum(row[way]["rung"] for row in rows for way in ("to_device", "to_driver")),
        }

    def close(self) -> None:
        """Leave nothing: neither processes nor namespaces."""
        self._stack.close()


class Alarm:
    """Two drivers' sides on one urgent channel: what the one says, the bus gives to the other."""

    def __init__(self, folder: Path) -> None:
        self._stack = contextlib.ExitStack()
        here, there = (self._stack.enter_context(attach(f"{folder}/net.sock", timeout=20)) for _ in range(2))
        self._here, self._there = here.open_channel("alarm"), there.open_channel("alarm")

    def measure(self, count: int) -> list[float]:
        """Seconds from one side to the other, through the bus."""
        took = []
        for n in range(count):
            began = time.perf_counter()
            self._here.send(n.to_bytes(4, "little"))
            event = self._there.receive(20)
            if event is None:
                raise NetworkError("an urgent event did not come within 20 s")
            took.append(time.perf_counter() - began)
            time.sleep(0.001)
        return took

    def __enter__(self) -> Alarm:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def percentile(values: list[float], part: float) -> float:
    """The value below which `part` of them are."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
