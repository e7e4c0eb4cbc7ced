"""Whether models' bias profiles go with what they were pretrained on or with what they were tuned on (cross-tuning).

Itzhak, Belinkov and Stanovsky 2025 (arXiv 2507.07186) tune every backbone on every instruction set with several seeds, and ask by which label the
models cluster. A profile is a model's vector of bias scores. Here each label is tested with the other held fixed: labels are permuted among the
models of one stratum of the other label only, in all ways or, where there are too many, in drawn ones. A silhouette and a Calinski-Harabasz index are
better if higher, a Davies-Bouldin index if lower; the released code of the paper counts all three as better if higher.

Shares are sums of squares of a two-way analysis of variance with the seed as error, summed over the rows of the matrix (type II, where designs are
not balanced), over the total. Not covered: what corpus and initialisation do each, which needs several backbones of one corpus.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import factorial, prod
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

Profiles = Float[np.ndarray, "models rows"]
Labels = Shaped[np.ndarray, " models"]
Label = Literal["pretraining", "instruction"]
LABELS: tuple[Label, Label] = ("pretraining", "instruction")
INDICES: Mapping[str, tuple[Callable[[np.ndarray, np.ndarray], float], bool]] = {  # and whether higher is better
    "silhouette": (silhouette_score, True),
    "calinski_harabasz": (calinski_harabasz_score, True),
    "davies_bouldin": (davies_bouldin_score, False),
}
MOST = 5000  # permutations
CLOSE = 1e-9  # indices that differ by rounding only are equal


@dataclass(frozen=True)
class Clustering:
    """By index and label: its value, and the share of permutations that are as good or better; by label: how many `permutations`, and whether these
    are all."""

    values: dict[str, dict[str, float]]
    p: dict[str, dict[str, float]]
    permutations: dict[str, int]
    exact: dict[str, bool]


def clusters(profiles: Profiles, labels: Mapping[str, Labels], progress: Callable[[int], None] = lambda done: None) -> Clustering:
    """Of both labels. `progress` counts permutations."""
    values: dict[str, dict[str, float]] = {index: {} for index in INDICES}
    p: dict[str, dict[str, float]] = {index: {} for index in INDICES}
    permutations: dict[str, int] = {}
    exact: dict[str, bool] = {}
    for label, other in zip(LABELS, reversed(LABELS), strict=True):
        own, strata = labels[label], labels[other]
        exact[label] = count(own, strata) <= MOST
        as_good, done = dict.fromkeys(INDICES, 0), 0
        for index, (score, _) in INDICES.items():
            values[index][label] = float(score(profiles, own))
        for permuted in all_permutations(own, strata) if exact[label] else drawn_permutations(own, strata, MOST):
            for index, (score, higher) in INDICES.items():
                value, true = float(score(profiles, permuted)), values[index][label]
                as_good[index] += value >= true - CLOSE * abs(true) if higher else value <= true + CLOSE * abs(true)
            done += 1
            progress(1)
        permutations[label] = done
        for index in INDICES:  # all permutations have the true one among them; drawn ones are counted with it
            p[index][label] = as_good[index] / done if exact[label] else (1 + as_good[index]) / (1 + done)
    return Clustering(values, p, permutations, exact)


def count(labels: Labels, strata: Labels) -> int:
    """How many ways there are to permute the labels within the strata."""
    ways = 1
    for stratum in np.unique(strata):
        _, counts = np.unique(labels[strata == stratum], return_counts=True)
        ways *= factorial(int(counts.sum())) // prod(factorial(int(each)) for each in counts)
    return ways


def all_permutations(labels: Labels, strata: Labels) -> Iterator[Labels]:
    places = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    for arranged in product(*(list(_arrangements(labels[place])) for place in places)):
        permuted = labels.copy()
        for place, one in zip(places, arranged, strict=True):
            permuted[place] = one
        yield permuted


def drawn_permutations(labels: Labels, strata: Labels, number: int) -> Iterator[Labels]:
    draw = np.random.default_rng(0)
    places = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    for _ in range(number):
        permuted = labels.copy()
        for place in places:
            permuted[place] = draw.permutation(labels[place])
        yield permuted


def _arrangements(labels: Labels) -> Iterator[Labels]:
    """All different orders of labels, some of which are equal."""
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) <= 1:
        yield labels
        return
    for chosen in combinations(range(len(labels)), int(counts[0])):
        first = np.isin(np.arange(len(labels)), chosen)
        for rest in _arrangements(labels[labels != classes[0]]):
            found = labels.copy()
            found[first], found[~first] = classes[0], rest
            yield found


def shares(profiles: Profiles, labels: Mapping[str, Labels]) -> dict[str, float]:
    """Of the total sum of squares: pretraining, instruction, interaction (both together, beyond each), seed (models of both in common)."""
    squares, _ = _squares(profiles, labels)
    total = float(((profiles - profiles.mean(axis=0)) ** 2).sum())
    return {name: value / total for name, value in squares.items()} if total else dict.fromkeys(squares, float("nan"))


def components(profiles: Profiles, labels: Mapping[str, Labels]) -> dict[str, float] | None:
    """Variance components, summed over the rows, from the mean squares of a balanced design with random effects; they may be below zero. None where
    the design is not balanced, or where there is one seed."""
    cells, counts = np.unique(np.stack([labels[label].astype(str) for label in LABELS]), axis=1, return_counts=True)
    levels = {label: len(np.unique(labels[label])) for label in LABELS}
    seeds = int(counts[0])
    if cells.shape[1] != levels["pretraining"] * levels["instruction"] or (counts != seeds).any() or seeds < 2:
        return None
    squares, degrees = _squares(profiles, labels)
    mean = {name: squares[name] / degrees[name] for name in squares}
    return {
        "pretraining": (mean["pretraining"] - mean["interaction"]) / (seeds * levels["instruction"]),
        "instruction": (mean["instruction"] - mean["interaction"]) / (seeds * levels["pretraining"]),
        "interaction": (mean["interaction"] - mean["seed"]) / seeds,
        "seed": mean["seed"],
    }


def _squares(profiles: Profiles, labels: Mapping[str, Labels]) -> tuple[dict[str, float], dict[str, int]]:
    """Sums of squares and degrees of freedom of the sources, type II: each label beyond the other, their interaction beyond both."""
    one, other = (_indicators(labels[label]) for label in LABELS)
    both = np.hstack([one, other])
    cells = _indicators(np.array([f"{first}\0{second}" for first, second in zip(*(labels[label] for label in LABELS), strict=True)]))
    left = {name: _left(profiles, design) for name, design in {"one": one, "other": other, "both": both, "cells": cells}.items()}
    ranks = {name: int(np.linalg.matrix_rank(design)) for name, design in {"one": one, "other": other, "both": both, "cells": cells}.items()}
    squares = {
        "pretraining": left["other"] - left["both"],
        "instruction": left["one"] - left["both"],
        "interaction": left["both"] - left["cells"],
        "seed": left["cells"],
    }
    degrees = {
        "pretraining": ranks["both"] - ranks["other"],
        "instruction": ranks["both"] - ranks["one"],
        "interaction": ranks["cells"] - ranks["both"],
        "seed": len(profiles) - ranks["cells"],
    }
    return squares, degrees


def _indicators(labels: Labels) -> Float[np.ndarray, "models levels"]:
    return (labels[:, None] == np.unique(labels)[None]).astype(float)


def _left(profiles: Profiles, design: Float[np.ndarray, "models columns"]) -> float:
    """The sum of squares that the design leaves, over all rows."""
    return float(((profiles - design @ np.linalg.lstsq(design, profiles, rcond=None)[0]) ** 2).sum())


def spread(profiles: Profiles, labels: Mapping[str, Labels]) -> tuple[list[str], Float[np.ndarray, "cells rows"], Float[np.ndarray, "cells rows"]]:
    """Names (PRETRAINING-INSTRUCTION), means and standard deviations over seeds (n - 1; NaN for one seed) of the models that have both in common."""
    names = np.array(["-".join(pair) for pair in zip(*(labels[label] for label in LABELS), strict=True)])
    found: Sequence[str] = list(dict.fromkeys(names.tolist()))
    groups = [profiles[names == name] for name in found]
    stds = [group.std(axis=0, ddof=1) if len(group) > 1 else np.full(profiles.shape[1], np.nan) for group in groups]
    return list(found), np.stack([group.mean(axis=0) for group in groups]), np.stack(stds)
