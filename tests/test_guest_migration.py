"""A guest under load moves to another QEMU and another process of vbus; twice, it stays where it is after all."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from guests import Served, device_args, file_served, namespace
from test_guest_kills import WRITER, counts, no_errors
from vbus.devices import Blk, Net
from vbus.vm import Guest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root"),
]

TAP = f"vb{os.getpid() % 100000}i"
HERE, THERE = "10.254.95.1", "10.254.95.2"
MIB = 1 << 20

BUS = """
[bus]
name = "{name}"
[device.disk0]
type = "blk"
path = "disk.img"
shared = true
[device.net0]
type = "net"
backend = "tap:{tap}"
mac = "52:54:00:12:34:56"
[connector.disk0]
type = "vhost-user"
device = "disk0"
socket = "{name}-disk0.sock"
[connector.net0]
type = "vhost-user"
device = "net0"
socket = "{name}-net0.sock"
"""


FINAL = {"completed", "failed", "cancelled"}


def ends(source: Guest, *states: str) -> str:
    """Wait until a migration is in one of these states: which."""
    deadline = time.monotonic() + 240
    while (found := source.qmp("query-migrate").get("status")) not in states:
        assert found not in FINAL, source.qmp("query-migrate")
        assert time.monotonic() < deadline, source.qmp("query-migrate")
        time.sleep(0.02)
    return str(found)


@contextlib.contextmanager
def incoming(socket: Path, args: list[str], options: dict[str, Any]) -> Iterator[Guest]:
    """A QEMU that waits for a guest."""
    with Guest(args=[*args, "-incoming", f"unix:{socket}"], wait=False, **options) as target:
        assert wait_until(socket.exists), target.errors
        yield target


def migrated(source: Guest, to: Path) -> str:
    """How a migration ended."""
    source.qmp("migrate", uri=f"unix:{to}")
    return ends(source, "completed", "failed", "cancelled")


def more(vm: Guest, before: list[int], rounds: int = 2) -> None:
    """Wait until the writers have done some more rounds."""
    deadline = time.monotonic() + 240
    while any(now < then + rounds for now, then in zip(counts(vm), before, strict=True)):
        assert time.monotonic() < deadline, (vm.ask("cat /tmp/e* /tmp/ended*; dmesg | tail -20").output, vm.errors)
        time.sleep(0.1)


def test_a_guest_moves_under_load(tmp_path: Path) -> None:
    with (tmp_path / "disk.img").open("wb") as disk:
        disk.truncate(32 * MIB)
    args: dict[str, list[str]] = {}
    options: dict[str, Any] = {"modules": ["virtio_blk", "virtio_net"], "cpus": 2, "files": {"/bin/writer": WRITER}}
    with namespace(f"{TAP}s") as inside:

        def ip(*words: str) -> None:
            subprocess.run([*inside, "ip", *words], check=True)

        ip("link", "add", "br0", "type", "bridge")
        ip("address", "add", f"{HERE}/24", "dev", "br0")
        ip("link", "set", "br0", "up")
        for number, name in enumerate(("from", "to")):
            tap = f"{TAP}{number}"
            ip("tuntap", "add", tap, "mode", "tap", "multi_queue")
            ip("link", "set", tap, "master", "br0", "up")
            (tmp_path / f"{name}.toml").write_text(BUS.format(name=name, tap=tap))
            disk0, net0 = Blk(tmp_path / "disk.img", shared=True), Net(mac="52:54:00:12:34:56")
            args[name] = device_args("q35", "disk0", disk0, tmp_path / f"{name}-disk0.sock")
            args[name] += device_args("q35", "net0", net0, tmp_path / f"{name}-net0.sock")
        with (
            file_served(tmp_path, 4 * MIB, HERE, inside) as digest,
            Served(tmp_path / "from.toml", "from", inside) as first,
            Served(tmp_path / "to.toml", "to", inside),
            Guest(args=args["from"], **options) as source,
        ):
            source.run(f"ip addr add {THERE}/24 dev eth0 && ip link set eth0 up")
            fetch = f"wget -q -O - http://{HERE}:8000/file | sha256sum"
            source.wait_for(fetch)
            source.run("for i in 0 1; do (writer $i; echo $? >/tmp/ended$i) & done")
            source.run(f"(while :; do {fetch}; done >/tmp/sums) &")
            more(source, [0, 0])

            # Nobody is there: it stays, and what logged its writes is stopped again.
            assert migrated(source, tmp_path / "nobody") == "failed"
            more(source, counts(source))

            # Called off half-way: the same.
            with incoming(tmp_path / "called-off", args["to"], options):
                source.qmp("migrate-set-parameters", max_bandwidth=1 << 20)
                source.qmp("migrate", uri=f"unix:{tmp_path / 'called-off'}")
                ends(source, "active")
                more(source, counts(source), 1)
                source.qmp("migrate_cancel")
                ends(source, "cancelled")
                more(source, counts(source))
                source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
            with incoming(tmp_path / "incoming", args["to"], options) as target:
                before, sums = counts(source), len(source.run("cat /tmp/sums").splitlines())
                assert migrated(source, tmp_path / "incoming") == "completed"
                target.take_over(source)
                source.close()
                first.end()
                more(target, before)
                target.wait_for(f"test $(wc -l </tmp/sums) -gt {sums + 1}")
                found = [line.split()[0] for line in target.run("cat /tmp/sums").splitlines()]
                assert found == [digest] * len(found)
                assert target.ask("cat /tmp/ended0 /tmp/ended1").status != 0, "a writer has ended"
                target.run("killall writer; sleep 0.5; sync")
                no_errors(target)
