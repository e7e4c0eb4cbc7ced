"""What density would be without anything learnt: the standards that `density` and `erosion` are read against.

Gaussian vectors with the layer's own mean and covariance give the scale of one vector; an untrained model of the same shape
shows what the input alone does. A random rotation is a site of `density`, and noise of the tuning's own size is
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
    """For every metric, `mean` and `sd` by state of vectors drawn from the normal law with these moments.

    The sd is of one vector: it is the unit in which differences of density are small or large. States are drawn one by one.
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
    """A model of the same configuration as it is before its first step, in fp32 on the same device."""
    set_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float32).eval().to(model.device)
