"""The console device and its driver: conversations over every backend and every connector, and what holds them back."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import Attached, Leftovers, wait_until
from vbus import virtio
from vbus.bus import Bus
from vbus.devices import Console
from vbus.devices.console import BUDGET
from vbus.errors import DriverError, UsageError
from vbus.proxy import Driver, drivers
from vbus.proxy.drivers import console as console_driver

LIMIT = 20
"""Seconds after which a test that waits has failed."""
MIB = 1 << 20


class Bare(Driver):
    """A driver that does nothing by itself."""

    device_id = virtio.DeviceID.CONSOLE
    features = virtio.console.FEATURES
    queue_count = 2


def connected(device: Console) -> socket.socket:
    """A client of a console on a Unix socket."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT)
    client.connect(device.path)
    assert wait_until(lambda: device.connected)
    return client


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def receive(read: Callable[[int], bytes], size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        part = read(65536)
        assert part, f"ended after {len(got)} bytes"
        got += part
    return bytes(got)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Conversations.


def test_a_conversation_over_a_terminal(attached: Attached) -> None:
    device = Console("pty")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    terminal = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    try:
        console.write(b"login: ", timeout=LIMIT)
        assert os.read(terminal, 100) == b"login: "
        os.write(terminal, b"root\nsecret\n")
        assert console.readline(LIMIT) == b"root\n"
        assert console.readline(LIMIT) == b"secret\n"
        console.write(b"welcome\n", timeout=LIMIT)
        assert os.read(terminal, 100) == b"welcome\n"
    finally:
        os.close(terminal)


def test_a_conversation_over_a_socket(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    for name in (b"first", b"second"):
        with connected(device) as client:
            client.sendall(b"hello, " + name + b" here\n")
            assert console.readline(LIMIT) == b"hello, " + name + b" here\n"
            console.write(b"hello, " + name, timeout=LIMIT)
            assert receive(client.recv, 7 + len(name)) == b"hello, " + name
        assert wait_until(lambda: not device.connected)


def test_output_is_appended_to_a_file(attached: Attached, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"boot 1\n")
    _, remote = attached(console0=Console(f"file:{path}"))
    remote.driver("console0", drivers.Console).write(b"boot 2\n" * 10_000, timeout=LIMIT)
    assert path.read_bytes() == b"boot 1\n" + b"boot 2\n" * 10_000


def test_a_mebibyte_each_way_at_the_same_time(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    bus, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    up, down = os.urandom(MIB), os.urandom(MIB)
    results: dict[str, bytes] = {}
    with connected(device) as client:
        threads = [
            in_thread(lambda: client.sendall(up)),
            in_thread(lambda: results.update(down=receive(client.recv, MIB))),
            in_thread(lambda: console.write(down, timeout=LIMIT)),
        ]
        assert digest(receive(lambda size: console.read(size, LIMIT), MIB)) == digest(up)
        for thread in threads:
            thread.join(LIMIT)
        assert digest(results["down"]) == digest(down)
    transmit = next(row for row in bus.stat() if row["queue"] == "transmit")
    assert transmit["bytes_read"] == MIB
    assert device.dropped == 0


def test_a_mebibyte_each_way_through_a_terminal(attached: Attached) -> None:
    device = Console()
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    up, down = os.urandom(MIB), os.urandom(MIB)
    terminal = os.open(device.path, os.O_RDWR | os.O_NOCTTY)
    try:

        def type_all() -> None:
            rest = memoryview(up)
            while rest:
                rest = rest[os.write(terminal, rest) :]

        typist = in_thread(type_all)
        assert digest(console.read_exactly(MIB, LIMIT)) == digest(up)
        typist.join(LIMIT)
        writer = in_thread(lambda: console.write(down, timeout=LIMIT))
        assert digest(receive(lambda size: os.read(terminal, size), MIB)) == digest(down)
        writer.join(LIMIT)
    finally:
        os.close(terminal)


# Who waits for whom.


def test_what_was_typed_before_a_driver_came_is_not_lost(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    data = os.urandom(MIB)
    with connected(device) as client:
        sender = in_thread(lambda: client.sendall(data))
        console = remote.driver("console0", drivers.Console)
        assert digest(console.read_exactly(MIB, LIMIT)) == digest(data)
        sender.join(LIMIT)


def test_a_reader_that_does_not_read_holds_the_typist_back(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    data = os.urandom(2 * MIB)
    sent = threading.Event()
    with connected(device) as client:

        def send_all() -> None:
            client.sendall(data)
            sent.set()

        sender = in_thread(send_all)
        assert wait_until(lambda: len(console._data) >= console_driver.UNREAD)
        most = console_driver.UNREAD + console_driver.BUFFERS * console_driver.BUFFER
        assert len(console._data) <= most
        assert not sent.is_set()  # sockets hold some hundred KiB; the rest of two MiB is still with the sender
        assert digest(receive(lambda size: console.read(size, LIMIT), len(data))) == digest(data)
        sender.join(LIMIT)


def test_a_client_that_does_not_read_holds_the_driver_back_and_not_the_bus(
    attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    data = os.urandom(4 * MIB)
    step = 32 << 10
    with connected(device) as client:
        futures = [console.queue(1).submit([data[at : at + step]], 0) for at in range(0, len(data), step)]
        futures[0].result(LIMIT)
        alive = threading.Event()
        device.post(alive.set)
        assert alive.wait(LIMIT)
        client.sendall(b"input goes on\n")
        assert console.readline(LIMIT) == b"input goes on\n"
        device.columns = 100
        assert wait_until(lambda: console.window.columns == 100)
        assert not futures[-1].done()  # four MiB are more than the sockets between hold
        write = device._backend.write
        calls: list[int] = []

        def counted(views: Sequence[memoryview]) -> int:
            calls.append(len(views))
            return write(views)

        monkeypatch.setattr(device._backend, "write", counted)
        for _ in range(50):
            passed = threading.Event()
            device.post(passed.set)
            assert passed.wait(LIMIT)
        # The device sleeps: it tries again for what is submitted (128 times), not in every turn (64 times in each).
        assert len(calls) < 500
        assert digest(receive(client.recv, len(data))) == digest(data)
        for future in futures:
            assert future.result(LIMIT) == b""
    assert device.dropped == 0


def test_output_without_a_client_is_dropped_and_counted(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    bus, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    console.write(bytes(100_000), timeout=LIMIT)
    assert device.dropped == 100_000
    assert bus.attributes("console0")["dropped"] == 100_000


def test_a_client_that_leaves_lets_waiting_output_go(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    with connected(device):
        future = console.queue(1).submit([bytes(4 * MIB)] if not console.device.max_request else [bytes(50_000)], 0)
    future.result(LIMIT)
    assert wait_until(lambda: not device.connected)
    console.write(b"after", timeout=LIMIT)
    assert device.dropped >= 5


def test_a_reset_forgets_the_driver_and_not_the_client(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    with connected(device) as client:
        for n in range(10):
            console = remote.driver("console0", drivers.Console)
            stuck = [console.queue(1).submit([bytes(30_000)], 0) for _ in range(20)]
            client.sendall(b"line %d\n" % n)
            assert console.readline(LIMIT) == b"line %d\n" % n
            console.close()
            for future in stuck:
                assert future.exception(LIMIT) is None or isinstance(future.exception(), DriverError)
            assert wait_until(lambda: device._transmitting is None and device._receiving is None)
        client.sendall(b"still the same client\n")
        console = remote.driver("console0", drivers.Console)
        assert console.readline(LIMIT) == b"still the same client\n"


def test_input_is_not_read_into_buffers_of_a_stopped_queue(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    with connected(device) as client:
        console = remote.driver("console0", drivers.Console)
        client.sendall(b"before\n")
        assert console.readline(LIMIT) == b"before\n"
        device.queue("receive").core.stop()  # as a violation of its ring does
        client.sendall(b"after\n")
        looked = threading.Event()
        device.post(device._turn)
        device.post(looked.set)
        assert looked.wait(LIMIT)
        assert remote.driver("console0", drivers.Console).readline(LIMIT) == b"after\n"


def test_more_buffers_than_one_turn_handles_are_all_handled(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    bare = remote.driver("console0", Bare)
    count = BUDGET + 36
    busy, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        busy.set()
        go_on.wait(LIMIT)

    with connected(device) as client:
        device.post(hold)
        assert busy.wait(LIMIT)
        client.sendall(bytes(range(count)) * 10)
        receives = [bare.queue(0).submit([], 10) for _ in range(count)]
        transmits = [bare.queue(1).submit([bytes([n])], 0) for n in range(count)]
        go_on.set()
        assert b"".join(future.result(LIMIT) for future in receives) == bytes(range(count)) * 10
        assert receive(client.recv, count) == bytes(range(count))
        for future in transmits:
            future.result(LIMIT)


def test_pulling_the_console_out_wakes_its_reader(attached: Attached, tmp_path: Path) -> None:
    path = tmp_path / "tty"
    device = Console(f"unix:{path}")
    bus, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    with connected(device) as client:
        client.sendall(b"last words")
        assert wait_until(lambda: len(console._data) == 10)
        bus.unplug("console0", surprise=True)
        assert console.read(4, LIMIT) == b"last"
        assert console.read(timeout=LIMIT) == b" words"
        with pytest.raises(DriverError) as gone:
            console.read(timeout=LIMIT)
        assert gone.value.errno == errno.ENODEV
        with pytest.raises(DriverError) as gone:
            console.write(b"x", timeout=LIMIT)
        assert gone.value.errno == errno.ENODEV
        assert client.recv(1) == b""
    assert not path.exists()


# The driver as a stream.


def test_reading_by_lines_by_ends_and_by_sizes(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    with connected(device) as client:
        client.sendall(b"one\ntwo\n\nlogin> 12345678rest")
        lines = iter(console)
        assert [next(lines), next(lines), next(lines)] == [b"one\n", b"two\n", b"\n"]
        assert console.read_until(b"> ", LIMIT) == b"login> "
        assert console.read_exactly(8, LIMIT) == b"12345678"
        assert console.read_exactly(4, LIMIT) == b"rest"
        assert console.read_exactly(0) == console.read(0) == b""
        with pytest.raises(ValueError, match="nothing"):
            console.read_until(b"")
        client.sendall(b"half a line")
        with pytest.raises(DriverError) as late:
            console.readline(0)
        assert late.value.errno == errno.ETIMEDOUT
        client.sendall(b", and its end\n")
        assert console.readline(LIMIT) == b"half a line, and its end\n"
        assert console.write(b"") == 0


def test_a_line_without_an_end_does_not_take_all_memory(
    attached: Attached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_driver, "LINE", 100_000)
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    with connected(device) as client:
        sender = in_thread(lambda: client.sendall(b"x" * 300_000 + b"\n"))
        with pytest.raises(DriverError) as endless:
            console.readline(LIMIT)
        assert endless.value.errno == errno.EMSGSIZE
        assert console.read_exactly(300_001, LIMIT) == b"x" * 300_000 + b"\n"
        sender.join(LIMIT)


def test_writers_do_not_mix_their_writes(attached: Attached, tmp_path: Path) -> None:
    path = tmp_path / "log"
    _, remote = attached(console0=Console(f"file:{path}"))
    console = remote.driver("console0", drivers.Console)
    size = 40 * console_driver.CHUNK
    threads = [in_thread(lambda n=n: console.write(bytes([n]) * size, timeout=LIMIT)) for n in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.join(LIMIT)
    data = path.read_bytes()
    assert len(data) == 4 * size
    assert all(len(set(data[at : at + size])) == 1 for at in range(0, len(data), size))


# Configuration.


def test_the_window_follows_its_attributes(attached: Attached) -> None:
    bus, remote = attached(console0=Console(columns=132, rows=50))
    console = remote.driver("console0", drivers.Console)
    assert console.window == (132, 50)
    assert bus.set("console0", "rows", "43") == 43
    assert wait_until(lambda: console.window == (132, 43))
    with pytest.raises(UsageError, match="rows"):
        bus.set("console0", "rows", "65536")
    with pytest.raises(UsageError, match="cannot be set"):
        bus.set("console0", "path", "/tmp/elsewhere")
    assert {"SIZE", "EMERG_WRITE"} <= set(bus.describe()[0]["features"]["negotiated"])
    assert "MULTIPORT" not in bus.describe()[0]["features"]["available"]


def test_an_emergency_write_shows_one_character(attached: Attached, tmp_path: Path) -> None:
    device = Console(f"unix:{tmp_path / 'tty'}")
    _, remote = attached(console0=device)
    console = remote.driver("console0", drivers.Console)
    with connected(device) as client:
        for character in b"panic!":
            console.emergency_write(character)
        assert receive(client.recv, 6) == b"panic!"
    with pytest.raises(DriverError):
        console.device.write_config(0, b"\1\0")
    assert device.columns == 80


def test_a_receive_buffer_without_room_is_the_drivers_violation(attached: Attached) -> None:
    bus, remote = attached(console0=Console(), other=Console())
    bare = remote.driver("console0", Bare)
    future = bare.queue(0).submit([b"no room"], 0)
    with pytest.raises(DriverError) as broken:
        future.result(LIMIT)
    assert broken.value.errno == errno.EIO
    assert bus.describe()[0]["violations"] == {"console-no-room": 1}
    assert bus.describe()[1]["violations"] == {}
    remote.driver("console0", drivers.Console).write(b"fine again", timeout=LIMIT)


@pytest.mark.parametrize("options", [{"columns": 65536}, {"rows": -1}, {"backend": "tty"}])
def test_options_that_make_no_console_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Console(**options)  # type: ignore[arg-type]


def test_a_backend_that_cannot_be_opened_leaves_nothing_behind(tmp_path: Path, leftovers: type[Leftovers]) -> None:
    with Bus("test") as bus:
        bus.plug(Console(), "console0")
        before = leftovers()
        with pytest.raises(UsageError, match="missing"):
            bus.plug(Console(f"unix:{tmp_path}/missing/tty"), "console1")
        assert [slot.name for slot in bus.slots()] == ["console0"]
        for _ in range(5):
            bus.plug(Console(f"unix:{tmp_path}/tty"), "console1")
            bus.unplug("console1")
        assert not leftovers().exceeds(before)
