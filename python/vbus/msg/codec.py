"""Messages to bytes and back. Whatever the bytes are, decoding them never raises: it gives a `Malformed`.

`TABLE` is the protocol at a glance: each message's id, whether it is the bus's, what it is on a link, and its layout.
Encoding looks the body's class up there, decoding the type and id of the header; everything else is in the layouts.
"""

from __future__ import annotations

import dataclasses
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vbus.msg import messages as m
from vbus.msg.generation import (
    EVENT_BIT,
    FRAME_HEADER_SIZE,
    HEADER,
    MAX_MESSAGE,
    TYPE_BUS,
    TYPE_RESERVED,
    TYPE_RESPONSE,
)
from vbus.msg.layout import DATA, IDENTITY, NAME, TEXT, WORDS, BadBodyError, Layout

TRANSPORT, BUS = False, True
EMPTY = Layout("")


class Row(NamedTuple):
    """A request or event, and what answers it."""

    id: int
    bus: bool
    """Whether it is a bus message; else it is a transport message, about one device."""
    message: type[m.Body]
    layout: Layout
    response: type[m.Body] | None = None
    response_layout: Layout = EMPTY

    @property
    def header_type(self) -> int:
        """The header's type; a response adds TYPE_RESPONSE."""
        return TYPE_BUS if self.bus else 0


TABLE: list[Row] = [
    Row(0x02, TRANSPORT, m.GetDeviceInfo, EMPTY, m.GetDeviceInfoResponse, Layout("IIIIIHH")),
    Row(0x03, TRANSPORT, m.GetDeviceFeatures, Layout("II"), m.GetDeviceFeaturesResponse, Layout("II", WORDS)),
    Row(0x04, TRANSPORT, m.SetDriverFeatures, Layout("II", WORDS), m.SetDriverFeaturesResponse, EMPTY),
    Row(0x05, TRANSPORT, m.GetConfig, Layout("II"), m.GetConfigResponse, Layout("III", DATA)),
    Row(0x06, TRANSPORT, m.SetConfig, Layout("III", DATA), m.SetConfigResponse, Layout("III", DATA)),
    Row(0x07, TRANSPORT, m.GetDeviceStatus, EMPTY, m.GetDeviceStatusResponse, Layout("I")),
    Row(0x08, TRANSPORT, m.SetDeviceStatus, Layout("I"), m.SetDeviceStatusResponse, Layout("I")),
    Row(0x09, TRANSPORT, m.GetVqueue, Layout("I"), m.GetVqueueResponse, Layout("III4xQQQ")),
    Row(0x0A, TRANSPORT, m.SetVqueue, Layout("I4xI4xQQQ"), m.SetVqueueResponse, EMPTY),
    Row(0x0B, TRANSPORT, m.ResetVqueue, Layout("I"), m.ResetVqueueResponse, EMPTY),
    Row(0x0C, TRANSPORT, m.GetShm, Layout("I"), m.GetShmResponse, Layout("III")),
    Row(0x40, TRANSPORT, m.EventConfig, Layout("IIII", DATA)),
    Row(0x41, TRANSPORT, m.EventAvail, Layout("II")),
    Row(0x42, TRANSPORT, m.EventUsed, Layout("I")),
    Row(0x02, BUS, m.GetDevices, Layout("HH"), m.GetDevicesResponse, Layout("HHH", DATA)),
    Row(0x03, BUS, m.Ping, Layout("I"), m.PingResponse, Layout("I")),
    Row(0x40, BUS, m.EventDevice, Layout("HH")),
    # Ours; `values.ReservedId` are kept free.
    Row(0x80, BUS, m.Hello, Layout("III"), m.HelloResponse, Layout("IIBBBBII", IDENTITY)),
    Row(0x81, BUS, m.MemoryAdd, Layout("QQQII"), m.MemoryAddResponse, Layout("I")),
    Row(0x82, BUS, m.MemoryRemove, Layout("Q"), m.MemoryRemoveResponse, Layout("I")),
    Row(0x83, BUS, m.Name, EMPTY, m.NameResponse, Layout("", IDENTITY)),
    Row(0x84, BUS, m.Sources, EMPTY, m.SourcesResponse, Layout("II", DATA)),
    Row(0x85, BUS, m.Release, EMPTY, m.ReleaseResponse, EMPTY),
    Row(0x86, BUS, m.ChannelOpen, Layout("BB2xII", NAME), m.ChannelOpenResponse, Layout("B3xIQQ")),
    Row(0x87, BUS, m.ChannelClose, Layout("I"), m.ChannelCloseResponse, EMPTY),
    Row(0x8A, BUS, m.Doorbell, Layout("III"), m.DoorbellResponse, Layout("I")),
    Row(0x8B, BUS, m.NextChannel, Layout("", NAME), m.NextChannelResponse, Layout("B3xI", NAME)),
    Row(0x8C, BUS, m.RamRange, Layout("I"), m.RamRangeResponse, Layout("IIQQQ")),
    Row(0x8D, BUS, m.RamProof, Layout("I4xQ"), m.RamProofResponse, EMPTY),
    Row(0x8E, BUS, m.UseMemory, Layout("I"), m.UseMemoryResponse, EMPTY),
    Row(0xC0, BUS, m.Request, Layout("IIII", DATA)),
    Row(0xC1, BUS, m.Data, Layout("IIII", DATA)),
    Row(0xC2, BUS, m.Complete, Layout("III", DATA)),
    Row(0xC3, BUS, m.Cancel, Layout("II")),
    Row(0xC4, BUS, m.ChannelEvent, Layout("I", DATA)),
    Row(0xC5, BUS, m.Error, Layout("IB3x", TEXT)),
    Row(0xC6, BUS, m.EventChannels, EMPTY),
    Row(0xC7, BUS, m.ChannelClosed, Layout("I", TEXT)),
    Row(0xC8, BUS, m.ChannelCredit, Layout("II")),
    Row(0xC9, BUS, m.ChannelMemory, Layout("II", DATA)),
]


class _Kind(NamedTuple):
    """How to encode the bodies of one class."""

    header_type: int
    id: int
    layout: Layout
    values: Callable[[m.Body], tuple[Any, ...]]


def _values_of(cls: type[m.Body]) -> Callable[[m.Body], tuple[Any, ...]]:
    """What gives the fields of a body as a tuple."""
    names = [field.name for field in dataclasses.fields(cls)]
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda body: tuple(getattr(body, name) for name in names)


_BY_TYPE: dict[type[m.Body], _Kind] = {}
_BY_ID: dict[tuple[int, int], tuple[type[m.Body], Layout]] = {}


def _register(cls: type[m.Body], header_type: int, number: int, layout: Layout) -> None:
    _BY_TYPE[cls] = _Kind(header_type, number, layout, _values_of(cls))
    _BY_ID[header_type, number] = cls, layout


for _row in TABLE:
    _register(_row.message, _row.header_type, _row.id, _row.layout)
    if _row.response is not None:
        _register(_row.response, _row.header_type | TYPE_RESPONSE, _row.id, _row.response_layout)


@dataclass(frozen=True, slots=True)
class Frame:
    """A message: its body, the device it is about (0 for the bus), and the token that pairs it with its answer."""

    body: m.Body
    dev_num: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message: a stable name, and the details for people.

    The names: `short-header`, `message-size`, `reserved-type`, `unknown-message`, `bad-body`.
    """

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})"


def message_id(body: m.Body | type[m.Body]) -> int:
    """The id of a message. KeyError when it is none."""
    return _BY_TYPE[body if isinstance(body, type) else type(body)].id


def is_event(body: m.Body | type[m.Body]) -> bool:
    """Whether a message wants no answer."""
    return bool(message_id(body) & EVENT_BIT)


def response_type(request: type[m.Body]) -> type[m.Body] | None:
    """The class that answers a request; None for events and responses."""
    kind = _BY_TYPE[request]
    found = _BY_ID.get((kind.header_type | TYPE_RESPONSE, kind.id))
    return found[0] if found is not None and not kind.header_type & TYPE_RESPONSE else None


def encode(frame: Frame) -> bytes:
    """The bytes of a message, of which `decode` makes the same again.

    ValueError when a field does not fit, when fields contradict each other, or when all is over 65535 bytes.
    """
    body = frame.body
    header_type, number, layout, values_of = _BY_TYPE[type(body)]
    body.check()
    try:
        fixed, tail = layout.split(values_of(body))
        size = layout.framed.size + len(tail)
        if size > MAX_MESSAGE:
            raise ValueError(f"{type(body).__name__} of {size} bytes; {MAX_MESSAGE} are the most")
        head = layout.framed.pack(header_type, number, frame.dev_num, frame.token, size, *fixed)
    except struct.error as error:
        raise ValueError(f"{frame}: {error}") from None
    return b"".join((head, tail)) if tail else head


def decode(data: bytes | bytearray | memoryview) -> Frame | Malformed:
    """The message of these bytes, which must be exactly one. Never raises."""
    view = memoryview(data)
    if len(view) < FRAME_HEADER_SIZE:
        return Malformed("short-header", f"{len(view)} bytes")
    header_type, number, dev_num, token, size = HEADER.unpack_from(view)
    if header_type & TYPE_RESERVED:
        return Malformed("reserved-type", f"type {header_type:#04x}")
    if size != len(view):
        return Malformed("message-size", f"it says {size} and has {len(view)} bytes")
    found = _BY_ID.get((header_type, number))
    if found is None:
        return Malformed("unknown-message", f"type {header_type:#04x}, id {number:#04x}")
    cls, layout = found
    try:
        body = cls(*layout.unpack(view[FRAME_HEADER_SIZE:]))
        body.check()
    except BadBodyError as error:
        return Malformed("bad-body", f"{cls.__name__}: {error}")
    return Frame(body, dev_num, token)


class Splitter:
    """Cuts a byte stream into messages. Between two calls it holds less than one message, of at most `limit` bytes."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._held = bytearray()
        self._broken: Malformed | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes | Malformed]:
        """The messages that are whole now. A header that cannot be is Malformed: nothing after it is looked at."""
        if self._broken is not None:
            return [self._broken]
        found: list[bytes | Malformed] = []
        self._held += data
        at = 0
        with memoryview(self._held) as held:
            while len(held) - at >= FRAME_HEADER_SIZE:
                header_type, _, _, _, size = HEADER.unpack_from(held, at)
                if header_type & TYPE_RESERVED:
                    # Whoever speaks something else shall hear so at once, not when enough has come.
                    self._broken = Malformed("reserved-type", f"type {header_type:#04x}")
                    break
                if not FRAME_HEADER_SIZE <= size <= self._limit:
                    what = f"a message of {size} bytes; {FRAME_HEADER_SIZE} to {self._limit} are taken"
                    self._broken = Malformed("message-size", what)
                    break
                if len(held) - at < size:
                    break
                found.append(bytes(held[at : at + size]))
                at += size
        if self._broken is not None:
            found.append(self._broken)
            at = len(self._held)
        del self._held[:at]
        return found
