"""How large a difference a number of items or seeds can detect, and how many of them detect a given one."""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import brentq
from scipy.stats import nct, norm, t

from evals.statistics.intervals import LEVEL, interval

POWER = 0.8
MOST = {"seeds": 1000, "units": 100_000}  # larger numbers are not told apart


class Needs(NamedTuple):
    """How many seeds (in worlds: families) or units would decide. A number above `MOST` stands for all larger ones."""

    number: int
    of: Literal["seeds", "units"]

    def __str__(self) -> str:
        return f"over {MOST[self.of]} {self.of}" if self.number > MOST[self.of] else f"{self.number} {self.of}"


def needs(
    value: float, draws: Float[np.ndarray, "*laws draws"], seeds: int, units: int, same_units: bool, effect: float, level: float = 1 - LEVEL
) -> Needs:
    """How many seeds (or units) find `effect` four times in five, two-sided at `level`, with the spread seen in these draws (`bootstrap_means`).

    One seed says nothing about how seeds differ: then units are counted, and what they decide holds for this seed. With several seeds it is the t
    test over their means. Seeds with units of their own (`same_units` false) differ at least by the sampling of `units` each. Where all seeds have
    the same units, no number of seeds helps if these units are too few: then units are counted.
    """
    if draws.ndim == 1:
        return Needs(needed_units(_half_width(value, draws), units, effect, level=level), "units")
    by_seeds, by_units = (_half_width(value, law) for law in draws)
    if same_units and (wanted := needed_units(by_units, units, effect, level=level)) > units:
        return Needs(wanted, "units")
    if not same_units:
        by_seeds = max(by_seeds, by_units * t.ppf((1 + LEVEL) / 2, seeds - 1) / norm.ppf((1 + LEVEL) / 2))
    return Needs(needed_seeds(by_seeds, seeds, effect, level=level), "seeds")


def needed_units(half_width: float, n: int, effect: float, power: float = POWER, level: float = 1 - LEVEL) -> int:
    """How many units (or items) detect `effect` with this power, two-sided at `level`, where `n` of them gave a 95 % interval of this half width.

    By the normal distribution; two buckets of n items each count as n. At most `MOST` + 1.
    """
    error, most = half_width / norm.ppf((1 + LEVEL) / 2), MOST["units"] + 1
    ratio = _errors(power, level) * error / abs(effect) if effect else math.inf
    return max(1, math.ceil(min(most, n * ratio**2)))


def needed_seeds(half_width: float, seeds: int, effect: float, power: float = POWER, level: float = 1 - LEVEL) -> int:
    """The same for a t interval over the means of `seeds` (two or more): the fewest seeds whose t test detects `effect` with this power.

    The spread of few seeds is itself uncertain: with three seeds the number may be wrong by a factor of ten. At most `MOST` + 1.
    """
    spread, most = half_width * math.sqrt(seeds) / t.ppf((1 + LEVEL) / 2, seeds - 1), MOST["seeds"] + 1
    shift = abs(effect) / spread if spread > 0 else math.inf
    if not shift * math.sqrt(most) > _errors(power, level):
        return most
    count = max(2, math.floor((_errors(power, level) / shift) ** 2))  # the number by the normal distribution: never too large
    while count < most and power_of_t_test(count, shift, level) < power:
        count += 1
    return count


def detectable(spread: float, seeds: int, power: float = POWER, level: float = 1 - LEVEL) -> float:
    """The least effect that a t test over the means of `seeds` (two or more) detects with this power, where they have the SD `spread`."""
    enough = 2 * t.ppf(1 - level / 2, seeds - 1) + 10
    return spread * float(brentq(lambda shift: power_of_t_test(seeds, shift, level) - power, 0, enough))


def power_of_t_test(seeds: int, shift: float, level: float = 1 - LEVEL) -> float:
    """The power of the two-sided test that a mean is zero, when it is `shift` standard deviations of a seed away from zero."""
    if math.isinf(shift):
        return 1.0
    limit, distance = t.ppf(1 - level / 2, seeds - 1), shift * math.sqrt(seeds)
    # NaN where the effect is too far from zero for the distribution to be computed: all lies on its side, nothing on the other.
    right, wrong = nct.sf(limit, seeds - 1, distance), nct.cdf(-limit, seeds - 1, distance)
    return float(np.nan_to_num(right, nan=1.0) + np.nan_to_num(wrong, nan=0.0))


def _errors(power: float, level: float) -> float:
    """By how many standard errors an effect must differ from zero to be detected."""
    return float(norm.ppf(1 - level / 2) + norm.ppf(power))


def _half_width(value: float, draws: Float[np.ndarray, " draws"]) -> float:
    drawn = interval(value, draws)
    return (drawn.high - drawn.low) / 2


def minimum_detectable_effect(
    items: int | Int[np.ndarray, "*tests"], discordant: float | Float[np.ndarray, "*tests"], power: float = 0.8, level: float = 0.05
) -> Float[np.ndarray, "*tests"]:
    """The smallest difference of two arms' shares that `items` paired items detect with probability `power`, two-sided at `level`.

    `discordant` is the share ψ of items that exactly one arm has right. The difference d solves Connor (1987):
    √n · d = a √ψ + b √(ψ - d²), with a = z(1 - level / 2) and b = z(power). nan if even d = ψ, the largest possible difference,
    is too small to be detected. In simulations with 100 items and more it holds within 0.04 of `power` for McNemar's test without
    continuity correction; the exact test (`mcnemar`) is conservative and detects it in 0.76 to 0.79 of studies instead of 0.8.
    Not for several items of one person, and not over seeds.
    """
    a, b = norm.ppf(1 - level / 2), norm.ppf(power)
    share = np.asarray(discordant, float)
    with np.errstate(invalid="ignore"):  # fewer than a² - b² items: nothing is detectable, nan
        effect = np.sqrt(share) * (a * np.sqrt(items) + b * np.sqrt(items + b * b - a * a)) / (items + b * b)
    return np.where(effect <= share, effect, np.nan)
