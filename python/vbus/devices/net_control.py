"""What a driver says on a network device's control queue (virtio 1.4, section 5.1.6.5), and the filter that it sets.

A command is a class, a command and its data. It is read once, into memory of our own; anything that is not exactly as
the specification lays it out, or that needs a feature that was not negotiated, is refused and changes nothing.
"""

from __future__ import annotations

import struct
from abc import abstractmethod
from typing import Protocol

from vbus.virtio.net import (
    CONTROL,
    FEATURES,
    AnnounceCommand,
    ControlClass,
    GuestOffloadsCommand,
    MacCommand,
    MqCommand,
    RxCommand,
    VlanCommand,
)

LONGEST_COMMAND = 64 << 10
"""Bytes of the longest command: tables of some ten thousand addresses."""
BROADCAST = b"\xff" * 6
VLAN_TYPE = b"\x81\x00"
VLAN_IDS = 4096
GUEST_OFFLOADS = ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6", "GUEST_ECN", "GUEST_UFO", "GUEST_USO4", "GUEST_USO6")

_LE16 = struct.Struct("<H")
_LE32 = struct.Struct("<I")
_LE64 = struct.Struct("<Q")


class Filter:
    """Which frames a driver wants. It begins with all of them, until the driver says what it wants."""

    def __init__(self, mac: bytes, *, vlans: bool = False) -> None:
        """`mac`: the device's address. `vlans`: only tagged frames that are asked for."""
        self.mac = mac
        self.modes: set[RxCommand] = set()
        self.unicast: frozenset[bytes] = frozenset()
        self.multicast: frozenset[bytes] = frozenset()
        self.vlans: set[int] | None = set() if vlans else None
        self.told = False
        """Whether the driver has said anything about addresses."""

    @property
    def promiscuous(self) -> bool:
        """Whether frames to any address pass."""
        return not self.told or RxCommand.PROMISC in self.modes

    @property
    def is_open(self) -> bool:
        """Whether everything passes."""
        return RxCommand.PROMISC in self.modes or (not self.told and self.vlans is None)

    def passes(self, frame: memoryview) -> bool:
        """Whether a frame, which begins with its destination, is one that the driver wants."""
        if RxCommand.PROMISC in self.modes:
            return True
        if self.vlans is not None and frame[12:14] == VLAN_TYPE:
            tag = int.from_bytes(frame[14:16], "big") % VLAN_IDS
            if tag not in self.vlans:
                return False
        if not self.told:
            return True
        to = bytes(frame[:6])
        if to == BROADCAST:
            return RxCommand.NOBCAST not in self.modes
        if to[0] & 1:
            wanted = RxCommand.ALLMULTI in self.modes or to in self.multicast
            return wanted and RxCommand.NOMULTI not in self.modes
        wanted = RxCommand.ALLUNI in self.modes or to == self.mac or to in self.unicast
        return wanted and RxCommand.NOUNI not in self.modes


class Commanded(Protocol):
    """What commands change: a network device."""

    filter: Filter
    queue_pairs: int

    @abstractmethod
    def has(self, feature: str) -> bool:
        """Whether the driver took this feature."""

    @abstractmethod
    def use_mac(self, mac: bytes) -> None:
        """The driver changes the device's address."""

    @abstractmethod
    def use_pairs(self, pairs: int) -> None:
        """The driver uses the first `pairs`."""

    @abstractmethod
    def use_offloads(self, names: tuple[str, ...]) -> None:
        """The driver takes these GUEST_* offloads, of those that it negotiated, and no others."""

    @abstractmethod
    def announced(self) -> None:
        """The driver has announced its addresses."""


def obey(net: Commanded, command: bytes) -> bool:
    """Do what a command asks; False, and nothing is changed, when it cannot be."""
    if len(command) < CONTROL.size:
        return False
    group, what = CONTROL.unpack_from(command)
    data = command[CONTROL.size :]
    match group:
        case ControlClass.RX:
            return _receive_mode(net, what, data)
        case ControlClass.MAC if what == MacCommand.TABLE_SET and net.has("CTRL_RX"):
            return _mac_table(net.filter, data)
        case ControlClass.MAC if what == MacCommand.ADDR_SET and net.has("CTRL_MAC_ADDR"):
            if not is_station(data):
                return False
            net.use_mac(data)
            return True
        case ControlClass.VLAN if net.has("CTRL_VLAN"):
            return _vlan(net.filter, what, data)
        case ControlClass.ANNOUNCE if what == AnnounceCommand.ACK and net.has("GUEST_ANNOUNCE") and not data:
            net.announced()
            return True
        case ControlClass.MQ if what == MqCommand.VQ_PAIRS_SET and net.has("MQ"):
            pairs = _number(_LE16, data)
            if pairs is None or not 1 <= pairs <= net.queue_pairs:
                return False
            net.use_pairs(pairs)
            return True
        case ControlClass.GUEST_OFFLOADS if what == GuestOffloadsCommand.SET and net.has("CTRL_GUEST_OFFLOADS"):
            return _offloads(net, data)
    return False


def is_station(mac: bytes) -> bool:
    """Whether an address may be a device's: 6 bytes, of one station, not all zero."""
    return len(mac) == 6 and not mac[0] & 1 and any(mac)


def _number(layout: struct.Struct, data: bytes) -> int | None:
    return int(layout.unpack(data)[0]) if len(data) == layout.size else None


def _receive_mode(net: Commanded, what: int, data: bytes) -> bool:
    extra = what not in (RxCommand.PROMISC, RxCommand.ALLMULTI)
    if data not in (b"\0", b"\1") or what not in set(RxCommand):
        return False
    if not net.has("CTRL_RX_EXTRA" if extra else "CTRL_RX"):
        return False
    net.filter.told = True
    if data == b"\1":
        net.filter.modes.add(RxCommand(what))
    else:
        net.filter.modes.discard(RxCommand(what))
    return True


def _mac_table(filter: Filter, data: bytes) -> bool:
    tables = []
    for _ in range(2):
        if len(data) < _LE32.size:
            return False
        (entries,) = _LE32.unpack_from(data)
        end = _LE32.size + 6 * entries
        if len(data) < end:
            return False
        tables.append(frozenset(data[start : start + 6] for start in range(_LE32.size, end, 6)))
        data = data[end:]
    unicast, multicast = tables
    if data or any(mac[0] & 1 for mac in unicast) or not all(mac[0] & 1 for mac in multicast):
        return False
    filter.unicast, filter.multicast = unicast, multicast
    filter.told = True
    return True


def _vlan(filter: Filter, what: int, data: bytes) -> bool:
    tag = _number(_LE16, data)
    if tag is None or tag >= VLAN_IDS or filter.vlans is None:
        return False
    match what:
        case VlanCommand.ADD:
            filter.vlans.add(tag)
        case VlanCommand.DEL:
            filter.vlans.discard(tag)
        case _:
            return False
    return True


def _offloads(net: Commanded, data: bytes) -> bool:
    bits = _number(_LE64, data)
    negotiated = tuple(name for name in GUEST_OFFLOADS if net.has(name))
    if bits is None or bits & ~FEATURES.mask(negotiated):
        return False
    net.use_offloads(tuple(name for name in negotiated if bits & FEATURES.mask([name])))
    return True
