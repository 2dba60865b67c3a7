"""The parts of a libvirt domain for devices that are served behind vhost-user sockets (libvirt.org/formatdomain.html).

libvirt has elements for networks and disks; the options of all other devices are its `qemu:commandline`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from itertools import count, product
from xml.etree import ElementTree as ET

from vbus.virtio import DeviceID
from vbus.vm.options import VhostUserDevice, device_options, front_end

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
"""The namespace of what is handed to QEMU as it is."""
RECONNECT_SECONDS = "1"


def domain(devices: Iterable[VhostUserDevice], machine: str = "q35", *, reconnect: bool = True) -> ET.Element:
    """A domain with nothing but what these devices need. NoFrontEndError, UsageError."""
    ET.register_namespace("qemu", QEMU)
    root = ET.Element("domain", type="kvm")
    memory = ET.SubElement(root, "memoryBacking")
    ET.SubElement(memory, "source", type="memfd")
    ET.SubElement(memory, "access", mode="shared")
    elements = ET.Element("devices")
    words: list[str] = []
    names = _disk_names()
    for device in devices:
        # Whatever libvirt makes of it, QEMU must be able to.
        front_end(device, machine)
        match device.device_id:
            case DeviceID.NETWORK:
                _interface(elements, device, reconnect)
            case DeviceID.BLOCK if not device.connect:
                _disk(elements, device, next(names), reconnect)
            case _:
                words += device_options(device, machine, "ms" if reconnect else "no")
    if len(elements):
        root.append(elements)
    if words:
        line = ET.SubElement(root, f"{{{QEMU}}}commandline")
        for word in words:
            ET.SubElement(line, f"{{{QEMU}}}arg", value=word)
    ET.indent(root)
    return root


def text(root: ET.Element) -> str:
    """The domain as it is written."""
    return ET.tostring(root, encoding="unicode")


def _interface(parent: ET.Element, device: VhostUserDevice, reconnect: bool) -> None:
    interface = ET.SubElement(parent, "interface", type="vhostuser")
    if device.mac is not None:
        ET.SubElement(interface, "mac", address=device.mac)
    mode = "server" if device.connect else "client"
    source = ET.SubElement(interface, "source", type="unix", path=str(device.socket), mode=mode)
    _reconnect(source, device, reconnect)
    ET.SubElement(interface, "model", type="virtio")
    if device.pairs > 1:
        ET.SubElement(interface, "driver", queues=str(device.pairs))


def _disk(parent: ET.Element, device: VhostUserDevice, name: str, reconnect: bool) -> None:
    disk = ET.SubElement(parent, "disk", type="vhostuser", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="raw", queues=str(device.queues))
    source = ET.SubElement(disk, "source", type="unix", path=str(device.socket))
    _reconnect(source, device, reconnect)
    ET.SubElement(disk, "target", dev=name, bus="virtio")


def _reconnect(source: ET.Element, device: VhostUserDevice, reconnect: bool) -> None:
    if reconnect and device.reconnects:
        ET.SubElement(source, "reconnect", enabled="yes", timeout=RECONNECT_SECONDS)


def _disk_names() -> Iterator[str]:
    """In order: vda to vdz, vdaa, ..."""
    for length in count(1):
        for letters in product(string.ascii_lowercase, repeat=length):
            yield "vd" + "".join(letters)
