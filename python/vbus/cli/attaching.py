"""What verbs share that attach to a bus as a driver's side: the options for TLS."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--cert", "certificate", metavar="FILE", help="For tls: this side's certificate."),
    click.option("--key", metavar="FILE", help="For tls: its key."),
    click.option(
        "--ca", "authority", metavar="FILE", help="For tls: the authority that has signed the bus's certificate."
    ),
    click.option("--server-name", metavar="NAME", help="For tls: the bus's name, when it is not the address's host."),
)
_NAMES = ("certificate", "key", "authority", "server_name")


def tls_options(command: F) -> F:
    """Add the options; the command gets them as one argument `tls`, for `attach`."""

    @functools.wraps(command)
    def packed(**options: Any) -> Any:
        return command(tls={name: options.pop(name) for name in _NAMES}, **options)

    wrapped: Any = packed
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]
