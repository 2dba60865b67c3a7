"""The verb `completion`."""

from __future__ import annotations

import click


@click.command("completion", short_help="Print what a shell needs to complete vbus.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what SHELL needs to complete verbs, options, and names of buses and devices.

    bash and zsh: eval "$(vbus completion bash)" in ~/.bashrc or ~/.zshrc. fish: vbus completion fish | source
    """
    from click.shell_completion import get_completion_class

    from vbus.cli.app import app

    completer = get_completion_class(shell)
    assert completer is not None, "click knows the three shells"
    click.echo(completer(app, {}, "vbus", "_VBUS_COMPLETE").source())
