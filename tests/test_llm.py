"""LLM: completions of the OpenAI shape, streaming, stop strings, sampling, prefix reuse, refusals."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm import (
    LLM,
    Adaptive,
    ArgumentError,
    ContextError,
    FileError,
    FormatError,
    PyllmError,
    TemplateError,
)
from pyllm import llm as llm_module
from pyllm.errors import DeviceError, InsufficientMemoryError
from pyllm.generation import Generation, Request, Sampling, StopFilter
from tiny_models import write_tiny

PROMPT = "the hand and the inner thing"
MESSAGES = [{"role": "user", "content": "and then?"}]


def greedy_ids(llm: LLM, prompt: list[int], n: int) -> list[int]:
    """The likeliest continuation, taken token by token from the logits; up to the end of generation."""
    session = llm.session()
    logits = session.eval(prompt)
    found: list[int] = []
    while len(found) < n and int(logits.argmax()) not in llm.tokenizer.eog_ids:
        found.append(int(logits.argmax()))
        logits = session.eval(found[-1:])
    return found


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


# ---- answers ----


def test_generate_is_the_likeliest_text(tiny: LLM) -> None:
    answer = tiny.generate(PROMPT, max_tokens=20, temperature=0)
    ids = greedy_ids(tiny, tiny.tokenize(PROMPT, add_special=True), 20)
    assert len(ids) == 20
    choice = answer["choices"][0]
    assert choice["text"] == tiny.tokenizer.decode(ids, skip_special=True)
    assert choice["finish_reason"] == "length"
    n_prompt = len(tiny.tokenize(PROMPT, add_special=True))
    assert answer["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 20,
        "total_tokens": n_prompt + 20,
    }
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"


def test_token_ids_are_taken_as_they_are(tiny: LLM) -> None:
    ids = tiny.tokenize(PROMPT)
    answers = [tiny.generate(prompt, max_tokens=10, temperature=0) for prompt in (ids, np.array(ids))]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == len(ids)


def test_stream_is_the_same_answer_in_pieces(tiny: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "seed": 5, "logprobs": 2}
    whole = tiny.generate(PROMPT, **options)
    chunks = list(tiny.generate(PROMPT, stream=True, **options))
    assert text_of(chunks) == whole["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "length"
    ]
    assert chunks[-1]["usage"] == whole["usage"]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert tokens == whole["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == 30


def test_chat_renders_the_template(tiny: LLM) -> None:
    prompt = tiny.tokenize("<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n")
    answer = tiny.chat(MESSAGES, max_tokens=12, temperature=0)
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"] == tiny.tokenizer.decode(greedy_ids(tiny, prompt, 12), skip_special=True)
    chunks = list(tiny.chat(MESSAGES, max_tokens=12, temperature=0, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[1:]]
    assert "".join(deltas) == message["content"]


def test_an_end_of_generation_token_stops_and_is_no_text(tiny: LLM) -> None:
    # Nearly uniform draws from 320 tokens reach one that ends an answer long before the context does.
    flat: dict[str, Any] = {"temperature": 100.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    answer = tiny.generate(PROMPT, max_tokens=None, seed=1, **flat)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "<|" not in answer["choices"][0]["text"]
    assert answer["usage"]["total_tokens"] < tiny.n_ctx


def test_a_full_context_ends_the_answer(tiny_model: Path) -> None:
    llm = LLM(tiny_model, n_ctx=40)
    prompt = [5] * 30
    answer = llm.generate(prompt, max_tokens=None, temperature=0)
    assert len(greedy_ids(LLM(tiny_model), prompt, 20)) == 20
    assert answer["choices"][0]["finish_reason"] == "context"
    # The last token needs no place of its own: nothing is predicted from it.
    assert answer["usage"]["completion_tokens"] == 11
    assert llm.generate([5] * 40, max_tokens=None)["usage"]["completion_tokens"] == 1


def test_bytes_that_are_no_text_do_not_break_the_stream(tiny: LLM) -> None:
    flat = Sampling(temperature=100.0, top_k=0, top_p=1.0, min_p=0.0)
    broken = 0
    for seed in range(20):  # some of which draw an end of generation at once
        request = Request(flat, seed=seed, max_tokens=200, logprobs=0)
        pieces = list(Generation(tiny.session(), tiny.tokenizer, [5], request, continuing=True).pieces())
        ids = [entry.token for piece in pieces for entry in piece.logprobs]
        text = "".join(piece.text for piece in pieces)
        assert text == tiny.tokenizer.decode(ids, skip_special=True)
        broken += "\ufffd" in text
    assert broken


# ---- stop strings ----


@given(
    st.lists(st.text("ab", max_size=4)),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_filter(pieces: list[str], stops: list[str]) -> None:
    text, out, filtered = "".join(pieces), "", StopFilter(stops)
    for piece in pieces:
        out += filtered.push(piece)
        if filtered.stopped:
            break
    out += filtered.flush()
    assert filtered.stopped == any(stop in text for stop in stops)
    assert not any(stop in out for stop in stops)
    if filtered.stopped:
        assert any(text.startswith(out + stop) for stop in stops)
    else:
        assert out == text


def test_stop_filter_holds_back_no_more_than_it_must() -> None:
    filtered = StopFilter(["###", "\nUser:"])
    assert [filtered.push(piece) for piece in ("a#", "#b", "\nUs", "e", "d", "#", "##x")] == [
        "a", "##b", "", "", "\nUsed", "", ""
    ]  # fmt: skip
    assert filtered.stopped


def test_stop_strings_across_tokens(tiny: LLM) -> None:
    text = tiny.generate(PROMPT, max_tokens=40, temperature=0)["choices"][0]["text"]
    stop = text[15:22]
    answer = tiny.generate(PROMPT, max_tokens=40, temperature=0, stop=stop)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    chunks = list(tiny.generate(PROMPT, max_tokens=40, temperature=0, stop=["never", stop], stream=True))
    assert text_of(chunks) == text[: text.index(stop)]


# ---- log-probabilities, seeds ----


def test_logprobs_are_the_models(tiny: LLM) -> None:
    prompt = tiny.tokenize(PROMPT)
    entry = tiny.generate(prompt, max_tokens=3, temperature=0, logprobs=320)["choices"][0]["logprobs"]
    logits = tiny.session().eval(prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert entry["token_logprobs"][0] == pytest.approx(expected.max(), abs=1e-3)
    assert entry["text_offset"][0] == 0
    assert entry["text_offset"][1] == len(entry["tokens"][0])
    best = list(entry["top_logprobs"][0].values())
    assert best == sorted(best, reverse=True)
    content = tiny.chat(MESSAGES, max_tokens=3, temperature=0, logprobs=2)["choices"][0]["logprobs"][
        "content"
    ]
    assert [len(token["top_logprobs"]) for token in content] == [2, 2, 2]
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in content)


def test_logprobs_as_the_chat_api_asks_for_them(tiny: LLM) -> None:
    def content(**options: Any) -> Any:
        shaped = tiny.chat(MESSAGES, max_tokens=3, temperature=0, **options)["choices"][0]["logprobs"]
        return shaped and shaped["content"]

    assert content(logprobs=True, top_logprobs=2) == content(logprobs=2)
    assert [token["top_logprobs"] for token in content(logprobs=True)] == [[], [], []]
    assert content(logprobs=False) is None
    with pytest.raises(ArgumentError, match="goes with logprobs=True"):
        content(top_logprobs=2)


def test_bytes_of_tokens_make_the_characters_that_their_texts_cannot(tiny: LLM) -> None:
    (token,) = tiny.chat(MESSAGES, max_tokens=1, temperature=0, logprobs=320)["choices"][0]["logprobs"][
        "content"
    ]
    by_bytes = [bytes(candidate["bytes"]) for candidate in token["top_logprobs"]]
    assert set(by_bytes) >= {bytes([byte]) for byte in range(256)}
    assert all(
        entry["token"] == bytes(entry["bytes"]).decode("utf-8", "replace") for entry in token["top_logprobs"]
    )


def test_seeds_repeat(tiny_model: Path) -> None:
    def answers(llm: LLM, **options: Any) -> list[str]:
        return [llm.generate(PROMPT, max_tokens=20, **options)["choices"][0]["text"] for _ in range(3)]

    fixed = answers(LLM(tiny_model), seed=7)
    assert len(set(fixed)) == 1
    assert answers(LLM(tiny_model), seed=7) == fixed
    drawn = answers(LLM(tiny_model, seed=7))
    assert len(set(drawn)) == 3
    assert answers(LLM(tiny_model, seed=7)) == drawn


# ---- the session behind it ----


def test_a_known_prefix_is_not_read_again(tiny: LLM, rng: np.random.Generator) -> None:
    document = [int(i) for i in rng.integers(0, 256, 600)]
    first = tiny.generate([*document, 1, 2, 3], max_tokens=5, temperature=0)
    assert (first["timings"]["cache_n"], first["timings"]["prompt_n"]) == (0, 603)
    second = tiny.generate([*document, 4, 5], max_tokens=5, temperature=0)
    assert (second["timings"]["cache_n"], second["timings"]["prompt_n"]) == (600, 2)
    fresh = LLM(tiny.paths[0]).generate([*document, 4, 5], max_tokens=5, temperature=0)
    assert second["choices"] == fresh["choices"]
    # 603 and 2 of the prompts, and of each answer all but the last token, which may end it early.
    answered = sum(answer["usage"]["completion_tokens"] - 1 for answer in (first, second))
    assert sum(tiny.default_session.stats.evaluated.values()) == 603 + 2 + answered


def test_threads_wait_for_each_other(tiny: LLM) -> None:
    prompts = [[n] * 50 for n in range(1, 5)]
    expected = [tiny.generate(prompt, max_tokens=15, temperature=0)["choices"] for prompt in prompts]
    found: dict[int, Any] = {}

    def work(at: int) -> None:
        found[at] = tiny.generate(prompts[at], max_tokens=15, temperature=0)["choices"]

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[at] for at in range(4)] == expected


def test_a_stream_whose_session_went_elsewhere_says_so(tiny: LLM) -> None:
    stream = tiny.generate(PROMPT, max_tokens=20, temperature=0, stream=True)
    next(stream)
    tiny.generate("and", max_tokens=2)
    with pytest.raises(PyllmError, match="something else"):
        next(stream)


def test_an_answer_counts_its_own_tokens(tiny: LLM) -> None:
    """Also where the session goes on with something else before anybody asks."""
    session = tiny.session()
    request = Request(Sampling(temperature=0.0), 0, max_tokens=3)
    generation = Generation(session, tiny.tokenizer, [1, 2, 3], request, continuing=True)
    assert len(list(generation.pieces())) == 3
    session.sync([7] * 50)
    assert (generation.stats.prefill_tokens, generation.stats.decode_tokens) == (3, 2)


def test_threads_that_come_first_share(tiny_model: Path) -> None:
    """The library and a model's default session, which are made when they are first wanted."""
    code = """
import sys, threading
from pyllm import LLM

def at_once(work):
    found, start = [], threading.Barrier(4)

    def run():
        start.wait()
        found.append(work())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found

llms = at_once(lambda: LLM(sys.argv[1]))
sessions = at_once(lambda: llms[0].default_session)
print(len(llms), len(sessions), len(set(map(id, sessions))))
"""
    ran = subprocess.run([sys.executable, "-c", code, str(tiny_model)], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout == "4 4 1\n"


# ---- refusals ----


def test_a_session_of_another_model_is_refused(tiny: LLM, tmp_path: Path) -> None:
    other = LLM(write_tiny(tmp_path / "other.gguf", tokenizer=True, seed=1))
    with pytest.raises(ArgumentError, match="session: is one of another model"):
        tiny.generate("the", session=other.session())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": "x"}, "min_p"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["a", ""]}, "stop"),
        ({"seed": "a"}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_wrong_options(tiny: LLM, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        tiny.generate(PROMPT, **options)


def test_wrong_prompts(tiny_model: Path) -> None:
    llm = LLM(tiny_model, n_ctx=50)
    with pytest.raises(ArgumentError, match="empty"):
        llm.generate("")
    with pytest.raises(ArgumentError, match="320"):
        llm.generate([1, 320])
    for stream in (False, True):
        wrongs: list[Any] = [[1.5], [-1], [[1]], None]
        for wrong in wrongs:
            with pytest.raises(ArgumentError, match="token id"):
                llm.generate(wrong, stream=stream)
        with pytest.raises(ContextError, match=r"51 tokens.*holds 50.*needs [\d.]+ .?B"):
            llm.generate([1] * 51, stream=stream)
    for messages in ([], "hello", [{"role": "user"}], [{"content": "x"}], [None]):
        with pytest.raises(PyllmError):
            llm.chat(messages)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="temprature"):
        llm.generate(PROMPT, temprature=1)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"device": "cuda:999"}, DeviceError, "(?i)cuda"),
        ({"device": "tpu"}, ArgumentError, "device"),
        ({"n_ctx": 0}, ArgumentError, "n_ctx"),
        ({"n_ctx": 4097}, ArgumentError, "at most 4096"),
        ({"n_batch": 5000}, ArgumentError, "n_batch"),
        ({"n_threads": 0}, ArgumentError, "n_threads"),
        ({"isa": "sse9"}, PyllmError, "sse9"),
        ({"attention": "sideways"}, ArgumentError, "expected dense"),
        ({"attention": 0.9}, ArgumentError, "attention: expected a policy"),
        ({"attention": Adaptive([0.5] * 3)}, ArgumentError, "threshold"),
    ],
)
def test_wrong_arguments(tiny_model: Path, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        LLM(tiny_model, **options)


def test_models_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"missing\.gguf"):
        LLM(tmp_path / "missing.gguf")
    with pytest.raises(PyllmError, match=r"bare.gguf.*tokenizer.ggml.model"):
        LLM(write_tiny(tmp_path / "bare.gguf"))


def test_no_chat_template(tiny: LLM) -> None:
    del tiny.metadata["tokenizer.chat_template"]
    assert tiny.generate(PROMPT, max_tokens=1)["usage"]["completion_tokens"] == 1
    with pytest.raises(TemplateError, match="generate"):
        tiny.chat(MESSAGES)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{% for %}", "line 1: "),
        ("{{ messages[0].x.y }}", "line 1: .*'x'"),
        ("", "makes nothing of these messages"),
        (5, "not text but int"),
    ],
)
def test_a_broken_chat_template_names_its_file(tiny: LLM, source: object, cause: str) -> None:
    tiny.metadata["tokenizer.chat_template"] = source
    with pytest.raises(TemplateError, match=rf"^[^:]*tiny\.gguf: the chat template.*{cause}"):
        tiny.chat(MESSAGES)


@pytest.mark.parametrize("rows", [319, 321])
def test_tokens_and_embeddings_are_of_one_number(tmp_path: Path, rows: int) -> None:
    """The tokenizer has 320: of more rows the last could not be said, of fewer the last token not be read."""
    path = write_tiny(tmp_path / "odd.gguf", tokenizer=True, n_embeddings=rows)
    with pytest.raises(
        FormatError, match=rf"odd\.gguf: key tokenizer\.ggml\.tokens has 320 .* has {rows} rows"
    ):
        LLM(path)


def test_memory_is_checked_before_the_model_is_opened(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllm.device.available_memory", lambda: 1000)
    with pytest.raises(
        InsufficientMemoryError, match=r"tiny.gguf: the model needs .*B.* only 1.0 kB is available"
    ):
        LLM(tiny_model)


@pytest.mark.slow
def test_a_gpu_that_cannot_be_opened_leaves_the_cpu(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm_module, "choose", lambda device, file: "cuda:99" if device == "auto" else device)
    assert LLM(tiny_model).device == "cpu"
    with pytest.raises(DeviceError):
        LLM(tiny_model, device="cuda:99")


def test_the_default_model_knows_a_capital(default_model: Path) -> None:
    llm = LLM(default_model, n_ctx=512)
    answer = llm.generate("The capital of France is", max_tokens=4, temperature=0)
    assert answer["choices"][0]["text"].startswith(" Paris")
    reply = llm.chat([{"role": "user", "content": "Say hello."}], temperature=0)
    assert reply["choices"][0]["finish_reason"] == "stop"


RESIDENT = """
import sys
import numpy as np
import pyllm

llm = pyllm.LLM(sys.argv[1])
llm.session(n_ctx=1024).eval(np.random.default_rng(0).integers(0, llm.info.n_vocab, 600))
path, resident = "", []
for line in open("/proc/self/smaps"):
    first, *_, last = line.split()
    if not first.endswith(":"):
        path = last
    elif first == "Rss:" and path == sys.argv[1]:
        resident.append(int(line.split()[1]))
assert resident, "the file is not mapped"
print(sum(resident))
"""


def test_the_file_does_not_stay_in_memory_beside_its_packed_copy(default_model: Path) -> None:
    """Neither what a fingerprint reads of every tensor nor the embeddings of a prompt."""
    command = [sys.executable, "-c", RESIDENT, str(default_model.resolve())]
    kilobytes = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert kilobytes < 1024
