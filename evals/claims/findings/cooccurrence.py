"""Finding 5: corpus counts tell hallucinations better than the model's own confidence."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evals.claims.claim import Beside, Claim

THRESHOLDS = "cooccurrence/thresholds.csv"


def _outside(folder: Path) -> Sequence[Beside]:
    frame = pd.read_csv(folder / THRESHOLDS)
    frame = frame[frame["entity_count_threshold"] > 0]  # -1 turns the signal off
    used = {str(name): sorted(set(of["entity_count_threshold"])) for name, of in frame.groupby("dataset")}
    return [
        Beside(
            f"the count below which an entity is rare, in {len(frame)} released configurations",
            "corpus statistics as the signal, independent of the model",
            "; ".join(f"{', '.join(f'{int(number):,}' for number in numbers)} in {name}" for name, numbers in used.items()) + ": set per data set",
        )
    ]


CLAIM = Claim(
    5,
    "cooccurrence",
    "How often the corpus states two entities together tells when a model makes things up, better than the model's own confidence.",
    "Min et al. 2025, arXiv 2512.19134",
    "Confidence tells wrong answers as well as counts do; or the counts' advantage is gone at equal counts of each entity; or the confident errors "
    "are pairs that the corpus states in another relation.",
    "Counts of entities, pairs and triples that vary independently; resampling by entity; confidently wrong answers by themselves.",
    outside=_outside,
    files=(THRESHOLDS,),
    missing="There is no probe of co-occurrence here yet.",
)
