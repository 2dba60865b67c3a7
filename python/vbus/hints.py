"""What to say to somebody who typed a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?`, or else which names there are."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(choices) or 'none'}"


def no_such(what: str, name: str, known: Iterable[str], where: str) -> str:
    """One line for a name that is not there: `bus demo has no device 'x': did you mean 'y'?`."""
    return f"{where} has no {what} {name!r}: {did_you_mean(name, known)}"
