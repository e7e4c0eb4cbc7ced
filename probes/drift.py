"""How far tuning moved a model: weights by matrix, states by layer, and the next-token distribution.

Weights: relative change |dW|_F / |W|_F and stable rank |dW|_F^2 / |dW|_2^2 of the change (as in Biderman et al. 2024, arXiv
2405.09673, who find full tuning's rank 10 to 100 times LoRA's). States: cosine by token here, debiased linear CKA in `moments`.
Distribution: KL(base || arm) in nats after the prompt, over the whole vocabulary. It is the only drift that compares all arms,
because a proxied base has the base's own weights and states, but another distribution. Costs one singular value per matrix; states
and distribution cost a forward pass. Not covered: which of two equally distant models is better.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

POWER_STEPS = 50


def weight_drift(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], blocks: Mapping[str, Sequence[str]]) -> list[dict[str, str | int | float]]:
    """A row for every parameter: `matrix`, `block`, `size`, `relative_change`, and `stable_rank` (NaN for vectors and where nothing changed)."""
    rows: list[dict[str, str | int | float]] = []
    for block, names in blocks.items():
        for name in names:
            before = base[name].double()
            change = tuned[name].double() - before
            length = float(torch.linalg.vector_norm(change))
            relative = length / max(float(torch.linalg.vector_norm(before)), 1e-300)
            rank = float("nan") if change.ndim < 2 or not length else (length / _largest_singular_value(change.flatten(1))) ** 2
            rows.append({"matrix": name, "block": block, "size": before.numel(), "relative_change": relative, "stable_rank": rank})
    return rows


def _largest_singular_value(matrix: Float[Tensor, "rows columns"]) -> float:
    """By power iteration: a lower bound, within one per cent unless the two largest singular values are that close."""
    vector = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=matrix.dtype).to(matrix.device)
    for _ in range(POWER_STEPS):
        vector = matrix.T @ (matrix @ (vector / torch.linalg.vector_norm(vector)))
    return float(torch.linalg.vector_norm(matrix @ (vector / torch.linalg.vector_norm(vector))))


def divergence(base: Float[Tensor, "batch vocabulary"], other: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, " batch"]:
    """KL(base || other) in nats between the distributions of two rows of logits, computed in fp64; zero for equal rows.

    Infinite where `other` forbids a token (-inf) that `base` does not; a token that `base` forbids adds nothing.
    """
    before, after = base.double().log_softmax(-1), other.double().log_softmax(-1)
    probabilities = before.exp()
    return torch.where(probabilities == 0, 0.0, probabilities * (before - after)).sum(-1).clamp(min=0)


def cosine(base: Float[Tensor, "*batch hidden"], tuned: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
    """Cosine of two models' states at the same token: 1 where they point in the same direction."""
    return torch.nn.functional.cosine_similarity(base.double(), tuned.double(), dim=-1)
