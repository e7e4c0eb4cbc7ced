"""Density of hidden states: how many coordinates share a vector's energy, layer by layer.

Source: Jin et al. 2026, arXiv 2603.03415, which reads familiarity off it; the measures here are taken on h squared, as in
its abstract's "energy", not on |h|. They depend on the basis: a rotation of h changes every one of them, hence the nulls.
One forward pass a prompt. Not covered yet: attention and MLP outputs, the subject's token, partialling out confidence.

What would refute "tuning erodes the density of what is familiar in lower layers": the change of familiar minus unfamiliar
in the lower third is not below zero, or no further below zero than in the upper third, or the same in rotated states.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from probes.activations import final_norm, last_token_states


def top_energy(vectors: Float[Tensor, "*batch hidden"], share: float = 0.05) -> Float[Tensor, "*batch"]:
    """E_k: the share of the energy in the `share` largest coordinates; higher is sparser."""
    energy = vectors.square()
    count = max(1, int(share * vectors.shape[-1]))
    return energy.topk(count, dim=-1).values.sum(-1) / energy.sum(-1)


def effective_rank(vectors: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of one vector's energy over its coordinates, divided by their number; lower is sparser.

    In (0, 1]. It is not the rank of a matrix of representations.
    """
    shares = vectors.square() / vectors.square().sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp() / vectors.shape[-1]


def hoyer(vectors: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
    """(sqrt(d) - |h|_1 / |h|_2) / (sqrt(d) - 1): 0 for equal coordinates, 1 for a single one; higher is sparser."""
    root = vectors.shape[-1] ** 0.5
    return (root - vectors.abs().sum(-1) / vectors.norm(dim=-1)) / (root - 1)


def participation_ratio(vectors: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch"]:
    """(sum h^2)^2 / (d sum h^4), in (0, 1]; lower is sparser."""
    energy = vectors.square()
    return energy.sum(-1).square() / (vectors.shape[-1] * energy.square().sum(-1))


METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "e5": top_energy,
    "effective_rank": effective_rank,
    "hoyer": hoyer,
    "participation_ratio": participation_ratio,
}


def density(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, batch_size: int, pad: int, seed: int = 0
) -> dict[str, Float[np.ndarray, "prompts states"]]:
    """Every metric of every state of every prompt, keyed 'metric/view'.

    Views: `pre` (the residual stream), `post` (the same through the model's final norm, as its head would read it) and
    `rotated` (`pre` in a random orthogonal basis: what is left of an effect there does not live in the neurons).
    """
    norm = final_norm(model)
    rotation: Tensor | None = None
    parts: dict[str, list[Tensor]] = {}
    for states in last_token_states(model, prompts, batch_size, pad):
        if rotation is None:
            rotation = random_rotation(states.shape[-1], seed).to(states.device)
        with torch.inference_mode():
            views = {"pre": states, "post": norm(states.to(model.dtype)).float(), "rotated": states @ rotation}
        for metric, function in METRICS.items():
            for view, vectors in views.items():
                parts.setdefault(f"{metric}/{view}", []).append(function(vectors).cpu())
    return {name: torch.cat(tensors).double().numpy() for name, tensors in parts.items()}


def gaussian_null(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, batch_size: int, pad: int, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """For every metric, `mean` and `sd` by state of vectors drawn from the normal law with the states' mean and covariance.

    The sd is of one vector: it standardises differences of `density`. Moments are summed batch by batch.
    """
    count, total, outer = 0, torch.zeros(()), torch.zeros(())
    for states in last_token_states(model, prompts, batch_size, pad):
        doubles = states.double()
        count += len(doubles)
        total = total + doubles.sum(0)
        outer = outer + torch.einsum("bsi,bsj->sij", doubles, doubles)
    mean = total / count
    covariance = outer / count - torch.einsum("si,sj->sij", mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(draws, *mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
    samples = mean + torch.einsum("sij,nsj->nsi", vectors, noise * values.clamp(min=0).sqrt())
    return {metric: {"mean": function(samples).mean(0).tolist(), "sd": function(samples).std(0).tolist()} for metric, function in METRICS.items()}


def random_rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix drawn uniformly."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian)
    return (orthogonal * upper.diagonal().sign()).float()


def thirds(states: int) -> dict[str, range]:
    """The states of the lower and of the upper third of the layers; the embeddings belong to neither."""
    layers = states - 1
    width = max(1, layers // 3)
    return {"lower": range(1, 1 + width), "upper": range(1 + layers - width, 1 + layers)}


SMALLEST_EFFECT = 0.002


def erosion_verdict(
    lower: tuple[float, float, float], lower_less_upper: tuple[float, float, float]
) -> Literal["supported", "not supported", "underpowered"]:
    """The verdict on "tuning erodes familiar density in lower layers" from (value, low, high) of two changes of effective rank.

    Supported: both intervals lie below zero. Not supported: the lower third's interval excludes an erosion of
    `SMALLEST_EFFECT`, or the lower third's lies above the upper's. Else the data cannot tell.
    """
    if lower[2] < 0 and lower_less_upper[2] < 0:
        return "supported"
    if lower[1] > -SMALLEST_EFFECT or lower_less_upper[1] > 0:
        return "not supported"
    return "underpowered"
