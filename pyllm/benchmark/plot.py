"""Tokens per second over depth, drawn with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyllm.errors import ArgumentError, FileError

PANELS = {"prefill": "tokens in the prompt", "decode": "tokens in the context"}


def require() -> None:
    """Raises ArgumentError where matplotlib is not installed: before an hour of measuring, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ArgumentError("plots need matplotlib: pip install matplotlib") from None


def save(result: dict[str, Any], path: Path) -> None:
    """Writes the plot in the format that the path's ending names. Raises FileError, and ArgumentError for an
    ending that matplotlib does not know."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (kind, label) in zip(panels, PANELS.items(), strict=True):
        for subject in result["subjects"]:
            _curve(panel, subject, kind, result)
        panel.set(title=f"{kind}, tokens per second", xlabel=label, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{result['model']['name']}, {result['threads']} threads")
    try:
        figure.savefig(path)
    except OSError as error:
        raise FileError(f"{path}: the plot could not be written: {error.strerror or error}") from None
    except ValueError as error:
        raise ArgumentError(f"{path}: {error}") from None


def _curve(panel: Any, subject: str, kind: str, result: dict[str, Any]) -> None:
    """Medians, with the range from lowest to highest shaded."""
    records = [r for r in result["measurements"] if r["kind"] == kind and r["subject"] == subject]
    x = [record["tokens" if kind == "prefill" else "depth"] for record in records]
    y = {name: [r["tokens_per_second"][name] for r in records] for name in ("median", "min", "max")}
    (line,) = panel.plot(x, y["median"], marker="o", label=subject)
    panel.fill_between(x, y["min"], y["max"], color=line.get_color(), alpha=0.2)
