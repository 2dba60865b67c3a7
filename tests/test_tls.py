"""Streams over TLS: mutual, with an authority that the tests make, and all that can be wrong with a certificate."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vbus
from command import vbus as run
from conftest import Leftovers, wait_until
from models import Echo, EchoDriver
from vbus import config, msg
from vbus.bus import Bus, Connector, Credentials, Members
from vbus.bus.members import NOBODY
from vbus.errors import DriverError, UsageError
from vbus.proxy import Remote

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is missing")


class Authority:
    """A certificate authority in a folder, made with openssl."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.certificate = folder / f"{name}.pem"
        self._signed = 0
        self._key = folder / f"{name}.key"
        self._openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(self._key),
            "-out", str(self.certificate), "-subj", f"/CN={name} authority", "-days", "30",
        )  # fmt: skip

    def _openssl(self, *words: str) -> None:
        subprocess.run(["openssl", *words], cwd=self.folder, check=True, capture_output=True)

    def sign(self, name: str, *, names: str | None = None, ended: bool = False) -> dict[str, Any]:
        """A certificate for `name`; `names` is its subjectAltName, "" for none; `ended`: it was good some time ago."""
        self._signed += 1
        key, request, certificate = (self.folder / f"{self._signed}-{name}.{kind}" for kind in ("key", "csr", "pem"))
        self._openssl(
            "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(key),
            "-out", str(request), "-subj", f"/CN={name}",
        )  # fmt: skip
        alternative = f"DNS:{name}" if names is None else names
        extensions = self.folder / "extensions"
        extensions.write_text(f"subjectAltName={alternative}\n" if alternative else "basicConstraints=CA:FALSE\n")
        (self.folder / "index.txt").write_text("")
        (self.folder / "ca.cnf").write_text(
            f"[ca]\ndefault_ca=d\n[d]\nnew_certs_dir={self.folder}\ndatabase={self.folder}/index.txt\n"
            f"rand_serial=yes\ndefault_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\n"
        )
        dates = ["-startdate", "20200101000000Z", "-enddate", "20210101000000Z"] if ended else ["-days", "30"]
        self._openssl(
            "ca", "-batch", "-notext", "-config", "ca.cnf", "-cert", str(self.certificate), "-keyfile", str(self._key),
            "-in", str(request), "-out", str(certificate), "-extfile", str(extensions), *dates,
        )  # fmt: skip
        return {"certificate": certificate, "key": key, "authority": self.certificate}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that both sides know."""
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another one."""
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


@pytest.fixture(scope="module")
def server(ours: Authority) -> dict[str, Any]:
    return ours.sign("bus.test", names="DNS:bus.test,IP:127.0.0.1")


@pytest.fixture(scope="module")
def alice(ours: Authority) -> dict[str, Any]:
    return ours.sign("alice.test")


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    bus = make_bus(members=["tls:alice.test"])
    bus.plug(Echo(), "echo")
    return bus


@pytest.fixture
def connector(bus: Bus, server: dict[str, Any]) -> Connector:
    return bus.connect(vbus.connectors.Stream("tls:127.0.0.1:0", **server), "far")


def why(connector: Connector) -> str:
    """Why the last peer went."""
    assert wait_until(lambda: connector.describe()["departed"])
    return str(connector.describe()["departed"][-1]["reason"])


def attach(connector: Connector, files: dict[str, Any], **rest: Any) -> Remote:
    return vbus.attach(connector.address, **files, **rest)


def test_a_member_drives_devices_and_is_known_by_its_name(
    bus: Bus, connector: Connector, alice: dict[str, Any]
) -> None:
    with attach(connector, alice) as remote:
        driver = remote.driver("echo", EchoDriver)
        for size in (1, 4096, 65_535, 300_001):
            data = random.Random(size).randbytes(size)
            assert driver.echo(data) == data
        assert bus.describe()[0]["owner"] == "far: tls:alice.test"
        assert [peer["peer"] for peer in connector.describe()["peers"]] == ["far: tls:alice.test"]
        bus.plug(Echo(), "later")
        assert remote.driver(remote.wait_for("later").name, EchoDriver).echo(b"x") == b"x"
        futures = [driver.queue(0).submit([bytes(100_000)], 100_000) for _ in range(50)]
        assert all(future.result(30) == bytes(100_000) for future in futures)
        bus.open_channel("c", memory=4096)
        channel = remote.open_channel("c")
        channel.memory[:4] = b"over"
        channel.send(b"tls")
        event = bus.channel("c").receive(10)
        assert event is not None
        assert (event.data, bytes(event.end.memory[:4])) == (b"tls", b"over")
    bus.set_member("tls:alice.test", "channels", "1")
    with attach(connector, alice) as remote:
        remote.open_channel("c")
        with pytest.raises(DriverError, match=r"tls:alice\.test may have 1 channels"):
            remote.open_channel("d", create=True)


def test_the_server_has_the_name_that_was_asked_for(connector: Connector, alice: dict[str, Any]) -> None:
    with attach(connector, alice, server_name="bus.test") as remote:
        assert remote.bus_name == "test"
    with pytest.raises(DriverError, match="for another name") as refused:
        attach(connector, alice, server_name="other.test")
    assert refused.value.errno == errno.EACCES


def test_a_name_that_is_no_member_is_refused(connector: Connector, ours: Authority) -> None:
    with pytest.raises(DriverError, match=r"tls:mallory\.test is not a member") as refused:
        attach(connector, ours.sign("mallory.test"))
    assert refused.value.errno == errno.EACCES
    assert why(connector) == "is not a member of this bus"


@pytest.mark.parametrize(
    ("name", "names"), [("alice.test", "DNS:other.test"), ("other.test", "DNS:*.test"), ("x", "IP:127.0.0.1")]
)
def test_what_a_certificate_says_beside_its_names_does_not_count(
    connector: Connector, ours: Authority, name: str, names: str
) -> None:
    with pytest.raises(DriverError, match="is not a member"):
        attach(connector, ours.sign(name, names=names))


def test_a_common_name_counts_where_there_is_nothing_else(connector: Connector, ours: Authority) -> None:
    with attach(connector, ours.sign("alice.test", names="")) as remote:
        assert remote.driver("echo", EchoDriver).echo(b"x") == b"x"


def test_a_certificate_of_another_authority_is_refused(
    connector: Connector, ours: Authority, theirs: Authority
) -> None:
    files = theirs.sign("alice.test") | {"authority": ours.certificate}
    with pytest.raises(DriverError, match="does not know the authority") as refused:
        attach(connector, files)
    assert refused.value.errno == errno.EACCES
    assert "signed by an authority that is not the one named here" in why(connector)


def test_a_bus_of_another_authority_is_refused(connector: Connector, alice: dict[str, Any], theirs: Authority) -> None:
    with pytest.raises(DriverError, match="signed by an authority that is not the one named here"):
        attach(connector, alice | {"authority": theirs.certificate})
    assert "does not know the authority" in why(connector)


def test_certificates_that_have_expired_are_refused(
    bus: Bus, connector: Connector, ours: Authority, alice: dict[str, Any]
) -> None:
    with pytest.raises(DriverError, match="says that our certificate has expired"):
        attach(connector, ours.sign("alice.test", ended=True))
    assert why(connector) == "tls: the other side's certificate has expired"
    old = bus.connect(
        vbus.connectors.Stream("tls:127.0.0.1:0", **ours.sign("bus", names="IP:127.0.0.1", ended=True)), "old"
    )
    with pytest.raises(DriverError, match="the other side's certificate has expired"):
        attach(old, alice)


def raw(connector: Connector) -> socket.socket:
    host, _, port = connector.address.removeprefix("tls:").rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def test_no_certificate_at_all_is_refused(connector: Connector, ours: Authority) -> None:
    context = ssl.create_default_context(cafile=str(ours.certificate))
    with (
        raw(connector) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as tls,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        tls.recv(1)
    assert why(connector) == "tls: no certificate was shown"


def test_an_older_tls_is_refused(connector: Connector, ours: Authority, alice: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=str(ours.certificate))
    context.load_cert_chain(alice["certificate"], alice["key"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with raw(connector) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname="127.0.0.1")
    assert "speaks no TLS 1.3" in why(connector)


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.0\r\n\r\n", bytes(100), b"\x16\x03\x01\x00\x05hello", os.urandom(5000)]
)
def test_garbage_is_refused(connector: Connector, alice: dict[str, Any], said: bytes) -> None:
    with raw(connector) as sock:
        sock.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    assert why(connector).startswith("tls: ")
    with attach(connector, alice) as remote:
        assert remote.driver("echo", EchoDriver).echo(b"still") == b"still"


def test_who_says_nothing_delays_nobody(connector: Connector, alice: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(connector)) for _ in range(20)]
        # Half a ClientHello, a byte at a time.
        hello = _client_hello()
        for sock in silent[::2]:
            for byte in hello[: len(hello) // 2]:
                sock.send(bytes([byte]))
        with attach(connector, alice) as remote:
            assert remote.driver("echo", EchoDriver).echo(b"x") == b"x"
            assert len(connector.describe()["peers"]) == 21


def _client_hello() -> bytes:
    ingoing, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ingoing, outgoing, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_hundreds_that_leave_half_way_leave_nothing(
    bus: Bus, connector: Connector, alice: dict[str, Any], leftovers: type[Leftovers]
) -> None:
    attach(connector, alice).close()
    assert wait_until(lambda: connector.describe()["peers"] == [])
    before = leftovers()
    hello = _client_hello()
    for n in range(200):
        # Nobody is surprised when the bus has closed it already.
        with raw(connector) as sock, contextlib.suppress(OSError):
            sock.sendall(hello[: 1 + n * 7 % len(hello)])
            if n % 3 == 0:
                sock.sendall(hello)
    # They take places until the bus has seen them go.
    assert wait_until(lambda: connector.describe()["peers"] == [], 60)
    for _ in range(20):
        attach(connector, alice).close()
    assert wait_until(lambda: connector.describe()["peers"] == [], 20)
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"


def test_a_bus_that_never_answers_is_given_up(alice: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(DriverError) as refused:
            vbus.attach(f"tls:127.0.0.1:{server.getsockname()[1]}", timeout=0.3, **alice)
        assert refused.value.errno == errno.ETIMEDOUT


def test_the_owner_is_no_member_by_that_alone(
    make_bus: Callable[..., Bus], server: dict[str, Any], alice: dict[str, Any]
) -> None:
    bus = make_bus(members=["uid:0", f"uid:{os.getuid()}"])
    connector = bus.connect(vbus.connectors.Stream("tls:127.0.0.1:0", **server))
    with pytest.raises(DriverError, match="is not a member"):
        attach(connector, alice)


def test_members_by_name() -> None:
    members = Members(["tls:alice.test", "uid:5"], owner=3)
    assert members.admits(Credentials(NOBODY, names=("bob.test", "alice.test")))
    assert not members.admits(Credentials(NOBODY, names=("Alice.test", "alice.test.", "")))
    assert not members.admits(Credentials(NOBODY))
    assert Credentials(NOBODY, names=("a", "b")).identities == ["tls:a", "tls:b"]
    assert str(Credentials(NOBODY, names=("a",))) == "tls:a"
    with pytest.raises(UsageError, match="tls:NAME"):
        Members(["tls:"])


def test_files_that_are_none(tmp_path: Path, server: dict[str, Any], alice: dict[str, Any]) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", str(server["key"]), "-aes256", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    for changed, line in (
        ({"key": None}, "key is missing"),
        ({"certificate": tmp_path / "nowhere"}, "No such file"),
        ({"certificate": empty}, "holds no certificate in PEM"),
        ({"key": empty}, "holds no key in PEM"),
        ({"authority": empty}, "holds no certificate in PEM"),
        ({"key": alice["key"]}, "is not that of"),
        ({"key": locked}, "has a password"),
        ({"key": server["key"].read_text()}, "write the path of a file"),
    ):
        files = server | changed
        with pytest.raises(UsageError, match=line) as said:
            vbus.connectors.Stream("tls:127.0.0.1:0", **files)
        assert "\n" not in str(said.value)
        with pytest.raises(UsageError, match=line):
            vbus.attach("tls:127.0.0.1:1", **files)
    with pytest.raises(UsageError, match="are for tls"):
        vbus.connectors.Stream("tcp:127.0.0.1:0", **server)
    with pytest.raises(UsageError, match="are for tls"):
        vbus.attach("unix:x", **alice)
    with pytest.raises(UsageError, match="insecure"):
        vbus.connectors.Stream("tls:127.0.0.1:0", insecure=True, **server)


def test_a_file_and_a_command(
    tmp_path: Path, runtime_dir: Path, server: dict[str, Any], alice: dict[str, Any], ours: Authority
) -> None:
    for name, path in server.items():
        shutil.copyfile(path, tmp_path / name)
    (tmp_path / "far.toml").write_text(
        '[bus]\nmembers = ["tls:alice.test"]\n[device.rng0]\ntype = "rng"\n[connector.far]\ntype = "stream"\n'
        'listen = "tls:127.0.0.1:0"\ncertificate = "certificate"\nkey = "key"\nauthority = "authority"\n'
    )
    bus = config.make(config.load(tmp_path / "far.toml"))
    bus.start()
    try:
        address = bus.connectors["far"].address
        words = ["--cert", str(alice["certificate"]), "--key", str(alice["key"]), "--ca", str(ours.certificate)]
        done = run("driver", address, "rng0", "--read", "16", *words, cwd=tmp_path)
        assert (done.returncode, len(done.stdout)) == (0, 16)
        done = run("driver", address, cwd=tmp_path)
        assert (done.returncode, done.stderr.decode().count("\n")) == (2, 1)
        assert b"certificate is missing" in done.stderr
        mallory = ours.sign("mallory.test")
        words = ["--cert", str(mallory["certificate"]), "--key", str(mallory["key"]), "--ca", str(ours.certificate)]
        done = run("channel", "ls", "--address", address, *words, cwd=tmp_path)
        assert done.returncode == 1
        assert b"tls:mallory.test is not a member" in done.stderr
    finally:
        bus.stop()


def test_a_name_that_is_no_text_lets_nobody_in(bus: Bus, connector: Connector, ours: Authority) -> None:
    # A dNSName of two bytes that are no UTF-8, signed all the same.
    evil = ours.sign("alice.test", names="DER:30:04:82:02:ff:fe")
    for _ in range(2):
        with pytest.raises(DriverError, match="is not a member"):
            attach(connector, evil)
    # By hand: what comes after the refusal is not listened to.
    context = ssl.create_default_context(cafile=str(evil["authority"]))
    context.load_cert_chain(evil["certificate"], evil["key"])
    with raw(connector) as sock, context.wrap_socket(sock, server_hostname="127.0.0.1") as tls:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            tls.sendall(msg.encode(msg.Frame(msg.Hello(1, 65528, 0), token=1)))
        with contextlib.suppress(OSError):
            answer = msg.decode(tls.recv(65536))
            assert isinstance(answer, msg.Frame)
            assert isinstance(answer.body, msg.Error)
    assert wait_until(lambda: connector.describe()["peers"] == [])


def hands_shaken(connector: Connector, files: dict[str, Any]) -> tuple[socket.socket, ssl.SSLObject, ssl.MemoryBIO]:
    """A member's TLS by hand."""
    context = ssl.create_default_context(cafile=str(files["authority"]))
    context.load_cert_chain(files["certificate"], files["key"])
    ingoing, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(ingoing, outgoing, server_hostname="127.0.0.1")
    sock = raw(connector)
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            ingoing.write(sock.recv(65536))
    sock.sendall(outgoing.read())
    return sock, tls, outgoing


def test_nothing_is_kept_behind_the_end(connector: Connector, alice: dict[str, Any]) -> None:
    sock, tls, outgoing = hands_shaken(connector, alice)
    with sock:
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        with contextlib.suppress(OSError):
            sock.sendall(outgoing.read())
            for _ in range(100):
                sock.sendall(bytes(1 << 20))
    assert why(connector) in ("the driver closed the stream", "the stream broke: Connection reset by peer")
    assert wait_until(lambda: connector.describe()["peers"] == [])


def test_a_cipher_keeps_no_garbage(ours: Authority, server: dict[str, Any], alice: dict[str, Any]) -> None:
    from vbus.tls import Tls, client_context, server_context

    here, there = (
        Tls(server_context(**server), server_side=True),
        Tls(client_context(**alice), server_side=False, server_name="bus.test"),
    )
    there.start()
    while not (here.ready and there.ready):
        here.feed(there.wrap([]))
        there.feed(here.wrap([]))
    assert here.feed(there.wrap([b"hello"])) == b"hello"
    with contextlib.suppress(ssl.SSLWantReadError):
        there._tls.unwrap()
    assert here.feed(there._out.read() + bytes(1000)) == b""
    assert here.over
    for _ in range(10):
        assert here.feed(bytes(1 << 16)) == b""
    assert here._in.pending < 1 << 12
