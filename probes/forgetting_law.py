"""Whether one curve tells what an arm forgets from how far it is from the base: knowledge lost against KL(base || arm).

Shenfeld, Pari and Agrawal 2025 (arXiv 2509.04259) find forgetting to be a quadratic function of KL on the new task's prompts, whatever the training.
Here the curve is a quadratic through the origin: an arm at KL 0 is the base and has lost nothing. Arms are points; seeds are pretrained families or
tunings, in which all arms are measured.

Rank correlation and R² are those of the arms' means over seeds, so that the noise of one seed's items does not hide the curve. Their standard errors
are those of half of the seeds left out (the delete-d jackknife, Shao and Wu 1989): to leave out one seed seldom changes a rank, so that intervals of
the common jackknife are too narrow. R² is adjusted for the two coefficients.

Not covered: that arms of one sweep are alike, so that there are fewer independent points than arms; curves of other shapes; KL on answers, as KL is
taken where a prompt ends. Noise lowers a rank correlation that is 1 in truth.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import comb

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import least_squares
from scipy.stats import spearmanr

COEFFICIENTS = 2
FEWEST = COEFFICIENTS + 1  # points that a curve is fitted to
OUTLYING = 0.01  # share of knowledge: arms that are farther from the curve of others pull at it by their distance, not by its square
MOST_HALVES = 1000  # ways to leave out half of the seeds

Statistic = Callable[[Float[np.ndarray, " arms"], Float[np.ndarray, " arms"]], float]


def curve(kl: Float[np.ndarray, " arms"], lost: Float[np.ndarray, " arms"]) -> Float[np.ndarray, " coefficients"]:
    """The coefficients b, c of lost = b KL + c KL², by least squares; NaN with fewer than three points."""
    if len(kl) < FEWEST:
        return np.full(COEFFICIENTS, np.nan)
    return np.linalg.lstsq(_powers(kl), lost, rcond=None)[0]


def curve_without_outliers(kl: Float[np.ndarray, " arms"], lost: Float[np.ndarray, " arms"]) -> Float[np.ndarray, " coefficients"]:
    """The same curve with a soft L1 loss (`OUTLYING`), so that one arm far off does not draw it away from the others."""
    first = curve(kl, lost)
    if np.isnan(first).any():
        return first
    return least_squares(lambda found: along(found, kl) - lost, first, loss="soft_l1", f_scale=OUTLYING).x


def along(coefficients: Float[np.ndarray, " coefficients"], kl: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """What the curve says is lost at a KL."""
    return _powers(kl) @ coefficients


def rank(kl: Float[np.ndarray, " arms"], lost: Float[np.ndarray, " arms"]) -> float:
    """Spearman's correlation; NaN where one of them does not vary."""
    if len(kl) < FEWEST or np.ptp(kl) == 0 or np.ptp(lost) == 0:
        return float("nan")
    return float(spearmanr(kl, lost).statistic)


def explained(kl: Float[np.ndarray, " arms"], lost: Float[np.ndarray, " arms"]) -> float:
    """The adjusted R² of the curve, of the variance around the arms' mean; NaN where there is none, or with fewer than four points."""
    whole, count = float(((lost - lost.mean()) ** 2).sum()), len(kl)
    if whole == 0 or count < FEWEST + 1:
        return float("nan")
    left = float(((lost - along(curve(kl, lost), kl)) ** 2).sum())
    return 1 - (left / whole) * (count - 1) / (count - COEFFICIENTS)


def of_seeds(statistic: Statistic, kl: Float[np.ndarray, "seeds arms"], lost: Float[np.ndarray, "seeds arms"]) -> Float[np.ndarray, " seeds"]:
    """One number for each seed, whose mean is the statistic of the arms' means over all seeds and whose standard error is that of the statistic; with
    one seed the statistic itself."""
    whole, count = statistic(kl.mean(axis=0), lost.mean(axis=0)), len(kl)
    if count == 1:
        return np.array([whole])
    kept = [list(seeds) for seeds in _halves(count)]
    halves = np.array([statistic(kl[seeds].mean(axis=0), lost[seeds].mean(axis=0)) for seeds in kept])
    left_out = count - len(kept[0])
    error = np.sqrt((count - left_out) / left_out) * halves.std()
    places = np.arange(count) - (count - 1) / 2
    return whole + error * np.sqrt(count) * places / places.std(ddof=1)


def _halves(count: int) -> Iterator[tuple[int, ...]]:
    """All ways to keep half of the seeds (or one more); drawn at random where there are more than are used."""
    kept = count - count // 2
    if comb(count, kept) <= MOST_HALVES:
        return combinations(range(count), kept)
    draw = np.random.default_rng(0)
    return (tuple(draw.permutation(count)[:kept].tolist()) for _ in range(MOST_HALVES))


def off_the_curve(
    kl: Float[np.ndarray, "seeds arms"], lost: Float[np.ndarray, "seeds arms"], families: Sequence[str]
) -> Float[np.ndarray, "seeds arms"]:
    """What each arm lost in each seed beyond that seed's curve (without outliers) through the arms of all other families."""
    names = np.array(families)
    found = np.empty_like(lost)
    for seed in range(len(kl)):
        for family in dict.fromkeys(families):
            own = names == family
            found[seed, own] = lost[seed, own] - along(curve_without_outliers(kl[seed, ~own], lost[seed, ~own]), kl[seed, own])
    return found


def apart(
    kl: Float[np.ndarray, "seeds arms"], lost: Float[np.ndarray, "seeds arms"], chosen: Bool[np.ndarray, " arms"]
) -> Float[np.ndarray, " seeds"] | None:
    """What the chosen arms lost on average beyond the curve (without outliers) through the others, for each seed. Chosen arms that are farther from
    the base than any other are left out: the curve does not reach them. None if none is left in some seed, or if the others are too few."""
    found = []
    for one, other in zip(kl, lost, strict=True):
        within = chosen & (one <= one[~chosen].max(initial=0.0))
        if not within.any() or (~chosen).sum() < FEWEST:
            return None
        found.append(float((other[within] - along(curve_without_outliers(one[~chosen], other[~chosen]), one[within])).mean()))
    return np.array(found)


def _powers(kl: np.ndarray) -> np.ndarray:
    return np.stack([kl, kl**2], axis=-1)
