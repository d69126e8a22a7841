"""Dialogue to evaluate on: a scripted conversation about Python's language reference, in chat tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import accumulate

import numpy as np

from pyllm.errors import TemplateError
from pyllm.evaluate.texts import CHARACTERS_PER_TOKEN, Text
from pyllm.llm import LLM, Message

OPENINGS = (
    "What does Python's language reference say about {topic}?",
    "Could you explain {topic} to me?",
    "I keep running into {topic}. Where do I begin?",
    "New question: what should I know about {topic}?",
)
FOLLOW_UPS = (
    "Go on, please.",
    "And then?",
    "Is there more on {topic} that I should know?",
    "I see. What else?",
    "Thanks! Anything to watch out for?",
)
QUOTING = "Earlier you said: “{said}” What does the reference say after that?"
SHOW = "Can you show me how that looks?"
ENOUGH = 400  # characters of an answer


def conversation() -> list[Message]:
    """User and assistant in turns. What the assistant says is the half of the reference that is evaluated as
    prose; what is fitted is not fitted on dialogue. The user's questions are a fixed script."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    messages: list[Message] = []
    for name in sorted(topics)[::2]:
        for question, answer in _exchanges(name.replace("-", " "), topics[name]):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def excerpt(llm: LLM, n_tokens: int, seed: int) -> Text:
    """At most n_tokens of it, from a question that seed chooses, as the model's chat template writes it; as a
    transcript where there is none, or one that refuses it."""
    messages = conversation()
    room = CHARACTERS_PER_TOKEN * n_tokens
    before = [0, *accumulate(len(message["content"]) for message in messages)]
    starts = [i for i in range(0, len(messages), 2) if before[-1] - before[i] >= room] or [0]
    start = random.Random(seed).choice(starts)
    stop = next((i for i in range(start, len(messages)) if before[i] - before[start] >= room), len(messages))
    return Text("dialogue", np.array(_tokens(llm, messages[start:stop])[:n_tokens], np.int32))


def _exchanges(topic: str, text: str) -> Iterator[tuple[str, str]]:
    """Questions with their answers, which together are the text."""
    rng = random.Random(topic)
    said = ""
    for turn, answer in enumerate(_answers(text)):
        if turn == 0:
            question = rng.choice(OPENINGS)
        elif _is_example(answer):
            question = SHOW
        else:
            question = QUOTING if said and turn % 3 == 0 else rng.choice(FOLLOW_UPS)
        yield question.format(topic=topic, said=said), answer
        said = re.split(r"(?<=\.)\s", " ".join(answer.split()))[0]


def _answers(text: str) -> Iterator[str]:
    """Paragraphs, short ones joined with the next; an example begins an answer of its own."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if parts and (_is_example(paragraph) or sum(map(len, parts)) >= ENOUGH):
            yield "\n\n".join(parts)
            parts = []
        parts.append(paragraph)
    if parts:
        yield "\n\n".join(parts)


def _is_example(text: str) -> bool:
    """Whether it looks like code: indented, begun in lower case, in short lines."""
    return re.match(r" {3,}(>>>|[a-z_@])", text) is not None and max(map(len, text.splitlines())) < 60


def _tokens(llm: LLM, messages: list[Message]) -> list[int]:
    try:
        return llm.chat_tokens(messages)
    except TemplateError:
        script = "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
        return llm.tokenize(script, add_special=True, parse_special=False)
