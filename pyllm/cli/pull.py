"""`pyllm pull`: fetches a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pyllm import models

HELP = "Fetch a model, checked and resumed where an earlier try ended."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(f"{m.name} ({m.size / 1e6:.0f} MB, {m.licence})" for m in models.KNOWN_MODELS.values())
    parser.add_argument("source", help=f"{known}, hf:OWNER/REPO/FILE.gguf, or an https URL")
    parser.add_argument("--sha256", metavar="HEX", help="checksum that a URL's file must have")
    parser.add_argument("--dir", type=Path, metavar="DIR", help=f"default: {models.models_dir()}")


def run(args: argparse.Namespace) -> int:
    console = Console(stderr=True)
    columns = (
        TextColumn(args.source, markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def on_progress(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        paths = models.pull(args.source, args.dir, sha256=args.sha256, on_progress=on_progress)
    for path in paths:
        print(path)
    return 0
