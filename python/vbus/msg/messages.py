"""Every message of the bus protocol: what it means and what it holds.

Requests and their responses are classes of their own, so that a `match` reads like the protocol. The transport's and
the bus's messages come from the virtio-msg draft; those from 0x80 on are ours, in the range that it reserves for
implementations. `docs/protocol.md` tells the same in words, with test vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import UUID

from vbus.msg.layout import BadBodyError


@dataclass(frozen=True, slots=True)
class Body:
    """A message without its header; `codec.TABLE` says its id and its layout."""

    def check(self) -> None:
        """BadBodyError when the fields contradict each other."""


# The transport's messages: about one device, whose number is in the header.


@dataclass(frozen=True, slots=True)
class GetDeviceInfo(Body):
    """What is this device?"""


@dataclass(frozen=True, slots=True)
class GetDeviceInfoResponse(Body):
    """Ids, and how much of everything the device has: bits (a multiple of 32), bytes, queues."""

    device_id: int
    vendor_id: int
    num_feature_bits: int
    config_size: int
    max_virtqueues: int
    admin_vq_start: int
    admin_vq_count: int


@dataclass(frozen=True, slots=True)
class GetDeviceFeatures(Body):
    """Which features does it offer, from block `block_index` of 32 bits on?"""

    block_index: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class GetDeviceFeaturesResponse(Body):
    """The blocks, the lowest bits first."""

    block_index: int
    num_blocks: int
    features: tuple[int, ...]

    def check(self) -> None:
        """As many blocks as it says."""
        _check_count(self.num_blocks, len(self.features))


@dataclass(frozen=True, slots=True)
class SetDriverFeatures(Body):
    """These the driver takes."""

    block_index: int
    num_blocks: int
    features: tuple[int, ...]

    def check(self) -> None:
        """As many blocks as it says."""
        _check_count(self.num_blocks, len(self.features))


@dataclass(frozen=True, slots=True)
class SetDriverFeaturesResponse(Body):
    """Taken note of; FEATURES_OK says whether they stand."""


@dataclass(frozen=True, slots=True)
class GetConfig(Body):
    """`length` bytes of config space from `offset` on."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GetConfigResponse(Body):
    """The bytes, fewer at the end of config space, and their generation."""

    generation: int
    offset: int
    length: int
    data: bytes

    def check(self) -> None:
        """As many bytes as it says."""
        _check_count(self.length, len(self.data))


@dataclass(frozen=True, slots=True)
class SetConfig(Body):
    """Write `length` bytes of config space from `offset` on, if its generation is still this."""

    generation: int
    offset: int
    length: int
    data: bytes

    def check(self) -> None:
        """As many bytes as it says."""
        _check_count(self.length, len(self.data))


@dataclass(frozen=True, slots=True)
class SetConfigResponse(Body):
    """How many bytes were taken; 0: rejected. A bus may echo them; ours does not."""

    generation: int
    offset: int
    length: int
    data: bytes = b""

    def check(self) -> None:
        """No bytes, or as many as it says."""
        if self.data:
            _check_count(self.length, len(self.data))


@dataclass(frozen=True, slots=True)
class GetDeviceStatus(Body):
    """The device status."""


@dataclass(frozen=True, slots=True)
class GetDeviceStatusResponse(Body):
    """The status bits."""

    status: int


@dataclass(frozen=True, slots=True)
class SetDeviceStatus(Body):
    """Set status bits; 0 resets."""

    status: int


@dataclass(frozen=True, slots=True)
class SetDeviceStatusResponse(Body):
    """The status that came of it."""

    status: int


@dataclass(frozen=True, slots=True)
class GetVqueue(Body):
    """A queue's sizes and place."""

    index: int


@dataclass(frozen=True, slots=True)
class GetVqueueResponse(Body):
    """The largest size, and what the driver has set (0 before)."""

    index: int
    max_size: int
    size: int
    desc: int
    driver: int
    device: int


@dataclass(frozen=True, slots=True)
class SetVqueue(Body):
    """A queue's size and the driver addresses of its three parts (0 over copied memory)."""

    index: int
    size: int
    desc: int
    driver: int
    device: int


@dataclass(frozen=True, slots=True)
class SetVqueueResponse(Body):
    """Taken note of; DRIVER_OK starts it."""


@dataclass(frozen=True, slots=True)
class ResetVqueue(Body):
    """Reset one queue (RING_RESET)."""

    index: int


@dataclass(frozen=True, slots=True)
class ResetVqueueResponse(Body):
    """Done."""


@dataclass(frozen=True, slots=True)
class GetShm(Body):
    """A shared memory region of the device."""

    index: int


@dataclass(frozen=True, slots=True)
class GetShmResponse(Body):
    """Its place, in bytes; length 0: there is none."""

    index: int
    length: int
    address: int


@dataclass(frozen=True, slots=True)
class EventConfig(Body):
    """Config space or status changed: the place that changed, with its bytes, or without: read it anew."""

    status: int
    generation: int
    offset: int
    length: int
    data: bytes

    def check(self) -> None:
        """No bytes, or as many as it says."""
        if self.data:
            _check_count(self.length, len(self.data))


@dataclass(frozen=True, slots=True)
class EventAvail(Body):
    """The driver has made buffers available."""

    vq_index: int
    next_offset: int


@dataclass(frozen=True, slots=True)
class EventUsed(Body):
    """The device has used buffers."""

    vq_index: int


# The bus's messages.


@dataclass(frozen=True, slots=True)
class GetDevices(Body):
    """Which device numbers exist, from `offset` on?"""

    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class GetDevicesResponse(Body):
    """A bit a number; `next_offset` is where further ones are, 0 when there are none."""

    offset: int
    count: int
    next_offset: int
    bitmap: bytes

    def check(self) -> None:
        """A bit for each number that it speaks of."""
        _check_count(-(-self.count // 8), len(self.bitmap))

    def numbers(self) -> Iterator[int]:
        """The device numbers whose bits are set; bits beyond the last number that can be are none."""
        for at in range(min(self.count, 0x10000 - self.offset)):
            if self.bitmap[at // 8] >> at % 8 & 1:
                yield self.offset + at


@dataclass(frozen=True, slots=True)
class Ping(Body):
    """Are you there?"""

    data: int


@dataclass(frozen=True, slots=True)
class PingResponse(Body):
    """The same data."""

    data: int


@dataclass(frozen=True, slots=True)
class EventDevice(Body):
    """A device is ready or removed: a `DeviceState`."""

    dev_num: int
    state: int


# Ours, in the range for implementations.


@dataclass(frozen=True, slots=True)
class Hello(Body):
    """The driver's side introduces itself: the first message of a link.

    `max_msg_size` is the most that it takes; `flags` are `HelloFlags`.
    """

    revision: int
    max_msg_size: int
    flags: int


@dataclass(frozen=True, slots=True)
class HelloResponse(Body):
    """The bus introduces itself: a `MemoryKind`, a `SignalKind`, the geometry of its event rings, and its limits.

    `max_request` is how many bytes, readable and writable together, one `Request` may have.
    """

    revision: int
    max_msg_size: int
    memory_kind: int
    signal_kind: int
    priorities: int
    shards: int
    max_sources: int
    max_request: int
    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class MemoryAdd(Body):
    """Map `size` bytes from `offset` of the file whose descriptor the socket passed with this cookie.

    `address` is what the driver calls them; `protection` is a `Protection`.
    """

    address: int
    size: int
    offset: int
    protection: int
    cookie: int


@dataclass(frozen=True, slots=True)
class MemoryAddResponse(Body):
    """0, or an errno."""

    errno: int


@dataclass(frozen=True, slots=True)
class MemoryRemove(Body):
    """Forget the region that begins at this driver address."""

    address: int


@dataclass(frozen=True, slots=True)
class MemoryRemoveResponse(Body):
    """0, or an errno."""

    errno: int


@dataclass(frozen=True, slots=True)
class Name(Body):
    """Who is behind this device number?"""


@dataclass(frozen=True, slots=True)
class NameResponse(Body):
    """The stable identity."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Sources(Body):
    """Where are this device's queues in the event rings?"""


@dataclass(frozen=True, slots=True)
class SourcesResponse(Body):
    """The first source, their generation, and a priority a queue."""

    first_source: int
    generation: int
    priorities: bytes


@dataclass(frozen=True, slots=True)
class Release(Body):
    """The driver has forgotten the number of a device that was removed."""


@dataclass(frozen=True, slots=True)
class ReleaseResponse(Body):
    """The number may be given again."""


@dataclass(frozen=True, slots=True)
class ChannelOpen(Body):
    """Open the event channel of this name; with `ChannelFlags.CREATE` make it, with `memory` bytes of a region.

    `channel` is the number that it shall have on this link.
    """

    priority: int
    flags: int
    memory: int
    channel: int
    name: str


@dataclass(frozen=True, slots=True)
class ChannelOpenResponse(Body):
    """The channel's priority and window, and its region in the shared area (or its size alone)."""

    priority: int
    window: int
    memory_offset: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class ChannelClose(Body):
    """Leave an event channel."""

    channel: int


@dataclass(frozen=True, slots=True)
class ChannelCloseResponse(Body):
    """Nothing more comes on the channel."""


@dataclass(frozen=True, slots=True)
class NextChannel(Body):
    """Which channel comes after the one of this name, in the order of names? The empty name asks for the first."""

    name: str


@dataclass(frozen=True, slots=True)
class NextChannelResponse(Body):
    """A channel that this driver's side may open. The empty name: there is none."""

    priority: int
    memory: int
    name: str


@dataclass(frozen=True, slots=True)
class RamRange(Body):
    """Where may the guest's memory be? The range of this index."""

    index: int


@dataclass(frozen=True, slots=True)
class RamRangeResponse(Body):
    """One of `count` ranges, by guest address, and what is to be written there to prove it."""

    index: int
    count: int
    address: int
    size: int
    nonce: int


@dataclass(frozen=True, slots=True)
class RamProof(Body):
    """The nonce of this range lies at this guest address."""

    index: int
    address: int


@dataclass(frozen=True, slots=True)
class RamProofResponse(Body):
    """It was found there."""


@dataclass(frozen=True, slots=True)
class UseMemory(Body):
    """Addresses are of this `MemoryKind` from now on: the guest's own memory, or the window."""

    memory_kind: int


@dataclass(frozen=True, slots=True)
class UseMemoryResponse(Body):
    """So they are."""


@dataclass(frozen=True, slots=True)
class Doorbell(Body):
    """Pair a queue with two eventfds that the socket passed (direct signals)."""

    vq_index: int
    kick_cookie: int
    call_cookie: int


@dataclass(frozen=True, slots=True)
class DoorbellResponse(Body):
    """0, or an errno."""

    errno: int


@dataclass(frozen=True, slots=True)
class Request(Body):
    """A request over copied memory: how many bytes it has, with the first part of the readable ones."""

    vq_index: int
    id: int
    readable_total: int
    writable_total: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Data(Body):
    """A further part, from byte `offset` of the request's readable or writable bytes on; bit 0 is a `Direction`."""

    vq_index: int
    id: int
    direction: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Complete(Body):
    """A request is done: `written` bytes in all, with the last part of them."""

    vq_index: int
    id: int
    written: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Cancel(Body):
    """The driver has no use for a request's answer any more. Its completion still comes."""

    vq_index: int
    id: int


@dataclass(frozen=True, slots=True)
class ChannelEvent(Body):
    """Something was said on a channel."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class EventChannels(Body):
    """Channels came or went: ask NEXT_CHANNEL who wants to know."""


@dataclass(frozen=True, slots=True)
class ChannelClosed(Body):
    """The bus closed a channel that this driver's side had open."""

    channel: int
    text: str


@dataclass(frozen=True, slots=True)
class ChannelCredit(Body):
    """Events that cost `consumed` bytes in all, modulo 2^32, have been taken by whoever they are for."""

    channel: int
    consumed: int


@dataclass(frozen=True, slots=True)
class ChannelMemory(Body):
    """The sender wrote these bytes of a channel's region, where the region is copied."""

    channel: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Error(Body):
    """A request, whose id is `message`, was refused. It echoes the request's number and token although it is an event.

    With token 0 the whole link is refused.
    """

    errno: int
    message: int
    text: str


def _check_count(said: int, is_: int) -> None:
    if said != is_:
        raise BadBodyError(f"it says {said} and holds {is_}")
