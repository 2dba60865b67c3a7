"""The guest connector of `vhost-user`: this process is the front-end, and any back-end serves the device.

What a driver's side asks of a bus is translated: there is one device on it, whose class is known from elsewhere, and
each question becomes one of the protocol's, or is answered here where the protocol has no word for it. Memory: the
arena, region by region (`vhost_user_memory`). Signal: an eventfd a queue and direction, or in-band messages. Which
class has what is in `vhost_user_classes`; sockets, questions and answers are in `vhost_user_link`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from vbus import _core, msg
from vbus.channel import Mirror
from vbus.errors import DriverError, UsageError, Violation
from vbus.proxy.connector import GuestConnector
from vbus.proxy.connectors import vhost_user_state
from vbus.proxy.connectors.vhost_user_classes import OwnNet, class_of
from vbus.proxy.connectors.vhost_user_link import BackEndLink
from vbus.proxy.connectors.vhost_user_memory import PartedArena
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from vbus.virtio import DeviceID, Status, features
from vbus.virtio.net import ACK_ERR, ACK_OK, controlq

R = TypeVar("R")
log = logging.getLogger("vbus.proxy")

NUMBER = 1
"""The device's number on a bus that has no other."""
MAX_QUEUE_SIZE = 1024
"""Descriptors that a ring may have: no message tells, and every back-end takes so many."""
MAX_QUEUES = 256
"""Queues that SET_VRING_KICK can name."""
CONTROL_SIZE = 64
FEATURE_BITS = 64
WANTED = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
)
"""What this front-end uses of whatever is offered; CONFIG and in-band notifications come to it by class and choice."""
IN_BAND = ProtocolFeature.INBAND_NOTIFICATIONS | ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
"""In-band notifications, and what the protocol wants with them."""


@dataclass(frozen=True)
class FrontEndOptions:
    """What a front-end is told by whoever starts it, as the protocol does not say it; see `vbus.attach`. UsageError."""

    device_id: int
    name: str | None = None
    signal: Literal["direct", "in-band"] = "direct"
    queues: int | None = None
    config_size: int | None = None
    mac: bytes | None = None

    def __post_init__(self) -> None:
        """UsageError for what cannot be."""
        if self.signal not in ("direct", "in-band"):
            raise UsageError(f"signal {self.signal!r}: write direct or in-band")
        if self.queues is not None and self.queues < 1:
            raise UsageError(f"queues {self.queues}: there is at least one")
        if self.config_size is not None and not 0 <= self.config_size <= m.MAX_CONFIG:
            raise UsageError(f"config_size {self.config_size}: 0 to {m.MAX_CONFIG} bytes")
        if self.mac is not None and (len(self.mac) != 6 or self.mac[0] & 1):
            raise UsageError(f"mac {self.mac.hex(':')}: 6 bytes, the address of one station")


@dataclass
class _Vring:
    """A ring of ours, and how it is signalled."""

    index: int
    size: int
    place: int
    ring: _core.DriverQueue
    queue: RemoteQueue
    signal: _core.Signal
    key: int
    """Its turns reap what is finished."""
    keys: list[int]
    bells: dict[str, _core.Doorbell] = field(default_factory=dict)
    """`kick`, `call`, `err`: those that are descriptors."""
    served_here: _core.DeviceQueue | None = None
    """Where the front-end itself is the device."""
    base: int = 0
    started: bool = False
    may_kick: bool = False
    """Whether a kick may be said now: one that comes behind the word that ends the ring is an offence."""
    enabled: bool = True
    kicks: int = 0
    """In-band."""
    kicking: bool = False
    """A kick in-band has not been acknowledged yet."""
    kick_again: bool = False


class VhostUserConnector(GuestConnector):
    """Attached to the socket of a back-end. DriverError when it is not there, or not one that can be used."""

    arena: PartedArena

    def __init__(self, path: Path, loop: Loop, timeout: float, options: FrontEndOptions) -> None:
        super().__init__(loop, timeout, PartedArena())
        self.path = path
        self.options = options
        self._turn = threading.RLock()
        self._kick_lock = threading.Lock()
        self._device: RemoteDevice | None = None
        self._vrings: dict[int, _Vring] = {}
        self._status = Status(0)
        self._chosen = 0
        self._begun = False
        """A driver has said something since the device was reset for the last time."""
        self._generation = 0
        self._config_telling = False
        self._growing = False
        self._parts = 1
        self._own_memory = _core.Memory()
        self._own_memory.add(self.arena.address, self.arena.mapping)
        self._link = BackEndLink(_connect(path, timeout, self.arena), loop, timeout, self._link_ended, self._said)
        self._grow_key = loop.key(self._grow, 0)
        self._spare_key = loop.key(self._shrink, 0)
        try:
            self._negotiate()
        except BaseException:
            self._link.fail(DriverError(errno.ESHUTDOWN, "detached"))
            loop.close()
            self._give_back()
            raise

    # Meeting the back-end.

    def _negotiate(self) -> None:
        link, options = self._link, self.options
        kind = class_of(options.device_id)
        self._by_back_end = link.number(Request.GET_FEATURES)
        self._has_protocol = bool(self._by_back_end >> m.PROTOCOL_FEATURES & 1)
        offered = link.number(Request.GET_PROTOCOL_FEATURES) if self._has_protocol else 0
        wanted = WANTED
        is_net = options.device_id == DeviceID.NETWORK
        size = kind.config_size if options.config_size is None else options.config_size
        if size and not is_net:
            wanted |= ProtocolFeature.CONFIG
        self._in_band = options.signal == "in-band"
        if self._in_band:
            wanted |= IN_BAND
            if offered & IN_BAND != IN_BAND:
                raise DriverError(errno.EOPNOTSUPP, f"{self}: the back-end offers no in-band notifications")
        self.protocol = ProtocolFeature(offered & int(wanted))
        """The protocol features that were negotiated."""
        if self._has_protocol:
            link.say(Request.SET_PROTOCOL_FEATURES, m.U64(int(self.protocol)))
            link.acknowledges = bool(self.protocol & ProtocolFeature.REPLY_ACK)
        link.tell(Request.SET_OWNER)
        if self.protocol & ProtocolFeature.BACKEND_REQ:
            link.open_channel()
        counted = kind.queues // kind.queues_each
        if self.protocol & ProtocolFeature.MQ:
            counted = link.number(Request.GET_QUEUE_NUM)
            if not counted:
                raise DriverError(errno.EPROTO, f"{self}: the back-end says that it has no queues")
        counted = min(counted, options.queues or counted, MAX_QUEUES // kind.queues_each)
        self._served = counted * kind.queues_each
        """Queues that the back-end serves; what comes behind them is ours."""
        self._own_net = OwnNet(counted, options.mac) if is_net else None
        if self._own_net is not None:
            self._config_size = self._own_net.config.size
        else:
            self._config_size = self._find_config_size(size) if self.protocol & ProtocolFeature.CONFIG else 0

    def _find_config_size(self, wanted: int) -> int:
        """The most of config space, up to `wanted` bytes, that the back-end tells: some know a shorter one."""
        if self._ask_config(0, wanted) is not None:
            return wanted
        least = 0
        while wanted - least > 1:
            middle = (least + wanted) // 2
            if self._ask_config(0, middle) is not None:
                least = middle
            else:
                wanted = middle
        return least

    def __str__(self) -> str:
        return f"vhost-user:{self.path}"

    def accept(self, hello: msg.HelloResponse) -> None:
        """Show the back-end the first part of our memory, or all of it. DriverError."""
        arena = self.arena
        if self.protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self._link.number(Request.GET_MAX_MEM_SLOTS)
            if not slots:
                raise DriverError(errno.EPROTO, f"{self}: the back-end takes no memory at all")
            self._parts = min(slots, len(arena.parts))
            arena.full = lambda: self.loop.scheduler.mark(self._grow_key)
            arena.spare = lambda: self.loop.scheduler.mark(self._spare_key)
            self._link.tell(Request.ADD_MEM_REG, arena.region(0), [arena.fd])
            shown = 1
        else:
            self._link.tell(Request.SET_MEM_TABLE, arena.whole(), [arena.fd])
            self._parts = shown = len(arena.parts)
        self._link.settle()
        with self.arena_lock:
            arena.shown = shown

    # What the driver's side asks.

    def call(
        self,
        body: msg.Body,
        answer: type[R],
        dev_num: int = 0,
        timeout: float | None = None,
        on_answer: Callable[[R], None] | None = None,
        channel_priority: int | None = None,
    ) -> R:
        """Translate a question, ask it where the back-end has to know, and answer. DriverError, as any connector's."""
        if self.loop.is_here:
            raise RuntimeError("this thread answers the bus and must not wait for it; use a hook")
        with self._turn:
            if self.lost is not None:
                raise DriverError(self.lost.errno or errno.ECONNRESET, self.lost.strerror)
            result = self._answer_to(body)
        if not isinstance(result, answer):
            raise DriverError(errno.EPROTO, f"{type(result).__name__} came as the answer to {type(body).__name__}")
        if on_answer is not None:
            on_answer(result)
        return result

    def _answer_to(self, body: msg.Body) -> msg.Body:
        match body:
            case msg.Hello(revision=revision, max_msg_size=size):
                identity = uuid.uuid5(uuid.NAMESPACE_URL, str(self))
                kinds = msg.MemoryKind.SHARED, msg.SignalKind.DIRECT
                return msg.HelloResponse(revision, size, *kinds, 1, 1, 0, 0, identity, self.path.name)
            case msg.GetDevices(offset=offset):
                numbers = range(offset, NUMBER + 1)
                return msg.GetDevicesResponse(offset, len(numbers), 0, _bitmap([n == NUMBER for n in numbers]))
            case msg.GetDeviceInfo():
                queues = self._served + bool(self._own_net and self._own_net.pairs > 1)
                return msg.GetDeviceInfoResponse(
                    self.options.device_id, 0x1AF4, FEATURE_BITS, self._config_size, queues, 0, 0
                )
            case msg.Name():
                name = self.options.name or self.path.stem
                return msg.NameResponse(uuid.uuid5(uuid.NAMESPACE_URL, f"{self}#device"), name)
            case msg.GetDeviceFeatures(block_index=first, num_blocks=count):
                blocks = features.to_blocks(self._offered >> first * features.BLOCK_BITS, count)
                return msg.GetDeviceFeaturesResponse(first, count, tuple(blocks))
            case msg.SetDriverFeatures(block_index=first, features=blocks):
                self._chosen = features.from_blocks(blocks) << first * features.BLOCK_BITS
                return msg.SetDriverFeaturesResponse()
            case msg.GetDeviceStatus():
                return msg.GetDeviceStatusResponse(int(self._read_status()))
            case msg.SetDeviceStatus(status=value):
                return msg.SetDeviceStatusResponse(int(self._set_status(Status(value))))
            case msg.GetConfig(offset=offset, length=length):
                data = self._read_config(offset, length)
                return msg.GetConfigResponse(self._generation, offset, len(data), data)
            case msg.SetConfig(generation=generation, offset=offset, data=data):
                taken = generation == self._generation and self._write_config(offset, data)
                return msg.SetConfigResponse(self._generation, offset, len(data) if taken else 0)
            case msg.GetVqueue(index=index):
                most = MAX_QUEUE_SIZE if index < self._served else CONTROL_SIZE
                return msg.GetVqueueResponse(index, most, 0, 0, 0, 0)
            case msg.Release():
                return msg.ReleaseResponse()
            case msg.NextChannel():
                return msg.NextChannelResponse(0, 0, "")
        raise DriverError(errno.EOPNOTSUPP, f"{self}: vhost-user has no {type(body).__name__}")

    @property
    def _offered(self) -> int:
        hidden = 1 << m.PROTOCOL_FEATURES | 1 << m.LOG_ALL
        offered = self._by_back_end & ~hidden
        return self._own_net.offered(offered) if self._own_net is not None else offered

    # Status.

    def _read_status(self) -> Status:
        needs = Status(0)
        if self._begun and self.protocol & ProtocolFeature.STATUS:
            needs = Status(self._link.number(Request.GET_STATUS) & Status.DEVICE_NEEDS_RESET)
        return self._status | needs

    def _set_status(self, wanted: Status) -> Status:
        if not wanted:
            self._reset()
            return self._status
        new = wanted & ~self._status
        self._begun = True
        if new & Status.FEATURES_OK and not self._set_features():
            new &= ~(Status.FEATURES_OK | Status.DRIVER_OK)
        if new & Status.DRIVER_OK:
            self._start()
        self._status |= new
        if self.protocol & ProtocolFeature.STATUS:
            self._link.tell(Request.SET_STATUS, m.U64(int(self._status)))
            # What the back-end did not take, such as our features, is not so.
            self._status &= Status(self._link.number(Request.GET_STATUS) & 0xFF)
        return self._status

    def _set_features(self) -> bool:
        bits = self._chosen
        if self._own_net is not None:
            bits = self._own_net.told(bits, self._by_back_end)
        if self._has_protocol:
            bits |= 1 << m.PROTOCOL_FEATURES
        try:
            self._link.tell(Request.SET_FEATURES, m.U64(bits))
        except DriverError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True

    def _reset(self) -> None:
        """Have nothing of the device under way any more. DriverError ETIMEDOUT when it hangs."""
        if not self._begun:
            return
        link = self._link
        self._let_kick(False)
        if self.protocol & ProtocolFeature.RESET_DEVICE:
            link.tell(Request.RESET_DEVICE)
        # Some back-ends take a reset for no more than the end of all notifications.
        self._stop()
        if self.protocol & ProtocolFeature.STATUS:
            link.tell(Request.SET_STATUS, m.U64(0))
        link.settle()
        self._status = Status(0)
        self._begun = False

    # Config space.

    def _ask_config(self, offset: int, length: int) -> bytes | None:
        """So much of it; None when the back-end refuses. DriverError EPROTO for another part."""
        answer, _ = self._link.ask(Request.GET_CONFIG, m.Payload, m.Config(offset, 0, bytes(length)))
        if not isinstance(answer, m.Config) or not answer.data:
            return None
        if (answer.offset, len(answer.data)) != (offset, length):
            raise DriverError(
                errno.EPROTO,
                f"the back-end was asked for {length} bytes at {offset} of config space, "
                f"and tells {len(answer.data)} at {answer.offset}",
            )
        return answer.data

    def _read_config(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self._config_size - offset))
        if self._own_net is not None:
            return self._own_net.config.to_bytes()[offset : offset + length]
        if not length:
            return b""
        data = self._ask_config(offset, length)
        if data is None:
            raise DriverError(errno.EIO, "the back-end does not tell its config space any more")
        return data

    def _write_config(self, offset: int, data: bytes) -> bool:
        if not self.protocol & ProtocolFeature.CONFIG or not data or offset + len(data) > self._config_size:
            return False
        try:
            self._link.tell(Request.SET_CONFIG, m.Config(offset, 0, data))
        except DriverError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self._link.settle()
        return True

    # Queues.

    def prepare(self, device: RemoteDevice) -> None:
        """Nothing but knowing it: rings are made here."""
        self._device = device

    def open_queue(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a ring in the arena; the back-end hears of it when its driver begins. DriverError ENOMEM."""
        loop = self.loop
        place = self._take(_core.DriverQueue.bytes_needed(size))
        queues: list[RemoteQueue] = []
        priority = device.queue_priority(index)
        key = loop.key(lambda: queues[0].reap() if queues else False, priority)
        keys = [key]
        bells: dict[str, _core.Doorbell] = {}
        if index >= self._served:
            keys.append(loop.key(self._serve_control, priority))
            signal = _core.Signal.local(loop.scheduler, keys[-1])
        elif self._in_band:
            keys.append(loop.key(lambda: self._kick_in_band(index), priority))
            signal = _core.Signal.local(loop.scheduler, keys[-1])
        else:
            bells = {name: _new_bell() for name in ("kick", "call", "err")}
            signal = _core.Signal.direct(bells["kick"])
            for name, turn in (("call", lambda: self._called(index)), ("err", lambda: self._ring_failed(index))):
                keys.append(loop.key(turn, priority))
                loop.scheduler.add_fd(bells[name].fileno(), keys[-1])
        event_idx = bool(device.negotiated >> features.RING_EVENT_IDX & 1)
        indirect = bool(device.negotiated >> features.RING_INDIRECT_DESC & 1)
        ring = _core.DriverQueue(
            self.arena.mapping,
            place,
            self.arena.address,
            size,
            event_idx=event_idx,
            indirect=indirect,
            signal=signal,
        )
        queues.append(RemoteQueue(device, index, self.arena, self.arena_lock, ring))
        vring = _Vring(index, size, place, ring, queues[0], signal, key, keys, bells)
        if index >= self._served:
            vring.served_here = _core.DeviceQueue(size)
            vring.served_here.start(
                self._own_memory,
                size,
                ring.desc,
                ring.driver,
                ring.device,
                event_idx=event_idx,
                indirect=indirect,
                signal=_core.Signal.local(loop.scheduler, key),
            )
        self._vrings[index] = vring
        return queues[0]

    def _take(self, size: int) -> int:
        """Room in the arena, of which the back-end may have to be shown more first. DriverError ENOMEM."""
        deadline = time.monotonic() + self.timeout
        while True:
            with self.arena_lock:
                place = self.arena.take(size)
                may_grow = self.arena.shown < self._parts
            if place is not None:
                return place
            if not may_grow or self.lost is not None or time.monotonic() > deadline:
                raise DriverError(errno.ENOMEM, f"no room for {size} bytes of rings in the arena")
            time.sleep(0.002)

    def close_queues(self, device: RemoteDevice) -> None:
        """Forget keys and descriptors, and give the rings' memory back."""
        vrings, self._vrings = list(self._vrings.values()), {}
        for vring in vrings:
            if vring.served_here is not None:
                vring.served_here.stop()
            self._unwatch(vring)
            for key in vring.keys:
                self.loop.drop_key(key)
            with self.arena_lock:
                self.arena.give_back(vring.place)

    def _unwatch(self, vring: _Vring) -> None:
        for name in vring.bells.keys() & {"call", "err"}:
            self.loop.scheduler.remove_fd(vring.bells[name].fileno())

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """What this side's signal counted."""
        vring = self._vrings.get(index)
        if vring is None:
            return (0, 0, 0)
        signalled, sent, rung = vring.signal.counters
        return signalled, sent, vring.kicks if self._in_band else rung

    def _of_back_end(self) -> list[_Vring]:
        return [vring for _, vring in sorted(self._vrings.items()) if vring.served_here is None]

    def _start(self) -> None:
        """Give the back-end every ring of its own, where it stopped if it did, and let it look at each."""
        link, vrings = self._link, self._of_back_end()
        net = self._own_net
        if net is not None and controlq(net.pairs) in self._vrings and not self._status & Status.DRIVER_OK:
            # Of several pairs a driver says how many it uses; until then it is one (section 5.1.6.5.6).
            for vring in vrings:
                vring.enabled = vring.index < 2
        for vring in vrings:
            index, where = vring.index, self.arena.user_address
            ring = vring.ring
            link.tell(Request.SET_VRING_NUM, m.VringState(index, vring.size))
            link.tell(Request.SET_VRING_BASE, m.VringState(index, vring.base))
            places = where(ring.desc), where(ring.device), where(ring.driver)
            link.tell(Request.SET_VRING_ADDR, m.VringAddr(index, 0, *places, ring.device))
            # The kick comes last: with it the ring may start.
            bells = {"call": Request.SET_VRING_CALL, "err": Request.SET_VRING_ERR, "kick": Request.SET_VRING_KICK}
            for name, request in bells.items():
                if name in vring.bells:
                    link.tell(request, m.U64(index), [vring.bells[name].fileno()])
            vring.started = True
        if self._has_protocol:
            for vring in vrings:
                link.tell(Request.SET_VRING_ENABLE, m.VringState(vring.index, int(vring.enabled)))
        link.settle()
        self._let_kick(True)
        for vring in vrings:
            # A ring starts with its first kick, and one that goes on may have missed some.
            if self._in_band:
                self.loop.scheduler.mark(vring.keys[-1])
            else:
                vring.bells["kick"].ring()

    def _stop(self) -> None:
        """Stop every ring of the back-end, when nothing of it is in flight any more, and keep where each stopped."""
        self._let_kick(False)
        for vring in self._of_back_end():
            if not vring.started:
                continue
            answer, _ = self._link.ask(Request.GET_VRING_BASE, m.VringState, m.VringState(vring.index, 0))
            if answer.index != vring.index or answer.num > 0xFFFF:
                raise DriverError(errno.EPROTO, f"queue {vring.index} stopped, says the back-end, as {answer}")
            vring.started, vring.base = False, answer.num

    # Turns.

    def _called(self, index: int) -> bool:
        vring = self._vrings.get(index)
        if vring is None:
            return False
        vring.bells["call"].drain()
        return vring.queue.reap()

    def _ring_failed(self, index: int) -> bool:
        """The back-end gave up a ring: as a device that needs a reset."""
        vring, remote, device = self._vrings.get(index), self.remote, self._device
        if vring is not None and "err" in vring.bells:
            vring.bells["err"].drain()
        if vring is not None and remote is not None and device is not None and not device.needs_reset:
            status = int(self._status | Status.DEVICE_NEEDS_RESET)
            remote.config_event(NUMBER, msg.EventConfig(status, self._generation, 0, 0, b""))
        return False

    def _kick_in_band(self, index: int) -> bool:
        """At most one kick of a queue is on its way: the next waits until the back-end has read it."""
        vring = self._vrings.get(index)
        if vring is None:
            return False
        if vring.kicking:
            vring.kick_again = True
            return False

        def kicked(taken: bool) -> None:
            vring.kicking = False
            if not taken:
                self._ring_failed(index)
            elif vring.kick_again:
                vring.kick_again = False
                self._kick_in_band(index)

        # When the link is gone, the queues hear it from elsewhere.
        with self._kick_lock, contextlib.suppress(DriverError):
            if vring.may_kick:
                vring.kicking, vring.kicks = True, vring.kicks + 1
                self._link.tell_later(Request.VRING_KICK, m.VringState(index, 0), (), kicked)
        return False

    def _let_kick(self, allowed: bool) -> None:
        with self._kick_lock:
            for vring in self._of_back_end():
                vring.may_kick = allowed and vring.started

    def _said(self, request: BackendRequest, payload: m.Payload) -> None:
        """What the back-end says by itself. Violation."""
        match request, payload:
            case BackendRequest.CONFIG_CHANGE_MSG, _:
                self._generation = (self._generation + 1) & 0xFFFF_FFFF
                if not self._config_telling:
                    # However often it says so before anybody looks.
                    self._config_telling = True
                    self.loop.hook(self._tell_config)
            case ((BackendRequest.VRING_CALL | BackendRequest.VRING_ERR), m.VringState(index=index)):
                if index >= self._served or not self._in_band:
                    raise Violation("queue-index", f"{request.name} of queue {index}")
                vring = self._vrings.get(index)
                if vring is not None and request is BackendRequest.VRING_CALL:
                    self.loop.scheduler.mark(vring.key)
                elif vring is not None:
                    self._ring_failed(index)

    def _tell_config(self) -> None:
        """In the hooks' thread, which may ask what the status is now."""
        self._config_telling = False
        remote = self.remote
        if remote is None or self.lost is not None:
            return
        with contextlib.suppress(DriverError), self._turn:
            status = self._read_status()
            remote.config_event(NUMBER, msg.EventConfig(int(status), self._generation, 0, 0, b""))

    # Memory that comes and goes.

    def _grow(self) -> bool:
        """Show the back-end one more part of the arena; who waits for room is looked at when it has it."""
        with self.arena_lock:
            if self._growing or self.arena.shown >= self._parts or self.lost is not None:
                return False
            self._growing = True
            number = self.arena.shown
        with contextlib.suppress(DriverError):
            self._link.tell_later(Request.ADD_MEM_REG, self.arena.region(number), [self.arena.fd], self._grown)
        return False

    def _grown(self, taken: bool) -> None:
        with self.arena_lock:
            self._growing = False
            if taken:
                self.arena.shown += 1
            else:
                self._parts = self.arena.shown
                log.warning("%s: the back-end takes no more than %d regions", self, self._parts)
        for vring in list(self._vrings.values()):
            self.loop.scheduler.mark(vring.key)

    def _shrink(self) -> bool:
        """Take a part back that nobody needs."""
        with self.arena_lock:
            if self._growing or not self.arena.is_spare or self.lost is not None:
                return False
            self.arena.shown -= 1
            number = self.arena.shown
        with contextlib.suppress(DriverError):
            self._link.tell_later(Request.REM_MEM_REG, self.arena.region(number), (), lambda _: None)
        return False

    # The queue that a network's front-end serves itself.

    def _serve_control(self) -> bool:
        assert self._own_net is not None
        vring = self._vrings.get(controlq(self._own_net.pairs))
        if vring is None or vring.served_here is None:
            return False
        try:
            requests = vring.served_here.take(CONTROL_SIZE)
        except Violation as violation:
            assert self._device is not None
            self._device.broken(f"its control queue: {violation}")
            return False
        for request in requests:
            pairs = self._own_net.pairs_asked(request.read()) if request.writable else None
            if pairs is None:
                self._acknowledge(vring.served_here, request, ACK_ERR)
            else:
                self._use_pairs(pairs, vring.served_here, request)
        # Until there are none: it is then that the driver is asked to say when there are.
        return bool(requests)

    def _use_pairs(self, pairs: int, served: _core.DeviceQueue, request: _core.Request) -> None:
        """Enable as many pairs as a driver wants; answer when the back-end knows."""
        changed = [vring for vring in self._of_back_end() if vring.enabled != (vring.index < 2 * pairs)]
        left, refused = len(changed), 0
        if not changed or not self._has_protocol:
            self._acknowledge(served, request, ACK_OK)
            return

        def told(taken: bool) -> None:
            nonlocal left, refused
            left, refused = left - 1, refused + (not taken)
            if not left:
                self._acknowledge(served, request, ACK_ERR if refused else ACK_OK)

        for vring in changed:
            vring.enabled = not vring.enabled
            with contextlib.suppress(DriverError):
                state = m.VringState(vring.index, int(vring.enabled))
                self._link.tell_later(Request.SET_VRING_ENABLE, state, (), told)

    @staticmethod
    def _acknowledge(served: _core.DeviceQueue, request: _core.Request, ack: int) -> None:
        if request.writable:
            request.write(bytes([ack]))
        served.complete([request])

    # A device's state, while its rings are stopped (DEVICE_STATE).

    def save_state(self) -> bytes:
        """The device's own state, for another back-end's `load_state`; its rings stop for so long, and go on.

        DriverError: EOPNOTSUPP when the back-end offers no such thing, EIO when it failed, EMSGSIZE, ETIMEDOUT.
        """
        with self._suspended():
            return vhost_user_state.save(self._link)

    def load_state(self, data: bytes) -> None:
        """Give the device a state that was saved; before its driver begins, or while it has one. As `save_state`."""
        with self._suspended():
            vhost_user_state.load(self._link, data)

    @contextlib.contextmanager
    def _suspended(self) -> Iterator[None]:
        if not self.protocol & ProtocolFeature.DEVICE_STATE:
            raise DriverError(errno.EOPNOTSUPP, f"{self}: the back-end offers no device state")
        with self._turn:
            running = any(vring.started for vring in self._of_back_end())
            self._stop()
            try:
                yield
            finally:
                if running and self.lost is None:
                    self._start()

    # What the other connectors have a link for.

    def transmit(self, message: bytes, priority: int) -> None:
        """Nothing is ever sent as it is. DriverError EOPNOTSUPP."""
        raise DriverError(errno.EOPNOTSUPP, f"{self}: vhost-user carries no messages of a bus")

    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """There are no channels."""
        return False

    def has_room(self) -> bool:
        """Nothing waits."""
        return True

    def map_region(self, offset: int, size: int) -> memoryview | Mirror:
        """No channel has a region here. Violation."""
        raise Violation("channel-region", "vhost-user has no channels")

    # The end.

    def _link_ended(self, error: DriverError) -> None:
        super().end(error)

    def end(self, error: DriverError) -> None:
        """The back-end is gone, or is to be left: every question and every request ends with `error`."""
        self._link.fail(error)

    def close(self) -> None:
        """Part from the back-end, which notices that the socket is closed."""
        self._link.fail(DriverError(errno.ESHUTDOWN, "detached"))
        for vring in self._vrings.values():
            self._unwatch(vring)
        self.loop.close()
        self._give_back()

    def _give_back(self) -> None:
        self._link.close()
        # Descriptors and mappings go now, not when some cycle of this side's objects is collected.
        self._vrings.clear()
        self._device = None
        self._own_memory.clear()
        self.arena.full = self.arena.spare = None
        self.arena.close()


def _bitmap(bits: list[bool]) -> bytes:
    number = sum(bit << at for at, bit in enumerate(bits))
    return number.to_bytes(-(-len(bits) // 8), "little")


def _new_bell() -> _core.Doorbell:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return _core.Doorbell(fd)
    finally:
        os.close(fd)


def _connect(path: Path, timeout: float, arena: PartedArena) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    sock.settimeout(timeout)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        arena.close()
        reason = {
            errno.ENOENT: "there is no such socket; is the back-end running?",
            errno.ECONNREFUSED: "nobody listens there; is the back-end running?",
            errno.EPROTOTYPE: f"it is no socket of vhost-user; attach to process:{path}",
        }.get(error.errno or 0, error.strerror or str(error))
        raise DriverError(error.errno or errno.ECONNREFUSED, f"vhost-user:{path}: {reason}") from None
    return sock
