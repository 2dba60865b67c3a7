"""Steps of a demo: each does something, checks it, and says in a line what was done; the first that fails ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from vbus.errors import Error

Step = tuple[str, Callable[[], str]]


class StepFailed(Error):
    """A step of the demo did not do what it says."""


def run_steps(steps: Sequence[Step], say: Callable[[str], None]) -> None:
    """Every step, in order. StepFailed, with the step's name."""
    for name, step in steps:
        began = time.monotonic()
        try:
            result = step()
        except Error as failed:
            raise StepFailed(f"{name}: {failed}") from None
        except Exception as error:
            raise StepFailed(f"{name}: {type(error).__name__}: {error}") from error
        say(f"{name + ' ':.<26} {result} ({time.monotonic() - began:.1f} s)")
