"""The verb `driver`: be the driver of a device behind an address, from the command line."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from vbus.cli import attaching, output
from vbus.cli.terminal import LEAVE, raw_terminal
from vbus.errors import DriverError, Error, UsageError

if TYPE_CHECKING:
    from vbus.proxy import Remote, RemoteDevice
    from vbus.proxy.drivers import Blk, Console, Rng
    from vbus.proxy.drivers.net_tap import Joined

PIECE = 8 << 20
"""Bytes that are in memory at a time."""


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, or a text such as "64 MiB"."""
    from vbus.units import parse_size

    try:
        return None if value is None else parse_size(value)
    except UsageError as error:
        raise click.BadParameter(str(error).removeprefix("size: "), ctx, parameter) from None


@click.command("driver", short_help="Drive a device behind an address.")
@click.argument("address")
@click.argument("device", required=False)
@click.option("--read", "length", callback=_size, metavar="LENGTH", help="Write LENGTH bytes of the device to stdout.")
@click.option("--offset", callback=_size, metavar="OFFSET", help="Where on the disk --read and --write begin.")
@click.option("--write", "source", metavar="FILE", help="Write FILE ('-': stdin) onto the disk.")
@click.option("--copy-to", "target", metavar="FILE", help="Copy the whole disk into FILE ('-': stdout).")
@click.option("--quit", "quit_after", type=float, metavar="SECONDS", help="Leave a console so long after stdin ended.")
@click.option("--tap", metavar="NAME", help="Make the device an interface of this network namespace.")
@click.option("--address", "own", metavar="ADDRESS/PREFIX", help="The interface's address, such as 10.0.0.2/24.")
@click.option("--gateway", metavar="ADDRESS", help="The interface's default route.")
@click.option("--device-id", metavar="TYPE", help="For vhost-user: the class of the device there, or its number.")
@click.option("--timeout", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Seconds for an answer.")
@attaching.tls_options
@output.json_option
def driver_command(
    address: str,
    device: str | None,
    length: int | None,
    offset: int | None,
    source: str | None,
    target: str | None,
    quit_after: float | None,
    tap: str | None,
    own: str | None,
    gateway: str | None,
    device_id: str | None,
    timeout: float,
    tls: dict[str, Any],
    as_json: bool,
) -> None:
    """Attach to the bus at ADDRESS (PATH, process:PATH, unix:PATH, tcp:HOST:PORT, tls:HOST:PORT) and drive DEVICE.

    At vhost-user:PATH is one device, of any back-end, which does not say of which class it is: write --device-id TYPE,
    or TYPE (blk, net, rng, ...) for DEVICE, unless the other options tell.

    Without DEVICE: list what the bus offers. An entropy device (rng): --read. A disk (blk): --read and --write with
    --offset, --copy-to; else what it is like. A console: joined with stdin and stdout, until the device is gone or
    --read LENGTH bytes came; a terminal leaves with Control-]. A network device (net): --tap, with --address and
    --gateway, until it is interrupted; else what it is like. Sizes may be written as "64 MiB".
    """
    wants = {"--read": length, "--write": source, "--copy-to": target, "--offset": offset, "--quit": quit_after}
    wants |= {"--tap": tap, "--address": own, "--gateway": gateway}
    given = [name for name, value in wants.items() if value is not None]
    if device is None and given:
        raise UsageError(f"{given[0]} needs a device: vbus driver ADDRESS lists them")
    options = {"timeout": timeout, **tls, **_front_end(address, device, device_id, given)}
    if device is None:
        _list(address, options, as_json)
        return
    from vbus.proxy import attach, drivers
    from vbus.virtio import DeviceID

    with attach(address, **options) as remote:
        found = remote.device(device)
        match found.device_id:
            case DeviceID.ENTROPY if length is not None:
                _only(given, found, "--read")
                _read_rng(remote.driver(device, drivers.Rng), length)
            case DeviceID.BLOCK if given:
                _only(given, found, "--read", "--write", "--copy-to", "--offset")
                _use_disk(remote.driver(device, drivers.Blk), length, offset, source, target)
            case DeviceID.NETWORK if given:
                _only(given, found, "--tap", "--address", "--gateway")
                if tap is None:
                    raise UsageError(f"{given[0]} is for an interface: name it with --tap NAME")
                _be_interface(remote, device, tap, own, gateway, as_json)
            case DeviceID.CONSOLE if not as_json:
                _only(given, found, "--read", "--quit")
                _join(remote, remote.driver(device, drivers.Console), length, quit_after)
            case _:
                _only(given, found)
                _print_facts(remote, found, as_json)


OF_CLASS = {
    "blk": ("--write", "--copy-to", "--offset"),
    "net": ("--tap", "--address", "--gateway"),
    "console": ("--quit",),
}
"""Options that only one class of device has."""


def _front_end(address: str, device: str | None, device_id: str | None, given: list[str]) -> dict[str, Any]:
    """What `attach` must be told of a device behind vhost-user, whose protocol does not tell its class. UsageError."""
    if not address.startswith("vhost-user:"):
        if device_id is not None:
            raise UsageError("--device-id is for vhost-user:PATH: the devices of a bus say what they are")
        return {}
    from vbus.hints import did_you_mean
    from vbus.virtio import DeviceID, device_type_name

    classes = {device_type_name(known): int(known) for known in DeviceID}
    if device_id is not None and device_id.isdecimal():
        return {"device_id": int(device_id), "name": device}
    kind = device_id if device_id is not None else device if device in classes else None
    if kind is None:
        kind = next((name for name, options in OF_CLASS.items() if any(option in given for option in options)), None)
    if kind is None:
        raise UsageError(f"{address}: say of which class the device there is, as --device-id blk")
    if kind not in classes:
        raise UsageError(f"--device-id {kind!r}: {did_you_mean(kind, classes)}, or write its number")
    return {"device_id": classes[kind], "name": device}


def _only(given: list[str], device: RemoteDevice, *allowed: str) -> None:
    """UsageError for an option that says nothing to this class of device."""
    for name in given:
        if name not in allowed:
            from vbus.virtio import device_type_name

            kind = device_type_name(device.device_id)
            raise UsageError(f"{name} is not for {device.name}, a device of type {kind}: see vbus driver --help")


# What there is.


def _row(remote: Remote, device: RemoteDevice) -> dict[str, Any]:
    from vbus.virtio import DeviceID, FeatureSet, blk, console, device_type_name, features, net

    classes: dict[int, FeatureSet] = {
        DeviceID.BLOCK: blk.FEATURES,
        DeviceID.CONSOLE: console.FEATURES,
        DeviceID.NETWORK: net.FEATURES,
    }
    names = classes.get(device.device_id, features.features()) | features.TRANSPORT
    return {
        "bus": remote.bus_name,
        "address": device.address,
        "name": device.name,
        "uuid": str(device.uuid),
        "type": device_type_name(device.device_id),
        "device_id": int(device.device_id),
        "status": device.status.names,
        "offered": names.names_of(device.offered),
    }


def _list(address: str, options: dict[str, Any], as_json: bool) -> None:
    from vbus.proxy import attach

    rows: list[dict[str, Any]] = []
    with attach(address, **options) as remote:
        for device in remote:
            try:
                rows.append(_row(remote, device))
            except DriverError as error:
                if error.errno != errno.ENODEV:  # it may go while it is looked at
                    raise
    if as_json:
        output.print_json(rows)
    else:
        output.print_table(
            ("ADDRESS", "NAME", "TYPE", "STATUS", "UUID"),
            ([r["address"], r["name"], r["type"], (r["status"] or ["free"])[-1], r["uuid"]] for r in rows),
        )


def _print_facts(remote: Remote, device: RemoteDevice, as_json: bool) -> None:
    row = _row(remote, device)
    row["config"] = device.config().hex()
    row["facts"] = _facts(remote, device)
    if as_json:
        output.print_json([row])
        return
    click.echo(output.paint(f"{output.plain(row['name'])} on bus {output.plain(row['bus'])}", bold=True))
    facts: dict[str, Any] = row.pop("facts")
    rest = ((name, value) for name, value in row.items() if name not in ("bus", "name"))
    output.print_facts([*rest, *facts.items()])


def _facts(remote: Remote, device: RemoteDevice) -> dict[str, Any]:
    """What a device is like. A disk's driver is asked; a disk that somebody else has still shows its config."""
    from vbus.proxy import drivers
    from vbus.virtio import DeviceID, console

    if device.device_id == DeviceID.NETWORK:
        return _net_config(device)

    if device.device_id == DeviceID.CONSOLE:
        config = console.Config.from_bytes(device.config())
        return {"columns": config.cols, "rows": config.rows}
    if device.device_id != DeviceID.BLOCK:
        return {}
    try:
        disk = remote.driver(device.name, drivers.Blk)
    except DriverError as error:
        if error.errno != errno.EBUSY:
            raise
        return {**_disk_config(device), "serial": None, "in_use": True}
    try:
        return {
            "size": disk.size,
            "block_size": disk.block_size,
            "read_only": disk.read_only,
            "serial": disk.serial,
            "in_use": False,
        }
    finally:
        disk.close()


def _disk_config(device: RemoteDevice) -> dict[str, Any]:
    from vbus.virtio import blk

    config = blk.Config.from_bytes(device.config())
    offered = blk.FEATURES.names_of(device.offered)
    return {
        "size": config.capacity * blk.SECTOR,
        "block_size": config.blk_size if "BLK_SIZE" in offered else blk.SECTOR,
        "read_only": "RO" in offered,
    }


def _net_config(device: RemoteDevice) -> dict[str, Any]:
    """What it says without a driver, so that a driver that has it is not disturbed; null for what it does not say."""
    from vbus.virtio import net

    config = net.Config.from_bytes(device.config())
    offered = net.FEATURES.names_of(device.offered)
    return {
        "mac": config.mac.hex(":") if "MAC" in offered else None,
        "mtu": config.mtu if "MTU" in offered else None,
        "link": bool(config.status & net.LinkStatus.LINK_UP) if "STATUS" in offered else None,
        "queue_pairs": config.max_virtqueue_pairs if "MQ" in offered else 1,
    }


# Entropy and disks.


def _read_rng(rng: Rng, length: int) -> None:
    _to_stdout(rng.read(min(PIECE, length - at)) for at in range(0, length, PIECE))


def _use_disk(disk: Blk, length: int | None, offset: int | None, source: str | None, target: str | None) -> None:
    if sum(value is not None for value in (length, source, target)) != 1 or (target and offset is not None):
        raise UsageError("write one of --read LENGTH [--offset N], --write FILE [--offset N], --copy-to FILE")
    name = disk.device.name
    at = offset or 0
    if length is not None:
        if at + length > disk.size:
            raise Error(f"{name} ends at {disk.size}: there are no {length} bytes at {at}")
        _to_stdout(_pieces(disk, at, at + length))
    elif source is not None:
        with _source(source) as file:
            end = at
            while data := file.read(PIECE):
                disk.pwrite(data, end)
                end += len(data)
        disk.flush()
        click.echo(f"{end - at} bytes written to {name} at {at}")
    elif target == "-":
        _to_stdout(_pieces(disk, 0, disk.size))
    elif target is not None:
        with Path(target).open("wb") as file:
            for data in _pieces(disk, 0, disk.size):
                file.write(data)
        click.echo(f"{disk.size} bytes of {name} copied to {target}")


def _pieces(disk: Blk, start: int, end: int) -> Iterator[bytes]:
    for at in range(start, end, PIECE):
        size = min(PIECE, end - at)
        data = disk.pread(size, at)
        if len(data) != size:
            raise Error(f"{disk.device.name} became shorter while it was read: it ends at {disk.size}")
        yield data


def _source(name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    return contextlib.nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb")


def _to_stdout(pieces: Iterator[bytes]) -> None:
    for data in pieces:
        sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


# Consoles.


def _join(remote: Remote, console: Console, length: int | None, quit_after: float | None) -> None:
    """Copy stdin to the console and the console to stdout, until one of the reasons to end."""
    ended, ending = os.pipe()
    failure: list[BaseException] = []

    def receive() -> None:
        left = length
        try:
            while left is None or left > 0:
                data = console.read(-1 if left is None else left)
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
                left = None if left is None else left - len(data)
        except BaseException as error:
            failure.append(error)
        finally:
            os.close(ending)

    receiver = threading.Thread(target=receive, name="console", daemon=True)
    with raw_terminal() as terminal:
        if terminal:
            click.echo(f"joined with {console.device.name}; Control-] leaves\r", err=True)
        receiver.start()
        try:
            _send(console, ended, terminal, quit_after)
            left_first = not _readable(ended)
        finally:
            remote.close()
            receiver.join(5)
            os.close(ended)
    if failure and not left_first:
        raise failure[0]


def _send(console: Console, ended: int, terminal: bool, quit_after: float | None) -> None:
    stdin = sys.stdin.fileno()
    open_ends = [ended, stdin]
    deadline: float | None = None
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = select.select(open_ends, [], [], wait)[0]
        if ended in ready or (not ready and wait is not None):
            return
        data = os.read(stdin, 65536)
        if terminal and LEAVE in data:
            console.write(data[: data.index(LEAVE)])
            return
        if data:
            console.write(data)
        else:
            open_ends.remove(stdin)
            deadline = None if quit_after is None else time.monotonic() + quit_after


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# Network devices.


def _be_interface(
    remote: Remote, device: str, name: str, address: str | None, gateway: str | None, as_json: bool
) -> None:
    """Join the device with a tap until a signal (which is how this ends well), or until either is gone."""
    from vbus.proxy.drivers import OffloadNet
    from vbus.proxy.drivers.net_tap import Joined, check_gateway, parse_address

    own = None if address is None else parse_address(address)
    if gateway is not None:
        gateway = check_gateway(gateway, own)
    stop = (signal.SIGTERM, signal.SIGINT)
    # Until there is something to end: what is half made is taken down again.
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in stop}
    try:
        joined = Joined(remote.driver(device, OffloadNet), name, address=own, gateway=gateway)
        try:
            for number in stop:
                signal.signal(number, lambda *_: joined.end())
            _say_ready(joined, as_json)
            joined.wait()
        finally:
            joined.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say_ready(joined: Joined, as_json: bool) -> None:
    driver = joined.driver
    row = {
        "name": driver.device.name,
        "tap": joined.name,
        "mac": driver.mac.hex(":"),
        "mtu": joined.mtu,
        "link": driver.link,
        "address": None if joined.address is None else str(joined.address),
    }
    if as_json:
        output.print_json([row], indent=None)
    else:
        facts = [f"{row['tap']} is up", str(row["mac"]), f"mtu {row['mtu']}"]
        facts += [str(row["address"])] if row["address"] else []
        facts += [] if row["link"] else ["no carrier"]
        click.echo(f"{output.plain(row['name'])}: {', '.join(facts)}")
    sys.stdout.flush()
