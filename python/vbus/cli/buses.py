"""Which bus, which device: what somebody typed, looked for among the buses that run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from vbus import rundir
from vbus.errors import Error, NoSuchNameError, UsageError
from vbus.hints import did_you_mean

if TYPE_CHECKING:
    from vbus.control.client import BusClient


def running() -> list[BusClient]:
    """The buses of this user that run."""
    from vbus.control.client import running as find

    return find()


def the_bus(name: str | None) -> BusClient:
    """The bus of this name, or the only one. Error when none runs; UsageError when there is a choice to make."""
    buses = running()
    if name is None:
        if len(buses) == 1:
            return buses[0]
        if buses:
            names = ", ".join(bus.name for bus in buses)
            raise UsageError(f"several buses run ({names}): say which one with --bus NAME")
        raise _none_runs()
    for bus in buses:
        if bus.name == name:
            return bus
    raise _no_bus(name, buses)


def some_buses(name: str | None) -> list[BusClient]:
    """The bus of this name, or all of them."""
    return running() if name is None else [the_bus(name)]


def the_device(text: str) -> tuple[BusClient, str]:
    """The bus and the name of `DEVICE` or `BUS/DEVICE`. UsageError when that is none, or may be several."""
    bus_name, slash, device = text.rpartition("/")
    buses = [the_bus(bus_name)] if slash else running()
    if not buses:
        raise _none_runs()
    there = [(bus, row["name"]) for bus in buses for row in bus.devices()]
    found = [(bus, name) for bus, name in there if name == device]
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(f"{bus.name}/{name}" for bus, name in found)
        raise UsageError(f"device {device!r} is on several buses: write {names}")
    where = f"bus {buses[0].name} has" if len(buses) == 1 else "there is"
    raise NoSuchNameError(f"{where} no device {device!r}: {did_you_mean(device, [name for _, name in there])}")


def the_channel(text: str) -> tuple[BusClient, str]:
    """The bus and the name of `CHANNEL` or `BUS/CHANNEL`. UsageError when that is none, or may be several."""
    bus_name, slash, name = text.rpartition("/")
    buses = [the_bus(bus_name)] if slash else running()
    if not buses:
        raise _none_runs()
    there = [(bus, row["name"]) for bus in buses for row in bus.channels()]
    found = [bus for bus, channel in there if channel == name]
    if len(found) == 1:
        return found[0], name
    if found:
        raise UsageError(
            f"channel {name!r} is on several buses: write " + " or ".join(f"{b.name}/{name}" for b in found)
        )
    where = f"bus {buses[0].name} has" if len(buses) == 1 else "there is"
    raise NoSuchNameError(f"{where} no channel {name!r}: {did_you_mean(name, [channel for _, channel in there])}")


def complete_channel(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of channels."""
    names = {row["name"] for bus in running() for row in bus.channels()}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _none_runs() -> Error:
    return Error(f"no bus runs in {rundir.root()}: start one with vbus run FILE.toml")


def _no_bus(name: str, buses: list[BusClient]) -> Error:
    if not buses:
        return _none_runs()
    return NoSuchNameError(f"no bus {name!r} runs: {did_you_mean(name, [bus.name for bus in buses])}")


def complete_bus(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of buses that run."""
    return [CompletionItem(bus.name) for bus in running() if bus.name.startswith(incomplete)]


def complete_device(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of devices, with their buses where that is needed."""
    there = [(bus.name, row["name"], row["type"]) for bus in running() for row in bus.devices()]
    names = [name for _, name, _ in there]
    return [
        CompletionItem(text, help=kind)
        for bus, name, kind in there
        if (text := f"{bus}/{name}" if names.count(name) > 1 or "/" in incomplete else name).startswith(incomplete)
    ]
