"""The guest connector of `vhost-user`: this process is the front-end, and any back-end serves the device.

What a driver's side asks of a bus is translated: there is one device on it, whose class is known from elsewhere, and
each question becomes one of the protocol's, or is answered here where the protocol has no word for it. Memory: the
arena, region by region (`vhost_user_memory`). Signal: an eventfd a queue and direction, or in-band messages. Which
class has what is in `vhost_user_classes`, rings are in `vhost_user_rings`, questions and answers in `vhost_user_link`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from vbus import _core, msg
from vbus.channel import Mirror
from vbus.errors import DriverError, UsageError, Violation
from vbus.proxy.connector import GuestConnector, Question
from vbus.proxy.connectors import vhost_user_state
from vbus.proxy.connectors.knock import connected
from vbus.proxy.connectors.vhost_user_classes import OwnNet, class_of
from vbus.proxy.connectors.vhost_user_link import BackEndLink
from vbus.proxy.connectors.vhost_user_memory import PartedArena, SharedArena
from vbus.proxy.connectors.vhost_user_rings import CONTROL_SIZE, MAX_QUEUE_SIZE, Rings
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from vbus.virtio import DeviceID, Status, features

R = TypeVar("R")

NUMBER = 1
"""The device's number on a bus that has no other."""
MAX_QUEUES = 256
"""Queues that SET_VRING_KICK can name."""
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


class VhostUserConnector(GuestConnector):
    """Attached to the socket of a back-end. DriverError when it is not there, or not one that can be used."""

    arena: PartedArena

    def __init__(self, path: Path, loop: Loop, timeout: float, options: FrontEndOptions) -> None:
        super().__init__(loop, timeout, PartedArena())
        self.path = path
        self.options = options
        self._turn = threading.RLock()
        self._device: RemoteDevice | None = None
        self._status = Status(0)
        self._chosen = 0
        self._begun = False
        """A driver has said something since the device was reset for the last time."""
        self._generation = 0
        self._config_telling = False
        self._rings: Rings | None = None
        self._own_net: OwnNet | None = None
        self._link = BackEndLink(_connect(path, timeout, self.arena), loop, timeout, self._link_ended, self._said)
        self._shared = SharedArena(self.arena, self.arena_lock, self._link, loop, self._look)
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
        self._own_net = OwnNet(counted, options.mac) if is_net else None
        self._rings = Rings(
            link,
            self.loop,
            self._shared,
            served=counted * kind.queues_each,
            has_enable=self._has_protocol,
            in_band=self._in_band,
            own_net=self._own_net,
            failed=self._ring_failed,
        )
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
        self._shared.share(by_regions=bool(self.protocol & ProtocolFeature.CONFIGURE_MEM_SLOTS))

    # What the driver's side asks.

    def ask(
        self,
        body: msg.Body,
        answer: type[R],
        dev_num: int = 0,
        on_answer: Callable[[R], None] | None = None,
        channel_priority: int | None = None,
    ) -> Question[R]:
        """Translate a question, ask it where the back-end has to know, and wait: the answer is there. DriverError."""
        if self.loop.is_here:
            raise RuntimeError("this thread answers the bus and must not wait for it; use a hook")
        with self._turn:
            if self.lost is not None:
                raise DriverError(self.lost.errno or errno.ECONNRESET, self.lost.strerror)
            result = self._answer_to(body)
        if on_answer is not None and isinstance(result, answer):
            on_answer(result)
        future: Future[msg.Body] = Future()
        future.set_result(result)
        return Question(body, answer, dev_num, 0, future)

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
                queues = self.rings.served + bool(self._own_net and self._own_net.pairs > 1)
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
                most = MAX_QUEUE_SIZE if index < self.rings.served else CONTROL_SIZE
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
            self.rings.begin()
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
        self.rings.let_kick(False)
        if self.protocol & ProtocolFeature.RESET_DEVICE:
            link.tell(Request.RESET_DEVICE)
        # Some back-ends take a reset for no more than the end of all notifications.
        self.rings.stop()
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
        return self.rings.open(device, index, size)

    @contextlib.contextmanager
    def lent_bell(self, device: RemoteDevice, index: int) -> Iterator[_core.Doorbell | None]:
        """A queue's call, which the loop does not listen to meanwhile; None in-band."""
        with self.rings.lent_bell(index) as bell:
            yield bell

    def close_queues(self, device: RemoteDevice) -> None:
        """Forget keys and descriptors, and give the rings' memory back."""
        if self._rings is not None:
            self._rings.close()

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """What this side's signal counted."""
        return self._rings.counters(index) if self._rings is not None else (0, 0, 0)

    @property
    def rings(self) -> Rings:
        """The device's rings, while there is a back-end. DriverError ESHUTDOWN."""
        if self._rings is None:
            raise DriverError(errno.ESHUTDOWN, "detached")
        return self._rings

    def _look(self) -> None:
        if self._rings is not None:
            self._rings.look()

    # What the back-end says by itself. On the loop's thread.

    def _said(self, request: BackendRequest, payload: m.Payload) -> None:
        """A message on its own channel. Violation."""
        match request, payload:
            case BackendRequest.CONFIG_CHANGE_MSG, _:
                self._generation = (self._generation + 1) & 0xFFFF_FFFF
                if not self._config_telling:
                    # However often it says so before anybody looks.
                    self._config_telling = True
                    self.loop.hook(self._tell_config)
            case ((BackendRequest.VRING_CALL | BackendRequest.VRING_ERR), m.VringState(index=index)):
                if self._rings is None or index >= self._rings.served or not self._in_band:
                    raise Violation("queue-index", f"{request.name} of queue {index}")
                if request is BackendRequest.VRING_CALL:
                    self._rings.called(index)
                else:
                    self._rings.gave_up(index)

    def _tell_config(self) -> None:
        """In the hooks' thread, which may ask what the status is now."""
        self._config_telling = False
        remote = self.remote
        if remote is None or self.lost is not None:
            return
        with contextlib.suppress(DriverError), self._turn:
            status = self._read_status()
            remote.config_event(NUMBER, msg.EventConfig(int(status), self._generation, 0, 0, b""))

    def _ring_failed(self) -> None:
        """The back-end gave up a ring: that is a device that needs a reset."""
        remote, device = self.remote, self._device
        if remote is not None and device is not None and not device.needs_reset:
            status = int(self._status | Status.DEVICE_NEEDS_RESET)
            remote.config_event(NUMBER, msg.EventConfig(status, self._generation, 0, 0, b""))

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
        if self.loop.is_here:
            raise RuntimeError("this thread answers the bus and must not wait for it; use a hook")
        if not self.protocol & ProtocolFeature.DEVICE_STATE:
            raise DriverError(errno.EOPNOTSUPP, f"{self}: the back-end offers no device state")
        with self._turn:
            running = self.rings.running
            self.rings.stop()
            try:
                yield
            finally:
                if running and self.lost is None:
                    self.rings.start()

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
        self._shared.end()
        super().end(error)

    def end(self, error: DriverError) -> None:
        """The back-end is gone, or is to be left: every question and every request ends with `error`."""
        self._link.fail(error)

    def close(self) -> None:
        """Part from the back-end, which notices that the socket is closed."""
        self._link.fail(DriverError(errno.ESHUTDOWN, "detached"))
        self.loop.close()
        self._give_back()

    def _give_back(self) -> None:
        self._link.close()
        self._shared.end()
        # Descriptors and mappings go now, not when some cycle of this side's objects is collected.
        if self._rings is not None:
            self._rings.close()
            self._rings = None
        self._device = None
        self.arena.close()


def _bitmap(bits: list[bool]) -> bytes:
    number = sum(bit << at for at, bit in enumerate(bits))
    return number.to_bytes(-(-len(bits) // 8), "little")


def _connect(path: Path, timeout: float, arena: PartedArena) -> socket.socket:
    try:
        return connected(
            "vhost-user",
            path,
            socket.SOCK_STREAM,
            timeout,
            running="is the back-end running?",
            otherwise=f"it is no socket of vhost-user; attach to process:{path}",
        )
    except BaseException:
        arena.close()
        raise
