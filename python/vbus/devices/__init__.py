"""The built-in device models, one file each. They know the bus and never a connector."""

from vbus.devices.blk import Blk
from vbus.devices.console import Console
from vbus.devices.input import Input
from vbus.devices.net import Net
from vbus.devices.rng import Rng

__all__ = ["Blk", "Console", "Input", "Net", "Rng"]
