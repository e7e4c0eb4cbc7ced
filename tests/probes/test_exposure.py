import numpy as np
import pytest
from scipy.stats import norm, rankdata, spearmanr, ttest_1samp

from evals.statistics.intervals import bootstrap_means, interval
from evals.statistics.power import needed_seeds, needed_units
from probes.knowledge.exposure import matched, matched_contrast, rank_correlation, strata, unit_means
from proxytune.errors import UserError

ONE = 1.96


def some_items(items: int = 240, columns: int = 6, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Values with ties, popularity with few levels, four strata that shift both, and two covariates with ties."""
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 4, items)
    popularity = generator.choice([0.0, 1, 3, 10, 30, 100], items) + 5.0 * groups
    covariates = np.stack([popularity**0.5 + generator.normal(0, 3, items), generator.integers(0, 5, items)], axis=1)
    values = generator.normal(size=(items, columns)) + 0.2 * np.log2(popularity + 1)[:, None] + 0.3 * covariates[:, :1] + groups[:, None]
    return values.round(1), popularity, groups, covariates


def taken(contributions: np.ndarray) -> np.ndarray:
    return contributions[~np.isnan(contributions).all(axis=1)]


def ends(contributions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The normal interval of every column's mean: what the bootstrap gives, without its 4,000 draws."""
    half = ONE * contributions.std(axis=0, ddof=1) / len(contributions) ** 0.5
    return contributions.mean(axis=0) - half, contributions.mean(axis=0) + half


def residuals(target: np.ndarray, explained_by: np.ndarray) -> np.ndarray:
    return target - explained_by @ np.linalg.lstsq(explained_by, target, rcond=None)[0]


def dummies(groups: np.ndarray) -> np.ndarray:
    return (groups[:, None] == np.unique(groups)).astype(float)


def test_strata_are_those_of_equal_length_and_last_token() -> None:
    lengths, tokens = [5, 5, 6, 5, 6], [9, 8, 9, 9, 9]
    numbers = strata(lengths, tokens)
    pairs = list(zip(lengths, tokens, strict=True))
    for i in range(5):
        for j in range(5):
            assert (numbers[i] == numbers[j]) == (pairs[i] == pairs[j])


def test_one_stratum_without_covariates_is_spearman() -> None:
    values, popularity, _, _ = some_items()
    contributions = rank_correlation(values, popularity, np.zeros(len(values), int))
    expected = [spearmanr(column, np.log2(popularity + 1)).statistic for column in values.T]
    np.testing.assert_allclose(contributions.mean(axis=0), expected, atol=1e-12)
    shuffled = rank_correlation(values, np.random.default_rng(0).permutation(popularity), np.zeros(len(values), int))
    assert np.abs(shuffled.mean(axis=0) - expected).min() > 0.1


@pytest.mark.parametrize("covariates_used", [0, 2])
def test_partial_slope_is_that_of_residuals_of_a_plain_regression(covariates_used: int) -> None:
    values, popularity, groups, covariates = some_items()
    covariates = covariates[:, :covariates_used]
    contributions = rank_correlation(values, popularity, groups, covariates if covariates_used else None)
    design = np.column_stack([dummies(groups), *(rankdata(column) for column in covariates.T)])
    for column, found in zip(values.T, contributions.mean(axis=0), strict=True):
        left, right = residuals(rankdata(column), design), residuals(rankdata(np.log2(popularity + 1)), design)
        assert found == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-10)
        unstratified = residuals(rankdata(popularity), design[:, 4:]) if covariates_used else rankdata(popularity)
        assert abs(np.corrcoef(rankdata(column), unstratified)[0, 1] - found) > 0.02


def test_columns_are_read_alone_and_those_without_variation_are_nan() -> None:
    values, popularity, groups, covariates = some_items()
    together = rank_correlation(values, popularity, groups, covariates)
    for column in range(values.shape[1]):
        np.testing.assert_allclose(rank_correlation(values[:, [column]], popularity, groups, covariates)[:, 0], together[:, column], atol=1e-10)
    values[:, 0], values[:, 1], values[:, 2], values[7, 3] = 3.7, groups, covariates[:, 0], np.nan
    odd = rank_correlation(values, popularity, groups, covariates)
    assert np.isnan(odd[:, :4]).all()
    np.testing.assert_allclose(odd[:, 4:], together[:, 4:], atol=1e-10)


def test_contrast_is_the_coefficient_of_a_regression_with_a_constant_a_stratum() -> None:
    values, popularity, groups, _ = some_items()
    groups[popularity > 100] = 9  # a stratum without unfamiliar items
    contrast = np.where(popularity > 20, 1, np.where(popularity < 9, -1, 0))
    contributions = matched_contrast(values, contrast, groups)
    used = contrast != 0
    design = np.column_stack([contrast[used] > 0, dummies(groups[used])]).astype(float)
    expected = np.linalg.lstsq(design, values[used], rcond=None)[0][0]
    np.testing.assert_allclose(taken(contributions).mean(axis=0), expected, atol=1e-12)
    np.testing.assert_array_equal(~np.isnan(contributions[:, 0]), matched(contrast, groups))
    assert matched(contrast, groups).sum() < used.sum()
    plain = values[contrast > 0].mean(axis=0) - values[contrast < 0].mean(axis=0)
    assert np.abs(plain - expected).min() > 0.1
    one = matched_contrast(values, contrast, np.zeros(len(values), int))
    np.testing.assert_allclose(taken(one).mean(axis=0), plain, atol=1e-12)


def test_items_that_take_no_part_change_nothing() -> None:
    values, popularity, groups, covariates = some_items()
    more = np.vstack([values, np.full((1, values.shape[1]), 1e9)])
    alone = np.append(groups, 77)
    slopes = rank_correlation(more, np.append(popularity, 1e9), alone, np.vstack([covariates, [[1e9, 1e9]]]))
    np.testing.assert_array_equal(slopes[:-1], rank_correlation(values, popularity, groups, covariates))
    contrast = np.where(popularity > 20, 1, -1)
    contrasts = matched_contrast(more, np.append(contrast, 1), alone)
    np.testing.assert_array_equal(contrasts[:-1], matched_contrast(values, contrast, groups))
    assert np.isnan(slopes[-1]).all()
    assert np.isnan(contrasts[-1]).all()


def test_nothing_to_compare_is_an_error() -> None:
    values, popularity, groups, _ = some_items()
    with pytest.raises(UserError, match="statements of the same form"):
        matched_contrast(values, np.where(groups == 0, 1, -1), groups)
    for confounded in (groups.astype(float), np.full(len(groups), 5.0)):
        with pytest.raises(UserError, match="popularity: it does not vary over 240"):
            rank_correlation(values, confounded, groups)
    with pytest.raises(UserError, match="popularity: it does not vary over"):
        rank_correlation(values, popularity, groups, popularity[:, None])
    with pytest.raises(UserError, match="does not vary over 0 items"):
        rank_correlation(values, popularity, np.arange(len(values)))


def test_spread_of_contributions_is_that_of_the_jackknife() -> None:
    values, popularity, groups, covariates = some_items(columns=3)
    contrast = np.where(popularity > 20, 1, -1)
    count = len(values)
    for contributions, without in (
        (rank_correlation(values, popularity, groups, covariates), lambda k: rank_correlation(values[k], popularity[k], groups[k], covariates[k])),
        (matched_contrast(values, contrast, groups), lambda k: matched_contrast(values[k], contrast[k], groups[k])),
    ):
        left_out = np.stack([without(np.arange(count) != item).mean(axis=0) for item in range(count)])
        jackknife = (count - 1) / count**0.5 * left_out.std(axis=0)
        np.testing.assert_allclose(contributions.std(axis=0) / count**0.5, jackknife, rtol=0.06)


def test_bootstrap_of_contributions_is_the_normal_interval() -> None:
    values, popularity, groups, covariates = some_items(items=400)
    contributions = rank_correlation(values, popularity, groups, covariates)
    estimate = bootstrap_means([contributions.T])
    for column, (low, high) in enumerate(zip(*ends(contributions), strict=True)):
        found = interval(estimate.value[column], estimate.draws[column])
        assert found.value == pytest.approx((low + high) / 2, abs=1e-12)
        assert found.high - found.low == pytest.approx(high - low, rel=0.06)


def coverage(slope: float, items: int, size_of_strata: int, repeats: int = 80, columns: int = 20) -> tuple[float, float]:
    """How often the interval holds a planted slope: of contributions, and of contributions from a shuffled column, which must not."""
    generator, covered, wrong = np.random.default_rng(1), [], []
    groups = np.arange(items) // size_of_strata
    normal = 2 * np.sin(np.pi * slope / 6)  # the correlation of normal values whose ranks have this one
    for _ in range(repeats):
        popularity = generator.normal(size=items)
        values = normal * popularity[:, None] + (1 - normal**2) ** 0.5 * generator.normal(size=(items, columns))
        low, high = ends(taken(rank_correlation(values, popularity, groups)))
        covered.append((low < slope) & (slope < high))
        low, high = ends(taken(rank_correlation(values, generator.permutation(popularity), groups)))
        wrong.append((low < slope) & (slope < high))
    return float(np.mean(covered)), float(np.mean(wrong))


def test_interval_covers_a_slope_of_a_tenth() -> None:
    covered, wrong = coverage(0.1, 300, 300)
    assert 0.93 < covered < 0.965
    assert wrong < 0.7


def test_interval_covers_where_strata_are_pairs() -> None:
    """Plain influences of items demeaned in pairs have half their variance: their interval must miss too often."""
    covered, _ = coverage(0.0, 300, 2)
    assert 0.93 < covered < 0.965
    generator = np.random.default_rng(2)
    groups = np.arange(600) // 2
    contrast = np.where(np.arange(600) % 2, 1, -1)
    values = generator.normal(size=(600, 1000)) + generator.normal(size=(300, 1000))[groups]
    contributions = matched_contrast(values, contrast, groups)
    low, high = ends(contributions)
    assert 0.93 < ((low < 0) & (high > 0)).mean() < 0.965
    differences = values[1::2] - values[::2]  # what a paired test sees
    np.testing.assert_allclose(high - low, 2 * ONE * differences.std(axis=0) / 300**0.5, rtol=0.01)
    middle = (low + high) / 2
    plain = middle + (high - middle) / 2**0.5
    assert ((2 * middle - plain < 0) & (plain > 0)).mean() < 0.87


def test_arms_on_the_same_items_are_paired() -> None:
    generator = np.random.default_rng(3)
    popularity, groups = generator.normal(size=300), generator.integers(0, 3, 300)
    base = generator.normal(size=(300, 400)) + 0.5 * popularity[:, None]
    tuned = base + 0.1 * generator.normal(size=(300, 400))
    slopes = [rank_correlation(values, popularity, groups) for values in (base, tuned)]
    low, high = ends(slopes[1] - slopes[0])
    loss = np.mean([arm.mean(axis=0) for arm in slopes], axis=1)
    assert ((low < loss[1] - loss[0]) & (high > loss[1] - loss[0])).mean() == pytest.approx(0.95, abs=0.03)
    wide = [np.diff(ends(arm), axis=0).mean() for arm in slopes]
    assert (high - low).mean() < 0.2 * np.hypot(*wide)
    assert not (rank_correlation(base, popularity, groups) - slopes[0]).any()


def unequal_units(generator: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Contributions about 5 of 80 units with 1 to 12 items each, which share their unit's luck."""
    sizes = generator.integers(1, 13, 80)
    owner = np.repeat(np.arange(80), sizes)
    return 5 + generator.normal(size=(80, 1))[owner] + generator.normal(size=(len(owner), 1)), [f"unit {number:02}" for number in owner]


def test_units_have_the_items_mean_and_the_right_spread() -> None:
    generator = np.random.default_rng(4)
    counts = np.zeros(3)
    for _ in range(400):
        values, units = unequal_units(generator)
        by_unit = unit_means(values, units)
        np.testing.assert_allclose(by_unit.mean(axis=0), values.mean(axis=0), atol=1e-12)
        sums = np.bincount([int(unit[5:]) for unit in units], values[:, 0])[:, None] * 80 / len(values)
        for place, table in enumerate((by_unit, values, sums)):
            low, high = ends(table)
            counts[place] += low[0] < 5 < high[0]
    assert 0.92 < counts[0] / 400 < 0.975
    assert counts[1] / 400 < 0.75  # items taken as independent
    assert counts[2] / 400 > 0.99  # plain sums: sizes pass for noise


def test_units_pass_over_items_that_take_no_part() -> None:
    contributions = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [6.0, np.nan], [np.nan, np.nan]])
    by_unit = unit_means(contributions, ["b", "b", "b", "a", "c"])
    assert by_unit[:, 0].mean() == pytest.approx(3.0)
    np.testing.assert_allclose(by_unit[:, 0], [3 + 3, 3 - 3, 3])  # a, b, c
    assert np.isnan(by_unit[:, 1]).all()
    alone = np.array([[1.0], [2.0], [6.0]])
    np.testing.assert_allclose(unit_means(alone, ["x", "y", "z"]), alone)


def planted(effect: float, items: int, repeats: int, seed: int) -> np.ndarray:
    """Contributions of `repeats` experiments with as many familiar as unfamiliar items, SD .032, in three strata of other densities."""
    generator = np.random.default_rng(seed)
    contrast = np.where(np.arange(items) % 2, 1, -1)
    groups = np.arange(items) // 2 % 3
    noise = generator.normal(0, 0.032, (items, repeats)) + 0.1 * groups[:, None]
    return matched_contrast(noise + effect * (contrast > 0)[:, None], contrast, groups)


def test_planted_density_is_found_at_the_size_that_the_formula_gives() -> None:
    low, high = ends(planted(0.002, 1000, 20, seed=5))
    items = needed_units(float((high - low).mean() / 2), 1000, 0.002)
    assert items == pytest.approx(2 * 4000, rel=0.05)  # PROBES 1
    found = [float((ends(planted(effect, items, 200, seed=6))[0] > 0).mean()) for effect in (0.002, 0.0002)]
    assert 0.72 < found[0] < 0.88
    assert found[1] < 0.1
    fewer = ends(planted(0.002, items // 4, 200, seed=7))[0] > 0
    assert fewer.mean() < 0.45


def test_number_of_vectors_in_probes() -> None:
    half_width = norm.ppf(0.975) * 0.032 * (2 / 100) ** 0.5  # two buckets of a hundred
    assert needed_units(half_width, 100, 0.002) == pytest.approx(4000, rel=0.01)
    assert needed_units(half_width, 100, -0.002) == needed_units(half_width, 100, 0.002)
    assert needed_units(half_width, 100, 0.002, power=0.9) == pytest.approx(4000 * (3.24 / 2.8) ** 2, rel=0.01)


def test_seeds_that_a_t_test_needs() -> None:
    """Ten seeds for one standard deviation and 34 for half of one, as in tables of the t test; and so found by simulation."""
    half_width = 2.776 / 5**0.5  # five seeds, SD 1
    assert [needed_seeds(half_width, 5, effect) for effect in (1.0, -1.0, 0.5)] == [10, 10, 34]
    assert needed_seeds(half_width, 5, 1.0) > needed_units(1.96, 1, 1.0)  # the normal law asks for too few
    generator = np.random.default_rng(8)
    power = {seeds: (ttest_1samp(1 + generator.normal(size=(seeds, 20000)), 0).pvalue < 0.05).mean() for seeds in (9, 10)}
    assert power[9] < 0.8 < power[10]


def test_length_that_decides_both_is_matched_away() -> None:
    """Familiar things have long statements, long statements are dense: no familiarity is in it but a planted .01."""
    generator = np.random.default_rng(9)
    lengths = generator.integers(5, 9, 1200)
    popularity = generator.poisson(np.exp(lengths - 5)).astype(float)
    contrast = np.where(popularity > 4, 1, np.where(popularity < 2, -1, 0))
    values = 0.05 * lengths[:, None] + 0.01 * (contrast > 0)[:, None] + generator.normal(0, 0.02, (1200, 50))
    groups = strata(lengths.tolist(), [7] * 1200)
    low, high = ends(taken(matched_contrast(values, contrast, groups)))
    assert ((low < 0.01) & (high > 0.01)).mean() >= 0.88
    unmatched = ends(taken(matched_contrast(values, contrast, np.zeros(1200, int))))
    assert unmatched[0].min() > 0.05
    slopes = [rank_correlation(values - 0.01 * (contrast > 0)[:, None], popularity, by).mean() for by in (groups, np.zeros(1200, int))]
    assert abs(slopes[0]) < 0.02
    assert slopes[1] > 0.5


def test_covariate_that_carries_everything_leaves_no_slope() -> None:
    generator = np.random.default_rng(10)
    popularity = generator.choice([0.0, 1, 3, 10, 30, 100], 1000)
    confidence = np.log2(popularity + 1) + generator.normal(size=1000)
    values = confidence[:, None] + generator.normal(size=(1000, 50))
    one = np.zeros(1000, int)
    low, high = ends(rank_correlation(values, popularity, one, confidence[:, None]))
    assert ((low < 0) & (high > 0)).mean() >= 0.88
    assert ends(rank_correlation(values, popularity, one))[0].min() > 0.5
    unrelated = generator.normal(size=(1000, 1))
    assert ends(rank_correlation(values, popularity, one, unrelated))[0].min() > 0.5
    direct = values + 0.5 * np.log2(popularity + 1)[:, None]
    assert ends(rank_correlation(direct, popularity, one, confidence[:, None]))[0].min() > 0.1
