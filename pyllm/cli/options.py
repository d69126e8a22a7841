"""Options that several commands share, and what they make."""

from __future__ import annotations

import argparse
from typing import Any

from pyllm import attention
from pyllm.cpus import ISAS
from pyllm.errors import ArgumentError
from pyllm.llm import LLM
from pyllm.models import DEFAULT_MODEL


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, help="known name, path or file name (default: %(default)s)"
    )
    group.add_argument("--ctx", type=int, metavar="N", help="tokens of context (default: the model's)")
    group.add_argument(
        "--batch", type=int, metavar="N", default=512, help="tokens evaluated at once (default: 512)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="default: the CPUs this process may use")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    group.add_argument("--isa", choices=ISAS, help="default: the best there is")
    group.add_argument(
        "--attention", type=policy, metavar="POLICY", help=f"{attention.SYNTAX} (default: adaptive:0.9)"
    )


def policy(text: str) -> attention.Policy:
    """An attention policy, for argparse."""
    try:
        return attention.parse(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def open_llm(args: argparse.Namespace) -> LLM:
    return LLM(
        args.model,
        n_ctx=args.ctx,
        n_batch=args.batch,
        n_threads=args.threads,
        device=args.device,
        attention=args.attention,
        isa=args.isa,
    )


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
    return {name: getattr(args, name) for name in names}
