"""Where running buses are found: a directory for each, a lock that tells a running bus from a dead one, and sockets.

    ROOT/NAME/lock           held (flock) for as long as the bus runs; holds its process id
    ROOT/NAME/control.sock   the control API of the bus
    ROOT/sock/NAME-CONNECTOR.sock   where drivers attach when the connector was given no path of its own

ROOT is `$VBUS_RUNTIME_DIR` if that is set, `/run/vbus` for root, `$XDG_RUNTIME_DIR/vbus` for anybody who has one, else
`/tmp/vbus-UID`. A bus's own directory has mode 0700: whoever is not its owner cannot even knock at its control socket.
The sockets' directory is outside, because there it is each peer's credentials that decide.

Nothing of vbus but its errors is imported here, so that connectors and the command may both import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from vbus.errors import UsageError

ENVIRONMENT = "VBUS_RUNTIME_DIR"
CONTROL = "control.sock"
LOCK = "lock"
SOCKETS = "sock"
MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path (unix(7): `sun_path` has 108, the last is zero)."""
LOCK_TRIES = 100
"""How often a lock may vanish between its opening and its taking: each time another bus of this name has ended."""


def root() -> Path:
    """The directory that holds the directories of this user's buses; it may not be there yet."""
    override = os.environ.get(ENVIRONMENT)
    if override:
        return Path(override).absolute()
    user = os.geteuid()
    if user == 0:
        return Path("/run/vbus")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # After `su` it may still name the directory of another user.
    with contextlib.suppress(OSError):
        if os.path.isabs(runtime) and os.stat(runtime).st_uid == user:
            return Path(runtime, "vbus")
    return Path(f"/tmp/vbus-{user}")


def socket_path(bus: str, connector: str) -> Path:
    """Where a connector listens that was given no path. UsageError when there can be no such directory."""
    # Members of a bus of root are other users: they must be able to get as far as the socket.
    public = 0o755 if os.geteuid() == 0 else 0o700
    _make(_make_root() / SOCKETS, public)
    return socket_place(bus, connector)


def socket_place(bus: str, connector: str) -> Path:
    """The path that `socket_path` gives, whose directory need not be there yet."""
    return root() / SOCKETS / f"{bus}-{connector}.sock"


def check_socket_path(path: Path) -> Path:
    """The path, when a socket can have it. UsageError."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise UsageError(
            f"socket path '{path}' has {length} bytes, {MAX_SOCKET_PATH} are the most: use a shorter bus name, "
            f"or set {ENVIRONMENT} to a shorter directory"
        )
    return path


def _make_root() -> Path:
    folder = root()
    try:
        if os.environ.get(ENVIRONMENT):
            # The operator's choice, which may be shared; what is made inside is checked.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return folder
        return _make(folder, 0o755 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; set {ENVIRONMENT} to a directory of your own") from None


def _make(folder: Path, mode: int) -> Path:
    """Make the directory, or check that the one that is there is ours alone to write. UsageError.

    FileNotFoundError when somebody removed it in this very moment.
    """
    try:
        folder.mkdir(mode=mode)
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; set {ENVIRONMENT} to a directory of your own") from None
    else:
        folder.chmod(mode)  # whatever the umask
    _check_ours(folder)
    return folder


def _check_ours(folder: Path) -> None:
    """In a place that others can write to, a directory may have been planted: by a link, or by its owner."""
    status = folder.lstat()
    problem = None
    if not stat.S_ISDIR(status.st_mode):
        problem = "is no directory: remove it"
    elif status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}: have it removed"
    elif status.st_mode & 0o022:
        problem = f"can be written by others: chmod go-w {folder}"
    if problem:
        raise UsageError(f"{folder} {problem}, or set {ENVIRONMENT} to another directory")


class BusDirectory:
    """The directory of one running bus, held by its lock from construction until `release`."""

    def __init__(self, name: str) -> None:
        """UsageError: the bus is running already, or there can be no such directory."""
        if name == SOCKETS:
            raise UsageError(f"bus {name!r}: this name is taken by the directory of the sockets: choose another")
        self.name = name
        self.path = _make_root() / name
        self.control = check_socket_path(self.path / CONTROL)
        self._lock = self._take_lock()
        # We hold the lock, so whatever is here was left by a bus that did not end well.
        self.control.unlink(missing_ok=True)

    def _take_lock(self) -> int:
        path = self.path / LOCK
        for _ in range(LOCK_TRIES):
            try:
                _make(self.path, 0o700)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UsageError(f"{path}: {error.strerror}; remove it, or set {ENVIRONMENT}") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(fd, 16, 0).decode(errors="replace").strip()
                os.close(fd)
                if error.errno != errno.EWOULDBLOCK:
                    raise UsageError(f"{path}: {error.strerror}; set {ENVIRONMENT} to a local directory") from None
                who = f" (process {holder})" if holder else ""
                raise UsageError(
                    f"a bus {self.name!r} is running already{who}: end that one, or choose another name"
                ) from None
            # The lock counts only while it is the one that the next comer will find.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.lstat()):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return fd
            os.close(fd)
        raise UsageError(f"{path}: this lock cannot be had: other buses of the same name come and go")

    def listen(self) -> socket.socket:
        """The control socket, listening; only this user and root can connect. UsageError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(os.fspath(self.control))
            self.control.chmod(0o600)
            sock.listen(64)
        except OSError as error:
            sock.close()
            raise UsageError(f"{self.control}: {error.strerror}; set {ENVIRONMENT} to another directory") from None
        return sock

    def release(self) -> None:
        """Remove the directory and let go of the lock. A second time does nothing."""
        if self._lock < 0:
            return
        # In this order and under the lock: whoever opened this lock file meanwhile will see that it is no more.
        for path in (self.control, self.path / LOCK):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> BusDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def running() -> Iterator[tuple[str, Path]]:
    """(name, control socket) of each bus of this user that answers, by name. UsageError when ROOT is not ours."""
    folder = root()
    if not folder.is_dir():
        return
    if not os.environ.get(ENVIRONMENT):
        _check_ours(folder)
    for path in sorted(folder.iterdir()):
        control = path / CONTROL
        if path.name != SOCKETS and len(os.fsencode(control)) <= MAX_SOCKET_PATH and _answers(control):
            yield path.name, control


def _answers(control: Path) -> bool:
    """Whether somebody listens. The lock is not asked: to try it would keep a bus from starting in that moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(control))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
