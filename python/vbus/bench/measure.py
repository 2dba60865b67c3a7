"""Comparing variants fairly: they run in turns, do the same work, and are summed up by medians.

A round runs every variant once, every other round in reverse, so that what drifts (heat, neighbours) hits all alike.
Before anything is summed up, all samples must have done the same work, or there is no figure. Ratios are taken within a
round, between runs that were close in time, and then the median of the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vbus.errors import Error

V = TypeVar("V", bound=Hashable)
T = TypeVar("T")


class UnequalWorkError(Error):
    """Two sides of a comparison did not do the same work, so that their figures say nothing."""


@dataclass(frozen=True)
class Summary:
    """Values of several rounds in short."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Median, smallest and largest of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The value of an ascending sequence below or at which `percent` of 100 of it lie (the nearest rank)."""
    if not ordered:
        raise ValueError("a percentile of nothing")
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def alternate(variants: Sequence[V], rounds: int) -> Iterator[tuple[int, V]]:
    """(round, variant), in the order in which they are to be run."""
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            yield number, variant


def run_alternately(variants: Sequence[V], rounds: int, run: Callable[[int, V], T]) -> dict[V, list[T]]:
    """The samples of every variant, by round."""
    samples: dict[V, list[T]] = {variant: [] for variant in variants}
    for number, variant in alternate(variants, rounds):
        samples[variant].append(run(number, variant))
    return samples


def flat(work: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Work without mappings in it: their items by their names, one after the other."""
    items: dict[str, Any] = {}
    for key, value in work.items():
        items |= flat(value, f"{before}{key} ") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return items


def check_same_work(what: str, works: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """UnequalWorkError unless all of (whose, work) are one work, with no wrong answer in it."""
    first_whose, first = works[0]
    for whose, work in works:
        for key in sorted({*first, *work}):
            if first.get(key) != work.get(key):
                raise UnequalWorkError(
                    f"{what}: unequal work, so no figures: {key} is {first.get(key)} ({first_whose}) "
                    f"and {work.get(key)} ({whose})"
                )


def summarise(rounds: Sequence[Mapping[str, float]]) -> dict[str, Summary]:
    """Of every value that the rounds have, its summary."""
    return {key: Summary.of([values[key] for values in rounds]) for key in rounds[0]}


def ratios(rounds: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> dict[str, Summary | None]:
    """Of every value that both have, its ratio to that of `base` in the same round, summed up; None where base has a
    zero.
    """
    found: dict[str, Summary | None] = {}
    for key in (key for key in rounds[0] if key in base[0]):
        pairs = [(values[key], others[key]) for values, others in zip(rounds, base, strict=True)]
        found[key] = Summary.of([value / other for value, other in pairs]) if all(o for _, o in pairs) else None
    return found
