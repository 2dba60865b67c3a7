"""Buses of this very process, from the files or the class that somebody typed: for the verbs that serve.

Everything is read and checked first, then made, then served; what fails before the last step leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from vbus.cli import words
from vbus.errors import UsageError

if TYPE_CHECKING:
    from vbus.bus import Bus
    from vbus.config import BusSpec

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_file(word: str) -> bool:
    """Whether a word names a bus's file, not a class."""
    return word.endswith(".toml")


def class_spec(
    what: tuple[str, ...],
    bus_name: str | None,
    *,
    name: str | None = None,
    priority: int = 4,
    uuid: UUID | None = None,
    mask: tuple[str, ...] = (),
) -> BusSpec:
    """A bus with one device of a CLASS and its options, and no connector yet. UsageError."""
    from vbus import config
    from vbus.options import OptionErrors

    kind, values = what[0], words.parse(what[1:])
    try:
        device = config.device_spec(kind, values, Path.cwd(), name=name, priority=priority, uuid=uuid, mask=mask)
    except OptionErrors as errors:
        lines = [words.as_typed(f"options.{key}: {text}") for key, text in errors.problems]
        raise UsageError("\n".join(f"{kind}: {line}" for line in lines)) from None
    except UsageError as error:
        raise UsageError(words.as_typed(str(error))) from error
    device.name = name or device.type_name
    spec = config.BusSpec(kind, bus_name or device.type_name, devices=[device])
    config.check_names(spec)
    return spec


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A signal to stop is a KeyboardInterrupt, which takes everything down that is there, or half made."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def serving(specs: list[BusSpec], hung: list[str]) -> Iterator[list[Bus]]:
    """Make every bus and serve it, with its control API; take all of it down again at the end.

    Devices that do not come back then are named in `hung`.
    """
    from vbus import config
    from vbus.control.server import Control
    from vbus.rundir import BusDirectory

    with contextlib.ExitStack() as stack:
        directories = []
        for spec in specs:
            try:
                directories.append(stack.enter_context(BusDirectory(spec.name)))
            except UsageError as error:
                raise spec.error("bus.name", error) from None
        buses: list[Bus] = []
        for spec in specs:
            bus = config.make(spec)
            stack.callback(_stop, bus, hung)
            buses.append(bus)
        for spec, bus, directory in zip(specs, buses, directories, strict=True):
            try:
                bus.start()
            except OSError as error:
                raise spec.error("connector", error) from None
            stack.enter_context(Control(bus, directory))
        yield buses


def leave_behind(hung: list[str], status: int = 0) -> None:
    """Say which devices hung, and end: their threads would keep the interpreter from it. Nothing when none did."""
    for name in hung:
        click.echo(f"vbus: device {name} hung and was left behind", err=True)
    if hung:
        sys.stdout.flush()
        os._exit(status)


def _stop(bus: Bus, hung: list[str]) -> None:
    hung += [f"{bus.name}/{name}" for name in bus.stop()]
