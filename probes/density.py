"""Density of hidden states: over how many coordinates a vector's energy is spread, layer by layer.

Source: Jin et al. 2026, arXiv 2603.03415, who use it to detect familiarity. All metrics except Hoyer and Gini use the squares of
h, the "energy" of that paper's abstract. All depend on the basis: a rotation of h changes them. Hence the site `rotated`: an effect
that remains there is not in single neurons. `nulls` has further reference values. Costs one sort of each vector beside the forward
pass. The effective rank of one vector is not the rank of a matrix of representations (see `moments.rankme`).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.internals.activations import States, final_norm

SPREADS = ("effective_rank", "participation_ratio", "norm")
CUT = 0.99  # the quantile at which a vector is winsorised
METRICS = ("e1", "e5", "e10", "effective_rank", "hoyer", "gini", "participation_ratio")
SITES = ("residual", "normed", "rotated", "attention", "mlp")


def density(vectors: Float[Tensor, "*batch hidden"]) -> dict[str, Float[Tensor, "*batch"]]:
    """Every metric of every vector; a are the absolute values of its d coordinates, p = a^2 / sum a^2:

    `e1`, `e5`, `e10`: the share of p in the largest 1, 5 or 10 per cent of the coordinates (at least one); higher is sparser.
    `effective_rank`: exp(entropy of p) / d, in (0, 1]; lower is sparser.
    `hoyer`: (sqrt d - |a|_1 / |a|_2) / (sqrt d - 1): 0 for equal coordinates, 1 for a single one.
    `gini`: Gini coefficient of a; 0 for equal coordinates; higher is sparser.
    `participation_ratio`: 1 / (d sum p^2), in (0, 1]; lower is sparser. A vector of zeros gives NaN.
    """
    size = vectors.shape[-1]
    ordered = _sorted(vectors.abs())
    energy = ordered.square()
    # Sums over coordinates are computed as products with columns of weights: one pass over the vectors per product.
    ranks = torch.arange(1, size + 1, dtype=ordered.dtype, device=ordered.device)
    largest = torch.stack([ranks > size - max(1, size * percent // 100) for percent in (1, 5, 10)] + [ranks > 0], dim=1).to(ordered.dtype)
    *top, whole = (energy @ largest).unbind(-1)
    ranked, total = (ordered @ torch.stack([ranks, torch.ones_like(ranks)], dim=1)).unbind(-1)
    found = {f"e{percent}": sum_ / whole for percent, sum_ in zip((1, 5, 10), top, strict=True)}
    found["effective_rank"] = _effective_rank(energy, whole)
    found["hoyer"] = (size**0.5 - total / whole.sqrt()) / (size**0.5 - 1)
    found["gini"] = 2 * ranked / (size * total) - (size + 1) / size
    found["participation_ratio"] = _participation_ratio(energy, whole)
    return found


def winsorised(vectors: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
    """The absolute values, cut at each vector's own .99 quantile (linear between two values, as numpy's).

    A few massive coordinates (Sun et al. 2024, arXiv 2402.17762) hold nearly all of a residual stream's energy; without the cut, density
    says little else than how large these are.
    """
    ordered = _sorted(vectors.abs())
    place = CUT * (vectors.shape[-1] - 1)
    below, share = int(place), place - int(place)
    limit = torch.lerp(ordered[..., below], ordered[..., min(below + 1, vectors.shape[-1] - 1)], share)
    return vectors.abs().minimum(limit[..., None])


def spread(vectors: Float[Tensor, "*batch hidden"]) -> dict[tuple[str, str], Float[Tensor, "*batch"]]:
    """`effective_rank` and `participation_ratio` as in `density`, of the vectors as they are (`raw`) and `winsorised`, and the raw `norm`.

    Keyed by metric and cut. A vector of zeros gives NaN.
    """
    found = {}
    for cut, sizes in (("raw", vectors), ("winsorised", winsorised(vectors))):
        energy = sizes.square()
        whole = energy.sum(-1)
        found["effective_rank", cut] = _effective_rank(energy, whole)
        found["participation_ratio", cut] = _participation_ratio(energy, whole)
    found["norm", "raw"] = vectors.norm(dim=-1)
    return found


def _effective_rank(energy: Float[Tensor, "*batch hidden"], whole: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return (torch.special.entr(energy).sum(-1) / whole + whole.log()).exp() / energy.shape[-1]


def _participation_ratio(energy: Float[Tensor, "*batch hidden"], whole: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return whole.square() / (energy.shape[-1] * torch.linalg.vecdot(energy, energy))


def _sorted(sizes: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
    """In ascending order. On a CPU numpy sorts, which takes a tenth of torch's time for short rows."""
    if sizes.device.type == "cpu":
        return torch.from_numpy(np.sort(sizes.numpy(), axis=-1))
    return sizes.sort(dim=-1).values


def density_of_states(
    model: PreTrainedModel, states: States, rotation: Float[Tensor, "hidden hidden"] | None
) -> dict[str, Float[Tensor, "batch positions states"]]:
    """Every metric at every site, keyed `metric/site`; attention and MLP have one state per layer.

    Sites: `residual`; `normed` (residual after the model's final norm, as its head would read it); `rotated` (residual in another
    orthogonal basis, if `rotation` is given); `attention` and `mlp` (what each adds to the residual stream).
    """
    sites = {"residual": states.residual, "attention": states.attention, "mlp": states.mlp}
    with torch.inference_mode():
        sites["normed"] = final_norm(model)(states.residual.to(model.dtype)).float()
        if rotation is not None:
            sites["rotated"] = states.residual @ rotation
        return {f"{metric}/{site}": values for site, vectors in sites.items() for metric, values in density(vectors).items()}


def random_rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix drawn uniformly."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian)
    return (orthogonal * upper.diagonal().sign()).float()
