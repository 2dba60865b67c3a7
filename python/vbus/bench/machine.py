"""Where a measurement was made: what somebody must know who compares its figures with others."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import vbus


def describe() -> dict[str, Any]:
    """Machine, kernel, Python and vbus; nothing that names the machine or who uses it."""
    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "vbus": vbus.__version__,
    }


def load_average() -> float:
    """Of the last minute: what else ran."""
    return round(os.getloadavg()[0], 2)


def _cpu() -> str:
    """What the processor calls itself; its architecture where it does not say."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "cpu model", "cpu"):
            return value.strip()
    return platform.machine()
