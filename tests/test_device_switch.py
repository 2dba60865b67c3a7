"""A switch between network devices: whoever serves its ports, frames go where a simple model says that they go."""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import vbus
from command import VBUS
from conftest import make_connector, wait_until
from test_containers import FETCH, SERVE, WHY_NOT, Namespace
from test_device_net import TYPE, Raw, checksum, header
from vbus.bus import Bus
from vbus.devices import Net, net_switch
from vbus.devices.net_backends import BACKLOG_FRAMES, LONGEST
from vbus.errors import DriverError, UsageError
from vbus.proxy import Remote
from vbus.virtio.net import ACK_OK, HEADER, ControlClass, Gso, MqCommand, RxCommand

LIMIT = 20
BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")
ENGINES = ("native", "python", "mixed")
MOST, MOST_OF_PORT = 4096, 1024
"""Stations of a switch, and of one port."""


def mac(number: int) -> bytes:
    return b"\x52\x54" + number.to_bytes(4, "big")


def frame(to: bytes, of: bytes, *, tag: int | None = None, fill: int = 0, size: int = 60) -> bytes:
    front = to + of + (b"" if tag is None else struct.pack("!HH", 0x8100, tag)) + TYPE.to_bytes(2, "big")
    return front + bytes([fill]) * (size - len(front))


class Port:
    """A device of the switch, its driver, and what that one received."""

    def __init__(self, net: Net, remote: Remote, name: str, *wanted: str, packed: bool = False) -> None:
        self.net, self.remote, self.name, self.wanted = net, remote, name, wanted
        self.received: list[tuple[bytes, bytes]] = []
        """(header, frame) of each packet, in order."""
        self.begin()

    def begin(self) -> None:
        self.driver = Raw(self.remote.wait_for(self.name, LIMIT), *self.wanted)
        self.posted: list[Future[bytes]] = []

    def post(self, *sizes: int) -> None:
        self.posted += self.driver.post(*sizes)

    def restart(self) -> None:
        self.driver.close()
        self.begin()

    def send(self, *frames: bytes, front: bytes = bytes(12)) -> None:
        futures = [self.driver.queue(1).submit([front, one], 0) for one in frames]
        for future in futures:
            future.result(LIMIT)

    def frames(self) -> list[bytes]:
        """All frames that came until now."""
        while self.posted and self.posted[0].done():
            packet = self.posted[0].result()
            count = int.from_bytes(packet[10:12], "little")
            if not all(future.done() for future in self.posted[:count]):
                break
            packet = b"".join(future.result() for future in self.posted[:count])
            del self.posted[:count]
            self.received.append((packet[: HEADER.size], packet[HEADER.size :]))
        return [one for _, one in self.received]

    def gets(self, *frames: bytes) -> None:
        """These frames come, in this order, and no others until now."""
        wanted = list(frames)
        assert wait_until(lambda: len(self.frames()) >= len(wanted)), (self.frames(), wanted)
        assert self.frames() == wanted
        self.received.clear()


Lan = Callable[..., list[Port]]


@pytest.fixture(params=ENGINES)
def engines(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lan(make_bus: Callable[..., Bus], tmp_path: Path, engines: str) -> Iterator[Lan]:
    """Ports of one switch, with buffers."""
    with contextlib.ExitStack() as stack:

        def make(count: int, *wanted: str, buffers: int = 64, connector: str = "process-direct", **options: Any) -> Any:
            bus = make_bus(workers=2)
            remote = stack.enter_context(vbus.attach(bus.connect(make_connector(connector, tmp_path)).address))
            ports = []
            for n in range(count):
                engine = engines if engines != "mixed" else ("native", "python")[n % 2]
                net = bus.plug(Net("switch:lan", engine=engine, **options), f"net{n}")
                assert bus.slot(f"net{n}").engine == {"python": "python (as it was asked for)"}.get(engine, engine)
                ports.append(Port(net, remote, f"net{n}", *wanted))
                ports[-1].post(*[2048] * buffers)
            return ports

        yield make


def bus_of(port: Port) -> Bus:
    return port.net.bus


# Against a model.


class Model:
    """What a switch does, said in the simplest way."""

    def __init__(self, ports: int) -> None:
        self.up = [True] * ports
        self.isolated = [False] * ports
        self.stations: dict[tuple[bytes, int], int] = {}
        self.counts: list[Counter[str]] = [Counter() for _ in range(ports)]

    def send(self, port: int, one: bytes) -> list[int]:
        """Which ports get a frame of this one."""
        counts = self.counts[port]
        if len(one) < 14:
            counts["tx_errors"] += 1
            return []
        if not self.up[port]:
            counts["tx_dropped"] += 1
            return []
        tag = int.from_bytes(one[14:16].ljust(2, b"\0"), "big") % 4096 if one[12:14] == b"\x81\0" else 0
        to, of = (one[:6], tag), (one[6:12], tag)
        if not one[6] & 1 and any(one[6:12]) and self.stations.get(of) != port:
            counts["learned"] += 1
            counts["moved"] += of in self.stations
            self.stations[of] = port
        to_all = bool(one[0] & 1) or to not in self.stations
        counts["flooded"] += to_all
        targets = [other for other in range(len(self.up)) if to_all or self.stations[to] == other]
        targets = [
            other
            for other in targets
            if other != port and self.up[other] and not (self.isolated[port] and self.isolated[other])
        ]
        counts["tx_packets" if targets or to_all else "tx_dropped"] += 1
        for target in targets:
            self.counts[target]["rx_packets"] += 1
        return targets

    def forget(self, port: int) -> None:
        self.stations = {station: at for station, at in self.stations.items() if at != port}


COUNTED = ("tx_packets", "tx_dropped", "tx_errors", "rx_packets", "flooded", "learned", "moved")


@pytest.mark.parametrize("connector", ["process-direct", "process-tunnelled", "stream-unix"])
@pytest.mark.parametrize("seed", range(2))
def test_frames_go_where_a_model_says(lan: Lan, connector: str, seed: int) -> None:
    rng = random.Random(f"{connector} {seed}")
    ports = lan(4, "MRG_RXBUF", connector=connector)
    model = Model(4)
    macs = [mac(n) for n in range(7)]
    for step in range(150):
        at = rng.randrange(4)
        port = ports[at]
        match rng.choice(["send"] * 8 + ["link", "isolate", "restart"]):
            case "send":
                frames = []
                for _ in range(rng.choice([1, 1, 4, 40])):
                    to = rng.choice([*macs, *macs, BROADCAST, GROUP])
                    of = rng.choice([macs[at], macs[at], macs[at], rng.choice(macs), BROADCAST, bytes(6)])
                    tag = rng.choice([None, None, None, 5, 0xE005, 0])
                    size = rng.choice([16, 60, 60, 300, 1500, 5000])
                    one = frame(to, of, tag=tag, fill=rng.randrange(256), size=size)
                    one = one[: rng.choice([size, size, size, 15])]
                    frames.append(one[:13] if rng.random() < 0.05 else one)
                wanted: list[list[bytes]] = [[] for _ in ports]
                for one in frames:
                    for target in model.send(at, one):
                        wanted[target].append(one)
                port.send(*frames)
                for other, own in zip(ports, wanted, strict=True):
                    other.gets(*own)
            case "link":
                port.net.link = model.up[at] = not model.up[at]
                if not model.up[at]:
                    model.forget(at)
            case "isolate":
                port.net.isolated = model.isolated[at] = not model.isolated[at]
            case "restart":
                port.restart()
                model.forget(at)
        for other in ports:
            other.post(*[2048] * (128 - len(other.posted)))
        known = Counter(model.stations.values())
        for n, other in enumerate(ports):
            counts = {name: getattr(other.net, name) for name in COUNTED}
            assert counts == {name: model.counts[n][name] for name in COUNTED}, (step, n)
            assert other.net.stations == known[n]
    assert not any(bus_of(port).slot(port.name).violations for port in ports)
    assert all(port.net.rx_dropped == 0 for port in ports)


def test_a_station_that_is_silent_is_known_no_more(
    make_bus: Callable[..., Bus], lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(net_switch, "AGEING", 0.05)
    a, b, c = lan(3)
    a.send(frame(BROADCAST, mac(1)))
    b.gets(frame(BROADCAST, mac(1)))
    c.gets(frame(BROADCAST, mac(1)))

    def flooded() -> bool:
        b.send(frame(mac(1), mac(2)))
        a.frames()
        return bool(c.frames())

    assert wait_until(flooded)


# Hostile drivers.


def test_a_driver_that_makes_up_addresses_takes_no_place_from_others(lan: Lan) -> None:
    ports = lan(6, buffers=0, flood_limit=net_switch.MAX_FLOOD_LIMIT)
    for port in ports:
        # What comes for it is dropped before it is kept.
        port.driver.close()
    hostile = ports[:5]
    for n, port in enumerate(hostile):
        port.begin()
        port.send(*[frame(mac(99_000_000), mac(n * 10_000 + number)) for number in range(1500)])
        wanted = min(MOST_OF_PORT, MOST - n * MOST_OF_PORT)
        assert (port.net.learned, port.net.stations) == (wanted, wanted)
        assert (port.net.tx_packets, port.net.flooded) == (1500, 1500)
    # Nobody has any place left: what is not known is flooded.
    last, first = ports[5], ports[0]
    last.begin()
    last.send(frame(mac(0), mac(77_000_000)))
    assert (last.net.learned, last.net.flooded) == (0, 0)
    first.post(100)
    first.send(frame(mac(77_000_000), mac(0)))
    assert first.net.flooded == 1501
    # One that leaves makes room.
    hostile[4].driver.close()
    hostile[3].driver.close()
    assert hostile[3].net.stations == 0
    last.send(frame(mac(0), mac(77_000_000)))
    assert (last.net.learned, last.net.stations) == (1, 1)


def test_an_address_that_moves_to_and_fro_is_where_it_was_last(lan: Lan) -> None:
    a, b, c = lan(3)
    for n in range(50):
        for one, other in ((a, b), (b, a)):
            one.send(frame(mac(9), mac(1), fill=n))
            other.gets(frame(mac(9), mac(1), fill=n))
            c.gets(frame(mac(9), mac(1), fill=n))
            c.send(frame(mac(1), mac(3), fill=n))
            one.gets(frame(mac(1), mac(3), fill=n))
            other.post(2048)
            one.post(2048)
        c.post(2048, 2048)
    assert (a.net.moved, b.net.moved, a.net.learned, c.net.learned) == (49, 50, 50, 1)


def test_the_shortest_and_the_longest_frame(lan: Lan) -> None:
    a, b = lan(2, "MRG_RXBUF", buffers=128)
    shortest, longest = frame(BROADCAST, mac(1), size=14), frame(BROADCAST, mac(1), size=LONGEST)
    a.send(shortest, longest, bytes(LONGEST + 1), b"")
    b.gets(shortest, longest)
    assert (a.net.tx_packets, a.net.tx_too_long, a.net.tx_too_short) == (2, 1, 1)


def test_whoever_breaks_a_rule_does_it_alone(lan: Lan) -> None:
    a, b, c = lan(3, buffers=8)
    bus = bus_of(a)
    # A buffer that has no room for a header is found by whoever has a frame for it.
    b.driver.close()
    b.begin()
    b.post(11)
    a.send(frame(BROADCAST, mac(1)))
    assert wait_until(lambda: bus.slot("net1").violations["rx-buffer-too-small"] == 1)
    with pytest.raises(DriverError):
        b.posted[0].result(LIMIT)
    c.gets(frame(BROADCAST, mac(1)))
    # So is a frame without a whole header by itself.
    with pytest.raises(DriverError):
        c.driver.queue(1).submit([bytes(11)], 0).result(LIMIT)
    assert wait_until(lambda: bus.slot("net2").violations["tx-header-short"] == 1)
    assert not bus.slot("net0").violations
    for port in (b, c):
        port.restart()
        port.post(100)
    a.send(frame(BROADCAST, mac(1), fill=7))
    b.gets(frame(BROADCAST, mac(1), fill=7))
    c.gets(frame(BROADCAST, mac(1), fill=7))


def test_a_driver_without_buffers_holds_up_nobody(lan: Lan) -> None:
    a, b, c = lan(3, buffers=0)
    sent = [frame(BROADCAST, mac(1), fill=n % 256) for n in range(BACKLOG_FRAMES + 100)]
    bus_of(a).set("net0", "flood_limit", "1000000")
    for start in range(0, len(sent), 100):
        a.send(*sent[start : start + 100])
        c.post(*[100] * len(sent[start : start + 100]))
        c.gets(*sent[start : start + 100])
    assert wait_until(lambda: b.net.rx_dropped == 100)
    assert (a.net.tx_packets, c.net.rx_dropped) == (len(sent), 0)
    b.post(*[100] * 100)
    b.gets(*sent[:100])
    # What waits for a link that goes down is lost, and so is what waits for a driver that leaves.
    b.net.link = False
    assert b.net.rx_dropped == 100 + BACKLOG_FRAMES - 100
    b.net.link = True
    a.send(*sent[:5])
    assert wait_until(lambda: c.net.rx_packets + 5 == a.net.tx_packets)
    b.restart()
    b.post(100)
    a.send(sent[7])
    b.gets(sent[7])
    assert b.net.rx_dropped == 100 + BACKLOG_FRAMES - 100 + 5


def test_floods_are_limited_and_what_is_known_is_not(lan: Lan) -> None:
    a, b, c = lan(3, buffers=128)
    b.send(frame(BROADCAST, mac(2)))
    a.gets(frame(BROADCAST, mac(2)))
    c.gets(frame(BROADCAST, mac(2)))
    a.net.flood_limit = 10
    a.send(*[frame(BROADCAST, mac(1), fill=n) for n in range(100)])
    known = [frame(mac(2), mac(1), fill=n) for n in range(100)]
    flooded, dropped = a.net.flooded, a.net.flood_dropped
    assert flooded + dropped == 100
    assert dropped > 0 < flooded
    assert (a.net.tx_packets, a.net.tx_dropped) == (flooded, dropped)
    assert wait_until(lambda: len(b.frames()) == len(c.frames()) == flooded)
    b.received.clear()
    b.post(*[100] * 100)
    a.send(*known)
    b.gets(*known)
    assert a.net.flood_dropped == dropped


# Who talks with whom.


def test_isolated_ports_talk_with_others_alone(lan: Lan) -> None:
    a, b, c = lan(3)
    bus = bus_of(a)
    bus.set("net0", "isolated", "on")
    bus.set("net1", "isolated", "on")
    a.send(frame(BROADCAST, mac(1)))
    c.gets(frame(BROADCAST, mac(1)))
    b.send(frame(BROADCAST, mac(2)))
    c.gets(frame(BROADCAST, mac(2)))
    a.send(frame(mac(2), mac(1)))
    b.send(frame(mac(1), mac(2)))
    assert (a.net.tx_dropped, b.net.tx_dropped) == (1, 1)
    c.send(frame(mac(1), mac(3)), frame(mac(2), mac(3)))
    a.gets(frame(mac(1), mac(3)))
    b.gets(frame(mac(2), mac(3)))
    bus.set("net1", "isolated", "off")
    b.send(frame(mac(1), mac(2)))
    a.gets(frame(mac(1), mac(2)))
    assert bus.show("net0")["attributes"]["isolated"] is True


def test_switches_know_nothing_of_each_other(lan: Lan, make_bus: Callable[..., Bus]) -> None:
    a, b = lan(2)
    other = make_bus("other")
    other.plug(Net("switch:lan"), "net0")
    bus_of(a).plug(Net("switch:wan"), "net9")
    lone = Port(bus_of(a).get("net9", Net), a.remote, "net9")
    lone.post(100)
    a.send(frame(BROADCAST, mac(1)))
    b.gets(frame(BROADCAST, mac(1)))
    lone.send(frame(BROADCAST, mac(4)))
    assert not lone.frames()
    assert not a.frames()
    assert set(net_switch._switches[bus_of(a)]) == {"lan", "wan"}
    bus_of(a).unplug("net9")
    assert set(net_switch._switches[bus_of(a)]) == {"lan"}


def test_a_port_comes_and_goes_and_keeps_its_counts(lan: Lan) -> None:
    a, b = lan(2)
    bus = bus_of(a)
    a.send(frame(BROADCAST, mac(1)))
    b.gets(frame(BROADCAST, mac(1)))
    bus.unplug("net0")
    assert (a.net.flooded, a.net.learned, a.net.tx_packets, a.net.stations) == (1, 1, 1, 0)
    b.send(frame(mac(1), mac(2)))
    assert (b.net.flooded, b.net.tx_packets) == (1, 1)
    bus.plug(a.net, "net0")
    a.begin()
    a.send(frame(mac(2), mac(1)))
    b.gets(frame(mac(2), mac(1)))
    assert (a.net.flooded, a.net.learned, a.net.tx_packets) == (1, 2, 2)
    assert bus.show("net0")["attributes"]["backend"] == "switch:lan"


def test_a_filter_and_a_limit_hold_at_a_port(lan: Lan) -> None:
    a, b = lan(2, "CTRL_VQ", "CTRL_RX", "MAC")
    assert b.driver.command(ControlClass.RX, RxCommand.PROMISC, b"\0") == ACK_OK
    own = b.driver.config.mac
    a.send(frame(mac(9), mac(1)), frame(own, mac(1)))
    b.gets(frame(own, mac(1)))
    assert wait_until(lambda: b.net.rx_filtered == 1)
    # From now on, its model serves it; the buffers that an engine took are not lost.
    for port in (a, b):
        bus_of(a).set(port.name, "limit.iops", "2000")
    more = [frame(own, mac(1), fill=n) for n in range(63)]
    a.send(*more)
    b.gets(*more)
    assert not b.posted


# Work that a driver leaves to others.

GUEST = ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_USO4", "GUEST_USO6")
HOST = ("CSUM", "HOST_TSO4", "HOST_TSO6", "HOST_ECN", "HOST_USO")
SOURCE, TARGET = socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.2")
SOURCE6, TARGET6 = (socket.inet_pton(socket.AF_INET6, text) for text in ("fd00::1", "fd00::2"))


def ethernet(tags: Sequence[int], kind: int) -> bytes:
    return BROADCAST + mac(1) + b"".join(struct.pack("!HH", 0x8100, tag) for tag in tags) + struct.pack("!H", kind)


def transport(protocol: int, payload: bytes, addresses: bytes, *, flags: int = 0x18) -> bytes:
    """TCP or UDP, with the sum that a driver leaves in place of the checksum."""
    if protocol == 6:
        head = struct.pack("!HHIIBBHHH", 1000, 2000, 0xFFFF_FF00, 5, 0x80, flags, 500, 0, 0) + bytes(12)
        at = 16
    else:
        head = struct.pack("!HHHH", 1000, 2000, 8 + len(payload), 0)
        at = 6
    value = checksum(addresses + struct.pack("!II", len(head) + len(payload), protocol))
    return head[:at] + struct.pack("!H", value) + head[at + 2 :] + payload


def packet(
    version: int, protocol: int, payload: bytes, *, tags: Sequence[int] = (), flags: int = 0x18
) -> tuple[bytes, int]:
    """A frame whose checksum is not finished, and where its transport begins."""
    if version == 4:
        front = ethernet(tags, 0x0800)
        body = transport(protocol, payload, SOURCE + TARGET, flags=flags)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0xFFFE, 0x4000, 64, protocol, 0) + SOURCE + TARGET
        head = head[:10] + struct.pack("!H", 0xFFFF - checksum(head)) + head[12:]
    else:
        front = ethernet(tags, 0x86DD)
        body = transport(protocol, payload, SOURCE6 + TARGET6, flags=flags)
        options = bytes([protocol, 0]) + bytes([1, 4, 0, 0, 0, 0])
        head = struct.pack("!IHBB", 6 << 28, 8 + len(body), 0, 64) + SOURCE6 + TARGET6 + options
    return front + head + body, len(front + head)


def check_finished(one: bytes, version: int, protocol: int, start: int, front: int) -> bytes:
    """What a frame carries; everything about it must be right."""
    network = one[front:start]
    if version == 4:
        assert checksum(network) == 0xFFFF
        assert int.from_bytes(network[2:4], "big") == len(one) - front
        addresses = network[12:20]
    else:
        assert int.from_bytes(network[4:6], "big") == len(one) - front - 40
        addresses = network[8:40]
    body = one[start:]
    assert checksum(body, checksum(addresses + struct.pack("!II", len(body), protocol))) == 0xFFFF
    if protocol == 17:
        assert int.from_bytes(body[4:6], "big") == len(body)
    return body[32 if protocol == 6 else 8 :]


@pytest.mark.parametrize("tags", [(), (5,), (7, 5)], ids=["plain", "tagged", "twice"])
@pytest.mark.parametrize("protocol", [6, 17], ids=["tcp", "udp"])
@pytest.mark.parametrize("version", [4, 6])
def test_what_a_driver_leaves_undone_is_done_for_who_does_not_take_it(
    lan: Lan, version: int, protocol: int, tags: Sequence[int]
) -> None:
    a, plain, *_ = lan(2, *HOST, "MRG_RXBUF", buffers=256)
    bus = bus_of(a)
    taking = {}
    for n, wanted in enumerate([("GUEST_CSUM",), GUEST]):
        net = bus.plug(Net("switch:lan", engine=("native", "python")[n]), f"taking{n}")
        taking[n] = Port(net, a.remote, f"taking{n}", *wanted, "MRG_RXBUF")
        taking[n].post(*[2048] * 256)
    payload = random.Random(3).randbytes(40_001)
    offset = 16 if protocol == 6 else 6
    # Short: only the checksum.
    short, start = packet(version, protocol, payload[:501], tags=tags)
    front = header(flags=1, start=start, offset=offset)
    a.send(short, front=front)
    network = 14 + 4 * len(tags)
    for port in (plain, *taking.values()):
        assert wait_until(lambda port=port: len(port.frames()) == 1)  # type: ignore[misc]
        (said, got), port.received[:] = port.received[0], []
        if port is plain:
            assert said[:10] == bytes(10)
            assert check_finished(got, version, protocol, start, network) == payload[:501]
        else:
            assert (said[:10], got) == (front[:10], short)
    # Long: also the segments.
    kind = {6: {4: Gso.TCPV4, 6: Gso.TCPV6}[version], 17: Gso.UDP_L4}[protocol]
    flags = 0x80 | 0x18 | 1
    long, start = packet(version, protocol, payload, tags=tags, flags=flags)
    headers = start + (32 if protocol == 6 else 8)
    front = header(flags=1, gso=kind, size=headers - 1, gso_size=1400, start=start, offset=offset)
    a.send(long, front=front)
    for port in (plain, taking[0]):
        assert wait_until(lambda port=port: len(port.frames()) == 29), len(port.frames())  # type: ignore[misc]
        assert {said[:10] for said, _ in port.received} == {bytes(10)}
        parts = [check_finished(got, version, protocol, start, network) for got in port.frames()]
        assert [len(part) for part in parts] == [1400] * 28 + [801]
        assert b"".join(parts) == payload
        for n, got in enumerate(port.frames()):
            if version == 4:
                assert int.from_bytes(got[network + 4 : network + 6], "big") == (0xFFFE + n) % 0x10000
            if protocol == 6:
                assert int.from_bytes(got[start + 4 : start + 8], "big") == (0xFFFF_FF00 + 1400 * n) % (1 << 32)
                # CWR is of the first, PSH and FIN are of the last.
                assert got[start + 13] == 0x10 | (0x80 if n == 0 else 0) | (0x09 if n == 28 else 0)
    assert wait_until(lambda: len(taking[1].frames()) == 1)
    ((said, got),) = taking[1].received
    assert (said[:10], got) == (header(1, kind, headers, 1400, start, offset)[:10], long)
    assert (a.net.tx_packets, a.net.tx_errors, a.net.flooded) == (2, 0, 2)


def lie(version: int = 4, protocol: int = 6, **fields: int) -> tuple[bytes, bytes]:
    """A frame, and a header that says something else of it."""
    one, start = packet(version, protocol, bytes(3000))
    kind = {6: {4: Gso.TCPV4, 6: Gso.TCPV6}[version], 17: Gso.UDP_L4}[protocol]
    said = {"flags": 1, "gso": kind, "size": 0, "gso_size": 1000, "start": start, "offset": 16 if protocol == 6 else 6}
    return one, header(**(said | fields))


@pytest.mark.parametrize(
    ("one", "front"),
    [
        pytest.param(*lie(gso=Gso.TCPV6), id="not-ipv6"),
        pytest.param(*lie(6, gso=Gso.TCPV4), id="not-ipv4"),
        pytest.param(*lie(gso=Gso.UDP_L4), id="not-udp"),
        pytest.param(*lie(4, 17, gso=Gso.TCPV4), id="not-tcp"),
        pytest.param(*lie(start=30), id="sum-from-elsewhere"),
        pytest.param(*lie(offset=6), id="checksum-elsewhere"),
        pytest.param(*lie(gso_size=1), id="too-many-segments"),
        pytest.param(lie()[0][:60], lie(gso_size=20)[1], id="cut-in-the-header"),
        pytest.param(lie()[0][:66], lie(gso_size=20)[1], id="nothing-to-cut"),
        pytest.param(lie()[0][:46] + b"\x10" + lie()[0][47:], lie()[1], id="header-too-short"),
        pytest.param(lie()[0][:20] + b"\x20\0" + lie()[0][22:], lie()[1], id="a-fragment"),
        pytest.param(lie()[0][:14] + b"\x4f" + lie()[0][15:], lie()[1], id="options-that-are-none"),
        pytest.param(lie(6)[0][:55] + b"\xff" + lie(6)[0][56:], lie(6)[1], id="an-extension-without-end"),
        pytest.param(BROADCAST + mac(1) + b"\x81\0\0\1" * 12, lie()[1][:10] + bytes(2), id="tags-without-end"),
    ],
)
def test_a_header_that_lies_about_segments_reaches_nobody(lan: Lan, one: bytes, front: bytes) -> None:
    a, b = lan(2, *HOST, *GUEST)
    a.send(one, front=front)
    a.send(frame(BROADCAST, mac(1)))
    b.gets(frame(BROADCAST, mac(1)))
    assert (a.net.tx_errors, a.net.tx_packets) == (1, 1)


def test_a_flow_comes_back_on_the_pair_that_it_was_sent_on(
    make_bus: Callable[..., Bus], tmp_path: Path, engines: str
) -> None:
    bus = make_bus(workers=2)
    engine = "native" if engines == "mixed" else engines
    nets = [bus.plug(Net("switch:lan", engine=engine, queue_pairs=n), f"net{n}") for n in (1, 2)]
    with vbus.attach(bus.connect(make_connector("process-direct", tmp_path)).address) as remote:
        one = Raw(remote.device("net1"), "CTRL_VQ")
        two = Raw(remote.device("net2"), "CTRL_VQ", "MQ", queues=5, control=4)
        assert two.command(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, b"\2\0") == ACK_OK
        ours = one.post(*[2048] * 40)
        theirs = [two.post(*[2048] * 40, queue=queue) for queue in (0, 2)]

        def flow(n: int, answer: bool) -> bytes:
            """A datagram of the nth flow, there or back."""
            ends = [(mac(2), TARGET, 3000 + n), (mac(1), SOURCE, 2000)]
            (at, place, port), (to, target, other) = ends[::-1] if answer else ends
            head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + place + target
            return to + at + b"\x08\0" + head + struct.pack("!HHHH", port, other, 8, 0)

        for n in range(20):
            # Whichever pair it is on, its answers come there.
            for pair in (n % 2, 1 - n % 2):
                two.send(flow(n, False), queue=2 * pair + 1)
                assert ours.pop(0).result(LIMIT)[12:] == flow(n, False)
                ours += one.post(2048)
                one.send(flow(n, True))
                assert theirs[pair].pop(0).result(LIMIT)[12:] == flow(n, True)
    assert [net.tx_packets for net in nets] == [40, 40]


# What is said, and what cannot be.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "switch:"}, "it is loopback, switch:NAME"),
        ({"backend": "switch"}, "it is loopback, switch:NAME"),
        ({"backend": "swich:lan"}, "did you mean 'switch'"),
        ({"backend": "switch:a b"}, r"switch 'a b': a name is 1 to 63 of"),
        ({"backend": "switch:" + "x" * 64}, "a name is 1 to 63 of"),
        ({"isolated": True}, r"net: isolated: loopback is no port of a switch \(backend switch:NAME\)"),
        ({"flood_limit": 5}, r"net: flood_limit: loopback is no port of a switch"),
        ({"backend": "switch:lan", "flood_limit": 0}, "flood_limit 0 is out of range: 1 to 1000000 frames a second"),
        ({"backend": "switch:lan", "flood_limit": 1000001}, "out of range"),
    ],
)
def test_what_cannot_be_built(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Net(**options)
    assert "\n" not in str(caught.value)


def test_what_is_no_port_cannot_be_isolated(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus()
    bus.plug(Net(), "net0")
    with pytest.raises(UsageError, match="net0: isolated: loopback is no port of a switch"):
        bus.set("net0", "isolated", "on")
    with pytest.raises(UsageError, match="net0: flood_limit: loopback is no port of a switch"):
        bus.set("net0", "flood_limit", "5")


def test_ports_come_and_go_under_load(lan: Lan) -> None:
    ports = lan(3)
    steady, coming = ports[:2], ports[2]
    over = threading.Event()
    errors: list[BaseException] = []

    def load(port: Port, other: int) -> None:
        try:
            while not over.is_set():
                port.send(*[frame(to, mac(other)) for to in (BROADCAST, mac(1 - other), mac(2), mac(9))] * 8)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(port, n)) for n, port in enumerate(steady)]
    for thread in threads:
        thread.start()
    try:
        for n in range(30):
            coming.send(frame(BROADCAST, mac(2), fill=n))
            if n % 3:
                coming.restart()
                coming.post(*[2048] * 16)
            else:
                bus_of(steady[0]).unplug(coming.name, surprise=n % 2 == 0)
                coming.name = f"again{n}"
                bus_of(steady[0]).plug(coming.net, coming.name)
                coming.begin()
    finally:
        over.set()
        for thread in threads:
            thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors
    assert not any(bus_of(port).slot(port.name).violations for port in ports)


# Two kernels.

NEAR, FAR = "10.78.0.1", "10.78.0.2"


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
@pytest.mark.parametrize("engines", ["native", "python", "mixed"])
def test_two_kernels_talk_through_a_switch(tmp_path: Path, engines: str) -> None:
    kinds = {"mixed": ("native", "python")}.get(engines, (engines, engines))
    devices = "".join(
        f'[device.net{n}]\ntype = "net"\nbackend = "switch:lan"\nengine = "{kind}"\n' for n, kind in enumerate(kinds)
    )
    socket_path = tmp_path / "c.sock"
    (tmp_path / "bus.toml").write_text(
        f'[bus]\nname = "b"\n{devices}[connector.c]\ntype = "process"\nsocket = "{socket_path}"\n'
    )
    with contextlib.ExitStack() as stack:
        outside, near, far = (stack.enter_context(Namespace(tmp_path)) for _ in range(3))
        outside.start(*VBUS, "run", tmp_path / "bus.toml")
        for n, (place, address) in enumerate(((near, NEAR), (far, FAR))):
            words = ("driver", f"process:{socket_path}", f"net{n}", "--tap", "eth0", "--address", f"{address}/24")
            assert "eth0 is up" in place.start(*VBUS, *words)[1]
        for place, target in ((near, FAR), (far, NEAR)):
            assert wait_until(lambda place=place: place.sysfs("carrier") == "1")  # type: ignore[misc]
            place.ping(target, "-s", "3000", count=5)
        content = random.Random(7).randbytes(8 << 20)
        (tmp_path / "file").write_bytes(content)
        wanted = hashlib.sha256(content).hexdigest()
        for server, client, address in ((near, far, NEAR), (far, near, FAR)):
            before = server.link()
            process, line = server.start(sys.executable, "-c", SERVE, address, tmp_path)
            assert line == "ready"
            assert client.run(sys.executable, "-c", FETCH, f"http://{address}:8000/file").strip() == wanted
            server.end(process, signal.SIGTERM)
            after = server.link()
            # Whole segments go from kernel to kernel.
            assert after["tx_bytes"] - before["tx_bytes"] > 3000 * (after["tx_packets"] - before["tx_packets"])
        status, said, _ = outside.vbus("show", "net0")
        assert status == 0
        for text in ("switch:lan", "isolated", "flooded", "learned"):
            assert text in said
