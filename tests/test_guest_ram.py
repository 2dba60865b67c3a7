"""A guest's own memory, shared: found by asking QEMU, proven by the guest; and what is said when it is not."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import vbus
from conftest import wait_until
from models import Echo, EchoDriver
from qmp_server import QmpServer, backend, tree
from vbus import msg
from vbus.bus import Bus
from vbus.connectors import Ivshmem, guest_monitor, ivshmem_peer
from vbus.connectors.guest_monitor import Finder
from vbus.connectors.guest_ram import GuestRam, RamError
from vbus.connectors.ivshmem import LOOK_AGAIN
from vbus.connectors.memory_tree import Range
from vbus.errors import DriverError, UsageError
from vbus.proxy import Remote
from vbus.proxy.connectors import ivshmem as guest
from vbus.proxy.connectors.ivshmem import Function, IvshmemConnector
from vbus.proxy.loop import Loop
from vbus.shmem import ivshmem
from vbus.shmem.area import Area
from vbus.shmem.arena import Arena
from vbus.vm.options import machine_options, monitor_options

QEMU = shutil.which("qemu-system-x86_64")
SOURCES = 64
MIB, GIB = 1 << 20, 1 << 30
LAYOUT = [Range(0, MIB // 2, 0), Range(MIB, 7 * MIB, MIB), Range(4 * GIB, 8 * MIB, 8 * MIB)]
SIZE = 16 * MIB


def answers(size: int = SIZE, **more: Any) -> dict[str, Any]:
    """What a QEMU with memory of this layout says."""
    text = tree(*((found.address, found.size, found.offset) for found in LAYOUT))
    return {"query-memdev": [backend(size)], "human-monitor-command": text} | {
        name.replace("_", "-"): value for name, value in more.items()
    }


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A file that a guest's memory could be in."""
    path = tmp_path / "ram"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def qmp(tmp_path: Path) -> Iterator[QmpServer]:
    """Who answers for QEMU."""
    with QmpServer(tmp_path / "qmp", answers()) as server:
        yield server


def write_nonce(path: Path, offset: int, nonce: int) -> None:
    """What a guest does at an address that is at this offset of the file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<Q", nonce))


# Finding.


class Asker(Finder):
    """A finder that counts resets."""

    def __init__(self, ram: Path, socket: Path) -> None:
        super().__init__(ram, socket, lambda: self.resets.append(1))
        self.resets: list[int] = []

    def found(self) -> GuestRam:
        """What is found; RamError is raised."""
        heard: queue.Queue[GuestRam | RamError] = queue.Queue()
        self.ask(heard.put)
        found = heard.get(timeout=30)
        if isinstance(found, RamError):
            raise found
        return found


def find(ram: Path, socket: Path) -> GuestRam:
    """What is found by somebody who then leaves."""
    asker = Asker(ram, socket)
    try:
        return asker.found()
    finally:
        asker.close()


def test_ranges_are_found(ram: Path, qmp: QmpServer, tmp_path: Path) -> None:
    found = find(ram, tmp_path / "qmp")
    assert found.ranges == LAYOUT
    assert len(set(found.nonces)) == len(LAYOUT)
    again = find(ram, tmp_path / "qmp")
    assert set(again.nonces).isdisjoint(found.nonces)
    assert set(qmp.asked) == {"qmp_capabilities", "query-memdev", "qom-get", "human-monitor-command"}


def test_a_backend_that_begins_somewhere_in_its_file(tmp_path: Path, ram: Path) -> None:
    with ram.open("r+b") as file:
        file.truncate(SIZE + 2 * MIB)
    said = answers() | {"qom-get mem-path": str(ram), "qom-get offset": 2 * MIB}
    with QmpServer(tmp_path / "qmp", said):
        found = find(ram, tmp_path / "qmp")
    assert [each.offset for each in found.ranges] == [each.offset + 2 * MIB for each in LAYOUT]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"human_monitor_command": "unknown command: 'info mtree'\r\n"}, "a line of the memory tree is not understood"),
        ({"human_monitor_command": 7}, "the memory tree is no text"),
        ({"query_memdev": []}, "0 shared memory backends may be the file: vbus qemu-args"),
        ({"query_memdev": [backend(SIZE), backend(SIZE)]}, "2 shared memory backends"),
        ({"query_memdev": [backend(SIZE) | {"share": False}]}, "0 shared memory backends"),
        ({"query_memdev": [{"id": 5, "size": "x"}]}, "a memory backend is not understood"),
        ({"query_memdev": [backend(2 * SIZE)]}, "more than its file"),
        ({"query_memdev": [backend(SIZE - 4096)]}, "beyond its"),
        ({"query_memdev": "mem"}, "the list of memory backends is not understood"),
        ({"qom_get mem_path": "/dev/zero"}, "0 shared memory backends may be the file"),
        ({"greeting": {"hello": 1}}, "QMP at"),
        ({"human_monitor_command": None}, "does not answer within 0.5 s"),
    ],
)
def test_what_qemu_says_otherwise_is_one_line(
    ram: Path, tmp_path: Path, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if None in change.values():
        monkeypatch.setattr(guest_monitor, "ASK_SECONDS", 0.5)
    with QmpServer(tmp_path / "qmp", answers(**change)), pytest.raises(RamError) as error:
        find(ram, tmp_path / "qmp")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_there_is_said(tmp_path: Path, ram: Path) -> None:
    for place, monitor, said in (
        (tmp_path / "none", tmp_path / "qmp", "the guest's memory .*none': No such file"),
        (tmp_path, tmp_path / "qmp", "the guest's memory .*: Is a directory"),
        (Path("/dev/null"), tmp_path / "qmp", "the guest's memory '/dev/null' is no file"),
        (ram, tmp_path / "none", "QMP at .*none': No such file"),
        (ram, ram, "QMP at .*ram': "),
    ):
        with pytest.raises(RamError, match=said):
            find(place, monitor)


def test_one_question_at_a_time_and_the_last_one_counts(
    ram: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_monitor, "ASK_SECONDS", 3)
    finder = Asker(ram, tmp_path / "qmp")
    heard: list[tuple[int, object]] = []
    with QmpServer(tmp_path / "qmp", answers(query_memdev=None)) as server:
        for number in range(20):
            finder.ask(lambda found, number=number: heard.append((number, found)))  # type: ignore[misc]
            if number == 0:
                assert wait_until(lambda: "query-memdev" in server.asked), "the first is under way, the others wait"
        assert wait_until(lambda: bool(heard) and heard[-1][0] == 19)
        assert [number for number, _ in heard] == [0, 19]
        assert all(isinstance(found, RamError) for _, found in heard)
        server.answers |= answers()
        monkeypatch.undo()
        finder.ask(lambda found: heard.append((20, found)))
        assert wait_until(lambda: heard[-1][0] == 20)
    finder.close()
    assert isinstance(heard[-1][1], GuestRam)


def test_all_who_share_memory_hear_that_their_guest_was_reset(ram: Path, qmp: QmpServer, tmp_path: Path) -> None:
    """A monitor has one client at a time, so that the functions of one QEMU ask and hear over one connection."""
    one, other, wrong = (Asker(path, tmp_path / "qmp") for path in (ram, ram, tmp_path / "none"))
    assert one.found().ranges == other.found().ranges == LAYOUT
    with pytest.raises(RamError, match="No such file"):
        wrong.found()
    for event in ("STOP", "RESET"):
        qmp.tell({"event": event, "data": {"guest": False, "reason": "host-qmp-system-reset"}})
    assert wait_until(lambda: len(one.resets) == len(other.resets) == 1)
    other.close()
    assert one.found().ranges == LAYOUT
    qmp.tell({"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}})
    assert wait_until(lambda: len(one.resets) == 2)
    one.close()
    # Now the monitor is somebody else's.
    assert wait_until(lambda: qmp.is_free)
    assert (one.resets, other.resets, wrong.resets) == ([1, 1], [1], [])
    assert qmp.asked.count("qmp_capabilities") == 1
    assert find(ram, tmp_path / "qmp").ranges == LAYOUT


def test_a_monitor_that_goes_is_asked_anew(ram: Path, tmp_path: Path) -> None:
    asker = Asker(ram, tmp_path / "qmp")
    with QmpServer(tmp_path / "qmp", answers()):
        assert asker.found().ranges == LAYOUT
    (tmp_path / "qmp").unlink()
    with QmpServer(tmp_path / "qmp", answers()) as server:
        assert asker.found().ranges == LAYOUT
        server.tell({"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}})
        assert wait_until(lambda: asker.resets == [1])
        asker.close()


def asked(ram: Path, socket: Path) -> GuestRam:
    """What is found once QEMU has started, which takes a while on a busy machine."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return find(ram, socket)
        except RamError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.skipif(QEMU is None, reason="no qemu-system-x86_64: apt-get install qemu-system-x86")
def test_qemu_itself_is_understood(tmp_path: Path) -> None:
    assert QEMU is not None
    ram, socket = tmp_path / "ram", tmp_path / "qmp"
    words = [*machine_options("q35", 64 * MIB, ram=ram), *monitor_options(socket), "-M", "max-ram-below-4g=32M"]
    machine = subprocess.Popen(
        [QEMU, *words, "-m", "64M", "-accel", "tcg", "-nodefaults", "-display", "none", "-S"], stdout=subprocess.DEVNULL
    )
    try:
        found = asked(ram, socket)
        assert found.ranges[-2:] == [Range(MIB, 31 * MIB, MIB), Range(4 * GIB, 32 * MIB, 32 * MIB)]
        (tmp_path / "other").write_bytes(b"")
        with pytest.raises(RamError, match="0 shared memory backends"):
            find(tmp_path / "other", socket)
    finally:
        machine.kill()
        machine.wait()


# Proving.


def test_a_range_is_proven_by_its_nonce_alone(ram: Path) -> None:
    found = GuestRam(os.open(ram, os.O_RDWR), LAYOUT)
    with pytest.raises(RamError, match="proven none"):
        _ = found.proven
    write_nonce(ram, 10 * MIB, found.nonces[2])
    assert found.prove(2, 4 * GIB + 2 * MIB)
    write_nonce(ram, 8 * MIB - 8, found.nonces[1])
    assert found.prove(1, 8 * MIB - 8)
    assert [(each.address, each.size) for each in found.proven] == [(MIB, 7 * MIB), (4 * GIB, 8 * MIB)]
    for index, address in ((3, MIB), (1, MIB - 1), (1, 8 * MIB - 7), (1, 4 * GIB), (2, (1 << 64) - 8)):
        with pytest.raises(RamError):
            found.prove(index, address)
    # The nonce of another range.
    write_nonce(ram, MIB, found.nonces[2])
    assert not found.prove(1, MIB)
    with pytest.raises(RamError, match="the nonce of the guest memory at 0x100000 is not in the file"):
        _ = found.proven


def test_a_file_of_large_pages_is_mapped_in_such_pages(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a range begins in the middle of one."""

    class Large:
        f_bsize = 2 * MIB

    monkeypatch.setattr(os, "fstatvfs", lambda _: Large)
    found = GuestRam(os.open(ram, os.O_RDWR), LAYOUT)
    write_nonce(ram, 5 * MIB, found.nonces[1])
    assert found.prove(1, 5 * MIB)
    [proven] = found.proven
    assert (proven.before, proven.size, proven.mapping.size) == (MIB, 7 * MIB, 8 * MIB)
    assert memoryview(proven.mapping)[5 * MIB : 5 * MIB + 8] == found.nonces[1].to_bytes(8, "little")


def test_a_file_that_is_truncated_proves_nothing(ram: Path) -> None:
    found = GuestRam(os.open(ram, os.O_RDWR), LAYOUT)
    write_nonce(ram, MIB, found.nonces[1])
    assert found.prove(1, MIB)
    os.truncate(ram, 2 * MIB)
    assert not found.prove(1, 4 * MIB)
    assert "cannot be mapped" in str(found.failed)


# Sessions.


@dataclass
class Session:
    """A guest in this process, whose memory is the file: it has said HELLO, and that it can prove memory."""

    connector: IvshmemConnector
    hello: msg.HelloResponse
    ram: Path

    def range(self, index: int) -> msg.RamRangeResponse:
        """What the bus says of a range."""
        return self.connector.call(msg.RamRange(index), msg.RamRangeResponse)

    def prove(self, index: int, *, right: bool = True) -> None:
        """Prove a range at its end."""
        told = self.range(index)
        write_nonce(self.ram, LAYOUT[index].offset + told.size - 8, told.nonce ^ (not right))
        self.connector.call(msg.RamProof(index, told.address + told.size - 8), msg.RamProofResponse)

    def use(self, kind: msg.MemoryKind = msg.MemoryKind.SHARED) -> None:
        """Say which memory is used."""
        self.connector.call(msg.UseMemory(int(kind)), msg.UseMemoryResponse)

    def drive(self) -> Remote:
        """Go on as a driver's side does."""
        self.connector.accept(self.hello)
        remote = Remote(self.connector, self.hello)
        remote.discover()
        return remote


class SharingConnector(IvshmemConnector):
    """Its buffers are in the last range, at the guest's addresses."""

    def accept(self, hello: msg.HelloResponse) -> None:
        """Whatever it says of memory."""


@pytest.fixture
def served(make_bus: Callable[..., Bus], tmp_path: Path, ram: Path) -> tuple[Bus, Ivshmem]:
    """A bus with an echo, whose guests may share their memory."""
    bus = make_bus(max_sources=SOURCES)
    bus.plug(Echo(), "echo")
    return bus, bus.connect(Ivshmem(tmp_path / "guest.sock", ram=ram, qmp=tmp_path / "qmp", keep=False), "vm")


Begin = Callable[[], Session]


@pytest.fixture
def begin(served: tuple[Bus, Ivshmem], ram: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Begins a session, of a machine of its own."""
    _, connector = served
    assert connector.socket is not None
    place = connector.socket
    begun: list[IvshmemConnector] = []

    def arena(*_: object) -> Arena:
        return Arena(4 * MIB, 4 * GIB + 4 * MIB, (os.open(ram, os.O_RDWR), 12 * MIB))

    monkeypatch.setattr(guest, "_arena", arena)

    def start() -> Session:
        made = SharingConnector(Function(place, 10), Loop("guest"))
        begun.append(made)
        hello = made.call(msg.Hello(1, 65528, int(msg.HelloFlags.RAM)), msg.HelloResponse)
        made.max_message = hello.max_msg_size
        return Session(made, hello, ram)

    yield start
    for made in begun:
        if "_function" in vars(made):
            made.close()
        made.loop.close()


def peer_row(connector: Ivshmem) -> dict[str, Any]:
    """What a listing shows of the only session."""
    [row] = connector.describe()["peers"]
    assert isinstance(row, dict)
    return row


def refused(call: Callable[[], object], number: int, *words: str) -> None:
    """The bus says no, and why."""
    with pytest.raises(DriverError) as error:
        call()
    assert error.value.errno == number
    assert all(word in str(error.value) for word in words), error.value


def test_a_guest_that_proves_its_memory_has_devices_there(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer
) -> None:
    bus, connector = served
    session = begin()
    assert session.hello.memory_kind == msg.MemoryKind.SHARED
    assert [session.range(index).count for index in range(3)] == [3] * 3
    refused(lambda: session.range(3), errno.EINVAL, "no range 3")
    session.prove(1)
    session.prove(2)
    session.use()
    assert (peer_row(connector)["memory"], peer_row(connector)["not_shared"]) == ("shared", None)
    [peer] = connector.peers
    assert peer.memory.regions() == [(MIB, 7 * MIB, True), (4 * GIB, 8 * MIB, True)]
    remote = session.drive()
    assert remote.driver("echo", EchoDriver).echo(b"where it is") == b"where it is"
    # How it is reached stays as it is.
    refused(lambda: session.use(msg.MemoryKind.WINDOW), errno.EINVAL, "does not change")
    assert qmp.asked.count("human-monitor-command") == 1
    assert not bus.slot("echo").violations


def test_memory_that_was_not_proven_is_not_reached(served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer) -> None:
    bus, connector = served
    session = begin()
    session.prove(1)
    session.use()
    [peer] = connector.peers
    assert peer.memory.regions() == [(MIB, 7 * MIB, True)]
    remote = session.drive()
    with pytest.raises(DriverError):
        remote.driver("echo", EchoDriver).echo(b"x")
    assert set(bus.slot("echo").violations) == {"ring-outside-memory"}


def test_a_nonce_that_is_not_there_leaves_the_window(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer, caplog: pytest.LogCaptureFixture
) -> None:
    _, connector = served
    session = begin()
    session.prove(2)
    refused(lambda: session.prove(1, right=False), errno.EINVAL, "the nonce of the guest memory at 0x100000")
    refused(session.use, errno.EINVAL, "the nonce")
    session.use(msg.MemoryKind.WINDOW)
    row = peer_row(connector)
    assert row["memory"] == "window"
    assert "the nonce of the guest memory at 0x100000 is not in the file" in row["not_shared"]
    [peer] = connector.peers
    assert [size for _, size, _ in peer.memory.regions()] == [peer.machine.window.size]  # type: ignore[attr-defined]
    [said] = [record.getMessage() for record in caplog.records if "not shared" in record.getMessage()]
    assert "\n" not in said
    assert "a window is used: the nonce of" in said


def test_without_qemu_there_is_the_window(served: tuple[Bus, Ivshmem], begin: Begin) -> None:
    _, connector = served
    session = begin()
    refused(lambda: session.range(0), errno.EOPNOTSUPP, "QMP at", "No such file")
    refused(lambda: session.range(0), errno.EOPNOTSUPP, "QMP at")
    refused(lambda: session.prove(0), errno.EOPNOTSUPP)
    refused(lambda: session.connector.call(msg.RamProof(0, 0), msg.RamProofResponse), errno.EINVAL, "nobody asked")
    refused(session.use, errno.EINVAL, "nobody asked")
    session.use(msg.MemoryKind.WINDOW)
    assert "QMP at" in peer_row(connector)["not_shared"]


def test_a_guest_that_is_reset_is_parted_from(served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer) -> None:
    """It cannot say that its memory is its own again, and the next kernel's it is at once."""
    _, connector = served
    session = begin()
    for index in range(len(LAYOUT)):
        session.prove(index)
    session.use()
    assert peer_row(connector)["memory"] == "shared"
    qmp.tell({"event": "RESET", "data": {"guest": True, "reason": "guest-reset"}})
    assert wait_until(lambda: not connector.peers)
    assert connector.describe()["departed"][-1]["reason"] == "its guest was reset"
    again = begin()
    again.range(0)
    assert wait_until(lambda: len(connector.peers) == 1)


def test_qemu_that_does_not_answer_holds_nobody(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, connector = served
    monkeypatch.setattr(guest_monitor, "ASK_SECONDS", 5)
    qmp.answers["human-monitor-command"] = None
    session = begin()
    question = session.connector.ask(msg.RamRange(0), msg.RamRangeResponse)
    # Others are served, and so is this one.
    assert session.connector.call(msg.Ping(7), msg.PingResponse).data == 7
    assert bus.stat()
    assert not question.future.done()
    with pytest.raises(DriverError, match=r"does not answer within 5 s"):
        session.connector.answer_to(question, 60)
    assert peer_row(connector)["memory"] == "window"


def test_whoever_keeps_the_question_does_not_keep_the_guest(
    served: tuple[Bus, Ivshmem], begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system does that does not answer."""
    monkeypatch.setattr(ivshmem_peer, "ASK_SECONDS", 0.1)
    monkeypatch.setattr(Finder, "ask", lambda *_: None)
    refused(lambda: begin().range(0), errno.EOPNOTSUPP, "QEMU was not asked within 0.2 s")


def test_a_guest_that_asks_too_much_is_parted_from(
    served: tuple[Bus, Ivshmem], begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, connector = served
    monkeypatch.setattr(Finder, "ask", lambda *_: None)
    session = begin()
    with contextlib.suppress(DriverError):
        for number in range(20):
            session.connector.ask(msg.RamRange(number), msg.RamRangeResponse)
    assert wait_until(lambda: not connector.peers)
    assert connector.describe()["departed"][-1]["reason"].startswith("too-many-questions")


def test_a_kind_of_memory_that_is_none_ends_the_session(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer
) -> None:
    _, connector = served
    session = begin()
    with pytest.raises(DriverError):
        session.connector.call(msg.UseMemory(2), msg.UseMemoryResponse)
    assert wait_until(lambda: not connector.peers)
    assert connector.describe()["departed"][-1]["reason"].startswith("memory-kind")


def test_memory_does_not_change_under_a_device(served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer) -> None:
    bus, connector = served
    session = begin()
    session.prove(2)
    [device] = session.drive()
    session.connector.call(msg.SetDeviceStatus(1), msg.SetDeviceStatusResponse, device.address)
    refused(session.use, errno.EINVAL, "does not change")
    session.connector.call(msg.SetDeviceStatus(0), msg.SetDeviceStatusResponse, device.address)
    session.use()
    assert peer_row(connector)["memory"] == "shared"
    assert bus.slot("echo").owner is None


def test_a_guest_that_wants_the_window_has_it(served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer) -> None:
    _, connector = served
    session = begin()
    session.prove(2)
    session.use(msg.MemoryKind.WINDOW)
    assert peer_row(connector)["memory"] == "window"
    assert "its guest wants the window" in peer_row(connector)["not_shared"]


def test_a_guest_that_cannot_prove_anything_has_the_window(
    served: tuple[Bus, Ivshmem], make_bus: Callable[..., Bus], tmp_path: Path
) -> None:
    _, connector = served
    assert connector.socket is not None
    made = IvshmemConnector(Function(connector.socket, 10), Loop("guest"))
    hello = made.call(msg.Hello(1, 65528, 0), msg.HelloResponse)
    assert hello.memory_kind == msg.MemoryKind.WINDOW
    assert "cannot share" in peer_row(connector)["not_shared"]
    made.close()
    made.loop.close()


def test_where_nothing_is_shared_a_guest_hears_so(make_bus: Callable[..., Bus], tmp_path: Path) -> None:
    bus = make_bus(max_sources=SOURCES)
    connector = bus.connect(Ivshmem(tmp_path / "plain.sock", keep=False))
    assert connector.socket is not None
    made = IvshmemConnector(Function(connector.socket, 10), Loop("guest"))
    hello = made.call(msg.Hello(1, 65528, int(msg.HelloFlags.RAM)), msg.HelloResponse)
    assert hello.memory_kind == msg.MemoryKind.WINDOW
    refused(lambda: made.call(msg.RamRange(0), msg.RamRangeResponse), errno.EOPNOTSUPP, "has no ram")
    assert peer_row(connector)["not_shared"] is None
    made.close()
    made.loop.close()


def test_what_a_guest_may_have_mapped_is_limited(served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer) -> None:
    bus, connector = served
    member = f"uid:{os.getuid()}"
    bus.set_member(member, "limit.memory", "70 MiB")
    session = begin()
    session_accounts = connector.peers[0].accounts
    session.prove(2)
    refused(session.use, errno.ENOMEM, "may have 70 MiB of memory mapped here")
    session.use(msg.MemoryKind.WINDOW)
    assert "70 MiB" in peer_row(connector)["not_shared"]
    [account] = [each for each in session_accounts if each.name == member]
    session.connector.close()
    assert wait_until(lambda: not account.memory), "all of it is given back"
    bus.set_member(member, "limit.memory", "90 MiB")
    for _ in range(3):
        again = begin()
        again.prove(2)
        again.use()
        assert account.memory == connector.memory + 8 * MIB
        again.connector.close()
        assert wait_until(lambda: not account.memory)


def test_a_file_that_is_truncated_is_one_drivers_loss(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, _ = served
    session = begin()
    session.prove(2)
    session.use()
    driver = session.drive().driver("echo", EchoDriver)
    assert driver.echo(b"x") == b"x"
    # What this side has mapped of it is gone as well: a guest would not live to look at its ring once more.
    monkeypatch.setattr(driver.device, "reap", lambda: None)
    with ram.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as kept:
        data = kept[12 * MIB :]
    os.truncate(ram, 8 * MIB)
    bus.slot("echo").mark(bus.slot("echo").queues[0])
    assert wait_until(lambda: set(bus.slot("echo").violations) == {"region-lost"})
    # So that whoever reads on here does not fault.
    os.truncate(ram, SIZE)
    with ram.open("r+b") as file:
        file.seek(12 * MIB)
        file.write(data)


class Stuck(Echo):
    """Its requests are under way for as long as the test likes."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.may_go_on = threading.Event()

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        """Answer, much later."""
        self.began.set()
        assert self.may_go_on.wait(30)
        super().handle(queue, request)


def test_a_session_is_over_when_nothing_uses_the_guests_memory(
    served: tuple[Bus, Ivshmem], begin: Begin, qmp: QmpServer
) -> None:
    bus, connector = served
    stuck = bus.plug(Stuck(), "stuck")
    session = begin()
    session.prove(2)
    session.use()
    session.drive().driver("stuck", EchoDriver).queue(0).submit([b"x"], 1)
    assert stuck.began.wait(10)
    view = memoryview(session.connector._function.memory)
    _, number = Area.sessions(view)
    [peer] = connector.peers
    Area.request_session(view, 0)
    session.connector._function.outward[ivshmem.SESSION_VECTOR].ring()
    assert wait_until(lambda: peer.actor.closed)
    assert connector.describe()["departed"][-1]["reason"] == "its guest ended the session"
    time.sleep(5 * LOOK_AGAIN)
    assert Area.sessions(view) == (0, number)
    stuck.may_go_on.set()
    assert wait_until(lambda: Area.sessions(view) == (0, 0))
    assert wait_until(lambda: session.connector.lost is not None)


def test_a_device_that_leaves_counts_until_it_has_left(make_bus: Callable[..., Bus], tmp_path: Path, ram: Path) -> None:
    bus = make_bus(max_sources=SOURCES)
    bus.plug(Echo(), "echo")
    slot = bus.slot("echo")
    owner: Any = object()
    slot.owner = owner
    seen: list[bool] = []
    halt = slot.halt

    def halted() -> bool:
        seen.append(bus.has_devices(owner))
        return halt()

    slot.halt = halted  # type: ignore[method-assign]
    slot._part = lambda owner: None  # type: ignore[method-assign]
    bus.unplug("echo", surprise=True)
    assert seen == [True]
    assert not bus.has_devices(owner)


def test_what_goes_together_is_given_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ram and qmp go together"):
        Ivshmem(tmp_path / "s", ram=tmp_path / "ram")
    with pytest.raises(UsageError, match="ram and qmp go together"):
        Ivshmem(tmp_path / "s", qmp=tmp_path / "qmp")
