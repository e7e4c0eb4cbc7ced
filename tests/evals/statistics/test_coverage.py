"""How often intervals of a study of the default's size hold what is true: eight families with persons of their own, three answers a person."""

import numpy as np
import pytest

from evals.statistics.intervals import Estimate, bootstrap_means, gap_closed, interval

FAMILIES, ANSWERS = 8, 3
LEVELS = np.array([0.25, 0.3, 0.35, 0.4, 0.45])  # right of what was stated seldom and often
EFFECTS = np.array([0.0, 0.0, 0.24, 0.3, 0.3])  # base, an arm like it, an arm that closes four fifths of the gap, direct, an arm like direct
BASE, LIKE_BASE, CLOSER, DIRECT, LIKE_DIRECT = range(5)


def uniform(generator: np.random.Generator, sd: float, *shape: int) -> np.ndarray:
    """Bounded, so that probabilities stay within 0 and 1 and what is true is exactly what was planted."""
    return generator.uniform(-1, 1, shape) * sd * 3**0.5


def study(people: int, families: float, generator: np.random.Generator) -> Estimate:
    """The arms' shares. Families differ by an SD of `families`, and so does what a family does to an arm; persons by .05."""
    level = np.arange(people) % len(LEVELS)
    found = []
    for _ in range(FAMILIES):
        truth = LEVELS[level] + EFFECTS[:, None] + uniform(generator, families) + uniform(generator, 0.7 * families, len(EFFECTS), 1)
        truth = truth + uniform(generator, 0.05, people)
        shape = (len(EFFECTS), people, ANSWERS)
        luck = np.where(generator.random(shape) < 0.6, generator.random(shape[1:]), generator.random(shape))  # arms agree on most answers
        found.append((luck < truth[:, :, None]).mean(axis=2))
    return bootstrap_means(found, shares=True, strata=[level] * FAMILIES)


def held(people: int, families: float, studies: int, law: int | None = None, seed: int = 0) -> dict[str, float]:
    """The share of studies whose interval holds the truth; with `law` that of one of the two distributions alone (1: persons within families)."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[bool]] = {}
    for _ in range(studies):
        of = study(people, families, generator)
        of = of if law is None else Estimate(of.value, of.draws[:, law])
        share = interval(of.value[CLOSER], of.draws[CLOSER], (0.0, 1.0))
        found.setdefault("share", []).append(share.low <= LEVELS.mean() + EFFECTS[CLOSER] <= share.high)
        for name, arm, other in (("null difference", LIKE_BASE, BASE), ("planted difference", CLOSER, DIRECT)):
            difference = interval(of.value[arm] - of.value[other], of.draws[arm] - of.draws[other], (-1.0, 1.0))
            found.setdefault(name, []).append(difference.low <= EFFECTS[arm] - EFFECTS[other] <= difference.high)
        for name, arm, truth in (("gap closed, none", LIKE_BASE, 0.0), ("gap closed, most", CLOSER, 0.8), ("gap closed, all", LIKE_DIRECT, 1.0)):
            closed = gap_closed(of, arm, BASE, DIRECT)
            found.setdefault(name, []).append(closed is not None and closed.low <= truth <= closed.high)
    return {name: float(np.mean(each)) for name, each in found.items()}


def test_intervals_of_eight_families_hold_what_is_true() -> None:
    """A few studies. Twin: intervals of persons alone, which ignore that families differ, are far too narrow."""
    assert min(held(130, 0.04, 30).values()) > 0.8
    assert max(held(130, 0.04, 15, law=1).values()) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("people", [130, 260])
def test_intervals_of_the_default_cover_93_to_97_per_cent(people: int) -> None:
    """With a third (130 persons) of a difference's variance from persons, and less."""
    studies = 600
    slack = 2.5 * (0.05 * 0.95 / studies) ** 0.5
    for name, share in held(people, 0.04, studies).items():
        assert 0.93 - slack < share < 0.97 + slack, name


@pytest.mark.slow
@pytest.mark.parametrize("families", [0.0, 0.02])
def test_families_that_hardly_differ_are_covered_more_often(families: float) -> None:
    """The price of the wider of two intervals: where both are right, the wider one covers more."""
    assert all(0.93 < share < 0.995 for share in held(130, families, 300).values())
