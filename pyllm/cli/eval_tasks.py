"""`pyllm eval --tasks`: what each attention policy costs in answers, on generated tasks."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pyllm.attention import Adaptive
from pyllm.cli import options
from pyllm.cli.terminal import prefill_bar, render
from pyllm.errors import ArgumentError
from pyllm.evaluate.asked import asked
from pyllm.evaluate.outputs import csv_bytes, write
from pyllm.evaluate.tasks import catalog, haystack, summary
from pyllm.evaluate.tasks.answers import Answers
from pyllm.evaluate.tasks.running import TaskEvaluation, asking, require_bulk, with_dense
from pyllm.evaluate.tasks.samples import Samples
from pyllm.files import file_sha256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "tasks", "answers to generated questions, beside dense attention's on the same samples"
    )
    group.add_argument(
        "--tasks", type=options.words, metavar="A,B", help=f"{', '.join(catalog.TASKS)}, or all of them: all"
    )
    group.add_argument("--samples", type=int, default=20, metavar="N", help="of each task (default: 20)")
    group.add_argument("--plain", action="store_true", help="without the model's chat template")


def run(args: argparse.Namespace) -> int:
    tasks = catalog.chosen(args.tasks)
    if args.samples < 1:
        raise ArgumentError(f"--samples: expected at least 1, got {args.samples}")
    for name, default in args.for_texts.items():
        if getattr(args, name) != default:
            raise ArgumentError(f"--{name.replace('_', '-')} is for texts, not for --tasks")
    llm = options.open_llm(args)
    attentions = args.attentions or [Adaptive(window=args.window, sinks=args.sinks)]
    policies = with_dense(asked(llm, attentions))
    require_bulk(policies, llm.n_ctx)
    samples = Samples(llm, llm.n_ctx, args.seed, plain=args.plain)
    settings: dict[str, Any] = {
        "model": llm.name,
        "model sha256": [file_sha256(path) for path in llm.paths],
        "device": llm.device,
        "isa": llm.info.isa,
        "haystack": haystack.sha256(),
        "length": samples.length,
        "plain": samples.plain,
        "batch": args.batch,
        "seed": args.seed,
    }
    answers = Answers.open(args.json, settings) if args.json else Answers(settings)
    ask = asking(llm, samples.length)
    evaluation = TaskEvaluation(tasks, policies, args.samples, samples, ask, answers)
    for task in tasks:
        samples.make(task, 0)  # a length that is too short is refused before the work
    with prefill_bar() as tick:
        left = evaluation.run(args.limit, tick)
    rows = summary.rows(evaluation.finished())
    if args.csv:
        write(args.csv, csv_bytes(rows, summary.TaskRow))
    print(f"{llm.name}: {samples.length:,} tokens{', plain prompts' if samples.plain else ''}")
    print(render(summary.table(rows)), summary.LEGEND, sep="\n")
    print(f"dense attention is above chance on: {', '.join(summary.above_chance(rows)) or 'no task'}")
    if left:
        print(f"{left} samples are left for the next run", file=sys.stderr)
    return 0
