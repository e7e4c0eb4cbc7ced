"""Scores of answers: pass@k, calibration error and Brier score. Functions work on the last axis and on all leading axes at once."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom


def pass_at_k(n: int | Int[np.ndarray, "*problems"], c: int | Int[np.ndarray, "*problems"], k: int) -> Float[np.ndarray, "*problems"]:
    """The probability that at least one of k answers is right, for every problem: the unbiased estimate from c right answers of n.

    1 - C(n - c, k) / C(n, k): the probability that k of the n answers, drawn without replacement, include a right one (Chen et al. 2021,
    eq. 1). nan where k > n.
    """
    return np.asarray(1 - hypergeom.pmf(0, n, c, k))


def expected_calibration_error(
    confidence: Float[np.ndarray, "*arms items"], right: Bool[np.ndarray, "*arms items"] | Float[np.ndarray, "*arms items"], bins: int = 10
) -> Float[np.ndarray, "*arms"]:
    """The difference between confidence and share right within a bin, averaged over items (Guo et al. 2017, eq. 5).

    Bins have equal width, are open below and closed above; 0 is in the first bin. The error is biased upwards with few items per bin, and
    depends on `bins`: compare arms with the same bins. `right` may be a share (for ties).
    """
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    inside = bin_of[..., None] == np.arange(bins)
    gaps = ((right - confidence)[..., None] * inside).sum(axis=-2)
    return np.asarray(np.abs(gaps).sum(axis=-1) / confidence.shape[-1])


def brier(probability: Float[np.ndarray, "*arms items"], right: Bool[np.ndarray, "*arms items"]) -> Float[np.ndarray, "*arms"]:
    """The mean squared error of the probability of being right (Brier 1950, halved: for one outcome, so that it is between 0 and 1)."""
    return np.asarray(np.square(probability - right).mean(axis=-1))
