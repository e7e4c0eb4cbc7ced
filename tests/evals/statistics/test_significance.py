from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import binomtest

from evals.statistics.significance import mcnemar
from probes.significance import holm


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
