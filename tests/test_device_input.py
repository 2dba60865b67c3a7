"""The input device: what a driver learns of it, and what it is told; behind every connector."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

import vbus
from conftest import Attached, wait_until
from vbus import virtio
from vbus.devices.input import AXIS_MAX, BACKLOG, Input
from vbus.proxy import Driver
from vbus.virtio.input import ABS_INFO, BUTTONS, EVENT, KEYS, EventType, Led, Select, bits

BUFFERS = 32


class InputDriver(Driver):
    """Asks what the device is, and keeps what happens."""

    device_id = vbus.DeviceID.INPUT
    features = virtio.input.FEATURES
    queue_count = 2
    queue_size = 64
    Config = virtio.input.Config
    config: virtio.input.Config

    def started(self) -> None:
        self.happened: list[tuple[int, int, int]] = []
        for _ in range(BUFFERS):
            self.post()

    def post(self) -> None:
        self.queue(0).submit([], EVENT.size).add_done_callback(self._heard)

    def _heard(self, future: Future[bytes]) -> None:
        if future.exception() is None:
            self.happened.append(EVENT.unpack(future.result()))

    def ask(self, select: int, subsel: int = 0) -> bytes:
        self.device.write_config(0, bytes([select]))
        self.device.write_config(1, bytes([subsel]))
        config = self.config
        return config.data[: config.size_of_data]


def driven(attached: Attached, device: Input) -> InputDriver:
    _, remote = attached(in0=device)
    return remote.driver("in0", InputDriver)


def has(bitmap: bytes, code: int) -> bool:
    return bool(int.from_bytes(bitmap, "little") >> code & 1)


def test_a_keyboard_says_what_it_is(attached: Attached) -> None:
    driver = driven(attached, Input(label="my keys"))
    assert driver.ask(Select.ID_NAME) == b"my keys"
    assert driver.ask(Select.ID_SERIAL) == b"in0"
    keys = driver.ask(Select.EV_BITS, EventType.KEY)
    assert all(has(keys, code) for code in KEYS.values())
    assert not has(keys, BUTTONS["left"])
    assert has(driver.ask(Select.EV_BITS, EventType.LED), Led.CAPS_LOCK)
    assert driver.ask(Select.EV_BITS, EventType.ABS) == b""
    assert driver.ask(Select.ABS_INFO, 0) == b""
    assert driver.ask(Select.UNSET) == b""
    assert driver.ask(0x77, 3) == b""


def test_a_tablet_says_what_it_is(attached: Attached) -> None:
    driver = driven(attached, Input("tablet"))
    assert driver.ask(Select.EV_BITS, EventType.ABS) == b"\x03"
    assert ABS_INFO.unpack(driver.ask(Select.ABS_INFO, 1))[:2] == (0, AXIS_MAX)
    assert has(driver.ask(Select.EV_BITS, EventType.KEY), BUTTONS["left"])
    assert driver.ask(Select.EV_BITS, EventType.LED) == b""


def test_a_chord_is_pressed_and_let_go(attached: Attached) -> None:
    device = Input()
    driver = driven(attached, device)
    assert wait_until(lambda: device.press("leftshift", "a"))
    shift, a, key = KEYS["leftshift"], KEYS["a"], EventType.KEY
    expected = [(key, shift, 1), (key, a, 1), (0, 0, 0), (key, a, 0), (key, shift, 0), (0, 0, 0)]
    assert wait_until(lambda: len(driver.happened) >= 6)
    assert driver.happened == expected
    assert device.events == 6


def test_a_tablet_points(attached: Attached) -> None:
    device = Input("tablet")
    driver = driven(attached, device)
    assert wait_until(lambda: device.move(5, AXIS_MAX))
    assert wait_until(lambda: len(driver.happened) >= 3)
    assert driver.happened == [(EventType.ABS, 0, 5), (EventType.ABS, 1, AXIS_MAX), (0, 0, 0)]


def test_events_wait_for_room_and_what_finds_too_many_is_missed_whole(attached: Attached) -> None:
    device = Input()
    driver = driven(attached, device)
    # Each letter takes four buffers: far more than the driver has.
    text = "abcdefgh" * (BACKLOG // 64)
    assert wait_until(lambda: device.type(text[0]))
    assert device.type(text[1:])
    pressed = len(text)
    while device.press("x"):
        pressed += 1
    missed = device.missed
    assert missed
    assert device.events <= BUFFERS
    for posted in range(BUFFERS, 4 * pressed):
        assert wait_until(lambda n=posted: n - len(driver.happened) < BUFFERS)  # type: ignore[misc]
        driver.post()
    assert wait_until(lambda: len(driver.happened) == 4 * pressed)
    letters = [code for kind, code, value in driver.happened if kind == EventType.KEY and value == 1]
    assert letters[: len(text)] == [KEYS[letter] for letter in text]
    # None is left down.
    assert letters == [code for kind, code, value in driver.happened if kind == EventType.KEY and value == 0]


def test_lights(attached: Attached) -> None:
    device = Input()
    driver = driven(attached, device)
    driver.queue(1).submit([EVENT.pack(EventType.LED, Led.CAPS_LOCK, 1)], 0).result(10)
    driver.queue(1).submit([EVENT.pack(EventType.LED, 999, 1)], 0).result(10)
    assert device.leds == "caps_lock"
    driver.close()
    assert device.leds == ""


def test_what_a_driver_asked_and_was_not_given_goes_on_in_another(attached: Attached) -> None:
    first, second = Input(label="first"), Input(label="second")
    driver = driven(attached, first)
    assert driver.ask(Select.ID_NAME) == b"first"
    with first._lock:
        first._waiting.extend([(EventType.KEY, KEYS["a"], 0), (EventType.SYN, 0, 0)])
    second._leds = {"num_lock"}
    second.load_state(first.save_state())
    assert second.leds == ""
    assert list(second._waiting) == [(EventType.KEY, KEYS["a"], 0), (EventType.SYN, 0, 0)]
    # It answers for itself, in the place where the other one did.
    assert second.config.data[: second.config.size_of_data] == b"second"
    assert second.save_state() == first.save_state()


@pytest.mark.parametrize(
    "wrong", [b"", b"\x02" + bytes(6), bytes(7), b"\x01" + bytes(7), b"\x01" + bytes(6 + 8 * 1025)]
)
def test_a_state_that_is_none_changes_nothing(wrong: bytes) -> None:
    device = Input()
    device._leds = {"caps_lock"}
    with pytest.raises(vbus.Violation) as named:
        device.load_state(wrong)
    assert named.value.name == "input-state"
    assert device.leds == "caps_lock"


def test_a_status_that_is_no_event_is_a_violation(attached: Attached) -> None:
    device = Input()
    driver = driven(attached, device)
    with pytest.raises(OSError, match=r"."):
        driver.queue(1).submit([b"xyz"], 0).result(10)
    assert wait_until(lambda: device.slot.violations["status-size"] == 1)


def test_what_a_user_gets_wrong() -> None:
    with pytest.raises(vbus.UsageError, match="did you mean 'tablet'"):
        Input("tabelt")  # type: ignore[arg-type]
    with pytest.raises(vbus.UsageError, match="no key 'entr': did you mean 'enter'"):
        Input().press("entr")
    with pytest.raises(vbus.UsageError, match="a tablet points to"):
        Input().move(1, 1)
    with pytest.raises(vbus.UsageError, match="label has over 128 bytes"):
        Input(label="x" * 129)
    assert bits([0, 9]) == b"\x01\x02"
