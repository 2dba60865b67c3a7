"""A peer: one driver's side that speaks virtio-msg, whatever carries the messages.

It turns messages into the verbs of slots and their refusals into answers. What differs between environments (how bytes
leave, where memory is, how a queue is signalled) is left to the connector's own kind of peer. A peer is an actor: its
messages are handled one at a time, in order.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vbus import _core, msg
from vbus.bus import Account, Actor, Attachment, Bus, InUseError, RefusedError, Ring, Slot
from vbus.channel import Mirror
from vbus.connectors.peer_channels import PeerChannels
from vbus.errors import Error, Violation
from vbus.virtio import Status, features

if TYPE_CHECKING:
    from vbus.connectors.peer_host import PeerHost

log = logging.getLogger("vbus.connector")

REVISION = 1
FEATURE_BLOCKS = 4
"""128 feature bits, in blocks of 32."""
LEAST_URGENT = 7
MAX_BLOCKS = 16
"""Blocks of features in one answer."""
LEAST_MESSAGE = 128
"""Bytes of a message that every link must take: a HELLO with the longest name fits."""
HEADROOM = 64
"""Bytes of a message that are not payload, at most."""
MAX_UNRELEASED = 256
"""Numbers of removed devices that a driver may hold: each keeps its number and its event sources from reuse."""
MAX_DRIVER_MEMORY = 1 << 36
"""Bytes that one driver may have mapped here: address space, no memory of ours."""


class MessagePeer(Attachment):
    """The device's side of one link."""

    memory_kind: int
    signal_kind: int
    max_message: int
    max_request = 0
    extra_features = 0
    """Bits of the transport's own, which are offered and taken beside those of every device."""

    def __init__(self, host: PeerHost, bus: Bus, label: str, accounts: list[Account]) -> None:
        self.host = host
        self.bus = bus
        self.label = label
        self.connector_name = host.name
        self.memory = _core.Memory(max_bytes=MAX_DRIVER_MEMORY)
        self.accounts = accounts
        self.actor = Actor(bus.pool, f"peer {label}")
        self.since = time.time()
        self.parted = False
        self.greeted = False
        self.limit = self.max_message
        """Bytes of a message that both sides take."""
        self.held: set[int] = set()
        """Device numbers that this driver has been told of and has not let go."""
        self._gone: set[int] = set()
        """Those of them whose device was removed."""
        self._dirty: set[int] = set()
        self._channels_dirty = False
        self.channels = PeerChannels(self)
        self._lock = threading.Lock()

    # What a connector's own peer adds.

    @abstractmethod
    def transmit(self, message: bytes, priority: int) -> None:
        """Send one message, before less urgent ones if the link can. Never blocks; Violation when nobody reads."""

    @abstractmethod
    def has_room(self) -> bool:
        """Whether messages go out at once, or wait for the other side."""

    @abstractmethod
    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Send what is said on a channel; False when there is no room now: `channels.room` is called when there is."""

    @abstractmethod
    def map_region(self, place: int, size: int) -> tuple[int, memoryview | Mirror]:
        """A channel's region, zero, and its offset for the driver's side, at `place` among this driver's regions."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the link holds; called once, in the peer's turn, with its slots detached."""

    def memory_kind_for(self, flags: int) -> int:
        """How buffers may be reached of a driver's side that said HELLO with these flags."""
        return self.memory_kind

    def introduced(self) -> None:
        """The driver's side said HELLO: it listens."""

    def open_sources(self, slot: Slot) -> None:
        """The driver asked for the event sources of a slot that it has: listen to them."""

    def bodied(self, frame: msg.Frame) -> bool:
        """Handle a message that only this kind of link knows; False when it is none."""
        return False

    # Sending.

    def send(self, body: msg.Body, dev_num: int = 0, token: int = 0, priority: int | None = None) -> None:
        """Send one message; a driver that does not read is parted from.

        Without `priority`, what is about a device is behind everything else, for its queues may have had any priority:
        the answer to a reset must not overtake completions from before it.
        """
        if self.parted:
            return
        if priority is None:
            priority = LEAST_URGENT if dev_num else 0
        try:
            self.transmit(msg.encode(msg.Frame(body=body, dev_num=dev_num, token=token)), priority)
        except Violation as violation:
            self.part(str(violation))
        except OSError as error:
            self.part(f"the link broke: {error.strerror}")

    def refuse(self, frame: msg.Frame, number: int, text: str) -> None:
        """Answer a request that cannot be granted."""
        self.send(msg.Error(number, msg.message_id(frame.body), text), frame.dev_num, frame.token)

    # Receiving.

    def received(self, data: bytes) -> None:
        """Handle one message, in the peer's turn; none once it has parted."""
        if self.parted:
            return
        frame = msg.decode(data)
        if isinstance(frame, msg.Malformed):
            self.part(f"malformed-message: {frame}")
            return
        self._handle(frame, self._dispatch)

    def received_on_channel(self, data: bytes) -> None:
        """Handle a message that came where only channels speak, in the peer's turn."""
        if self.parted:
            return
        frame = msg.decode(data)
        if isinstance(frame, msg.Malformed):
            self.part(f"malformed-message: {frame}")
        else:
            self._handle(frame, self._dispatch_channel)

    def _dispatch_channel(self, frame: msg.Frame) -> None:
        if not self.channels.heard(frame):
            raise Violation("not-on-channels", f"{type(frame.body).__name__} in a ring of channels")

    def _handle(self, frame: msg.Frame, dispatch: Callable[[msg.Frame], None]) -> None:
        try:
            dispatch(frame)
        except InUseError as error:
            self.refuse(frame, errno.EBUSY, str(error))
        except RefusedError as error:
            self.refuse(frame, errno.EINVAL, str(error))
        except Violation as violation:
            self.part(str(violation))
        except Exception:
            # Half a message may have been done: going on from there would be worse than the end of this link.
            log.exception("%s: a message could not be handled", self.label)
            self.part("a defect of this bus: its log has the traceback")

    def _dispatch(self, frame: msg.Frame) -> None:
        token = frame.token
        match frame.body:
            case msg.Hello(max_msg_size=limit, flags=flags):
                self._hello(limit, flags, token)
            case msg.Ping(data=data):
                self.send(msg.PingResponse(data), token=token)
            case _ if not self.greeted:
                self.part("the first message was not HELLO")
            case msg.GetDevices(offset=offset, count=count):
                self._get_devices(offset, count, token)
            case msg.Release():
                self.held.discard(frame.dev_num)
                self._gone.discard(frame.dev_num)
                self.send(msg.ReleaseResponse(), frame.dev_num, token)
            case _ if self.bodied(frame) or self.channels.handle(frame):
                pass
            case body if msg.is_event(body) or msg.response_type(type(body)) is None:
                self._event(frame)
            case _:
                slot = self.bus.slot_at(frame.dev_num)
                if slot is None or not self.host.carries(slot):
                    self.refuse(frame, errno.ENODEV, f"there is no device {frame.dev_num}")
                else:
                    self._dispatch_to(slot, frame)

    def _event(self, frame: msg.Frame) -> None:
        """A notification in band; whatever else wants no answer gets none."""
        slot = self.bus.slot_at(frame.dev_num)
        if isinstance(frame.body, msg.EventAvail) and slot is not None and slot.owner is self:
            slot.mark(slot.queue_at(frame.body.vq_index))

    def _dispatch_to(self, slot: Slot, frame: msg.Frame) -> None:
        number, token = slot.number, frame.token

        def answer(body: msg.Body) -> None:
            self.send(body, number, token)

        match frame.body:
            case msg.GetDeviceInfo():
                self._hold(number)
                answer(
                    msg.GetDeviceInfoResponse(
                        device_id=int(slot.device.device_id),
                        vendor_id=slot.device.vendor_id,
                        num_feature_bits=32 * FEATURE_BLOCKS,
                        config_size=slot.config_size,
                        max_virtqueues=len(slot.queues),
                        admin_vq_start=0,
                        admin_vq_count=0,
                    )
                )
            case msg.Name():
                answer(msg.NameResponse(slot.uuid, slot.name))
            case msg.GetDeviceFeatures(block_index=first, num_blocks=count):
                # Blocks that the device has not are zero; `first` may be anything.
                exposed = features.to_blocks(slot.exposed | self.extra_features, FEATURE_BLOCKS)
                count = min(count, MAX_BLOCKS)
                blocks = [exposed[n] if n < FEATURE_BLOCKS else 0 for n in range(first, first + count)]
                answer(msg.GetDeviceFeaturesResponse(first, count, tuple(blocks)))
            case msg.SetDriverFeatures(block_index=first, features=blocks):
                if first + len(blocks) > FEATURE_BLOCKS:
                    raise RefusedError(f"{slot.name} has {FEATURE_BLOCKS} blocks of features")
                mask = ((1 << 32 * len(blocks)) - 1) << 32 * first
                bits = slot.negotiated & ~mask | features.from_blocks(blocks) << 32 * first
                slot.set_driver_features(self, bits & ~self.extra_features)
                answer(msg.SetDriverFeaturesResponse())
            case msg.GetConfig(offset=offset, length=length):
                generation, data = slot.read_config(offset, min(length, self.limit - HEADROOM))
                answer(msg.GetConfigResponse(generation, offset, len(data), data))
            case msg.SetConfig(generation=generation, offset=offset, data=data):

                def written(taken: bool) -> None:
                    answer(msg.SetConfigResponse(slot.config_generation, offset, len(data) if taken else 0))

                slot.write_config(self, generation, offset, bytes(data), written)
            case msg.GetDeviceStatus():
                status = slot.status if slot.owner is self else Status(0)
                answer(msg.GetDeviceStatusResponse(int(status)))
            case msg.SetDeviceStatus(status=status):
                if slot.owner is not None and slot.owner is not self and status == 0:
                    # Another driver's device is in its own status 0 as far as this driver can know.
                    answer(msg.SetDeviceStatusResponse(0))
                else:
                    slot.set_status(self, status, lambda value: answer(msg.SetDeviceStatusResponse(value)))
            case msg.GetVqueue(index=index):
                queue = slot.queue_at(index)
                ring = slot.ring_of(index)
                answer(msg.GetVqueueResponse(index, queue.max_size, ring.size, ring.desc, ring.driver, ring.device))
            case msg.SetVqueue(index=index, size=size, desc=desc, driver=driver, device=device):
                ring = Ring(size, desc, driver, device)
                self.set_queue(slot, index, ring, lambda: answer(msg.SetVqueueResponse()))
            case msg.ResetVqueue(index=index):

                def was_reset(error: Error | None) -> None:
                    if error is None:
                        answer(msg.ResetVqueueResponse())
                    else:
                        self.refuse(frame, errno.ETIMEDOUT, str(error))

                slot.reset_queue(self, index, was_reset)
            case msg.GetShm(index=index):
                answer(msg.GetShmResponse(index, 0, 0))
            case msg.Sources():
                if slot.owner is not self:
                    raise RefusedError(f"{slot.name} has not been claimed: set its status first")
                self.open_sources(slot)
                priorities = bytes(slot.queue_priorities)
                answer(msg.SourcesResponse(slot.first_source, slot.generation, priorities))
            case _:
                self.refuse(frame, errno.EOPNOTSUPP, f"{type(frame.body).__name__} is not for this side of the link")

    def set_queue(self, slot: Slot, index: int, ring: Ring, done: Callable[[], None]) -> None:
        """The driver says where a ring is."""
        slot.set_queue(self, index, ring, done)

    def _hello(self, limit: int, flags: int, token: int) -> None:
        if limit < LEAST_MESSAGE:
            raise Violation(
                "message-limit", f"the driver takes messages of {limit} bytes; {LEAST_MESSAGE} are the least"
            )
        if not self.greeted:
            self.introduced()
        self.greeted = True
        self.limit = min(self.max_message, limit)
        self.send(
            msg.HelloResponse(
                revision=REVISION,
                max_msg_size=self.limit,
                memory_kind=self.memory_kind_for(flags),
                signal_kind=self.signal_kind,
                priorities=8,
                shards=1,
                max_sources=self.bus.max_sources,
                max_request=self.max_request,
                uuid=self.bus.uuid,
                name=self.bus.name,
            ),
            token=token,
        )

    def _get_devices(self, offset: int, count: int, token: int) -> None:
        """A bitmap of the numbers from `offset` on that hold a device which this driver may see."""
        count = min(count, 8 * (self.limit - HEADROOM), 1 << 15)
        numbers = [slot.number for slot in self.bus.slots() if self.host.carries(slot)]
        bitmap = bytearray(-(-count // 8))
        for number in numbers:
            if offset <= number < offset + count:
                bitmap[(number - offset) // 8] |= 1 << (number - offset) % 8
                self._hold(number)
        later = [number for number in numbers if number >= offset + count]
        # The draft asks for offsets that are multiples of 8.
        self.send(msg.GetDevicesResponse(offset, count, min(later, default=0) & ~7, bytes(bitmap)), token=token)

    def _hold(self, number: int) -> None:
        """The driver is told of a number."""
        self.held.add(number)
        if self.bus.slot_at(number) is None:
            # Removed at this very moment: `unplugged` did not find it among those that are held.
            self._gone.add(number)

    # What slots and the bus say.

    def plugged(self, slot: Slot) -> None:
        """Offer a device that arrived."""
        if self.greeted:
            self._hold(slot.number)
            # Behind the removal of what had this number before.
            self.send(msg.EventDevice(slot.number, msg.DeviceState.READY), priority=LEAST_URGENT)

    def unplugged(self, slot: Slot) -> None:
        """Say that a device is gone."""
        if self.greeted:
            # Behind the completions of its last requests.
            self.send(msg.EventDevice(slot.number, msg.DeviceState.REMOVED), priority=LEAST_URGENT)
        if slot.number in self.held:
            self._gone.add(slot.number)
        if len(self._gone) > MAX_UNRELEASED:
            self.part(f"removed-devices-held: it does not let go of {len(self._gone)} devices that were removed")

    def config_changed(self, slot: Slot) -> None:
        """Remember that a device changed; the driver hears of it once, however often it did meanwhile."""
        with self._lock:
            first = not self._dirty
            self._dirty.add(slot.number)
        if first:
            self.actor.post(self.flush_events)

    def channels_changed(self) -> None:
        """Remember that channels came or went, for a driver's side that has shown interest."""
        if self.channels.interested and not self._channels_dirty:
            self._channels_dirty = True
            self.actor.post(self.flush_events)

    def flush_events(self) -> None:
        """Send the changes that wait, as long as the link has room. In the peer's turn."""
        if self._channels_dirty and not self.parted and self.has_room():
            self._channels_dirty = False
            self.send(msg.EventChannels())
        while not self.parted and self.has_room():
            with self._lock:
                if not self._dirty:
                    return
                number = self._dirty.pop()
            slot = self.bus.slot_at(number)
            if slot is not None and slot.owner is self:
                self.send(msg.EventConfig(int(slot.status), slot.config_generation, 0, 0, b""), number)

    def slot_reset(self, slot: Slot) -> None:
        """Forget the slot's signals."""

    # The end.

    def part(self, reason: str) -> None:
        """Part from this driver: its devices are reset, everything is given back, the reason is kept."""
        with self._lock:
            if self.parted:
                return
            self.parted = True
        self.host.peer_parted(self, reason)
        for slot in self.bus.slots():
            slot.detach(self)
        self.actor.post(self._close)

    def _close(self) -> None:
        # Once more, in the peer's own turn: a message that was being handled when it parted may have claimed a device.
        for slot in self.bus.slots():
            slot.detach(self)
        self.channels.close()
        self.close()
        self.memory.clear()
        self.actor.close()

    def describe(self) -> dict[str, Any]:
        """The peer's row in a listing."""
        slots = [slot.name for slot in self.bus.slots() if slot.owner is self]
        return {
            "peer": self.label,
            "since": self.since,
            "devices": slots,
            "channels": self.channels.describe(),
            "memory": msg.MemoryKind(self.memory_kind).name.lower(),
            "not_shared": None,
        }
