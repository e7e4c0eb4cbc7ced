"""Exact speculative decoding of a mixture, with one of its small members as the draft.

The draft proposes a few tokens; every other member reads them in one pass; each proposal d is accepted with probability
min(1, p(d) / q(d)), and the first refused one is drawn again from (p - q)+, where p is the mixture's law and q the draft's,
both after temperature, top-k, top-p and whatever else `generate` was asked for (Leviathan et al. 2023, arXiv 2211.17192,
with the mixture as the target). What comes out has the mixture's law exactly; greedy decoding gives the plain one's tokens.
The draft's own logits at the proposals are those the mixture needs, so it reads nothing twice.

In a batch the rows accept different numbers of tokens: what a row refused is masked out of its cache, and what all rows
refused is cut off. Members that share the draft's weights read along with it. Not covered: beams, and members whose caches
do not keep every position.

Large batches gain nothing where arithmetic is dear (a CPU): all rows wait for the one that accepts least. The draft need not
be in the mixture: any member with its vocabulary will do (`drafting` makes a fast one).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from proxytune.cost import PACE, step_seconds
from proxytune.errors import UserError
from proxytune.mixture import active
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import positions_of
from proxytune.prompts import OwnPrompts

LONGEST_DRAFT = 12


class SpeculationReport(NamedTuple):
    """Counts over all rows: passes of the base, tokens drafted, tokens accepted, tokens that came out."""

    passes: int
    drafted: int
    accepted: int
    emitted: int

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were accepted; NaN where none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def tokens_per_pass(self) -> float:
        return self.emitted / self.passes if self.passes else float("nan")


def verify(
    mixed: Float[Tensor, "rows drafted_and_one vocabulary"],
    drafted: Float[Tensor, "rows drafted_and_one vocabulary"],
    tokens: Int[Tensor, "rows drafted"],
    sample: bool,
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """How many of each row's drafted tokens are accepted, and the token that follows them.

    `mixed` and `drafted` are scores (processed logits) of the mixture and the draft before each drafted token and after
    the last one. Sampled: the rule of the module's head. Greedy: a token is accepted while it is the mixture's best.
    """
    if not sample:
        best = mixed.argmax(-1)
        accepted = (best[:, :-1] == tokens).cumprod(dim=1).sum(dim=1)
        return accepted, best.gather(1, accepted[:, None])[:, 0]
    law, draft = mixed.softmax(-1), drafted.softmax(-1)
    chance = law[:, :-1].gather(2, tokens[..., None])[..., 0] / draft[:, :-1].gather(2, tokens[..., None])[..., 0]
    accepted = (torch.rand_like(chance) < chance).cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(tokens), device=tokens.device)
    refused = (accepted < tokens.shape[1])[:, None]
    left = torch.where(refused, (law[rows, accepted] - draft[rows, accepted]).clamp(min=0), law[rows, accepted])
    # Where the two laws are equal to rounding, nothing is left over and a refusal can only be rounding too.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, law[rows, accepted])
    return accepted, torch.multinomial(left, 1)[:, 0]


@torch.inference_mode()
def speculative_decoding(
    model: ProxyTunedForCausalLM,
    input_ids: Int[Tensor, "rows time"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: str = "expert",
    draft_tokens: int | None = None,
    streamer: Any = None,
    prompts: OwnPrompts | None = None,
    prompt_lengths: Int[Tensor, " rows"] | None = None,
    **model_kwargs: Any,
) -> Int[Tensor, "rows longer_time"]:
    """`generate`'s decoding loop; called through `model.generate(..., speculate=True)`.

    Leaves a `SpeculationReport` in `model.speculation`. Raises `UserError` for a draft that is no member, for beams, for
    dictionary output and for caches that do not keep every position.
    """
    _check(model, draft, draft_tokens, generation_config)
    sample = bool(generation_config.do_sample)
    names = list(dict.fromkeys([draft, *active(model.mixture)]))
    cache = model.new_cache(names)
    if not cache.keeps_everything:
        raise UserError("speculate: a member's cache does not keep every position (a sliding window, say); decode plainly")
    together = model.sharing(draft, names, prompts)
    apart = [name for name in names if name not in together]
    # `generate` hands the mask over among the model's arguments, and twice if it is named here.
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if given is None else given.long()
    rows = [row.tolist() for row in input_ids]
    running = torch.ones(len(rows), dtype=torch.bool, device=input_ids.device)

    def mixture_scores(logits: dict[str, Tensor], held: Tensor, fed: Tensor) -> Float[Tensor, "rows positions vocabulary"]:
        positions = positions_of(held)[:, -fed.shape[1] :]
        mixed = model.mixed({name: logits[name] for name in active(model.mixture)}, positions, prompt_lengths)
        return _processed(mixed, rows, fed, logits_processor)

    # The prompt gives the first token; from then on a row's last token is the one that nobody has read yet.
    first = mixture_scores(model.member_logits(names, input_ids, mask, None, cache, 1, prompts), mask, input_ids[:, -1:])
    pending = verify(first, first, input_ids[:, :0], sample)[1]
    for number in range(len(rows)):
        running[number] = not _emit(rows[number], [int(pending[number])], stopping_criteria, input_ids.device, streamer)
    passes, drafted_count, accepted_count = len(rows), 0, 0
    length = _DraftLength(model, together, apart, draft_tokens)
    while running.any():
        room = int(generation_config.max_length or 0) - 1 - min(len(row) for row, runs in zip(rows, running.tolist(), strict=True) if runs)
        fed, logits, scores = _draft(model, draft, together, pending, room, length, running, cache, mask, rows, logits_processor, sample, prompts)
        ahead = fed.shape[1] - 1
        held = torch.cat([mask, torch.ones_like(fed)], dim=1)
        logits |= model.member_logits(apart, fed, held, None, cache, 0, prompts) if apart else {}
        accepted, following = verify(mixture_scores(logits, held, fed), scores, fed[:, 1:], sample)
        passes += int(running.sum())
        drafted_count += ahead * int(running.sum())
        accepted_count += int(accepted[running].sum())
        length.learn(scores[running, :-1].softmax(-1).amax(-1), accepted[running])
        # Kept are the pending token and the accepted ones; a row that has ended keeps nothing.
        read = ((torch.arange(ahead + 1, device=mask.device) <= accepted[:, None]) & running[:, None]).long()
        refused_by_all = ahead - int(accepted[running].max())
        if refused_by_all:
            cache.crop(-refused_by_all)
        mask = torch.cat([mask, read[:, : ahead + 1 - refused_by_all]], dim=1)
        for number in running.nonzero()[:, 0].tolist():
            proposed = [*fed[number, 1 : 1 + int(accepted[number])].tolist(), int(following[number])]
            running[number] = not _emit(rows[number], proposed, stopping_criteria, input_ids.device, streamer)
        pending = following
    if streamer is not None:
        streamer.end()
    emitted = sum(len(row) - input_ids.shape[1] for row in rows)
    model.speculation = SpeculationReport(passes, drafted_count, accepted_count, emitted)
    longest, pad = max(map(len, rows)), generation_config.pad_token_id
    pad = model.config.pad_token_id if pad is None else pad
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=input_ids.device)


def _check(model: ProxyTunedForCausalLM, draft: str, draft_tokens: int | None, generation_config: GenerationConfig) -> None:
    if draft not in model.members:
        raise UserError(f"draft: '{draft}' is no member; the members are {', '.join(model.members)}")
    if draft_tokens is not None and not 1 <= draft_tokens <= LONGEST_DRAFT:
        raise UserError(f"draft_tokens: must be from 1 to {LONGEST_DRAFT}, not {draft_tokens}")
    if model.token_maps:
        raise UserError(f"speculate: {', '.join(model.token_maps)} read tokens of their own, which cannot be taken back; decode plainly")
    if (generation_config.num_beams or 1) > 1:
        raise UserError(f"num_beams: speculation decodes one beam, not {generation_config.num_beams}; leave one of the two out")
    if generation_config.return_dict_in_generate:
        raise UserError("return_dict_in_generate: speculation returns the tokens alone; leave it out")


class _DraftLength:
    """Whether one more token is worth drafting: its chance to come out, times what a token takes, against what it costs.

    The chance is that of all before it times its own, 1 - k (1 - c) for a draft whose best token has probability c (and
    never more than .95); k is learned from what was refused. The decision sees only what came before the token, so the law stays exact. Seconds are
    those of `cost`, not a clock's: the same seed gives the same tokens.
    """

    def __init__(self, model: ProxyTunedForCausalLM, together: Sequence[str], apart: Sequence[str], fixed: int | None):
        self._fixed = fixed
        self._pace = PACE.get(model.device.type, PACE["cuda"])
        self._together = len(together)
        self._draft = step_seconds(model.members[together[0]], self._pace)
        self._verify = sum((step_seconds(model.members[name], self._pace) for name in apart), 0.0)
        self._refused = self._doubts = 0.5  # a prior: k is 1
        self._seconds = self._tokens = 0.0

    def one_more(self, confidence: Float[Tensor, "running drafted"]) -> bool:
        """Of the running rows: the best token's probability before each token drafted so far, and before the one in question."""
        ahead = confidence.shape[1] - 1
        if self._fixed is not None or ahead >= LONGEST_DRAFT:
            return ahead < min(self._fixed or LONGEST_DRAFT, LONGEST_DRAFT)
        running = len(confidence)
        chance = (1 - self._refused / self._doubts * _doubt(confidence)).clamp(0, 1).prod(1).sum()
        # Before the first round a token is taken to cost what it would without a draft.
        alone = self._one_round(0, running) / running
        a_token = self._seconds / self._tokens if self._tokens else alone
        return bool(chance * a_token > self._one_round(ahead + 1, running) - self._one_round(ahead, running))

    def learn(self, confidence: Float[Tensor, "running drafted"], accepted: Int[Tensor, " running"]) -> None:
        """After a round: the confidence before each drafted token, and how many of them each running row accepted."""
        running, ahead = confidence.shape
        verified = torch.arange(ahead, device=accepted.device) <= accepted[:, None]
        self._refused = 0.9 * self._refused + float((accepted < ahead).sum())
        self._doubts = 0.9 * self._doubts + float((_doubt(confidence) * verified).sum())
        self._seconds = 0.9 * self._seconds + self._one_round(ahead, running)
        self._tokens = 0.9 * self._tokens + float((accepted + 1).sum())

    def _one_round(self, ahead: int, rows: int) -> float:
        further = self._pace.token
        drafting = (ahead + 1) * self._draft * (1 + further * (rows * self._together - 1))
        return drafting + self._verify * (1 + further * (rows * (ahead + 1) - 1))


def _doubt(confidence: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return (1 - confidence).clamp(min=0.05)


def _draft(
    model: ProxyTunedForCausalLM,
    draft: str,
    together: Sequence[str],
    pending: Int[Tensor, " rows"],
    room: int,
    length: _DraftLength,
    running: Bool[Tensor, " rows"],
    cache: Any,
    mask: Int[Tensor, "rows all_time"],
    rows: Sequence[list[int]],
    logits_processor: LogitsProcessorList,
    sample: bool,
    prompts: OwnPrompts | None,
) -> tuple[Int[Tensor, "rows drafted_and_one"], dict[str, Tensor], Float[Tensor, "rows drafted_and_one vocabulary"]]:
    """Lets the draft go on by at most `room` tokens. Returns what it was fed, the raw logits after each token of those
    that read along, and its scores."""
    fed, scores = pending[:, None], []
    confidence = torch.empty(int(running.sum()), 0, device=mask.device)
    raw: dict[str, list[Tensor]] = {name: [] for name in together}
    while True:
        held = torch.cat([mask, torch.ones_like(fed)], dim=1)
        logits = model.member_logits(together, fed[:, -1:], held, None, cache, 0, prompts)
        for name in together:
            raw[name].append(logits[name])
        scores.append(_processed(logits[draft].float(), rows, fed, logits_processor, first=fed.shape[1] - 1))
        law = scores[-1][:, 0].softmax(-1)
        confidence = torch.cat([confidence, law[running].amax(-1, keepdim=True)], dim=1)
        if fed.shape[1] > room or not length.one_more(confidence):
            return fed, {name: torch.cat(given, dim=1) for name, given in raw.items()}, torch.cat(scores, dim=1)
        fed = torch.cat([fed, torch.multinomial(law, 1) if sample else law.argmax(-1, keepdim=True)], dim=1)


def _processed(
    logits: Float[Tensor, "rows positions vocabulary"],
    rows: Sequence[list[int]],
    fed: Int[Tensor, "rows fed"],
    logits_processor: LogitsProcessorList,
    first: int = 0,
) -> Float[Tensor, "rows positions vocabulary"]:
    """The logits after `generate`'s processors, each position seeing its own row up to it. A row ends with fed[:, 0].

    Processors may count rows, so each call gets all of them: those of one length, and for the others a stand-in.
    """
    if not len(logits_processor):
        return logits
    processed = torch.empty_like(logits)
    for length in {len(row) for row in rows}:
        same = [number for number, row in enumerate(rows) if len(row) == length]
        stand_in = torch.tensor([number if len(row) == length else same[0] for number, row in enumerate(rows)], device=logits.device)
        ids = torch.tensor([rows[number] for number in stand_in.tolist()], device=logits.device)
        for place in range(logits.shape[1]):
            seen = torch.cat([ids, fed[stand_in, 1 : 1 + first + place]], dim=1)
            processed[same, place] = logits_processor(seen, logits[stand_in, place])[same]
    return processed


def _emit(row: list[int], tokens: Sequence[int], stopping_criteria: StoppingCriteriaList, device: torch.device, streamer: Any) -> bool:
    """Appends tokens to the row until a criterion stops it; tells whether one did."""
    for token in tokens:
        row.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        stops: Bool[Tensor, " rows"] = stopping_criteria(torch.tensor([row], device=device), None)
        if bool(stops.all()):
            return True
    return False
