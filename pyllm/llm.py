"""LLM: an opened model with its tokenizer and chat template; text in, text out."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from pyllm import _native
from pyllm.attention import UNCALIBRATED, Policy, is_preset, needs_profile, parse
from pyllm.completion import Completion
from pyllm.cpus import MAX_THREADS, default_threads
from pyllm.device import available_on, choose
from pyllm.errors import ArgumentError, DeviceError, FormatError, TemplateError, UnsupportedError
from pyllm.generation import Generation, Request, Sampling
from pyllm.guard import Guard
from pyllm.models import resolve
from pyllm.profile import Profile, beside, find
from pyllm.session import Ids, Progress, Session
from pyllm.template import ChatTemplate
from pyllm.tokenizer import Tokenizer
from pyllm.verified import VerifiedGeneration

Message = Mapping[str, Any]


class LLM:
    """A model file, opened.

    model: a known name, a path or a file name in the models directory. n_ctx: tokens of context, by default
    what the model was trained on. n_batch: tokens evaluated at once in prefill. n_threads: by default the
    CPUs this process may use. device: "cpu", "cuda", "cuda:N", or "auto", a GPU where there is one that holds
    the model and a session; `device` then tells. kv: "gpu", or on a GPU "split", with all keys and values in
    the host's memory but those of the sinks, the window and a batch of tokens: for contexts that its own
    memory does not hold. kv_type: what the KV cache holds, "f16", or on the CPU "q8_0", bytes with scales,
    but in layers whose keys have large biases: half the memory, for a loss that docs/performance.md measures.
    activation_bits: what activations are rounded to on their way into quantized weights, 16, or on the CPU 8
    where these have at most 6 and the loss is least (docs/performance.md): prompts are read faster.
    attention: for all its sessions, a policy, its text form ("dense", "adaptive:0.8") or a preset of the
    model's profile ("conservative", "balanced", "aggressive", "balanced:FILE" of another profile); by default
    "balanced" where there is a profile, or else pages alone by a 3-bit sketch (`attention.UNCALIBRATED`).
    isa: one of `pyllm.cpus.ISAS`, by default $PYLLM_ISA or the best of this processor. seed: makes the
    sequence of answers drawn without a seed of their own repeatable. guard: what watches over attention in
    all its sessions, by default nothing.

    Raises FileError, FormatError, UnsupportedError, NumericError, ArgumentError and
    InsufficientMemoryError, the last before anything is allocated. Memory is given back with the last
    reference to it and its sessions.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        *,
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_threads: int | None = None,
        device: str = "auto",
        kv: str = "gpu",
        kv_type: str = "f16",
        activation_bits: int = 16,
        attention: Policy | str | None = None,
        isa: str | None = None,
        seed: int | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.paths = resolve(model)
        self.name = self.paths[0].stem
        self._file = _native.File(self.paths)
        self.metadata = self._file.values()
        self.tokenizer = self._open_tokenizer()
        threads = default_threads() if n_threads is None else _whole("n_threads", n_threads, 1, MAX_THREADS)
        self.kv_type = _one_of("kv_type", kv_type, _native.KV_TYPES)
        self.activation_bits = _bits(activation_bits)
        isa = isa or os.environ.get("PYLLM_ISA") or None
        try:
            self._open_model(choose(device, self._file), kv, threads, isa)
        except DeviceError:
            if device != "auto":
                raise
            self._open_model(choose("cpu", self._file), kv, threads, isa)
        self._require_one_vocabulary()
        self.n_ctx = self._context(n_ctx)
        self.n_batch = _whole("n_batch", n_batch, 1, 4096)
        self.attention = self.policy(attention)
        if device == "auto" and self.device != "cpu" and not self._has_room():
            del self._model  # before there is another
            self._open_model(choose("cpu", self._file), kv, threads, isa)
        self.guard = guard
        self._seeds = random.Random(seed)
        self._first_use = threading.Lock()
        self._default_session: Session | None = None

    def _open_model(self, device: str, kv: str, n_threads: int, isa: str | None) -> None:
        self.device, self.kv = device, _kv(kv, device)
        self._model = _native.Model(self._file, n_threads, isa, device)
        self.info = self._model.info

    def _open_tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer(self.metadata)
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{self.paths[0]}: {error}") from None

    def _has_room(self) -> bool:
        """Whether the device has kernels and memory for a session."""
        try:
            needed, available = self.session_memory(self.n_ctx), available_on(self.device)
        except UnsupportedError:
            return False
        return available is None or needed <= available

    def _require_one_vocabulary(self) -> None:
        """A token of only one of the two could be neither read nor said."""
        if self.tokenizer.n_vocab != self.info.n_vocab:
            raise FormatError(
                f"{self.paths[0]}: key tokenizer.ggml.tokens has {self.tokenizer.n_vocab} entries, but "
                f"tensor token_embd.weight has {self.info.n_vocab} rows"
            )

    def _context(self, n_ctx: int | None) -> int:
        trained = self.info.n_ctx_train
        if n_ctx is not None and _whole("n_ctx", n_ctx, 1, 2**31 - 1) > trained:
            raise ArgumentError(f"n_ctx: {n_ctx} tokens, but the model was trained on at most {trained}")
        return trained if n_ctx is None else n_ctx

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell models apart: a profile belongs to one of them."""
        return self._file.fingerprint

    @cached_property
    def profile(self) -> Profile | None:
        """What `pyllm calibrate` found out about this model: the profile beside its file, or the one that
        pyllm ships for it, or None. Raises FileError and FormatError as `Profile.load` does."""
        path = find(self.paths, self.fingerprint)
        return Profile.load(path, self.fingerprint) if path else None

    def policy(self, attention: Policy | str | None) -> Policy:
        """The policy that `attention` stands for with this model, as the constructor takes it.

        Raises ArgumentError for what is none, does not fit the model, or needs a profile of a model that
        has none, FileError and FormatError for a profile that cannot be used.
        """
        if attention is None:
            policy: Policy = self.profile.presets["balanced"].policy if self.profile else UNCALIBRATED
        elif isinstance(attention, str):
            policy = self._named(attention)
        else:
            policy = attention
        if not isinstance(policy, Policy):
            raise ArgumentError(f"attention: expected a policy such as Adaptive(0.9), got {policy!r}")
        policy.native(self.info.n_layers, self.info.n_heads)
        fitted = getattr(policy, "calibration", None)  # not all policies have one
        if fitted and fitted.model not in (None, self.fingerprint):
            raise ArgumentError(
                f"attention: the calibration is of another model ({fitted.model}, not {self.fingerprint})"
            )
        return policy

    def _named(self, spec: str) -> Policy:
        if is_preset(spec):
            return self._preset(spec)
        profile = self.profile if needs_profile(spec) else None
        return parse(spec, profile)

    def _preset(self, spec: str) -> Policy:
        name, _, path = spec.strip().partition(":")
        profile = Profile.load(Path(path), self.fingerprint) if path else self.profile
        if profile is None:
            raise ArgumentError(
                f"attention {name!r}: {self.paths[0]} has no profile; pyllm calibrate {self.paths[0]} makes "
                f"{beside(self.paths)}"
            )
        return profile.presets[name].policy

    def tensors(self) -> list[_native.Tensor]:
        """The file's tensor directory: name, type, shape, size of each."""
        return self._file.tensors()

    # ---- text and tokens ----

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids. add_special: with BOS and EOS where the file asks for them; parse_special: special
        tokens spelled out in the text become those tokens."""
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Ids) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode([int(i) for i in ids])

    @cached_property
    def template(self) -> ChatTemplate:
        """The file's chat template. Raises TemplateError where there is none or it is broken."""
        source = self.metadata.get("tokenizer.chat_template")
        if source is None:
            raise TemplateError(
                f"{self.paths[0]}: the model has no chat template: use generate instead of chat"
            )
        with self._template_errors():
            return ChatTemplate(source, self.tokenizer.bos_token, self.tokenizer.eos_token)

    @contextmanager
    def _template_errors(self) -> Iterator[None]:
        """Names the file in the errors of its template."""
        try:
            yield
        except TemplateError as error:
            raise TemplateError(f"{self.paths[0]}: {error}") from error

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that the model sees for messages, up to where its answer begins."""
        template = self.template
        with self._template_errors():
            text = template.render(messages)
            if not text:
                raise TemplateError("the chat template makes nothing of these messages")
        ids = self.tokenizer.encode(text, add_special=False, parse_special=True)
        bos = self.tokenizer.bos_id
        # Some templates spell BOS out, others leave it to the file's keys.
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    # ---- sessions ----

    def session(
        self,
        *,
        n_ctx: int | None = None,
        attention: Policy | str | None = None,
        guard: Guard | None = None,
        kv_type: str | None = None,
        activation_bits: int | None = None,
    ) -> Session:
        """A new, empty session; by default with the model's context, attention, guard, kv_type and
        activation_bits.

        Raises InsufficientMemoryError with the numbers where its KV cache would not fit, and FileError where
        the guard's log cannot be written.
        """
        return Session(
            self._model,
            n_ctx=self.n_ctx if n_ctx is None else self._context(n_ctx),
            n_batch=self.n_batch,
            split=self.kv == "split",
            kv_type=self.kv_type if kv_type is None else _one_of("kv_type", kv_type, _native.KV_TYPES),
            activation_bits=_bits(self.activation_bits if activation_bits is None else activation_bits),
            attention=self.attention if attention is None else self.policy(attention),
            policy=self.policy,
            guard=guard or self.guard,
            identity={"model": self.name, "fingerprint": self.fingerprint},
        )

    def kv_bytes(self, n_ctx: int) -> int:
        """Bytes of keys and values in a KV cache of n_ctx tokens, filled."""
        params = _native.SessionParams(n_ctx, self.n_batch, self.attention.sinks, kv_type=self.kv_type)
        return _native.session_memory(self._model, params, 0).kv_bytes

    def session_memory(self, n_ctx: int) -> int:
        """Bytes of the device's memory that a session with a context of n_ctx tokens needs."""
        window = min(self.attention.window, n_ctx) if self.kv == "split" else 0
        params = _native.SessionParams(
            n_ctx, self.n_batch, self.attention.sinks, window, self.kv_type, self.activation_bits
        )
        return _native.session_memory(self._model, params, self.attention.sketch).total

    @property
    def default_session(self) -> Session:
        """What `generate` and `chat` use where no session is given: a prompt's known prefix is not
        evaluated again."""
        with self._first_use:
            if self._default_session is None:
                self._default_session = self.session()
            return self._default_session

    # ---- answers ----

    @overload
    def generate(
        self, prompt: str | Ids, *, stream: Literal[False] = False, **options: Any
    ) -> dict[str, Any]: ...

    @overload
    def generate(
        self, prompt: str | Ids, *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...

    def generate(
        self,
        prompt: str | Ids,
        *,
        max_tokens: int | None = 128,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        stream: bool = False,
        session: Session | None = None,
        progress: Progress | None = None,
        hold_back: bool = False,
        **sampling: float,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Continues a text, or token ids as they are.

        Returns a completion as OpenAI's API shapes it: `choices[0]["text"]`, `["finish_reason"]` ("stop" for
        an end-of-generation token or a stop string, "length" for max_tokens, "context" for a full context),
        `usage`, and beside them `timings` and `attention`. With `stream` an iterator of chunks.

        max_tokens None: until the model or the context ends. stop: strings that end the answer and are not
        part of it. logprobs: with each token its log-probability and that many alternatives. sampling: the
        fields of `Sampling`: temperature=0.8 (0 takes the most probable token), top_k=40, top_p=0.95,
        min_p=0.05, repeat_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0. The part of the prompt
        that the session holds already is not evaluated again; its last token always is, and a page tier reads
        other pages for a token alone than in a batch, so that the same prompt and seed may then give another
        answer. progress: called with (tokens done, tokens in
        all) after each batch of the prompt. hold_back: only what the session's guard has verified; what it
        repairs is drawn again. Raises ArgumentError, and ContextError where the prompt does not fit.
        """
        ids = self.tokenize(prompt, add_special=True) if isinstance(prompt, str) else prompt
        request = self._request(max_tokens, stop, seed, logprobs, sampling)
        completion = self._completion(ids, request, session, hold_back, chat=False)
        return completion.stream(progress) if stream else completion.collect(progress)

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Any
    ) -> dict[str, Any]: ...

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Any
    ) -> Iterator[dict[str, Any]]: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: bool | int | None = None,
        top_logprobs: int | None = None,
        stream: bool = False,
        session: Session | None = None,
        progress: Progress | None = None,
        hold_back: bool = False,
        **sampling: float,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answers messages of the OpenAI API's shape: [{"role": "user", "content": "..."}, ...].

        As `generate`, but with `choices[0]["message"]["content"]`, or `["delta"]` in chunks, and logprobs may
        also be asked for as that API does: logprobs=True, top_logprobs=N. Raises TemplateError where the
        model has no chat template or the template refuses the messages.
        """
        if isinstance(logprobs, bool):
            logprobs = (top_logprobs or 0) if logprobs else None
        elif top_logprobs is not None:
            raise ArgumentError("top_logprobs: goes with logprobs=True")
        request = self._request(max_tokens, stop, seed, logprobs, sampling)
        completion = self._completion(self.chat_tokens(messages), request, session, hold_back, chat=True)
        return completion.stream(progress) if stream else completion.collect(progress)

    def _request(
        self,
        max_tokens: int | None,
        stop: str | Sequence[str] | None,
        seed: int | None,
        logprobs: int | None,
        sampling: Mapping[str, Any],
    ) -> Request:
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        drawn = self._seeds.getrandbits(64) if seed is None else seed
        return Request(Sampling(**sampling), drawn, max_tokens, stops, logprobs)

    def _completion(
        self, prompt: Ids, request: Request, session: Session | None, hold_back: bool, chat: bool
    ) -> Completion:
        session = session or self.default_session
        if not session.belongs_to(self._model):
            raise ArgumentError("session: is one of another model")
        kind = VerifiedGeneration if hold_back else Generation
        ids = session.checked(prompt).tolist() if np.size(prompt) else []
        generation = kind(session, self.tokenizer, ids, request, continuing=not chat)
        session.require_room(generation.n_prompt)
        return Completion(generation, self.name, chat)


def _kv(kv: str, device: str) -> str:
    if _one_of("kv", kv, ("gpu", "split")) == "split" and device == "cpu":
        raise ArgumentError("kv: 'split' is between a GPU and the host, and the model is on the CPU")
    return kv


def _one_of(name: str, value: Any, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}")
    return value


def _bits(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (8, 16):
        raise ArgumentError(f"activation_bits: expected 16 or 8, got {value!r}")
    return value


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ArgumentError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
    return value
