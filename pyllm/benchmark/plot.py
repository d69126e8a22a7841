"""Tokens per second over depth, drawn with matplotlib."""

from __future__ import annotations

import io
from typing import Any

PANELS = {"prefill": "tokens in the prompt", "decode": "tokens in the context"}


def image(result: dict[str, Any], kind: str) -> bytes:
    """kind: "png", "svg" or "pdf"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.3), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (work, label) in zip(panels, PANELS.items(), strict=True):
        for subject in result["subjects"]:
            _curve(panel, subject, work, result)
        panel.set(title=f"{work}, tokens per second", xlabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{result['model']['name']}, {result['threads']} threads")
    data = io.BytesIO()
    figure.savefig(data, format=kind)
    return data.getvalue()


def _curve(panel: Any, subject: str, work: str, result: dict[str, Any]) -> None:
    """Medians, with the range from lowest to highest shaded."""
    records = [r for r in result["measurements"] if r["kind"] == work and r["subject"] == subject]
    x = [record["tokens" if work == "prefill" else "depth"] for record in records]
    y = {name: [r["tokens_per_second"][name] for r in records] for name in ("median", "min", "max")}
    (line,) = panel.plot(x, y["median"], marker="o", label=subject)
    panel.fill_between(x, y["min"], y["max"], color=line.get_color(), alpha=0.2)
