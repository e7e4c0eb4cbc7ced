"""log P(continuation | prefix) of many requests under many mixtures, from one pass of each member.

A forward pass is made of every member that some mixture needs; all mixtures are rows over the logits of that one pass.
Requests that feed the same tokens share a row (the one-token choices of a question are one row), and logits are computed
for the scored positions only. Not covered yet: sharing a prefix's keys and values between different rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from proxytune.errors import UserError
from proxytune.mixture import Mixture, active, check_mixture, combine
from proxytune.modeling import ProxyTunedForCausalLM


class Request(NamedTuple):
    """Token ids: what is given, and what is scored after it."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """What a model must read to score the request: all but the last token."""
        return self.prefix + self.continuation[:-1]


@torch.inference_mode()
def score(
    model: ProxyTunedForCausalLM,
    requests: Sequence[Request],
    mixtures: Mapping[str, Mixture],
    *,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda requests_done: None,
) -> dict[str, Float[Tensor, " requests"]]:
    """For each mixture, the summed log-probability (nats, fp64) of every request's continuation.

    A batch holds at most `batch_tokens` tokens, padding counted, or one request. The result does not depend on it, nor
    on the order of the requests, beyond rounding. Raises `UserError` for an empty prefix or continuation and for a
    request that is longer than a member's window.
    """
    for mixture in mixtures.values():
        check_mixture(mixture, model.members)
    _check(requests, model.config.max_position_embeddings)
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        sharing.setdefault(request.fed, []).append(index)
    results = {name: torch.zeros(len(requests), dtype=torch.float64) for name in mixtures}
    for rows in _batches(sorted(sharing, key=len), batch_tokens):
        members = [index for row in rows for index in sharing[row]]
        kept = max(len(requests[index].continuation) for index in members)
        logits = _logits(model, rows, kept, mixtures)
        row_of, position_of, token_of, owner_of = _targets(rows, sharing, requests, kept)
        for name, mixture in mixtures.items():
            law = combine({member: logits[member] for member in active(mixture)}, mixture).log_softmax(-1)
            results[name].index_add_(0, owner_of, law[row_of, position_of, token_of].double().cpu())
        progress(len(members))
    return results


def _check(requests: Sequence[Request], window: int) -> None:
    for number, request in enumerate(requests):
        if not request.prefix or not request.continuation:
            raise UserError(f"requests: number {number} has an empty {'prefix' if not request.prefix else 'continuation'}; give it a token")
        if len(request.fed) > window:
            raise UserError(f"requests: number {number} has {len(request.fed)} tokens, a member's window only {window}; shorten it")


def _batches(rows: list[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Rows, sorted by length, in groups of at most `batch_tokens` tokens when padded."""
    batches: list[list[tuple[int, ...]]] = []
    for row in rows:
        if not batches or len(row) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _logits(
    model: ProxyTunedForCausalLM, rows: list[tuple[int, ...]], kept: int, mixtures: Mapping[str, Mixture]
) -> dict[str, Float[Tensor, "rows kept vocabulary"]]:
    """Each needed member's logits at the last `kept` positions; padding stands on the left, so these are the scored ones."""
    longest = max(map(len, rows))
    kept = min(kept, longest)
    pad = model.config.pad_token_id or 0
    input_ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=model.device)
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    names = dict.fromkeys(name for mixture in mixtures.values() for name in active(mixture))
    return model.member_logits(names, input_ids, attention_mask, logits_to_keep=kept)


def _targets(
    rows: list[tuple[int, ...]], sharing: Mapping[tuple[int, ...], list[int]], requests: Sequence[Request], kept: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every scored token: its row, its position among those kept, its id, and the request it belongs to."""
    kept = min(kept, max(map(len, rows)))
    found = [
        (row_number, kept - len(requests[index].continuation) + offset, token, index)
        for row_number, row in enumerate(rows)
        for index in sharing[row]
        for offset, token in enumerate(requests[index].continuation)
    ]
    row_of, position_of, token_of, owner_of = torch.tensor(found).unbind(1)
    return row_of, position_of, token_of, owner_of
