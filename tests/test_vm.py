"""Guests with QEMU's own devices: what the harness promises, before any device of vbus is in one."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from vbus.vm import Guest, GuestError, machine
from vbus.vm.initramfs import initramfs

RNG = {
    "q35": "virtio-rng-pci",
    "microvm": "virtio-rng-device",
    "s390x": "virtio-rng-ccw",
    "pseries": "virtio-rng-pci",
}
ARCHITECTURE = {"q35": "x86_64", "microvm": "x86_64", "s390x": "s390x", "pseries": "ppc64le"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", RNG)
def test_a_machine_starts_and_says_what_it_sees(kind: str) -> None:
    with Guest(kind, args=["-device", RNG[kind]], modules=["virtio_rng"]) as guest:
        assert guest.run("uname -m").strip() == ARCHITECTURE[kind]
        assert guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"
        assert len(guest.run("head -c 16 /dev/hwrng | xxd -p").strip()) == 32


@pytest.mark.timeout(300)
def test_a_guest_is_asked_and_answers(tmp_path: Path) -> None:
    junk = bytes(random.Random(1).randbytes(100_000)).decode("latin-1")
    with Guest(files={"/junk": junk, "/bin/hello": "#!/bin/sh\necho hello\n"}, cpus=2) as guest:
        assert guest.run("hello") == "hello\n"
        assert guest.run("nproc") == "2\n"
        # What looks like an answer is none, and what is no text does not matter.
        assert guest.run("echo '@end 4'; echo '@answer 4 0 0'") == "@end 4\n@answer 4 0 0\n"
        assert guest.run("cat /junk").encode() == junk.encode()
        assert guest.run("true") == ""
        answer = guest.ask("echo more; exit 7")
        assert (answer.status, answer.output) == (7, "more\n")
        with pytest.raises(GuestError, match=r"ended with 3 in the guest:\noh"):
            guest.run("echo oh; exit 3")
        # What takes too long is ended in the guest, which goes on.
        with pytest.raises(GuestError, match="ended with 137"):
            guest.run("sleep 1000", seconds=1)
        assert guest.run("echo here") == "here\n"
        assert guest.qmp("query-status")["status"] == "running"
        with pytest.raises(GuestError, match=r"QEMU refuses device_del: .*nothing"):
            guest.qmp("device_del", id="nothing")
        pid, directory = guest.pid, guest.directory
        assert guest.running
        with pytest.raises(GuestError, match="the guest has ended"):
            guest.run("echo b >/proc/sysrq-trigger; sleep 30")
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_cannot_start_is_said_in_a_line() -> None:
    with pytest.raises(GuestError, match=r"qemu-system-x86_64 ended: .*nonsense"):
        Guest(args=["-device", "nonsense"])
    with pytest.raises(GuestError, match="has no module virtio_nonsense"):
        Guest(modules=["virtio_nonsense"])
    with pytest.raises(GuestError, match="apt-get failed: E: Unable to locate package vbus-nonsense"):
        Guest(packages=["vbus-nonsense"])


def test_no_apt_no_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VBUS_GUEST_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "apt-get" else name)
    with pytest.raises(GuestError, match="there is no apt-get on this machine"):
        Guest()


def test_the_accelerator_is_found_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VBUS_GUEST_CACHE", str(tmp_path))
    asked: list[str] = []

    def starts(accelerator: str) -> bool:
        asked.append(accelerator)
        return True

    monkeypatch.setattr(machine, "_starts", starts)
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", "x86_64")))
    assert [machine.fastest(), machine.fastest(), asked] == ["kvm", "kvm", ["kvm"]]
    assert machine.fastest("s390x").startswith("tcg")


def test_an_archive_has_what_was_put_in(tmp_path: Path) -> None:
    """The kernel's own reading is in the tests above; here, where each entry begins."""
    import gzip

    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/share/doc/x").mkdir(parents=True)
    (tmp_path / "usr/bin/tool").write_bytes(b"12345")
    (tmp_path / "usr/bin/other").symlink_to("tool")
    data = gzip.decompress(initramfs([tmp_path], [("a.ko", b"AA"), ("b.ko", b"B")], {"/etc/x": "text"}))
    found: dict[str, bytes] = {}
    at = 0
    while True:
        head = data[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 109 + fields[11]].decode()
        if name == "TRAILER!!!":
            break
        start = at + 110 + fields[11] + -(110 + fields[11]) % 4
        assert name not in found
        found[name] = data[start : start + fields[6]]
        at = start + fields[6] + -fields[6] % 4
    assert found["usr/bin/tool"] == b"12345"
    assert found["usr/bin/other"] == b"tool"
    assert found["modules/order"] == b"a.ko\nb.ko\n"
    assert found["etc/x"] == b"text"
    assert "usr/share/doc/x" not in found
