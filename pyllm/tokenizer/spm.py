"""SentencePiece BPE (tokenizer.ggml.model "llama"): scores order the merges, "▁" spells a space."""

from __future__ import annotations

import importlib
from typing import Any

import sentencepiece

from pyllm.tokenizer import keys
from pyllm.tokenizer.keys import Metadata
from pyllm.tokenizer.vocab import PREFIX, TokenType, Vocab

SPACE = "▁"


class SentencePieceBpe:
    """The `sentencepiece` model of a vocabulary. Raises FormatError where the keys make none."""

    def __init__(self, metadata: Metadata, vocab: Vocab, add_space_prefix: bool) -> None:
        self._tokens = vocab.tokens
        self._byte_of = _byte_tokens(vocab)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_model_proto(metadata, vocab, add_space_prefix))
        except RuntimeError as error:
            keys.fail(PREFIX + "tokens", f"sentencepiece refuses the vocabulary: {error}")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with the space before it that the file asks for."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def piece(self, token: int) -> bytes:
        """The bytes a normal or byte token stands for."""
        return self._byte_of.get(token) or self._tokens[token].replace(SPACE, " ").encode()


def _model_proto(metadata: Metadata, vocab: Vocab, add_space_prefix: bool) -> bytes:
    # protobuf takes a tenth of a second to import, and only these vocabularies need it.
    pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto()
    scores = keys.floats(metadata, PREFIX + "scores", len(vocab.tokens)).tolist()
    for token, score, kind in zip(vocab.tokens, scores, _types(metadata, vocab), strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = TokenType.BYTE in vocab.types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_space_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    serialized: bytes = proto.SerializeToString()
    return serialized


def _types(metadata: Metadata, vocab: Vocab) -> list[int]:
    """Token types with exactly one UNKNOWN: sentencepiece asks for it, not every file says so."""
    types: list[int] = vocab.types.tolist()
    if TokenType.UNKNOWN not in types:
        unknown = keys.token_id(metadata, PREFIX + "unknown_token_id", len(types))
        types[unknown or 0] = TokenType.UNKNOWN
    return types


def _byte_tokens(vocab: Vocab) -> dict[int, bytes]:
    """The tokens that stand for single bytes: all 256 or none."""
    spelled = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
    tokens = {i: vocab.tokens[i] for i in vocab.ids_of(TokenType.BYTE)}
    if tokens and set(tokens.values()) != set(spelled):
        keys.fail(PREFIX + "token_type", f"the {len(tokens)} byte tokens are not <0x00> to <0xFF>")
    return {i: spelled[token] for i, token in tokens.items()}
