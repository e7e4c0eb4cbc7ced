from itertools import combinations
from math import comb

import numpy as np
import pytest

from evals.statistics.scores import brier, expected_calibration_error, pass_at_k


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
