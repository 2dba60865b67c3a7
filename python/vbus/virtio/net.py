"""The network device (virtio 1.3, section 5.1)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Annotated

from vbus.virtio import config
from vbus.virtio.config import le16, le32, u8
from vbus.virtio.features import features

FEATURES = features(
    CSUM=0,
    GUEST_CSUM=1,
    CTRL_GUEST_OFFLOADS=2,
    MTU=3,
    MAC=5,
    GUEST_TSO4=7,
    GUEST_TSO6=8,
    GUEST_ECN=9,
    GUEST_UFO=10,
    HOST_TSO4=11,
    HOST_TSO6=12,
    HOST_ECN=13,
    HOST_UFO=14,
    MRG_RXBUF=15,
    STATUS=16,
    CTRL_VQ=17,
    CTRL_RX=18,
    CTRL_VLAN=19,
    CTRL_RX_EXTRA=20,
    GUEST_ANNOUNCE=21,
    MQ=22,
    CTRL_MAC_ADDR=23,
    HASH_TUNNEL=51,
    VQ_NOTF_COAL=52,
    NOTF_COAL=53,
    GUEST_USO4=54,
    GUEST_USO6=55,
    HOST_USO=56,
    HASH_REPORT=57,
    GUEST_HDRLEN=59,
    RSS=60,
    RSC_EXT=61,
    STANDBY=62,
    SPEED_DUPLEX=63,
)


class Config(config.Config):
    """Section 5.1.4."""

    mac: Annotated[bytes, 6]
    status: le16
    max_virtqueue_pairs: le16
    mtu: le16
    speed: le32
    duplex: u8
    rss_max_key_size: u8
    rss_max_indirection_table_length: le16
    supported_hash_types: le32


class LinkStatus(IntFlag):
    """The status field."""

    LINK_UP = 1
    ANNOUNCE = 2


HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers: 12 bytes before every frame."""


class ControlClass(IntEnum):
    """Classes of commands on the control queue (section 5.1.6.5)."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6


ACK_OK, ACK_ERR = 0, 1
