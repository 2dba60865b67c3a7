"""The verb `demo`."""

from __future__ import annotations

import click


@click.command("demo", short_help="Show what vbus does, on real input.")
def demo_command() -> int:
    """Start a bus in one process and drive its devices from another: disks, a console, hotplug, surprise removal.

    Nothing is left behind. The last line is `demo: ok`; exit status 1 and the step that failed otherwise.
    """
    from vbus.demo import main

    return main()
