"""Queues that engines serve, driven by front-ends that take away what they gave, lie, and never give buffers."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vbus
from test_vhost_user import DATA, GUEST, MY_FEATURES, SIZE, USER, Front, wait_until
from vbus import _core
from vbus.connectors import VhostUser
from vbus.devices.blk import Blk
from vbus.devices.net import Net
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import ProtocolFeature, Request
from vbus.virtio.blk import HEADER, SECTOR, RequestType

FAR = 0x1_0000_0000
"""Guest's address of memory beside the rings' own."""
MRG_RXBUF = 1 << 15


class SlowDisk(Blk):
    """A disk whose reads last until somebody answers."""

    def plugged(self) -> None:
        self._fd, self.other = os.pipe()
        self.config.capacity = 1 << 30

    def answer(self, size: int) -> None:
        assert os.write(self.other, bytes([7]) * size) == size

    def unplugged(self) -> None:
        super().unplugged()
        os.close(self.other)


@pytest.fixture
def bus() -> Iterator[vbus.Bus]:
    with vbus.Bus("vhost") as bus:
        yield bus


@pytest.fixture
def fronts(tmp_path: Path, bus: vbus.Bus) -> Iterator[Callable[..., Front]]:
    made: list[Front] = []

    def front(device: vbus.Device | None = None) -> Front:
        if device is not None:
            bus.plug(device, "d0")
            bus.connect(VhostUser("d0", tmp_path / "d0.sock"), "vm")
        made.append(Front(tmp_path / "d0.sock").greet(ProtocolFeature.CONFIGURE_MEM_SLOTS))
        return made[-1]

    yield front
    for one in made:
        one.close()


def far(front: Front, size: int = 0x1000) -> tuple[int, memoryview]:
    """Give more memory, of a file of its own."""
    fd = os.memfd_create("far")
    os.ftruncate(fd, size)
    front.acked(Request.ADD_MEM_REG, m.MemRegion(FAR, size, USER + FAR, 0), fd)
    return fd, memoryview(_core.Mapping(fd, size))


def read(front: Front, *parts: tuple[int, int]) -> None:
    """Ask for what is at the beginning of a disk."""
    front.bytes[DATA : DATA + HEADER.size] = HEADER.pack(RequestType.IN, 0, 0)
    front.bytes[DATA + 16] = 0xFF
    assert front.ring.add([(GUEST + DATA, HEADER.size)], [*parts, (GUEST + DATA + 16, 1)]) is not None
    front.ring.publish()
    front.ring_kick()


def is_silent(front: Front) -> bool:
    """Whether no answer comes for a while."""
    front.sock.settimeout(0.1)
    try:
        front.sock.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        front.sock.settimeout(20)
    return False


@pytest.mark.parametrize("how", ["REM_MEM_REG", "SET_MEM_TABLE"])
def test_memory_is_given_back_when_the_kernel_is_done_with_it(
    bus: vbus.Bus, fronts: Callable[..., Front], how: str
) -> None:
    device = SlowDisk(memory=SECTOR, engine="native")
    front = fronts(device)
    front.set_up()
    front.start()
    fd, shown = far(front)
    read(front, (FAR, SECTOR))
    wait_until(lambda: bus.slot("d0").queues[0].core.in_flight == 1)
    if how == "REM_MEM_REG":
        front.say(Request.REM_MEM_REG, m.MemRegion(FAR, len(shown), USER + FAR, 0), ack=True)
    else:
        front.say(Request.SET_MEM_TABLE, m.MemTable((m.Region(GUEST, SIZE, USER, 0),)), front.fd, ack=True)
    assert is_silent(front)
    device.answer(SECTOR)
    assert front.hear() == m.U64(0)
    assert bytes(shown[:SECTOR]) == bytes([7]) * SECTOR
    wait_until(lambda: bool(front.ring.reap(1)))
    os.close(fd)


@pytest.mark.parametrize("engine", ["native", "python"])
def test_memory_that_was_truncated_is_not_filled_in_its_place(
    bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path, engine: str
) -> None:
    size = 256 << 20
    front = fronts(Blk(memory=size, engine=engine))
    front.set_up()
    front.start()
    fd, _ = far(front, size)
    os.ftruncate(fd, 0)
    before = private_memory()
    read(front, (FAR, size))
    wait_until(lambda: bool(front.ring.reap(1)) or bus.slot("d0").violations["region-lost"] == 1)
    assert private_memory() - before < size // 2
    assert front.bytes[DATA + 16] in (0xFF, 1)
    os.close(fd)


def private_memory() -> int:
    """Bytes that this process has for itself."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_buffers_that_wait_keep_no_more_memory_mapped_than_a_front_end_may_have(
    bus: vbus.Bus, fronts: Callable[..., Front]
) -> None:
    regions = 100
    front = fronts(Net(engine="native"))
    front.acked(Request.SET_FEATURES, m.U64(MY_FEATURES | MRG_RXBUF))
    front.share()
    rings = []
    for index in range(2):
        ring = _core.DriverQueue(front.arena, index * 0x2_0000, GUEST, 64, event_idx=False, indirect=False)
        front.acked(Request.SET_VRING_NUM, m.VringState(index, ring.size))
        desc, used, avail = (place - GUEST + USER for place in (ring.desc, ring.device, ring.driver))
        front.acked(Request.SET_VRING_ADDR, m.VringAddr(index, 0, desc, used, avail, 0))
        front.acked(Request.SET_VRING_CALL, m.U64(index), front.call)
        front.acked(Request.SET_VRING_KICK, m.U64(index), front.kick)
        front.acked(Request.SET_VRING_ENABLE, m.VringState(index, 1))
        rings.append(ring)
    # A frame that needs all buffers that come.
    assert rings[1].add([(GUEST + DATA, 12 + 60000)], []) is not None
    rings[1].publish()
    front.ring_kick()
    slot = bus.slot("d0")
    wait_until(lambda: slot.queues[1].core.counters[0] == 1)
    mapped = 0
    for n in range(60):
        places = [m.MemRegion(FAR + i * 0x10000, 0x1000, USER + FAR + i * 0x10000, 0) for i in range(regions)]
        for place in places:
            front.say(Request.ADD_MEM_REG, place, front.fd, ack=True)
            try:
                if front.hear() != m.U64(0):
                    break
            except (AssertionError, OSError):
                break
        else:
            assert rings[0].add([], [(FAR, 12)]) is not None
            rings[0].publish()
            front.ring_kick()
            wait_until(lambda n=n: slot.queues[0].core.in_flight == n + 1)  # type: ignore[misc]
            for place in places:
                front.acked(Request.REM_MEM_REG, place)
            mapped += regions
            continue
        break
    assert 509 <= mapped <= 2 * 509
    wait_until(lambda: bus.connectors["vm"].describe()["departed"] != [])
    assert "too-many-regions" in bus.connectors["vm"].describe()["departed"][-1]["reason"]


class Served:
    """A file system of one file, which this process serves: it could as well never answer."""

    INIT, LOOKUP, GETATTR, OPEN, STATFS = 26, 1, 3, 14, 17
    UNANSWERED = (2, 36, 42)
    """FORGET, INTERRUPT, BATCH_FORGET."""
    ROOT, FILE = 1, 2

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self.fd},rootmode=40000,user_id=0,group_id=0"
        subprocess.run(
            ("mount", "-i", "-t", "fuse", "-o", options, "test", str(folder)), check=True, pass_fds=[self.fd]
        )
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == self.ROOT else stat.S_IFREG | 0o600
        return struct.pack("<6Q10I", node, SIZE, SIZE >> 9, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _serve(self) -> None:
        while True:
            try:
                asked = os.read(self.fd, 1 << 18)
            except OSError:
                return
            _, request, token, node = struct.unpack_from("<IIQQ", asked)
            error, answer = 0, b""
            match request:
                case self.INIT:
                    answer = struct.pack("<4I2HIIHHI28x", 7, 31, 4096, 0, 10, 10, 1 << 16, 1, 1, 0, 0)
                case self.LOOKUP:
                    answer = struct.pack("<4Q2I", self.FILE, 0, 100, 100, 0, 0) + self._attributes(self.FILE)
                case self.GETATTR:
                    answer = struct.pack("<QII", 100, 0, 0) + self._attributes(node)
                case self.OPEN:
                    answer = struct.pack("<QII", 1, 0, 0)
                case self.STATFS:
                    answer = struct.pack("<5Q4I24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
                case _:
                    error = -errno.ENOSYS
            if request not in self.UNANSWERED:
                os.write(self.fd, struct.pack("<IiQ", 16 + len(answer), error, token) + answer)

    def close(self) -> None:
        subprocess.run(("umount", str(self.folder)), check=True)
        self._thread.join()
        os.close(self.fd)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="mounting takes CAP_SYS_ADMIN and FUSE")
def test_memory_that_a_process_serves_is_refused(bus: vbus.Bus, fronts: Callable[..., Front], tmp_path: Path) -> None:
    front = fronts(Blk(memory=SECTOR, engine="native"))
    front.set_up()
    front.start()
    served = Served(tmp_path / "served")
    fd = os.open(served.folder / "file", os.O_RDWR)
    front.say(Request.ADD_MEM_REG, m.MemRegion(FAR, 0x1000, USER + FAR, 0), fd)
    os.close(fd)
    assert front.is_closed()
    wait_until(lambda: bus.connectors["vm"].describe()["departed"] != [])
    reason = bus.connectors["vm"].describe()["departed"][-1]["reason"]
    assert reason.startswith("region-not-mappable: the file is served by a process (FUSE)")
    served.close()
