"""How well a signal tells wrong answers: counts in a corpus beside the model's own confidence.

Min et al. 2025 (arXiv 2512.19134) trigger retrieval where the corpus never states two entities together; whether that tells wrong answers better than
confidence does is not settled by it, as whole systems are compared there (Zhang et al. 2025, arXiv 2511.17946, find counts weak by themselves).
Here every signal is oriented so that more means more doubt. Intervals are over entities: answers about one entity are not independent.

Not covered: relations (a pair that the corpus states in another relation counts as stated), and aliases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from sklearn.metrics import average_precision_score, roc_auc_score

DRAWS = 500

Doubt = Float[np.ndarray, " items"]
Wrong = Bool[np.ndarray, " items"]


@dataclass(frozen=True)
class Told:
    """Of one signal: AUROC, area under precision and recall, and under risk and coverage (less is better), each with a 95 % interval over entities;
    `against` is its AUROC minus that of the signal it is compared with. NaN where all answers are right, or all wrong."""

    auroc: tuple[float, float, float]
    precision: tuple[float, float, float]
    risk: tuple[float, float, float]
    against: tuple[float, float, float]


def risk_coverage(doubt: Doubt, wrong: Wrong) -> Float[np.ndarray, " items"]:
    """The share of wrong answers among the 1, 2, … least doubted ones; equally doubted ones in random order, so that each counts the share of
    its group."""
    order = np.argsort(doubt, kind="stable")
    _, groups, counts = np.unique(doubt[order], return_inverse=True, return_counts=True)
    shares = np.bincount(groups, weights=wrong[order].astype(float)) / counts
    return np.cumsum(shares[groups]) / np.arange(1, len(doubt) + 1)


def measures(doubt: Doubt, wrong: Wrong) -> Float[np.ndarray, " three"]:
    """AUROC, area under precision and recall, area under risk and coverage; NaN where all answers are right, or all wrong."""
    if wrong.all() or not wrong.any():
        return np.full(3, np.nan)
    return np.array([roc_auc_score(wrong, doubt), average_precision_score(wrong, doubt), risk_coverage(doubt, wrong).mean()])


def compare(signals: Mapping[str, Doubt], wrong: Wrong, entities: Sequence[str], beside: str, seed: int = 0) -> dict[str, Told]:
    """Every signal, and its AUROC minus that of the signal `beside`, from the same draws of entities."""
    names = list(signals)
    groups = [np.flatnonzero(np.array(entities) == entity) for entity in dict.fromkeys(entities)]
    draw = np.random.default_rng(seed)
    whole = np.stack([measures(signals[name], wrong) for name in names])
    drawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([groups[place] for place in draw.integers(0, len(groups), len(groups))])
        drawn.append([measures(signals[name][chosen], wrong[chosen]) for name in names])
    draws, other = np.array(drawn), names.index(beside)
    found = {}
    for place, name in enumerate(names):
        values = [_interval(whole[place, number], draws[:, place, number]) for number in range(3)]
        against = _interval(whole[place, 0] - whole[other, 0], draws[:, place, 0] - draws[:, other, 0])
        found[name] = Told(values[0], values[1], values[2], against)
    return found


def _interval(value: float, draws: Float[np.ndarray, " draws"]) -> tuple[float, float, float]:
    known = draws[np.isfinite(draws)]
    if not np.isfinite(value) or not len(known):
        return (float("nan"),) * 3
    low, high = np.quantile(known, (0.025, 0.975))
    return float(value), float(low), float(high)
