"""`pyllm eval`: what each attention policy costs and what it loses, on long text and on tasks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pyllm.attention import OPTIONS, Dense, PageBits, Policy
from pyllm.cli import eval_tasks, options
from pyllm.cli.terminal import prefill_bar, render
from pyllm.errors import ArgumentError
from pyllm.evaluate import compare, dialogue, domains, frontier, report, texts, tradeoff
from pyllm.evaluate.asked import asked
from pyllm.evaluate.candidates import PAGE_BITS, PAGE_SHARES, ROWS, SHARES, THRESHOLDS, Candidate, Choice
from pyllm.evaluate.evaluation import Evaluation, fitting_texts
from pyllm.evaluate.outputs import IMAGES, csv_bytes, require_outputs, require_plot, write
from pyllm.evaluate.results import FITTED, Results, Row
from pyllm.evaluate.texts import Text
from pyllm.exclusive import alone
from pyllm.files import file_sha256
from pyllm.llm import LLM
from pyllm.models import DEFAULT_MODEL

N = TypeVar("N")

HELP = "Compare attention policies with dense attention on long text or tasks: quality against cost."

DEFAULT_CONTEXT = 4096
FOR_TEXTS = (
    "text",
    "plot",
    "policies",
    "thresholds",
    "shares",
    "page_shares",
    "decode_shares",
    "page_bits",
    "decode",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="name or path (default: %(default)s)")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="documents to evaluate on (default: Python's language reference, source code, and a dialogue)",
    )
    parser.add_argument(
        "--ctx",
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of each text (default: {DEFAULT_CONTEXT}), or of each sample (default: the model's)",
    )
    parser.add_argument("--window", type=int, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument("--sinks", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--policies",
        type=options.words,
        metavar="A,B",
        help=f"on texts (default: {','.join(ROWS)}; with --attention only dense)",
    )
    parser.add_argument(
        "--attention",
        nargs="+",
        type=options.policy_or_preset,
        dest="attentions",
        metavar="POLICY",
        help="more rows, or those of --tasks, as of other commands (for --tasks by default adaptive:0.9 with "
        "--window and --sinks)",
    )
    for name, kind, default, what in (
        ("--thresholds", _floats, THRESHOLDS, "of oracle and adaptive"),
        ("--shares", _floats, SHARES, "of heads that static labels call local"),
        ("--page-shares", _floats, PAGE_SHARES, "of attention above which the page tier reads a page"),
        ("--decode-shares", _floats, (), "the same where tokens are evaluated one by one"),
        ("--page-bits", _page_bits, PAGE_BITS, "of the page tier's sketch: 2, 3, 4 or graded"),
    ):
        shown = ",".join(f"{value}" for value in default) or "those of prefill"
        parser.add_argument(
            name, type=kind, default=default, metavar="A,B", help=f"{what} (default: {shown})"
        )
    parser.add_argument(
        "--decode",
        type=int,
        default=32,
        metavar="N",
        help="tokens at the end evaluated one by one (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="chooses the part of each text, makes the samples (default: %(default)s)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N more rows, or samples, in this run")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="keeps finished rows or answers; a later run goes on from them",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="the table as comma-separated values")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"KL against bytes read, as {', '.join(IMAGES)}"
    )
    options.add_machine_options(parser)
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="evaluate nothing: show --json files of several models or texts side by side",
    )
    eval_tasks.add_arguments(parser)
    # Sessions have policies of their own here; a broken profile must not keep the model from being opened.
    parser.set_defaults(attention=Dense())
    parser.set_defaults(for_texts={name: parser.get_default(name) for name in FOR_TEXTS})


def run(args: argparse.Namespace) -> int:
    _check(args)
    if args.compare:
        return _compare(args.compare)
    with alone(args.json):
        return _run_texts(args) if args.tasks is None else eval_tasks.run(args)


def _run_texts(args: argparse.Namespace) -> int:
    policies = ("dense",) if args.attentions else tuple(ROWS)
    choice = Choice(
        window=args.window,
        sinks=args.sinks,
        policies=policies if args.policies is None else args.policies,
        thresholds=args.thresholds,
        shares=args.shares,
        page_shares=args.page_shares,
        decode_shares=args.decode_shares,
        page_bits=args.page_bits,
    )
    llm = options.open_llm(args)
    n_ctx = args.ctx or min(llm.n_ctx, DEFAULT_CONTEXT)
    sources = texts.files(args.text) if args.text else texts.builtin()
    chosen = [texts.excerpt(llm, name, text, n_ctx + 1, args.seed) for name, text in sources.items()]
    if not args.text:
        chosen.append(dialogue.excerpt(llm, n_ctx + 1, args.seed))
    for text in chosen:
        tradeoff.require_bulk(text, choice.window, choice.sinks, args.decode)
    other = fitting_texts(llm, choice, n_ctx, args.seed)
    settings = evaluation_settings(args, llm, n_ctx, chosen, other)
    results = Results.open(args.json, settings) if args.json else Results(settings)
    extra = _extra(llm, args.attentions or (), choice)
    evaluation = Evaluation(
        llm, choice, chosen, other, results, args.json, args.decode, args.seed, n_ctx, extra
    )
    with prefill_bar() as tick:
        left = evaluation.run(args.limit, tick)
    rows = evaluation.finished()
    if args.csv:
        write(args.csv, csv_bytes(rows, Row))
    if args.plot and rows:
        write(args.plot, frontier.plot(rows, args.plot.suffix[1:].lower()))
    for headline, tables in report.by_text(rows):
        print(headline, *map(render, tables), sep="\n")
    print(report.LEGEND)
    if worst := domains.worst(rows):
        print(*domains.sentences(worst), domains.LEGEND, sep="\n")
    for headline, tables in report.classifier_tables(evaluation.classifiers()):
        print(f"\n{headline}", *map(render, tables), sep="\n")
    if evaluation.classifiers():
        print(report.CLASSIFIER_LEGEND)
    if left:
        print(f"{left} rows are left for the next run", file=sys.stderr)
    return 0


def _extra(llm: LLM, attentions: Sequence[Policy | str], choice: Choice) -> list[Candidate]:
    """Raises ArgumentError for another window than the other rows have: what counts as bulk would differ."""
    found = asked(llm, attentions)
    for name, policy in found.items():
        for part, wanted in choice.geometry.items():
            if getattr(policy, part) != wanted:
                raise ArgumentError(
                    f"--attention {name}: {part} {getattr(policy, part)}, but --{part} is {wanted}"
                )
    return [Candidate(name, policy) for name, policy in found.items()]


def _compare(paths: Sequence[Path]) -> int:
    files = [(path, Results.read(path)) for path in paths]
    table = compare.table(files)
    print(*compare.headlines(files), render(table, width=200), sep="\n")
    for headline, (_, results) in zip(compare.headlines(files), files, strict=True):
        for sentence in domains.sentences(domains.worst(results.rows)):
            print(f"{headline[0]}: {sentence}")
    print(domains.LEGEND)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before the model is opened."""
    for name, least in (("ctx", 1), ("decode", 0), ("limit", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ArgumentError(f"--{name}: expected at least {least}, got {value}")
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    """Raises FileError and ArgumentError where --json, --csv or --plot could not be written in the end, or
    one would overwrite another."""
    require_outputs({"--json": args.json, "--csv": args.csv, "--plot": args.plot})
    require_plot(args.plot)


def evaluation_settings(
    args: argparse.Namespace, llm: LLM, n_ctx: int, chosen: Sequence[Text], other: Sequence[Text] = ()
) -> dict[str, Any]:
    """All that a row depends on besides its policy: results of other settings are not mixed with these."""
    return {
        "model": llm.name,
        "model sha256": [file_sha256(path) for path in llm.paths],
        **compare.rope(llm),
        "device": llm.device,
        **({"kv": llm.kv} if llm.kv != "gpu" else {}),
        **({"kv_type": llm.kv_type} if llm.kv_type != "f16" else {}),
        **({"activation_bits": llm.activation_bits} if llm.activation_bits != 16 else {}),
        "isa": llm.info.isa,
        "threads": llm.info.n_threads,
        "texts": {text.name: text.sha256 for text in chosen},
        **({FITTED: {text.name: text.sha256 for text in other}} if other else {}),
        "tokens": n_ctx,
        "batch": args.batch,
        "window": args.window,
        "sinks": args.sinks,
        "decode": args.decode,
        "seed": args.seed,
    }


def _floats(text: str) -> tuple[float, ...]:
    return _numbers(text, float)


def _page_bits(text: str) -> tuple[PageBits, ...]:
    return _numbers(text, OPTIONS["page_bits"])


def _numbers(text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    """Each of them once."""
    try:
        return tuple(dict.fromkeys(map(kind, options.words(text))))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None
