"""What a survey needs of a model: its tokenizer and a few sizes, read without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pyllm import _native
from pyllm.errors import FormatError, UnsupportedError
from pyllm.models import resolve
from pyllm.tokenizer import Tokenizer, keys

KV_ITEM = 2  # bytes of a number in the KV cache, f16


@dataclass(frozen=True)
class ModelFile:
    """fingerprint: hexadecimal, tells models apart. n_ctx: tokens it was trained on at most. weight_bytes: of
    all tensors, as stored."""

    name: str
    paths: list[Path]
    fingerprint: str
    tokenizer: Tokenizer
    n_ctx: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    weight_bytes: int

    @classmethod
    def open(cls, model: str | PathLike[str]) -> ModelFile:
        """model: a known name, a path or a file name in the models directory. Raises FileError, FormatError
        and UnsupportedError."""
        paths = resolve(model)
        file = _native.File(paths)
        metadata = file.values()
        try:
            arch = keys.string(metadata, "general.architecture")
            n_heads = keys.size(metadata, f"{arch}.attention.head_count")
            dim = keys.size(metadata, f"{arch}.embedding_length")
            return cls(
                name=paths[0].stem,
                paths=paths,
                fingerprint=file.fingerprint,
                tokenizer=Tokenizer(metadata),
                n_ctx=keys.size(metadata, f"{arch}.context_length"),
                n_layers=keys.size(metadata, f"{arch}.block_count"),
                n_kv_heads=keys.size(metadata, f"{arch}.attention.head_count_kv", n_heads),
                head_dim=keys.size(metadata, f"{arch}.attention.key_length", dim // n_heads),
                weight_bytes=sum(tensor.size for tensor in file.tensors()),
            )
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{paths[0]}: {error}") from None

    @property
    def kv_bytes(self) -> int:
        """Bytes that one token takes in the KV cache: a key and a value per layer and key/value head."""
        return 2 * KV_ITEM * self.n_layers * self.n_kv_heads * self.head_dim

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self.tokenizer.encode(text, parse_special=False))
