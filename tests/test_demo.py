"""The demonstration, as a user runs it: whole, with tools missing, and with a tool that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from command import VBUS, vbus
from conftest import wait_until

STEPS = [
    "disks",
    "bus",
    "read, tunnelled signals",
    "read, direct signals",
    "copy",
    "console",
    "hotplug",
    "grow",
    "surprise removal",
    "read, over a stream",
    "containers",
    "http, tunnelled signals",
    "link",
    "http, over a stream",
    "end",
]
ROWS = [("disk0", "tunnelled"), ("disk0", "direct"), ("disk1", "tunnelled"), ("disk0", "far")]
NET_ROWS = [("net0", "tunnelled"), ("net0", "far")]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
HOST_TOOLS = ("mkfs.ext4", "e2fsck", "ip")
GUEST_TOOLS = ("qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb")
TOOLS = {name: shutil.which(name, path=PATH) for name in HOST_TOOLS + GUEST_TOOLS}
GUEST_STEPS = ["disks", "bus", "guest", "entropy", "files", "grow", "offloads", "http", "link", "keys", "end"]
FUNCTION_STEPS = [*GUEST_STEPS[:3], "arrival", *GUEST_STEPS[3:-1], "hotplug", "signals", "end", "compare"]
LOOPBACK = "a loopback stands in for two kernels' networks"
NO_IP = f"replaced: ip is missing (package iproute2): {LOOPBACK}"
NO_RIGHT = f"replaced: no right to make network namespaces (run as root): {LOOPBACK}"
NO_QEMU = "qemu-system-x86_64 is missing (package qemu-system-x86)"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo keeps its things: a short path, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="vbus-test-") as name:
        yield Path(name)


def demo(folder: Path, *tools: str, options: Sequence[str] = (), path: str = "") -> list[str]:
    """The lines of a demo that succeeds, with these tools alone on its PATH, or with a whole one; it left nothing."""
    with_tools(folder, *tools)
    env = {"PATH": path or str(folder / "bin"), "TMPDIR": str(folder / "tmp")}
    done = vbus("demo", *options, cwd=folder, env=env, timeout=880)
    # What a guest is made of is fetched the first time.
    errors = [line for line in done.stderr.decode().splitlines() if not line.startswith("vbus: fetching ")]
    assert (done.returncode, errors) == (0, []), done.stdout.decode()
    assert list((folder / "tmp").iterdir()) == []
    return done.stdout.decode().splitlines()


def with_tools(folder: Path, *tools: str) -> None:
    """Make `folder`/bin with these tools in it, and `folder`/tmp."""
    (folder / "tmp").mkdir()
    (folder / "bin").mkdir()
    for name in tools:
        found = TOOLS[name]
        assert found is not None
        (folder / "bin" / name).symlink_to(found)


def namespaces() -> list[str]:
    """The network namespaces that a demo made and did not remove."""
    folder = Path("/run/netns")
    return [path.name for path in folder.iterdir() if path.name.startswith("vbus-")] if folder.exists() else []


def check_table(lines: list[str], *, with_net: bool = False) -> None:
    """Every disk's row is there, and says that a whole disk was moved; with a network, its rows too."""
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["device", "connector"])
    assert lines[start].split() == ["device", "connector", "requests", "bytes", "doorbells/request"]
    rows = [line.split() for line in lines[start + 1 : start + 1 + len(ROWS)]]
    assert [(row[0], row[1]) for row in rows] == ROWS
    rest = [line.split() for line in lines[start + 1 + len(ROWS) :] if line.startswith("net")]
    assert [(row[0], row[1]) for row in rest] == (NET_ROWS if with_net else [])
    assert [int(row[3]) for row in rest] == [128 << 20] * len(rest)
    said = re.search(r"of (\d+) MiB with \d+ files", lines[0])
    assert said
    size = int(said[1]) << 20
    assert [int(row[3]) for row in rows] == [size] * len(ROWS)
    assert all(int(row[2]) >= size >> 16 for row in rows)
    assert all(float(row[4]) > 0 for row in rows)


@pytest.mark.skipif(None in (TOOLS[name] for name in HOST_TOOLS), reason="needs e2fsprogs and iproute2")
def test_the_whole_of_it(folder: Path) -> None:
    lines = demo(folder, *HOST_TOOLS)
    assert [re.split(r" \.\.", line)[0] for line in lines[: len(STEPS)]] == STEPS
    assert "ext4 image" in lines[0]
    assert "e2fsck -fn finds it clean" in lines[STEPS.index("copy")]
    if os.geteuid() == 0:
        check_table(lines, with_net=True)
        assert lines[-1] == "demo: ok"
        assert not any(line.startswith("replaced") for line in lines)
        for step in ("http, tunnelled signals", "http, over a stream"):
            assert re.search(r"128 MiB through lo, eth0 .* checksums agree; an urgent event", lines[STEPS.index(step)])
        assert "off: carrier 0, on: carrier 1" in lines[STEPS.index("link")]
    else:
        check_table(lines)
        assert lines[-2:] == [NO_RIGHT, "demo: ok (1 replaced)"]
    assert namespaces() == []


def test_without_tools_it_says_what_it_replaced(folder: Path) -> None:
    lines = demo(folder)
    assert "tar archive" in lines[0]
    check_table(lines)
    assert lines[-3] == "replaced: mkfs.ext4 is missing: a tar archive stands in for the file system"
    assert lines[-2] == NO_IP
    assert lines[-1] == "demo: ok (2 replaced)"
    for step in ("http, tunnelled signals", "http, over a stream"):
        assert "500 frames came back from a loopback, unchanged" in lines[STEPS.index(step)]
    assert "seen by the driver" in lines[STEPS.index("link")]


@pytest.mark.skipif(TOOLS["mkfs.ext4"] is None, reason="needs e2fsprogs")
def test_without_a_check_it_compares(folder: Path) -> None:
    lines = demo(folder, "mkfs.ext4")
    assert "the copy's checksum is the image's" in lines[STEPS.index("copy")]
    check_table(lines)
    assert lines[-3] == "replaced: e2fsck is missing: the copy's checksum stands in for the check"
    assert lines[-2:] == [NO_IP, "demo: ok (2 replaced)"]


@pytest.mark.skipif(os.geteuid() != 0 or None in (TOOLS[name] for name in HOST_TOOLS), reason="needs root and tools")
def test_who_is_stopped_leaves_nothing_behind(folder: Path) -> None:
    with_tools(folder, *HOST_TOOLS)
    env = os.environ | {"PATH": str(folder / "bin"), "TMPDIR": str(folder / "tmp")}
    with subprocess.Popen([*VBUS, "demo"], cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        # Its network comes last of all.
        while not process.stdout.readline().startswith("containers "):
            assert process.poll() is None
        assert wait_until(lambda: namespaces() != [], 60)
        process.terminate()
        assert process.wait(30) != 0
    assert list((folder / "tmp").iterdir()) == []
    assert namespaces() == []


def test_a_step_that_fails_is_named(folder: Path) -> None:
    with_tools(folder)
    tool = folder / "bin" / "mkfs.ext4"
    tool.write_text("#!/bin/sh\nexit 7\n")
    tool.chmod(0o755)
    done = vbus("demo", cwd=folder, env={"PATH": str(folder / "bin"), "TMPDIR": str(folder / "tmp")})
    assert done.returncode == 1
    assert done.stderr.startswith(b"demo: failed: disks: CalledProcessError")
    assert b"demo: ok" not in done.stdout
    assert list((folder / "tmp").iterdir()) == []


def guest_table(lines: list[str], steps: Sequence[str] = GUEST_STEPS) -> dict[str, tuple[str, str]]:
    """What the guest saw and what the bus counted, by device; every step is above."""
    assert [re.split(r" \.\.", line)[0] for line in lines[: len(steps)]] == steps
    start = lines.index("") + 1
    assert re.fullmatch(r"device +the guest saw +the bus counted", lines[start])
    rows = [re.split(r" {2,}", line) for line in lines[start + 1 : start + 6]]
    assert [row[0] for row in rows] == ["rng0", "net0", "keys0", "disk0", "disk1"]
    return {device: (saw, counted) for device, saw, counted in rows}


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0 or None in TOOLS.values(), reason="needs root, QEMU, e2fsprogs and iproute2")
def test_the_whole_of_it_in_a_guest(folder: Path) -> None:
    lines = demo(folder, *TOOLS, options=["--vm"])
    table = guest_table(lines)
    assert lines[-1] == "demo: ok"
    assert not any(line.startswith("replaced") for line in lines)
    assert table["rng0"][0] == f"{1 << 20} bytes of /dev/hwrng"
    assert table["keys0"] == ("16 events, 'vbus'", "16 events given")
    received, given = int(table["net0"][0].split()[0]), int(table["net0"][1].split()[0])
    # Segments came whole: far fewer frames than 16 MiB have otherwise.
    assert 0 < received == given < (16 << 20) / 1448 / 2
    assert "e2fsck -fn finds it clean" in lines[GUEST_STEPS.index("files")]
    assert "16 MiB from the host and back, checksums agree" in lines[GUEST_STEPS.index("http")]
    assert "off: carrier 0, on: carrier 1" in lines[GUEST_STEPS.index("link")]
    assert namespaces() == []
    assert not [name for name in os.listdir("/sys/class/net") if re.fullmatch(r"vb\d+", name)]


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0 or None in TOOLS.values(), reason="needs root, QEMU, e2fsprogs and iproute2")
def test_the_whole_bus_in_a_guest(folder: Path) -> None:
    # What builds modules is more than can be listed.
    lines = demo(folder, options=["--kvm"], path=PATH)
    table = guest_table(lines, FUNCTION_STEPS)
    assert lines[-1] == "demo: ok"
    assert table["rng0"][0] == f"{1 << 20} bytes of /dev/hwrng"
    assert table["keys0"] == ("16 events, 'vbus'", "16 events given")
    arrived = lines[FUNCTION_STEPS.index("arrival")]
    assert re.findall(r"vbus0-\d+ is (\w+) \((\w+)\)", arrived) == [
        ("rng0", "virtio_rng"),
        ("disk0", "virtio_blk"),
        ("disk1", "virtio_blk"),
        ("net0", "virtio_net"),
        ("keys0", "virtio_input"),
    ]
    assert re.search(r"disk2 came as /dev/vdc, .* and went; (\d+) PCI", lines[FUNCTION_STEPS.index("hotplug")])
    counted = re.search(r"(\d+) requests; .* (\d+) interrupts", lines[FUNCTION_STEPS.index("signals")])
    assert counted is not None
    assert int(counted[2]) > 0
    assert "off: carrier 0, on: carrier 1" in lines[FUNCTION_STEPS.index("link")]
    assert namespaces() == []


def test_without_what_builds_modules_there_is_the_other_demo(folder: Path) -> None:
    lines = demo(folder, options=["--kvm"])
    assert f"replaced: {NO_QEMU}: drivers in this process stand in for a guest" in lines


@pytest.mark.timeout(900)
@pytest.mark.skipif(None in (TOOLS[name] for name in GUEST_TOOLS), reason="needs QEMU and apt")
def test_a_guest_without_the_host_s_tools(folder: Path) -> None:
    lines = demo(folder, *GUEST_TOOLS, options=["--vm"])
    guest_table(lines)
    assert lines[-4:] == [
        "replaced: mkfs.ext4 is missing: a tar archive stands in for the second disk's file system",
        "replaced: ip is missing (package iproute2): a loopback stands in for the host's network",
        "replaced: e2fsck is missing: the guest's check stands in for the host's",
        "demo: ok (3 replaced)",
    ]
    assert "comes back to it" in lines[GUEST_STEPS.index("http")]


def test_without_a_guest_there_is_the_other_demo(folder: Path) -> None:
    lines = demo(folder, options=["--vm"])
    check_table(lines)
    assert lines[-4:] == [
        f"replaced: {NO_QEMU}: drivers in this process stand in for a guest",
        "replaced: mkfs.ext4 is missing: a tar archive stands in for the file system",
        NO_IP,
        "demo: ok (3 replaced)",
    ]
