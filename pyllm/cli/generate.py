"""`pyllm generate`: continues a text."""

from __future__ import annotations

import argparse
import sys

from pyllm import documents
from pyllm.cli import options
from pyllm.cli.terminal import prefill_bar, status_line

HELP = "Continue a text, as a model without a chat template does."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to go on from; - reads it from standard input")
    options.add_model_options(parser)
    options.add_guard_options(parser)
    options.add_sampling_options(parser, temperature=0.8, max_tokens=128)


def run(args: argparse.Namespace) -> int:
    llm = options.open_llm(args)
    prompt = args.prompt
    if prompt == "-":
        prompt = documents.plain_text("standard input", sys.stdin.buffer.read())
    with prefill_bar() as tick:
        chunks = llm.generate(prompt, stream=True, progress=tick, **options.sampling(args))
        chunk = next(chunks)
    print(chunk["choices"][0]["text"], end="", flush=True)
    for chunk in chunks:
        print(chunk["choices"][0]["text"], end="", flush=True)
    print()
    print(status_line(chunk, llm.n_ctx), file=sys.stderr)
    return 0
