"""Taps of this machine: made, taken, configured, and gone; and the lines that say why not."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vbus.errors import Error, UsageError
from vbus.tap import MAX_NAME, TUN_F_CSUM, TUN_F_TSO4, TUN_F_UFO, TUN_F_USO, VANISHED, Tap

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root")

NAME = f"vb{os.getpid() % 100000}t"


def ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout


def exists(name: str) -> bool:
    return subprocess.run(("ip", "link", "show", name), capture_output=True).returncode == 0


def segments_tcp(name: str) -> bool:
    """Whether the kernel leaves the cutting of TCP's segments to the interface (ETHTOOL_GTSO)."""
    value = array.array("I", [0x1E, 0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        fcntl.ioctl(asking, 0x8946, struct.pack("16sQ16x", name.encode(), value.buffer_info()[0]))
    return bool(value[1])


@pytest.fixture
def tap() -> Iterator[Tap]:
    tap = Tap.open(NAME)
    yield tap
    tap.close()


@pytest.fixture
def persistent() -> Iterator[str]:
    name = f"{NAME}p"
    ip("tuntap", "add", name, "mode", "tap", "multi_queue")
    yield name
    subprocess.run(("ip", "link", "del", name), capture_output=True)


@pytest.fixture
def namespace() -> Iterator[str]:
    ip("netns", "add", NAME)
    yield NAME
    ip("netns", "del", NAME)


def test_one_that_was_made_here_is_gone_when_it_is_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    tap = Tap.open(NAME, queues=3)
    assert tap.created
    assert len(tap.fds) == 3
    assert not any(os.get_blocking(fd) or os.get_inheritable(fd) for fd in tap.fds)
    assert exists(NAME)
    tap.close()
    tap.close()
    assert not exists(NAME)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_configured_is_what_others_see(tap: Tap) -> None:
    mac = bytes.fromhex("021122334455")
    assert not tap.up
    tap.configure(up=True, mtu=9000, mac=mac, address="10.254.77.1/24")
    tap.configure(address="fd00:77::1/64")
    tap.configure(address="10.254.77.1/24")
    assert (tap.up, tap.mtu, tap.mac) == (True, 9000, mac)
    seen = ip("address", "show", NAME)
    assert "mtu 9000" in seen
    assert "link/ether 02:11:22:33:44:55" in seen
    assert "inet 10.254.77.1/24" in seen
    assert "inet6 fd00:77::1/64" in seen
    tap.configure(up=False, mac="02:00:00:00:00:01")
    assert (tap.up, tap.mac[5]) == (False, 1)


def test_a_carrier_comes_and_goes(tap: Tap) -> None:
    tap.configure(up=True)
    assert "LOWER_UP" in ip("link", "show", NAME)
    tap.set_carrier(False)
    assert "NO-CARRIER" in ip("link", "show", NAME)
    tap.set_carrier(True)
    assert "LOWER_UP" in ip("link", "show", NAME)


def test_offloads_are_what_the_kernel_knows(tap: Tap) -> None:
    assert tap.set_offloads(TUN_F_CSUM | TUN_F_TSO4) == TUN_F_CSUM | TUN_F_TSO4
    assert segments_tcp(NAME)
    assert tap.set_offloads(0) == 0
    assert not segments_tcp(NAME)
    assert tap.set_offloads(TUN_F_CSUM | TUN_F_USO | TUN_F_UFO) & (TUN_F_CSUM | TUN_F_TSO4) == TUN_F_CSUM
    with pytest.raises(OSError, match="Invalid argument"):
        tap.set_offloads(TUN_F_TSO4)


def test_it_is_configured_where_it_was_moved_to(tap: Tap, namespace: str) -> None:
    ip("link", "set", NAME, "netns", namespace)
    ip("-n", namespace, "link", "set", NAME, "name", "eth7")
    tap.configure(up=True, mtu=4000, address="10.254.78.1/24")
    assert (tap.up, tap.mtu) == (True, 4000)
    seen = ip("-n", namespace, "address", "show", "eth7")
    assert "mtu 4000" in seen
    assert "inet 10.254.78.1/24" in seen


def test_a_persistent_one_stays_as_it_was(persistent: str) -> None:
    ip("link", "set", persistent, "mtu", "1400")
    ip("address", "add", "10.254.79.1/24", "dev", persistent)
    mac = Path(f"/sys/class/net/{persistent}/address").read_text()
    tap = Tap.open(persistent)
    assert not tap.created
    tap.configure(up=True, mtu=2000, mac=bytes.fromhex("020000000001"), address="10.254.80.1/24")
    tap.configure(address="10.254.79.1/24")
    assert tap.mtu == 2000
    tap.close()
    seen = ip("address", "show", persistent)
    assert "mtu 1400" in seen
    assert "10.254.80.1" not in seen
    assert "10.254.79.1" in seen
    assert "UP" not in seen.split(">")[0]
    assert Path(f"/sys/class/net/{persistent}/address").read_text() == mac


def test_a_queue_is_taken_out_and_put_back(persistent: str) -> None:
    def seen() -> str:
        return ip("-d", "link", "show", persistent)

    tap = Tap.open(persistent, queues=3)
    assert "numqueues 3 numdisabled 0" in seen()
    tap.set_queue(1, False)
    tap.set_queue(1, False)
    assert "numqueues 2 numdisabled 1" in seen()
    with pytest.raises(BlockingIOError):
        os.read(tap.fds[1], 2000)
    tap.set_queue(1, True)
    tap.set_queue(1, True)
    assert "numqueues 3 numdisabled 0" in seen()
    tap.close()


def test_a_program_with_an_event_loop_may_use_one(persistent: str) -> None:
    async def use() -> int:
        tap = Tap.open(persistent)
        tap.configure(mtu=1400, up=True)
        mtu = tap.mtu
        tap.close()
        return mtu

    assert asyncio.run(use()) == 1400


def test_frames_go_both_ways_behind_twelve_bytes(tap: Tap) -> None:
    tap.configure(up=True)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as wire:
        wire.bind((NAME, 0x88B5))
        wire.settimeout(10)
        frame = b"\xff" * 6 + tap.mac + b"\x88\xb5" + bytes(range(46))
        os.write(tap.fds[0], bytes(12) + frame)
        assert wire.recv(2000) == frame
        wire.send(frame)
        os.set_blocking(tap.fds[0], True)
        while (read := os.read(tap.fds[0], 2000))[12:] != frame:
            assert len(read) > 26
        # num_buffers is not the kernel's.
        assert read[:10] == bytes(10)


@pytest.mark.parametrize(
    ("name", "queues", "says"),
    [
        ("x" * (MAX_NAME + 1), 1, "up to 15 bytes"),
        ("ü" * 8, 1, "up to 15 bytes"),
        ("", 1, "no name of an interface"),
        (".", 1, "no name of an interface"),
        ("a/b", 1, "no name of an interface"),
        ("a b", 1, "no name of an interface"),
        ("tap%d", 1, "no name of an interface"),
        ("a\0b", 1, "no name of an interface"),
        (NAME, 0, "has 1 to 256"),
        (NAME, 257, "has 1 to 256"),
        ("lo", 1, "exists and is no tap"),
    ],
)
def test_what_cannot_be_a_tap(name: str, queues: int, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Tap.open(name, queues=queues)
    assert "\n" not in str(caught.value)


def test_an_interface_of_another_kind_is_not_taken() -> None:
    name = f"{NAME}u"
    ip("tuntap", "add", name, "mode", "tun")
    try:
        with pytest.raises(UsageError, match="is a tun"):
            Tap.open(name)
    finally:
        ip("link", "del", name)


def test_one_that_somebody_has_is_not_shared(tap: Tap, persistent: str) -> None:
    with pytest.raises(UsageError, match="in use by another"):
        Tap.open(NAME)
    several = Tap.open(persistent, queues=2)
    with pytest.raises(UsageError, match="in use by another"):
        Tap.open(persistent, queues=2)
    several.close()
    Tap.open(persistent, queues=2).close()


def test_one_that_was_made_for_one_queue_has_one() -> None:
    name = f"{NAME}q"
    ip("tuntap", "add", name, "mode", "tap")
    try:
        with pytest.raises(UsageError, match="made with one queue"):
            Tap.open(name, queues=2)
        Tap.open(name).close()
    finally:
        ip("link", "del", name)


def test_without_the_right_the_line_names_the_capability() -> None:
    program = (
        "import os\nfrom vbus.tap import Tap\nfrom vbus.errors import UsageError\n"
        "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
        f"try: Tap.open({NAME!r})\nexcept UsageError as error: print(error)\n"
    )
    ran = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True)
    assert "CAP_NET_ADMIN" in ran.stdout, ran.stderr
    assert ran.stdout.count("\n") == 1


def test_where_there_are_no_taps_the_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vbus.tap.CLONE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="modprobe tun"):
        Tap.open(NAME)


def test_what_the_kernel_refuses_and_what_is_no_address(tap: Tap) -> None:
    with pytest.raises(UsageError, match="no address with a prefix"):
        tap.configure(address="10.0.0.300/24")
    with pytest.raises(UsageError, match="the kernel refuses"):
        tap.configure(mtu=1)


def test_one_that_was_deleted_says_so(tap: Tap) -> None:
    ip("link", "del", NAME)
    with pytest.raises(Error, match="is gone"):
        tap.configure(mtu=1400)
    with pytest.raises(Error, match="is gone"):
        _ = tap.mtu
    with pytest.raises(OSError, match="bad state") as caught:
        os.read(tap.fds[0], 100)
    assert caught.value.errno in VANISHED
    with pytest.raises(OSError, match="bad state"):
        tap.set_carrier(True)
    tap.close()
