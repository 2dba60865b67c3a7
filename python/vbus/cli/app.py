"""The command itself: which verbs there are, and what becomes of errors."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import click

import vbus
from vbus.errors import Error, UsageError
from vbus.hints import did_you_mean

VERBS = {
    "run": "run",
    "ls": "listing",
    "show": "listing",
    "stat": "listing",
    "plug": "change",
    "unplug": "change",
    "set": "change",
    "qemu-args": "machines",
    "libvirt-xml": "machines",
    "channel": "channel",
    "driver": "driver",
    "guest": "guest",
    "doctor": "doctor",
    "demo": "demo",
    "bench": "bench",
    "completion": "completion",
}
"""Each verb, and the module that has a command of this name, with underscores for dashes."""
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def _name(verb: str) -> str:
    return f"{verb.replace('-', '_')}_command"


@dataclass
class Settings:
    """What the options before the verb say."""

    debug: bool = False
    command: list[str] | None = None
    """What stood behind `--`, for a verb that runs it."""


class Verbs(click.Group):
    """Imports a verb when it is typed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which somebody meets them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"vbus.cli.{VERBS[cmd_name]}"), _name(cmd_name))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a verb that does not exist is answered with the nearest."""
        if not args[0].startswith("-") and args[0] not in VERBS and not ctx.resilient_parsing:
            raise click.UsageError(f"there is no verb {args[0]!r}: {did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
@click.version_option(vbus.__version__, message="vbus %(version)s")
@click.pass_context
def app(ctx: click.Context, debug: bool) -> None:
    """A virtual bus for virtio: write a device once, in Python; reach it from anywhere.

    Exit status: 0 success, 1 failed, 2 wrong usage.
    """
    ctx.obj.debug = debug
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(WRONG_USAGE)


def main(arguments: list[str] | None = None) -> int:
    """Run the command with these arguments (by default those of the process); its exit status."""
    settings = Settings()
    try:
        status: Any = app.main(arguments, prog_name="vbus", standalone_mode=False, obj=settings)
        sys.stdout.flush()
    except click.UsageError as error:
        return _fail(settings, error, _usage(error), WRONG_USAGE)
    except click.ClickException as error:
        return _fail(settings, error, error.format_message(), FAILED)
    except click.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough of it. Nothing is left to be said, also not at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except UsageError as error:
        return _fail(settings, error, str(error), WRONG_USAGE)
    except (Error, OSError) as error:
        return _fail(settings, error, _system(error), FAILED)
    except Exception as error:
        text = f"{type(error).__name__}: {error} (a defect of vbus: --debug shows where)"
        return _fail(settings, error, text, FAILED)
    return status if isinstance(status, int) else 0


def _fail(settings: Settings, error: BaseException, text: str, status: int) -> int:
    if settings.debug:
        traceback.print_exception(error)
    for line in text.splitlines() or [type(error).__name__]:
        click.echo(f"vbus: {line}", err=True)
    return status


def _system(error: BaseException) -> str:
    """An OSError without its number."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


def _usage(error: click.UsageError) -> str:
    """A click error in one line, with what to do."""
    verb = error.ctx.command_path if error.ctx is not None else "vbus"
    if isinstance(error, click.NoSuchOption):
        names = [name for parameter in _parameters(error.ctx) for name in parameter.opts if name.startswith("--")]
        hint = did_you_mean(error.option_name, names)
        return f"no such option {error.option_name}: {hint if hint.endswith('?') else f'see {verb} --help'}"
    text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    return text if ": " in text or text.endswith("?") else f"{text}: see {verb} --help"


def _parameters(ctx: click.Context | None) -> list[click.Parameter]:
    return ctx.command.get_params(ctx) if ctx is not None else []
