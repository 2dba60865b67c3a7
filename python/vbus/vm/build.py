"""Modules built for a guest's kernel: with the kernel's own headers, fetched as its packages are, in the same cache.

Nothing is installed, and nothing is built a second time: what was built is known by its sources, the kernel and the
compiler. For another architecture a cross compiler is needed; the programs that the headers' own package has for the
build are that architecture's, so that they are taken from the same package of this machine's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vbus.vm.debian import FetchError, alone, cache, depends, unpacked
from vbus.vm.kernel import newest

SOURCES = Path(__file__).parents[3] / "guest" / "linux"
"""Where a checkout has the modules with which a guest sees a whole bus. An installation has none."""
MODULES = ("vbus_proxy", "virtio_vbus", "vbus_ivshmem")
"""What they are called, each behind what it needs."""

HERE = "amd64"
"""What the programs of a build run on."""


@dataclass(frozen=True)
class Cross:
    """What the kernel calls an architecture, and what the programs that build for it begin with."""

    name: str
    prefix: str


CROSS = {"ppc64el": Cross("powerpc", "powerpc64le-linux-gnu-")}
"""By Debian's name of the architecture."""


class BuildError(Exception):
    """Modules could not be built; with what the build said."""


@dataclass(frozen=True)
class Built:
    """What a build came to."""

    modules: dict[str, Path]
    """The modules' files, by the names of the modules."""
    said: str
    """What the compiler and the kernel's checks said, beside the progress of the build."""


def headers(architecture: str, *, backports: bool = False) -> Path:
    """The directory that a kernel's modules are built in: that of `make -C`. Raises FetchError."""
    package = newest(architecture, "linux-headers-", backports=backports)
    needed = [
        name
        for name in depends(architecture, package, backports=backports)
        if name.startswith(("linux-headers-", "linux-kbuild-"))
    ]
    files = unpacked(architecture, [package, *needed], alone_without=True, backports=backports)
    tools = files
    if architecture != HERE:
        programs = [name for name in needed if name.startswith("linux-kbuild-")]
        tools = unpacked(HERE, programs, alone_without=True, backports=backports)
    place = cache() / architecture / f"build-{package.removeprefix('linux-headers-')}-{files.name[-12:]}"
    with alone(architecture):
        if not place.exists():
            _relocate(files, tools, package, place)
    return place


def _relocate(files: Path, tools: Path, package: str, place: Path) -> None:
    """Debian's directory finds its other half by an absolute path: here is one that finds it where it is.

    `tools` is where the programs for the build were unpacked.
    """
    source = files / "usr/src" / package
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        for entry in source.iterdir():
            (made / entry.name).symlink_to(entry)
        for (theirs,) in (tools.glob(f"usr/lib/linux-kbuild-*/{name}") for name in ("scripts", "tools")):
            (made / theirs.name).unlink()
            (made / theirs.name).symlink_to(theirs)
        (made / "Makefile").unlink()
        text = (source / "Makefile").read_text()
        (made / "Makefile").write_text(text.replace("include /usr/src/", f"include {files}/usr/src/"))
        made.rename(place)


def bus_modules(*, backports: bool = False) -> list[Path]:
    """Those modules, built, in the order in which they are loaded. Raises FetchError, BuildError."""
    if not (SOURCES / "Kbuild").exists():
        raise BuildError(
            "the sources of the guest's modules are not here: they are in guest/linux of a checkout of vbus"
        )
    built = build(SOURCES, backports=backports).modules
    return [built[name] for name in MODULES]


def build(
    sources: Path, architecture: str = "amd64", *, backports: bool = False, options: Sequence[str] = ("W=1",)
) -> Built:
    """Build the modules of a directory. `options` are make's. Raises FetchError, BuildError."""
    cross = CROSS.get(architecture)
    compiler_name = f"{cross.prefix if cross is not None else ''}gcc"
    if shutil.which("make") is None or shutil.which(compiler_name) is None:
        raise BuildError(f"modules are built with make and {compiler_name}: install them")
    if cross is not None:
        options = [*options, f"ARCH={cross.name}", f"CROSS_COMPILE={cross.prefix}"]
    place = headers(architecture, backports=backports)
    files = sorted(path for path in sources.iterdir() if path.suffix in (".c", ".h") or path.name == "Kbuild")
    compiler = subprocess.run([compiler_name, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(b"\0".join([place.name.encode(), compiler, *(word.encode() for word in options)]))
    for path in files:
        digest.update(b"\0".join([path.name.encode(), path.read_bytes(), b""]))
    kept = cache() / architecture / f"modules-{digest.hexdigest()[:16]}"
    with alone(f"{architecture}-modules"):
        if not kept.exists():
            _make(files, place, kept, options)
    modules = {path.stem: path for path in sorted(kept.glob("*.ko"))}
    return Built(modules, (kept / "said").read_text())


PROGRESS = ("  CC ", "  LD ", "  CHECK ", "  MODPOST ", "  BTF ", "make", "Skipping BTF generation", "  DESCEND")
"""How lines begin that say nothing of the sources."""


def _make(files: Sequence[Path], place: Path, kept: Path, options: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        work, made = Path(scratch) / "work", Path(scratch) / "made"
        work.mkdir()
        made.mkdir()
        for path in files:
            shutil.copy(path, work)
        # The types of the kernel's own debugging information are nothing that these modules need, and take a tool more.
        words = ["make", f"-j{os.cpu_count() or 1}", "-C", str(place), f"M={work}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
        done = subprocess.run(
            [*words, *options, "modules"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(PROGRESS)]
        said = "".join(f"{line}\n" for line in lines).replace(f"{work}/", "")
        if done.returncode:
            raise BuildError(f"the modules cannot be built:\n{said}")
        for module in work.glob("*.ko"):
            shutil.copy(module, made)
        (made / "said").write_text(said)
        made.rename(kept)


__all__ = ["MODULES", "SOURCES", "BuildError", "Built", "FetchError", "build", "bus_modules", "headers"]
