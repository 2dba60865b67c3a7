"""The network device, before a raw driver that says exactly what a test wants, and with real taps behind it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import random
import resource
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import pytest

import vbus
from conftest import Attached, make_connector, wait_until
from vbus import virtio
from vbus.bus import Bus
from vbus.devices import Net
from vbus.devices.net_backends import BACKLOG_FRAMES, LONGEST
from vbus.errors import DriverError, UsageError
from vbus.proxy import Driver, Remote
from vbus.proxy.remote import RemoteDevice
from vbus.virtio import Status
from vbus.virtio.net import (
    ACK_ERR,
    ACK_OK,
    FEATURES,
    HEADER,
    ControlClass,
    Gso,
    HeaderFlags,
    LinkStatus,
    MacCommand,
    MqCommand,
    RxCommand,
    VlanCommand,
)

pytestmark = pytest.mark.usefixtures("both_engines")
T = TypeVar("T")

MAC = bytes.fromhex("525400010203")
BROADCAST = b"\xff" * 6
TYPE = 0x88B5
"""An Ethernet type for experiments, which nobody else uses."""
CONTROL_FEATURES = (
    "MAC",
    "STATUS",
    "MTU",
    "CTRL_VQ",
    "CTRL_RX",
    "CTRL_RX_EXTRA",
    "CTRL_VLAN",
    "CTRL_MAC_ADDR",
    "GUEST_ANNOUNCE",
)
HOST = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO")
GUEST = ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6")
TAP = f"vb{os.getpid() % 100000}n"

root = pytest.mark.skipif(os.geteuid() != 0, reason="making a tap takes CAP_NET_ADMIN: run as root")


class Raw(Driver):
    """Every buffer and every byte as the test says."""

    device_id = virtio.DeviceID.NETWORK
    features = FEATURES
    Config = virtio.net.Config
    config: virtio.net.Config

    def __init__(self, device: RemoteDevice, *wanted: str, queues: int = 3, control: int = 2) -> None:
        self.wanted, self.queue_count = wanted, queues  # type: ignore[misc]
        self.control = control
        self.changes = threading.Semaphore(0)
        super().__init__(device)

    def config_changed(self) -> None:
        self.changes.release()

    def post(self, *sizes: int, queue: int = 0) -> list[Future[bytes]]:
        return [self.queue(queue).submit([], size) for size in sizes]

    def send(self, frame: bytes, header: bytes = bytes(12), queue: int = 1) -> None:
        self.queue(queue).submit([header, frame], 0).result(10)

    def command(self, group: int, what: int, data: bytes = b"") -> int:
        (ack,) = self.queue(self.control).submit([bytes([group, what]), data], 1).result(10)
        return ack


def frame(to: bytes = BROADCAST, size: int = 60, fill: int = 0) -> bytes:
    return to + MAC + TYPE.to_bytes(2, "big") + bytes([fill]) * (size - 14)


def tagged(tag: int) -> bytes:
    return BROADCAST + MAC + struct.pack("!HHH", 0x8100, tag, TYPE) + bytes(42)


def header(flags: int = 0, gso: int = 0, size: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    return HEADER.pack(flags, gso, size, gso_size, start, offset, 0)


def told(future: Future[bytes]) -> tuple[bytes, bytes]:
    """(header, frame) of a packet in one buffer."""
    packet = future.result(10)
    return packet[: HEADER.size], packet[HEADER.size :]


def ip(*words: str) -> str:
    return subprocess.run(("ip", *words), check=True, capture_output=True, text=True).stdout


def exists(name: str) -> bool:
    return subprocess.run(("ip", "link", "show", name), capture_output=True).returncode == 0


@pytest.fixture
def near(make_bus: Callable[..., Bus], tmp_path: Path) -> Iterator[tuple[Bus, Remote]]:
    """A bus over one connector, for what does not depend on which."""
    bus = make_bus()
    connector = bus.connect(make_connector("process-tunnelled", tmp_path))
    with vbus.attach(connector.address) as remote:
        yield bus, remote


def drive(remote: Remote, *wanted: str, name: str = "net0", queues: int = 3, control: int = 2) -> Raw:
    return Raw(remote.wait_for(name, 10), *wanted, queues=queues, control=control)


# Frames.


def test_what_is_sent_comes_back_whole_and_in_order(attached: Attached) -> None:
    net = Net(mac="52:54:00:01:02:03")
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "MAC", "MRG_RXBUF")
    assert driver.config.mac == MAC
    sent = [frame(fill=n, size=14 + 15 * n) for n in range(100)]
    futures = driver.post(*[1600] * 100)
    for one in sent:
        driver.send(one)
    assert [told(future) for future in futures] == [(header()[:10] + b"\1\0", one) for one in sent]
    size = sum(map(len, sent))
    assert (net.tx_packets, net.tx_bytes, net.rx_packets, net.rx_bytes) == (100, size, 100, size)
    assert (net.tx_errors, net.rx_dropped, net.tx_dropped) == (0, 0, 0)


def test_a_frame_may_lie_in_many_pieces(attached: Attached) -> None:
    _, remote = attached(net0=Net())
    driver = Raw(remote.device("net0"))
    (future,) = driver.post(1600)
    packet = bytes(12) + frame(fill=7, size=90)
    driver.queue(1).submit([packet[n : n + 1] for n in range(len(packet))], 0).result(10)
    assert told(future)[1] == frame(fill=7, size=90)


def test_a_frame_longer_than_a_buffer_takes_several(attached: Attached) -> None:
    _, remote = attached(net0=Net())
    driver = Raw(remote.device("net0"), "MRG_RXBUF", "CTRL_VQ")
    sent = bytes(range(200))
    first = driver.post(64, 40)
    driver.send(sent)
    assert driver.command(99, 0) == ACK_ERR
    # Two buffers are too few; neither is used before there are enough.
    assert not any(future.done() for future in first)
    futures = [*first, *driver.post(100, 50, 1600)]
    parts = [future.result(10) for future in futures[:4]]
    assert [len(part) for part in parts] == [64, 40, 100, 8]
    assert b"".join(parts) == header()[:10] + b"\4\0" + sent
    assert not futures[4].done()
    driver.send(frame())
    assert told(futures[4])[0][10:] == b"\1\0"


def test_a_frame_that_all_buffers_cannot_hold_is_dropped_and_not_waited_for(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(), "net0")
    driver = drive(remote, "MRG_RXBUF", "CTRL_VQ")
    size = driver.queue(0).size
    futures = driver.post(*[20] * size)
    driver.send(frame(size=20 * size))
    assert wait_until(lambda: net.rx_too_long == 1)
    driver.send(frame(size=14))
    assert futures[0].result(10)[10:12] == b"\2\0"


def test_without_merging_a_frame_that_is_too_long_is_dropped_and_the_buffer_used_again(attached: Attached) -> None:
    net = Net()
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"))
    small, large = driver.post(72, 1600)
    driver.send(frame(size=61))
    driver.send(frame(size=60, fill=1))
    driver.send(frame(size=61, fill=2))
    assert told(small) == (header()[:10] + b"\1\0", frame(size=60, fill=1))
    assert told(large)[1] == frame(size=61, fill=2)
    assert net.rx_too_long == 1


def test_frames_that_nobody_takes_wait_and_then_are_dropped(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(), "net0")
    driver = drive(remote)
    for n in range(BACKLOG_FRAMES + 10):
        driver.send(frame(fill=n % 256))
    assert net.rx_dropped == 10
    futures = driver.post(*[1600] * BACKLOG_FRAMES)
    assert [told(future)[1] for future in futures] == [frame(fill=n % 256) for n in range(BACKLOG_FRAMES)]
    assert net.rx_packets == BACKLOG_FRAMES


def test_frames_of_a_driver_that_leaves_are_counted_as_dropped(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(), "net0")
    driver = drive(remote)
    for _ in range(5):
        driver.send(frame())
    driver.close()
    assert (net.tx_packets, net.rx_packets, net.rx_dropped) == (5, 0, 5)
    driver = drive(remote)
    driver.send(frame(fill=7))
    assert told(driver.post(1600).pop())[1] == frame(fill=7)
    assert net.rx_dropped == 5


def test_what_a_driver_left_behind_does_not_reach_the_next(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    bus.plug(Net(), "net0")
    driver = drive(remote)
    for _ in range(3):
        driver.send(frame(fill=1))
    driver.close()
    driver = drive(remote)
    (future,) = driver.post(1600)
    driver.send(frame(fill=2))
    assert told(future)[1] == frame(fill=2)


# Frames and buffers that are wrong.

WRONG = [
    pytest.param(header(), frame(size=13)[:13], "tx_too_short", id="short"),
    pytest.param(header(), b"x", "tx_too_short", id="one-byte"),
    pytest.param(header(), bytes(LONGEST + 1), "tx_too_long", id="long"),
    pytest.param(header(flags=1, start=34, offset=6), frame(), "tx_bad_checksum", id="checksum-not-negotiated"),
    pytest.param(header(gso=Gso.TCPV4, gso_size=10), frame(), "tx_bad_segments", id="segments-not-negotiated"),
    pytest.param(header(gso=77), frame(), "tx_bad_segments", id="segments-of-no-kind"),
    pytest.param(header(size=61), frame(), "tx_bad_header", id="header-longer-than-frame"),
]


@pytest.mark.parametrize(("front", "sent", "counter"), WRONG)
def test_a_wrong_frame_is_dropped_and_counted_and_the_next_goes_on(
    attached: Attached, front: bytes, sent: bytes, counter: str
) -> None:
    net = Net()
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "MRG_RXBUF")
    (future,) = driver.post(1600)
    driver.send(sent, front)
    driver.send(frame(fill=9))
    assert told(future)[1] == frame(fill=9)
    assert (net.tx_errors, getattr(net, counter), net.tx_packets) == (1, 1, 1)


def test_bits_that_a_driver_must_not_set_do_not_come_back(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    bus.plug(Net(), "net0")
    driver = drive(remote)
    (future,) = driver.post(1600)
    driver.send(frame(), header(flags=0xFE, start=9999, offset=9999)[:10] + b"\7\0")
    assert told(future) == (header()[:10] + b"\1\0", frame())


def violated(bus: Bus, driver: Raw, name: str) -> None:
    assert wait_until(lambda: bus.slot("net0").violations[name] == 1), bus.slot("net0").violations
    assert wait_until(lambda: bus.slot("net0").status & Status.DEVICE_NEEDS_RESET)


def test_a_receive_buffer_shorter_than_a_header_is_a_violation(attached: Attached) -> None:
    bus, remote = attached(net0=Net(), net1=Net())
    neighbour = Raw(remote.device("net1"))
    driver = Raw(remote.device("net0"))
    (short,) = driver.post(HEADER.size - 1)
    # At the latest when there is a frame for it.
    with contextlib.suppress(DriverError):
        driver.send(frame())
    violated(bus, driver, "rx-buffer-too-small")
    with pytest.raises(DriverError):
        short.result(10)
    (future,) = neighbour.post(100)
    neighbour.send(frame())
    assert told(future)[1] == frame()
    driver.close()
    driver = Raw(remote.device("net0"))
    (future,) = driver.post(100)
    driver.send(frame())
    assert told(future)[1] == frame()


def test_a_frame_without_a_whole_header_is_a_violation(attached: Attached) -> None:
    bus, remote = attached(net0=Net())
    driver = Raw(remote.device("net0"))
    with pytest.raises(DriverError) as caught:
        driver.queue(1).submit([bytes(HEADER.size - 1)], 0).result(10)
    assert caught.value.errno == errno.EIO
    violated(bus, driver, "tx-header-short")


# Commands.


def table(*macs: bytes) -> bytes:
    return struct.pack("<I", len(macs)) + b"".join(macs)


GOOD = [
    pytest.param(ControlClass.RX, RxCommand.PROMISC, b"\1", id="promisc"),
    pytest.param(ControlClass.RX, RxCommand.NOBCAST, b"\0", id="nobcast"),
    pytest.param(ControlClass.MAC, MacCommand.TABLE_SET, table(MAC) + table(BROADCAST), id="tables"),
    pytest.param(ControlClass.MAC, MacCommand.ADDR_SET, MAC, id="address"),
    pytest.param(ControlClass.VLAN, VlanCommand.ADD, b"\5\0", id="vlan-add"),
    pytest.param(ControlClass.VLAN, VlanCommand.DEL, b"\5\0", id="vlan-del"),
    pytest.param(ControlClass.ANNOUNCE, 0, b"", id="announced"),
    pytest.param(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\2\0", id="pairs"),
]


@pytest.mark.parametrize(("group", "what", "data"), GOOD)
def test_a_command_is_obeyed_whole_and_refused_otherwise(
    near: tuple[Bus, Remote], group: int, what: int, data: bytes
) -> None:
    bus, remote = near
    net = bus.plug(Net(queue_pairs=2), "net0")
    driver = drive(remote, *CONTROL_FEATURES, "MQ", queues=5, control=4)
    assert driver.command(group, what, data) == ACK_OK
    for length in range(len(data)):
        assert driver.command(group, what, data[:length]) == ACK_ERR
    assert driver.command(group, what, data + b"\0") == ACK_ERR
    assert driver.command(group, 0xEE, data) == ACK_ERR
    for cut in (b"", bytes([group])):
        assert driver.queue(4).submit([cut], 1).result(10) == bytes([ACK_ERR])
    assert (net.commands, net.commands_refused) == (1, len(data) + 4)
    # What was not negotiated is not obeyed, whatever it is.
    driver.close()
    driver = drive(remote, "CTRL_VQ")
    assert driver.command(group, what, data) == ACK_ERR


@pytest.mark.parametrize(
    ("group", "what", "data"),
    [
        pytest.param(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\0\0", id="no-pairs"),
        pytest.param(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\3\0", id="more-pairs-than-there-are"),
        pytest.param(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\xff\xff", id="most-pairs"),
        pytest.param(ControlClass.MQ, MqCommand.RSS_CONFIG, bytes(20), id="rss"),
        pytest.param(ControlClass.RX, RxCommand.PROMISC, b"\2", id="neither-on-nor-off"),
        pytest.param(ControlClass.MAC, MacCommand.ADDR_SET, BROADCAST, id="broadcast-address"),
        pytest.param(ControlClass.MAC, MacCommand.TABLE_SET, b"\xff\xff\xff\xff" + MAC, id="table-that-lies"),
        pytest.param(ControlClass.MAC, MacCommand.TABLE_SET, table(BROADCAST) + table(), id="wrong-table"),
        pytest.param(ControlClass.MAC, MacCommand.TABLE_SET, table(*[MAC] * 12000) + table(), id="huge-table"),
        pytest.param(ControlClass.VLAN, VlanCommand.ADD, b"\0\x10", id="vlan-4096"),
        pytest.param(ControlClass.GUEST_OFFLOADS, 0, bytes(8), id="offloads-of-a-loopback"),
        pytest.param(200, 0, b"", id="no-class"),
    ],
)
def test_a_command_that_cannot_be_is_refused_and_changes_nothing(
    near: tuple[Bus, Remote], group: int, what: int, data: bytes
) -> None:
    bus, remote = near
    net = bus.plug(Net(queue_pairs=2, mac=MAC.hex(":")), "net0")
    driver = drive(remote, *CONTROL_FEATURES, "MQ", queues=5, control=4)
    before = bus.attributes("net0")
    assert driver.command(group, what, data) == ACK_ERR
    assert bus.attributes("net0") == before | {"commands_refused": 1}
    assert not net.filter.told


def test_the_answer_is_in_the_last_byte(attached: Attached) -> None:
    _, remote = attached(net0=Net())
    driver = Raw(remote.device("net0"), "CTRL_VQ", "CTRL_RX")
    answer = driver.queue(2).submit([bytes([ControlClass.RX]), bytes([0]), b"\1"], 5).result(10)
    assert answer == bytes(4) + bytes([ACK_OK])
    assert driver.queue(2).submit([bytes([ControlClass.RX]), b"\x77", b"\1"], 5).result(10) == bytes(4) + b"\1"


def test_a_command_without_room_for_an_answer_is_a_violation(attached: Attached) -> None:
    bus, remote = attached(net0=Net())
    driver = Raw(remote.device("net0"), "CTRL_VQ", "CTRL_RX")
    with pytest.raises(DriverError):
        driver.queue(2).submit([bytes([0, 0, 1])], 0).result(10)
    violated(bus, driver, "control-no-ack")


def test_without_pairs_negotiated_the_control_queue_is_the_third(attached: Attached) -> None:
    net = Net(queue_pairs=3)
    bus, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "CTRL_VQ", "CTRL_RX", queues=7, control=2)
    assert driver.command(ControlClass.RX, RxCommand.PROMISC, b"\1") == ACK_OK
    for _ in range(100):
        assert driver.command(ControlClass.RX, RxCommand.PROMISC, b"\7") == ACK_ERR
    driver.send(frame(), queue=3)
    assert net.tx_bad_queue == 1
    driver.control = 6
    with pytest.raises(DriverError):
        driver.command(ControlClass.RX, RxCommand.PROMISC, b"\1")
    violated(bus, driver, "control-elsewhere")


def test_pairs_are_used_when_the_driver_says_so(attached: Attached) -> None:
    net = Net(queue_pairs=2)
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "CTRL_VQ", "MQ", queues=5, control=4)
    assert driver.config.max_virtqueue_pairs == 2
    driver.send(frame(), queue=3)
    assert (net.tx_bad_queue, net.pairs) == (1, 1)
    assert driver.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\2\0") == ACK_OK
    assert net.pairs == 2
    (first,), (second,) = driver.post(1600, queue=0), driver.post(1600, queue=2)
    driver.send(frame(fill=2), queue=3)
    driver.send(frame(fill=1), queue=1)
    assert told(first)[1] == frame(fill=1)
    assert told(second)[1] == frame(fill=2)
    driver.close()
    assert net.pairs == 1


def test_noise_on_all_queues_is_counted_and_breaks_nothing(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(queue_pairs=2), "net0")
    driver = drive(remote, *CONTROL_FEATURES, "MRG_RXBUF", "MQ", queues=5, control=4)
    noise = random.Random(5)
    for _ in range(500):
        driver.queue(noise.choice((1, 3))).submit([noise.randbytes(12 + noise.randrange(100))], 0).result(10)
        command = bytes([noise.randrange(7), noise.randrange(7)]) + noise.randbytes(noise.randrange(9))
        assert driver.queue(4).submit([command], 1).result(10)[0] in (ACK_OK, ACK_ERR)
        driver.post(*[noise.randrange(12, 90) for _ in range(noise.randrange(2))], queue=noise.choice((0, 2)))
    assert net.commands + net.commands_refused == 500
    assert net.tx_packets + net.tx_errors == 500
    assert net.tx_errors > 300
    assert not bus.slot("net0").violations
    driver.close()
    driver = drive(remote)
    (future,) = driver.post(100)
    driver.send(frame())
    assert told(future)[1] == frame()


def test_a_limit_delays_frames_and_loses_none(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(), "net0")
    bus.set("net0", "limit.iops", "400")
    driver = drive(remote)
    futures = driver.post(*[100] * 60)
    for n in range(60):
        driver.queue(1).submit([bytes(12), frame(fill=n)], 0)
    assert [told(future)[1] for future in futures] == [frame(fill=n) for n in range(60)]
    assert (net.rx_dropped, net.tx_dropped) == (0, 0)


# What a driver wants to receive.

OTHER = bytes.fromhex("525400aaaaaa")
GROUP, GROUP2 = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
RX, MAC_TABLE = ControlClass.RX, (ControlClass.MAC, MacCommand.TABLE_SET)


@pytest.mark.parametrize(
    ("commands", "passing"),
    [
        pytest.param([], [MAC, OTHER, GROUP, GROUP2, BROADCAST], id="untold"),
        pytest.param([(RX, RxCommand.PROMISC, b"\0")], [MAC, BROADCAST], id="own"),
        pytest.param([(RX, RxCommand.PROMISC, b"\1")], [MAC, OTHER, GROUP, GROUP2, BROADCAST], id="promiscuous"),
        pytest.param([(RX, RxCommand.ALLMULTI, b"\1")], [MAC, GROUP, GROUP2, BROADCAST], id="allmulti"),
        pytest.param([(RX, RxCommand.ALLUNI, b"\1")], [MAC, OTHER, BROADCAST], id="alluni"),
        pytest.param([(*MAC_TABLE, table() + table(GROUP))], [MAC, GROUP, BROADCAST], id="group"),
        pytest.param([(*MAC_TABLE, table(OTHER) + table(GROUP2))], [MAC, OTHER, GROUP2, BROADCAST], id="tables"),
        pytest.param(
            [(*MAC_TABLE, table(OTHER) + table(GROUP)), (*MAC_TABLE, table() + table())], [MAC, BROADCAST], id="emptied"
        ),
        pytest.param([(RX, RxCommand.ALLMULTI, b"\1"), (RX, RxCommand.NOMULTI, b"\1")], [MAC, BROADCAST], id="nomulti"),
        pytest.param([(RX, RxCommand.NOUNI, b"\1")], [BROADCAST], id="nouni"),
        pytest.param([(RX, RxCommand.NOBCAST, b"\1")], [MAC], id="nobcast"),
        pytest.param([(ControlClass.MAC, MacCommand.ADDR_SET, OTHER), (RX, 1, b"\0")], [OTHER, BROADCAST], id="moved"),
    ],
)
def test_frames_pass_the_filter_that_the_driver_set(
    near: tuple[Bus, Remote], commands: list[tuple[int, int, bytes]], passing: list[bytes]
) -> None:
    bus, remote = near
    net = bus.plug(Net(mac=MAC.hex(":")), "net0")
    driver = drive(remote, "MAC", "CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_MAC_ADDR")
    for group, what, data in commands:
        assert driver.command(group, what, data) == ACK_OK
    assert net.promiscuous == (not commands or (RX, RxCommand.PROMISC, b"\1") in commands)
    everything = [MAC, OTHER, GROUP, GROUP2, BROADCAST]
    futures = driver.post(*[100] * (len(passing) + 1))
    for to in everything:
        driver.send(frame(to))
    assert [told(future)[1][:6] for future in futures[:-1]] == passing
    assert wait_until(lambda: net.rx_filtered == len(everything) - len(passing))
    assert not futures[-1].done()


def test_tagged_frames_pass_when_their_tag_was_asked_for(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(), "net0")
    driver = drive(remote, "CTRL_VQ", "CTRL_VLAN", "CTRL_RX")
    assert driver.command(ControlClass.VLAN, VlanCommand.ADD, b"\5\0") == ACK_OK
    assert driver.command(ControlClass.VLAN, VlanCommand.ADD, b"\6\0") == ACK_OK
    assert driver.command(ControlClass.VLAN, VlanCommand.DEL, b"\6\0") == ACK_OK
    futures = driver.post(*[100] * 3)
    # Priority bits are no part of the tag.
    for one in (tagged(4), tagged(5), tagged(6), tagged(0xE005), frame()):
        driver.send(one)
    assert [told(future)[1] for future in futures] == [tagged(5), tagged(0xE005), frame()]
    assert net.rx_filtered == 2
    assert driver.command(ControlClass.RX, RxCommand.PROMISC, b"\1") == ACK_OK
    (future,) = driver.post(100)
    driver.send(tagged(4))
    assert told(future)[1] == tagged(4)
    driver.close()
    driver = drive(remote)
    (future,) = driver.post(100)
    driver.send(tagged(4))
    assert told(future)[1] == tagged(4)


# What an operator sets.


def test_a_driver_hears_of_a_link_that_goes_and_returns(attached: Attached) -> None:
    net = Net()
    bus, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "STATUS", "CTRL_VQ", "GUEST_ANNOUNCE")
    assert driver.config.status == LinkStatus.LINK_UP
    bus.set("net0", "link", "off")
    assert driver.changes.acquire(timeout=10)
    assert driver.config.status == 0
    assert net.link is False
    (future,) = driver.post(100)
    driver.send(frame(fill=1))
    assert (net.tx_dropped, net.tx_packets) == (1, 0)
    bus.set("net0", "link", "on")
    assert driver.changes.acquire(timeout=10)
    assert driver.config.status == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE
    assert driver.command(ControlClass.ANNOUNCE, 0) == ACK_OK
    assert driver.config.status == LinkStatus.LINK_UP
    driver.send(frame(fill=2))
    assert told(future)[1] == frame(fill=2)
    bus.set("net0", "announce", "on")
    assert driver.config.status == LinkStatus.LINK_UP | LinkStatus.ANNOUNCE
    driver.close()
    assert net.announce is False
    with pytest.raises(UsageError, match="no driver that could announce"):
        net.announce = True


def test_an_address_follows_from_the_uuid_or_is_set(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    uuid = UUID("12345678-1234-5678-1234-567812345678")
    net = bus.plug(Net(), "net0", uuid=uuid)
    mac = bytes.fromhex(net.mac.replace(":", ""))
    assert mac[0] & 3 == 2
    other = bus.plug(Net(), "net1")
    assert other.mac != net.mac
    bus.unplug("net0")
    net = bus.plug(Net(), "net0", uuid=uuid)
    assert net.mac == mac.hex(":")
    # The driver's side may have heard of neither yet.
    number = bus.slot("net0").number
    assert wait_until(lambda: ("net0", number) in [(device.name, device.address) for device in remote])
    driver = drive(remote, "MAC", "CTRL_VQ", "CTRL_MAC_ADDR")
    assert driver.config.mac == mac
    bus.set("net0", "mac", "52-54-00-01-02-03")
    assert driver.changes.acquire(timeout=10)
    assert driver.config.mac == MAC
    assert driver.command(ControlClass.MAC, MacCommand.ADDR_SET, OTHER) == ACK_OK
    assert (driver.config.mac, net.mac) == (OTHER, OTHER.hex(":"))
    driver.close()
    assert net.mac == MAC.hex(":")
    for wrong in ("52:54:00:01:02", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52:54:00:01:02:100", "x"):
        with pytest.raises(UsageError, match="is no address of a device"):
            bus.set("net0", "mac", wrong)
    assert net.mac == MAC.hex(":")


def test_an_mtu_is_told_and_has_limits(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    net = bus.plug(Net(mtu=9000), "net0")
    driver = drive(remote, "MTU")
    assert driver.config.mtu == 9000
    bus.set("net0", "mtu", "1280")
    assert driver.changes.acquire(timeout=10)
    assert driver.config.mtu == 1280
    for wrong in (67, 65536, -1):
        with pytest.raises(UsageError, match="68 to 65535"):
            net.mtu = wrong
    assert driver.config.mtu == 1280


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "lopback"}, "did you mean 'loopback'"),
        ({"backend": "tap:"}, "it is loopback, switch:NAME, tap:NAME or pcap:FILE"),
        ({"backend": "loopback:x"}, "it is loopback, switch:NAME, tap:NAME or pcap:FILE"),
        ({"queue_pairs": 0}, "1 to 8"),
        ({"queue_pairs": 9}, "1 to 8"),
        ({"mtu": 67}, "68 to 65535"),
        ({"mac": "52:54"}, "no address of a device"),
    ],
)
def test_what_cannot_be_built(options: dict[str, str | int], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Net(**options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# A file.


def read_pcap(path: Path) -> list[tuple[int, bytes]]:
    """(nanoseconds, frame) of each record."""
    data = path.read_bytes()
    assert struct.unpack_from("<IHHiIII", data) == (0xA1B23C4D, 2, 4, 0, 0, 262144, 1)
    data = data[24:]
    found = []
    while data:
        seconds, nanoseconds, kept, size = struct.unpack_from("<IIII", data)
        assert kept == size
        assert nanoseconds < 10**9
        found.append((seconds * 10**9 + nanoseconds, data[16 : 16 + size]))
        data = data[16 + size :]
    return found


def test_what_is_sent_is_written_to_a_file(attached: Attached, tmp_path: Path) -> None:
    file = tmp_path / "sent.pcap"
    file.write_bytes(b"what was there before" * 100)
    net = Net(f"pcap:{file}")
    bus, remote = attached(net0=net)
    driver = Raw(remote.device("net0"))
    sent = [frame(fill=n, size=14 + 10 * n) for n in range(100)]
    for one in sent:
        driver.send(one)
    found = read_pcap(file)
    assert [one for _, one in found] == sent
    assert sorted(when for when, _ in found) == [when for when, _ in found]
    with pytest.raises(UsageError, match="is in use"):
        bus.plug(Net(f"pcap:{file}"))
    with pytest.raises(UsageError, match="Is a directory"):
        bus.plug(Net(f"pcap:{tmp_path}"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"cannot be written|no regular file"):
        bus.plug(Net(f"pcap:{tmp_path / 'pipe'}"))
    assert read_pcap(file) == found


def test_a_file_that_takes_no_more_stays_readable(near: tuple[Bus, Remote], tmp_path: Path) -> None:
    bus, remote = near
    file = tmp_path / "full.pcap"
    net = bus.plug(Net(f"pcap:{file}"), "net0")
    driver = drive(remote)
    driver.send(frame(fill=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 30, limits[1]))
    try:
        driver.send(frame(fill=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    driver.send(frame(fill=3))
    assert [one for _, one in read_pcap(file)] == [frame(fill=1), frame(fill=3)]
    assert (net.tx_packets, net.tx_dropped) == (2, 1)


# A tap.

OURS, THEIRS = "10.254.91.2", "10.254.91.1"
"""The driver's address, and the kernel's."""
UDP_SEGMENT = 103


class Wire:
    """A tap of a device, in a network namespace of its own, with the kernel's stack on it."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.sockets: list[socket.socket] = []
        ip("link", "set", TAP, "netns", namespace)
        ip("-n", namespace, "link", "set", TAP, "addrgenmode", "none")
        ip("-n", namespace, "address", "add", f"{THEIRS}/24", "dev", TAP)
        ip("-n", namespace, "link", "set", TAP, "up")
        ip("-n", namespace, "neighbour", "add", OURS, "lladdr", MAC.hex(":"), "dev", TAP)
        self.mac = bytes.fromhex(self.shown().split("link/ether ")[1][:17].replace(":", ""))

    def shown(self) -> str:
        return ip("-n", self.namespace, "-d", "link", "show", TAP)

    def within(self, task: Callable[[], T]) -> T:
        """Run something in the namespace; what sockets it makes stay there."""
        results: list[T] = []

        def run() -> None:
            with open(f"/run/netns/{self.namespace}") as there:
                assert ctypes.CDLL(None).setns(there.fileno(), 0) == 0
            results.append(task())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results[0]

    def udp(self, port: int = 0) -> socket.socket:
        made = self.within(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sockets.append(made)
        made.settimeout(10)
        made.bind((THEIRS, port))
        return made

    def raw(self) -> socket.socket:
        made = self.within(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TYPE)))
        self.sockets.append(made)
        made.settimeout(10)
        made.bind((TAP, TYPE))
        return made

    def close(self) -> None:
        for one in self.sockets:
            one.close()


@pytest.fixture
def wire() -> Iterator[Callable[[], Wire]]:
    namespace = f"{TAP}s"
    # Made beforehand, so that IPv6 can be told to say nothing by itself.
    ip("tuntap", "add", TAP, "mode", "tap", "multi_queue")
    ip("link", "set", TAP, "addrgenmode", "none")
    ip("netns", "add", namespace)
    wires: list[Wire] = []

    def make() -> Wire:
        wires.append(Wire(namespace))
        return wires[-1]

    yield make
    for one in wires:
        one.close()
    ip("netns", "del", namespace)
    if exists(TAP):
        ip("link", "del", TAP)


def checksum(data: bytes, start: int = 0) -> int:
    """The internet checksum, before it is inverted."""
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2))
    total = start + sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


def ipv4(kind: int, payload: bytes) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, 64, kind, 0)
    head += socket.inet_aton(OURS) + socket.inet_aton(THEIRS)
    return head[:10] + struct.pack("!H", 0xFFFF - checksum(head)) + head[12:] + payload


def pseudo(head: bytes, size: int) -> int:
    """The sum over what UDP's checksum covers beside the datagram. `head`: IPv4's header."""
    return checksum(head[12:20] + struct.pack("!HH", 17, size))


def datagram(to: bytes, port: int, payload: bytes, *, finished: bool, source: int = 4000) -> bytes:
    """A frame with a UDP datagram, with its checksum or what a device makes it from."""
    size = 8 + len(payload)
    head = ipv4(17, bytes(size))[:20]
    udp = struct.pack("!HHHH", source, port, size, 0) + payload
    start = pseudo(head, size)
    value = 0xFFFF - checksum(udp, start) if finished else start
    return to + MAC + b"\x08\x00" + head + udp[:6] + struct.pack("!H", value) + udp[8:]


@root
def test_the_kernel_pings_a_driver(attached: Attached, wire: Callable[[], Wire]) -> None:
    net = Net(f"tap:{TAP}", mac=MAC.hex(":"))
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "MAC", "MRG_RXBUF")
    there = wire()
    ip("-n", there.namespace, "neighbour", "del", OURS, "dev", TAP)
    futures = driver.post(*[700] * 32)
    # With a deadline, it goes on until three are answered.
    words = ("ip", "netns", "exec", there.namespace, "ping", "-c", "3", "-i", "0.05", "-s", "1400", "-w", "20", OURS)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as ping:
        try:
            while ping.poll() is None:
                try:
                    packet = futures[0].result(0.05)
                except TimeoutError:
                    continue
                futures.pop(0)
                for _ in range(packet[10] - 1):
                    packet += futures.pop(0).result(10)
                futures += driver.post(*[700] * packet[10])
                assert packet[:10] == bytes(10)
                got = packet[12:]
                if got[12:14] == b"\x08\x06":
                    reply = b"\0\2" + MAC + socket.inet_aton(OURS) + got[22:32]
                    driver.send(got[6:12] + MAC + b"\x08\x06" + got[14:20] + reply)
                elif got[12:14] == b"\x08\x00" and got[34] == 8:
                    assert len(got) == 14 + 20 + 8 + 1400
                    echo = b"\0\0\0\0" + got[38:]
                    echo = echo[:2] + struct.pack("!H", 0xFFFF - checksum(echo)) + echo[4:]
                    driver.send(got[6:12] + MAC + b"\x08\x00" + ipv4(1, echo))
            said, _ = ping.communicate()
        finally:
            ping.kill()
    assert ping.returncode == 0, said
    assert "3 received" in said


@root
@pytest.mark.parametrize(
    ("taken", "flags", "kinds"),
    [
        pytest.param((), 0, [0, 0, 0], id="none"),
        pytest.param(("GUEST_CSUM",), 1, [0, 0, 0], id="checksum"),
        pytest.param(("GUEST_USO4", "GUEST_USO6"), 0, [0, 0, 0], id="segments-without-checksum"),
        pytest.param(("GUEST_CSUM", "GUEST_ECN"), 1, [0, 0, 0], id="ecn-without-segments"),
        pytest.param(GUEST, 1, [Gso.UDP_L4], id="all"),
    ],
)
def test_the_kernel_leaves_to_a_driver_what_it_negotiated(
    near: tuple[Bus, Remote], wire: Callable[[], Wire], taken: tuple[str, ...], flags: int, kinds: list[int]
) -> None:
    bus, remote = near
    bus.plug(Net(f"tap:{TAP}"), "net0")
    there = wire()
    driver = drive(remote, *taken)
    futures = driver.post(*[8192] * 16)
    sender = there.udp()
    sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
    sender.sendto(bytes(range(250)) * 10, (OURS, 7))
    payload = b""
    for future, kind in zip(futures, kinds, strict=False):
        head, got = told(future)
        seen, gso, _, gso_size, start, offset, buffers = HEADER.unpack(head)
        assert (seen & HeaderFlags.NEEDS_CSUM, gso, buffers) == (flags, kind, 1)
        assert gso_size == (1000 if kind else 0)
        udp = got[34:]
        if flags:
            assert (start, offset) == (34, 6)
        else:
            assert seen == 0
            assert checksum(udp, pseudo(got[14:34], len(udp))) == 0xFFFF
        payload += udp[8:]
    assert payload == bytes(range(250)) * 10


@root
def test_a_driver_changes_what_is_left_to_it(near: tuple[Bus, Remote], wire: Callable[[], Wire]) -> None:
    bus, remote = near
    net = bus.plug(Net(f"tap:{TAP}"), "net0")
    there = wire()
    driver = drive(remote, "CTRL_VQ", "CTRL_GUEST_OFFLOADS", "GUEST_CSUM", "GUEST_USO4", "GUEST_USO6")
    futures = driver.post(*[8192] * 16)
    sender = there.udp()
    sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)

    def offloads(*names: str) -> int:
        bits: int = FEATURES.mask(names)
        return driver.command(ControlClass.GUEST_OFFLOADS, 0, bits.to_bytes(8, "little"))

    assert offloads("GUEST_TSO4") == ACK_ERR
    assert offloads("GUEST_CSUM") == ACK_OK
    sender.sendto(bytes(2000), (OURS, 7))
    assert [told(futures.pop(0))[0][:2] for _ in range(2)] == [b"\1\0", b"\1\0"]
    assert offloads("GUEST_CSUM", "GUEST_USO4", "GUEST_USO6") == ACK_OK
    sender.sendto(bytes(2000), (OURS, 7))
    assert told(futures.pop(0))[0][:2] == b"\1\5"
    assert net.rx_dropped == 0


@root
def test_what_was_left_to_one_driver_does_not_reach_the_next(
    near: tuple[Bus, Remote], wire: Callable[[], Wire]
) -> None:
    bus, remote = near
    net = bus.plug(Net(f"tap:{TAP}"), "net0")
    there = wire()
    driver = drive(remote, *GUEST)
    sender = there.udp()
    sender.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1000)
    sender.sendto(bytes(2000), (OURS, 7))
    driver.close()
    driver = drive(remote)
    (future,) = driver.post(8192)
    sender.sendto(b"whole", (OURS, 7))
    head, got = told(future)
    assert (head[:2], got[42:47]) == (bytes(2), b"whole")
    assert net.rx_dropped == 1


@root
def test_the_kernel_finishes_what_a_driver_left_to_it(attached: Attached, wire: Callable[[], Wire]) -> None:
    net = Net(f"tap:{TAP}")
    _, remote = attached(net0=net)
    there = wire()
    receiver = there.udp(4001)
    driver = Raw(remote.device("net0"), *HOST)
    driver.send(datagram(there.mac, 4001, b"finished", finished=True))
    assert receiver.recv(9000) == b"finished"
    unfinished = datagram(there.mac, 4001, b"unfinished", finished=False)
    driver.send(unfinished)
    driver.send(unfinished, header(flags=1, start=34, offset=6))
    assert receiver.recv(9000) == b"unfinished"
    large = bytes(range(200)) * 14
    front = header(flags=1, gso=Gso.UDP_L4, size=42, gso_size=1000, start=34, offset=6)
    driver.send(datagram(there.mac, 4001, large, finished=False), front)
    assert [receiver.recv(9000) for _ in range(3)] == [large[:1000], large[1000:2000], large[2000:]]
    assert (net.tx_packets, net.tx_errors) == (4, 0)


@root
@pytest.mark.parametrize(
    ("front", "counter"),
    [
        pytest.param(header(flags=1, start=34, offset=17), "tx_bad_checksum", id="checksum-behind-the-end"),
        pytest.param(header(flags=1, start=52, offset=0), "tx_bad_checksum", id="sum-from-behind-the-end"),
        pytest.param(header(flags=1, start=0xFFFF, offset=0xFFFF), "tx_bad_checksum", id="checksum-far-away"),
        pytest.param(header(flags=1, start=13, offset=6), "tx_bad_checksum", id="sum-from-before-the-packet"),
        pytest.param(header(gso=Gso.TCPV4, gso_size=20), "tx_bad_segments", id="segments-without-checksum"),
        pytest.param(header(1, Gso.TCPV4, 0, 0, 34, 6), "tx_bad_segments", id="segments-of-nothing"),
        pytest.param(header(1, Gso.TCPV4, 0, 53, 34, 6), "tx_bad_segments", id="segments-longer-than-the-frame"),
        pytest.param(header(1, Gso.UDP, 0, 20, 34, 6), "tx_bad_segments", id="fragments"),
        pytest.param(header(1, Gso.UDP_L4 | 0x80, 0, 20, 34, 6), "tx_bad_segments", id="ecn-of-udp"),
        pytest.param(header(1, Gso.TCPV4 | 0x20, 0, 20, 34, 6), "tx_bad_segments", id="tunnel"),
        pytest.param(header(1, Gso.TCPV4, 53, 20, 34, 6), "tx_bad_header", id="header-behind-the-end"),
        pytest.param(header(1, Gso.TCPV6, 0, 8, 34, 6), "tx_refused", id="not-what-it-says"),
    ],
)
def test_a_header_that_lies_never_reaches_the_kernel(
    near: tuple[Bus, Remote], wire: Callable[[], Wire], front: bytes, counter: str
) -> None:
    bus, remote = near
    net = bus.plug(Net(f"tap:{TAP}"), "net0")
    there = wire()
    receiver = there.udp(4001)
    driver = drive(remote, *HOST)
    sent = datagram(there.mac, 4001, b"lies......", finished=True)
    assert len(sent) == 52
    driver.send(sent, front)
    driver.send(datagram(there.mac, 4001, b"good", finished=True))
    assert receiver.recv(9000) == b"good"
    assert (net.tx_errors, getattr(net, counter), net.tx_packets) == (1, 1, 1)
    (seen,) = json.loads(ip("-n", there.namespace, "-s", "-j", "link", "show", TAP))
    assert seen["stats64"]["rx"]["packets"] == 1


@root
def test_what_the_kernel_sends_waits_for_buffers(attached: Attached, wire: Callable[[], Wire]) -> None:
    net = Net(f"tap:{TAP}")
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "MRG_RXBUF")
    there = wire()
    sender = there.raw()
    sent = [frame(fill=n, size=60 + 13 * n) for n in range(100)]
    for one in sent:
        sender.send(one)
    received: list[bytes] = []
    while len(received) < len(sent):
        # Some at a time, so that the device runs out of them again and again.
        packets = [future.result(10) for future in driver.post(*[1600] * 5)]
        received += [packet[12:] for packet in packets]
    assert received == sent
    assert (net.rx_packets, net.rx_dropped) == (100, 0)


@root
@pytest.mark.parametrize("polling", ["notified", "adaptive", "always"])
def test_whoever_serves_a_tap_and_however_it_waits_nothing_is_left_behind(
    make_bus: Callable[..., Bus], tmp_path: Path, wire: Callable[[], Wire], both_engines: str, polling: str
) -> None:
    bus = make_bus(polling=polling)
    net = bus.plug(Net(f"tap:{TAP}"), "net0")
    assert bus.show("net0")["engine"].split()[0] == both_engines
    with vbus.attach(bus.connect(make_connector("process-direct", tmp_path)).address) as remote:
        driver = drive(remote, "MRG_RXBUF", "CTRL_VQ")
        there = wire()
        wired = there.raw()
        for n in range(150):
            # It waits for the buffers, or they for it.
            ahead = driver.post(*[400] * 4) if n % 2 else []
            wired.send(frame(fill=n, size=60 + 9 * n))
            futures = ahead or driver.post(*[400] * 4)
            packet = futures[0].result(10)
            count = int.from_bytes(packet[10:12], "little")
            packet += b"".join(future.result(10) for future in futures[1:count])
            assert packet[12:] == frame(fill=n, size=60 + 9 * n)
            driver.send(frame(fill=n, size=60 + n))
            assert wired.recv(2000) == frame(fill=n, size=60 + n)
            if n == 100:
                # From now on the model serves it, and the buffers that an engine took are not lost.
                bus.set("net0", "limit.iops", "100000")
                assert bus.show("net0")["engine"].split()[0] == "python"
            driver.close()
            driver = drive(remote, "MRG_RXBUF", "CTRL_VQ")
        assert (net.rx_packets, net.tx_packets, net.rx_dropped) == (150, 150, 0)


@root
def test_carrier_and_mtu_follow_the_attributes(near: tuple[Bus, Remote], wire: Callable[[], Wire]) -> None:
    bus, remote = near
    net = bus.plug(Net(f"tap:{TAP}", mtu=1400, link=False), "net0")
    assert "mtu 1400" in ip("link", "show", TAP)
    there = wire()
    assert "NO-CARRIER" in there.shown()
    net.link = True
    assert "LOWER_UP" in there.shown()
    net.mtu = 4000
    assert "mtu 4000" in there.shown()
    net.link = False
    assert "NO-CARRIER" in there.shown()
    driver = drive(remote, "STATUS", "MTU")
    assert (driver.config.status, driver.config.mtu) == (0, 4000)


@root
def test_an_interface_may_be_down_for_a_while(near: tuple[Bus, Remote], wire: Callable[[], Wire]) -> None:
    bus, remote = near
    net = bus.plug(Net(f"tap:{TAP}"), "net0")
    there = wire()
    receiver = there.raw()
    driver = drive(remote)
    ip("-n", there.namespace, "link", "set", TAP, "down")
    driver.send(frame(fill=1))
    assert (net.tx_dropped, net.tx_packets, net.link) == (1, 0, True)
    ip("-n", there.namespace, "link", "set", TAP, "up")
    # What waits at a socket when an interface goes down is its error.
    assert receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ENETDOWN
    driver.send(frame(fill=2))
    assert receiver.recv(2000) == frame(fill=2)


@root
def test_pairs_of_a_tap_are_queues_of_the_kernel(attached: Attached, wire: Callable[[], Wire]) -> None:
    net = Net(f"tap:{TAP}", queue_pairs=2)
    _, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "CTRL_VQ", "MQ", queues=5, control=4)
    there = wire()
    assert "numqueues 1 numdisabled 1" in there.shown()
    assert driver.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\2\0") == ACK_OK
    assert "numqueues 2 numdisabled 0" in there.shown()
    receiver = there.udp(4001)
    queues = driver.post(*[1600] * 8, queue=0), driver.post(*[1600] * 8, queue=2)
    for pair, source in ((1, 4000), (0, 4002), (1, 4000), (0, 4002)):
        # A flow's frames come on the pair on which the driver sent its own.
        driver.send(datagram(there.mac, 4001, b"ping", finished=True, source=source), queue=2 * pair + 1)
        assert receiver.recvfrom(100) == (b"ping", (OURS, source))
        receiver.sendto(b"pong", (OURS, source))
        assert told(queues[pair].pop(0))[1][42:46] == b"pong"
    assert driver.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\1\0") == ACK_OK
    assert "numqueues 1 numdisabled 1" in there.shown()
    receiver.sendto(b"last", (OURS, 4000))
    assert told(queues[0].pop(0))[1][42:46] == b"last"


@root
def test_a_tap_that_vanishes_is_a_link_that_is_down(attached: Attached, caplog: pytest.LogCaptureFixture) -> None:
    net = Net(f"tap:{TAP}", queue_pairs=2)
    bus, remote = attached(net0=net)
    driver = Raw(remote.device("net0"), "STATUS", "CTRL_VQ", "CTRL_RX", "MQ", queues=5, control=4)
    futures = driver.post(*[1600] * 64)
    assert driver.command(ControlClass.RX, RxCommand.PROMISC, b"\1") == ACK_OK
    ip("link", "del", TAP)
    assert wait_until(lambda: not net.link)
    assert driver.changes.acquire(timeout=10)
    assert driver.config.status == 0
    for _ in range(3):
        driver.send(frame())
    assert driver.command(ControlClass.RX, RxCommand.PROMISC, b"\1") == ACK_OK
    assert driver.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\2\0") == ACK_OK
    assert (net.tx_dropped, net.tap_lost) == (3, 1)
    assert not futures[-1].done()
    with pytest.raises(UsageError, match="unplug the device, and plug it again"):
        net.link = True
    driver.close()
    assert [record.levelname for record in caplog.records if "is gone" in record.message] == ["ERROR"]
    assert not bus.slot("net0").violations
    bus.unplug("net0")
    bus.plug(net, "net0")
    assert net.link
    assert exists(TAP)


@root
def test_a_tap_that_cannot_be_had_is_told_in_a_line(near: tuple[Bus, Remote]) -> None:
    bus, _ = near
    bus.plug(Net(f"tap:{TAP}"), "net0")
    for backend, says in ((TAP, "in use"), ("lo", "no tap"), ("x" * 16, "up to 15"), ("a/b", "no name")):
        with pytest.raises(UsageError, match=says) as caught:
            bus.plug(Net(f"tap:{backend}"))
        assert "\n" not in str(caught.value)
    assert [slot.name for slot in bus.slots()] == ["net0"]
    assert bus.get("net0", Net).link


@root
def test_nothing_is_left_of_a_tap(near: tuple[Bus, Remote]) -> None:
    bus, remote = near
    # With so many engines that every worker has begun.
    bus.plug(Net(queue_pairs=8), "other")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        bus.plug(Net(f"tap:{TAP}", queue_pairs=4), "net0")
        driver = drive(remote, "CTRL_VQ", "MQ", queues=9, control=8)
        assert driver.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\4\0") == ACK_OK
        driver.post(1600, 1600)
        assert exists(TAP)
        bus.unplug("net0")
        assert not exists(TAP)
    # The links' memory of what was removed comes and goes by itself.
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)
