"""Feature bits (virtio 1.3, sections 2.2 and 6): named bits of a device class and of the transport.

A feature word is a Python int of up to 128 bits; on the wire it travels in 32-bit blocks, the lowest first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

MAX_BITS = 128
BLOCK_BITS = 32
BLOCK_MASK = (1 << BLOCK_BITS) - 1

RING_INDIRECT_DESC = 28
RING_EVENT_IDX = 29
VERSION_1 = 32
ACCESS_PLATFORM = 33
RING_PACKED = 34
IN_ORDER = 35
ORDER_PLATFORM = 36
SR_IOV = 37
NOTIFICATION_DATA = 38
NOTIF_CONFIG_DATA = 39
RING_RESET = 40
ADMIN_VQ = 41
SUSPEND = 43


class FeatureSet:
    """Names for feature bits; `|` joins two sets. ValueError for a bit out of range, or one with two names."""

    def __init__(self, bits: Mapping[str, int]) -> None:
        self._bits = dict(bits)
        self._names: dict[int, str] = {}
        for name, bit in self._bits.items():
            if not 0 <= bit < MAX_BITS:
                raise ValueError(f"feature {name} has bit {bit}: 0 to {MAX_BITS - 1}")
            if bit in self._names:
                raise ValueError(f"features {self._names[bit]} and {name} have the same bit {bit}")
            self._names[bit] = name

    def __repr__(self) -> str:
        return f"FeatureSet({self._bits})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureSet) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(frozenset(self._bits.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __or__(self, other: FeatureSet) -> FeatureSet:
        for name in self._bits.keys() & other._bits.keys():
            if self._bits[name] != other._bits[name]:
                raise ValueError(f"feature {name} has bit {self._bits[name]} here and {other._bits[name]} there")
        return FeatureSet(self._bits | other._bits)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in the order of their definition."""
        return tuple(self._bits)

    def bit(self, name: str) -> int:
        """The number of a named bit. ValueError, which names the nearest, when there is none."""
        try:
            return self._bits[name]
        except KeyError:
            # People also write names as the specification does: VIRTIO_NET_F_CSUM.
            near = difflib.get_close_matches(name.upper().rpartition("_F_")[2], self._bits, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._bits) or 'none'}"
            raise ValueError(f"no feature {name!r}: {hint}") from None

    def mask(self, names: Iterable[str]) -> int:
        """The word with these bits set. ValueError for an unknown name."""
        word = 0
        for name in names:
            word |= 1 << self.bit(name)
        return word

    def names_of(self, word: int) -> list[str]:
        """The names of the bits that are set, by bit; those without a name as `bit N`."""
        return [self._names.get(bit, f"bit {bit}") for bit in range(word.bit_length()) if word >> bit & 1]


def features(**bits: int) -> FeatureSet:
    """Name the feature bits of a device class: `features(DIMMABLE=0, COLOUR=1)`. ValueError for a bit out of range."""
    return FeatureSet(bits)


TRANSPORT = FeatureSet(
    {
        "RING_INDIRECT_DESC": RING_INDIRECT_DESC,
        "RING_EVENT_IDX": RING_EVENT_IDX,
        "VERSION_1": VERSION_1,
        "ACCESS_PLATFORM": ACCESS_PLATFORM,
        "RING_PACKED": RING_PACKED,
        "IN_ORDER": IN_ORDER,
        "ORDER_PLATFORM": ORDER_PLATFORM,
        "SR_IOV": SR_IOV,
        "NOTIFICATION_DATA": NOTIFICATION_DATA,
        "NOTIF_CONFIG_DATA": NOTIF_CONFIG_DATA,
        "RING_RESET": RING_RESET,
        "ADMIN_VQ": ADMIN_VQ,
        "SUSPEND": SUSPEND,
    }
)
"""The bits that every device class has in common."""


class RingFeatures(TypedDict):
    """What a ring heeds of the bits that were negotiated (section 6)."""

    packed: bool
    event_idx: bool
    indirect: bool
    in_order: bool


def of_ring(word: int) -> RingFeatures:
    """What of a word a ring heeds: keywords of both its sides."""
    return {
        "packed": bool(word >> RING_PACKED & 1),
        "event_idx": bool(word >> RING_EVENT_IDX & 1),
        "indirect": bool(word >> RING_INDIRECT_DESC & 1),
        "in_order": bool(word >> IN_ORDER & 1),
    }


def to_blocks(word: int, count: int | None = None) -> list[int]:
    """A word as 32-bit blocks: at least two (VERSION_1 is in the second), or exactly `count`, the rest left out."""
    wanted = count if count is not None else max(2, -(-word.bit_length() // BLOCK_BITS))
    return [word >> BLOCK_BITS * n & BLOCK_MASK for n in range(wanted)]


def from_blocks(blocks: Sequence[int]) -> int:
    """The word of 32-bit blocks, the lowest first."""
    return sum((block & BLOCK_MASK) << BLOCK_BITS * n for n, block in enumerate(blocks))
