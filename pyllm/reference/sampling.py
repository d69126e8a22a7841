"""The distribution that pyllm_sample draws from, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sampling:
    """The fields of pyllm_sampling in pyllm.h, with the values that switch each off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


def distribution(logits: npt.ArrayLike, params: Sampling, recent: Sequence[int] = ()) -> Array:
    """Probabilities (n_vocab) after penalties, top_k, top_p, min_p and temperature, in this order.

    A token that a filter drops gets probability 0. Greedy (temperature <= 0) gives 1 to the most probable
    token. Among equal logits the lower id comes first.
    """
    penalized = penalize(np.asarray(logits, np.float64), params, recent)
    order = np.argsort(-penalized, kind="stable")
    if params.temperature <= 0:
        order = order[:1]
    if params.top_k > 0:
        order = order[: params.top_k]
    if params.top_p < 1:
        order = order[: nucleus_size(softmax(penalized[order]), params.top_p)]
    if params.min_p > 0:
        p = softmax(penalized[order])
        order = order[p >= min(params.min_p, 1.0) * p[0]]
    probabilities = np.zeros(len(penalized))
    temperature = params.temperature if params.temperature > 0 else 1.0
    probabilities[order] = softmax(penalized[order] / temperature)
    return probabilities


def penalize(logits: Array, params: Sampling, recent: Sequence[int]) -> Array:
    """Lowers the logit of every token that occurs in recent.

    A positive logit is divided by repeat_penalty, another multiplied; then frequency_penalty times the
    number of occurrences and presence_penalty are subtracted.
    """
    penalized: Array = logits.copy()
    for token, occurrences in Counter(recent).items():
        logit = float(logits[token])
        logit = logit / params.repeat_penalty if logit > 0 else logit * params.repeat_penalty
        penalized[token] = logit - occurrences * params.frequency_penalty - params.presence_penalty
    return penalized


def nucleus_size(p: Array, top_p: float) -> int:
    """How many of the descending probabilities p make a sum >= top_p; at least one."""
    return min(len(p), int(np.searchsorted(np.cumsum(p), top_p)) + 1)


def softmax(logits: Array) -> Array:
    exponentials: Array = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())
