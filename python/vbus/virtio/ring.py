"""The split virtqueue (virtio 1.3, section 2.7): flags, sizes and alignments, for readers, tools and tests.

A queue of a size is three pieces of driver memory: the descriptor table, the available ring (the driver writes it) and
the used ring (the device writes it). The rings themselves run once per descriptor and are native.
"""

from __future__ import annotations

import struct
from enum import IntFlag

MAX_SIZE = 32768
"""Descriptors of a queue, at most; a size is a power of two."""

DESCRIPTOR = struct.Struct("<QIHH")
"""addr, len, flags, next: an entry of the descriptor table (2.7.5)."""
DESCRIPTOR_SIZE = DESCRIPTOR.size
RING_HEADER = struct.Struct("<HH")
"""flags, idx: what the available and the used ring begin with."""
AVAIL_ENTRY = struct.Struct("<H")
"""The head of a chain (2.7.6). Behind the last entry is used_event."""
USED_ENTRY = struct.Struct("<II")
"""id, len: the head of a chain and the bytes that were written (2.7.8). Behind the last entry is avail_event."""
EVENT = struct.Struct("<H")
"""used_event, avail_event (2.7.10, EVENT_IDX)."""

DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1


class DescriptorFlags(IntFlag):
    """Flags of a descriptor."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


def desc_bytes(size: int) -> int:
    """Bytes of the descriptor table of a queue of `size`."""
    return DESCRIPTOR.size * size


def avail_bytes(size: int) -> int:
    """Bytes of the available ring: flags, idx, entries, used_event."""
    return RING_HEADER.size + AVAIL_ENTRY.size * size + EVENT.size


def used_bytes(size: int) -> int:
    """Bytes of the used ring: flags, idx, entries, avail_event."""
    return RING_HEADER.size + USED_ENTRY.size * size + EVENT.size
