"""The codec of the bus protocol: what it makes it reads, whatever else comes is a value and never an exception."""

from __future__ import annotations

import dataclasses
import itertools
import re
import socket
import struct
import subprocess
import sys
import threading
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vbus import msg
from vbus.msg import wire
from vbus.msg.codec import TABLE
from vbus.msg.generation import FRAME_HEADER_SIZE, TYPE_BUS, TYPE_RESPONSE
from vbus.msg.layout import DATA, IDENTITY, MAX_NAME, NAME, TEXT, WORDS, Layout, Tail
from vbus.msg.wire import WireWriter

unhurried = settings(deadline=None)
"""No timing decides a test."""

CLASSES = {
    cls: layout
    for row in TABLE
    for cls, layout in ((row.message, row.layout), (row.response, row.response_layout))
    if cls is not None
}
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64}
COUNTED = {"num_blocks": "features", "length": "data"}
"""Fields that say how many there are of another."""
REQUEST_ID, TOKEN_AT, SIZE_AT = 0xC0, 4, 6

printable = st.characters(codec="utf-8").filter(str.isprintable)
names = st.text(printable, max_size=MAX_NAME).filter(lambda text: _fits(text, MAX_NAME))
texts = st.text(printable, max_size=200).filter(lambda text: _fits(text, 4000))
TAILS: dict[Tail, tuple[st.SearchStrategy[Any], ...]] = {
    DATA: (st.binary(max_size=300),),
    WORDS: (st.lists(st.integers(0, 2**32 - 1), max_size=8).map(tuple),),
    TEXT: (texts,),
    NAME: (names,),
    IDENTITY: (st.uuids(), names),
}


def _fits(text: str, most: int) -> bool:
    try:
        return len(text.encode()) <= most
    except UnicodeEncodeError:
        return False


def bodies_of(cls: type[msg.Body]) -> st.SearchStrategy[msg.Body]:
    """Messages of one class, with all values that its fields can hold."""
    layout = CLASSES[cls]
    codes = re.sub(r"\d*x", "", layout.fixed.format.lstrip("<"))
    codes = re.sub(r"(\d+)([BHIQ])", lambda found: found[2] * int(found[1]), codes)
    values: list[st.SearchStrategy[Any]] = [st.integers(0, 2 ** BITS[code] - 1) for code in codes]
    values += TAILS[layout.tail] if layout.tail is not None else ()
    fields = [field.name for field in dataclasses.fields(cls)]
    assert len(fields) == len(values)
    return st.fixed_dictionaries(dict(zip(fields, values, strict=True))).map(lambda found: made(cls, found))


def made(cls: type[msg.Body], values: dict[str, Any]) -> msg.Body:
    """A body of these values, its counts made true."""
    for count, counted in COUNTED.items():
        if count in values and counted in values:
            values[count] = len(values[counted])
    if cls is msg.GetDevicesResponse:
        values["count"] = 8 * len(values["bitmap"])
    return cls(**values)


bodies = st.sampled_from(sorted(CLASSES, key=lambda cls: cls.__name__)).flatmap(bodies_of)
frames = st.builds(msg.Frame, bodies, st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
every_class = pytest.mark.parametrize("cls", list(CLASSES), ids=lambda cls: cls.__name__)


def with_size(data: bytes) -> bytes:
    """A message whose header says its true length."""
    return data[:SIZE_AT] + struct.pack("<H", len(data)) + data[SIZE_AT + 2 :]


def is_free(cls: type[msg.Body], layout: Layout) -> bool:
    """Whether a message of this class may end anywhere behind its fixed fields."""
    if layout.tail not in (DATA, TEXT):
        return False
    fields = {field.name for field in dataclasses.fields(cls)}
    return not fields & {"length", "num_blocks", "bitmap"}


def malformed(data: bytes | bytearray) -> msg.Malformed:
    found = msg.decode(data)
    assert isinstance(found, msg.Malformed), found
    return found


# Round trips.


@every_class
@unhurried
@given(data=st.data())
def test_what_is_made_is_read(cls: type[msg.Body], data: st.DataObject) -> None:
    frame = msg.Frame(data.draw(bodies_of(cls)), data.draw(st.integers(0, 0xFFFF)), data.draw(st.integers(0, 0xFFFF)))
    encoded = msg.encode(frame)
    assert struct.unpack_from("<HHH", encoded, 2) == (frame.dev_num, frame.token, len(encoded))
    assert msg.decode(encoded) == frame
    assert msg.decode(bytearray(encoded)) == msg.decode(memoryview(encoded)) == frame


def test_call_sites_read_like_the_protocol() -> None:
    data = msg.encode(msg.Frame(dev_num=3, token=7, body=msg.GetConfig(offset=0, length=8)))
    assert data == bytes.fromhex("00 05 0300 0700 1000 00000000 08000000")
    match msg.decode(data):
        case msg.Frame(dev_num=number, token=token, body=msg.GetConfig(offset=offset, length=length)):
            assert (number, token, offset, length) == (3, 7, 0, 8)
        case other:
            pytest.fail(str(other))


@unhurried
@given(st.binary(max_size=5000), st.integers(0, 64))
def test_data_may_be_a_view(data: bytes, skip: int) -> None:
    view: Any = memoryview(data)[skip:]
    plain = msg.encode(msg.Frame(msg.Request(0, 1, len(view), 0, bytes(view)), 3))
    assert msg.encode(msg.Frame(msg.Request(0, 1, len(view), 0, view), 3)) == plain


def test_messages_are_values() -> None:
    body = msg.GetConfig(0, 8)
    assert body == msg.GetConfig(0, 8)
    assert len({body, msg.GetConfig(0, 8), msg.GetConfig(0, 9)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        body.offset = 3  # type: ignore[misc]


def test_the_largest_message() -> None:
    room = msg.MAX_MESSAGE - FRAME_HEADER_SIZE - 16
    frame = msg.Frame(msg.Request(0, 1, room, 0, bytes(room)), 3)
    assert len(msg.encode(frame)) == 65535
    assert msg.decode(msg.encode(frame)) == frame
    with pytest.raises(ValueError, match="65536 bytes; 65535"):
        msg.encode(msg.Frame(msg.Request(0, 1, room, 0, bytes(room + 1)), 3))


# What cannot be made.


@pytest.mark.parametrize(
    "frame",
    [
        msg.Frame(msg.Ping(1 << 32)),
        msg.Frame(msg.Ping(-1)),
        msg.Frame(msg.Ping(0), dev_num=1 << 16),
        msg.Frame(msg.Ping(0), token=-1),
        msg.Frame(msg.SetDriverFeatures(0, 1, (1 << 32,))),
        msg.Frame(msg.SetDriverFeatures(0, 1, (1, 2))),
        msg.Frame(msg.GetDeviceFeaturesResponse(0, 3, ())),
        msg.Frame(msg.GetConfigResponse(0, 0, 3, b"four")),
        msg.Frame(msg.SetConfig(0, 0, 5, b"four")),
        msg.Frame(msg.SetConfigResponse(0, 0, 0, b"four")),
        msg.Frame(msg.EventConfig(0, 0, 0, 3, b"four")),
        msg.Frame(msg.GetDevicesResponse(0, 16, 0, b"x")),
        msg.Frame(msg.NameResponse(UUID(int=0), "x" * 64)),
        msg.Frame(msg.NameResponse(UUID(int=0), "ü" * 32)),
        msg.Frame(msg.NameResponse(UUID(int=0), "\udc80")),
        msg.Frame(msg.Error(1, 256, "")),
    ],
    ids=lambda frame: type(frame.body).__name__,
)
def test_what_does_not_fit_is_not_made(frame: msg.Frame) -> None:
    with pytest.raises(ValueError, match=r"."):
        msg.encode(frame)


def integers_of(cls: type[msg.Body]) -> list[tuple[str, int]]:
    """The names of a message's fixed fields, and the first number that is too large for each."""
    codes = re.sub(r"\d*x", "", CLASSES[cls].fixed.format.lstrip("<"))
    codes = re.sub(r"(\d+)([BHIQ])", lambda found: found[2] * int(found[1]), codes)
    return [(field.name, 1 << BITS[code]) for field, code in zip(dataclasses.fields(cls), codes, strict=False)]


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if integers_of(cls)], ids=lambda cls: cls.__name__)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_no_field_takes_a_number_that_does_not_fit(cls: type[msg.Body], data: st.DataObject) -> None:
    body = data.draw(bodies_of(cls))
    for name, too_large in integers_of(cls):
        for value in (-1, too_large, too_large + data.draw(st.integers(0, 1 << 64))):
            with pytest.raises(ValueError, match=r"."):
                msg.encode(msg.Frame(dataclasses.replace(body, **{name: value})))


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[2J", "\x00", "\u202e", "\ud800"])
def test_texts_that_cannot_be_printed_are_neither_made_nor_read(text: str) -> None:
    for body in (msg.Error(1, 2, text), msg.NameResponse(UUID(int=0), text), msg.ChannelOpen(0, 0, 0, 0, text)):
        with pytest.raises(ValueError, match="cannot be printed"):
            msg.encode(msg.Frame(body))
    data = text.encode(errors="surrogatepass")
    good = msg.encode(msg.Frame(msg.Error(1, 2, "x" * len(data))))
    assert malformed(good[: -len(data)] + data).name == "bad-body"


# What is no message.


@unhurried
@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_message_or_malformed(data: bytes) -> None:
    found = msg.decode(data)
    assert isinstance(found, msg.Frame | msg.Malformed)


@unhurried
@given(st.sampled_from(TABLE), st.booleans(), st.binary(max_size=120))
def test_a_body_of_any_kind_behind_a_good_header(row: Any, response: bool, body: bytes) -> None:
    header_type = row.header_type | (TYPE_RESPONSE if response else 0)
    found = msg.decode(struct.pack("<BBHHH", header_type, row.id, 1, 2, 8 + len(body)) + body)
    if isinstance(found, msg.Malformed):
        assert found.name in ("bad-body", "unknown-message")
        assert (found.name == "unknown-message") == (response and row.response is None)
    else:
        # Reserved bytes aside, what was read is what would be made.
        again = msg.encode(found)
        assert len(again) == 8 + len(body)
        assert msg.decode(again) == found


@unhurried
@given(frames, st.data())
def test_a_message_with_a_flipped_bit(frame: msg.Frame, data: st.DataObject) -> None:
    encoded = bytearray(msg.encode(frame))
    bit = data.draw(st.integers(0, 8 * len(encoded) - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    found = msg.decode(encoded)
    if isinstance(found, msg.Frame):
        assert msg.decode(msg.encode(found)) == found
    if bit < 8 and bit not in (0, 1):
        assert malformed(encoded).name == "reserved-type"
    if bit // 8 in (SIZE_AT, SIZE_AT + 1):
        assert malformed(encoded).name == "message-size"


@every_class
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_message_cut_anywhere_is_malformed(cls: type[msg.Body], data: st.DataObject) -> None:
    encoded = msg.encode(msg.Frame(data.draw(bodies_of(cls)), 1, 2))
    for length in range(len(encoded)):
        assert malformed(encoded[:length]).name == ("short-header" if length < 8 else "message-size")
    # Nor does it help to say the smaller size, unless the rest of the message is free.
    layout = CLASSES[cls]
    for length in range(FRAME_HEADER_SIZE, len(encoded)):
        if length < FRAME_HEADER_SIZE + layout.fixed.size or not is_free(cls, layout):
            found = msg.decode(with_size(encoded[:length]))
            if isinstance(found, msg.Frame):
                # The optional bytes of these two are left out as a whole.
                assert cls in (msg.SetConfigResponse, msg.EventConfig)
                assert length == FRAME_HEADER_SIZE + layout.fixed.size
            else:
                assert found.name == "bad-body"


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if not is_free(cls, CLASSES[cls])], ids=lambda cls: cls.__name__
)
@unhurried
@given(data=st.data())
def test_bytes_behind_a_message_are_malformed(cls: type[msg.Body], data: st.DataObject) -> None:
    encoded = msg.encode(msg.Frame(data.draw(bodies_of(cls)), 1, 2))
    more = data.draw(st.binary(min_size=1, max_size=9))
    assert malformed(encoded + more).name == "message-size"
    assert malformed(with_size(encoded + more)).name == "bad-body"


@pytest.mark.parametrize(
    "body",
    [
        "0005000000 000000 03000000 61626364",  # GET_CONFIG response: 3 of 4 bytes
        "00000000 00000000 ffffffff",
    ],
)
def test_a_count_that_lies_is_malformed(body: str) -> None:
    data = bytes.fromhex(body)
    found = malformed(struct.pack("<BBHHH", TYPE_RESPONSE, 0x05, 1, 2, 8 + len(data)) + data)
    assert found.name == "bad-body"
    assert found.detail.startswith("GetConfigResponse")


def test_all_ids_that_are_not_ours_are_unknown() -> None:
    known = {(row.header_type, row.id) for row in TABLE}
    known |= {(row.header_type | TYPE_RESPONSE, row.id) for row in TABLE if row.response is not None}
    for header_type in range(4):
        for number in range(256):
            found = msg.decode(struct.pack("<BBHHH", header_type, number, 0, 0, 8))
            is_unknown = isinstance(found, msg.Malformed) and found.name == "unknown-message"
            assert is_unknown == ((header_type, number) not in known)


def test_ids_that_are_kept_are_unknown() -> None:
    for kept in msg.ReservedId:
        assert malformed(struct.pack("<BBHHH", TYPE_BUS, kept, 0, 0, 8)).name == "unknown-message"


def test_reserved_bytes_are_zero_when_written_and_skipped_when_read() -> None:
    for frame, places in (
        (msg.Frame(msg.SetVqueue(1, 2, 3, 4, 5), 1, 2), (12, 13, 14, 15, 20, 21, 22, 23)),
        (msg.Frame(msg.GetVqueueResponse(1, 2, 3, 4, 5, 6), 1, 2), (20, 21, 22, 23)),
        (msg.Frame(msg.ChannelOpen(1, 2, 3, 4, "c"), 0, 2), (10, 11)),
        (msg.Frame(msg.Error(1, 2, "no"), 1, 2), (13, 14, 15)),
    ):
        data = bytearray(msg.encode(frame))
        for place in places:
            assert data[place] == 0
            data[place] = 0xFF
        assert msg.decode(data) == frame


def test_names_and_texts_are_utf8_of_their_length() -> None:
    good = msg.encode(msg.Frame(msg.NameResponse(UUID(int=5), "disk0"), 1, 2))
    for name in (b"\x06disk0", b"\x04disk0", b"\x02\xc3\x28", bytes([64]) + b"x" * 64, b""):
        assert malformed(with_size(good[:24] + name)).name == "bad-body"
    longest = msg.Frame(msg.NameResponse(UUID(int=5), "ü" * 31 + "x"), 1, 2)
    assert msg.decode(msg.encode(longest)) == longest
    text = msg.encode(msg.Frame(msg.Error(1, 2, ""), 1, 2))
    assert malformed(with_size(text + b"\xff")).name == "bad-body"


def test_optional_bytes_are_none_or_as_many_as_said() -> None:
    for body in (
        msg.SetConfigResponse(1, 2, 4),
        msg.SetConfigResponse(1, 2, 4, b"four"),
        msg.SetConfigResponse(1, 2, 0),
    ):
        assert msg.decode(msg.encode(msg.Frame(body, 1))) == msg.Frame(body, 1)
    for event in (msg.EventConfig(1, 2, 3, 4, b""), msg.EventConfig(1, 2, 3, 4, b"four")):
        assert msg.decode(msg.encode(msg.Frame(event, 1))) == msg.Frame(event, 1)


# What belongs to what.


def test_responses_belong_to_requests() -> None:
    assert msg.response_type(msg.GetConfig) is msg.GetConfigResponse
    for row in TABLE:
        assert msg.response_type(row.message) is row.response
        assert msg.is_event(row.message) == (row.response is None)
        assert msg.message_id(row.message) == row.id
        if row.response is not None:
            assert row.response.__name__ == row.message.__name__ + "Response"
            assert msg.message_id(row.response) == row.id
            assert msg.response_type(row.response) is None
    assert msg.message_id(msg.Ping(3)) == 3
    assert (msg.message_id(msg.Request), msg.is_event(msg.Request)) == (REQUEST_ID, True)


def test_every_class_is_exported() -> None:
    for cls in CLASSES:
        assert getattr(msg, cls.__name__) is cls
        assert cls.__name__ in msg.__all__


@unhurried
@given(st.integers(0, 0xFFFF), st.binary(max_size=64))
def test_device_numbers_of_a_bitmap(offset: int, bitmap: bytes) -> None:
    found = list(msg.GetDevicesResponse(offset, 8 * len(bitmap), 0, bitmap).numbers())
    wanted = [offset + n for n in range(8 * len(bitmap)) if bitmap[n // 8] >> n % 8 & 1]
    assert found == [number for number in wanted if number <= 0xFFFF]


def test_it_imports_virtio_at_most() -> None:
    script = "import sys, vbus.msg; print(*sorted(n for n in sys.modules if n.startswith('vbus.')))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in found if not name.startswith(("vbus.msg", "vbus.virtio"))] == []


# Byte streams.


def chunks_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    return [stream[a:b] for a, b in itertools.pairwise(places)]


@unhurried
@given(st.lists(frames, max_size=6), st.lists(st.integers(0, 2000), max_size=12), st.binary(max_size=7))
def test_a_stream_is_cut_into_its_messages_however_it_arrives(
    sent: list[msg.Frame], cuts: list[int], rest: bytes
) -> None:
    messages = [msg.encode(frame) for frame in sent]
    splitter = msg.Splitter()
    found: list[Any] = []
    for chunk in chunks_of(b"".join(messages) + rest, cuts):
        found += splitter.feed(chunk)
        assert len(splitter._held) < msg.MAX_MESSAGE
    assert found == messages
    assert [msg.decode(message) for message in found] == sent


def test_a_stream_byte_by_byte() -> None:
    frame = msg.Frame(msg.Request(0, 1, 5, 0, b"bytes"), 3)
    message = msg.encode(frame)
    splitter = msg.Splitter(len(message))
    for _ in range(3):
        for n in range(len(message) - 1):
            assert splitter.feed(message[n : n + 1]) == []
        assert splitter.feed(message[-1:]) == [message]


def test_no_bytes_are_no_message() -> None:
    assert msg.Splitter().feed(b"") == []


@pytest.mark.parametrize(
    ("limit", "header", "name"),
    [
        (65535, "02 03 0000 0000 0700", "message-size"),
        (65535, "02 03 0000 0000 0000", "message-size"),
        (264, "02 03 0000 0000 0901", "message-size"),
        (264, "02 03 0000 0000 ffff", "message-size"),
        (65535, "06 03 0000 0000 0c00", "reserved-type"),
        (65535, "ff ff ffff ffff ffff", "reserved-type"),
    ],
)
def test_a_header_that_cannot_be_ends_the_stream(limit: int, header: str, name: str) -> None:
    good = msg.encode(msg.Frame(msg.Ping(1)))
    splitter = msg.Splitter(limit)
    first, second = splitter.feed(good + bytes.fromhex(header) + good)
    assert first == good
    assert isinstance(second, msg.Malformed)
    assert second.name == name
    assert splitter.feed(good) == [second]
    assert not splitter._held


def test_the_limit_itself_is_taken() -> None:
    message = msg.encode(msg.Frame(msg.ChannelEvent(1, bytes(264 - 12))))
    assert len(message) == 264
    assert msg.Splitter(264).feed(message) == [message]
    (found,) = msg.Splitter(263).feed(message)
    assert isinstance(found, msg.Malformed)


@unhurried
@given(st.lists(st.binary(max_size=300), max_size=10))
def test_a_stream_of_anything_ends_or_waits(chunks: list[bytes]) -> None:
    splitter = msg.Splitter(100)
    for chunk in chunks:
        for piece in splitter.feed(chunk):
            assert isinstance(piece, msg.Malformed) or 8 <= len(piece) <= 100
        assert len(splitter._held) < 100


# The writer of a stream.


@pytest.fixture
def pair() -> Any:
    near, far = socket.socketpair()
    near.setblocking(True)
    far.settimeout(30)
    yield near, far
    near.close()
    far.close()


class Ended:
    """Hears why a writer ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.event = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.event.set()


def test_the_writer_keeps_order_and_loses_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    ended = Ended()
    writer = WireWriter(near, "test", ended)
    sent = [msg.encode(msg.Frame(msg.Request(0, n, 9000, 0, bytes([n % 256]) * 9000), 1)) for n in range(400)]
    for message in sent:
        assert writer.send(message)
    splitter = msg.Splitter()
    found: list[Any] = []
    while len(found) < len(sent):
        found += splitter.feed(far.recv(50000))
    assert found == sent
    writer.close()
    assert writer.queued == 0
    assert not ended.reasons


def test_the_writer_holds_a_limited_amount(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = pair
    monkeypatch.setattr(wire, "MAX_QUEUED", 1 << 20)
    writer = WireWriter(near, "test", Ended())
    message = bytes(1 << 16)
    taken = 0
    while writer.send(message):
        taken += 1
        assert taken < 1000, "nobody reads, and still it takes more"
    assert writer.queued <= 1 << 20
    # It ends although a write waits for a reader that never comes.
    writer.close()
    assert not writer._thread.is_alive()
    assert writer.queued == 0
    assert not writer.send(b"late")


def test_the_writer_says_once_that_the_other_side_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    ended = Ended()
    writer = WireWriter(near, "test", ended)
    far.close()
    while writer.send(bytes(1000)):
        if ended.event.wait(0.01):
            break
    assert ended.event.wait(30)
    assert not writer.send(b"late")
    writer.close()
    assert len(ended.reasons) == 1
    assert not writer._thread.is_alive()
