"""Other people's programs that take part in a measurement: the same work through them, in the same run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vbus.errors import UsageError

VERSION_SECONDS = 20.0


class MissingError(UsageError):
    """A program is not installed."""


@dataclass(frozen=True)
class Peer:
    """A program that is found on the PATH."""

    program: str
    package: str
    """Debian's, that has it."""
    version_words: Sequence[str] = ("--version",)
    commands: Sequence[str] = ()
    """How it is run, with words in capitals for paths."""

    def find(self, needed_by: str = "") -> str:
        """Where it is. MissingError when it is not installed; `needed_by`: what cannot be measured without."""
        path = shutil.which(self.program)
        if path is None:
            way = f"to measure {needed_by}" if needed_by else "or measure without --peer"
            raise MissingError(f"{self.program} is not installed: install it (Debian's package {self.package}), {way}")
        return path

    def describe(self) -> dict[str, Any]:
        """Its name, what it says of its version, and how it is run."""
        done = subprocess.run(
            [self.find(), *self.version_words],
            capture_output=True,
            text=True,
            timeout=VERSION_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        found = re.search(r"\d+\.\d+[\w.+~-]*", done.stdout + done.stderr)
        return {"program": self.program, "version": found[0] if found else "unknown", "commands": [*self.commands]}
