"""Tables of what was measured, made once, and shown on a terminal or on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vbus.bench.measurement import Figure

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text, below headings, below a line that says what they are."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def numeric(self) -> list[bool]:
        """Of every column, whether it holds numbers, which stand on the right."""
        return [
            all(row[number][:1].isdigit() or row[number] == "-" for row in self.rows)
            for number in range(len(self.headings))
        ]

    def aligned(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, each as wide as its column."""
        columns = []
        for number, (heading, right) in enumerate(zip(self.headings, self.numeric(), strict=True)):
            column = [heading, *(row[number] for row in self.rows)]
            width = max(map(len, column))
            columns.append([text.rjust(width) if right else text for text in column])
        first, *others = ([*line] for line in zip(*columns, strict=True))
        return first, others

    def markdown(self) -> str:
        """For a page."""
        rule = ["---:" if right else "---" for right in self.numeric()]
        lines = [[heading.lower() for heading in self.headings], rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(middle: float | None, ends: Sequence[float] | None, digits: int = 2) -> str:
    """A median with the smallest and the largest of its rounds."""
    if middle is None or ends is None:
        return "-"
    return f"{middle:.{digits}f} ({ends[0]:.{digits}f}-{ends[1]:.{digits}f})"


def cell(value: object) -> str:
    """A factor's value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if value is not None else "-"


def rows_table(result: Row, figures: Sequence[Figure]) -> Table:
    """A row a variant of a case: its factors and its medians, with the spread of those that are compared."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in (*row["case"], *row["variant"])))
    shown = [figure for figure in figures if any(figure.key in row["median"] for row in result["rows"])]
    rows = []
    for row in result["rows"]:
        factors = {**row["case"], **row["variant"]}
        cells = [cell(factors.get(name)) for name in names]
        for figure in shown:
            middle, ends = row["median"].get(figure.key), row["spread"].get(figure.key)
            if figure.compared or middle is None:
                cells.append(spread(middle, ends, figure.digits))
            else:
                cells.append(f"{middle:.{figure.digits}f}")
        rows.append(cells)
    title = f"medians of {result['options']['rounds']} rounds (in brackets: the smallest and the largest)"
    headings = [*(name.replace("_", " ").upper() for name in names), *(figure.heading for figure in shown)]
    return Table(title, headings, rows)


def verdict(row: Row) -> str:
    """What became of a comparison."""
    if not row["counts"]:
        return f"does not count: {', '.join(row['why'])}"
    if not row["bars"]:
        return "counts"
    return "; ".join(f"{'meets' if bar['met'] else 'MISSES'} {limit(bar)}" for bar in row["bars"])


def limit(bar: Row) -> str:
    """A bar in words."""
    return f"{'at least' if bar['at_least'] else 'at most'} {bar['limit']:g}x"


def named(factors: Row) -> str:
    """A variant in words."""
    return ", ".join(
        cell(value) if not isinstance(value, bool) else f"{key.replace('_', ' ')} {cell(value)}"
        for key, value in factors.items()
    )


def verdicts_table(result: Row, figures: Sequence[Figure]) -> Table:
    """A row a comparison: ratios with their spread, and what became of it."""
    names = list(dict.fromkeys(name for row in result["comparisons"] for name in row["case"]))
    shown = [
        figure
        for figure in figures
        if figure.compared and any(figure.key in row["ratios"] for row in result["comparisons"])
    ]
    rows = [
        [
            *(cell(row["case"].get(name)) for name in names),
            named(row["of"]),
            named(row["against"]),
            *(spread(row["ratios"].get(figure.key), row["spread"].get(figure.key)) for figure in shown),
            verdict(row),
        ]
        for row in result["comparisons"]
    ]
    headings = [
        *(name.replace("_", " ").upper() for name in names),
        *("OF", "AGAINST"),
        *(figure.heading for figure in shown),
        "VERDICT",
    ]
    return Table("ratios within a round: the median, the smallest and the largest", headings, rows)
