"""The verb `run`: serve the buses of files, or a bus with one device, until SIGINT or SIGTERM."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click
from click.shell_completion import CompletionItem

from vbus.cli import serving, words
from vbus.cli.notify import notify
from vbus.errors import UsageError

if TYPE_CHECKING:
    from vbus.bus import Bus
    from vbus.config import BusSpec, ConnectorSpec
    from vbus.options import Options


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="file")]


@click.command(
    "run",
    short_help="Serve buses: those of files, or one with a single device.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument(
    "what",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="FILE.toml... | CLASS [--OPTION VALUE]...",
    shell_complete=_complete,
)
@click.option("--name", metavar="NAME", help="The device's name; by default that of its class.")
@click.option("--bus", "bus_name", metavar="NAME", help="The name of its bus; by default that of the class.")
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    metavar="ADDRESS",
    help="Where drivers attach: PATH, unix:PATH or tcp:HOST:PORT. May be given several times.",
)
@click.option("--priority", type=click.IntRange(0, 7), default=4, show_default=True, help="0 is the most urgent.")
@click.option("--uuid", type=click.UUID, help="By default: from the names of bus and device.")
@click.option("--mask", multiple=True, metavar="FEATURE", help="A feature bit that drivers shall not see.")
@click.option("-v", "--verbose", is_flag=True, help="Also say who comes and goes.")
@click.option("-h", "--help", "wants_help", is_flag=True, help="Show this; after a CLASS, also its own options.")
@click.pass_context
def run_command(
    ctx: click.Context,
    what: tuple[str, ...],
    name: str | None,
    bus_name: str | None,
    addresses: tuple[str, ...],
    priority: int,
    uuid: UUID | None,
    mask: tuple[str, ...],
    verbose: bool,
    wants_help: bool,
) -> None:
    """Serve the buses that files describe, or a bus with one device of a CLASS, until SIGINT or SIGTERM.

    A CLASS is "module:Class", "file.py:Class", or the name of a built-in; every other --OPTION is its own. All options
    but --verbose are for a CLASS only: a file says everything itself.
    """
    if wants_help:
        click.echo(ctx.get_help())
        if what and not serving.is_file(what[0]):
            click.echo(f"\n{_class_help(what[0])}")
        return
    if not what:
        raise UsageError("nothing to run: write vbus run FILE.toml, or vbus run CLASS; see vbus run --help")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="vbus: %(levelname)s: %(name)s: %(message)s"
    )
    try:
        with serving.interruptible():
            if serving.is_file(what[0]):
                _check_files(ctx, what)
                from vbus import config

                specs, of_class = config.load_all(map(Path, what)), False
            else:
                specs, of_class = [_spec(what, name, bus_name, addresses, priority, uuid, mask)], True
            try:
                _serve(specs, of_class)
            except UsageError as error:
                if not of_class:
                    raise
                raise UsageError(words.as_typed(str(error))) from error
    except KeyboardInterrupt:
        # Stopped before it served: that is no failure either.
        return


def _check_files(ctx: click.Context, what: tuple[str, ...]) -> None:
    for word in what:
        if word.startswith("--"):
            raise UsageError(f"no such option {word.partition('=')[0]} for a file: write it into the file as a key")
        if not serving.is_file(word):
            raise UsageError(f"unexpected {word!r}: write files only, each ending in .toml, or one CLASS only")
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if source is click.core.ParameterSource.COMMANDLINE and parameter.name not in ("what", "verbose"):
            raise UsageError(f"{parameter.opts[0]} is not for a file: write it into the file as a key")


# A bus with one device.


def _spec(
    what: tuple[str, ...],
    name: str | None,
    bus_name: str | None,
    addresses: tuple[str, ...],
    priority: int,
    uuid: UUID | None,
    mask: tuple[str, ...],
) -> BusSpec:
    from vbus import config

    spec = serving.class_spec(what, bus_name, name=name, priority=priority, uuid=uuid, mask=mask)
    here = Path.cwd()
    spec.connectors = [_connector(address, number, here) for number, address in enumerate(addresses)]
    if not spec.connectors:
        spec.connectors = [config.default_connector()]
    return spec


def _connector(text: str, number: int, here: Path) -> ConnectorSpec:
    """The connector that listens at an address."""
    from vbus import address, config
    from vbus.connectors import CONNECTORS

    where = address.parse(text)
    name = config.DEFAULT_CONNECTOR + (str(number) if number else "")
    if where.kind == "vhost-user":
        raise UsageError(f"--listen {text}: a vhost-user connector has one device; write both into a file")
    if where.kind == "process":
        return config.ConnectorSpec(name, CONNECTORS["process"], {"socket": here / where.path})
    listen = f"unix:{here / where.path}" if where.kind == "unix" else str(where)
    return config.ConnectorSpec(name, CONNECTORS["stream"], {"listen": listen})


def _class_help(kind: str) -> str:
    """A class's own words, and its options."""
    import inspect

    from vbus import loading
    from vbus.options import Options

    cls = loading.find(kind, Path.cwd())
    options = Options.of(cls)
    formatter = click.HelpFormatter()
    with formatter.section(f"Options of {kind}"):
        if options.options:
            formatter.write_dl(list(_option_help(options)))
        else:
            formatter.write_text("none")
    return f"{inspect.cleandoc(cls.__doc__ or cls.__name__)}\n\n{formatter.getvalue()}".rstrip()


def _option_help(options: Options) -> Iterator[tuple[str, str]]:
    for option in options.options.values():
        if option.required:
            text = "required"
        elif option.default is None or option.default == "":
            text = ""
        else:
            default = str(option.default).lower() if isinstance(option.default, bool) else option.default
            text = f"default: {default}"
        yield f"--{option.name.replace('_', '-')} {option.metavar}", text


# Serving.


def _serve(specs: list[BusSpec], of_class: bool) -> None:
    """Make every bus, serve, wait, and take all of it down again."""
    stopped = threading.Event()
    hung: list[str] = []
    with serving.serving(specs, hung) as buses:
        for number in serving.STOP_SIGNALS:
            signal.signal(number, lambda *_: stopped.set())
        _announce(buses, of_class)
        notify("READY=1\nSTATUS=serving " + ", ".join(bus.name for bus in buses))
        stopped.wait()
        notify("STOPPING=1")
        # Somebody who is told that it is stopping and asks again means it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    serving.leave_behind(hung)


def _announce(buses: list[Bus], of_class: bool) -> None:
    """Say where drivers attach."""
    for bus in buses:
        for connector in bus.connectors.values():
            click.echo(f"bus {bus.name}: {connector.address}")
    if of_class:
        bus = buses[0]
        slot = bus.slots()[0]
        address = next(iter(bus.connectors.values())).address.removeprefix("process:")
        click.echo(f"try: vbus driver {shlex.quote(_short(address))} {slot.name}{_use(int(slot.device.device_id))}")
    sys.stdout.flush()


def _short(address: str) -> str:
    """A path as somebody in this directory would type it."""
    path = Path(address)
    if path.is_absolute() and path.parent == Path.cwd():
        return f"./{path.name}"
    return address


def _use(device_id: int) -> str:
    from vbus.virtio import DeviceID

    uses: dict[Any, str] = {DeviceID.ENTROPY: " --read 16 | xxd", DeviceID.BLOCK: " --read 512 | xxd"}
    return uses.get(device_id, "")
