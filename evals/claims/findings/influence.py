"""Finding 6: procedural knowledge in pretraining drives reasoning."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from evals.claims.claim import Beside, Claim

SCORES = "bergson_lds.csv"


def _outside(folder: Path) -> Sequence[Beside]:
    frame = pd.read_csv(folder / SCORES)
    adam = frame[frame["training_optimizer"] == "Adam"].set_index("method")
    score, apart = (float(adam[name]["EK-FAC"]) for name in ("lds", "plus_minus"))
    best = adam["lds"].sort_values().index[-1]
    return [
        Beside(
            "how well EK-FAC predicts what leaving documents out does (linear datamodelling score, GPT-2)",
            "documents are ranked by EK-FAC influence",
            f"{score:.3f} ± {apart:.3f} of 1, beside {adam['lds'].max():.3f} by {best} (a table of bergson's, not computed here)",
        )
    ]


CLAIM = Claim(
    6,
    "influence",
    "Reasoning draws on documents that show the procedure, facts on the few documents that state them.",
    "Ruis et al. 2025, arXiv 2411.12580",
    "Nonsense in the same format correlates as much as the procedure; or leaving documents out shows no difference between facts and procedures.",
    "Document length, gradient norm and template taken out; models trained again without the documents.",
    outside=_outside,
    files=(SCORES,),
    missing="There is no probe of influence here yet.",
)
