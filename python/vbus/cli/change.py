"""The verbs that change a running bus: `plug`, `unplug`, `set`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
from click.shell_completion import CompletionItem

from vbus.cli import buses, output, words
from vbus.errors import Error, NoSuchNameError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
RELEASE_SECONDS = 30.0
"""How long a guest may take to release a device."""


def _complete_type(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from vbus import loading

    return [CompletionItem(name) for name in sorted(loading.names()) if name.startswith(incomplete)]


def _qmp_option(text: str) -> Callable[[F], F]:
    return click.option("--qmp", type=click.Path(path_type=Path), metavar="SOCKET", help=text)


@click.command(
    "plug", short_help="Plug a device into a running bus.", context_settings={"ignore_unknown_options": True}
)
@click.argument("name")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[--OPTION VALUE]...")
@click.option(
    "--type",
    "kind",
    required=True,
    metavar="TYPE",
    shell_complete=_complete_type,
    help="A built-in, an entry point of group vbus.devices, module:Class or file.py:Class.",
)
@click.option("--bus", metavar="NAME", shell_complete=buses.complete_bus, help="Which bus, when several run.")
@click.option("--priority", type=click.IntRange(0, 7), default=4, show_default=True, help="0 is the most urgent.")
@click.option("--uuid", type=click.UUID, help="By default: from the names of bus and device.")
@click.option("--mask", multiple=True, metavar="FEATURE", help="A feature bit that drivers shall not see.")
@_qmp_option("Also add it to the running QEMU behind this QMP socket, through a connector that is made for it.")
@click.option("--qmp-bus", metavar="ID", help="Where in QEMU; by default a free root port.")
@output.json_option
def plug_command(
    name: str,
    options: tuple[str, ...],
    kind: str,
    bus: str | None,
    priority: int,
    uuid: UUID | None,
    mask: tuple[str, ...],
    qmp: Path | None,
    qmp_bus: str | None,
    as_json: bool,
) -> None:
    """Plug a device called NAME, of this type, into a running bus.

    Every other --OPTION is the device's own; paths are relative to the current directory. `vbus run TYPE --help` shows
    the options of a class.
    """
    if name.startswith("-"):
        raise UsageError(f"unexpected {name!r}: write the device's name before its options")
    if qmp_bus is not None and qmp is None:
        raise UsageError("--qmp-bus is a place in QEMU: say which QEMU with --qmp SOCKET")
    client = buses.the_bus(bus)

    def plug() -> dict[str, Any]:
        try:
            return client.plug(
                kind,
                name,
                options=words.parse(options),
                directory=os.getcwd(),
                priority=priority,
                uuid=str(uuid) if uuid is not None else None,
                mask=list(mask),
            )
        except NoSuchNameError:
            raise
        except UsageError as error:
            raise UsageError(words.as_typed(str(error))) from None

    if qmp is None:
        row, where = plug(), ""
    else:
        from vbus.cli import hotplug

        row, place = hotplug.plug(client, name, plug, qmp, qmp_bus)
        where = f", and {place}"
    if as_json:
        output.print_json([row])
    else:
        click.echo(f"{row['name']} is plugged into bus {row['bus']}, at address {row['address']}{where}")


@click.command("unplug", short_help="Take a device off its bus.")
@click.argument("device", shell_complete=buses.complete_device)
@click.option("--surprise", is_flag=True, help="Do not wait for requests under way: they fail.")
@_qmp_option("Also take it out of the running QEMU behind this QMP socket, when its guest releases it.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="How long the guest may take: 30.")
def unplug_command(device: str, surprise: bool, qmp: Path | None, timeout: float | None) -> None:
    """Take DEVICE (or BUS/DEVICE) off its bus; its driver is told."""
    if qmp is not None:
        from vbus.cli import hotplug

        seconds = RELEASE_SECONDS if timeout is None else timeout
        click.echo(hotplug.unplug(device, qmp, surprise=surprise, seconds=seconds))
        return
    if timeout is not None:
        raise UsageError("--timeout is for the guest of a QEMU: say which QEMU with --qmp SOCKET")
    bus, name = buses.the_device(device)
    row = bus.unplug(name, surprise=surprise)
    if not row["ended"]:
        raise Error(f"{name} hung: it is off the bus, but its handler was left behind in the bus's process")
    click.echo(f"{name} is off bus {bus.name}")


@click.command("set", short_help="Set attributes of a device.")
@click.argument("device", shell_complete=buses.complete_device)
@click.argument("values", nargs=-1, required=True, metavar="ATTRIBUTE=VALUE...")
@output.json_option
def set_command(device: str, values: tuple[str, ...], as_json: bool) -> None:
    """Set attributes of DEVICE (or BUS/DEVICE); drivers see the change at once. `vbus show` lists them.

    Also priority=0..7 and priority.QUEUE=0..7, for the next time that a driver begins; and limits, where none takes one
    away: limit.iops, limit.iops_burst, limit.bps, limit.bps_burst, limit.outstanding. A member instead of a device
    (uid:1000, gid:kvm, BUS/uid:alice) has limits too, shared by all of its drivers: also limit.channels, limit.memory.
    """
    wanted: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise UsageError(f"unexpected {value!r}: write ATTRIBUTE=VALUE")
        if name in wanted:
            raise UsageError(f"attribute {name!r} is given twice")
        wanted[name] = text
    member = device.rpartition("/")[2]
    if ":" in member:
        bus, name = buses.the_bus(device.rpartition("/")[0] or None), member
        now = bus.set_member(name, wanted)
    else:
        bus, name = buses.the_device(device)
        now = bus.set(name, wanted)
    if as_json:
        output.print_json([{"bus": bus.name, "device": name, "attributes": now}])
    else:
        output.print_facts(now.items(), indent="")
