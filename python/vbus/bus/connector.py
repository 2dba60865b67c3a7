"""What a bus knows of a connector: that it can be started, told of devices that come and go, and described.

A connector brings one environment's drivers to the bus. It sees slots, never devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from vbus.bus.bus import Bus
    from vbus.bus.slot import Slot


class Connector(ABC):
    """One environment's way to a bus."""

    type_name: ClassVar[str]
    name: str = ""
    bus: Bus | None = None

    def __init__(self, *, devices: Iterable[str] | None = None) -> None:
        self.device_names = None if devices is None else list(devices)

    def carries(self, slot: Slot) -> bool:
        """Whether drivers behind this connector see the slot: all do unless it was given names."""
        return self.device_names is None or slot.name in self.device_names

    @property
    @abstractmethod
    def address(self) -> str:
        """What a driver attaches to; known when the connector is bound."""

    @abstractmethod
    def bind(self, bus: Bus, name: str) -> None:
        """Take a name on this bus and reserve what is needed (a socket), accepting nobody yet. UsageError."""

    @abstractmethod
    def start(self) -> None:
        """Accept drivers from now on."""

    @abstractmethod
    def stop(self) -> None:
        """Part from every driver, and give back everything; also when it was bound but never started."""

    @abstractmethod
    def plugged(self, slot: Slot) -> None:
        """A device arrived."""

    @abstractmethod
    def unplugged(self, slot: Slot) -> None:
        """A device is gone."""

    @abstractmethod
    def channels_changed(self) -> None:
        """Event channels came or went."""

    def holds(self, number: int) -> bool:
        """Whether any driver behind this connector still holds this number of a device that is gone."""
        return False

    def describe(self) -> dict[str, Any]:
        """The connector's row in a listing, less bus, name and type."""
        row = {"address": self.address, "devices": self.device_names, "peers": [], "departed": [], "connects": False}
        return row | {"ram": None, "qmp": None}
