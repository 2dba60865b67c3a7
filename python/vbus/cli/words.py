"""Options that the command does not know, because a device's class does: `--name value`, `--name=value`, `--flag`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vbus.errors import UsageError

Values = dict[str, str | list[str]]


def parse(words: Sequence[str]) -> Values:
    """The options by the names of their keywords; one that is given several times has a list. UsageError.

    What follows an option is its value, unless it is an option itself: then the first one is a flag, and true.
    """
    values: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise UsageError(f"unexpected word {word!r}: an option of the device is written --name value")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        values.setdefault(name.replace("-", "_"), []).append(value)
    return {name: given[0] if len(given) == 1 else given for name, given in values.items()}


def as_typed(message: str) -> str:
    """An error about keys, in the words of somebody who typed options."""
    message = re.sub(r"\bfeatures\.mask: ", "--mask: ", message)
    message = re.sub(r"\bbus\.name: ", "--bus: ", message)
    message = re.sub(r"\bconnector\.[a-z0-9]+(\.\w+)?: ", "--listen: ", message)
    message = re.sub(r"\bdevice\.[\w.-]+?(?=\.\w+: )", "options", message)
    message = re.sub(r"\bdevice\.[\w.-]+?: ", "", message)
    message = re.sub(r"\boptions\.(\w+): ", lambda match: f"--{match[1].replace('_', '-')}: ", message)
    return re.sub(r"unknown key: did you mean '(\w+)'", _no_option, message).replace("unknown key", "no such option")


def _no_option(match: re.Match[str]) -> str:
    return f"no such option: did you mean '--{match[1].replace('_', '-')}'"
