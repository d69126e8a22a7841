"""The benchmark, end to end on a tiny model: its report is complete and consistent. No speed is asserted."""

from __future__ import annotations

import fcntl
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from native import NATIVE
from pyllm import LLM, Adaptive, Dense, Window
from pyllm.benchmark import ceilings, llama_worker, report
from pyllm.benchmark.engine import Engine
from pyllm.benchmark.measure import GuardedSubject, PolicySubject, Work, works
from pyllm.benchmark.peer import Peer
from pyllm.benchmark.plan import Plan
from pyllm.benchmark.stages import Stage, mean
from pyllm.cli import main
from pyllm.errors import ArgumentError, PyllmError
from tiny_models import Type, write_tiny

SMALL = ["--prefill", "70,1500,9000", "--depths", "0,1200", "--decode", "3", "--runs", "2"]

# A stand-in for llama_cpp where that is not installed: it counts tokens and takes no time.
FAKE_LLAMA = """
__version__ = "0.0-test"

class Llama:
    ctx = None
    n_tokens = 0

    def __init__(self, **options):
        assert options["model_path"].endswith(".gguf") and options["n_ctx"] > 0, options
        assert isinstance(options["flash_attn"], bool)
        kinds = options.get("type_k"), options.get("type_v")
        assert kinds == (None, None) or (kinds == (8, 8) and options["flash_attn"]), options

    def n_vocab(self):
        return 320

    def eval(self, ids):
        if len(ids) == 0:
            raise ValueError("nothing to evaluate")
        self.n_tokens += len(ids)

    def close(self):
        pass

def llama_print_system_info():
    print("a line that is no answer")
    return b"TEST = 1"

def llama_synchronize(ctx):
    pass
"""


@pytest.fixture
def peer_python(tmp_path: Path) -> str:
    """A Python whose llama_cpp is the stand-in."""
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "llama_cpp.py").write_text(FAKE_LLAMA)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/peer exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def bench_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["bench", *map(str, arguments), "--json", "-"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_result_is_complete(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--attention", "window:64", "--device", "cpu", "--no-ceilings"]
    result = bench_json(capsys, tiny_model, *SMALL, *options)
    assert result["device"] == "cpu"
    assert result["subjects"] == ["pyllm dense", "pyllm window:64"]
    # 9,000 tokens do not fit the model's context.
    assert result["plan"]["prefill"] == [70, 1500]
    expected = ["prefill 70", "prefill 1,500", "decode at 0", "decode at 1,200"]
    assert list(report.by_work(result)) == expected
    assert len(result["measurements"]) == len(expected) * 2
    for record in result["measurements"]:
        for values in (record["seconds"], record["tokens_per_second"]):
            assert 0 < values["min"] <= values["median"] <= values["max"]
            assert sorted(values["runs"])[0] == values["min"]
            assert len(values["runs"]) == 2
        assert {stage["name"] for stage in record["stages"]} >= {"qkv", "attend_local", "select", "logits"}
        spent = sum(stage["seconds"] for stage in record["stages"])
        assert 0 < spent <= sum(record["seconds"]["runs"]) / 2
    opening = result["opening"]["pyllm"]
    assert 0 < opening["memory"]["before"] <= opening["memory"]["peak"]
    assert len(opening["open_seconds"]["runs"]) == 2
    assert result["ceilings"] is None
    assert result["ratios"] == []
    assert {"pyllm", "machine", "model", "isa", "threads", "batch"} <= result.keys()


def test_policies_read_what_they_should(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench_json(capsys, tiny_model, *SMALL, "--attention", "window:64", "--no-ceilings")
    at_depth = report.by_work(result)["decode at 1,200"]
    assert at_depth["pyllm dense"]["attention"]["bulk_read"] == 100
    assert at_depth["pyllm window:64"]["attention"]["bulk_read"] == 0
    assert set(report.by_work(result)["decode at 0"]["pyllm dense"]["attention"].values()) == {None}


def test_tables_and_files(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.svg")]
    assert main(["bench", str(tiny_model), *SMALL, "--no-ceilings", "--all-stages", *files]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    for text in (*report.by_work(result), *result["subjects"], "memory added", "gate_up", "heads local"):
        assert text in shown
    assert "<svg" in (tmp_path / "b.svg").read_text()


def test_a_policy_without_a_long_head(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tiny_model), *SMALL, "--no-ceilings", "--attention", "window:64"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any("pages read" in line for line in shown)
    assert any(re.search(r"window:64 +100\.0 +0\.0 +0\.0 +–", line) for line in shown)


def test_outputs_are_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for files, cause in (
        (["--json", "no/such/b.json"], "cannot be written"),
        (["--plot", "b.txt"], "ends in"),
        (["--json", f"{tmp_path}/b.png", "--plot", f"{tmp_path}/b.png"], "the same file"),
    ):
        # That the model is not there would be found next.
        assert main(["bench", str(tmp_path / "no.gguf"), *files]) == 1
        assert cause in capsys.readouterr().err


def test_decode_follows_a_prompt_read_in_full(tiny_model: Path) -> None:
    plan = Plan((200,), (200,), 1, 1)
    paged = Dense(page_bits=3, page_share=1.0, window=64)
    engine = Engine(lambda: LLM(tiny_model), plan, lambda _: {"pages": paged})
    engine.prefill(paged, 200)
    engine.decode(paged, 200, 1)
    before = engine.session.stats.evaluated
    assert before[str(Dense())] >= 199, before


def test_peer_takes_turns(tiny_model: Path, capsys: pytest.CaptureFixture[str], peer_python: str) -> None:
    arguments = [*SMALL, "--no-ceilings", "--peer-python", peer_python]
    result = bench_json(capsys, tiny_model, *arguments)
    assert result["peers"] == ["llama.cpp", "llama.cpp flash"]
    assert result["peer"]["llama.cpp"]["system"] == "TEST = 1"
    assert set(result["opening"]) == {"pyllm", "llama.cpp", "llama.cpp flash"}
    records = report.by_work(result)
    for ratio in result["ratios"]:
        speeds = {name: r["tokens_per_second"]["median"] for name, r in records[ratio["work"]].items()}
        assert speeds[ratio["peer"]] == max(speeds[peer] for peer in result["peers"])
        for subject, times in ratio["times"].items():
            assert times == pytest.approx(speeds[subject] / speeds[ratio["peer"]])
    assert main(["bench", str(tiny_model), *arguments]) == 0
    assert "times as fast as llama.cpp" in capsys.readouterr().out


def test_a_cache_of_bytes_has_a_peer_of_its_kind(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], peer_python: str
) -> None:
    arguments = [*SMALL, "--no-ceilings", "--peer-python", peer_python, "--kv-type", "q8_0"]
    result = bench_json(capsys, tiny_model, *arguments, "--activation-bits", "8")
    assert (result["kv_type"], result["activation_bits"]) == ("q8_0", 8)
    assert result["peers"] == ["llama.cpp", "llama.cpp flash", "llama.cpp q8_0"]


def test_peer_that_fails_says_why(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], peer_python: str
) -> None:
    module = tmp_path / "peer" / "llama_cpp.py"
    for broken, message in (
        ('raise OSError("no libllama.so")', "llama.cpp: OSError: no libllama.so"),
        ('import os, sys\nprint("died of it", file=sys.stderr, flush=True)\nos._exit(3)', "died of it"),
        (FAKE_LLAMA.replace("320", "321"), "reads 321 tokens"),
    ):
        module.write_text(broken)
        assert main(["bench", str(tiny_model), *SMALL, "--no-ceilings", "--peer-python", peer_python]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["bench", str(tiny_model), *SMALL, "--peer-python", str(tmp_path / "none")]) == 1
    assert "none: cannot be run: No such file" in capsys.readouterr().err


def test_peer_evaluates_the_given_tokens_at_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    namespace: dict[str, Any] = {}
    exec(FAKE_LLAMA, namespace)
    count = namespace["Llama"].eval

    def record(llama: Any, ids: list[int]) -> None:
        seen.append([llama.n_tokens, *ids])
        count(llama, ids)

    namespace["Llama"].eval = record
    monkeypatch.setitem(sys.modules, "llama_cpp", type("module", (), namespace))
    engine = llama_worker.LlamaEngine({"model_path": "x.gguf", "n_ctx": 20, "flash_attn": True})
    engine.use([10 + i for i in range(20)])
    engine.prefill(4)
    engine.decode(3, 2)
    engine.decode(6, 1)
    engine.decode(0, 1)
    # (position, ids): a prompt; the token before depth 3 again, then two; up to depth 6; from the start.
    assert seen == [
        [0, 10, 11, 12, 13],
        [2, 12],
        [3, 13],
        [4, 14],
        [5, 15],
        [6, 16],
        [0, 10],
    ]


def engine(path: Path, plan: Plan, *policies: Any) -> Engine:
    return Engine(lambda: LLM(path), plan, lambda _: {str(policy): policy for policy in policies})


def test_session_holds_the_planned_tokens(tiny_model: Path) -> None:
    bench = engine(tiny_model, Plan((40, 90), (0, 120), 4), Dense(), Adaptive(window=16))
    for name, policy in bench.policies.items():
        for work in works(bench.plan):
            sample = work.run(PolicySubject(bench, name))
            held = work.depth + work.tokens
            assert bench.session.tokens == bench.ids[:held].tolist()
            assert bench.session.attention == policy
            assert sample.seconds > 0
    bench.open()
    assert bench.session.position == 0
    assert (
        Work("decode", 120, 4).run(PolicySubject(bench, str(Adaptive(window=16)))).attention["bulk_work"]
        is not None
    )


def test_a_guard_watches_over_decode_only(tiny_model: Path) -> None:
    """What it costs is mostly the scores of audited tokens, in a stage of their own."""
    policy = Adaptive(1.5, window=16)
    bench = engine(tiny_model, Plan((90,), (200,), 64), Dense(), policy)
    guarded, plain = GuardedSubject(bench, str(policy)), PolicySubject(bench, str(policy))
    assert guarded.name == f"{plain.name} guarded"
    for work in works(bench.plan):
        for subject, audited in ((plain, False), (guarded, work.kind == "decode")):
            (stage,) = [stage for stage in work.run(subject).stages if stage.name == "audit"]
            assert (stage.seconds > 0) == audited
            assert bench.session.guard is None
            assert bench.session.attention == policy


def multiply_adds(sample: Any) -> dict[str, int]:
    return {stage.name: stage.multiply_adds for stage in sample.stages}


def test_multiply_adds_are_the_models(tiny_model: Path) -> None:
    """Dense attention over t + 1 keys at position t, and every weight once per token."""
    bench = engine(tiny_model, Plan((300,), (200,), 5), Dense(window=64), Window(window=64))
    info = bench.llm.info
    heads = info.n_layers * info.n_heads * info.head_dim * 2
    for start, n, sample in (
        (0, 300, bench.prefill(Dense(window=64), 300)),
        (200, 5, bench.decode(Dense(window=64), 200, 5)),
    ):
        done = multiply_adds(sample)
        assert done["attend_local"] + done["attend_bulk"] == heads * sum(range(start + 1, start + n + 1))
        assert done["attend_bulk"] > 0
        assert done["gate_up"] == n * 2 * info.dim * info.n_ff * info.n_layers
        assert done["logits"] == (n if start else 1) * info.dim * info.n_vocab
    windowed = multiply_adds(bench.decode(Window(window=64), 200, 5))
    assert windowed["attend_bulk"] == 0
    assert 64 * 5 * heads <= windowed["attend_local"] < done["attend_local"] + done["attend_bulk"]


def test_bytes_of_decode(tiny_model: Path) -> None:
    bench = engine(tiny_model, Plan((), (200,), 5), Dense(window=64))
    info = bench.llm.info
    read = {stage.name: stage.bytes for stage in bench.decode(Dense(window=64), 200, 5).stages}
    per_key = info.n_layers * info.n_kv_heads * info.head_dim * 2 * 2
    assert read["attend_local"] + read["attend_bulk"] == per_key * sum(range(201, 206))
    assert read["gate_up"] == 5 * info.n_layers * 2 * info.dim * info.n_ff * 4


def test_stages_of_quantized_weights_multiply_integers(tmp_path: Path) -> None:
    kinds = {"attn_q": Type.Q8_0, "ffn_gate": Type.F16, "token_embd": Type.Q8_0}
    path = write_tiny(tmp_path / "mixed.gguf", types=kinds, tokenizer=True)
    stages = engine(path, Plan((8,), (), 1), Dense()).prefill(Dense(), 8).stages
    assert {stage.name for stage in stages if stage.arithmetic == "int8"} == {"qkv", "logits"}


def test_plan() -> None:
    plan = Plan((512, 8000), (0, 8000), 64, seed=5)
    assert plan.n_ctx == 8064
    assert plan.fitting(8063) == Plan((512, 8000), (0,), 64, seed=5)
    assert np.array_equal(plan.ids(100), Plan((512, 8000), (0, 8000), 64, seed=5).ids(100))
    assert not np.array_equal(plan.ids(100), Plan((512, 8000), (0, 8000), 64, seed=6).ids(100))
    assert set(plan.ids(7)) == set(range(7))
    with pytest.raises(ArgumentError, match="context of 30 tokens"):
        plan.fitting(30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "runs: expected at least 1, got 0"),
        (["--prefill", "0,5"], "prefill: expected at least 1, got 0"),
        (["--prefill", "", "--depths", ""], "neither a prefill size nor a depth"),
        (["--prefill", "9000", "--depths", "9000"], "none of the sizes fits"),
        (["--attention", "window:8", "--attention", "adaptive:0.5,sinks=4"], "need the same sinks"),
        (["--prefill", "8", "--depths", "", "--no-ceilings", "--plot", "x.nothing"], "x.nothing: "),
    ],
)
def test_mistakes(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main(["bench", str(tiny_model), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_mean_of_stages() -> None:
    runs = [[Stage("qkv", 1.0, 10, 7, "int8")], [Stage("qkv", 3.0, 20, 7, "int8")]]
    assert mean(runs) == [Stage("qkv", 2.0, 15, 7, "int8")]
    assert mean([]) == []


def test_floor_is_the_longer_of_reading_and_multiplying() -> None:
    found = ceilings.Ceilings(10.0, {"int8": 100.0, "f32": 20.0}, [])
    assert found.floor(Stage("down", 1.0, 5 * 10**9, 10**9, "int8")) == pytest.approx(0.5)
    assert found.floor(Stage("down", 1.0, 10**9, 10**10, "f32")) == pytest.approx(0.5)
    assert found.floor(Stage("norm", 1.0, 0, 0, "f32")) == 0


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of bench_mem and bench_ops, built."""
    with (NATIVE / "build" / "hooks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-s", "-C", str(NATIVE), "bench"], check=True)
    return ceilings.PROGRAMS


def test_ceilings(programs: Path) -> None:
    found = ceilings.measure(2, seconds=0.001, programs=programs)
    assert found is not None
    assert found.memory_gb_s > 0
    assert {"int8", "f32"} <= found.gmac_s.keys()
    assert {(k["kernel"], k["shape"]) for k in found.kernels} == {
        (kernel, shape)
        for kernel in ("tile_gemm", "tile_gemm_8", "strip_gemm", "attend_strips", "sketch_sums")
        for shape in ("prefill", "decode")
    }
    for kernel in found.kernels:
        peak = found.gmac_s[kernel["peak"]]
        assert kernel["percent"] == pytest.approx(100 * kernel["gmac_s"] / peak, rel=0.02, abs=0.02)
    assert ceilings.Ceilings(**json.loads(json.dumps(asdict(found)))) == found


def test_ceilings_without_the_programs(tmp_path: Path) -> None:
    assert ceilings.measure(1, programs=tmp_path) is None


def test_program_that_fails_says_why(tmp_path: Path) -> None:
    for name in ("bench_mem", "bench_ops"):
        (tmp_path / name).write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(PyllmError, match="failed with status 3: no memory"):
        ceilings.measure(1, programs=tmp_path)


@pytest.mark.parametrize("program", ["bench_mem", "bench_ops"])
def test_programs_refuse_what_they_do_not_know(programs: Path, program: str) -> None:
    for arguments in (["--threads", "0"], ["--threads"], ["--what", "1"], ["--mib", "0"], ["--seconds", "x"]):
        result = subprocess.run([programs / program, *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr.startswith("usage: ")


def test_closing_a_peer_ends_it(tiny_model: Path, peer_python: str) -> None:
    ids = np.arange(8, dtype=np.int32)
    options = {"n_ctx": 8, "flash_attn": False}
    with Peer(peer_python, "llama.cpp", tiny_model, ids, 320, **options) as peer:
        assert peer.prefill(3).seconds >= 0
        assert peer._process.poll() is None
        with pytest.raises(PyllmError, match=r"llama\.cpp: ValueError: nothing to evaluate"):
            peer.prefill(0)
    assert peer._process.poll() is not None
