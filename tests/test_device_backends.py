"""The byte streams behind a console, buffer lists and sizes: everything of the devices that needs no bus."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vbus.devices import buffers
from vbus.devices.backends import Backend, File, Pty, Stdio, UnixSocket, make_backend
from vbus.errors import UsageError
from vbus.units import LARGEST, format_size, parse_size

LOG = logging.getLogger("test")
LIMIT = 10
"""Seconds after which a test that waits has failed."""


@contextlib.contextmanager
def opened(backend: Backend) -> Iterator[Backend]:
    backend.open(LOG)
    try:
        yield backend
    finally:
        backend.close()


def woken(backend: Backend) -> None:
    """Wait until the backend asks to be looked at, and look."""
    ready, _, _ = select.select([backend.fileno()], [], [], LIMIT)
    assert ready, "the backend did not wake its owner"
    backend.wake()


def read(backend: Backend, size: int = 4096) -> bytes:
    """What there is to read now."""
    buffer = bytearray(size)
    return bytes(buffer[: backend.read_into([memoryview(buffer)])])


def read_some(backend: Backend) -> bytes:
    """Wait for input."""
    while not (data := read(backend)):
        woken(backend)
    return data


def write(backend: Backend, data: bytes) -> int:
    return backend.write([memoryview(data)])


def write_all(backend: Backend, data: bytes) -> None:
    rest = [memoryview(data)]
    while rest:
        count = backend.write(rest)
        rest = buffers.skip(rest, count)
        if not count:
            woken(backend)


def connected(backend: Backend) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(LIMIT)
    client.connect(backend.path)
    return client


def collect(receive: Callable[[int], bytes], size: int) -> tuple[threading.Thread, bytearray]:
    """A thread that receives `size` bytes."""
    got = bytearray()

    def run() -> None:
        while len(got) < size:
            got.extend(receive(65536))

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


# The pseudo-terminal.


def test_a_pty_talks_both_ways_and_is_raw() -> None:
    with opened(Pty()) as backend:
        terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
        try:
            assert backend.connected
            assert write(backend, b"hello\n") == 6
            assert os.read(terminal, 100) == b"hello\n"  # no carriage return is added
            os.write(terminal, b"typed\x03\r")
            assert read_some(backend) == b"typed\x03\r"
            assert not termios.tcgetattr(terminal)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        finally:
            os.close(terminal)


def test_output_for_a_pty_that_nobody_opened_is_dropped_and_counted() -> None:
    with opened(Pty()) as backend:
        assert not backend.connected
        assert write(backend, b"x" * 1000) == 1000
        assert backend.dropped == 1000
        terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
        assert write(backend, b"now") == 3
        assert os.read(terminal, 100) == b"now"
        os.close(terminal)
        assert not backend.connected
        assert write(backend, b"gone") == 4
        assert backend.dropped == 1004
        assert read(backend) == b""


def test_a_full_pty_takes_no_more_and_wakes_its_owner_when_it_is_read() -> None:
    data = os.urandom(200_000)
    with opened(Pty()) as backend:
        terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
        sent = 0
        while count := write(backend, data[sent : sent + 1000]):
            sent += count
        assert sent < len(data)
        backend.wake()
        thread, got = collect(lambda size: os.read(terminal, size), len(data))
        write_all(backend, data[sent:])
        thread.join(LIMIT)
        os.close(terminal)
        assert bytes(got) == data
        assert backend.dropped == 0


def test_a_terminal_that_closes_while_output_waits_lets_it_be_dropped() -> None:
    with opened(Pty()) as backend:
        terminal = os.open(backend.path, os.O_RDWR | os.O_NOCTTY)
        while write(backend, b"y" * 1000):
            pass
        backend.wake()
        os.close(terminal)
        woken(backend)
        assert write(backend, b"late") == 4
        assert backend.dropped == 4


# The Unix socket.


def test_a_socket_serves_one_client_after_the_other(tmp_path: Path) -> None:
    with opened(UnixSocket(str(tmp_path / "c"))) as backend:
        assert stat.S_IMODE(os.stat(backend.path).st_mode) == 0o600
        assert write(backend, b"nobody") == 6
        assert backend.dropped == 6
        with connected(backend) as first:
            woken(backend)
            assert write(backend, b"to the first") == 12
            assert first.recv(100) == b"to the first"
            first.sendall(b"one")
            with connected(backend) as second:
                second.sendall(b"two")
                assert read_some(backend) == b"one"
                backend.wake()
                assert read(backend) == b""  # the second waits for its turn
                first.close()
                assert read_some(backend) == b"two"
                assert write(backend, b"to the second") == 13
                assert second.recv(100) == b"to the second"
        assert backend.dropped == 6


def test_a_client_that_has_connected_hears_what_is_said_before_its_turn_comes(tmp_path: Path) -> None:
    with opened(UnixSocket(str(tmp_path / "c"))) as backend, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(LIMIT)
        client.connect(backend.path)
        assert write(backend, b"login: ") == 7
        assert backend.dropped == 0
        assert client.recv(100) == b"login: "


def test_what_a_client_sent_before_it_left_is_not_lost(tmp_path: Path) -> None:
    data = os.urandom(50_000)
    with opened(UnixSocket(str(tmp_path / "c"))) as backend:
        with connected(backend) as client:
            client.sendall(data)
        woken(backend)
        backend.wake()
        assert not backend.connected
        assert write(backend, b"gone") == 4
        with connected(backend) as second:
            second.sendall(b"|second")
            got = b""
            while len(got) < len(data) + 7:
                got += read_some(backend)
            assert got == data + b"|second"
            assert write(backend, b"hi") == 2
            assert second.recv(10) == b"hi"


def test_a_client_that_comes_and_goes_unheard_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    with opened(UnixSocket(str(tmp_path / "c"))) as backend:
        connected(backend).close()
        with connected(backend) as second:
            woken(backend)  # the first is served
            woken(backend)  # it is found to be gone, though nobody reads, and the second is served
            woken(backend)  # which takes output
            assert write(backend, b"hi") == 2
            assert second.recv(10) == b"hi"


def test_a_client_that_ends_its_sending_still_gets_output(tmp_path: Path) -> None:
    with opened(UnixSocket(str(tmp_path / "c"))) as backend, connected(backend) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        woken(backend)
        assert read_some(backend) == b"question"
        assert read(backend) == b""
        assert write(backend, b"answer") == 6
        assert client.recv(100) == b"answer"
        client.close()
        woken(backend)
        assert not backend.connected


def test_a_slow_client_holds_output_back(tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    with opened(UnixSocket(str(tmp_path / "c"))) as backend, connected(backend) as client:
        woken(backend)
        sent = 0
        while count := write(backend, data[sent : sent + 10_000]):
            sent += count
        assert sent < len(data)
        backend.wake()
        thread, got = collect(client.recv, len(data))
        write_all(backend, data[sent:])
        thread.join(LIMIT)
        assert bytes(got) == data
        assert backend.dropped == 0


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    with opened(UnixSocket(str(path))):
        with pytest.raises(UsageError, match="in use"):
            UnixSocket(str(path)).open(LOG)
        assert path.exists()
    assert not path.exists()


def test_a_socket_does_not_replace_or_remove_what_is_not_its_own(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("precious")
    with pytest.raises(UsageError, match="is no socket"):
        UnixSocket(str(path)).open(LOG)
    assert path.read_text() == "precious"
    path.unlink()
    with opened(UnixSocket(str(path))):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_backends_leave_no_descriptor_behind(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with opened(Pty()) as backend:
            write(backend, b"x")
        with opened(UnixSocket(str(tmp_path / "c"))) as backend, connected(backend):
            woken(backend)
        with opened(File(str(tmp_path / "f"))) as backend:
            write(backend, b"x")
        with pytest.raises(UsageError):
            UnixSocket(str(tmp_path / "missing" / "c")).open(LOG)
        with pytest.raises(UsageError):
            File(str(tmp_path / "missing" / "f")).open(LOG)
    assert sorted(os.listdir("/proc/self/fd")) == before


# Files and standard input and output.


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"before ")
    with opened(File(str(path))) as backend:
        assert backend.write([memoryview(b"one "), memoryview(b"two")]) == 7
        assert read(backend) == b""
    assert path.read_bytes() == b"before one two"


def test_a_full_disk_drops_output_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with opened(File("/dev/full")) as backend:
        for _ in range(5):
            assert write(backend, b"x" * 10) == 10
        assert backend.dropped == 50
    assert len([record for record in caplog.records if os.strerror(errno.ENOSPC) in record.message]) == 1


def test_stdio_over_pipes_leaves_the_shared_descriptors_blocking() -> None:
    stdin, typing = os.pipe()
    reading, stdout = os.pipe()
    try:
        with opened(Stdio(stdin, stdout)) as backend:
            os.write(typing, b"in")
            assert read_some(backend) == b"in"
            assert write(backend, b"out") == 3
            assert os.read(reading, 10) == b"out"
            with pytest.raises(UsageError, match="another console"):
                Stdio(stdin, stdout).open(LOG)
            while write(backend, b"z" * 4096):  # a full pipe does not block
                pass
            assert os.get_blocking(stdin)
            assert os.get_blocking(stdout)
            os.close(typing)
            typing = -1
            assert read(backend) == b""
            assert write(backend, b"z") == 0  # no more input is not the end of output
        with opened(Stdio(stdin, stdout)):
            pass
    finally:
        for fd in {stdin, typing, reading, stdout} - {-1}:
            os.close(fd)


def test_stdio_over_a_socket_is_blocking_again_at_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with opened(Stdio(ours.fileno(), ours.fileno())) as backend:
            theirs.sendall(b"in")
            assert read_some(backend) == b"in"
            while write(backend, b"z" * 4096):
                pass
        assert os.get_blocking(ours.fileno())


def test_stdio_on_a_terminal_puts_its_mode_back() -> None:
    ours, terminal = os.openpty()
    try:
        before = termios.tcgetattr(terminal)
        assert before[3] & termios.ECHO
        with opened(Stdio(terminal, terminal)) as backend:
            assert not termios.tcgetattr(terminal)[3] & (termios.ECHO | termios.ICANON)
            assert termios.tcgetattr(terminal)[3] & termios.ISIG
            os.write(ours, b"k")
            assert read_some(backend) == b"k"
        assert termios.tcgetattr(terminal) == before
    finally:
        os.close(ours)
        os.close(terminal)


def test_stdio_appends_where_a_redirected_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb", buffering=0) as out, (tmp_path / "in").open("w+b", buffering=0) as source:
        source.write(b"all of it")
        source.seek(0)
        out.write(b"shell: ")
        with opened(Stdio(source.fileno(), out.fileno())) as backend:
            assert read(backend) == b"all of it"
            assert read(backend) == b""
            assert write(backend, b"console") == 7
        out.write(b" shell")
    assert path.read_bytes() == b"shell: console shell"


# What people write.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is pty, stdio, unix:PATH or file:PATH"),
        ("ptty", "did you mean 'pty'"),
        ("unxi:/tmp/x", "did you mean 'unix'"),
        ("pty:0", "it is pty, stdio"),
        ("unix:", "write unix:PATH"),
        ("file:", "write file:PATH"),
        ("unix:/" + "x" * 107, "over 107 bytes"),
    ],
)
def test_a_backend_that_is_none_gets_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_backend(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_kind_of_backend_can_be_written() -> None:
    kinds = [type(make_backend(text)) for text in ("pty", "stdio", "unix:/tmp/c", "file:/tmp/f")]
    assert kinds == [Pty, Stdio, UnixSocket, File]
    assert [str(make_backend(text)) for text in ("pty", "unix:a:b", "file:f")] == ["pty", "unix:a:b", "file:f"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("512", 512),
        ("1KiB", 1024),
        ("64 MiB", 64 << 20),
        (" 2 GiB ", 2 << 30),
        ("7 B", 7),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "64 MB", "64 mib", "1.5 GiB", "-1", "1 2", "9" * 5000, -1, LARGEST + 1, True, "8388608 TiB"]
)
def test_what_is_no_size_gets_one_line_that_names_it(text: int | str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, "memory")
    assert str(caught.value).startswith("memory: ")


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 1536, 64 << 20, 3 << 40, LARGEST])
def test_a_size_that_is_written_is_read_as_the_same(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_the_shortest_way_to_write_a_size() -> None:
    assert [format_size(size) for size in (0, 1536, 65536, 1 << 30)] == ["0 B", "1536 B", "64 KiB", "1 GiB"]


# Lists of buffers.


def parts(*sizes: int) -> tuple[bytearray, list[memoryview]]:
    """A block of 1, 2, 3, ... in pieces of these sizes."""
    block = bytearray((n + 1) % 256 for n in range(sum(sizes)))
    views = []
    at = 0
    for size in sizes:
        views.append(memoryview(block)[at : at + size])
        at += size
    return block, views


@pytest.mark.parametrize("count", range(8))
def test_skip_leaves_the_rest(count: int) -> None:
    block, views = parts(1, 0, 3, 2, 0)
    assert b"".join(buffers.skip(views, count)) == block[count:]
    assert all(len(view) for view in buffers.skip(views, count))


def test_the_last_byte_is_found_in_any_layout() -> None:
    for sizes in [(1,), (5,), (2, 1), (1, 2), (3, 0), (1, 1, 1)]:
        block, views = parts(*sizes)
        rest, last = buffers.split_last(views)
        assert b"".join(rest) == block[:-1]
        last[0] = 200
        assert block[-1] == 200
    with pytest.raises(ValueError, match="no byte"):
        buffers.split_last([memoryview(b"")])


def test_clear_and_scatter_change_what_they_should() -> None:
    block, views = parts(3, 0, 100_000, 5)
    buffers.clear(views[:3])
    assert block[:100_003] == bytes(100_003)
    assert any(block[100_003:])
    buffers.scatter(b"abcdef", views)
    assert block[:8] == b"abcdef\0\0"


def test_move_goes_on_after_short_transfers_and_past_the_limit_of_one_call(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 20)
    block, views = parts(*[2] * 2000, 3000)
    calls = []

    def short(fd: int, views: object, offset: int) -> int:
        assert isinstance(views, list)
        assert len(views) <= buffers.IOV_MAX
        calls.append(offset)
        return os.preadv(fd, [views[0][:700], *(view[:2] for view in views[1:])], offset)

    with path.open("rb") as file:
        rest = buffers.move(short, file.fileno(), views, 10)
    data = path.read_bytes()[10:]
    assert block[: len(data)] == data
    assert sum(map(len, rest)) == len(block) - len(data)
    assert calls[0] == 10
    assert len(calls) > 3
