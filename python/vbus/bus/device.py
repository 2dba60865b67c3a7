"""What a device model is made of: a class with an id, queues, features, config space, attributes and a handler.

A device knows requests and nothing below them: not the ring they came off, not the connector that carried them. It is
an actor: its handlers, hooks and reset never overlap, so a model needs no lock. What the outside world may do to a
device at any moment (set an attribute, read its config space) is guarded here.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, overload

from vbus import hints
from vbus.bus.queue import Queue, Request
from vbus.bus.workers import Engine
from vbus.errors import NoSuchNameError, UsageError
from vbus.virtio import Config as ConfigSpace
from vbus.virtio import FeatureSet
from vbus.virtio import features as feature_set

if TYPE_CHECKING:
    from vbus.bus.bus import Bus
    from vbus.bus.slot import Slot

T = TypeVar("T")
_TRUTHS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


class attribute(Generic[T]):
    """A value of a device that an operator sees, and may set from any thread while drivers are attached.

    `config` names the field of config space that shows it to the driver: setting the attribute then raises the
    config-change event. `set` runs in the setter's thread before the change shows; it gives the value to store, or
    raises `UsageError`. `get` computes a read-only attribute. Without `config` or `get` the device keeps the value.
    `tells` is the field of config space that a computed attribute changes, for whoever asks what reaches the driver.
    """

    def __init__(
        self,
        kind: type[T],
        *,
        config: str | None = None,
        tells: str | None = None,
        get: Callable[[Any], T] | None = None,
        set: Callable[[Any, T], T] | None = None,
        default: T | None = None,
        writable: bool | None = None,
        doc: str = "",
    ) -> None:
        self.kind = kind
        self.config = config
        self.tells = config if config is not None else tells
        self.getter = get
        self.setter = set
        self.default = default
        self.writable = writable if writable is not None else get is None
        self.__doc__ = doc
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, device: None, owner: type) -> attribute[T]: ...
    @overload
    def __get__(self, device: Device, owner: type) -> T: ...
    def __get__(self, device: Device | None, owner: type) -> T | attribute[T]:
        if device is None:
            return self
        if self.getter is not None:
            return self.getter(device)
        if self.config is not None:
            value = getattr(device.config, self.config)
            return cast(T, bool(value) if self.kind is bool else value)
        return cast(T, device._values.get(self.name, self.default))

    def __set__(self, device: Device, value: T) -> None:
        if not self.writable:
            raise UsageError(f"{device.name}: {self.name} cannot be set")
        if self.setter is not None:
            value = self.setter(device, value)
        with device._lock:
            if self.config is not None:
                try:
                    setattr(device.config, self.config, value)
                except ValueError as error:
                    raise UsageError(f"{device.name}: {self.name}: {error}") from None
            else:
                device._values[self.name] = value
        if self.config is not None:
            device.config_changed()

    def parse(self, text: str) -> T:
        """The value that an operator typed. UsageError when it is not one."""
        try:
            if self.kind is bool:
                return cast(T, _TRUTHS[text.lower()])
            if self.kind is int:
                return cast(T, int(text, 0))
            return cast(Callable[[str], T], self.kind)(text)
        except (ValueError, KeyError):
            wanted = {bool: "on or off", int: "a whole number"}.get(self.kind, f"a {self.kind.__name__}")
            raise UsageError(f"{self.name}: {text!r} is not {wanted}") from None


class Device:
    """A device model. Subclasses set the class variables and write `handle`, `handle_batch` or `async def handle`."""

    device_id: ClassVar[int]
    """Section 5 of the specification: `DeviceID`, or a number of one's own."""
    vendor_id: ClassVar[int] = 0x1AF4
    features: ClassVar[FeatureSet] = feature_set.features()
    """The named feature bits of this device class."""
    queues: ClassVar[Sequence[str | Queue]] = ()
    Config: ClassVar[type[ConfigSpace]] = ConfigSpace
    config_writable: ClassVar[Sequence[str]] = ()
    """Fields of config space that a driver may write; writes elsewhere are refused."""
    in_order: ClassVar[bool] = True
    """Whether a driver may ask for its requests back in the order in which it made them (IN_ORDER): one that is done
    early waits then for those before it. False where they take different times, as a disk's do."""
    concurrency: ClassVar[int] = 64
    """How many requests an `async` device has under way at most; the rest wait in the ring."""

    config: ConfigSpace
    _queues: list[Queue]
    _slot: Slot | None
    _lock: threading.RLock
    _values: dict[str, Any]

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Make what every device has, so that a model's `__init__` owes nothing to this class."""
        if not hasattr(cls, "device_id"):
            raise UsageError(f"{cls.__name__} has no device_id: set it to a vbus.DeviceID or a number of your own")
        device = super().__new__(cls)
        device.config = cls.Config()
        device._slot = None
        device.declare_queues(cls.queues)
        device._lock = threading.RLock()
        device._values = {}
        return device

    def declare_queues(self, queues: Sequence[str | Queue]) -> None:
        """Give this very device other queues than its class declares. In `__init__` only."""
        declared = [queue if isinstance(queue, Queue) else Queue(queue) for queue in queues]
        self._queues = [queue.live(index) for index, queue in enumerate(declared)]

    def offered_features(self) -> Iterable[str]:
        """Names of the feature bits that this very device offers; all of its class unless overridden."""
        return self.features.names

    # The handlers: a class overrides one of the two.

    def handle(self, queue: Queue, request: Request) -> Any:
        """Answer one request; it completes when this returns. May be `async`."""
        raise NotImplementedError(f"{type(self).__name__} has no handle for its queue {queue.name}")

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> Any:
        """Answer several requests, which complete together when this returns."""
        for request in requests:
            self.handle(queue, request)

    # Hooks. All run on the device's actor and never overlap with each other or with a handler.

    def plugged(self) -> None:
        """The device is on a bus: open what it serves."""

    def unplugged(self) -> None:
        """The device left its bus: close what `plugged` opened, even if that failed half-way."""

    def ready(self) -> None:
        """A driver set DRIVER_OK: `negotiated` holds what it took."""

    def queues_changed(self) -> None:
        """Which queues are served (`Queue.served`) changed, where queues come and go one by one."""

    def queue_stopping(self, queue: Queue) -> bool:
        """The driver takes a pull queue away, and waits. It may give it back later, without a reset.

        Complete what is filled, and forget what else was taken: it comes again. True says that this is done; False that
        something is being used, which is asked for again, until it is completed or five seconds are over.
        """
        return False

    def reset(self) -> None:
        """The driver reset the device. Its queues are stopped already."""

    def available(self, queue: Queue) -> None:
        """A pull queue has new buffers."""

    def config_written(self, fields: frozenset[str]) -> None:
        """The driver wrote these fields of config space."""

    def save_state(self) -> bytes:
        """What the device holds that its driver could not restore, for `load_state` of one that goes on in its place.

        Called while no queue runs. A class that overrides both has state, which moves with a guest.
        """
        return b""

    def load_state(self, data: bytes) -> None:
        """Go on from what `save_state` of another device gave. It came through hands that nobody knows.

        Violation, with a name of the device's own, for what makes no sense; best before anything was changed.
        """

    async def run(self) -> None:
        """A task beside the handlers, from plug to unplug; a device that overrides it is an `async` device."""

    # Engines: what serves queues of this device natively, if anything does.

    no_engine = "its class is served in Python"
    """Why there are none."""

    def engines(self) -> Sequence[Engine]:
        """Native engines for queues of this device, right after `plugged`. UsageError when one was asked for in vain.

        They are made with `Slot.engine_signal`, and told of what the model decides. While a limit is set on the device
        or on its driver, and for whatever an engine hands back, the model's own handlers serve the same queues.
        """
        return ()

    def engine_serves(self, queue: Queue) -> bool:
        """Whether the engine of this queue is to serve it, now that features were negotiated."""
        return True

    def engine_yielded(self, queue: Queue) -> None:
        """The engine of this queue serves it no more, and the model does from now on: take over what the engine keeps.
        In a turn of the device, before it serves the queue.
        """

    def engine_failed(self, error: OSError) -> None:
        """What is behind the device failed while an engine used it; told once of each kind and driver."""
        self.log.error("%s", error.strerror)

    # What a model may use.

    def queue(self, name: str) -> Queue:
        """The live queue of this name."""
        for queue in self._queues:
            if queue.name == name:
                return queue
        raise NoSuchNameError(hints.no_such("queue", name, [q.name for q in self._queues], type(self).__name__))

    @property
    def slot(self) -> Slot:
        """The place on a bus where this device is. UsageError when it is on none."""
        if self._slot is None:
            raise UsageError(f"this {type(self).__name__} is not plugged into a bus")
        return self._slot

    @property
    def bus(self) -> Bus:
        """The bus that the device is plugged into."""
        return self.slot.bus

    @property
    def name(self) -> str:
        """The name on its bus; the class's name while it is on none."""
        return self._slot.name if self._slot is not None else type(self).__name__.lower()

    @property
    def log(self) -> logging.Logger:
        """Where a device says what its operator should know."""
        return logging.getLogger(f"vbus.device.{self.name}")

    @property
    def negotiated(self) -> int:
        """The feature bits that the driver took; 0 before it did."""
        return self._slot.negotiated if self._slot is not None else 0

    def has(self, feature: str) -> bool:
        """Whether the driver took the feature of this name. NoSuchNameError for a name that this class has not."""
        return bool(self.negotiated & self.features.mask([feature]))

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back on the actor whenever `fd` is readable or hung up, until `unwatch`."""
        slot = self.slot
        slot.actor.watch(fd, lambda: slot.runner.call(callback), slot.priority)

    def unwatch(self, fd: int) -> None:
        """Stop watching; nothing happens when `fd` was not watched."""
        if self._slot is not None:
            self._slot.actor.unwatch(fd)

    def post(self, callback: Callable[[], None]) -> None:
        """Call back on the actor soon. From any thread."""
        slot = self.slot
        slot.actor.post(lambda: slot.runner.call(callback))

    def config_changed(self) -> None:
        """Tell the driver that config space changed (section 2.5); attributes with `config` do so by themselves."""
        if self._slot is not None:
            self._slot.config_changed()


def attributes_of(device: Device | type[Device]) -> dict[str, attribute[Any]]:
    """The attributes of a device's class, in the order of their definition, bases first."""
    cls = device if isinstance(device, type) else type(device)
    found: dict[str, attribute[Any]] = {}
    for base in reversed(cls.__mro__):
        found.update({name: value for name, value in vars(base).items() if isinstance(value, attribute)})
    return found


def is_async(device: Device) -> bool:
    """Whether any of the device's own code is a coroutine, so that all of it runs on an event loop."""
    cls = type(device)
    return (
        inspect.iscoroutinefunction(cls.handle)
        or inspect.iscoroutinefunction(cls.handle_batch)
        or cls.run is not Device.run
    )


def has_state(device: Device) -> bool:
    """Whether the class says what its state is."""
    cls = type(device)
    return cls.save_state is not Device.save_state and cls.load_state is not Device.load_state


def handles_batches(device: Device) -> bool:
    """Whether the class answers several requests at once."""
    return type(device).handle_batch is not Device.handle_batch
