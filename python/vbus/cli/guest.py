"""The verb `guest`: a stock guest with devices of a bus in it, for a command or for a shell.

    what was typed -> buses, served here or running elsewhere -> rows of connectors and devices -> what the guest
    reaches -> QEMU's options and the kernel's modules -> a guest -> a command's outputs and status, or a shell

The guest is Debian's own kernel with busybox, made by `vbus.vm`; it is gone when the command is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from vbus.cli import buses, serving, words
from vbus.cli.machines import of_row
from vbus.cli.terminal import LEAVE, raw_terminal
from vbus.errors import Error, UsageError

if TYPE_CHECKING:
    from vbus.config import BusSpec
    from vbus.vm import Guest
    from vbus.vm.options import Reconnect, VhostUserDevice

MACHINES = ("q35", "microvm", "s390x", "pseries")
SLOW_SECONDS = 2.0
"""What takes longer says what it does."""
WEEK = 7 * 86400
"""Seconds that a command may take: until somebody interrupts it."""
SETTLE_SECONDS = 10
"""How long a guest is waited for until it has found its devices."""
LEAST_MEMORY = 128 << 20
MIB = 1 << 20
Row = dict[str, Any]


class _WithCommand(click.Command):
    """What follows `--` is the guest's; what follows a CLASS is the class's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with the part behind `--` put aside."""
        if "--" in args:
            at = args.index("--")
            ctx.obj.command = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


def _memory(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """Bytes; at least so many as a kernel starts with."""
    from vbus.units import format_size, parse_size

    try:
        size = parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error).removeprefix("size: "), ctx, parameter) from None
    if size < LEAST_MEMORY:
        raise click.BadParameter(f"{value}: a guest needs {format_size(LEAST_MEMORY)}", ctx, parameter)
    return size


@click.command(
    "guest",
    cls=_WithCommand,
    short_help="Boot a stock guest with devices of a bus in it.",
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTION]...",
)
@click.argument(
    "what",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="[FILE.toml... | CLASS [--OPTION VALUE]...] [-- COMMAND]",
    shell_complete=_complete,
)
@click.option("--bus", "bus_name", metavar="NAME", shell_complete=buses.complete_bus, help="Of the buses that run.")
@click.option("--machine", type=click.Choice(MACHINES), default="q35", show_default=True)
@click.option("--memory", metavar="SIZE", default="256 MiB", show_default=True, callback=_memory)
@click.option("--cpus", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option("--module", "modules", multiple=True, metavar="NAME", help="Another module of the kernel.")
@click.option("--function", is_flag=True, help="All of each bus behind one function, with vbus's modules.")
@click.option("--package", "packages", multiple=True, metavar="NAME", help="A Debian package that shall be there.")
@click.pass_context
def guest_command(
    ctx: click.Context,
    what: tuple[str, ...],
    bus_name: str | None,
    machine: str,
    memory: int,
    cpus: int,
    modules: tuple[str, ...],
    packages: tuple[str, ...],
    function: bool,
) -> int:
    """Boot Debian's own kernel in QEMU, with devices of a bus in it, and run COMMAND there, or a shell.

    The devices: all of the files' buses, or one of a CLASS, which are served for as long as the guest is there; with
    neither, those that running buses have behind a vhost-user or an ivshmem connector. With --function, and behind an
    ivshmem connector, the guest sees a bus as one function of its machine, and has vbus's modules, which are built from
    a checkout. The options above come before FILE or CLASS; what follows a CLASS is its own. A COMMAND of one word is a
    line for the guest's shell. Its outputs are printed when it is done; the exit status is its own.
    """
    command: Sequence[str] | None = ctx.obj.command
    if command is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("there is no terminal for a shell: write a command, vbus guest ... -- COMMAND")
    if command is not None and not command:
        raise UsageError("there is no command behind --: write one, or leave out -- for a shell")
    if what and bus_name is not None:
        raise UsageError("--bus is for buses that run: leave it out beside a file or a class")
    if function and not what:
        raise UsageError("--function is for a file or a class: give a bus that runs a connector of type ivshmem")
    logging.basicConfig(level=logging.WARNING, format="vbus: %(levelname)s: %(name)s: %(message)s")
    wanted = _Wanted(machine, memory, cpus, modules, packages)
    hung: list[str] = []
    with serving.interruptible(), _reached(what, bus_name, machine, function, hung) as reached:
        status = _boot(wanted, reached, "no" if what else "ms", command)
    serving.leave_behind(hung, status)
    return status


# Which devices.


@dataclass(frozen=True)
class _Function:
    """A function with a whole bus behind it."""

    name: str
    socket: Path
    devices: tuple[str, ...]
    """Their names."""
    classes: tuple[int, ...]
    """The ids of their classes."""


@dataclass
class _Reached:
    """What the guest shall have."""

    devices: list[VhostUserDevice] = field(default_factory=list)
    functions: list[_Function] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.devices or self.functions)

    @property
    def names(self) -> list[str]:
        """The devices' names."""
        return [device.name for device in self.devices] + [name for one in self.functions for name in one.devices]


@contextlib.contextmanager
def _reached(
    what: tuple[str, ...], bus_name: str | None, machine: str, function: bool, hung: list[str]
) -> Iterator[_Reached]:
    """What the guest shall have, and what is served inside. Error when there is nothing."""
    if not what:
        yield _running(bus_name, machine)
        return
    with tempfile.TemporaryDirectory(prefix="vbus-guest-") as folder, _typed(what):
        specs = _specs(what)
        for number, spec in enumerate(specs):
            if function:
                _carry_together(spec, Path(folder), number)
            else:
                _carry_all(spec, Path(folder), number)
        with serving.serving(specs, hung) as served:
            found = _Reached()
            for bus in served:
                names = [row["name"] for row in bus.describe()]
                _behind(bus.describe_connectors(), names, bus.show, machine, found)
            if not found:
                raise UsageError(f"{what[0]} has no device that a guest could have")
            yield found


@contextlib.contextmanager
def _typed(what: tuple[str, ...]) -> Iterator[None]:
    """Errors about a class are in the words of somebody who typed options."""
    try:
        yield
    except UsageError as error:
        if serving.is_file(what[0]):
            raise
        raise UsageError(words.as_typed(str(error))) from error


def _specs(what: tuple[str, ...]) -> list[BusSpec]:
    if not serving.is_file(what[0]):
        return [serving.class_spec(what, f"guest-{os.getpid()}")]
    for word in what:
        if word.startswith("-"):
            raise UsageError(f"{word.partition('=')[0]} stands behind a file: write options of the guest before it")
        if not serving.is_file(word):
            raise UsageError(f"unexpected {word!r}: write files, each ending in .toml, or one CLASS; COMMAND behind --")
    from vbus import config

    return config.load_all(map(Path, what))


def _carry_all(spec: BusSpec, folder: Path, number: int) -> None:
    """Give every device that no hypervisor would reach a connector of its own."""
    from vbus import config
    from vbus.connectors import Ivshmem, VhostUser

    carried = {connector.options["device"] for connector in spec.connectors if connector.cls is VhostUser}
    for connector in spec.connectors:
        if connector.cls is Ivshmem:
            carried.update(connector.options.get("devices") or [device.name for device in spec.devices])
    for at, device in enumerate(spec.devices):
        if device.name not in carried:
            options = {"device": device.name, "socket": folder / f"{number}-{at}.sock"}
            spec.connectors.append(config.ConnectorSpec(_free(spec, f"guest{at}"), VhostUser, options))


def _carry_together(spec: BusSpec, folder: Path, number: int) -> None:
    """Give the bus a function with all of its devices, in place of whatever a hypervisor would reach."""
    from vbus import config
    from vbus.connectors import Ivshmem, VhostUser

    spec.connectors = [connector for connector in spec.connectors if connector.cls not in (Ivshmem, VhostUser)]
    options = {"socket": folder / f"{number}.sock", "keep": False}
    spec.connectors.append(config.ConnectorSpec(_free(spec, f"guest{number}"), Ivshmem, options))


def _free(spec: BusSpec, name: str) -> str:
    """A name for a connector that no other has."""
    taken = {connector.name for connector in spec.connectors}
    while name in taken:
        name += "x"
    return name


def _running(bus_name: str | None, machine: str) -> _Reached:
    """What running buses have for a hypervisor, less what has one already."""
    there = buses.some_buses(bus_name)
    if not there:
        raise Error("no bus runs: start one with vbus run FILE.toml, or name a class, vbus guest file.py:Class")
    found = _Reached()
    for bus in there:
        _behind(bus.connectors(), [row["name"] for row in bus.devices()], bus.show, machine, found)
    if not found:
        names = ", ".join(bus.name for bus in there)
        raise UsageError(f"bus {names} has no device for a guest: give it a connector of type vhost-user for one")
    return found


def _behind(connectors: list[Row], names: list[str], show: Callable[[str], Row], machine: str, found: _Reached) -> None:
    """Add what is behind the connectors of a bus that has these devices. What cannot be had is named, and left out."""
    from vbus.errors import NoSuchNameError
    from vbus.vm.options import NoFrontEndError, front_end

    for connector in connectors:
        if connector["type"] == "ivshmem":
            devices = tuple(name for name in names if connector["devices"] is None or name in connector["devices"])
            classes = tuple(show(name)["device_id"] for name in devices)
            socket = Path(connector["address"].removeprefix("ivshmem:")).absolute()
            found.functions.append(_Function(connector["name"], socket, devices, classes))
            continue
        if connector["type"] != "vhost-user":
            continue
        if connector["peers"]:
            click.echo(f"vbus: left out: {connector['name']}: {connector['peers'][0]['peer']} has it", err=True)
            continue
        try:
            device = of_row(show, connector)
            front_end(device, machine)
        except NoSuchNameError:
            continue
        except NoFrontEndError as error:
            click.echo(f"vbus: left out: {error}", err=True)
            continue
        found.devices.append(device)


# The guest.


@dataclass(frozen=True)
class _Wanted:
    """What the guest shall be."""

    machine: str
    memory: int
    cpus: int
    modules: tuple[str, ...]
    packages: tuple[str, ...]


def _boot(wanted: _Wanted, reached: _Reached, reconnect: Reconnect, command: Sequence[str] | None) -> int:
    """Boot a guest with these devices, run the command or a shell in it; the exit status."""
    from vbus.shmem.ivshmem import VECTORS
    from vbus.vm import Guest, GuestError
    from vbus.vm.build import BuildError, FetchError, bus_modules
    from vbus.vm.modules import modules_for
    from vbus.vm.options import device_options, function_options

    options = [word for device in reached.devices for word in device_options(device, wanted.machine, reconnect)]
    classes = [device.device_id for device in reached.devices]
    own: list[Path] = []
    for function in reached.functions:
        options += function_options(function.name, function.socket, VECTORS, wanted.machine)
        classes += function.classes
    modules: list[str | Path] = [module for number in classes for module in modules_for(number)]
    if reached.functions:
        try:
            with _slow("building the guest's modules"):
                own = bus_modules()
        except (BuildError, FetchError) as error:
            raise Error(str(error).rstrip()) from error
    try:
        with contextlib.ExitStack() as stack:
            with _slow("booting Debian's kernel in QEMU"):
                guest = stack.enter_context(
                    Guest(
                        wanted.machine,
                        args=options,
                        modules=[*dict.fromkeys([*modules, *wanted.modules]), *own],
                        packages=wanted.packages,
                        memory=wanted.memory // MIB,
                        cpus=wanted.cpus,
                    )
                )
            if reached.functions:
                _settle(guest, reached.functions)
            if command is None:
                return _shell(guest, ", ".join(reached.names))
            return _command(guest, command[0] if len(command) == 1 else shlex.join(command))
    except GuestError as error:
        raise Error(str(error).splitlines()[0].rstrip(":")) from error


def _settle(guest: Guest, functions: Sequence[_Function]) -> None:
    """Wait until the guest has found what is behind its functions, and drives what it has drivers for; for a while."""
    from vbus.vm import GuestError
    from vbus.vm.modules import modules_for

    lines = []
    for function in functions:
        for name, number in zip(function.devices, function.classes, strict=True):
            driven = "/virtio*/driver" if modules_for(number) else ""
            lines.append(f"test -e $(dirname $(grep -lx {name} /sys/bus/vbus/devices/*/name)){driven}")
    # What is not there by then, a user sees best in the guest.
    with contextlib.suppress(GuestError):
        guest.wait_for(" && ".join(lines) or "true", seconds=SETTLE_SECONDS)


@contextlib.contextmanager
def _slow(what: str) -> Iterator[None]:
    """Say what goes on when it takes its time."""
    timer = threading.Timer(SLOW_SECONDS, lambda: click.echo(f"vbus: {what}", err=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _command(guest: Guest, line: str) -> int:
    """Run a line of the shell; each of its outputs is printed as ours."""
    answer = guest.ask(f"{{ {line}\n}} 2>/tmp/.errors", seconds=WEEK)
    errors = guest.ask("cat /tmp/.errors").data
    sys.stdout.buffer.write(answer.data)
    sys.stdout.buffer.flush()
    sys.stderr.buffer.write(errors)
    sys.stderr.buffer.flush()
    return answer.status


def _shell(guest: Guest, devices: str) -> int:
    """Join the terminal with a shell on the guest's console, until it is left; its status."""
    from vbus.vm import GuestError

    left: list[int] = []
    ended, ending = os.pipe()

    def run() -> None:
        # A guest that is shut down from within is no failure.
        with contextlib.suppress(GuestError):
            left.append(guest.shell(_show, size=shutil.get_terminal_size()))
        os.close(ending)

    click.echo(f"a shell in the guest, which has {devices}; exit, or Control-], leaves", err=True)
    with raw_terminal():
        shell = threading.Thread(target=run, name="shell", daemon=True)
        shell.start()
        try:
            while True:
                ready = select.select([ended, sys.stdin.fileno()], [], [])[0]
                if ended in ready:
                    return left[0] if left else 0
                keys = os.read(sys.stdin.fileno(), 1 << 12)
                guest.type_keys(keys.partition(LEAVE)[0])
                if LEAVE in keys or not keys:
                    return 0
        finally:
            guest.close()
            shell.join(5)
            os.close(ended)


def _show(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
