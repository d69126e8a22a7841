"""From a prompt's tokens to text, piece by piece: sampling, stop strings, and when to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm import _native
from pyllm.errors import ArgumentError, PyllmError
from pyllm.session import Progress, Session
from pyllm.stats import Stats
from pyllm.tokenizer import Tokenizer

RECENT = 64  # tokens the penalties look back at


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 takes the most probable one.

    top_k 0, top_p 1, min_p 0, repeat_penalty 1 and the other penalties at 0 are off.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "temperature": (0, 100),
            "top_k": (0, 2**31 - 1),
            "top_p": (0, 1),
            "min_p": (0, 1),
        }
        limits |= {"repeat_penalty": (0.01, 100), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            kind = int if name == "top_k" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                what = "a whole number" if name == "top_k" else "a number"
                raise ArgumentError(f"{name}: expected {what} from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class Request:
    """One answer to be generated. logprobs: alternatives reported per token; None for no
    log-probabilities."""

    sampling: Sampling
    seed: int
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ArgumentError(f"stop: expected non-empty strings, got {list(self.stop)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentError(f"seed: expected None or a whole number, got {self.seed!r}")
        for name, low in (("max_tokens", 1), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ArgumentError(f"{name}: expected None or a whole number from {low} up, got {value!r}")


@dataclass(frozen=True)
class Candidate:
    """A token and its log-probability. piece: its bytes, maybe part of a character."""

    token: int
    piece: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.piece.decode("utf-8", "replace")


@dataclass(frozen=True)
class TokenLogprob(Candidate):
    """A generated token. offset: characters of the answer before it; top: the likeliest, best first."""

    offset: int
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class Piece:
    """Text ready to be shown, with the log-probabilities of tokens that ended in it."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # "stop", "length" or "context" in the last piece


class StopFilter:
    """Passes text on, but for what may be the start of a stop string; cuts it where one is complete."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain by now."""
        self.held += text
        found = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self.held) - max((self._overlap(stop) for stop in self.stop), default=0))

    def flush(self) -> str:
        """What is still held: the text has ended."""
        return "" if self.stopped else self._release(len(self.held))

    def _release(self, n: int) -> str:
        ready, self.held = self.held[:n], self.held[n:]
        return ready

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)


class Draft:
    """The tokens of an answer and the text they make; it can be taken back to any of them."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], request: Request, continuing: bool
    ) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._prompt, self._request = tokenizer, prompt[-RECENT:], request
        self._continuing = continuing
        self._params: dict[str, Any] = asdict(request.sampling)
        self._rng = np.array([request.seed % 2**64], np.uint64)
        self._drawn_from: list[np.uint64] = []  # state of the random numbers before each token
        self._begin_text()

    def _begin_text(self) -> None:
        self._decoder = self._tokenizer.decoder(skip_special=True, continuing=self._continuing)
        self._stops = StopFilter(self._request.stop)
        self._length = 0

    def draw(self, logits: NDArray[np.float32], full: bool) -> Piece:
        """The next token's piece, with a reason where it is the last one. full: so is the context."""
        self._drawn_from.append(self._rng[0])
        recent = [*self._prompt, *self.tokens[-RECENT:]][-RECENT:]
        token = _native.sample(logits, self._params, np.array(recent, np.int32), self._rng)
        self.tokens.append(token)
        if token in self._tokenizer.eog_ids:
            return Piece(self._end(), (), "stop")
        offset = self._length
        ready = self._push(token)
        logprobs = self._logprobs(token, logits, offset)
        if reason := self._finish(full):
            return Piece(ready + self._end(), logprobs, reason)
        return Piece(ready, logprobs)

    def take_back(self, n: int) -> None:
        """Forgets all but the first n tokens: the next one is drawn with the same random number again."""
        if n < len(self.tokens):
            self._rng[0] = self._drawn_from[n]
        del self.tokens[n:], self._drawn_from[n:]
        self._begin_text()
        for token in self.tokens:
            self._push(token)

    def _push(self, token: int) -> str:
        """The text that is certain with this token."""
        text = self._decoder.feed(token)
        self._length += len(text)
        return self._stops.push(text)

    def _end(self) -> str:
        return self._stops.push(self._decoder.flush()) + self._stops.flush()

    def _finish(self, full: bool) -> str | None:
        if self._stops.stopped:
            return "stop"
        if len(self.tokens) == self._request.max_tokens:
            return "length"
        return "context" if full else None

    def _logprobs(self, token: int, logits: NDArray[np.float32], offset: int) -> tuple[TokenLogprob, ...]:
        """Of the model's own distribution: before penalties and temperature."""
        n = self._request.logprobs
        if n is None:
            return ()
        peak = float(logits.max())
        logprobs = logits - (peak + np.log(np.exp(logits - peak, dtype=np.float64).sum()))
        best = np.argsort(-logprobs, kind="stable")[:n]
        piece = self._tokenizer.piece
        top = tuple(Candidate(int(i), piece(int(i)), float(logprobs[i])) for i in best)
        return (TokenLogprob(token, piece(token), float(logprobs[token]), offset, top),)


class Generation:
    """One answer in the making: iterate for its pieces; the counts are right at every moment.

    n_prompt: tokens of the prompt, n_reused: of these found in the session's KV cache; `stats`: what was
    evaluated for it. continuing: the answer goes on in the prompt's text, rather than beginning one of its
    own. Raises ContextError where the prompt does not fit, and PyllmError where the session was used for
    something else between two pieces.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        request: Request,
        *,
        continuing: bool,
    ) -> None:
        if not len(prompt):
            raise ArgumentError("the prompt is empty: there is nothing to go on from")
        self.session = session
        self.request = request
        self.n_prompt = len(prompt)
        self.n_reused = 0
        self.draft = Draft(tokenizer, prompt, request, continuing)
        self._prompt = prompt
        self._before = session.stats
        self._revision = 0  # of the session, as the last piece left it
        self._ended: Stats | None = None  # the session's, when the answer was complete

    @property
    def n_generated(self) -> int:
        """Tokens of the answer."""
        return len(self.draft.tokens)

    @property
    def stats(self) -> Stats:
        return (self._ended or self.session.stats) - self._before

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Evaluates what the session does not hold yet of the prompt, then yields the answer as it comes.

        progress: called with (tokens done, tokens in all) after each batch of the prompt.
        """
        with self.session.lock:
            piece = self._draw(self._begin(progress))
        while not piece.finish_reason:
            yield piece
            with self.session.lock:
                piece = self._draw(self._next())
        yield piece

    def _begin(self, progress: Progress | None) -> NDArray[np.float32]:
        """The prompt's logits."""
        with self.session.lock:
            self._before = self.session.stats
            logits = self.session.sync(self._prompt, progress)
            self.n_reused = self.n_prompt - self.stats.prefill_tokens
            self._revision = self.session.revision
        return logits

    def _draw(self, logits: NDArray[np.float32]) -> Piece:
        """Under the lock of what made the logits: what comes after the last piece is not this answer's."""
        piece = self.draft.draw(logits, full=self.session.position >= self.session.n_ctx)
        if piece.finish_reason:
            self._ended = self.session.stats
        return piece

    def _next(self) -> NDArray[np.float32]:
        """The logits after the newest token."""
        with self.session.lock:
            self._require_untouched()
            logits = self.session.eval(self.draft.tokens[-1:])
            self._revision = self.session.revision
        return logits

    def _require_untouched(self) -> None:
        if self.session.revision != self._revision:
            raise PyllmError("the session was used for something else while this answer was streaming")
