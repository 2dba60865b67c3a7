"""The bus as the driver side sees it: devices that come and go, each ready for one driver.

`attach` connects and discovers. What the bus announces afterwards (devices, config changes, a device that needs a
reset) arrives on the loop's thread, which only keeps the books; whoever wants to ask the bus in return is called from
the hooks' thread.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar
from uuid import UUID

from vbus import hints, msg
from vbus.channel import Channel
from vbus.errors import DriverError, NoSuchNameError, UsageError
from vbus.proxy.channels import ChannelInfo
from vbus.proxy.connector import GuestConnector
from vbus.proxy.driver import Driver
from vbus.proxy.queue import BATCH, RemoteQueue
from vbus.virtio import Status, features

D = TypeVar("D", bound=Driver)
Event = tuple[str, "RemoteDevice"]

QUEUE_SIZE = 128
"""Descriptors of a ring when the driver does not say."""
OWN_FEATURES = sum(
    1 << bit for bit in (features.VERSION_1, features.RING_INDIRECT_DESC, features.RING_EVENT_IDX, features.RING_RESET)
)
"""What our rings understand beside a driver's own features, and always want."""
CONFIG_TRIES = 8
AT_ONCE = 64
"""Devices that are asked for at once."""


class RemoteDevice:
    """A device behind the bus, from the driver's side."""

    def __init__(self, remote: Remote, address: int, info: msg.GetDeviceInfoResponse, name: str, uuid: UUID) -> None:
        self.remote = remote
        self.address = address
        self.device_id = info.device_id
        self.vendor_id = info.vendor_id
        self.name = name
        self.uuid = uuid
        self.config_size = info.config_size
        self.num_feature_bits = info.num_feature_bits
        self.max_queues = info.max_virtqueues
        self.ring_features = OWN_FEATURES
        """What the next driver wants of the rings, where it is offered."""
        self.negotiated = 0
        self.present = True
        self.needs_reset = False
        self.queues: list[RemoteQueue] = []
        self.driver: Driver | None = None
        self.priorities = b""
        """Of each queue, from 0, the most urgent, to 7; known while a driver has the device."""

    def __repr__(self) -> str:
        return f"<RemoteDevice {self.address} {self.name}>"

    @property
    def max_request(self) -> int:
        """Bytes that the link takes in one request, readable and writable together; 0 when it has no limit."""
        return self.remote.connector.max_request

    def queue_priority(self, index: int) -> int:
        """The priority of a queue; 4 for one of which the bus said nothing."""
        return min(self.priorities[index], 7) if index < len(self.priorities) else 4

    # What a driver asks of the device (section 2 of the specification).

    @property
    def offered(self) -> int:
        """The feature bits that the device offers now."""
        blocks = -(-self.num_feature_bits // 32)
        answer = self._call(msg.GetDeviceFeatures(0, blocks), msg.GetDeviceFeaturesResponse)
        return features.from_blocks(answer.features)

    @property
    def status(self) -> Status:
        """The device's status."""
        return Status(self._call(msg.GetDeviceStatus(), msg.GetDeviceStatusResponse).status)

    def config(self) -> bytes:
        """All of config space, read until the generation before and after is one (section 2.5.4)."""
        return self._read_config()[1]

    def _read_config(self) -> tuple[int, bytes]:
        """(generation, bytes). One message where it fits; else pieces of one generation."""
        piece = self.remote.connector_config_piece
        for _ in range(CONFIG_TRIES):
            data = b""
            generations: set[int] = set()
            while len(data) < self.config_size or not generations:
                length = min(piece, self.config_size - len(data))
                answer = self._call(msg.GetConfig(len(data), length), msg.GetConfigResponse)
                generations.add(answer.generation)
                data += bytes(answer.data)
                if len(answer.data) < length:
                    break
            if len(generations) == 1:
                return generations.pop(), data
        raise DriverError(errno.EAGAIN, f"{self.name}: config space changes faster than it can be read")

    def write_config(self, offset: int, data: bytes) -> None:
        """Write config space. DriverError EPERM when the device does not take it."""
        for _ in range(CONFIG_TRIES):
            generation, _ = self._read_config()
            answer = self._call(msg.SetConfig(generation, offset, len(data), data), msg.SetConfigResponse)
            if answer.length == len(data):
                return
            if answer.generation == generation:
                break
        raise DriverError(errno.EPERM, f"{self.name}: the device refuses {len(data)} bytes at {offset} of config space")

    def _call(self, body: msg.Body, answer: type[msg.R], timeout: float | None = None) -> msg.R:
        if not self.present:
            raise DriverError(errno.ENODEV, f"{self.name} was removed")
        return self.remote.connector.call(body, answer, self.address, timeout)

    def _set_status(self, value: int) -> int:
        return self._call(msg.SetDeviceStatus(value), msg.SetDeviceStatusResponse).status

    # The life of a driver (section 3.1).

    def begin(self, wanted: int, queue_count: int, queue_size: int) -> None:
        """Reset, claim, negotiate, and set the queues up. DriverError: EBUSY when another driver has it, EIO, ..."""
        self.reset()
        self._set_status(Status.ACKNOWLEDGE)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        chosen = self.offered & (wanted | self.ring_features)
        blocks = features.to_blocks(chosen)
        self._call(msg.SetDriverFeatures(0, len(blocks), tuple(blocks)), msg.SetDriverFeaturesResponse)
        status = self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if not status & Status.FEATURES_OK:
            with contextlib.suppress(DriverError):
                self.reset()
            raise DriverError(errno.EOPNOTSUPP, f"{self.name} refuses the features {chosen:#x}")
        self.negotiated = chosen
        connector = self.remote.connector
        connector.prepare(self)
        for index in range(min(queue_count, self.max_queues)):
            place = self._call(msg.GetVqueue(index), msg.GetVqueueResponse)
            if place.max_size:
                self.queues.append(connector.open_queue(self, index, min(queue_size, place.max_size)))

    def go(self) -> None:
        """Set DRIVER_OK: from now on the device serves."""
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    def reset(self) -> None:
        """Reset the device; what was outstanding ends with ESHUTDOWN. DriverError ETIMEDOUT when it hangs."""
        self._fail_queues(DriverError(errno.ESHUTDOWN, f"{self.name} was reset"))
        deadline = time.monotonic() + self.remote.connector.timeout
        status = self._set_status(0)
        while status != 0 and time.monotonic() < deadline:
            if self.driver is None and not self.queues:
                # Not ours to reset: another driver has it, and the next status write says so.
                break
            time.sleep(0.005)
            status = int(self.status)
        if status != 0 and self.queues:
            # Its buffers are the device's for as long.
            raise DriverError(errno.ETIMEDOUT, f"{self.name} is not reset: what is under way there does not end")
        self._forget_queues()
        self.needs_reset = False

    def reset_queue(self, index: int, size: int = 0) -> None:
        """Reset one queue and set it up anew, by default with as many descriptors as before; others go on.

        What was outstanding there ends with ESHUTDOWN. DriverError: EOPNOTSUPP without RING_RESET, ...
        """
        remote_queue = self.queues[index]
        if not self.negotiated >> features.RING_RESET & 1:
            raise DriverError(errno.EOPNOTSUPP, f"{self.name} does not offer to reset one queue")
        size = size or remote_queue.size
        connector = self.remote.connector
        connector.stop_queue(self, remote_queue)
        remote_queue.fail(DriverError(errno.ESHUTDOWN, f"queue {index} of {self.name} was reset"))
        self._call(msg.ResetVqueue(index), msg.ResetVqueueResponse)
        remote_queue.free_buffers()
        connector.renew_queue(self, remote_queue, size)

    def _fail_queues(self, error: DriverError) -> None:
        for remote_queue in self.queues:
            remote_queue.fail(error)

    def _forget_queues(self) -> None:
        self.remote.connector.close_queues(self)
        for remote_queue in self.queues:
            remote_queue.free_buffers()
        self.queues = []
        self.negotiated = 0

    def reap(self) -> None:
        """Resolve what the device has finished: its last message may have overtaken the notification of that."""
        for remote_queue in self.queues:
            # And nothing that is submitted meanwhile: this ends, whatever the device does.
            for _ in range(remote_queue.outstanding // BATCH + 1):
                remote_queue.reap()

    def broken(self, reason: str) -> None:
        """The device needs a reset, or lied: what is outstanding ends with EIO until a driver begins anew."""
        self.needs_reset = True
        error = DriverError(errno.EIO, f"{self.name} needs a reset: {reason}")
        self.remote.connector.loop.hook(lambda: self._fail_queues(error))

    def gone(self, error: DriverError) -> None:
        """The device was removed, or its bus is gone."""
        self.present = False
        self._fail_queues(error)
        driver = self.driver
        if driver is not None:
            self.remote.connector.loop.hook(driver.removed)


class Remote:
    """An attached bus. Iterating gives its devices by address; a context manager that parts from it at the end."""

    def __init__(self, connector: GuestConnector, hello: msg.HelloResponse) -> None:
        self.connector = connector
        self.bus_name = hello.name
        self.bus_uuid = hello.uuid
        self.max_msg_size = hello.max_msg_size
        self.connector_config_piece = min(hello.max_msg_size, 4096) - 64
        self._devices: dict[int, RemoteDevice] = {}
        self._callbacks: list[Callable[[str, RemoteDevice], None]] = []
        self._streams: list[queue.SimpleQueue[Event | None]] = []
        self._changed = threading.Condition()
        self._closed = False
        connector.remote = self

    def discover(self) -> None:
        """Ask for every device number that exists, and for what stands behind it."""
        offset = 0
        while True:
            answer = self.connector.call(msg.GetDevices(offset, 2048), msg.GetDevicesResponse)
            numbers = list(answer.numbers())
            for start in range(0, len(numbers), AT_ONCE):
                self._discover(numbers[start : start + AT_ONCE])
            if answer.next_offset <= offset:
                return
            offset = answer.next_offset

    def _discover(self, numbers: Sequence[int]) -> None:
        """Ask for what stands behind some numbers, and then wait for all answers."""
        with self._changed:
            numbers = [number for number in numbers if number not in self._devices]
        ask = self.connector.ask
        questions = [
            (n, ask(msg.GetDeviceInfo(), msg.GetDeviceInfoResponse, n), ask(msg.Name(), msg.NameResponse, n))
            for n in numbers
        ]
        for number, info, name in questions:
            try:
                self._add(number, self.connector.answer_to(info), self.connector.answer_to(name))
            except DriverError as error:
                if error.errno != errno.ENODEV:
                    raise

    def _add(self, number: int, info: msg.GetDeviceInfoResponse, name: msg.NameResponse) -> None:
        device = RemoteDevice(self, number, info, name.name, name.uuid)
        with self._changed:
            if number in self._devices:
                return
            self._devices[number] = device
            self._changed.notify_all()
        self._tell("added", device)

    # What the bus announces. On the loop's thread.

    def device_event(self, number: int, state: int) -> None:
        """A device is ready or removed."""
        if state == msg.DeviceState.READY:
            self.connector.loop.hook(lambda: self._arrived(number))
            return
        with self._changed:
            device = self._devices.pop(number, None)
            self._changed.notify_all()
        if device is not None:
            device.reap()
            device.gone(DriverError(errno.ENODEV, f"{device.name} was removed"))
        # Through the hooks, so that an arrival which is still being looked at comes first.
        self.connector.loop.hook(lambda: self._left(number, device))

    def _arrived(self, number: int) -> None:
        with contextlib.suppress(DriverError):
            self._discover([number])

    def _left(self, number: int, device: RemoteDevice | None) -> None:
        with self._changed:
            late = self._devices.get(number)
            if late is not None and device is None:
                device = self._devices.pop(number)
                device.present = False
            self._changed.notify_all()
        if device is not None:
            device._forget_queues()
            self._tell("removed", device)
        with contextlib.suppress(DriverError, OSError):
            self.connector.call(msg.Release(), msg.ReleaseResponse, number)

    def config_event(self, number: int, event: msg.EventConfig) -> None:
        """Config space or status of a device changed."""
        device = self._devices.get(number)
        if device is None:
            return
        if event.status & Status.DEVICE_NEEDS_RESET:
            device.reap()
            device.broken("it said so")
        driver = device.driver
        if driver is not None:
            self.connector.loop.hook(driver.config_changed)
        self._tell("config", device)

    def link_lost(self, error: DriverError) -> None:
        """The bus is gone."""
        with self._changed:
            devices = list(self._devices.values())
            self._changed.notify_all()
        for device in devices:
            device.gone(error)
        for stream in self._streams:
            stream.put(None)

    def _tell(self, kind: str, device: RemoteDevice) -> None:
        for stream in list(self._streams):
            stream.put((kind, device))
        for callback in list(self._callbacks):
            self.connector.loop.hook(lambda callback=callback: callback(kind, device))  # type: ignore[misc]

    # What a user of the driver side does.

    def on_event(self, callback: Callable[[str, RemoteDevice], None]) -> None:
        """Call back with "added", "removed" or "config" and the device, from the hooks' thread."""
        self._callbacks.append(callback)

    def events(self) -> Iterator[Event]:
        """("added" | "removed" | "config", device) as it happens, from now on, until the bus is gone or left."""
        stream: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._streams.append(stream)
        return self._stream(stream)

    def _stream(self, stream: queue.SimpleQueue[Event | None]) -> Iterator[Event]:
        try:
            while (event := stream.get()) is not None:
                yield event
        finally:
            self._streams.remove(stream)

    def __iter__(self) -> Iterator[RemoteDevice]:
        with self._changed:
            return iter(sorted(self._devices.values(), key=lambda device: device.address))

    def device(self, name: str) -> RemoteDevice:
        """The device of this name. NoSuchNameError."""
        for device in self:
            if device.name == name:
                return device
        raise NoSuchNameError(hints.no_such("device", name, [d.name for d in self], f"bus {self.bus_name}"))

    def wait_for(self, name: str, timeout: float | None = None) -> RemoteDevice:
        """The device of this name, as soon as it is there. DriverError ETIMEDOUT."""
        limit = self.connector.timeout if timeout is None else timeout
        with self._changed:
            found = self._changed.wait_for(
                lambda: self.connector.lost or any(d.name == name for d in self._devices.values()), limit
            )
        if self.connector.lost is not None:
            raise DriverError(errno.ECONNRESET, f"the bus is gone: {self.connector.lost.strerror}")
        if not found:
            raise DriverError(errno.ETIMEDOUT, f"no device {name!r} within {limit} s")
        return self.device(name)

    def driver(self, name: str, cls: type[D], *, packed: bool = False, in_order: bool = False) -> D:
        """Reset the device of this name and drive it. NoSuchNameError, UsageError, DriverError (EBUSY, ...).

        `packed`: through packed rings, where the device offers them, in place of split ones. `in_order`: its requests
        shall come back in their order, where it offers that.
        """
        device = self.device(name)
        if device.device_id != cls.device_id:
            raise UsageError(
                f"device {name!r} has device id {device.device_id}; a {cls.__name__} driver wants {cls.device_id}"
            )
        device.ring_features = OWN_FEATURES | packed << features.RING_PACKED | in_order << features.IN_ORDER
        return cls(device)

    # Channels.

    def open_channel(
        self, name: str, *, create: bool = False, priority: int = 4, memory: int | str = 0, wait: float = 0.0
    ) -> Channel:
        """Open the event channel of this name, waiting up to `wait` seconds until there is one; or make it.

        One that is made is this side's alone, has `priority` (0, the most urgent, to 7) and a region of `memory` bytes
        ("64 KiB"), and is gone when this side closes it. DriverError: ENOENT, EEXIST, EBUSY (another's alone), EALREADY
        (open already), EMFILE, ENOMEM, EINVAL.
        """
        return self.connector.channels.open(name, create=create, priority=priority, memory=memory, wait=wait)

    def channels(self) -> list[ChannelInfo]:
        """The event channels that may be opened, by name."""
        return list(self.connector.channels.list())

    @property
    def lost(self) -> DriverError | None:
        """Why the bus is gone, if it is."""
        return self.connector.lost

    def close(self) -> None:
        """Part from the bus: its devices are reset by it."""
        if self._closed:
            return
        self._closed = True
        self.connector.end(DriverError(errno.ESHUTDOWN, "detached"))
        self.connector.close()
        # What holds descriptors goes now, not when this side's cycles are collected.
        for device in self:
            device.queues = []
            device.driver = None
        self.connector.remote = None
        self._devices = {}

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
