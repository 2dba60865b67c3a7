"""The behaviours of `driver_interface.py` with our own drivers, over every connector."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import pytest

import vbus
from conftest import make_connector, wait_until
from driver_interface import LIMIT, Behaviour, Stage, each_behaviour
from vbus.bus import Bus
from vbus.channel import Channel, ChannelFullError
from vbus.errors import DriverError
from vbus.proxy import Driver, Remote, drivers

D = TypeVar("D", bound=Driver)


class OurDisk:
    """A disk behind our driver."""

    def __init__(self, driver: drivers.Blk) -> None:
        self._driver = driver
        self.block_size = driver.block_size
        self.read_only = driver.read_only
        self.flush = driver.flush
        self.discard = driver.discard

    @property
    def size(self) -> int:
        """As the device says."""
        return self._driver.size

    @property
    def serial(self) -> str:
        """As the device says."""
        return self._driver.serial

    def read(self, length: int, offset: int) -> bytes:
        """Any bytes."""
        return self._driver.pread(length, offset)

    def begin_read(self, length: int, offset: int) -> Callable[[], bytes]:
        """Whole blocks."""
        future = self._driver.submit_read(length, offset)
        return lambda: future.result(LIMIT)

    def write(self, data: bytes, offset: int) -> None:
        """Any bytes."""
        self._driver.pwrite(data, offset)


class OurNetwork:
    """A network behind our driver."""

    def __init__(self, driver: drivers.Net) -> None:
        self._driver = driver
        self.mac = driver.mac.hex(":")
        self.mtu = driver.mtu

    @property
    def link(self) -> bool:
        """As the device says."""
        return self._driver.link

    def exchange(self, frames: Sequence[bytes]) -> list[bytes]:
        """Nobody else speaks there."""
        self._driver.send(frames).result(LIMIT)
        back: list[bytes] = []
        while len(back) < len(frames):
            back += self._driver.recv(len(frames) - len(back), LIMIT)
        return back


class OurTerminal:
    """A console behind our driver."""

    def __init__(self, driver: drivers.Console) -> None:
        self._driver = driver

    @property
    def window(self) -> tuple[int, int]:
        """As the device says."""
        return self._driver.window.columns, self._driver.window.lines

    def write(self, data: bytes) -> None:
        """All of it."""
        self._driver.write(data, LIMIT)

    def read(self, size: int) -> bytes:
        """All of it."""
        return self._driver.read_exactly(size, LIMIT)


class OurTalk:
    """A channel of ours."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.say = channel.send

    def hear(self) -> bytes:
        """OSError when none comes any more."""
        event = self._channel.receive(LIMIT)
        if event is None:
            raise OSError(errno.ENODEV, "nothing was said")
        return event.data

    def fill(self, size: int) -> int:
        """Until ChannelFullError."""
        before = self._channel.sent
        with contextlib.suppress(ChannelFullError):
            while True:
                self._channel.send(bytes(size))
        return self._channel.sent - before

    def put(self, offset: int, data: bytes) -> None:
        """Into the region."""
        self._channel.memory[offset : offset + len(data)] = data

    def get(self, offset: int, size: int) -> bytes:
        """From the region."""
        return bytes(self._channel.memory[offset : offset + size])


class OurSide:
    """Our own drivers, over a connector."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._drivers: dict[str, Driver] = {}

    def _driver(self, name: str, cls: type[D]) -> D:
        self._remote.wait_for(name)
        known = self._drivers.get(name)
        if not isinstance(known, cls) or known.device is not self._remote.device(name):
            known = self._drivers[name] = self._remote.driver(name, cls)
        return known

    def identity(self, name: str) -> tuple[int, UUID, int]:
        """As it was discovered."""
        device = self._remote.wait_for(name)
        return device.address, device.uuid, int(device.device_id)

    def is_there(self, name: str) -> bool:
        """Whether it is among the devices."""
        return any(device.name == name for device in self._remote)

    def disk(self, name: str) -> OurDisk:
        """Behind `Blk`."""
        return OurDisk(self._driver(name, drivers.Blk))

    def network(self, name: str) -> OurNetwork:
        """Behind `Net`."""
        return OurNetwork(self._driver(name, drivers.Net))

    def entropy(self, name: str) -> drivers.Rng:
        """`Rng` itself."""
        return self._driver(name, drivers.Rng)

    def terminal(self, name: str) -> OurTerminal:
        """Behind `Console`."""
        return OurTerminal(self._driver(name, drivers.Console))

    @contextlib.contextmanager
    def talk(self, name: str) -> Iterator[OurTalk]:
        """A channel of the link."""
        with self._remote.open_channel(name, wait=LIMIT) as channel:
            yield OurTalk(channel)

    def channels(self) -> list[str]:
        """As they are listed."""
        return [info.name for info in self._remote.channels()]

    def let_go(self, name: str) -> None:
        """Close the driver, if its device lets it."""
        with contextlib.suppress(DriverError):
            self._drivers.pop(name).close()

    def priorities(self, name: str) -> list[int]:
        """Of the queues that the driver uses."""
        device = self._drivers[name].device
        return [device.queue_priority(index) for index in range(len(device.queues))]

    def counters(self, name: str) -> tuple[int, int, int]:
        """Of the queues that the driver uses."""
        device = self._drivers[name].device
        each = [self._remote.connector.counters(device, index) for index in range(len(device.queues))]
        signalled, sent, rung = (sum(column) for column in zip(*each, strict=True))
        return signalled, sent, rung


@pytest.fixture
def stage(connector_kind: str, make_bus: Callable[..., Bus], tmp_path: Path) -> Iterator[Stage]:
    bus = make_bus()
    connector = bus.connect(make_connector(connector_kind, tmp_path))
    files = tmp_path / "files"
    files.mkdir()
    with vbus.attach(connector.address) as remote:
        stage = Stage(bus, OurSide(remote), files)
        yield stage
        stage.clear()
    assert wait_until(lambda: not connector.describe()["peers"])


@each_behaviour
def test_our_drivers(stage: Stage, shown: Behaviour) -> None:
    shown(stage)
