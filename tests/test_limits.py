"""Limits of devices and members: buckets against a clock of their own, and what drivers and operators see of them."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vbus
from conftest import Attached, wait_until
from models import ECHO_ID, Echo, EchoDriver, Lamp, LampDriver
from vbus.bus import Bus
from vbus.bus.limits import DEVICE_LIMITS, Account, parse_limit, reserve_all
from vbus.errors import DriverError, NoSuchNameError, UsageError

MakeBus = Callable[..., Bus]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def none_outstanding() -> int:
    return 0


@given(
    rate=st.integers(1, 100_000),
    burst=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 64)), min_size=1, max_size=60),
)
def test_no_more_than_the_rate_and_the_burst_come_through(
    rate: int, burst: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    account = Account("a", clock=clock)
    account.set("iops", str(rate))
    account.set("iops_burst", str(burst))
    began, came = clock.now, 0
    for pause, wanted in steps:
        clock.now += pause
        allowed, wait = account.admit(wanted, none_outstanding)
        assert 0 <= allowed <= wanted
        account.charge(allowed, 0)
        came += allowed
        assert came <= burst + rate * (clock.now - began) + 1e-6
        if not allowed:
            # After the time that it names there is room for one; the sum of floats may be short by a breath.
            clock.now += wait + 1e-6
            assert account.admit(1, none_outstanding)[0] == 1


@given(sizes=st.lists(st.integers(1, 1 << 20), min_size=1, max_size=40))
def test_bytes_run_into_debt_by_one_request_at_most(sizes: list[int]) -> None:
    clock = Clock()
    account = Account("a", clock=clock)
    account.set("bps", "100 KiB")
    burst = 10 * 1024
    began, came = clock.now, 0
    for size in sizes:
        allowed, wait = account.admit(64, none_outstanding)
        if not allowed:
            clock.now += wait + 1e-6
            allowed, wait = account.admit(64, none_outstanding)
        assert allowed == 1
        account.charge(1, size)
        came += size
        assert came - size <= burst + 100 * 1024 * (clock.now - began) + 1


def test_outstanding_requests_are_counted_when_asked() -> None:
    account = Account("a")
    account.set("outstanding", "3")
    now = 0
    assert account.admit(64, lambda: now) == (3, 0.0)
    now = 2
    assert account.admit(64, lambda: now) == (1, 0.0)
    now = 3
    assert account.admit(64, lambda: now) == (0, 0.0)
    assert account.held == 1


def test_what_several_accounts_share_is_taken_of_all_or_none() -> None:
    first, second = Account("first"), Account("second")
    second.set("channels", "1")
    assert reserve_all([first, second], "channels", 1) is None
    assert reserve_all([first, second], "channels", 1) is second
    assert (first.channels, second.channels) == (1, 1)
    second.set("channels", "none")
    assert reserve_all([first, second], "channels", 1) is None


@pytest.mark.parametrize("text", ["0", "-1", "-99999999999999999999999"])
def test_a_limit_of_zero_or_below_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="from 1 on, or none"):
        parse_limit("iops", text, DEVICE_LIMITS)


def test_limits_that_are_none() -> None:
    assert parse_limit("bps", "10 MiB", DEVICE_LIMITS) == 10 << 20
    assert parse_limit("bps", "none", DEVICE_LIMITS) is None
    with pytest.raises(UsageError, match="from 1 on"):
        parse_limit("bps", "0 MiB", DEVICE_LIMITS)
    for text in ("", "ten", "1.5", "1e3"):
        with pytest.raises(UsageError, match="not a whole number"):
            parse_limit("iops", text, DEVICE_LIMITS)
    with pytest.raises(NoSuchNameError, match="did you mean 'iops'"):
        parse_limit("iosp", "1", DEVICE_LIMITS)
    with pytest.raises(NoSuchNameError):
        parse_limit("channels", "1", DEVICE_LIMITS)


def test_a_device_serves_no_faster_than_its_limit(attached: Attached) -> None:
    bus, remote = attached(echo=Echo(), free=Echo())
    assert bus.set("echo", "limit.iops", "200") == 200
    assert bus.set("echo", "limit.iops_burst", "10") == 10
    driver, free = remote.driver("echo", EchoDriver), remote.driver("free", EchoDriver)
    began = time.monotonic()
    futures = [driver.queue(0).submit([b"x"], 1) for _ in range(100)]
    # The neighbour is not held up.
    for _ in range(100):
        assert free.echo(b"y") == b"y"
    assert not futures[-1].done()
    assert [future.result(20) for future in futures] == [b"x"] * 100
    # A limit is a lower bound of time: (100 - 10) / 200.
    assert time.monotonic() - began >= 0.44
    shown = bus.show("echo")
    assert shown["limits"] == {"iops": 200, "iops_burst": 10}
    assert shown["held"] > 0
    assert bus.set("echo", "limit.iops", "none") is None
    for _ in range(300):
        assert driver.echo(b"z") == b"z"


def test_lifting_a_limit_frees_who_waits(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    bus.set("echo", "limit.iops", "1")
    bus.set("echo", "limit.iops_burst", "1")
    driver = remote.driver("echo", EchoDriver)
    futures = [driver.queue(0).submit([b"x"], 1) for _ in range(100)]
    assert futures[0].result(10) == b"x"
    bus.set("echo", "limit.iops", "none")
    assert [future.result(10) for future in futures] == [b"x"] * 100


def test_bytes_are_limited_and_large_requests_still_come(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    bus.set("echo", "limit.bps", "4 MiB")
    bus.set("echo", "limit.bps_burst", "1 KiB")
    driver = remote.driver("echo", EchoDriver)
    data = bytes(range(256)) * 1024
    began = time.monotonic()
    for _ in range(4):
        assert driver.echo(data) == data
    # Each moves 512 KiB, both ways together; the last one's debt is not waited for.
    assert time.monotonic() - began >= 3 * 0.5 / 4 - 0.01


class Slow(vbus.Device):
    """Answers when it is let, and knows how many wait."""

    device_id = ECHO_ID
    queues = ("requests",)

    def __init__(self) -> None:
        self.waiting = 0
        self.go = asyncio.Event()

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.waiting += 1
        await self.go.wait()
        self.waiting -= 1
        request.write(request.read())


def test_outstanding_requests_of_a_device_are_limited(attached: Attached) -> None:
    device = Slow()
    bus, remote = attached(slow=device)
    bus.set("slow", "limit.outstanding", "3")
    driver = remote.driver("slow", EchoDriver)
    futures = [driver.queue(0).submit([b"x"], 1) for _ in range(20)]
    assert wait_until(lambda: device.waiting == 3)
    time.sleep(0.05)
    assert device.waiting == 3
    bus.loop.get().call_soon_threadsafe(device.go.set)
    assert [future.result(20) for future in futures] == [b"x"] * 20


def test_a_member_shares_its_limit_among_its_devices(attached: Attached) -> None:
    first, second = Slow(), Slow()
    bus, remote = attached(first=first, second=second)
    me = f"uid:{os.getuid()}"
    assert bus.set_member(me, "outstanding", "4") == 4
    drivers = [remote.driver(name, EchoDriver) for name in ("first", "second")]
    futures = [driver.queue(0).submit([b"x"], 1) for driver in drivers for _ in range(10)]
    assert wait_until(lambda: first.waiting + second.waiting == 4)
    time.sleep(0.05)
    assert first.waiting + second.waiting <= 5
    for device in (first, second):
        bus.loop.get().call_soon_threadsafe(device.go.set)
    assert [future.result(20) for future in futures] == [b"x"] * 20
    (row,) = [row for row in bus.describe_members() if row["member"] == me]
    assert row["limits"] == {"outstanding": 4}
    assert row["held"] > 0


def test_buffers_of_a_pull_queue_wait_for_the_limit(attached: Attached) -> None:
    lamp = Lamp()
    bus, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    bus.set("lamp", "limit.iops", "50")
    bus.set("lamp", "limit.iops_burst", "1")
    events = [driver.queue(1).submit([], 100) for _ in range(3)]
    assert wait_until(lambda: lamp.say(b"one"))
    assert not lamp.say(b"too soon")
    assert wait_until(lambda: lamp.say(b"two"))
    assert [event.result(10) for event in events[:2]] == [b"one", b"two"]


def test_channels_of_a_member_are_limited(attached: Attached) -> None:
    bus, remote = attached()
    me = f"uid:{os.getuid()}"
    bus.set_member(me, "channels", "2")
    first = remote.open_channel("a", create=True)
    remote.open_channel("b", create=True)
    with pytest.raises(DriverError, match="may have 2 channels") as refused:
        remote.open_channel("c", create=True)
    assert refused.value.errno == errno.EMFILE
    with pytest.raises(DriverError) as refused:
        remote.open_channel("nowhere")
    assert refused.value.errno == errno.EMFILE
    first.close()
    with pytest.raises(DriverError) as refused:
        remote.open_channel("nowhere")
    assert refused.value.errno == errno.ENOENT
    third = remote.open_channel("c", create=True)
    third.close()
    remote.close()
    assert wait_until(lambda: all(row["channels"] == 0 for row in bus.describe_members()))


@pytest.mark.parametrize("connector_kind", ["process-tunnelled", "process-direct"], indirect=True)
def test_memory_of_a_member_is_limited(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    me = f"uid:{os.getuid()}"
    mapped = next(row["memory"] for row in bus.describe_members() if row["member"] == me)
    assert mapped >= 1 << 20
    bus.set_member(me, "memory", str(mapped + 4096))
    (connector,) = bus.connectors.values()
    with pytest.raises(DriverError, match="of memory mapped here") as refused:
        vbus.attach(connector.address)
    assert refused.value.errno == errno.ENOMEM
    assert remote.driver("echo", EchoDriver).echo(b"mine") == b"mine"
    remote.close()
    assert wait_until(lambda: all(row["memory"] == 0 for row in bus.describe_members()))
    with vbus.attach(connector.address) as again:
        assert again.driver("echo", EchoDriver).echo(b"again") == b"again"


def test_members_are_named_as_in_a_file(make_bus: MakeBus) -> None:
    bus = make_bus()
    assert bus.set_member("uid:root", "iops", "5") == 5
    assert bus.set_member("uid:0", "limit.bps", "1 MiB") == 1 << 20
    assert [(row["member"], row["limits"]) for row in bus.describe_members()] == [
        ("uid:0", {"iops": 5, "bps": 1 << 20})
    ]
    for member in ("root", "uid:", "uid:nobody-of-this-name"):
        with pytest.raises(UsageError):
            bus.set_member(member, "iops", "5")
    with pytest.raises(UsageError):
        bus.set_member("uid:0", "iops", "0")
    assert len(bus.describe_members()) == 1


def test_a_reset_ends_the_wait(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    bus.set("echo", "limit.iops", "1")
    bus.set("echo", "limit.iops_burst", "1")
    driver = remote.driver("echo", EchoDriver)
    futures = [driver.queue(0).submit([b"x"], 1) for _ in range(10)]
    assert futures[0].result(10) == b"x"
    closing = threading.Thread(target=driver.close)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    with pytest.raises(DriverError):
        futures[-1].result(5)
    bus.set("echo", "limit.iops", "none")
    assert remote.driver("echo", EchoDriver).echo(b"y") == b"y"


class Never(vbus.Device):
    """Takes requests and answers none."""

    device_id = ECHO_ID
    queues = ("requests",)

    def __init__(self) -> None:
        self.taken = 0

    async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        self.taken += 1
        await asyncio.sleep(3600)


@pytest.mark.parametrize("end", ["reset", "leave", "unplug", "fail"])
def test_a_request_that_ends_otherwise_makes_room_too(attached: Attached, end: str) -> None:
    class Fails(Never):
        go = False

        async def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
            self.taken += 1
            while not self.go:
                await asyncio.sleep(0.005)
            raise RuntimeError("as it should")

    device = Fails() if end == "fail" else Never()
    bus, remote = attached(never=device, echo=Echo())
    bus.set_member(f"uid:{os.getuid()}", "outstanding", "1")
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as other:
        first, second = other.driver("never", EchoDriver), remote.driver("echo", EchoDriver)
        first.queue(0).submit([b"x"], 1)
        assert wait_until(lambda: device.taken == 1)
        waiting = second.queue(0).submit([b"y"], 1)
        assert wait_until(lambda: bus.describe_members()[-1]["held"] + bus.describe_members()[0]["held"] > 0)
        assert not waiting.done()
        match end:
            case "reset":
                first.close()
            case "leave":
                other.close()
            case "unplug":
                bus.unplug("never", surprise=True)
            case _:
                device.go = True  # type: ignore[attr-defined]
        assert waiting.result(10) == b"y"


def test_kicks_of_a_queue_that_waits_leave_one_timer(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    bus.set("echo", "limit.bps", "1")
    driver = remote.driver("echo", EchoDriver)
    # A debt of days.
    assert len(driver.echo(bytes(200_000))) == 200_000
    waiting = driver.queue(0).submit([b"x"], 1)
    slot = bus.slot("echo")
    for _ in range(2000):
        slot.mark(slot.queues[0])
        time.sleep(0)
    key = slot.key(slot.queues[0])
    assert sum(timed == key for _, timed in bus.pool._timers) <= 2
    bus.set("echo", "limit.bps", "none")
    assert waiting.result(10) == b"x"
