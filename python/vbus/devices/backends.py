"""Byte streams that never wait: the world's side of a console.

A backend is read into, and written from, the driver's own buffers; it keeps no bytes itself. What does not go out now
stays where it is, and what is not asked for stays in the kernel: so a slow reader slows its driver down, and input for
a driver that gives no buffers waits, and nothing is lost on the way. Only where nobody could ever read output (no
terminal on the pty, no client on the socket) it is dropped, and counted.

Each backend owns an epoll descriptor, edge-triggered, which becomes readable whenever reading or writing may go on.
Its owner watches that one descriptor, calls `wake`, and then reads and writes until both say that it is enough for now.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import logging
import os
import select
import socket
import stat
import termios
import tty
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from vbus.devices.buffers import IOV_MAX
from vbus.errors import UsageError

SOCKET_PATH_MAX = 107
"""Bytes of a Unix socket's path."""

_EVENTS = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


class Backend(ABC):
    """A non-blocking stream: at most one descriptor to read from, and one to write to."""

    def __init__(self) -> None:
        self.dropped = 0
        """Bytes of output that nobody was there to take."""
        self.log = logging.getLogger("vbus.device")
        self._epoll: select.epoll | None = None
        self._input = -1
        self._output = -1
        self._told: set[int] = set()

    @property
    @abstractmethod
    def path(self) -> str:
        """Where a person finds the other end; "" where there is no such place."""

    @property
    def connected(self) -> bool:
        """Whether somebody could read what is written now."""
        return self._output >= 0

    @abstractmethod
    def _open(self) -> None:
        """Open what the backend serves. UsageError, or OSError."""

    def open(self, log: logging.Logger) -> None:
        """Begin to serve; `log` hears of what an operator should know. UsageError in one line when it cannot."""
        self.log = log
        self._told.clear()
        self._epoll = select.epoll()
        try:
            self._open()
        except OSError as error:
            self.close()
            raise UsageError(f"console backend {self}: {error.strerror or error}") from None
        except UsageError:
            self.close()
            raise

    def close(self) -> None:
        """Give everything back. A second time does nothing."""
        for fd in {self._input, self._output} - {-1}:
            os.close(fd)
        self._input = self._output = -1
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None

    @property
    def is_open(self) -> bool:
        """Between `open` and `close`."""
        return self._epoll is not None

    def fileno(self) -> int:
        """The descriptor to watch."""
        assert self._epoll is not None, "the backend is not open"
        return self._epoll.fileno()

    def wake(self) -> None:
        """The watched descriptor was readable: look at what happened."""
        if self._epoll is not None:
            for fd, events in self._epoll.poll(0):
                self._happened(fd, events)

    def _seek_reader(self) -> None:  # noqa: B027 - most streams have one or have none
        """There is output and nobody to read it: take whoever may be waiting to."""

    def _happened(self, fd: int, events: int) -> None:  # noqa: B027 - most streams need not know
        """Something happened to a descriptor; reading and writing find out the rest."""

    def _watch(self, fd: int) -> None:
        """Let `fd` wake the owner. A regular file cannot, and need not: it is always ready."""
        assert self._epoll is not None
        with contextlib.suppress(PermissionError):
            self._epoll.register(fd, _EVENTS)

    def read_into(self, buffers: Sequence[memoryview]) -> int:
        """Read what there is into `buffers` (not empty); 0 when there is nothing now, or never will be."""
        if self._input < 0:
            return 0
        try:
            count = os.readv(self._input, buffers[:IOV_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            self._check(error)
            self._input_failed(error)
            return 0
        if count == 0:
            self._input_ended()
        return count

    def write(self, buffers: Sequence[memoryview]) -> int:
        """Write as much of `buffers` (not empty) as goes now; 0 when the other end must read first."""
        total = sum(map(len, buffers))
        if not self.connected:
            self._seek_reader()
        if not self.connected:
            self.dropped += total
            return total
        try:
            return os.writev(self._output, buffers[:IOV_MAX])
        except BlockingIOError:
            return 0
        except OSError as error:
            self._check(error)
            self._output_failed(error)
            self.dropped += total
            return total

    @staticmethod
    def _check(error: OSError) -> None:
        # The buffers are the driver's memory: one that was taken away is not the fault of this stream.
        if error.errno == errno.EFAULT:
            raise error

    def _input_ended(self) -> None:
        """There will be no more input."""
        fd, self._input = self._input, -1
        if fd != self._output:
            os.close(fd)

    def _input_failed(self, error: OSError) -> None:
        self._tell(error, "input ends")
        self._input_ended()

    def _output_failed(self, error: OSError) -> None:
        self._tell(error, "output is dropped")

    def _tell(self, error: OSError, what: str) -> None:
        """Log an error, once of each kind: a driver must not be able to fill the log."""
        if error.errno not in self._told:
            self._told.add(error.errno or 0)
            self.log.warning("%s: %s: %s", self, error.strerror, what)


class Pty(Backend):
    """A pseudo-terminal in raw mode; `path` is what to open (`screen /dev/pts/7`).

    Output while nobody has it open is dropped. Whoever opens it and does not read holds the driver back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._path = ""

    def __str__(self) -> str:
        return "pty"

    @property
    def path(self) -> str:
        """The terminal's device file."""
        return self._path

    @property
    def connected(self) -> bool:
        """Whether a terminal has the pty open."""
        if self._output < 0:
            return False
        poll = select.poll()
        poll.register(self._output, 0)
        return not poll.poll(0)

    def _open(self) -> None:
        ours, theirs = os.openpty()
        self._input = self._output = ours
        try:
            self._path = os.ttyname(theirs)
            tty.setraw(theirs)
        finally:
            # The kernel keeps the mode as long as our end is open, and from this first close on it reports a hang-up
            # whenever nobody has the other end open.
            os.close(theirs)
        os.set_blocking(ours, False)
        self._watch(ours)
        self.log.info("console on %s", self._path)

    def _input_failed(self, error: OSError) -> None:
        if error.errno != errno.EIO:  # EIO: nobody has the terminal open
            super()._input_failed(error)

    def _output_failed(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            super()._output_failed(error)

    def close(self) -> None:
        """Close the terminal: whoever has it open sees a hang-up."""
        super().close()
        self._path = ""


class UnixSocket(Backend):
    """A listening Unix stream socket, mode 0600, that serves one client at a time.

    Further clients wait until the one before has left and what it sent has been read. A client that ends only its own
    sending still gets output.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        if not path:
            raise UsageError("console backend unix: has no path: write unix:PATH")
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise UsageError(f"console backend: {path} is over {SOCKET_PATH_MAX} bytes: use a shorter path")
        self._path = path
        self._listener: socket.socket | None = None
        self._inode = (0, 0)
        self._hung_up = False

    def __str__(self) -> str:
        return f"unix:{self._path}"

    @property
    def path(self) -> str:
        """The socket."""
        return self._path

    def _open(self) -> None:
        self._remove_stale()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # The mode that the socket's file is made with: there is no moment in which others could connect.
        os.fchmod(self._listener.fileno(), 0o600)
        self._listener.bind(self._path)
        status = os.stat(self._path)
        self._inode = (status.st_dev, status.st_ino)
        self._listener.listen(8)
        self._watch(self._listener.fileno())

    def _remove_stale(self) -> None:
        """Remove the socket of a process that is gone. UsageError when one still listens, or it is no socket."""
        try:
            mode = os.stat(self._path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise UsageError(f"console backend: {self._path} exists and is no socket: choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            if probe.connect_ex(self._path) != errno.ECONNREFUSED:
                raise UsageError(f"console backend: {self._path} is in use by another process: choose another path")
        os.unlink(self._path)

    def close(self) -> None:
        """Let the client go and remove the socket."""
        super().close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._inode != (0, 0):
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(self._path)
                if (status.st_dev, status.st_ino) == self._inode:
                    os.unlink(self._path)
            self._inode = (0, 0)

    def _happened(self, fd: int, events: int) -> None:
        if self._listener is not None and fd == self._listener.fileno():
            self._accept()
        elif fd == self._output and events & (select.EPOLLHUP | select.EPOLLERR):
            self._output_ended()

    def _seek_reader(self) -> None:
        # A client that has connected counts, even if its turn to be served has not come yet: it hears all that is
        # said from then on.
        self._accept()

    def _accept(self) -> None:
        """Serve the next client, when there is one and none is served now."""
        if self._listener is None or self._input >= 0 or self._output >= 0:
            return
        while True:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Too many open files, or a client that left at once. The next event looks again.
                self._tell(error, "a client was not served")
                return
            client.setblocking(False)
            self._input = self._output = client.detach()
            self._watch(self._input)
            return

    def _input_ended(self) -> None:
        super()._input_ended()
        self._accept()

    def _input_failed(self, error: OSError) -> None:
        self._input_ended()

    def _output_failed(self, error: OSError) -> None:
        self._output_ended()

    def _output_ended(self) -> None:
        """The client does not read any more; what it sent before may still wait to be read."""
        fd, self._output = self._output, -1
        if fd != self._input:
            os.close(fd)
        elif not _unread(fd):
            # Nobody may ever read to find the end of the input: the next client shall not wait for that.
            super()._input_ended()
        self._accept()


class File(Backend):
    """A file that output is appended to; there is no input."""

    def __init__(self, path: str) -> None:
        super().__init__()
        if not path:
            raise UsageError("console backend file: has no path: write file:PATH")
        self._path = path

    def __str__(self) -> str:
        return f"file:{self._path}"

    @property
    def path(self) -> str:
        """The file."""
        return self._path

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        self._output = os.open(self._path, flags, 0o644)
        self._watch(self._output)


class Stdio(Backend):
    """The standard input and output of this process; one console of a process can have them.

    A terminal is taken out of line mode and echo (its keys for interrupt and stop go on working), and put back at the
    end.
    """

    _user: Stdio | None = None

    def __init__(self, stdin: int = 0, stdout: int = 1) -> None:
        super().__init__()
        self._stdin = stdin
        self._stdout = stdout
        self._mode: list[Any] | None = None
        self._made_non_blocking: list[int] = []

    def __str__(self) -> str:
        return "stdio"

    @property
    def path(self) -> str:
        """Nowhere else than here."""
        return ""

    def _open(self) -> None:
        if Stdio._user is not None:
            raise UsageError("console backend stdio: another console of this process has it")
        Stdio._user = self
        self._input = self._own(self._stdin, os.O_RDONLY)
        self._output = self._own(self._stdout, os.O_WRONLY)
        if os.isatty(self._stdin):
            self._mode = termios.tcgetattr(self._stdin)
            tty.setcbreak(self._stdin, termios.TCSANOW)
        self._watch(self._input)
        self._watch(self._output)

    def _own(self, fd: int, flags: int) -> int:
        """A non-blocking descriptor of the same thing as `fd`.

        O_NONBLOCK belongs to the open file, which the shell and others share: so a terminal or a pipe is opened anew.
        A regular file never blocks, and keeps its place. A socket cannot be opened anew: its mode is put back at the
        end.
        """
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
            with contextlib.suppress(OSError):
                return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        own = os.dup(fd)
        if not stat.S_ISREG(mode) and os.get_blocking(own):
            os.set_blocking(own, False)
            self._made_non_blocking.append(fd)
        return own

    def close(self) -> None:
        """Leave standard input and output as they were."""
        if Stdio._user is self:
            Stdio._user = None
        if self._mode is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._stdin, termios.TCSANOW, self._mode)
        self._mode = None
        for fd in self._made_non_blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, True)
        self._made_non_blocking.clear()
        super().close()


def _unread(sock: int) -> bool:
    """Whether a stream socket holds bytes to read."""
    return any(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))


def make_backend(text: str) -> Backend:
    """The backend that `text` describes: pty, stdio, unix:PATH or file:PATH. UsageError when it is none of them."""
    kind, _, path = text.partition(":")
    match kind:
        case "pty" | "stdio" if text == kind:
            return Pty() if kind == "pty" else Stdio()
        case "unix":
            return UnixSocket(path)
        case "file":
            return File(path)
    near = difflib.get_close_matches(kind, ("pty", "stdio", "unix", "file"), n=1)
    hint = f"did you mean {near[0]!r}? " if near and near[0] != kind else ""
    raise UsageError(f"console backend {text!r}: {hint}it is pty, stdio, unix:PATH or file:PATH")
