"""A request's data as a list of memoryviews on the driver's memory, and the few things that devices do with such lists.

None of this copies; every view stays a window on memory that the driver may change at the same moment, so nothing here
reads a byte to decide by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

IOV_MAX = 1024
"""Buffers that one system call takes (`sysconf(_SC_IOV_MAX)` on Linux)."""

_ZEROS = bytes(64 << 10)


def skip(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` after their first `count` bytes, without empty ones."""
    rest = [buffer for buffer in buffers if len(buffer)]
    first = 0
    while first < len(rest) and count >= len(rest[first]):
        count -= len(rest[first])
        first += 1
    rest = rest[first:]
    if count and rest:
        rest[0] = rest[0][count:]
    return rest


def split_last(buffers: Sequence[memoryview]) -> tuple[list[memoryview], memoryview]:
    """(all but the last byte, the last byte). ValueError when there is no byte."""
    rest = skip(buffers, 0)
    if not rest:
        raise ValueError("no byte to split off")
    last = rest.pop()
    if len(last) > 1:
        rest.append(last[:-1])
    return rest, last[-1:]


def clear(buffers: Sequence[memoryview]) -> None:
    """Fill with zeros."""
    for buffer in buffers:
        for start in range(0, len(buffer), len(_ZEROS)):
            part = buffer[start : start + len(_ZEROS)]
            part[:] = _ZEROS[: len(part)]


def scatter(data: bytes, buffers: Sequence[memoryview]) -> None:
    """Lay `data` over the beginning of `buffers`, which must have room for it."""
    for buffer in buffers:
        part, data = data[: len(buffer)], data[len(buffer) :]
        buffer[: len(part)] = part


def move(
    call: Callable[[int, Sequence[memoryview], int], int], fd: int, buffers: Sequence[memoryview], offset: int
) -> list[memoryview]:
    """Repeat `call` (`os.preadv` or the like) until all of `buffers` is moved, or it moves nothing more.

    Returns what was not moved: none, or what lay beyond the end of the file. OSError as the call raises it.
    """
    rest = skip(buffers, 0)
    while rest:
        moved = call(fd, rest[:IOV_MAX], offset)
        if moved == 0:
            break
        offset += moved
        rest = skip(rest, moved)
    return rest
