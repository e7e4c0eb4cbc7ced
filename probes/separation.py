"""How well one number for each entity tells two groups apart: AUROC with sign, its null, and a layer that is chosen honestly.

AUROC is the probability that an entity of the first group has the larger value than one of the second (Mann and Whitney 1947); a tie
counts half. .5 is nothing. It is not folded: below .5 the first group has the smaller values. Only entities of one stratum are compared
(one length in tokens, say), and all such pairs count alike. Everything works on a column for each layer at once.

Three ways to fool oneself are closed. A layer that is chosen among many because it looks best is scored on other entities (`held_out`).
The null draws the choice, too (`extremes`). What goes with a covariate alone, such as a name's surprisal, is taken out by comparing
entities of like covariates only (`alike`).

In simulation (120 against 120 entities, 30 layers that correlate .9 with their neighbours, `tests/probes/test_separation.py`): the held-out
AUROC is .5 on average without an effect, where the best layer's own is .07 off; its 95 % interval covers 91 to 98 %; it is outside the null's
quantiles in none of 60 draws, and the best layer's own in 5 %. Given a covariate that alone tells the groups apart at .88, a quantity that follows
it monotonely has .75 to .81 as it is and .51 among entities that are `alike` in it, and a planted effect of .71 is found at .70. Five strata leave
.52 to .54, and so does regression on the covariate's ranks, which also shrinks the planted effect to .64 unless the groups' own difference is in it.

Not covered: covariates that are not given, and groups without overlap in a covariate: no entities are then left to compare, and the
result is NaN. Intervals of an AUROC of exactly 0 or 1 have no width.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

SPLITS = 20
PERMUTATIONS = 1000
BANDS = 12  # strata of like covariates: with a dozen, less than a tenth of a strong covariate's difference is left


class Pairs(NamedTuple):
    """Every pair of an entity of the first group and one of the second in one stratum, by their places among so many `entities`."""

    first: Int[np.ndarray, " pairs"]
    second: Int[np.ndarray, " pairs"]
    entities: int


def pairs_of(contrast: Int[np.ndarray, " entities"], strata: Int[np.ndarray, " entities"]) -> Pairs:
    """`contrast` is 1 for the first group, -1 for the second, 0 for neither."""
    one, other = np.flatnonzero(contrast > 0), np.flatnonzero(contrast < 0)
    first, second = np.nonzero(strata[one][:, None] == strata[other])
    return Pairs(one[first], other[second], len(contrast))


def wins(values: Float[np.ndarray, "entities layers"], pairs: Pairs) -> Float[np.ndarray, "pairs layers"]:
    """1 where the pair's first entity has the larger value, 0 where the second has, .5 for a tie; NaN where a value is NaN."""
    return (np.sign(values[pairs.first] - values[pairs.second]) + 1) / 2


def auroc(won: Float[np.ndarray, "pairs layers"], pairs: Pairs) -> Float[np.ndarray, "entities layers"]:
    """Contributions of the entities: their mean is the AUROC, and their spread its sampling error; NaN for entities that are in no pair.

    The first-order term of the U statistic (Hoeffding 1948; DeLong et al. 1988), so that a bootstrap of means gives an interval and
    two models that are read by the same entities are paired. In strata of few entities the interval is too wide, not too narrow.
    """
    influence = np.zeros((pairs.entities, won.shape[1]))
    if not len(won):
        return np.full_like(influence, np.nan)
    left = won - won.mean(axis=0)
    np.add.at(influence, pairs.first, left)
    np.add.at(influence, pairs.second, left)
    paired = np.bincount(np.concatenate([pairs.first, pairs.second]), minlength=pairs.entities) > 0
    return np.where(paired[:, None], won.mean(axis=0) + influence * paired.sum() / len(won), np.nan)


def halves(contrast: Int[np.ndarray, " entities"], strata: Int[np.ndarray, " entities"], seed: int = 0) -> Bool[np.ndarray, "splits entities"]:
    """Random halves of the entities, with half of every group in every stratum."""
    cells = np.unique(np.stack([contrast, strata], axis=1), axis=0, return_inverse=True)[1].reshape(-1)
    drawn = np.random.default_rng(seed).random((SPLITS, len(contrast)))
    order = np.argsort(np.argsort(drawn + cells, axis=1), axis=1)  # `drawn` is below 1: sorted by cell, at random within it
    return order % 2 == 0


def in_halves(
    won: Float[np.ndarray, "pairs layers"], pairs: Pairs, split: Bool[np.ndarray, "splits entities"]
) -> Float[np.ndarray, "2 splits layers"]:
    """The AUROC within each half: of pairs whose entities are both in it. NaN in a half without a pair."""
    inside = np.stack([half[:, pairs.first] & half[:, pairs.second] for half in (split, ~split)]).astype(float)
    count = inside.sum(axis=-1, keepdims=True)
    return np.divide(inside @ won, count, out=np.full((*inside.shape[:2], won.shape[1]), np.nan), where=count > 0)


class HeldOut(NamedTuple):
    """`value`: the mean AUROC of layers that were chosen on the other half. `layer`: the place of the one that was chosen most often."""

    value: float
    layer: int


def held_out(of_halves: Float[np.ndarray, "2 splits layers"], scored: Float[np.ndarray, "2 splits layers"], sign: int = 0) -> HeldOut:
    """In each half the layer whose AUROC is farthest from .5 is chosen, and scored in the other half; both ways, averaged over splits.

    Where a `sign` is predicted, 1 (above .5) or -1 (below), it is the layer that is farthest in that direction; layers of opposite signs
    would otherwise be averaged. The value can be on the other side all the same.
    `scored` are the AUROCs in the same halves by which the chosen layers are scored: the same ones, or those of other pairs, say of entities with
    like covariates. Halves that are NaN there count nothing; the value is NaN if all are. One split alone would depend on luck.
    """
    distance = of_halves - 0.5
    chosen = (sign * distance if sign else np.abs(distance)).argmax(axis=-1)
    values = np.take_along_axis(scored[::-1], chosen[..., None], axis=-1)
    found = values[np.isfinite(values)]
    return HeldOut(float(found.mean()) if len(found) else np.nan, int(np.bincount(chosen.ravel()).argmax()))


def shuffled(
    contrast: Int[np.ndarray, " entities"], strata: Int[np.ndarray, " entities"], seed: int = 0
) -> Bool[np.ndarray, "permutations entities"]:
    """Which entities are of the first group when the groups' names are permuted within strata; none of those that are of neither group."""
    kept = contrast != 0
    groups = _numbered(strata[kept])
    first = np.bincount(groups, contrast[kept] > 0)
    drawn = np.random.default_rng(seed).random((len(groups), PERMUTATIONS))
    found = np.zeros((PERMUTATIONS, len(contrast)), bool)
    found[:, kept] = (_ranks_within(drawn, groups) <= first[groups][:, None]).T
    return found


def permuted(
    values: Float[np.ndarray, "entities layers"],
    contrast: Int[np.ndarray, " entities"],
    strata: Int[np.ndarray, " entities"],
    permutations: Bool[np.ndarray, "permutations entities"],
) -> Float[np.ndarray, "permutations layers"]:
    """The AUROC of every layer in each permutation (`shuffled`)."""
    kept = contrast != 0
    groups = _numbered(strata[kept])
    first = np.bincount(groups, contrast[kept] > 0)
    pairs = (first * (np.bincount(groups) - first)).sum()
    sums = permutations[:, kept].astype(float) @ _ranks_within(values[kept], groups)
    return (sums - (first * (first + 1) / 2).sum()) / pairs


def extremes(of_layers: Float[np.ndarray, "permutations layers"]) -> Float[np.ndarray, " permutations"]:
    """The null: in each permutation the AUROC of the layer where it is farthest from .5, with its sign.

    The choice is made anew each time, so that the more layers there are, and the less alike, the wider the null is.
    """
    return np.take_along_axis(of_layers, np.abs(of_layers - 0.5).argmax(axis=1)[:, None], axis=1)[:, 0]


def _numbered(strata: Int[np.ndarray, " entities"]) -> Int[np.ndarray, " entities"]:
    return np.unique(strata, return_inverse=True)[1].reshape(-1)


def _ranks_within(values: Float[np.ndarray, "entities columns"], groups: Int[np.ndarray, " entities"]) -> Float[np.ndarray, "entities columns"]:
    """Ranks from 1 within each group, ties shared."""
    before = np.cumsum(np.bincount(groups)) - np.bincount(groups)
    apart = rankdata(values, axis=0) + (len(values) * groups)[:, None]
    return rankdata(apart, axis=0) - before[groups][:, None]


def alike(
    contrast: Int[np.ndarray, " entities"], strata: Int[np.ndarray, " entities"], covariates: Float[np.ndarray, "entities k"]
) -> Int[np.ndarray, " entities"]:
    """Finer strata: within each, the entities of the two groups have about the same covariates.

    The covariates' ranks within strata predict the group by least squares; entities whose predictions are in the same twelfth are alike
    (stratification by the propensity score, Rosenbaum and Rubin 1984). Only ranks count.
    """
    kept = contrast != 0
    ranks = _ranks_within(covariates[kept], _numbered(strata[kept]))
    design = np.column_stack([ranks - ranks.mean(axis=0), (ranks - ranks.mean(axis=0)) ** 2, np.ones(len(ranks))])
    score = design @ np.linalg.lstsq(design, contrast[kept].astype(float), rcond=None)[0]
    bands = np.zeros(len(contrast), int)
    bands[kept] = ((rankdata(score) - 0.5) / len(score) * BANDS).astype(int)
    return strata * BANDS + bands
