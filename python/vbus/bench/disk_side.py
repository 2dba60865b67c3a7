"""A side of reads from a disk: it serves the disk, has somebody else's program serve it, drives it, or does without.

Run as a process of its own: `python -m vbus.bench.disk_side`, told what to do by `children`. What it starts is on the
CPU that it was told, and ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vbus import _core
from vbus.bench import children
from vbus.bench.work import usage
from vbus.bus import Bus
from vbus.connectors import VhostUser
from vbus.devices import Blk
from vbus.proxy import attach, drivers
from vbus.shmem.area import sealed_memfd
from vbus.virtio import DeviceID, features

NAME = "disk"
HEADER = 16
"""Bytes of a request before its data; behind them there is one byte."""
START_SECONDS = 20.0
RUN_SECONDS = 90.0


class DiskSide:
    """What the measurement can ask of this side."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._device: Blk | None = None
        self._program: subprocess.Popen[bytes] | None = None
        self._disk: drivers.Blk | None = None

    def stay(self, cpu: int) -> None:
        """Run on this CPU, with all that is started from here on."""
        os.sched_setaffinity(0, {cpu})

    # Servers.

    def serve(self, path: str, socket: str, engine: str, polling: str) -> str:
        """Serve a file as a disk that is not written; what serves it."""
        bus = Bus("bench", workers=1, polling=polling)
        self._closing.callback(bus.stop)
        self._device = Blk(path=path, read_only=True, engine=engine)
        bus.plug(self._device, NAME)
        bus.connect(VhostUser(NAME, socket))
        bus.start()
        return bus.slot(NAME).engine

    def served(self) -> dict[str, int]:
        """What the disk counted so far."""
        assert self._device is not None
        return {"requests": self._device.reads, "failed": self._device.io_errors + self._device.refused}

    def start(self, command: Sequence[str], socket: str) -> None:
        """Start a program that makes a socket and serves it. SideError: it does not."""
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self._closing.callback(_end, process)
        self._program = process
        deadline = time.monotonic() + START_SECONDS
        while not Path(socket).is_socket():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                assert process.stderr is not None
                said = process.stderr.read().decode(errors="replace").strip()
                raise children.SideError(f"{command[0]} does not serve: {said or 'it says nothing'}")
            time.sleep(0.01)

    def cpu_seconds(self) -> float:
        """What the server has used of its CPU so far."""
        if self._program is None:
            used = usage()
            return used["user"] + used["system"]
        # Behind the name, which may have anything in it: the state, and so on.
        fields = Path(f"/proc/{self._program.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # Drivers.

    def attach(self, socket: str, packed: bool) -> dict[str, bool]:
        """Drive the disk that is served at a socket; what was agreed on."""
        remote = self._closing.enter_context(attach(f"vhost-user:{socket}", device_id=DeviceID.BLOCK, name=NAME))
        self._disk = remote.driver(NAME, drivers.Blk, packed=packed)
        negotiated = self._disk.device.negotiated
        return {
            "packed": bool(negotiated >> features.RING_PACKED & 1),
            "event_idx": bool(negotiated >> features.RING_EVENT_IDX & 1),
        }

    def read(self, total: int, depth: int, size: int, places: int, seed: int, polls: bool) -> dict[str, Any]:
        """`total` random reads, `depth` under way; this side polls for answers, or sleeps until it is called."""
        assert self._disk is not None
        queue = self._disk.queue(0)
        with (
            queue.lent(_core.Load.bytes_needed(depth, HEADER + size + 1)) as (ring, arena, place),
            queue.device.remote.connector.lent_bell(queue.device, queue.index) as bell,
        ):
            load = _core.Load(ring, arena.mapping, arena.address, place, depth)
            return dict(load.random_reads(total, size, places, seed, None if polls else bell))

    # Neither.

    def bare(self, path: str, total: int, depth: int, size: int, places: int, seed: int, batch: int) -> dict[str, Any]:
        """The same reads by io_uring alone."""
        room = _core.Load.bytes_needed(depth, HEADER + size + 1)
        arena = sealed_memfd("vbus-bench", room)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME)
        try:
            mapping = _core.Mapping(arena, room)
            return dict(_core.bench_reads(fd, mapping, total, size, places, seed, depth=depth, batch=batch))
        finally:
            os.close(fd)
            os.close(arena)

    def run(self, command: Sequence[str]) -> Any:
        """Run a program to its end; the JSON that it prints. SideError: it failed."""
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=RUN_SECONDS)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise children.SideError(f"{command[0]} failed: {said or f'status {done.returncode}'}")
        return json.loads(done.stdout)

    def close(self) -> None:
        """Part from everything."""
        self._disk = self._device = None
        self._closing.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()


def main() -> None:
    """Do as told until standard input ends."""
    side = DiskSide()
    try:
        names = ("stay", "serve", "served", "start", "cpu_seconds", "attach", "read", "bare", "run")
        children.serve({name: getattr(side, name) for name in names})
    finally:
        side.close()


if __name__ == "__main__":
    main()
