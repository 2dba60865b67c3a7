"""What vhost-user says: requests of both ends, their payloads, and feature bits.

All numbers are in the machine's byte order: both ends are on one machine. A payload is checked for its shape here; what
its numbers mean (an index that there is, an address in memory) is checked where it is used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum, IntFlag
from typing import ClassVar

VERSION = 1
MAX_REGIONS = 8
"""Regions of SET_MEM_TABLE."""
MAX_CONFIG = 256
"""Bytes of config space in one message."""
NO_FD = 1 << 8
"""In the number that comes with SET_VRING_KICK, _CALL, _ERR: there is no descriptor."""
INDEX = 0xFF
"""The queue in that number."""
PACKED_BASE = 0x8000_8000
"""Where a packed ring begins: at descriptor 0 with a wrap counter of 1, for both sides."""


class BadPayloadError(ValueError):
    """A payload that is none; becomes a `Malformed`, and never leaves the codec."""


class Request(IntEnum):
    """What a front-end asks."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """What a back-end asks, on the socket that SET_BACKEND_REQ_FD gave it."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5


class Flags(IntFlag):
    """A header's flags above the version."""

    REPLY = 4
    NEED_REPLY = 8


class ProtocolFeature(IntFlag):
    """What both ends negotiate beside the device's features (`PROTOCOL_FEATURES`)."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


PROTOCOL_FEATURES = 30
"""The bit of the device's features that says that there are protocol features. No driver ever sees it."""
LOG_ALL = 26
"""The bit of the device's features that switches the dirty log on."""
VRING_LOG = 1
"""The flag of SET_VRING_ADDR that has the used ring logged."""


class StateDirection(IntEnum):
    """Which way a device's state goes (SET_DEVICE_STATE_FD)."""

    SAVE = 0
    """To the front-end."""
    LOAD = 1
    """From the front-end."""


PHASE_STOPPED = 0
"""The only phase of a migration in which a device's state goes: none of its rings runs."""
STATE_ERROR = 0xFF
"""The bits of the answer to SET_DEVICE_STATE_FD that are 0 when it succeeded; `NO_FD`: use the descriptor you gave."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A fixed layout. Subclasses with more behind it override `pack` and `unpack`."""

    layout: ClassVar[struct.Struct] = struct.Struct("=")

    def pack(self) -> bytes:
        """Its bytes. ValueError when a field does not fit."""
        try:
            return self.layout.pack(*(getattr(self, field.name) for field in fields(self)))
        except struct.error as error:
            raise ValueError(f"{self}: {error}") from None

    @classmethod
    def unpack(cls, data: bytes) -> Payload:
        """The payload of these bytes. BadPayloadError."""
        if len(data) != cls.layout.size:
            raise BadPayloadError(f"{len(data)} bytes; {cls.__name__} has {cls.layout.size}")
        return cls(*cls.layout.unpack(data))


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload."""


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """A number: features, a count, a status, a queue with its descriptor's flag."""

    layout: ClassVar[struct.Struct] = struct.Struct("=Q")

    value: int


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """A queue, and a number that is about it."""

    layout: ClassVar[struct.Struct] = struct.Struct("=II")

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Where a ring is, in the front-end's own addresses; `log` is a guest address."""

    layout: ClassVar[struct.Struct] = struct.Struct("=IIQQQQ")

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class Region(Payload):
    """Memory of the guest: its guest address, bytes, the front-end's address, and where it is in its file."""

    layout: ClassVar[struct.Struct] = struct.Struct("=QQQQ")

    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True, slots=True)
class MemTable(Payload):
    """All of the guest's memory, at once."""

    head: ClassVar[struct.Struct] = struct.Struct("=II")

    regions: tuple[Region, ...]

    def pack(self) -> bytes:
        """Its bytes. ValueError for more than eight regions."""
        if len(self.regions) > MAX_REGIONS:
            raise ValueError(f"{len(self.regions)} regions; {MAX_REGIONS} are the most")
        return self.head.pack(len(self.regions), 0) + b"".join(region.pack() for region in self.regions)

    @classmethod
    def unpack(cls, data: bytes) -> MemTable:
        """The table of these bytes, of which some front-ends send more than is used. BadPayloadError."""
        if len(data) < cls.head.size:
            raise BadPayloadError(f"{len(data)} bytes are no memory table")
        count, _ = cls.head.unpack_from(data)
        size = Region.layout.size
        if count > MAX_REGIONS or len(data) < cls.head.size + count * size:
            raise BadPayloadError(f"{count} regions in {len(data)} bytes")
        places = range(cls.head.size, cls.head.size + count * size, size)
        return cls(tuple(Region(*Region.layout.unpack_from(data, at)) for at in places))


@dataclass(frozen=True, slots=True)
class MemRegion(Payload):
    """One region to be added or removed."""

    layout: ClassVar[struct.Struct] = struct.Struct("=8xQQQQ")

    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True, slots=True)
class Log(Payload):
    """The dirty log: bytes, and where it is in its file."""

    layout: ClassVar[struct.Struct] = struct.Struct("=QQ")

    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Config(Payload):
    """A part of config space; `flags` 1 for a migration. An answer without bytes, or `Empty`, is a refusal."""

    head: ClassVar[struct.Struct] = struct.Struct("=III")

    offset: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        """Its bytes. ValueError for more than 256 of config space."""
        if len(self.data) > MAX_CONFIG:
            raise ValueError(f"{len(self.data)} bytes of config space; {MAX_CONFIG} are the most")
        try:
            return self.head.pack(self.offset, len(self.data), self.flags) + self.data
        except struct.error as error:
            raise ValueError(f"{self}: {error}") from None

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """The part of these bytes. BadPayloadError."""
        if len(data) < cls.head.size:
            raise BadPayloadError(f"{len(data)} bytes are no part of config space")
        offset, size, flags = cls.head.unpack_from(data)
        rest = data[cls.head.size :]
        if size > MAX_CONFIG or len(rest) != size:
            raise BadPayloadError(f"it says {size} bytes of config space and holds {len(rest)}")
        return cls(offset, flags, rest)


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """The memory that remembers requests under way: bytes, place in its file, queues, and their size."""

    # With the padding that every compiler adds, although the specification's drawing has none.
    layout: ClassVar[struct.Struct] = struct.Struct("=QQHH4x")

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class DeviceState(Payload):
    """Where a device's state goes: direction (a `StateDirection`) and phase (0: stopped)."""

    layout: ClassVar[struct.Struct] = struct.Struct("=II")

    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class Row:
    """A request: its payload, how many descriptors may come with it, and the payload of its answer, if it has one."""

    payload: type[Payload]
    least_fds: int = 0
    most_fds: int = 0
    answer: type[Payload] | None = None


TABLE: dict[Request, Row] = {
    Request.GET_FEATURES: Row(Empty, answer=U64),
    Request.SET_FEATURES: Row(U64),
    Request.SET_OWNER: Row(Empty),
    Request.RESET_OWNER: Row(Empty),
    # As many descriptors as regions.
    Request.SET_MEM_TABLE: Row(MemTable, 0, MAX_REGIONS),
    Request.SET_LOG_BASE: Row(Log, 1, 1, answer=U64),
    Request.SET_LOG_FD: Row(Empty, 1, 1),
    Request.SET_VRING_NUM: Row(VringState),
    Request.SET_VRING_ADDR: Row(VringAddr),
    Request.SET_VRING_BASE: Row(VringState),
    Request.GET_VRING_BASE: Row(VringState, answer=VringState),
    Request.SET_VRING_KICK: Row(U64, 0, 1),
    Request.SET_VRING_CALL: Row(U64, 0, 1),
    Request.SET_VRING_ERR: Row(U64, 0, 1),
    Request.GET_PROTOCOL_FEATURES: Row(Empty, answer=U64),
    Request.SET_PROTOCOL_FEATURES: Row(U64),
    Request.GET_QUEUE_NUM: Row(Empty, answer=U64),
    Request.SET_VRING_ENABLE: Row(VringState),
    Request.SEND_RARP: Row(U64),
    Request.NET_SET_MTU: Row(U64),
    Request.SET_BACKEND_REQ_FD: Row(Empty, 1, 1),
    Request.GET_CONFIG: Row(Config, answer=Config),
    Request.SET_CONFIG: Row(Config),
    # The answer brings a descriptor.
    Request.GET_INFLIGHT_FD: Row(Inflight, answer=Inflight),
    Request.SET_INFLIGHT_FD: Row(Inflight, 1, 1),
    Request.RESET_DEVICE: Row(Empty),
    Request.VRING_KICK: Row(VringState),
    Request.GET_MAX_MEM_SLOTS: Row(Empty, answer=U64),
    Request.ADD_MEM_REG: Row(MemRegion, 1, 1),
    # Some front-ends send one that nobody needs.
    Request.REM_MEM_REG: Row(MemRegion, 0, 1),
    Request.SET_STATUS: Row(U64),
    Request.GET_STATUS: Row(Empty, answer=U64),
    Request.SET_DEVICE_STATE_FD: Row(DeviceState, 1, 1, answer=U64),
    Request.CHECK_DEVICE_STATE: Row(Empty, answer=U64),
}
"""What the codec knows. Post-copy, IOTLB and crypto sessions are not among it: nobody here offers them."""

BACKEND_TABLE: dict[BackendRequest, Row] = {
    BackendRequest.CONFIG_CHANGE_MSG: Row(Empty),
    BackendRequest.VRING_CALL: Row(VringState),
    BackendRequest.VRING_ERR: Row(VringState),
}
