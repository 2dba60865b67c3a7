"""The verbs that look: `ls`, `show`, `stat`."""

from __future__ import annotations

import time
from typing import Any

import click

from vbus import rundir
from vbus.cli import buses, output
from vbus.control.client import BusClient
from vbus.errors import Error, UsageError

Row = dict[str, Any]


@click.command("ls", short_help="List devices, or connectors and their drivers.")
@click.argument("bus", required=False, shell_complete=buses.complete_bus)
@click.option(
    "--connectors", is_flag=True, help="List connectors: their addresses, their drivers, and why others went."
)
@click.option("--members", is_flag=True, help="List members that have limits, or are here.")
@output.json_option
def ls_command(bus: str | None, connectors: bool, members: bool, as_json: bool) -> None:
    """List the devices of BUS, or of every bus that runs."""
    if connectors and members:
        raise UsageError("--connectors and --members are two lists: ask for one")
    found = buses.some_buses(bus)
    if not found:
        click.echo(f"no bus runs in {rundir.root()}", err=True)
    ask = BusClient.connectors if connectors else BusClient.members if members else BusClient.devices
    rows = [row for one in found for row in ask(one)]
    if as_json:
        output.print_json(rows)
    elif members:
        output.print_table(
            ("BUS", "MEMBER", "LIMITS", "CHANNELS", "MEMORY", "HELD"),
            ([r["bus"], r["member"], r["limits"], r["channels"], r["memory"], r["held"]] for r in rows),
        )
    elif connectors:
        _print_connectors(rows)
    else:
        output.print_table(
            ("BUS", "ADDRESS", "NAME", "TYPE", "STATUS", "DRIVER", "VIOLATIONS"),
            ([r["bus"], r["address"], r["name"], r["type"], _status(r), r["owner"], r["violations"]] for r in rows),
        )


def _print_connectors(rows: list[Row]) -> None:
    output.print_table(
        ("BUS", "NAME", "TYPE", "ADDRESS", "DEVICES", "DRIVERS"),
        (
            [
                row["bus"],
                row["name"],
                row["type"],
                row["address"],
                "all" if row["devices"] is None else row["devices"],
                len(row["peers"]),
            ]
            for row in rows
        ),
    )
    peers = [(row, peer) for row in rows for peer in row["peers"]]
    if peers:
        click.echo("\ndrivers that are here")
        output.print_table(
            ("BUS", "SINCE", "DRIVER", "MEMORY", "DEVICES", "CHANNELS"),
            (
                [
                    row["bus"],
                    output.when(peer["since"]),
                    peer["peer"],
                    peer["memory"],
                    peer["devices"],
                    peer["channels"],
                ]
                for row, peer in peers
            ),
            indent="  ",
        )
        for _, peer in peers:
            if peer["not_shared"] is not None:
                click.echo(f"  {peer['peer']} does not share its memory: {peer['not_shared']}")
    departed = [(row, peer) for row in rows for peer in row["departed"]]
    if departed:
        click.echo("\ndrivers that went")
        output.print_table(
            ("BUS", "WHEN", "DRIVER", "WHY"),
            ([row["bus"], output.when(peer["time"]), peer["peer"], peer["reason"]] for row, peer in departed),
            indent="  ",
        )


def _status(row: Row) -> str:
    """The status in one word: how far a driver has come."""
    status: list[str] = row["status"]
    for bit in ("FAILED", "DEVICE_NEEDS_RESET"):
        if bit in status:
            return bit
    return status[-1] if status else "free"


@click.command("show", short_help="Show everything about a device.")
@click.argument("device", shell_complete=buses.complete_device)
@output.json_option
def show_command(device: str, as_json: bool) -> None:
    """Show everything about DEVICE (or BUS/DEVICE)."""
    bus, name = buses.the_device(device)
    row = bus.show(name)
    if as_json:
        output.print_json([row])
        return
    features = row["features"]
    click.echo(output.paint(f"{row['name']} on bus {row['bus']}", bold=True))
    output.print_facts(
        [
            ("address", row["address"]),
            ("uuid", row["uuid"]),
            ("type", f"{row['type']} (device id {row['device_id']}, class {row['class']})"),
            ("priority", _priorities(row)),
            ("engine", row["engine"]),
            ("limits", row["limits"]),
            *([("held", f"{row['held']} times by a limit")] if row["held"] else []),
            ("status", " ".join(row["status"]) or "free"),
            ("driver", row["owner"]),
            ("connectors", row["connectors"]),
            ("available", " ".join(features["available"])),
            ("exposed", " ".join(features["exposed"])),
            ("negotiated", " ".join(features["negotiated"])),
        ]
    )
    _section("attributes", list(row["attributes"].items()))
    # Most fields belong to features that this device does not have, and are zero.
    fields = [(key, value) for key, value in row["config"]["fields"].items() if value]
    _section(f"config space, generation {row['config']['generation']}, what is not zero of it", fields)
    click.echo("\nqueues")
    _print_stat(row["stat"], indent="  ")
    _section("violations", list(row["violations"].items()))
    _section("reasons", [(output.when(reason["time"]), reason["reason"]) for reason in row["reasons"]])


def _priorities(row: Row) -> str:
    """The device's priority, and those of queues that differ."""
    own = [f"{q['name']}: {q['priority']}" for q in row["queues"] if q["priority"] != row["priority"]]
    return ", ".join([str(row["priority"]), *own])


def _section(title: str, facts: list[tuple[str, object]]) -> None:
    if facts:
        click.echo(f"\n{title}")
        output.print_facts(facts)


@click.command("stat", short_help="Count requests, bytes, events and doorbells.")
@click.argument("device", required=False, shell_complete=buses.complete_device)
@click.option("--watch", is_flag=True, help="Print again and again, until interrupted.")
@click.option("--interval", type=click.FloatRange(min=0.05), default=1.0, show_default=True, help="Seconds between.")
@output.json_option
def stat_command(device: str | None, watch: bool, interval: float, as_json: bool) -> None:
    """Print what every queue counted, or every queue of DEVICE (or BUS/DEVICE).

    Of each direction: events signalled / events sent / doorbells rung. With --watch and --json, one array a line.
    """
    if not watch:
        rows = _stat(device)
        output.print_json(rows) if as_json else _print_stat(rows)
        return
    try:
        while True:
            rows = _stat(device)
            if as_json:
                output.print_json(rows, indent=None)
            else:
                click.clear() if output.colourful() else None
                _print_stat(rows)
                click.echo()
            time.sleep(interval)
    except KeyboardInterrupt:
        return


def _stat(device: str | None) -> list[Row]:
    if device is not None:
        bus, name = buses.the_device(device)
        return bus.stat(name)
    found = buses.running()
    if not found:
        raise Error(f"no bus runs in {rundir.root()}: start one with vbus run FILE.toml")
    return [row for bus in found for row in bus.stat()]


def _print_stat(rows: list[Row], indent: str = "") -> None:
    output.print_table(
        ("BUS", "DEVICE", "QUEUE", "REQUESTS", "READ", "WRITTEN", "TO DEVICE", "TO DRIVER"),
        (
            [
                row["bus"],
                row["device"],
                f"{row['index']} {row['queue']}",
                row["requests"],
                row["bytes_read"],
                row["bytes_written"],
                _signals(row["to_device"]),
                _signals(row["to_driver"]),
            ]
            for row in rows
        ),
        indent=indent,
    )


def _signals(counts: Row) -> str:
    return f"{counts['signalled']}/{counts['sent']}/{counts['rung']}"
