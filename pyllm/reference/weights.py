"""A GGUF file as numpy arrays: what the keys say, and every tensor dequantized to float32 by gguf."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import FormatError, UnsupportedError
from .rope import RopeConfig

ROPE_KIND = {"llama": "norm", "qwen2": "neox", "qwen3": "neox"}

NARROW_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Of at most 6 bits: their inputs may be rounded to 8."""

FLOAT_TYPES = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)


@dataclass(frozen=True)
class Config:
    """Sizes and constants of a model; scale is c, by which attention scores are multiplied."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_eps: float
    scale: float
    sliding_window: int | None
    rope: RopeConfig


@dataclass(frozen=True)
class Tensor:
    """values: float32 (rows, cols). quantized: its inputs are rounded to 16 bits, or where narrow to 8, see
    `model.linear`."""

    values: npt.NDArray[np.float32]
    quantized: bool
    narrow: bool = False


@dataclass(frozen=True)
class Model:
    config: Config
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        """Raises FormatError when the file has no such tensor."""
        if name not in self.tensors:
            raise FormatError(f"tensor {name!r} is missing")
        return self.tensors[name]


def load(*paths: str | Path) -> Model:
    """Reads a model from one GGUF file, or from all parts of a split one in order (keys are in the first)."""
    readers = [gguf.GGUFReader(str(path)) for path in paths]
    tensors = {
        tensor.name: Tensor(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32),
            tensor.tensor_type not in FLOAT_TYPES,
            tensor.tensor_type.name in NARROW_TYPES,
        )
        for reader in readers
        for tensor in reader.tensors
    }
    return Model(read_config(readers[0], tensors), tensors)


class _Keys:
    """The file's keys, those of the architecture without its prefix."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._reader = reader
        self.architecture = str(self._contents("general.architecture"))

    def required(self, key: str) -> Any:
        value = self._contents(f"{self.architecture}.{key}")
        if value is None:
            raise FormatError(f"key '{self.architecture}.{key}' is missing")
        return value

    def get(self, key: str, default: Any) -> Any:
        value = self._contents(f"{self.architecture}.{key}")
        return default if value is None else value

    def _contents(self, key: str) -> Any:
        found = self._reader.get_field(key)
        return None if found is None else found.contents()


def read_config(reader: gguf.GGUFReader, tensors: Mapping[str, Tensor]) -> Config:
    """Raises FormatError for a missing key, UnsupportedError for an unknown architecture or RoPE scaling."""
    keys = _Keys(reader)
    if keys.architecture not in ROPE_KIND:
        raise UnsupportedError(f"architecture {keys.architecture!r} is not one of {', '.join(ROPE_KIND)}")
    if "token_embd.weight" not in tensors:
        raise FormatError("tensor 'token_embd.weight' is missing")
    n_heads, dim = int(keys.required("attention.head_count")), int(keys.required("embedding_length"))
    head_dim = int(keys.get("attention.key_length", dim // n_heads))
    return Config(
        architecture=keys.architecture,
        n_layers=int(keys.required("block_count")),
        n_heads=n_heads,
        n_kv_heads=int(keys.get("attention.head_count_kv", n_heads)),
        head_dim=head_dim,
        dim=dim,
        n_ff=int(keys.required("feed_forward_length")),
        n_vocab=len(tensors["token_embd.weight"].values),
        n_ctx_train=int(keys.required("context_length")),
        rms_eps=float(keys.required("attention.layer_norm_rms_epsilon")),
        scale=float(keys.get("attention.scale", 0) or 1.0 / math.sqrt(head_dim)),
        sliding_window=keys.get("attention.sliding_window", None),
        rope=_read_rope(keys, head_dim, tensors),
    )


def _read_rope(keys: _Keys, head_dim: int, tensors: Mapping[str, Tensor]) -> RopeConfig:
    scaling = str(keys.get("rope.scaling.type", "linear"))
    if scaling not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"RoPE scaling {scaling!r} is not one of none, linear, yarn")
    factors = tensors.get("rope_freqs.weight")
    return RopeConfig(
        kind=ROPE_KIND[keys.architecture],
        n_rot=int(keys.get("rope.dimension_count", head_dim)),
        base=float(keys.get("rope.freq_base", 10000.0)),
        scaling=scaling,
        factor=float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)) or 1.0),
        original_context=int(
            keys.get("rope.scaling.original_context_length", keys.required("context_length"))
        ),
        attn_factor=float(keys.get("rope.scaling.attn_factor", 1.0))
        * float(keys.get("rope.scaling.yarn_attn_factor", 1.0)),
        ext_factor=float(keys.get("rope.scaling.yarn_ext_factor", 1.0)),
        beta_fast=float(keys.get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=float(keys.get("rope.scaling.yarn_beta_slow", 1.0)),
        freq_factors=None if factors is None else factors.values.astype(np.float64),
    )
