"""Prompts of a member's own: a tuned chat model reads its template, the base reads plain text; the answer is shared.

The caller gives the token ids; nothing is inferred from a model's name.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from proxytune.errors import UserError
from proxytune.padding import left_padded, positions_of


class OwnPrompts(NamedTuple):
    """For some members, the prompts that they read instead of the first `columns` columns of the shared token ids."""

    columns: int
    ids: dict[str, Int[Tensor, "rows _"]]
    masks: dict[str, Int[Tensor, "rows _"]]


class Reading(NamedTuple):
    """The input of one member: token ids, the attention mask over cached and new tokens, and the new tokens' positions."""

    input_ids: Int[Tensor, "rows time"]
    attention_mask: Int[Tensor, "rows all_time"] | None
    position_ids: Int[Tensor, "rows time"] | None


def own_prompts(prompts: Mapping[str, Sequence[Sequence[int]]], columns: int, rows: int, pad: int, device: torch.device) -> OwnPrompts:
    """From token ids: for each member one prompt per row. Raises `UserError` for a wrong number of prompts and an empty one."""
    for name, given in prompts.items():
        if len(given) != rows:
            raise UserError(f"prompts: '{name}' has {len(given)} for {rows} rows; give one for each row")
        if not all(len(prompt) for prompt in given):
            raise UserError(f"prompts: one of '{name}' is empty; give it a token")
    padded = {name: left_padded(given, pad, device) for name, given in prompts.items()}
    return OwnPrompts(columns, {name: ids for name, (ids, _) in padded.items()}, {name: mask for name, (_, mask) in padded.items()})


def reading(
    name: str,
    ids: Int[Tensor, "rows time"],
    mask: Int[Tensor, "rows all_time"] | None,
    positions: Int[Tensor, "rows time"] | None,
    prompts: OwnPrompts | None,
) -> Reading:
    """The member's input for the shared tokens `ids`; the width of `mask` says how many tokens came before them.

    A mask is needed for an own prompt. Where rows were repeated (beams, samples), their own prompts are repeated too. Raises
    `UserError` where the shared prompt comes in pieces, because then no piece can be replaced by the own prompt.
    """
    if prompts is None or name not in prompts.ids:
        if positions is None and mask is not None:
            positions = positions_of(mask)[:, -ids.shape[1] :]
        return Reading(ids, mask, positions)
    assert mask is not None
    before = mask.shape[1] - ids.shape[1]
    repeats = len(ids) // len(prompts.ids[name])
    own = torch.cat([prompts.masks[name].repeat_interleave(repeats, 0), mask[:, prompts.columns :].long()], dim=1)
    if before == 0:
        ids = torch.cat([prompts.ids[name].repeat_interleave(repeats, 0), ids[:, prompts.columns :]], dim=1)
    elif before < prompts.columns:
        raise UserError(f"prompts: '{name}' has its own, so the shared prompt must be read in one piece; leave prefill_chunk_size out")
    return Reading(ids, own, positions_of(own)[:, -ids.shape[1] :])
