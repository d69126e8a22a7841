"""Samples under policies: which answers are wanted, which are finished, and the work between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyllm.attention import Dense, Policy
from pyllm.bulk import bulk_from, first_with_bulk
from pyllm.errors import ArgumentError
from pyllm.evaluate.tasks.answers import Answer, Answers
from pyllm.evaluate.tasks.draft import Task
from pyllm.evaluate.tasks.samples import Sample, Samples
from pyllm.evaluate.tasks.scoring import score
from pyllm.llm import LLM
from pyllm.session import Progress, Session


@dataclass(frozen=True)
class Reply:
    """text: what follows the prompt. attention: as `Stats.attention` of prompt and answer."""

    text: str
    attention: Mapping[str, Any]


# Whatever answers: a model, or in a test something that knows what it will say.
Ask = Callable[[Sample, Policy, Progress], Reply]


def asking(llm: LLM, length: int) -> Ask:
    """The model's likeliest tokens, as in a context of the sample's own. But of one sample the first batches,
    in which no query has a bulk, are evaluated once: there all policies are dense attention."""
    sessions: dict[int, Session] = {}  # by their sinks, which a session cannot change

    def ask(sample: Sample, policy: Policy, progress: Progress) -> Reply:
        if policy.sinks not in sessions:
            sessions[policy.sinks] = llm.session(n_ctx=length, attention=policy)
        session = sessions[policy.sinks]
        windows = session.attention.window, policy.window
        alike = min(first_with_bulk(window, policy.sinks) for window in windows) // llm.n_batch * llm.n_batch
        # A shorter prefix of another sample would change where batches begin, on which the page tier depends.
        same = session.tokens[:alike] == list(sample.tokens[:alike])
        session.rewind(alike if same else 0)
        session.attention = policy
        answer = llm.generate(
            sample.tokens, max_tokens=sample.max_new, temperature=0.0, session=session, progress=progress
        )
        return Reply(answer["choices"][0]["text"], answer["attention"])

    return ask


def with_dense(policies: Mapping[str, Policy]) -> dict[str, Policy]:
    """Dense attention first."""
    return {str(Dense()): Dense(), **policies}


def require_bulk(policies: Mapping[str, Policy], length: int) -> None:
    """Raises ArgumentError where a policy would have nothing to leave out."""
    for name, policy in policies.items():
        needed = bulk_from(policy.window, policy.sinks)
        if policy != Dense() and length < needed:
            raise ArgumentError(
                f"attention {name}: with a window of {policy.window} and {policy.sinks} sinks a query has a "
                f"bulk only from {needed} tokens on, but --length is {length}: take a smaller window"
            )


class TaskEvaluation:
    """Of n_samples of each task under each policy, the same samples under all. answers: what is finished
    already."""

    def __init__(
        self,
        tasks: Sequence[Task],
        policies: Mapping[str, Policy],
        n_samples: int,
        samples: Samples,
        ask: Ask,
        answers: Answers,
    ) -> None:
        self.tasks, self.policies, self.n_samples = tasks, policies, n_samples
        self.samples, self.ask, self.answers = samples, ask, answers

    def run(self, limit: int | None, progress: Progress) -> int:
        """Answers what is missing of at most limit samples, keeping each answer as soon as it is there;
        returns how many samples are left. progress: called with (tokens done, in all), about."""
        missing = self._missing()
        now = missing if limit is None else missing[:limit]
        length = self.samples.length
        total = length * sum(len(names) for _, _, names in now)
        done = 0

        def on_tokens(n: int, _: int) -> None:
            progress(done + n, total)

        for task, index, names in now:
            sample = self.samples.make(task, index)
            for name in names:
                reply = self.ask(sample, self.policies[name], on_tokens)
                self.answers.add([_answer(sample, name, reply)])
                done += length
                progress(done, total)
        return len(missing) - len(now)

    def finished(self) -> list[Answer]:
        """Of the answers that are wanted, in the order of tasks, policies and samples."""
        found = (
            self.answers.find(task.name, index, name)
            for task in self.tasks
            for name in self.policies
            for index in range(self.n_samples)
        )
        return [answer for answer in found if answer]

    def _missing(self) -> list[tuple[Task, int, list[str]]]:
        """Samples with the policies that have not answered them: the tasks in turns, so that whenever a run
        ends, all are about as far."""
        wanted = [
            (task, index, [name for name in self.policies if not self.answers.find(task.name, index, name)])
            for index in range(self.n_samples)
            for task in self.tasks
        ]
        return [entry for entry in wanted if entry[2]]


def _answer(sample: Sample, policy: str, reply: Reply) -> Answer:
    costs = {name: reply.attention[name] for name in ("heads_local", "bulk_work", "bulk_read")}
    return Answer(
        task=sample.task,
        sample=sample.index,
        policy=policy,
        score=score(reply.text, sample.answers),
        text=reply.text,
        expected=list(sample.answers),
        chance=sample.chance,
        tokens=len(sample.tokens),
        **costs,
    )
