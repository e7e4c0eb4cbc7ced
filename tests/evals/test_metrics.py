from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from evals.statistics.power import minimum_detectable_effect
from evals.statistics.scores import brier, expected_calibration_error, pass_at_k
from evals.statistics.significance import holm, mcnemar


def discordant(gained: int, lost: int) -> tuple[np.ndarray, np.ndarray]:
    """Two arms on 30 items, ten of which both have right."""
    first, second = np.zeros(30, bool), np.zeros(30, bool)
    first[: 10 + gained] = True
    second[:10] = True
    second[30 - lost :] = lost > 0
    return first, second


def test_mcnemar_is_the_binomial_test_of_the_discordant_items() -> None:
    counts = [(gained, lost) for gained in range(8) for lost in range(8)]
    first, second = (np.stack(arm) for arm in zip(*[discordant(*count) for count in counts], strict=True))
    expected = [binomtest(gained, gained + lost).pvalue if gained + lost else 1.0 for gained, lost in counts]
    np.testing.assert_allclose(mcnemar(first, second), expected)
    np.testing.assert_array_equal(mcnemar(first, second), mcnemar(second, first))


def test_mcnemar_is_that_of_every_way_to_swap_arms() -> None:
    first, second = discordant(6, 1)
    signs = [abs(sum(signs)) for signs in product((1, -1), repeat=7)]
    assert mcnemar(first, second) == pytest.approx(np.mean([value >= 5 for value in signs]))


def test_mcnemar_does_not_count_items_that_both_have_right() -> None:
    """Unlike a test that takes the arms as independent: there, more items on which both agree change the evidence."""
    first, second = discordant(6, 1)
    agreed = np.ones(500, bool)
    assert mcnemar(np.append(first, agreed), np.append(second, agreed)) == mcnemar(first, second)
    assert mcnemar(first, second) != pytest.approx(binomtest(int(first.sum()), int(first.sum() + second.sum())).pvalue, abs=0.01)


def found(items: int, share: float, effect: float, exact: bool = False) -> float:
    """How often McNemar's test at .05 finds the effect, in 20,000 simulated studies (standard error .003)."""
    generator = np.random.default_rng(0)
    gained, lost, _ = generator.multinomial(items, [(share + effect) / 2, (share - effect) / 2, 1 - share], size=20_000).T
    if exact:
        tests = np.unique(np.stack([gained, lost]), axis=1, return_inverse=True)
        values = np.array([binomtest(int(a), int(a + b)).pvalue if a + b else 1.0 for a, b in tests[0].T])
        return float((values[tests[1].ravel()] <= 0.05).mean())
    with np.errstate(invalid="ignore"):
        return float((np.abs(gained - lost) / np.sqrt(gained + lost) >= norm.ppf(0.975)).mean())


@pytest.mark.parametrize(("items", "share"), [(100, 0.4), (200, 0.2), (200, 0.1), (500, 0.1), (1500, 0.1), (1500, 0.5)])
def test_minimum_detectable_effect_is_found_in_four_of_five_studies(items: int, share: float) -> None:
    effect = float(minimum_detectable_effect(items, share))
    a, b = norm.ppf(0.975), norm.ppf(0.8)
    assert items == pytest.approx((a * share**0.5 + b * (share - effect**2) ** 0.5) ** 2 / effect**2)
    assert found(items, share, effect) == pytest.approx(0.8, abs=0.04)  # counts are no normal law
    assert 0.75 < found(items, share, effect, exact=True) < 0.81
    assert found(items, share, effect / 2) < 0.4


def test_minimum_detectable_effect_is_none_where_too_few_items_differ() -> None:
    effects = minimum_detectable_effect(np.array([2, 20, 2000]), np.array([0.5, 0.1, 0.1]))
    assert np.isnan(effects).tolist() == [True, True, False]
    assert minimum_detectable_effect(200, 0.2, power=0.9) > minimum_detectable_effect(200, 0.2)
    assert minimum_detectable_effect(200, 0.2, level=0.01) > minimum_detectable_effect(200, 0.2)


def closed(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted values by closed testing: the largest Bonferroni p value of all sets that a test belongs to."""
    tests = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in combinations(tests, size)]
    return np.array([max(min(1.0, len(chosen) * min(p_values[list(chosen)])) for chosen in sets if test in chosen) for test in tests])


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    families = np.random.default_rng(0).beta(0.3, 2, (200, 6))
    families[:20, 1] = families[:20, 4]  # ties
    np.testing.assert_allclose(holm(families), [closed(family) for family in families])
    assert holm(np.array([0.03])).tolist() == [0.03]


def test_holm_keeps_false_rejections_at_their_level_and_bare_p_values_do_not() -> None:
    families = np.random.default_rng(1).uniform(size=(4000, 10))
    assert (holm(families).min(axis=1) <= 0.05).mean() == pytest.approx(0.05, abs=0.012)  # 3.5 standard errors
    assert (families.min(axis=1) <= 0.05).mean() > 0.35
    some = np.random.default_rng(0).beta(0.3, 2, (200, 6))
    bonferroni = np.minimum(1, 6 * some)
    assert (holm(some) <= bonferroni + 1e-12).all()
    assert (holm(some) < bonferroni - 1e-3).any()


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer() -> None:
    for n, k in ((1, 1), (5, 2), (6, 6), (7, 3)):
        for c in range(n + 1):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert float(pass_at_k(n, c, k)) == pytest.approx(np.mean([any(draw) for draw in draws]), abs=1e-12)


def test_pass_at_k_of_many_answers_and_of_too_few() -> None:
    right = np.array([0, 1, 150, 900, 1000])
    np.testing.assert_allclose(pass_at_k(1000, right, 200), [1 - comb(1000 - int(c), 200) / comb(1000, 200) for c in right], atol=1e-9)
    assert np.isnan(pass_at_k(np.array([5, 20]), np.array([1, 1]), 10)).tolist() == [True, False]


def test_pass_at_k_is_unbiased_and_the_plain_power_is_not() -> None:
    n, k, p = 10, 5, 0.2
    counts = np.arange(n + 1)
    law = np.array([comb(n, int(c)) * p**c * (1 - p) ** (n - c) for c in counts])
    assert law @ pass_at_k(n, counts, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert law @ (1 - (1 - counts / n) ** k) < 1 - (1 - p) ** k - 0.05


def calibration_by_hand(confidence: np.ndarray, right: np.ndarray, bins: int) -> float:
    total = 0.0
    for number in range(bins):
        inside = [i for i, value in enumerate(confidence) if number / bins < value <= (number + 1) / bins or (number == 0 == value)]
        if inside:
            total += len(inside) / len(confidence) * abs(np.mean(confidence[inside]) - np.mean(right[inside]))
    return total


@pytest.mark.parametrize("bins", [1, 4, 10, 16])
def test_expected_calibration_error_by_hand(bins: int) -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=(3, 200))
    confidence[:, :4] = [0, 0.25, 0.5, 1]
    right = generator.uniform(size=(3, 200)) < confidence**2
    expected = [calibration_by_hand(*arm, bins) for arm in zip(confidence, right, strict=True)]
    np.testing.assert_allclose(expected_calibration_error(confidence, right, bins), expected)


def test_expected_calibration_error_falls_with_items_only_where_confidence_is_right() -> None:
    confidence = np.random.default_rng(0).uniform(size=(2, 50_000))
    right = np.random.default_rng(1).uniform(size=(2, 50_000)) < np.stack([confidence[0], confidence[1] ** 2])
    honest, boastful = expected_calibration_error(confidence, right)
    assert honest < 0.02
    assert boastful == pytest.approx(1 / 6, abs=0.01)  # the mean of x - x²


def test_a_bin_that_is_too_wide_hides_what_is_wrong() -> None:
    confidence, right = np.array([0.1, 0.9]), np.array([True, False])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.9)
    assert expected_calibration_error(confidence, right, bins=1) == pytest.approx(0.0)


def test_brier_is_the_mean_square_and_least_at_the_truth() -> None:
    generator = np.random.default_rng(0)
    probability, right = generator.uniform(size=(4, 30)), generator.uniform(size=(4, 30)) < 0.3
    by_hand = [sum((p - float(r)) ** 2 for p, r in zip(*arm, strict=True)) / 30 for arm in zip(probability, right, strict=True)]
    np.testing.assert_allclose(brier(probability, right), by_hand)
    said = np.linspace(0, 1, 101)
    expected = [0.3 * float(brier(np.array([p]), np.array([True]))) + 0.7 * float(brier(np.array([p]), np.array([False]))) for p in said]
    assert said[int(np.argmin(expected))] == pytest.approx(0.3)
    assert brier(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert brier(np.array([0.0, 1.0]), np.array([True, False])) == 1
