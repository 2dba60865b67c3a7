"""The first screen of README.md: its blocks, as a new user would copy them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCREEN = (ROOT / "README.md").read_text().partition("\n## ")[0]


def blocks(kind: str) -> list[str]:
    """The insides of the fenced blocks of one kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", SCREEN, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every command behind a `$`, without its comment."""
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), lines
    return [re.sub(r"\s+# .*", "", line[2:]) for line in lines]


def files() -> dict[str, str]:
    """The Python blocks that begin with a file's name: name to text."""
    found = [(re.match(r"# (\w+\.py)\n", block), block) for block in blocks("python")]
    return {match[1]: block for match, block in found if match}


def programs() -> list[str]:
    """The Python blocks that are run as they are."""
    return [block for block in blocks("python") if block not in files().values()]
