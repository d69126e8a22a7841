"""A whole evaluation: which rows are wanted, which are finished, and the work between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pyllm.errors import ArgumentError
from pyllm.evaluate import texts, tradeoff
from pyllm.evaluate.candidates import FORMS, Candidate, Choice, Fitted, adaptive, calibrated, candidates, keys
from pyllm.evaluate.classifier import Classifier, classify
from pyllm.evaluate.fit import fit
from pyllm.evaluate.results import Results, Row
from pyllm.evaluate.static_labels import local_shares
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Progress


def fitting_texts(llm: LLM, choice: Choice, n_ctx: int, seed: int) -> list[Text]:
    """Of n_ctx tokens each, what the choice's policies are fitted on; none where none is."""
    if not any(name == "static" or calibrated(name, choice) for name in choice.policies):
        return []
    return [texts.excerpt(llm, name, text, n_ctx, seed) for name, text in texts.builtin(fitted=True).items()]


class Evaluation:
    """Of a choice of policies on some texts. other: what is fitted on, `fitting_texts`. results: what is
    finished already, kept at path if there is one. n_ctx: tokens of a text. extra: rows beside the choice's.
    Raises ArgumentError where there is no row.
    """

    def __init__(
        self,
        llm: LLM,
        choice: Choice,
        chosen: Sequence[Text],
        other: Sequence[Text],
        results: Results,
        path: Path | None,
        n_decode: int,
        seed: int,
        n_ctx: int,
        extra: Sequence[Candidate] = (),
    ) -> None:
        self.llm, self.choice, self.texts, self.other = llm, choice, chosen, other
        self.results, self.path = results, path
        self.n_decode, self.seed, self.n_ctx = n_decode, seed, n_ctx
        self.extra = extra
        # A row that is asked for twice is one row.
        self.keys = list(dict.fromkeys([*keys(choice), *(candidate.key for candidate in extra)]))
        if not self.keys:
            raise ArgumentError("nothing to evaluate: no policy, threshold or share was given")

    def run(self, limit: int | None, progress: Progress) -> int:
        """Evaluates what is missing, at most limit rows, keeping each group as soon as it is finished;
        returns how many rows are left."""
        # Only what is missing is worth a fit.
        names = [name for name in self.choice.policies if self._is_missing(name)]
        choice = replace(self.choice, policies=names)
        fitted = self._fit(choice, progress)
        rows = [*candidates(choice, fitted), *self.extra]
        wanted = {candidate.key: candidate for candidate in rows}.values()
        missing = [(text, c) for text in self.texts for c in wanted if not self._find(text, c.key)]
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
        found = [self._find(text, key) for text in self.texts for key in self.keys]
        return [row for row in found if row]

    def _find(self, text: Text, key: tuple[str, float | None]) -> Row | None:
        return self.results.find(text.name, *key)

    def _is_missing(self, name: str) -> bool:
        """Whether any of the policy's rows or of its estimate's records is."""
        rows = keys(replace(self.choice, policies=[name]))
        return any(
            self._unclassified(text, name) or not all(self._find(text, key) for key in rows)
            for text in self.texts
        )

    def _unclassified(self, text: Text, name: str) -> list[float]:
        """Thresholds at which the estimate of that name has no record yet."""
        known = {c.threshold for c in self.results.classifiers if (c.text, c.line) == (text.name, name)}
        return [t for t in self.choice.thresholds if t not in known] if name in FORMS else []

    def _fit(self, choice: Choice, progress: Progress) -> Fitted:
        """What the choice needs to know of the model, from texts that are not evaluated."""
        if "static" in choice.policies and self.results.local_shares is None:
            self.results.local_shares = local_shares(
                self.llm, self.other, choice.window, choice.sinks, progress
            )
            self._keep()
        moments = dict.fromkeys(calibrated(name, choice) for name in choice.policies)
        tokens = [text.tokens for text in self.other]
        calibrations = {
            kind: fit(self.llm, tokens, **choice.geometry, moments=kind, progress=progress)
            for kind in moments
            if kind
        }
        return Fitted(self.llm.info.n_kv_heads, self.results.local_shares, calibrations)

    def _classify(self, fitted: Fitted, progress: Progress) -> None:
        """Adds the records of the estimates that the choice asks for."""
        names = [name for name in self.choice.policies if name in FORMS]
        for text, name in itertools.product(self.texts, names):
            if missing := self._unclassified(text, name):
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
