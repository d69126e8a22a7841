"""A finished survey, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyllm.bulk import bulk_tokens
from pyllm.files import shown
from pyllm.survey.folder import Folder
from pyllm.survey.model_file import ModelFile
from pyllm.survey.projection import Projection
from pyllm.survey.speed import Speed

FORMAT = "pyllm survey 1"
PERCENTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)


@dataclass(frozen=True)
class Survey:
    """n_ctx: tokens of context that documents have to fit into."""

    model: ModelFile
    folder: Folder
    window: int
    sinks: int
    n_ctx: int
    projections: list[Projection]
    speed: Speed | None = None

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(n_documents,)"""
        return np.array([document.tokens for document in self.folder.documents], np.int64)

    @property
    def beyond_window(self) -> NDArray[np.bool_]:
        """(n_documents,) whether a bulk lies behind the window at the document's end."""
        return bulk_tokens(self.tokens, self.window, self.sinks) > 0

    @property
    def beyond_context(self) -> NDArray[np.bool_]:
        """(n_documents,)"""
        return self.tokens > self.n_ctx

    @property
    def percentiles(self) -> dict[int, float]:
        """Of the documents' tokens, linear between neighbours."""
        values = np.percentile(self.tokens, PERCENTILES)
        return {p: float(value) for p, value in zip(PERCENTILES, values, strict=True)}

    def as_json(self) -> bytes:
        return json.dumps(self._content(), indent=1).encode() + b"\n"

    def as_csv(self) -> bytes:
        """A line per file; of an unreadable one only its path and the cause."""
        text = io.StringIO()
        names = ["path", "bytes", "tokens", "beyond_window", "beyond_context", "cause"]
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*self._documents(), *self._unreadable()])
        return text.getvalue().encode()

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "folder": shown(self.folder.root),
            "model": {
                "name": self.model.name,
                "fingerprint": self.model.fingerprint,
                "n_ctx": self.model.n_ctx,
                "kv_bytes_per_token": self.model.kv_bytes,
                "weight_bytes": self.model.weight_bytes,
            },
            "settings": {"window": self.window, "sinks": self.sinks, "ctx": self.n_ctx},
            "lengths": {
                "documents": len(self.tokens),
                "tokens": int(self.tokens.sum()),
                "mean": float(self.tokens.mean()),
                "percentiles": self.percentiles,
                "beyond_window": int(self.beyond_window.sum()),
                "beyond_context": int(self.beyond_context.sum()),
            },
            "speed": None if self.speed is None else asdict(self.speed),
            "policies": [asdict(projection) for projection in self.projections],
            "documents": self._documents(),
            "unreadable": self._unreadable(),
        }

    def _documents(self) -> list[dict[str, Any]]:
        flags = zip(self.folder.documents, self.beyond_window, self.beyond_context, strict=True)
        return [
            {
                "path": shown(document.path),
                "bytes": document.size,
                "tokens": document.tokens,
                "beyond_window": bool(beyond_window),
                "beyond_context": bool(beyond_context),
            }
            for document, beyond_window, beyond_context in flags
        ]

    def _unreadable(self) -> list[dict[str, Any]]:
        return [{"path": shown(one.path), "cause": one.cause} for one in self.folder.unreadable]
