"""The transformer, all tokens at once, in float32: the specification of pyllm_session_eval.

Axes: T tokens, H query heads, G key/value heads, d = head_dim. Attention's inside is float64, see
`attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, UnsupportedError
from .attention import AttentionResult, Policy, attend
from .rope import rotate
from .weights import Model, Tensor

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ForwardResult:
    """logits: (n_logits, n_vocab) float32. layers: (n_layers) what each layer's attention did."""

    logits: Array
    layers: list[AttentionResult]


def forward(
    model: Model,
    tokens: Sequence[int],
    policy: Policy | None = None,
    n_logits: int | None = None,
    activation_bits: int | None = 16,
    products: str = "float",
) -> ForwardResult:
    """Evaluates tokens from position 0 and returns the logits of the last n_logits of them (all by default).

    activation_bits: 16, or 8 for the narrow weights of attention's output and of the feed-forward network;
    None multiplies quantized weights by the float32 input, which no library call does: it tells what the
    rounding costs. products: as in `attend`. Raises ArgumentError for an empty prompt or a token out of
    range.
    """
    config = model.config
    check_tokens(model, tokens)
    x = model.tensor("token_embd.weight").values[np.asarray(tokens)]
    layers = []
    wide = activation_bits and 16
    for layer in range(config.n_layers):
        blk = f"blk.{layer}"
        normed = rms_norm(x, model.tensor(f"{blk}.attn_norm.weight").values, config.rms_eps)
        q, k, v = project_qkv(model, layer, normed, wide)
        result = attend(q, k, v, config.scale, policy or Policy(), layer, products=products)
        heads = result.output.reshape(len(tokens), -1)
        x = x + biased_linear(model, f"{blk}.attn_output", heads, activation_bits)
        normed = rms_norm(x, model.tensor(f"{blk}.ffn_norm.weight").values, config.rms_eps)
        x = x + swiglu(model, layer, normed, activation_bits)
        layers.append(result)
    last = x[len(tokens) - (len(tokens) if n_logits is None else n_logits) :]
    last = rms_norm(last, model.tensor("output_norm.weight").values, config.rms_eps)
    output = model.tensors.get("output.weight", model.tensor("token_embd.weight"))
    return ForwardResult(linear(last, output, wide), layers)


def check_tokens(model: Model, tokens: Sequence[int]) -> None:
    """Raises ArgumentError for tokens that cannot be evaluated, UnsupportedError past a sliding window."""
    if len(tokens) == 0:
        raise ArgumentError("the prompt is empty")
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < model.config.n_vocab:
            raise ArgumentError(f"token {token} is out of range, the model has {model.config.n_vocab}")
    window = model.config.sliding_window
    if window and len(tokens) > window:
        raise UnsupportedError(f"{len(tokens)} tokens exceed the model's sliding window of {window}")


def project_qkv(model: Model, layer: int, normed: Array, bits: int | None) -> tuple[Array, Array, Array]:
    """normed: (T, dim). q: (T, H, d), k: (T, G, d), both rotated, v: (T, G, d)."""
    config = model.config

    def heads(part: str) -> Array:
        projected = biased_linear(model, f"blk.{layer}.attn_{part}", normed, bits)
        projected = projected.reshape(len(normed), -1, config.head_dim)
        norm = model.tensors.get(f"blk.{layer}.attn_{part}_norm.weight")
        return projected if norm is None else rms_norm(projected, norm.values, config.rms_eps)

    positions = np.arange(len(normed))
    return rotate(heads("q"), positions, config.rope), rotate(heads("k"), positions, config.rope), heads("v")


def swiglu(model: Model, layer: int, normed: Array, bits: int | None) -> Array:
    """down(silu(gate(x)) · up(x)); normed and the result: (T, dim). Gate's and up's input is rounded once."""
    blk = f"blk.{layer}"
    readers = [model.tensor(f"{blk}.ffn_{part}.weight") for part in ("gate", "up")]
    shared = 16 if bits and any(w.quantized and not w.narrow for w in readers) else bits
    gate = biased_linear(model, f"{blk}.ffn_gate", normed, shared)
    up = biased_linear(model, f"{blk}.ffn_up", normed, shared)
    return biased_linear(model, f"{blk}.ffn_down", silu(gate) * up, bits)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / √(mean(x²) + eps) · weight over the last axis; the mean is taken in float64."""
    mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    normed: Array = x * (1.0 / np.sqrt(mean_square + eps)).astype(np.float32) * weight
    return normed


def silu(x: Array) -> Array:
    """x · sigmoid(x), without overflow."""
    sigmoid: Array = np.float32(0.5) * (np.float32(1.0) + np.tanh(np.float32(0.5) * x))
    return x * sigmoid


def linear(x: Array, weight: Tensor, bits: int | None = 16) -> Array:
    """x (n, cols) times weight (rows, cols) transposed: (n, rows). Quantized weights see an input of 16 bits,
    narrow ones of `bits`; with None all see x."""
    if weight.quantized and bits:
        x = rounded_to_int8(x) if weight.narrow and bits == 8 else rounded_to_int16(x)
    product: Array = x @ weight.values.T
    return product


def biased_linear(model: Model, name: str, x: Array, bits: int | None) -> Array:
    """linear with NAME.weight, plus NAME.bias where the file has one."""
    projected = linear(x, model.tensor(f"{name}.weight"), bits)
    bias = model.tensors.get(f"{name}.bias")
    return projected if bias is None else projected + bias.values


def rounded_to_int16(x: Array) -> Array:
    """What the library's integer kernels see of x (n, cols), cols a multiple of 32: `rounded` with a scale
    for every 32 values."""
    return rounded(x, 32, 32512)


def rounded_to_int8(x: Array) -> Array:
    """The same where activations have 8 bits: with a scale for every 16 values."""
    return rounded(x, 16, 127)


def rounded(x: Array, group: int, most: int) -> Array:
    """x (n, cols), cols a multiple of group, in whole multiples of one scale per group, up to ±most.

    scale = max|x| / most in float32, q = x / scale rounded half to even, value = q · scale. A group whose
    scale is 0 gives zeros.
    """
    groups = x.reshape(len(x), -1, group)
    scale = np.max(np.abs(groups), axis=-1, keepdims=True) / np.float32(most)
    q: Array = np.rint(np.divide(groups, scale, where=scale > 0, out=np.zeros_like(groups)))
    return np.asarray(q * scale).reshape(x.shape)
