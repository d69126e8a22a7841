"""Text to ids and back: llama.cpp's tokenizations, both kinds of vocabulary, streams, broken metadata."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from pyllm import _native
from pyllm.errors import ArgumentError, FormatError, UnsupportedError
from pyllm.models import DEFAULT_MODEL, resolve
from pyllm.tokenizer import Tokenizer
from pyllm.tokenizer.bpe import PRE, pre_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "smollm2-135m.json").read_text("utf-8"))["tokenize"]
P = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CORPUS = """\
The harbour crane lifts twelve tons. Its manual says: never lift in wind above 14 m/s!
Der Kran hebt zwölf Tonnen; the naïve operator doesn't read.  Two  spaces, (brackets), a_b = c1 + 42;
日本語のテキスト、漢字とかな。 Привет, мир!
""".splitlines()

# Where the characters of a vocabulary's own training text meet anything else.
texts = st.text() | st.lists(st.sampled_from([*CORPUS, *" '\n\t▁0é日😀"]), max_size=6).map("".join)


@cache
def smollm() -> Tokenizer:
    return Tokenizer(_native.File(resolve(DEFAULT_MODEL)).values())


@cache
def smollm_bytes() -> frozenset[int]:
    """The bytes that have a token of their own."""
    pieces_of_all = map(smollm().piece, range(smollm().n_vocab))
    return frozenset(piece[0] for piece in pieces_of_all if len(piece) == 1)


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != P + key}


# ---- the default model ----


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_ids_are_those_of_llama_cpp(case: dict[str, Any]) -> None:
    assert smollm().encode(case["text"], parse_special=True) == case["ids"]
    assert smollm().encode(case["text"], parse_special=False) == case["ids_plain"]
    assert smollm().decode(case["ids"]) == case["text"]


def test_the_default_models_special_tokens() -> None:
    tokenizer = smollm()
    assert (tokenizer.n_vocab, tokenizer.add_bos, tokenizer.add_eos) == (49152, False, False)
    assert (tokenizer.bos_id, tokenizer.bos_token) == (1, "<|im_start|>")
    assert (tokenizer.eos_id, tokenizer.eos_token) == (2, "<|im_end|>")
    assert tokenizer.eog_ids == {0, 2}  # the file names only <|im_end|>; <|endoftext|> ends a generation too


@settings(deadline=None)
@given(texts)
def test_real_vocabulary_loses_only_bytes_it_does_not_have(text: str) -> None:
    kept = bytes(byte for byte in text.encode() if byte in smollm_bytes())
    for parse_special in (True, False):
        ids = smollm().encode(text, parse_special=parse_special)
        assert b"".join(map(smollm().piece, ids)) == kept


def test_a_byte_without_a_token_parts_its_neighbours() -> None:
    (mark,) = smollm().encode("!")
    assert smollm().encode("!!") != [mark, mark]
    assert smollm().encode("!\x04!") == [mark, mark]


# ---- byte-level BPE ----


def byte_level(pre: str = "gpt-2", **changed: Any) -> dict[str, Any]:
    """All bytes, some merges, and special tokens; `changed` replaces keys."""
    merges = ["t h", "th e", "Ġ the", "1 2", "< |", "' t", "Ġ Ġ"]
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "whole"]
    special = {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<|end|>!": CONTROL, "<tool>": USER_DEFINED}
    padding = {"[PAD]": UNUSED}
    return {
        P + "model": "gpt2",
        P + "pre": pre,
        P + "tokens": [*tokens, *special, *padding],
        P + "token_type": [*[NORMAL] * len(tokens), *special.values(), *padding.values()],
        P + "merges": merges,
        P + "bos_token_id": len(tokens),
        P + "eos_token_id": len(tokens) + 1,
        **{P + key: value for key, value in changed.items()},
    }


def pieces(tokenizer: Tokenizer, text: str, **options: bool) -> list[bytes]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx"])
@settings(deadline=None)
@given(text=texts)
@example(text="<|begin|>the<tool> <|end|>!")
def test_decode_undoes_encode(pre: str, text: str) -> None:
    tokenizer = byte_level_tokenizer(pre)
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids) == text


@cache
def byte_level_tokenizer(pre: str) -> Tokenizer:
    return Tokenizer(byte_level(pre))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm it's x2024 a", ["I", "'m", "Ġit", "'s", "Ġx", "2024", "Ġa"]),
        ("gpt-2", "I'LL\n\n  go", ["I", "'", "LL", "ĊĊĠ", "Ġgo"]),
        ("smollm", "in 2024, we'll", ["in", "Ġ", "2", "0", "2", "4", ",", "Ġwe", "'ll"]),
        ("qwen2", "in 2024, WE'LL", ["in", "Ġ", "2", "0", "2", "4", ",", "ĠWE", "'LL"]),
        ("qwen2", "\tx (y)!\n\n z", ["ĉx", "Ġ(", "y", ")!ĊĊ", "Ġz"]),
        ("qwen2", "a  \n  b   ", ["a", "ĠĠĊ", "Ġ", "Ġb", "ĠĠĠ"]),
        ("llama-bpe", "in 12345, WE'LL", ["in", "Ġ", "123", "45", ",", "ĠWE", "'LL"]),
        ("default", "a+b 12345.6", ["a", "+", "b", "Ġ", "123", "45", ".", "6"]),
    ],
)
def test_pre_tokenizers_cut_as_known(pre: str, text: str, words: list[str]) -> None:
    assert [word for word, _ in pre_tokenizer(PRE[pre]).pre_tokenize_str(text)] == words


def test_pre_tokenizer_is_default_where_the_file_does_not_say() -> None:
    assert pieces(Tokenizer(without(byte_level(), "pre")), "1212") == [b"12", b"1", b"2"]
    assert pieces(Tokenizer(byte_level("gpt-2")), "1212") == [b"12", b"12"]


def test_llama3_takes_a_whole_token_before_merging() -> None:
    assert pieces(Tokenizer(byte_level("llama-bpe", add_bos_token=False)), "whole") == [b"whole"]
    assert pieces(Tokenizer(byte_level("dbrx")), "whole") == [b"w", b"h", b"o", b"l", b"e"]


def test_special_tokens_are_parsed_or_plain() -> None:
    tokenizer = Tokenizer(byte_level())
    text = "<|begin|>the<|end|>!<|end|>"
    assert pieces(tokenizer, text) == [b"<|begin|>", b"the", b"<|end|>!", b"<|end|>"]
    plain = pieces(tokenizer, text, parse_special=False)
    assert plain[0] == b"<|"
    assert b"".join(plain) == text.encode()
    assert b"<|end|>" not in plain


def test_user_defined_tokens_are_always_parsed() -> None:
    for parse_special in (True, False):
        assert pieces(Tokenizer(byte_level()), "a<tool>b", parse_special=parse_special) == [
            b"a",
            b"<tool>",
            b"b",
        ]


def test_bos_and_eos_are_added_where_the_file_asks() -> None:
    text = "the"
    both = Tokenizer(byte_level(add_bos_token=True, add_eos_token=True))
    (the,) = both.encode(text)
    assert both.encode(text, add_special=True) == [both.bos_id, the, both.eos_id]
    neither = Tokenizer(byte_level())
    assert neither.encode(text, add_special=True) == [the]
    assert Tokenizer(byte_level("llama-bpe")).encode("", add_special=True) == [neither.bos_id]


def test_end_of_generation_is_what_keys_and_known_texts_say() -> None:
    metadata = byte_level(eot_token_id=3, eom_token_id=4)
    eos, end = metadata[P + "eos_token_id"], metadata[P + "tokens"].index("<|end|>")
    assert Tokenizer(metadata).eog_ids == {eos, end, 3, 4}
    metadata[P + "tokens"][end] = "<|stop|>"
    assert Tokenizer(without(metadata, "eos_token_id")).eog_ids == {3, 4}


def test_a_known_text_that_is_a_normal_token_does_not_end_generation() -> None:
    metadata = byte_level()
    end = metadata[P + "tokens"].index("<|end|>")
    metadata[P + "token_type"][end] = NORMAL
    assert Tokenizer(without(metadata, "eos_token_id")).eog_ids == frozenset()


def test_without_types_every_token_is_normal() -> None:
    tokenizer = Tokenizer(without(byte_level(), "token_type"))
    assert b"<|begin|>" not in pieces(tokenizer, "<|begin|>")


def test_unused_tokens_have_no_text() -> None:
    metadata = byte_level()
    assert Tokenizer(metadata).decode([metadata[P + "tokens"].index("[PAD]")]) == ""


# ---- streams ----


@settings(deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30), st.booleans())
def test_a_stream_gives_what_decode_gives(ids: list[int], skip_special: bool) -> None:
    decoder = smollm().decoder(skip_special)
    streamed = "".join(map(decoder.feed, ids)) + decoder.flush()
    kept = [i for i in ids if not (skip_special and smollm().is_special(i))]
    assert streamed == b"".join(map(smollm().piece, kept)).decode("utf-8", "replace")
    assert streamed == smollm().decode(ids, skip_special)


@settings(deadline=None)
@given(texts)
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    tokenizer = byte_level_tokenizer("gpt-2")
    decoder, so_far = tokenizer.decoder(), ""
    for token in tokenizer.encode(text):
        so_far += decoder.feed(token)
        assert text.startswith(so_far)
    assert so_far == text
    assert decoder.flush() == ""


def test_bytes_that_are_not_utf8_become_replacement_characters() -> None:
    tokenizer = byte_level_tokenizer("gpt-2")
    half, a = tokenizer.encode("é")[0], tokenizer.encode("a")[0]
    decoder = tokenizer.decoder()
    assert [decoder.feed(half), decoder.feed(a), decoder.feed(half)] == ["", "�a", ""]
    assert decoder.flush() == "�"


@pytest.mark.parametrize("bad", [-1, 49152, 10**30])
def test_an_id_out_of_range_is_refused(bad: int) -> None:
    for decode in (smollm().piece, smollm().decoder().feed, lambda i: smollm().decode([0, i])):
        with pytest.raises(ArgumentError, match=f"token id {bad} is not in the vocabulary of 49152"):
            decode(bad)


def test_bytes_are_no_text() -> None:
    with pytest.raises(ArgumentError, match="expected a str, got bytes"):
        smollm().encode(b"text")  # type: ignore[arg-type]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ArgumentError, match="lone surrogate at index 1"):
        smollm().encode("a\ud800b")


# ---- SentencePiece ----


@cache
def trained(space_prefix: bool, byte_fallback: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420 if byte_fallback else 170,
        byte_fallback=byte_fallback,
        add_dummy_prefix=space_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def exported(space_prefix: bool = True, byte_fallback: bool = True, **changed: Any) -> dict[str, Any]:
    """The trained model as GGUF keys; `changed` replaces keys."""
    processor = trained(space_prefix, byte_fallback)
    ids = range(processor.get_piece_size())
    tests = ((processor.is_unknown, UNKNOWN), (processor.is_control, CONTROL), (processor.is_byte, BYTE))
    return {
        P + "model": "llama",
        P + "tokens": [processor.id_to_piece(i) for i in ids],
        P + "scores": [processor.get_score(i) for i in ids],
        P + "token_type": [next((kind for is_kind, kind in tests if is_kind(i)), NORMAL) for i in ids],
        P + "add_space_prefix": space_prefix,
        **{P + key: value for key, value in changed.items()},
    }


@cache
def exported_tokenizer(space_prefix: bool, byte_fallback: bool) -> Tokenizer:
    return Tokenizer(exported(space_prefix, byte_fallback))


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("space_prefix", [True, False])
@settings(deadline=None)
@given(text=texts)
@example(text="")
@example(text=" ")
@example(text="<s>a</s><unk><0x41>")
def test_ids_are_those_of_the_sentencepiece_model(space_prefix: bool, byte_fallback: bool, text: str) -> None:
    processor = trained(space_prefix, byte_fallback)
    tokenizer = exported_tokenizer(space_prefix, byte_fallback)
    ids = tokenizer.encode(text, parse_special=False)
    assert ids == processor.encode(text)
    if processor.unk_id() not in ids:
        assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_sentencepiece_defaults() -> None:
    tokenizer = Tokenizer(without(exported(), "add_space_prefix"))
    assert (tokenizer.bos_id, tokenizer.eos_id, *tokenizer.eog_ids) == (1, 2, 2)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (True, False, True)
    assert tokenizer.encode("crane", add_special=True) == [1, *trained(True, True).encode("crane")]


def test_each_text_after_a_special_token_begins_with_a_space() -> None:
    crane = trained(True, True).encode("crane")
    assert exported_tokenizer(True, True).encode("<s>crane</s>crane") == [1, *crane, 2, *crane]


def test_the_first_space_is_dropped_only_at_the_start() -> None:
    tokenizer = exported_tokenizer(True, True)
    crane = tokenizer.encode("crane")
    assert tokenizer.decode([1, *crane, *crane], skip_special=True) == "crane crane"
    continuing = tokenizer.decoder(continuing=True)
    assert "".join(map(continuing.feed, crane)) == " crane"
    assert exported_tokenizer(False, True).decode(trained(True, True).encode(" a")[:1]).startswith(" ")


def test_byte_tokens_are_bytes() -> None:
    tokenizer = exported_tokenizer(True, True)
    ids = tokenizer.encode("😀")
    assert [tokenizer.piece(i) for i in ids[-4:]] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    decoder = tokenizer.decoder()
    assert [decoder.feed(i) for i in ids] == ["", "", "", "", "😀"]


def test_a_vocabulary_without_an_unknown_token_gets_one() -> None:
    metadata = exported(byte_fallback=False, unknown_token_id=0)
    metadata[P + "token_type"][0] = CONTROL
    ids = Tokenizer(metadata).encode("crane😀", parse_special=False)
    assert ids == trained(True, False).encode("crane😀")
    assert ids[-1] == 0


# ---- metadata ----


def test_arrays_may_be_numpy() -> None:
    for metadata in (byte_level(), exported()):
        arrays = {
            **metadata,
            P + "token_type": np.array(metadata[P + "token_type"], np.int32),
            P + "scores": np.array(metadata.get(P + "scores", []), np.float32),
        }
        assert Tokenizer(arrays).encode("the crane 12") == Tokenizer(metadata).encode("the crane 12")


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", ""])
def test_unknown_models_are_named(model: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"tokenizer\.ggml\.model: .*'{model}'.* gpt2, llama"):
        Tokenizer(byte_level(model=model))


def test_unknown_pre_tokenizers_are_named() -> None:
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.pre: .*'viking'.*default, gpt-2,.* qwen2"):
        Tokenizer(byte_level("viking"))


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(FormatError, match=rf"key tokenizer\.ggml\.{key}: missing"):
        Tokenizer(without(byte_level(), key))


def test_missing_scores_are_named() -> None:
    with pytest.raises(FormatError, match=r"key tokenizer\.ggml\.scores: missing"):
        Tokenizer(without(exported(), "scores"))


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("model", 3, "expected a string, not an integer"),
        ("pre", ["gpt-2"], "expected a string, not an array"),
        ("tokens", "abc", "expected an array of strings, not a string"),
        ("tokens", [], "the vocabulary is empty"),
        ("tokens", ["a", b"\xff"], "entry 1 is bytes that are not UTF-8"),
        ("tokens", ["a", "b", "a"], "entries 0 and 2 are both 'a'"),
        ("token_type", [1, 1], "2 entries for 269 tokens"),
        ("token_type", [1] * 268 + [7], "entry 268 is 7, not one of 1 to 6"),
        ("token_type", [1.5] * 269, "expected an array of integers"),
        ("token_type", [[1], 1], "expected an array of integers"),
        ("merges", ["a b", "ab"], "entry 1 is not two tokens"),
        ("merges", ["t h", "t e"], "entry 1 needs 'te', which is not a token"),
        ("merges", ["t h", "日 h"], "entry 1 needs '日', which is not a token"),
        ("merges", np.zeros(3), "expected an array of strings, not an array of float64"),
        ("bos_token_id", 269, "269 is not a token of the vocabulary of 269"),
        ("eot_token_id", -1, "-1 is not a token"),
        ("eos_token_id", "</s>", "expected an integer, not a string"),
        ("eom_token_id", True, "expected an integer, not a boolean"),
        ("add_bos_token", 1, "expected a boolean, not an integer"),
        ("add_eos_token", "yes", "expected a boolean, not a string"),
    ],
)
def test_bad_keys_are_named(key: str, value: Any, cause: str) -> None:
    assert len(byte_level()[P + "tokens"]) == 269
    with pytest.raises(FormatError, match=rf"^key tokenizer\.ggml\.{key}: .*{cause}"):
        Tokenizer({**byte_level(), P + key: value})


@pytest.mark.parametrize(
    ("key", "index", "value", "cause"),
    [
        ("scores", 5, float("nan"), "scores: entry 5 is not a finite number"),
        ("token_type", 1, UNKNOWN, "tokens: sentencepiece refuses the vocabulary: .*unk"),
        ("token_type", 3, NORMAL, "token_type: the 255 byte tokens are not <0x00> to <0xFF>"),
        ("add_space_prefix", None, "no", "add_space_prefix: expected a boolean, not a string"),
    ],
)
def test_bad_sentencepiece_keys_are_named(key: str, index: int | None, value: object, cause: str) -> None:
    metadata = exported()
    if index is None:
        metadata[P + key] = value
    else:
        metadata[P + key][index] = value
    with pytest.raises(FormatError, match=rf"^key tokenizer\.ggml\.{cause}"):
        Tokenizer(metadata)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_to_add_that_is_not_named_is_an_error(name: str) -> None:
    metadata = {**without(byte_level(), f"{name}_token_id"), P + f"add_{name}_token": True}
    with pytest.raises(FormatError, match=rf"key tokenizer\.ggml\.{name}_token_id: missing"):
        Tokenizer(metadata)
