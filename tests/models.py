"""Small device models for tests, and drivers for them: written as a user would write them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import ClassVar

import vbus
from vbus.proxy import Driver

ECHO_ID = 0x7E01
LAMP_ID = 0x7E02


class Echo(vbus.Device):
    """Writes back what it reads."""

    device_id = ECHO_ID
    queues = ("requests",)

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        request.write(request.read())


class BatchEcho(vbus.Device):
    """Writes back what it reads, several requests at once."""

    device_id = ECHO_ID
    queues = ("requests",)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def handle_batch(self, queue: vbus.Queue, requests: Sequence[vbus.Request]) -> None:
        self.batches.append(len(requests))
        for request in requests:
            request.write(request.read())


class AsyncEcho(vbus.Device):
    """Writes back what it reads after a while, several requests at a time."""

    device_id = ECHO_ID
    queues = ("requests",)
    concurrency = 8

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        request.write(request.read())
        self.now -= 1


class Awaits(vbus.Device):
    """Writes back what it reads; but what begins with "wait" only when it is let."""

    device_id = ECHO_ID
    queues = ("requests",)
    concurrency = 16

    def __init__(self) -> None:
        self.waiting = 0
        self._go = asyncio.Event()

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        data = request.read()
        if data.startswith(b"wait"):
            self.waiting += 1
            await self._go.wait()
            self.waiting -= 1
        request.write(data)

    def release(self) -> None:
        """Let it answer, from now on."""
        self.post(self._go.set)


class Backwards(vbus.Device):
    """Answers eight requests at a time, the last one first."""

    device_id = ECHO_ID
    queues = ("requests",)
    concurrency = 8

    def __init__(self) -> None:
        self.finished: list[bytes] = []
        self._turns: list[asyncio.Event] = []

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        data = request.read()
        turn = asyncio.Event()
        self._turns.append(turn)
        if len(self._turns) == self.concurrency:
            self._turns.pop().set()
        await turn.wait()
        request.write(data)
        self.finished.append(data)
        if self._turns:
            # Behind the completion of this one.
            asyncio.get_running_loop().call_soon(self._turns.pop().set)


class Two(vbus.Device):
    """Echoes on one queue, and keeps what comes on the other."""

    device_id = ECHO_ID
    queues = ("first", vbus.Queue("second", pull=True))

    def __init__(self) -> None:
        self.kept: list[vbus.Request] = []

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        request.write(request.read())

    def available(self, queue: vbus.Queue) -> None:
        self.kept += queue.take_batch(64)
        while taken := queue.take_batch(64):
            self.kept += taken


class TwoAsync(vbus.Device):
    """Echoes on two queues, when it is let."""

    device_id = ECHO_ID
    queues = ("first", "second")

    def __init__(self) -> None:
        self.waiting = {"first": 0, "second": 0}
        self._go = asyncio.Event()

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.waiting[queue.name] += 1
        try:
            await self._go.wait()
        finally:
            self.waiting[queue.name] -= 1
        request.write(request.read())

    def release(self) -> None:
        """Let it answer, from now on."""
        self.post(self._go.set)


class ViewEcho(vbus.Device):
    """Copies from the driver's memory to the driver's memory, with no bytes of its own."""

    device_id = ECHO_ID
    queues = ("requests",)

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        readable, writable = request.views()
        data = b"".join(readable)
        at = 0
        for view in writable:
            part = data[at : at + len(view)]
            view[: len(part)] = part
            at += len(part)
        request.written = min(len(data), request.writable_total)


class Raises(vbus.Device):
    """Fails when it is told to."""

    device_id = ECHO_ID
    queues = ("requests",)

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        data = request.read()
        if data == b"fail":
            raise RuntimeError("as it was told")
        request.write(data)


class Hangs(vbus.Device):
    """Does not return from its handler until it is let go."""

    device_id = ECHO_ID
    queues = ("requests",)

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.entered.set()
        self.let_go.wait(60)


class Lamp(vbus.Device):
    """A device with config space, a pull queue and a masked feature."""

    device_id = LAMP_ID
    features = vbus.features(DIMMABLE=0, COLOUR=1)
    queues = ("commands", vbus.Queue("events", pull=True))
    config_writable = ("flags",)

    class Config(vbus.Config):
        level: vbus.le32
        flags: vbus.u8

    level = vbus.attribute(int, config="level", doc="Brightness, 0 to 100.")
    label = vbus.attribute(str, default="lamp", doc="What is written on it.")

    def __init__(self) -> None:
        self.seen: list[str] = []

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.say(b"got " + request.read())

    def say(self, what: bytes) -> bool:
        """Tell the driver something, when it has given a buffer for it."""
        request = self.queue("events").take()
        if request is None:
            return False
        request.write(what)
        self.queue("events").complete(request)
        return True

    def ready(self) -> None:
        self.seen.append("ready")

    def reset(self) -> None:
        self.seen.append("reset")

    def available(self, queue: vbus.Queue) -> None:
        self.seen.append(f"available {queue.name}")

    def config_written(self, fields: frozenset[str]) -> None:
        self.seen.append("written " + " ".join(sorted(fields)))


class TwoDriver(Driver):
    """Drives a device with two queues."""

    device_id = ECHO_ID
    features = vbus.features()
    queue_count = 2


class EchoDriver(Driver):
    """Drives any of the echoes."""

    device_id = ECHO_ID
    features = vbus.features()

    def echo(self, data: bytes, room: int | None = None) -> bytes:
        """What the device wrote."""
        return self.queue(0).submit([data], len(data) if room is None else room).result(20)


class LampDriver(Driver):
    """Drives a lamp."""

    device_id = LAMP_ID
    features = Lamp.features
    wanted: ClassVar[tuple[str, ...]] = ("DIMMABLE", "COLOUR")
    queue_count = 2

    def started(self) -> None:
        self.changes = threading.Semaphore(0)
        self.gone = threading.Event()

    def config_changed(self) -> None:
        self.changes.release()

    def removed(self) -> None:
        self.gone.set()
