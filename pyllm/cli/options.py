"""Options that several commands share, and what they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyllm import attention
from pyllm.cpus import ISAS
from pyllm.errors import ArgumentError
from pyllm.guard import Guard
from pyllm.llm import LLM
from pyllm.models import DEFAULT_MODEL


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, help="known name, path or file name (default: %(default)s)"
    )
    group.add_argument("--ctx", type=int, metavar="N", help="tokens of context (default: the model's)")
    add_machine_options(group)
    group.add_argument(
        "--attention",
        type=policy_or_preset,
        metavar="POLICY",
        help=f"{attention.SYNTAX} (default: balanced, or without a profile {attention.UNCALIBRATED})",
    )


def add_machine_options(group: argparse._ActionsContainer) -> None:
    """What a model runs on, and how."""
    group.add_argument(
        "--batch", type=int, metavar="N", default=512, help="tokens evaluated at once (default: %(default)s)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="default: the CPUs this process may use")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument(
        "--kv",
        choices=("gpu", "split"),
        default="gpu",
        help="split: on a GPU, keys and values in the host's memory but for sinks and window (default: gpu)",
    )
    group.add_argument(
        "--kv-type",
        choices=("f16", "q8_0"),
        default="f16",
        help="q8_0: on the CPU, keys and values as bytes, at half the memory (default: f16)",
    )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=(16, 8),
        default=16,
        help="8: on the CPU, prompts are read faster for a small loss (default: 16)",
    )
    group.add_argument("--isa", choices=ISAS, help="default: the best there is")


def policy(text: str) -> attention.Policy:
    """An attention policy, for argparse."""
    try:
        return attention.parse(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder(text: str) -> Path:
    """A folder's path, for argparse. An empty one, such as an unset variable's, is not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return Path(text)


def words(text: str) -> tuple[str, ...]:
    """What stands between commas, each once, for argparse."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def policy_or_preset(text: str) -> attention.Policy | str:
    """An attention policy, or what needs the model's profile as it is, for argparse."""
    return text if attention.needs_profile(text) else policy(text)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `LLM`: those of `add_machine_options`."""
    return {
        "n_batch": args.batch,
        "n_threads": args.threads,
        "device": args.device,
        "kv": args.kv,
        "kv_type": args.kv_type,
        "activation_bits": args.activation_bits,
        "isa": args.isa,
    }


def open_llm(args: argparse.Namespace) -> LLM:
    return LLM(
        args.model,
        n_ctx=args.ctx,
        attention=args.attention,
        **machine(args),
        guard=guard(args),
    )


def add_guard_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("guard", "any of these sets one up")
    group.add_argument(
        "--guard", action="store_true", help="audit what attention leaves out, adapt it and repair"
    )
    group.add_argument(
        "--audit-rate", type=float, metavar="X", help=f"of the tokens (default: {Guard().audit_rate:g})"
    )
    group.add_argument("--log", metavar="FILE", help="keep every decision, for pyllm log")
    group.add_argument(
        "--hold-back", action="store_true", help="show only what is verified, in bursts of some 64 tokens"
    )


def guard(args: argparse.Namespace) -> Guard | None:
    """As the command has it; None for a command without these options."""
    given = {name: getattr(args, name, None) for name in ("audit_rate", "log")}
    settings = {name: value for name, value in given.items() if value is not None}
    wanted = settings or getattr(args, "guard", False) or getattr(args, "hold_back", False)
    return Guard(**settings) if wanted else None


def add_sampling_options(
    parser: argparse.ArgumentParser, *, temperature: float, max_tokens: int | None
) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", default=max_tokens, help="of an answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="0 is the likeliest token (default: %(default)s)",
    )
    group.add_argument("--top-k", type=int, default=40, help="0 is off (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=0.95, help="1 is off (default: %(default)s)")
    group.add_argument("--min-p", type=float, default=0.05, help="0 is off (default: %(default)s)")
    group.add_argument("--repeat-penalty", type=float, default=1.0, help="1 is off (default: %(default)s)")
    group.add_argument("--seed", type=int, help="makes answers repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be repeated")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `LLM.generate` and `LLM.chat`."""
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop")
    return {name: getattr(args, name) for name in (*names, "hold_back")}
