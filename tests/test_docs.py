"""The programs in the documentation's pages, each run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["concepts.md"]
PROGRAMS = [
    (page, number, program)
    for page in PAGES
    for number, program in enumerate(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize("program", [p for _, _, p in PROGRAMS], ids=[f"{page}-{n}" for page, n, _ in PROGRAMS])
def test_a_program_of_a_page_runs(program: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_every_page_has_programs() -> None:
    assert {page for page, _, _ in PROGRAMS} == set(PAGES)
