"""Exact speculative decoding of a mixture, with one of its small members as the draft.

The draft proposes a few tokens. Every other member reads them in one pass. A proposal d is accepted with probability
min(1, p(d) / q(d)); the first one that is refused is drawn again from (p - q)+. Here p is the mixture's distribution and q the
draft's, both after temperature, top-k, top-p and the other options of `generate` (Leviathan et al. 2023, arXiv 2211.17192, with
the mixture as the target). The output has exactly the mixture's distribution. Greedy decoding gives the same tokens as without
speculation in fp32; in bf16 near ties may differ, since a pass over several tokens rounds differently from one pass per token. The
mixture needs the draft's logits at the proposals too, so the draft reads nothing twice.

In a batch the rows accept different numbers of tokens. What one row refused is masked out of its cache; what all rows
refused is cut off. Members that share the draft's weights run in the draft's pass. Stopping criteria see what they see without
speculation: all rows at one length. Not covered, and refused with an error: beams, members whose caches do not keep every
position, continuing from a cache, and logits processors that may keep state between calls.

Large batches gain nothing where compute dominates (on a CPU), because all rows wait for the row that accepts least. The draft
need not be in the mixture: any member with its vocabulary will do (`drafting` makes a fast one).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from proxytune.cache import MixtureCache
from proxytune.cost import PACE, step_seconds
from proxytune.draft_length import LONGEST_DRAFT, DraftLength
from proxytune.errors import UserError
from proxytune.mixture import Mixture, active, biased
from proxytune.padding import positions_of
from proxytune.processors import STATELESS
from proxytune.prompts import OwnPrompts
from proxytune.rows import Rows
from proxytune.token_map import TokenMap

# The arguments of `forward` that speculation supports or does not need.
SUPPORTED = {"attention_mask", "position_ids", "prompts", "prompt_lengths", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}


class SpeculationReport(NamedTuple):
    """Counts over all rows: passes of the base, tokens drafted, tokens accepted, tokens generated."""

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
    the last one. With sampling the rule is the one in the module's docstring. Greedy: a token is accepted while it is the
    mixture's best.
    """
    if not sample:
        best = mixed.argmax(-1)
        accepted = (best[:, :-1] == tokens).cumprod(dim=1).sum(dim=1)
        return accepted, best.gather(1, accepted[:, None])[:, 0]
    target, draft = mixed.softmax(-1), drafted.softmax(-1)
    chance = target[:, :-1].gather(2, tokens[..., None])[..., 0] / draft[:, :-1].gather(2, tokens[..., None])[..., 0]
    accepted = (torch.rand_like(chance) < chance).cumprod(dim=1).sum(dim=1)
    rows = torch.arange(len(tokens), device=tokens.device)
    refused = (accepted < tokens.shape[1])[:, None]
    left = torch.where(refused, (target[rows, accepted] - draft[rows, accepted]).clamp(min=0), target[rows, accepted])
    # Where both distributions are equal up to rounding, nothing is left over; a refusal is then due to rounding too.
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, target[rows, accepted])
    return accepted, torch.multinomial(left, 1)[:, 0]


@runtime_checkable
class MixtureModel(Protocol):
    """What speculation needs of a model; `modeling.ProxyTunedForCausalLM` has it."""

    speculation: SpeculationReport

    @property
    def mixture(self) -> Mixture: ...

    @property
    def members(self) -> nn.ModuleDict: ...

    @property
    def token_maps(self) -> Mapping[str, TokenMap]: ...

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, names: Collection[str] | None = None) -> MixtureCache: ...

    def sharing(self, name: str, names: Collection[str], prompts: OwnPrompts | None = None) -> tuple[str, ...]: ...

    def member_logits(
        self,
        names: Collection[str],
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch all_time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        past_key_values: MixtureCache | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        prompts: OwnPrompts | None = None,
    ) -> dict[str, Float[Tensor, "batch kept_time rows"]]: ...

    def mixed(
        self,
        logits: Mapping[str, Float[Tensor, "batch kept rows"]],
        positions: Int[Tensor, "batch time"] | None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
    ) -> Float[Tensor, "batch kept rows"]: ...


def speculative_decoding(
    model: MixtureModel,
    input_ids: Int[Tensor, "rows time"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: str = "expert",
    draft_tokens: int | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Int[Tensor, "rows longer_time"]:
    """The decoding loop of `generate`; called by `model.generate(..., speculate=True)`.

    Leaves a `SpeculationReport` in `model.speculation`. Raises `UserError` for a draft that is not a member and for what is
    not covered.
    """
    _check(model, draft, draft_tokens, generation_config, logits_processor, model_kwargs)
    names = list(dict.fromkeys([draft, *active(model.mixture)]))
    cache = model.new_cache(names)
    if not cache.keeps_everything:
        raise UserError("speculate: a member's cache does not keep every position (a sliding window, say); decode plainly")
    # `prompts` and `prompt_lengths` stay in `model_kwargs`: `generate` repeats only what is there for several sequences per prompt.
    prompts = model_kwargs.get("prompts")
    given, position_ids = model_kwargs.get("attention_mask"), model_kwargs["position_ids"].expand_as(input_ids)
    attention_mask = torch.ones_like(input_ids) if given is None else given.long()
    rows = Rows(input_ids, stopping_criteria, generation_config, streamer)
    together = model.sharing(draft, names, prompts)
    pace = PACE.get(model.device.type, PACE["cuda"])
    seconds = {name: step_seconds(model.members[name], pace) for name in names}
    apart = tuple(name for name in names if name not in together)
    decoding = _Decoding(
        model=model,
        draft=draft,
        together=together,
        apart=apart,
        rows=rows,
        length=DraftLength(pace, len(together), seconds[together[0]], sum((seconds[name] for name in apart), 0.0), draft_tokens),
        cache=cache,
        positions=_Positions(
            position_ids[:, -1:] - positions_of(attention_mask)[:, -1:], position_ids[:, -1:] + rows.longest - 1 - input_ids.shape[1]
        ),
        processors=logits_processor,
        sample=bool(generation_config.do_sample),
        prompts=prompts,
        prompt_lengths=model_kwargs.get("prompt_lengths"),
    )
    # The prompt gives the first token. From then on no member has read a row's last token yet.
    logits = model.member_logits(names, input_ids, attention_mask, position_ids, cache, 1, prompts)
    first = _mixture_scores(decoding, logits, position_ids, input_ids[:, -1:])
    rows.extend(input_ids[:, :0], *verify(first, first, input_ids[:, :0], decoding.sample))
    passes, drafted_count, accepted_count = len(input_ids), 0, 0
    while (running := rows.running).any():
        new_ids, logits, scores = _draft(decoding, attention_mask)
        drafted = new_ids.shape[1] - 1
        whole_mask = torch.cat([attention_mask, torch.ones_like(new_ids)], dim=1)
        position_ids = decoding.positions.of_last(drafted + 1, whole_mask)
        logits |= model.member_logits(apart, new_ids, whole_mask, position_ids, cache, 0, prompts) if apart else {}
        accepted, following = verify(_mixture_scores(decoding, logits, position_ids, new_ids), scores, new_ids[:, 1:], decoding.sample)
        passes += int(running.sum())
        drafted_count += drafted * int(running.sum())
        accepted_count += int(accepted[running].sum())
        decoding.length.learn(scores[running, :-1].softmax(-1).amax(-1), accepted[running])
        # A row keeps the new ids before its last token. A row that has ended keeps none.
        kept = rows.extend(new_ids[:, 1:], accepted, following)
        unkept = drafted + 1 - int(kept.max())
        if unkept:
            cache.crop(-unkept)
        columns = torch.arange(drafted + 1 - unkept, device=attention_mask.device)
        attention_mask = torch.cat([attention_mask, (columns < kept[:, None]).long()], dim=1)
    if streamer is not None:
        streamer.end()
    model.speculation = SpeculationReport(passes, drafted_count, accepted_count, rows.emitted)
    return rows.shown()


def _check(
    model: MixtureModel,
    draft: str,
    draft_tokens: int | None,
    settings: GenerationConfig,
    logits_processor: LogitsProcessorList,
    model_kwargs: dict[str, Any],
) -> None:
    if draft not in model.members:
        raise UserError(f"draft: '{draft}' is not a member; the members are {', '.join(model.members)}")
    if draft_tokens is not None and not 1 <= draft_tokens <= LONGEST_DRAFT:
        raise UserError(f"draft_tokens: must be from 1 to {LONGEST_DRAFT}, not {draft_tokens}")
    if model.token_maps:
        raise UserError(f"speculate: {', '.join(model.token_maps)} read tokens of their own, which cannot be taken back; decode plainly")
    if (settings.num_beams or 1) > 1:
        raise UserError(f"num_beams: speculation decodes one beam, not {settings.num_beams}; leave one of the two out")
    mode = settings.get_generation_mode(model_kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"speculate: it decodes greedily or samples, and {mode.replace('_', ' ')} was asked for; leave one of the two out")
    if settings.return_dict_in_generate:
        raise UserError("return_dict_in_generate: speculation returns the tokens alone; leave it out")
    if settings.cache_implementation not in (None, "dynamic"):
        raise UserError(f"cache_implementation: speculation takes back what it read, which {settings.cache_implementation!r} cannot; leave it out")
    for processor in logits_processor:
        if type(processor) not in STATELESS:
            kind = type(processor).__name__
            raise UserError(f"speculate: {kind} may keep state from call to call, and speculation asks about tokens that do not come; decode plainly")
    for name, value in model_kwargs.items():
        if value is not None and name not in SUPPORTED:
            raise UserError(f"{name}: speculation does not support it; decode plainly")


class _Positions(NamedTuple):
    """Positions of new tokens: counted on from the prompt's last one, up to `last`, the last that can be kept. Drafts after it are refused."""

    shift: Int[Tensor, "rows 1"]
    last: Int[Tensor, "rows 1"]

    def of_last(self, count: int, attention_mask: Int[Tensor, "rows all_time"]) -> Int[Tensor, "rows count"]:
        return (positions_of(attention_mask) + self.shift).minimum(self.last)[:, -count:]


@dataclass(frozen=True)
class _Decoding:
    """What all rounds of one call share. `rows`, `length` and `cache` grow as it goes; members `together` share the draft's pass."""

    model: MixtureModel
    draft: str
    together: tuple[str, ...]
    apart: tuple[str, ...]
    rows: Rows
    length: DraftLength
    cache: MixtureCache
    positions: _Positions
    processors: LogitsProcessorList
    sample: bool
    prompts: OwnPrompts | None
    prompt_lengths: Int[Tensor, " rows"] | None


def _draft(
    decoding: _Decoding, attention_mask: Int[Tensor, "rows all_time"]
) -> tuple[Int[Tensor, "rows drafted_and_one"], dict[str, Tensor], Float[Tensor, "rows drafted_and_one vocabulary"]]:
    """Drafts tokens after each row's last one.

    Returns that token with the drafted ones, the raw logits after each of them of the members that share the pass, and the
    draft's scores.
    """
    rows, running, room = decoding.rows, decoding.rows.running, decoding.rows.room
    new_ids, scores = rows.pending, []
    confidence = torch.empty(int(running.sum()), 0, device=attention_mask.device)
    raw: dict[str, list[Tensor]] = {name: [] for name in decoding.together}
    while True:
        mask = torch.cat([attention_mask, torch.ones_like(new_ids)], dim=1)
        position_ids = decoding.positions.of_last(1, mask)
        logits = decoding.model.member_logits(decoding.together, new_ids[:, -1:], mask, position_ids, decoding.cache, 0, decoding.prompts)
        for name in decoding.together:
            raw[name].append(logits[name])
        proposed = biased(logits[decoding.draft].float(), decoding.model.mixture)  # no proposal is wasted on what the mixture bans
        scores.append(_processed(proposed, rows, new_ids, decoding.processors, first=new_ids.shape[1] - 1))
        probabilities = scores[-1][:, 0].softmax(-1)
        confidence = torch.cat([confidence, probabilities[running].amax(-1, keepdim=True)], dim=1)
        if new_ids.shape[1] > room or not decoding.length.one_more(confidence):
            return new_ids, {name: torch.cat(given, dim=1) for name, given in raw.items()}, torch.cat(scores, dim=1)
        drawn = torch.multinomial(probabilities, 1) if decoding.sample else probabilities.argmax(-1, keepdim=True)
        new_ids = torch.cat([new_ids, drawn], dim=1)


def _mixture_scores(
    decoding: _Decoding,
    logits: Mapping[str, Tensor],
    position_ids: Int[Tensor, "rows time"],
    new_ids: Int[Tensor, "rows new"],
) -> Float[Tensor, "rows positions vocabulary"]:
    """The mixture's processed logits after each of the new ids."""
    model = decoding.model
    mixed = model.mixed({name: logits[name] for name in active(model.mixture)}, position_ids, decoding.prompt_lengths)
    return _processed(mixed, decoding.rows, new_ids, decoding.processors)


def _processed(
    logits: Float[Tensor, "rows positions vocabulary"],
    rows: Rows,
    new_ids: Int[Tensor, "rows new"],
    logits_processor: LogitsProcessorList,
    first: int = 0,
) -> Float[Tensor, "rows positions vocabulary"]:
    """The logits after `generate`'s processors; at each position they see the row up to it. A row ends with new_ids[:, 0].

    Processors may count rows, so each call gets as many as there are: the running ones of one length, and stand-ins for the
    others.
    """
    if not len(logits_processor):
        return logits
    processed = logits.clone()
    lengths = [len(row) if runs else 0 for row, runs in zip(rows.tokens, rows.running.tolist(), strict=True)]
    for length in set(lengths) - {0}:
        same = [number for number, other in enumerate(lengths) if other == length]
        stand_in = torch.tensor([number if other == length else same[0] for number, other in enumerate(lengths)], device=logits.device)
        ids = torch.tensor([rows.tokens[number] for number in stand_in.tolist()], device=logits.device)
        for position in range(logits.shape[1]):
            seen = torch.cat([ids, new_ids[stand_in, 1 : 1 + first + position]], dim=1)
            processed[same, position] = logits_processor(seen, logits[stand_in, position])[same]
    return processed
