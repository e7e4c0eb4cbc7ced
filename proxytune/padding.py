"""Rows of different lengths as one batch. Padding is on the left, so that every row's last token is in the last column."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Int[Tensor, "rows time"], Int[Tensor, "rows time"]]:
    """Token ids and attention mask (1 where there is a token)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long, device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long, device=device)
    return ids, mask


def positions_of(mask: Int[Tensor, "rows time"]) -> Int[Tensor, "rows time"]:
    """Each token's position in its own row, counted from the attention mask; padding has position 0 or that of the token before it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def has_several_texts(positions: Int[Tensor, "#rows time"], mask: Int[Tensor, "rows all_time"] | None = None) -> bool:
    """Whether some row holds several texts end to end: its positions do not always go up by one."""
    steps = positions[:, 1:] - positions[:, :-1] != 1
    if mask is not None:
        tokens = mask[:, -positions.shape[1] :].bool()
        steps = steps & tokens[:, 1:] & tokens[:, :-1]
    return bool(steps.any())
