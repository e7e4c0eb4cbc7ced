"""Cross-tuning: shares, variance components and exact permutation tests, on planted effects and without any."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import davies_bouldin_score

from probes.bias import all_permutations, clusters, components, count, drawn_permutations, shares, spread

ROWS = 12


def labels_of(seeds: int = 3, backbones: int = 2, sets: int = 2) -> dict[str, np.ndarray]:
    pairs = [(f"b{one}", f"d{other}") for one in range(backbones) for other in range(sets) for _ in range(seeds)]
    return {"pretraining": np.array([one for one, _ in pairs]), "instruction": np.array([other for _, other in pairs])}


def profiles_of(draw: np.random.Generator, labels: dict[str, np.ndarray], pretraining: float = 0.0, instruction: float = 0.0) -> np.ndarray:
    """Noise of one, and effects of these standard deviations between the levels of a label."""
    found = draw.standard_normal((len(labels["pretraining"]), ROWS))
    for label, size in (("pretraining", pretraining), ("instruction", instruction)):
        for level in np.unique(labels[label]):
            found[labels[label] == level] += size * draw.standard_normal(ROWS)
    return found


def test_shares_of_a_balanced_design_are_those_of_the_means_and_add_up() -> None:
    draw, labels = np.random.default_rng(0), labels_of()
    profiles = profiles_of(draw, labels, 1.0, 0.5)
    found = shares(profiles, labels)
    centred = profiles - profiles.mean(axis=0)
    total = (centred**2).sum()
    for label in labels:
        between = sum(
            (labels[label] == level).sum() * (centred[labels[label] == level].mean(axis=0) ** 2).sum() for level in np.unique(labels[label])
        )
        assert found[label] == pytest.approx(between / total)
    assert sum(found.values()) == pytest.approx(1.0)


def test_unbalanced_squares_of_one_label_do_not_change_with_the_other_s_effect() -> None:
    """That is type II. Twin: the between-groups squares, which ignore the other label, do change."""
    draw, labels = np.random.default_rng(1), labels_of()
    kept = np.array([True] * 3 + [False, True, True] + [True, False, False] + [True] * 3)
    labels = {label: values[kept] for label, values in labels.items()}
    profiles = profiles_of(draw, labels)
    moved = profiles + 3.0 * (labels["pretraining"] == "b0")[:, None]

    def squares(values: np.ndarray) -> float:
        return shares(values, labels)["instruction"] * float(((values - values.mean(axis=0)) ** 2).sum())

    def ignoring(values: np.ndarray) -> float:
        centred = values - values.mean(axis=0)
        return float(sum((centred[labels["instruction"] == level].mean(axis=0) ** 2).sum() for level in ("d0", "d1")))

    assert squares(moved) == pytest.approx(squares(profiles))
    assert ignoring(moved) != pytest.approx(ignoring(profiles))


def test_variance_components_are_found_on_average() -> None:
    draw, labels = np.random.default_rng(2), labels_of(seeds=3, backbones=4, sets=4)
    found = [components(profiles_of(draw, labels, 1.0, 0.5), labels) for _ in range(200)]
    means = {name: np.mean([one[name] for one in found if one is not None]) / ROWS for name in ("pretraining", "instruction", "interaction", "seed")}
    assert means == {
        "pretraining": pytest.approx(1.0, abs=0.08),
        "instruction": pytest.approx(0.25, abs=0.05),
        "interaction": pytest.approx(0.0, abs=0.03),
        "seed": pytest.approx(1.0, abs=0.03),
    }
    assert components(profiles_of(draw, labels_of(seeds=1), 1.0), labels_of(seeds=1)) is None  # no seed, no error
    labels = labels_of()
    assert components(profiles_of(draw, labels)[1:], {label: values[1:] for label, values in labels.items()}) is None


def test_all_permutations_within_strata_are_there_once() -> None:
    own, strata = np.array(list("aabbabb")), np.array(list("xxxxyyy"))
    found = {"".join(one) for one in all_permutations(own, strata)}
    wanted = {"".join(first) + "".join(second) for first in permutations("aabb") for second in permutations("abb")}
    assert found == wanted
    assert len(list(all_permutations(own, strata))) == len(wanted) == count(own, strata)
    assert count(labels_of()["pretraining"], labels_of()["instruction"]) == 400
    assert {"".join(one) for one in drawn_permutations(own, strata, 500)} == wanted


LEAST = 2 / 36  # the smallest p that two seeds allow: a division and its mirror image, of 36 permutations


def rejected(pretraining: float, trials: int) -> dict[str, Any]:
    draw, labels = np.random.default_rng(3), labels_of(seeds=2)
    found = [clusters(profiles_of(draw, labels, pretraining), labels) for _ in range(trials)]
    return {label: {index: np.mean([one.p[index][label] <= LEAST + 1e-9 for one in found]) for index in found[0].p} for label in labels}


def test_without_an_effect_few_are_found_and_a_planted_one_is() -> None:
    """A planted effect of the other label does not make this one's test err, as its strata are kept."""
    none, planted = rejected(0.0, 30), rejected(3.0, 15)
    assert all(share <= LEAST + 3 * np.sqrt(LEAST / 30) for of_label in none.values() for share in of_label.values())
    assert all(share >= 0.9 for share in planted["pretraining"].values())
    assert all(share <= LEAST + 3 * np.sqrt(LEAST / 15) for share in planted["instruction"].values())


def test_the_davies_bouldin_index_counts_on_its_lower_side() -> None:
    """Counted on the other side, a planted effect would have a p near one."""
    draw, labels = np.random.default_rng(4), labels_of()
    profiles = profiles_of(draw, labels, 2.0)
    found = clusters(profiles, labels)
    assert found.p["davies_bouldin"]["pretraining"] <= 0.01
    own = found.values["davies_bouldin"]["pretraining"]
    permuted = [davies_bouldin_score(profiles, one) for one in all_permutations(labels["pretraining"], labels["instruction"])]
    assert np.mean([value >= own - 1e-9 for value in permuted]) > 0.98


def test_means_and_deviations_are_over_seeds() -> None:
    labels = labels_of(seeds=2)
    profiles = np.arange(8.0)[:, None] ** 2 * np.ones((1, 2))
    names, means, stds = spread(profiles, labels)
    assert names == ["b0-d0", "b0-d1", "b1-d0", "b1-d1"]
    assert means[1].tolist() == [6.5, 6.5]
    assert stds[1] == pytest.approx([np.sqrt(12.5)] * 2)
    assert np.isnan(spread(profiles[::2], {label: values[::2] for label, values in labels.items()})[2]).all()
