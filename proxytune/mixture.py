"""Mixtures: rows of coefficients over members, and the logits that follow from them.

A mixture's next-token distribution is the softmax of the weighted sum of its members' logits. Proxy-tuning (Liu et al. 2024,
arXiv 2401.08565, eq. 1) with strength alpha is {base: 1, expert: alpha, antiexpert: -alpha}; a model by itself is the
row {name: 1}. A coefficient may be a function of its context (position, row, logits), and a `Rule` adds options that coefficients
cannot express, such as a bias on the vocabulary. Pure functions on tensors; no models here. `rules` has the published mixtures by name.
"""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proxytune.bias import Bias
from proxytune.errors import UserError, brief


class Context(NamedTuple):
    """What a coefficient may depend on."""

    logits: Mapping[str, Float[Tensor, "*batch vocabulary"]]
    position: Int[Tensor, "*batch"]  # of the next token; 0 is the first after the prompt
    row: Int[Tensor, "*batch"]  # in the batch, or the request's number
    rows: int  # how many there are


Coefficient = int | float | Callable[[Context], Float[Tensor, "*batch"]]
Row = Mapping[str, Coefficient]


@dataclass(frozen=True)
class Rule:
    """A row of coefficients with options beyond adding logits.

    `plausible` (member, share): tokens that the member gives less than `share` of its best token's probability are
    forbidden (Li et al. 2023, arXiv 2210.15097, eq. 2). In the space of `probabilities` the members' distributions are
    averaged with the coefficients as weights, which must not be negative and sum to 1. The `bias` is added to the sum at every
    step; a token that it bans has probability 0, and is not the best token of `plausible`.
    """

    row: Row
    plausible: tuple[str, float] | None = None
    space: Literal["logits", "probabilities"] = "logits"
    bias: Bias | None = None


Mixture = Row | Rule
LARGEST = torch.finfo(torch.float32).max


def proxy_tuning(alpha: Coefficient) -> dict[str, Coefficient]:
    """The proxy-tuning row: base + alpha * (expert - antiexpert)."""
    return {"base": 1.0} | pair(alpha, "expert", "antiexpert")


def pair(alpha: Coefficient, expert: str, antiexpert: str) -> dict[str, Coefficient]:
    """The part of a row that adds alpha * (expert - antiexpert)."""
    negative: Coefficient = (lambda context: -alpha(context)) if callable(alpha) else -alpha
    return {expert: alpha, antiexpert: negative}


def active(mixture: Mixture) -> dict[str, Coefficient]:
    """The members that have to run, with their coefficients: 0 for one that only `plausible` needs."""
    row = mixture.row if isinstance(mixture, Rule) else mixture
    found = {name: value if callable(value) else float(value) for name, value in row.items() if callable(value) or value != 0}
    if isinstance(mixture, Rule) and mixture.plausible:
        found.setdefault(mixture.plausible[0], 0.0)
    return found


def bias_of(mixture: Mixture) -> Bias | None:
    """The bias that is added to the members' sum; None if there is none."""
    return mixture.bias if isinstance(mixture, Rule) else None


def biased(logits: Float[Tensor, "*batch vocabulary"], mixture: Mixture) -> Float[Tensor, "*batch vocabulary"]:
    """The logits (fp32) plus the mixture's bias, if it has one."""
    bias = bias_of(mixture)
    return logits if bias is None else logits + bias.values.to(logits.device)


def depends_on_context(mixture: Mixture) -> bool:
    """Whether some coefficient is a function."""
    return any(callable(value) for value in active(mixture).values())


def check_mixture(mixture: Mixture, members: Iterable[str], vocabulary: int) -> None:
    """Raises `UserError` unless every coefficient is finite or a function, every member known, some coefficient positive, and a bias as long as
    the vocabulary."""
    members = list(members)
    row = mixture.row if isinstance(mixture, Rule) else mixture
    for name, coefficient in row.items():
        if name not in members:
            raise UserError(f"mixture: member '{name}' is not loaded; the members are {', '.join(members)}")
        if callable(coefficient):
            continue
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not abs(coefficient) <= sys.float_info.max:
            raise UserError(f"mixture: the coefficient of '{name}' must be a finite number, not {brief(coefficient)}")
    if not any(callable(coefficient) or coefficient > 0 for coefficient in row.values()):
        raise UserError(f"mixture: at least one coefficient must be positive, not {dict(row)}")
    if not isinstance(mixture, Rule):
        return
    if mixture.bias is not None and len(mixture.bias.values) != vocabulary:
        raise UserError(f"bias: it must have one number for each of the {vocabulary} tokens, not {len(mixture.bias.values)}")
    if mixture.plausible is not None:
        name, share = mixture.plausible
        if name not in members:
            raise UserError(f"plausible: member '{name}' is not loaded; the members are {', '.join(members)}")
        if not 0 < share <= 1:
            raise UserError(f"plausible: the share of the best token's probability must be in (0, 1], not {share!r}")
    if mixture.space == "probabilities":
        numbers = [value for value in row.values() if not callable(value)]
        if min(numbers, default=0) < 0 or (len(numbers) == len(row) and not math.isclose(sum(numbers), 1)):
            raise UserError(f"mixture: weights of probabilities must not be negative and sum to 1, not {dict(row)}")


def combine(
    logits: Mapping[str, Float[Tensor, "*batch vocabulary"]], mixture: Mixture, context: Context | None = None
) -> Float[Tensor, "*batch vocabulary"]:
    """The mixture's logits, in fp32, from its members' logits. `context` is needed where a coefficient is a function.

    A member with a negative coefficient is subtracted from the last positive one of the same size before the sum is
    taken, so that an expert equal to its anti-expert leaves the base as it is, bit for bit.

    A token at -inf in a member with a positive coefficient stays at -inf. Where a subtracted member has a token at -inf, its
    lowest finite logit is used instead; where its partner has -inf too, so is the partner's. So a token that only the
    anti-expert forbids is favoured by a finite amount. Logits that are finite or -inf never give NaN or +inf: values beyond
    fp32 become its largest or smallest finite number. NaN and +inf in a member's logits are passed on.
    """
    rule = mixture if isinstance(mixture, Rule) else Rule(mixture)
    row = {name: _evaluated(name, value, context) for name, value in active(rule.row).items()}
    if rule.space == "probabilities":
        total = torch.stack([_weighted_log(logits[name].float().log_softmax(-1), value) for name, value in row.items()]).logsumexp(0)
    else:
        total = _sum({name: logits[name].float() for name in row}, row)
        if list(row.values()) != [1.0] and not _in_range(total, logits, row):
            # In fp64 no product of two fp32 numbers overflows, so a value that is not finite there comes from a member.
            exact = _sum({name: logits[name].double() for name in row}, row)
            saturated = torch.where(exact.isfinite(), exact.clamp(-LARGEST, LARGEST), exact).float()
            total = torch.where(total.isfinite(), total, saturated)
    if rule.plausible is not None:
        name, share = rule.plausible
        judge = logits[name].float()
        if rule.bias is not None:
            judge = judge.masked_fill(rule.bias.values.isneginf().to(judge.device), -torch.inf)
        total = total.masked_fill(judge < judge.amax(-1, keepdim=True) + math.log(share), -torch.inf)
    return biased(total, rule)


def _sum(logits: Mapping[str, Float[Tensor, "*batch vocabulary"]], row: Mapping[str, float | Tensor]) -> Float[Tensor, "*batch vocabulary"]:
    singles, pairs = _pair(row)
    terms = [_signed(logits[name], value) for name, value in singles]
    terms += [_difference(logits[plus], logits[minus], value) for plus, minus, value in pairs]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _in_range(
    total: Float[Tensor, "*batch vocabulary"], logits: Mapping[str, Float[Tensor, "*batch vocabulary"]], row: Mapping[str, float | Tensor]
) -> bool:
    """Whether all of the sum is finite, or -inf where a member with a positive coefficient forbids the token."""
    if bool(total.sum().isfinite()):  # faster than checking each
        return True
    finite = total.isfinite()
    for name, value in row.items():
        if isinstance(value, float) and value > 0:
            finite |= total.isneginf() & logits[name].isneginf()
    return bool(finite.all())


def _evaluated(name: str, coefficient: Coefficient, context: Context | None) -> float | Float[Tensor, "*batch 1"]:
    if not callable(coefficient):
        return min(max(float(coefficient), -LARGEST), LARGEST)
    if context is None:
        raise UserError(f"mixture: the coefficient of '{name}' is a function, but its context is not known here; give a number")
    return coefficient(context).float().clamp(-LARGEST, LARGEST)[..., None]


def _pair(row: Mapping[str, float | Tensor]) -> tuple[list[tuple[str, float | Tensor]], list[tuple[str, str, float | Tensor]]]:
    singles = dict(row)
    pairs = []
    for minus, coefficient in row.items():
        partners = [name for name, other in singles.items() if name != minus and _opposite(other, coefficient)]
        if partners and minus in singles:
            pairs.append((partners[-1], minus, singles[partners[-1]]))
            del singles[partners[-1]], singles[minus]
    return list(singles.items()), pairs


def _opposite(plus: float | Tensor, minus: float | Tensor) -> bool:
    if isinstance(plus, Tensor) and isinstance(minus, Tensor):
        # A function may change its sign: the first of the two counts as the expert.
        return torch.equal(plus, -minus)
    return isinstance(plus, float) and isinstance(minus, float) and minus < 0 and plus == -minus


def _signed(logits: Float[Tensor, "*batch vocabulary"], coefficient: float | Tensor) -> Float[Tensor, "*batch vocabulary"]:
    """coefficient * logits; with a negative coefficient -inf counts as the lowest finite logit."""
    if isinstance(coefficient, float):
        return coefficient * (logits if coefficient > 0 else _raised(logits))
    # 0 * -inf is avoided too: where a function is zero, the member has no effect.
    raised = _raised(logits)
    return torch.where(coefficient > 0, coefficient.clamp(min=torch.finfo(torch.float32).tiny) * logits, coefficient * raised)


def _difference(
    plus: Float[Tensor, "*batch vocabulary"], minus: Float[Tensor, "*batch vocabulary"], coefficient: float | Tensor
) -> Float[Tensor, "*batch vocabulary"]:
    """coefficient * (plus - minus); -inf in `minus` counts as the lowest finite logit."""
    if isinstance(coefficient, Tensor):
        ahead, behind = _difference(plus, minus, 1.0), _difference(minus, plus, 1.0)
        tiny = torch.finfo(torch.float32).tiny
        return torch.where(
            coefficient > 0,
            coefficient.clamp(min=tiny) * ahead,
            torch.where(coefficient < 0, (-coefficient).clamp(min=tiny) * behind, torch.zeros_like(plus)),
        )
    forbidden = torch.isneginf(minus)
    if not forbidden.any():
        return coefficient * (plus - minus)
    both = forbidden & torch.isneginf(plus)
    return coefficient * (torch.where(both, _lowest_finite(plus), plus) - torch.where(forbidden, _lowest_finite(minus), minus))


def _weighted_log(log_probabilities: Float[Tensor, "*batch vocabulary"], weight: float | Tensor) -> Float[Tensor, "*batch vocabulary"]:
    return log_probabilities + (math.log(weight) if isinstance(weight, float) else weight.log())


def _raised(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    forbidden = torch.isneginf(logits)
    return torch.where(forbidden, _lowest_finite(logits), logits) if forbidden.any() else logits


def _lowest_finite(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch 1"]:
    return torch.where(torch.isneginf(logits), torch.inf, logits).amin(-1, keepdim=True)
