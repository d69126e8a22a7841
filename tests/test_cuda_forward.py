"""Whole models on the emulated GPU, against the same models on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from emulated import GIGABYTE, fail_next, is_emulated, set_memory
from pyllm import LLM, Adaptive, Calibration, Dense, Oracle, Session, Static, Window, _native
from pyllm.attention import Policy
from pyllm.device import RESERVE
from pyllm.errors import (
    ArgumentError,
    DeviceError,
    InsufficientMemoryError,
    NumericError,
    PyllmError,
    UnsupportedError,
)
from test_forward import VOCABULARY, overflowing
from tiny_models import write_tiny

pytestmark = pytest.mark.usefixtures("emulated_gpu")

TOKENS = np.random.default_rng(8).integers(0, 300, 150).tolist()
LABELS = np.random.default_rng(9).random((2, 8)) < 0.5
THRESHOLDS = np.random.default_rng(10).choice([0.3, 0.6, 0.9, 1.1], (2, 8))


def calibration(moments: str) -> Calibration:
    rng = np.random.default_rng(11)
    root = rng.standard_normal((2, 2, 32, 32)) / 6
    return Calibration(
        rng.uniform(-0.5, 0.5, (2, 8, 3)),
        rng.standard_normal((2, 2, 32)) / 3,
        root @ root.swapaxes(-1, -2),
        rng.random((2, 2, 32)),
        rng.random((2, 2, 32)),
        rng.standard_normal((2, 2, 32)),
        (0, 128),
        moments,
    )


POLICIES = [
    Dense(sinks=4, window=20),
    Window(sinks=4, window=20),
    Static(LABELS, sinks=4, window=20),
    Oracle(sinks=4, window=20, threshold=0.6),
    Adaptive(sinks=4, window=20, threshold=0.6, granularity="head"),
    Adaptive(sinks=4, window=20, threshold=0.6, granularity="group"),
    Adaptive(sinks=4, window=20, threshold=0.9, page_bits=3, page_share=0.01),
    Adaptive(sinks=4, window=20, threshold=0.6, gaussian="frozen"),
    Adaptive(sinks=4, window=20, threshold=THRESHOLDS, granularity="head", gaussian="truncated"),
    Adaptive(sinks=4, window=20, threshold=0.6, estimate="regression", calibration=calibration("prompt")),
    Adaptive(sinks=4, window=20, threshold=0.6, estimate="maximum", calibration=calibration("prompt")),
    Adaptive(
        sinks=4,
        window=20,
        threshold=THRESHOLDS,
        estimate="maximum",
        moments="calibrated",
        calibration=calibration("calibrated"),
    ),
    Adaptive(
        sinks=4,
        window=20,
        threshold=0.9,
        page_bits="graded",
        page_share=0.01,
        decode_share=0.2,
        calibration=calibration("prompt"),
    ),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    return write_tiny(folder / "tiny.gguf", types=Type.Q8_0, tokenizer=True, sharp=4.0)


def evaluate(path: Path, device: str, policy: Policy) -> tuple[Session, NDArray[np.float32]]:
    """A prompt in two batches, and six tokens one by one. isa: not one that sums in bfloat16."""
    llm = LLM(path, device=device, isa="generic", attention=policy, n_batch=100, n_ctx=256)
    session = llm.session()
    logits = [session.eval(TOKENS[:-6], all_logits=True)]
    logits += [session.eval([token], all_logits=True) for token in TOKENS[-6:]]
    return session, np.concatenate(logits)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy)[:60])
def test_policies(path: Path, policy: Policy) -> None:
    """The model and the tokens are fixed: a decision that hangs on rounding does not come and go."""
    ours, theirs = (evaluate(path, device, policy) for device in ("cuda", "cpu"))
    error = np.abs(ours[1] - theirs[1]).max(1) / np.abs(theirs[1]).max()
    assert np.median(error) <= 2e-3
    assert np.quantile(error, 0.9) <= 1e-2
    # Per layer: pairs, pairs_local, work, work_done, bytes, bytes_read, pages, pages_read.
    counts, expected = (session.stats.layer_counts.astype(float) for session in (ours[0], theirs[0]))
    assert np.array_equal(counts[:, 0:6:2], expected[:, 0:6:2])
    assert (np.abs(counts - expected)[:, 1:6:2] <= 0.05 * expected[:, 0:6:2]).all()


def calls(session: Session) -> dict[str, int]:
    return {name: n for name, n, _, _ in session._native.stage_stats()}


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[4], POLICIES[6], POLICIES[-1]], ids=str)
def test_a_token_is_one_launch(path: Path, policy: Policy) -> None:
    """From the second one on, and with the same logits as stage by stage: across the position where the bulk
    begins, after rewinding, under another policy and beside another session of the model."""
    llm = LLM(path, device="cuda", attention=policy, n_ctx=256)
    session, other, stages = (llm.session() for _ in range(3))
    for s in (session, other, stages):
        s.eval(TOKENS[:85])

    def follow(n: int) -> None:
        for token in TOKENS[session.position : session.position + n]:
            expected = stages.eval([token], record=stages.new_record(1))
            assert np.array_equal(session.eval([token]), expected)
            other.eval([token + 1])

    before = calls(session)
    follow(5)
    after = calls(session)
    assert after["token"] - before["token"] == 4
    assert after["qkv"] - before["qkv"] == 2 * 2  # layers: of the first token, and of the one written down
    for s in (session, stages):
        s.rewind(60)
        s.eval(TOKENS[60:84])
    follow(3)
    for s in (session, stages):
        s.attention = Dense(sinks=4, window=30)
    follow(3)
    assert calls(session)["token"] - after["token"] == 3 + 2


@pytest.mark.skipif(not is_emulated, reason="a real GPU does not fail when it is told to")
@pytest.mark.parametrize(
    "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload"]
)
def test_a_token_that_cannot_be_written_down(path: Path, call: str) -> None:
    """It goes stage by stage, and the next one is tried again, once."""
    llm = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256)
    session, stages = llm.session(), llm.session()
    for s in (session, stages):
        s.eval(TOKENS[:100])

    def written(n: int) -> int:
        """How many of n tokens were one launch."""
        before = calls(session)["token"]
        for token in TOKENS[session.position : session.position + n]:
            expected = stages.eval([token], record=stages.new_record(1))
            assert np.array_equal(session.eval([token]), expected)
        return calls(session)["token"] - before

    assert written(1) == 0
    fail_next(call, 2)
    assert [written(1), written(2)] == [0, 2]
    for s in (session, stages):
        s.attention = Dense(sinks=4, window=30)
    assert written(1) == 0
    fail_next(call, 2, times=2)
    assert written(4) == 0


@pytest.mark.skipif(not is_emulated, reason="a real GPU does not fail when it is told to")
def test_a_launch_whose_memory_is_refused(path: Path) -> None:
    """The token goes stage by stage, and nothing else is different."""
    llm = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256)
    session, stages = llm.session(), llm.session()
    for s in (session, stages):
        s.eval(TOKENS[:100])
    n_launched = []
    for at in range(100, 104):
        if at == 102:
            fail_next("cudaGraphLaunch", 2)
        before = calls(session)["token"]
        expected = stages.eval(TOKENS[at : at + 1], record=stages.new_record(1))
        assert np.array_equal(session.eval(TOKENS[at : at + 1]), expected)
        n_launched.append(calls(session)["token"] - before)
    assert n_launched == [0, 1, 0, 1]


def test_a_stopped_token_loads_no_kernels(path: Path) -> None:
    """So the one after it goes stage by stage, too."""
    llm = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256)
    session, stopped = llm.session(), Event()

    def stop() -> None:
        while not stopped.wait(0.0002):
            session.abort()

    def first_tokens() -> None:
        """Of a policy, until one is stopped."""
        while True:
            session.eval([7])
            session.attention = POLICIES[0]
            session.rewind(0)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(stop)
        try:
            with pytest.raises(PyllmError, match="evaluation stopped at position 0"):
                first_tokens()
        finally:
            stopped.set()
    before = calls(session)
    session.eval([7])
    assert calls(session)["token"] == before["token"]
    session.eval([7])
    assert calls(session)["token"] == before["token"] + 1


@pytest.mark.parametrize("policy", [*POLICIES[3:7], POLICIES[-1]], ids=str)
def test_records(path: Path, policy: Policy) -> None:
    """Both devices record the same, and recording changes nothing."""
    audit = np.arange(len(TOKENS)) % 3 == 0
    records, logits = [], []
    for device in ("cuda", "cpu"):
        llm = LLM(path, device=device, isa="generic", attention=policy, n_batch=100, n_ctx=256)
        session = llm.session()
        records.append(session.new_record(len(TOKENS), audit))
        logits.append(session.eval(TOKENS, record=records[-1], all_logits=True))
    plain = LLM(path, device="cuda", attention=policy, n_batch=100, n_ctx=256).session()
    assert np.array_equal(plain.eval(TOKENS, all_logits=True), logits[0])
    ours, theirs = records
    assert (ours.is_long != theirs.is_long).mean() <= 0.02
    for name in ("local_mass", "estimate", "true_mass", "mean_score", "deviation"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert np.array_equal(np.isnan(a), np.isnan(b)), name
        known = ~np.isnan(b)
        if known.any():
            assert np.quantile(np.abs(a - b)[known], 0.9) <= 5e-3 * (1 + np.abs(b[known]).max()), name


def test_a_rewound_session_repeats_itself(path: Path) -> None:
    policy = Adaptive(sinks=4, window=20, threshold=0.6, page_bits=2)
    session, logits = evaluate(path, "cuda", policy)
    session.rewind(100)
    session.eval(TOKENS[:10])
    session.rewind(100)
    again = session.eval(TOKENS[100:-6], all_logits=True)
    assert np.array_equal(again, logits[100:-6])


def test_a_session_moves_between_devices(path: Path, tmp_path: Path) -> None:
    """A saved session is the same bytes on both, and goes on where it was."""
    policy = Dense(sinks=4, window=20)
    session, logits = evaluate(path, "cuda", policy)
    session.rewind(len(TOKENS) - 6)
    session.save(tmp_path / "state")
    state = (tmp_path / "state").read_bytes()
    for device in ("cuda", "cpu"):
        other = LLM(path, device=device, isa="generic", attention=policy, n_ctx=256).session()
        other.load(tmp_path / "state")
        other.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == state
        error = np.abs(other.eval(TOKENS[-6:-5]) - logits[-6]).max() / np.abs(logits).max()
        assert error <= (0 if device == "cuda" else 5e-3)


@pytest.fixture
def long_path(tmp_path: Path) -> Path:
    path = tmp_path / "long.gguf"
    return write_tiny(path, n_layers=6, types=Type.Q8_0, tokenizer=True, sharp=4.0, n_ctx_train=32768)


@pytest.mark.slow
def test_a_token_far_into_a_text(tmp_path: Path) -> None:
    """More spans, strips and lists than any kernel of decode takes at once."""
    path = tmp_path / "far.gguf"
    write_tiny(path, n_kv_heads=8, types=Type.Q8_0, tokenizer=True, sharp=4.0, n_ctx_train=32768)
    ids = np.random.default_rng(14).integers(0, 300, 20_000)
    text = LLM(path, device="cpu", attention=Window(sinks=4, window=64)).session()
    text.eval(ids)
    text.save(tmp_path / "state")
    for policy in (Dense(sinks=4, window=64), Dense(sinks=4, window=64, page_bits=3, page_share=1e-4)):
        logits, counts = [], []
        for device in ("cuda", "cpu"):
            session = LLM(path, device=device, isa="generic", attention=policy).session()
            session.load(tmp_path / "state")
            logits.append(np.stack([session.eval([token]) for token in (7, 8)]))
            counts.append(session.stats.layer_counts.astype(float))
        assert np.abs(logits[0] - logits[1]).max() <= 1e-2 * np.abs(logits[1]).max()
        assert np.abs(counts[0] - counts[1]).max() <= 0.01 * counts[1].max()


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[4], POLICIES[6], POLICIES[-1]], ids=str)
def test_a_split_cache(path: Path, policy: Policy, tmp_path: Path) -> None:
    """The same logits, sessions and moments as with all keys and values on the GPU."""
    whole, split = (
        LLM(path, device="cuda", kv=kv, attention=policy, n_batch=40, n_ctx=512).session()
        for kv in ("gpu", "split")
    )
    rng = np.random.default_rng(12)
    ids = rng.integers(0, 300, 330).tolist()
    for first, stop, rewound in ((0, 300, 170), (170, 260, 90), (90, 95, 95), (95, 330, 330)):
        for session in (whole, split):
            session.eval(ids[first : stop - 3])
        for token in ids[stop - 3 : stop]:
            assert np.array_equal(whole.eval([token]), split.eval([token]))
        for session in (whole, split):
            session.rewind(rewound)
    assert np.array_equal(whole._native.moments(1, 1, 4)[1], split._native.moments(1, 1, 4)[1])
    whole.save(tmp_path / "state")
    split.rewind(100)
    split.load(tmp_path / "state")
    split.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()
    assert np.array_equal(whole.eval([7]), split.eval([7]))
    assert np.array_equal(whole.eval(ids[:70]), split.eval(ids[:70]))


@pytest.mark.skipif(not is_emulated, reason="the memory of a real GPU cannot be capped")
def test_a_context_that_only_a_split_cache_fits(long_path: Path) -> None:
    """Memory is what the arithmetic says: of the GPU's no more than sinks, window and a batch need, and room
    for one layer's bulk while a prompt is read."""
    policy = Adaptive(sinks=4, window=64, threshold=0.6, page_bits=2)
    llm = LLM(long_path, device="cuda", kv="split", attention=policy, n_batch=64)
    memory = _native.session_memory(llm._model, _native.SessionParams(32768, 64, 4, 64), 2)
    token_bytes = 6 * 2 * 2 * 32 * 2  # layers, key/value heads, keys and values, dimensions, f16
    blocks = 1 + (64 + 64) // 64 + 3
    assert memory.kv_bytes == blocks * 64 * token_bytes
    assert memory.host_bytes == (1 + 512) * 64 * token_bytes
    # Of every page 32 minima and maxima as f16, and 2 bits for each of 64 keys' dimensions.
    pages = 6 * 2 * (1 + 512)
    assert memory.sketch_bytes - pages * 32 * (2 * 2 + 64 // 4) in range(6 * 2 * 64)
    whole = _native.session_memory(llm._model, _native.SessionParams(32768, 64, 4, 0), 2)
    assert (whole.kv_bytes, whole.host_bytes) == (memory.host_bytes, 0)
    assert memory.scratch_bytes - whole.scratch_bytes == memory.host_bytes // 6
    info = _native.device_info("cuda")
    set_memory(info.total_bytes - info.free_bytes + RESERVE + memory.total + whole.kv_bytes // 2)
    with pytest.raises(InsufficientMemoryError, match=r"a context of 32768 tokens needs .* enough for"):
        LLM(long_path, device="cuda", attention=policy, n_batch=64).session()
    before = _native.device_info("cuda").free_bytes
    session = llm.session()
    assert before - _native.device_info("cuda").free_bytes == pytest.approx(memory.total, rel=0.01)
    ids = np.random.default_rng(13).integers(0, 300, 200)
    session.eval(ids[:190])
    taken = [session.eval([int(token)]) for token in ids[190:]]
    set_memory(4 * GIGABYTE)
    other = LLM(long_path, device="cuda", attention=policy, n_batch=64, n_ctx=256).session()
    other.eval(ids[:190])
    assert np.array_equal(taken, [other.eval([int(token)]) for token in ids[190:]])


@pytest.mark.skipif(not is_emulated, reason="the memory of a real GPU cannot be capped")
def test_a_policy_whose_memory_is_refused_leaves_the_last_one(path: Path) -> None:
    policy = Adaptive(sinks=4, window=20, threshold=0.6, page_bits=3, page_share=0.01)
    session, other = (LLM(path, device="cuda", attention=policy, n_ctx=256).session() for _ in range(2))
    for s in (session, other):
        s.eval(TOKENS[:140])
    for refused in (
        Dense(sinks=4, window=20, page_bits=4),
        Adaptive(sinks=4, window=20, estimate="maximum", calibration=calibration("prompt")),
    ):
        set_memory(1)
        with pytest.raises(InsufficientMemoryError, match=r"memory for .* was refused"):
            session.attention = refused
        set_memory(4 * GIGABYTE)
        assert session.attention == policy
        assert np.array_equal(session.eval(TOKENS[140:143]), other.eval(TOKENS[140:143]))


@pytest.mark.skipif(not is_emulated, reason="a real GPU does not fail when it is told to")
@pytest.mark.parametrize(
    ("times", "remedy"), [(1, "the model must be opened"), (100, "this process must be started")]
)
def test_a_gpu_that_failed(path: Path, times: int, remedy: str) -> None:
    """It says what helps, and never that memory was refused."""
    llm = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256)
    session = llm.session()
    fail_next("cudaStreamSynchronize", 700, times)
    message = f"the GPU failed; {remedy} again: an illegal memory access"
    for call in (lambda: session.eval([7]), lambda: setattr(session, "attention", POLICIES[3]), llm.session):
        with pytest.raises(DeviceError, match=message):
            call()


@pytest.mark.skipif(not is_emulated, reason="a real GPU does not fail when it is told to")
def test_a_batch_whose_memory_is_refused(path: Path) -> None:
    """Nothing else is lost."""
    session, other = (LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256).session() for _ in range(2))
    for s in (session, other):
        s.eval(TOKENS[:10])
    fail_next("cudaHostAlloc", 2)
    with pytest.raises(InsufficientMemoryError, match="memory for a batch of 50 tokens was refused"):
        session.eval(TOKENS[10:60])
    assert session.position == 10
    assert np.array_equal(session.eval(TOKENS[10:60]), other.eval(TOKENS[10:60]))


def test_a_batch_that_overflows_says_so(tmp_path: Path) -> None:
    path = overflowing(write_tiny(tmp_path / "tiny.gguf", n_vocab=VOCABULARY, tokenizer=True), 7)
    policy = Window(sinks=4, window=16)
    session, other = (LLM(path, device="cuda", attention=policy, n_ctx=256).session() for _ in range(2))
    tokens = np.random.default_rng(3).integers(10, VOCABULARY, 60).astype(np.int32)
    bad = tokens.copy()
    bad[20] = 7
    for n_logits in (0, 1, 60):
        with pytest.raises(NumericError, match="after position 0"):
            session._native.eval(bad, np.empty((n_logits, VOCABULARY), np.float32))
        assert session.position == 0
    assert np.array_equal(session.eval(tokens), other.eval(tokens))


@pytest.mark.skipif(not is_emulated, reason="a real GPU does not fail when it is told to")
def test_a_gpu_that_fails_in_a_batch_without_logits(path: Path) -> None:
    session = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256).session()
    session.eval(TOKENS[:10])
    fail_next("cudaStreamSynchronize", 700)
    with pytest.raises(DeviceError, match="an illegal memory access"):
        session._native.eval(np.array(TOKENS[10:60], np.int32), np.empty((0, 300), np.float32))


def test_sessions_of_one_model_take_turns(path: Path) -> None:
    """Two threads with a session each, one of which rewinds while the other's token may be written down."""
    llm = LLM(path, device="cuda", attention=POLICIES[4], n_ctx=256)

    def follow(seed: int) -> list[NDArray[np.float32]]:
        ids = np.random.default_rng(seed).integers(0, 300, 100)
        session, logits = llm.session(), []
        session.eval(ids[:90])
        for _ in range(3):
            logits += [session.eval([int(token)]) for token in ids[90:94]]
            session.rewind(90)
        return logits

    alone = [follow(seed) for seed in (20, 21)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(follow, (20, 21)))
    assert np.array_equal(alone, together)


def test_another_models_sessions_come_and_go_meanwhile(tmp_path: Path) -> None:
    """As when the collector closes one in a thread that works with another: freeing waits for the GPU."""
    path = write_tiny(tmp_path / "tiny.gguf", n_layers=1, dim=64, n_ff=96, tokenizer=True)
    llm, other = (LLM(path, device="cuda", attention=POLICIES[0], n_ctx=128) for _ in range(2))

    def come_and_go() -> None:
        for _ in range(60):
            other.session()

    with ThreadPoolExecutor(1) as thread:
        meanwhile = thread.submit(come_and_go)
        while not meanwhile.done():
            session = llm.session()
            session.eval([1, 2, 3, 4, 5])
            session.rewind(2)
            session.eval([7])
        meanwhile.result()


def test_a_thread_begins_anywhere(path: Path, tmp_path: Path) -> None:
    """Its current GPU may be another one until its first call, which may be to rewind or load."""
    session = LLM(path, device="cuda", attention=POLICIES[0], n_ctx=256).session()
    session.eval(TOKENS)
    session.save(tmp_path / "state")
    expected = session.eval([7])
    for call in (lambda: session.rewind(len(TOKENS)), lambda: session.load(tmp_path / "state")):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call).result()
        assert np.array_equal(session.eval([7]), expected)


def test_a_split_cache_is_for_gpus(path: Path) -> None:
    for device, kv in (("cpu", "split"), ("cuda", "both")):
        with pytest.raises(ArgumentError, match="kv"):
            LLM(path, device=device, kv=kv)


def test_heads_without_kernels(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "odd.gguf", head_dim=48, n_heads=8, tokenizer=True)
    with pytest.raises(UnsupportedError, match="heads of 48 dimensions: the GPU has kernels for 32, 64"):
        LLM(path, device="cuda").session()
    ffi, lib = _native.library()
    out = ffi.new("pyllm_session_memory *", (1, 2, 3, 4, 5))
    model = _native.Model(_native.File([path]), 1, None, "cuda")
    params = _native.SessionParams(64, 64, 16).native()
    with pytest.raises(UnsupportedError, match="heads of 48 dimensions"):
        _native.check(lib.pyllm_session_memory_needed, model.handle, params, 0, out)
    assert list(ffi.unpack(ffi.cast("uint64_t *", out), 5)) == [1, 2, 3, 4, 5]
