"""The bus: devices with addresses, names and identities that outlast their numbers; connectors that bring drivers.

A bus joins the parts and decides nothing that belongs to them: slots hold the virtio state, connectors carry it, the
pool runs the devices. What the bus itself owns is who is here: names, numbers (not given again while anybody holds
them), sources of events, membership.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid5

from vbus import hints
from vbus.bus.channel import Channel, Channels
from vbus.bus.connector import Connector
from vbus.bus.device import Device, attributes_of
from vbus.bus.limits import MEMBER_LIMITS, Account, parse_limit
from vbus.bus.members import Credentials, Members
from vbus.bus.pool import Actor, shared_pool
from vbus.bus.runner import BusLoop
from vbus.bus.slot import LATE_SECONDS, Attachment, Slot
from vbus.bus.sources import Sources
from vbus.bus.workers import Workers
from vbus.errors import NoSuchNameError, UsageError
from vbus.virtio import Status, device_type_name, features

log = logging.getLogger("vbus.bus")
D = TypeVar("D", bound=Device)
C = TypeVar("C", bound=Connector)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_DEVICES = 0xFFFF
CHANNEL_SOURCES = 8
"""Event sources that channels use, one a priority."""
STOP_SECONDS = 5.0
"""How long a stop waits for handlers before it leaves a device behind."""


def check_name(what: str, name: str) -> str:
    """The name, when it is one. UsageError otherwise."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{what} {name!r}: a name is 1 to 63 of a-z 0-9 . _ - and begins with a letter or a digit")
    return name


def identity(name: str, bus: UUID | None = None) -> UUID:
    """The UUID that follows from a name: of a bus, or of a device on a bus of that UUID."""
    return uuid5(NAMESPACE_OID, f"vbus:{name}") if bus is None else uuid5(bus, name)


class Bus:
    """An instance that holds devices, with members that may use them.

    `max_sources` (a power of two from 16 on) is the size of every event ring: 8 of them are for channels, each of the
    others for a queue of a device. `workers`, `polling` and `affinity` say how native engines run: see `Workers`.
    Entering a bus serves, leaving stops.
    """

    def __init__(
        self,
        name: str,
        *,
        uuid: UUID | str | None = None,
        members: Iterable[str] = (),
        max_sources: int = 1024,
        workers: int | None = None,
        polling: str = "notified",
        affinity: Sequence[int] = (),
    ) -> None:
        self.name = check_name("bus", name)
        self.uuid = _uuid(uuid) if uuid is not None else identity(name)
        self.members = Members(members)
        if not 16 <= max_sources <= 1 << 16 or max_sources & (max_sources - 1):
            raise UsageError(f"max_sources {max_sources} is not a power of two from 16 to {1 << 16}")
        self.max_sources = max_sources
        self.pool = shared_pool()
        self.loop = BusLoop()
        self.workers = Workers(name, workers, polling, affinity)
        self.connectors: dict[str, Connector] = {}
        self.channels = Channels(self)
        self._accounts: dict[str, Account] = {}
        self._slots: dict[str, Slot] = {}
        self._numbers: dict[int, Slot] = {}
        self._last_number = 0
        self._sources = Sources(max_sources - CHANNEL_SOURCES)
        self._held_sources: dict[int, tuple[int, int]] = {}
        """Of each number: the first of its sources, and how many there are."""
        self._left: set[int] = set()
        """Numbers whose device is gone, and whose sources are not given back."""
        self._leaving: dict[Slot, Actor] = {}
        """What is off the bus, and has something under way that does not end."""
        self._ending: set[Slot] = set()
        """What is off the bus, until its driver has lost it."""
        self._lock = threading.RLock()
        self._running = False
        self._stop_wanted = threading.Event()

    # Devices.

    def plug(
        self,
        device: D,
        name: str | None = None,
        *,
        uuid: UUID | str | None = None,
        priority: int = 4,
        queue_priorities: Mapping[str, int] | None = None,
        mask: Iterable[str] = (),
        type_name: str | None = None,
    ) -> D:
        """Give the device a place on the bus and offer it to every driver; returns the device.

        `priority` is 0 (the most urgent) to 7; `queue_priorities` has those of queues that differ. `mask` names feature
        bits that drivers shall not see. UsageError: a name that is taken or is none, a feature that the device has not,
        no room for its queues.
        """
        kind = type_name or device_type_name(device.device_id)
        _check_priority("priority", priority)
        for queue_name, value in (queue_priorities or {}).items():
            device.queue(queue_name)
            _check_priority(f"priority of queue {queue_name}", value)
        with self._lock:
            name = check_name("device", name if name is not None else self._free_name(kind))
            if name in self._slots:
                raise UsageError(f"bus {self.name} has a device {name!r} already: choose another name")
            if device._slot is not None:
                raise UsageError(f"this {type(device).__name__} is plugged already, as {device._slot.name!r}")
            try:
                masked = (device.features | features.TRANSPORT).mask(mask)
            except ValueError as error:
                raise UsageError(f"device {name}: features.mask: {error}") from None
            own = _uuid(uuid) if uuid is not None else identity(name, self.uuid)
            number = self._free_number()
            self._start_pool()
            slot = Slot(
                self,
                device,
                number,
                name,
                own,
                type_name=kind,
                priority=priority,
                queue_priorities=queue_priorities or {},
                mask=masked,
            )
            slot.first_source = self._take_sources(number, len(slot.queues), name)
            device._slot = slot
            for queue in slot.queues:
                queue.bind(slot)
            self._slots[name] = slot
            self._numbers[number] = slot
        try:
            slot.plug(STOP_SECONDS)
        except BaseException:
            self._forget(slot)
            slot.remove(STOP_SECONDS)
            self._ending.discard(slot)
            device._slot = None
            raise
        for connector in list(self.connectors.values()):
            if connector.carries(slot):
                connector.plugged(slot)
        return device

    def unplug(self, name: str | Device, *, surprise: bool = False, timeout: float = STOP_SECONDS) -> bool:
        """Take a device off the bus. Requests under way may end first, unless it is by surprise.

        Whatever the driver still waits for fails there with ENODEV. False when the device hung and was left behind: its
        driver hears of it when nothing writes to the driver's memory any more.
        """
        slot = self.slot(name.name if isinstance(name, Device) else name)
        if slot.runner.is_here:
            raise UsageError(
                f"{slot.name}: its handlers run on this event loop, which must not wait for them; "
                "use await asyncio.to_thread(bus.unplug, ...)"
            )
        if not surprise:
            slot.drain(timeout)
        self._forget(slot)
        if slot.halt() or not self._running:
            return self._take_off(slot, timeout)
        self._take_off_late(slot)
        return False

    def _take_off(self, slot: Slot, timeout: float) -> bool:
        """Have the driver hear that its device is gone, and end that; False when it hangs."""
        for connector in list(self.connectors.values()):
            if connector.carries(slot):
                connector.unplugged(slot)
        ended = slot.remove(timeout)
        with self._lock:
            self._ending.discard(slot)
        slot.device._slot = None
        return ended

    def _take_off_late(self, slot: Slot) -> None:
        """The same, when what an engine has under way has ended: for so long the driver's memory is in use."""
        actor = Actor(self.pool, f"{slot.name}, which leaves")

        def look() -> bool:
            if not slot.is_settled:
                actor.mark_later(key, LATE_SECONDS)
            elif self._leaving.pop(slot, None) is not None:
                self._take_off(slot, STOP_SECONDS)
                actor.close()
            return False

        key = actor.key(look, 0)
        self._leaving[slot] = actor
        actor.mark(key)

    def _forget(self, slot: Slot) -> None:
        with self._lock:
            self._slots.pop(slot.name, None)
            self._numbers.pop(slot.number, None)
            self._left.add(slot.number)
            self._ending.add(slot)

    def slots(self) -> list[Slot]:
        """The places that hold a device, by address."""
        with self._lock:
            return sorted(self._slots.values(), key=lambda slot: slot.number)

    def has_devices(self, attachment: Attachment) -> bool:
        """Whether a driver's side has devices. Those count that left, and are still in the middle of something."""
        with self._lock:
            return any(slot.owner is attachment for slot in [*self._slots.values(), *self._ending])

    def slot(self, name: str) -> Slot:
        """The place of this name. NoSuchNameError."""
        with self._lock:
            try:
                return self._slots[name]
            except KeyError:
                raise NoSuchNameError(hints.no_such("device", name, self._slots, f"bus {self.name}")) from None

    def slot_at(self, number: int) -> Slot | None:
        """The place of this address, if a device is there."""
        return self._numbers.get(number)

    def get(self, name: str, cls: type[D]) -> D:
        """The device of this name, which must be of this class. NoSuchNameError, UsageError."""
        device = self.slot(name).device
        if not isinstance(device, cls):
            raise UsageError(f"device {name!r} is a {type(device).__name__}, not a {cls.__name__}")
        return device

    def _free_name(self, kind: str) -> str:
        base = re.sub(r"[^a-z0-9._-]", "-", kind.lower())
        return next(name for n in range(MAX_DEVICES) if (name := f"{base}{n}") not in self._slots)

    def _free_number(self) -> int:
        """The next number that nobody holds: neither a device nor a driver that has not let go of an old one."""
        for step in range(1, MAX_DEVICES + 1):
            number = (self._last_number + step - 1) % MAX_DEVICES + 1
            if number not in self._numbers and not self._held(number):
                self._last_number = number
                self._give_back_sources(number)
                return number
        raise UsageError(f"bus {self.name} has no free address: {MAX_DEVICES} devices are the most")

    def _held(self, number: int) -> bool:
        return any(connector.holds(number) for connector in self.connectors.values())

    def _take_sources(self, number: int, count: int, name: str) -> int:
        """The first of `count` event sources in a row; those of a number that somebody holds stay taken."""
        for gone in [n for n in self._left if n in self._numbers or not self._held(n)]:
            self._give_back_sources(gone)
        first = self._sources.take(count)
        if first is None:
            raise UsageError(
                f"device {name}: the bus has {self.max_sources - CHANNEL_SOURCES} event sources for queues, "
                "all in use: give it more max_sources"
            )
        self._held_sources[number] = (first, count)
        return first

    def _give_back_sources(self, number: int) -> None:
        self._left.discard(number)
        if number in self._held_sources:
            self._sources.give_back(*self._held_sources.pop(number))

    # Channels.

    def open_channel(self, name: str, *, priority: int = 4, memory: int | str = 0, relay: bool = False) -> Channel:
        """Make an event channel that every driver's side may open; returns it.

        `priority` is 0 (the most urgent) to 7. `memory` ("64 KiB") is the size of the region that each of them shares
        with this side. With `relay`, what one of them says goes to the others. UsageError; ChannelExistsError.
        """
        check_name("channel", name)
        self._start_pool()
        return self.channels.open(name, priority=priority, memory=memory, relay=relay)

    def channel(self, name: str) -> Channel:
        """The channel of this name. NoSuchNameError."""
        return self.channels.get(name)

    def channels_changed(self) -> None:
        """Tell drivers' sides that channels came or went."""
        for connector in list(self.connectors.values()):
            connector.channels_changed()

    # Connectors.

    def connect(self, connector: C, name: str | None = None) -> C:
        """Let drivers come through this connector; returns it. UsageError when its address cannot be had."""
        with self._lock:
            if name is None:
                name = next(
                    candidate
                    for n in range(MAX_DEVICES)
                    if (candidate := connector.type_name + (str(n) if n else "")) not in self.connectors
                )
            check_name("connector", name)
            if name in self.connectors:
                raise UsageError(f"bus {self.name} has a connector {name!r} already: choose another name")
            connector.bind(self, name)
            self.connectors[name] = connector
        if self._running:
            try:
                connector.start()
            except BaseException:
                self.disconnect(name)
                raise
        return connector

    def disconnect(self, name: str) -> None:
        """Part from a connector and its drivers. NoSuchNameError."""
        with self._lock:
            connector = self.connectors.pop(name, None)
        if connector is None:
            raise NoSuchNameError(hints.no_such("connector", name, self.connectors, f"bus {self.name}"))
        connector.stop()

    # Members.

    def accounts_of(self, who: Credentials | None) -> list[Account]:
        """The accounts of the members that a peer is: its user, its groups, the names in its certificate."""
        with self._lock:
            names = who.identities if who is not None else []
            return [self._accounts.setdefault(name, Account(name)) for name in names]

    def set_member(self, name: str, limit: str, text: str) -> int | None:
        """Set `limit.NAME` of a member (`uid:1000`, `uid:alice`, `gid:kvm`, ...). NoSuchNameError, UsageError."""
        member = Members.canonical(name)
        parse_limit(limit.removeprefix("limit."), text, MEMBER_LIMITS)
        with self._lock:
            account = self._accounts.setdefault(member, Account(member))
        value = account.set(limit.removeprefix("limit."), text)
        for slot in self.slots():
            slot.limits_changed()
        return value

    def describe_members(self) -> list[dict[str, Any]]:
        """One row a member that has limits, or is here: its limits, and what it uses."""
        return [
            {
                "bus": self.name,
                "member": account.name,
                "limits": dict(account.limits),
                "channels": account.channels,
                "memory": account.memory,
                "held": account.held,
            }
            for account in sorted(self._accounts.values(), key=lambda account: account.name)
        ]

    # Life.

    def _start_pool(self) -> None:
        """Serve from the first device on: its own descriptors want turns before any driver comes."""
        if not self._pool_held:
            self.pool.acquire()
            self._pool_held = True

    _pool_held = False

    def start(self) -> None:
        """Serve: accept drivers on every connector."""
        with self._lock:
            if self._running:
                return
            self._start_pool()
            self._running = True
            self._stop_wanted.clear()
            connectors = list(self.connectors.values())
        for connector in connectors:
            connector.start()

    def stop(self, timeout: float = STOP_SECONDS) -> list[str]:
        """Stop serving and take every device off; returns the names of those that hung for `timeout` seconds."""
        with self._lock:
            self._running = False
            self._stop_wanted.set()
            connectors, self.connectors = list(self.connectors.values()), {}
        for connector in connectors:
            connector.stop()
        self.channels.close("the bus stopped")
        hung = [slot.name for slot in self.slots() if not self.unplug(slot.name, surprise=True, timeout=timeout)]
        for slot in list(self._leaving):
            actor = self._leaving.pop(slot, None)
            if actor is not None:
                actor.close()
                hung += [] if self._take_off(slot, timeout) else [slot.name]
        self.loop.close(timeout if not hung else 0.1)
        if self._pool_held:
            self._pool_held = False
            self.pool.release()
        self.workers.close()
        return hung

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; says where, so that the next command can be typed. In the main thread."""
        self.start()
        for connector in self.connectors.values():
            print(f"bus {self.name}: {connector.address}", flush=True)
        end = (signal.SIGINT, signal.SIGTERM)
        old = {number: signal.signal(number, lambda *_: self._stop_wanted.set()) for number in end}
        try:
            # A wait without a limit would keep the interpreter from running the handlers on some systems.
            while not self._stop_wanted.wait(3600):
                pass
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def __enter__(self) -> Bus:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Bus:
        self.loop.use(asyncio.get_running_loop())
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # What an operator sees.

    def attributes(self, name: str) -> dict[str, Any]:
        """The attributes of a device and their values."""
        device = self.slot(name).device
        return {key: getattr(device, key) for key in attributes_of(device)}

    def set(self, name: str, attribute: str, text: str) -> Any:
        """Set an attribute to what an operator typed; returns its value. NoSuchNameError, UsageError.

        Beside the attributes of the device there are `priority` and `priority.QUEUE`, which hold from the next time on
        that a driver begins, and `limit.NAME` (see `vbus.bus.limits`; "none" takes a limit away).
        """
        slot = self.slot(name)
        device = slot.device
        known = attributes_of(device)
        if attribute.partition(".")[0] == "priority" and attribute not in known:
            return self._set_priority(slot, attribute, text)
        if attribute.startswith("limit."):
            value = slot.gate.device.set(attribute.removeprefix("limit."), text)
            slot.limits_changed()
            return value
        if attribute not in known:
            raise NoSuchNameError(hints.no_such("attribute", attribute, known, f"device {name}"))
        value, field = known[attribute].parse(text), known[attribute].tells
        slot = self.slot(name)
        if field is not None and slot.owner is not None:
            refusal = slot.owner.refuses(slot, field)
            if refusal is not None:
                raise UsageError(f"{name}: {attribute} cannot reach the driver now: {refusal}")
        setattr(device, attribute, value)
        return getattr(device, attribute)

    def _set_priority(self, slot: Slot, attribute: str, text: str) -> int:
        _, dot, queue = attribute.partition(".")
        if not text.isdecimal():
            raise UsageError(f"{attribute}: {text!r} is not a whole number: 0 (the most urgent) to 7")
        if dot:
            slot.device.queue(queue)
        value = _check_priority(attribute, int(text[:6]))
        slot.set_priority(value, queue if dot else None)
        return value

    def describe(self) -> list[dict[str, Any]]:
        """One row a device: what `vbus ls` lists."""
        return [self._row(slot) for slot in self.slots()]

    def _row(self, slot: Slot) -> dict[str, Any]:
        names = slot.device.features | features.TRANSPORT
        owner = slot.owner
        return {
            "bus": self.name,
            "address": slot.number,
            "name": slot.name,
            "uuid": str(slot.uuid),
            "type": slot.type_name,
            "device_id": int(slot.device.device_id),
            "status": Status(slot.status).names,
            "features": {
                "available": names.names_of(slot.available),
                "exposed": names.names_of(slot.exposed),
                "negotiated": names.names_of(slot.negotiated),
            },
            "connectors": [c.name for c in self.connectors.values() if c.carries(slot)],
            "connector": owner.connector_name if owner is not None else None,
            "owner": owner.label if owner is not None else None,
            "priority": slot.priority,
            "engine": slot.engine,
            "queues": [
                {
                    "index": queue.index,
                    "name": queue.name,
                    "size": queue.core.size,
                    "running": queue.core.running,
                    "priority": slot.queue_priorities[queue.index],
                }
                for queue in slot.queues
            ],
            "violations": dict(slot.violations),
        }

    def show(self, name: str) -> dict[str, Any]:
        """Everything about one device."""
        slot = self.slot(name)
        generation, config = slot.read_config(0, slot.config_size)
        return self._row(slot) | {
            "class": f"{type(slot.device).__module__}:{type(slot.device).__qualname__}",
            "attributes": self.attributes(name),
            "limits": dict(slot.gate.device.limits),
            "held": slot.gate.device.held,
            "config": {"generation": generation, "bytes": config.hex(), "fields": slot.device.config.to_dict()},
            "reasons": [{"time": when, "reason": reason} for when, reason in slot.reasons],
            "stat": [self._stat_row(slot, index) for index in range(len(slot.queues))],
        }

    def stat(self) -> list[dict[str, Any]]:
        """One row a queue: what `vbus stat` counts."""
        return [self._stat_row(slot, index) for slot in self.slots() for index in range(len(slot.queues))]

    def _stat_row(self, slot: Slot, index: int) -> dict[str, Any]:
        queue = slot.queues[index]
        requests, bytes_read, bytes_written = queue.core.counters
        to_device, to_driver = slot.signal_counters(queue)
        keys = ("signalled", "sent", "rung")
        return {
            "bus": self.name,
            "device": slot.name,
            "queue": queue.name,
            "index": index,
            "requests": requests,
            "bytes_read": bytes_read,
            "bytes_written": bytes_written,
            "to_device": dict(zip(keys, to_device, strict=True)),
            "to_driver": dict(zip(keys, to_driver, strict=True)),
        }

    def describe_channels(self) -> list[dict[str, Any]]:
        """One row a channel: its priority, its region, who has it open, and what was said."""
        return [channel.describe() for channel in self.channels]

    def describe_connectors(self) -> list[dict[str, Any]]:
        """One row a connector: its address, its drivers, and why those went that are gone."""
        return [
            {"bus": self.name, "name": name, "type": connector.type_name, **connector.describe()}
            for name, connector in list(self.connectors.items())
        ]


def _check_priority(what: str, value: int) -> int:
    if not 0 <= value <= 7:
        raise UsageError(f"{what} {value}: 0 (the most urgent) to 7")
    return value


def _uuid(text: UUID | str) -> UUID:
    with contextlib.suppress(ValueError):
        return text if isinstance(text, UUID) else UUID(text)
    raise UsageError(f"uuid {text!r}: write it as 8-4-4-4-12 hexadecimal digits")
