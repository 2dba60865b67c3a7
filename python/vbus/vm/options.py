"""QEMU's options for a device whose queues are served behind a vhost-user socket, by the machine that shall have it.

Data flow: a `VhostUserDevice` says what the device is and where its socket is; `front_end` finds what QEMU calls the
class on that kind of machine, and gives its three parts (a chardev, for a network a netdev, the device), as words for a
command line and as arguments for QMP. `machine_options` is what the machine itself needs, so that the devices work.

All names are QEMU's since 9; what it has no front-end for is a `NoFrontEndError` that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vbus.errors import UsageError
from vbus.virtio import DeviceID, device_type_name

Reconnect = Literal["ms", "s", "no"]
"""How QEMU is told to connect again: in milliseconds, as it can since 9.2; in seconds, as before; or not at all."""
RECONNECT_MS = 100
RECONNECT_S = 1
MEMORY = "mem"
"""The id of the memory that QEMU shares."""
PORT = "vbus-port"
"""What the ids of root ports for hotplug begin with."""
MAX_PORTS = 24
"""There are 32 slots on the bus where they sit."""
_FIRST_CHASSIS = 200


class NoFrontEndError(UsageError):
    """QEMU has nothing that would show its guest a device of this class, on this machine or on any."""


@dataclass(frozen=True)
class MachineKind:
    """What the devices of a kind of machine are called, and how they come into it while it runs."""

    option: str
    """What `-machine` begins with."""
    bus: Literal["pci", "ccw", "mmio"]
    needs: tuple[str, ...] = ()
    """Options without which vhost-user's devices do not work."""
    ports: bool = False
    """Whether a device that is added to the running machine takes a root port."""
    hotplug: bool = True


MACHINE_KINDS = {
    "q35": MachineKind("q35", "pci", ports=True),
    # Otherwise it shows the legacy interface, which vhost-user's devices refuse.
    "microvm": MachineKind("microvm", "mmio", needs=("-global", "virtio-mmio.force-legacy=false"), hotplug=False),
    "s390x": MachineKind("s390-ccw-virtio", "ccw"),
    "pseries": MachineKind("pseries", "pci"),
}
"""By the name that a user gives."""


@dataclass(frozen=True)
class _Class:
    """What QEMU calls a device class: before `-pci` and `-ccw`, and where it is mapped into memory."""

    name: str
    mapped: str
    reconnects: bool = False
    queues: str = ""
    """The property that says how many queues there are beside those that every device of the class has."""
    fixed: int = 0
    """How many those are."""
    ccw: bool = False


_CLASSES: dict[int, _Class] = {
    DeviceID.NETWORK: _Class("virtio-net", "virtio-net-device", reconnects=True, ccw=True),
    DeviceID.BLOCK: _Class("vhost-user-blk", "vhost-user-blk", reconnects=True, queues="num-queues"),
    DeviceID.ENTROPY: _Class("vhost-user-rng", "vhost-user-rng"),
    DeviceID.SCSI: _Class("vhost-user-scsi", "vhost-user-scsi", queues="num_queues", fixed=2),
    DeviceID.INPUT: _Class("vhost-user-input", "vhost-user-input"),
    DeviceID.SOCKET: _Class("vhost-user-vsock", "vhost-user-vsock-device"),
    DeviceID.SOUND: _Class("vhost-user-snd", "vhost-user-snd"),
    DeviceID.FILE_SYSTEM: _Class(
        "vhost-user-fs", "vhost-user-fs-device", queues="num-request-queues", fixed=1, ccw=True
    ),
    DeviceID.I2C: _Class("vhost-user-i2c", "vhost-user-i2c-device"),
    DeviceID.GPIO: _Class("vhost-user-gpio", "vhost-user-gpio-device"),
}


@dataclass(frozen=True)
class VhostUserDevice:
    """A device that is served at a socket.

    `queues` is how many queues it has, all kinds together. `connect`: it is QEMU that listens, and the server of the
    device that connects. `mac` is of a network, `tag` of a file system (by default its name).
    """

    name: str
    device_id: int
    socket: Path
    queues: int = 1
    connect: bool = False
    mac: str | None = None
    tag: str | None = None

    @property
    def type_name(self) -> str:
        """The short name of its class."""
        return device_type_name(self.device_id)

    @property
    def id(self) -> str:
        """QEMU's name of the device, which may not begin with a digit."""
        return self.name if self.name[:1].isalpha() else f"d-{self.name}"

    @property
    def chardev_id(self) -> str:
        """QEMU's name of the socket."""
        return f"c-{self.name}"

    @property
    def netdev_id(self) -> str:
        """QEMU's name of what is behind a network device."""
        return f"n-{self.name}"

    @property
    def pairs(self) -> int:
        """Pairs of queues of a network, which may have one more for control."""
        return max(1, self.queues // 2)

    @property
    def reconnects(self) -> bool:
        """Whether QEMU can connect again when the server was away; it does not start when others shall."""
        known = _CLASSES.get(self.device_id)
        return known is not None and known.reconnects and not self.connect


@dataclass(frozen=True)
class FrontEnd:
    """The parts of QEMU that make one device: each with its properties, as JSON has them."""

    chardev: Mapping[str, Any]
    netdev: Mapping[str, Any] | None
    device: Mapping[str, Any]

    @property
    def words(self) -> list[str]:
        """The options of a command line."""
        words = ["-chardev", _option("socket", self.chardev)]
        if self.netdev is not None:
            words += ["-netdev", _option(self.netdev["type"], self.netdev, "type")]
        return [*words, "-device", _option(self.device["driver"], self.device, "driver")]

    @property
    def chardev_add(self) -> dict[str, Any]:
        """The arguments of QMP's `chardev-add`; the others' are their properties as they are."""
        rest = {key: value for key, value in self.chardev.items() if key not in ("id", "path")}
        address = {"type": "unix", "data": {"path": self.chardev["path"]}}
        # A client says so here: the default is to listen.
        return {
            "id": self.chardev["id"],
            "backend": {"type": "socket", "data": {"server": False, **rest, "addr": address}},
        }


def front_end(device: VhostUserDevice, machine: str = "q35", reconnect: Reconnect = "ms") -> FrontEnd:
    """What QEMU needs for a device in a machine. NoFrontEndError; UsageError for a machine that is not known.

    `reconnect` is left out where the class does not know it.
    """
    kind = machine_kind(machine)
    known = _known(device, machine)
    chardev: dict[str, Any] = {"id": device.chardev_id, "path": str(device.socket)}
    if device.connect:
        chardev |= {"server": True, "wait": False}
    elif device.reconnects and reconnect != "no":
        chardev |= {"reconnect-ms": RECONNECT_MS} if reconnect == "ms" else {"reconnect": RECONNECT_S}
    driver = known.mapped if kind.bus == "mmio" else f"{known.name}-{kind.bus}"
    own: dict[str, Any] = {"driver": driver, "id": device.id}
    if device.device_id != DeviceID.NETWORK:
        own["chardev"] = device.chardev_id
        if known.queues:
            own[known.queues] = max(1, device.queues - known.fixed)
        if device.device_id == DeviceID.FILE_SYSTEM:
            own["tag"] = device.tag or device.name
        return FrontEnd(chardev, None, own)
    netdev = {
        "type": "vhost-user",
        "id": device.netdev_id,
        "chardev": device.chardev_id,
        "queues": device.pairs,
    }
    own["netdev"] = device.netdev_id
    if device.mac is not None:
        own["mac"] = device.mac
    if device.pairs > 1:
        own["mq"] = True
    if kind.bus == "pci":
        if device.pairs > 1:
            # One a queue, and one each for control and config.
            own["vectors"] = 2 * device.pairs + 2
        # Booting from the network is not for a device that comes and goes.
        own["romfile"] = ""
    return FrontEnd(chardev, netdev, own)


def device_options(device: VhostUserDevice, machine: str = "q35", reconnect: Reconnect = "ms") -> list[str]:
    """The words of a command line for a device in a machine. NoFrontEndError, UsageError."""
    return front_end(device, machine, reconnect).words


def machine_options(
    machine: str = "q35", memory: int | None = 1 << 30, ports: int = 0, ram: Path | None = None
) -> list[str]:
    """The words of a command line for a machine with such devices. UsageError for a machine that is not known.

    `memory` is in bytes, and shared with whoever serves the devices; None when QEMU is told of its memory elsewhere.
    `ports` are root ports, each for a device that is added later, where a machine needs such ports. `ram` is the file
    that the memory shall be in, where others open it by its path.
    """
    kind = machine_kind(machine)
    words: list[str] = []
    if memory is not None:
        backend: dict[str, Any] = {"id": MEMORY, "size": memory, "share": True}
        if ram is not None:
            backend["mem-path"] = str(ram)
        words += ["-object", _option("memory-backend-file" if ram is not None else "memory-backend-memfd", backend)]
        words += ["-machine", f"{kind.option},memory-backend={MEMORY}"]
    words += kind.needs
    for number in range(1, ports + 1 if kind.ports else 1):
        words += ["-device", f"pcie-root-port,id={PORT}{number},chassis={_FIRST_CHASSIS + number}"]
    return words


def monitor_options(socket: Path) -> list[str]:
    """The words of a command line for a QMP socket, where whoever connects is served, and then the next."""
    return ["-qmp", _option(f"unix:{str(socket).replace(',', ',,')}", {"server": True, "wait": False})]


def function_options(name: str, socket: Path, vectors: int, machine: str = "q35") -> list[str]:
    """The words of a command line for a function of ivshmem with so many vectors. NoFrontEndError, UsageError."""
    if machine_kind(machine).bus != "pci":
        raise NoFrontEndError(f"{name}: QEMU has ivshmem on PCI alone: take another machine than {machine}")
    chardev = {"id": f"c-{name}", "path": str(socket)}
    device = {"id": name, "chardev": chardev["id"], "vectors": vectors}
    return ["-chardev", _option("socket", chardev), "-device", _option("ivshmem-doorbell", device)]


def machine_kind(machine: str) -> MachineKind:
    """The row of a machine. UsageError when it is not known."""
    try:
        return MACHINE_KINDS[machine]
    except KeyError:
        raise UsageError(f"machine {machine!r} is not known: {', '.join(MACHINE_KINDS)} are") from None


def _known(device: VhostUserDevice, machine: str) -> _Class:
    known = _CLASSES.get(device.device_id)
    if known is None:
        names = ", ".join(device_type_name(number) for number in _CLASSES)
        raise NoFrontEndError(
            f"{device.name}: QEMU has no vhost-user front-end for {device.type_name}, it has some for {names}: "
            "carry the device by another connector"
        )
    if MACHINE_KINDS[machine].bus == "ccw" and not known.ccw:
        names = " and ".join(device_type_name(number) for number, row in _CLASSES.items() if row.ccw)
        raise NoFrontEndError(
            f"{device.name}: QEMU has no vhost-user front-end for {device.type_name} on {machine}, only for {names}: "
            "take another machine"
        )
    return known


def _option(first: str, properties: Mapping[str, Any], leave: str = "") -> str:
    """An option of a command line, where a comma in a value is doubled."""
    words = [f"{key}={_text(value)}" for key, value in properties.items() if key != leave]
    return ",".join([first, *words])


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")
