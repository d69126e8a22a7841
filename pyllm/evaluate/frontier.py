"""Quality against cost as a picture: KL to dense attention over the bulk bytes read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllm.evaluate.outputs import require_matplotlib
from pyllm.evaluate.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = "osD^vP*X"
COLOURS = 10  # of matplotlib's cycle
FLOOR = 1e-5  # nats; what is below, dense attention itself among it, stands at the plot's lower edge


@dataclass(frozen=True)
class Point:
    """A row's, of prefill or decode. read: % of dense attention's bytes; low, high: of the KL, if known."""

    text: str
    line: str
    setting: float | None
    read: float
    kl: float
    low: float | None
    high: float | None


def plot(rows: Sequence[Row], kind: str) -> bytes:
    """A panel per text and a line per policy, of prefill and below of decode, where that had tokens enough,
    as an image of that kind ("png", "svg", "pdf"). Raises UnsupportedError where matplotlib is missing."""
    require_matplotlib()
    figure = draw(rows)
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=90)
    return image.getvalue()


def draw(rows: Sequence[Row]) -> Figure:
    """A line has one colour and marker in all panels, and stands in the one legend."""
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row.text for row in rows))
    shown = {"": [*filter(None, map(_of_prefill, rows))]}
    lines = list(dict.fromkeys(point.line for point in shown[""]))
    if decoded := [*filter(None, map(_of_decode, rows))]:
        shown[" in decode"] = decoded
    figure = Figure(figsize=(5.4 * len(texts) + 1.6, 4.3 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), len(texts), sharey="row", squeeze=False)
    # A sketch may cost more than the pages that it spares.
    reach = max([100.0, *(point.read for points in shown.values() for point in points)])
    drawn: dict[str, Line2D] = {}
    for panels, (part, points) in zip(grid, shown.items(), strict=True):
        for text, panel in zip(texts, panels, strict=True):
            for number, line in enumerate(lines):
                if of_line := [point for point in points if (point.text, point.line) == (text, line)]:
                    drawn[line] = _draw(panel, number, of_line)
            panel.set(xlabel="bulk bytes read, % of dense", yscale="log", xlim=(-4, reach + 4))
            panel.set_title(f"{text}{part}", parse_math=False)  # a file's name
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("KL to dense, nats")
    handles = [drawn[line] for line in lines]
    legend = figure.legend(handles, lines, fontsize=8, loc="outside right upper")
    for name in legend.get_texts():
        name.set_parse_math(False)
    return figure


def _of_prefill(row: Row) -> Point | None:
    if row.bulk_read is None:
        return None
    return Point(row.text, row.line, row.setting, row.bulk_read, row.kl, row.kl_low, row.kl_high)


def _of_decode(row: Row) -> Point | None:
    if row.decode_kl is None or row.decode_bulk_read is None or not row.tells_decode:
        return None
    interval = row.decode_kl_low, row.decode_kl_high
    return Point(row.text, row.line, row.setting, row.decode_bulk_read, row.decode_kl, *interval)


def _draw(panel: Axes, number: int, points: Sequence[Point]) -> Line2D:
    """The line of that number."""
    x = [point.read for point in points]
    y = [max(point.kl, FLOOR) for point in points]
    low = [v - max(point.low or v, FLOOR) for v, point in zip(y, points, strict=True)]
    high = [(point.high or v) - v for v, point in zip(y, points, strict=True)]
    errors = [[max(0.0, v) for v in side] for side in (low, high)]
    for point, at, kl in zip(points, x, y, strict=True):
        if point.setting is not None:
            panel.annotate(f"{point.setting:g}", (at, kl), (4, 3), textcoords="offset points", fontsize=6)
    style: dict[str, Any] = {"color": f"C{number % COLOURS}", "marker": MARKERS[number % len(MARKERS)]}
    drawn = panel.errorbar(x, y, yerr=errors, markersize=5, linewidth=1.2, elinewidth=0.6, **style)
    return drawn.lines[0]
