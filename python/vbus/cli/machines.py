"""The verbs `qemu-args` and `libvirt-xml`: what a hypervisor is told, so that its guest gets a bus's devices.

a file, or a running bus -> a `VhostUserDevice` for each connector of type vhost-user -> words, or XML
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.shell_completion import CompletionItem

from vbus.cli import buses, output
from vbus.errors import NoSuchNameError, UsageError

if TYPE_CHECKING:
    from vbus.config import BusSpec, DeviceSpec
    from vbus.control.client import BusClient, Row
    from vbus.vm.options import VhostUserDevice

F = TypeVar("F", bound=Callable[..., Any])
MACHINES = ("q35", "microvm", "s390x", "pseries")
ADDRESS = "vhost-user:"
"""What the address of such a connector begins with."""


@dataclass
class Found:
    """What was found on a bus."""

    source: str
    """The file, or the bus."""
    devices: list[VhostUserDevice] = field(default_factory=list)
    functions: dict[str, Path] = field(default_factory=dict)
    """Connectors that show the whole bus as one function, and their sockets."""
    ram: Path | None = None
    """The file that the guest's memory shall be in, where a function shares it."""
    qmp: list[Path] = field(default_factory=list)
    """Where such functions ask QEMU how it lies there."""
    notes: list[str] = field(default_factory=list)
    """What is left out, and why."""

    def add(self, device: VhostUserDevice) -> None:
        """Take a device. UsageError when it has another connector of this kind."""
        if any(other.name == device.name for other in self.devices):
            raise UsageError(f"{self.source}: {device.name} has two connectors of type vhost-user, and one front-end")
        self.devices.append(device)

    def add_function(self, name: str, socket: Path, ram: str | Path | None, qmp: str | Path | None) -> None:
        """Take a function, which may share its guest's memory. UsageError when another shares that of another guest."""
        self.functions[name] = socket.absolute()
        if ram is None or qmp is None:
            return
        place, monitor = Path(ram).absolute(), Path(qmp).absolute()
        if self.ram not in (None, place):
            raise UsageError(
                f"{self.source}: connector {name} has its guest's memory in '{place}', another in '{self.ram}': "
                "these are two guests, write a file for each"
            )
        self.ram = place
        if monitor not in self.qmp:
            self.qmp.append(monitor)


def find(what: str | None) -> Found:
    """What is found of a file, of the running bus of this name, or of the only one. UsageError when that is nothing."""
    found = of_file(Path(what)) if what is not None and what.endswith(".toml") else of_bus(buses.the_bus(what))
    if not found.devices and not found.functions:
        raise UsageError(
            f"{found.source}: no connector of type vhost-user or ivshmem: write [connector.NAME] with "
            'type = "vhost-user" and device = "DEVICE"'
        )
    return found


def of_file(path: Path) -> Found:
    """The devices of a file, with the sockets that `vbus run` will bind. ConfigError."""
    from vbus import config, rundir
    from vbus.connectors import Ivshmem, VhostUser

    spec = config.load(path)
    found = Found(str(path))
    devices = {device.name: device for device in spec.devices}
    for connector in spec.connectors:
        assert connector.name is not None, "in a file, each has one"
        if connector.cls not in (VhostUser, Ivshmem):
            found.notes.append(f"connector {connector.name} of type {connector.cls.type_name} has no options")
            continue
        options = connector.options
        socket = Path(options["socket"]) if "socket" in options else rundir.socket_place(spec.name, connector.name)
        if connector.cls is Ivshmem:
            found.add_function(connector.name, socket, options.get("ram"), options.get("qmp"))
            continue
        found.add(_described(spec, devices[options["device"]], socket.absolute(), options.get("connect", False)))
    return found


def _described(spec: BusSpec, device: DeviceSpec, socket: Path, connect: bool) -> VhostUserDevice:
    """A device that is not on a bus yet: its constructor opens nothing."""
    from vbus.bus import identity
    from vbus.devices import Net
    from vbus.devices.net import station
    from vbus.vm.options import VhostUserDevice

    assert device.name is not None, "in a file, each has one"
    try:
        made = device.make()
    except UsageError as error:
        raise spec.error(f"device.{device.name}", error) from None
    mac = bytes(getattr(made.config, "mac", b""))
    if not any(mac):
        own = isinstance(made, Net)
        mac = station(device.uuid or identity(device.name, spec.uuid or identity(spec.name))) if own else b""
    return VhostUserDevice(
        device.name,
        int(made.device_id),
        socket,
        queues=len(made._queues),
        connect=connect,
        mac=mac.hex(":") or None,
        tag=_tag(getattr(made.config, "tag", None)),
    )


def of_bus(bus: BusClient) -> Found:
    """The devices of a running bus."""
    found = Found(f"bus {bus.name}")
    for row in bus.connectors():
        if row["type"] == "ivshmem":
            found.add_function(row["name"], Path(row["address"].removeprefix("ivshmem:")), row["ram"], row["qmp"])
            continue
        if row["type"] != "vhost-user":
            found.notes.append(f"connector {row['name']} of type {row['type']} has no options")
            continue
        try:
            found.add(of_row(bus.show, row))
        except NoSuchNameError:
            found.notes.append(f"connector {row['name']}: there is no device {row['devices'][0]} now")
    return found


def of_row(show: Callable[[str], Row], connector: Row) -> VhostUserDevice:
    """The device behind a connector, which `show` tells more of. NoSuchNameError when it is not plugged."""
    from vbus.vm.options import VhostUserDevice

    row = show(connector["devices"][0])
    fields = row["config"]["fields"]
    return VhostUserDevice(
        row["name"],
        row["device_id"],
        Path(connector["address"].removeprefix(ADDRESS)).absolute(),
        queues=len(row["queues"]),
        connect=connector["connects"],
        mac=row["attributes"].get("mac"),
        tag=_tag(fields.get("tag")),
    )


def _tag(value: object) -> str | None:
    """The tag of a file system, from its field of config space."""
    if isinstance(value, str):
        return value.rstrip("\0") or None
    return bytes(value).rstrip(b"\0").decode(errors="replace") or None if isinstance(value, bytes | bytearray) else None


# The verbs.


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file"), *buses.complete_bus(ctx, parameter, incomplete)]


def _options(command: F) -> F:
    """What both verbs take."""
    for decorate in (
        click.option(
            "--machine",
            type=click.Choice(MACHINES),
            default="q35",
            show_default=True,
            help="The kind of machine that the guest has.",
        ),
        click.argument("what", required=False, metavar="[FILE.toml | BUS]", shell_complete=_complete),
    ):
        command = decorate(command)
    return command


@click.command("qemu-args", short_help="Print QEMU's options for devices behind vhost-user.")
@_options
@click.option(
    "--memory",
    default="1 GiB",
    show_default=True,
    metavar="SIZE|none",
    help="The guest's memory, which is shared; none: you give QEMU shared memory yourself.",
)
@click.option(
    "--root-ports",
    type=click.IntRange(0, 24),
    default=4,
    show_default=True,
    help="Root ports for devices that are plugged later, on machines that need them.",
)
@click.option(
    "--reconnect",
    type=click.Choice(["ms", "s", "no"]),
    default="ms",
    show_default=True,
    help="How QEMU comes back to a bus that was away: ms since QEMU 9.2, s before.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an array of the words.")
def qemu_args_command(
    what: str | None,
    machine: str,
    memory: str,
    root_ports: int,
    reconnect: Literal["ms", "s", "no"],
    as_json: bool,
) -> None:
    """Print QEMU's options for every device behind a connector of type vhost-user, and for every bus behind ivshmem.

    Of a file, or of a running bus.

    qemu-system-x86_64 $(vbus qemu-args bus.toml) ... starts a guest that has them. A path with spaces is quoted, as
    xargs wants it: vbus qemu-args bus.toml | xargs qemu-system-x86_64 ...
    """
    from vbus.units import parse_size

    size = None if memory == "none" else parse_size(memory, "--memory")
    found = find(what)
    from vbus.shmem.ivshmem import VECTORS
    from vbus.vm.options import device_options, function_options, machine_options, monitor_options

    words = machine_options(machine, size, root_ports, found.ram)
    for monitor in found.qmp:
        words += monitor_options(monitor)
    if found.ram is not None and size is None:
        found.notes.append(f"your memory-backend-file with share=on must have mem-path={found.ram}")
    words += _each(found, lambda device: device_options(device, machine, reconnect))
    for name, socket in found.functions.items():
        words += function_options(name, socket, VECTORS, machine)
    for note in found.notes:
        click.echo(f"# {note}", err=True)
    if as_json:
        output.print_json(words)
        return
    if any(_quoted(word) != word for word in words):
        click.echo("# a path is quoted: $(...) would break it, use xargs; see vbus qemu-args --help", err=True)
    for flag, value in _groups(words):
        click.echo(f"{flag} {_quoted(value)}")


def _groups(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each option with its value."""
    yield from zip(words[::2], words[1::2], strict=True)


def _quoted(word: str) -> str:
    """A word as a shell, and xargs, understand it. UsageError when there is no line that says it."""
    if not word.isprintable():
        raise UsageError(f"{word!r} is no line: choose another path, or take --json")
    return shlex.quote(word)


def _each(found: Found, options: Callable[[VhostUserDevice], list[str]]) -> list[str]:
    """The options of all devices. UsageError with a line for each that cannot be had."""
    words: list[str] = []
    lines: list[str] = []
    for device in found.devices:
        try:
            words += options(device)
        except UsageError as error:
            lines.append(f"{found.source}: {error}")
    if lines:
        raise UsageError("\n".join(lines))
    return words


@click.command("libvirt-xml", short_help="Print the parts of a libvirt domain for devices behind vhost-user.")
@_options
@click.option("--no-reconnect", is_flag=True, help="Do not come back to a bus that was away.")
def libvirt_xml_command(what: str | None, machine: str, no_reconnect: bool) -> None:
    """Print what a libvirt domain needs for every device behind a connector of type vhost-user.

    Of a file, or of a running bus. Put the parts into your own domain (virsh edit): memoryBacking, devices, and for
    classes that libvirt has no element for, qemu:commandline with its namespace.
    """
    found = find(what)
    found.notes += [f"connector {name} of type ivshmem: see vbus qemu-args" for name in found.functions]
    if not found.devices:
        raise UsageError(f"{found.source}: no connector of type vhost-user: libvirt has no word for others")
    from vbus.vm import libvirt
    from vbus.vm.options import device_options

    _each(found, lambda device: device_options(device, machine))
    for note in found.notes:
        click.echo(f"# {note}", err=True)
    click.echo(libvirt.text(libvirt.domain(found.devices, machine, reconnect=not no_reconnect)))
