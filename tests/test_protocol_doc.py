"""docs/protocol.md against the codec: every layout and every example in it is read, and must be what the codec does."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from vbus import channel, msg
from vbus.connectors import (
    area_peer,
    guest_ram,
    ivshmem_peer,
    memory_tree,
    peer,
    peer_channels,
    peer_host,
    process,
    stream,
)
from vbus.msg import messages, wire
from vbus.msg.codec import TABLE
from vbus.msg.generation import EVENT_BIT, FRAME_HEADER_SIZE, TYPE_RESPONSE
from vbus.msg.layout import DATA, IDENTITY, MAX_NAME, NAME, TEXT, WORDS, Layout
from vbus.proxy.connectors import process as guest_process
from vbus.shmem import area, handshake, link

PAGE = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text()
CODES = {"u8": "B", "le16": "H", "le32": "I", "le64": "Q"}
SIZES = {"u8": 1, "le16": 2, "le32": 4, "le64": 8}


def blocks(kind: str) -> list[str]:
    """The insides of the fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def paragraphs(block: str) -> Iterator[str]:
    """Lines that begin at the margin, each with the lines that are indented by two behind it."""
    yield from re.sub(r"\n  (?! )", " ", block).splitlines()


def body_class(name: str) -> type[msg.Body]:
    found = getattr(messages, name)
    assert issubclass(found, msg.Body)
    return typing.cast(type[msg.Body], found)


ALL = {cls for row in TABLE for cls in (row.message, row.response) if cls is not None}
LAYOUTS = [line for block in blocks("layout") for line in paragraphs(block)]
VECTORS = [
    (call, hex_.replace("\n", " "))
    for block in blocks("vectors")
    for call, hex_ in re.findall(
        r"^(dev_num.*\))\n((?:    [0-9a-f ]+\n)+)", re.sub(r"\n  (?! )", " ", block), re.MULTILINE
    )
]
MALFORMED = [
    (name, hex_) for block in blocks("malformed") for name, hex_ in re.findall(r"^(\S+)\s+(.+)$", block, re.MULTILINE)
]


def name_of(line: str) -> str:
    found = re.match(r"(?:dev_num=\d+ token=\d+ )?(\w+)", line)
    assert found, line
    return found[1]


def parsed(call: str) -> msg.Frame:
    """The message that a vector's first line describes."""
    found = re.fullmatch(r"dev_num=(\d+) token=(\d+) (.*)", call)
    assert found, call
    tree = ast.parse(found[3], mode="eval").body
    assert isinstance(tree, ast.Call)
    assert isinstance(tree.func, ast.Name)
    cls = body_class(tree.func.id)
    kinds = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for keyword in tree.keywords:
        assert keyword.arg is not None
        value = ast.literal_eval(keyword.value)
        match kinds[keyword.arg]:
            case kind if kind is bytes:
                value = bytes.fromhex(value)
            case kind if kind is UUID:
                value = UUID(value)
        values[keyword.arg] = value
    assert list(values) == [field.name for field in dataclasses.fields(cls)], "all fields, in order"
    return msg.Frame(cls(**values), dev_num=int(found[1]), token=int(found[2]))


def test_every_message_has_a_layout_and_a_vector() -> None:
    names = sorted(cls.__name__ for cls in ALL)
    assert sorted(map(name_of, LAYOUTS)) == names
    assert sorted({name_of(call) for call, _ in VECTORS}) == names
    assert len(VECTORS) == sum(block.count(" token=") for block in blocks("vectors"))


@pytest.mark.parametrize("line", LAYOUTS, ids=name_of)
def test_the_layout_is_the_codecs(line: str) -> None:
    found = re.fullmatch(r"(\w+) +type (\d), id ([0-9a-f]{2}): (.+)", line)
    assert found, line
    cls = body_class(found[1])
    (row,) = [row for row in TABLE if cls in (row.message, row.response)]
    layout = row.layout if cls is row.message else row.response_layout
    header_type = row.header_type | (TYPE_RESPONSE if cls is row.response else 0)
    assert (int(found[2]), int(found[3], 16)) == (header_type, row.id)
    names, code, tail = [], "<", []
    for field in found[4].split("; ") if found[4] != "-" else []:
        kind, name = field.split(" ", 1)
        reserved = re.fullmatch(r"0(?:\[(\d)\])?", name)
        if reserved:
            code += f"{int(reserved[1] or 1) * SIZES[kind]}x"
        elif "[" in name or kind in ("uuid", "name"):
            names.append(name.partition("[")[0])
            tail.append(kind)
        else:
            assert not tail, f"{name} is fixed and comes behind the tail"
            names.append(name)
            code += CODES[kind]
    assert names == [field.name for field in dataclasses.fields(cls)]
    assert code == layout.fixed.format
    assert len(tail) == (layout.tail.count if layout.tail else 0)


@pytest.mark.parametrize(("call", "hex_"), VECTORS, ids=[name_of(call) for call, _ in VECTORS])
def test_the_vector_is_what_the_codec_makes_and_reads(call: str, hex_: str) -> None:
    frame, data = parsed(call), bytes.fromhex(hex_)
    assert msg.encode(frame).hex(" ") == data.hex(" ")
    assert msg.decode(data) == frame


@pytest.mark.parametrize(("name", "hex_"), MALFORMED, ids=[f"{n}-{name}" for n, (name, _) in enumerate(MALFORMED)])
def test_the_malformed_example_is_called_so(name: str, hex_: str) -> None:
    found = msg.decode(bytes.fromhex(hex_))
    assert isinstance(found, msg.Malformed)
    assert found.name == name


def test_every_kind_of_malformed_has_an_example() -> None:
    names = re.findall(r"`([a-z]+-[a-z]+)`", msg.Malformed.__doc__ or "")
    assert sorted({name for name, _ in MALFORMED}) == sorted(names)
    assert len(names) == 5


TAILS = {DATA: "bytes", WORDS: "words", TEXT: "text", NAME: "name", IDENTITY: "uuid, name"}


def body_of(layout: Layout) -> str:
    """A body as the page's first table writes it."""
    if layout.tail is None:
        return str(layout.fixed.size)
    return (f"{layout.fixed.size} + " if layout.fixed.size else "") + TAILS[layout.tail]


def title(cls: type[msg.Body]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).upper()


def test_the_first_table_has_every_message_with_its_id_and_sizes() -> None:
    line = r"^\| (bus )?([0-9a-f]{2}) \| \[(\w+)\]\(#(\S+)\) \| (?:driver|bus|both) \| (.+?) \| (.+?) \|$"
    found = re.findall(line, PAGE, re.MULTILINE)
    wanted = []
    for row in TABLE:
        name = title(row.message)
        response = body_of(row.response_layout) if row.response is not None else "none"
        wanted.append(
            ("bus " * row.bus, f"{row.id:02x}", name, f"{name.lower()}-{row.id:02x}", body_of(row.layout), response)
        )
    assert found == wanted


def test_the_limits_are_those_of_the_code() -> None:
    (section,) = re.findall(r"^## Limits\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^\| (.+?) \| (\d+)(?: bytes)? \|$", section, re.MULTILINE)
    assert {what: int(value) for what, value in lines} == {
        "largest message, `process`": area_peer.MAX_MESSAGE,
        "largest message, `stream`": stream.MAX_MESSAGE,
        "smallest `max_msg_size` of a HELLO": peer.LEAST_MESSAGE,
        "name": MAX_NAME,
        "readable and writable bytes of a REQUEST": stream.MAX_REQUEST,
        "bytes that wait for a reader of a stream": wire.MAX_QUEUED,
        "messages that wait for a reader of a link ring": link.MAX_KEPT,
        "descriptors that wait for the message with their cookie": process.MAX_WAITING_FDS,
        "bytes of memory that one driver may have mapped": peer.MAX_DRIVER_MEMORY,
        "numbers of removed devices that are not RELEASEd": peer.MAX_UNRELEASED,
        "drivers of one connector; the next is refused": peer_host.MAX_PEERS,
        "event sources of a bus, those of channels among them; a device beyond them is refused": area.MAX_SOURCES,
        "bytes of a shared area": area.MAX_AREA,
        "channels that one driver's side has open; the next is refused": peer_channels.MAX_CHANNELS,
        "bytes of regions of one driver's channels, each rounded up to a power of two": area.REGIONS_SIZE,
        "bytes of a channel's event": channel.MAX_EVENT,
        "smallest `max_msg_size` of a link with channels": peer_channels.EVENT_MESSAGE,
        "window of a channel": channel.WINDOW,
        "ranges of a guest's memory": memory_tree.MAX_RANGES,
        "bytes of a guest's memory that are mapped": guest_ram.MAX_GUEST_RAM,
        "questions for ranges that wait for QEMU's answer": ivshmem_peer.MAX_QUESTIONS,
    }


def test_the_answer_to_hello_is_small_enough_for_everybody() -> None:
    largest = msg.HelloResponse(1, 0, 0, 0, 0, 0, 0, 0, UUID(int=0), "x" * MAX_NAME)
    assert len(msg.encode(msg.Frame(largest))) <= peer.LEAST_MESSAGE


def test_the_header_of_the_shared_area() -> None:
    header = area.Geometry.plan(1024).pack()
    end = 0
    lines = re.findall(r"^\| (\d+) \| (le\d+) \S+ \| (0x[0-9a-f]+) \|$", PAGE, re.MULTILINE)
    for at, kind, value in lines:
        assert int(at) == end
        end += SIZES[kind]
        assert int.from_bytes(header[int(at) : end], "little") == int(value, 16)
    assert end == len(header)
    assert header[:8] == b"vbarea1\0"


def test_the_packets_of_the_socket() -> None:
    (block,) = blocks("socket")
    examples = re.findall(r"^(\w.*)\n    (.+)$", block, re.MULTILINE)
    assert [what.split()[0] for what, _ in examples] == ["greeting", "greeting", "cookie"]
    for what, hex_ in examples:
        packet = bytes.fromhex(hex_)
        if what.startswith("cookie"):
            cookie = int(what.split()[1])
            assert handshake.pack_cookie(cookie) == packet
            assert handshake.read_cookie(packet) == cookie
        else:
            values = dict(pair.split("=") for pair in what.split()[1:])
            greeting = handshake.Greeting(
                int(values["signal_kind"]), int(values["priorities"]), int(values["errno"]), values["text"]
            )
            assert greeting.pack() == packet
            assert handshake.Greeting.unpack(packet) == greeting


def test_what_the_page_says_of_the_socket() -> None:
    assert f"it carries {guest_process.DESCRIPTORS} descriptors" in PAGE
    assert f"then text; {handshake.MAX_PACKET} bytes at most" in PAGE
    assert f"At most {process.MAX_WAITING_FDS} may wait for their messages" in PAGE
    assert f"keeps up to {link.MAX_KEPT} messages" in PAGE


def test_headings_name_the_ids() -> None:
    found = {(name, int(number, 16)) for name, number in re.findall(r"^### ([A-Z_]+) \(([0-9a-f]{2})\)$", PAGE, re.M)}
    wanted = {(title(row.message), row.id) for row in TABLE}
    assert found == wanted


def test_what_the_page_says_of_sizes_and_ids() -> None:
    assert "begins with 8 bytes" in PAGE
    assert FRAME_HEADER_SIZE == 8
    assert "8 to 65535" in PAGE
    assert msg.MAX_MESSAGE == 65535
    assert "88 and 89 are kept for GRANT and REVOKE" in PAGE
    assert {kept.name: kept.value for kept in msg.ReservedId} == {"GRANT": 0x88, "REVOKE": 0x89}
    assert all(msg.is_event(row.message) == (row.response is None) for row in TABLE)
    assert all(bool(row.id & EVENT_BIT) == (row.response is None) for row in TABLE)


def test_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert targets
    assert targets <= anchors
