"""Finding 2: biases are planted in pretraining and swayed by fine-tuning."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import davies_bouldin_score, silhouette_score

from evals.claims.claim import Beside, Claim

SCORES = "bias/cross_tuning_full_scores.csv"


def _outside(folder: Path) -> Sequence[Beside]:
    frame = pd.read_csv(folder / SCORES, index_col=0).drop(index="MMLU")
    models = [str(name) for name in frame if "Seed" in str(name)]
    values = frame[models].to_numpy(float).T  # models x biases
    base = np.array([name.startswith("OLMo") for name in models])
    data = np.array(["Flan" in name for name in models])
    splits = list(_splits(len(values)))
    silhouettes, indices = ([score(values, split) for split in splits] for score in (silhouette_score, davies_bouldin_score))
    own = {name: (silhouette_score(values, labels), davies_bouldin_score(values, labels)) for name, labels in (("base", base), ("data", data))}
    shares = _shares(values, base, data)

    def p(scores: Sequence[float], value: float, higher: bool) -> float:
        counted = np.array(scores) >= value - 1e-12 if higher else np.array(scores) <= value + 1e-12
        return float(counted.mean())

    index = own["base"][1]
    return [
        Beside(
            "silhouette by pretraining and by instruction data, 12 models by 32 biases",
            "models cluster by pretraining",
            f"{own['base'][0]:.3f} (exact permutation p {p(silhouettes, own['base'][0], True):.3f}) and {own['data'][0]:.3f} "
            f"(p {p(silhouettes, own['data'][0], True):.2f})",
        ),
        Beside(
            "p of the Davies-Bouldin index by pretraining",
            f"as the released code counts, permuted at least as high: {p(indices, index, True):.3f}",
            f"{p(indices, index, False):.3f}: lower is better, so that the p is on the other side",
        ),
        Beside(
            "shares of the sums of squares: pretraining, instruction data, both together, seed",
            "pretraining overwhelmingly determines biases",
            ", ".join(f"{share:.3f}" for share in shares),
        ),
    ]


def _splits(models: int) -> list[np.ndarray]:
    """All ways to divide the models into two halves, by one of the labels; both names of a division are counted."""
    return [np.isin(np.arange(models), chosen) for chosen in combinations(range(models), models // 2)]


def _shares(values: np.ndarray, base: np.ndarray, data: np.ndarray) -> list[float]:
    """Shares of the total sum of squares in a balanced design of two factors with two levels, summed over the biases."""
    centred = values - values.mean(axis=0)

    def between(labels: np.ndarray) -> float:
        return sum(float((labels == level).sum() * (centred[labels == level].mean(axis=0) ** 2).sum()) for level in np.unique(labels))

    total, one, other, cells = float((centred**2).sum()), between(base), between(data), between(2 * base.astype(int) + data)
    return [part / total for part in (one, other, cells - one - other, total - cells)]


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
    missing="There is no probe of planted biases here yet.",
)
