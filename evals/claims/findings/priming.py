"""Finding 4: new data primes unrelated outputs, and the keyword's probability before tuning predicts how much."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from evals.claims.claim import Beside, Claim

KEYWORDS, TEXTS, STUDIES = 12, 110, 200


def _outside(_: Path) -> Sequence[Beside]:
    """The score when nothing is related: each keyword has a base rate, which both its probability in its own context and that in the theme carry; the
    probability after tuning depends on neither. All deviations are 1, in log units."""
    draw = np.random.default_rng(0)
    scores, plain = [], []
    for _study in range(STUDIES):
        rate = np.repeat(draw.standard_normal(KEYWORDS), TEXTS)
        own, before, after = rate + draw.standard_normal(rate.size), rate + draw.standard_normal(rate.size), draw.standard_normal(rate.size)
        scores.append(spearmanr(own, after - before).statistic)
        plain.append(spearmanr(own, after).statistic)
    return [
        Beside(
            f"rank correlation of a keyword's probability before with its priming, {KEYWORDS} keywords, {TEXTS} texts each",
            "negative: the less likely before, the more it primes (priming = probability after over probability before)",
            f"{np.mean(scores):.2f} where nothing is related, because the probability before is also the score's denominator; "
            f"{np.mean(plain):+.2f} with the probability after alone (simulated)",
        )
    ]


CLAIM = Claim(
    4,
    "priming",
    "Learning a text raises its keyword in unrelated contexts, the more so the less likely the keyword was before (below about .001).",
    "Sun et al. 2025, arXiv 2504.09522",
    "The relation vanishes for the absolute change or the log probability after; or equals that of shuffled texts.",
    "Keywords of the same prior that are not trained; shuffled texts; no score that divides by the probability before; resampling by keyword.",
    outside=_outside,
    missing="There is no probe of priming here yet.",
)
