"""Groups items by how familiar they are: by exposure, or by a popularity that stands in for it.

Forgetting is measured per group: F_k = (share right of the base) - (share right of the arm) over the items stated k times, for
each read-out (`readouts`). Positive means forgotten. Controlled for: the items (the same for both, paired) and the facts (none is
in the tuning data). Not controlled for: task gain; compare it with the task's result. Items that were never stated (k = 0) are the
floor: a change there is not forgetting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proxytune.errors import UserError

FEW_LEVELS = 8


@dataclass(frozen=True)
class Familiarity:
    """For every item the label of its bucket, and 1 (familiar), -1 (unfamiliar) or 0 (neither). `labels` are the buckets, rarest first."""

    labels: tuple[str, ...]
    buckets: tuple[str, ...]
    contrast: tuple[int, ...]


def familiarity(popularity: Sequence[float]) -> Familiarity:
    """Puts items into buckets by popularity (NaN where there is none): one per value (`k=30`) for up to eight values, else thirds.

    The top third of the buckets is familiar, the lowest bucket is unfamiliar. Raises `UserError` where an item has no popularity or
    all have the same.
    """
    values = np.asarray(popularity, float)
    if np.isnan(values).any():
        raise UserError("popularity: forgetting and density need it in every knowledge item; add a number that says how well known it is")
    levels = np.unique(values)
    if len(levels) < 2:
        raise UserError(f"popularity: all {len(values)} knowledge items have {levels[0]:g}; give familiar and unfamiliar items")
    if len(levels) <= FEW_LEVELS:
        ranks = np.searchsorted(levels, values)
        labels = [f"k={level:g}" for level in levels]
    else:
        ranks = np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values, side="left")
        labels = ["popularity=low", "popularity=middle", "popularity=high"]
    first_familiar = len(labels) - max(1, len(labels) // 3)
    contrast = np.where(ranks >= first_familiar, 1, np.where(ranks == 0, -1, 0))
    return Familiarity(tuple(labels), tuple(labels[rank] for rank in ranks), tuple(contrast.tolist()))
