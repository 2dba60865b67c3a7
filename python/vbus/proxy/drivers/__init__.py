"""Drivers for the built-in device classes, one file each, for programs that use a device without a kernel's driver."""

from vbus.proxy.drivers.blk import Blk
from vbus.proxy.drivers.console import Console
from vbus.proxy.drivers.net import Net, OffloadNet
from vbus.proxy.drivers.rng import Rng

__all__ = ["Blk", "Console", "Net", "OffloadNet", "Rng"]
