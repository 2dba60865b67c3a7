"""One target in Python, in the hands of libFuzzer: `python -m harness.target NAME`, then libFuzzer's own words.

With `--seeds DIRECTORY` it writes the target's seeds there instead. What the target imports of vbus is instrumented.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run, until libFuzzer ends the process."""
    name, *words = sys.argv[1:]
    if words[:1] == ["--seeds"]:
        write_seeds(name, Path(words[1]))
        return
    import atheris

    with atheris.instrument_imports(include=["vbus", name]):
        target = importlib.import_module(name)
    atheris.Setup([name, *words], target.one)
    atheris.Fuzz()


def write_seeds(name: str, directory: Path) -> None:
    """A file for each of the target's seeds."""
    for number, seed in enumerate(importlib.import_module(name).seeds()):
        (directory / f"seed-{number:03}").write_bytes(seed)


if __name__ == "__main__":
    main()
