"""Fitting a calibration: least squares against numpy's, moments against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pyllm import LLM, Adaptive, ArgumentError, Calibration, Dense, Record
from pyllm.evaluate.fit import fit
from tiny_models import write_tiny

WINDOW, SINKS = 64, 16
FIRST = WINDOW + SINKS + 63  # position of the first query with a bulk
N = 400


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("fit")
    return LLM(write_tiny(folder / "tiny.gguf", dim=64, n_ff=96, sharp=12.0, tokenizer=True), n_batch=128)


def ids(rng: np.random.Generator, n: int = N) -> NDArray[np.int32]:
    return rng.integers(0, 300, n).astype(np.int32)


def dense_record(llm: LLM, tokens: NDArray[np.int32], policy: Adaptive, queries: bool = False) -> Record:
    session = llm.session(attention=policy)
    record = session.new_record(len(tokens), audit=True, queries=queries)
    session.eval(tokens, record=record)
    return record


def policy(calibration: Calibration | None, moments: str, estimate: str = "gaussian") -> Adaptive:
    return Adaptive(
        2.0, "head", window=WINDOW, sinks=SINKS, moments=moments, estimate=estimate, calibration=calibration
    )


@pytest.mark.parametrize("moments", ["prompt", "calibrated"])
def test_least_squares(llm: LLM, rng: np.random.Generator, moments: str) -> None:
    tokens = ids(rng)
    found = fit(llm, [tokens], window=WINDOW, sinks=SINKS, moments=moments)
    assert found.moments == moments
    record = dense_record(llm, tokens, policy(found, moments))
    n_keys = 64 * ((np.arange(FIRST, N) + 1 - WINDOW - SINKS) // 64)
    y = (record.true_mass - record.mean_score)[:, FIRST:] - np.log(n_keys)[:, None]
    s = record.deviation[:, FIRST:].astype(np.float64)
    for layer, head in np.ndindex(found.coefficients.shape[:2]):
        x = np.stack([np.ones(N - FIRST), s[layer, :, head] ** 2, s[layer, :, head]], 1)
        best = np.linalg.lstsq(x, y[layer, :, head], rcond=None)[0]
        ours = x @ found.coefficients[layer, head].astype(np.float64)
        rest, least = (np.square(v - y[layer, :, head]).mean() for v in (ours, x @ best))
        assert rest <= 1.001 * least + 1e-6


@pytest.mark.parametrize("moments", ["prompt", "calibrated"])
def test_the_regression_is_right_on_average_where_it_was_fitted(
    llm: LLM, rng: np.random.Generator, moments: str
) -> None:
    """End to end: the library's estimate with these coefficients, against the truth it was fitted to."""
    tokens = [ids(rng), ids(rng, 300)]
    found = fit(llm, tokens, window=WINDOW, sinks=SINKS, moments=moments)
    records = [dense_record(llm, part, policy(found, moments, "regression")) for part in tokens]
    error = np.concatenate([(r.estimate - r.true_mass)[:, FIRST:] for r in records], axis=1)
    np.testing.assert_allclose(error.mean(axis=1), 0, atol=5e-3)


def test_moments_of_all_texts(llm: LLM, rng: np.random.Generator) -> None:
    tokens = [ids(rng, 210), ids(rng, 300), ids(rng, 50)]
    found = fit(llm, tokens, window=WINDOW, sinks=SINKS)
    assert found.positions == (SINKS, SINKS + 3 * 64)
    n, mean, square = 0, np.zeros(32), np.zeros((32, 32))
    for text, pages in zip(tokens, (2, 3, 0), strict=True):
        session = llm.session(attention=Dense(window=WINDOW, sinks=SINKS))
        session.eval(text)
        if pages:
            m, cov = (x.astype(np.float64) for x in session.key_moments(1, 1, pages))
            n, mean = n + 64 * pages, mean + 64 * pages * m
            square = square + 64 * pages * (cov + np.outer(m, m))
    mean, square = mean / n, square / n
    np.testing.assert_allclose(found.means[1, 1], mean, atol=1e-5)
    np.testing.assert_allclose(found.covariances[1, 1], square - np.outer(mean, mean), atol=1e-4)


def page_variance(
    llm: LLM, tokens: NDArray[np.int32], layer: int, kv_head: int, page: int
) -> NDArray[np.float64]:
    """By what the sums of keys and of their squares gain with the page."""
    session = llm.session(attention=Dense(window=WINDOW, sinks=SINKS))
    session.eval(tokens)
    sums = [np.zeros((2, llm.info.head_dim))]
    for n in range(1, page + 2):
        mean, cov = (x.astype(np.float64) for x in session.key_moments(layer, kv_head, n))
        sums.append(n * np.stack([mean, np.diag(cov) + mean**2]))
    mean, square = sums[-1] - sums[-2]
    variance: NDArray[np.float64] = square - mean**2
    return variance


def test_variance_inside_pages(llm: LLM, rng: np.random.Generator) -> None:
    tokens = [ids(rng, 210), ids(rng, 300), ids(rng, 50)]
    found = fit(llm, tokens, window=WINDOW, sinks=SINKS).page_variances
    for layer, kv_head in np.ndindex(found.shape[:2]):
        pages = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
        inside = [page_variance(llm, tokens[text], layer, kv_head, page) for text, page in pages]
        np.testing.assert_allclose(found[layer, kv_head], np.mean(inside, axis=0), rtol=1e-3, atol=1e-5)


def test_moments_of_queries(llm: LLM, rng: np.random.Generator) -> None:
    """Those of a head's group together, of all tokens of all texts."""
    tokens = [ids(rng, 210), ids(rng, 300)]
    found = fit(llm, tokens, window=WINDOW, sinks=SINKS)
    records = [dense_record(llm, text, policy(None, "prompt"), queries=True) for text in tokens]
    queries = np.concatenate([np.asarray(record.queries) for record in records], axis=1).astype(np.float64)
    of_group = queries.reshape(len(queries), queries.shape[1], found.means.shape[1], -1, queries.shape[3])
    np.testing.assert_allclose(found.query_means, of_group.mean(axis=(1, 3)), atol=1e-5)
    np.testing.assert_allclose(found.query_squares, (of_group**2).mean(axis=(1, 3)), rtol=1e-4)


def test_batches_make_one_fit(llm: LLM, rng: np.random.Generator) -> None:
    tokens = ids(rng)
    seen: list[tuple[int, int]] = []
    whole = fit(llm, [tokens], window=WINDOW, sinks=SINKS, progress=lambda *at: seen.append(at))
    other = fit(LLM(llm.paths[0], n_batch=37), [tokens], window=WINDOW, sinks=SINKS)
    s = dense_record(llm, tokens, policy(None, "prompt")).deviation[:, FIRST:].astype(np.float64)
    x = np.stack([np.ones_like(s), s * s, s], axis=-1)
    one, two = (np.einsum("lnhb,lhb->lnh", x, c.coefficients) for c in (whole, other))
    np.testing.assert_allclose(one, two, atol=5e-3)
    np.testing.assert_array_equal(whole.means, other.means)
    assert seen == [(128, N), (256, N), (384, N), (N, N)]


def test_texts_without_a_bulk(llm: LLM, rng: np.random.Generator) -> None:
    with pytest.raises(ArgumentError, match="only from 144 tokens on"):
        fit(llm, [ids(rng, FIRST)], window=WINDOW, sinks=SINKS)
    assert fit(llm, [ids(rng, FIRST + 1)], window=WINDOW, sinks=SINKS).positions == (16, 80)
    with pytest.raises(ArgumentError, match="moments"):
        fit(llm, [ids(rng)], window=WINDOW, sinks=SINKS, moments="other")
