"""`pyllm survey`: how long a folder's documents are for a model, and what attention policies would save."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from pyllm.attention import Dense
from pyllm.cli import options
from pyllm.cli.eval import check_outputs
from pyllm.cli.terminal import prefill_bar, render
from pyllm.errors import ArgumentError, FileError, FormatError
from pyllm.evaluate.outputs import IMAGES, write
from pyllm.models import DEFAULT_MODEL
from pyllm.survey import folder, plot, tables
from pyllm.survey.model_file import ModelFile
from pyllm.survey.projection import project
from pyllm.survey.result import Survey
from pyllm.survey.shares import Share, assumed, combined, measured, presets
from pyllm.survey.speed import Speed, measure_speed

HELP = "Measure a folder of documents in tokens, and project what attention policies would save on them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=options.folder, metavar="DIR", help="txt, md, html, pdf, docx, source code"
    )
    add_length_options(parser)
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="policies with the shares that `pyllm eval --json` measured"
    )
    parser.add_argument(
        "--assume",
        type=_share,
        action="append",
        default=[],
        metavar="NAME=PERCENT",
        help="a policy that reads and computes that much of the bulk; may be repeated",
    )
    parser.add_argument(
        "--measure", action="store_true", help="open the model and measure its speed, for times"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for --measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was found")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a line per file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"histogram of lengths, as {', '.join(IMAGES)}"
    )


def add_length_options(parser: argparse.ArgumentParser) -> None:
    """What lengths are judged by."""
    parser.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, help="known name, path or file name (default: %(default)s)"
    )
    parser.add_argument(
        "--ctx", type=int, metavar="N", help="tokens of context to fit into (default: the model's)"
    )
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument("--sinks", type=int, default=16, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    check_outputs(args)
    model = ModelFile.open(args.model)
    n_ctx = context(args, model)
    shares = _presets(args, model)
    if args.rows:
        shares += measured(args.rows, model, args.window, args.sinks)
    found = survey(args, model, n_ctx, combined([*shares, *args.assume]), args.measure)
    for path, content in ((args.json, found.as_json), (args.csv, found.as_csv)):
        if path:
            write(path, content())
    if args.plot:
        write(args.plot, plot.plot(found, args.plot.suffix[1:].lower()))
    show(found)
    return 0


def _presets(args: argparse.Namespace, model: ModelFile) -> list[Share]:
    """None, and a line on the cause, where the profile cannot be used: lengths do not depend on it."""
    try:
        return presets(model, args.window, args.sinks)
    except (FileError, FormatError) as error:
        print(f"pyllm: without presets: {error}", file=sys.stderr)
        return []


def context(args: argparse.Namespace, model: ModelFile) -> int:
    """Tokens that documents have to fit into. Raises ArgumentError for lengths out of range."""
    Dense(window=args.window, sinks=args.sinks)  # refuses what is out of range
    if args.ctx is not None and not 1 <= args.ctx <= model.n_ctx:
        raise ArgumentError(f"--ctx: expected 1 to {model.n_ctx}, the model's context, got {args.ctx}")
    return args.ctx or model.n_ctx


def survey(
    args: argparse.Namespace, model: ModelFile, n_ctx: int, shares: list[Share], timed: bool
) -> Survey:
    with prefill_bar("reading", "files") as tick:
        documents = folder.survey(args.folder, model.count, tick)
    speed: Speed | None = None
    if timed:
        with prefill_bar("measuring speed", "runs") as tick:
            speed = measure_speed(model, n_ctx, args.threads, lambda _, done, total: tick(done, total))
    tokens = np.array([document.tokens for document in documents.documents], np.int64)
    geometry = {"window": args.window, "sinks": args.sinks, "n_ctx": n_ctx}
    projections = project(model, tokens, shares, **geometry, speed=speed)
    return Survey(model, documents, **geometry, projections=projections, speed=speed)


def show(found: Survey) -> None:
    print(tables.headline(found))
    print(render(tables.lengths(found)))
    print(render(tables.policies(found)))
    print(tables.LEGEND, tables.sources(found), tables.TIMED if found.speed else tables.PROJECTED, sep="\n")
    if found.folder.unreadable:
        print()
        print(render(tables.unreadable(found)), end="")


def _share(text: str) -> Share:
    try:
        return assumed(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
