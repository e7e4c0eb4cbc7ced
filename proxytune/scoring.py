"""log P(continuation | prefix) of many requests under many mixtures, from one pass of each member.

A forward pass is made of every member that some mixture needs; all mixtures are rows over the logits of that one pass.
What requests have in common is read once: the tokens that all of them begin with (few-shot examples, instructions), then
each distinct prefix, then its continuations. Logits are computed for the scored positions only, a bounded number at a time.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.mixture import Mixture, active, check_mixture, combine
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded

Ids = tuple[int, ...]
Thing = TypeVar("Thing")
HELD = 8  # a batch may hold the keys and values of this many times the tokens that it may feed


class Request(NamedTuple):
    """Token ids: what is given, and what is scored after it."""

    prefix: Ids
    continuation: Ids


class _Read(NamedTuple):
    """Rows that the members have read: their keys and values, where they hold tokens, and how many tokens each holds."""

    cache: MixtureCache
    mask: Int[Tensor, "rows time"]
    lengths: Int[Tensor, " rows"]


@torch.inference_mode()
def score(
    model: ProxyTunedForCausalLM,
    requests: Sequence[Request],
    mixtures: Mapping[str, Mixture],
    *,
    batch_tokens: int = 2048,
    share_prefixes: bool = True,
    progress: Callable[[int], None] = lambda requests_done: None,
) -> dict[str, Float[Tensor, " requests"]]:
    """For each mixture, the summed log-probability (nats, fp64) of every request's continuation.

    A batch feeds at most `batch_tokens` tokens, padding counted, or one row. The result does not depend on it, nor on
    the order of the requests or on `share_prefixes`, beyond rounding. Members whose caches do not keep every position
    (sliding windows, recurrent states) are read without sharing. Raises `UserError` for an empty prefix or continuation
    and for a request that is longer than a member's window.
    """
    for mixture in mixtures.values():
        check_mixture(mixture, model.members)
    _check(requests, model.config.max_position_embeddings)
    totals = {name: torch.zeros(len(requests), dtype=torch.float64) for name in mixtures}
    if not requests:
        return totals
    names = list(dict.fromkeys(name for mixture in mixtures.values() for name in active(mixture)))
    if share_prefixes and model.new_cache(names).keeps_everything:
        groups = _shared(model, names, requests, batch_tokens)
    else:
        groups = _apart(model, names, requests, batch_tokens)
    for logits, scored in groups:
        _add_up(totals, logits, scored, mixtures)
        progress(sum(target.last for target in scored))
    return totals


class _Target(NamedTuple):
    """A scored token: where its logits are, which it is, whose it is, and whether it is its request's last."""

    row: int
    position: int
    token: int
    request: int
    last: bool


Scored = tuple[dict[str, Float[Tensor, "rows kept vocabulary"]], list[_Target]]


def _add_up(totals: dict[str, Tensor], logits: dict[str, Tensor], scored: list[_Target], mixtures: Mapping[str, Mixture]) -> None:
    """Adds the log-probabilities of the scored tokens to their requests', for every mixture."""
    places = sorted({(target.row, target.position) for target in scored})
    number = {place: index for index, place in enumerate(places)}
    rows, positions = torch.tensor(places).unbind(1)
    needed = {name: law[rows, positions] for name, law in logits.items()}
    where = torch.tensor([number[target.row, target.position] for target in scored])
    tokens = torch.tensor([target.token for target in scored])
    owners = torch.tensor([target.request for target in scored])
    for name, mixture in mixtures.items():
        mixed = combine({member: needed[member] for member in active(mixture)}, mixture)
        totals[name].index_add_(0, owners, (mixed[where, tokens] - mixed.logsumexp(-1)[where]).double().cpu())


def _shared(model: ProxyTunedForCausalLM, names: list[str], requests: Sequence[Request], batch_tokens: int) -> Iterator[Scored]:
    """Reads common beginning, prefixes and continuations once each."""
    owners: dict[Ids, list[int]] = {}
    for index, request in enumerate(requests):
        owners.setdefault(request.prefix, []).append(index)
    # At least one token of every prefix is left to be fed: its logits are the first continuation tokens'.
    common = min(_common(owners), min(map(len, owners)) - 1) if len(owners) > 1 else 0
    beginning = _read(model, names, None, [next(iter(owners))[:common]])[1] if common else None
    for prefixes in _batches(sorted(owners, key=len), batch_tokens, lambda prefix: max(len(prefix) - common, -(-len(prefix) // HELD))):
        start = None if beginning is None else _select(beginning, [0] * len(prefixes))
        logits, read = _read(model, names, start, [prefix[common:] for prefix in prefixes], kept=1)
        firsts = [(row, index) for row, prefix in enumerate(prefixes) for index in owners[prefix]]
        yield logits, [_Target(row, 0, requests[index].continuation[0], index, len(requests[index].continuation) == 1) for row, index in firsts]
        # Continuations that feed the same tokens after one prefix share a row.
        fed: dict[tuple[int, Ids], list[int]] = {}
        for row, index in firsts:
            if len(requests[index].continuation) > 1:
                fed.setdefault((row, requests[index].continuation[:-1]), []).append(index)
        cost = functools.partial(_continuation_cost, prefixes)
        for rows in _batches(sorted(fed, key=lambda key: len(key[1])), batch_tokens, cost):
            kept = max(len(tokens) for _, tokens in rows)
            logits, _ = _read(model, names, _select(read, [row for row, _ in rows]), [tokens for _, tokens in rows], kept=kept)
            yield (
                logits,
                [
                    target
                    for number, key in enumerate(rows)
                    for index in fed[key]
                    for target in _targets(number, kept, index, requests[index].continuation[1:])
                ],
            )


def _common(prefixes: Collection[Ids]) -> int:
    """How many tokens all prefixes begin with: as many as the first and the last of them in order."""
    first, last = min(prefixes), max(prefixes)
    return next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))


def _continuation_cost(prefixes: Sequence[Ids], key: tuple[int, Ids]) -> int:
    row, tokens = key
    return max(len(tokens), -(-(len(prefixes[row]) + len(tokens)) // HELD))


def _targets(row: int, kept: int, index: int, tokens: Ids) -> list[_Target]:
    """A request's last tokens as targets, where the last of the `kept` logits of its row are those of its last token."""
    return [_Target(row, kept - len(tokens) + place, token, index, place == len(tokens) - 1) for place, token in enumerate(tokens)]


def _apart(model: ProxyTunedForCausalLM, names: list[str], requests: Sequence[Request], batch_tokens: int) -> Iterator[Scored]:
    """Reads every distinct row of tokens in full: slower, and what sharing is tested against."""
    owners: dict[Ids, list[int]] = {}
    for index, request in enumerate(requests):
        owners.setdefault(request.prefix + request.continuation[:-1], []).append(index)
    for rows in _batches(sorted(owners, key=len), batch_tokens, len):
        kept = min(max(len(requests[index].continuation) for row in rows for index in owners[row]), len(rows[-1]))
        logits, _ = _read(model, names, None, rows, kept=kept)
        found = [(number, index) for number, row in enumerate(rows) for index in owners[row]]
        yield logits, [target for number, index in found for target in _targets(number, kept, index, requests[index].continuation)]


def _read(
    model: ProxyTunedForCausalLM, names: list[str], start: _Read | None, segments: Sequence[Ids], kept: int = 1
) -> tuple[dict[str, Float[Tensor, "rows kept vocabulary"]], _Read]:
    """Feeds one segment a row after what the rows have read; padding stands on the left of the segment, masked out.

    Returns the members' logits at the last `kept` positions, and what has then been read.
    """
    ids, held = left_padded(segments, model.config.pad_token_id or 0, model.device)
    if start is None:
        start = _Read(model.new_cache(names), held[:, :0], torch.zeros(len(segments), dtype=torch.long, device=model.device))
    mask = torch.cat([start.mask, held], dim=1)
    positions = (start.lengths[:, None] + held.cumsum(1) - 1).clamp(min=0)
    logits = model.member_logits(names, ids, mask, positions, start.cache, min(kept, ids.shape[1]))
    return logits, _Read(start.cache, mask, start.lengths + held.sum(1))


def _select(read: _Read, rows: list[int]) -> _Read:
    index = torch.tensor(rows, device=read.mask.device)
    return _Read(read.cache.select_rows(index), read.mask[index], read.lengths[index])


def _batches(things: Sequence[Thing], budget: int, cost: Callable[[Thing], int]) -> Iterator[list[Thing]]:
    """Things in their order, in groups whose size times their highest cost is within the budget, or of one thing."""
    batch: list[Thing] = []
    for thing in things:
        if batch and max(cost(thing), max(map(cost, batch))) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(thing)
    if batch:
        yield batch


def _check(requests: Sequence[Request], window: int) -> None:
    for number, request in enumerate(requests):
        if not request.prefix or not request.continuation:
            raise UserError(f"requests: number {number} has an empty {'prefix' if not request.prefix else 'continuation'}; give it a token")
        fed = len(request.prefix) + len(request.continuation) - 1
        if fed > window:
            raise UserError(f"requests: number {number} has {fed} tokens, a member's window only {window}; shorten it")
