"""How the command prints: aligned tables for people, JSON with stable keys for programs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="Print an array of objects.")


def print_json(rows: Iterable[Any], *, indent: int | None = 2) -> None:
    """An array of objects."""
    click.echo(json.dumps(list(rows), indent=indent, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, indent: str = "") -> None:
    """Columns as wide as what is in them; numbers on the right. Headings alone are not worth printing."""
    cells = [[plain(cell) for cell in row] for row in rows]
    if not cells:
        return
    columns = list(zip(headings, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell.isdigit() for cell in column[1:]) for column in columns]
    for number, row in enumerate([list(headings), *cells]):
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        line = indent + "  ".join(parts).rstrip()
        click.echo(paint(line, bold=True) if number == 0 else _alarm(line))


def print_facts(facts: Iterable[tuple[str, object]], *, indent: str = "  ") -> None:
    """Names and values, one a line."""
    pairs = [(name, plain(value)) for name, value in facts]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        click.echo(_alarm(f"{indent}{name.ljust(width)}  {value}".rstrip()))


def plain(value: object) -> str:
    """A value as a cell. What came from another side must not be able to speak to the terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = ", ".join(f"{key}: {item}" for key, item in value.items()) or "-"
    elif isinstance(value, list | tuple):
        value = ", ".join(str(item) for item in value) or "-"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(value))


def when(seconds: float) -> str:
    """A point in time, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def colourful() -> bool:
    """Whether standard output is a terminal whose user does not mind colours (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stdout.isatty()


def paint(text: str, **style: Any) -> str:
    """The text in this style, where that can be seen."""
    return click.style(text, **style) if colourful() else text


def _alarm(line: str) -> str:
    return paint(line, fg="red") if "NEEDS_RESET" in line or "FAILED" in line else line
