"""The block device (virtio 1.3, section 5.2)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Annotated

from vbus.virtio import config
from vbus.virtio.config import le16, le32, le64, u8
from vbus.virtio.features import features

SECTOR = 512
"""Bytes of a sector: the unit of capacity and of a request's place, whatever the block size."""

FEATURES = features(
    SIZE_MAX=1,
    SEG_MAX=2,
    GEOMETRY=4,
    RO=5,
    BLK_SIZE=6,
    FLUSH=9,
    TOPOLOGY=10,
    CONFIG_WCE=11,
    MQ=12,
    DISCARD=13,
    WRITE_ZEROES=14,
    LIFETIME=15,
    SECURE_ERASE=16,
    ZONED=17,
)


class Config(config.Config):
    """Section 5.2.4, up to the fields of SECURE_ERASE: 72 bytes. What ZONED would add behind them is not there."""

    capacity: le64
    size_max: le32
    seg_max: le32
    cylinders: le16
    heads: u8
    sectors: u8
    blk_size: le32
    physical_block_exp: u8
    alignment_offset: u8
    min_io_size: le16
    opt_io_size: le32
    writeback: u8
    unused0: u8
    num_queues: le16
    max_discard_sectors: le32
    max_discard_seg: le32
    discard_sector_alignment: le32
    max_write_zeroes_sectors: le32
    max_write_zeroes_seg: le32
    write_zeroes_may_unmap: u8
    unused1: Annotated[bytes, 3]
    max_secure_erase_sectors: le32
    max_secure_erase_seg: le32
    secure_erase_sector_alignment: le32


class RequestType(IntEnum):
    """What a request asks for (section 5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class RequestStatus(IntEnum):
    """The last byte of every request."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


HEADER = struct.Struct("<IIQ")
"""type, reserved, sector: 16 bytes before the data."""
RANGE = struct.Struct("<QII")
"""sector, num_sectors, flags: a segment of DISCARD, WRITE_ZEROES and SECURE_ERASE."""
LIFETIME = struct.Struct("<HHH")
"""pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b: what GET_LIFETIME gives."""


class RangeFlags(IntFlag):
    """Flags of a segment; all others must be 0."""

    UNMAP = 1
    """WRITE_ZEROES may deallocate. Must be 0 for DISCARD."""


ID_BYTES = 20
"""Bytes of the serial that GET_ID gives, padded with zeros."""
