"""Second-moment model of the bulk keys: running moments and the bulk mass they predict, in float64.

The rule is that of "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification"
(arXiv 2502.09647): were the bulk keys Gaussian, the sum of their exponentiated scores would be log-normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

FORMS = ("lognormal", "frozen", "truncated")
ESTIMATES = ("gaussian", "regression", "maximum")


@dataclass(frozen=True)
class Moments:
    """Moments of the bulk keys of one key/value head.

    n: number of keys. mean: (head_dim) float64, μ. m2: (head_dim, head_dim) float64, Σ_i (k_i − μ)(k_i − μ)ᵀ.
    """

    n: int
    mean: Array
    m2: Array

    @classmethod
    def empty(cls, head_dim: int) -> Moments:
        return cls(0, np.zeros(head_dim), np.zeros((head_dim, head_dim)))

    @classmethod
    def of(cls, keys: Array) -> Moments:
        """Moments of keys (n, head_dim), n >= 1, in two passes."""
        mean = keys.mean(axis=0)
        centred = keys - mean
        return cls(len(keys), mean, centred.T @ centred)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets together: Chan, Golub and LeVeque's pairwise update."""
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, mean, m2)

    @property
    def covariance(self) -> Array:
        """Σ (head_dim, head_dim) with ddof 0; requires n >= 1."""
        return self.m2 / self.n

    def like(self, mean: Array, covariance: Array) -> Moments:
        """As many keys as these, with another text's mean and covariance: calibrated moments."""
        return Moments(self.n, mean, covariance * self.n)


def score_moments(queries: Array, moments: Moments, scale: float) -> tuple[Array, Array]:
    """Mean c·q·μ and variance σ² = c²·qᵀΣq, both (n), of the scores of queries (n, head_dim)."""
    variance = scale**2 * np.einsum("nd,de,ne->n", queries, moments.covariance, queries)
    return scale * (queries @ moments.mean), np.maximum(variance, 0.0)


def bulk_mass(
    queries: Array,
    moments: Moments,
    scale: float,
    form: str = "lognormal",
    estimate: str = "gaussian",
    coefficients: Array | None = None,
) -> Array:
    """M̂ (n) of queries (n, head_dim); −inf for an empty bulk.

    "gaussian": ln N + c·q·μ + G(σ², N). "regression": ln N + c·q·μ + b0 + b1 σ² + b2 σ, with coefficients (3)
    fitted to a head on other text. "maximum": the larger of both.
    """
    if moments.n == 0:
        return np.full(len(queries), -np.inf)
    return estimated_mass(*score_moments(queries, moments, scale), moments.n, form, estimate, coefficients)


def estimated_mass(
    mean: Array,
    variance: Array,
    n: int,
    form: str = "lognormal",
    estimate: str = "gaussian",
    coefficients: Array | None = None,
) -> Array:
    """`bulk_mass` of n >= 1 keys whose scores have this mean and variance, both (any shape)."""
    location = math.log(n) + mean
    gaussian = location + log_mean_exp(variance, n, form)
    if estimate == "gaussian":
        return gaussian
    b = np.asarray(coefficients, np.float64)
    regression = location + b[0] + b[1] * variance + b[2] * np.sqrt(variance)
    if estimate == "regression":
        return np.asarray(regression)
    if estimate == "maximum":
        return np.asarray(np.maximum(gaussian, regression))
    raise ValueError(f"estimate is {estimate!r}, expected one of {ESTIMATES}")


def log_mean_exp(variance: Array, n: int, form: str) -> Array:
    """G(σ², N): log of the mean of exp over N draws of a centred Gaussian of variance σ² (n).

    form "lognormal" is the paper's, the mean of infinitely many draws; "frozen" follows the random energy
    model, in which beyond σ = √(2 ln N) the largest draw dominates; "truncated" cuts the Gaussian there.
    """
    sigma = np.sqrt(variance)
    edge = math.sqrt(2.0 * math.log(n))
    if form == "lognormal":
        return variance / 2
    if form == "frozen":
        return np.where(sigma <= edge, variance / 2, sigma * edge - math.log(n))
    if form == "truncated":
        return variance / 2 + log_normal_cdf(edge - sigma)
    raise ValueError(f"form is {form!r}, expected one of {FORMS}")


def log_normal_cdf(x: Array) -> Array:
    """ln Φ(x), elementwise, without underflow for very negative x (two terms of the asymptotic series)."""
    return np.asarray(np.vectorize(_log_normal_cdf, otypes=[np.float64])(x))


def _log_normal_cdf(x: float) -> float:
    if x > -30.0:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2.0)))
    return -x * x / 2 - math.log(-x * math.sqrt(2.0 * math.pi)) + math.log1p(-1.0 / (x * x))
