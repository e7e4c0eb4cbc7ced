"""Intervals: joint draws of several arms' means over units and seeds, and what is derived from those draws.

Arms are drawn together, so that a difference between two arms is paired. With one seed the draws are a bootstrap over units
(people, questions), and the interval covers units only: it describes this model and this run. With several seeds there are draws
from two distributions: a t distribution over the seeds' means, and the bootstrap of units within seeds. The interval is the wider
of both. Three seeds can agree by chance, and then their t interval is far narrower than the sampling of units alone allows.

Not covered: both sources at once when seeds have the same units. The seeds' means then differ by tuning only, and the interval
is over these units or over these seeds, whichever is wider.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy.linalg import hadamard, helmert
from scipy.stats import chi2, norm, t
from scipy.stats.qmc import Halton

from probes.knowledge.exposure import within_strata

DRAWS = 4000
LEVEL = 0.95
BATCH = 200  # draws at a time: bounds memory, does not change results
KEPT_UNITS = 3000  # the weights of so many units are kept, 100 MB at most
PSEUDO_UNITS = 2.0  # in total: one right and one wrong for one arm, one half for each of the four outcomes of two arms


class Estimate(NamedTuple):
    """A value for every series, and its draws; differences of rows are paired.

    With one seed there are draws from one distribution. With several seeds there are draws from two (axis `laws`), and `interval` takes
    the wider interval; everything that is derived from draws is derived from both.
    """

    value: Float[np.ndarray, " series"]
    draws: Float[np.ndarray, "series *laws draws"]


class Interval(NamedTuple):
    value: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_means(
    seeds: Sequence[Float[np.ndarray, "series _"]],
    stream: int = 0,
    *,
    shares: bool = False,
    strata: Sequence[Shaped[np.ndarray, " _"]] | None = None,
    same_units: bool = False,
) -> Estimate:
    """Means over units, then over seeds, of several series that are measured on the same units.

    `shares` says that every value is a share of right answers, in [0, 1]. Draws are then smoothed by pseudo-units
    (`_with_pseudo_units`); without them a sample in which all answers are right would have no interval. Values stay plain means.

    `strata` are labels of every seed's units. The number of units in each stratum is taken as fixed, so that differences between
    strata are not sampling error. Default: all units are one stratum. `same_units` says that every seed has the same units, in the
    same order; otherwise units of different seeds are taken as different.

    `stream` separates draws of units that must be independent of each other (different units). Seeds are drawn in the same way in
    every stream, so that what differs between seeds but not within them cancels in a contrast. Deterministic.

    With one seed: the Bayesian bootstrap of units (`_law_of_units`). With several: that, and `_law_of_seeds`, in which units count
    only through their seed's mean. The cost is width: 4.3 standard errors with three seeds and 12.7 with two, so that two seeds say
    almost nothing about how seeds differ.
    """
    value = np.mean([units.mean(axis=1) for units in seeds], axis=0)
    labels = [np.zeros(units.shape[1]) for units in seeds] if strata is None else strata
    of_units = _law_of_units(value, seeds, labels, shares, same_units, stream)
    if len(seeds) == 1:
        return Estimate(value, of_units)
    return Estimate(value, np.stack([_law_of_seeds(value, seeds, shares, np.random.default_rng([stream, len(seeds)])), of_units], axis=1))


def _law_of_seeds(
    value: Float[np.ndarray, " series"], seeds: Sequence[Float[np.ndarray, "series _"]], shares: bool, generator: np.random.Generator
) -> Float[np.ndarray, "series draws"]:
    means = np.stack([units.mean(axis=1) for units in seeds])
    draws = value[:, None] + (means - value).T @ _seed_weights(len(seeds))
    size = float(sum(units.shape[1] for units in seeds))
    return _with_pseudo_units(draws, size, _own_weight(seeds), generator, np.zeros((len(value), 1))) if shares else draws


def _law_of_units(
    value: Float[np.ndarray, " series"],
    seeds: Sequence[Float[np.ndarray, "series _"]],
    strata: Sequence[Shaped[np.ndarray, " _"]],
    shares: bool,
    same_units: bool,
    stream: int,
) -> Float[np.ndarray, "series draws"]:
    """Draws of the mean of these seeds when only their units are resampled, within strata: as if all were one seed.

    Units that all seeds have count once, with their mean over seeds: the same seed twice gives no more information than once. Seeds
    with units of their own are strata, each with the weight of one seed.
    """
    total = sum(units.shape[1] for units in seeds)
    if same_units:
        pooled, labels = np.mean(seeds, axis=0), strata[0]
    else:
        scaled = [(units - units.mean(axis=1, keepdims=True)) * total / (len(seeds) * units.shape[1]) for units in seeds]
        pooled = value[:, None] + np.concatenate(scaled, axis=1)
        labels = np.concatenate([np.unique(of_seed, return_inverse=True)[1] + 1j * seed for seed, of_seed in enumerate(strata)])
    inside, count = within_strata(pooled.T, labels).T, len(np.unique(labels))
    weights, generator = _unit_weights(stream, inside.shape[1])
    if not shares:
        return _bayesian_bootstrap(inside, 0.0, weights, count)[0]
    own = _own_weight([pooled] if same_units else seeds)
    draws, sizes = _bayesian_bootstrap(inside, own, weights, count)
    lower = [value - pooled[:, labels == label].mean(axis=1) for label in np.unique(labels)]
    return _with_pseudo_units(draws, sizes, own, copy.deepcopy(generator), np.stack(lower, axis=1))


def _unit_weights(stream: int, units: int) -> tuple[Iterable[Float[np.ndarray, "units batch"]], np.random.Generator]:
    """Exponential weights of so many units, a batch of draws at a time, and the generator, which goes on after the last one."""
    if units <= KEPT_UNITS:
        return _kept_weights(stream, units)
    generator = np.random.default_rng([stream, 1])
    return _batches(units, generator), generator


@lru_cache(maxsize=2)
def _kept_weights(stream: int, units: int) -> tuple[Iterable[Float[np.ndarray, "units batch"]], np.random.Generator]:
    """A study asks for the same weights again and again, and drawing them is most of the work."""
    generator = np.random.default_rng([stream, 1])
    return list(_batches(units, generator)), generator


def _batches(units: int, generator: np.random.Generator) -> Iterator[Float[np.ndarray, "units batch"]]:
    return (generator.exponential(size=(units, min(BATCH, DRAWS - start))) for start in range(0, DRAWS, BATCH))


@cache
def _seed_weights(seeds: int) -> Float[np.ndarray, "seeds draws"]:
    """Weights whose weighted sums of the seeds' means are draws of the mean's error: s / √k · t, k - 1 degrees of freedom.

    This is the usual t interval of a mean of k seeds (seed means are assumed to be normal). It is drawn as a multivariate t
    distribution over the seeds' contrasts, so that it holds for every difference of arms at once. Three seeds can be resampled in only
    ten ways, and their spread comes out a third too small: an interval from their bootstrap covers between 76 and 99 % instead of 95.
    The draws are quasi-random (Halton) because the distribution's tails are long: with three seeds, random draws would miss the
    interval's ends by 6 %, these miss them by 2 %.
    """
    uniform = Halton(seeds, rng=seeds).random(DRAWS).T
    return helmert(seeds).T @ norm.ppf(uniform[1:]) / np.sqrt(seeds * chi2.ppf(uniform[0], seeds - 1))


def _own_weight(seeds: Sequence[Float[np.ndarray, "series units"]]) -> float:
    """The weight of one unit relative to one 0/1 answer, pooled over series and seeds: 1 / its number of independent answers.

    This is the variance of units divided by that of 0/1 answers with the same mean (Kish's design effect over the answers in a unit).
    It is at most 1, and exactly 1 where units are 0/1. It is also 1 where nothing varies, which is the cautious choice.
    """
    several = [units for units in seeds if units.shape[1] > 1]
    found = sum(float(units.var(axis=1, ddof=1).sum()) for units in several)
    whole = sum(float((units.mean(axis=1) * (1 - units.mean(axis=1))).sum()) for units in several)
    return min(1.0, found / whole) if whole > 1e-12 else 1.0


def _bayesian_bootstrap(
    units: Float[np.ndarray, "series units"], own: float, weights: Iterable[Float[np.ndarray, "units batch"]], strata: int
) -> tuple[Float[np.ndarray, "series draws"], Float[np.ndarray, " draws"]]:
    """Means under exponential weights of the units (Rubin 1981, The Bayesian bootstrap), and the weights' sums.

    The spread of units with several answers does not follow from their mean. It is estimated with (units - strata) degrees of freedom,
    and the draws are widened as a t interval is, but only by the fraction 1 - `own`: 0/1 answers (`own` 1) are not widened at all.
    """
    count = units.shape[1]
    values = units.mean(axis=1, keepdims=True)
    draws, sizes = [], []
    for batch in weights:
        sizes.append(batch.sum(axis=0))
        draws.append((units - values) @ batch / sizes[-1])
    widening = 1.0
    if count > strata:
        ends = t.ppf((1 + LEVEL) / 2, count - strata) / norm.ppf((1 + LEVEL) / 2)
        widening += (1 - own) * (ends * math.sqrt((count + 1) / (count - 1)) - 1)
    return values + widening * np.concatenate(draws, axis=1), np.concatenate(sizes)


def _with_pseudo_units(
    draws: Float[np.ndarray, "series draws"],
    size: float | Float[np.ndarray, " draws"],
    own: float,
    generator: np.random.Generator,
    beside: Float[np.ndarray, "series strata"],
) -> Float[np.ndarray, "series draws"]:
    """The draws of shares as if `PSEUDO_UNITS` more units had been seen, of which every series has half right and half wrong.

    A Hadamard matrix gives their answers: every two series agree on half of them, a quarter in each of the four combinations. So
    one seed with n 0/1 units, x of them right, is drawn from Beta(x + 1, n - x + 1) (Bayes and Laplace), and the 2 x 2 table of
    two arms from a Dirichlet distribution with one half added to each cell (Jeffreys; Agresti and Min 2005 add the same to a
    Wald interval). The pseudo-units' weights are drawn: arms that are equal on every unit therefore differ in their draws, by about
    2 / n at the interval's ends. For units with several answers a pseudo-unit has the weight `own`. Strata share the pseudo-units
    equally; `beside` is how far each stratum's mean lies below the whole: a wrong answer counts more where all answers are right.

    Covers 95 %, as far as counts of few units allow. Too narrow are only differences between an arm with nearly all answers
    right and one with nearly all wrong, with fewer than about 50 units.
    """
    order = 1 << len(draws).bit_length()
    right = (1 + hadamard(order)[1 : len(draws) + 1]) / 2
    answers = (right[:, :, None] + beside[:, None, :]).reshape(len(draws), -1)
    weights = own * generator.gamma(PSEUDO_UNITS / answers.shape[1], size=(answers.shape[1], draws.shape[1]))
    return (size * draws + answers @ weights) / (size + weights.sum(axis=0))


def interval(value: float, draws: Float[np.ndarray, "*laws draws"], bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The value with its 95 % percentile interval, the wider of several distributions at each end, clipped to possible values (`bounds`).

    It is widened to contain the value: draws of shares are pulled away from 0 and 1, so that a sample with all answers right would
    lie just outside its own interval.
    """
    low, high = np.clip(np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1), *bounds)
    return Interval(float(value), float(min(low.min(), value)), float(max(high.max(), value)))


def gap_closed(estimate: Estimate, arm: int, base: int, direct: int) -> Interval | None:
    """(arm - base) / (direct - base), uncapped; None where direct - base is within noise (its interval contains zero)."""
    gap = interval(estimate.value[direct] - estimate.value[base], estimate.draws[direct] - estimate.draws[base])
    if not gap.excludes_zero():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # draws with a gap of zero are left out below
        draws = (estimate.draws[arm] - estimate.draws[base]) / (estimate.draws[direct] - estimate.draws[base])
    whole = np.isfinite(draws).reshape(-1, draws.shape[-1]).all(axis=0)
    return interval((estimate.value[arm] - estimate.value[base]) / gap.value, draws[..., whole])
