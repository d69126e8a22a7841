"""`pyllm bench`: how fast a model runs on this machine, and where the time goes."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyllm.attention import Dense, Policy
from pyllm.benchmark import ceilings, plot, report
from pyllm.benchmark.engine import Engine
from pyllm.benchmark.measure import GuardedSubject, Opens, PolicySubject, Subject, measure, measure_opening
from pyllm.benchmark.peer import Peer
from pyllm.benchmark.plan import Plan
from pyllm.cli import options
from pyllm.cli.terminal import render
from pyllm.evaluate.asked import asked
from pyllm.evaluate.outputs import IMAGES, require_outputs, require_plot, write
from pyllm.llm import LLM
from pyllm.models import DEFAULT_MODEL

GGML_Q8_0 = 8  # of enum ggml_type
HELP = "Measure prefill and decode speed over depth, memory, and the time of each stage."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="default: %(default)s")
    group = parser.add_argument_group("what is measured")
    default = Plan()
    group.add_argument(
        "--attention",
        type=options.policy_or_preset,
        action="append",
        default=[],
        metavar="POLICY",
        help="besides dense; may be repeated (default: the model's)",
    )
    group.add_argument(
        "--prefill", type=sizes, default=default.prefill, metavar="N,...", help=_sizes_help(default.prefill)
    )
    group.add_argument(
        "--depths", type=sizes, default=default.depths, metavar="N,...", help=_sizes_help(default.depths)
    )
    group.add_argument(
        "--decode", type=int, default=default.decode, metavar="N", help="tokens (default: %(default)s)"
    )
    group.add_argument(
        "--runs", type=int, default=default.runs, metavar="N", help="of each (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=default.seed, help="of the tokens (default: %(default)s)")
    group.add_argument(
        "--guard",
        action="store_true",
        help="what is not dense also under a guard with its own defaults",
    )
    group.add_argument(
        "--peer-python",
        metavar="PATH",
        help="compare with llama.cpp, through the llama-cpp-python that this Python has",
    )
    group.add_argument(
        "--no-ceilings", action="store_true", help="do not measure what the machine can do at most"
    )
    group = parser.add_argument_group("how it runs")
    options.add_machine_options(group)
    group = parser.add_argument_group("output")
    group.add_argument("--all-stages", action="store_true", help="the stages of every measurement")
    group.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured; - for stdout")
    group.add_argument("--plot", type=Path, metavar="FILE", help=f"speed over depth, as {', '.join(IMAGES)}")


def _sizes_help(default: tuple[int, ...]) -> str:
    return f"those that fit the model's context (default: {','.join(map(str, default))})"


def sizes(text: str) -> tuple[int, ...]:
    """Numbers separated by commas, or nothing; for argparse."""
    return tuple(sorted({int(number) for number in text.split(",") if number.strip()}))


def run(args: argparse.Namespace) -> int:
    plan = Plan(args.prefill, args.depths, args.decode, args.runs, args.seed)
    json_file = None if args.json == Path("-") else args.json
    require_outputs({"--json": json_file, "--plot": args.plot})
    require_plot(args.plot)
    result = benchmark(args, plan)
    data = json.dumps(result, indent=1) + "\n"
    if json_file:
        write(json_file, data.encode())
    if args.plot:
        write(args.plot, plot.image(result, args.plot.suffix[1:].lower()))
    if args.json == Path("-"):
        sys.stdout.write(data)
    else:
        _show(result, args.all_stages)
    return 0


def benchmark(args: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """The result as the JSON has it."""

    def open_llm() -> LLM:
        return LLM(args.model, **options.machine(args))

    with ExitStack() as stack:
        engine = Engine(open_llm, plan, lambda llm: _policies(llm, args.attention))
        plan, info = engine.plan, engine.llm.info
        peers = _open_peers(stack, args.peer_python, engine)
        on_cpu = engine.llm.device == "cpu"  # whose ceilings the programs measure
        found = ceilings.measure(info.n_threads) if on_cpu and not args.no_ceilings else None
        own = [PolicySubject(engine, name) for name in engine.policies]
        if args.guard:
            own += [GuardedSubject(engine, name) for name in engine.policies if name != "dense"]
        subjects: list[Subject] = [*own, *peers]
        holders: list[tuple[str, float, Opens]] = [("pyllm", engine.first_open_seconds, engine)]
        holders += [(peer.name, peer.info["first_open_seconds"], peer) for peer in peers]
        bar = stack.enter_context(_bar())
        task = bar.add_task("")
        result: dict[str, Any] = {
            "pyllm": version("pyllm"),
            "peer": {peer.name: peer.info for peer in peers},
            "machine": _machine(),
            "model": {"name": engine.llm.name, "bytes": sum(p.stat().st_size for p in engine.llm.paths)},
            "device": engine.llm.device,
            "kv": engine.llm.kv,
            "kv_type": engine.llm.kv_type,
            "activation_bits": engine.llm.activation_bits,
            "isa": info.isa,
            "threads": info.n_threads,
            "batch": args.batch,
            "plan": asdict(plan),
            "ceilings": asdict(found) if found else None,
            "subjects": [subject.name for subject in subjects],
            "peers": [peer.name for peer in peers],
            "measurements": measure(
                plan,
                subjects,
                lambda text, done, total: bar.update(task, description=text, completed=done, total=total),
            ),
            "opening": {
                name: {"first_open_seconds": first, **measure_opening(plan, holder)}
                for name, first, holder in holders
            },
        }
    result["ratios"] = report.ratios(result) if peers else []
    return result


def _policies(llm: LLM, attentions: Sequence[Policy | str]) -> dict[str, Policy]:
    """By name: dense, and those given or the model's default; the sinks of the first of these are dense's."""
    found = asked(llm, attentions or ["balanced" if llm.profile else llm.attention])
    return {"dense": Dense(sinks=next(iter(found.values())).sinks)} | found


def _open_peers(stack: ExitStack, python: str | None, engine: Engine) -> list[Peer]:
    """llama.cpp with flash attention and without, and where keys and values are bytes also with these, which
    needs flash attention; each in its own process."""
    if python is None:
        return []
    llm, n_vocab = engine.llm, engine.llm.info.n_vocab
    settings = {
        "n_ctx": engine.plan.n_ctx,
        "n_batch": llm.n_batch,
        "n_threads": llm.info.n_threads,
        "n_threads_batch": llm.info.n_threads,
    }
    kinds: dict[str, dict[str, Any]] = {
        "llama.cpp": {"flash_attn": False},
        "llama.cpp flash": {"flash_attn": True},
    }
    if llm.kv_type == "q8_0":
        kinds["llama.cpp q8_0"] = {"flash_attn": True, "type_k": GGML_Q8_0, "type_v": GGML_Q8_0}
    return [
        stack.enter_context(Peer(python, name, llm.paths[0], engine.ids, n_vocab, **settings, **kind))
        for name, kind in kinds.items()
    ]


def _machine() -> dict[str, Any]:
    """Which machine it was."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": models[0] if models else platform.machine(), "processors": len(models)}


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(result: dict[str, Any], all_stages: bool) -> None:
    """Tables on standard output."""
    machine = result["machine"]
    print(
        f"{result['model']['name']} on {machine['processors']} x {machine['processor']}: "
        f"{result['isa']}, {result['threads']} threads, {result['plan']['runs']} runs"
    )
    found = ceilings.Ceilings(**result["ceilings"]) if result["ceilings"] else None
    if found:
        peaks = ", ".join(f"{value:,.0f} G {name}" for name, value in found.gmac_s.items())
        print(f"at most {found.memory_gb_s:.1f} GB/s and {peaks} multiply-adds per second")
    tables = [report.speed_table(result), report.opening_table(result), report.attention_table(result)]
    if result["ratios"]:
        tables.insert(1, report.ratio_table(result))
    works = list(report.by_work(result).items())
    shown = works if all_stages else [works[i] for i in report.largest(result)]
    for work, records in shown:
        tables += [report.stage_table(r, work, found) for r in records.values() if r["stages"]]
    for table in tables:
        if table.row_count:
            print()
            print(render(table), end="")
