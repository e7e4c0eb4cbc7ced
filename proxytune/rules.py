"""Published ways of combining models at decoding time, each as a row of coefficients or a `Rule`.

Proxy-tuning itself is `mixture.proxy_tuning`. DExperts (Liu et al. 2021, arXiv 2105.03023) is the same row; several pairs
are rows joined by `pair`: {"base": 1} | pair(.5, "expert", "antiexpert") | pair(1, "safe", "unsafe"). An expert without
an anti-expert is {"base": 1, "expert": alpha}, a product of laws (Xu et al. 2025, arXiv 2410.08193, call it GenARM).
Whatever `generate` is asked for (temperature, top-k, top-p, penalties) applies to the mixture.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from proxytune.errors import UserError
from proxytune.mixture import Coefficient, Place, Rule


def contrastive(beta: float, share: float = 0.1, expert: str = "base", amateur: str = "antiexpert") -> Rule:
    """(1 + beta) expert - beta amateur over what the expert finds plausible (O'Brien & Lewis 2023, arXiv 2309.09117)."""
    return Rule({expert: 1.0 + beta, amateur: -beta}, plausible=(expert, share))


def realignment(strength: float, reference: str = "base", aligned: str = "expert") -> dict[str, float]:
    """(1 - strength) reference + strength aligned: how far a tuned model is aligned (Liu et al. 2024, arXiv 2402.02992).

    0 is the reference, 1 the aligned model; beyond 1 extrapolates.
    """
    return {reference: 1.0 - strength, aligned: strength}


def interpolation(weights: Mapping[str, float]) -> Rule:
    """The average of the members' laws (not of their logits), as a language model with a memory beside it is made."""
    return Rule(weights, space="probabilities")


def per_row(values: Sequence[float]) -> Coefficient:
    """A coefficient for each row of a batch, or for each scored request; beams and repeated samples share their row's."""

    def coefficient(place: Place) -> Float[Tensor, "*batch"]:
        if place.rows % len(values):
            raise UserError(f"per_row: there are {len(values)} values for {place.rows} rows; give one for each row")
        return torch.tensor(values, device=place.row.device, dtype=torch.float32)[place.row // (place.rows // len(values))]

    return coefficient


def decaying(alpha: float, half_life: float) -> Coefficient:
    """alpha at the first token of the answer, half of it `half_life` tokens later: where style is set early."""
    return lambda place: alpha * torch.exp2(-place.position / half_life)


def by_entropy(alpha: float, member: str = "base") -> Coefficient:
    """alpha times the entropy of the member's law as a share of the highest possible: more where it does not know."""

    def coefficient(place: Place) -> Float[Tensor, "*batch"]:
        law = _logits(place, member).softmax(-1)
        return alpha * torch.special.entr(law).sum(-1) / math.log(law.shape[-1])

    return coefficient


def when_unsure(alpha: float, confidence: float = 0.4, member: str = "base") -> Coefficient:
    """alpha where the member's best token has less than `confidence`, else 0: the trigger of nudging (Fei et al. 2025, arXiv 2410.09300)."""
    return lambda place: alpha * (_logits(place, member).softmax(-1).amax(-1) < confidence)


def _logits(place: Place, member: str) -> Float[Tensor, "*batch vocabulary"]:
    if member not in place.logits:
        raise UserError(f"mixture: a coefficient looks at '{member}', which the mixture leaves out; give it a coefficient")
    return place.logits[member].float()
