"""What `vbus demo` shows, step by step.

A bus with two disks, a console and an entropy device runs in a process of its own, started as a user starts it. This
process is the drivers' side. Each step does real work, checks it, and says in one line what was done; the first that
fails ends the demo, by name. Where a tool is missing, a step is replaced by a weaker one, which is said and counted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vbus.demo.network import Network, percentile, why_not
from vbus.demo.steps import Step, StepFailed, run_steps
from vbus.errors import DriverError
from vbus.proxy import Remote, attach, drivers

PIECE = 64 << 10
"""Bytes of one request of the bulk copies."""
DEPTH = 16
"""Requests that the bulk copies keep outstanding."""
LOAD = 400
"""Requests that are outstanding when a disk is pulled out: more than its ring holds, so that some always are."""
MIB = 1 << 20
GROWN = 8 * MIB

FILE = """\
[bus]
name = "demo"

[device.disk0]
type = "blk"
path = "disk0.img"
read_only = true

[device.disk1]
type = "blk"
path = "disk1.img"

[device.console0]
type = "console"
backend = "unix:{folder}/console.sock"

[device.rng0]
type = "rng"

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


class Demo:
    """One run, in a folder of its own."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.replaced: list[str] = []
        self.has_ext4 = True
        self.rows: list[tuple[str, str, int, int, float]] = []
        self.env = os.environ | {"VBUS_RUNTIME_DIR": str(folder / "run")}
        self.bus: subprocess.Popen[str] | None = None
        self.network: Network | None = None

    # Tools.

    def vbus(self, *words: str) -> str:
        """Run the command as a user does; its standard output."""
        command = [sys.executable, "-m", "vbus", *words]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise StepFailed(f"vbus {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def stat(self, device: str) -> dict[str, Any]:
        """What the bus counted of a device, all its queues together."""
        rows = [row for row in json.loads(self.vbus("stat", "--json")) if row["device"] == device]
        keys = ("requests", "bytes_read", "bytes_written")
        total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in keys}
        total["doorbells"] = sum(row[way]["rung"] for row in rows for way in ("to_device", "to_driver"))
        return total

    def remote(self, connector: str) -> Remote:
        """Attach over one of the connectors."""
        kind = "unix" if connector == "far" else "process"
        return attach(f"{kind}:{self.folder}/{connector}.sock", timeout=20)

    @contextlib.contextmanager
    def counted(self, device: str, connector: str, moved: Callable[[], int]) -> Iterator[None]:
        """Add a row to the table, and hold what the bus counted against what was moved here.

        A read of n bytes writes n + 1 bytes (data and status) and reads a header of 16; a write the other way around.
        """
        before = self.stat(device)
        yield
        after = self.stat(device)
        requests = after["requests"] - before["requests"]
        counted = after["bytes_read"] + after["bytes_written"] - before["bytes_read"] - before["bytes_written"]
        if counted != moved() + 17 * requests:
            raise StepFailed(f"{device}: {moved()} bytes were moved, the bus counted {counted - 17 * requests}")
        self.rows.append((device, connector, requests, moved(), (after["doorbells"] - before["doorbells"]) / requests))

    # Steps.

    def make_disks(self) -> str:
        """An ext4 image that holds a real tree of files, and an empty disk of the same size."""
        tree = self.folder / "tree"
        files, size = copy_tree(tree)
        image = self.folder / "disk0.img"
        if shutil.which("mkfs.ext4"):
            length = (2 * size + 16 * MIB) // MIB * MIB
            image.touch()
            os.truncate(image, length)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image)], check=True, capture_output=True)
            what = "ext4 image"
        else:
            import tarfile

            with tarfile.open(image, "w") as archive:
                archive.add(tree, arcname=".")
            length = -(-image.stat().st_size // MIB) * MIB
            os.truncate(image, length)
            what = "tar archive"
            self.has_ext4 = False
            self.replaced.append("mkfs.ext4 is missing: a tar archive stands in for the file system")
        other = self.folder / "disk1.img"
        other.touch()
        os.truncate(other, length)
        return f"{what} of {length // MIB} MiB with {files} files"

    def start_bus(self) -> str:
        """The bus, in a process of its own."""
        path = self.folder / "demo.toml"
        path.write_text(FILE.format(folder=self.folder))
        log = (self.folder / "bus.log").open("w")
        self.bus = subprocess.Popen(
            [sys.executable, "-m", "vbus", "run", str(path)], env=self.env, stdout=log, stderr=log, text=True
        )
        log.close()
        deadline = time.monotonic() + 30
        while True:
            try:
                with self.remote("tunnelled") as remote:
                    names = ", ".join(device.name for device in remote)
                return f"process {self.bus.pid} serves {names}"
            except DriverError:
                if self.bus.poll() is not None or time.monotonic() > deadline:
                    said = (self.folder / "bus.log").read_text().strip()
                    raise StepFailed(said or "the bus does not start") from None
                time.sleep(0.02)

    def read_disk(self, connector: str) -> str:
        """All of disk0 through virtio-blk; its checksum is the image's."""
        moved = 0
        with self.remote(connector) as remote:
            disk = remote.driver("disk0", drivers.Blk)
            digest = hashlib.sha256()
            with self.counted("disk0", connector, lambda: moved):
                for data in _read_all(disk):
                    digest.update(data)
                    moved += len(data)
            disk.close()
        if digest.digest() != _sha256(self.folder / "disk0.img"):
            raise StepFailed("disk0 read through the bus differs from its image")
        return f"{moved // MIB} MiB read, checksum {digest.hexdigest()[:16]} is the image's"

    def copy_disk(self) -> str:
        """disk0 to disk1 through their drivers; the copy is a sound file system."""
        moved = 0
        with self.remote("tunnelled") as remote:
            source, target = remote.driver("disk0", drivers.Blk), remote.driver("disk1", drivers.Blk)
            with self.counted("disk1", "tunnelled", lambda: moved):
                pending: deque[Future[Any]] = deque()
                for data in _read_all(source):
                    pending.append(target.submit_write(data, moved))
                    moved += len(data)
                    if len(pending) >= DEPTH:
                        pending.popleft().result(60)
                while pending:
                    pending.popleft().result(60)
            target.flush()
        return f"{moved // MIB} MiB copied; {self._check_copy()}"

    def _check_copy(self) -> str:
        if not self.has_ext4 or not shutil.which("e2fsck"):
            if self.has_ext4:
                self.replaced.append("e2fsck is missing: the copy's checksum stands in for the check")
            if _sha256(self.folder / "disk1.img") != _sha256(self.folder / "disk0.img"):
                raise StepFailed("the copy differs")
            return "the copy's checksum is the image's"
        done = subprocess.run(
            ["e2fsck", "-fn", str(self.folder / "disk1.img")], capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise StepFailed(f"e2fsck -fn: {done.stdout.strip()}")
        return "e2fsck -fn finds it clean"

    def talk(self) -> str:
        """A conversation over the console, and entropy."""
        said = 0
        with (
            self.remote("tunnelled") as remote,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as person,
        ):
            console = remote.driver("console0", drivers.Console)
            person.connect(f"{self.folder}/console.sock")
            person.settimeout(20)
            reader = person.makefile("rb")
            for line in (b"who is there?\n", b"what is the time?\n", b"good night\n"):
                console.write(line)
                person.sendall(b"heard " + reader.readline())
                answer = console.readline(timeout=20)
                if answer != b"heard " + line:
                    raise StepFailed(f"the console said {answer!r}")
                said += 1
            noise = remote.driver("rng0", drivers.Rng).read(1 << 16)
            if len(set(noise)) != 256:
                raise StepFailed("64 KiB of entropy lack a byte value")
        return f"{said} lines each way over the console; 64 KiB of entropy"

    def hotplug(self) -> str:
        """A third disk arrives while the others are busy, and is used."""
        with self.remote("tunnelled") as remote, _load(remote.driver("disk0", drivers.Blk)) as busy:
            before = busy.done
            self.vbus("plug", "disk2", "--type", "blk", "--memory", "16 MiB")
            remote.wait_for("disk2")
            disk = remote.driver("disk2", drivers.Blk)
            data = random.Random(2).randbytes(MIB)
            disk.pwrite(data, 3 * MIB)
            disk.flush()
            if disk.pread(MIB, 3 * MIB) != data:
                raise StepFailed("disk2 gives back something else")
            busy.wait_for_more_than(before)
        return f"disk2 came, was written and read, while disk0 did {busy.done} reads"

    def grow(self) -> str:
        """A disk grows, and its driver notices."""
        with self.remote("tunnelled") as remote:
            disk = remote.driver("disk1", drivers.Blk)
            old = disk.size
            self.vbus("set", "disk1", f"capacity={(old + GROWN) // 512}")
            deadline = time.monotonic() + 20
            while disk.size == old and time.monotonic() < deadline:
                time.sleep(0.005)
            if disk.size != old + GROWN:
                raise StepFailed(f"the driver sees {disk.size} bytes, not {old + GROWN}")
            disk.pwrite(b"at the new end  ", disk.size - 512)
            if disk.pread(16, disk.size - 512) != b"at the new end  ":
                raise StepFailed("the new end cannot be used")
        return f"disk1 grew from {old // MIB} to {(old + GROWN) // MIB} MiB, and its new end is in use"

    def surprise(self) -> str:
        """A disk is pulled out under load: every outstanding request ends with an error."""
        with self.remote("tunnelled") as remote:
            disk = remote.driver("disk2", drivers.Blk)
            futures: list[Future[Any]] = []
            stop = threading.Event()

            def load() -> None:
                with contextlib.suppress(DriverError):
                    while not stop.is_set():
                        futures.append(disk.submit_read(4096, 4096 * (len(futures) % 4000)))
                        while len(futures) > LOAD and not futures[-LOAD].done():
                            time.sleep(0)

            thread = threading.Thread(target=load)
            thread.start()
            while len(futures) < 500:
                time.sleep(0.001)
            self.vbus("unplug", "disk2", "--surprise")
            thread.join(20)
            stop.set()
            if thread.is_alive():
                raise StepFailed("the load goes on although the disk is gone")
            ended = [future.exception(20) for future in futures]
        failed = [error for error in ended if error is not None]
        if not failed:
            raise StepFailed("no request was outstanding when the disk went")
        if any(not isinstance(error, DriverError) or error.errno != errno.ENODEV for error in failed):
            raise StepFailed(f"requests ended with {failed[0]!r}")
        return f"disk2 went; {len(ended) - len(failed)} reads had been answered, {len(failed)} ended with ENODEV"

    def containers(self) -> str:
        """Two namespaces, and a bus beside one of them; or a loopback where that cannot be."""
        reason = why_not()
        if reason:
            self.replaced.append(f"{reason}: a loopback stands in for two kernels' networks")
            return "no namespaces here"
        self.network = Network(self.folder, self.env, self.vbus)
        return self.network.begin()

    def http(self, connector: str) -> str:
        """64 MiB each way between two kernels' stacks, with an urgent channel measured meanwhile."""
        if self.network is None:
            return self._loopback(connector)
        has = self.network.connect(connector)
        before = self.network.counters()
        began = time.monotonic()
        moved, idle, busy = self.network.transfer()
        seconds = time.monotonic() - began
        after = self.network.counters()
        requests, counted = after["requests"] - before["requests"], after["bytes"] - before["bytes"]
        if counted < moved:
            raise StepFailed(f"{moved} bytes were moved, the bus counted {counted}")
        self.rows.append(("net0", connector, requests, moved, (after["doorbells"] - before["doorbells"]) / requests))
        median, median_busy = (1e6 * percentile(values, 0.5) for values in (idle, busy))
        return (
            f"{moved // MIB} MiB through {has} at {moved / MIB / seconds:.0f} MiB/s, checksums agree; "
            f"an urgent event took {median:.0f} us idle, {median_busy:.0f} us meanwhile (99%: "
            f"{1e6 * percentile(busy, 0.99):.0f} us)"
        )

    def _loopback(self, connector: str) -> str:
        """Frames to a network device that gives them back."""
        name = f"net-{connector}"
        self.vbus("plug", name, "--type", "net", "--backend", "loopback")
        frames = [b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5" + n.to_bytes(4, "little") * 250 for n in range(500)]
        back: list[bytes] = []
        with self.remote(connector) as remote:
            remote.wait_for(name)
            net = remote.driver(name, drivers.Net)
            for start in range(0, len(frames), 50):
                net.send(frames[start : start + 50])
                while len(back) < start + 50:
                    got = net.recv(timeout=20)
                    if not got:
                        raise StepFailed(f"{len(back)} of {len(frames)} frames came back")
                    back += got
        if back != frames:
            raise StepFailed("frames came back changed")
        return f"{len(frames)} frames came back from a loopback, unchanged"

    def link(self) -> str:
        """The far kernel sees the link go down and come up."""
        if self.network is None:
            return self._loopback_link()
        return self.network.link()

    def _loopback_link(self) -> str:
        with self.remote("tunnelled") as remote:
            net = remote.driver("net-tunnelled", drivers.Net)
            for state in ("off", "on"):
                self.vbus("set", "net-tunnelled", f"link={state}")
                deadline = time.monotonic() + 20
                while net.link != (state == "on"):
                    if time.monotonic() > deadline:
                        raise StepFailed(f"link={state}, and the driver does not notice")
                    time.sleep(0.005)
        return "off and on again, seen by the driver"

    def leave(self) -> str:
        """SIGTERM ends the bus with status 0."""
        assert self.bus is not None
        self.bus.send_signal(signal.SIGTERM)
        status = self.bus.wait(20)
        if status:
            raise StepFailed(f"the bus ended with status {status}: {(self.folder / 'bus.log').read_text()}")
        self.bus = None
        return "the bus ended with status 0"

    def run(self) -> None:
        """Every step, in order."""
        steps: list[Step] = [
            ("disks", self.make_disks),
            ("bus", self.start_bus),
            ("read, tunnelled signals", lambda: self.read_disk("tunnelled")),
            ("read, direct signals", lambda: self.read_disk("direct")),
            ("copy", self.copy_disk),
            ("console", self.talk),
            ("hotplug", self.hotplug),
            ("grow", self.grow),
            ("surprise removal", self.surprise),
            ("read, over a stream", lambda: self.read_disk("far")),
            ("containers", self.containers),
            ("http, tunnelled signals", lambda: self.http("tunnelled")),
            ("link", self.link),
            ("http, over a stream", lambda: self.http("far")),
            ("end", self.leave),
        ]
        run_steps(steps, self.say)

    def table(self) -> str:
        """What was moved, and how many doorbells a request took."""
        lines = [f"{'device':<8} {'connector':<10} {'requests':>9} {'bytes':>12} {'doorbells/request':>18}"]
        for device, connector, requests, moved, doorbells in self.rows:
            lines.append(f"{device:<8} {connector:<10} {requests:>9} {moved:>12} {doorbells:>18.3f}")
        return "\n".join(lines)

    def close(self) -> None:
        """Leave nothing running."""
        if self.network is not None:
            self.network.close()
        if self.bus is not None and self.bus.poll() is None:
            self.bus.terminate()
            try:
                self.bus.wait(10)
            except subprocess.TimeoutExpired:
                self.bus.kill()
                self.bus.wait()


class _load:
    """Keeps a disk busy with random reads in a thread."""

    def __init__(self, disk: drivers.Blk) -> None:
        self.disk = disk
        self.done = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        chance = random.Random(1)
        try:
            while not self._stop.is_set():
                for future in [
                    self.disk.submit_read(4096, 4096 * chance.randrange(self.disk.size // 4096)) for _ in range(DEPTH)
                ]:
                    future.result(20)
                    self.done += 1
        except BaseException as error:
            self._error = error

    def wait_for_more_than(self, before: int) -> None:
        """Wait until work was done since."""
        deadline = time.monotonic() + 20
        while self.done <= before and self._error is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if self._error is not None or self.done <= before:
            raise StepFailed(f"the busy disk was disturbed: {self._error or 'it stopped'}")

    def __enter__(self) -> _load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _read_all(disk: drivers.Blk) -> Iterator[bytes]:
    """The disk's bytes, in order, with several requests outstanding."""
    pending: deque[Future[bytes]] = deque()
    at = 0
    while at < disk.size or pending:
        while at < disk.size and len(pending) < DEPTH:
            size = min(PIECE, disk.size - at)
            pending.append(disk.submit_read(size, at))
            at += size
        yield pending.popleft().result(60)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def copy_tree(target: Path) -> tuple[int, int]:
    """Copy this project's own files: the checkout's when there is one, else the installed package's."""
    package = Path(__file__).resolve().parent.parent
    root = package.parent.parent
    names: list[str] = []
    if (root / "pyproject.toml").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=False)
        names = [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]
    if not names:
        root = package
        names = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    size = 0
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, copy)
        size += copy.stat().st_size
    return len(names), size


def main(replaced: Sequence[str] = ()) -> int:
    """Run the demo; its exit status. The last line is `demo: ok`, or names the step that failed.

    `replaced`: what this demo as a whole stands in for.
    """
    with tempfile.TemporaryDirectory(prefix="vbus-demo-") as folder:
        demo = Demo(Path(folder), lambda line: print(line, flush=True))
        demo.replaced += replaced
        return tell(demo.run, demo.close, demo.table, demo.replaced)


def tell(run: Callable[[], None], close: Callable[[], None], table: Callable[[], str], replaced: Sequence[str]) -> int:
    """Run a demo and say how it ended; the exit status."""
    try:
        run()
    except StepFailed as failed:
        print(f"demo: failed: {failed}", file=sys.stderr)
        return 1
    finally:
        close()
    print()
    print(table())
    for line in replaced:
        print(f"replaced: {line}")
    print(f"demo: ok ({len(replaced)} replaced)" if replaced else "demo: ok")
    return 0
