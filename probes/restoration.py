"""Where the damage of tuning is: parts of a tuned model are set back to the base, and the recovery is measured.

theta(S) is the tuned model with the blocks in S set to the base's weights. All 32 subsets of the five blocks give each block's Shapley
value: its share of (base - tuned), averaged over all orders in which blocks can be restored, because blocks interact. Further values:
`recovery` (one block restored) and its converse `damage` (all but one restored: the base with that block tuned). After Ye et al. 2025
(arXiv 2509.16596) there are also the p per cent of all parameters that changed most, against as many at random.

Controls for each block: the same number of random parameters outside it, and random parameters outside it with the same squared norm
of the change. A block that brings back no more than its controls is not special. Noise of equal strength everywhere can already
give the low block the largest share, because all later layers pass it on: so restore a model with `blocks.random_delta`, too.

Costs one measurement per restoration, 54 at most; restorations with the same weights are measured once. Memory: one more copy of the
weights, and eight bytes per parameter of the largest matrix. Not covered: ratios to (base - tuned), which mean nothing where that is
within noise; and whether the part that brings an answer back is where the answer was stored.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations
from math import comb
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from probes.internals.blocks import BLOCKS, blocks_of, change_of, check_same_shape, frobenius, put, weights_of
from proxytune.errors import UserError
from proxytune.member import Member

SHARES = (1, 5, 10, 20, 40, 60)  # per cent
SAMPLE = 2**22  # coordinates that thresholds are computed from; exact for models with at most so many parameters

Result = TypeVar("Result")


class Restoration(NamedTuple):
    """Which coordinates of the parameters `names` are set to the base's; all others stay the tuned model's.

    Every coordinate has a random key in [0, 1), drawn by the seed. Set back are those whose key is below `share`. With a `size`: those
    that changed by more than it, and of those that changed by exactly as much the ones whose key is below `share`.
    """

    names: frozenset[str]
    share: float = 1.0
    size: float | None = None
    seed: int = 0


class _Survey(NamedTuple):
    """For each block its number of parameters and the squared norm of their change; for sampled coordinates their block, key and |change|."""

    counts: dict[str, int]
    norms: dict[str, float]
    blocks: Int[np.ndarray, " sampled"]
    keys: Float[np.ndarray, " sampled"]
    changes: Float[np.ndarray, " sampled"]


def block_label(blocks: Collection[str]) -> str:
    """The label of a restoration of these blocks: `blocks/low+high`, or `blocks/none`."""
    return f"blocks/{'+'.join(block for block in BLOCKS if block in blocks) or 'none'}"


def restorations(base: Member, tuned: Member, seed: int = 0) -> dict[str, Restoration]:
    """The restorations that `restore` measures, by label, for these two models.

    `blocks/none` (the tuned model), `blocks/low`, … (all 32; with all blocks it is the base), `top/5` and `random/5` (per cent, for all
    of `SHARES`), `same-number/low` and `same-norm/low`. Labels of controls are missing for a block that is empty or did not change, and
    where the rest of the model is too small. Draws with one seed are nested: `random/5` contains `random/1`. Parameters that did not
    change are left out of `names`, so restorations with the same effect are equal. Raises `UserError` for models of different shapes.
    """
    check_same_shape(base, tuned)
    blocks = blocks_of(tuned.model)
    survey = _survey(base, tuned, blocks, seed)
    changed = {block: names for block, names in blocks.items() if survey.norms[block]}

    def of(within: Iterable[str], share: float = 1.0, size: float | None = None) -> Restoration:
        names = frozenset(name for block in within for name in changed.get(block, []))
        return Restoration(names, share, size, seed) if names else Restoration(names)

    plan = {block_label(subset): of(subset) for count in range(len(BLOCKS) + 1) for subset in combinations(BLOCKS, count)}
    everything = len(survey.keys)
    for percent in SHARES:
        number = max(1, round(everything * percent / 100))
        plan[f"top/{percent}"] = of(BLOCKS, *_most_changed(survey, number))
        plan[f"random/{percent}"] = of(BLOCKS, _share_of_lowest(survey.keys, number))
    for number_of_block, block in enumerate(BLOCKS):
        outside = [other for other in BLOCKS if other != block]
        keys, changes = survey.keys[survey.blocks != number_of_block], survey.changes[survey.blocks != number_of_block]
        count, norm = (sum(values[other] for other in outside) for values in (survey.counts, survey.norms))
        if block in changed and survey.counts[block] <= count:
            number = round(len(keys) * survey.counts[block] / count)
            plan[f"same-number/{block}"] = of(outside, _share_of_lowest(keys, number))
        if block in changed and survey.norms[block] <= norm:
            restored = np.cumsum(np.square(changes[np.argsort(keys)]))
            number = 1 + int(np.searchsorted(restored, restored[-1] * (survey.norms[block] / norm)))
            plan[f"same-norm/{block}"] = of(outside, _share_of_lowest(keys, number))
    return plan


def count_evaluations(plan: Mapping[str, Restoration]) -> int:
    """How many measurements `restore` makes."""
    return len(set(plan.values()))


def restore(
    base: Member,
    tuned: Member,
    plan: Mapping[str, Restoration],
    measure: Callable[[Member], Result],
    *,
    progress: Callable[[int], None] = lambda evaluations_done: None,
) -> dict[str, Result]:
    """The result of `measure` for each restoration. The tuned model is changed meanwhile and has its own weights again at the end, bit for bit.

    `measure` gets a new member each time, because a member caches the fingerprint of its weights. Labels of equal restorations share
    one result. Raises `UserError` for models of different shapes.
    """
    check_same_shape(base, tuned)
    own = weights_of(tuned.model)
    found: dict[Restoration, Result] = {}
    try:
        for restoration in dict.fromkeys(plan.values()):
            _set_back(tuned.model, base.model, own, restoration)
            try:
                found[restoration] = measure(Member(tuned.model, tuned.tokenizer))
            except UserError as error:
                raise UserError(f"{next(label for label, entry in plan.items() if entry == restoration)}: {error}") from error
            progress(1)
    finally:
        put(tuned.model, own)
    return {label: found[restoration] for label, restoration in plan.items()}


def shapley(values: Mapping[str, Shaped[np.ndarray, " items"]]) -> dict[str, Float[np.ndarray, " items"]]:
    """The Shapley value of each block and item, from the values by label (all 32 of `blocks/…`). The blocks' values sum to base - tuned.

    Positive: restoring the block raises the value, so tuning the block lowered it.
    """
    result = {}
    for block in BLOCKS:
        others = [other for other in BLOCKS if other != block]
        gains = [
            _difference(values, {*subset, block}, subset) / (len(BLOCKS) * comb(len(others), count))
            for count in range(len(others) + 1)
            for subset in combinations(others, count)
        ]
        result[block] = np.sum(gains, axis=0)
    return result


def recovery(values: Mapping[str, Shaped[np.ndarray, " items"]]) -> dict[str, Float[np.ndarray, " items"]]:
    """The gain from restoring each block alone: theta(block) - tuned."""
    return {block: _difference(values, [block], []) for block in BLOCKS}


def damage(values: Mapping[str, Shaped[np.ndarray, " items"]]) -> dict[str, Float[np.ndarray, " items"]]:
    """The loss from putting each tuned block into the base: base - theta(all but the block)."""
    return {block: _difference(values, BLOCKS, [other for other in BLOCKS if other != block]) for block in BLOCKS}


def _difference(values: Mapping[str, np.ndarray], more: Collection[str], less: Collection[str]) -> Float[np.ndarray, " items"]:
    return np.asarray(values[block_label(more)], float) - np.asarray(values[block_label(less)], float)


def _survey(base: Member, tuned: Member, blocks: Mapping[str, list[str]], seed: int) -> _Survey:
    before, after = (dict(member.model.named_parameters()) for member in (base, tuned))
    block_of = {name: number for number, block in enumerate(BLOCKS) for name in blocks[block]}
    total = sum(parameter.numel() for parameter in after.values())
    counts, norms = dict.fromkeys(BLOCKS, 0), dict.fromkeys(BLOCKS, 0.0)
    sampled: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, name in enumerate(sorted(after)):
        change = change_of(before[name].detach(), after[name].detach()).abs().flatten()
        counts[BLOCKS[block_of[name]]] += len(change)
        norms[BLOCKS[block_of[name]]] += frobenius(change) ** 2
        keys = _keys(seed, number, len(change))
        if total > SAMPLE:
            chosen = np.random.default_rng([seed, number, 1]).integers(len(change), size=max(1, round(len(change) * SAMPLE / total)))
            keys, change = keys[chosen], change[torch.from_numpy(chosen).to(change.device)]
        sampled.append((np.full(len(keys), block_of[name]), keys, change.double().cpu().numpy()))
    return _Survey(counts, norms, *(np.concatenate(column) for column in zip(*sampled, strict=True)))


def _most_changed(survey: _Survey, number: int) -> tuple[float, float | None]:
    """The share and size of a `Restoration` of the `number` most changed coordinates. Equal changes, common in half precision, are chosen by key."""
    size = float(np.partition(survey.changes, -number)[-number])
    if not size:
        return 1.0, None  # at most so many changed: all are restored
    return _share_of_lowest(survey.keys[survey.changes == size], number - int((survey.changes > size).sum())), size


def _share_of_lowest(keys: Float[np.ndarray, " keys"], number: int) -> float:
    """The value that exactly so many of the keys are below."""
    return float(np.partition(keys, number)[number]) if number < len(keys) else 1.0


@torch.no_grad()
def _set_back(model: PreTrainedModel, base: PreTrainedModel, own: Mapping[str, Tensor], restoration: Restoration) -> None:
    """Writes a restoration into the model, one matrix at a time. It does not matter what was written there before."""
    parameters, origin = dict(model.named_parameters()), dict(base.named_parameters())
    for number, name in enumerate(sorted(own)):
        value = own[name]
        if name in restoration.names:
            value = origin[name]
            if restoration.share < 1.0 or restoration.size is not None:
                value = torch.where(_chosen(restoration, number, value, own[name]), value.to(own[name].device), own[name])
        parameters[name].copy_(value)


def _chosen(restoration: Restoration, number: int, origin: Tensor, own: Tensor) -> Bool[Tensor, "*shape"]:
    drawn = torch.from_numpy(_keys(restoration.seed, number, own.numel()) < restoration.share).to(own.device).view_as(own)
    if restoration.size is None:
        return drawn
    change = change_of(origin, own).abs()
    return (change > restoration.size) | ((change == restoration.size) & drawn)


def _keys(seed: int, number: int, count: int) -> Float[np.ndarray, " {count}"]:
    """The keys of a parameter's coordinates; `number` is its index in the order of names. Each has its own random stream."""
    return np.random.default_rng([seed, number]).random(count)
