"""Exact tests of paired answers, and their correction for several tests. Functions work on the last axis and on all leading axes at once."""

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import binom


def mcnemar(first: Bool[np.ndarray, "*tests items"], second: Bool[np.ndarray, "*tests items"]) -> Float[np.ndarray, "*tests"]:
    """Two-sided p values of the exact test that two arms are right equally often on the same items (McNemar 1947).

    Under the hypothesis each arm's count, among the items that exactly one arm has right, is Binomial(., 1/2); p is 1 if there are no
    such items. It is the sign test, which assumes that items are independent: not for several items of one person.
    """
    gained, lost = (first & ~second).sum(axis=-1), (~first & second).sum(axis=-1)
    # The distribution is symmetric, so twice the smaller tail is what scipy.stats.binomtest gives, for all tests at once.
    return np.asarray(np.minimum(1.0, 2 * binom.cdf(np.minimum(gained, lost), gained + lost, 0.5)))


def holm(p_values: Float[np.ndarray, "*families tests"]) -> Float[np.ndarray, "*families tests"]:
    """Adjusted p values, in the order given: rejecting those up to α keeps the probability of any false rejection in a family
    at or below α, for any dependence between the tests (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, and is at least as large as those before it.
    """
    order = np.argsort(p_values, axis=-1)
    count = p_values.shape[-1]
    raised = np.take_along_axis(p_values, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(raised, axis=-1)), axis=-1)
    return adjusted
