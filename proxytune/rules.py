"""Published ways of combining models at decoding time, each as a row of coefficients or a `Rule`.

Proxy-tuning itself is `mixture.proxy_tuning`. DExperts (Liu et al. 2021, arXiv 2105.03023) is the same row; several pairs
are joined by `pair`: {"base": 1} | pair(.5, "expert", "antiexpert") | pair(1, "safe", "unsafe"). An expert without
an anti-expert is {"base": 1, "expert": alpha}, a product of distributions (GenARM: Xu et al. 2025, arXiv 2410.08193).
Options of `generate` (temperature, top-k, top-p, penalties) apply to the mixture.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from proxytune.errors import UserError
from proxytune.mixture import Coefficient, Context, Rule


def contrastive(beta: float, share: float = 0.1, expert: str = "base", amateur: str = "antiexpert") -> Rule:
    """(1 + beta) expert - beta amateur over what the expert finds plausible (O'Brien & Lewis 2023, arXiv 2309.09117)."""
    return Rule({expert: 1.0 + beta, amateur: -beta}, plausible=(expert, share))


def realignment(strength: float, reference: str = "base", aligned: str = "expert") -> dict[str, float]:
    """(1 - strength) reference + strength aligned: how far a tuned model is aligned (Liu et al. 2024, arXiv 2402.02992).

    0 is the reference, 1 the aligned model; beyond 1 extrapolates.
    """
    return {reference: 1.0 - strength, aligned: strength}


def interpolation(weights: Mapping[str, float]) -> Rule:
    """The average of the members' distributions (not of their logits), as in a language model with a separate memory."""
    return Rule(weights, space="probabilities")


def per_row(values: Sequence[float]) -> Coefficient:
    """A coefficient for each row of a batch, or for each scored request; beams and repeated samples share their row's."""

    def coefficient(context: Context) -> Float[Tensor, "*batch"]:
        if context.rows % len(values):
            raise UserError(f"per_row: there are {len(values)} values for {context.rows} rows; give one for each row")
        return torch.tensor(values, device=context.row.device, dtype=torch.float32)[context.row // (context.rows // len(values))]

    return coefficient


def decaying(alpha: float, half_life: float) -> Coefficient:
    """alpha at the first token of the answer, half of it `half_life` tokens later: for style, which is set early."""
    return lambda context: alpha * torch.exp2(-context.position / half_life)


def by_entropy(alpha: float, member: str = "base") -> Coefficient:
    """alpha times the entropy of the member's distribution as a share of its maximum: more where the member is unsure."""

    def coefficient(context: Context) -> Float[Tensor, "*batch"]:
        probabilities = _logits(context, member).softmax(-1)
        return alpha * torch.special.entr(probabilities).sum(-1) / math.log(probabilities.shape[-1])

    return coefficient


def when_unsure(alpha: float, confidence: float = 0.4, member: str = "base") -> Coefficient:
    """alpha where the member's best token has less than `confidence`, else 0: the trigger of nudging (Fei et al. 2025, arXiv 2410.09300)."""
    return lambda context: alpha * (_logits(context, member).softmax(-1).amax(-1) < confidence)


def _logits(context: Context, member: str) -> Float[Tensor, "*batch vocabulary"]:
    if member not in context.logits:
        raise UserError(f"mixture: a coefficient looks at '{member}', which the mixture leaves out; give it a coefficient")
    return context.logits[member].float()
