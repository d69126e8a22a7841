"""Answers as dictionaries, shaped as those of the OpenAI API and llama-cpp-python."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from pyllm.generation import Candidate, Generation, Piece, TokenLogprob
from pyllm.session import Progress


class Completion:
    """Turns one generation into a whole answer (`collect`) or its chunks (`stream`).

    Beside the API's fields the answer, or its last chunk, has `timings` (named as llama.cpp's server names
    them) and `attention` (as `Stats.attention`).
    """

    def __init__(self, generation: Generation, model: str, chat: bool) -> None:
        self.generation = generation
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def collect(self, progress: Progress | None) -> dict[str, Any]:
        """Runs the generation to its end; no other thread gets the session meanwhile."""
        with self.generation.session.lock:
            pieces = list(self.generation.pieces(progress))
        text = "".join(piece.text for piece in pieces)
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = self._choice(content, logprobs, pieces[-1].finish_reason)
        return {**self._head, "choices": [choice], **self._tail()}

    def stream(self, progress: Progress | None) -> Iterator[dict[str, Any]]:
        """Chunks as they come: text in `choices[0]`'s `text`, or `delta` for a chat."""
        head = {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        if self.chat:
            yield {**head, "choices": [self._choice({"delta": {"role": "assistant"}}, [], None)]}
        for piece in self.generation.pieces(progress):
            if piece.text or piece.logprobs or piece.finish_reason:
                tail = self._tail() if piece.finish_reason else {}
                yield {**head, "choices": [self._piece(piece)], **tail}

    def _piece(self, piece: Piece) -> dict[str, Any]:
        content = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
        return self._choice(content, piece.logprobs, piece.finish_reason)

    def _choice(
        self, content: dict[str, Any], logprobs: Sequence[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        shaped = None
        if self.generation.request.logprobs is not None:
            shaped = chat_logprobs(logprobs) if self.chat else text_logprobs(logprobs)
        return {"index": 0, **content, "logprobs": shaped, "finish_reason": reason}

    def _tail(self) -> dict[str, Any]:
        generation = self.generation
        stats = generation.stats
        n_prompt, n_answer = generation.n_prompt, generation.n_generated
        return {
            "usage": {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_answer,
                "total_tokens": n_prompt + n_answer,
            },
            "timings": {
                "cache_n": generation.n_reused,
                "prompt_n": stats.prefill_tokens,
                "prompt_ms": 1000 * stats.prefill_seconds,
                "prompt_per_second": stats.prefill_per_second,
                "predicted_n": n_answer,
                "predicted_ms": 1000 * stats.decode_seconds,
                "predicted_per_second": stats.decode_per_second,
            },
            "attention": stats.attention(),
        }


def text_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The shape of the completions API."""
    return {
        "tokens": [entry.text for entry in entries],
        "text_offset": [entry.offset for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_best_by_text(entry) for entry in entries],
    }


def _best_by_text(entry: TokenLogprob) -> dict[str, float]:
    """Tokens may share a text (parts of characters are all U+FFFD): the best one stands for them."""
    best: dict[str, float] = {}
    for candidate in entry.top:
        best.setdefault(candidate.text, candidate.logprob)
    return best


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The shape of the chat completions API."""
    return {
        "content": [
            {**_chat_token(entry), "top_logprobs": [_chat_token(candidate) for candidate in entry.top]}
            for entry in entries
        ]
    }


def _chat_token(entry: Candidate) -> dict[str, Any]:
    """Its bytes are there for whoever puts characters together that take several tokens."""
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.piece)}
