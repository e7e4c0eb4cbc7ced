"""Finding 2: biases are planted in pretraining and swayed by fine-tuning."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import davies_bouldin_score

from evals.claims.claim import Beside, Claim
from evals.released.scores import read_scores, score_matrix
from probes.bias import all_permutations

SCORES = "bias/cross_tuning_full_scores.csv"


def _outside(folder: Path) -> Sequence[Beside]:
    matrix = read_scores(folder / SCORES, ["MMLU"])
    found = score_matrix(matrix)
    values, p = found.clustering.values, found.clustering.p
    own = values["davies_bouldin"]["pretraining"]
    permuted = all_permutations(matrix.labels["pretraining"], matrix.labels["instruction"])
    higher = np.mean([davies_bouldin_score(matrix.profiles, labels) >= own - 1e-9 for labels in permuted])
    return [
        Beside(
            f"silhouette by pretraining and by instruction data, {len(matrix.profiles)} models by {len(matrix.rows)} biases",
            "models cluster by pretraining",
            f"{values['silhouette']['pretraining']:.3f} (exact permutation p within strata {p['silhouette']['pretraining']:.3f}) and "
            f"{values['silhouette']['instruction']:.3f} (p {p['silhouette']['instruction']:.2f})",
        ),
        Beside(
            "p of the Davies-Bouldin index by pretraining",
            f"as the released code counts, permuted at least as high: {higher:.3f}",
            f"{p['davies_bouldin']['pretraining']:.3f}: lower is better, so that the p is on the other side",
        ),
        Beside(
            f"shares of the sums of squares: {', '.join(found.shares)}",
            "pretraining overwhelmingly determines biases",
            ", ".join(f"{share:.3f}" for share in found.shares.values()),
        ),
    ]


CLAIM = Claim(
    2,
    "bias",
    "A model's biases are planted in pretraining; fine-tuning only sways them.",
    "Itzhak, Belinkov and Stanovsky 2025, arXiv 2507.07186",
    "Tuning data explain at least as much of the bias profile as the corpus, at a moderate dose; or two models of one corpus differ as much as two "
    "corpora do.",
    "The same architecture everywhere, several pretraining seeds of one corpus, several doses of tuning, equal task gain.",
    outside=_outside,
    files=(SCORES,),
    missing="There is no study of planted biases here yet; proxytune probe bias --scores reads released ones.",
)
