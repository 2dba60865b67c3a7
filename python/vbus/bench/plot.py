"""Figures as one SVG picture, drawn by hand: a few panels of lines and bars need no library.

Points and bars are medians; thin lines go from the smallest value of all rounds to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from vbus.bench.tables import named

if TYPE_CHECKING:
    from vbus.bench.measurement import Figure

Row = dict[str, Any]

COLOURS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490")
GREY, LIGHT = "#475569", "#e2e8f0"
WIDTH = 1120
MARGIN = 30
BAR, BETWEEN = 18, 8
LABELS, ROOM = 380, 560
"""Pixels across for the names of bars, and for the longest bar."""


@dataclass(frozen=True)
class Scale:
    """Values of an axis to pixels, and where its ticks are."""

    to_pixel: Callable[[float], float]
    ticks: Sequence[float]


def linear(most: float, length: float) -> Scale:
    """From 0 to at least `most`, over `length` pixels upwards, with four to eight ticks at round values."""
    step = 10.0 ** math.floor(math.log10(most)) if most > 0 else 1.0
    while most / step < 4:
        step /= 2
    while most / step > 8:
        step *= 2
    count = max(math.ceil(most / step - 1e-9), 1)
    return Scale(lambda value: length * (1 - value / (count * step)), [number * step for number in range(count + 1)])


def logarithmic(least: float, most: float, length: float) -> Scale:
    """From the power of ten below `least` to the one above `most`."""
    low = math.floor(math.log10(least))
    high = max(math.ceil(math.log10(most)), low + 1)
    ticks = [10.0**power for power in range(low, high + 1)]
    return Scale(lambda value: length * (1 - (math.log10(value) - low) / (high - low)), ticks)


class Drawing:
    """Elements of an SVG file, placed relative to a corner."""

    def __init__(self, parent: ElementTree.Element, x: float = 0, y: float = 0) -> None:
        self._group = ElementTree.SubElement(parent, "g", transform=f"translate({x:g} {y:g})")

    def text(self, x: float, y: float, text: str, *, anchor: str = "start", **style: str) -> None:
        """A line of text; `anchor`: start, middle or end of it is at x."""
        element = ElementTree.SubElement(
            self._group, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, **_attributes(style)}
        )
        element.text = text

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, **style: str) -> None:
        """A straight line."""
        places = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        ElementTree.SubElement(self._group, "line", places | {"stroke": colour} | _attributes(style))

    def path(self, points: Sequence[tuple[float, float]], colour: str, **style: str) -> None:
        """Points, joined."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        ElementTree.SubElement(
            self._group,
            "polyline",
            {"points": joined, "fill": "none", "stroke": colour, "stroke-width": "2"} | _attributes(style),
        )

    def dot(self, x: float, y: float, colour: str, *, filled: bool) -> None:
        """A point of a line."""
        look = {"fill": colour if filled else "white", "stroke": colour, "stroke-width": "2"}
        ElementTree.SubElement(self._group, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3.5"} | look)

    def bar(self, x: float, y: float, width: float, bottom: float, colour: str, **style: str) -> None:
        """A bar from the bottom up to y."""
        places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{max(bottom - y, 0):.1f}"}
        ElementTree.SubElement(self._group, "rect", places | {"fill": colour} | _attributes(style))

    def across(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A bar from x to the right."""
        places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
        ElementTree.SubElement(self._group, "rect", places | {"fill": colour})


def _attributes(style: dict[str, str]) -> dict[str, str]:
    return {key.replace("_", "-"): value for key, value in style.items()}


def page(result: Row, title: str, about: str, height: float) -> ElementTree.Element:
    """An empty picture below its headline, what it is about, and where it was measured."""
    svg = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {WIDTH} {height:g}",
            "width": str(WIDTH),
            "height": f"{height:g}",
            "font-family": "sans-serif",
            "font-size": "12",
            "fill": "#0f172a",
        },
    )
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    machine = result["machine"]
    top = Drawing(svg)
    top.text(MARGIN, 34, title, font_size="20", font_weight="bold")
    top.text(MARGIN, 56, about, fill=GREY)
    top.text(
        MARGIN,
        74,
        f"{machine['cpu']}, {machine['cpus']} CPUs; {machine['kernel']}; {machine['python']}; vbus {machine['vbus']}",
        fill=GREY,
    )
    return svg


def to_text(svg: ElementTree.Element) -> str:
    """The text of an SVG file."""
    return ElementTree.tostring(svg, encoding="unicode", xml_declaration=True) + "\n"


def bars(result: Row, title: str, figures: Sequence[Figure]) -> str:
    """A picture with a panel a figure, and a bar a variant of a case in it: text of an SVG file."""
    plotted = [
        (figure, rows)
        for figure in figures
        if figure.plotted and (rows := [row for row in result["rows"] if figure.key in row["median"]])
    ]
    tops = [110.0]
    for _, rows in plotted:
        tops.append(tops[-1] + 60 + len(rows) * (BAR + BETWEEN))
    about = f"Medians of {result['options']['rounds']} rounds; thin lines from the smallest to the largest."
    svg = page(result, title, about, tops[-1])
    for top, (figure, rows) in zip(tops, plotted, strict=False):
        _panel(Drawing(svg, MARGIN, top), figure, rows)
    return to_text(svg)


def _panel(panel: Drawing, figure: Figure, rows: Sequence[Row]) -> None:
    panel.text(0, 0, f"{figure.heading.lower()}, {figure.unit}", font_size="14", font_weight="bold")
    scale = linear(max(row["spread"][figure.key][1] for row in rows), ROOM)
    height = len(rows) * (BAR + BETWEEN)
    for tick in scale.ticks:
        x = LABELS + ROOM - scale.to_pixel(tick)
        panel.line(x, 12, x, 12 + height, LIGHT)
        panel.text(x, 26 + height, f"{tick:g}", anchor="middle", fill=GREY)
    variants = list(dict.fromkeys(named(row["variant"]) for row in rows))
    for number, row in enumerate(rows):
        y = 12 + number * (BAR + BETWEEN)
        colour = COLOURS[variants.index(named(row["variant"])) % len(COLOURS)]
        low, middle, high = (
            ROOM - scale.to_pixel(value)
            for value in (row["spread"][figure.key][0], row["median"][figure.key], row["spread"][figure.key][1])
        )
        name = ": ".join(filter(None, (named(row["case"]), named(row["variant"]))))
        panel.text(LABELS - 8, y + BAR - 4, name, anchor="end")
        panel.across(LABELS, y, middle, BAR, colour)
        panel.line(LABELS + low, y + BAR / 2, LABELS + high, y + BAR / 2, "#0f172a")
        panel.text(LABELS + high + 6, y + BAR - 4, f"{row['median'][figure.key]:.{figure.digits}f}")
