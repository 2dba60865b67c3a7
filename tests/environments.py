"""Clean virtual environments outside the checkout, from what is installed here: nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

_HERE = Path(sysconfig.get_path("purelib"))


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that these requirements need, all the way down, by name."""
    found: dict[str, Distribution] = {}
    wanted = [Requirement(line) for line in requirements]
    while wanted:
        requirement = wanted.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        installed = distribution(name)
        assert requirement.specifier.contains(installed.version, prereleases=True), requirement
        found[name] = installed
        wanted += [
            inner
            for inner in map(Requirement, installed.requires or [])
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras)
        ]
    return found


def create(folder: Path, wheel: Path) -> Path:
    """An environment with a wheel, and copies of what it says that it needs; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=100)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-index", "--no-deps", str(wheel)], check=True, timeout=100)
    asked = (python, "-c", "import importlib.metadata as m; print(*m.requires('vbus') or [], sep='\\n')")
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=100, cwd=folder)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        cwd=folder,
    )
    needed = [line for line in done.stdout.splitlines() if "extra ==" not in line]
    for installed in closure(needed).values():
        for path in installed.files or []:
            if not path.parts[0].startswith("..") and path.suffix != ".pyc":
                target = Path(where.stdout.strip()) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(_HERE / path, target)
    subprocess.run([*pip, "check"], check=True, timeout=100)
    return python
