"""Every way of generating that transformers documents gives what a plain model with the mixture's logits gives, or is refused.

The plain model is written the obvious way: transformers' own caches hold nothing but what was read, and the members read all
of it again, each by itself, for every token. It shares no code with the mixture.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import CausalLMOutputWithPast

from proxytune import Member, ProxyTunedForCausalLM, UserError, proxy_tuning

ALPHA = 0.8
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO"
VOCABULARY = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {
    token: 3 + number for number, token in enumerate([*LETTERS, "ab", "abc", "de", "def", "xy", "z!"])
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 2}
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_p": 0.95}
ARCHITECTURES = ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bloom", marks=pytest.mark.slow)]


class Plain(PreTrainedModel, GenerationMixin):
    """base + alpha * (expert - antiexpert), from each model's own pass over the whole text."""

    config_class = PreTrainedConfig

    def __init__(self, base: PreTrainedModel, expert: PreTrainedModel, antiexpert: PreTrainedModel, alpha: float = ALPHA):
        super().__init__(PreTrainedConfig(vocab_size=50, num_hidden_layers=1, hidden_size=1, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        self.models = torch.nn.ModuleList([base, expert, antiexpert])
        self.weights = [1, alpha, -alpha]

    def init_weights(self) -> None:
        pass

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True, logits_to_keep=0, **_: Any
    ) -> CausalLMOutputWithPast:
        """Its cache has one layer, whose keys are tokens and whose values are positions."""
        read = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(read, read + input_ids.shape[1])[None]
        ids, positions = input_ids, position_ids.expand_as(input_ids)
        if use_cache:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            ids, positions = past_key_values.update(ids.float()[:, None, :, None], positions.float()[:, None, :, None], 0)
            ids, positions = ids[:, 0, :, 0].long(), positions[:, 0, :, 0].long()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        logits = 0
        for weight, model in zip(self.weights, self.models, strict=True):
            where = {} if model.config.model_type == "bloom" else {"position_ids": positions}
            logits = logits + weight * model(ids, attention_mask=mask, use_cache=False, **where).logits
        kept = logits_to_keep or input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits[:, -kept:], past_key_values=past_key_values if use_cache else None)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters and a few pairs, as stop strings and token healing need one."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, [("a", "b"), ("ab", "c"), ("d", "e"), ("de", "f"), ("x", "y")], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


def model_of(architecture: str, seed: int, layers: int) -> PreTrainedModel:
    if architecture != "bloom":
        return make_model(architecture, seed=seed, layers=layers)
    torch.manual_seed(seed)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=layers, n_head=4, initializer_range=0.3, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def models_of(architecture: str) -> list[PreTrainedModel]:
    """An expert near the base, so that much is accepted and something refused."""
    base, antiexpert = model_of(architecture, 1, 3), model_of(architecture, 3, 2)
    expert = model_of(architecture, 1, 3)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return [base, expert, antiexpert]


def mixture_of(architecture: str) -> ProxyTunedForCausalLM:
    members = {name: Member(model, letters()) for name, model in zip(("base", "expert", "antiexpert"), models_of(architecture), strict=True)}
    return ProxyTunedForCausalLM(members, proxy_tuning(ALPHA))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    ids, mask = drawn(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, padding in enumerate((5, 0, 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


class CountsCalls(LogitsProcessor):
    """As SynthID and guidance do, it expects one call a token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, 3 + self.calls % 5 :: 5] -= 4
        return scores


class StopsByRow(StoppingCriteria):
    """Knows which row is which, and how often it was asked."""

    def __init__(self, limits: Sequence[int]):
        self.limits, self.widths = torch.tensor(limits), []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.widths.append(input_ids.shape[1])
        return input_ids.shape[1] >= self.limits


class Keeps(BaseStreamer):
    def __init__(self) -> None:
        self.kept: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.kept.append(value.flatten().tolist())

    def end(self) -> None:
        self.kept.append([])


def one() -> dict[str, torch.Tensor]:
    return {"inputs": drawn(1, 6)}


def allowed(row: int, ids: torch.Tensor) -> list[int]:
    return list(range(3 + (row + len(ids)) % 2, 50, 2))


# What is asked for, of a padded batch or one row, and the words of the refusal where speculation cannot do it.
MODES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]], str | None]] = {
    "greedy": (padded, dict, None),
    "greedy, one row": (one, dict, None),
    "without a cache": (padded, lambda: {"use_cache": False}, None),
    "dynamic cache": (padded, lambda: {"cache_implementation": "dynamic"}, None),
    "static cache": (padded, lambda: {"cache_implementation": "static"}, "cache_implementation"),
    "static cache, one row": (one, lambda: {"cache_implementation": "static"}, "cache_implementation"),
    "larger static cache": (padded, lambda: {"cache_implementation": "static", "max_cache_len": 64}, "cache_implementation"),
    "chunked prefill": (padded, lambda: {"prefill_chunk_size": 3}, None),
    "chunked prefill of a static cache": (padded, lambda: {"prefill_chunk_size": 3, "cache_implementation": "static"}, "cache_implementation"),
    "several sequences": (padded, lambda: {"num_return_sequences": 2, "do_sample": True, "top_k": 1}, None),
    "beams": (padded, lambda: {"num_beams": 3}, "num_beams"),
    "several beams": (padded, lambda: {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True}, "num_beams"),
    "prompt lookup": (one, lambda: {"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "watermark": (padded, lambda: {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)}, None),
    "guidance": (padded, lambda: {"guidance_scale": 1.7}, "UnbatchedClassifierFreeGuidance"),
    "guidance, negative prompt": (
        padded,
        lambda: {"guidance_scale": 1.7, "negative_prompt_ids": drawn(3, 4, seed=8), "negative_prompt_attention_mask": torch.ones(3, 4).long()},
        "UnbatchedClassifierFreeGuidance",
    ),
    "guidance, no cache": (one, lambda: {"guidance_scale": 1.7, "use_cache": False}, "UnbatchedClassifierFreeGuidance"),
    "stop strings": (padded, lambda: {"stop_strings": list("acegikmoqsuwy"), "tokenizer": letters()}, None),
    "token healing": (
        lambda: {"inputs": torch.tensor([[20, 9, VOCABULARY["ab"]], [8, 11, VOCABULARY["d"]]])},
        lambda: {"token_healing": True, "tokenizer": letters()},
        None,
    ),
    "shifted positions": (one, lambda: {"position_ids": torch.arange(6)[None] + 7}, None),
    "dictionary": (padded, lambda: {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, "return_dict"),
    "dictionary of beams": (
        padded,
        lambda: {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        "num_beams",
    ),
    "own criterion": (padded, lambda: {"stopping_criteria": StoppingCriteriaList([StopsByRow([11, 14, 16])])}, None),
    "own criterion, no end": (padded, lambda: {"stopping_criteria": StoppingCriteriaList([StopsByRow([11, 14, 16])]), "eos_token_id": None}, None),
    "own processor": (padded, lambda: {"logits_processor": [CountsCalls()]}, "CountsCalls may keep state"),
    "end tokens": (padded, lambda: {"eos_token_id": list(range(3, 20))}, None),
    "max_length": (padded, lambda: {"max_length": 15, "max_new_tokens": None}, None),
    "repetition penalty": (padded, lambda: {"repetition_penalty": 1.6}, None),
    "no repeated pairs": (padded, lambda: {"no_repeat_ngram_size": 2}, None),
    "penalty on the prompt": (padded, lambda: {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2}, None),
    "biases": (padded, lambda: {"sequence_bias": {(5,): 6.0, (7, 8): -9.0}, "bad_words_ids": [[9], [4, 6]]}, None),
    "lengths": (padded, lambda: {"min_new_tokens": 6, "exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5}, None),
    "forced end": (padded, lambda: {"forced_eos_token_id": 2, "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": list(range(3, 25))}, None),
    "allowed tokens": (padded, lambda: {"prefix_allowed_tokens_fn": allowed}, None),
    "normalised": (padded, lambda: {"renormalize_logits": True, "remove_invalid_values": True}, None),
    # Sampled: the same draws give the same tokens; what speculation draws is tested by its law below.
    "sampling": (padded, lambda: SAMPLED, "law"),
    "several samples": (padded, lambda: SAMPLED | {"num_return_sequences": 3}, "law"),
    "other warpers": (padded, lambda: SAMPLED | {"top_k": 12, "min_p": 0.02, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3}, "law"),
    "beam sampling": (padded, lambda: SAMPLED | {"num_beams": 3}, "num_beams"),
    "sampled prompt lookup": (one, lambda: SAMPLED | {"prompt_lookup_num_tokens": 3}, "assisted generation"),
    "SynthID": (
        padded,
        lambda: SAMPLED | {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 8], ngram_len=3)},
        "SynthIDTextWatermark",
    ),
    "entropy warper": (padded, lambda: SAMPLED | {"top_h": 0.6}, "TopH"),
}


def check_equal(found: Any, right: Any) -> None:
    if isinstance(right, torch.Tensor):
        assert torch.equal(found, right)
        return
    assert torch.equal(found.sequences, right.sequences)
    for name in ("scores", "logits", "sequences_scores", "beam_indices"):
        ours, theirs = getattr(found, name, None), getattr(right, name, None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mode_is_the_plain_models_or_refused(architecture: str, mode: str) -> None:
    inputs, options, refusal = MODES[mode]
    mixture = mixture_of(architecture)

    def generate(model: PreTrainedModel, **further: Any) -> Any:
        torch.manual_seed(0)
        return model.generate(**(inputs() | GREEDY | options() | further))

    if architecture == "bloom" and "position_ids" in options():
        for speculate in (False, True):
            with pytest.raises(UserError, match="position_ids: base, expert, antiexpert counts positions"):
                generate(mixture, speculate=speculate)
        return
    dynamic = {"cache_implementation": None} if "cache_implementation" in options() else {}
    right, other = generate(Plain(*models_of(architecture)), **dynamic), generate(Plain(*models_of(architecture), alpha=-1.0), **dynamic)
    check_equal(generate(mixture), right)
    with pytest.raises(AssertionError):
        check_equal(other, right)
    if refusal == "law":
        assert generate(mixture, speculate=True).shape[0] == right.shape[0]
    elif refusal is not None:
        with pytest.raises(UserError, match=refusal) as error:
            generate(mixture, speculate=True)
        assert "\n" not in str(error.value)
    else:
        check_equal(generate(mixture, speculate=True, draft_tokens=3), right)
        assert mixture.speculation.drafted > 0
