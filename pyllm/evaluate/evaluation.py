"""A whole evaluation: which rows are wanted, which are finished, and the work between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyllm.evaluate import texts, tradeoff
from pyllm.evaluate.candidates import Candidate, Choice, candidates
from pyllm.evaluate.results import Results, Row
from pyllm.evaluate.static_labels import local_shares
from pyllm.evaluate.texts import Text
from pyllm.llm import LLM
from pyllm.session import Progress


class Evaluation:
    """Of a choice of policies on some texts. results: what is finished already, kept at path if there is one.
    n_ctx: tokens of a text, and of those that static labels are chosen on."""

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
    ) -> None:
        self.llm, self.choice, self.texts = llm, choice, chosen
        self.results, self.path = results, path
        self.n_decode, self.seed, self.n_ctx = n_decode, seed, n_ctx
        self.candidates: list[Candidate] = []

    def run(self, limit: int | None, progress: Progress) -> int:
        """Evaluates what is missing, at most limit rows, keeping each group as soon as it is finished;
        returns how many rows are left."""
        self._label_heads(progress)
        shares, n_kv_heads = self.results.local_shares, self.llm.info.n_kv_heads
        self.candidates = candidates(self.choice, shares, n_kv_heads)
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
                self.llm, text, group, n_decode=self.n_decode, seed=self.seed, on_tokens=on_tokens
            )
            self._keep()
        return len(missing) - len(now)

    def finished(self) -> list[Row]:
        """Of the rows that are wanted, in the order of the table."""
        found = [self._find(text, candidate) for text in self.texts for candidate in self.candidates]
        return [row for row in found if row]

    def _find(self, text: Text, candidate: Candidate) -> Row | None:
        return self.results.find(text.name, candidate.line, candidate.setting)

    def _label_heads(self, progress: Progress) -> None:
        """Static labels come from texts that are not evaluated."""
        if "static" not in self.choice.policies or self.results.local_shares is not None:
            return
        fitted = [
            texts.excerpt(self.llm, name, text, self.n_ctx, self.seed)
            for name, text in texts.builtin(fitted=True).items()
        ]
        self.results.local_shares = local_shares(
            self.llm, fitted, self.choice.window, self.choice.sinks, progress
        )
        self._keep()

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
