"""What every connector must do: the same checks, over each of them, with the same device models."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

import vbus
from conftest import Attached, make_connector, wait_until
from models import (
    AsyncEcho,
    Awaits,
    Backwards,
    BatchEcho,
    Echo,
    EchoDriver,
    Hangs,
    Lamp,
    LampDriver,
    Raises,
    Two,
    TwoAsync,
    TwoDriver,
    ViewEcho,
)
from vbus import msg
from vbus.bus import Bus, Device
from vbus.devices import Blk
from vbus.errors import DriverError, NoSuchNameError, UsageError, Violation
from vbus.virtio import Status, features


def test_discovery_gives_addresses_names_and_identities(attached: Attached) -> None:
    bus, remote = attached(one=Echo(), two=Lamp())
    found = {device.name: device for device in remote}
    assert list(found) == ["one", "two"]
    assert found["one"].device_id == Echo.device_id
    assert [found[name].uuid for name in found] == [bus.slot(name).uuid for name in found]
    assert [found[name].address for name in found] == [bus.slot(name).number for name in found]
    assert remote.bus_name == "test"


LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@LAYOUTS
@pytest.mark.parametrize("model", [Echo, BatchEcho, AsyncEcho, ViewEcho])
def test_every_kind_of_handler_answers_every_size(attached: Attached, model: type[Device], packed: bool) -> None:
    _, remote = attached(echo=model())
    driver = remote.driver("echo", EchoDriver, packed=packed)
    assert bool(driver.device.negotiated >> features.RING_PACKED & 1) == packed
    for size in (1, 2, 511, 4096, 65_535, 65_536, 300_001):
        data = random.Random(size).randbytes(size)
        assert driver.echo(data) == data


@LAYOUTS
@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])
@pytest.mark.parametrize("model", [Echo, BatchEcho, AsyncEcho, ViewEcho])
def test_many_requests_at_once_all_come_back(
    attached: Attached, model: type[Device], in_order: bool, packed: bool
) -> None:
    _, remote = attached(echo=model())
    driver = remote.driver("echo", EchoDriver, packed=packed, in_order=in_order)
    assert bool(driver.device.negotiated >> features.IN_ORDER & 1) == in_order
    sent = [f"request {n}".encode() * (n % 7 + 1) for n in range(1000)]
    futures = [driver.queue(0).submit([data], 200) for data in sent]
    assert [future.result(30) for future in futures] == sent


def test_plain_handlers_answer_in_ring_order(attached: Attached) -> None:
    _, remote = attached(echo=Echo())
    driver = remote.driver("echo", EchoDriver)
    order: list[int] = []
    futures: list[Future[bytes]] = []
    for n in range(300):
        future = driver.queue(0).submit([str(n).encode()], 8)
        future.add_done_callback(lambda done: order.append(int(done.result())))
        futures.append(future)
    for future in futures:
        future.result(20)
    assert wait_until(lambda: len(order) == 300)
    assert order == list(range(300))


def test_async_handlers_overlap_up_to_their_limit(attached: Attached) -> None:
    device = AsyncEcho()
    _, remote = attached(echo=device)
    driver = remote.driver("echo", EchoDriver)
    for future in [driver.queue(0).submit([b"x"], 1) for _ in range(200)]:
        future.result(20)
    assert 1 < device.most <= AsyncEcho.concurrency


@LAYOUTS
def test_an_async_handler_that_awaits_does_not_hold_up_its_queue(attached: Attached, packed: bool) -> None:
    device = Awaits()
    _, remote = attached(awaits=device)
    driver = remote.driver("awaits", EchoDriver, packed=packed)
    slow = [driver.queue(0).submit([b"wait %d" % n], 8) for n in range(3)]
    assert wait_until(lambda: device.waiting == 3)
    # Many more than may be under way at once, asked later and answered before.
    quick = [driver.queue(0).submit([b"%d" % n], 8) for n in range(300)]
    assert [future.result(20) for future in quick] == [b"%d" % n for n in range(300)]
    assert not any(future.done() for future in slow)
    assert device.waiting == 3
    device.release()
    assert [future.result(20) for future in slow] == [b"wait %d" % n for n in range(3)]


@LAYOUTS
def test_in_order_what_is_done_early_comes_back_late(attached: Attached, packed: bool) -> None:
    """An `async` device that finishes the last of its requests first."""
    device = Backwards()
    _, remote = attached(backwards=device)
    driver = remote.driver("backwards", EchoDriver, packed=packed, in_order=True)
    order: list[bytes] = []
    futures = [driver.queue(0).submit([bytes([n])], 8) for n in range(8)]
    for future in futures:
        future.add_done_callback(lambda done: order.append(done.result()))
    assert [future.result(20) for future in futures] == [bytes([n]) for n in range(8)]
    assert wait_until(lambda: len(order) == 8)
    assert order == [bytes([n]) for n in range(8)]
    assert device.finished == [bytes([n]) for n in range(7, -1, -1)]


def test_a_disk_gives_no_order(attached: Attached) -> None:
    _, remote = attached(disk=Blk(memory="1 MiB"), echo=Echo())
    offered = {device.name: features.TRANSPORT.names_of(device.offered) for device in remote}
    assert "IN_ORDER" in offered["echo"]
    assert "IN_ORDER" not in offered["disk"]
    assert {"RING_PACKED", "RING_RESET"} <= set(offered["disk"])


@LAYOUTS
def test_a_queue_is_reset_while_others_go_on(attached: Attached, packed: bool) -> None:
    device = Two()
    bus, remote = attached(two=device)
    driver = remote.driver("two", TwoDriver, packed=packed)
    kept = [driver.queue(1).submit([b"kept"], 8) for _ in range(3)]
    assert wait_until(lambda: len(device.kept) == 3)
    before, wanted = driver.queue(1), driver.queue(1).size
    for size in (0, 16, 0):
        driver.device.reset_queue(1, size)
        for future in kept:
            with pytest.raises(DriverError) as ended:
                future.result(20)
            assert ended.value.errno == errno.ESHUTDOWN
        assert all(request.done for request in device.kept)
        assert driver.queue(1) is before
        wanted = size or wanted
        assert driver.queue(1).size == wanted
        assert driver.queue(0).submit([b"other"], 8).result(20) == b"other"
        device.kept.clear()
        kept = [driver.queue(1).submit([b"kept"], 8) for _ in range(3)]
        assert wait_until(lambda: len(device.kept) == 3)
    for request in device.kept:
        request.write(request.read())
    device.post(lambda: device.queue("second").complete(*device.kept))
    assert [future.result(20) for future in kept] == [b"kept"] * 3
    assert bus.slot("two").violations == {}
    # From the one that was reset as often as it is used.
    for n in range(300):
        device.kept.clear()
        future = driver.queue(1).submit([b"%d" % n], 8)
        assert wait_until(lambda: len(device.kept) == 1)
        device.kept[0].write(device.kept[0].read())
        device.post(lambda: device.queue("second").complete(*device.kept))
        assert future.result(20) == b"%d" % n


def test_an_async_devices_queue_is_reset_alone(attached: Attached) -> None:
    device = TwoAsync()
    _, remote = attached(two=device)
    driver = remote.driver("two", TwoDriver)
    first, second = driver.queue(0).submit([b"one"], 8), driver.queue(1).submit([b"two"], 8)
    assert wait_until(lambda: device.waiting == {"first": 1, "second": 1})
    driver.device.reset_queue(1)
    assert device.waiting == {"first": 1, "second": 0}, "its handler was cancelled, and had ended before the answer"
    with pytest.raises(DriverError, match="reset"):
        second.result(20)
    again = driver.queue(1).submit([b"three"], 8)
    device.release()
    assert (first.result(20), again.result(20)) == (b"one", b"three")


def test_a_queue_is_not_reset_unless_that_was_negotiated(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    bus.slot("echo").mask = 1 << features.RING_RESET
    driver = remote.driver("echo", EchoDriver)
    with pytest.raises(DriverError) as refused:
        driver.device.reset_queue(0)
    assert refused.value.errno == errno.EOPNOTSUPP
    # Whoever asks all the same is refused, and goes on.
    for wrong in (0, 7):
        with pytest.raises(DriverError) as refused:
            driver.device._call(msg.ResetVqueue(wrong), msg.ResetVqueueResponse)
        assert refused.value.errno == errno.EINVAL
    assert driver.echo(b"alive") == b"alive"


def test_what_was_not_written_does_not_come_back(attached: Attached) -> None:
    _, remote = attached(echo=Echo())
    assert remote.driver("echo", EchoDriver).echo(b"abc", room=5000) == b"abc"


def test_readable_parts_arrive_as_one(attached: Attached) -> None:
    _, remote = attached(echo=Echo())
    parts = [bytes([n]) * (n + 1) for n in range(20)]
    assert remote.driver("echo", EchoDriver).queue(0).submit(parts, 500).result(20) == b"".join(parts)


def test_two_drivers_cannot_have_one_device(attached: Attached) -> None:
    bus, remote = attached(echo=Echo(), other=Echo())
    driver = remote.driver("echo", EchoDriver)
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as second:
        with pytest.raises(DriverError, match="in use") as refused:
            second.driver("echo", EchoDriver)
        assert refused.value.errno == errno.EBUSY
        assert driver.echo(b"still mine") == b"still mine"
        assert second.driver("other", EchoDriver).echo(b"free") == b"free"
        row = next(row for row in bus.describe() if row["name"] == "echo")
        assert row["connector"] == connector.name
        assert str(os.getuid()) in row["owner"]
        driver.close()
        assert second.driver("echo", EchoDriver).echo(b"mine now") == b"mine now"


def test_a_driver_that_leaves_frees_its_device(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    (connector,) = bus.connectors.values()
    with vbus.attach(connector.address) as second:
        second.driver("echo", EchoDriver).echo(b"x")
    assert wait_until(lambda: bus.slot("echo").owner is None)
    assert bus.describe()[0]["status"] == []
    assert remote.driver("echo", EchoDriver).echo(b"y") == b"y"


def test_features_come_in_three_sets(attached: Attached) -> None:
    bus, remote = attached()
    bus.plug(Lamp(), "lamp", mask=["COLOUR"])
    remote.wait_for("lamp")
    driver = remote.driver("lamp", LampDriver)
    assert driver.has("DIMMABLE")
    assert not driver.has("COLOUR")
    names = bus.describe()[0]["features"]
    assert {"DIMMABLE", "COLOUR", "VERSION_1"} <= set(names["available"])
    assert "COLOUR" not in names["exposed"]
    assert "COLOUR" not in names["negotiated"]
    assert {"DIMMABLE", "VERSION_1"} <= set(names["negotiated"])
    assert bus.get("lamp", Lamp).has("DIMMABLE")


def test_a_feature_that_was_not_offered_is_not_accepted(attached: Attached) -> None:
    bus, remote = attached()
    bus.plug(Lamp(), "lamp", mask=["COLOUR"])
    device = remote.wait_for("lamp")
    device.reset()
    device._set_status(Status.ACKNOWLEDGE | Status.DRIVER)
    device._call(msg.SetDriverFeatures(0, 2, (0b10, 1)), msg.SetDriverFeaturesResponse)
    status = device._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    assert not status & Status.FEATURES_OK


def test_an_attribute_that_is_set_shows_in_config_space(attached: Attached) -> None:
    lamp = Lamp()
    bus, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    lamp.level = 40
    assert driver.changes.acquire(timeout=10)
    assert int.from_bytes(driver.device.config()[:4], "little") == 40
    assert bus.set("lamp", "level", "41") == 41
    assert driver.changes.acquire(timeout=10)
    assert int.from_bytes(driver.device.config()[:4], "little") == 41
    with pytest.raises(NoSuchNameError, match="did you mean 'level'"):
        bus.set("lamp", "levle", "1")
    with pytest.raises(UsageError, match="whole number"):
        bus.set("lamp", "level", "bright")


def test_ten_thousand_settings_reach_the_driver_as_the_last(attached: Attached) -> None:
    lamp = Lamp()
    _, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    for level in range(10_000):
        lamp.level = level
    assert wait_until(lambda: int.from_bytes(driver.device.config()[:4], "little") == 9_999)


def test_a_driver_writes_only_what_it_may(attached: Attached) -> None:
    lamp = Lamp()
    _, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    driver.device.write_config(4, b"\x07")
    assert driver.device.config()[4] == 7
    assert "written flags" in lamp.seen
    with pytest.raises(DriverError):
        driver.device.write_config(0, b"\x01\x02\x03\x04")
    assert lamp.level == 0


def test_a_pull_queue_waits_for_the_device(attached: Attached) -> None:
    lamp = Lamp()
    _, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    assert not lamp.say(b"nobody gave a buffer")
    events = [driver.queue(1).submit([], 100) for _ in range(2)]
    assert wait_until(lambda: "available events" in lamp.seen)
    driver.queue(0).submit([b"red"], 0).result(10)
    assert events[0].result(10) == b"got red"
    assert lamp.say(b"hello")
    assert events[1].result(10) == b"hello"


def test_devices_come_and_go_while_drivers_are_attached(attached: Attached) -> None:
    bus, remote = attached(first=Echo())
    kinds: list[tuple[str, str]] = []
    remote.on_event(lambda kind, device: kinds.append((kind, device.name)))
    first = remote.driver("first", EchoDriver)
    for n in range(20):
        name = f"guest{n}"
        bus.plug(Echo(), name)
        remote.wait_for(name)
        assert remote.driver(name, EchoDriver).echo(name.encode()) == name.encode()
        assert first.echo(b"here") == b"here"
        bus.unplug(name)
    assert wait_until(lambda: kinds.count(("removed", "guest19")) == 1)
    assert [kind for kind, name in kinds if name == "guest3"] == ["added", "removed"]
    assert [device.name for device in remote] == ["first"]
    assert first.echo(b"still here") == b"still here"


def test_a_device_pulled_out_ends_every_request_with_an_error(attached: Attached) -> None:
    device = Hangs()
    bus, remote = attached(hangs=device, other=Echo())
    driver = remote.driver("hangs", EchoDriver)
    futures = [driver.queue(0).submit([b"x"], 1) for _ in range(500)]
    assert device.entered.wait(10)
    done = threading.Thread(target=lambda: bus.unplug("hangs", surprise=True, timeout=0.5))
    done.start()
    for future in futures:
        with pytest.raises(DriverError) as gone:
            future.result(10)
        assert gone.value.errno == errno.ENODEV
    done.join()
    with pytest.raises(DriverError) as gone:
        driver.queue(0)
    assert gone.value.errno == errno.ENODEV
    assert remote.driver("other", EchoDriver).echo(b"fine") == b"fine"
    device.let_go.set()


def test_a_number_is_not_reused_while_a_driver_holds_it(attached: Attached) -> None:
    bus, remote = attached(one=Echo())
    bus.unplug("one")
    assert wait_until(lambda: not any(bus._held(n) for n in range(1, 10)))
    (connector,) = bus.connectors.values()
    (peer,) = connector.peers  # type: ignore[attr-defined]
    # A driver that was told of a device and never lets go of it.
    bus.plug(Echo(), "two")
    number = bus.slot("two").number
    remote.wait_for("two")
    peer.held.add(number + 1)
    bus.plug(Echo(), "three")
    assert bus.slot("three").number == number + 2


def test_a_device_that_raises_needs_a_reset_and_gets_one(attached: Attached, caplog: pytest.LogCaptureFixture) -> None:
    bus, remote = attached(raises=Raises(), other=Echo())
    driver = remote.driver("raises", EchoDriver)
    other = remote.driver("other", EchoDriver)
    assert driver.echo(b"fine") == b"fine"
    with pytest.raises(DriverError) as broken:
        driver.queue(0).submit([b"fail"], 10).result(10)
    assert broken.value.errno == errno.EIO
    row = next(row for row in bus.describe() if row["name"] == "raises")
    assert row["violations"] == {"device-error": 1}
    assert "DEVICE_NEEDS_RESET" in row["status"]
    assert "as it was told" in caplog.text
    assert "Traceback" in caplog.text
    assert other.echo(b"undisturbed") == b"undisturbed"
    again = remote.driver("raises", EchoDriver)
    assert again.echo(b"fine again") == b"fine again"
    assert "DEVICE_NEEDS_RESET" not in next(row for row in bus.describe() if row["name"] == "raises")["status"]


@pytest.mark.parametrize("what", ["breaks", "goes"])
def test_what_a_device_finished_is_not_lost_with_it(
    attached: Attached, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its last message may overtake the notification of what it finished before."""
    bus, remote = attached(echo=Echo())
    slot = bus.slot("echo")
    driver = remote.driver("echo", EchoDriver)
    device, queue = driver.device, driver.queue(0)
    looks, reap, reap_all = [False], queue.reap, device.reap

    def looked() -> None:
        looks[0] = True
        reap_all()

    # Notifications do not get through; messages do.
    monkeypatch.setattr(queue, "reap", lambda: looks[0] and reap())
    monkeypatch.setattr(device, "reap", looked)
    finished = queue.submit([b"abc"], 3)
    assert wait_until(lambda: slot.queues[0].core.counters[0] == 1 and slot.idle())
    assert not finished.done()
    if what == "breaks":
        slot.violated(Violation("test-broke", "for a test"))
    else:
        bus.unplug("echo", surprise=True)
    assert finished.result(30) == b"abc"
    assert wait_until(lambda: device.needs_reset or not device.present)


def test_a_buffer_that_is_too_small_is_the_drivers_violation(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    driver = remote.driver("echo", EchoDriver)
    with pytest.raises(DriverError):
        driver.echo(b"four bytes and more", room=4)
    assert bus.describe()[0]["violations"] == {"buffer-too-small": 1}
    assert remote.driver("echo", EchoDriver).echo(b"ok") == b"ok"


def test_a_device_that_hangs_hangs_nobody_else(attached: Attached) -> None:
    hangers = {f"hang{n}": Hangs() for n in range(6)}
    bus, remote = attached(**hangers, fine=Echo())
    for name, device in hangers.items():
        remote.driver(name, EchoDriver).queue(0).submit([b"x"], 1)
        assert device.entered.wait(20), name
    assert remote.driver("fine", EchoDriver).echo(b"fine") == b"fine"
    assert sorted(bus.stop(timeout=0.3)) == sorted(hangers)
    for device in hangers.values():
        device.let_go.set()


def test_a_reset_ends_what_was_outstanding(attached: Attached) -> None:
    lamp = Lamp()
    _, remote = attached(lamp=lamp)
    driver = remote.driver("lamp", LampDriver)
    waiting = driver.queue(1).submit([], 10)
    driver.close()
    with pytest.raises(DriverError) as ended:
        waiting.result(10)
    assert ended.value.errno == errno.ESHUTDOWN
    assert wait_until(lambda: lamp.seen[-1] == "reset")
    again = remote.driver("lamp", LampDriver)
    buffer = again.queue(1).submit([], 10)
    assert wait_until(lambda: lamp.say(b"anew"))
    assert buffer.result(10) == b"anew"


def test_a_hundred_resets_lose_nothing(attached: Attached) -> None:
    _, remote = attached(echo=Echo())
    for n in range(100):
        driver = remote.driver("echo", EchoDriver)
        futures = [driver.queue(0).submit([bytes([n])], 1) for _ in range(5)]
        assert [future.result(10) for future in futures] == [bytes([n])] * 5
    assert remote.connector.arena.in_use < 1 << 20


def test_what_was_counted_is_what_was_done(attached: Attached) -> None:
    bus, remote = attached(echo=Echo())
    driver = remote.driver("echo", EchoDriver)
    for _ in range(50):
        driver.echo(b"12345", room=7)
    (row,) = bus.stat()
    assert (row["requests"], row["bytes_read"], row["bytes_written"]) == (50, 250, 250)
    for direction in ("to_device", "to_driver"):
        counted = row[direction]
        assert 0 < counted["rung"] <= counted["sent"] <= counted["signalled"] <= 50
    before = row
    driver.close()
    (row,) = bus.stat()
    assert row["requests"] == 50
    for direction in ("to_device", "to_driver"):
        # What was under way when it was looked at may have been counted a moment later; nothing is forgotten.
        assert all(before[direction][key] <= row[direction][key] <= 50 for key in ("signalled", "sent", "rung"))


def test_parting_ends_everything_and_leaves_nothing(
    connector_kind: str, make_bus: Callable[..., Bus], tmp_path: Path, leftovers: type
) -> None:
    bus = make_bus()
    bus.plug(Echo(), "echo")
    connector = bus.connect(make_connector(connector_kind, tmp_path))

    def visit() -> None:
        with vbus.attach(connector.address) as remote:
            driver = remote.driver("echo", EchoDriver)
            assert driver.echo(b"x") == b"x"
            del driver

    visit()
    assert wait_until(lambda: not connector.describe()["peers"])
    before = leftovers()
    for _ in range(30):
        visit()
    assert wait_until(lambda: not leftovers().exceeds(before)), f"{before} then {leftovers()}"


def test_the_bus_going_ends_every_request(attached: Attached) -> None:
    device = Hangs()
    bus, remote = attached(hangs=device)
    driver = remote.driver("hangs", EchoDriver)
    future = driver.queue(0).submit([b"x"], 1)
    assert device.entered.wait(10)
    stopper = threading.Thread(target=lambda: bus.stop(timeout=0.2))
    stopper.start()
    with pytest.raises(DriverError) as lost:
        future.result(10)
    assert lost.value.errno in (errno.ECONNRESET, errno.ENODEV)
    device.let_go.set()
    stopper.join()
    assert wait_until(lambda: remote.lost is not None)


def test_requests_beyond_the_limit_are_refused_before_they_leave(attached: Attached) -> None:
    _, remote = attached(echo=Echo())
    driver = remote.driver("echo", EchoDriver)
    with pytest.raises(DriverError) as too_long:
        driver.queue(0).submit([b"x"], 1 << 30)
    assert too_long.value.errno == errno.EMSGSIZE
    assert driver.echo(b"x") == b"x"
