"""A mixture of language models as one transformers model.

`ProxyTunedForCausalLM` runs its members on the same tokens and combines their logits (see `mixture.combine`). It works
wherever a causal language model does: `generate` with beams, sampling, streaming and stopping criteria, evaluation
harnesses, trainers that read logits or loss (TRL's GKD). What needs one model's states, cache or head raises a one-line error.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Context, Mixture, active, check_mixture, combine, depends_on_context
from proxytune.padding import has_several_texts, positions_of
from proxytune.passes import Reader, at_once, grouped, run, run_mapped
from proxytune.processors import NumbersOnly
from proxytune.prompts import OwnPrompts, own_prompts, reading
from proxytune.speculation import SpeculationReport, speculative_decoding
from proxytune.token_map import TokenMap, check_pairs
from proxytune.vocabulary import check_rows, check_same_vocabulary

STATIC = [kind for kind in ALL_STATIC_CACHE_IMPLEMENTATIONS if not kind.startswith("offloaded")]


NO_STATES = (
    "last_hidden_state: a mixture has logits but no states before one head, which TRL's DPO, GRPO and RLOO need;"
    " distil from it (GKD), or take one of its members as the reference"
)


class NoStatesError(UserError, AttributeError):
    """The states before the head were asked for. An AttributeError too, so that `hasattr` returns False."""


class MixtureOutput(CausalLMOutputWithPast):
    @property
    def last_hidden_state(self) -> Tensor:
        raise NoStatesError(NO_STATES)


class ProxyTunedForCausalLM(PreTrainedModel, GenerationMixin):
    """Members and the current mixture of them.

    `mixture` may be set at any time between calls; a member with coefficient 0 is not run. Logits are as wide as the
    narrowest head among the members. Members are not changed: weights, adapters, devices and configs stay as they are.
    Members that share weights through LoRA adapters are rows of one pass; members on different devices run at the same
    time; `repr` shows the passes. Not covered: saving (save the members) and training the mixture.

    Raises `UserError` where vocabularies differ (except for members with one of `token_maps`, see `token_map`), and where
    the mixture names other members.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, members: Mapping[str, Member], mixture: Mixture, token_maps: Mapping[str, TokenMap] | None = None):
        self.token_maps = dict(token_maps or {})
        alike = {name: member for name, member in members.items() if name not in self.token_maps}
        check_same_vocabulary({name: member.tokenizer for name, member in alike.items()})
        first = next(iter(alike.values()))
        rows = check_rows({name: member.rows for name, member in alike.items()}, first.tokenizer)
        texts = [member.model.config.get_text_config() for member in members.values()]
        super().__init__(
            # Only what the mixture shows: transformers changes a member's config that is part of another config (it drops the
            # attention implementation, and the member then attends to later tokens).
            PreTrainedConfig(
                vocab_size=rows,
                num_hidden_layers=sum(text.num_hidden_layers for text in texts),
                hidden_size=texts[0].hidden_size,
                max_position_embeddings=min((getattr(text, "max_position_embeddings", None) or 2**31) for text in texts),
                bos_token_id=first.tokenizer.bos_token_id,
                eos_token_id=first.tokenizer.eos_token_id,
                pad_token_id=first.tokenizer.pad_token_id,
                dtype=first.model.dtype,
            )
        )
        self.generation_config = copy.deepcopy(first.model.generation_config)
        if self.generation_config.pad_token_id is None:
            self.generation_config.pad_token_id = first.tokenizer.pad_token_id
        self.members = nn.ModuleDict({name: member.model for name, member in members.items()})
        accepted = {name: inspect.signature(member.model.forward).parameters for name, member in members.items()}
        for name, parameters in accepted.items():
            if not {"past_key_values", "logits_to_keep"} <= parameters.keys():
                kind = type(members[name].model).__name__
                raise UserError(f"{name}: {kind} does not take a cache of keys and values; choose a model that does")
        self._readers = {
            name: Reader(name, member.model, member.adapter, self.token_maps.get(name), "position_ids" in accepted[name])
            for name, member in members.items()
        }
        self.mixture = mixture
        self.speculation = SpeculationReport(0, 0, 0, 0)  # of the last call of `generate` with `speculate`
        self.post_init()
        self.eval()

    def init_weights(self) -> None:
        """Leaves the weights alone: the default would initialise unknown modules again, LoRA adapters among them."""

    @property
    def mixture(self) -> Mixture:
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        check_mixture(mixture, self.members, self.config.vocab_size)
        mapped = [(name, value) for name, value in active(mixture).items() if name in self.token_maps and not callable(value)]
        check_pairs(mapped)
        self._covered: list[float] = []
        self._mixture = dict(mixture) if isinstance(mixture, Mapping) else mixture

    @property
    def mass_covered(self) -> float:
        """The mean share of the base's probability on mapped tokens, since the mixture was set; NaN where no map was used."""
        return sum(self._covered) / len(self._covered) if self._covered else float("nan")

    def extra_repr(self) -> str:
        """Which members share a pass, on which device."""
        passes = [
            f"{' + '.join(reader.name for reader in group)}{' on one set of weights' if len(group) > 1 else ''} ({group[0].device})"
            for group in grouped(list(self._readers.values()), (), None)
        ]
        return f"(passes): {', '.join(passes)}"

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("save_pretrained: a mixture has no weights of its own; save its members")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("generate_batch: its paged cache is built for one model and not for a mixture; use generate")

    def get_input_embeddings(self) -> nn.Module:
        return next(iter(self.members.values())).get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> None:
        """A mixture has no head of its own."""

    @property
    def device(self) -> torch.device:
        """The device of the logits: that of the first member, also where its weights are offloaded."""
        return next(iter(self._readers.values())).device

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Int[Tensor, "batch all_time"] | None = None,
        position_ids: Int[Tensor, "#batch time"] | None = None,
        past_key_values: Any = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        prompts: OwnPrompts | None = None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The mixture's logits, fp32, [batch, time or kept, rows]; a tuple with `return_dict=False`.

        Padding may be on either side if `attention_mask` marks it; positions are then counted from the mask, which single
        transformers models do not do. A row holds several texts where its `position_ids` start again and there is neither mask
        nor cache. `labels` are shifted inside, as in transformers. Where members read `prompts` of their own, the logits begin at
        the prompt's last token. Coefficients that are functions count positions from `prompt_lengths` (tokens per row without
        padding); without it, from the beginning of the row.

        Returns a cache unless `use_cache` is false or a row holds several texts. Raises `UserError` for a cache that does not
        come from `new_cache`, for a mask that does not cover the cached tokens, and for arguments that it does not support.
        """
        for name, value in unsupported.items():
            if not (value is None or value is False):
                raise UserError(NO_STATES if name == "fused_lm_head" else f"{name}: a mixture's forward does not take it; leave it out")
        if input_ids is None:
            raise UserError("input_ids: members read tokens; give them")
        self._check_cache(past_key_values)
        several = position_ids is not None and attention_mask is None and has_several_texts(position_ids)
        if several:
            self._check_takes_positions(prompts is not None)
        if past_key_values is None and (not several and getattr(self.config, "use_cache", True) if use_cache is None else use_cache):
            past_key_values = self.new_cache()
        if (
            attention_mask is not None
            and prompts is None
            and attention_mask.shape[1] < (needed := self._already_read(past_key_values) + input_ids.shape[1])
        ):
            raise UserError(f"attention_mask: it must cover what the cache holds and the new tokens, {needed}, not {attention_mask.shape[1]}")
        if position_ids is not None:
            position_ids = position_ids.expand_as(input_ids)
        logits = self.member_logits(active(self.mixture), input_ids, attention_mask, position_ids, past_key_values, logits_to_keep, prompts)
        if position_ids is None and depends_on_context(self.mixture):
            mask = self._all_read(input_ids, past_key_values, prompts, input_ids.shape[1]) if attention_mask is None else attention_mask
            position_ids = positions_of(mask)[:, -input_ids.shape[1] :]
        mixed: Float[Tensor, "batch kept rows"] = self.mixed(logits, position_ids, prompt_lengths, logits_to_keep)
        loss = None if labels is None else self.loss_function(logits=mixed, labels=labels, vocab_size=self.config.vocab_size)
        output = MixtureOutput(loss=loss, logits=mixed, past_key_values=past_key_values)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def generate(
        self,
        inputs: Int[Tensor, "batch time"] | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        speculate: bool = False,
        draft: str = "expert",
        draft_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`. `speculate` gives the same distribution with fewer passes of the base, and with greedy decoding the
        same tokens in fp32 (see `speculation`).

        `prompts` are token ids that a member reads instead of the shared prompt, one list per row. `draft` is the member that
        proposes `draft_tokens` tokens at a time; without a number, as many as pay off. The attribute `speculation` then has the
        counts. Raises `UserError` for a prompt longer than a member's window, and for options that a mixture or speculation
        does not support.
        """
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if kwargs.get("inputs_embeds") is not None:
            raise UserError("inputs_embeds: each member has embeddings of its own; give input_ids")
        if ids is None:
            raise UserError("input_ids: a mixture needs token ids; give a prompt of at least one token")
        by_context = depends_on_context(self.mixture)
        mask = kwargs.get("attention_mask")
        if mask is None and (prompts is not None or by_context):
            pads = {self.config.pad_token_id, kwargs.get("pad_token_id"), getattr(generation_config, "pad_token_id", None)} - {None}
            if any((ids == pad).any() for pad in pads):
                raise UserError("attention_mask: the prompt has padding tokens, so a mask is needed; give it")
            mask = kwargs["attention_mask"] = torch.ones_like(ids)
        self._check_continuation(kwargs.get("past_key_values"), ids, mask, prompts is not None)
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device) if mask is None else mask.sum(1)
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"] = kwargs["position_ids"].expand(len(ids), -1)
            tokens, width = torch.ones_like(ids) if mask is None else mask, positions.shape[1]
            # Assisted decoding gives the positions that are counted anyway.
            if ((positions - positions_of(tokens)[:, -width:]) * tokens[:, -width:]).any():
                self._check_takes_positions(prompts is not None)
            if has_several_texts(positions, mask):
                raise UserError("position_ids: a row's positions must go up by one, because a row is one text; give each text a row")
            lengths = positions[:, -1] + 1
        if prompts is not None:
            kwargs["prompts"] = own_prompts(prompts, ids.shape[1], len(ids), self.config.pad_token_id or 0, ids.device)
        if by_context:
            kwargs["prompt_lengths"] = lengths
        self._check_windows(int(lengths.max()), {name: max(map(len, given)) for name, given in (prompts or {}).items()})
        if speculate:
            for name in ("past_key_values", "custom_generate"):
                if kwargs.get(name) is not None:
                    raise UserError(f"{name}: speculation has its own; leave one of the two out")
            kwargs["custom_generate"] = functools.partial(speculative_decoding, draft=draft, draft_tokens=draft_tokens)
        return super().generate(ids, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, tokenizer: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Overrides a step of `generate`, which would pass the tokenizer on to `forward`."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Overrides a step of `generate`: adds a check for NaN logits."""
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if not generation_config.remove_invalid_values:
            processors.insert(0, NumbersOnly(" + ".join(active(self.mixture))))
        return processors

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], synced_gpus: bool | None, assistant_model: Any, streamer: Any
    ) -> dict[str, Any]:
        """Overrides a step of `generate`, which would not pass these three on to a custom decoding loop."""
        kept = {"tokenizer": kwargs.get("tokenizer"), "assistant_model": assistant_model, "streamer": streamer}
        found = super()._extract_generation_mode_kwargs(custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        return found | {name: value for name, value in kept.items() if value is not None}

    def mixed(
        self,
        logits: Mapping[str, Float[Tensor, "batch kept rows"]],
        positions: Int[Tensor, "batch time"] | None,
        prompt_lengths: Int[Tensor, " batch"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
    ) -> Float[Tensor, "batch kept rows"]:
        """The current mixture of its active members' logits, which are those at the kept ones of `positions`.

        Positions are needed where a coefficient is a function.
        """
        if not depends_on_context(self.mixture):
            return combine(logits, self.mixture)
        assert positions is not None
        kept = next(iter(logits.values())).shape[1]
        positions = positions[:, logits_to_keep] if isinstance(logits_to_keep, Tensor) else positions[:, -kept:]
        following = positions + 1 if prompt_lengths is None else positions + 1 - prompt_lengths[:, None]
        row = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
        return combine(logits, self.mixture, Context(logits, following, row, len(positions)))

    def member_logits(
        self,
        names: Collection[str],
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch all_time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        past_key_values: MixtureCache | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        prompts: OwnPrompts | None = None,
    ) -> dict[str, Float[Tensor, "batch kept_time rows"]]:
        """The logits of each named member, in its own dtype: one forward pass per member, or per group that shares weights."""
        if past_key_values is not None and (missing := set(names) - past_key_values.members.keys()):
            raise UserError(f"past_key_values: it was made for another mixture and lacks {', '.join(sorted(missing))}; start a new cache")
        own = {} if prompts is None else prompts.ids
        static = past_key_values is not None and past_key_values.is_static
        if attention_mask is None and (own or self.token_maps or static):
            attention_mask = self._all_read(input_ids, past_key_values, prompts)
        if prompts is not None and attention_mask is not None and own:
            if not isinstance(logits_to_keep, int):
                raise UserError("logits_to_keep: with prompts of a member's own it must be a number; columns differ among members")
            begins = attention_mask.shape[1] == input_ids.shape[1]
            most = input_ids.shape[1] - prompts.columns + 1 if begins else input_ids.shape[1]
            logits_to_keep = min(logits_to_keep, most) if logits_to_keep else most
        groups = grouped([self._readers[name] for name in names], own, past_key_values)

        def start(group: list[Reader]) -> Callable[[], dict[str, Tensor]]:
            first = group[0]
            if first.token_map is not None:
                assert attention_mask is not None
                pad = self.config.pad_token_id or 0
                return functools.partial(run_mapped, first, input_ids, attention_mask, past_key_values, logits_to_keep, prompts, pad)
            read = reading(first.name, input_ids, attention_mask, position_ids, prompts)
            return functools.partial(run, group, read, past_key_values, logits_to_keep)

        found = at_once([start(group) for group in groups], [group[0].device for group in groups])
        every = dict(pair for pairs in found for pair in pairs.items())
        logits = {name: every[name][..., : self.config.vocab_size].to(self.device) for name in names}
        self._note_coverage(logits)
        return logits

    def sharing(self, name: str, names: Collection[str], prompts: OwnPrompts | None = None) -> tuple[str, ...]:
        """Those of the names, `name` included, that share a pass with it."""
        groups = grouped([self._readers[name] for name in names], () if prompts is None else prompts.ids, None)
        return next(found for group in groups if name in (found := tuple(reader.name for reader in group)))

    def _all_read(
        self, ids: Int[Tensor, "batch time"], cache: MixtureCache | None, prompts: OwnPrompts | None = None, already: int = 0
    ) -> Int[Tensor, "batch all_time"]:
        """The mask over cached and new tokens where none was given: `generate` leaves out a mask that masks nothing.

        `already` of the new tokens are in the cache by now.
        """
        return ids.new_ones(len(ids), self._already_read(cache, prompts) - already + ids.shape[1])

    def _already_read(self, cache: MixtureCache | None, prompts: OwnPrompts | None = None) -> int:
        """How many columns of the shared tokens are in the cache."""
        if cache is None:
            return 0
        name, member = next((pair for pair in cache.members.items() if pair[0] not in self.token_maps), next(iter(cache.members.items())))
        read = int(member.get_seq_length())
        if read and prompts is not None and name in prompts.ids:
            read += prompts.columns - prompts.ids[name].shape[1]
        return read

    def _check_cache(self, cache: Any) -> None:
        if not (cache is None or isinstance(cache, MixtureCache)):
            raise UserError(
                f"past_key_values: a mixture keeps a cache for each member, which a {type(cache).__name__} is not; start with model.new_cache()"
            )

    def _check_takes_positions(self, own: bool) -> None:
        without = [name for name in active(self.mixture) if name in self.token_maps or not self._readers[name].takes_positions]
        if own or without:
            raise UserError(
                f"position_ids: {', '.join(without) or 'a member with its own prompt'} counts positions by itself; leave it out, one row per text"
            )

    def _check_continuation(self, cache: Any, ids: Int[Tensor, "batch time"], mask: Tensor | None, own: bool) -> None:
        """`ids` are the whole text or, with a mask over the whole text, the tokens after those in the cache."""
        self._check_cache(cache)
        read = self._already_read(cache)
        if not read:
            return
        if own:
            raise UserError("prompts: members read their own from its beginning; leave past_key_values out")
        whole = ids.shape[1] if mask is None else mask.shape[1]
        if whole not in (ids.shape[1], read + ids.shape[1]) or whole <= read:
            raise UserError(
                f"attention_mask: the cache holds {read} tokens and {ids.shape[1]} are given; give the whole text,"
                " or new tokens with a mask over the whole"
            )

    def _note_coverage(self, logits: Mapping[str, Tensor]) -> None:
        alike = [name for name in logits if name not in self.token_maps]
        for name in [name for name in logits if name in self.token_maps][:1] if alike else []:
            self._covered.append(float(self.token_maps[name].mass_covered(logits[alike[0]]).mean()))

    def _check_windows(self, longest: int, own: Mapping[str, int]) -> None:
        for name in active(self.mixture):
            window = getattr(self.members[name].config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
            if window is not None and own.get(name, longest) > window:
                raise UserError(f"{name}: the prompt has {own.get(name, longest)} tokens, its window only {window}; shorten it")

    def new_cache(self, names: Collection[str] | None = None, static_length: int | None = None) -> MixtureCache:
        """An empty cache of the named members (default: the mixture's), with a fixed number of positions if `static_length` is given."""
        configs = {name: self.members[name].config for name in (active(self.mixture) if names is None else names)}
        if static_length is None:
            return MixtureCache({name: DynamicCache(config=config) for name, config in configs.items()})
        return MixtureCache({name: StaticCache(config=config, max_cache_len=static_length) for name, config in configs.items()})

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Overrides a step of `generate`, which would build one cache from one config. Here all settings are known, so they are checked."""
        kind, own = generation_config.cache_implementation, model_kwargs.get("prompts")
        self._check_settings(generation_config, own, "prompt_lengths" in model_kwargs)
        if kind not in (None, "dynamic", *STATIC):
            raise UserError(f"cache_implementation: a mixture takes 'dynamic' or 'static', not {kind!r}")
        if kind in STATIC and self.token_maps:
            raise UserError("cache_implementation: members with a token map read more tokens than there are in the mixture; leave it out")
        if model_kwargs.get("past_key_values") is not None:
            if kind is not None:
                raise UserError("cache_implementation: past_key_values is a cache already; leave one of the two out")
            return
        if generation_config.use_cache is False:
            return
        further = 0 if own is None else max(0, *(ids.shape[1] - own.columns for ids in own.ids.values()))
        static_length = max(max_cache_length, generation_config.max_cache_len or 0) + further if kind in STATIC else None
        model_kwargs["past_key_values"] = self.new_cache(static_length=static_length)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _check_settings(self, settings: GenerationConfig, own: OwnPrompts | None, by_context: bool) -> None:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(settings, name):
                raise UserError(f"{name}: a mixture has none of its own; ask its members")
        if settings.assistant_early_exit is not None:
            raise UserError("assistant_early_exit: a mixture has no layers of its own to leave early; use speculate=True")
        if settings.guidance_scale not in (None, 1) and (own is not None or by_context):
            raise UserError("guidance_scale: the prompt without guidance is one that all members share; leave prompts and functions out")
        if settings.token_healing and own is not None:
            raise UserError("token_healing: it mends the shared prompt alone; leave it or prompts out")
