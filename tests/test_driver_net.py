"""The driver of the network device, against devices that behave, and devices that lie."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from ipaddress import IPv4Address

import pytest

import vbus
from conftest import Attached, wait_until
from vbus import virtio
from vbus.bus import Queue, Request
from vbus.devices.net import Net as NetDevice
from vbus.errors import DriverError, UsageError
from vbus.proxy.drivers import Net, OffloadNet
from vbus.proxy.drivers.net import ETHERNET, LONGEST, UNREAD_FRAMES, VLAN_TAG, gratuitous_arp
from vbus.virtio.net import ACK_ERR, ACK_OK, HEADER, ControlClass, Gso, LinkStatus, MqCommand, RxCommand

pytestmark = pytest.mark.usefixtures("both_engines")
MAC = bytes.fromhex("525400010203")
BASIC = ("MAC", "STATUS", "MTU", "MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR", "GUEST_ANNOUNCE")
GUEST = ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN")


class Card(vbus.Device):
    """Keeps what it is sent, and gives what the test says, byte for byte."""

    device_id = virtio.DeviceID.NETWORK
    features = virtio.net.FEATURES
    queues = (
        Queue("receive0", pull=True),
        Queue("transmit0", pull=True),
        Queue("receive1", pull=True),
        Queue("transmit1", pull=True),
        "control",
    )
    Config = virtio.net.Config
    config: virtio.net.Config

    mtu = vbus.attribute(int, config="mtu")
    status = vbus.attribute(int, config="status")

    def __init__(self, *offer: str, pairs: int = 2, mtu: int = 1500, mac: bytes = MAC, echo: bool = False) -> None:
        self.offer = offer or (*BASIC, "MQ")
        self.config.mac = mac
        self.config.max_virtqueue_pairs = pairs
        self.mtu = mtu
        self.status = int(LinkStatus.LINK_UP)
        self.echo = echo
        self.sent: list[tuple[int, bytes]] = []
        self.commands: list[bytes] = []
        self.answer = bytes([ACK_OK])
        self.reading = True

    def offered_features(self) -> Iterable[str]:
        return self.offer

    def available(self, queue: Queue) -> None:
        """Without MQ, what is declared as receive1 is the control queue."""
        if queue.index == 2 and not self.has("MQ"):
            while (request := queue.take()) is not None:
                self.handle(queue, request)
                queue.complete(request)
        elif queue.index % 2 and self.reading:
            while taken := queue.take_batch(64):
                frames = [request.read() for request in taken]
                self.sent += [(queue.index // 2, frame) for frame in frames]
                queue.complete(*taken)
                if self.echo:
                    for frame in frames:
                        self.give(frame[: HEADER.size], frame[HEADER.size :], pair=queue.index // 2)

    def handle(self, queue: Queue, request: Request) -> None:
        self.commands.append(request.read())
        request.write(self.answer)

    def read_again(self) -> None:
        self.reading = True
        self.available(self.queue("transmit0"))

    def room(self, pair: int = 0) -> Request | None:
        return self.queue(f"receive{pair}").take()

    def give_buffers(self, *parts: bytes, patience: float = 10) -> None:
        """One receive buffer for each part, as soon as there are so many."""
        requests: list[Request] = []
        for part in parts:
            deadline = time.monotonic() + patience
            while (request := self.room()) is None:
                if time.monotonic() > deadline:
                    raise TimeoutError
                time.sleep(0.001)
            request.write(part)
            requests.append(request)
        self.queue("receive0").complete(*requests)

    def give(self, header: bytes, frame: bytes, pair: int = 0) -> None:
        """A frame over as many buffers as it takes."""
        requests: list[Request] = []
        left = len(frame) + HEADER.size
        while left > 0:
            request = self.room(pair)
            if request is None:
                return
            requests.append(request)
            left -= request.writable_total
        data = header[:10] + len(requests).to_bytes(2, "little") + frame
        for request in requests:
            size = request.writable_total
            request.write(data[:size])
            data = data[size:]
        self.queue(f"receive{pair}").complete(*requests)


def header(flags: int = 0, gso: int = 0, buffers: int = 1, start: int = 0, offset: int = 0, size: int = 0) -> bytes:
    return HEADER.pack(flags, gso, 0, size, start, offset, buffers)


def frame(n: int = 0, size: int = 60) -> bytes:
    return b"\xff" * 6 + MAC + b"\x88\xb5" + random.Random(n).randbytes(size - ETHERNET)


def received(driver: Net, count: int) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < count:
        frames += driver.recv(timeout=10)
    return frames


def fails(number: int, what: str = ".") -> pytest.RaisesExc[DriverError]:
    return pytest.raises(DriverError, match=what, check=lambda error: error.errno == number)


def test_a_batch_goes_out_in_order_with_headers(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    sent = [frame(n, 60 + n) for n in range(1000)]
    assert driver.send(sent).result(10) == 1000
    assert card.sent == [(0, bytes(HEADER.size) + one) for one in sent]
    assert driver.send([]).result(10) == 0


def test_a_batch_is_submitted_whole_or_not_at_all(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    queue = driver.queue(1)
    answer: Future[bytes] = Future()
    with pytest.raises(ValueError, match="needs bytes"):
        queue.submit_many([(answer, [header(), frame(1)], 0), (answer, [b""], 0)])
    with fails(errno.EMSGSIZE):
        queue.submit_many([(answer, [header(), frame(1)], 0), (answer, [frame(2)], 1 << 30)])
    with fails(errno.EMSGSIZE):
        driver.send([frame(1), frame(2, 60000)])
    assert driver.send([frame(3)]).result(10) == 1
    assert card.sent == [(0, header(buffers=0) + frame(3))]
    assert not answer.done()


def test_frames_come_back_in_order_whole_and_in_batches(attached: Attached) -> None:
    _, remote = attached(net0=Card(echo=True))
    driver = remote.driver("net0", Net)
    sizes = random.Random(1)
    sent = [frame(n, sizes.randrange(60, 1514)) for n in range(90)]
    for _ in range(20):
        driver.send(sent)
        assert received(driver, len(sent)) == sent
    assert driver.received == 1800
    assert not driver.dropped
    driver.send(sent)
    batch = driver.recv(max=7, timeout=10)
    assert 1 <= len(batch) <= 7
    rest = received(driver, len(sent) - len(batch))
    assert batch + rest == sent


@pytest.mark.parametrize("mtu", [68, 1500, 9000, 65535])
@pytest.mark.parametrize("merged", [True, False])
def test_frames_of_every_mtu_fit(attached: Attached, mtu: int, merged: bool) -> None:
    offer = [name for name in BASIC if merged or name != "MRG_RXBUF"]
    _, remote = attached(net0=Card(*offer, mtu=mtu, echo=True))
    driver = remote.driver("net0", Net)
    assert driver.mtu == mtu
    longest = frame(1, mtu + ETHERNET + VLAN_TAG)
    driver.send([longest, frame(2, 14)])
    assert received(driver, 2) == [longest, frame(2, 14)]
    with fails(errno.EMSGSIZE):
        driver.send([frame(2), longest + b"x"])
    with fails(errno.EINVAL):
        driver.send([bytes(ETHERNET - 1)])


@pytest.mark.parametrize("merged", [True, False])
def test_the_longest_frame_of_all_fits_with_offloads(attached: Attached, merged: bool) -> None:
    offer = [*(name for name in BASIC if merged or name != "MRG_RXBUF"), *GUEST, "CSUM", "HOST_TSO4"]
    card = Card(*offer)
    _, remote = attached(net0=card)
    driver = remote.driver("net0", OffloadNet)
    raw = header(1, Gso.TCPV4, 0, 34, 16, 1448) + frame(3, LONGEST)
    assert driver.send_raw([raw]).result(10) == 1
    assert card.sent == [(0, raw)]
    card.give(raw[: HEADER.size], raw[HEADER.size :])
    (back,) = driver.recv_raw(timeout=10)
    assert (back[:10], back[HEADER.size :]) == (raw[:10], raw[HEADER.size :])
    with fails(errno.EMSGSIZE):
        driver.send_raw([raw + b"x"])
    with fails(errno.EMSGSIZE):
        driver.send_raw([bytes(HEADER.size) + raw])
    with pytest.raises(UsageError, match="recv_raw"):
        driver.recv(timeout=0)


def test_merged_buffers_are_put_together(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    whole = frame(5, 1400)
    card.give_buffers(header(buffers=4) + whole[:1], whole[1:3], b"", whole[3:])
    card.give_buffers(header() + frame(6))
    assert received(driver, 2) == [whole, frame(6)]


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ([b""], "net-header"),
        ([b"\0" * 11], "net-header"),
        ([header(buffers=0) + frame()], "net-num-buffers"),
        ([header(buffers=65535) + frame()], "net-num-buffers"),
        ([header(buffers=257) + frame(), b"", b""], "net-num-buffers"),
    ],
)
def test_a_device_that_lies_about_buffers_is_broken_and_said_to_be(
    attached: Attached, parts: list[bytes], rule: str
) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    failed = threading.Event()
    driver.on_failed = lambda error: failed.set()
    card.give_buffers(header() + frame(1))
    card.give_buffers(*parts)
    assert driver.recv(timeout=10) == [frame(1)]
    with fails(errno.EIO, rule):
        driver.recv(timeout=10)
    assert failed.wait(20)
    assert wait_until(lambda: driver.device.needs_reset)
    with fails(errno.EIO, rule):
        for _ in range(100):
            driver.send([frame(1)]).result(10)
    again = remote.driver("net0", Net)
    assert again.send([frame(2)]).result(10) == 1
    card.give_buffers(header() + frame(3))
    assert again.recv(timeout=10) == [frame(3)]


def test_frames_that_nobody_can_use_are_counted_and_dropped(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    card.give_buffers(header())
    card.give_buffers(header() + bytes(ETHERNET - 1))
    card.give_buffers(header(flags=1, start=60000, offset=60000) + frame())
    card.give_buffers(header(gso=Gso.TCPV4) + frame())
    card.give_buffers(header(gso=77) + frame())
    piece = bytes(1500)
    pieces = (LONGEST + HEADER.size) // len(piece) + 1
    card.give_buffers(header(buffers=pieces) + piece[HEADER.size :], *[piece] * (pieces - 1))
    card.give_buffers(header() + frame(9))
    assert driver.recv(timeout=10) == [frame(9)]
    assert driver.dropped == {"short": 2, "header": 3, "long": 1}
    assert driver.received == 1


def test_offloads_only_where_they_were_negotiated(attached: Attached) -> None:
    card = Card(*BASIC, "GUEST_CSUM", "GUEST_TSO6", "GUEST_ECN", "HOST_TSO4", "GUEST_TSO4")
    _, remote = attached(net0=card)
    plain = remote.driver("net0", Net)
    assert not plain.has("GUEST_CSUM")
    driver = remote.driver("net0", OffloadNet)
    assert driver.has("GUEST_ECN")
    # It needs CSUM, which this device has not.
    assert not driver.has("HOST_TSO4")
    ecn = int(Gso.TCPV6) | virtio.net.GsoFlags.ECN
    card.give_buffers(header(1, ecn, start=54, offset=16, size=1000) + frame(1))
    card.give_buffers(header(1, int(Gso.UDP_L4)) + frame(2))
    card.give_buffers(header(1, start=34, offset=16) + frame(3))
    frames = driver.recv_raw(timeout=10)
    while len(frames) < 2:
        frames += driver.recv_raw(timeout=10)
    assert [one[HEADER.size :] for one in frames] == [frame(1), frame(3)]
    assert driver.dropped == {"header": 1}


def test_who_does_not_read_does_not_fill_our_memory(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    given = 0
    # The device gives all that it can, until it has no buffers any more.
    while driver.received < UNREAD_FRAMES or driver.queue(0).outstanding:
        with contextlib.suppress(TimeoutError):
            card.give_buffers(header() + frame(given), patience=0.01)
            given += 1
    assert UNREAD_FRAMES <= given <= UNREAD_FRAMES + 128
    got = received(driver, given)
    assert got == [frame(n) for n in range(given)]
    card.give_buffers(header() + frame(7))
    assert driver.recv(timeout=10) == [frame(7)]


def test_a_sink_gets_what_waited_and_what_comes(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    card.give_buffers(header() + frame(1))
    assert wait_until(lambda: driver.received == 1)
    got: list[bytes] = []
    driver.deliver(lambda pair, raw: got.append(raw))
    for n in range(2, 500):
        card.give_buffers(header() + frame(n))
    assert wait_until(lambda: len(got) == 499)
    assert got == [header() + frame(n) for n in range(1, 500)]
    with fails(errno.ETIMEDOUT):
        driver.recv(timeout=0)


def test_link_and_mtu_are_followed(attached: Attached) -> None:
    card = Card(mtu=1400)
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    seen: list[tuple[bool, int]] = []
    driver.on_change = lambda: seen.append((driver.link, driver.mtu))
    assert (driver.mac, driver.link, driver.mtu) == (MAC, True, 1400)
    card.status = 0
    assert wait_until(lambda: seen == [(False, 1400)])
    card.status = 1
    assert wait_until(lambda: seen[1:] == [(True, 1400)])
    card.mtu = 9000
    assert wait_until(lambda: seen[2:] == [(True, 9000)])
    driver.send([frame(1, 9014)]).result(10)
    card.config.mac = b"\x02\0\0\0\0\2"
    card.config_changed()
    assert wait_until(lambda: driver.mac == b"\x02\0\0\0\0\2")
    driver.set_mac(b"\x02\0\0\0\0\3")
    card.mtu = 8000
    assert wait_until(lambda: driver.mtu == 8000)
    assert driver.mac == b"\x02\0\0\0\0\3"
    card.mtu = 67
    with fails(errno.EIO, "net-mtu"):
        driver.recv(timeout=10)


def test_a_device_that_tells_little_is_taken_as_it_is(attached: Attached) -> None:
    card = Card("CSUM", "MQ", "GUEST_ANNOUNCE", "CTRL_RX", echo=True)
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    assert (driver.link, driver.mtu, driver.max_pairs, len(driver.mac)) == (True, 1500, 1, 6)
    assert driver.mac[0] & 3 == 2
    # Without a control queue, what needs it is not taken either.
    assert virtio.net.FEATURES.names_of(driver.device.negotiated & 0xFFFFFF) == []
    with fails(errno.EOPNOTSUPP):
        driver.control(ControlClass.RX, RxCommand.PROMISC, b"\1")
    driver.send([frame(4)])
    assert driver.recv(timeout=10) == [frame(4)]


@pytest.mark.parametrize(
    ("card", "what"),
    [
        (lambda: Card(mac=bytes(6)), "address"),
        (lambda: Card(mac=b"\xff" * 6), "address"),
        (lambda: Card(mtu=67), "mtu"),
        (lambda: Card(pairs=0), "pairs"),
        (lambda: Card(pairs=3), "pairs"),
        (lambda: Card(pairs=0xFFFF), "pairs"),
    ],
)
def test_a_device_that_talks_nonsense_is_refused_and_left_free(attached: Attached, card: type[Card], what: str) -> None:
    bus, remote = attached(net0=card())
    with fails(errno.EIO, what):
        remote.driver("net0", Net)
    assert wait_until(lambda: bus.slot("net0").owner is None)


@pytest.mark.parametrize("offer", [(*BASIC, "MQ"), BASIC])
def test_commands_reach_the_control_queue_wherever_it_is(attached: Attached, offer: tuple[str, ...]) -> None:
    card = Card(*offer)
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    driver.set_promiscuous(True)
    driver.set_mac(b"\x02\0\0\0\0\1")
    assert card.commands == [b"\0\0\1", b"\1\1\2\0\0\0\0\1"]
    assert driver.mac == b"\x02\0\0\0\0\1"
    card.answer = bytes([ACK_ERR])
    with fails(errno.EINVAL, "refuses"):
        driver.set_promiscuous(False)
    with fails(errno.EINVAL):
        driver.set_mac(b"\x01\0\0\0\0\1")
    for nonsense in (b"", b"\2"):
        card.answer = nonsense
        with fails(errno.EPROTO):
            driver.control(9, 9, b"x" * 100)
    assert driver.mac == b"\x02\0\0\0\0\1"


def test_several_pairs_of_queues(attached: Attached) -> None:
    card = Card(echo=True)
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    assert (driver.pairs, driver.max_pairs) == (1, 2)
    with fails(errno.EINVAL):
        driver.send([frame()], pair=1)
    for number in (0, 3, 65536):
        with fails(errno.EINVAL):
            driver.set_queue_pairs(number)
    assert card.commands == []
    driver.set_queue_pairs(2)
    assert card.commands == [bytes([ControlClass.MQ, MqCommand.VQ_PAIRS_SET, 2, 0])]
    for n in range(200):
        driver.send([frame(n)], pair=n % 2)
    assert sorted(received(driver, 200)) == sorted(frame(n) for n in range(200))
    assert [pair for pair, _ in card.sent].count(1) == 100
    driver.set_queue_pairs(1)
    assert driver.pairs == 1


@pytest.mark.parametrize("pairs", [1, 4])
def test_with_the_device_that_is_built_in(attached: Attached, pairs: int) -> None:
    bus, remote = attached(net0=NetDevice("loopback", mtu=9000, mac="52:54:00:12:34:56", queue_pairs=pairs))
    driver = remote.driver("net0", Net)
    assert (driver.mac.hex(":"), driver.mtu, driver.link) == ("52:54:00:12:34:56", 9000, True)
    driver.set_queue_pairs(pairs)
    driver.set_promiscuous(True)
    device = bus.get("net0", NetDevice)
    assert (device.pairs, device.promiscuous) == (pairs, True)
    sent = [frame(n, 60 + n * 99) for n in range(90)]
    for n in range(12):
        driver.send(sent, pair=n % pairs)
        assert received(driver, len(sent)) == sent
    driver.set_mac(b"\x02\0\0\0\0\1")
    assert device.mac == "02:00:00:00:00:01"
    for nonsense in (b"", b"\0\0", b"\xff\xff", bytes([pairs + 1, 0])):
        with fails(errno.EINVAL):
            driver.control(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, nonsense)
    seen: list[bool] = []
    driver.on_change = lambda: seen.append(driver.link)
    driver.addresses.add(IPv4Address("10.0.0.2"))
    device.link = False
    assert wait_until(lambda: seen == [False])
    device.link = True
    assert wait_until(lambda: seen == [False, True])
    # It asks for an announcement then, and gets it: the frame comes back here.
    assert received(driver, 1) == [gratuitous_arp(driver.mac, IPv4Address("10.0.0.2"))]
    assert wait_until(lambda: not device.announce)


def test_addresses_are_announced_when_the_device_asks(attached: Attached) -> None:
    card = Card()
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    driver.addresses.add(IPv4Address("10.0.0.2"))
    card.status = int(LinkStatus.LINK_UP | LinkStatus.ANNOUNCE)
    assert wait_until(lambda: card.commands == [b"\3\0"])
    assert wait_until(lambda: card.sent == [(0, bytes(HEADER.size) + gratuitous_arp(MAC, IPv4Address("10.0.0.2")))])
    assert card.sent[0][1][HEADER.size :][:14] == b"\xff" * 6 + MAC + b"\x08\x06"


def test_what_is_under_way_ends_when_the_device_goes(attached: Attached) -> None:
    card = Card()
    card.reading = False
    bus, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    failed: list[int] = []
    driver.on_failed = lambda error: failed.append(error.errno)
    batches = [driver.send([frame(n)] * 100) for n in range(10)]
    ended: list[DriverError] = []

    def read() -> None:
        try:
            driver.recv()
        except DriverError as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    bus.unplug("net0", surprise=True)
    for batch in batches:
        with fails(errno.ENODEV):
            batch.result(10)
    reader.join(20)
    assert [error.errno for error in ended] == [errno.ENODEV]
    assert wait_until(lambda: failed == [errno.ENODEV])
    with fails(errno.ENODEV):
        driver.send([frame()])
    with fails(errno.ENODEV):
        driver.recv()


def test_more_than_the_ring_takes_waits_in_order(attached: Attached) -> None:
    card = Card()
    card.reading = False
    _, remote = attached(net0=card)
    driver = remote.driver("net0", Net)
    batches = [driver.send([frame(n * 100 + m) for m in range(100)]) for n in range(10)]
    card.post(card.read_again)
    assert [batch.result(10) for batch in batches] == [100] * 10
    assert [sent[HEADER.size :] for _, sent in card.sent] == [frame(n) for n in range(1000)]


def test_a_closed_driver_says_so_and_gives_its_buffers_back(attached: Attached) -> None:
    _, remote = attached(net0=Card(echo=True))
    before = remote.connector.arena.in_use
    for _ in range(20):
        driver = remote.driver("net0", Net)
        driver.send([frame(1)])
        assert driver.recv(timeout=10) == [frame(1)]
        driver.close()
        with fails(errno.ESHUTDOWN):
            driver.recv(timeout=10)
    assert remote.connector.arena.in_use == before
