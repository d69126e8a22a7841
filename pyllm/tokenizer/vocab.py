"""The vocabulary of a GGUF file: its tokens, their kinds, and which of them have a task."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pyllm.errors import FormatError
from pyllm.tokenizer import keys
from pyllm.tokenizer.keys import Metadata

PREFIX = "tokenizer.ggml."

# These end a generation whatever the keys say, as in llama.cpp: the keys often name only one of a file's.
END_OF_GENERATION = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<EOT>",
        "<｜end▁of▁sentence｜>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    }
)


class TokenType(IntEnum):
    """tokenizer.ggml.token_type; sentencepiece numbers its pieces alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocab:
    """tokens: (n_vocab) distinct texts as the file spells them; types: (n_vocab) of TokenType."""

    tokens: list[str]
    types: NDArray[np.int64]
    bos_id: int | None
    eos_id: int | None
    eog_ids: frozenset[int]

    def ids_of(self, *types: TokenType) -> list[int]:
        return [int(i) for i in np.flatnonzero(np.isin(self.types, types))]


def read_vocab(metadata: Metadata, default_ids: dict[str, int]) -> Vocab:
    """Raises FormatError, naming the key. default_ids: of "bos" and "eos", where the file does not say."""
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    ids = {
        name: keys.token_id(metadata, f"{PREFIX}{name}_token_id", len(tokens))
        for name in ("bos", "eos", "eot", "eom")
    }
    for name, default in default_ids.items():
        if ids[name] is None and default < len(tokens):
            ids[name] = default
    named = {i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None}
    special = np.flatnonzero(np.isin(types, (TokenType.CONTROL, TokenType.USER_DEFINED)))
    known = {int(i) for i in special if tokens[i] in END_OF_GENERATION}
    return Vocab(tokens, types, ids["bos"], ids["eos"], frozenset(named | known))


def _tokens(metadata: Metadata) -> list[str]:
    key = PREFIX + "tokens"
    tokens = keys.strings(metadata, key)
    if not tokens:
        keys.fail(key, "the vocabulary is empty")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        seen: dict[str, int] = {}
        first, second = next((seen[t], i) for i, t in enumerate(tokens) if seen.setdefault(t, i) != i)
        raise FormatError(f"key {key}: entries {first} and {second} are both {tokens[first]!r}")
    return tokens


def _types(metadata: Metadata, n_vocab: int) -> NDArray[np.int64]:
    key = PREFIX + "token_type"
    if key not in metadata:
        return np.full(n_vocab, TokenType.NORMAL, np.int64)
    types = keys.integers(metadata, key, n_vocab)
    known = np.isin(types, list(TokenType))
    if not known.all():
        index = int(np.argmin(known))
        keys.fail(key, f"entry {index} is {types[index]}, not one of 1 to {max(TokenType)}")
    return types
