import numpy as np
import pytest
from scipy.stats import binomtest, norm

from evals.statistics.power import minimum_detectable_effect


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
