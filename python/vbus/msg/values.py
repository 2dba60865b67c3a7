"""What numbers in our messages mean."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class MemoryKind(IntEnum):
    """How the bus reaches the driver's buffers (HELLO)."""

    SHARED = 0
    """Regions of files that MEMORY_ADD names; or a guest's own memory, whose ranges RAM_PROOF proves."""
    WINDOW = 1
    """One region that both sides see; buffers are in it."""
    COPIED = 2
    """Not at all: bytes travel in REQUEST, DATA and COMPLETE."""


class SignalKind(IntEnum):
    """How one side tells the other to look at a queue (HELLO)."""

    DIRECT = 0
    """A doorbell a queue and direction (DOORBELL)."""
    TUNNELLED = 1
    """Event rings in the shared area (SOURCES)."""
    IN_BAND = 2
    """Messages on the link."""


class HelloFlags(IntFlag):
    """What the driver's side can do (HELLO)."""

    RAM = 1
    """It is a guest that can prove where its memory is (RAM_RANGE)."""


class DeviceState(IntEnum):
    """What EVENT_DEVICE announces."""

    READY = 1
    REMOVED = 2


class Protection(IntFlag):
    """What the bus may do with a region (MEMORY_ADD)."""

    READ = 1
    WRITE = 2


class Direction(IntEnum):
    """Where a DATA message goes: bit 0."""

    TO_DEVICE = 0
    TO_DRIVER = 1


class ChannelFlags(IntFlag):
    """What CHANNEL_OPEN asks for."""

    CREATE = 1
    """Make the channel; EEXIST when there is one of this name."""


class ReservedId(IntEnum):
    """Ids that are kept for messages to come: no page may be touched before GRANT or after REVOKE."""

    GRANT = 0x88
    REVOKE = 0x89
