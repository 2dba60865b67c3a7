"""The demonstration: a bus in one process, drivers in another, on real input; `vbus demo` runs it."""

from vbus.demo.story import main

__all__ = ["main"]
