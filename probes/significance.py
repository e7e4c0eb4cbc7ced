"""The correction of p values for several tests. It works on the last axis and on all leading axes at once."""

import numpy as np
from jaxtyping import Float


def holm(p_values: Float[np.ndarray, "*families tests"]) -> Float[np.ndarray, "*families tests"]:
    """Adjusted p values, in the order given: rejecting those up to α keeps the probability of any false rejection in a family
    at or below α, for any dependence between the tests (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, and is at least as large as those before it.
    """
    order = np.argsort(p_values, axis=-1)
    count = p_values.shape[-1]
    raised = np.take_along_axis(p_values, order, axis=-1) * np.arange(count, 0, -1)
    adjusted = np.empty_like(p_values)
    np.put_along_axis(adjusted, order, np.minimum(1.0, np.maximum.accumulate(raised, axis=-1)), axis=-1)
    return adjusted
