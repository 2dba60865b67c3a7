"""Debian packages for guests, of any architecture: fetched by apt, unpacked into a cache, never installed.

apt gets a state of its own for each architecture, so that the machine's is neither used nor changed; the sources and
the keys are the machine's. What is in the cache is whole: it is made beside and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

FRESH = 7 * 86400
"""Seconds for which the lists of packages are good: a package that was replaced meanwhile has them fetched again."""


class FetchError(Exception):
    """What a guest is made of could not be fetched: one line that says what and why."""


def cache() -> Path:
    """Where things are kept: `$VBUS_GUEST_CACHE`, or `vbus/guests` in the user's cache."""
    named = os.environ.get("VBUS_GUEST_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vbus" / "guests"


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """While inside, no other process is in the part of the cache that has this name."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def unpacked(
    architecture: str, packages: Sequence[str], *, alone_without: bool = False, backports: bool = False
) -> Path:
    """A directory with the files of these packages and of all that they need; or of them alone.

    `backports`: those that were made newer for this release of Debian. Raises FetchError.
    """
    names = sorted(packages)
    words = [*names, str(alone_without), *(["backports"] if backports else [])]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    place = cache() / architecture / f"{names[0]}-{digest}"
    if place.is_dir():
        return place
    with alone(architecture):
        if place.is_dir():
            return place
        print(f"vbus: fetching {', '.join(names)} for {architecture} guests", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            fetched, files = Path(scratch) / "archives", Path(scratch) / "files"
            (fetched / "partial").mkdir(parents=True)
            files.mkdir()
            apt = _Apt(architecture, backports)
            try:
                apt.fetch(names, fetched, alone_without)
            except FetchError:
                apt.refresh()
                apt.fetch(names, fetched, alone_without)
            for archive in sorted(fetched.glob("*.deb")):
                _run(["dpkg-deb", "-x", str(archive), str(files)])
            place.parent.mkdir(parents=True, exist_ok=True)
            files.rename(place)
    return place


def depends(architecture: str, package: str, *, backports: bool = False) -> list[str]:
    """The names of the packages that one depends on directly. Raises FetchError."""
    with alone(architecture):
        apt = _Apt(architecture, backports)
        said = apt.run("apt-cache", "depends", package)
    return re.findall(r"^ +Depends: ([^<\s]+)$", said, re.MULTILINE)


class _Apt:
    """apt with a state of its own, for one architecture, and for the release alone or its backports alone."""

    def __init__(self, architecture: str, backports: bool = False) -> None:
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise FetchError("guests are made of Debian's packages: there is no apt-get on this machine")
        self._root = cache() / architecture / ("apt-backports" if backports else "apt")
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self._root / part).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        self._options = [
            *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
            *("-o", f"Dir::State={self._root}/state", "-o", f"Dir::State::status={self._root}/status"),
            # Nobody else may read the cache; the packages' signatures are checked all the same.
            *("-o", f"Dir::Cache={self._root}/cache", "-o", "APT::Sandbox::User=root"),
            *("-o", "Dpkg::Use-Pty=0", "-o", "Acquire::Languages=none", "-o", "Acquire::Retries=3"),
        ]
        if backports:
            self._options += [
                "-o",
                "Dir::Etc::SourceList=/dev/null",
                "-o",
                f"Dir::Etc::SourceParts={self._backports()}",
            ]
        stamp = self._root / "refreshed"
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > FRESH:
            self.refresh()

    def _backports(self) -> Path:
        """A directory of sources: the backports, from the mirror that this machine's Debian comes from."""
        release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
        codename = release.get("VERSION_CODENAME", "").strip('"')
        said = _run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"])
        mirrors = [line.split()[0] for line in said.splitlines() if line.split()[1:] == [codename]]
        if not mirrors:
            raise FetchError(f"no mirror of {codename or 'Debian'} is among this machine's sources")
        sources = self._root / "sources"
        sources.mkdir(exist_ok=True)
        (sources / "backports.list").write_text(f"deb {mirrors[0]} {codename}-backports main\n")
        return sources

    def refresh(self) -> None:
        """Fetch the lists of packages; those of an archive that does not have the architecture any more are missed."""
        try:
            self.run("apt-get", "-qq", "update")
        except FetchError:
            if not list((self._root / "state/lists").glob("*_Packages*")):
                raise
        (self._root / "refreshed").touch()

    def fetch(self, names: Sequence[str], into: Path, alone_without: bool) -> None:
        """Fetch packages' archives."""
        if alone_without:
            self.run("apt-get", "-qq", "download", *names, cwd=into)
            return
        words = ["install", "--download-only", "--no-install-recommends", "--yes", *names]
        self.run("apt-get", "-qq", "-o", f"Dir::Cache::archives={into}", *words)

    def run(self, command: str, *words: str, cwd: Path | None = None) -> str:
        """What a command says."""
        return _run([command, *self._options, *words], cwd)


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    # apt calls others by their names, and takes an archive whose signature it cannot check for one that has none.
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise FetchError(f"{command[0]} failed: {lines[-1]}")
    return done.stdout
