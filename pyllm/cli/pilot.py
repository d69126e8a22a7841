"""`pyllm pilot`: tries adaptive attention on a folder of documents and writes a report."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from pathlib import Path

from pyllm.cli import options
from pyllm.cli.eval import evaluation_settings
from pyllm.cli.survey import add_length_options, context, survey
from pyllm.cli.terminal import prefill_bar
from pyllm.errors import ArgumentError
from pyllm.evaluate import report
from pyllm.evaluate.candidates import Choice
from pyllm.evaluate.evaluation import Evaluation
from pyllm.evaluate.results import Results, require_writable, write
from pyllm.evaluate.static_labels import first_with_bulk
from pyllm.llm import LLM
from pyllm.pilot import page, pilot
from pyllm.pilot.sample import draw
from pyllm.survey.folder import shown
from pyllm.survey.model_file import ModelFile
from pyllm.survey.shares import combined

HELP = "Try attention policies on a sample of a folder's documents and write an HTML report."

POLICIES = ("dense", "window", "adaptive", "pages", "adaptive+pages")
THRESHOLDS = (0.8, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="txt, md, html, pdf, docx, source code")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("pilot.html"),
        help="the report (default: %(default)s)",
    )
    add_length_options(parser)
    for name, kind, default, what in (
        ("--budget-kl", float, 0.005, "nats that the recommended policy may lose"),
        ("--limit", int, 16384, "tokens of the sample"),
        ("--decode", int, 32, "tokens at the end of each document evaluated one by one"),
        ("--seed", int, 0, "draws documents and audited queries"),
        ("--batch", int, 512, "tokens evaluated at once"),
    ):
        metavar = "X" if kind is float else "N"
        parser.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keeps finished rows; a later run goes on from them"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: the CPUs this process may use")
    parser.add_argument("--isa", choices=("generic", "avx2", "avx512"), help="default: the best there is")
    parser.set_defaults(device="auto", attention=None)


def run(args: argparse.Namespace) -> int:
    _check(args)
    choice = Choice(args.window, args.sinks, POLICIES, THRESHOLDS)
    model = ModelFile.open(args.model)
    n_ctx = context(args, model)
    found = survey(args, model, n_ctx, combined([]), timed=False)
    llm = options.open_llm(args)
    least = first_with_bulk(args.window, args.sinks) + 1 + args.decode + 1
    texts = draw(llm, found.folder, n_ctx=n_ctx, limit=args.limit, least=least, seed=args.seed)
    made_with = evaluation_settings(args, llm, n_ctx, texts)
    results = Results.open(args.json, made_with) if args.json else Results(made_with)
    evaluation = Evaluation(llm, choice, texts, results, args.json, args.decode, args.seed, n_ctx)
    result = pilot.run(evaluation, found, args.budget_kl, prefill_bar)
    write(args.output, page.render(result, _made(args, llm, model)))
    kept = "" if result.recommendation.kept else "no policy keeps to the budget; the nearest: "
    print(f"{kept}{result.row.name}, KL {result.row.kl:.4f} on {result.row.text}; report in {args.output}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any document is read."""
    for name, least in (("limit", 1), ("decode", 0), ("seed", 0)):
        value = getattr(args, name)
        if value < least:
            raise ArgumentError(f"--{name}: expected at least {least}, got {value}")
    if not 0 < args.budget_kl < float("inf"):
        raise ArgumentError(f"--budget-kl: expected nats above 0, got {args.budget_kl}")
    for path in filter(None, (args.output, args.json)):
        require_writable(path)
    report.require_matplotlib()


def _made(args: argparse.Namespace, llm: LLM, model: ModelFile) -> dict[str, str]:
    """How the report was made."""
    names = (
        "model",
        "ctx",
        "window",
        "sinks",
        "budget_kl",
        "limit",
        "decode",
        "seed",
        "batch",
        "threads",
        "isa",
    )
    given = {name: getattr(args, name) for name in names}
    command = ["pyllm", "pilot", shown(args.folder)]
    for name, value in given.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return {
        "command": shlex.join(command),
        "model": f"{model.name}, fingerprint {model.fingerprint}",
        "pyllm": version("pyllm"),
        "Python": platform.python_version(),
        "processor": f"{llm.info.isa}, {llm.info.n_threads} threads",
    }
