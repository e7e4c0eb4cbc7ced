"""Density as separation of two groups: against the slow definitions, under nulls, and with planted effects."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from probes.separation import HeldOut, Pairs, alike, auroc, extremes, halves, held_out, in_halves, pairs_of, permuted, shuffled, wins

CONTRAST = np.repeat([1, -1, 0], [30, 40, 10])
STRATA = np.arange(80) % 3


def drawn(generator: np.random.Generator, entities: int = 160, layers: int = 12, effect: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers that correlate .9 with their neighbours, two groups of equal size in two strata, and an effect that is largest in the middle layer."""
    contrast, strata = np.repeat([1, -1], entities // 2), np.arange(entities) % 2
    values = generator.normal(size=(entities, layers))
    for layer in range(1, layers):
        values[:, layer] = 0.9 * values[:, layer - 1] + np.sqrt(1 - 0.9**2) * values[:, layer]
    shape = np.exp(-(((np.arange(layers) - layers // 2) / 3) ** 2))
    return contrast, strata, values + effect * (contrast > 0)[:, None] * shape


def held(won: np.ndarray, pairs: Pairs, contrast: np.ndarray, strata: np.ndarray, scored: tuple[np.ndarray, Pairs] | None = None) -> HeldOut:
    split = halves(contrast, strata)
    return held_out(in_halves(won, pairs, split), in_halves(*(scored or (won, pairs)), split))


@pytest.mark.parametrize("ties", [False, True])
def test_the_auroc_is_that_of_all_pairs_within_strata(ties: bool) -> None:
    values = np.random.default_rng(0).normal(size=(80, 3))
    values = values.round() if ties else values
    pairs = pairs_of(CONTRAST, STRATA)
    found = np.nanmean(auroc(wins(values, pairs), pairs), axis=0)
    for column, value in zip(values.T, found, strict=True):
        scores, counts = [], []
        for stratum in range(3):
            inside = (stratum == STRATA) & (CONTRAST != 0)
            scores.append(roc_auc_score(CONTRAST[inside] > 0, column[inside]))
            counts.append((CONTRAST[inside] > 0).sum() * (CONTRAST[inside] < 0).sum())
        assert value == pytest.approx(np.average(scores, weights=counts))
    assert np.isnan(auroc(wins(values, pairs), pairs)[CONTRAST == 0]).all()


def test_the_sign_is_kept_and_changes_with_the_values() -> None:
    values = np.where(CONTRAST > 0, 1.0, 0.0)[:, None] + np.random.default_rng(1).normal(size=(80, 2))
    pairs = pairs_of(CONTRAST, STRATA)
    one, other = (np.nanmean(auroc(wins(sign * values, pairs), pairs), axis=0) for sign in (1, -1))
    assert (one > 0.6).all()
    assert one + other == pytest.approx([1, 1])


def test_the_contributions_spread_is_the_sampling_error() -> None:
    generator, found, errors = np.random.default_rng(2), [], []
    for _ in range(300):
        contrast, strata, values = drawn(generator, layers=1, effect=0.8)
        pairs = pairs_of(contrast, strata)
        contributions = auroc(wins(values, pairs), pairs)[:, 0]
        found.append(contributions.mean())
        errors.append(contributions.std(ddof=1) / np.sqrt(len(contributions)))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def test_halves_share_every_group_of_every_stratum() -> None:
    for half in halves(CONTRAST, STRATA):
        for group in (1, -1):
            for stratum in range(3):
                inside = (group == CONTRAST) & (stratum == STRATA)
                assert abs(half[inside].sum() - inside.sum() / 2) <= 1


def test_the_null_is_that_of_labels_shuffled_one_by_one() -> None:
    values = np.random.default_rng(3).normal(size=(80, 4)).round(1)
    permutations = shuffled(CONTRAST, STRATA)
    found = extremes(permuted(values, CONTRAST, STRATA, permutations))
    for permutation in (0, 17, 999):
        contrast = np.where(CONTRAST == 0, 0, np.where(permutations[permutation], 1, -1))
        for stratum in range(3):
            assert (contrast[stratum == STRATA] > 0).sum() == (CONTRAST[stratum == STRATA] > 0).sum()
        pairs = pairs_of(contrast, STRATA)
        of_layers = np.nanmean(auroc(wins(values, pairs), pairs), axis=0)
        assert found[permutation] == pytest.approx(of_layers[np.abs(of_layers - 0.5).argmax()])


def test_one_layer_without_choice_has_the_textbook_null() -> None:
    contrast, strata, values = drawn(np.random.default_rng(4), layers=1)
    flat = np.zeros_like(strata)
    null = extremes(permuted(values, contrast, flat, shuffled(contrast, flat)))
    test = mannwhitneyu(values[:80, 0], values[80:, 0])
    share = np.mean(np.abs(null - 0.5) >= abs(test.statistic / 6400 - 0.5))
    assert share == pytest.approx(test.pvalue, abs=0.04)


def shares(effect: float, draws: int = 40) -> tuple[float, float, float]:
    """How often the held-out layer, and the best one, are outside the null; and the held-out layer's mean."""
    generator, found = np.random.default_rng(5), []
    for _ in range(draws):
        contrast, strata, values = drawn(generator, effect=effect)
        pairs = pairs_of(contrast, strata)
        won = wins(values, pairs)
        of_held = held(won, pairs, contrast, strata).value
        best = max(won.mean(axis=0), key=lambda value: abs(value - 0.5))
        low, high = np.quantile(extremes(permuted(values, contrast, strata, shuffled(contrast, strata))), [0.025, 0.975])
        found.append((not low <= of_held <= high, not low <= best <= high, of_held))
    return tuple(np.mean(found, axis=0))  # type: ignore[return-value]


def test_nothing_is_found_where_nothing_is_and_a_planted_effect_is() -> None:
    held, best, mean = shares(0.0)
    assert held <= 0.05
    assert best <= 0.15
    assert mean == pytest.approx(0.5, abs=0.015)
    assert shares(0.9, draws=10)[0] == 1


LINKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda s: s,
    "saturating": lambda s: np.tanh(2 * s - 1),
    "step": lambda s: 2.0 * (s > 0.8),
}


@pytest.mark.parametrize("link", LINKS)
def test_what_goes_with_surprisal_alone_is_not_left_given_surprisal_and_a_planted_effect_is(link: str) -> None:
    found = {0.0: [], 0.8: []}
    plain = []
    for seed in range(30):
        generator = np.random.default_rng(seed)
        for effect, values_of in found.items():
            contrast, strata, values = drawn(generator, effect=effect)
            surprisal = generator.normal(size=len(contrast)) + 1.7 * (contrast > 0)
            values = values + LINKS[link](surprisal)[:, None]
            pairs = pairs_of(contrast, strata)
            others = pairs_of(contrast, alike(contrast, strata, np.column_stack([surprisal, generator.normal(size=len(contrast))])))
            won = wins(values, pairs)
            values_of.append(held(won, pairs, contrast, strata, (wins(values, others), others)).value)
            if effect == 0:
                plain.append(held(won, pairs, contrast, strata).value)
    assert np.mean(plain) > 0.7  # the negative twin: without surprisal taken out it looks like an effect
    assert np.mean(found[0.0]) == pytest.approx(0.51, abs=0.03)
    assert np.mean(found[0.8]) == pytest.approx(0.70, abs=0.03)


def test_groups_that_a_covariate_wholly_separates_cannot_be_compared() -> None:
    contrast, strata, values = drawn(np.random.default_rng(6))
    pairs = pairs_of(contrast, alike(contrast, strata, contrast[:, None] + 0.01 * values[:, :1]))
    others = pairs_of(contrast, strata)
    assert len(pairs.first) == 0
    assert np.isnan(held(wins(values, others), others, contrast, strata, (wins(values, pairs), pairs)).value)
