"""A whole pilot: evaluate a sample, choose on half of it, report on the other half, look into the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pyllm.attention import PRESETS, Policy
from pyllm.evaluate.candidates import Candidate, candidates
from pyllm.evaluate.evaluation import Evaluation
from pyllm.evaluate.results import Row
from pyllm.evaluate.texts import Text
from pyllm.files import shown
from pyllm.pilot.choice import Recommendation, by_policy, pool, recommend
from pyllm.pilot.heads import Heads, observe
from pyllm.session import Progress
from pyllm.survey.projection import Projection, project
from pyllm.survey.result import Survey
from pyllm.survey.shares import Share


@dataclass(frozen=True)
class Pilot:
    """policy: the recommended one, or the nearest to it; attention: how a command line names it. tuned: names
    of the documents that it was chosen on; held_out: of those it is reported on, the same where there is only
    one. rows: of all policies and documents. documents: of that policy, the worst first; kinds: these pooled
    by their suffix, the worst first. row: pooled over held_out. projections: of every policy onto the folder.
    """

    survey: Survey
    recommendation: Recommendation
    policy: Policy
    attention: str
    tuned: list[str]
    held_out: list[str]
    rows: list[Row]
    documents: list[Row]
    kinds: list[Row]
    row: Row
    heads: Heads
    projections: list[Projection]

    @property
    def projection(self) -> Projection:
        """Of the recommended policy."""
        return next(one for one in self.projections if one.share.name == self.row.name)

    @property
    def pooled(self) -> list[Row]:
        """A row per policy over all documents."""
        return [pool(rows) for rows in by_policy(self.rows)]


def run(
    evaluation: Evaluation,
    survey: Survey,
    budget: float,
    bar: Callable[[str], AbstractContextManager[Progress]],
    profile: Path,
) -> Pilot:
    """evaluation: of the candidates, dense attention among them, on the sampled documents. budget: nats.
    bar: shows the progress of what it is told. profile: the file of those candidates that are presets."""
    with bar("evaluating") as tick:
        evaluation.run(None, tick)
    rows = evaluation.finished()
    tuned, held_out = halves(evaluation.texts)
    recommendation = recommend([row for row in rows if row.text in tuned], budget)
    chosen = recommendation.row
    documents = [row for row in rows if row.name == chosen.name]
    policy = _policy([*candidates(evaluation.choice), *evaluation.extra], chosen)
    texts = [text for text in evaluation.texts if text.name in held_out]
    with bar("auditing") as tick:
        heads = observe(evaluation.llm, texts, policy, evaluation.seed, tick)
    return Pilot(
        survey=survey,
        recommendation=recommendation,
        policy=policy,
        attention=spelled(chosen.line, policy, profile),
        tuned=tuned,
        held_out=held_out,
        rows=rows,
        documents=sorted(documents, key=lambda row: -row.kl),
        kinds=by_kind(documents),
        row=pool([row for row in documents if row.text in held_out]),
        heads=heads,
        projections=_projections(survey, [row for row in rows if row.text in held_out]),
    )


def halves(texts: Sequence[Text]) -> tuple[list[str], list[str]]:
    """Every other text of those in order of length: names to choose on, and names to report on."""
    names = [text.name for text in texts]
    return names[0::2], names[1::2] or names


def by_kind(documents: Sequence[Row]) -> list[Row]:
    """Documents of the same suffix as one row that bears its name, the highest KL first."""
    kinds: dict[str, list[Row]] = {}
    for row in documents:
        name = row.text.rpartition("/")[2]
        suffix = name.rpartition(".")[2].lower() if "." in name else "without suffix"
        kinds.setdefault(suffix, []).append(row)
    return sorted((pool(rows, kind) for kind, rows in kinds.items()), key=lambda row: -row.kl)


def spelled(line: str, policy: Policy, profile: Path) -> str:
    """How a command line names a policy; profile: the file of those that are presets."""
    return f"{line}:{shown(profile)}" if line in PRESETS else str(policy)


def _policy(found: Sequence[Candidate], row: Row) -> Policy:
    return next(c.policy for c in found if c.key == (row.line, row.setting))


def _projections(survey: Survey, rows: Sequence[Row]) -> list[Projection]:
    """Of every policy onto all documents of the folder."""
    shares = []
    for row in map(pool, by_policy(rows)):
        read, work = row.decode_read, row.bulk_work
        assert read is not None
        assert work is not None  # evaluated texts have a bulk
        shares.append(Share(row.name, read / 100, work / 100, f"measured on {row.text}", row.kl))
    return project(
        survey.model,
        survey.tokens,
        shares,
        window=survey.window,
        sinks=survey.sinks,
        n_ctx=survey.n_ctx,
    )
