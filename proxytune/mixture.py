"""Mixtures: rows of coefficients over members, and the logits that follow from them.

A mixture's next-token law is the softmax of the weighted sum of its members' logits. Proxy-tuning (Liu et al. 2024,
arXiv 2401.08565, eq. 1) with strength alpha is {base: 1, expert: alpha, antiexpert: -alpha}; a model by itself is the
row {name: 1}. Pure functions on tensors; no models here.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from proxytune.errors import UserError

Mixture = Mapping[str, int | float]


def proxy_tuning(alpha: float) -> dict[str, float]:
    """The proxy-tuning row: base + alpha * (expert - antiexpert)."""
    return {"base": 1.0, "expert": alpha, "antiexpert": -alpha}


def active(mixture: Mixture) -> dict[str, float]:
    """The members with a non-zero coefficient: the only ones that have to run."""
    return {name: float(coefficient) for name, coefficient in mixture.items() if coefficient != 0}


def check_mixture(mixture: Mixture, members: Iterable[str]) -> None:
    """Raises `UserError` unless every coefficient is finite, every member is known and some coefficient is positive."""
    members = list(members)
    for name, coefficient in mixture.items():
        if name not in members:
            raise UserError(f"mixture: member '{name}' is not loaded; the members are {', '.join(members)}")
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not math.isfinite(coefficient):
            raise UserError(f"mixture: the coefficient of '{name}' must be a finite number, not {coefficient!r}")
    if not any(coefficient > 0 for coefficient in mixture.values()):
        raise UserError(f"mixture: at least one coefficient must be positive, not {dict(mixture)}")


def combine(logits: Mapping[str, Float[Tensor, "*batch vocabulary"]], mixture: Mixture) -> Float[Tensor, "*batch vocabulary"]:
    """The mixture's logits, in fp32, from its members' logits.

    A member with a negative coefficient is subtracted from the last positive one of the same size before the sum is
    taken, so that an expert equal to its anti-expert leaves the base as it is, bit for bit.

    A token at -inf in a member with a positive coefficient stays at -inf. A member that is subtracted counts a token it
    forbids as if that token had the member's lowest finite logit, and so does its partner where both forbid it: a token
    that nobody but the anti-expert forbids is favoured by a finite amount. No NaN and no +inf can arise.
    """
    singles, pairs = _pair(active(mixture))
    terms = [coefficient * _for_sign(logits[name].float(), coefficient) for name, coefficient in singles]
    terms += [coefficient * _difference(logits[plus].float(), logits[minus].float()) for plus, minus, coefficient in pairs]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _pair(mixture: dict[str, float]) -> tuple[list[tuple[str, float]], list[tuple[str, str, float]]]:
    singles = dict(mixture)
    pairs = []
    for minus, coefficient in mixture.items():
        partners = [name for name, other in singles.items() if coefficient < 0 and other == -coefficient]
        if partners:
            pairs.append((partners[-1], minus, -coefficient))
            del singles[partners[-1]], singles[minus]
    return list(singles.items()), pairs


def _difference(plus: Float[Tensor, "*batch vocabulary"], minus: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    forbidden = torch.isneginf(minus)
    if not forbidden.any():
        return plus - minus
    both = forbidden & torch.isneginf(plus)
    return torch.where(both, _lowest_finite(plus), plus) - torch.where(forbidden, _lowest_finite(minus), minus)


def _for_sign(logits: Float[Tensor, "*batch vocabulary"], coefficient: float) -> Float[Tensor, "*batch vocabulary"]:
    forbidden = torch.isneginf(logits)
    if coefficient > 0 or not forbidden.any():
        return logits
    return torch.where(forbidden, _lowest_finite(logits), logits)


def _lowest_finite(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch 1"]:
    return torch.where(torch.isneginf(logits), torch.inf, logits).amin(-1, keepdim=True)
