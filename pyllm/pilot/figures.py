"""The report's figures, each an SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pyllm.evaluate import report
from pyllm.evaluate.results import Row
from pyllm.pilot.heads import PROMISE, Heads
from pyllm.survey import plot
from pyllm.survey.result import Survey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_HEADS = 6  # of which distributions are drawn
SHARE_BINS = 25


def lengths(survey: Survey) -> bytes:
    return plot.plot(survey, "svg")


def frontier(pooled: Sequence[Row]) -> bytes:
    """KL against bulk bytes read, a line per policy. pooled: a row per policy, all of the same text."""
    return report.plot(pooled, "svg")


def heat_map(heads: Heads, policy: str) -> bytes:
    """Long-head rates by layer and head: true ones, and those of the policy."""
    figure = _figure(9, 1.2 + 0.17 * len(heads.truly_long))
    panels = figure.subplots(1, 2, sharey=True)
    titles = (f"window holds under {PROMISE:g} of the attention", f"called long by {policy}")
    for panel, title, rates in zip(panels, titles, (heads.truly_long, heads.called_long), strict=True):
        image = panel.imshow(100 * rates, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
        panel.set(xlabel="query head")
        panel.set_title(title, fontsize=9)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="% of queries")
    return _svg(figure)


def distributions(heads: Heads) -> bytes:
    """How the window's true share is distributed over queries, for heads from the most local to the most
    distant."""
    figure = _figure(9, 4.2)
    panels = figure.subplots(2, SHOWN_HEADS // 2, sharex=True, sharey=True).ravel()
    bins = np.linspace(0, 1, SHARE_BINS + 1)
    for panel, (layer, head) in zip(panels, spread(heads.truly_long, SHOWN_HEADS), strict=False):
        values = heads.local_share[:, layer, head]
        panel.hist(values, bins=bins.tolist(), weights=np.full(len(values), 100 / len(values)))
        panel.axvline(PROMISE, color="C1", linestyle="--")
        panel.set_title(f"layer {layer}, head {head}: {(values < PROMISE).mean():.0%} long", fontsize=9)
    for panel in panels[SHOWN_HEADS // 2 :]:
        panel.set_xlabel("true share of sinks and window")
    for panel in panels[:: SHOWN_HEADS // 2]:
        panel.set_ylabel("% of queries")
    return _svg(figure)


def spread(rates: NDArray[np.float64], n: int) -> list[tuple[int, int]]:
    """(layer, head) of at most n heads, evenly from the lowest rate to the highest."""
    order = np.argsort(rates, axis=None, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, n).round().astype(int))]
    return [(int(i) // rates.shape[1], int(i) % rates.shape[1]) for i in chosen]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="svg")
    return image.getvalue()
