"""How what is measured of every item goes with exposure: estimates as means of one contribution an item.

A contribution is the estimate plus the item's influence on it (Hampel 1974): its mean over items is exactly the estimate, its
spread over the square root of their number the sampling error. So a bootstrap of means gives an interval, and arms measured
on the same items are paired. Popularity stands in for exposure on real models.

Items are compared within strata of one prompt length and one last token, or length and template would pass for familiarity
(Saghir 2026, arXiv 2605.00269). Costs one sort of each column. Not covered: exposure that is not random given the strata and
covariates (what comes out is then an association), and ranks taken of few items (the error of the ranks themselves is left
out: intervals of `rank_correlation` cover 94 to 95 % from 300 items on).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from scipy.linalg import orth
from scipy.stats import nct, norm, rankdata, t

from proxytune.errors import UserError

LEVEL = 0.95


def strata(lengths: Sequence[int], last_tokens: Sequence[int]) -> Int[np.ndarray, " items"]:
    """A number for every item, alike for those whose prompts have the same length in tokens and the same last token."""
    return _numbered(np.stack([np.asarray(lengths), np.asarray(last_tokens)], axis=1))


def matched(contrast: Int[np.ndarray, " items"], strata: Int[np.ndarray, " items"]) -> Bool[np.ndarray, " items"]:
    """Which items `matched_contrast` compares: the familiar (1) and unfamiliar (-1) of strata that hold both."""
    both = np.intersect1d(strata[contrast > 0], strata[contrast < 0])
    return (contrast != 0) & np.isin(strata, both)


def matched_contrast(
    values: Float[np.ndarray, "items columns"], contrast: Int[np.ndarray, " items"], strata: Int[np.ndarray, " items"]
) -> Float[np.ndarray, "items columns"]:
    """Contributions to familiar less unfamiliar (1 and -1 in `contrast`; 0 is neither), in the values' unit; NaN for items not `matched`.

    The estimate is the coefficient of being familiar in a regression with a constant for every stratum: the mean of the strata's
    differences, weighted by how much each tells. Columns with a NaN in a matched item are NaN. Raises `UserError` where no
    stratum holds both kinds.
    """
    taking_part = matched(contrast, strata)
    if not taking_part.any():
        raise UserError(
            f"knowledge: no familiar item among {int((contrast > 0).sum())} has an unfamiliar one with as many tokens and the same last token; "
            "give statements of one form for both"
        )
    groups = _numbered(strata[taking_part])
    familiar = _within((contrast[taking_part] > 0).astype(float)[:, None], groups)
    inside = _within(values[taking_part].astype(float), groups)
    information = (familiar**2).mean()
    estimate = (familiar * inside).mean(axis=0) / information
    influence = familiar * (inside - familiar * estimate) / information
    return _placed(_contributions(estimate, influence, groups), taking_part)


def rank_correlation(
    values: Float[np.ndarray, "items columns"],
    popularity: Float[np.ndarray, " items"],
    strata: Int[np.ndarray, " items"],
    covariates: Float[np.ndarray, "items k"] | None = None,
) -> Float[np.ndarray, "items columns"]:
    """Contributions to the partial Spearman correlation of the values with popularity; NaN for items that are alone in their stratum.

    Ranks of values and popularity less what the strata's constants and the ranks of the covariates (the model's own
    log-probability, say) explain of them, correlated. Only ranks count: those of log2(popularity + 1) are the same. Columns
    that do not vary beyond what is explained, or hold a NaN, are NaN. Covariates must be finite. Raises `UserError` where
    nothing is left of popularity.
    """
    groups = _numbered(strata)
    taking_part = np.bincount(groups)[groups] > 1
    groups, count = _numbered(strata[taking_part]), int(taking_part.sum())
    refusal = UserError(
        f"popularity: nothing of it varies over {count} items matched for length, last token and covariates; "
        "give statements of one form about things of different popularity"
    )
    if not count:
        raise refusal
    left, asked = (_within(rankdata(table[taking_part], axis=0), groups) for table in (values, popularity[:, None]))
    if covariates is not None:
        explained = orth(_within(rankdata(covariates[taking_part], axis=0), groups), rcond=1e-10)
        left, asked = (table - explained @ (explained.T @ table) for table in (left, asked))
    slack = 1e-8 * count  # a spread of ranks below this is rounding
    deviation, spread = left.std(axis=0), asked.std()
    if not spread > slack:
        raise refusal
    asked /= spread
    left /= np.where(deviation > slack, deviation, np.nan)
    estimate = (asked * left).mean(axis=0)
    influence = asked * left - estimate * (asked**2 + left**2) / 2
    return _placed(_contributions(estimate, influence, groups), taking_part)


def unit_means(contributions: Float[np.ndarray, "items columns"], units: Sequence[str]) -> Float[np.ndarray, "units columns"]:
    """Contributions of units (sorted by name) in place of items: their mean is the items' mean, whatever the units' sizes.

    A unit has the items' mean plus its items' distances from it, summed and scaled by units an item. Plain sums would have the same mean, but
    how many items a unit has would pass for noise. Items that take no part (NaN) add nothing; a unit of such items alone has the mean.
    """
    groups = _numbered(np.asarray(units))
    present = ~np.isnan(contributions)
    counts = present.sum(axis=0)
    mean = np.where(present, contributions, 0).sum(axis=0) / np.where(counts > 0, counts, np.nan)
    sums = _sums(np.where(present, contributions - mean, 0), groups)
    return mean + sums * len(sums) / counts.clip(min=1)


def within_strata(values: Float[np.ndarray, "units columns"], strata: Shaped[np.ndarray, " units"]) -> Float[np.ndarray, "units columns"]:
    """Contributions to the mean over units of which so many were taken from every stratum: what differs between strata is no sampling error.

    The mean plus each unit's distance from its stratum's mean, widened by what that mean took from it more than the whole mean
    would have. With one stratum they are the values.
    """
    groups = _numbered(strata)
    counts = np.bincount(groups)
    count, mean = len(values), values.mean(axis=0)
    if len(counts) == 1:
        return values
    spread = np.sqrt((1 - 1 / count) / (1 - 1 / counts.clip(min=2)))
    return mean + spread[groups][:, None] * _within(values, groups)


def needed(half_width: float, n: int, effect: float, power: float = 0.8) -> int:
    """How many items (or units) find `effect` with this power, where `n` of them gave a 95 % interval of this half width.

    By the normal law; two buckets of n each count as n.
    """
    error = half_width / norm.ppf((1 + LEVEL) / 2)
    return max(1, math.ceil(n * _errors(power) ** 2 * (error / effect) ** 2))


def needed_seeds(half_width: float, seeds: int, effect: float, power: float = 0.8) -> int:
    """The same for a t interval over the means of `seeds` (two or more): the fewest seeds whose t test finds `effect` with this power.

    The spread of few seeds is itself uncertain: from three seeds the number may be off tenfold.
    """
    spread = half_width * math.sqrt(seeds) / t.ppf((1 + LEVEL) / 2, seeds - 1)
    shift = abs(effect) / spread if spread > 0 else math.inf
    count = max(2, math.floor((_errors(power) / shift) ** 2))  # what the normal law asks for: never too many
    while _power_of_t_test(count, shift) < power:
        count += 1
    return count


def _power_of_t_test(seeds: int, shift: float) -> float:
    """Of the two-sided test that a mean is zero, when it is `shift` standard deviations of a seed away."""
    if math.isinf(shift):
        return 1.0
    limit, distance = t.ppf((1 + LEVEL) / 2, seeds - 1), shift * math.sqrt(seeds)
    return float(nct.sf(limit, seeds - 1, distance) + nct.cdf(-limit, seeds - 1, distance))


def _errors(power: float) -> float:
    """By how many standard errors an effect must differ from zero to be found."""
    return float(norm.ppf((1 + LEVEL) / 2) + norm.ppf(power))


def _numbered(labels: Shaped[np.ndarray, "items ..."]) -> Int[np.ndarray, " items"]:
    """Equal labels get equal numbers, 0 to their count, in the labels' order."""
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)


def _sums(values: Float[np.ndarray, "items columns"], groups: Int[np.ndarray, " items"]) -> Float[np.ndarray, "groups columns"]:
    order = np.argsort(groups, kind="stable")
    return np.add.reduceat(values[order], np.searchsorted(groups[order], np.arange(groups.max() + 1)), axis=0)


def _within(values: Float[np.ndarray, "items columns"], groups: Int[np.ndarray, " items"]) -> Float[np.ndarray, "items columns"]:
    """The values less their group's mean."""
    return values - (_sums(values, groups) / np.bincount(groups)[:, None])[groups]


def _contributions(
    estimate: Float[np.ndarray, " columns"], influence: Float[np.ndarray, "items columns"], groups: Int[np.ndarray, " items"]
) -> Float[np.ndarray, "items columns"]:
    """The estimate plus the influences, each widened by what its group's mean took from it (MacKinnon and White 1985, HC2).

    In groups of two items half of the variance is gone, and without this a 95 % interval covers 83 %.
    """
    widened = influence / np.sqrt(1 - 1 / np.bincount(groups)[groups])[:, None]
    return estimate + widened - widened.mean(axis=0)


def _placed(contributions: Float[np.ndarray, "some columns"], taking_part: Bool[np.ndarray, " items"]) -> Float[np.ndarray, "items columns"]:
    placed = np.full((len(taking_part), contributions.shape[1]), np.nan)
    placed[taking_part] = contributions
    return placed
