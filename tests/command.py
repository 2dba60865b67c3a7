"""The command as a user runs it: in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

VBUS = (sys.executable, "-m", "vbus")
ONE_CLASS = """\
import vbus


class Lamp(vbus.Device):
    \"\"\"A lamp that can be set.\"\"\"

    device_id = 0x7E02
    features = vbus.features(DIMMABLE=0, COLOUR=1)
    queues = ("commands",)

    class Config(vbus.Config):
        level: vbus.le32

    level = vbus.attribute(int, config="level", doc="Brightness, 0 to 100.")

    def __init__(self, colour: str = "white", *, level: int = 0, bright: bool = False) -> None:
        if colour == "black":
            raise vbus.UsageError(f"colour {colour!r} is none: choose another")
        self.level = 100 if bright else level

    def handle(self, queue, request):
        request.write(request.read())
"""


def vbus(
    *words: str | Path, cwd: Path, stdin: bytes = b"", env: dict[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    return subprocess.run(
        [*VBUS, *map(str, words)],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=False,
        env=os.environ | (env or {}),
    )


def out(*words: str | Path, cwd: Path, stdin: bytes = b"") -> str:
    """The standard output of a command that succeeds."""
    done = vbus(*words, cwd=cwd, stdin=stdin)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout.decode()


def fails(*words: str | Path, cwd: Path, status: int = 2, env: dict[str, str] | None = None) -> list[str]:
    """The lines of a command that ends with this status, and prints nothing else."""
    done = vbus(*words, cwd=cwd, env=env)
    assert done.stdout == b""
    assert done.returncode == status, done.stderr.decode()
    return done.stderr.decode().splitlines()


@contextlib.contextmanager
def serving(
    *words: str | Path, cwd: Path, lines: int = 1, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[bytes], list[str]]]:
    """A `vbus run` that serves, and the lines that it prints; it ends with SIGTERM, and with status 0."""
    process = subprocess.Popen(
        [*VBUS, "run", *map(str, words)],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | (env or {}),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        said = [process.stdout.readline().decode().rstrip("\n") for _ in range(lines)]
        assert all(said), process.stderr.read().decode()
        yield process, said
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


def files(folder: Path) -> Sequence[str]:
    """What is in a folder, directories apart."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
