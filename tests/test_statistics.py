from functools import cache

import numpy as np
import pytest
from scipy.stats import beta, binom, t

from evals.statistics import Interval, bootstrap_means, gap_closed, interval


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
    broken = interval(estimate.value[1] - estimate.value[0], estimate.draws[1] - np.random.default_rng(0).permutation(estimate.draws[0], axis=-1))
    assert paired.excludes_zero()
    assert not broken.excludes_zero()


def test_interval_of_several_seeds_is_that_of_the_t_law() -> None:
    for means in ((0.0, 1.0, 5.0), (0.3, 0.1), (2.0, -1.0, 0.5, 0.0, 0.1)):
        estimate = bootstrap_means([np.array([[mean - 0.01, mean + 0.01]]) for mean in means])
        value = interval(estimate.value[0], estimate.draws[0])
        half = t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5
        assert value.value == pytest.approx(np.mean(means))
        assert value.low == pytest.approx(value.value - half, rel=0.05)
        assert value.high == pytest.approx(value.value + half, rel=0.05)


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


def right(units: int, *counts: int) -> np.ndarray:
    """Series of 0/1 units with so many right, at the beginning."""
    return (np.arange(units) < np.array(counts)[:, None]).astype(float)


def less(seeds: list[np.ndarray], shares: bool = True) -> Interval:
    """The first series less the second."""
    estimate = bootstrap_means(seeds, shares=shares)
    return interval(estimate.value[0] - estimate.value[1], estimate.draws[0] - estimate.draws[1])


def test_a_share_is_drawn_from_its_beta_law() -> None:
    estimate = bootstrap_means([right(20, 0, 7, 20)], shares=True)
    assert estimate.value.tolist() == pytest.approx([0, 0.35, 1])
    for series, count in enumerate((0, 7, 20)):
        drawn = np.quantile(estimate.draws[series], [0.025, 0.5, 0.975])
        np.testing.assert_allclose(drawn, beta.ppf([0.025, 0.5, 0.975], count + 1, 21 - count), atol=0.015)


def test_pseudo_units_of_two_arms_are_half_a_unit_in_each_cell() -> None:
    """The mean and spread of a difference are those of the Dirichlet law, whichever two of many arms are compared."""
    first = right(20, *[12] * 9)
    first[4] = np.roll(first[4], 3)
    draws = bootstrap_means([first], shares=True).draws
    for one, other, discordant in ((0, 1, (0.5, 0.5)), (2, 8, (0.5, 0.5)), (4, 6, (3.5, 3.5)), (0, 4, (3.5, 3.5))):
        gained, lost = np.array(discordant) / 22
        spread = ((gained + lost - (gained - lost) ** 2) / 23) ** 0.5
        assert np.std(draws[one] - draws[other]) == pytest.approx(spread, rel=0.1)
        assert np.mean(draws[one] - draws[other]) == pytest.approx(0, abs=0.01)


def test_an_arm_less_itself_is_zero_and_less_its_like_is_nearly() -> None:
    estimate = bootstrap_means([right(50, 40, 40)], shares=True)
    assert interval(0.0, estimate.draws[0] - estimate.draws[0]) == (0, 0, 0)
    for units in (20, 200):
        value = less([right(units, units // 2, units // 2)])
        assert value.value == 0
        assert 1.5 / units < value.high < 2.5 / units
        assert -2.5 / units < value.low < -1.5 / units


def test_values_that_are_no_shares_are_drawn_from_their_own_units_only() -> None:
    units = draws(1, 30, (5.0,))
    assert bootstrap_means(units).draws.min() > 4
    assert less([right(20, 20, 20)], shares=False) == (0, 0, 0)


def test_several_answers_of_a_unit_count_as_what_they_tell() -> None:
    """Twenty units of fifty answers alike in nothing are nearly a thousand answers; of fifty alike, twenty."""
    generator = np.random.default_rng(0)
    apart = generator.binomial(50, 0.9, (1, 20)) / 50
    alike = right(20, 18)
    widths = []
    for units in (apart, alike, right(1000, 900)):
        value = interval(float(units.mean()), bootstrap_means([units], shares=True).draws[0])
        widths.append(value.high - value.low)
    assert widths[0] < 1.5 * widths[2] < widths[1] / 4


def test_shares_all_right_in_every_seed_have_an_interval() -> None:
    estimate = bootstrap_means([right(20, 20)] * 3, shares=True)
    assert interval(1.0, estimate.draws[0]).low == pytest.approx(beta.ppf(0.025, 61, 1), abs=0.01)
    assert interval(1.0, bootstrap_means([right(20, 20)] * 3).draws[0]) == (1, 1, 1)


def test_interval_holds_its_value_and_keeps_its_bounds() -> None:
    spread = np.linspace(0.5, 1.5, 1001)
    assert interval(0.2, spread).low == 0.2
    assert interval(1.6, spread).high == 1.6
    assert interval(0.9, spread, bounds=(0.0, 1.0)) == pytest.approx((0.9, 0.525, 1.0))


def coverage(units: int, share: float, shares: bool = True) -> float:
    """The chance that the interval of a share of 0/1 units holds it: of every count, so without error of a simulation."""
    total = 0.0
    for count in range(units + 1):
        chance = binom.pmf(count, units, share)
        if chance > 1e-5:
            estimate = bootstrap_means([right(units, count)], shares=shares)
            value = interval(estimate.value[0], estimate.draws[0])
            total += chance * (value.low <= share <= value.high)
    return total


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("units", [20, 50, 200])
def test_intervals_of_shares_cover_them(units: int, share: float) -> None:
    # At 50 units and .02 counts allow 92.2 or 98.2 %, nothing between. 0.972 is a draw's luck at one count.
    assert (0.92 if units == 50 and share in (0.02, 0.98) else 0.93) <= coverage(units, share) <= 0.973


def test_without_pseudo_units_intervals_of_shares_near_one_do_not_cover_them() -> None:
    assert coverage(20, 0.98, shares=False) < 0.4
    assert coverage(50, 0.98, shares=False) < 0.7
    assert coverage(200, 0.5, shares=False) > 0.93


STUDIES = 2000


def within(covered: int, low: float = 0.93, high: float = 0.97) -> bool:
    """Whether a coverage between low and high can have given this count, up to 2.5 standard errors of the simulation."""
    return low - 0.013 <= covered / STUDIES <= high + 0.013


@pytest.mark.slow
@pytest.mark.parametrize("units", [20, 50, 200])
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((0.25, 0.25, 0.25), 0.93, 0.97),
        ((0.4, 0.1, 0.1), 0.93, 0.97),
        ((0.5, 0.3, 0.1), 0.93, 0.97),
        ((0.9604, 0.0196, 0.0196), 0.93, 1),  # few units differ: what counts allow is above 95 %
        ((0.96, 0.02, 0.0), 0.93, 1),
        ((0.7, 0.0, 0.0), 1, 1),
        ((0.05, 0.8, 0.0), 0.91, 0.97),  # 91.3 % of 20 units
    ],
)
def test_differences_of_shares_are_covered(units: int, table: tuple[float, float, float], low: float, high: float) -> None:
    """`table`: the shares of units that both arms have right, the first only, the second only."""

    @cache
    def of(both: int, first: int, second: int, neither: int) -> Interval:
        answers = np.repeat([[1, 1, 0, 0], [1, 0, 1, 0]], [both, first, second, neither], axis=1)
        return less([answers.astype(float)])

    studies = np.random.default_rng(0).multinomial(units, [*table, max(0, 1 - sum(table))], STUDIES).tolist()
    truth = table[1] - table[2]
    assert within(sum(value.low <= truth <= value.high for value in (of(*study) for study in studies)), low, high)


@pytest.mark.slow
@pytest.mark.parametrize(("units", "alike"), [(20, 0.0), (20, 0.3), (50, 0.3)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_shares_of_units_of_five_answers_are_covered(units: int, alike: float, share: float) -> None:
    """`alike`: the correlation of the answers within a unit."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(STUDIES):
        chance = generator.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, units) if alike else share
        estimate = bootstrap_means([generator.binomial(5, chance, (1, units)) / 5], shares=True)
        value = interval(estimate.value[0], estimate.draws[0])
        covered += value.low <= share <= value.high
    assert within(covered)


def seeds_that_cover(between: float, draw_seeds: bool, studies: int = STUDIES) -> int:
    """Studies of three seeds of 200 units whose shares differ by an sd of `between`; or of their units alone, seeds put together."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(studies):
        shares = 0.5 + between * generator.normal(size=3)
        seeds = [(generator.random((1, 200)) < share).astype(float) for share in shares]
        estimate = bootstrap_means(seeds if draw_seeds else [np.concatenate(seeds, axis=1)], shares=True)
        value = interval(estimate.value[0], estimate.draws[0])
        covered += value.low <= 0.5 <= value.high
    return covered


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.035, 0.14])
def test_means_over_seeds_are_covered_however_much_seeds_differ(between: float) -> None:
    assert within(seeds_that_cover(between, draw_seeds=True))


@pytest.mark.slow
def test_units_alone_do_not_cover_what_differs_between_seeds() -> None:
    assert seeds_that_cover(0.14, draw_seeds=False, studies=200) < 0.5 * 200
