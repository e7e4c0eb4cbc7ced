"""Exact speculative decoding of a mixture, with one of its small members as the draft.

The draft proposes a few tokens; every other member reads them in one pass; each proposal d is accepted with probability
min(1, p(d) / q(d)), and the first refused one is drawn again from (p - q)+, where p is the mixture's law and q the draft's,
both after temperature, top-k, top-p and whatever else `generate` was asked for (Leviathan et al. 2023, arXiv 2211.17192,
with the mixture as the target). What comes out has the mixture's law exactly; greedy decoding gives the same tokens as the
plain one in fp32. In bf16 near ties may fall otherwise, since a pass over several tokens rounds differently from one over each.
The draft's own logits at the proposals are those the mixture needs, so it reads nothing twice.

In a batch the rows accept different numbers of tokens: what a row refused is masked out of its cache, and what all rows
refused is cut off. Members that share the draft's weights read along with it. Stopping criteria are asked as in plain
decoding, about all rows at one length. Not covered, and refused: beams, members whose caches do not keep every position,
going on from a cache, and logits processors that are not known to be functions of the text and its scores.

Large batches gain nothing where arithmetic is dear (a CPU): all rows wait for the one that accepts least. The draft need not
be in the mixture: any member with its vocabulary will do (`drafting` makes a fast one).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from proxytune.cache import MixtureCache
from proxytune.cost import PACE, step_seconds
from proxytune.errors import UserError
from proxytune.mixture import active
from proxytune.modeling import NumbersOnly, ProxyTunedForCausalLM
from proxytune.padding import positions_of
from proxytune.prompts import OwnPrompts

LONGEST_DRAFT = 12
# Functions of the text and its scores, whatever calls came before. Others count their calls, or keep a cache.
PURE = frozenset(
    {
        transformers.EncoderNoRepeatNGramLogitsProcessor,
        transformers.EncoderRepetitionPenaltyLogitsProcessor,
        transformers.EpsilonLogitsWarper,
        transformers.EtaLogitsWarper,
        transformers.ExponentialDecayLengthPenalty,
        transformers.ForcedBOSTokenLogitsProcessor,
        transformers.ForcedEOSTokenLogitsProcessor,
        transformers.InfNanRemoveLogitsProcessor,
        transformers.LogitNormalization,
        transformers.MinLengthLogitsProcessor,
        transformers.MinNewTokensLengthLogitsProcessor,
        transformers.MinPLogitsWarper,
        transformers.NoBadWordsLogitsProcessor,
        transformers.NoRepeatNGramLogitsProcessor,
        transformers.PrefixConstrainedLogitsProcessor,
        transformers.RepetitionPenaltyLogitsProcessor,
        transformers.SequenceBiasLogitsProcessor,
        transformers.SuppressTokensAtBeginLogitsProcessor,
        transformers.SuppressTokensLogitsProcessor,
        transformers.TemperatureLogitsWarper,
        transformers.TopKLogitsWarper,
        transformers.TopPLogitsWarper,
        transformers.TypicalLogitsWarper,
        transformers.WatermarkLogitsProcessor,
        NumbersOnly,
    }
)
# What plain decoding hands to `forward` and speculation heeds or has no need of.
HEEDED = {"attention_mask", "position_ids", "prompts", "prompt_lengths", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}


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


def speculative_decoding(
    model: ProxyTunedForCausalLM,
    input_ids: Int[Tensor, "rows time"],
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: str = "expert",
    draft_tokens: int | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Int[Tensor, "rows longer_time"]:
    """`generate`'s decoding loop; called through `model.generate(..., speculate=True)`.

    Leaves a `SpeculationReport` in `model.speculation`. Raises `UserError` for a draft that is no member and for what is
    not covered.
    """
    _check(model, draft, draft_tokens, generation_config, logits_processor, model_kwargs)
    sample = bool(generation_config.do_sample)
    names = list(dict.fromkeys([draft, *active(model.mixture)]))
    cache = model.new_cache(names)
    if not cache.keeps_everything:
        raise UserError("speculate: a member's cache does not keep every position (a sliding window, say); decode plainly")
    # Not parameters of their own: `generate` would keep them out of what it repeats for several sequences a prompt.
    prompts, prompt_lengths = model_kwargs.get("prompts"), model_kwargs.get("prompt_lengths")
    together = model.sharing(draft, names, prompts)
    apart = [name for name in names if name not in together]
    given, positions = model_kwargs.get("attention_mask"), model_kwargs["position_ids"].expand_as(input_ids)
    mask = torch.ones_like(input_ids) if given is None else given.long()
    rows = _Rows(input_ids, stopping_criteria, generation_config, streamer)
    counted = _Positions(positions[:, -1:] - positions_of(mask)[:, -1:], positions[:, -1:] + rows.longest - 1 - input_ids.shape[1])

    def mixture_scores(logits: dict[str, Tensor], places: Tensor, fed: Tensor) -> Float[Tensor, "rows positions vocabulary"]:
        mixed = model.mixed({name: logits[name] for name in active(model.mixture)}, places, prompt_lengths)
        return _processed(mixed, rows, fed, logits_processor)

    # The prompt gives the first token; from then on a row's last token is the one that nobody has read yet.
    first = mixture_scores(model.member_logits(names, input_ids, mask, positions, cache, 1, prompts), positions, input_ids[:, -1:])
    rows.extend(input_ids[:, :0], *verify(first, first, input_ids[:, :0], sample))
    passes, drafted_count, accepted_count = len(input_ids), 0, 0
    length = _DraftLength(model, together, apart, draft_tokens)
    while (running := rows.running).any():
        fed, logits, scores = _draft(model, draft, together, rows, length, cache, mask, counted, logits_processor, sample, prompts)
        ahead = fed.shape[1] - 1
        held = torch.cat([mask, torch.ones_like(fed)], dim=1)
        places = counted.of_last(ahead + 1, held)
        logits |= model.member_logits(apart, fed, held, places, cache, 0, prompts) if apart else {}
        accepted, following = verify(mixture_scores(logits, places, fed), scores, fed[:, 1:], sample)
        passes += int(running.sum())
        drafted_count += ahead * int(running.sum())
        accepted_count += int(accepted[running].sum())
        length.learn(scores[running, :-1].softmax(-1).amax(-1), accepted[running])
        # Of what was fed, a row keeps all that now stands before its last token; one that has ended keeps nothing.
        kept = rows.extend(fed[:, 1:], accepted, following)
        unkept = ahead + 1 - int(kept.max())
        if unkept:
            cache.crop(-unkept)
        mask = torch.cat([mask, (torch.arange(ahead + 1 - unkept, device=mask.device) < kept[:, None]).long()], dim=1)
    if streamer is not None:
        streamer.end()
    model.speculation = SpeculationReport(passes, drafted_count, accepted_count, rows.emitted)
    return rows.shown()


def _check(
    model: ProxyTunedForCausalLM,
    draft: str,
    draft_tokens: int | None,
    settings: GenerationConfig,
    logits_processor: LogitsProcessorList,
    model_kwargs: dict[str, Any],
) -> None:
    if draft not in model.members:
        raise UserError(f"draft: '{draft}' is no member; the members are {', '.join(model.members)}")
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
        if type(processor) not in PURE:
            kind = type(processor).__name__
            raise UserError(f"speculate: {kind} may keep state from call to call, and speculation asks about tokens that do not come; decode plainly")
    for name, value in model_kwargs.items():
        if value is not None and name not in HEEDED:
            raise UserError(f"{name}: speculation cannot heed it; decode plainly")


class _Positions(NamedTuple):
    """Where tokens stand: they count on from the prompt's last, up to the last that is read; what a row drafts behind it is refused."""

    shift: Int[Tensor, "rows 1"]
    last: Int[Tensor, "rows 1"]

    def of_last(self, count: int, held: Int[Tensor, "rows all_time"]) -> Int[Tensor, "rows count"]:
        return (positions_of(held) + self.shift).minimum(self.last)[:, -count:]


class _Rows:
    """Rows of tokens that grow at their own pace.

    Criteria and streamer see them as in plain decoding: all rows, longer by one token at each call, ended ones padded. So a
    row that is ahead waits to be asked about, and may be cut back then.
    """

    def __init__(self, input_ids: Int[Tensor, "rows time"], criteria: StoppingCriteriaList, settings: GenerationConfig, streamer: Any):
        self.tokens = [row.tolist() for row in input_ids]
        self._device, self._width = input_ids.device, input_ids.shape[1]
        self._criteria, self._streamer = criteria, streamer
        self._asked = self._width  # the length up to which the criteria have been
        self._unfinished = torch.ones(len(self.tokens), dtype=torch.bool, device=self._device)
        self.longest = int(criteria.max_length or settings.max_length)
        self._ends = {int(end) for criterion in criteria if isinstance(criterion, EosTokenCriteria) for end in criterion.eos_token_id}
        # Where no end token is known, `generate` lets a row that was stopped go on until all are.
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = getattr(settings, "_pad_token_tensor", None)
        if self._pads and pad is None:
            raise UserError("pad_token_id: rows that end early are filled up with it; give one")
        self._pad = 0 if pad is None else int(pad)

    @property
    def _open(self) -> list[bool]:
        return self._unfinished.tolist() if self._pads else [bool(self._unfinished.any())] * len(self.tokens)

    @property
    def running(self) -> Bool[Tensor, " rows"]:
        """Those that want more tokens now: not stopped, and not waiting to be."""
        wants = [runs and (len(row) == self._asked or not self._is_full(row)) for row, runs in zip(self.tokens, self._open, strict=True)]
        return torch.tensor(wants, device=self._device)

    @property
    def room(self) -> int:
        """How many tokens may be drafted for the shortest of the running rows, and one follow."""
        return self.longest - 1 - min(len(row) for row, runs in zip(self.tokens, self.running.tolist(), strict=True) if runs)

    @property
    def pending(self) -> Int[Tensor, "rows 1"]:
        return torch.tensor([row[-1:] for row in self.tokens], device=self._device)

    @property
    def emitted(self) -> int:
        return sum(len(row) - self._width for row in self.tokens)

    def _is_full(self, row: list[int]) -> bool:
        return len(row) >= self.longest or row[-1] in self._ends

    def extend(self, proposed: Int[Tensor, "rows drafted"], accepted: Int[Tensor, " rows"], following: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Gives each running row its accepted tokens and the one that follows, and asks the criteria. Returns how many each took."""
        before = [len(row) for row in self.tokens]
        for number in self.running.nonzero()[:, 0].tolist():
            row = self.tokens[number]
            for token in [*proposed[number, : int(accepted[number])].tolist(), int(following[number])]:
                row.append(token)
                if self._is_full(row):
                    break
        taken = [len(row) - length for row, length in zip(self.tokens, before, strict=True)]
        while any(self._open) and all(len(row) > self._asked for row, runs in zip(self.tokens, self._open, strict=True) if runs):
            self._asked += 1
            shown = self.shown()
            self._unfinished &= ~self._criteria(shown, None)
            if self._streamer is not None:
                self._streamer.put(shown[:, -1].cpu())
            for row, runs in zip(self.tokens, self._open, strict=True):
                if not runs:
                    del row[self._asked :]
        return torch.tensor(taken, device=self._device)

    def shown(self) -> Int[Tensor, "rows asked"]:
        """The rows up to the length that the criteria were asked about."""
        rows = [row[: self._asked] + [self._pad] * (self._asked - len(row)) for row in self.tokens]
        return torch.tensor(rows, device=self._device)


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
    rows: _Rows,
    length: _DraftLength,
    cache: MixtureCache,
    mask: Int[Tensor, "rows all_time"],
    counted: _Positions,
    logits_processor: LogitsProcessorList,
    sample: bool,
    prompts: OwnPrompts | None,
) -> tuple[Int[Tensor, "rows drafted_and_one"], dict[str, Tensor], Float[Tensor, "rows drafted_and_one vocabulary"]]:
    """Lets the draft go on. Returns what it was fed, the raw logits after each token of those that read along, and its scores."""
    fed, scores, running, room = rows.pending, [], rows.running, rows.room
    confidence = torch.empty(int(running.sum()), 0, device=mask.device)
    raw: dict[str, list[Tensor]] = {name: [] for name in together}
    while True:
        held = torch.cat([mask, torch.ones_like(fed)], dim=1)
        logits = model.member_logits(together, fed[:, -1:], held, counted.of_last(1, held), cache, 0, prompts)
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
    rows: _Rows,
    fed: Int[Tensor, "rows fed"],
    logits_processor: LogitsProcessorList,
    first: int = 0,
) -> Float[Tensor, "rows positions vocabulary"]:
    """The logits after `generate`'s processors, each position seeing its own row up to it. A row ends with fed[:, 0].

    Processors may count rows, so each call gets all of them: those that run and are of one length, and for the others a
    stand-in.
    """
    if not len(logits_processor):
        return logits
    processed = logits.clone()
    lengths = [len(row) if runs else 0 for row, runs in zip(rows.tokens, rows.running.tolist(), strict=True)]
    for length in set(lengths) - {0}:
        same = [number for number, other in enumerate(lengths) if other == length]
        stand_in = torch.tensor([number if other == length else same[0] for number, other in enumerate(lengths)], device=logits.device)
        ids = torch.tensor([rows.tokens[number] for number in stand_in.tolist()], device=logits.device)
        for place in range(logits.shape[1]):
            seen = torch.cat([ids, fed[stand_in, 1 : 1 + first + place]], dim=1)
            processed[same, place] = logits_processor(seen, logits[stand_in, place])[same]
    return processed
