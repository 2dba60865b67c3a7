"""What a measurement is, for the harness that runs it.

A measurement has *cases*: a setting in which something is compared. A case has *variants*, which differ in one factor
and do the same work, and each run of a variant is a *sample*. *Comparisons* are of two variants of a case: ratios of
their figures, taken within a round; *guards* that must hold or the comparison does not count, since what was saved was
paid for elsewhere; and *bars*, which say how good the ratio must be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from vbus.bench.measure import Summary
from vbus.bench.peers import Peer
from vbus.bench.tables import Table, rows_table, verdicts_table

Row = dict[str, Any]
Say = Callable[[int, int, str], None]
"""Told before each sample: its number from 0, how many there are, what it is."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. Measurements add their own numbers."""

    rounds: int = 5
    quick: bool = False
    """Enough to see that it works, and too little to believe the figures."""
    peer: bool = False
    """Whether other people's programs take part."""


@dataclass(frozen=True)
class Factors:
    """What a case or a variant is: names and values, as they are printed."""

    def factors(self) -> Row:
        """Names and values."""
        return asdict(self)

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.factors().items())


@dataclass(frozen=True)
class Sample:
    """One run of a variant: what was done, and what it took."""

    work: Mapping[str, Any]
    """Alike for all variants of a case, or there is no comparison. Mappings in it are compared item by item."""
    values: Mapping[str, float]


@dataclass(frozen=True)
class Bar:
    """What the median ratio of a value must be: at most `limit`, or at least."""

    value: str
    what: str
    """What the value is called, in a verdict."""
    limit: float
    at_least: bool = False
    unit: str = "x"
    """Of what is compared with the limit: a ratio, or the value itself where there is nothing to hold it against."""

    def is_met(self, ratio: float) -> bool:
        """Whether this ratio is good enough."""
        return ratio >= self.limit if self.at_least else ratio <= self.limit

    def objection(self, ratio: float) -> str:
        """Why a ratio is not good enough."""
        return (
            f"{self.what} {ratio:.3f}{self.unit}, {'less' if self.at_least else 'more'} than {self.limit:g}{self.unit}"
        )

    def __str__(self) -> str:
        return f"{self.what} {'at least' if self.at_least else 'at most'} {self.limit:g}{self.unit}"


V = TypeVar("V", bound=Factors)
C = TypeVar("C", bound=Factors)
P = TypeVar("P", bound=Plan)


@dataclass(frozen=True)
class Comparison(Generic[V]):
    """Two variants of a case, by the figures of which one is held against the other; or one, by its figures alone."""

    of: V
    against: V | None = None
    bars: tuple[Bar, ...] = ()
    guards: tuple[Bar, ...] = ()

    def judge(self, found: Mapping[str, Summary | None]) -> tuple[list[str], list[Row]]:
        """Why the ratios do not count, if they do not; and of each bar, whether it is met."""
        why = [
            guard.objection(value.median)
            for guard in self.guards
            if (value := found.get(guard.value)) is not None and not guard.is_met(value.median)
        ]
        bars = [
            {**asdict(bar), "ratio": value.median, "met": not why and bar.is_met(value.median)}
            for bar in self.bars
            if (value := found.get(bar.value)) is not None
        ]
        return why, bars


@dataclass(frozen=True)
class Figure:
    """A value as tables and plots show it."""

    key: str
    heading: str
    unit: str = ""
    digits: int = 0
    compared: bool = False
    """Whether its ratios are shown."""
    plotted: bool = False


class Measurement(ABC, Generic[P, C, V]):
    """One thing that is measured. A module in `measurements` has one of these, called MEASUREMENT."""

    name: ClassVar[str]
    title: ClassVar[str]
    figures: ClassVar[Sequence[Figure]]
    template: ClassVar[str]
    """What the figures say, in Markdown, with the names of `numbers` in braces."""
    page_head: ClassVar[str] = ""
    """How a page begins of which this is the first, in Markdown; by default as that of benchmarks."""
    needs: ClassVar[Sequence[Peer]] = ()
    """Other people's programs without which nothing can be measured."""
    peers: ClassVar[Sequence[Peer]] = ()
    """Other people's programs that can take part."""

    @abstractmethod
    def plan(self, quick: bool) -> P:
        """How much is measured; `quick`: enough to see that it works, and too little to believe the figures."""

    @abstractmethod
    def cases(self, plan: P) -> Sequence[C]:
        """What is measured."""

    @abstractmethod
    def variants(self, plan: P, case: C) -> Sequence[V]:
        """What is compared in a case."""

    @abstractmethod
    def comparisons(self, plan: P, case: C) -> Sequence[Comparison[V]]:
        """What is held against what."""

    def taking_part(self, plan: P) -> Sequence[Peer]:
        """Other people's programs that do."""
        return self.peers if plan.peer else ()

    def prepare(self, plan: P, folder: Path) -> None:
        """Make what all runs use, in a folder that is there until the last of them has ended."""

    def finish(self) -> None:
        """End what `prepare` has started, or has begun to start; called once after it."""

    @abstractmethod
    def sample(self, plan: P, case: C, variant: V, folder: Path) -> Sample:
        """Run one variant once. `folder` is empty and for this run, in the folder of `prepare`. SideError,
        UnequalWorkError: no sample.
        """

    @abstractmethod
    def numbers(self, result: Row) -> Mapping[str, float]:
        """What the template names, from the result alone."""

    def words(self, result: Row) -> str:
        """What the figures say, for the page of benchmarks: Markdown."""
        return self.template.format(**self.numbers(result))

    def notes(self, result: Row) -> list[str]:
        """What must be known beside the figures: a line each."""
        return []

    def tables(self, result: Row) -> list[Table]:
        """What is printed."""
        return [rows_table(result, self.figures), verdicts_table(result, self.figures)]

    def draw(self, result: Row) -> str:
        """The picture: text of an SVG file."""
        from vbus.bench.plot import bars

        return bars(result, self.title, self.figures)


AnyMeasurement = Measurement[Any, Any, Any]
