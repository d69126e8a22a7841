"""`pyllm pilot`: tries adaptive attention on a folder of documents and writes a report."""

from __future__ import annotations

import argparse
import platform
import shlex
from importlib.metadata import version
from pathlib import Path

from pyllm.attention import Dense
from pyllm.cli import options
from pyllm.cli.eval import evaluation_settings
from pyllm.cli.survey import add_length_options, context, survey
from pyllm.cli.terminal import prefill_bar
from pyllm.errors import ArgumentError
from pyllm.evaluate import tradeoff
from pyllm.evaluate.calibrate import Plan
from pyllm.evaluate.candidates import Candidate, Choice
from pyllm.evaluate.evaluation import Evaluation
from pyllm.evaluate.outputs import require_apart, require_matplotlib, require_outputs, write
from pyllm.evaluate.results import Results
from pyllm.exclusive import alone
from pyllm.files import file_sha256, shown
from pyllm.llm import LLM
from pyllm.pilot import page, pilot
from pyllm.pilot.calibration import DECODED, search_presets
from pyllm.pilot.sample import draw
from pyllm.profile import Profile
from pyllm.survey.folder import Folder
from pyllm.survey.model_file import ModelFile
from pyllm.survey.result import Survey
from pyllm.survey.shares import combined

HELP = "Try attention policies on a sample of a folder's documents and write an HTML report."

POLICIES = ("dense", "window", "adaptive", "pages", "adaptive+pages")
THRESHOLDS = (0.8, 0.9)
NOT_OPTIONS = ("command", "run", "folder", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=options.folder, metavar="DIR", help="txt, md, html, pdf, docx, source code"
    )
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
        ("--budget-kl", float, Plan.budget_kl, "nats that the recommended policy may lose"),
        ("--limit", int, 16384, "tokens of the sample"),
        ("--decode", int, 32, "tokens at the end of each document evaluated one by one"),
        ("--seed", int, 0, "draws documents and audited queries"),
    ):
        metavar = "X" if kind is float else "N"
        parser.add_argument(
            name, type=kind, default=default, metavar=metavar, help=f"{what} (default: %(default)s)"
        )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keeps finished rows; a later run goes on from them"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="presets of an earlier run (default: search them, and keep them beside the report)",
    )
    group.add_argument("--no-calibrate", action="store_true", help="do not search presets")
    options.add_machine_options(parser)
    # A profile beside the model, perhaps a broken one, must not keep it from being opened.
    parser.set_defaults(attention=Dense())


def run(args: argparse.Namespace) -> int:
    _check(args)
    choice = Choice(args.window, args.sinks, POLICIES, THRESHOLDS, page_bits=(3,))  # a graded one needs a fit
    model = ModelFile.open(args.model)
    n_ctx = context(args, model)
    found = survey(args, model, n_ctx, combined([]), timed=False)
    with alone(args.json):
        return _report(args, choice, model, n_ctx, found)


def _report(args: argparse.Namespace, choice: Choice, model: ModelFile, n_ctx: int, found: Survey) -> int:
    llm = options.open_llm(args)
    least = tradeoff.least(args.window, args.sinks, args.decode)
    texts = draw(llm, found.folder, n_ctx=n_ctx, limit=args.limit, least=least, seed=args.seed)
    path = _profile_path(args)
    presets, calibration = _presets(args, llm, found.folder, pilot.halves(texts)[1], n_ctx, path)
    made_with = evaluation_settings(args, llm, n_ctx, texts)
    made_with["profile sha256"] = file_sha256(path) if presets else None
    results = Results.open(args.json, made_with) if args.json else Results(made_with)
    evaluation = Evaluation(
        llm, choice, texts, (), results, args.json, args.decode, args.seed, n_ctx, presets
    )
    result = pilot.run(evaluation, found, args.budget_kl, prefill_bar, path)
    write(args.output, page.render(result, calibration, args.model, _made(args, llm, model)))
    kept = "" if result.recommendation.kept else "no policy keeps to the budget; the nearest: "
    print(f"{kept}{result.row.name}, KL {result.row.kl:.4f} on {result.row.text}; report in {args.output}")
    return 0


def _presets(
    args: argparse.Namespace, llm: LLM, folder: Folder, held_out: list[str], n_ctx: int, path: Path
) -> tuple[list[Candidate], str]:
    """Presets as candidates, and a sentence on where they come from."""
    if args.no_calibrate:
        return [], "No presets were searched, as it was asked."
    plan = Plan(args.budget_kl, n_ctx, max(1, args.limit // 2), DECODED, args.window, args.sinks)
    if args.profile:
        profile, source = Profile.load(path, llm.fingerprint), "of an earlier calibration"
        _require_geometry(path, profile, args)
    else:
        try:
            with prefill_bar("calibrating") as tick:
                profile = search_presets(llm, folder, held_out, plan, args.seed, tick)
        except ArgumentError as error:
            return [], f"No presets: {error}."
        profile.save(path)
        source = "searched on other documents than those that the recommendation is measured on"
    presets = [Candidate(name, preset.policy) for name, preset in profile.presets.items()]
    return presets, f"The presets {', '.join(profile.presets)} are {source}; they are kept in {shown(path)}."


def _require_geometry(path: Path, profile: Profile, args: argparse.Namespace) -> None:
    for name, preset in profile.presets.items():
        found, wanted = (preset.policy.window, preset.policy.sinks), (args.window, args.sinks)
        if found != wanted:
            raise ArgumentError(
                f"{path}: preset {name} has window and sinks {found}, but this pilot {wanted}: give the same"
            )


def _check(args: argparse.Namespace) -> None:
    """What can be refused before any document is read."""
    for name, least in (("limit", 1), ("decode", 0), ("seed", 0)):
        value = getattr(args, name)
        if value < least:
            raise ArgumentError(f"--{name}: expected at least {least}, got {value}")
    if not 0 < args.budget_kl < float("inf"):
        raise ArgumentError(f"--budget-kl: expected nats above 0, got {args.budget_kl}")
    outputs = {"--output": args.output, "--json": args.json}
    require_outputs(outputs)
    if args.profile:
        require_apart({**outputs, "--profile": args.profile})
    elif not args.no_calibrate:
        require_outputs({**outputs, "the profile beside it": _profile_path(args)})
    require_matplotlib()


def _profile_path(args: argparse.Namespace) -> Path:
    """Of the presets: as given, or kept beside the report."""
    path: Path = args.profile or args.output.with_suffix(".profile")
    return path


def _made(args: argparse.Namespace, llm: LLM, model: ModelFile) -> dict[str, str]:
    """How the report was made."""
    words = ["pyllm", "pilot", str(args.folder)]
    for name, value in vars(args).items():
        if name in NOT_OPTIONS or value is None or value is False:
            continue
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return {
        "command": shown(shlex.join(words)),
        "model": f"{shown(model.name)}, fingerprint {model.fingerprint}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("pyllm", "numpy", "matplotlib")),
        "Python": platform.python_version(),
        "processor": f"{llm.info.isa}, {llm.info.n_threads} threads",
    }
