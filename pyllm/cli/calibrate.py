"""`pyllm calibrate`: the cheapest attention that keeps to a budget, for one model, as a profile."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from pyllm.attention import Dense
from pyllm.cli import options
from pyllm.cli.terminal import prefill_bar, render
from pyllm.evaluate import texts
from pyllm.evaluate.calibrate import BUDGETS, Plan, calibrate
from pyllm.evaluate.outputs import require_writable
from pyllm.exclusive import alone
from pyllm.models import DEFAULT_MODEL
from pyllm.profile import DECODE_PART, Profile, beside

HELP = "Find the cheapest attention for a model that keeps to a budget of KL divergence; write its profile."

LEGEND = (
    "On text that neither the fit nor the search saw: KL to dense attention in nats with its 95 % interval, "
    "of prefill and of decode; top-1, tokens whose likeliest successor is dense attention's; work, "
    "multiply-adds of prefill, scoring included, and read, bytes read in decode, both in % of dense "
    "attention's on the bulk."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    plan = Plan()
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="name or path (default: %(default)s)")
    parser.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="documents to calibrate on (default: Python's language reference and source code)",
    )
    shown = ", ".join(f"{name} {part:g} times" for name, part in BUDGETS.items() if part != 1)
    parser.add_argument(
        "--budget-kl",
        type=float,
        default=plan.budget_kl,
        metavar="X",
        help=f"nats that the balanced preset may lose; {shown} that (default: %(default)s)",
    )
    parser.add_argument(
        "--ctx", type=int, metavar="N", help=f"tokens of a text (default: {plan.n_ctx}, or the model's)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=plan.limit,
        metavar="N",
        help="tokens of each part: one is fitted, one searched, one reported on (default: %(default)s)",
    )
    parser.add_argument(
        "--decode",
        type=int,
        default=plan.n_decode,
        metavar="N",
        help="tokens at the end of each text evaluated one by one (default: %(default)s)",
    )
    parser.add_argument("--window", type=int, default=plan.window, metavar="N", help="default: %(default)s")
    parser.add_argument("--sinks", type=int, default=plan.sinks, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: beside the model, where presets are looked up"
    )
    options.add_machine_options(parser)
    # An older profile, perhaps a broken one, must not keep the model from being opened.
    parser.set_defaults(attention=Dense())


def run(args: argparse.Namespace) -> int:
    plan = Plan(
        budget_kl=args.budget_kl,
        n_ctx=args.ctx or Plan.n_ctx,
        limit=args.limit,
        n_decode=args.decode,
        window=args.window,
        sinks=args.sinks,
    )
    if args.out:
        require_writable(args.out)
    llm = options.open_llm(args)
    plan = replace(plan, n_ctx=min(plan.n_ctx, llm.n_ctx))
    path = args.out or beside(llm.paths)
    kept = path.with_name(f"{path.name}.trials")
    for file in (path, kept):
        require_writable(file)
    documents = texts.files(args.text) if args.text else texts.builtin(fitted=True)
    with alone(kept), prefill_bar() as tick:
        profile = calibrate(llm, documents, plan, tick, kept)
        profile.save(path)
        kept.unlink(missing_ok=True)
    print(render(table(profile)), end="")
    print(LEGEND)
    for name, preset in profile.presets.items():
        print(f"{name}: {preset.policy}")
    for sentence in (*over_budget(profile), *on_answers(profile)):
        print(sentence)
    print(f"{path} written")
    return 0


def table(profile: Profile) -> Table:
    columns = Table("preset", "budget", "KL, 95 %", "decode KL, 95 %", "top-1", "work", "read", box=None)
    for name, preset in profile.presets.items():
        m = preset.measured
        columns.add_row(
            name,
            f"{preset.budget:g}",
            f"{m.kl:.4f}  {m.kl_low:.4f}–{m.kl_high:.4f}",
            f"{m.decode_kl:.4f}  {m.decode_kl_low:.4f}–{m.decode_kl_high:.4f}",
            f"{m.top1:.1f}",
            f"{m.bulk_work:.1f}",
            f"{m.bulk_read:.1f}",
        )
    return columns


def on_answers(profile: Profile) -> list[str]:
    """Sentences on what was lost where an answer hangs on few places, by gates that were not tried for it and
    by the presets."""
    gates, presets = (profile.made["answers"][name] for name in ("gates", "presets"))
    if not presets:
        return ["no gate was tried: the context is too short to ask for anything hidden in it"]
    budgets = {name: preset.budget for name, preset in profile.presets.items()}
    refused = [f"{gate} {loss:.2g}" for gate, loss in gates.items() if loss > min(budgets.values())]
    lost = [
        f"{name} {loss:.2g}{' (over its budget)' if loss > budgets[name] else ''}"
        for name, loss in presets.items()
    ]
    found = [f"lost on answers, in nats: {', '.join(lost)}"]
    if refused:
        found.insert(0, f"not tried as gates, for what they lose on answers: {', '.join(refused)}")
    return found


def over_budget(profile: Profile) -> list[str]:
    """A sentence on every preset whose loss on the report's text is over its budget."""
    found = []
    for name, preset in profile.presets.items():
        if preset.measured.loss > preset.budget:
            where = "the interval ends" if preset.measured.mean_loss <= preset.budget else "even the mean is"
            found.append(
                f"{name}: {where} over its budget of {preset.budget:g} nats on this text, of which decode "
                f"may have {DECODE_PART:g}, though within it where it was chosen: take more --limit"
            )
    return found
