"""What travels over the control API: the rows of every listing, and the bodies of requests.

These are the stable keys of every `--json`: an answer that does not fit its model is never sent.
"""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """The base of all: keys that are not named here are a mistake of either side."""

    model_config = ConfigDict(extra="forbid")


class BusInfo(Model):
    """A bus and the process that serves it."""

    name: str
    uuid: UUID
    members: list[str]
    max_sources: int
    pid: int
    version: str


class FeatureNames(Model):
    """The three sets of feature bits, by name."""

    available: list[str] = Field(description="What the device has.")
    exposed: list[str] = Field(description="What drivers are offered: available, less what is masked.")
    negotiated: list[str] = Field(description="What the driver took; empty while there is none.")


class QueueRow(Model):
    """A queue of a device."""

    index: int
    name: str
    size: int
    running: bool
    priority: int


class DeviceRow(Model):
    """A device on a bus: a row of `vbus ls --json`."""

    bus: str
    address: int
    name: str
    uuid: UUID
    type: str
    device_id: int
    status: list[str] = Field(description="Names of the status bits, in the order in which a driver sets them.")
    features: FeatureNames
    connectors: list[str] = Field(description="The connectors that carry the device.")
    connector: str | None = Field(description="The connector whose driver has the device.")
    owner: str | None = Field(description="The driver that has the device.")
    priority: int
    engine: str = Field(description='What serves its queues: "native", or "python" and why.')
    queues: list[QueueRow]
    violations: dict[str, int] = Field(description="How often a driver broke which rule.")


class Signals(Model):
    """What one direction of a queue counted."""

    signalled: int = Field(description="Events signalled.")
    sent: int = Field(description="Events sent: those that were not signalled before already.")
    rung: int = Field(description="Doorbells rung: those that found the other side asleep.")


class StatRow(Model):
    """A queue's counters: a row of `vbus stat --json`."""

    bus: str
    device: str
    queue: str
    index: int
    requests: int
    bytes_read: int = Field(description="Bytes that the device read from the driver.")
    bytes_written: int = Field(description="Bytes that the device wrote for the driver.")
    to_device: Signals
    to_driver: Signals


class ConfigSpace(Model):
    """A device's config space."""

    generation: int
    bytes: str = Field(description="Hexadecimal.")
    fields: dict[str, Any]


class Reason(Model):
    """Why something broke, and when."""

    time: float = Field(description="Seconds since 1970.")
    reason: str


class DeviceDetails(DeviceRow):
    """Everything about one device: the row of `vbus show --json`."""

    class_: str = Field(alias="class", description="module:Class")
    attributes: dict[str, Any]
    limits: dict[str, int] = Field(description="What an operator set: see `vbus set --help`.")
    held: int = Field(description="How often a queue had to wait for a limit.")
    config: ConfigSpace
    reasons: list[Reason] = Field(description="The latest violations, oldest first.")
    stat: list[StatRow]


class PeerRow(Model):
    """A driver's side that is connected."""

    peer: str
    since: float = Field(description="Seconds since 1970.")
    devices: list[str] = Field(description="The devices that it has.")
    channels: list[str] = Field(description="The event channels that it has open.")
    memory: str = Field(description="How its buffers are reached: shared, window or copied.")
    not_shared: str | None = Field(description="Why a guest's memory is not shared that should be.")


class ChannelDriver(Model):
    """A driver's side that has a channel open."""

    driver: str
    sent: int = Field(description="Events that it was sent.")
    received: int = Field(description="Events that it said.")
    missed: int = Field(description="Events that it was not sent because it had not taken those before.")


class ChannelRow(Model):
    """An event channel: a row of `vbus channel ls --json`."""

    bus: str
    name: str
    priority: int
    memory: int = Field(description="Bytes of the region that each driver shares with the bus.")
    owner: str | None = Field(description="The driver that made it and has it alone; null for the bus's own.")
    relay: bool = Field(description="Whether what one driver says goes to the others.")
    drivers: list[ChannelDriver]
    sent: int
    received: int
    missed: int
    waiting: int = Field(description="Events that nobody on the bus's side has taken.")


class OpenChannel(Model):
    """A channel to be opened."""

    name: str
    priority: int = 4
    memory: int | str = 0
    relay: bool = True


class Said(Model):
    """What is to be said on a channel: a text, or bytes in hexadecimal."""

    text: str | None = None
    hex: str | None = None


class Heard(Model):
    """How many drivers took what was said."""

    bus: str
    channel: str
    drivers: int


class ClosedChannel(Model):
    """A channel that was closed."""

    bus: str
    name: str


class MemberRow(Model):
    """A member of a bus that has limits, or is here: a row of `vbus ls --members --json`."""

    bus: str
    member: str
    limits: dict[str, int]
    channels: int = Field(description="Event channels that it has open.")
    memory: int = Field(description="Bytes of its memory that are mapped.")
    held: int = Field(description="How often a queue had to wait for one of its limits.")


class DepartedRow(Model):
    """A driver's side that is gone, and why."""

    peer: str
    reason: str
    time: float = Field(description="Seconds since 1970.")


class ConnectorRow(Model):
    """A connector: a row of `vbus ls --connectors --json`."""

    bus: str
    name: str
    type: str
    address: str = Field(description="What a driver attaches to.")
    devices: list[str] | None = Field(description="The devices that it carries; null for all.")
    peers: list[PeerRow]
    departed: list[DepartedRow] = Field(description="The latest that went, oldest first.")
    connects: bool = Field(description="Whether the other side listens at the address, and the bus goes there.")
    ram: str | None = Field(description="The file with the memory of a guest that shares it.")
    qmp: str | None = Field(description="Where QEMU is asked how that memory lies in the file.")


class Connect(Model):
    """A connector to make."""

    type: str = Field(description="process, stream, vhost-user or ivshmem.")
    name: str | None = Field(None, description="By default: the type, and a number where that is taken.")
    options: dict[str, Any] = Field({}, description="Its keys in a file; text is converted.")
    directory: str | None = Field(None, description="Where relative paths begin; by default where the bus runs.")


class Disconnected(Model):
    """A connector that was taken away."""

    bus: str
    name: str


class Plug(Model):
    """A device to plug."""

    type: str = Field(description="A built-in, an entry point of group vbus.devices, module:Class or file.py:Class.")
    name: str | None = Field(None, description="By default: the type and a number.")
    options: dict[str, Any] = Field({}, description="Keywords of the class; text is converted.")
    directory: str | None = Field(None, description="Where relative paths begin; by default where the bus runs.")
    priority: Annotated[int, Field(ge=0, le=7)] = 4
    uuid: UUID | None = None
    mask: list[str] = Field([], description="Feature bits that drivers shall not see.")


class Unplugged(Model):
    """A device that was unplugged."""

    bus: str
    name: str
    ended: bool = Field(description="False when the device hung and was left behind.")


class Problem(Model):
    """Any answer whose status is 400 or more."""

    error: str = Field(description="One line: what is wrong, and what to do.")
    kind: str = Field(description="no-such-name, usage, too-large, not-allowed, busy or failed")
    did_you_mean: str | None = None
