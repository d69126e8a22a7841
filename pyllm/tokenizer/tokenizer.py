"""The tokenizer of a model: finds special tokens, leaves the rest to byte-level BPE or SentencePiece."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from typing import Protocol

from pyllm.errors import ArgumentError, UnsupportedError
from pyllm.tokenizer import keys
from pyllm.tokenizer.bpe import ByteLevelBpe, find_pre
from pyllm.tokenizer.decoder import Decoder
from pyllm.tokenizer.keys import Metadata
from pyllm.tokenizer.spm import SentencePieceBpe
from pyllm.tokenizer.vocab import PREFIX, TokenType, Vocab, read_vocab

MODELS = ("gpt2", "llama")
NEVER = re.compile(r"(?!)")


class PlainText(Protocol):
    """What the two kinds of vocabulary do with text that holds no special tokens."""

    def encode(self, text: str) -> list[int]: ...
    def piece(self, token: int) -> bytes: ...


class Tokenizer:
    """Built from GGUF metadata (keys `tokenizer.ggml.*`); read-only, shared freely between threads.

    Raises FormatError for keys that are missing, mistyped or contradict each other, UnsupportedError for a
    kind of tokenizer or pre-tokenizer that pyllm does not know; both name the key.
    """

    def __init__(self, metadata: Metadata) -> None:
        model = keys.string(metadata, PREFIX + "model")
        if model not in MODELS:
            raise UnsupportedError(
                f"key {PREFIX}model: tokenizer {model!r} is not supported; supported: {', '.join(MODELS)}"
            )
        sentencepiece = model == "llama"
        self._vocab = read_vocab(metadata, {"bos": 1, "eos": 2} if sentencepiece else {})
        self.add_space_prefix = sentencepiece and keys.boolean(metadata, PREFIX + "add_space_prefix", True)
        self.add_bos = keys.boolean(
            metadata, PREFIX + "add_bos_token", sentencepiece or find_pre(metadata).add_bos
        )
        self.add_eos = keys.boolean(metadata, PREFIX + "add_eos_token", False)
        self._check_added_ids()
        self._plain: PlainText = (
            SentencePieceBpe(metadata, self._vocab, self.add_space_prefix)
            if sentencepiece
            else ByteLevelBpe(metadata, self._vocab)
        )
        self._special = frozenset(self._vocab.ids_of(TokenType.CONTROL, TokenType.UNKNOWN))
        whole = self._vocab.ids_of(TokenType.USER_DEFINED)
        self._user_defined = _any_of(self._vocab, whole)
        self._all_special = _any_of(self._vocab, [*whole, *self._special])
        self._id_of = {self._vocab.tokens[i]: i for i in (*whole, *self._special)}

    @property
    def n_vocab(self) -> int:
        return len(self._vocab.tokens)

    @property
    def bos_id(self) -> int | None:
        return self._vocab.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._vocab.eos_id

    @property
    def bos_token(self) -> str:
        """The text of BOS, as a chat template writes it; empty where the file names none."""
        return "" if self.bos_id is None else self._vocab.tokens[self.bos_id]

    @property
    def eos_token(self) -> str:
        """The text of EOS; empty where the file names none."""
        return "" if self.eos_id is None else self._vocab.tokens[self.eos_id]

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends a generation: the file's eos, eot and eom, and well-known control tokens."""
        return self._vocab.eog_ids

    def encode(self, text: str, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        add_special: BOS before and EOS after, where the file asks for them. parse_special: the text of a
        control token means that token; otherwise it is text like any other. Raises ArgumentError for what is
        no text or has a lone surrogate.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text: expected a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(f"the text has a lone surrogate at index {error.start}") from None
        special = self._all_special if parse_special else self._user_defined
        ids = self._added(self.bos_id, add_special and self.add_bos)
        for index, part in enumerate(special.split(text)):
            if index % 2:  # between plain parts, what the pattern caught
                ids.append(self._id_of[part])
            elif part:
                ids += self._plain.encode(part)
        return ids + self._added(self.eos_id, add_special and self.add_eos)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Raises ArgumentError as `piece` does."""
        decoder = self.decoder(skip_special)
        return "".join([decoder.feed(token) for token in ids]) + decoder.flush()

    def decoder(self, skip_special: bool = False, continuing: bool = False) -> Decoder:
        """A decoder for ids that come one by one; see `Decoder`."""
        return Decoder(self, skip_special, continuing)

    def piece(self, token: int) -> bytes:
        """The bytes of one token, maybe part of a character. Raises ArgumentError for an id out of range."""
        token = self._check(token)
        match self._vocab.types[token]:
            case TokenType.NORMAL | TokenType.BYTE:
                return self._plain.piece(token)
            case TokenType.UNUSED:
                return b""
            case _:
                return self._vocab.tokens[token].encode()

    def is_special(self, token: int) -> bool:
        """Whether a token is a control or unknown token: not text."""
        return token in self._special

    def _check(self, token: int) -> int:
        index = operator.index(token)
        if not 0 <= index < self.n_vocab:
            raise ArgumentError(f"token id {index} is not in the vocabulary of {self.n_vocab}")
        return index

    def _check_added_ids(self) -> None:
        for name, wanted, token in (("bos", self.add_bos, self.bos_id), ("eos", self.add_eos, self.eos_id)):
            if wanted and token is None:
                keys.fail(f"{PREFIX}{name}_token_id", f"missing, but {PREFIX}add_{name}_token asks for it")

    def _added(self, token: int | None, wanted: bool) -> list[int]:
        return [token] if wanted and token is not None else []


def _any_of(vocab: Vocab, ids: list[int]) -> re.Pattern[str]:
    """Finds the leftmost of these tokens in a text, the longest first; one group."""
    texts = sorted((vocab.tokens[i] for i in ids), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else NEVER
