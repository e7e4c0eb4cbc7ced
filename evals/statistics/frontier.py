"""The frontier of task and knowledge: the points for which no other point is at least as good at both and better at one."""

import numpy as np
from jaxtyping import Bool, Float


def on_frontier(task: Float[np.ndarray, "points ..."], knowledge: Float[np.ndarray, "points ..."]) -> Bool[np.ndarray, "points ..."]:
    """Which points no other point dominates, separately for every draw. Points that are equal at both do not dominate each other."""
    as_good = (task[None] >= task[:, None]) & (knowledge[None] >= knowledge[:, None])
    better = (task[None] > task[:, None]) | (knowledge[None] > knowledge[:, None])
    return np.logical_not((as_good & better).any(axis=1))
