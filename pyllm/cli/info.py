"""`pyllm info`: what a model file holds, and what running it takes."""

from __future__ import annotations

import argparse
from collections import Counter

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pyllm.cli import options
from pyllm.cli.terminal import render
from pyllm.device import available_on
from pyllm.llm import LLM
from pyllm.profile import find

HELP = "Show a model's architecture, size, tokenizer and the memory it takes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_options(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its type and shape")


def run(args: argparse.Namespace) -> int:
    llm = options.open_llm(args)
    table = Table(show_header=False, box=None)
    for name, value in rows(llm):
        table.add_row(name, Text(value))
    print(render(table), end="")
    if args.tensors:
        print(render(tensor_table(llm)), end="")
    return 0


def rows(llm: LLM) -> list[tuple[str, str]]:
    """Name and value of every line."""
    info, metadata = llm.info, llm.metadata
    types = Counter(tensor.type_name for tensor in llm.tensors())
    needed, available = llm.session_memory(llm.n_ctx), available_on(llm.device)
    return [
        ("file", ", ".join(str(path) for path in llm.paths)),
        ("name", str(metadata.get("general.name", "–"))),
        ("licence", str(metadata.get("general.license", "–"))),
        ("architecture", info.architecture),
        ("parameters", f"{info.n_params:,}"),
        ("tensors", ", ".join(f"{n} {name}" for name, n in types.most_common())),
        ("layers", f"{info.n_layers} of width {info.dim:,}, feed-forward {info.n_ff:,}"),
        ("heads", f"{info.n_heads} query, {info.n_kv_heads} key/value, of {info.head_dim}"),
        ("vocabulary", f"{info.n_vocab:,} tokens ({metadata.get('tokenizer.ggml.model', '–')})"),
        ("chat template", "yes" if "tokenizer.chat_template" in metadata else "no"),
        ("context", f"{info.n_ctx_train:,} tokens"),
        ("weights", f"{decimal(info.weight_bytes)} in the file, {decimal(info.resident_bytes)} in memory"),
        ("session", f"{decimal(needed)} for a context of {llm.n_ctx:,} tokens"),
        ("available", "unknown" if available is None else decimal(available)),
        ("processor", f"{info.isa}, {info.n_threads} threads"),
        ("profile", str(find(llm.paths, llm.fingerprint) or "no: pyllm calibrate makes one")),
        ("attention", str(llm.attention)),
    ]


def tensor_table(llm: LLM) -> Table:
    table = Table("tensor", "type", "shape", "size", box=None)
    for tensor in llm.tensors():
        shape = " x ".join(str(n) for n in tensor.shape)
        table.add_row(Text(tensor.name), tensor.type_name, shape, decimal(tensor.size))
    return table
