"""QEMU's monitor, as far as `ivshmem` needs it: where a guest's memory is in a file, and that the guest was reset.

```text
 Finder, one a function ──┐
 Finder, one a function ──┴─> Monitor, one a QMP socket: a thread while there is something to ask or to hear
                               question: which backend is this file's? where has the guest its memory? (memory_tree)
                               event: RESET ──> whoever was told of memory
```

A monitor has one client at a time, so that all functions of one QEMU share a connection. It stays, once somebody was
told where memory is: a guest that is reset cannot end its session, and what devices write then is the next kernel's.
What QEMU says is text for people: nothing is believed of it until the guest has proven it (`guest_ram`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from vbus.connectors.guest_ram import MAX_GUEST_RAM, GuestRam, RamError
from vbus.connectors.memory_tree import COMMAND, Range, TreeError, backend_ranges

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

log = logging.getLogger("vbus.connector")

ASK_SECONDS = 10.0
"""How long QEMU may take for an answer, all in all."""
MAX_BACKENDS = 64

Done = Callable[[GuestRam | RamError], object]


class Finder:
    """What one function asks of its QEMU, and hears from it."""

    def __init__(self, ram: Path, qmp: Path, was_reset: Callable[[], object]) -> None:
        """`was_reset` is called in a thread, whenever the guest was reset since it was found where its memory is."""
        self.ram = ram
        self.was_reset = was_reset
        self.closed = False
        self._monitor = Monitor.at(qmp)

    def ask(self, done: Done) -> None:
        """Have `done` called with what was found, in a thread. A question takes the place of one that waits."""
        self._monitor.ask(self, done)

    def close(self) -> None:
        """Ask and hear nothing more."""
        self._monitor.leave(self)


class Monitor:
    """The monitor at one socket, for all that ask there: one question at a time, in a thread, as QEMU may be stuck."""

    _all: ClassVar[WeakValueDictionary[str, Monitor]] = WeakValueDictionary()
    _all_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._lock = threading.Lock()
        self._questions: dict[Finder, Done] = {}
        self._hearers: set[Finder] = set()
        self._runs = False
        self._woken: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @classmethod
    def at(cls, socket: Path) -> Monitor:
        """The one of a socket."""
        with cls._all_lock:
            return cls._all.setdefault(os.path.abspath(socket), cls(socket))

    def ask(self, finder: Finder, done: Done) -> None:
        """Take a question, or another in place of one that waits."""
        with self._lock:
            self._questions[finder] = done
            if self._runs:
                self._wake()
                return
            self._runs = True
        threading.Thread(target=self._run, name="asks QEMU", daemon=True).start()

    def leave(self, finder: Finder) -> None:
        """Forget a finder. With the last one of those who hear, the connection ends."""
        with self._lock:
            finder.closed = True
            self._questions.pop(finder, None)
            self._hearers.discard(finder)
            self._wake()

    def _wake(self) -> None:
        if self._woken is not None:
            loop, event = self._woken
            loop.call_soon_threadsafe(event.set)

    def _run(self) -> None:
        while self._is_asked():
            asyncio.run(self._serve())

    def _is_asked(self) -> bool:
        with self._lock:
            self._runs = bool(self._questions)
            return self._runs

    async def _serve(self) -> None:
        """One connection, for as long as it is of use."""
        from qemu.qmp import QMPClient

        # It writes of its own accord what is raised here, too.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
        client = QMPClient("vbus")
        woken = asyncio.Event()
        with self._lock:
            self._woken = asyncio.get_running_loop(), woken
        try:
            while True:
                woken.clear()
                with self._lock:
                    finder = next(iter(self._questions), None)
                    done = self._questions.pop(finder) if finder is not None else None
                    if done is None and not self._hearers:
                        return
                if finder is None or done is None:
                    if not await self._hear(client, woken):
                        return
                elif not await self._answer(client, finder, done):
                    return
        finally:
            with self._lock:
                self._woken = None
                self._hearers.clear()
            # It is somebody else's again.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), 1)

    async def _answer(self, client: QMPClient, finder: Finder, done: Done) -> bool:
        """Answer one question. Whether the connection is good for another."""
        try:
            found = await find(client, self._socket, finder.ram)
        except RamError as error:
            done(error)
            return _is_up(client)
        with self._lock:
            if not finder.closed:
                self._hearers.add(finder)
        done(found)
        return True

    async def _hear(self, client: QMPClient, woken: asyncio.Event) -> bool:
        """Say that the guest was reset, until somebody asks or leaves. Whether the connection is still there."""
        if _is_up(client):
            waits: list[asyncio.Task[Any]] = [
                asyncio.create_task(each)
                for each in (self._say_resets(client), client.runstate_changed(), woken.wait())
            ]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if _is_up(client):
            return True
        log.info("QMP at '%s' is gone: a reset of its guest would not be heard", self._socket)
        return False

    async def _say_resets(self, client: QMPClient) -> None:
        async for event in client.events:
            if event.get("event") == "RESET":
                with self._lock:
                    hearers = list(self._hearers)
                for finder in hearers:
                    finder.was_reset()


def _is_up(client: QMPClient) -> bool:
    from qemu.qmp import Runstate

    return client.runstate == Runstate.RUNNING


async def find(client: QMPClient, qmp: Path, ram: Path) -> GuestRam:
    """Open the file that a guest's memory is in, and ask QEMU where the guest has it. RamError.

    The client is connected if it is not. Who does not answer, or breaks the protocol, is parted from.
    """
    try:
        # Nothing that a path can lead to may keep us waiting.
        fd = os.open(ram, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise RamError(f"the guest's memory '{ram}': {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise RamError(f"the guest's memory '{ram}' is no file")
        return GuestRam(fd, await _asked(client, qmp, fd))
    except BaseException:
        os.close(fd)
        raise


async def _asked(client: QMPClient, qmp: Path, fd: int) -> list[Range]:
    from qemu.qmp import QMPError

    try:
        async with asyncio.timeout(ASK_SECONDS):
            if not _is_up(client):
                await client.connect(str(qmp))
            return await _ask(client, fd)
    except TreeError as error:
        raise RamError(f"QMP at '{qmp}': {error}") from None
    except TimeoutError:
        text = f" does not answer within {ASK_SECONDS:g} s: has it another client?"
    except (QMPError, EOFError, OSError, ValueError) as error:
        reason = getattr(error, "exc", error)
        text = f": {getattr(reason, 'strerror', None) or ' '.join(str(reason).split()) or type(reason).__name__}"
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.disconnect(), 1)
    raise RamError(f"QMP at '{qmp}'{text}")


async def _ask(client: QMPClient, fd: int) -> list[Range]:
    name, size, offset = await _backend(client, fd)
    tree = await client.execute("human-monitor-command", {"command-line": COMMAND})
    if not isinstance(tree, str):
        raise TreeError("the memory tree is no text")
    ranges = backend_ranges(tree, name, size)
    if offset + size > os.fstat(fd).st_size:
        raise TreeError(f"{name} has {size} bytes from {offset}, more than its file")
    if sum(found.size for found in ranges) > MAX_GUEST_RAM:
        raise TreeError(f"the guest has more than {MAX_GUEST_RAM} bytes of memory")
    return [Range(found.address, found.size, found.offset + offset) for found in ranges]


async def _backend(client: QMPClient, fd: int) -> tuple[str, int, int]:
    """The backend that this file is: its id, its bytes, and where in the file they begin. TreeError."""
    rows = await client.execute("query-memdev")
    if not isinstance(rows, list) or len(rows) > MAX_BACKENDS:
        raise TreeError("the list of memory backends is not understood")
    found: list[tuple[str, int, int]] = []
    for row in rows:
        match row:
            case {"id": str(name), "size": int(size), "share": True} if size > 0:
                # One of a descriptor has no path. Whether it is the right one shows when the guest proves it.
                path = await _property(client, name, "mem-path")
                if path is None or _is_file(path, fd):
                    offset = await _property(client, name, "offset")
                    found.append((name, size, offset if isinstance(offset, int) and offset >= 0 else 0))
            case {"share": False} | {"share": True}:
                pass
            case _:
                raise TreeError("a memory backend is not understood")
    if len(found) != 1:
        raise TreeError(f"{len(found)} shared memory backends may be the file: vbus qemu-args prints which it shall be")
    return found[0]


async def _property(client: QMPClient, name: str, wanted: str) -> Any:
    """A property of a backend; None when it has none of this name."""
    from qemu.qmp import ExecuteError

    try:
        return await client.execute("qom-get", {"path": f"/objects/{name}", "property": wanted})
    except ExecuteError:
        return None


def _is_file(path: object, fd: int) -> bool:
    """Whether a path, as QEMU has it, leads to the file here. One that is relative is relative to QEMU."""
    if not isinstance(path, str) or not os.path.isabs(path):
        return isinstance(path, str)
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        # QEMU may see other files than this process does.
        return True
