"""Real guests: Debian's own kernel in QEMU, with a small root of busybox and an agent that runs commands.

For tests, and for whoever wants to see a device in a running machine within seconds. Nothing here knows the bus: what
a guest has beside processors and memory is said in QEMU's own options. The parts, in the order in which they are used:

    debian.py     packages of any architecture, fetched by apt into a cache and unpacked there
    kernel.py     the stock kernel of an architecture, and which modules a module needs
    build.py      modules built for it
    initramfs.py  the guest's files, as the kernel unpacks them
    machine.py    the machine's options, its start and its end; commands in the guest; QMP

and for guests of anybody's:

    options.py    QEMU's options for a device behind a vhost-user socket, by class and machine
    libvirt.py    the same as parts of a libvirt domain
    hotplug.py    a running QEMU, to which such devices are added, and from which they are taken
"""

from vbus.vm.machine import Guest, GuestError

__all__ = ["Guest", "GuestError"]
