"""QEMU's memory tree, read: what QEMU 10 says of several machines, and what nobody should believe."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmp_server import tree
from vbus.connectors.memory_tree import MAX_RANGES, PAGE, Range, TreeError, backend_ranges

MIB, GIB = 1 << 20, 1 << 30
SAID = {path.stem: path.read_text() for path in (Path(__file__).parent / "memory_trees").glob("*.txt")}
"""By machine: q35 with more than fits below 4 GiB, q35 that has half of 256 MiB there, ..."""
LOW = Range(0, 0xC0000, 0)
LINE = "  0000000000100000-0000000007ffffff (prio 0, ram): mem @0000000000100000 owner:{obj path=/objects/mem}\n"


@pytest.mark.parametrize(
    ("machine", "size", "ranges"),
    [
        ("q35-6g", 6 * GIB, [LOW, Range(MIB, 2 * GIB - MIB, MIB), Range(4 * GIB, 4 * GIB, 2 * GIB)]),
        ("q35-split", 256 * MIB, [LOW, Range(MIB, 127 * MIB, MIB), Range(4 * GIB, 128 * MIB, 128 * MIB)]),
        ("q35-kvm", 256 * MIB, [LOW, Range(MIB, 255 * MIB, MIB)]),
        ("pseries", 256 * MIB, [Range(0, 256 * MIB, 0)]),
    ],
)
def test_what_qemu_says_of_machines(machine: str, size: int, ranges: list[Range]) -> None:
    assert backend_ranges(SAID[machine], "mem", size) == ranges
    # Lines may end as monitors' lines do.
    assert backend_ranges(SAID[machine].replace("\n", "\r\n"), "mem", size) == ranges
    with pytest.raises(TreeError, match="beyond its"):
        backend_ranges(SAID[machine], "mem", size - PAGE)
    with pytest.raises(TreeError, match="has nothing of me"):
        backend_ranges(SAID[machine], "me", size)


def test_what_is_not_the_guests_to_write_is_left_out() -> None:
    said = SAID["q35-split"]
    assert LINE in said
    for other in ("rom", "romd", "ramd", "i/o", "nv-ram"):
        found = backend_ranges(said.replace(LINE, LINE.replace(", ram)", f", {other})")), "mem", 256 * MIB)
        assert found == [LOW, Range(4 * GIB, 128 * MIB, 128 * MIB)], other
    # What is called so, and is somebody else's.
    for owner in ("obj path=/objects/other", "dev id=mem", "dev path=/objects/mem"):
        found = backend_ranges(said.replace(LINE, LINE.replace("obj path=/objects/mem", owner)), "mem", 256 * MIB)
        assert found == [LOW, Range(4 * GIB, 128 * MIB, 128 * MIB)], owner
    parts = LINE.replace("7ffffff ", "7fffdff ")
    assert backend_ranges(said.replace(LINE, parts), "mem", 256 * MIB) == [LOW, Range(4 * GIB, 128 * MIB, 128 * MIB)]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "  something new",
        LINE.replace("(prio 0, ram)", "(prio 0, ram, discarded)"),
        LINE.replace("(prio 0, ram)", "(prio 0, cxl)"),
        LINE.replace(" owner:{obj path=/objects/mem}", ""),
        LINE.replace("@0000000000100000", "@0x100000"),
        LINE.replace("0000000000100000-", "100000-"),
        LINE.replace(
            "owner:{obj path=/objects/mem}", "owner:{obj path=/objects/mem} owner:{dev id=x} owner:{dev id=y}"
        ),
        LINE.replace("\n", " KVM and more\n"),
        LINE.replace("mem @", "{mem} @"),
        # Behind its end, and in what comes before it.
        LINE.replace("0000000007ffffff", "00000000000fffff"),
        LINE.replace("0000000000100000-", "00000000000bffff-"),
    ],
)
def test_a_line_that_is_not_known_spoils_all_of_it(line: str) -> None:
    said = SAID["q35-split"].replace(LINE, f"{line.rstrip(chr(10))}\n")
    with pytest.raises(TreeError):
        backend_ranges(said, "mem", 256 * MIB)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "\n",
        "unknown command: 'info mtree'\n",
        "FlatView #0\n",
        tree((0, MIB, 0)) + "\n" + tree((0, MIB, 0)),
        tree((0, MIB, 0)).replace('"memory"', '"memoir"'),
        tree((0, MIB, 0)).replace(" Root memory region: system\n", ""),
        re.sub(r"  0.*\n", "  No rendered FlatView\n", tree((0, MIB, 0))),
        tree(),
        tree(*((at * 2 * PAGE, PAGE, at * PAGE) for at in range(MAX_RANGES + 1))),
        tree((0, MIB, 0)) + " " * (4 << 20),
    ],
)
def test_a_tree_that_is_none_is_not_believed(said: str) -> None:
    with pytest.raises(TreeError):
        backend_ranges(said, "mem", GIB)


pages = st.integers(1, 1 << 20)


@given(st.lists(st.tuples(st.integers(0, 1 << 20), pages, pages), min_size=1, max_size=MAX_RANGES))
def test_ranges_are_found_as_they_were_said(steps: list[tuple[int, int, int]]) -> None:
    ranges, at = [], 0
    for gap, count, offset in steps:
        ranges.append((at + gap * PAGE, count * PAGE, offset * PAGE))
        at += (gap + count) * PAGE
    size = max(offset + count for _, count, offset in ranges)
    assert backend_ranges(tree(*ranges), "mem", size) == [Range(*each) for each in ranges]


@given(st.data())
def test_whatever_it_says_ranges_are_in_order_and_inside(data: st.DataObject) -> None:
    """A tree that something was changed in."""
    said = SAID[data.draw(st.sampled_from(sorted(SAID)))]
    at = data.draw(st.integers(0, len(said)))
    cut = data.draw(st.integers(0, 40))
    put = data.draw(st.text(alphabet="0123456789abcdef-() ,:{}\n@ramowneri/" + "mem", max_size=40))
    with contextlib.suppress(TreeError):
        end = 0
        for found in backend_ranges(said[:at] + put + said[at + cut :], "mem", 256 * MIB):
            assert end <= found.address
            assert found.size > 0
            assert found.offset + found.size <= 256 * MIB
            assert not (found.address | found.size | found.offset) % PAGE
            end = found.address + found.size


@given(st.text(max_size=400))
def test_no_text_is_too_odd(said: str) -> None:
    with pytest.raises(TreeError):
        backend_ranges(said, "mem", GIB)
