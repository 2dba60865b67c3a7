"""The specification as data: layouts against its offsets, names against its numbers, and what a wrong value gets."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any, ClassVar, assert_type

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vbus import virtio
from vbus.virtio import (
    Config,
    DeviceID,
    FeatureSet,
    Status,
    blk,
    console,
    entropy,
    features,
    le16,
    le32,
    le64,
    net,
    ring,
    u8,
)

unhurried = settings(deadline=None)
"""No timing decides a test."""


class Lamp(Config):
    level: le32 = 100
    flags: u8
    serial: Annotated[bytes, 6]
    power: le16
    energy: le64

    LIMIT: ClassVar[int] = 7


# Config space.


def test_fields_follow_each_other_without_padding() -> None:
    assert [
        (name, Lamp.offset_of(name), Lamp.size_of(name)) for name in ("level", "flags", "serial", "power", "energy")
    ] == [
        ("level", 0, 4),
        ("flags", 4, 1),
        ("serial", 5, 6),
        ("power", 11, 2),
        ("energy", 13, 8),
    ]
    assert Lamp().size == 21


def test_fields_are_little_endian() -> None:
    lamp = Lamp(level=0x01020304, flags=5, serial=b"sixsix", power=0x0607, energy=0x08090A0B0C0D0E0F)
    assert lamp.to_bytes() == bytes.fromhex("04030201 05") + b"sixsix" + bytes.fromhex("0706 0f0e0d0c0b0a0908")


def test_fields_are_ints_and_bytes_to_a_type_checker_too() -> None:
    lamp = Lamp()
    assert_type(lamp.level, int)
    assert_type(lamp.serial, bytes)
    assert type(lamp.level) is int
    assert type(lamp.serial) is bytes
    with pytest.raises(AttributeError, match="levle"):
        lamp.levle  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="Lamp has no field 'levle'"):
        lamp.levle = 3  # type: ignore[attr-defined]


def test_a_field_begins_with_its_default_or_zero() -> None:
    assert Lamp().to_dict() == {"level": 100, "flags": 0, "serial": "000000000000", "power": 0, "energy": 0}
    assert Lamp(flags=3).level == 100
    assert Config().to_bytes() == b""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("level", 1 << 32),
        ("level", -1),
        ("level", "3"),
        ("level", 3.0),
        ("level", None),
        ("flags", 256),
        ("power", 1 << 16),
        ("energy", 1 << 64),
        ("serial", b"five5"),
        ("serial", b"seven77"),
        ("serial", "sixsix"),
        ("serial", 6),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    lamp = Lamp(level=1, flags=2, serial=b"abcdef", power=3, energy=4)
    before = lamp.to_bytes()
    with pytest.raises(ValueError, match=f"^{field} takes"):
        setattr(lamp, field, value)
    with pytest.raises(ValueError, match=f"^{field} takes"):
        Lamp(**{field: value})
    assert lamp.to_bytes() == before


@pytest.mark.parametrize(
    ("field", "most"), [("level", 2**32 - 1), ("flags", 255), ("power", 65535), ("energy", 2**64 - 1)]
)
def test_the_largest_value_fits(field: str, most: int) -> None:
    lamp = Lamp()
    setattr(lamp, field, most)
    assert getattr(lamp, field) == most


def test_a_field_that_there_is_not() -> None:
    with pytest.raises(TypeError, match="colour"):
        Lamp(colour=3)
    with pytest.raises(KeyError):
        Lamp.offset_of("colour")


def test_a_subclass_adds_fields_behind() -> None:
    class Dimmer(Lamp):
        speed: le16

    assert Dimmer.offset_of("energy") == Lamp.offset_of("energy")
    assert Dimmer.offset_of("speed") == Lamp().size
    assert Dimmer().level == 100
    assert "speed" not in Lamp().to_dict()


@pytest.mark.parametrize(
    "annotation", [int, "int", str, bytes, Annotated[int, 3], Annotated[str, 4], Annotated[bytes, 0]]
)
def test_an_annotation_that_is_no_field_is_refused(annotation: Any) -> None:
    with pytest.raises(TypeError, match="level: annotate it with"):
        type("Wrong", (Config,), {"__annotations__": {"level": annotation}, "__module__": __name__})


@pytest.mark.parametrize("name", ["size", "write", "to_bytes", "level"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: this name is taken"):
        type("Wrong", (Lamp,), {"__annotations__": {name: u8}, "__module__": __name__})


def test_a_default_that_does_not_fit_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(ValueError, match=r"^level takes"):
        type("Wrong", (Config,), {"__annotations__": {"level": u8}, "level": 256, "__module__": __name__})


@unhurried
@given(st.integers(-2, 23), st.binary(max_size=24), st.binary(min_size=21, max_size=21))
def test_a_write_names_the_fields_it_lies_in_and_changes_no_others(offset: int, data: bytes, before: bytes) -> None:
    lamp = Lamp.from_bytes(before)
    if offset < 0 or offset + len(data) > 21:
        with pytest.raises(ValueError, match="config space of 21"):
            lamp.write(offset, data)
        assert lamp.to_bytes() == before
        return
    fields = lamp.write(offset, data)
    assert lamp.to_bytes() == before[:offset] + data + before[offset + len(data) :]
    touched = set(range(offset, offset + len(data)))
    for name in lamp.to_dict():
        start = Lamp.offset_of(name)
        places = set(range(start, start + Lamp.size_of(name)))
        assert (name in fields) == bool(places & touched)


@unhurried
@given(st.binary(max_size=40))
def test_bytes_of_any_length_can_be_read(data: bytes) -> None:
    assert Lamp.from_bytes(data).to_bytes() == (data + bytes(21))[:21]


def test_instances_share_nothing() -> None:
    one, two = Lamp(), Lamp()
    one.level = 5
    assert two.level == 100
    assert one.to_bytes() != two.to_bytes()


# The specification's own layouts.


def test_the_config_space_of_blk() -> None:
    offsets = {
        "capacity": 0,
        "size_max": 8,
        "seg_max": 12,
        "cylinders": 16,
        "heads": 18,
        "sectors": 19,
        "blk_size": 20,
        "physical_block_exp": 24,
        "alignment_offset": 25,
        "min_io_size": 26,
        "opt_io_size": 28,
        "writeback": 32,
        "unused0": 33,
        "num_queues": 34,
        "max_discard_sectors": 36,
        "max_discard_seg": 40,
        "discard_sector_alignment": 44,
        "max_write_zeroes_sectors": 48,
        "max_write_zeroes_seg": 52,
        "write_zeroes_may_unmap": 56,
        "unused1": 57,
        "max_secure_erase_sectors": 60,
        "max_secure_erase_seg": 64,
        "secure_erase_sector_alignment": 68,
    }
    assert {name: blk.Config.offset_of(name) for name in blk.Config().to_dict()} == offsets
    assert blk.Config().size == 72


def test_the_requests_of_blk() -> None:
    assert blk.HEADER.size == 16
    assert blk.HEADER.pack(blk.RequestType.OUT, 0, 0x1122) == bytes.fromhex("01000000 00000000 2211000000000000")
    assert blk.RANGE.size == 16
    assert blk.RANGE.pack(8, 2, blk.RangeFlags.UNMAP) == bytes.fromhex("0800000000000000 02000000 01000000")
    assert blk.LIFETIME.size == 6
    assert {t.name: t.value for t in blk.RequestType} == {
        "IN": 0,
        "OUT": 1,
        "FLUSH": 4,
        "GET_ID": 8,
        "GET_LIFETIME": 10,
        "DISCARD": 11,
        "WRITE_ZEROES": 13,
        "SECURE_ERASE": 14,
    }
    assert {s.name: s.value for s in blk.RequestStatus} == {"OK": 0, "IOERR": 1, "UNSUPP": 2}
    assert (blk.ID_BYTES, blk.SECTOR) == (20, 512)


def test_the_config_space_of_net() -> None:
    offsets = {
        "mac": 0,
        "status": 6,
        "max_virtqueue_pairs": 8,
        "mtu": 10,
        "speed": 12,
        "duplex": 16,
        "rss_max_key_size": 17,
        "rss_max_indirection_table_length": 18,
        "supported_hash_types": 20,
        "supported_tunnel_types": 24,
    }
    assert {name: net.Config.offset_of(name) for name in net.Config().to_dict()} == offsets
    assert net.Config().size == 28
    assert net.Config(mac=bytes.fromhex("525400123456")).to_dict()["mac"] == "525400123456"


def test_the_headers_and_queues_of_net() -> None:
    assert net.HEADER.size == 12
    assert net.HEADER.pack(net.HeaderFlags.NEEDS_CSUM, net.Gso.TCPV4, 54, 1448, 34, 16, 1) == bytes.fromhex(
        "01 01 3600 a805 2200 1000 0100"
    )
    assert net.HEADER.size + net.HASH_HEADER.size == 20
    assert [int(flag) for flag in net.HeaderFlags] == [1, 2, 4, 8, 16, 32, 64]
    assert [int(kind) for kind in net.Gso] == [0, 1, 3, 4, 5]
    assert [int(flag) for flag in net.GsoFlags] == [0x20, 0x40, 0x80]
    assert net.CONTROL.pack(net.ControlClass.MQ, net.MqCommand.VQ_PAIRS_SET) == b"\x04\x00"
    assert [(net.receiveq(pair), net.transmitq(pair)) for pair in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert [net.controlq(pairs) for pairs in (1, 2, 8)] == [2, 4, 16]


def test_the_layouts_of_console() -> None:
    assert [console.Config.offset_of(name) for name in ("cols", "rows", "max_nr_ports", "emerg_wr")] == [0, 2, 4, 8]
    assert console.Config().size == 12
    assert console.CONTROL.pack(3, console.ControlEvent.PORT_OPEN, 1) == bytes.fromhex("03000000 0600 0100")
    assert console.RESIZE.size == 4
    assert [console.port_queues(port) for port in range(3)] == [(0, 1), (4, 5), (6, 7)]
    assert (console.CONTROL_RECEIVEQ, console.CONTROL_TRANSMITQ) == (2, 3)


def test_entropy_has_neither_features_nor_config_space() -> None:
    assert entropy.FEATURES.names == ()
    assert entropy.Config().size == 0


@pytest.mark.parametrize("size", [1, 2, 8, 256, ring.MAX_SIZE])
def test_the_parts_of_a_split_ring(size: int) -> None:
    assert ring.desc_bytes(size) == 16 * size
    assert ring.avail_bytes(size) == 6 + 2 * size
    assert ring.used_bytes(size) == 6 + 8 * size
    assert (ring.DESC_ALIGN, ring.AVAIL_ALIGN, ring.USED_ALIGN) == (16, 2, 4)
    assert [int(flag) for flag in ring.DescriptorFlags] == [1, 2, 4]


# Features.


def test_bits_of_the_specification() -> None:
    assert net.FEATURES.mask(["CSUM", "MRG_RXBUF", "CTRL_VQ"]) == 1 << 0 | 1 << 15 | 1 << 17
    assert net.FEATURES.bit("RSS") == 60
    assert net.FEATURES.bit("IPSEC") == 70
    assert blk.FEATURES.mask(["RO", "FLUSH", "MQ", "DISCARD"]) == 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13
    assert console.FEATURES.mask(["SIZE", "MULTIPORT", "EMERG_WRITE"]) == 0b111
    assert features.TRANSPORT.mask(["RING_INDIRECT_DESC", "RING_EVENT_IDX", "VERSION_1"]) == 1 << 28 | 1 << 29 | 1 << 32
    assert [features.TRANSPORT.bit(name) for name in features.TRANSPORT] == [28, 29, *range(32, 42), 43]


BITS_BY_CLASS = [
    (console.FEATURES, "SIZE MULTIPORT EMERG_WRITE", [0, 1, 2]),
    (
        blk.FEATURES,
        "SIZE_MAX SEG_MAX GEOMETRY RO BLK_SIZE FLUSH TOPOLOGY CONFIG_WCE MQ DISCARD WRITE_ZEROES LIFETIME SECURE_ERASE "
        "ZONED",
        [1, 2, 4, 5, 6, *range(9, 18)],
    ),
    (
        net.FEATURES,
        "CSUM GUEST_CSUM CTRL_GUEST_OFFLOADS MTU MAC GUEST_TSO4 GUEST_TSO6 GUEST_ECN GUEST_UFO HOST_TSO4 HOST_TSO6 "
        "HOST_ECN HOST_UFO MRG_RXBUF STATUS CTRL_VQ CTRL_RX CTRL_VLAN CTRL_RX_EXTRA GUEST_ANNOUNCE MQ CTRL_MAC_ADDR "
        "DEVICE_STATS HASH_TUNNEL VQ_NOTF_COAL NOTF_COAL GUEST_USO4 GUEST_USO6 HOST_USO HASH_REPORT GUEST_HDRLEN RSS "
        "RSC_EXT STANDBY SPEED_DUPLEX RSS_CONTEXT GUEST_UDP_TUNNEL_GSO GUEST_UDP_TUNNEL_GSO_CSUM HOST_UDP_TUNNEL_GSO "
        "HOST_UDP_TUNNEL_GSO_CSUM OUT_NET_HEADER IPSEC",
        [0, 1, 2, 3, 5, *range(7, 24), *range(50, 58), *range(59, 71)],
    ),
]


@pytest.mark.parametrize(("of", "names", "bits"), BITS_BY_CLASS)
def test_all_bits_of_a_class(of: FeatureSet, names: str, bits: list[int]) -> None:
    assert {name: of.bit(name) for name in of} == dict(zip(names.split(), bits, strict=True))


@pytest.mark.parametrize("of", [net.FEATURES, blk.FEATURES, console.FEATURES, entropy.FEATURES])
def test_no_class_has_a_name_of_the_transport(of: FeatureSet) -> None:
    assert not set(of) & set(features.TRANSPORT)


@unhurried
@given(st.integers(0, 2**128 - 1))
def test_words_have_names_and_blocks(word: int) -> None:
    everything = net.FEATURES | features.TRANSPORT
    names = everything.names_of(word)
    assert len(names) == word.bit_count()
    known = [name for name in names if not name.startswith("bit ")]
    unknown = [int(name.removeprefix("bit ")) for name in names if name.startswith("bit ")]
    assert everything.mask(known) | sum(1 << bit for bit in unknown) == word
    blocks = features.to_blocks(word)
    assert len(blocks) >= 2
    assert all(0 <= block < 1 << 32 for block in blocks)
    assert features.from_blocks(blocks) == word
    assert features.to_blocks(word, 4) == [*blocks, 0, 0][:4]


def test_blocks_that_are_asked_for() -> None:
    word = 1 << 0 | 1 << 32 | 1 << 127
    assert features.to_blocks(1) == [1, 0]
    assert features.to_blocks(word) == [1, 1, 0, 1 << 31]
    assert features.to_blocks(word, 1) == [1]
    assert features.to_blocks(word, 5) == [1, 1, 0, 1 << 31, 0]


@pytest.mark.parametrize("name", ["MRG_RXBUFF", "mrg_rxbuf", "VIRTIO_NET_F_MRG_RXBUF", "MRGRXBUF"])
def test_an_unknown_name_is_told_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'MRG_RXBUF'"):
        net.FEATURES.mask(["CSUM", name])


def test_a_name_like_no_other_is_told_all() -> None:
    with pytest.raises(ValueError, match="there are SIZE, MULTIPORT, EMERG_WRITE"):
        console.FEATURES.bit("zzz")
    with pytest.raises(ValueError, match="there are none"):
        entropy.FEATURES.bit("zzz")


def test_a_class_of_ones_own() -> None:
    lamp = features.features(DIMMABLE=0, COLOUR=5)
    assert lamp.names == ("DIMMABLE", "COLOUR")
    assert lamp.names_of(0b100001 | 1 << 32) == ["DIMMABLE", "COLOUR", "bit 32"]
    assert lamp == FeatureSet({"COLOUR": 5, "DIMMABLE": 0})
    assert hash(lamp) == hash(FeatureSet({"COLOUR": 5, "DIMMABLE": 0}))
    assert lamp != features.features(DIMMABLE=0)
    with pytest.raises(ValueError, match="bit 128"):
        features.features(FAR=128)
    with pytest.raises(ValueError, match="bit -1"):
        features.features(LOW=-1)
    with pytest.raises(ValueError, match="A and B have the same bit 3"):
        features.features(A=3, B=3)


def test_joining_sets_that_contradict_each_other_is_refused() -> None:
    with pytest.raises(ValueError, match="VERSION_1 has bit"):
        features.features(VERSION_1=3) | features.TRANSPORT
    with pytest.raises(ValueError, match="same bit 32"):
        features.features(MINE=32) | features.TRANSPORT
    assert (features.TRANSPORT | features.TRANSPORT) == features.TRANSPORT


# Ids and status.


def test_device_ids() -> None:
    assert (DeviceID.NETWORK, DeviceID.BLOCK, DeviceID.CONSOLE, DeviceID.ENTROPY) == (1, 2, 3, 4)
    assert (DeviceID.GPU, DeviceID.SOCKET, DeviceID.FILE_SYSTEM, DeviceID.SPI, DeviceID.USB) == (16, 19, 26, 45, 49)
    assert sorted(DeviceID) == [n for n in range(1, 50) if n not in (14, 15, 37)]


def test_device_type_names_are_those_of_linux_drivers() -> None:
    assert [virtio.device_type_name(n) for n in (1, 2, 3, 4, 9, 16, 26, 41)] == [
        "net",
        "blk",
        "console",
        "rng",
        "9p",
        "gpu",
        "fs",
        "gpio",
    ]
    assert [virtio.device_type_name(n) for n in (0, 14, 0x1234, 2**32 - 1)] == [
        "device-0",
        "device-14",
        "device-4660",
        "device-4294967295",
    ]
    names = [virtio.device_type_name(n) for n in DeviceID]
    assert len(set(names)) == len(names)


def test_status_names_come_in_the_order_of_a_driver() -> None:
    assert Status(0).names == []
    assert Status(15).names == ["ACKNOWLEDGE", "DRIVER", "FEATURES_OK", "DRIVER_OK"]
    assert Status(64 | 128 | 1).names == ["ACKNOWLEDGE", "DEVICE_NEEDS_RESET", "FAILED"]
    assert Status(0x31).names == ["ACKNOWLEDGE", "SUSPEND", "bit 5"]
    assert {bit.name: bit.value for bit in Status} == {
        "ACKNOWLEDGE": 1,
        "DRIVER": 2,
        "DRIVER_OK": 4,
        "FEATURES_OK": 8,
        "SUSPEND": 16,
        "DEVICE_NEEDS_RESET": 64,
        "FAILED": 128,
    }
    assert Status(15) == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


# The wall.


def test_it_imports_nothing_of_vbus() -> None:
    script = "import sys, vbus.virtio; print(*sorted(n for n in sys.modules if n.startswith('vbus')))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert [name for name in found if not name.startswith("vbus.virtio")] == ["vbus"]
