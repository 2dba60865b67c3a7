"""What both sides of a measurement agree on: the device, its names, and what a process has used so far."""

from __future__ import annotations

import contextlib
import os
import resource
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

DEVICE_ID = 0x7E10
"""Of the device that is measured, which answers with what it was asked: no class of the specification."""
URGENT = "urgent"
LEAST_URGENT = 7


class Usage(TypedDict):
    """What a process has used since it began."""

    user: float
    """Seconds of CPU time in the process's own code."""
    system: float
    """Seconds of CPU time in the kernel."""
    sleeps: int
    """How often one of its threads gave up its CPU to wait."""


def usage() -> Usage:
    """What this process has used, all its threads together."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"user": used.ru_utime, "system": used.ru_stime, "sleeps": used.ru_nvcsw}


def used_between(before: Usage, after: Usage) -> Usage:
    """What was used from one look to the next."""
    return {
        "user": after["user"] - before["user"],
        "system": after["system"] - before["system"],
        "sleeps": after["sleeps"] - before["sleeps"],
    }


class Threads(TypedDict):
    """What the threads of a process have used since they began, those that are there now, together. In nanoseconds."""

    ran: int
    waited: int
    """For a CPU that others had."""


def threads_of(pid: int) -> Threads:
    """Of a process of this machine; nothing of one that is gone."""
    rows = []
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        # One that has just ended is not there any more.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            rows.append([int(word) for word in path.read_text().split()])
    return {"ran": sum(row[0] for row in rows), "waited": sum(row[1] for row in rows)}


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def names_checksum(names: Iterable[str]) -> int:
    """Of names, in whatever order."""
    return zlib.crc32("\n".join(sorted(names)).encode())


def load_names(count: int) -> list[str]:
    """Names of the devices under load."""
    return [f"load{number}" for number in range(count)]
