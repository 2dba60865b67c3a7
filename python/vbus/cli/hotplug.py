"""Devices that are plugged into a bus and a running QEMU at once, and taken out of both: `plug --qmp`, `unplug --qmp`.

It is this command that speaks to both, so that a bus knows no hypervisor. What cannot be finished is taken back, step
by step, last first; only when the guest does not release a device is that said, and left to whoever asked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vbus.cli import buses, machines
from vbus.control.client import BusClient, Row
from vbus.errors import Error, NoSuchNameError, UsageError
from vbus.virtio import DeviceID
from vbus.vm.hotplug import GoneError, HotplugError, Monitor, NotReleasedError
from vbus.vm.options import VhostUserDevice, machine_kind

ABORTS_EARLY = {DeviceID.ENTROPY, DeviceID.INPUT, DeviceID.SOUND, DeviceID.I2C, DeviceID.GPIO}
"""Classes whose front-ends in QEMU stop, when their socket closes, what may never have begun (seen with QEMU 10)."""
CLOSED = "it closed the connection"
"""The bus's word for a front-end that went by itself."""


def plug(bus: BusClient, name: str, make: Callable[[], Row], qmp: Path, port: str | None) -> tuple[Row, str]:
    """Have `make` plug a device, and add it to QEMU; the device's row, and where it is there in words.

    `port` is the id of a bus of QEMU's, by default that of a free root port. UsageError, Error; then nothing is left.
    """
    with Monitor(qmp) as qemu, contextlib.ExitStack() as undo:
        machine = qemu.machine()
        if port is None and machine_kind(machine).ports:
            port = qemu.free_port()
        connector = _connector(bus, name, undo)
        row = make()
        undo.callback(_quietly, bus.unplug, name, surprise=True)
        device = machines.of_row(bus.show, connector)
        try:
            _knock(qemu, bus, connector, device)
            _add(qemu, bus, connector["name"], device, machine, port)
        except HotplugError as error:
            raise Error(f"{name} is not plugged: {error}") from None
        undo.pop_all()
        return row, f"in QEMU{'' if port is None else f' on {port}'}"


def _connector(bus: BusClient, name: str, undo: contextlib.ExitStack) -> Row:
    """The row of the device's connector, made when there is none."""
    for row in bus.connectors():
        if row["type"] == "vhost-user" and row["devices"] == [name]:
            if row["connects"]:
                raise UsageError(
                    f"connector {row['name']} goes where QEMU listens: --qmp wants one that listens itself"
                )
            return row
    row = bus.connect("vhost-user", name, options={"device": name})
    undo.callback(_quietly, bus.disconnect, name)
    return row


def _row(bus: BusClient, connector: str) -> Row:
    for row in bus.connectors():
        if row["name"] == connector:
            return row
    raise HotplugError(f"connector {connector} was taken off bus {bus.name}")


def _knock(qemu: Monitor, bus: BusClient, connector: Row, device: VhostUserDevice) -> None:
    """Find out whether QEMU can reach the bus and is let in, before it is given the device. HotplugError."""
    name, seen = connector["name"], connector["departed"]

    def answered() -> bool:
        row = _row(bus, name)
        for gone in row["departed"]:
            if gone not in seen:
                hint = ": name its user in [bus] members" if "member" in gone["reason"] else ""
                raise HotplugError(f"the bus turns QEMU away ({gone['peer']}): it {gone['reason']}{hint}")
        return bool(row["peers"])

    try:
        qemu.knock(device, answered)
    except HotplugError as error:
        if "Permission denied" in str(error):
            raise HotplugError(
                f"{error}: QEMU's user must get at this directory: open it, or set VBUS_RUNTIME_DIR for the bus"
            ) from None
        raise
    if not qemu.wait(lambda: not _row(bus, name)["peers"]):
        raise HotplugError(f"bus {bus.name} is not free of QEMU's first connection")


def _add(
    qemu: Monitor, bus: BusClient, connector: str, device: VhostUserDevice, machine: str, port: str | None
) -> None:
    """Give QEMU the device. HotplugError, with why the bus parted from QEMU where it is the bus that did."""
    seen = _row(bus, connector)["departed"]
    try:
        qemu.add(device, machine, port)
    except HotplugError as error:
        said = ""
        with contextlib.suppress(Error):
            reasons = [gone["reason"] for gone in _row(bus, connector)["departed"] if gone not in seen]
            said = "".join(f"; the bus says: {reason}" for reason in reasons if reason != CLOSED)
        raise HotplugError(f"{error}{said}") from None


def unplug(text: str, qmp: Path, *, surprise: bool, seconds: float) -> str:
    """Take `DEVICE` or `BUS/DEVICE` out of QEMU and off its bus; what was done, in words.

    The guest has some seconds to release it. When it does not, the device stays where it is; by surprise, it is taken
    off the bus all the same. UsageError, Error.
    """
    bus, name, missing = _sought(text)
    device = VhostUserDevice(name, 0, Path())
    with Monitor(qmp) as qemu:
        if missing is not None and not qemu.has_socket(device):
            raise missing
        if not (qemu.has_device(device) or qemu.has_socket(device)):
            raise UsageError(
                f"QEMU at '{qmp}' has no device {device.id!r}: is it another QEMU? Without --qmp, {name} is taken off "
                "its bus alone"
            )
        try:
            qemu.remove(device, seconds)
        except GoneError as error:
            raise Error(f"{error}; without --qmp, {name} is taken off its bus alone") from None
        except NotReleasedError as error:
            if bus is None:
                raise Error(f"{error}: it is on no bus any more; say it again when the guest runs") from None
            if not surprise:
                raise Error(
                    f"{error}: it stays where it is. Does the guest run, and know hotplug? Say it again, or with "
                    "--surprise"
                ) from None
            _check_begun(bus, name)
            _take_off(bus, name, surprise=True)
            return f"{name} is off bus {bus.name}; {error}, so say it again later to have it out of QEMU"
    if bus is None:
        return f"{name} is out of QEMU; it was on no bus any more"
    _take_off(bus, name, surprise=surprise)
    return f"{name} is out of QEMU and off bus {bus.name}"


def _sought(text: str) -> tuple[BusClient | None, str, Error | None]:
    """The bus of a device, and its name; or why there is none: it may have been taken off, and be in QEMU still."""
    try:
        bus, name = buses.the_device(text)
    except NoSuchNameError as error:
        return None, text.rpartition("/")[2], error
    except UsageError:
        raise
    except Error as error:
        return None, text.rpartition("/")[2], error
    return bus, name, None


def _check_begun(bus: BusClient, name: str) -> None:
    """UsageError when QEMU would not survive that a device goes."""
    row = bus.show(name)
    if not row["status"] and row["device_id"] in ABORTS_EARLY:
        raise UsageError(
            f"{name}: no driver has begun with it, and QEMU aborts when such a {row['type']} goes: let the guest "
            "run first, or end QEMU"
        )


def _take_off(bus: BusClient, name: str, *, surprise: bool) -> None:
    """Take a device off its bus, and its connector. Error when the device hung."""
    ended = bus.unplug(name, surprise=surprise)["ended"]
    for row in bus.connectors():
        if row["type"] == "vhost-user" and row["devices"] == [name]:
            bus.disconnect(row["name"])
    if not ended:
        raise Error(f"{name} hung: it is off the bus, but its handler was left behind in the bus's process")


def _quietly(action: Callable[..., Any], *words: Any, **more: Any) -> None:
    """Take a step back: what fails here must not hide why."""
    with contextlib.suppress(Error):
        action(*words, **more)
