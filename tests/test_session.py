"""Sessions: the timeline, prefix reuse, statistics, files, Ctrl-C and threads."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllm import (
    LLM,
    AbortedError,
    Adaptive,
    ArgumentError,
    ContextError,
    Dense,
    FileError,
    FormatError,
    InsufficientMemoryError,
    PyllmError,
    Session,
    Window,
)
from pyllm._native import File, Model, SessionMemory, SessionParams, check, library, session_memory
from pyllm.bulk import PAGE
from tiny_models import write_tiny

TOLERANCE = 2e-3  # of logits of size about 1: float noise of another order of sums


def ids(n: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 320, n)]


@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(0, 150), st.integers(0, 3)), min_size=1, max_size=5)
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sync_equals_a_fresh_session(tiny: LLM, turns: list[tuple[int, int, int]]) -> None:
    session = tiny.session(n_ctx=512)
    held: list[int] = []
    for keep, new, seed in turns:
        wanted = held[:keep] + ids(new, seed) or [1]
        common = next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), None)
        common = min(len(held), len(wanted)) if common is None else common
        before = session.stats
        logits = session.sync(wanted)
        evaluated = (session.stats - before).prefill_tokens
        assert evaluated == len(wanted) - min(common, len(wanted) - 1)
        assert session.tokens == wanted
        np.testing.assert_allclose(logits, tiny.session(n_ctx=512).eval(wanted), atol=TOLERANCE)
        held = wanted


def test_all_logits_are_those_of_every_token(tiny: LLM) -> None:
    tokens = ids(150)
    many = LLM(tiny.paths[0], n_batch=64).session().eval(tokens, all_logits=True)
    session = tiny.session()
    single = np.stack([session.eval([token]) for token in tokens])
    assert many.shape == (150, 320)
    assert many.dtype == np.float32
    np.testing.assert_allclose(many, single, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["dense", "adaptive:0.9"])
@pytest.mark.parametrize("n_batch", [40, 512])
def test_tokens_whose_logits_nobody_asks_for_change_nothing(tiny: LLM, attention: str, n_batch: int) -> None:
    """They end at the last layer's attention, in whole batches and in part of one."""
    tokens = ids(150)
    llm = LLM(tiny.paths[0], n_batch=n_batch, attention=attention)
    asked, last = llm.session(), llm.session()
    every = asked.eval(tokens, all_logits=True)
    assert np.array_equal(last.eval(tokens), every[-1])
    assert np.array_equal(last.eval([7]), asked.eval([7]))


def test_rewind_then_replay(tiny: LLM) -> None:
    session = tiny.session()
    first = session.eval(ids(200))
    session.rewind(70)
    assert session.position == 70
    session.eval(ids(50, seed=1))
    session.rewind(70)
    np.testing.assert_allclose(session.eval(ids(200)[70:]), first, atol=TOLERANCE)
    for n in (-1, 201):
        with pytest.raises(ArgumentError, match=f"{n}"):
            session.rewind(n)


def test_progress_after_every_batch(tiny: LLM) -> None:
    seen: list[tuple[int, int]] = []
    LLM(tiny.paths[0], n_batch=64).session().eval(ids(150), progress=lambda *at: seen.append(at))
    assert seen == [(64, 150), (128, 150), (150, 150)]


@pytest.mark.parametrize("wrong", [[], [[1]], [1.5], ["a"], [1, -1], [1, 320], [2**40], None])
def test_wrong_ids_change_nothing(tiny: LLM, wrong: list[int]) -> None:
    session = tiny.session()
    session.eval([1, 2, 3])
    for call in (session.eval, session.sync):
        with pytest.raises(ArgumentError, match="token id"):
            call(wrong)
    assert session.tokens == [1, 2, 3]


def test_too_long_says_three_numbers_and_changes_nothing(tiny: LLM) -> None:
    session = tiny.session(n_ctx=100)
    session.eval(ids(60))
    with pytest.raises(ContextError, match=r"101 tokens.*holds 100.*needs [\d.]+ .?B"):
        session.eval(ids(41))
    with pytest.raises(ContextError):
        session.sync(ids(101))
    assert session.position == 60
    session.eval(ids(40))
    assert session.position == 100


def test_memory_is_checked_before_it_is_taken(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = tiny.session_memory(4096)
    monkeypatch.setattr("pyllm.device.available_memory", lambda: needed - 1)
    with pytest.raises(InsufficientMemoryError, match=r"4096 tokens needs .*B.* only .*B is available"):
        tiny.session()
    tiny.session(n_ctx=2048)


def test_a_sketch_counts_as_memory(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.session(attention=Dense()).memory_needed(4096)
    monkeypatch.setattr("pyllm.device.available_memory", lambda: whole)
    tiny.session(attention=Dense())
    with pytest.raises(InsufficientMemoryError, match=r"4096 tokens needs"):
        tiny.session(attention=Dense(page_bits=2))


def test_no_batch_counts_more_tokens_than_the_context(tiny: LLM) -> None:
    def needed(n_batch: int) -> SessionMemory:
        return session_memory(tiny._model, SessionParams(64, n_batch, 16), 2)

    assert needed(64) == needed(512)
    assert needed(32).total < needed(64).total


def test_memory_of_a_session_that_cannot_be_is_not_written(tiny: LLM) -> None:
    ffi, lib = library()
    out = ffi.new("pyllm_session_memory *", (1, 2, 3, 4, 5))
    model = Model(File(tiny.paths), 1, None, "cpu")
    with pytest.raises(ArgumentError, match="split"):
        check(lib.pyllm_session_memory_needed, model.handle, SessionParams(64, 64, 16, 32).native(), 0, out)
    assert list(ffi.unpack(ffi.cast("uint64_t *", out), 5)) == [1, 2, 3, 4, 5]


def test_stats_follow_the_policy(tiny: LLM) -> None:
    session = tiny.session(attention=Window(window=64))
    session.eval(ids(64))
    assert session.stats.heads_local is None
    session.eval(ids(300))
    window = session.stats
    assert (window.heads_local, window.bulk_work, window.bulk_read) == (100, 0, 0)
    session.attention = Dense(window=64)
    session.eval(ids(10))
    session.eval([1])
    dense = session.stats - window
    assert (dense.heads_local, dense.bulk_work, dense.bulk_read) == (0, 100, 100)
    assert [layer.bulk_read for layer in dense.layers] == [100, 100]
    assert dense.evaluated == {"dense,window=64": 11}
    assert session.stats.evaluated == {"window:64": 364, "dense,window=64": 11}
    assert (dense.prefill_tokens, dense.decode_tokens) == (10, 1)


def test_sinks_are_the_sessions(tiny: LLM) -> None:
    session = tiny.session(attention=Adaptive(sinks=4))
    with pytest.raises(ArgumentError, match=r"16 sinks.*opened with 4"):
        session.attention = Dense(page_bits=3)
    session.attention = Dense()  # reads everything, whatever its sinks are
    with pytest.raises(ArgumentError, match=r"16 sinks.*opened with 4"):
        session.attention = Adaptive()
    session.attention = Dense()
    with pytest.raises(ArgumentError, match="policy"):
        session.attention = 0.9  # type: ignore[assignment]


def test_attention_by_its_text_form(tiny: LLM) -> None:
    session = tiny.session(attention="window:64")
    assert session.attention == Window(window=64)
    session.attention = "adaptive:0.5"
    assert session.attention == Adaptive(0.5)
    with pytest.raises(ArgumentError, match="expected dense"):
        session.attention = "sideways"
    assert session.attention == Adaptive(0.5)


# ---- files ----


def test_save_and_load(tiny: LLM, tmp_path: Path) -> None:
    session = tiny.session()
    session.eval(ids(150))
    session.save(tmp_path / "s")
    other = tiny.session(n_ctx=200)
    other.eval(ids(20, seed=1))
    other.load(tmp_path / "s")
    assert other.tokens == ids(150)
    np.testing.assert_array_equal(other.eval([5, 6]), session.eval([5, 6]))


def test_a_session_that_cannot_be_saved_leaves_nothing(tiny: LLM, tmp_path: Path) -> None:
    session = tiny.session()
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="folder"):
        session.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(FileError, match="nowhere"):
        session.save(tmp_path / "nowhere" / "s")


def test_saving_replaces_files_and_nothing_else(tiny: LLM, tmp_path: Path) -> None:
    """A saved file in the place of a pipe, or of a device such as /dev/null, would break who else uses it."""
    session = tiny.session()
    session.eval([1, 2, 3])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=r"pipe: .*something else than a file"):
        session.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    other = tiny.session()
    other.load(tmp_path / "there")
    assert other.tokens == [1, 2, 3]


def test_who_may_read_a_file_stays(tiny: LLM, tmp_path: Path) -> None:
    session = tiny.session()
    session.eval([1, 2, 3])
    (tmp_path / "private").touch(0o600)
    session.save(tmp_path / "private")
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600
    session.save(tmp_path / "new")
    (tmp_path / "usual").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_session_of_another_fine_tune_is_refused(tiny: LLM, tiny_model: Path, tmp_path: Path) -> None:
    last = max(tiny.tensors(), key=lambda tensor: tensor.offset)
    changed = bytearray(tiny_model.read_bytes())
    changed[last.offset] ^= 1
    (tmp_path / "other.gguf").write_bytes(changed)
    session = tiny.session()
    session.eval(ids(10))
    session.save(tmp_path / "s")
    with pytest.raises(FormatError, match="saved session of another model"):
        LLM(tmp_path / "other.gguf").session().load(tmp_path / "s")


def test_tokens_of_a_file_are_checked(tiny: LLM, tmp_path: Path) -> None:
    """A file that its checksum fits, with a token that no vocabulary has."""
    session = tiny.session()
    session.eval(ids(10))
    session.save(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    header = struct.Struct("<8sIiiiQQ")
    for token in (-1, 320):
        data[header.size + 8 : header.size + 12] = struct.pack("<i", token)
        checksum = 0
        for (word,) in struct.iter_unpack("<Q", bytes(data[header.size :])):
            checksum = (checksum ^ word) * 0x100000001B3 % 2**64
            checksum ^= checksum >> 32
        data[header.size - 8 : header.size] = struct.pack("<Q", checksum)
        (tmp_path / "s").write_bytes(data)
        with pytest.raises(FormatError, match=f"s: .*token {token} at position 2 is not in the vocabulary"):
            session.load(tmp_path / "s")
        assert session.tokens == ids(10)


def test_files_that_are_no_such_session(tiny: LLM, tmp_path: Path, rng: np.random.Generator) -> None:
    session = tiny.session()
    session.eval(ids(100))
    session.save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    flipped = bytearray(good)
    flipped[rng.integers(64, len(good))] ^= 1
    session.rewind(50)
    signs = bytearray(good)
    for byte in (len(good) - 9, len(good) - 1):  # of two words, in their last bits
        signs[byte] ^= 0x80
    wrong: dict[str, bytes | bytearray] = {
        "empty": b"",
        "text": b"x" * 200,
        "cut": good[:-1],
        "flipped": flipped,
        "signs": signs,
    }
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=name):
            session.load(tmp_path / name)
    with pytest.raises(FileError, match="missing"):
        session.load(tmp_path / "missing")
    with pytest.raises(ContextError, match="good"):
        tiny.session(n_ctx=99).load(tmp_path / "good")
    with pytest.raises(FormatError, match="sinks"):
        tiny.session(attention=Adaptive(sinks=4)).load(tmp_path / "good")
    another = LLM(write_tiny(tmp_path / "another.gguf", tokenizer=True, seed=1)).session()
    with pytest.raises(FormatError, match="model"):
        another.load(tmp_path / "good")
    assert session.tokens == ids(100)[:50]


# ---- Ctrl-C and threads ----


@pytest.fixture(scope="module")
def slow_llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Takes a good second for a prompt of 4,000 tokens, most of it inside one native call."""
    path = write_tiny(tmp_path_factory.mktemp("slow") / "slow.gguf", n_layers=24, tokenizer=True)
    return LLM(path, n_batch=4096, n_threads=1, attention=Dense())


def interrupt_soon(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_stops_a_native_call(slow_llm: LLM) -> None:
    session = slow_llm.session()
    session.eval(ids(100))
    interrupt_soon(0.1)
    with pytest.raises(KeyboardInterrupt):
        session.eval(ids(3900))
    assert session.tokens == ids(100)
    fresh = slow_llm.session()
    fresh.eval(ids(100))
    np.testing.assert_allclose(session.eval([7] * 20), fresh.eval([7] * 20), atol=TOLERANCE)


def test_ctrl_c_keeps_whole_batches(slow_llm: LLM) -> None:
    session = LLM(slow_llm.paths[0], n_batch=64, n_threads=1, attention=Dense()).session()
    interrupted = False

    def progress(done: int, total: int) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            interrupt_soon(0.05)

    with pytest.raises(KeyboardInterrupt):
        session.eval(ids(3900), progress=progress)
    assert 0 < session.position < 3900
    assert session.position % 64 == 0
    assert session.tokens == ids(3900)[: session.position]
    assert session.stats.prefill_tokens == session.position


def test_abort_from_another_thread(slow_llm: LLM) -> None:
    session = slow_llm.session()
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            session.eval(ids(4000))
        except PyllmError as error:
            outcome.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    time.sleep(0.05)
    while worker.is_alive():
        session.abort()
        worker.join(0.01)
    assert [type(error).__name__ for error in outcome] == ["AbortedError"]
    assert session.position == 0


def test_abort_between_two_batches(tiny: LLM) -> None:
    """Where the library has nothing to stop."""
    session = LLM(tiny.paths[0], n_batch=64).session()

    def progress(done: int, total: int) -> None:
        if done == 128:
            session.abort()

    with pytest.raises(AbortedError, match="position 128"):
        session.eval(ids(300), progress=progress)
    assert session.tokens == ids(300)[:128]
    session.eval(ids(300)[128:])
    assert session.tokens == ids(300)


def test_a_running_evaluation_is_not_copied(slow_llm: LLM) -> None:
    """A call past the package's lock is refused by the library: what it copies would grow under its hands."""
    session = slow_llm.session()
    session.eval(ids(100))
    native, (ffi, lib) = session._native, library()
    state = np.empty(lib.pyllm_session_state_size(native.handle), np.uint8)
    tokens = ffi.new("int32_t[]", 100)

    def work() -> None:
        with pytest.raises(AbortedError):
            session.eval(ids(3900))

    worker = threading.Thread(target=work)
    stage = ffi.new("pyllm_stage_stats *")
    lib.pyllm_session_stage_stats(native.handle, stage, 1)
    before = stage.calls
    worker.start()
    while stage.calls == before:
        time.sleep(0.001)
        lib.pyllm_session_stage_stats(native.handle, stage, 1)
    with pytest.raises(ArgumentError, match="in use by another thread"):
        check(lib.pyllm_session_save, native.handle, ffi.from_buffer("uint8_t[]", state), len(state))
    with pytest.raises(ArgumentError, match="in use by another thread"):
        check(lib.pyllm_session_tokens, native.handle, tokens, 100)
    while worker.is_alive():
        session.abort()
        worker.join(0.01)
    check(lib.pyllm_session_tokens, native.handle, tokens, 100)
    assert list(tokens) == ids(100)
    with pytest.raises(ArgumentError, match="101 tokens asked for: the session holds 100"):
        check(lib.pyllm_session_tokens, native.handle, tokens, 101)


def test_threads_take_turns(tiny: LLM) -> None:
    session = tiny.session()
    pieces = [[n] * 40 for n in range(1, 9)]
    threads = [threading.Thread(target=session.eval, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = session.tokens
    held = [tokens[i : i + 40] for i in range(0, 320, 40)]
    assert sorted(held) == pieces


def test_sessions_side_by_side(tiny: LLM) -> None:
    prompts = [ids(200, seed) for seed in range(4)]
    expected = [tiny.session().eval(prompt) for prompt in prompts]
    sessions: list[Session] = [tiny.session() for _ in prompts]
    found: dict[int, np.ndarray] = {}

    def work(at: int) -> None:
        found[at] = sessions[at].eval(prompts[at])

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(4):
        np.testing.assert_array_equal(found[at], expected[at])


def test_pages_are_the_librarys() -> None:
    assert library()[1].PYLLM_PAGE == PAGE
