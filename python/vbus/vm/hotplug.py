"""A running QEMU, asked through QMP: vhost-user devices that are added to it and taken out of it again.

Data flow: commands and events travel over one socket, which is open while a `Monitor` is; the event that a device is
gone is listened for before the device is asked to go. Every command has a time limit. What was half added is taken out
again, in reverse; what QEMU refuses is one line with QEMU's own words in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.error import ProtocolError
from qemu.qmp.protocol import ConnectError

from vbus.errors import Error, UsageError
from vbus.vm.options import MACHINE_KINDS, FrontEnd, Reconnect, VhostUserDevice, front_end, machine_kind

ANSWER_SECONDS = 20.0
"""How long QEMU may take for a command."""
_TYPES = {"pc-q35-": "q35", "microvm": "microvm", "s390-ccw-virtio": "s390x", "pseries": "pseries"}
"""What QEMU's names of a machine begin with, and ours."""
_GONE = (ExecInterruptedError, ProtocolError, ConnectError, EOFError, OSError)


class HotplugError(Error):
    """QEMU refused, does not answer, or is gone: one line."""


class NotThereError(HotplugError):
    """QEMU has nothing of this name."""


class GoneError(HotplugError):
    """QEMU, or its monitor, went away."""


class NotReleasedError(HotplugError):
    """The guest did not release a device in time, or said that it does not."""


class Monitor:
    """QEMU's monitor at a QMP socket, for a `with` block. HotplugError when it cannot be had."""

    def __init__(self, path: Path, seconds: float = ANSWER_SECONDS) -> None:
        self.path = path
        self._seconds = seconds
        # It writes of its own accord what is raised here, too.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)
        self._runner = asyncio.Runner()
        self._client = QMPClient("vbus")
        self._deleted = EventListener(names={"DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"})
        try:
            self._runner.run(self._connect())
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        self._client.register_listener(self._deleted)
        try:
            await asyncio.wait_for(self._client.connect(str(self.path)), self._seconds)
        except TimeoutError:
            raise HotplugError(
                f"QMP at '{self.path}' says nothing: a monitor has one client at a time; give QEMU another -qmp"
            ) from None
        except ConnectError as error:
            raise HotplugError(f"QMP at '{self.path}': {_why_not(error.exc)}") from None
        except (QMPError, EOFError, OSError, ValueError) as error:
            text = " ".join(str(error).split()) or "it closed the connection"
            raise HotplugError(
                f"'{self.path}' is no QMP socket of QEMU's ({text}): name that of -qmp unix:..."
            ) from None

    def close(self) -> None:
        """Let go of the monitor."""

        async def end() -> None:
            with contextlib.suppress(QMPError, EOFError, OSError, TimeoutError):
                await asyncio.wait_for(self._client.disconnect(), self._seconds)

        self._runner.run(end())
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers to a command; underscores in names of arguments are dashes. HotplugError."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._execute(command, words)

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:
        async def ask() -> Any:
            return await asyncio.wait_for(self._client.execute(command, arguments), self._seconds)

        try:
            return self._runner.run(ask())
        except ExecuteError as error:
            kind = NotThereError if error.error_class == "DeviceNotFound" else HotplugError
            raise kind(f"QEMU refuses {command}: {' '.join(str(error).split())}") from None
        except TimeoutError:
            raise HotplugError(f"QEMU does not answer {command} within {self._seconds:g} s") from None
        except _GONE:
            raise GoneError(f"QEMU at '{self.path}' went away at {command}") from None
        except QMPError as error:
            raise HotplugError(f"{command}: {' '.join(str(error).split())}") from None

    # What there is.

    def machine(self) -> str:
        """Our name of its machine, which takes devices while it runs and shares its memory. UsageError."""
        kind = str(self.execute("qom-get", path="/machine", property="type"))
        name = next((name for start, name in _TYPES.items() if kind.startswith(start)), None)
        if name is None:
            known = ", ".join(row.option for row in MACHINE_KINDS.values() if row.hotplug)
            raise UsageError(f"QEMU's machine is a {kind.removesuffix('-machine')}: devices are added to {known}")
        if not machine_kind(name).hotplug:
            raise UsageError(
                f"a {name} takes no device while it runs: write it into the file of its bus, and start anew"
            )
        if not any(row["share"] for row in self.execute("query-memdev")):
            raise UsageError("QEMU shares none of its memory: start it with what vbus qemu-args prints")
        return name

    def reconnect(self) -> Reconnect:
        """How this QEMU is told to connect again."""
        version = self.execute("query-version")["qemu"]
        return "ms" if (version["major"], version["minor"]) >= (9, 2) else "s"

    def free_port(self) -> str:
        """A root port with an id and without a device. UsageError when there is none."""
        ports = self._children("/machine/peripheral", "child<pcie-root-port>")
        for port in sorted(ports):
            for bus in self._children(f"/machine/peripheral/{port}", "child<PCIE>"):
                if not any(
                    n.startswith("child[") for n in self._children(f"/machine/peripheral/{port}/{bus}", "link<")
                ):
                    return bus
        raise UsageError(
            f"QEMU has no free root port with an id ({len(ports)} are taken): start it with more "
            "(vbus qemu-args --root-ports N), or unplug something"
        )

    def _children(self, path: str, kind: str) -> list[str]:
        return [row["name"] for row in self.execute("qom-list", path=path) if row["type"].startswith(kind)]

    def has_socket(self, device: VhostUserDevice) -> bool:
        """Whether the socket of a device is there, which outlasts the device's other parts."""
        return any(row["label"] == device.chardev_id for row in self.execute("query-chardev"))

    def has_device(self, device: VhostUserDevice) -> bool:
        """Whether a device is there by this name."""
        return device.id in self._children("/machine/peripheral", "child<")

    # What is done.

    def add(self, device: VhostUserDevice, machine: str, bus: str | None) -> None:
        """Add a device whose server listens already, on a bus of QEMU's. HotplugError; then nothing of it is there."""
        parts = front_end(device, machine, self.reconnect())
        with contextlib.ExitStack() as undo:
            self._execute("chardev-add", parts.chardev_add)
            undo.callback(self._quietly, self._remove_chardev, device)
            if parts.netdev is not None:
                self._execute("netdev_add", dict(parts.netdev))
                undo.callback(self._quietly, self._remove_netdev, device)
            self._execute("device_add", _placed(parts, bus))
            undo.pop_all()

    def knock(self, device: VhostUserDevice, answered: Callable[[], bool]) -> None:
        """Have QEMU connect to a device's socket, wait until its server `answered`, and part again. HotplugError.

        A server that turns QEMU away would have it try again without an end while it adds a device.
        """
        name = f"k-{device.name}"
        socket = {"server": False, "addr": {"type": "unix", "data": {"path": str(device.socket)}}}
        self._execute("chardev-add", {"id": name, "backend": {"type": "socket", "data": socket}})
        try:
            if not self.wait(answered):
                raise HotplugError(f"nobody answers QEMU at '{device.socket}' within {self._seconds:g} s")
        finally:
            self._quietly(lambda _: self.execute("chardev-remove", id=name), device)

    def wait(self, condition: Callable[[], bool]) -> bool:
        """Whether something comes to be so in the time of a command."""
        deadline = time.monotonic() + self._seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def remove(self, device: VhostUserDevice, seconds: float) -> None:
        """Take a device out, once the guest has released it. NotReleasedError; HotplugError."""
        if self.has_device(device):
            self._deleted.clear()
            try:
                self.execute("device_del", id=device.id)
            except GoneError:
                raise
            except HotplugError as error:
                # Somebody has asked the guest before, and it has not released the device yet.
                if "already in the process of unplug" not in str(error):
                    raise
            self._wait_deleted(device, seconds)
        self._remove_netdev(device)
        self._remove_chardev(device)

    def _wait_deleted(self, device: VhostUserDevice, seconds: float) -> None:
        async def deleted() -> None:
            while True:
                event = await self._deleted.get()
                data = event.get("data")
                if not isinstance(data, dict) or data.get("device") != device.id:
                    continue
                if event["event"] == "DEVICE_DELETED":
                    return
                raise NotReleasedError(f"the guest refuses to release {device.name}")

        async def wait() -> None:
            gone = asyncio.ensure_future(self._client.runstate_changed())
            done = asyncio.ensure_future(deleted())
            try:
                await asyncio.wait({gone, done}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
                if done.done():
                    done.result()
                elif gone.done():
                    raise GoneError(f"QEMU at '{self.path}' went away before the guest released {device.name}")
                else:
                    raise NotReleasedError(f"the guest did not release {device.name} within {seconds:g} s")
            finally:
                for task in (gone, done):
                    task.cancel()
                await asyncio.gather(gone, done, return_exceptions=True)

        self._runner.run(wait())

    def _remove_netdev(self, device: VhostUserDevice) -> None:
        with contextlib.suppress(NotThereError):
            self.execute("netdev_del", id=device.netdev_id)

    def _remove_chardev(self, device: VhostUserDevice) -> None:
        # That of a netdev is gone with it.
        if self.has_socket(device):
            self.execute("chardev-remove", id=device.chardev_id)

    def _quietly(self, action: Callable[[VhostUserDevice], Any], device: VhostUserDevice) -> None:
        """Undo a step: what fails here must not hide why."""
        with contextlib.suppress(HotplugError):
            action(device)


def _placed(parts: FrontEnd, bus: str | None) -> dict[str, Any]:
    return {**parts.device, **({"bus": bus} if bus is not None else {})}


def _why_not(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such socket: name that of QEMU's -qmp unix:..."
        case ConnectionRefusedError():
            return "nobody listens there: is QEMU still running?"
        case PermissionError():
            return "permission denied: be the user who runs QEMU, or root"
        case EOFError():
            return "it closed the connection: is it that of QEMU's -qmp unix:...?"
        case OSError(strerror=str(text)):
            return text
        case _:
            return f"it is no QMP socket of QEMU's ({' '.join(str(error).split()) or type(error).__name__})"
