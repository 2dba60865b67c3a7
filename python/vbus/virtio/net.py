"""The network device (virtio 1.4, section 5.1)."""

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
    DEVICE_STATS=50,
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
    RSS_CONTEXT=64,
    GUEST_UDP_TUNNEL_GSO=65,
    GUEST_UDP_TUNNEL_GSO_CSUM=66,
    HOST_UDP_TUNNEL_GSO=67,
    HOST_UDP_TUNNEL_GSO_CSUM=68,
    OUT_NET_HEADER=69,
    IPSEC=70,
)


class Config(config.Config):
    """Section 5.1.4: 28 bytes."""

    mac: Annotated[bytes, 6]
    status: le16
    max_virtqueue_pairs: le16
    mtu: le16
    speed: le32
    """Mbit/s; SPEED_UNKNOWN."""
    duplex: u8
    rss_max_key_size: u8
    rss_max_indirection_table_length: le16
    supported_hash_types: le32
    supported_tunnel_types: le32


SPEED_UNKNOWN = 0xFFFF_FFFF
DUPLEX_HALF, DUPLEX_FULL, DUPLEX_UNKNOWN = 0, 1, 0xFF
MIN_MTU = 68
MAX_QUEUE_PAIRS = 0x8000


class LinkStatus(IntFlag):
    """The status field."""

    LINK_UP = 1
    ANNOUNCE = 2


HEADER = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers: 12 bytes before every frame (5.1.6).

num_buffers is there whether or not MRG_RXBUF was negotiated (without: 1 received, 0 transmitted).
"""
HASH_HEADER = struct.Struct("<IHH")
"""hash_value, hash_report, 0: 8 bytes more behind it with HASH_REPORT."""


class HeaderFlags(IntFlag):
    """The flags of a frame's header."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4
    UDP_TUNNEL_CSUM = 8
    SECURITY = 16
    SECURITY_ERR = 32
    SECURITY_SA_SOFT_EXPIRY_WARN = 64


class Gso(IntEnum):
    """The kind of segmentation that a header's gso_type asks for, without the bits of GsoFlags."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5


class GsoFlags(IntFlag):
    """What a header's gso_type says beside the kind."""

    UDP_TUNNEL_IPV4 = 0x20
    UDP_TUNNEL_IPV6 = 0x40
    ECN = 0x80


def receiveq(pair: int) -> int:
    """The receive queue of a pair, from 0."""
    return 2 * pair


def transmitq(pair: int) -> int:
    """The transmit queue of a pair, from 0."""
    return 2 * pair + 1


def controlq(max_pairs: int) -> int:
    """The control queue, behind the queues of all pairs: with MQ or RSS those of max_virtqueue_pairs, else of one."""
    return 2 * max_pairs


CONTROL = struct.Struct("<BB")
"""class, command: what a buffer of the control queue begins with (5.1.6.5). Its last byte is ACK_OK or ACK_ERR."""
ACK_OK, ACK_ERR = 0, 1


class ControlClass(IntEnum):
    """Classes of commands on the control queue."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6
    HASH_TUNNEL = 7
    STATS = 8
    RSS_CONTEXT = 9


class RxCommand(IntEnum):
    """ControlClass.RX: one byte follows, on or off."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


class MacCommand(IntEnum):
    """ControlClass.MAC."""

    TABLE_SET = 0
    """Two tables follow, unicast and multicast: le32 entries, then 6 bytes each."""
    ADDR_SET = 1
    """6 bytes follow."""


class VlanCommand(IntEnum):
    """ControlClass.VLAN: the le16 VLAN id follows."""

    ADD = 0
    DEL = 1


class AnnounceCommand(IntEnum):
    """ControlClass.ANNOUNCE."""

    ACK = 0


class MqCommand(IntEnum):
    """ControlClass.MQ."""

    VQ_PAIRS_SET = 0
    """The le16 number of pairs follows."""
    RSS_CONFIG = 1
    HASH_CONFIG = 2


class GuestOffloadsCommand(IntEnum):
    """ControlClass.GUEST_OFFLOADS: an le64 follows, with the bits of the GUEST_* features.

    Those of GUEST_UDP_TUNNEL_GSO and GUEST_UDP_TUNNEL_GSO_CSUM are 46 and 47 there: their features have none that fit.
    """

    SET = 0
