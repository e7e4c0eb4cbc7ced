"""Tests, power, corrections and scores of answers: what is counted over items, without any draws.

Every function works on the last axis and on all leading ones at once, unless it says otherwise.
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binom, hypergeom, norm


def mcnemar(first: Bool[np.ndarray, "*tests items"], second: Bool[np.ndarray, "*tests items"]) -> Float[np.ndarray, "*tests"]:
    """Two-sided p values of the exact test that two arms are right equally often on the same items (McNemar 1947).

    Of the items that just one arm has right, each arm's count is Binomial(., 1/2) under the hypothesis; 1 where there are
    none. It is the sign test, so it takes items as independent: not for several items of one person.
    """
    gained, lost = (first & ~second).sum(axis=-1), (~first & second).sum(axis=-1)
    # The law is symmetric, so twice the smaller tail is what scipy.stats.binomtest gives, for all tests at once.
    return np.asarray(np.minimum(1.0, 2 * binom.cdf(np.minimum(gained, lost), gained + lost, 0.5)))


def minimum_detectable_effect(
    items: int | Int[np.ndarray, "*tests"], discordant: float | Float[np.ndarray, "*tests"], power: float = 0.8, level: float = 0.05
) -> Float[np.ndarray, "*tests"]:
    """The least difference of two arms' shares that `items` paired items find with probability `power`, two-sided at `level`.

    `discordant` is the share ψ of items that just one arm has right. The difference d solves Connor (1987):
    √n · d = a √ψ + b √(ψ - d²), with a = z(1 - level / 2) and b = z(power). nan where even d = ψ, the largest that ψ
    allows, is too small. Holds within 0.04 of `power` for McNemar's test without continuity correction at 100 items and
    more, as far as simulated; the exact test (`mcnemar`) is conservative and finds it in 0.76 to 0.79 of studies instead of
    0.8. Not for several items of one person, nor over seeds.
    """
    a, b = norm.ppf(1 - level / 2), norm.ppf(power)
    share = np.asarray(discordant, float)
    with np.errstate(invalid="ignore"):  # fewer than a² - b² items: nothing is detectable, nan
        effect = np.sqrt(share) * (a * np.sqrt(items) + b * np.sqrt(items + b * b - a * a)) / (items + b * b)
    return np.where(effect <= share, effect, np.nan)


def holm(p_values: Float[np.ndarray, "*families tests"]) -> Float[np.ndarray, "*families tests"]:
    """Adjusted p values, in their own order: rejecting those up to α keeps the chance of any false rejection in a family
    at α, whatever the tests' dependence (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1 and is no smaller than those before it.
    """
    order = np.argsort(p_values, axis=-1)
    count = p_values.shape[-1]
    raised = np.take_along_axis(p_values, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(raised, axis=-1)), axis=-1)
    return adjusted


def pass_at_k(n: int | Int[np.ndarray, "*problems"], c: int | Int[np.ndarray, "*problems"], k: int) -> Float[np.ndarray, "*problems"]:
    """The chance that some of k answers is right, for every problem, unbiased from c right ones of n (Chen et al. 2021, eq. 1).

    1 - C(n - c, k) / C(n, k): the chance that k of the n, drawn without replacement, hold a right one. nan where k > n.
    """
    return np.asarray(1 - hypergeom.pmf(0, n, c, k))


def expected_calibration_error(
    confidence: Float[np.ndarray, "*arms items"], right: Bool[np.ndarray, "*arms items"] | Float[np.ndarray, "*arms items"], bins: int = 10
) -> Float[np.ndarray, "*arms"]:
    """The gap between confidence and share right within a bin, averaged over items (Guo et al. 2017, eq. 5).

    Bins are of equal width, open below and closed above; 0 is in the first. Biased upwards with few items a bin, and
    it depends on `bins`: compare arms at the same ones. `right` may be a share (of a tie).
    """
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    inside = bin_of[..., None] == np.arange(bins)
    gaps = ((right - confidence)[..., None] * inside).sum(axis=-2)
    return np.asarray(np.abs(gaps).sum(axis=-1) / confidence.shape[-1])


def brier(probability: Float[np.ndarray, "*arms items"], right: Bool[np.ndarray, "*arms items"]) -> Float[np.ndarray, "*arms"]:
    """The mean squared error of the probability of being right (Brier 1950, halved: for one outcome, between 0 and 1)."""
    return np.asarray(np.square(probability - right).mean(axis=-1))
