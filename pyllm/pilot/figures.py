"""The report's figures, each an SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyllm.evaluate import frontier as tradeoff
from pyllm.evaluate.results import Row
from pyllm.pilot.heads import PROMISE, Heads
from pyllm.survey import plot
from pyllm.survey.result import Survey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_HEADS = 6  # of which distributions are drawn
BINS = 25


def lengths(survey: Survey) -> bytes:
    return plot.plot(survey, "svg")


def frontier(pooled: Sequence[Row]) -> bytes:
    """KL against bulk bytes read, a line per policy. pooled: a row per policy, all of the same text."""
    return tradeoff.plot(pooled, "svg")


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


def shares(heads: Heads) -> bytes:
    """How the window's true share is distributed over queries, for some heads."""
    figure = _figure(9, 4.2)
    panels = figure.subplots(2, SHOWN_HEADS // 2, sharex=True, sharey=True)
    bins = np.linspace(0, 1, BINS + 1)
    for panel, layer, head in _shown(heads, panels):
        values = heads.local_share[:, layer, head]
        panel.hist(values, bins=bins.tolist(), weights=_percent(values))
        panel.axvline(PROMISE, color="C1", linestyle="--")
        panel.set_title(f"layer {layer}, head {head}: {(values < PROMISE).mean():.0%} long", fontsize=9)
    _label(panels, "true share of sinks and window")
    return _svg(figure)


def masses(heads: Heads) -> bytes:
    """How the scores of the window and those of the whole context, each set summed up in its mass, are
    distributed over queries, for the same heads."""
    figure = _figure(9, 4.2)
    panels = figure.subplots(2, SHOWN_HEADS // 2)
    for panel, layer, head in _shown(heads, panels):
        window, whole = (mass[:, layer, head] for mass in (heads.local_mass, heads.whole_mass))
        bins = np.histogram_bin_edges(np.concatenate([window, whole]), BINS).tolist()
        panel.hist(window, bins=bins, weights=_percent(window), alpha=0.6, label="sinks and window")
        panel.hist(whole, bins=bins, weights=_percent(whole), histtype="step", color="C1", label="whole")
        panel.set_title(f"layer {layer}, head {head}", fontsize=9)
    panels[0, 0].legend(fontsize=8)
    _label(panels, "log of summed exp(score)")
    return _svg(figure)


def _shown(heads: Heads, panels: NDArray[Any]) -> Iterator[tuple[Any, int, int]]:
    """A panel each for heads from the most local to the most distant."""
    for panel, (layer, head) in zip(panels.flat, spread(heads.truly_long, SHOWN_HEADS), strict=False):
        yield panel, layer, head


def _percent(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Weights that make a histogram's bars % of the queries."""
    return np.full(len(values), 100 / len(values))


def _label(panels: NDArray[Any], x: str) -> None:
    for panel in panels[-1]:
        panel.set_xlabel(x)
    for panel in panels[:, 0]:
        panel.set_ylabel("% of queries")


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
