"""The entropy device and its driver, over every connector."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from conftest import Attached, Leftovers
from vbus.bus import Bus
from vbus.devices import Rng
from vbus.devices.rng import MOST
from vbus.errors import DriverError, UsageError
from vbus.proxy import drivers


def test_as_many_bytes_as_were_asked_for(attached: Attached) -> None:
    _, remote = attached(rng0=Rng())
    rng = remote.driver("rng0", drivers.Rng)
    for size in (0, 1, 31, 4096, 3 * MOST + 5):
        assert len(rng.read(size)) == size
    assert rng.read(32) != rng.read(32)
    assert len(set(rng.read(4096))) > 200
    with pytest.raises(ValueError, match="-1"):
        rng.read(-1)


def test_one_request_gets_no_more_than_the_device_gives(attached: Attached) -> None:
    _, remote = attached(rng0=Rng())
    rng = remote.driver("rng0", drivers.Rng)
    assert len(rng.queue(0).submit([], MOST).result(10)) == MOST
    if not remote.device("rng0").max_request:
        assert len(rng.queue(0).submit([], 4 * MOST).result(10)) == MOST
    assert rng.queue(0).submit([b"ignored"], 0).result(10) == b""


def test_the_bytes_of_a_source_come_in_order_and_only_once(attached: Attached, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    source = tmp_path / "entropy"
    source.write_bytes(data)
    bus, remote = attached(rng0=Rng(source=source))
    assert bus.attributes("rng0") == {"source": str(source)}
    rng = remote.driver("rng0", drivers.Rng)
    assert rng.read(70_000) == data[:70_000]
    assert rng.read(30_000) == data[70_000:]
    with pytest.raises(DriverError) as ended:
        rng.read(1)
    assert ended.value.errno == errno.EIO
    assert bus.describe()[0]["violations"] == {"device-error": 1}


def test_a_source_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Bus("test") as bus:
        for path, message in [
            (tmp_path / "missing", "No such file"),
            (tmp_path, "neither a character device nor a file"),
            (tmp_path / "fifo", "neither a character device nor a file"),
        ]:
            with pytest.raises(UsageError) as refused:
                bus.plug(Rng(source=path), "rng0")
            assert str(path) in str(refused.value)
            assert message in str(refused.value)
            assert "\n" not in str(refused.value)
        assert bus.slots() == []
        assert bus.plug(Rng(source="/dev/urandom"), "rng0").source == "/dev/urandom"


def test_a_source_is_closed_when_the_device_goes(leftovers: type[Leftovers]) -> None:
    with Bus("test") as bus:
        bus.plug(Rng(), "rng0")
        before = leftovers()
        bus.plug(Rng(source="/dev/urandom"), "rng1")
        bus.unplug("rng1")
        assert not leftovers().exceeds(before)
