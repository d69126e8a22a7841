"""`pyllm guard`: a trial of the guard's controller on text."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from rich.table import Table

from pyllm.attention import Adaptive, Policy
from pyllm.cli import options
from pyllm.cli.terminal import percent, prefill_bar, render
from pyllm.errors import ArgumentError
from pyllm.evaluate import texts
from pyllm.guard import Guard, trial
from pyllm.llm import LLM

HELP = "Try the guard's controller: does the miss rate reach its target, from any first threshold?"
THRESHOLDS = (0.0, 0.9, 2.0)  # every head local, as usual, every head long
PAGE_SHARES = (0.1, 0.01, 0.001)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    guard = Guard()
    options.add_model_options(parser)
    group = parser.add_argument_group("trial", "of adaptive attention with a window of 256, or --attention")
    group.add_argument(
        "--text", action="append", default=[], metavar="FILE", help="default: Python's reference and library"
    )
    group.add_argument("--tokens", type=int, default=20_000, metavar="N", help="default: %(default)s")
    group.add_argument("--document", type=int, default=4096, metavar="N", help="default: %(default)s tokens")
    group.add_argument(
        "--starts",
        type=numbers_of,
        metavar="X,...",
        help="first thresholds (default: 0,0.9,2: every head local, as usual, every head long); with an "
        "--attention of pages alone, first page shares, which only get stricter (default: 0.1,0.01,0.001)",
    )
    group.add_argument("--miss-target", type=float, default=guard.miss_target, help="default: %(default)s")
    group.add_argument("--audit-rate", type=float, default=guard.audit_rate, help="default: %(default)g")
    group.add_argument("--seed", type=int, default=0, help="of the excerpts (default: %(default)s)")
    group.add_argument("--json", action="store_true", help="the numbers as JSON, by layer too")


def numbers_of(text: str) -> tuple[float, ...]:
    """Numbers separated by commas; for argparse."""
    return tuple(float(number) for number in text.split(","))


def run(args: argparse.Namespace) -> int:
    guard = Guard(audit_rate=args.audit_rate, miss_target=args.miss_target, repair=False, seed=args.seed)
    llm = options.open_llm(args)
    policy = llm.attention if args.attention else Adaptive(window=256)
    if not isinstance(policy, Adaptive) and not policy.sketch:
        raise ArgumentError(
            "--attention: the controller moves adaptive attention's thresholds and the shares of pages, and "
            f"{policy} has none"
        )
    starts = args.starts or (THRESHOLDS if isinstance(policy, Adaptive) else PAGE_SHARES)
    for start in starts:
        trial.starting(policy, start)  # refuses what is no threshold, or no share
    least = policy.window + 512
    if not least <= args.document <= llm.n_ctx:
        raise ArgumentError(
            f"--document: expected {least} tokens, for some to lie behind the window, to the context's "
            f"{llm.n_ctx}, got {args.document}"
        )
    _require_halves("--tokens", args.tokens)
    tokens = _tokens(llm, args)
    _require_halves(f"--text: {', '.join(args.text)}" if args.text else "the texts", len(tokens))
    courses, done = [], 0
    with prefill_bar("evaluating") as tick:

        def on_tokens(n: int) -> None:
            nonlocal done
            done += n
            tick(done, len(tokens) * len(starts))

        for start in starts:
            courses.append(trial.run(llm, tokens, policy, start, guard, args.document, on_tokens))
    found = [numbers(course, guard) for course in courses]
    if args.json:
        settings = {name: getattr(args, name) for name in ("document", "miss_target", "audit_rate", "seed")}
        shown = {
            "model": llm.name,
            "policy": str(policy),
            "tokens": len(tokens),
            **settings,
            "courses": found,
        }
        print(json.dumps(shown, indent=1, allow_nan=False))
    else:
        target = f"target {100 * guard.miss_target:g} %"
        print(f"{llm.name}: {len(tokens):,} tokens, at most {args.document:,} to a document, {target}")
        print(render(table(found, policy)), end="")
    return 0


def _require_halves(what: str, n_tokens: int) -> None:
    if n_tokens < 2 * trial.PIECE:
        raise ArgumentError(
            f"{what}: expected at least {2 * trial.PIECE} tokens, for two halves, got {n_tokens}"
        )


def _tokens(llm: LLM, args: argparse.Namespace) -> Any:
    chosen = texts.files(args.text) if args.text else texts.builtin()
    parts = [texts.excerpt(llm, name, text, args.tokens, args.seed).tokens for name, text in chosen.items()]
    return trial.mixed(parts, args.tokens)


def numbers(course: trial.Course, guard: Guard) -> dict[str, Any]:
    """Of one course, as the JSON has them: null where nothing was audited. The interval and what follows it
    are of the second half."""
    early, late = course.half(False), course.half(True)
    rate, by_layer = course.miss_rate(late), course.missed(late).mean(axis=1)
    return {
        "start": course.start,
        "audits": early.audits + late.audits,
        "miss_rate_first_half": course.miss_rate(early),
        "miss_rate_second_half": rate,
        "interval": course.interval,
        "of_target": rate / guard.miss_target if rate is not None else None,
        "heads_local": course.late.heads_local,
        "bulk_work": course.late.bulk_work,
        "lost_share": late.lost_share,
        "thresholds": None if course.thresholds is None else np.round(course.thresholds, 4).tolist(),
        "page_share": course.page_share,
        "layers": np.round(by_layer / late.audits, 5).tolist() if late.audits else None,
    }


def table(found: list[dict[str, Any]], policy: Policy) -> Table:
    paged = not isinstance(policy, Adaptive)
    moved, cost = ("page share", "bulk work") if paged else ("threshold", "heads local")
    shown = Table(
        f"first {moved}", "audits", "misses, first half", "second half", "of target", cost, moved, box=None
    )
    for row in found:
        rates = [row[f"miss_rate_{half}_half"] for half in ("first", "second")]
        shown.add_row(
            f"{row['start']:g}",
            f"{row['audits']:,}",
            *("–" if rate is None else f"{100 * rate:.2f} %" for rate in rates),
            "–" if row["of_target"] is None else f"{row['of_target']:.2f}",
            percent(row[cost.replace(" ", "_")]),
            f"{row['page_share']:.5f}" if paged else _range(row["thresholds"]),
        )
    return shown


def _range(thresholds: list[float]) -> str:
    return " – ".join(f"{f(thresholds):.2f}" for f in (np.min, np.median, np.max))
