"""The split virtqueue (virtio 1.3, section 2.7): flags, sizes and alignments, for readers, tools and tests.

The rings themselves run once per descriptor and are native.
"""

from __future__ import annotations

from enum import IntFlag

MAX_SIZE = 32768
DESCRIPTOR_SIZE = 16
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
    return DESCRIPTOR_SIZE * size


def avail_bytes(size: int) -> int:
    """Bytes of the available ring: flags, idx, entries, used_event."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of the used ring: flags, idx, entries of 8 bytes, avail_event."""
    return 6 + 8 * size
