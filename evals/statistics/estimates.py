"""From items' values to estimates: units' contributions, contrasts of familiar and unfamiliar items, and their intervals.

Functions take the items' frame of one record (columns `unit` and `popularity`; `length` and `last_token` where items are matched) and values
[items, columns], and return the units' contributions [units, columns] to a mean. `estimate` joins the contributions of all seeds.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from evals.statistics.intervals import Estimate, Interval, bootstrap_means, interval
from probes.knowledge.exposure import matched, matched_contrast, strata, unit_means, within_strata
from probes.knowledge.familiarity import FEW_LEVELS, familiarity

COLUMNS_AT_ONCE = 100  # bounds memory, not results


def estimate(seeds: Sequence[np.ndarray], same_units: bool = False) -> Estimate:
    """The mean of contributions [units, columns] over all seeds. A column is NaN if one of its values is not finite in some seed."""
    columns = seeds[0].shape[1]
    whole = np.all([np.isfinite(seed).all(axis=0) for seed in seeds], axis=0)
    parts = [
        bootstrap_means([np.nan_to_num(seed[:, start : start + COLUMNS_AT_ONCE]).T for seed in seeds], same_units=same_units)
        for start in range(0, columns, COLUMNS_AT_ONCE)
    ]
    value, draws = np.concatenate([part.value for part in parts]), np.concatenate([part.draws for part in parts])
    return Estimate(np.where(whole, value, np.nan), np.where(whole.reshape(-1, *[1] * (draws.ndim - 1)), draws, np.nan))


def intervals(found: Estimate, bounds: tuple[float, float] = (-np.inf, np.inf)) -> list[Interval]:
    """The interval of every column, clipped to the possible values (`bounds`)."""
    return [interval(value, draws, bounds) if np.isfinite(value) else Interval(np.nan, np.nan, np.nan) for value, draws in zip(*found, strict=True)]


def over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """The mean of one number per seed, with a t interval; a single seed has no interval."""
    if len(values) == 1:
        return Interval(values[0], np.nan, np.nan)
    return intervals(estimate([np.array([[value]]) for value in values]), bounds)[0]


def by_unit(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Units' contributions from items' contributions."""
    return unit_means(values, frame["unit"].tolist())


def means_by_unit(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """The units' contributions to the mean of items' values, within levels of exposure."""
    return within_strata(by_unit(frame, values), levels(frame))


def levels(frame: pd.DataFrame) -> np.ndarray:
    """The stratum of every unit (sorted by name): its level of exposure.

    With few levels that have several units each, the number of units per level is taken as fixed, not as sampled. Otherwise all units are one
    stratum.
    """
    of_units = frame.groupby("unit", sort=True)["popularity"].mean().to_numpy(float)
    _, places, counts = np.unique(of_units, return_inverse=True, return_counts=True)
    return places if len(counts) <= FEW_LEVELS and counts.min() > 1 else np.zeros(len(of_units), int)


def contrast_of(frame: pd.DataFrame) -> np.ndarray:
    """1 for familiar items, -1 for unfamiliar items, 0 for the others."""
    return np.array(familiarity(frame["popularity"].tolist()).contrast)


def strata_of(frame: pd.DataFrame) -> np.ndarray:
    """Items with the same prompt length and last token are a stratum; all items are one stratum if no familiar item has an unfamiliar counterpart."""
    found = strata(frame["length"].tolist(), frame["last_token"].tolist())
    return found if matched(contrast_of(frame), found).any() else np.zeros(len(frame), int)


def contrast(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """The units' contributions to familiar minus unfamiliar, matched within strata."""
    return by_unit(frame, matched_contrast(values, contrast_of(frame), strata_of(frame)))


def exposed(frame: pd.DataFrame) -> pd.DataFrame:
    """The items that a model can know: all except those that the corpus never states."""
    return frame[frame["popularity"] != 0]
