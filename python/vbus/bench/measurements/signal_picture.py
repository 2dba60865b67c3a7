"""The picture of signals: panels of lines over the number of devices, and bars of an urgent request's latency.

Colour tells how signals travel, solid or dashed whether EVENT_IDX is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vbus.bench.plot import GREY, LIGHT, Drawing, Scale, linear, logarithmic, page, to_text

Row = dict[str, Any]

COLOURS = {"direct": "#c2410c", "tunnelled": "#1d4ed8"}
HEIGHT = 770
PANEL_WIDTH, PANEL_HEIGHT = 270, 220
LEFT, TOP, ACROSS, DOWN = 80, 160, 365, 325
"""Where the first panel's frame begins, and how far the next is."""


def draw(result: Row) -> str:
    """The picture of what the measurement of signals gave, as text of an SVG file."""
    options = result["options"]
    about = (
        f"{options['depth']} requests of {options['size']} bytes outstanding a device; medians ({options['rounds']} "
        "a variant), thin lines from smallest to largest. Consumers sleep when idle."
    )
    svg = page(result, "Signals: tunnelled against direct", about, HEIGHT)
    _legend(Drawing(svg))
    rows = [{**row, **row["case"], **row["variant"]} for row in result["rows"]]
    saturated = [row for row in rows if row["load"] == "saturated"]
    paced = [row for row in rows if row["load"] == "paced"]
    rate = f"{options['paced_rate']:g} requests/s"
    at = [(LEFT + ACROSS * column, TOP + DOWN * line) for line in range(2) for column in range(3)]
    each = "a request"
    _lines(Drawing(svg, *at[0]), "Under load: doorbells to the device", each, saturated, "doorbells_to_device")
    _lines(Drawing(svg, *at[1]), "Under load: doorbells to the driver", each, saturated, "doorbells_to_driver")
    _lines(Drawing(svg, *at[2]), "Under load: CPU time of both sides", "µs a request", saturated, "cpu_us")
    _lines(Drawing(svg, *at[3]), f"{rate}: doorbells to the device", each, paced, "doorbells_to_device")
    _lines(Drawing(svg, *at[4]), f"{rate}: doorbells to the driver", each, paced, "doorbells_to_driver")
    _urgent(Drawing(svg, *at[5]), [row for row in rows if row["load"] == "urgent"])
    return to_text(svg)


def _dashes(event_idx: bool) -> dict[str, str]:
    return {} if event_idx else {"stroke_dasharray": "6 4"}


def _legend(top: Drawing) -> None:
    x = LEFT - 50.0
    for signal, colour in COLOURS.items():
        for event_idx in (False, True):
            top.path([(x, 98), (x + 36, 98)], colour, **_dashes(event_idx))
            top.dot(x + 18, 98, colour, filled=event_idx)
            top.text(x + 44, 102, f"{signal}, EVENT_IDX {'on' if event_idx else 'off'}")
            x += 220


def _frame(panel: Drawing, title: str, unit: str, scale: Scale) -> None:
    panel.text(-45, -32, title, font_size="14", font_weight="bold")
    panel.text(-45, -15, unit, fill=GREY)
    for tick in scale.ticks:
        y = scale.to_pixel(tick)
        panel.line(0, y, PANEL_WIDTH, y, LIGHT)
        panel.text(-6, y + 4, f"{tick:g}", anchor="end", fill=GREY)
    panel.line(0, PANEL_HEIGHT, PANEL_WIDTH, PANEL_HEIGHT, GREY)


def _lines(panel: Drawing, title: str, unit: str, rows: Sequence[Row], key: str) -> None:
    """One value against the number of devices, a line a variant."""
    scale = linear(max((row["spread"][key][1] for row in rows), default=1), PANEL_HEIGHT)
    _frame(panel, title, unit, scale)
    counts = sorted({row["devices"] for row in rows})
    places = {count: PANEL_WIDTH * (number + 0.5) / len(counts) for number, count in enumerate(counts)}
    for count, x in places.items():
        panel.text(x, PANEL_HEIGHT + 18, str(count), anchor="middle")
    panel.text(PANEL_WIDTH / 2, PANEL_HEIGHT + 36, "devices", anchor="middle", fill=GREY)
    variants = [(signal, event_idx) for signal in COLOURS for event_idx in (False, True)]
    for number, (signal, event_idx) in enumerate(variants):
        line = [row for row in rows if (row["signal"], row["event_idx"]) == (signal, event_idx)]
        # A little apart, so that no line hides another's spread.
        points = [(places[row["devices"]] + 5 * (number - 1.5), scale.to_pixel(row["median"][key])) for row in line]
        panel.path(points, COLOURS[signal], **_dashes(event_idx))
        for (x, y), row in zip(points, line, strict=True):
            low, high = row["spread"][key]
            panel.line(x, scale.to_pixel(low), x, scale.to_pixel(high), COLOURS[signal])
            panel.dot(x, y, COLOURS[signal], filled=event_idx)


def _urgent(panel: Drawing, rows: Sequence[Row]) -> None:
    """Latency of one device among others: two bars a variant, the pale one up to the 99th percentile."""
    values = [row["spread"][key][end] for row in rows for key in ("p50_us", "p99_us") for end in (0, 1)]
    scale = logarithmic(min(values, default=10), max(values, default=1000), PANEL_HEIGHT)
    _frame(panel, "Latency of one request, asked at times", "µs; full colour: p50, pale: p99", scale)
    cases = list(dict.fromkeys((row["devices"], row["priority"]) for row in rows))
    room = PANEL_WIDTH / max(len(cases), 1)
    width = room * 0.3
    for number, (devices, priority) in enumerate(cases):
        middle = room * (number + 0.5)
        beside = f"beside {devices} busy" if devices else "idle bus"
        panel.text(middle, PANEL_HEIGHT + 18, beside, anchor="middle", font_size="11")
        panel.text(middle, PANEL_HEIGHT + 33, f"priority {priority}", anchor="middle", fill=GREY, font_size="11")
        for place, signal in enumerate(COLOURS):
            for row in rows:
                if (row["devices"], row["priority"], row["signal"]) == (devices, priority, signal):
                    _latency(panel, middle + (place - 1) * (width + 4) + 2, width, row, scale)


def _latency(panel: Drawing, x: float, width: float, row: Row, scale: Scale) -> None:
    colour = COLOURS[row["signal"]]
    for key, opacity in (("p99_us", "0.35"), ("p50_us", "1")):
        y = scale.to_pixel(row["median"][key])
        panel.bar(x, y, width, PANEL_HEIGHT, colour, opacity=opacity)
    low, high = row["spread"]["p99_us"]
    panel.line(x + width / 2, scale.to_pixel(low), x + width / 2, scale.to_pixel(high), colour)
    panel.text(
        x + width / 2, scale.to_pixel(high) - 4, f"{row['median']['p99_us']:.0f}", anchor="middle", font_size="10"
    )
    panel.text(
        x + width / 2,
        scale.to_pixel(row["median"]["p50_us"]) + 13,
        f"{row['median']['p50_us']:.0f}",
        anchor="middle",
        font_size="10",
        fill="white",
    )
