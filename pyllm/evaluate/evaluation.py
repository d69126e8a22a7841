"""A whole evaluation: which rows are wanted, which are finished, and the work between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from pyllm.evaluate import texts, tradeoff
from pyllm.evaluate.candidates import CALIBRATED, FORMS, Candidate, Choice, Fitted, adaptive, candidates
from pyllm.evaluate.classifier import Classifier, classify
from pyllm.evaluate.fit import fit
from pyllm.evaluate.results import Results, Row
from pyllm.evaluate.static_labels import local_shares
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Progress


class Evaluation:
    """Of a choice of policies on some texts. results: what is finished already, kept at path if there is one.
    n_ctx: tokens of a text, and of those that static labels are chosen on. extra: rows beside the choice's.
    """

    def __init__(
        self,
        llm: LLM,
        choice: Choice,
        chosen: Sequence[Text],
        results: Results,
        path: Path | None,
        n_decode: int,
        seed: int,
        n_ctx: int,
        extra: Sequence[Candidate] = (),
    ) -> None:
        self.llm, self.choice, self.texts = llm, choice, chosen
        self.results, self.path = results, path
        self.n_decode, self.seed, self.n_ctx = n_decode, seed, n_ctx
        self.extra = extra
        self.candidates: list[Candidate] = []

    def run(self, limit: int | None, progress: Progress) -> int:
        """Evaluates what is missing, at most limit rows, keeping each group as soon as it is finished;
        returns how many rows are left."""
        fitted = self._fit(progress)
        self.candidates = [*candidates(self.choice, fitted), *self.extra]
        wanted = [(text, candidate) for text in self.texts for candidate in self.candidates]
        missing = [(text, candidate) for text, candidate in wanted if not self._find(text, candidate)]
        now = missing if limit is None else missing[:limit]
        groups = self._groups(now)
        total = sum(len(text.tokens[1:]) * (1 + len(group)) for text, group in groups)
        done = 0

        def on_tokens(n: int) -> None:
            nonlocal done
            done += n
            progress(done, total)

        for text, group in groups:
            self.results.rows += tradeoff.evaluate(
                self.llm, text, group, n_decode=self.n_decode, on_tokens=on_tokens
            )
            self._keep()
        if len(missing) == len(now):
            self._classify(fitted, progress)
        return len(missing) - len(now)

    def finished(self) -> list[Row]:
        """Of the rows that are wanted, in the order of the table."""
        found = [self._find(text, candidate) for text in self.texts for candidate in self.candidates]
        return [row for row in found if row]

    def _find(self, text: Text, candidate: Candidate) -> Row | None:
        return self.results.find(text.name, candidate.line, candidate.setting)

    def _fit(self, progress: Progress) -> Fitted:
        """What the choice needs to know of the model, from texts that are not evaluated."""
        wants_labels = "static" in self.choice.policies and self.results.local_shares is None
        moments = dict.fromkeys(CALIBRATED[name] for name in self.choice.policies if name in CALIBRATED)
        other = (
            [
                texts.excerpt(self.llm, name, text, self.n_ctx, self.seed)
                for name, text in texts.builtin(fitted=True).items()
            ]
            if wants_labels or moments
            else []
        )
        if wants_labels:
            self.results.local_shares = local_shares(
                self.llm, other, self.choice.window, self.choice.sinks, progress
            )
            self._keep()
        tokens, geometry = [text.tokens for text in other], self.choice.geometry
        calibrations = {
            kind: fit(self.llm, tokens, **geometry, moments=kind, progress=progress) for kind in moments
        }
        return Fitted(self.llm.info.n_kv_heads, self.results.local_shares, calibrations)

    def _classify(self, fitted: Fitted, progress: Progress) -> None:
        """Adds the records of the estimates that the choice asks for."""
        names = [name for name in self.choice.policies if name in FORMS]
        for text, name in itertools.product(self.texts, names):
            known = {c.threshold for c in self.results.classifiers if (c.text, c.line) == (text.name, name)}
            missing = [threshold for threshold in self.choice.thresholds if threshold not in known]
            if missing:
                policy = adaptive(name, self.choice, fitted)
                self.results.classifiers += classify(self.llm, text, name, policy, missing, progress)
                self._keep()

    def classifiers(self) -> list[Classifier]:
        """Of the estimates that are wanted, in the order of the table."""
        found = {c.key: c for c in self.results.classifiers}
        keys = itertools.product(
            [text.name for text in self.texts], self.choice.policies, self.choice.thresholds
        )
        return [found[key] for key in keys if key in found]

    def _groups(self, missing: Sequence[tuple[Text, Candidate]]) -> list[tuple[Text, list[Candidate]]]:
        """Candidates of one text, as many as are evaluated at once."""
        size = tradeoff.at_once(self.llm, self.n_ctx)
        groups = []
        for text in self.texts:
            of_text = [candidate for other, candidate in missing if other is text]
            groups += [(text, of_text[i : i + size]) for i in range(0, len(of_text), size)]
        return groups

    def _keep(self) -> None:
        if self.path:
            self.results.save(self.path)
