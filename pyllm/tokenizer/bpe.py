"""Byte-level BPE (tokenizer.ggml.model "gpt2"): tokens spell bytes as characters, merges join them."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

from pyllm.errors import UnsupportedError
from pyllm.tokenizer import keys
from pyllm.tokenizer.keys import Metadata
from pyllm.tokenizer.vocab import PREFIX, Vocab

# How text is cut before merging. What a pattern matches is a piece, and so is what lies between two matches;
# the next pattern cuts those pieces further.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Pre:
    """What one value of tokenizer.ggml.pre stands for."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token stays whole, whatever the merges would make of it
    add_bos: bool = False  # where the file does not say


GPT2_PRE = Pre((GPT2,))
LLAMA3_PRE = Pre((LLAMA3,), ignore_merges=True, add_bos=True)
LLAMA3_MERGED_PRE = Pre((LLAMA3,))
QWEN2_PRE = Pre((QWEN2,))
SMOLLM_PRE = Pre((r"\p{N}", GPT2))
DEFAULT_PRE = Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

# The names and groups of llama.cpp.
PRE: dict[str, Pre] = {
    "default": DEFAULT_PRE,
    **dict.fromkeys(("gpt-2", "gigachat", "jais", "mpt", "olmo", "phi-2", "roberta-bpe"), GPT2_PRE),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA3_PRE),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "smaug-bpe"), LLAMA3_MERGED_PRE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2_PRE),
    **dict.fromkeys(
        ("smollm", "codeshell", "command-r", "exaone", "minerva-7b", "refact", "starcoder"), SMOLLM_PRE
    ),
}


def find_pre(metadata: Metadata) -> Pre:
    """Raises UnsupportedError for an unknown tokenizer.ggml.pre, and lists the known ones."""
    key = PREFIX + "pre"
    name = keys.string(metadata, key) if key in metadata else "default"
    if name not in PRE:
        raise UnsupportedError(
            f"key {key}: pre-tokenizer {name!r} is not supported; supported: {', '.join(PRE)}"
        )
    return PRE[name]


def pre_tokenizer(pre: Pre) -> PreTokenizer:
    cuts = [Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


class ByteLevelBpe:
    """The `tokenizers` model of a vocabulary. Raises FormatError for merges that do not fit it."""

    def __init__(self, metadata: Metadata, vocab: Vocab) -> None:
        pre = find_pre(metadata)
        self._tokens = vocab.tokens
        table = {token: i for i, token in enumerate(self._tokens)}
        # A byte that the vocabulary does not have must still part its neighbours, and then it vanishes.
        self._missing = len(self._tokens)
        table[MISSING] = self._missing
        model = _model(table, _merges(metadata), pre)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizer(pre)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Bytes for which the vocabulary has no token are left out, as llama.cpp does."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i != self._missing] if self._missing in ids else ids

    def piece(self, token: int) -> bytes:
        """The bytes a normal token stands for."""
        return b"".join(BYTE_OF.get(character) or character.encode() for character in self._tokens[token])


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    key = PREFIX + "merges"
    merges = [tuple(merge.split(" ")) for merge in keys.strings(metadata, key)]
    if set(map(len, merges)) - {2}:
        index = next(i for i, merge in enumerate(merges) if len(merge) != 2)
        keys.fail(key, f"entry {index} is not two tokens with a space between them")
    return merges  # type: ignore[return-value]


def _model(table: dict[str, int], merges: list[tuple[str, str]], pre: Pre) -> models.BPE:
    try:
        return models.BPE(table, merges, unk_token=MISSING, ignore_merges=pre.ignore_merges)
    except Exception as error:  # tokenizers raises nothing narrower
        for index, (left, right) in enumerate(merges):
            for token in (left, right, left + right):
                if token not in table:
                    keys.fail(PREFIX + "merges", f"entry {index} needs {token!r}, which is not a token")
        keys.fail(PREFIX + "merges", str(error))


def _byte_of() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: printable Latin-1 as itself, the rest in order from U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    rest = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): bytes([byte]) for byte in printable}
    return spelled | {chr(256 + n): bytes([byte]) for n, byte in enumerate(rest)}


BYTE_OF = _byte_of()
MISSING = "\0"  # no token can be spelled so: byte 0 is U+0100
