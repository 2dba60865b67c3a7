"""The control API, its socket, and the run directory: who may do what, and what is said to who asks wrongly."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vbus
from conftest import Leftovers, wait_until
from models import Lamp
from vbus import rundir
from vbus.bus import Bus
from vbus.control.api import ENDPOINTS, MAX_BODY, openapi
from vbus.control.client import BusClient, running
from vbus.control.server import Control
from vbus.errors import Error, NoSuchNameError, UsageError
from vbus.rundir import BusDirectory

MIB = 1 << 20


@pytest.fixture
def bus(make_bus: Callable[..., Bus]) -> Bus:
    bus = make_bus("demo")
    bus.plug(vbus.devices.Rng(), "rng0")
    bus.plug(vbus.devices.Blk(memory=MIB), "disk0")
    bus.plug(Lamp(), "lamp")
    bus.connect(vbus.connectors.Process())
    return bus


@pytest.fixture
def client(bus: Bus, runtime_dir: Path) -> Iterator[BusClient]:
    with Control(bus):
        [client] = running()
        yield client
    assert not (runtime_dir / "demo").exists()


def raw(client: BusClient, data: bytes) -> tuple[int, Any]:
    """Send bytes, and read the answer's status and JSON."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(str(client.path))
        sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        return response.status, json.loads(response.read())


def ask(client: BusClient, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Length: {len(body)}\r\n"
    return raw(client, head.encode() + b"\r\n" + (body or b""))


# Calls.


def test_what_a_bus_says_of_itself(client: BusClient, bus: Bus) -> None:
    info = client.info()
    assert (info["name"], info["uuid"], info["pid"]) == ("demo", str(bus.uuid), os.getpid())
    assert client.devices() == bus.describe()
    assert client.stat() == bus.stat()
    assert client.stat("rng0") == [row for row in bus.stat() if row["device"] == "rng0"]
    assert client.connectors() == bus.describe_connectors()
    assert client.show("lamp") == json.loads(json.dumps(bus.show("lamp")))


def test_devices_are_plugged_set_and_unplugged(client: BusClient, bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "x.img").write_bytes(bytes(MIB))
    row = client.plug("blk", "disk1", options={"path": "x.img", "read_only": True}, directory=str(tmp_path), priority=1)
    assert row == bus.describe()[-1]
    assert (row["name"], row["priority"]) == ("disk1", 1)
    assert bus.get("disk1", vbus.devices.Blk).path == str(tmp_path / "x.img")
    assert client.plug("rng")["name"] == "rng1"
    assert client.set("lamp", {"level": "7", "label": "over the table"}) == {"level": 7, "label": "over the table"}
    assert bus.get("lamp", Lamp).level == 7
    assert client.request("PATCH", "/v1/devices/lamp/attributes", {"level": 9}) == {"level": 9}
    assert client.unplug("disk1") == {"bus": "demo", "name": "disk1", "ended": True}
    assert client.unplug("rng1", surprise=True)["ended"]
    assert [row["name"] for row in client.devices()] == ["rng0", "disk0", "lamp"]


def test_connectors_are_made_and_taken_away(client: BusClient, bus: Bus, tmp_path: Path) -> None:
    row = client.connect("stream", "far", options={"listen": "unix:far.sock"}, directory=str(tmp_path))
    assert row == bus.describe_connectors()[-1]
    assert row["address"] == f"unix:{tmp_path}/far.sock"
    with vbus.attach(row["address"]) as remote:
        assert [device.name for device in remote] == ["rng0", "disk0", "lamp"]
        # It may be there before its device.
        row = client.connect("vhost-user", options={"device": "later"})
        assert (row["name"], row["devices"], row["connects"]) == ("vhost-user", ["later"], False)
        assert Path(row["address"].removeprefix("vhost-user:")).is_socket()
        client.disconnect("vhost-user")
        assert not Path(row["address"].removeprefix("vhost-user:")).exists()
        client.disconnect("far")
        assert wait_until(lambda: remote.lost is not None)
    assert not (tmp_path / "far.sock").exists()
    assert [row["name"] for row in client.connectors()] == ["process"]
    for wrong, line in {
        ("strem",): r"no connector type 'strem': did you mean 'stream'\?",
        ("stream", "process"): "options.listen: is missing",
        ("vhost-user", "x", "device=a", "connect=true"): "connect: needs the path of a socket",
        ("vhost-user", "process", "device=a"): "bus demo has a connector 'process' already",
        ("stream", "x", "listen=unix:none/x"): "make the directory",
        ("stream", "x", "lisen=unix:x"): r"options\.lisen: unknown key: did you mean 'listen'\?",
    }.items():
        kind, name, *options = (*wrong, None)[: max(2, len(wrong))]
        pairs = dict(str(option).split("=") for option in options)
        with pytest.raises(UsageError, match=line):
            client.connect(str(kind), name, options=pairs, directory=str(tmp_path))
    with pytest.raises(UsageError, match="directory 'x': write an absolute path"):
        client.connect("stream", options={"listen": "unix:x"}, directory="x")
    with pytest.raises(NoSuchNameError, match=r"bus demo has no connector 'proces': did you mean 'process'\?"):
        client.disconnect("proces")
    assert [row["name"] for row in client.connectors()] == ["process"]


def test_a_mistake_is_the_same_error_on_both_sides(client: BusClient) -> None:
    with pytest.raises(NoSuchNameError, match=r"bus demo has no device 'rgn0': did you mean 'rng0'\?"):
        client.show("rgn0")
    with pytest.raises(NoSuchNameError, match=r"no device type 'blkk': did you mean 'blk'\?"):
        client.plug("blkk")
    with pytest.raises(UsageError, match=r"options\.memry: unknown key: did you mean 'memory'\?"):
        client.plug("blk", options={"memry": "1 MiB"})
    with pytest.raises(UsageError, match="bus demo has a device 'rng0' already: choose another name"):
        client.plug("rng", "rng0")
    with pytest.raises(NoSuchNameError, match=r"has no attribute 'levle': did you mean 'level'\?"):
        client.set("lamp", {"level": "3", "levle": "3"})
    assert client.show("lamp")["attributes"]["level"] == 0
    with pytest.raises(UsageError, match="level: 'bright' is not a whole number"):
        client.set("lamp", {"level": "bright"})
    with pytest.raises(UsageError, match="is no call"):
        client.unplug("../bus")
    with pytest.raises(Error, match="bus x does not answer: No such file or directory"):
        BusClient("x", client.path.with_name("x")).devices()


MISTAKES: list[tuple[str, str, bytes | None, int, str, str]] = [
    ("GET", "/", None, 404, "usage", "GET / is no call: see /openapi.json"),
    ("POST", "/v1/stat", b"", 405, "usage", "POST /v1/stat is no call: see /openapi.json"),
    ("GET", "/v1/devices/none", None, 404, "no-such-name", "bus demo has no device 'none': there is "),
    ("GET", "/v1/stat?dev=x", None, 400, "usage", "unknown 'dev' in the query: there is device"),
    ("DELETE", "/v1/devices/rng0?surprise=yes", None, 400, "usage", "surprise=yes: write true or false"),
    ("POST", "/v1/devices", b"", 400, "usage", "Invalid JSON: EOF while parsing"),
    ("POST", "/v1/devices", b"[]", 400, "usage", "Input should be an object"),
    ("POST", "/v1/devices", b"{}", 400, "usage", "type: Field required"),
    ("POST", "/v1/devices", b'{"type": "rng", "nmae": "x"}', 400, "usage", "nmae: Extra inputs are not permitted"),
    ("POST", "/v1/devices", b'{"type": "rng", "priority": 8}', 400, "usage", "priority: Input should be less than"),
    ("POST", "/v1/devices", b'{"type": "rng", "directory": "x"}', 400, "usage", "directory 'x': write an absolute"),
    ("POST", "/v1/devices", b'{"type": "\xff"}', 400, "usage", "Invalid JSON"),
    ("PATCH", "/v1/devices/lamp/attributes", b"{", 400, "usage", "the body is no JSON: "),
    ("PATCH", "/v1/devices/lamp/attributes", b"{}", 400, "usage", "write an object of attributes and their values"),
    ("PATCH", "/v1/devices/lamp/attributes", b"[" * 60_000, 400, "usage", "the body is no JSON: "),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "kind", "error"), MISTAKES)
def test_what_is_wrong_is_said_in_json(
    client: BusClient, method: str, path: str, body: bytes | None, status: int, kind: str, error: str
) -> None:
    got, problem = ask(client, method, path, body)
    assert (got, problem["kind"]) == (status, kind)
    assert problem["error"].startswith(error)
    assert "\n" not in problem["error"]
    assert len(client.devices()) == 3


def test_the_nearest_name_is_a_key_of_its_own(client: BusClient) -> None:
    assert ask(client, "GET", "/v1/devices/rgn0") == (
        404,
        {
            "error": "bus demo has no device 'rgn0': did you mean 'rng0'?",
            "kind": "no-such-name",
            "did_you_mean": "rng0",
        },
    )


def test_a_body_has_a_limit(client: BusClient) -> None:
    body = b'{"type": "rng", "options": {"x": "' + b"x" * MAX_BODY + b'"}}'
    assert ask(client, "POST", "/v1/devices", body) == (
        413,
        {"error": f"the body has over {MAX_BODY} bytes", "kind": "too-large"},
    )
    # Nor does it help to say nothing of its length.
    chunked = b"POST /v1/devices HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, problem = raw(client, chunked + b"10000\r\n" + b"x" * 0x10000 + b"\r\n1\r\nx\r\n0\r\n\r\n")
    assert (status, problem["kind"]) == (413, "too-large")
    assert len(client.devices()) == 3


def test_what_is_no_http_disturbs_nobody(client: BusClient) -> None:
    for data in (b"\x00" * 100, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, b"\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(30)
            sock.connect(str(client.path))
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass
    assert len(client.devices()) == 3


def test_a_device_that_fails_to_plug_leaves_nothing(client: BusClient, bus: Bus, leftovers: type[Leftovers]) -> None:
    def attempt() -> None:
        with pytest.raises(UsageError, match="disk /nonexistent does not exist"):
            client.plug("blk", "d", options={"path": "/nonexistent"})

    attempt()
    before = leftovers()
    for _ in range(5):
        attempt()
    # Connections are closed by the other side in its own time.
    assert wait_until(lambda: not leftovers().exceeds(before))
    assert len(bus.slots()) == 3


def test_many_ask_at_once(client: BusClient) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                name = f"d{number}-{turn}"
                client.plug("rng", name)
                assert client.show(name)["name"] == name
                client.unplug(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(client.devices()) == 3


# The OpenAPI document.


def test_the_document_describes_what_is_served(client: BusClient) -> None:
    document = client.request("GET", "/openapi.json")
    assert document == json.loads(json.dumps(openapi()))
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, verbs in document["paths"].items() for method in verbs}
    # What goes on and on is served beside the table.
    watch = ("GET", "/v1/channels/{name}/events")
    assert described == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS} | {watch}
    schemas = document["components"]["schemas"]
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(schemas)
    assert {"DeviceRow", "DeviceDetails", "StatRow", "ConnectorRow", "Plug", "Problem"} <= set(schemas)
    for schema in ("DeviceRow", "StatRow"):
        rows = client.devices() if schema == "DeviceRow" else client.stat()
        assert list(schemas[schema]["properties"]) == list(rows[0])


# Who may.


def test_only_the_owner_can_reach_the_socket(client: BusClient) -> None:
    assert stat.S_IMODE(client.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(client.path.parent.stat().st_mode) == 0o700


STRANGER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
sock.connect(sys.argv[1])
sock.sendall(b"GET /v1/bus HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
while part := sock.recv(65536):
    sys.stdout.buffer.write(part)
"""


def test_a_socket_with_open_permissions_still_asks_who_is_there(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="vbus-test-") as folder:
        monkeypatch.setenv("VBUS_RUNTIME_DIR", folder)
        # Root becomes another user; who is not root tells the bus that it belongs to another.
        with Control(bus, owner=None if os.geteuid() == 0 else os.geteuid() + 1):
            [(_, path)] = rundir.running()
            os.chmod(folder, 0o711)
            path.parent.chmod(0o711)
            path.chmod(0o666)
            done = subprocess.run(
                [sys.executable, "-S", "-c", STRANGER, str(path)], capture_output=True, timeout=60, check=False
            )
    assert done.stderr == b""
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 ")
    problem = json.loads(body)
    assert problem["kind"] == "not-allowed"
    assert problem["error"].endswith("may not control this bus: only its owner and root may")


# Beginning and end.


def test_it_leaves_nothing_behind(bus: Bus, runtime_dir: Path, leftovers: type[Leftovers]) -> None:
    def once() -> None:
        with Control(bus):
            assert [client.name for client in running()] == ["demo"]
        assert running() == []
        assert sorted(path.name for path in runtime_dir.iterdir()) == ["sock"]

    once()
    before = leftovers()
    once()
    assert not leftovers().exceeds(before)


def test_clients_that_only_hold_the_line_do_not_hold_the_stop(bus: Bus, runtime_dir: Path) -> None:
    with Control(bus):
        [client] = running()
        idle = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(5)]
        for sock in idle:
            sock.connect(str(client.path))
            sock.sendall(b"GET /v1/bus HTTP/1.1\r\n")
        assert client.info()["name"] == "demo"
    assert not (runtime_dir / "demo").exists()
    for sock in idle:
        sock.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1000) == b""
        sock.close()


# The run directory.


def test_where_buses_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rundir.root() == Path(os.environ["VBUS_RUNTIME_DIR"])
    monkeypatch.delenv("VBUS_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert rundir.root() == Path("/run/vbus")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    os_stat = os.stat

    def owned_by(uid: int) -> Callable[..., os.stat_result]:
        def fake(path: Any, **rest: Any) -> os.stat_result:
            fields = list(os_stat(path, **rest))
            fields[stat.ST_UID] = uid
            return os.stat_result(fields)

        return fake

    monkeypatch.setattr(os, "stat", owned_by(1000))
    assert rundir.root() == tmp_path / "vbus"
    monkeypatch.setattr(os, "stat", owned_by(0))
    assert rundir.root() == Path("/tmp/vbus-1000")
    monkeypatch.setattr(os, "stat", os_stat)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    assert rundir.root() == Path("/tmp/vbus-1000")


def test_one_bus_of_a_name(runtime_dir: Path) -> None:
    with BusDirectory("a") as directory:
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        with pytest.raises(UsageError, match=rf"'a' is running already \(process {os.getpid()}\): end that one, or"):
            BusDirectory("a")
        BusDirectory("b").release()
        directory.release()
        directory.release()
        BusDirectory("a").release()
    assert list(runtime_dir.iterdir()) == []


def test_what_a_dead_bus_left_is_replaced(runtime_dir: Path) -> None:
    code = (
        "import os, signal\nfrom vbus.rundir import BusDirectory\n"
        "directory = BusDirectory('a')\nsock = directory.listen()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert sorted(path.name for path in (runtime_dir / "a").iterdir()) == ["control.sock", "lock"]
    assert list(rundir.running()) == []
    with BusDirectory("a") as directory, directory.listen():
        assert list(rundir.running()) == [("a", directory.control)]
    assert list(runtime_dir.iterdir()) == []


def test_a_lock_is_taken_by_one_of_many(runtime_dir: Path) -> None:
    """Processes that come and go at the same moment: never two at once, and nothing stays."""
    code = (
        "import os, sys\nfrom vbus.errors import UsageError\nfrom vbus.rundir import BusDirectory\n"
        "taken = 0\n"
        "while taken < 25:\n"
        "    try:\n"
        "        directory = BusDirectory('a')\n"
        "    except UsageError:\n"
        "        continue\n"
        "    fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)\n"
        "    taken += 1\n"
        "    os.close(fd)\n"
        "    os.unlink(sys.argv[1])\n"
        "    directory.release()\n"
    )
    inside = runtime_dir / "inside"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(inside)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert list(runtime_dir.iterdir()) == []


def test_directories_that_are_not_ours_are_refused(runtime_dir: Path, tmp_path: Path) -> None:
    (runtime_dir / "a").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"/a is no directory: remove it, or set VBUS_RUNTIME_DIR"):
        BusDirectory("a")
    (runtime_dir / "b").mkdir()
    (runtime_dir / "b").chmod(0o777)
    with pytest.raises(UsageError, match=r"/b can be written by others: chmod go-w .*/b"):
        BusDirectory("b")
    (runtime_dir / "c").mkdir(mode=0o700)
    (runtime_dir / "c" / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"/c/lock: Too many levels of symbolic links"):
        BusDirectory("c")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(UsageError, match="bus 'sock': this name is taken by the directory of the sockets"):
        BusDirectory("sock")
    if os.geteuid() == 0:
        (runtime_dir / "d").mkdir(mode=0o700)
        os.chown(runtime_dir / "d", 65534, 65534)
        with pytest.raises(UsageError, match=r"/d belongs to user 65534: have it removed"):
            BusDirectory("d")


def test_paths_that_are_too_long_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VBUS_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(UsageError, match=r"has \d+ bytes, 107 are the most: use a shorter bus name, or set VBUS_RUN"):
        BusDirectory("a")
    monkeypatch.setenv("VBUS_RUNTIME_DIR", "/proc/nothing/here")
    with pytest.raises(UsageError, match="/proc/nothing/here: No such file or directory; set VBUS_RUNTIME_DIR"):
        rundir.socket_path("a", "b")


def test_default_sockets_are_outside_of_the_bus(runtime_dir: Path) -> None:
    path = rundir.socket_path("demo", "local")
    assert path == runtime_dir / "sock" / "demo-local.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == (0o755 if os.geteuid() == 0 else 0o700)
