"""The verb `channel`: list event channels, say something on one, watch what is said.

An operator asks the bus, over its control socket. With `--address` the command is a driver's side instead, for who has
no control socket: in a container, or at the far end of a stream.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from vbus import rundir
from vbus.cli import attaching, buses, output
from vbus.errors import Error, UsageError

Row = dict[str, Any]
Tls = dict[str, Any]
address_option = click.option(
    "--address",
    metavar="ADDRESS",
    help="Be a driver's side there (PATH, unix:PATH, tcp:..., tls:...), not an operator.",
)
WAIT = 10.0
"""Seconds that a driver's side waits until the bus has room for what it says."""


@click.group("channel", short_help="List event channels, say something, watch.")
def channel_command() -> None:
    """Event channels: named places where the bus and its drivers say something to each other."""


@channel_command.command("ls", short_help="List channels.")
@click.argument("bus", required=False, shell_complete=buses.complete_bus)
@address_option
@attaching.tls_options
@output.json_option
def ls(bus: str | None, address: str | None, tls: Tls, as_json: bool) -> None:
    """List the channels of BUS, or of every bus that runs; with --address those that may be opened there."""
    if address is not None:
        if bus is not None:
            raise UsageError("BUS and --address are two ways to say where: write one")
        from vbus.proxy import attach

        with attach(address, **tls) as remote:
            there = [{"name": c.name, "priority": c.priority, "memory": c.memory} for c in remote.channels()]
        if as_json:
            output.print_json(there)
        else:
            output.print_table(("NAME", "PRIORITY", "MEMORY"), (list(row.values()) for row in there))
        return
    found = buses.some_buses(bus)
    if not found:
        click.echo(f"no bus runs in {rundir.root()}", err=True)
    rows = [row for one in found for row in one.channels()]
    if as_json:
        output.print_json(rows)
        return
    output.print_table(
        ("BUS", "NAME", "PRIORITY", "MEMORY", "OWNER", "DRIVERS", "SENT", "RECEIVED", "MISSED"),
        (
            [
                row["bus"],
                row["name"],
                row["priority"],
                row["memory"],
                row["owner"],
                len(row["drivers"]),
                row["sent"],
                row["received"],
                row["missed"],
            ]
            for row in rows
        ),
    )


@channel_command.command("send", short_help="Say something on a channel.")
@click.argument("channel", shell_complete=buses.complete_channel)
@click.argument("data")
@click.option("--hex", "as_hex", is_flag=True, help="DATA is hexadecimal.")
@address_option
@attaching.tls_options
def send(channel: str, data: str, as_hex: bool, address: str | None, tls: Tls) -> None:
    """Say DATA ('-': standard input) on CHANNEL (or BUS/CHANNEL): up to 4096 bytes.

    An operator speaks to every driver that has the channel open; with --address, a driver's side to the bus.
    """
    event = sys.stdin.buffer.read() if data == "-" else data.encode()
    if as_hex:
        try:
            event = bytes.fromhex(event.decode())
        except ValueError:
            raise UsageError("--hex: write an even number of hexadecimal digits") from None
    if address is not None:
        from vbus.proxy import attach

        with attach(address, **tls) as remote, remote.open_channel(channel) as there:
            if not there.wait_writable(WAIT):
                raise Error(f"channel {channel}: nobody takes what is said")
            try:
                there.send(event)
            except ValueError as error:
                raise UsageError(str(error)) from None
        return
    bus, name = buses.the_channel(channel)
    drivers = bus.say(name, event)
    if not drivers:
        raise Error(f"nobody heard it: no driver has channel {name} open, or has taken what was said before")
    click.echo(f"{drivers} driver{'s' if drivers != 1 else ''} heard it")


@channel_command.command("watch", short_help="Print what is said on a channel.")
@click.argument("channel", shell_complete=buses.complete_channel)
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
@address_option
@attaching.tls_options
@click.option("--json", "as_json", is_flag=True, help="Print an object a line.")
def watch(channel: str, count: int | None, address: str | None, tls: Tls, as_json: bool) -> None:
    """Print what is said on CHANNEL (or BUS/CHANNEL), until it is closed or interrupted.

    An operator sees both directions; with --address, a driver's side what it is told.
    """
    rows = _heard(address, tls, channel) if address is not None else _watched(channel)
    try:
        for number, row in enumerate(rows, 1):
            if as_json:
                click.echo(json.dumps(row, ensure_ascii=False))
            else:
                text = row["text"] if row["text"] is not None else f"hex {row['hex']}"
                who = row["driver"] or ("to all" if row["direction"] == "sent" else "")
                if row.get("missed"):
                    click.echo(f"(missed {row['missed']})")
                click.echo(f"{output.when(row['time'])}  {output.plain(who)}: {output.plain(text)}")
            sys.stdout.flush()
            if number == count:
                return
    except KeyboardInterrupt:
        return


def _watched(channel: str) -> Iterator[Row]:
    bus, name = buses.the_channel(channel)
    return bus.watch(name, lambda: _watching(channel))


def _watching(channel: str) -> None:
    """Nothing is missed from now on: whoever waits for that may go on."""
    click.echo(f"watching {channel}", err=True)


def _heard(address: str, tls: Tls, channel: str) -> Iterator[Row]:
    from vbus.proxy import attach

    with attach(address, **tls) as remote, remote.open_channel(channel) as there:
        _watching(channel)
        for event in there:
            text = event.data.decode("utf-8", "backslashreplace")
            yield {
                "time": time.time(),
                "direction": "received",
                "driver": remote.bus_name,
                "text": text if text.isprintable() else None,
                "hex": event.data.hex(),
            }
