"""A mixture of language models as one transformers model.

`ProxyTunedForCausalLM` runs its members on the same tokens and adds up their logits (see `mixture.combine`). Everything
that takes a causal language model takes it: `generate` with beams, sampling, streaming and stopping criteria, evaluation
harnesses, trainers that only read the loss.
"""

import copy
import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Mixture, active, check_mixture, combine
from proxytune.padding import positions_of
from proxytune.vocabulary import check_rows, check_same_vocabulary


class ProxyTunedForCausalLM(PreTrainedModel, GenerationMixin):
    """Members and the mixture of them that is in force.

    `mixture` may be set at any time between calls; a member with coefficient 0 is not run. Logits are as wide as the
    narrowest head among the members. Members are used as they are given: their weights, adapters, devices and configs
    stay untouched. Not covered: prompts of their own for members, saving (save the members), training the mixture.

    Raises `UserError` where vocabularies differ or the mixture is not one over these members.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, members: Mapping[str, Member], mixture: Mixture):
        check_same_vocabulary({name: member.tokenizer for name, member in members.items()})
        first = next(iter(members.values()))
        rows = check_rows({name: member.rows for name, member in members.items()}, first.tokenizer)
        texts = [member.model.config.get_text_config() for member in members.values()]
        super().__init__(
            # The mixture's outside only: transformers changes a config that it is given as a part of another (it forgets the
            # attention implementation, and the member then sees the future).
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
        self._takes_positions = {name: "position_ids" in inspect.signature(member.model.forward).parameters for name, member in members.items()}
        self.mixture = mixture
        self.post_init()
        self.eval()

    def init_weights(self) -> None:
        """Leaves the weights alone: the default initialises again whatever it does not know, LoRA adapters above all."""

    @property
    def mixture(self) -> dict[str, int | float]:
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        check_mixture(mixture, self.members)
        self._mixture = dict(mixture)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("save_pretrained: a mixture has no weights of its own; save its members")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise UserError("generate_batch: its paged cache is built for one model and not for a mixture; use generate")

    def get_input_embeddings(self) -> nn.Module:
        return next(iter(self.members.values())).get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> None:
        """A mixture has no head of its own."""

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch all_time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        past_key_values: MixtureCache | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """The mixture's logits, fp32, [batch, time or kept, rows].

        Padding may stand on either side if `attention_mask` says where; positions are then counted from the mask, which
        bare transformers models do not do by themselves. `labels` are shifted inside, as transformers does.
        """
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(active(self.mixture))
        logits = self.member_logits(active(self.mixture), input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
        mixed: Float[Tensor, "batch kept rows"] = combine(logits, self.mixture)
        loss = None if labels is None else self.loss_function(logits=mixed, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=mixed, past_key_values=past_key_values)

    def generate(self, *args: Any, speculate: bool = False, draft: str = "expert", draft_tokens: int = 4, **kwargs: Any) -> Any:
        """transformers' `generate`; with `speculate`, the same law from fewer passes of the base (see `speculation`).

        `draft` is the member that proposes, `draft_tokens` how many tokens at first. Counts are in `speculation` after it.
        """
        if speculate:
            from proxytune.speculation import speculative_decoding

            # transformers keeps the streamer from a decoding loop that it is given.
            streamer = kwargs.get("streamer")
            kwargs["custom_generate"] = functools.partial(speculative_decoding, draft=draft, draft_tokens=draft_tokens, streamer=streamer)
        return super().generate(*args, **kwargs)

    def member_logits(
        self,
        names: Collection[str],
        input_ids: Int[Tensor, "batch time"],
        attention_mask: Int[Tensor, "batch all_time"] | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        past_key_values: MixtureCache | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
    ) -> dict[str, Float[Tensor, "batch kept_time rows"]]:
        """The logits of each named member, in its own type, one plain forward pass each."""
        if past_key_values is not None and (missing := set(names) - past_key_values.members.keys()):
            raise UserError(f"past_key_values: it was made for another mixture and lacks {', '.join(sorted(missing))}; start a new cache")
        if position_ids is None and attention_mask is not None:
            position_ids = positions_of(attention_mask)[:, -input_ids.shape[1] :]
        logits = {}
        for name in names:
            positions = {"position_ids": position_ids} if self._takes_positions[name] else {}
            output = self.members[name](
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=None if past_key_values is None else past_key_values.members[name],
                use_cache=past_key_values is not None,
                logits_to_keep=logits_to_keep,
                **positions,
            )
            logits[name] = output.logits[..., : self.config.vocab_size]
        return logits

    def new_cache(self, names: Collection[str], static_length: int | None = None) -> MixtureCache:
        """An empty cache of the named members; with `static_length`, of that fixed number of positions."""
        configs = {name: self.members[name].config for name in names}
        if static_length is None:
            return MixtureCache({name: DynamicCache(config=config) for name, config in configs.items()})
        return MixtureCache({name: StaticCache(config=config, max_cache_len=static_length) for name, config in configs.items()})

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Hooks into `generate`, which would otherwise build one cache from one config."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", *ALL_STATIC_CACHE_IMPLEMENTATIONS):
            raise UserError(f"cache_implementation: a mixture takes 'dynamic' or 'static', not {kind!r}")
        static_length = max_cache_length if kind in ALL_STATIC_CACHE_IMPLEMENTATIONS else None
        model_kwargs["past_key_values"] = self.new_cache(active(self.mixture), static_length)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()
