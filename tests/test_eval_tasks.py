"""`pyllm eval --tasks`: the tasks, a fake model that knows or finds their answers, and the command."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllm import LLM, Adaptive, ArgumentError, Dense, FormatError, Window
from pyllm.attention import Policy
from pyllm.cli import main
from pyllm.evaluate.intervals import fractions_interval, paired_interval
from pyllm.evaluate.tasks import catalog, haystack, summary, words
from pyllm.evaluate.tasks.answers import Answer, Answers
from pyllm.evaluate.tasks.draft import Draft, Task
from pyllm.evaluate.tasks.running import Reply, TaskEvaluation, asking, with_dense
from pyllm.evaluate.tasks.samples import Sample, Samples
from pyllm.evaluate.tasks.scoring import score
from pyllm.session import Progress

TASKS = list(catalog.TASKS.values())
NOTHING = {"heads_local": None, "bulk_work": None, "bulk_read": None}
LENGTH = 4096  # of the tiny model's tokens, most of which are single characters

each_task = pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
seeds = st.integers(0, 2**32 - 1)


def drawn(task: Task, seed: int, n: int) -> Draft:
    return task.draw(random.Random(seed), n)


def document(draft: Draft) -> str:
    """What stands between the instruction and the question."""
    return draft.text.split("\n\n", 1)[1].rsplit("\n\n", 1)[0]


# ---- what a task draws ----


@each_task
@settings(max_examples=20)
@given(seed=seeds, more=st.integers(0, 200))
def test_a_task_depends_on_nothing_but_seed_and_amount(task: Task, seed: int, more: int) -> None:
    n = task.least + more
    draft = drawn(task, seed, n)
    assert draft == drawn(task, seed, n)
    assert draft != drawn(task, seed + 1, n)
    assert draft.answers == drawn(task, seed, n + 1).answers
    assert len(draft.text) <= len(drawn(task, seed, n + 1).text)
    assert 0 <= draft.chance <= 1


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(8, 300))
def test_needles_are_there_once(seed: int, n: int) -> None:
    keys = {"niah_single": 1, "niah_multikey": 4, "niah_multivalue": 1, "niah_multiquery": 4}
    numbers = {"niah_single": 1, "niah_multikey": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    answers = {"niah_single": 1, "niah_multikey": 1, "niah_multivalue": 4, "niah_multiquery": 4}
    for name, n_keys in keys.items():
        draft = drawn(catalog.TASKS[name], seed, n)
        found = re.findall(r"numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", document(draft))
        assert (len({key for key, _ in found}), len({value for _, value in found})) == (n_keys, numbers[name])
        assert len(draft.answers) == answers[name]
        assert all(draft.text.count(answer) == 1 for answer in draft.answers)
        assert not any(answer in draft.opening for answer in draft.answers)
        asked = draft.text.rsplit("\n\n", 1)[1]
        assert {value for key, value in found if key in asked} == set(draft.answers)
        assert len(re.findall(r"\d", document(draft))) == 7 * numbers[name]


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(8, 300))
def test_variables_are_a_chain_in_order(seed: int, n: int) -> None:
    draft = drawn(catalog.TASKS["vt"], seed, n)
    steps = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", document(draft))
    assert tuple(name for name, _ in steps) == draft.answers
    assert len(set(draft.answers)) == 5
    assert [before for _, before in steps[1:]] == list(draft.answers[:-1])
    assert draft.text.endswith(f"the value {steps[0][1]} in the text above.")


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(10, 2000))
@example(seed=422815, n=1532)  # makes up a word that the vocabulary has
def test_common_words_are(seed: int, n: int) -> None:
    draft = drawn(catalog.TASKS["cwe"], seed, n)
    counts = Counter(document(draft).split(", "))
    assert {word for word, times in counts.items() if times == 30} == set(draft.answers)
    assert sorted(counts.values()) == [3] * n + [30] * 10


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(64, 3000))
def test_frequent_words_are(seed: int, n: int) -> None:
    draft = drawn(catalog.TASKS["fwe"], seed, n)
    counts = Counter(document(draft).split())
    assert counts.total() == n
    (first, a), (second, b), (third, c), (_, d) = counts.most_common(4)
    assert (first, second, third) == draft.answers
    assert a > b > c > d


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(4, 300))
def test_one_document_has_the_answer(seed: int, n: int) -> None:
    draft = drawn(catalog.TASKS["qa"], seed, n)
    documents = re.split(r"\n\nDocument \d+:\n", draft.text)[1:]
    people = [" ".join(text.split()[:3]) for text in documents]
    assert len(set(people)) == n
    assert sum(draft.answers[0] in text for text in documents) == 1
    asked = next(name for name in people if name in draft.text.rsplit("Question: ", 1)[1])
    assert draft.answers[0] in documents[people.index(asked)]


@pytest.mark.parametrize(
    "kind",
    [words.TOWNS, words.TRADES, words.INSTRUMENTS, words.ADJECTIVES, words.NOUNS, haystack.vocabulary()],
)
def test_no_word_is_part_of_another(kind: Iterable[str]) -> None:
    assert not [(a, b) for a, b in itertools.permutations(kind, 2) if a in b]


def test_no_persons_name_is_a_fact() -> None:
    """Scores do not tell cases: whoever answers with Tanner would have named a trade."""
    names, facts = (*words.FIRST_NAMES, *words.SURNAMES), (*words.TOWNS, *words.TRADES, *words.INSTRUMENTS)
    pairs = itertools.product((name.casefold() for name in names), (fact.casefold() for fact in facts))
    assert not [(name, fact) for name, fact in pairs if name in fact or fact in name]


def test_the_haystack_has_nothing_that_is_hidden_in_it() -> None:
    prose = haystack.sentences()
    assert len(prose) == len(set(prose)) > 500
    assert not re.search(r"\d|VAR|magic", " ".join(prose))
    assert max(len(sentence.split()) for sentence in prose) <= 40


def test_a_haystack_longer_than_the_prose_goes_round() -> None:
    n = 2 * len(haystack.sentences())
    text = haystack.hide(random.Random(0), ["NEEDLE."], n)
    assert Counter(text.split("NEEDLE.")[0].split(". ")).most_common(1)[0][1] <= 2
    assert text.count(haystack.sentences()[5]) >= 2
    assert text.count("NEEDLE.") == 1


# ---- samples ----


@each_task
def test_samples_fill_the_length(task: Task, tiny: LLM) -> None:
    unit = max(len(tiny.tokenize(s)) for s in haystack.sentences())  # longer than any document or word
    for length in (3600, LENGTH):
        samples = Samples(tiny, length, seed=1)
        for index in range(3):
            sample = samples.make(task, index)
            assert length - unit - 2 <= len(sample.tokens) + task.max_new <= length
            assert sample == samples.make(task, index)
        assert samples.make(task, 0).tokens != samples.make(task, 1).tokens
        assert samples.make(task, 0).tokens != Samples(tiny, length, seed=2).make(task, 0).tokens


def test_prompts_with_and_without_a_template(tiny: LLM) -> None:
    task = catalog.TASKS["niah_single"]
    chat, plain = (tiny.detokenize(Samples(tiny, 2000, 0, plain=plain).make(task, 0).tokens)
                   for plain in (False, True))  # fmt: skip
    assert chat.startswith("<|im_start|>user\nSome special magic numbers")
    assert "<|im_end|>\n<|im_start|>assistant\nThe special magic number for" in chat
    assert "<|im" not in plain
    assert plain.endswith("mentioned in the provided text is")


@each_task
def test_a_length_that_is_too_short_is_refused(task: Task, tiny: LLM) -> None:
    with pytest.raises(ArgumentError, match=f"task {task.name}: a length of 300 tokens is too short"):
        Samples(tiny, 300, 0).make(task, 0)


def test_the_least_length_is_as_the_error_says(tiny: LLM) -> None:
    task = catalog.TASKS["qa"]
    with pytest.raises(ArgumentError) as error:
        Samples(tiny, 300, 0).make(task, 0)
    smallest, answer = map(int, re.findall(r"(\d+) for", str(error.value)))
    assert len(Samples(tiny, smallest + answer, 0).make(task, 0).tokens) == smallest
    with pytest.raises(ArgumentError):
        Samples(tiny, smallest + answer - 1, 0).make(task, 0)


# ---- scores ----


def test_scores() -> None:
    assert score(" 1234567.", ("1234567",)) == 1.0
    assert score("It is 1234568", ("1234567",)) == 0.0
    assert score("STONEBURY", ("Stonebury",)) == 1.0
    assert score("- a1\n- b2\n- b2", ("a1", "b2", "c3", "d4")) == 0.5
    assert score("", ("a", "b")) == 0.0


# ---- a fake model ----


def solve(text: str) -> str:
    """Reads a prompt as a careful person would."""
    question = text.rsplit("Question:", 1)[-1]
    if "magic number" in question:
        found = re.findall(r"numbers for ([a-z]+-[a-z]+) is: (\d+)", text)
        return ", ".join(value for key, value in found if key in text.rsplit("What ", 1)[1])
    if "VAR " in text:
        known = re.findall(r"value (\d{5})", question)[:1]
        for name, value in re.findall(r"VAR (\w{5}) = (?:VAR )?(\w+)", text):
            known += [name] if value in known else []
        return ", ".join(known[1:])
    if "appear" in text.split("\n\n")[0]:
        separator, n = (", ", 10) if "most common words" in question else (" ", 3)
        counts = Counter(text.split("\n\n")[1].split(separator))
        return ", ".join(word for word, _ in counts.most_common(n))
    name = re.findall(r"[A-Z]\w+ [A-Z]\. [A-Z]\w+", question)[0]
    facts = re.findall(rf"{name} grew up in (\w+) .*? trade of a (\w+) .*? the (\w+) with friends", text)[0]
    return str(facts[["town", "trade", "instrument"].index(re.findall("town|trade|instrument", question)[0])])


def fake(llm: LLM, say: Callable[[Sample, Policy], str]) -> Callable[[Sample, Policy, Progress], Reply]:
    return lambda sample, policy, progress: Reply(say(sample, policy), NOTHING)


def evaluated(llm: LLM, say: Callable[[Sample, Policy], str], *policies: Policy, n: int = 3) -> list[Answer]:
    evaluation = TaskEvaluation(
        TASKS,
        with_dense({str(policy): policy for policy in policies}),
        n,
        Samples(llm, LENGTH, 0),
        fake(llm, say),
        Answers({}),
    )
    assert evaluation.run(None, lambda done, total: None) == 0
    return evaluation.finished()


def test_who_reads_everything_knows_everything(tiny: LLM) -> None:
    answers = evaluated(tiny, lambda sample, _: solve(tiny.detokenize(sample.tokens)))
    assert len(answers) == 3 * len(TASKS)
    assert [answer.score for answer in answers] == [1.0] * len(answers)


def test_who_knows_nothing_scores_nothing(tiny: LLM) -> None:
    rows = summary.rows(evaluated(tiny, lambda *_: "I do not know."))
    assert [row.task for row in rows] == [*catalog.TASKS, "all"]
    assert not any(row.score for row in rows)
    assert summary.above_chance(rows) == []


def test_every_policy_answers_the_same_samples(tiny: LLM) -> None:
    """The fake window policy loses every second answer where there is one, and half of several."""
    seen: dict[tuple[str, int], set[tuple[int, ...]]] = {}

    def say(sample: Sample, policy: Policy) -> str:
        seen.setdefault((sample.task, sample.index), set()).add(sample.tokens)
        if isinstance(policy, Dense):
            return " ".join(sample.answers)
        if len(sample.answers) == 1:
            return sample.answers[0] if sample.index % 2 else ""
        return " ".join(sample.answers[: len(sample.answers) // 2])

    rows = summary.rows(evaluated(tiny, say, Window(window=64), n=4))
    assert all(len(prompts) == 1 for prompts in seen.values())
    by_key = {(row.task, row.policy): row for row in rows}
    for task, expected in (("niah_single", 50), ("niah_multivalue", 50), ("vt", 40), ("fwe", 100 / 3)):
        assert by_key[task, "dense"].score == 100
        assert by_key[task, "dense"].difference is None
        row = by_key[task, str(Window(window=64))]
        assert row.score == pytest.approx(expected)
        assert row.difference == pytest.approx(expected - 100)
        assert row.difference is not None
        assert row.difference_low is not None
        assert row.difference_high is not None
        assert row.difference_low <= row.difference <= row.difference_high
        assert row.low < row.score < row.high
    assert set(summary.above_chance(rows)) >= {"niah_single", "vt", "qa"}


def test_the_task_chooses_the_interval_not_its_scores() -> None:
    """A task of several answers has fractions, also where all happen to be 0 or 1."""
    one = [an_answer(sample, policy=policy) for sample in range(3) for policy in ("dense", "window")]
    several = [replace(answer, expected=["7", "8"]) for answer in one]
    (_, newcombe), (_, bonett_price) = summary.rows(one), summary.rows(several)
    both = np.ones((2, 3))
    for row, expected in (
        (newcombe, paired_interval(*both)),
        (bonett_price, fractions_interval(np.zeros(3))),
    ):
        assert (row.difference_low, row.difference_high) == tuple(100 * end for end in expected)


# ---- answers on disk ----


def an_answer(sample: int = 0, policy: str = "dense") -> Answer:
    return Answer("qa", sample, policy, 1.0, "7\u2028\x85 “ü”\n", ["7"], 0.25, 99, None, 100.0, 50.5)


def test_answers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Answers.open(path, {"seed": 0})
    first.add([an_answer(0), an_answer(1)])
    first.add([an_answer(2)])
    again = Answers.open(path, {"seed": 0})
    assert [again.find("qa", i, "dense") for i in range(4)] == [*(an_answer(i) for i in range(3)), None]
    with pytest.raises(FormatError, match="seed 0, now it is 1"):
        Answers.open(path, {"seed": 1})


def test_an_unfinished_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers.open(path, {}).add([an_answer(0), an_answer(1)])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in {*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)}:
        path.write_bytes(whole[:size])
        answers = Answers.open(path, {})
        kept = max((end for end in ends if end <= size), default=ends[0])
        assert path.read_bytes() == whole[:kept]
        answers.add([an_answer(5)])
        assert Answers.open(path, {}).find("qa", 5, "dense") == an_answer(5)


def test_a_file_without_a_line_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for foreign in (b"GGUF", b'{"format": "another"}', b"\xff" * 99):
        path.write_bytes(foreign)
        with pytest.raises(FormatError, match=rf"{path}: not the answers"):
            Answers.open(path, {})
        assert path.read_bytes() == foreign


def test_what_is_no_answers_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Answers.open(path, {}).add([an_answer()])
    good = path.read_text()
    for broken in (
        "{}\n",
        "x\n",
        '{"format": "pyllm eval 1", "settings": {}}\n',
        good + "{}\n",
        good + "[1]\n",
        good + "[" * 200_000 + "\n",
    ):
        path.write_text(broken)
        with pytest.raises(FormatError, match=re.escape(str(path))):
            Answers.open(path, {})
        assert path.read_text() == broken
    for change, cause in (
        ({"score": "x"}, "answer 1: score: expected float, got 'x'"),
        ({"score": math.nan}, "answer 1: score: expected float, got nan"),
        ({"score": 5}, "answer 1: score: expected 0 to 1, got 5"),
        ({"expected": "7"}, "answer 1: expected: expected list, got '7'"),
        ({"expected": [7]}, "answer 1: expected: expected list"),
        ({"sample": None}, "answer 1: sample: expected int, got None"),
    ):
        head, line = good.strip().split("\n")
        path.write_text(f"{head}\n{json.dumps({**json.loads(line), **change})}\n")
        with pytest.raises(FormatError, match=re.escape(cause)):
            Answers.open(path, {})
    path.write_bytes(b"GGUF\xff" + bytes(999) + b"\n")
    with pytest.raises(FormatError, match="UnicodeDecodeError") as error:
        Answers.open(path, {})
    assert len(str(error.value)) < 300


# ---- the command, with a model ----


def command(model: Path, *arguments: str | Path) -> list[str]:
    fixed = ("eval", model, "--tasks", "niah_single,qa", "--length", "1800", "--samples", "2")
    return [str(x) for x in (*fixed, "--attention", "window:64", *arguments)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()][1:]


def test_from_end_to_end(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv")}
    files = [x for kind, path in outputs.items() for x in (f"--{kind}", path)]
    assert main(command(tiny_model, *files)) == 0
    shown = capsys.readouterr().out
    assert "tiny: 1,800 tokens" in shown
    assert "dense attention is above chance on: no task" in shown
    found = lines(outputs["json"])
    assert sorted((x["task"], x["sample"], x["policy"]) for x in found) == [
        *itertools.product(("niah_single", "qa"), (0, 1), ("dense", "window:64"))
    ]
    for answer in found:
        assert (answer["bulk_read"], answer["heads_local"]) == (
            (100.0, 0.0) if answer["policy"] == "dense" else (0.0, 100.0)
        )
        assert answer["tokens"] <= 1800
        assert answer["text"]
    with outputs["csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["task"], row["policy"]) for row in table] == [
        *itertools.product(("niah_single", "qa", "all"), ("dense", "window:64"))
    ]
    assert [row["samples"] for row in table] == ["2", "2", "2", "2", "4", "4"]


def test_an_interrupted_run_goes_on(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main(command(tiny_model, "--json", whole)) == 0
    assert main(command(tiny_model, "--json", pieces, "--limit", "1")) == 0
    assert "3 samples are left" in capsys.readouterr().err
    assert lines(pieces) == lines(whole)[:2]
    # Killed in the middle of a line, in the middle of a sample.
    pieces.write_bytes(pieces.read_bytes()[:-20])
    assert main(command(tiny_model, "--json", pieces, "--limit", "2")) == 0
    assert main(command(tiny_model, "--json", pieces)) == 0
    assert pieces.read_bytes() == whole.read_bytes()
    # What is finished is not evaluated again; one more policy and sample are only added.
    more = ["--samples", "3", "--attention", "window:64", "adaptive:0.5,window=64"]
    assert main([*command(tiny_model, "--json", pieces), *more]) == 0
    assert len(lines(pieces)) == 2 * 3 * 3
    assert lines(pieces)[:8] == lines(whole)
    assert main(command(tiny_model, "--json", pieces, "--seed", "1")) == 1
    assert f"{pieces}: these results were made with seed 0, now it is 1" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(tiny: LLM, tmp_path: Path) -> None:
    model = asking(tiny, 1800)
    asked = 0

    def interrupted(sample: Sample, policy: Policy, progress: Progress) -> Reply:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise KeyboardInterrupt
        return model(sample, policy, progress)

    def evaluation(ask: Callable[[Sample, Policy, Progress], Reply]) -> TaskEvaluation:
        answers = Answers.open(tmp_path / "answers.jsonl", {})
        tasks = [catalog.TASKS["qa"], catalog.TASKS["niah_single"]]
        policies = with_dense({"adaptive": Adaptive(0.5, window=64)})
        return TaskEvaluation(tasks, policies, 2, Samples(tiny, 1800, 0), ask, answers)

    ticks: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        evaluation(interrupted).run(None, lambda done, total: ticks.append((done, total)))
    assert ticks == sorted(ticks)
    resumed = evaluation(model)
    assert len(resumed.finished()) == 3
    assert resumed.run(None, lambda done, total: ticks.append((done, total))) == 0
    assert ticks[-1] == (5 * 1800, 5 * 1800)
    answers = resumed.finished()
    assert len(answers) == 8
    # A sample has its context to itself: what was asked before leaves no trace.
    last = answers[-1]
    sample = Samples(tiny, 1800, 0).make(catalog.TASKS[last.task], last.sample)
    alone = asking(tiny, 1800)(sample, Adaptive(0.5, window=64), lambda done, total: None)
    assert alone.text == last.text


def test_what_no_policy_leaves_out_is_evaluated_once(tiny_model: Path) -> None:
    """And answers and costs are those of a context of their own."""
    llm = LLM(tiny_model, n_batch=32)
    samples = [Samples(llm, 1800, 0).make(catalog.TASKS[name], 0) for name in ("qa", "niah_single")]
    pages = Adaptive(0.5, window=64, page_bits=3)
    # A page leaves a window of 64 after 143 tokens, 4 batches of 32; other sinks are another cache.
    policies = [
        (Dense(), 0),
        (pages, 128),
        (Window(window=200), 128),
        (Adaptive(0.9, sinks=4), 0),
        (pages, 128),
    ]
    ask = asking(llm, 1800)
    for sample, (policy, kept) in itertools.product(samples, policies):
        ticks: list[tuple[int, int]] = []
        reply = ask(sample, policy, lambda done, total, to=ticks: to.append((done, total)))  # type: ignore[misc]
        alone = asking(llm, 1800)(sample, policy, lambda done, total: None)
        assert (reply.text, reply.attention["bulk_read"]) == (alone.text, alone.attention["bulk_read"])
        assert ticks[-1][1] == len(sample.tokens) - kept


BAD = [
    (["--tasks", "qa,nosuch"], "task 'nosuch' is unknown; there are niah_single"),
    (["--tasks", ""], "no task was given"),
    (["--samples", "0"], "--samples"),
    (["--length", "900"], "task niah_single: a length of 900 tokens is too short"),
    (["--length", "99999"], "4096"),
    (["--attention", "adaptive:0.9,window=1800"], "window of 1800"),
    (["--attention", "balanced"], "has no profile; pyllm calibrate"),
    (["--text", "x.txt"], "--text"),
    (["--plot", "x.png"], "--plot"),
    (["--policies", "window"], "--policies is for texts, not for --tasks"),
    (["--thresholds", "0.5"], "--thresholds is for texts"),
    (["--page-shares", "0.5"], "--page-shares is for texts"),
    (["--decode", "5"], "--decode is for texts"),
    (["--limit", "0"], "--limit"),
    (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    (["--json", "/nosuch/rows.json"], "/nosuch/rows.json: cannot be written"),
    (["--json", "/tmp/x.out", "--csv", "/tmp/../tmp/x.out"], "--json and --csv are the same file"),
]


@pytest.mark.parametrize(("arguments", "text"), BAD)
def test_bad_input_is_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(command(tiny_model, *arguments)) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("pyllm: error: ")
    assert shown.err.count("\n") == 1
    assert text in shown.err


@pytest.mark.slow
def test_the_default_model_needs_what_lies_behind_the_window(default_model: Path) -> None:
    llm = LLM(default_model, n_ctx=700)
    samples, ask = Samples(llm, 700, seed=0), asking(llm, 700)
    right = {
        policy: sum(
            score(ask(sample, policy, lambda done, total: None).text, sample.answers)
            for sample in (samples.make(catalog.TASKS["niah_single"], index) for index in range(3))
        )
        for policy in (Dense(), Window(window=64))
    }
    assert right[Dense()] >= 2
    assert right[Window(window=64)] < right[Dense()]
