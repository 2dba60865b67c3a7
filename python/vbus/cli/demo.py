"""The verb `demo`."""

from __future__ import annotations

import click

from vbus.cli import serving
from vbus.errors import UsageError


@click.command("demo", short_help="Show what vbus does, on real input.")
@click.option("--vm", is_flag=True, help="Show a bus's devices in a stock guest.")
@click.option("--kvm", is_flag=True, help="Show a whole bus in a guest that has vbus's modules.")
def demo_command(vm: bool, kvm: bool) -> int:
    """Start a bus in one process and drive its devices from another: disks, a console, hotplug, surprise removal.

    With --vm, Debian's own kernel drives them, in QEMU: file systems, a network, entropy, keys; at the end stands what
    the guest saw beside what the bus counted. With --kvm it does the same through one function that has all of the bus
    behind it, with the modules of guest/linux; devices come and go, and it is shown what their signals cost.

    Nothing is left behind. The last line is `demo: ok`; exit status 1 and the step that failed otherwise.
    """
    if vm and kvm:
        raise UsageError("--vm and --kvm are two demos: write one of them")
    with serving.interruptible():
        if kvm:
            from vbus.demo.function import main as function

            return function()
        if vm:
            from vbus.demo.machine import main as machine

            return machine()
        from vbus.demo import main

        return main()
