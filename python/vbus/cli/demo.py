"""The verb `demo`."""

from __future__ import annotations

import click


@click.command("demo", short_help="Show what vbus does, on real input.")
@click.option("--vm", is_flag=True, help="Show a bus's devices in a stock guest.")
def demo_command(vm: bool) -> int:
    """Start a bus in one process and drive its devices from another: disks, a console, hotplug, surprise removal.

    With --vm, Debian's own kernel drives them, in QEMU: file systems, a network, entropy, keys; at the end stands what
    the guest saw beside what the bus counted.

    Nothing is left behind. The last line is `demo: ok`; exit status 1 and the step that failed otherwise.
    """
    if vm:
        from vbus.demo.machine import main as machine

        return machine()
    from vbus.demo import main

    return main()
