"""QEMU's memory tree, as its monitor prints it for people: where a backend's memory lies in the guest's addresses.

No command of QMP tells that. `info mtree -f -o` shows, for each address space, what the guest finds where, with the
object that owns it:

```text
FlatView #0
 AS "memory", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): mem owner:{obj path=/objects/mem}
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom parent:{obj path=/machine/unattached}
  0000000000100000-0000000007ffffff (prio 0, ram): mem @0000000000100000 owner:{obj path=/objects/mem} KVM
```

Text for people may change. So every line of the view that is read must have a form that is known here, and the ranges
must be in order and inside of the backend; otherwise nothing of it is believed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMAND = "info mtree -f -o"
MAX_TEXT = 4 << 20
"""Bytes of a tree."""
MAX_RANGES = 64
PAGE = 4096
ADDRESS_SPACE = "memory"
"""What processors and devices without an IOMMU see."""

_VIEW = re.compile(r"FlatView #\d+")
_SPACE = re.compile(r' AS "([^"]*)", root: .+')
_ROOT = re.compile(r" Root memory region: .+")
_EMPTY = "  No rendered FlatView"
_OWNER = r"(?: (?:owner|parent):\{(?:dev|obj) (?:id|path|type)=[^{}]+\}){1,2}| orphan"
_RANGE = re.compile(
    r"  (?P<first>[0-9a-f]{16})-(?P<last>[0-9a-f]{16}) \(prio -?\d+, (?P<kind>(?:nv-)?(?:ram|rom|ramd|romd|i/o))\): "
    rf"(?P<name>(?:(?! @)[^{{}}])+?)(?: @(?P<offset>[0-9a-f]{{16}}))?(?P<owner>{_OWNER})(?: [A-Za-z]{{1,16}})?"
)


class TreeError(Exception):
    """A tree that is not understood, or that says what cannot be: one line."""


@dataclass(frozen=True)
class Range:
    """Memory that a guest has: `size` bytes at `address`, which are at `offset` of its backend."""

    address: int
    size: int
    offset: int


def backend_ranges(text: str, backend: str, size: int) -> list[Range]:
    """Where the backend `/objects/BACKEND`, of `size` bytes, is the guest's to write, by address. TreeError.

    What of it is not whole pages of 4096 bytes is left out.
    """
    if len(text) > MAX_TEXT:
        raise TreeError(f"a memory tree of {len(text)} bytes")
    owner = f" owner:{{obj path=/objects/{backend}}}"
    found: list[Range] = []
    end = 0
    for line in _view(text):
        match = _RANGE.fullmatch(line)
        if match is None:
            raise TreeError(f"a line of the memory tree is not understood: {line[:120]!r}")
        first, last = int(match["first"], 16), int(match["last"], 16)
        if not end <= first <= last:
            raise TreeError(f"the memory tree is not in order: {line[:120]!r}")
        end = last + 1
        if match["owner"] != owner or match["kind"] != "ram":
            continue
        offset = int(match["offset"] or "0", 16)
        if offset + (end - first) > size:
            raise TreeError(f"the memory tree has {backend} beyond its {size} bytes: {line[:120]!r}")
        if not (first | end | offset) % PAGE:
            found.append(Range(first, end - first, offset))
    if not found:
        raise TreeError(f"the guest has nothing of {backend}, as far as the memory tree tells")
    if len(found) > MAX_RANGES:
        raise TreeError(f"the guest has {backend} in {len(found)} ranges, {MAX_RANGES} are the most")
    return found


def _view(text: str) -> list[str]:
    """The ranges' lines of the one view that processors see. TreeError."""
    views: list[list[str]] = []
    for block in re.split(r"\n\n", text.replace("\r\n", "\n").strip("\n")):
        lines = block.split("\n")
        if not _VIEW.fullmatch(lines[0]):
            raise TreeError(f"a line of the memory tree is not understood: {lines[0][:120]!r}")
        spaces = []
        at = 1
        while at < len(lines) and (match := _SPACE.fullmatch(lines[at])):
            spaces.append(match[1])
            at += 1
        if not spaces or at == len(lines) or not _ROOT.fullmatch(lines[at]):
            raise TreeError(f"a view of the memory tree is not understood: {block[:120]!r}")
        if ADDRESS_SPACE in spaces:
            views.append(lines[at + 1 :])
    if len(views) != 1 or views[0] == [_EMPTY]:
        raise TreeError(f"the memory tree has {len(views)} views of the address space {ADDRESS_SPACE!r}")
    return views[0]
