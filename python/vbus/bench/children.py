"""Processes that take part in a measurement: each side has an interpreter of its own, so that they share no lock.

The measurement says `{"do": NAME, ...}` in a line of JSON on a side's standard input and gets `{"ok": ...}` or
`{"error": ..., "trace": ...}` in a line of its standard output. A side sleeps while it is told nothing, and ends when
its input ends: whatever becomes of the measurement, nothing is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from vbus.errors import Error

ANSWER_SECONDS = 120.0
"""How long one command may take."""
END_SECONDS = 5.0

Command = Callable[..., Any]


class SideError(Error):
    """A side of the measurement failed, or says nothing."""


class Child:
    """One side, running `module`. A context manager, at whose end the process is gone."""

    def __init__(self, module: str, fds: Sequence[int] = (), within: Sequence[str] = ()) -> None:
        """`fds`: descriptors that it has under the same numbers; `within`: words that run a command elsewhere."""
        self.name = module.rpartition(".")[2]
        # A process group of its own: an interrupt is for whoever measures, who then ends this one.
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
            pass_fds=fds,
        )
        self._said = b""

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def tell(self, do: str, **values: Any) -> None:
        """Say what to do, and do not wait."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self, timeout: float = ANSWER_SECONDS) -> Any:
        """What came of it. SideError when that is an error, or nothing in `timeout` seconds."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._said:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise SideError(f"{self.name} says nothing for {timeout:g} seconds")
            piece = os.read(fd, 1 << 16)
            if not piece:
                raise self._ended()
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            error = SideError(f"{self.name}: {answer['error']}")
            # Shown with a traceback, and only then.
            error.add_note(answer["trace"])
            raise error
        return answer["ok"]

    def ask(self, do: str, **values: Any) -> Any:
        """Say what to do, and what came of it. SideError."""
        self.tell(do, **values)
        return self.hear()

    def _ended(self) -> SideError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        return SideError(f"{self.name} ended with status {self._process.poll()}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # What it has started and could not end itself is in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()


def serve(commands: Mapping[str, Command]) -> None:
    """Do what is told on standard input, until that ends. On the side of the child."""
    for line in sys.stdin.buffer:
        told = json.loads(line)
        do = told.pop("do")
        try:
            answer = {"ok": commands[do](**told)}
        except Exception as error:
            answer = {"error": f"{do}: {error or type(error).__name__}", "trace": traceback.format_exc()}
        try:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            # Nobody measures any more. Nothing is left to be said, also not at the interpreter's end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
