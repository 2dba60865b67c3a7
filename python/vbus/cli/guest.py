"""The verb `guest`: a stock guest with devices of a bus in it, for a command or for a shell.

    what was typed -> buses, served here or running elsewhere -> rows of connectors and devices -> QEMU's options and
    the kernel's modules -> a guest -> a command's outputs and status, or a shell on its console

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
from dataclasses import dataclass
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
) -> int:
    """Boot Debian's own kernel in QEMU, with devices of a bus in it, and run COMMAND there, or a shell.

    The devices: all of the files' buses, or one of a CLASS, which are served for as long as the guest is there; with
    neither, those that running buses have behind a vhost-user connector. The options above come before FILE or CLASS;
    what follows a CLASS is its own. A COMMAND of one word is a line for the guest's shell. Its outputs are printed when
    it is done; the exit status is its own.
    """
    command: Sequence[str] | None = ctx.obj.command
    if command is None and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("there is no terminal for a shell: write a command, vbus guest ... -- COMMAND")
    if command is not None and not command:
        raise UsageError("there is no command behind --: write one, or leave out -- for a shell")
    if what and bus_name is not None:
        raise UsageError("--bus is for buses that run: leave it out beside a file or a class")
    logging.basicConfig(level=logging.WARNING, format="vbus: %(levelname)s: %(name)s: %(message)s")
    wanted = _Wanted(machine, memory, cpus, modules, packages)
    hung: list[str] = []
    with serving.interruptible(), _devices(what, bus_name, machine, hung) as devices:
        status = _boot(wanted, devices, "no" if what else "ms", command)
    serving.leave_behind(hung, status)
    return status


# Which devices.


@contextlib.contextmanager
def _devices(
    what: tuple[str, ...], bus_name: str | None, machine: str, hung: list[str]
) -> Iterator[list[VhostUserDevice]]:
    """The devices that the guest shall have, and that are served inside. Error when there is none."""
    if not what:
        yield _running(bus_name, machine)
        return
    with tempfile.TemporaryDirectory(prefix="vbus-guest-") as folder, _typed(what):
        specs = _specs(what)
        for number, spec in enumerate(specs):
            _carry_all(spec, Path(folder), number)
        with serving.serving(specs, hung) as served:
            found = []
            for bus in served:
                found += _behind(bus.describe_connectors(), bus.show, machine)
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
    from vbus.connectors import VhostUser

    carried = {connector.options["device"] for connector in spec.connectors if connector.cls is VhostUser}
    taken = {connector.name for connector in spec.connectors}
    for at, device in enumerate(spec.devices):
        if device.name not in carried:
            name = f"guest{at}"
            while name in taken:
                name += "x"
            options = {"device": device.name, "socket": folder / f"{number}-{at}.sock"}
            spec.connectors.append(config.ConnectorSpec(name, VhostUser, options))


def _running(bus_name: str | None, machine: str) -> list[VhostUserDevice]:
    """What running buses have for a hypervisor, less what has one already."""
    there = buses.some_buses(bus_name)
    if not there:
        raise Error("no bus runs: start one with vbus run FILE.toml, or name a class, vbus guest file.py:Class")
    found = []
    for bus in there:
        found += _behind(bus.connectors(), bus.show, machine)
    if not found:
        names = ", ".join(bus.name for bus in there)
        raise UsageError(f"bus {names} has no device for a guest: give it a connector of type vhost-user for one")
    return found


def _behind(connectors: list[Row], show: Callable[[str], Row], machine: str) -> list[VhostUserDevice]:
    """The devices behind the vhost-user connectors of a bus. Those that cannot be had are named, and left out."""
    from vbus.errors import NoSuchNameError
    from vbus.vm.options import NoFrontEndError, front_end

    found = []
    for connector in connectors:
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
        found.append(device)
    return found


# The guest.


@dataclass(frozen=True)
class _Wanted:
    """What the guest shall be."""

    machine: str
    memory: int
    cpus: int
    modules: tuple[str, ...]
    packages: tuple[str, ...]


def _boot(wanted: _Wanted, devices: list[VhostUserDevice], reconnect: Reconnect, command: Sequence[str] | None) -> int:
    """Boot a guest with these devices, run the command or a shell in it; the exit status."""
    from vbus.vm import Guest, GuestError
    from vbus.vm.modules import modules_for
    from vbus.vm.options import device_options

    options = [word for device in devices for word in device_options(device, wanted.machine, reconnect)]
    modules = [module for device in devices for module in modules_for(device.device_id)]
    try:
        with contextlib.ExitStack() as stack:
            with _slow("booting Debian's kernel in QEMU"):
                guest = stack.enter_context(
                    Guest(
                        wanted.machine,
                        args=options,
                        modules=[*dict.fromkeys([*modules, *wanted.modules])],
                        packages=wanted.packages,
                        memory=wanted.memory // MIB,
                        cpus=wanted.cpus,
                    )
                )
            if command is None:
                return _shell(guest, ", ".join(device.name for device in devices))
            return _command(guest, command[0] if len(command) == 1 else shlex.join(command))
    except GuestError as error:
        raise Error(str(error).splitlines()[0].rstrip(":")) from error


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
