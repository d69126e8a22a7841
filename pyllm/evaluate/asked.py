"""Policies that a user asks for, under names that tell them apart in a file of results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pyllm.attention import Policy
from pyllm.files import shown
from pyllm.llm import LLM


def asked(llm: LLM, attentions: Sequence[Policy | str]) -> dict[str, Policy]:
    """By name, each once. What a profile stands behind, which another calibration may replace, has a digest
    in its name: "balanced 3f2a9c41", of characters that any output can show. Raises as `LLM.policy` does."""
    found: dict[str, Policy] = {}
    for attention in attentions:
        policy = llm.policy(attention)
        name = f"{shown(attention)} {digest(llm, policy)[:8]}" if isinstance(attention, str) else str(policy)
        found[name] = policy
    return found


def digest(llm: LLM, policy: Policy) -> str:
    """Of all that the native library is told, in hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in sorted(policy.native(llm.info.n_layers, llm.info.n_heads).items()):
        found.update(name.encode() + (b"-" if value is None else np.asarray(value).tobytes()))
    return found.hexdigest()
