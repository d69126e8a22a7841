"""What policies lose on answers: the default model reads numbers hidden in prose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyllm import LLM, Adaptive, Dense
from pyllm.bulk import first_with_bulk
from pyllm.evaluate import recall

WINDOW: dict[str, Any] = {"window": 128, "sinks": 4}


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return LLM(default_model, n_ctx=1024, attention="dense")


def test_samples_ask_about_one_text(llm: LLM) -> None:
    samples = recall.draw(llm, 900, n_texts=2)
    assert len(samples) == 2 * recall.KEYS
    for text in (samples[: recall.KEYS], samples[recall.KEYS :]):
        shown = [llm.detokenize(sample.tokens) for sample in text]
        numbers = {sample.answers for sample in text}
        assert len(numbers) == recall.KEYS
        for (number,) in numbers:
            assert all(prompt.count(number) == 1 for prompt in shown)
    assert all(len(sample.tokens) <= 900 for sample in samples)


def test_what_cannot_be_asked_is_no_sample(llm: LLM) -> None:
    assert recall.draw(llm, 200) == []


def test_length_has_as_much_bulk_as_not() -> None:
    assert recall.length(1024, 16, 8192) == 2 * first_with_bulk(1024, 16)
    assert recall.length(1024, 16, 1500) == 1500


def test_who_reads_nothing_loses_the_answers(llm: LLM) -> None:
    """A gate that calls everything local loses much, who reads all nothing, pages little."""
    policies = [
        Adaptive(0.0, **WINDOW),
        Adaptive(2.0, **WINDOW),
        Dense(page_bits=3, page_share=0.003, **WINDOW),
        Adaptive(0.0, **WINDOW),
    ]
    seen: list[tuple[int, int]] = []
    samples = recall.draw(llm, 900, n_texts=2)
    local, everything, pages, again = recall.losses(llm, policies, samples, lambda *at: seen.append(at))
    assert abs(everything) < 1e-6
    assert everything < pages < local / 20
    assert local > 0.1
    assert again == local  # what came between changed nothing
    assert seen[-1] == (sum(len(sample.tokens) for sample in samples),) * 2
