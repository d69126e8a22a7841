"""How long the documents are, drawn with matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from pyllm import bulk
from pyllm.survey.result import Survey

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 30


def plot(survey: Survey, kind: str) -> bytes:
    """The histogram as an image of that kind ("png", "svg", "pdf")."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    draw_lengths(figure.subplots(), survey)
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=90)
    return image.getvalue()


def draw_lengths(axes: Axes, survey: Survey) -> None:
    """Documents by their tokens on a logarithmic axis, with the window's end and the context's."""
    from matplotlib.ticker import MaxNLocator

    bulk_from = bulk.bulk_from(survey.window, survey.sinks)
    marks = {f"bulk from {bulk_from:,}": bulk_from, f"context {survey.n_ctx:,}": survey.n_ctx}
    reach = [*survey.tokens, *marks.values()]
    axes.hist(survey.tokens, bins=np.geomspace(max(1, min(reach)) / 1.2, max(reach) * 1.2, BINS).tolist())
    for i, (label, at) in enumerate(marks.items()):
        axes.axvline(at, color=f"C{i + 1}", linestyle="--", label=label)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
