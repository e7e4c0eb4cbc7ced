"""Exact tests of paired answers, on the last axis and on all leading axes at once. Their correction: `holm` in `probes/significance.py`."""

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
