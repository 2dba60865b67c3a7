"""The modules of `guest/linux`, as sources: what the compiler, the kernel's own checks and its style say of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import vbus
from guests import bus_modules
from vbus.vm.build import SOURCES, BuildError, build, headers
from vbus.vm.debian import alone, cache, unpacked

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="headers are Debian's packages: there is no apt-get"),
]

MODULES = {"vbus_proxy", "virtio_vbus", "vbus_ivshmem"}


@pytest.mark.parametrize("backports", [False, True], ids=["release", "backports"])
def test_they_build_without_a_word(backports: bool) -> None:
    built = build(SOURCES, backports=backports)
    assert set(built.modules) == MODULES
    assert built.said == ""


@pytest.mark.skipif(shutil.which("powerpc64le-linux-gnu-gcc") is None, reason="no cross compiler for ppc64el")
def test_they_build_for_another_architecture() -> None:
    built = build(SOURCES, "ppc64el")
    assert set(built.modules) == MODULES
    assert built.said == ""


def test_what_the_compiler_says_is_shown(tmp_path: Path) -> None:
    (tmp_path / "Kbuild").write_text("obj-m := odd.o\n")
    (tmp_path / "odd.c").write_text("#include <linux/module.h>\nint odd(void);\nint odd(void) { return 1 / 0; }\n")
    with pytest.raises(BuildError, match=r"odd.c:3.*division by zero"):
        build(tmp_path)


@pytest.mark.skipif(shutil.which("sparse") is None, reason="no sparse on this machine")
def test_the_kernels_own_check_has_nothing_to_say() -> None:
    built = build(SOURCES, options=["W=1", "C=2", "CF=-D__CHECK_ENDIAN__"])
    assert built.said == ""


def checkpatch() -> Path:
    """The kernel's check of its style, out of the package of its source."""
    place = cache() / "checkpatch"
    with alone("checkpatch"):
        if not place.exists():
            files = unpacked("amd64", ["linux-source-6.1"], alone_without=True)
            (archive,) = files.glob("usr/src/linux-source-*.tar.xz")
            names = [f"*/scripts/{name}" for name in ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")]
            with tempfile.TemporaryDirectory(dir=cache()) as scratch:
                words = ["tar", "-x", "-f", str(archive), "-C", scratch, "--wildcards", *names]
                subprocess.run(words, check=True)
                (scripts,) = Path(scratch).glob("*/scripts")
                scripts.rename(place)
            # 139 MB, of which three files were wanted.
            shutil.rmtree(files)
    return place / "checkpatch.pl"


# A module that is built for several kernels has to ask which it is; the others are about macros that make sysfs files.
UNASKED = "LINUX_VERSION_CODE,CONSTANT_COMPARISON,MACRO_ARG_REUSE"


def checked(files: list[Path]) -> str:
    """What the check says of files."""
    options = ["--no-tree", "--strict", "--terse", "--quiet", "--max-line-length=100", f"--ignore={UNASKED}", "-f"]
    done = subprocess.run(
        ["perl", str(checkpatch()), *options, *map(str, files)], capture_output=True, text=True, check=False
    )
    return "".join(f"{line}\n" for line in (done.stdout + done.stderr).splitlines() if not line.startswith("total:"))


def test_their_style_is_the_kernels(tmp_path: Path) -> None:
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h"))
    assert checked(files) == ""
    odd = tmp_path / "odd.c"
    odd.write_text("// SPDX-License-Identifier: GPL-2.0-only\nint odd( void ) { return 1; }\n")
    assert "odd.c:2: ERROR" in checked([odd])


def test_each_file_can_be_read_in_a_sitting() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in SOURCES.glob("*.[ch]")}
    assert {name: length for name, length in lengths.items() if length > 650} == {}


def test_dkms_builds_what_there_is() -> None:
    said = (SOURCES / "dkms.conf").read_text()
    assert set(re.findall(r'BUILT_MODULE_NAME\[\d\]="(\w+)"', said)) == MODULES
    assert len(re.findall(r"DEST_MODULE_LOCATION\[\d\]", said)) == len(MODULES)
    (version,) = re.findall(r'PACKAGE_VERSION="(.+)"', said)
    assert version == vbus.__version__
    assert f"vbus-{version}" in (SOURCES / "README.md").read_text()


@pytest.mark.skipif(shutil.which("dkms") is None, reason="no dkms on this machine")
def test_dkms_builds_them(tmp_path: Path) -> None:
    """As it would for a kernel that is installed; with trees of its own, so that nothing of this machine changes."""
    place, source = headers("amd64"), tmp_path / "src" / f"vbus-{vbus.__version__}"
    release = (place / "include" / "config" / "kernel.release").read_text().strip()
    shutil.copytree(SOURCES, source)
    made = tmp_path / "made"
    made.mkdir()
    words = [
        "dkms",
        "build",
        f"vbus/{vbus.__version__}",
        "-k",
        release,
        "-a",
        "x86_64",
        "--kernelsourcedir",
        str(place),
    ]
    trees = ["--dkmstree", str(made), "--sourcetree", str(source.parent)]
    done = subprocess.run([*words, *trees], capture_output=True, text=True, check=False)
    logs = "".join(path.read_text() for path in made.rglob("make.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert {path.stem for path in made.rglob("*.ko")} == MODULES


def test_every_file_says_its_licence() -> None:
    for path in SOURCES.iterdir():
        if path.suffix in (".c", ".h") or path.name in ("Kbuild", "Makefile"):
            assert "SPDX-License-Identifier: GPL-2.0-only" in path.read_text().splitlines()[0], path.name


def test_modules_load_in_the_order_of_their_needs() -> None:
    loaded: set[str] = set()
    for path in bus_modules():
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        assert found is not None
        assert set(found[1].decode().split(",")) & MODULES <= loaded
        loaded.add(path.stem)
