from functools import cache
from itertools import product

import numpy as np
import pytest
from scipy.stats import beta, binom, t

from evals.statistics.intervals import Estimate, Interval, bootstrap_means, gap_closed, interval


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
@pytest.mark.parametrize(("between", "high"), [(0.0, 0.99), (0.035, 0.97), (0.14, 0.97)])
def test_means_over_seeds_are_covered_however_much_seeds_differ(between: float, high: float) -> None:
    """Where seeds differ by their units alone, the wider of the two laws covers more than 95 %: that is its price."""
    assert within(seeds_that_cover(between, draw_seeds=True), high=high)


@pytest.mark.slow
def test_units_alone_do_not_cover_what_differs_between_seeds() -> None:
    assert seeds_that_cover(0.14, draw_seeds=False, studies=200) < 0.5 * 200


LEVELS = np.array([0.05, 0.2, 0.5, 0.85, 0.97])  # how much is right of what was stated seldom and often
EFFECTS = np.array([0.0, 0.0, 0.12, 0.4])  # base, an arm like it, an arm that closes three tenths of the gap, direct


def some_study(seeds: int, between: float, shares: bool, generator: np.random.Generator, people: int = 20) -> Estimate:
    """Four arms asked of as many people of every level; each arm's tuning puts it off by an sd of `between` in each seed."""
    found = []
    for _ in range(seeds):
        off = np.concatenate([[0.0], generator.normal(0, between, 3)])
        truth = np.repeat(LEVELS, people) * 0.6 + (EFFECTS + off)[:, None]
        luck, own = generator.random(5 * people), generator.random((4, 5 * people))
        drawn = np.where(generator.random((4, 5 * people)) < 0.7, luck, own)  # arms agree on most people
        found.append((drawn < truth).astype(float) if shares else truth + 0.3 * (luck - 0.5) + 0.1 * (own - 0.5))
    return bootstrap_means(found, shares=shares, strata=[np.repeat(range(5), people)] * seeds)


def covered(seeds: int, between: float, shares: bool, studies: int) -> dict[str, float]:
    """How often intervals hold what is true of all people and tunings, and how often the t law alone does."""
    generator = np.random.default_rng(seeds)
    held: dict[str, list[bool]] = {}
    for _ in range(studies):
        of = some_study(seeds, between, shares, generator)
        for name, arm, truth in (("null", 1, 0.0), ("planted", 2, 0.12)):
            draws = of.draws[arm] - of.draws[0]
            for law, its in (("", draws), (" by t", draws[0])):
                value = interval(of.value[arm] - of.value[0], its)
                held.setdefault(name + law, []).append(value.low <= truth <= value.high)
        value = interval(of.value[0], of.draws[0])
        held.setdefault("value", []).append(value.low <= 0.6 * LEVELS.mean() <= value.high)
        closed = gap_closed(of, 2, 0, 3)
        if closed is not None:
            held.setdefault("gap", []).append(closed.low <= 0.3 <= closed.high)
    assert len(held["gap"]) > 0.95 * studies
    return {name: float(np.mean(of_name)) for name, of_name in held.items()}


@pytest.mark.parametrize(
    ("seeds", "between", "shares", "studies"),
    [
        (3, 0.001, False, 30),
        (8, 0.001, False, 15),
        *(pytest.param(*case, 1000, marks=pytest.mark.slow) for case in product((3, 8), (0.001, 0.03), (True, False))),
    ],
)
def test_differences_and_gaps_of_several_seeds_are_covered(seeds: int, between: float, shares: bool, studies: int) -> None:
    found = covered(seeds, between, shares, studies)
    slack = 2.5 * (0.05 * 0.95 / studies) ** 0.5
    for name in ("null", "planted", "gap", "value"):
        assert found[name] > 0.93 - slack
        assert seeds == 3 or found[name] < 0.985 + slack
    assert found["null"] >= found["null by t"]


@pytest.mark.parametrize("shares", [True, False])
def test_seeds_that_agree_by_luck_are_no_surer_than_their_people_allow(shares: bool) -> None:
    """Three seeds of one mean: a t interval of no width. Twin: seeds that differ, where the t interval is the wider."""
    generator = np.random.default_rng(0)
    strata = np.repeat(range(5), 20)
    for off, by_people in ((0.0, True), (0.1, False)):
        seeds = []
        for shift in (-off, 0.0, off):
            first = np.concatenate([right(20, count)[0] for count in (2, 6, 10, 14, 18)])
            second = np.concatenate([generator.permutation(right(20, count)[0]) for count in (6, 8, 12, 14, 18)])
            seeds.append(np.stack([first, second]) * (0.8 if shares else 1.0) + (0.1 + shift if shares else shift) * np.array([[0.0], [1.0]]))
        of = bootstrap_means(seeds, shares=shares, strata=[strata] * 3)
        value = interval(of.value[1] - of.value[0], of.draws[1] - of.draws[0])
        less_of = [seed[1] - seed[0] for seed in seeds]
        error = (sum(each[strata == level].var(ddof=1) * 20 / 100**2 for each in less_of for level in range(5)) / 9) ** 0.5
        by_t = 4.303 * float(np.std([each.mean() for each in less_of], ddof=1)) / 3**0.5
        assert (value.high - value.low) / 2 == pytest.approx(1.96 * error if by_people else by_t, rel=0.08)
        assert (by_t < 1e-9) == by_people
        ratio = interval(of.value[1] / of.value[0], of.draws[1] / of.draws[0])
        assert ratio.high - ratio.low > 1.5 * error / of.value[0]


def test_a_seed_told_three_times_is_one_seed() -> None:
    """Where all seeds have the same units. Twin: units that are others' in every seed tell more."""
    for seed, shares in ((right(40, 20, 31), True), (right(40, 40, 40), True), (draws(1, 40, (0.0, 0.3))[0], False)):
        once = bootstrap_means([seed], shares=shares)
        thrice, apart = (bootstrap_means([seed] * 3, shares=shares, same_units=same) for same in (True, False))
        for of_series in range(2):
            one, three, other = (interval(of.value[of_series], of.draws[of_series]) for of in (once, thrice, apart))
            assert tuple(three) == pytest.approx(tuple(one), abs=1e-9)
            assert other.high - other.low < 0.75 * (one.high - one.low)


def test_levels_of_exposure_are_taken_as_given() -> None:
    """How many are often stated was decided: one seed's share covers as it should, and is far narrower. Twin: labels that tell nothing."""
    generator = np.random.default_rng(1)
    levels = np.array([0.01, 0.02, 0.1, 0.98, 0.99])
    strata, truth = np.repeat(range(5), 40), np.repeat(levels, 40)
    held, widths = [], {"given": 0.0, "left out": 0.0, "of nothing": 0.0}
    for _ in range(60):
        answers = (generator.random((1, 200)) < truth).astype(float)
        for name, labels in (("given", [strata]), ("left out", None), ("of nothing", [generator.permutation(strata)])):
            of = bootstrap_means([answers], shares=True, strata=labels)
            value = interval(of.value[0], of.draws[0])
            widths[name] += value.high - value.low
            if name == "given":
                held.append(value.low <= levels.mean() <= value.high)
    assert np.mean(held) > 0.88
    assert widths["left out"] > 2 * widths["given"]
    assert widths["of nothing"] == pytest.approx(widths["left out"], rel=0.02)


def test_levels_all_right_or_all_wrong_still_have_an_interval() -> None:
    of = bootstrap_means([right(100, 50)], shares=True, strata=[np.repeat([0, 1], 50)])
    value = interval(of.value[0], of.draws[0])
    assert 0.47 < value.low < 0.485 < 0.515 < value.high < 0.53


@pytest.mark.parametrize("shares", [False, True])
def test_weights_that_are_kept_change_no_interval(shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = [(np.random.default_rng(seed).random((3, 40)) < 0.7).astype(float) for seed in range(2)]
    again = [bootstrap_means(seeds, shares=shares) for _ in range(2)]
    monkeypatch.setattr("evals.statistics.intervals.KEPT_UNITS", 0)
    fresh = [bootstrap_means(seeds, shares=shares) for _ in range(2)]
    assert all(np.array_equal(one.draws, fresh[0].draws) for one in (*again, *fresh))
    assert not np.array_equal(bootstrap_means(seeds, 1, shares=shares).draws, fresh[0].draws)
