"""log P(continuation | prefix) of many requests under many mixtures, from one pass of each member.

Every member that some mixture needs makes one forward pass; all mixtures are computed from its logits. Shared tokens are read
once: first the tokens that all requests begin with (few-shot examples, instructions), then each distinct prefix, then its
continuations. Long inputs are read in pieces, and logits are computed only for scored positions, a bounded number at a time:
apart from weights and caches, memory holds one piece.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.mixture import Context, Mixture, active, check_mixture, combine, depends_on_context
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded

Ids = tuple[int, ...]
Thing = TypeVar("Thing")
CACHED = 8  # a batch may cache the keys and values of this many times the tokens that it may read at a time
LOGITS = 2**26  # most numbers in one member's logits of one piece


class Request(NamedTuple):
    """Token ids: the given prefix and the continuation that is scored; `prompts` are prefixes that members read instead of `prefix`."""

    prefix: Ids
    continuation: Ids
    prompts: Mapping[str, Ids] = {}

    def prefix_of(self, name: str) -> Ids:
        return self.prompts.get(name, self.prefix)


class _Readers(NamedTuple):
    """Members that read the same prefixes, and those prefixes, one per request."""

    names: list[str]
    prefixes: list[Ids]


class _Read(NamedTuple):
    """Rows that a group of members has read: their keys and values, and which columns hold tokens."""

    cache: MixtureCache
    mask: Int[Tensor, "rows time"]


class Scores(NamedTuple):
    """For every request: the summed log-probability of its continuation (nats, fp64), and whether greedy decoding would give it."""

    total: Float[Tensor, " requests"]
    greedy: Bool[Tensor, " requests"]


def score(
    model: ProxyTunedForCausalLM, requests: Sequence[Request], mixtures: Mapping[str, Mixture], **options: Any
) -> dict[str, Float[Tensor, " requests"]]:
    """For each mixture, the summed log-probability (nats, fp64) of every request's continuation; see `score_greedily`."""
    return {name: scores.total for name, scores in score_greedily(model, requests, mixtures, **options).items()}


@torch.inference_mode()
def score_greedily(
    model: ProxyTunedForCausalLM,
    requests: Sequence[Request],
    mixtures: Mapping[str, Mixture],
    *,
    batch_tokens: int = 2048,
    share_prefixes: bool = True,
    progress: Callable[[int], None] = lambda requests_done: None,
) -> dict[str, Scores]:
    """For each mixture, every request's log-probability, and whether each of its tokens is the most likely one at its position.

    A batch reads at most `batch_tokens` tokens at a time, padding included. Apart from rounding, the result does not depend on
    it, nor on the order of the requests or on `share_prefixes`. Coefficients that are functions count positions from the
    continuation's first token, and rows are requests. Members whose caches do not keep every position (sliding windows,
    recurrent states) are read without sharing and in one piece. Raises `UserError` for an empty prefix or continuation and
    for a request that is longer than a member's window (`cut_to_window` shortens them, and counts).
    """
    for mixture in mixtures.values():
        check_mixture(mixture, model.members, model.config.vocab_size)
    _check(requests, model.config.max_position_embeddings)
    totals = {name: Scores(torch.zeros(len(requests), dtype=torch.float64), torch.ones(len(requests), dtype=torch.bool)) for name in mixtures}
    if not requests:
        return totals
    names = list(dict.fromkeys(name for mixture in mixtures.values() for name in active(mixture)))
    by_prefixes: dict[tuple[Ids, ...], list[str]] = {}
    for name in names:
        by_prefixes.setdefault(tuple(request.prefix_of(name) for request in requests), []).append(name)
    groups = [_Readers(members, list(prefixes)) for prefixes, members in by_prefixes.items()]
    read = _shared if share_prefixes and model.new_cache(names).keeps_everything else _apart
    for logits, scored in read(model, groups, requests, batch_tokens):
        _add_up(totals, logits, scored, mixtures)
        progress(sum(target.last for target in scored))
    return totals


def cut_to_window(requests: Sequence[Request], window: int) -> tuple[list[Request], int]:
    """The requests with their prefixes cut on the left to what fits beside the continuation, and how many were cut.

    lm-eval does the same silently. Raises `UserError` for a continuation that leaves no room for a token before it.
    """
    fitting = []
    for number, request in enumerate(requests):
        room = window - len(request.continuation) + 1
        if room < 1:
            raise UserError(
                f"requests: the continuation of number {number} has {len(request.continuation)} tokens, the window only {window}; shorten it"
            )
        fitting.append(Request(request.prefix[-room:], request.continuation, {name: prompt[-room:] for name, prompt in request.prompts.items()}))
    return fitting, sum(one != other for one, other in zip(requests, fitting, strict=True))


class _Target(NamedTuple):
    """A scored token: row and column of its logits, the token, its request, its index in the continuation, and whether it is the last."""

    row: int
    column: int
    token: int
    request: int
    position: int
    last: bool


Scored = tuple[dict[str, Float[Tensor, "rows kept vocabulary"]], list[_Target]]


def _add_up(totals: dict[str, Scores], logits: dict[str, Tensor], scored: list[_Target], mixtures: Mapping[str, Mixture]) -> None:
    """Adds the scored tokens' log-probabilities to their requests, for every mixture, and marks requests that are not greedy."""
    if not scored:
        return
    device = next(iter(logits.values())).device
    of_targets = [(target.row, target.column) for target in scored]
    cells = sorted(set(of_targets))
    number = {cell: index for index, cell in enumerate(cells)}
    where = torch.tensor([number[cell] for cell in of_targets], device=device)
    tokens, owners, position = (
        torch.tensor(column, device=device) for column in zip(*((t.token, t.request, t.position) for t in scored), strict=True)
    )
    rows, columns = torch.tensor(cells, device=device).unbind(1)
    needed = {name: values[rows, columns] for name, values in logits.items()}
    for name, mixture in mixtures.items():
        members = {member: needed[member] for member in active(mixture)}
        if depends_on_context(mixture):
            members = {member: values[where] for member, values in members.items()}
            mixed = combine(members, mixture, Context(members, position, owners, len(totals[name].total)))
            chosen, normaliser, likeliest = mixed.gather(1, tokens[:, None])[:, 0], mixed.logsumexp(-1), mixed.argmax(-1)
        else:
            mixed = combine(members, mixture)
            chosen, normaliser, likeliest = mixed[where, tokens], mixed.logsumexp(-1)[where], mixed.argmax(-1)[where]
        totals[name].total.index_add_(0, owners.cpu(), (chosen - normaliser).double().cpu())
        totals[name].greedy[owners[likeliest != tokens].cpu()] = False


def _shared(model: ProxyTunedForCausalLM, groups: Sequence[_Readers], requests: Sequence[Request], batch_tokens: int) -> Iterator[Scored]:
    """Reads the common beginning, each prefix and each continuation once. A key is one prefix for each group."""
    owners: dict[tuple[Ids, ...], list[int]] = {}
    for index in range(len(requests)):
        owners.setdefault(tuple(group.prefixes[index] for group in groups), []).append(index)
    # At least one token of every prefix is left to read: its logits score the first token of the continuation.
    common = [min(_common(own), min(map(len, own)) - 1) if len(own) > 1 else 0 for own in map(set, zip(*owners, strict=True))]
    beginnings = [
        _read_prefixes(model, group.names, None, [group.prefixes[0][:length]], batch_tokens)[1] if length else None
        for group, length in zip(groups, common, strict=True)
    ]

    def cost(key: tuple[Ids, ...]) -> int:
        return max(max(len(prefix) - length, -(-len(prefix) // CACHED)) for prefix, length in zip(key, common, strict=True))

    for keys in _batches(sorted(owners, key=lambda key: max(map(len, key))), batch_tokens, cost):
        logits: dict[str, Tensor] = {}
        reads = []
        for number, group in enumerate(groups):
            beginning = beginnings[number]
            start = None if beginning is None else _select(beginning, [0] * len(keys))
            found, read = _read_prefixes(model, group.names, start, [key[number][common[number] :] for key in keys], batch_tokens)
            logits |= found
            reads.append(read)
        firsts = [(row, index) for row, key in enumerate(keys) for index in owners[key]]
        yield logits, [_Target(row, 0, requests[index].continuation[0], index, 0, len(requests[index].continuation) == 1) for row, index in firsts]
        # Continuations that read the same tokens after one prefix share a row.
        sharing: dict[tuple[int, Ids], list[int]] = {}
        for row, index in firsts:
            if len(requests[index].continuation) > 1:
                sharing.setdefault((row, requests[index].continuation[:-1]), []).append(index)
        longest = [max(map(len, key)) for key in keys]
        for rows in _batches(sorted(sharing, key=lambda key: len(key[1])), batch_tokens, functools.partial(_continuation_cost, longest)):
            yield from _read_continuations(model, groups, reads, rows, sharing, requests, batch_tokens)


def _read_prefixes(
    model: ProxyTunedForCausalLM, names: list[str], start: _Read | None, segments: Sequence[Ids], batch_tokens: int
) -> tuple[dict[str, Float[Tensor, "rows 1 vocabulary"]], _Read]:
    """Reads one segment per row after what the rows have read, in pieces; returns the members' logits at the end, and what has been read."""
    ids, mask = left_padded(segments, model.config.pad_token_id or 0, model.device)
    read = start or _Read(model.new_cache(names), mask[:, :0])
    logits: dict[str, Tensor] = {}
    for piece in _pieces(ids.shape[1], batch_tokens // len(ids)):
        logits, read = _advance(model, names, read, ids[:, piece], mask[:, piece], 1)
    return logits, read


def _read_continuations(
    model: ProxyTunedForCausalLM,
    groups: Sequence[_Readers],
    reads: Sequence[_Read],
    rows: list[tuple[int, Ids]],
    sharing: Mapping[tuple[int, Ids], list[int]],
    requests: Sequence[Request],
    batch_tokens: int,
) -> Iterator[Scored]:
    """Reads every row's continuation without its last token, in pieces, and yields all logits."""
    ids, mask = left_padded([tokens for _, tokens in rows], model.config.pad_token_id or 0, model.device)
    targets = [
        target
        for number, key in enumerate(rows)
        for index in sharing[key]
        for target in _targets(number, ids.shape[1], index, requests[index].continuation, skipped=1)
    ]
    reads = [_select(read, [row for row, _ in rows]) for read in reads]
    for piece in _pieces(ids.shape[1], min(batch_tokens, LOGITS // model.config.vocab_size) // len(ids)):
        logits: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            found, reads[number] = _advance(model, group.names, reads[number], ids[:, piece], mask[:, piece], 0)
            logits |= found
        inside = [target for target in targets if piece.start <= target.column < piece.stop]
        yield logits, [target._replace(column=target.column - piece.start) for target in inside]


def _pieces(columns: int, width: int) -> list[slice]:
    width = max(width, 1)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def _common(prefixes: Collection[Ids]) -> int:
    """The length of the beginning that all prefixes share: that of the first and the last one in sorted order."""
    first, last = min(prefixes), max(prefixes)
    return next((index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))


def _continuation_cost(longest: Sequence[int], key: tuple[int, Ids]) -> int:
    row, tokens = key
    return max(len(tokens), -(-(longest[row] + len(tokens)) // CACHED))


def _targets(row: int, columns: int, index: int, continuation: Ids, skipped: int) -> list[_Target]:
    """A request's tokens after the first `skipped` ones as targets; the last column has the logits of the last token."""
    last = len(continuation) - 1
    return [_Target(row, columns - 1 - last + at, continuation[at], index, at, at == last) for at in range(skipped, last + 1)]


def _apart(model: ProxyTunedForCausalLM, groups: Sequence[_Readers], requests: Sequence[Request], batch_tokens: int) -> Iterator[Scored]:
    """Reads every distinct row of tokens in full: slower; sharing is tested against it."""
    owners: dict[tuple[Ids, ...], list[int]] = {}
    for index, request in enumerate(requests):
        owners.setdefault(tuple(group.prefixes[index] + request.continuation[:-1] for group in groups), []).append(index)
    for keys in _batches(sorted(owners, key=lambda key: max(map(len, key))), batch_tokens, lambda key: max(map(len, key))):
        kept = max(len(requests[index].continuation) for key in keys for index in owners[key])
        logits: dict[str, Tensor] = {}
        for number, group in enumerate(groups):
            ids, mask = left_padded([key[number] for key in keys], model.config.pad_token_id or 0, model.device)
            found, _ = _advance(model, group.names, _Read(model.new_cache(group.names), mask[:, :0]), ids, mask, min(kept, ids.shape[1]))
            logits |= found
        shortest = min(values.shape[1] for values in logits.values())
        logits = {name: values[:, -shortest:] for name, values in logits.items()}
        found_targets = [(row, index) for row, key in enumerate(keys) for index in owners[key]]
        yield logits, [target for row, index in found_targets for target in _targets(row, shortest, index, requests[index].continuation, skipped=0)]


def _advance(
    model: ProxyTunedForCausalLM,
    names: list[str],
    read: _Read,
    ids: Int[Tensor, "rows time"],
    new_mask: Int[Tensor, "rows time"],
    kept: int,
) -> tuple[dict[str, Float[Tensor, "rows kept vocabulary"]], _Read]:
    """Reads new tokens after those that the rows have read. Returns the members' logits at the last `kept` positions (0: at all)."""
    mask = torch.cat([read.mask, new_mask], dim=1)
    return model.member_logits(names, ids, mask, None, read.cache, kept), _Read(read.cache, mask)


def _select(read: _Read, rows: list[int]) -> _Read:
    index = torch.tensor(rows, device=read.mask.device)
    return _Read(read.cache.select_rows(index), read.mask[index])


def _batches(things: Sequence[Thing], budget: int, cost: Callable[[Thing], int]) -> Iterator[list[Thing]]:
    """Splits things, in their order, into batches whose size times highest cost is within the budget; a batch has at least one thing."""
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
        prefixes = [request.prefix, *request.prompts.values()]
        if not all(prefixes) or not request.continuation:
            raise UserError(f"requests: number {number} has an empty {'prefix' if request.continuation else 'continuation'}; give it a token")
        length = max(map(len, prefixes)) + len(request.continuation) - 1
        if length > window:
            raise UserError(f"requests: number {number} has {length} tokens, a member's window only {window}; shorten it")
