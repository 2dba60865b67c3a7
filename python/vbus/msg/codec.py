"""Messages to bytes and back. Whatever the bytes are, decoding them never raises: it gives a `Malformed`.

`TABLE` is the protocol at a glance: each message's id, whether it is the bus's, what it is on a link, and its layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vbus.msg import messages as m
from vbus.msg.generation import EVENT_BIT, FRAME_HEADER_SIZE, HEADER, MAX_MESSAGE, TYPE_BUS, TYPE_RESPONSE
from vbus.msg.layout import DATA, IDENTITY, NAME, TEXT, WORDS, BadBodyError, Layout

TRANSPORT, BUS = False, True
EMPTY = Layout("")

TABLE: list[tuple[int, bool, type[m.Body], Layout, type[m.Body] | None, Layout]] = [
    # id, whose, request or event, its layout, response, its layout
    (0x02, TRANSPORT, m.GetDeviceInfo, EMPTY, m.GetDeviceInfoResponse, Layout("IIIIIHH")),
    (0x03, TRANSPORT, m.GetDeviceFeatures, Layout("II"), m.GetDeviceFeaturesResponse, Layout("II", WORDS)),
    (0x04, TRANSPORT, m.SetDriverFeatures, Layout("II", WORDS), m.SetDriverFeaturesResponse, EMPTY),
    (0x05, TRANSPORT, m.GetConfig, Layout("II"), m.GetConfigResponse, Layout("III", DATA)),
    (0x06, TRANSPORT, m.SetConfig, Layout("III", DATA), m.SetConfigResponse, Layout("III")),
    (0x07, TRANSPORT, m.GetDeviceStatus, EMPTY, m.GetDeviceStatusResponse, Layout("I")),
    (0x08, TRANSPORT, m.SetDeviceStatus, Layout("I"), m.SetDeviceStatusResponse, Layout("I")),
    (0x09, TRANSPORT, m.GetVqueue, Layout("I"), m.GetVqueueResponse, Layout("III4xQQQ")),
    (0x0A, TRANSPORT, m.SetVqueue, Layout("I4xI4xQQQ"), m.SetVqueueResponse, EMPTY),
    (0x0B, TRANSPORT, m.ResetVqueue, Layout("I"), m.ResetVqueueResponse, EMPTY),
    (0x0C, TRANSPORT, m.GetShm, Layout("I"), m.GetShmResponse, Layout("III")),
    (0x40, TRANSPORT, m.EventConfig, Layout("IIII", DATA), None, EMPTY),
    (0x41, TRANSPORT, m.EventAvail, Layout("II"), None, EMPTY),
    (0x42, TRANSPORT, m.EventUsed, Layout("I"), None, EMPTY),
    (0x02, BUS, m.GetDevices, Layout("HH"), m.GetDevicesResponse, Layout("HHH", DATA)),
    (0x03, BUS, m.Ping, Layout("I"), m.PingResponse, Layout("I")),
    (0x40, BUS, m.EventDevice, Layout("HH"), None, EMPTY),
    # Ours. 0x88 and 0x89 are kept for GRANT and REVOKE.
    (0x80, BUS, m.Hello, Layout("III"), m.HelloResponse, Layout("IIBBBBII", IDENTITY)),
    (0x81, BUS, m.MemoryAdd, Layout("QQQII"), m.MemoryAddResponse, Layout("I")),
    (0x82, BUS, m.MemoryRemove, Layout("Q"), m.MemoryRemoveResponse, Layout("I")),
    (0x83, BUS, m.Name, EMPTY, m.NameResponse, Layout("", IDENTITY)),
    (0x84, BUS, m.Sources, EMPTY, m.SourcesResponse, Layout("II", DATA)),
    (0x85, BUS, m.Release, EMPTY, m.ReleaseResponse, EMPTY),
    (0x86, BUS, m.ChannelOpen, Layout("BB2xI", NAME), m.ChannelOpenResponse, Layout("IIIIQQ")),
    (0x87, BUS, m.ChannelClose, Layout("I"), m.ChannelCloseResponse, Layout("I")),
    (0x8A, BUS, m.Doorbell, Layout("III"), m.DoorbellResponse, Layout("I")),
    (0xC0, BUS, m.Request, Layout("IIII", DATA), None, EMPTY),
    (0xC1, BUS, m.Data, Layout("IIII", DATA), None, EMPTY),
    (0xC2, BUS, m.Complete, Layout("III", DATA), None, EMPTY),
    (0xC3, BUS, m.Cancel, Layout("II"), None, EMPTY),
    (0xC4, BUS, m.ChannelEvent, Layout("I", DATA), None, EMPTY),
    (0xC5, BUS, m.Error, Layout("IB3x", TEXT), None, EMPTY),
]

_BY_TYPE: dict[type[m.Body], tuple[int, int, Layout, tuple[str, ...]]] = {}
_BY_ID: dict[tuple[int, int], tuple[type[m.Body], Layout]] = {}
for _id, _bus, _request, _layout, _response, _response_layout in TABLE:
    _type = TYPE_BUS if _bus else 0
    for _cls, _bits, _body in ((_request, _type, _layout), (_response, _type | TYPE_RESPONSE, _response_layout)):
        if _cls is not None:
            _BY_TYPE[_cls] = _bits, _id, _body, tuple(field.name for field in dataclasses.fields(_cls))
            _BY_ID[_bits, _id] = _cls, _body


@dataclass(frozen=True, slots=True)
class Frame:
    """A message: its body, the device it is about (0 for the bus), and the token that pairs it with its answer."""

    body: m.Body
    dev_num: int = 0
    token: int = 0


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are no message: a stable name, and the details for people."""

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})"


def message_id(body: m.Body | type[m.Body]) -> int:
    """The id of a message. KeyError when it is none."""
    return _BY_TYPE[body if isinstance(body, type) else type(body)][1]


def is_event(body: m.Body | type[m.Body]) -> bool:
    """Whether a message wants no answer."""
    return bool(message_id(body) & EVENT_BIT)


def response_type(request: type[m.Body]) -> type[m.Body] | None:
    """The class that answers a request; None for events and responses."""
    bits, number, _, _ = _BY_TYPE[request]
    found = _BY_ID.get((bits | TYPE_RESPONSE, number))
    return found[0] if found is not None and not bits & TYPE_RESPONSE else None


def encode(frame: Frame) -> bytes:
    """The bytes of a message. ValueError when a field does not fit, or the whole is over 65535 bytes."""
    bits, number, layout, names = _BY_TYPE[type(frame.body)]
    values: tuple[Any, ...] = tuple(getattr(frame.body, name) for name in names)
    try:
        body = layout.pack(values)
        size = FRAME_HEADER_SIZE + len(body)
        if size > MAX_MESSAGE:
            raise ValueError(f"{type(frame.body).__name__} of {size} bytes; {MAX_MESSAGE} are the most")
        return HEADER.pack(bits, number, frame.dev_num, frame.token, size) + body
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{frame.body}: {error}") from None


def decode(data: bytes | bytearray | memoryview) -> Frame | Malformed:
    """The message of these bytes, which must be exactly one. Never raises."""
    view = memoryview(data)
    if len(view) < FRAME_HEADER_SIZE:
        return Malformed("short-header", f"{len(view)} bytes")
    bits, number, dev_num, token, size = HEADER.unpack_from(view)
    if size != len(view):
        return Malformed("size-mismatch", f"it says {size} and has {len(view)} bytes")
    if bits & ~(TYPE_BUS | TYPE_RESPONSE):
        return Malformed("reserved-type", f"type {bits:#04x}")
    found = _BY_ID.get((bits, number))
    if found is None:
        return Malformed("unknown-message", f"type {bits:#04x}, id {number:#04x}")
    cls, layout = found
    try:
        body = cls(*layout.unpack(view[FRAME_HEADER_SIZE:]))
        body.check()
    except BadBodyError as error:
        return Malformed("bad-body", f"{cls.__name__}: {error}")
    return Frame(body, dev_num, token)


class Splitter:
    """Cuts a byte stream into messages. It holds at most one message that is not whole yet, of up to `limit` bytes."""

    def __init__(self, limit: int = MAX_MESSAGE) -> None:
        self._limit = limit
        self._held = bytearray()
        self._broken: Malformed | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes | Malformed]:
        """The messages that are whole now. A size that cannot be is Malformed, and nothing comes after it."""
        if self._broken is not None:
            yield self._broken
            return
        self._held += data
        at = 0
        try:
            while len(self._held) - at >= FRAME_HEADER_SIZE:
                bits, _, _, _, size = HEADER.unpack_from(self._held, at)
                if bits & ~(TYPE_BUS | TYPE_RESPONSE):
                    # Whoever speaks something else shall hear so at once, not when enough has come.
                    self._broken = Malformed("reserved-type", f"type {bits:#04x}")
                elif not FRAME_HEADER_SIZE <= size <= self._limit:
                    self._broken = Malformed("size-mismatch", f"a message of {size} bytes; {self._limit} are the most")
                if self._broken is not None:
                    yield self._broken
                    return
                if len(self._held) - at < size:
                    return
                message = bytes(self._held[at : at + size])
                at += size
                yield message
        finally:
            if self._broken is not None:
                self._held.clear()
            else:
                del self._held[:at]
