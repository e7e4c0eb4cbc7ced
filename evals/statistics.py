"""Intervals: the paired bootstrap over units and seeds, and what is derived from its draws.

Arms are resampled together, so that a difference between two of them is paired. Units (people, questions) are resampled
within a seed by scipy; seeds are resampled above them. With one seed the interval covers units only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

DRAWS = 4000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A value for every series and its bootstrap draws; differences of rows are paired."""

    value: Float[np.ndarray, " series"]
    draws: Float[np.ndarray, "series draws"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_means(seeds: Sequence[Float[np.ndarray, "series units"]], stream: int = 0) -> Estimate:
    """Means over units, then over seeds, of several series measured on the same units.

    `stream` tells apart draws of units that must be independent of each other (different units); seeds are drawn alike
    in every stream, so that what differs between seeds but not within them cancels in a contrast. Deterministic.
    """
    generator = np.random.default_rng([stream, len(seeds)])
    within = []
    for units in seeds:
        if units.shape[1] == 1:
            within.append(np.repeat(units, DRAWS, axis=1))
            continue
        result = bootstrap((units,), np.mean, axis=-1, n_resamples=DRAWS, method="percentile", batch=200, rng=generator)
        within.append(result.bootstrap_distribution)
    chosen = np.random.default_rng(len(seeds)).integers(len(seeds), size=(len(seeds), DRAWS))
    draw = generator.permuted(np.tile(np.arange(DRAWS), (len(seeds), 1)), axis=1)
    draws = np.stack(within)[chosen, :, draw].mean(axis=0).T
    return Estimate(np.mean([units.mean(axis=1) for units in seeds], axis=0), draws)


def interval(value: float, draws: Float[np.ndarray, " draws"]) -> Interval:
    """The value with its percentile interval at 95 %."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def gap_closed(estimate: Estimate, arm: int, base: int, direct: int) -> Interval | None:
    """(arm - base) / (direct - base), uncapped; None where direct - base is within noise (its interval holds zero)."""
    gap = interval(estimate.value[direct] - estimate.value[base], estimate.draws[direct] - estimate.draws[base])
    if not gap.excludes_zero():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # draws without any gap are left out below
        draws = (estimate.draws[arm] - estimate.draws[base]) / (estimate.draws[direct] - estimate.draws[base])
    return interval((estimate.value[arm] - estimate.value[base]) / gap.value, draws[np.isfinite(draws)])
