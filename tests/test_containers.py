"""A container's network: two namespaces, two stacks of the kernel, and between them a bus.

In the one runs a bus with a network device whose backend is a tap, in the other `vbus driver --tap`, whose namespace
has nothing else than that. What passes, and what was lost, is counted by the kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import VBUS
from conftest import Attached, wait_until
from test_driver_net import BASIC, GUEST, Card, frame, header
from vbus.errors import DriverError
from vbus.proxy.drivers import OffloadNet
from vbus.proxy.drivers.net_tap import BATCH, WINDOW, Joined, parse_address
from vbus.virtio.net import HEADER, Gso, LinkStatus

NEAR, FAR = "10.77.0.2", "10.77.0.1"
NET = "vbus.devices.net:Net"


def _why_not() -> str:
    """Why there can be no namespaces and taps here."""
    if os.geteuid() != 0:
        return "namespaces and taps are root's"
    for tool, package in (("ip", "iproute2"), ("ping", "iputils-ping"), ("tc", "iproute2"), ("setpriv", "util-linux")):
        if shutil.which(tool, path=PATH) is None:
            return f"{tool} is missing: install {package}"
    if not Path("/dev/net/tun").exists():
        return "this kernel has no /dev/net/tun"
    return ""


PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
WHY_NOT = _why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
ENVIRONMENT = os.environ | {"PATH": PATH}
_numbers = itertools.count()


class Namespace:
    """A network namespace with nothing but `lo`, and what runs in it; gone at the end."""

    def __init__(self, folder: Path) -> None:
        self.name = f"vb{os.getpid() % 100000}n{next(_numbers)}"
        self.env = ENVIRONMENT | {"VBUS_RUNTIME_DIR": str(folder)}
        self.folder = folder
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Namespace:
        subprocess.run(["ip", "netns", "add", self.name], env=ENVIRONMENT, check=True, timeout=20)
        # Neighbour discovery would be frames that nobody here counts.
        for which in ("all", "default"):
            self.run("sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{which}/disable_ipv6")
        self.run("ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            self.end(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", self.name], env=ENVIRONMENT, check=True, timeout=20)

    def command(self, *words: str | Path) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, words)]

    def run(self, *words: str | Path, check: bool = True, timeout: float = 30) -> str:
        """What a command in here prints."""
        done = subprocess.run(
            self.command(*words), env=self.env, cwd=self.folder, capture_output=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.decode()

    def ping(self, target: str, *options: str, count: int) -> None:
        """Have as many echoes of `target`; none is lost."""
        # With a deadline, ping goes on until so many have come, however late; with another limit it waits for the last
        # as long as two echoes took, and no longer.
        said = self.run("ping", "-n", "-c", str(count), "-i", "0.05", "-w", "20", *options, target)
        assert re.findall(r"icmp_seq=(\d+)", said) == [str(n + 1) for n in range(count)], said

    def vbus(self, *words: str | Path) -> tuple[int, str, str]:
        """Status, output and errors of the command in here."""
        done = subprocess.run(
            self.command(*VBUS, *words), env=self.env, cwd=self.folder, capture_output=True, timeout=30, check=False
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def start(self, *words: str | Path) -> tuple[subprocess.Popen[bytes], str]:
        """A process in here, and its first line."""
        process = subprocess.Popen(
            self.command(*words),
            env=self.env | {"PYTHONUNBUFFERED": "1"},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._running.append(process)
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline().decode().rstrip("\n")
        assert line, process.stderr.read().decode()
        return process, line

    def end(self, process: subprocess.Popen[bytes], number: int | None = None) -> tuple[int, str]:
        """Status and errors of a process that ends by itself, or is told to."""
        if process.poll() is None and number is not None:
            process.send_signal(number)
        try:
            errors = process.communicate(timeout=20)[1]
        except ValueError:  # ended before
            errors = b""
        return process.returncode, errors.decode()

    def interfaces(self) -> list[str]:
        return [str(link["ifname"]) for link in json.loads(self.run("ip", "-j", "link"))]

    def link(self, name: str = "eth0") -> dict[str, int]:
        """The kernel's statistics of an interface."""
        (link,) = json.loads(self.run("ip", "-j", "-s", "link", "show", name))
        stats = link["stats64"]
        return {f"{way}_{key}": int(value) for way in ("rx", "tx") for key, value in stats[way].items()}

    def sysfs(self, what: str) -> str:
        return self.run("cat", f"/sys/class/net/eth0/{what}", check=False).strip()

    def udp(self) -> dict[str, int]:
        """The stack's counters of UDP."""
        lines = [line.split()[1:] for line in self.run("cat", "/proc/net/snmp").splitlines() if line.startswith("Udp:")]
        return dict(zip(lines[0], map(int, lines[1]), strict=True))

    def queued_drops(self) -> int:
        """What was dropped before the interface saw it."""
        return sum(int(row.get("drops", 0)) for row in json.loads(self.run("tc", "-s", "-j", "qdisc", "show")))


class Network:
    """A bus in one namespace, and the driver of its device in another."""

    def __init__(self, folder: Path, kind: str, options: str = "") -> None:
        self.folder = folder
        self.near = Namespace(folder)
        self.far = Namespace(folder)
        self.socket = folder / "c.sock"
        self.address = f"{kind}:{self.socket}"
        connector = f'socket = "{self.socket}"' if kind == "process" else f'listen = "unix:{self.socket}"'
        (folder / "bus.toml").write_text(
            f'[bus]\nname = "b"\n[device.net0]\ntype = "{NET}"\nbackend = "tap:eth0"\n{options}\n'
            f'[connector.c]\ntype = "{"process" if kind == "process" else "stream"}"\n{connector}\n'
        )

    def __enter__(self) -> Network:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.near)
            stack.enter_context(self.far)
            self.bus, _ = self.far.start(*VBUS, "run", self.folder / "bus.toml")
            self.far.run("ip", "link", "set", "eth0", "up")
            self.far.run("ip", "addr", "replace", f"{FAR}/24", "dev", "eth0")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def join(self, *words: str) -> tuple[subprocess.Popen[bytes], str]:
        """The driver, as somebody starts it in a container."""
        return self.near.start(
            *VBUS, "driver", self.address, "net0", "--tap", "eth0", "--address", f"{NEAR}/24", *words
        )

    def set(self, what: str) -> None:
        assert self.far.vbus("set", "net0", what)[0] == 0

    def ping(self) -> None:
        """Both ways."""
        wait_until(lambda: self.near.sysfs("carrier") == "1")
        for place, target in ((self.near, FAR), (self.far, NEAR)):
            place.ping(target, count=5)


class Joint:
    """A device of a test, and a tap of its driver in this very namespace, without any chatter of the kernel."""

    def __init__(self, attached: Attached, card: Card) -> None:
        _, remote = attached(net0=card)
        self.card = card
        self.name = f"vb{os.getpid() % 100000}t{next(_numbers)}"
        self.joined = Joined(remote.driver("net0", OffloadNet), self.name, address=parse_address("10.77.1.2/24"))
        (Path("/proc/sys/net/ipv6/conf") / self.name / "disable_ipv6").write_text("1")

    def __enter__(self) -> Joint:
        return self

    def __exit__(self, *_: object) -> None:
        self.joined.close()
        assert not Path("/sys/class/net", self.name).exists()

    def stat(self, name: str) -> int:
        return int(Path("/sys/class/net", self.name, "statistics", name).read_text())

    def sent(self) -> list[bytes]:
        """The test's frames that the device was given, with their headers."""
        return [raw for _, raw in self.card.sent if raw[HEADER.size + 12 : HEADER.size + 14] == b"\x88\xb5"]


@pytest.fixture(scope="module", params=["process", "unix"])
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A container's network that works."""
    with Network(tmp_path_factory.mktemp("net"), request.param) as network:
        network.driver, network.ready = network.join("--gateway", FAR)  # type: ignore[attr-defined]
        yield network


def test_the_namespace_gets_the_interface_and_nothing_else(network: Network) -> None:
    (address,) = json.loads(network.near.run("ip", "-j", "addr", "show", "eth0"))
    mac = str(address["address"])
    assert network.ready == f"net0: eth0 is up, {mac}, mtu 1500, {NEAR}/24"  # type: ignore[attr-defined]
    assert network.near.interfaces() == ["lo", "eth0"]
    assert [(one["local"], one["prefixlen"]) for one in address["addr_info"]] == [(NEAR, 24)]
    # Whoever looks does not disturb the driver that has it.
    (row,) = json.loads(network.far.vbus("driver", network.address, "net0", "--json")[1])
    assert row["facts"]["mac"] == mac
    assert network.near.run("ip", "route", "show", "default").split()[:3] == ["default", "via", FAR]


def test_ping(network: Network) -> None:
    network.ping()
    network.near.ping(FAR, "-s", "20000", count=3)


FETCH = """
import hashlib, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=20) as answer:
    print(hashlib.file_digest(answer, "sha256").hexdigest())
"""
SERVE = """
import functools, http.server, socketserver, sys
socketserver.TCPServer.allow_reuse_address = True
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
with socketserver.TCPServer((sys.argv[1], 8000), functools.partial(Quiet, directory=sys.argv[2])) as server:
    print("ready", flush=True)
    server.serve_forever()
"""


def test_http_both_ways_with_checksums(network: Network) -> None:
    content = random.Random(7).randbytes(8 << 20)
    (network.folder / "file").write_bytes(content)
    wanted = hashlib.sha256(content).hexdigest()
    for server, client, address in ((network.far, network.near, FAR), (network.near, network.far, NEAR)):
        before = server.link()
        process, line = server.start(sys.executable, "-c", SERVE, address, network.folder)
        assert line == "ready"
        assert client.run(sys.executable, "-c", FETCH, f"http://{address}:8000/file").strip() == wanted
        server.end(process, signal.SIGTERM)
        after = server.link()
        # Whole segments went through: what the interface sent is larger than any frame on a wire.
        sent = after["tx_bytes"] - before["tx_bytes"]
        assert sent > len(content)
        assert sent / (after["tx_packets"] - before["tx_packets"]) > 3000


FLOOD = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.connect((sys.argv[1], 9))
sent = 0
for n in range(int(sys.argv[2])):
    try:
        s.send(n.to_bytes(4, "big") * 250)
        sent += 1
    except OSError:
        pass
print(sent)
"""
SINK = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind((sys.argv[1], 9))
print("ready", flush=True)
while True:
    s.recv(2000)
"""


def test_of_a_flood_nothing_is_lost_uncounted(network: Network) -> None:
    network.ping()
    near, far = network.near, network.far
    for place, other, address in ((near, far, FAR), (far, near, NEAR)):
        # No questions about addresses among what is counted.
        mac = other.sysfs("address")
        place.run("ip", "neigh", "replace", address, "lladdr", mac, "dev", "eth0", "nud", "permanent")
    for sender, taker, address in ((near, far, FAR), (far, near, NEAR)):
        process, line = taker.start(sys.executable, "-c", SINK, address)
        assert line == "ready"
        before = sender.udp(), taker.udp(), sender.link(), taker.link(), sender.queued_drops()
        sent = int(sender.run(sys.executable, "-c", FLOOD, address, "20000"))

        def counted(before: tuple = before, sender: Namespace = sender, taker: Namespace = taker) -> dict[str, int]:  # type: ignore[type-arg]
            udp, link, out = taker.udp(), taker.link(), sender.link()
            return {
                "arrived": udp["InDatagrams"] - before[1]["InDatagrams"],
                "receiver full": udp["InErrors"] - before[1]["InErrors"],
                "dropped coming in": link["rx_dropped"] - before[3]["rx_dropped"],
                "dropped going out": out["tx_dropped"] - before[2]["tx_dropped"],
                "dropped in the queue": sender.queued_drops() - before[4],
            }

        assert wait_until(lambda counted=counted, sent=sent: sum(counted().values()) >= sent, 15), (sent, counted())  # type: ignore[misc]
        numbers = counted()
        assert sum(numbers.values()) == sent == sender.udp()["OutDatagrams"] - before[0]["OutDatagrams"], numbers
        # As many as wait in front of a tap came through at least, if not through the receiver's own queue.
        assert numbers["arrived"] + numbers["receiver full"] > 500
        taker.end(process, signal.SIGTERM)
    # And everything works as before.
    network.ping()


def test_link_and_mtu_are_followed_by_the_kernel(network: Network) -> None:
    near = network.near
    assert wait_until(lambda: near.sysfs("carrier") == "1")
    network.set("link=false")
    assert wait_until(lambda: near.sysfs("carrier") == "0")
    network.set("link=true")
    assert wait_until(lambda: near.sysfs("carrier") == "1")
    network.ping()
    network.set("mac=02:00:00:00:00:07")
    assert wait_until(lambda: near.sysfs("address") == "02:00:00:00:00:07")
    network.far.run("ip", "neigh", "flush", "dev", "eth0", "nud", "all")
    network.ping()
    assert near.sysfs("mtu") == "1500"
    network.set("mtu=1400")
    assert wait_until(lambda: near.sysfs("mtu") == "1400")
    network.ping()
    network.set("mtu=1500")
    assert wait_until(lambda: near.sysfs("mtu") == "1500")


def test_a_header_that_lies_is_the_kernels_to_refuse(attached: Attached) -> None:
    card = Card(*BASIC, *GUEST)
    with Joint(attached, card) as joint:
        before = joint.stat("rx_packets")
        lies = [
            header(flags=1, start=60000, offset=60000),
            header(flags=1, start=0xFFFF, offset=0xFFFF),
            header(flags=1, gso=Gso.TCPV4, start=34, offset=16, size=0),
            header(flags=1, gso=Gso.TCPV6, start=54, offset=16, size=1),
        ]
        for lie in lies:
            card.give_buffers(lie + frame(1))
        card.give_buffers(header() + frame(2))
        assert wait_until(lambda: joint.joined.dropped["refused"] == len(lies))
        assert wait_until(lambda: joint.stat("rx_packets") == before + 1)
        assert not joint.joined.driver.device.needs_reset


def test_a_device_that_takes_nothing_makes_the_kernel_drop_and_count(attached: Attached) -> None:
    card = Card(*BASIC)
    with Joint(attached, card) as joint, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((joint.name, 0))
        raw.send(frame(0))
        assert wait_until(lambda: len(joint.sent()) == 1)
        card.reading = False
        dropped = joint.stat("tx_dropped")
        count = 3000
        for n in range(count):
            raw.send(frame(n, 60))
        queue = joint.joined.driver.queue(1)
        assert wait_until(lambda: queue.outstanding > WINDOW - BATCH)
        assert queue.outstanding <= WINDOW
        lost = joint.stat("tx_dropped") - dropped
        assert lost > 0
        card.post(card.read_again)
        assert wait_until(lambda: len(joint.sent()) == 1 + count - lost)
        assert joint.stat("tx_dropped") - dropped == lost
        # In order, and each with a header that asks for nothing.
        got = joint.sent()[1:]
        numbers = {frame(n): n for n in range(count)}
        assert sorted(got, key=lambda one: numbers[one[HEADER.size :]]) == got
        assert {one[: HEADER.size] for one in got} == {bytes(HEADER.size)}


def test_a_move_is_announced_and_a_closed_interface_counts(attached: Attached) -> None:
    card = Card()
    with Joint(attached, card) as joint:
        card.commands.clear()
        card.status = int(LinkStatus.LINK_UP | LinkStatus.ANNOUNCE)
        assert wait_until(lambda: card.commands == [b"\3\0"])
        arps = [one[HEADER.size :] for _, one in card.sent if one[HEADER.size + 12 : HEADER.size + 14] == b"\x08\x06"]
        assert bytes([10, 77, 1, 2]) in arps[-1]
        subprocess.run(["ip", "link", "set", joint.name, "down"], env=ENVIRONMENT, check=True, timeout=20)
        card.give_buffers(header() + frame(1))
        assert wait_until(lambda: joint.joined.dropped["down"] == 1)
        subprocess.run(["ip", "link", "set", joint.name, "up"], env=ENVIRONMENT, check=True, timeout=20)
        before = joint.stat("rx_packets")
        card.give_buffers(header() + frame(1))
        assert wait_until(lambda: joint.stat("rx_packets") == before + 1)


def test_a_device_that_lies_ends_it(attached: Attached) -> None:
    card = Card()
    with Joint(attached, card) as joint:
        card.give_buffers(header(buffers=0) + frame())
        with pytest.raises(DriverError, match="net-num-buffers"):
            joint.joined.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_well_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    with Network(tmp_path, "process") as network:
        for _ in range(2):
            driver, ready = network.join()
            assert ready.startswith("net0: eth0 is up, ")
            network.ping()
            assert network.near.end(driver, number) == (0, "")
            assert network.near.interfaces() == ["lo"]
        driver, ready = network.join("--json")
        (row,) = json.loads(ready)
        assert list(row) == ["name", "tap", "mac", "mtu", "link", "address"]
        network.near.end(driver, signal.SIGKILL)
        assert network.near.interfaces() == ["lo"]
        driver, _ = network.join()
        network.ping()


@pytest.mark.parametrize("kind", ["process", "unix"])
def test_the_device_or_the_bus_going_ends_it_with_a_line(tmp_path: Path, kind: str) -> None:
    with Network(tmp_path, kind) as network:
        driver, _ = network.join()
        assert network.far.vbus("unplug", "net0")[0] == 0
        assert network.near.end(driver) == (1, "vbus: net0 was removed\n")
        assert network.near.interfaces() == ["lo"]
        assert wait_until(lambda: network.far.interfaces() == ["lo"])
        plugged = network.far.vbus("plug", "net0", "--type", NET, "--backend", "tap:eth0")
        assert plugged[0] == 0, plugged
        driver, _ = network.join()
        if kind == "process":
            assert network.far.end(network.bus, signal.SIGKILL)[0] == -signal.SIGKILL
        else:
            assert network.far.end(network.bus, signal.SIGTERM) == (0, "")
        status, errors = network.near.end(driver)
        assert (status, errors.count("\n")) == (1, 1), errors
        assert re.match(r"vbus: (net0 was removed|the bus is gone)", errors)
        assert network.near.interfaces() == ["lo"]
        assert network.far.interfaces() == ["lo"]


def test_an_interface_that_somebody_takes_away_ends_it_with_a_line(tmp_path: Path) -> None:
    with Network(tmp_path, "process") as network:
        driver, _ = network.join()
        network.near.run("ip", "link", "del", "eth0")
        status, errors = network.near.end(driver)
        assert (status, errors.count("\n")) == (1, 1), errors
        assert errors.startswith("vbus: eth0 is gone")


def test_several_pairs_of_queues(tmp_path: Path) -> None:
    with Network(tmp_path, "process", "queue_pairs = 2") as network:
        network.join()
        assert network.near.run("ls", "/sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
        network.ping()
        test_http_both_ways_with_checksums(network)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with Network(tmp_path, "process") as network:
        near = network.near

        def fails(status: int, *words: str, tap: str = "eth0") -> str:
            got, said, errors = near.vbus("driver", network.address, "net0", "--tap", tap, *words)
            assert (got, said, errors.count("\n")) == (status, "", 1), errors
            assert near.interfaces() == before
            return errors

        before = near.interfaces()
        assert "prefix" in fails(2, "--address", "10.0.0.2")
        assert "10.0.0.2/24" in fails(2, "--address", "10.0.0.256/24")
        assert "not in the network" in fails(2, "--address", "10.0.0.2/24", "--gateway", "10.0.1.1")
        assert "give both" in fails(2, "--gateway", "10.0.1.1")
        assert "10.0.0.1" in fails(2, "--address", "10.0.0.2/24", "--gateway", "gw")
        assert "name" in fails(2, tap="a name that is far too long")
        assert "--read is not for net0" in fails(2, "--read", "1")
        near.run("ip", "link", "add", "name", "bridge0", "type", "bridge")
        before = near.interfaces()
        assert "choose another name" in fails(2, tap="bridge0")
        near.run("ip", "tuntap", "add", "old", "mode", "tap")
        before = near.interfaces()
        assert "old exists" in fails(2, tap="old")
        status, _, errors = near.vbus("driver", network.address, "net0", "--address", f"{NEAR}/24")
        assert (status, errors.count("\n")) == (2, 1)
        assert "--tap" in errors
        weak = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
        done = subprocess.run(
            near.command(*weak, *VBUS, "driver", network.address, "net0", "--tap", "eth0"),
            env=near.env,
            cwd=tmp_path,
            capture_output=True,
            timeout=30,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done.stderr
        assert b"CAP_NET_ADMIN" in done.stderr
        # The device is free, and says what it is like.
        status, said, errors = near.vbus("driver", network.address, "net0", "--json")
        assert (status, errors) == (0, "")
        (row,) = json.loads(said)
        assert row["status"] == []
        assert {key: row["facts"][key] for key in ("mtu", "link", "queue_pairs")} == {
            "mtu": 1500,
            "link": True,
            "queue_pairs": 1,
        }
        status, said, errors = near.vbus("driver", network.address, "net0")
        assert (status, errors) == (0, "")
        assert re.search(r"^  mac +" + str(row["facts"]["mac"]), said, re.MULTILINE)
        network.join()
        before = near.interfaces()
        assert "in use" in fails(1, tap="eth1")
