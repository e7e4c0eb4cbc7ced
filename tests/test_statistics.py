import numpy as np
import pytest

from evals.statistics import bootstrap_means, gap_closed, interval


def draws(seeds: int, units: int, shift: tuple[float, ...], seed: int = 0) -> list[np.ndarray]:
    """Series that share their units' luck, so that their differences are far less noisy than themselves."""
    generator = np.random.default_rng(seed)
    return [generator.normal(0, 1, (1, units)) + generator.normal(0, 0.1, (len(shift), units)) + np.array(shift)[:, None] for _ in range(seeds)]


def test_interval_of_one_seed_is_that_of_the_normal_law() -> None:
    estimate = bootstrap_means(draws(1, 400, (0.0,)))
    value = interval(estimate.value[0], estimate.draws[0])
    assert value.high - value.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert value.low < value.value < value.high


def test_differences_are_paired() -> None:
    estimate = bootstrap_means(draws(3, 100, (0.0, 0.1)))
    paired = interval(estimate.value[1] - estimate.value[0], estimate.draws[1] - estimate.draws[0])
    broken = interval(estimate.value[1] - estimate.value[0], estimate.draws[1] - np.random.default_rng(0).permutation(estimate.draws[0]))
    assert paired.excludes_zero()
    assert not broken.excludes_zero()


def test_seeds_that_differ_widen_the_interval() -> None:
    together = [np.zeros((1, 50)) + generator for generator in (0.0, 1.0, 5.0)]
    estimate = bootstrap_means(together)
    value = interval(estimate.value[0], estimate.draws[0])
    assert (value.value, value.low, value.high) == (2.0, 0.0, 5.0)


def test_seeds_are_drawn_alike_in_every_stream() -> None:
    seeds = [np.zeros((1, 50)) + shift for shift in (0.0, 1.0, 5.0)]
    contrast = bootstrap_means(seeds, 0).draws[0] - bootstrap_means(seeds, 1).draws[0]
    assert np.abs(contrast).max() < 1e-12


def test_units_are_drawn_apart_in_different_streams() -> None:
    seeds = draws(1, 50, (0.0,))
    assert not np.array_equal(bootstrap_means(seeds, 0).draws, bootstrap_means(seeds, 1).draws)
    assert np.array_equal(bootstrap_means(seeds, 0).draws, bootstrap_means(seeds, 0).draws)


def test_coverage_is_near_its_level() -> None:
    covered = 0
    for study in range(200):
        estimate = bootstrap_means(draws(1, 60, (0.0,), seed=study))
        value = interval(estimate.value[0], estimate.draws[0])
        covered += value.low <= 0 <= value.high
    assert 180 <= covered <= 199


def test_gap_closed() -> None:
    estimate = bootstrap_means(draws(3, 200, (0.0, 0.9, 1.2, 1.0)))
    half, beyond = gap_closed(estimate, 1, 0, 3), gap_closed(estimate, 2, 0, 3)
    assert half is not None
    assert half.value == pytest.approx(0.9, abs=0.02)
    assert half.low < half.value < half.high < 1
    assert beyond is not None
    assert beyond.low > 1


def test_a_gap_within_noise_is_not_available() -> None:
    estimate = bootstrap_means(draws(3, 50, (0.0, 0.5, 0.001)))
    assert gap_closed(estimate, 1, 0, 2) is None
    assert gap_closed(estimate, 1, 0, 1) is not None


def test_one_unit_gives_a_point() -> None:
    estimate = bootstrap_means([np.array([[0.5]])])
    assert interval(estimate.value[0], estimate.draws[0]) == (0.5, 0.5, 0.5)
