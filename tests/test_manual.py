"""Questions about the manual that the repository ships, on the default model: adaptive beside dense.

A model of 135M parameters misses most facts, so its answers are compared with those under dense attention;
scripts/accuracy records how many are right.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

from pyllm import LLM, Dense
from pyllm.cli.conversation import FRAME

DATA = resources.files("pyllm") / "data"
ANSWER = 24  # tokens at most


@pytest.mark.slow
def test_answers_about_the_manual_are_those_of_dense_attention(default_model: Path) -> None:
    """Fed the answer that dense attention gives, the default policy would have said it, token by token."""
    llm = LLM(default_model)
    text = (DATA / "manual.md").read_text("utf-8")
    dense, adaptive = llm.session(attention=Dense()), llm.session()
    agreed = total = 0
    for item in json.loads((DATA / "manual.questions.json").read_text("utf-8"))[::6]:
        question = FRAME.format(text=text, question=item["question"])
        prompt = llm.chat_tokens([{"role": "user", "content": question}])
        answer = [int(dense.sync(prompt).argmax())]
        while len(answer) < ANSWER and answer[-1] not in llm.tokenizer.eog_ids:
            answer.append(int(dense.eval(answer[-1:]).argmax()))
        said = [int(adaptive.sync(prompt).argmax())]
        said += [int(adaptive.eval([token]).argmax()) for token in answer[:-1]]
        agreed += sum(a == b for a, b in zip(said, answer, strict=True))
        total += len(answer)
    assert dense.stats.bulk_read == 100
    assert 0 < (adaptive.stats.bulk_read or 0) < 40
    assert (adaptive.stats.bulk_work or 0) < 45
    assert agreed >= 0.9 * total, f"{agreed} of {total}"
