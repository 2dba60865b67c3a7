"""DPDK's packet forwarder, told what to do as at its prompt: the driver's side of a network, or a back-end.

It has two threads: one reads the prompt, and sleeps meanwhile; the other forwards, and never sleeps. Whatever comes in
by its port it sends back by the same (forwarding mode `io`), untouched. As a front-end its port is virtio-user's, which
is a driver of a network device, as a back-end it is vhost's.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from vbus.bench.children import END_SECONDS, SideError
from vbus.bench.peers import Peer
from vbus.bench.work import Threads, threads_of

TESTPMD = Peer("dpdk-testpmd", "dpdk-dev", ("-v", "--help"))
BURST = 32
"""Packets that it takes and sends together, as it is by default."""
ANSWER_SECONDS = 60.0
PROMPT = "testpmd> "


def frontend_port(socket: Path, *, packed: int | str, size: int) -> str:
    """The port that drives the device at a vhost-user socket, through rings of `size` descriptors."""
    return f"net_virtio_user0,path={socket},queues=1,queue_size={size},packed_vq={packed},mrg_rxbuf=1,in_order=1"


def backend_port(socket: Path) -> str:
    """The port that serves at a vhost-user socket."""
    return f"net_vhost0,iface={socket},queues=1"


def options(port: str, *, cpu: int | str, prefix: str, size: int | None = None) -> list[str]:
    """What it is started with: both of its threads on one CPU, of which only one is ever busy."""
    eal = [
        "--no-huge",
        "-m",
        "256",
        "--no-pci",
        "--no-shconf",
        "--single-file-segments",
        "--iova-mode=va",
        "--no-telemetry",
    ]
    eal += ["--lcores", f"0@{cpu},1@{cpu}", "--file-prefix", prefix, "--vdev", port]
    forward = ["--interactive", "--forward-mode=io", f"--burst={BURST}", "--total-num-mbufs=8192"]
    forward += ["--rxq=1", "--txq=1", "--record-core-cycles"]
    if size is not None:
        forward += [f"--rxd={size}", f"--txd={size}"]
    return [*eal, "--", *forward]


class Testpmd:
    """One of them, from when it is ready. A context manager, at whose end it is gone."""

    def __init__(self, words: Sequence[str], name: str) -> None:
        """Start it with these options; `name` is for people. UsageError: it is not installed; SideError."""
        self.name = name
        # To a terminal it writes what it has to say before it asks for more.
        self._fd, terminal = pty.openpty()
        self._process = subprocess.Popen(
            [TESTPMD.find(), *words],
            stdin=subprocess.PIPE,
            stdout=terminal,
            stderr=terminal,
            # A process group of its own: an interrupt is for whoever measures, who then ends this one.
            process_group=0,
        )
        os.close(terminal)
        self._said = b""
        try:
            self._hear()
        except BaseException:
            self.close()
            raise

    def ask(self, command: str) -> str:
        """Say a command; what it prints. SideError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(f"{self.name} ended") from None
        return self._hear(command)

    def _hear(self, command: str = "") -> str:
        """What it prints from the echo of a command until its next prompt. SideError: there is none, or it ended."""
        deadline = time.monotonic() + ANSWER_SECONDS
        # Whatever its threads have to say may come in front of the echo, and behind the prompt.
        while not (found := re.search(f"{re.escape(command)}.*?{re.escape(PROMPT)}".encode(), self._said, re.DOTALL)):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                raise SideError(f"{self.name} says nothing for {ANSWER_SECONDS:g} seconds")
            try:
                piece = os.read(self._fd, 1 << 16)
            except OSError:
                # Nobody has the terminal any more.
                piece = b""
            if not piece:
                text = " ".join(self._said.decode(errors="replace").split())
                raise SideError(f"{self.name} ended: {text[-500:]}")
            self._said += piece
        self._said = self._said[found.end() :]
        return found[0].decode(errors="replace")

    def threads(self) -> Threads:
        """What its threads have used so far."""
        return threads_of(self._process.pid)

    def clear(self) -> None:
        """Begin to count anew what `busy` tells of, and what `rate` does."""
        self.ask("clear fwd stats all")
        self.ask("show port stats 0")

    def rate(self) -> float:
        """Packets a second that it received since it was asked last, by its own clock."""
        return number(self.ask("show port stats 0"), r"Rx-pps:\s*(\d+)")

    def totals(self) -> tuple[int, int]:
        """Packets received and sent since it began."""
        said = self.ask("show port stats 0")
        return int(number(said, r"RX-packets:\s*(\d+)")), int(number(said, r"TX-packets:\s*(\d+)"))

    def busy(self) -> float:
        """Nanoseconds that it spent on a packet, looks that found nothing left out, since `clear`.

        SideError: there were no packets.
        """
        said = self.ask("show fwd stats all")
        cycles, packets = number(said, r"total cycles=(\d+)"), number(said, r"total io packets=(\d+)")
        return cycles / packets / number(said, r"at (\d+) MHz") * 1000

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"quit\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + END_SECONDS
        # It does not end before somebody has read what it says of that.
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if select.select([self._fd], [], [], 0.01)[0]:
                    os.read(self._fd, 1 << 16)
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


def number(said: str, pattern: str) -> float:
    """The one number that a pattern finds. SideError: it is not there."""
    found = re.search(pattern, said)
    if found is None:
        raise SideError(f"{TESTPMD.program} says nothing of {pattern!r}: {' '.join(said.split())[-500:]}")
    return float(found[1])
