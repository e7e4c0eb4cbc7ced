"""Exact speculative decoding of a mixture, with one of its small members as the draft.

The draft proposes a few tokens; every other member reads them in one pass; each proposal d is accepted with probability
min(1, p(d) / q(d)), and the first refused one is drawn again from (p - q)+, where p is the mixture's law and q the draft's,
both after temperature, top-k, top-p and whatever else `generate` was asked for (Leviathan et al. 2023, arXiv 2211.17192,
with the mixture as the target). What comes out has the mixture's law exactly; greedy decoding gives the plain one's tokens.
The draft's own logits at the proposals are those the mixture needs, so it reads nothing twice.

In a batch the rows accept different numbers of tokens: what a row refused is masked out of its cache, and what all rows
refused is cut off. Members that share the draft's weights read along with it. Not covered: beams, and members whose caches
do not keep every position.

How many tokens to draft follows from the acceptance so far and from what passes cost by a model of two constants a kind
of device (`PACE`), not from a clock: the same seed gives the same tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from proxytune.errors import UserError
from proxytune.mixture import active
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import positions_of
from proxytune.prompts import OwnPrompts

LONGEST_DRAFT = 12
LAUNCH = 2e-4  # seconds that a layer costs however small it is


class Pace(NamedTuple):
    """What decides a pass's time: bytes of weights a second, and what a further token adds to a pass, as a share of it."""

    bytes_a_second: float
    token: float


PACE = {"cpu": Pace(2e10, 0.03), "cuda": Pace(2e12, 0.003)}


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
    length = _DraftLength(model, together, apart, len(rows), draft_tokens)
    while running.any():
        room = int(generation_config.max_length or 0) - 1 - min(len(row) for row, runs in zip(rows, running.tolist(), strict=True) if runs)
        ahead = max(0, min(length.best(), room))
        held = torch.cat([mask, torch.ones(len(rows), ahead + 1, dtype=torch.long, device=mask.device)], dim=1)
        fed, logits, scores = _draft(model, draft, together, pending, ahead, cache, held, rows, logits_processor, sample, prompts)
        logits |= model.member_logits(apart, fed, held, None, cache, 0, prompts) if apart else {}
        accepted, following = verify(mixture_scores(logits, held, fed), scores, fed[:, 1:], sample)
        passes += int(running.sum())
        drafted_count += ahead * int(running.sum())
        accepted_count += int(accepted[running].sum())
        length.learn(int(accepted[running].sum()), int((accepted[running] < ahead).sum()))
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
    if (generation_config.num_beams or 1) > 1:
        raise UserError(f"num_beams: speculation decodes one beam, not {generation_config.num_beams}; leave one of the two out")
    if generation_config.return_dict_in_generate:
        raise UserError("return_dict_in_generate: speculation returns the tokens alone; leave it out")


class _DraftLength:
    """How many tokens to draft: those that give the most tokens a second at the acceptance seen lately.

    Tokens a round are (1 - a^(n+1)) / (1 - a) at acceptance a (Leviathan et al. 2023, eq. 1).
    """

    def __init__(self, model: ProxyTunedForCausalLM, together: Sequence[str], apart: Sequence[str], rows: int, fixed: int | None):
        self._fixed, self._rows = fixed, rows
        self._accepted, self._refused = 2.8, 1.2  # as if four drafted tokens had been seen
        self._pace = PACE.get(model.device.type, PACE["cuda"])
        self._draft = _seconds(model.members[together[0]], self._pace) * (1 + self._pace.token * (rows * len(together) - 1))
        self._verify = sum(_seconds(model.members[name], self._pace) for name in apart)

    def best(self) -> int:
        if self._fixed is not None:
            return self._fixed
        acceptance = self._accepted / (self._accepted + self._refused)

        def tokens_a_second(ahead: int) -> float:
            tokens = sum(acceptance**place for place in range(ahead + 1))
            verifying = self._verify * (1 + self._pace.token * (self._rows * (ahead + 1) - 1))
            return tokens / (self._draft * (ahead + 1) + verifying)

        return max(range(1, LONGEST_DRAFT + 1), key=tokens_a_second)

    def learn(self, accepted: int, refused: int) -> None:
        self._accepted, self._refused = 0.9 * self._accepted + accepted, 0.9 * self._refused + refused


def _seconds(model: Any, pace: Pace) -> float:
    read = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    return max(read / pace.bytes_a_second, LAUNCH * model.config.get_text_config().num_hidden_layers)


def _draft(
    model: ProxyTunedForCausalLM,
    draft: str,
    together: Sequence[str],
    pending: Int[Tensor, " rows"],
    ahead: int,
    cache: Any,
    held: Int[Tensor, "rows all_time"],
    rows: Sequence[list[int]],
    logits_processor: LogitsProcessorList,
    sample: bool,
    prompts: OwnPrompts | None,
) -> tuple[Int[Tensor, "rows drafted_and_one"], dict[str, Tensor], Float[Tensor, "rows drafted_and_one vocabulary"]]:
    """Lets the draft go `ahead` tokens on. Returns what it was fed, the raw logits after each of those that read along, and its scores."""
    fed, scores = pending[:, None], []
    raw: dict[str, list[Tensor]] = {name: [] for name in together}
    before = held.shape[1] - (ahead + 1)
    for step in range(ahead + 1):
        logits = model.member_logits(together, fed[:, -1:], held[:, : before + step + 1], None, cache, 0, prompts)
        for name in together:
            raw[name].append(logits[name])
        scores.append(_processed(logits[draft].float(), rows, fed, logits_processor, first=step))
        if step < ahead:
            last = scores[-1][:, 0]
            token = torch.multinomial(last.softmax(-1), 1) if sample else last.argmax(-1, keepdim=True)
            fed = torch.cat([fed, token], dim=1)
    return fed, {name: torch.cat(given, dim=1) for name, given in raw.items()}, torch.cat(scores, dim=1)


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
