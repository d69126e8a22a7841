"""Token ids to text, one by one: never half a character, never an exception for what a model may generate."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyllm.tokenizer.tokenizer import Tokenizer


class Decoder:
    """Turns a stream of ids into text. Bytes that are not UTF-8 become U+FFFD.

    skip_special: leave control and unknown tokens out. continuing: the ids follow text that is already there,
    so the space with which a SentencePiece vocabulary begins every text is a real one here.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, continuing: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = tokenizer.add_space_prefix and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token completes, possibly none. Raises ArgumentError for an id out of range."""
        piece = self._tokenizer.piece(token)
        if self._tokenizer.is_special(token):
            return "" if self._skip_special else self._utf8.decode(piece)
        if self._strip_space and piece:
            piece = piece.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD where a character was begun, else nothing."""
        return self._utf8.decode(b"", final=True)
