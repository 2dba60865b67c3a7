"""All targets for some seconds each, as many at once as there are processors; or one input again.

libFuzzer runs each in a process of its own, which ends by itself. What it finds interesting stays in `corpus/`, what
breaks a target in `artifacts/`; seeds are made anew each time, so that they are never older than the code.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skips import forbidden_here

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_INPUT = 4096
"""Bytes of an input: room for the longest message that is of interest."""
MAX_SECONDS = 60
"""An input that takes longer hangs."""
GRACE = 600
"""Seconds that a target may take longer than it was given, before it is ended."""
SHOWN = 60
"""Lines of a target's own words that are shown with a finding."""
COVERAGE = [
    "passes=sancov-module",
    "llvm-args=-sanitizer-coverage-level=4",
    "llvm-args=-sanitizer-coverage-inline-8bit-counters",
    "llvm-args=-sanitizer-coverage-pc-table",
    "llvm-args=-sanitizer-coverage-trace-compares",
    "codegen-units=1",
]
"""What makes any Rust compiler count edges and tell comparisons: no nightly one is needed."""
NO_ATHERIS = (
    "atheris is missing, which targets in Python need: pip install 'vbus[fuzz]' "
    "(it comes ready for Linux on x86_64, Python 3.11 to 3.14)"
)


@dataclass(frozen=True)
class Target:
    """Something that libFuzzer can run."""

    name: str
    command: list[str]
    environment: dict[str, str]


@dataclass
class Running:
    """Where a run's things are, and the processes that end with it."""

    directory: Path
    processes: list[subprocess.Popen[bytes]]

    def run(self, target: Target, words: list[str], seconds: float = 0) -> tuple[int, str]:
        """Run a target: its exit status and its words."""
        command = [*target.command, *words]
        environment = os.environ | target.environment
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
            self.processes.append(process)
            try:
                status = process.wait(seconds + GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
            said.seek(0)
            return status, said.read().decode(errors="replace")

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()


def main() -> int:
    """The command: 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="seconds a target (600)")
    parser.add_argument("--input", type=Path, help="run this input alone, again")
    parser.add_argument("--directory", type=Path, default=ROOT / "fuzz", help="where the targets are")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="these alone")
    wanted = parser.parse_args()
    directory: Path = wanted.directory.resolve()
    if wanted.input is not None:
        # Artifacts of a target have a directory of its name.
        wanted.targets = wanted.targets or [wanted.input.resolve().parent.name]
    pythons = sorted(path.stem for path in directory.glob("*.py"))
    rusts = sorted(path.stem for path in directory.glob("src/bin/*.rs"))
    for name in wanted.targets:
        if name not in pythons + rusts:
            print(f"fuzz: no target {name!r}; there are {', '.join(sorted(rusts + pythons))}", file=sys.stderr)
            return 2
    names = set(wanted.targets or rusts + pythons)
    if names & set(pythons) and importlib.util.find_spec("atheris") is None:
        print(f"fuzz: {NO_ATHERIS}", file=sys.stderr)
        if wanted.targets or forbidden_here():
            return 1
        print(f"fuzz: skipped: {', '.join(sorted(names & set(pythons)))}", file=sys.stderr)
        names -= set(pythons)
    targets = [_rust(directory, name) for name in rusts if name in names]
    if targets:
        _build(directory)
    targets += [_python(directory, name) for name in pythons if name in names]
    running = Running(directory, [])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            if wanted.input is not None:
                return _again(running, targets[0], wanted.input.resolve())
            good = list(pool.map(partial(_fuzz, running, seconds=wanted.seconds), targets))
            return 0 if all(good) else 1
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()


def _python(directory: Path, name: str) -> Target:
    path = os.pathsep.join([str(directory), str(ROOT / "fuzz")])
    return Target(name, [sys.executable, "-m", "harness.target", name], {"PYTHONPATH": path})


def _rust(directory: Path, name: str) -> Target:
    return Target(name, [str(_built() / _host() / "release" / name)], {"RUST_BACKTRACE": "1"})


def _built() -> Path:
    return ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "fuzz"


def _host() -> str:
    said = subprocess.run(["rustc", "-vV"], capture_output=True, text=True, check=True).stdout
    return said.partition("\nhost: ")[2].splitlines()[0]


def _build(directory: Path) -> None:
    """Build the targets in Rust. With a target named, what runs while building is not instrumented."""
    print("fuzz: building the targets in Rust", flush=True)
    manifest = str(directory / "Cargo.toml")
    command = ["cargo", "build", "--release", "--locked", "--quiet", "--manifest-path", manifest]
    command += ["--target", _host(), "--target-dir", str(_built())]
    flags = " ".join(f"-C {flag}" for flag in COVERAGE)
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"RUSTFLAGS": flags}, check=False).returncode:
        sys.exit("fuzz: the targets in Rust could not be built")


def _fuzz(running: Running, target: Target, seconds: int) -> bool:
    """Run a target for some time; False when it found something, or could not look."""
    corpus = running.directory / "corpus" / target.name
    artifacts = running.directory / "artifacts" / target.name
    for path in (corpus, artifacts):
        path.mkdir(parents=True, exist_ok=True)
    before = set(artifacts.iterdir())
    with tempfile.TemporaryDirectory() as seeds:
        status, said = running.run(target, ["--seeds", seeds])
        if status:
            print(f"{_end(said)}\n{target.name}: its seeds could not be made", flush=True)
            return False
        words = [str(corpus), seeds, f"-max_total_time={seconds}", f"-max_len={MAX_INPUT}"]
        words += [f"-timeout={MAX_SECONDS}", f"-artifact_prefix={artifacts}/"]
        status, said = running.run(target, words, seconds)
    found = sorted(set(artifacts.iterdir()) - before)
    covered = re.findall(r"^#(\d+)\s+DONE\s+cov: (\d+) ft: \d+ corp: (\d+)", said, re.MULTILINE)
    if status == 0 and not found and covered:
        inputs, edges, kept = covered[-1]
        print(f"{target.name}: {inputs} inputs, nothing found ({edges} edges, {kept} kept)", flush=True)
        return True
    lines = [_end(said)]
    for path in found or _named(said):
        lines += [f"{target.name}: FOUND SOMETHING, with the input {path}"]
        if path.stat().st_size <= MAX_INPUT:
            lines += [f"{target.name}: in base64, {base64.b64encode(path.read_bytes()).decode()}"]
        lines += [f"{target.name}: to see it again: {_command(running.directory, path)}"]
    if len(lines) == 1:
        lines += [f"{target.name}: ended with {status}, without having looked: see above"]
    print("\n".join(lines), flush=True)
    return False


def _again(running: Running, target: Target, path: Path) -> int:
    """Run one input, with all that is said about it."""
    status, said = running.run(target, [str(path), f"-timeout={MAX_SECONDS}"])
    print(said)
    print(f"{target.name}: {'nothing is wrong with' if status == 0 else 'broken by'} {path}")
    return 1 if status else 0


def _named(said: str) -> list[Path]:
    """The inputs that libFuzzer says it wrote: one that was there before is no new file."""
    return [path for path in map(Path, re.findall(r"Test unit written to (.+)$", said, re.MULTILINE)) if path.exists()]


def _command(directory: Path, path: Path) -> str:
    """What runs an input again."""
    if directory == ROOT / "fuzz":
        return f"make fuzz-input INPUT={shlex.quote(str(path.relative_to(ROOT)))}"
    return f"PYTHONPATH=fuzz:tests python -m harness --directory {directory} --input {path}"


def _end(said: str) -> str:
    """The last of a target's words, less its progress."""
    lines = [line for line in said.splitlines() if not re.match(r"#\d+\s|\s+NEW_(FUNC|PC)|INFO: |WARNING: ", line)]
    return "\n".join(lines[-SHOWN:])


if __name__ == "__main__":
    sys.exit(main())
