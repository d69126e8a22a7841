"""A conversation, perhaps about a document: its messages, and what the model is shown of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm import documents
from pyllm.llm import LLM
from pyllm.session import Progress

Message = dict[str, str]

# The first question about a document: both in the user's turn, because not every template has a system role.
# (The default model answers about as well with the document there as in the system message.)
FRAME = "{text}\n\nQuestion: {question}"


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @classmethod
    def read(cls, path: str) -> Document:
        """Raises DocumentError."""
        return cls(Path(path).name, documents.read(path))


class Conversation:
    """Questions and answers in one session, whose KV cache keeps what was already read.

    sampling: keyword arguments for `LLM.chat`. answer: the last chunk of the last answer, None while there
    is none that ended by itself.
    """

    def __init__(self, llm: LLM, sampling: dict[str, Any]) -> None:
        self.llm = llm
        self.session = llm.session()
        self.sampling = sampling
        self.document: Document | None = None
        self.messages: list[Message] = []
        self.answer: dict[str, Any] | None = None

    def open(self, document: Document | None) -> None:
        """Starts over, about another document. Raises ContextError, changing nothing, if it does not fit."""
        before = self.document, self.messages
        self.document, self.messages = document, []
        try:
            self.session.require_room(len(self._prompt("")))
        except Exception:
            self.document, self.messages = before
            raise

    def reset(self) -> None:
        """Forgets questions and answers, not the document."""
        self.messages = []
        self.answer = None

    def prefill(self, progress: Progress | None = None) -> None:
        """Evaluates the part of the prompt that is the same for every first question: the document."""
        one, other = self._prompt("a"), self._prompt("1")
        differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        shared = one[: next(differing, 0)]
        if shared:
            self.session.sync(shared, progress)

    def ask(self, question: str, progress: Progress | None = None) -> Generator[str, None, None]:
        """Yields the answer as it comes.

        One that is interrupted is kept as far as it came; where nothing came, the question is forgotten too.
        """
        self.answer = None
        self.messages.append({"role": "user", "content": question})
        said = ""
        try:
            options = {"session": self.session, "progress": progress, **self.sampling}
            for chunk in self.llm.chat(self._shown(self.messages), stream=True, **options):
                choice = chunk["choices"][0]
                text = choice["delta"].get("content", "")
                said += text
                if choice["finish_reason"]:
                    self.answer = chunk
                if text:
                    yield text
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()

    def _shown(self, messages: list[Message]) -> list[Message]:
        """The messages with the document in the first of them."""
        if not self.document:
            return messages
        framed = FRAME.format(text=self.document.text, question=messages[0]["content"])
        return [{**messages[0], "content": framed}, *messages[1:]]

    def _prompt(self, question: str) -> list[int]:
        """Tokens of a first question."""
        return self.llm.chat_tokens(self._shown([{"role": "user", "content": question}]))
