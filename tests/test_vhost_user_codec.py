"""The vhost-user codec: bytes as the protocol's text has them, round trips, and everything that is no message."""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbus.errors import Violation
from vbus.vhost_user import messages as m
from vbus.vhost_user.codec import HEADER, MAX_PAYLOAD, Malformed, Message, decode, encode
from vbus.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from vbus.vhost_user.wire import MAX_FDS, Reader, send

U32, U64, U16 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1)
REGION = st.builds(m.Region, U64, U64, U64, U64)
PAYLOADS: dict[type[m.Payload], st.SearchStrategy[Any]] = {
    m.Empty: st.just(m.Empty()),
    m.U64: st.builds(m.U64, U64),
    m.VringState: st.builds(m.VringState, U32, U32),
    m.VringAddr: st.builds(m.VringAddr, U32, U32, U64, U64, U64, U64),
    m.MemTable: st.builds(m.MemTable, st.lists(REGION, max_size=8).map(tuple)),
    m.MemRegion: st.builds(m.MemRegion, U64, U64, U64, U64),
    m.Log: st.builds(m.Log, U64, U64),
    m.Config: st.builds(m.Config, U32, U32, st.binary(max_size=256)),
    m.Inflight: st.builds(m.Inflight, U64, U64, U16, U16),
    m.DeviceState: st.builds(m.DeviceState, U32, U32),
}


@st.composite
def some_messages(draw: st.DrawFn) -> tuple[bool, Message]:
    backend = draw(st.booleans())
    table: dict[Any, m.Row] = dict(m.BACKEND_TABLE) if backend else dict(m.TABLE)
    request = draw(st.sampled_from(sorted(table)))
    reply = draw(st.booleans())
    kind = (table[request].answer or m.U64) if reply else table[request].payload
    return backend, Message(request, draw(PAYLOADS[kind]), reply, draw(st.booleans()))


@given(some_messages())
def test_every_message_comes_back_as_it_was(said: tuple[bool, Message]) -> None:
    backend, message = said
    data = encode(message.request, message.payload, reply=message.reply, need_reply=message.need_reply)
    assert decode(data, backend=backend) == message
    assert len(data) <= HEADER.size + MAX_PAYLOAD
    for size in range(len(data)):
        assert isinstance(decode(data[:size], backend=backend), Malformed)
    longer = decode(data + b"\0", backend=backend)
    assert isinstance(longer, Malformed)
    assert longer.name == "message-size"


@given(st.binary(max_size=400), st.booleans())
def test_no_bytes_at_all_raise(data: bytes, backend: bool) -> None:
    found = decode(data, backend=backend)
    assert isinstance(found, Message | Malformed)
    # Nearly a message: the header is good, whatever follows.
    for number in (*Request, 0, 26, 99):
        framed = struct.pack("=III", number, 1, len(data)) + data
        assert isinstance(decode(framed, backend=backend), Message | Malformed)


def native(little: str) -> bytes:
    """Words of four bytes as this machine lays them out."""
    words = bytes.fromhex(little)
    if sys.byteorder == "little":
        return words
    return b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))


def test_bytes_as_the_protocol_has_them() -> None:
    assert encode(Request.GET_FEATURES, m.Empty()) == native("01000000 01000000 00000000")
    assert encode(Request.SET_VRING_NUM, m.VringState(1, 256), need_reply=True) == native(
        "08000000 09000000 08000000 01000000 00010000"
    )
    assert encode(Request.GET_VRING_BASE, m.VringState(0, 7), reply=True) == native(
        "0b000000 05000000 08000000 00000000 07000000"
    )
    table = m.MemTable((m.Region(0x1, 0x2, 0x3, 0x4),))
    assert encode(Request.SET_MEM_TABLE, table) == struct.pack("=IIIIIQQQQ", 5, 1, 40, 1, 0, 1, 2, 3, 4)
    assert encode(Request.ADD_MEM_REG, m.MemRegion(1, 2, 3, 4)) == struct.pack("=IIIQQQQQ", 37, 1, 40, 0, 1, 2, 3, 4)
    assert encode(Request.SET_VRING_ADDR, m.VringAddr(1, 2, 3, 4, 5, 6)) == struct.pack(
        "=IIIIIQQQQ", 9, 1, 40, 1, 2, 3, 4, 5, 6
    )
    assert encode(Request.GET_CONFIG, m.Config(4, 0, b"abc")) == struct.pack("=IIIIII3s", 24, 1, 15, 4, 3, 0, b"abc")
    assert encode(Request.SET_INFLIGHT_FD, m.Inflight(1, 2, 3, 4)) == struct.pack("=IIIQQHH4x", 32, 1, 24, 1, 2, 3, 4)
    assert encode(BackendRequest.CONFIG_CHANGE_MSG, m.Empty()) == native("02000000 01000000 00000000")


def test_an_answer_with_nothing_in_it_is_a_refusal_to_tell_config_space() -> None:
    refused = encode(Request.GET_CONFIG, m.Empty(), reply=True)
    assert decode(refused) == Message(Request.GET_CONFIG, m.Empty(), reply=True)
    assert isinstance(decode(encode(Request.GET_CONFIG, m.Empty())), Malformed)


def test_numbers_of_the_protocol() -> None:
    assert [bit.bit_length() - 1 for bit in ProtocolFeature] == list(range(20))
    assert (ProtocolFeature.CONFIG, ProtocolFeature.STATUS, ProtocolFeature.DEVICE_STATE) == (1 << 9, 1 << 16, 1 << 19)
    assert set(m.TABLE) == set(Request) - {
        Request.IOTLB_MSG,
        Request.SET_VRING_ENDIAN,
        Request.POSTCOPY_ADVISE,
        Request.POSTCOPY_LISTEN,
        Request.POSTCOPY_END,
    }


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"", "short-header"),
        (bytes(11), "short-header"),
        (struct.pack("=III", 1, 0, 0), "vhost-user-version"),
        (struct.pack("=III", 1, 2, 0), "vhost-user-version"),
        (struct.pack("=III", 1, 1 | 16, 0), "message-flags"),
        (struct.pack("=III", 1, 1 | 1 << 31, 0), "message-flags"),
        (struct.pack("=III", 1, 1, 8), "message-size"),
        (struct.pack("=III", 1, 1, 2**32 - 1), "message-size"),
        (struct.pack("=III", 0, 1, 0), "unknown-request"),
        (struct.pack("=III", 22, 1, 0), "unknown-request"),
        (struct.pack("=III", 2**32 - 1, 1, 0), "unknown-request"),
        (struct.pack("=IIIQ", 1, 1, 8, 0), "bad-payload"),
        (struct.pack("=III", 2, 1, 0), "bad-payload"),
        (struct.pack("=IIII", 2, 1, 4, 0), "bad-payload"),
        (struct.pack("=IIIII", 5, 1, 8, 1, 0), "bad-payload"),
        (struct.pack("=IIIII", 5, 1, 8, 9, 0) + b"", "bad-payload"),
        (struct.pack("=IIIII", 5, 1, 8, 2**32 - 1, 0), "bad-payload"),
        (struct.pack("=IIIIII", 24, 1, 12, 0, 1, 0), "bad-payload"),
        (struct.pack("=IIIIII", 24, 1, 12, 0, 2**32 - 1, 0), "bad-payload"),
        (struct.pack("=IIIIII", 24, 1, 12 + 257, 0, 257, 0) + bytes(257), "bad-payload"),
    ],
)
def test_what_is_no_message_has_a_name(data: bytes, name: str) -> None:
    found = decode(data)
    assert isinstance(found, Malformed)
    assert found.name == name


def test_what_does_not_fit_is_not_made() -> None:
    for payload in (
        m.U64(-1),
        m.U64(2**64),
        m.VringState(2**32, 0),
        m.Config(0, 0, bytes(257)),
        m.Config(2**32, 0, b""),
        m.MemTable(tuple(m.Region(0, 0, 0, 0) for _ in range(9))),
        m.Inflight(0, 0, 2**16, 0),
    ):
        with pytest.raises(ValueError, match=r"."):
            payload.pack()


def test_messages_and_their_descriptors_stay_together() -> None:
    here, there = socket.socketpair()
    first, second = os.memfd_create("first"), os.memfd_create("second")
    before = len(os.listdir("/proc/self/fd"))
    with here, there:
        send(here, encode(Request.SET_OWNER, m.Empty()))
        send(here, encode(Request.SET_VRING_KICK, m.U64(0)), [first])
        table = m.MemTable(tuple(m.Region(n, 1, n, 0) for n in range(8)))
        send(here, encode(Request.SET_MEM_TABLE, table), [second] * MAX_FDS)
        reader = Reader(there)
        found = [reader.read() for _ in range(3)]
        here.shutdown(socket.SHUT_WR)
        assert reader.read() is None
    assert all(entry is not None for entry in found)
    assert [len(entry[1]) for entry in found if entry is not None] == [0, 1, 8]
    kick = found[1]
    assert kick is not None
    assert os.readlink(f"/proc/self/fd/{kick[1][0]}") == "/memfd:first (deleted)"
    for entry in found:
        for fd in entry[1] if entry is not None else ():
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before - 2
    os.close(first)
    os.close(second)


def test_a_byte_at_a_time_is_a_message_too() -> None:
    here, there = socket.socketpair()
    data = encode(Request.SET_VRING_NUM, m.VringState(3, 64))
    with here, there:
        there.setblocking(False)
        reader = Reader(there)
        for n in range(len(data)):
            with pytest.raises(BlockingIOError):
                reader.read()
            here.send(data[n : n + 1])
        assert reader.read() == (data, [])


@pytest.mark.parametrize(
    ("said", "fds", "name"),
    [
        (struct.pack("=III", 1, 3, 0), 0, "malformed-message"),
        (struct.pack("=III", 1, 1, 2**31), 1, "malformed-message"),
        (encode(Request.GET_FEATURES, m.Empty())[:-1], 2, "half-a-message"),
        (encode(Request.SET_FEATURES, m.U64(1))[:-1], 1, "half-a-message"),
        (encode(Request.GET_FEATURES, m.Empty()), MAX_FDS + 1, "too-many-descriptors"),
        (encode(Request.GET_FEATURES, m.Empty()), 200, "too-many-descriptors"),
    ],
)
def test_what_breaks_the_stream_leaves_no_descriptors(said: bytes, fds: int, name: str) -> None:
    here, there = socket.socketpair()
    fd = os.memfd_create("x")
    before = len(os.listdir("/proc/self/fd"))
    with here, there:
        send(here, said, [fd] * fds)
        here.shutdown(socket.SHUT_WR)
        reader = Reader(there)
        with pytest.raises(Violation) as broken:
            reader.read()
        reader.close()
        assert broken.value.name == name
        assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
