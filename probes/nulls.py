"""Density without learning: reference values for `density` and `erosion`.

Gaussian vectors with the layer's mean and covariance give the spread of a single vector. An untrained model of the same shape
shows the effect of the input alone. A random rotation is a site of `density`; noise of the tuning's norm is
`blocks.random_delta`.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from probes.density import density

DRAWS = 1000


def gaussian_null(
    mean: Float[Tensor, "states hidden"], covariance: Float[Tensor, "states hidden hidden"], seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """For every metric, `mean` and `sd` by state, of vectors drawn from the normal distribution with these moments.

    The sd is that of a single vector; differences of density can be compared with it. States are drawn one after the other.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, list[float]]] = {}
    for centre, spread in zip(mean.double().cpu(), covariance.double().cpu(), strict=True):
        values, vectors = torch.linalg.eigh(spread)
        noise = torch.randn(DRAWS, len(centre), generator=generator, dtype=torch.float64) * values.clamp(min=0).sqrt()
        for metric, drawn in density(centre + noise @ vectors.T).items():
            entry = found.setdefault(metric, {"mean": [], "sd": []})
            entry["mean"].append(float(drawn.mean()))
            entry["sd"].append(float(drawn.std()))
    return found


def untrained_twin(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A model of the same configuration before its first training step, in fp32 on the same device."""
    set_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32).eval().to(model.device)
