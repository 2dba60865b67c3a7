"""The picture of exits: interrupts and doorbells a request, at full speed, against what disks serve, and of networks.

A colour for each way that the guest has a device; points are medians, thin lines go from the smallest to the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vbus.bench.guest_side import DIRECT, PCI, TUNNELLED, WINDOW
from vbus.bench.plot import GREY, LIGHT, Drawing, Scale, linear, page, to_text

Row = dict[str, Any]

COLOURS = {PCI: "#c2410c", DIRECT: "#15803d", TUNNELLED: "#1d4ed8", WINDOW: "#7e22ce"}
NAMES = {PCI: "virtio-pci", DIRECT: "ivshmem, direct", TUNNELLED: "ivshmem, tunnelled", WINDOW: "tunnelled, copying"}
FIGURES = (("interrupts", "Interrupts of the guest"), ("doorbells", "Doorbells of the guest"))
PANEL_WIDTH, PANEL_HEIGHT = 460, 200
LEFT, TOP, ACROSS, DOWN = 80, 165, 540, 310


def draw(result: Row) -> str:
    """The picture of what the measurement of exits gave, as text of an SVG file."""
    rows = [{**row, **row["case"], **row["variant"]} for row in result["rows"]]
    lines = [
        (", disks at full speed", [row for row in rows if row["work"] == "read" and row["offered"] == "full"]),
        (", against what disks serve", [row for row in rows if row["offered"] != "full"]),
        (", networks", [row for row in rows if row["work"] != "read"]),
    ]
    lines = [(title, found) for title, found in lines if found]
    about = (
        f"Counts a request; medians of {result['options']['rounds']} rounds, thin lines from smallest to largest. "
        f"Accelerator: {result['rows'][0]['work']['accelerator']}."
    )
    svg = page(result, "Exits: doorbells and interrupts of a guest", about, TOP + DOWN * len(lines) - 20)
    _legend(Drawing(svg))
    for line, (title, found) in enumerate(lines):
        for column, (key, name) in enumerate(FIGURES):
            _panel(Drawing(svg, LEFT + ACROSS * column, TOP + DOWN * line), name + title, found, key)
    return to_text(svg)


def _legend(top: Drawing) -> None:
    x = LEFT - 50.0
    for signal, colour in COLOURS.items():
        top.dot(x + 10, 98, colour, filled=True)
        top.text(x + 22, 102, NAMES[signal])
        x += 200


def _label(row: Row) -> str:
    if row["offered"] != "full":
        return str(row["offered"])
    what = "" if row["work"] == "read" else f"{row['work']} "
    return f"{what}{row['devices']}x{row['depth']}"


def _panel(panel: Drawing, title: str, rows: Sequence[Row], key: str) -> None:
    """A value of each case, a point a way."""
    scale = linear(max(row["spread"][key][1] for row in rows), PANEL_HEIGHT)
    _frame(panel, title, scale)
    cases = list(dict.fromkeys(map(_label, rows)))
    room = PANEL_WIDTH / len(cases)
    for number, case in enumerate(cases):
        panel.text(room * (number + 0.5), PANEL_HEIGHT + 18, case, anchor="middle", font_size="11")
    unit = "devices x at once" if rows[0]["offered"] == "full" else "of what the guest asks for at full speed"
    panel.text(PANEL_WIDTH / 2, PANEL_HEIGHT + 36, unit, anchor="middle", fill=GREY)
    for place, (signal, colour) in enumerate(COLOURS.items()):
        for row in rows:
            if row["signal"] == signal:
                # Beside each other, so that none hides another's spread.
                x = room * (cases.index(_label(row)) + 0.2 + 0.2 * place)
                low, high = row["spread"][key]
                panel.line(x, scale.to_pixel(low), x, scale.to_pixel(high), colour)
                panel.dot(x, scale.to_pixel(row["median"][key]), colour, filled=True)


def _frame(panel: Drawing, title: str, scale: Scale) -> None:
    panel.text(-45, -32, title, font_size="14", font_weight="bold")
    panel.text(-45, -15, "a request", fill=GREY)
    for tick in scale.ticks:
        y = scale.to_pixel(tick)
        panel.line(0, y, PANEL_WIDTH, y, LIGHT)
        panel.text(-6, y + 4, f"{tick:g}", anchor="end", fill=GREY)
    panel.line(0, PANEL_HEIGHT, PANEL_WIDTH, PANEL_HEIGHT, GREY)
