"""Small random GGUF models, written with gguf: any architecture, weight type and RoPE scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

RowStd = float | np.ndarray  # standard deviation of a matrix, or of each of its rows (rows)

# Types for which gguf has no quantizer are filled with random bytes: where the block keeps its f16 scale,
# where its f16 minimum, and the ratio of the two that centres the values on zero.
RANDOM_LAYOUT: dict[Type, tuple[int, int | None, float]] = {
    Type.Q2_K: (80, 82, 1.5),
    Type.Q3_K: (108, None, 0.0),
    Type.Q4_K: (0, 2, 7.5),
    Type.Q5_K: (0, 2, 15.5),
    Type.Q6_K: (208, None, 0.0),
    Type.IQ4_NL: (0, None, 0.0),
    Type.IQ4_XS: (0, None, 0.0),
}
QUANTIZED = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, *RANDOM_LAYOUT)
WEIGHT_TYPES = (Type.F32, Type.F16, Type.BF16, *QUANTIZED)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("Ġ", "the"),
    ("i", "n"),
    ("a", "n"),
    ("an", "d"),
    ("Ġ", "and"),
    ("e", "r"),
)


@dataclass(frozen=True)
class RopeScaling:
    """The {arch}.rope.scaling.* keys; None leaves a key out."""

    kind: str
    factor: float
    original_context: int | None = None
    attn_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes; n_heads * head_dim, dim and n_ff must be multiples of the weight type's block."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dim: int
    n_ff: int
    n_vocab: int


def write_tiny(
    path: Path,
    arch: str = "llama",
    *,
    n_layers: int = 2,
    n_heads: int = 8,
    n_kv_heads: int = 2,
    head_dim: int = 32,
    dim: int = 256,
    n_ff: int = 512,
    n_vocab: int = 320,
    n_embeddings: int | None = None,
    types: Type | Mapping[str, Type] = Type.F32,
    tied: bool = True,
    rope_base: float = 10000.0,
    rope_scaling: RopeScaling | None = None,
    rope_freqs: np.ndarray | None = None,
    attention_scale: float | None = None,
    floats: Mapping[str, float] | None = None,
    sliding_window: int | None = None,
    n_ctx_train: int = 4096,
    sharp: float = 1.0,
    biases: bool = False,
    tokenizer: bool = False,
    same_layers: bool = False,
    seed: int = 0,
) -> Path:
    """Writes a random model of architecture llama, qwen2 or qwen3 and returns its path.

    types: one ggml type for all matrices, or a type per matrix by the part of its name that tells it apart
    ("attn_q", "ffn_down", "token_embd", "output"; "*" for all others). Norms and biases are F32.
    rope_freqs: (head_dim // 2) factors that divide the RoPE frequencies. sharp: random
    attention is nearly uniform; this scales queries up, by 1 for the first head to sharp for the last (qwen3
    normalizes its heads, so there by √sharp for all), so that decisions vary between heads and queries.
    biases: all matrices of a layer have one, not only qwen2's queries, keys and values.
    same_layers: all have the first one's matrices, so that large models are written soon.
    floats: more keys, without the architecture they begin with.
    tokenizer: adds a byte-level BPE vocabulary with a chat template, for which n_vocab must be at least 267.
    n_embeddings: rows of the embedding table, where they are not to be n_vocab.
    """
    shape = Shape(n_layers, n_heads, n_kv_heads, head_dim, dim, n_ff, n_embeddings or n_vocab)
    writer = gguf.GGUFWriter(str(path), arch)
    _write_config(writer, shape, rope_base, rope_scaling, attention_scale, n_ctx_train)
    for key, value in (floats or {}).items():
        writer.add_float32(f"{arch}.{key}", value)
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    if tokenizer:
        _write_tokenizer(writer, n_vocab)
    rng = np.random.default_rng(seed)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    _write_weights(writer, rng, arch, shape, types, tied, sharp, biases, same_layers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_matrix(rng: np.random.Generator, kind: Type, rows: int, cols: int, std: RowStd) -> np.ndarray:
    """A matrix (rows, cols) as the file stores it: float32, float16, or uint8 (rows, bytes of a row)."""
    row_std = np.broadcast_to(np.asarray(std, np.float32), (rows,))[:, None]
    if kind in RANDOM_LAYOUT:
        return _random_blocks(rng, kind, rows, cols, row_std)
    values = (rng.normal(size=(rows, cols)) * row_std).astype(np.float32)
    return values if kind == Type.F32 else gguf.quants.quantize(values, kind)


def _random_blocks(
    rng: np.random.Generator, kind: Type, rows: int, cols: int, row_std: np.ndarray
) -> np.ndarray:
    """Random bytes with f16 scales patched in, such that a row's values have about the wanted deviation."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if cols % block_size:
        raise ValueError(f"{cols} columns are not a multiple of {kind.name}'s block of {block_size}")
    blocks = rng.integers(0, 256, (rows, cols // block_size, block_bytes), dtype=np.uint8)
    _patch_scale(blocks, kind, np.ones(blocks.shape[:2]))
    deviation = float(gguf.quants.dequantize(blocks.reshape(rows, -1), kind).std())
    _patch_scale(blocks, kind, row_std / deviation * rng.uniform(0.7, 1.3, blocks.shape[:2]))
    return blocks.reshape(rows, -1)


def _patch_scale(blocks: np.ndarray, kind: Type, scale: np.ndarray) -> None:
    """Writes scale (rows, n_blocks), and its minimum, into blocks (rows, n_blocks, bytes)."""
    scale_at, min_at, min_ratio = RANDOM_LAYOUT[kind]
    blocks[..., scale_at : scale_at + 2] = _f16_bytes(scale)
    if min_at is not None:
        blocks[..., min_at : min_at + 2] = _f16_bytes(scale * min_ratio)


def _f16_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).astype("<f2")[..., None].view(np.uint8)


def _write_config(
    writer: gguf.GGUFWriter,
    shape: Shape,
    rope_base: float,
    scaling: RopeScaling | None,
    attention_scale: float | None,
    n_ctx_train: int,
) -> None:
    writer.add_name("tiny")
    writer.add_context_length(n_ctx_train)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_base)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.n_vocab)
    if shape.head_dim * shape.n_heads != shape.dim:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if attention_scale is not None:
        writer.add_attention_scale(attention_scale)
    if scaling is not None:
        _write_rope_scaling(writer, scaling)


def _write_rope_scaling(writer: gguf.GGUFWriter, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original_context is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    if scaling.attn_factor is not None:
        writer.add_rope_scaling_attn_factors(scaling.attn_factor)
    if scaling.beta_fast is not None:
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    if scaling.beta_slow is not None:
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _write_weights(
    writer: gguf.GGUFWriter,
    rng: np.random.Generator,
    arch: str,
    shape: Shape,
    types: Type | Mapping[str, Type],
    tied: bool,
    sharp: float,
    biases: bool,
    same_layers: bool,
) -> None:
    first: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, cols: int, gain: RowStd = 1.0) -> None:
        part = name.removesuffix(".weight").split(".")[-1]
        kind = _type_of(types, part)
        std = np.asarray(gain) / np.sqrt(cols)
        weights = first[part] if part in first else random_matrix(rng, kind, rows, cols, std)
        if same_layers:
            first[part] = weights
        writer.add_tensor(name, weights, raw_dtype=kind)

    def norm(name: str, n: int, gain: float = 1.0) -> None:
        writer.add_tensor(name, (gain * rng.normal(1.0, 0.1, n)).astype(np.float32))

    def bias(name: str, n: int, always: bool = False) -> None:
        if biases or always:
            writer.add_tensor(name, rng.normal(0.0, 0.3, n).astype(np.float32))

    q_rows, kv_rows = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    q_gain = np.repeat(np.geomspace(1.0, sharp, shape.n_heads), shape.head_dim)
    matrix("token_embd.weight", shape.n_vocab, shape.dim)
    for layer in range(shape.n_layers):
        blk = f"blk.{layer}"
        norm(f"{blk}.attn_norm.weight", shape.dim)
        matrix(f"{blk}.attn_q.weight", q_rows, shape.dim, q_gain)
        matrix(f"{blk}.attn_k.weight", kv_rows, shape.dim)
        matrix(f"{blk}.attn_v.weight", kv_rows, shape.dim)
        matrix(f"{blk}.attn_output.weight", shape.dim, q_rows)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            bias(f"{blk}.attn_{part}.bias", rows, arch == "qwen2")
        bias(f"{blk}.attn_output.bias", shape.dim)
        if arch == "qwen3":
            norm(f"{blk}.attn_q_norm.weight", shape.head_dim, sharp**0.5)
            norm(f"{blk}.attn_k_norm.weight", shape.head_dim)
        norm(f"{blk}.ffn_norm.weight", shape.dim)
        matrix(f"{blk}.ffn_gate.weight", shape.n_ff, shape.dim)
        matrix(f"{blk}.ffn_up.weight", shape.n_ff, shape.dim)
        matrix(f"{blk}.ffn_down.weight", shape.dim, shape.n_ff)
        for part, rows in (("gate", shape.n_ff), ("up", shape.n_ff), ("down", shape.dim)):
            bias(f"{blk}.ffn_{part}.bias", rows)
    norm("output_norm.weight", shape.dim)
    if not tied:
        matrix("output.weight", shape.n_vocab, shape.dim)


def _type_of(types: Type | Mapping[str, Type], part: str) -> Type:
    return types if isinstance(types, Type) else types.get(part, types.get("*", Type.F32))


def _write_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """256 byte tokens, a few merges, special tokens, and unused tokens up to n_vocab."""
    tokens = [*byte_alphabet(), *("".join(pair) for pair in MERGES)]
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    end_of_text = len(tokens)
    tokens += SPECIAL_TOKENS
    kinds += [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    if n_vocab < len(tokens):
        raise ValueError(f"n_vocab is {n_vocab}, but the tokenizer has {len(tokens)} tokens")
    unused = [f"<unused{i}>" for i in range(n_vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * len(unused)])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(end_of_text + 1)
    writer.add_eos_token_id(end_of_text + 2)
    writer.add_pad_token_id(end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte, in byte order."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
