"""A model's profile, made from texts: fitted on one part, searched on a second, reported on a third.

A gate that loses more than the strictest budget where an answer hangs on few places (`recall`) is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.attention import PRESETS, Adaptive, Policy
from pyllm.calibration import Calibration
from pyllm.errors import ArgumentError
from pyllm.evaluate import recall, search, tradeoff
from pyllm.evaluate.fit import fit
from pyllm.evaluate.metrics import BLOCK, Scores, blocks_interval
from pyllm.evaluate.parts import deal
from pyllm.evaluate.static_labels import local_shares
from pyllm.evaluate.tasks.samples import Sample
from pyllm.evaluate.texts import Text, bos
from pyllm.evaluate.trials import Trials
from pyllm.llm import LLM
from pyllm.profile import Measured, Preset, Profile
from pyllm.session import Progress
from pyllm.stats import LayerStats

PARTS = ("fit", "tune", "report")
BUDGETS = dict(zip(PRESETS, (0.4, 1.0, 4.0), strict=True))  # of the balanced one
GATE_THRESHOLDS = (0.95, 0.99)


@dataclass(frozen=True)
class Plan:
    """budget_kl: nats that the balanced preset may lose. n_ctx: tokens of a text, limit: of each of the three
    parts at most. n_decode: of each text's tokens, how many are evaluated one by one."""

    budget_kl: float = 0.0025
    n_ctx: int = 4096
    limit: int = 16384
    n_decode: int = 512
    window: int = 1024
    sinks: int = 16

    def __post_init__(self) -> None:
        for name in ("n_ctx", "limit"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1 token, got {getattr(self, name)}")
        if self.n_decode <= BLOCK:
            raise ArgumentError(f"n_decode: expected more than {BLOCK} tokens, got {self.n_decode}")
        if not 0 < self.budget_kl < math.inf:
            raise ArgumentError(f"budget: expected nats above 0, got {self.budget_kl}")
        Policy(**self.geometry)  # refuses what is out of range

    @property
    def geometry(self) -> dict[str, Any]:
        return {"window": self.window, "sinks": self.sinks}

    @property
    def budgets(self) -> dict[str, float]:
        return {name: part * self.budget_kl for name, part in BUDGETS.items()}

    @property
    def least(self) -> int:
        """Tokens of a text that is of use: some of its prefill's queries have a bulk."""
        return tradeoff.least(self.window, self.sinks, self.n_decode) + BLOCK


def calibrate(
    llm: LLM, documents: Mapping[str, str], plan: Plan, progress: Progress, kept: Path | None = None
) -> Profile:
    """documents: text by name. progress: called with (tokens done, in all), the latter being a guess. kept: a
    file for what is measured, from which an interrupted calibration goes on, whatever its budget.

    Raises ArgumentError where the documents are too short, or a budget cannot be met, and FileError.
    """
    parts = _parts(llm, documents, plan)
    trials = Trials(llm, _measured_with(llm, plan, parts), kept)
    work = Work(progress, _tokens(parts, llm.info.n_layers))
    shares, calibration = _fitted(llm, parts["fit"], plan, work)
    samples = recall.draw(llm, recall.length(**plan.geometry, n_ctx=plan.n_ctx))
    gates = {str(gate): gate for gate in _gates(plan, calibration)}
    gate_answers = _on_answers(llm, samples, gates, work)
    safe = [gates[name] for name, loss in gate_answers.items() if loss <= min(plan.budgets.values())]
    found = _search(llm, parts["tune"], plan, calibration, safe, work, trials).run(plan.budgets)
    policies = {name: trial.policy for name, trial in found.items()}
    reported = measure(llm, parts["report"], list(policies.values()), plan.n_decode, work)
    answers = {"gates": gate_answers, "presets": _on_answers(llm, samples, policies, work)}
    work.finish()
    return Profile(
        fingerprint=llm.fingerprint,
        model=llm.name,
        made={**_made(llm, plan, parts, found), "answers": answers},
        presets={
            name: Preset(trial.policy, plan.budgets[name], measured)
            for (name, trial), measured in zip(found.items(), reported, strict=True)
        },
        local_shares=shares.astype(np.float32),
        calibration=calibration,
    )


def _parts(llm: LLM, documents: Mapping[str, str], plan: Plan) -> dict[str, list[Text]]:
    ids = {name: llm.tokenize(text, parse_special=False) for name, text in documents.items()}
    sizes = {"n_ctx": plan.n_ctx, "limit": plan.limit, "least": plan.least}
    dealt = deal(ids, bos(llm), len(PARTS), **sizes)
    if not all(dealt):
        raise ArgumentError(
            f"the texts are too short: with a window of {plan.window}, each of {len(PARTS)} parts needs "
            f"{plan.least} tokens; take more text, a larger limit and context, or a smaller window"
        )
    return dict(zip(PARTS, dealt, strict=True))


def _tokens(parts: Mapping[str, Sequence[Text]], n_layers: int) -> int:
    """To read at most."""
    fit, tune, report = (sum(len(text.tokens) for text in texts) for texts in parts.values())
    n_tuned = search.most(2 * len(GATE_THRESHOLDS), len(BUDGETS))
    n_bands = len(search.bands(n_layers))
    answers = 2 * recall.KEYS * recall.N_TEXTS * max(len(text.tokens) for text in parts["tune"])
    return 2 * fit + tune * n_tuned + len(parts["tune"][0].tokens) * n_bands + report * len(BUDGETS) + answers


def _fitted(
    llm: LLM, texts: Sequence[Text], plan: Plan, work: Work
) -> tuple[NDArray[np.float64], Calibration]:
    """What is learnt from the first part: how often each head is local, and the calibration."""
    n = sum(len(text.tokens) for text in texts)
    shares = local_shares(llm, texts, **plan.geometry, progress=lambda done, _: work.at(done))
    work.add(n)
    ids = [text.tokens for text in texts]
    calibration = fit(llm, ids, **plan.geometry, progress=lambda done, _: work.at(done))
    work.add(n)
    return shares, calibration


def _on_answers(
    llm: LLM, samples: Sequence[Sample], policies: Mapping[str, Policy], work: Work
) -> dict[str, float]:
    """Nats that each policy may lose on answers, by name; nothing is known without samples."""
    if not samples:
        return {}
    found = recall.losses(llm, list(policies.values()), samples, lambda done, _: work.at(done))
    work.add(sum(len(sample.tokens) for sample in samples))
    return dict(zip(policies, found, strict=True))


def _search(
    llm: LLM,
    texts: Sequence[Text],
    plan: Plan,
    calibration: Calibration,
    gates: Sequence[Adaptive],
    work: Work,
    trials: Trials,
) -> search.Search:
    # Of single bands only the order and the rough size matter, for the search measures what it makes of them:
    # one text will do, without decode.
    whole = partial(measure, llm, texts, n_decode=plan.n_decode, work=work)
    band = partial(measure, llm, texts[:1], n_decode=0, work=work)
    return search.Search(
        measure=lambda policies: trials.measured("whole", policies, lambda new: whole(policies=new)),
        measure_band=lambda policies: trials.measured("band", policies, lambda new: band(policies=new)),
        n_layers=llm.info.n_layers,
        gates=gates,
        geometry=plan.geometry,
        calibration=calibration,
    )


def _gates(plan: Plan, calibration: Calibration) -> list[Adaptive]:
    """By the paper's estimate, and by the larger one of it and of the heads' regressions."""
    paper = Adaptive(granularity="group", **plan.geometry)
    fitted = replace(paper, estimate="maximum", calibration=calibration)
    return [replace(gate, threshold=value) for gate in (paper, fitted) for value in GATE_THRESHOLDS]


@dataclass
class Work:
    """How far it is, for a progress bar. total: tokens, an upper bound."""

    progress: Progress
    total: int
    done: int = 0

    def add(self, n: int) -> None:
        self.done += n
        self.at(0)

    def at(self, more: int) -> None:
        """`more` tokens than were added."""
        self.progress(self.done + more, max(self.total, self.done + more))

    def finish(self) -> None:
        self.progress(self.done, self.done)


def measure(
    llm: LLM, texts: Sequence[Text], policies: Sequence[Policy], n_decode: int, work: Work
) -> list[Measured]:
    """Each policy over all the texts. Where n_decode is 0, prefill's figures stand for those of decode."""
    found: list[Measured] = []
    size = tradeoff.at_once(llm, max(len(text.tokens) for text in texts))
    for first in range(0, len(policies), size):
        group = policies[first : first + size]
        parts = [_outcomes(llm, text, group, n_decode, work) for text in texts]
        found += [_measured([part[at] for part in parts]) for at in range(len(group))]
    return found


@dataclass(frozen=True)
class _Outcome:
    """Of a policy on a text: scores, and (9,) counts as `LayerStats.of` takes them, of prefill and decode."""

    scores: tuple[Scores, Scores]
    counts: tuple[NDArray[np.uint64], NDArray[np.uint64]]


def _outcomes(llm: LLM, text: Text, policies: Sequence[Policy], n_decode: int, work: Work) -> list[_Outcome]:
    """Without the sessions, whose memory the next text needs."""
    _, runs = tradeoff.side_by_side(llm, text, policies, n_decode=n_decode)
    work.add(len(text.tokens) * len(policies))
    return [
        _Outcome(
            (Scores.joined(run.scores[0]), Scores.joined(run.scores[1])),
            (run.prefill.layer_counts.sum(axis=0), run.decode.layer_counts.sum(axis=0)),
        )
        for run in runs
    ]


def _measured(outcomes: Sequence[_Outcome]) -> Measured:
    prefill, decode = (Scores.joined(outcome.scores[kind] for outcome in outcomes) for kind in (0, 1))
    prefilled, decoded = (
        LayerStats.of(np.sum([outcome.counts[kind] for outcome in outcomes], axis=0)) for kind in (0, 1)
    )
    if not len(decode):
        decode, decoded = prefill, prefilled
    interval, decode_interval = (blocks_interval(scores.kl) for scores in (prefill, decode))
    if not interval or not decode_interval or prefilled.bulk_work is None or decoded.bulk_read is None:
        raise ValueError(f"{len(prefill)} and {len(decode)} tokens with a bulk are too few")
    return Measured(
        tokens=len(prefill),
        kl=float(prefill.kl.mean()),
        kl_low=interval[0],
        kl_high=interval[1],
        top1=100 * float(prefill.agrees.mean()),
        bulk_work=prefilled.bulk_work,
        decode_tokens=len(decode),
        decode_kl=float(decode.kl.mean()),
        decode_kl_low=decode_interval[0],
        decode_kl_high=decode_interval[1],
        bulk_read=decoded.bulk_read,
    )


def _measured_with(llm: LLM, plan: Plan, parts: Mapping[str, Sequence[Text]]) -> dict[str, Any]:
    """All that a trial's figures depend on besides its policy."""
    made = _made(llm, plan, parts, {})
    geometry = {name: value for name, value in made["plan"].items() if name != "budget_kl"}
    return {**made, "plan": geometry, "fingerprint": llm.fingerprint}


def _made(
    llm: LLM, plan: Plan, parts: Mapping[str, Sequence[Text]], found: Mapping[str, search.Trial]
) -> dict[str, Any]:
    """All that the profile depends on besides the model, and what the search saw. Without a date, so that the
    same command makes the same file."""
    return {
        "plan": asdict(plan),
        "batch": llm.n_batch,
        "device": llm.device,
        "isa": llm.info.isa,
        "texts": {name: {text.name: text.sha256 for text in texts} for name, texts in parts.items()},
        "tuned": {name: asdict(trial.measured) for name, trial in found.items()},
    }
