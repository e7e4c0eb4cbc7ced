"""Every way of generating that transformers documents gives what a plain model with the mixture's logits gives, or is refused.

The plain model is written the obvious way: transformers' own caches hold nothing but what was read, and the members read all
of it again, each by itself, for every token. It shares no code with the mixture."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    ALPHA,
    DICTIONARY,
    GREEDY,
    LETTERED,
    Plain,
    StopsByRow,
    drawn,
    letters,
    mixture_of,
    models_of,
    padded,
)
from transformers import (
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    pipeline,
)

from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_p": 0.95}
ARCHITECTURES = ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bloom", marks=pytest.mark.slow)]


class CountsCalls(LogitsProcessor):
    """As SynthID and guidance do, it expects one call a token."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, 3 + self.calls % 5 :: 5] -= 4
        return scores


def one() -> dict[str, torch.Tensor]:
    return {"inputs": drawn(1, 6)}


def ends_early() -> dict[str, torch.Tensor]:
    """Prompts whose last token is the beginning of longer ones."""
    return {"inputs": torch.tensor([[20, 9, LETTERED["ab"]], [8, 11, LETTERED["d"]]])}


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
    "token healing": (ends_early, lambda: {"token_healing": True, "tokenizer": letters()}, None),
    "shifted positions": (one, lambda: {"position_ids": torch.arange(6)[None] + 7}, None),
    "dictionary": (padded, lambda: DICTIONARY, "return_dict"),
    "dictionary of beams": (padded, lambda: DICTIONARY | {"num_beams": 2}, "num_beams"),
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_going_on_from_a_cache(architecture: str) -> None:
    mixture, plain, ids = mixture_of(architecture), Plain(*models_of(architecture)), drawn(2, 9)
    right, covered = plain.generate(ids, **GREEDY), torch.ones_like(ids)
    for static_length in (None, 32):
        cache = mixture.new_cache(static_length=static_length)
        mixture(ids[:, :6], past_key_values=cache)
        assert torch.equal(mixture.generate(ids, past_key_values=cache, **GREEDY), right)
        cache = mixture.new_cache(static_length=static_length)
        mixture(ids[:, :6], past_key_values=cache)
        found = mixture.generate(ids[:, 6:], attention_mask=covered, past_key_values=cache, **GREEDY)
        assert torch.equal(found[:, 3:], right[:, 9:])
    cache = mixture(ids[:, :6]).past_key_values
    named = {"attention_mask": covered, "position_ids": torch.arange(6, 9)[None]}
    assert torch.equal(mixture.generate(ids[:, 6:], past_key_values=cache, **named, **GREEDY)[:, 3:], right[:, 9:])
    cache = mixture(ids[:, :6]).past_key_values
    for given, words in ((ids[:, 6:], "holds 6 tokens and 3 are given"), (ids[:, :6], "holds 6 tokens and 6 are given")):
        with pytest.raises(UserError, match=words):
            mixture.generate(given, past_key_values=cache, **GREEDY)
    with pytest.raises(UserError, match="must cover what the cache holds and the new tokens, 9, not 3"):
        mixture(ids[:, 6:], attention_mask=covered[:, 6:], past_key_values=cache)
    for given in (ids, ids[:, 6:]):
        with pytest.raises(UserError, match="past_key_values: speculation has its own"):
            mixture.generate(given, attention_mask=covered, past_key_values=cache, speculate=True, **GREEDY)
    turn = mixture.generate(ids, past_key_values=mixture.new_cache(), return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([turn.sequences, drawn(2, 3, seed=4)], dim=1)
    assert torch.equal(mixture.generate(longer, past_key_values=turn.past_key_values, **GREEDY), plain.generate(longer, **GREEDY))


def test_caches_of_another_kind_are_refused() -> None:
    """Trap: filled with the first member's keys alone, or left empty, it would be gone on from as if it were the mixture's."""
    mixture, ids = mixture_of("llama"), drawn(1, 6)
    config = mixture.members["base"].config
    for cache in (DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=20)):
        for call in (mixture.generate, functools.partial(mixture.generate, speculate=True), mixture):
            with pytest.raises(UserError, match=r"past_key_values: .* which a \w+ is not; start with model.new_cache\(\)"):
                call(ids, past_key_values=cache)
    for kind in ("offloaded", "offloaded_static", "offloaded_hybrid", "quantized"):
        for speculate in (False, True):
            with pytest.raises(UserError, match=f"cache_implementation: a mixture takes 'dynamic' or 'static', not '{kind}'"):
                mixture.generate(ids, cache_implementation=kind, speculate=speculate, **GREEDY)
    with pytest.raises(UserError, match="cache_implementation: past_key_values is a cache already"):
        mixture.generate(ids, cache_implementation="static", past_key_values=mixture.new_cache(), **GREEDY)
    assert torch.equal(mixture.generate(ids, past_key_values=mixture.new_cache(), **GREEDY), mixture.generate(ids, **GREEDY))


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assisted_both_ways(architecture: str, options: dict[str, Any]) -> None:
    mixture, plain, ids = mixture_of(architecture), Plain(*models_of(architecture)), drawn(1, 6)
    base, expert, _ = models_of(architecture)

    def generate(model: PreTrainedModel, assistant: PreTrainedModel | None, **further: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, assistant_model=assistant, **(GREEDY | options), **further)

    for target, its_plain, assistant, their_plain in (
        (mixture, plain, expert, expert),
        (base, base, mixture, plain),
        (mixture, plain, mixture, plain),
    ):
        found = generate(target, assistant)
        assert torch.equal(found, generate(its_plain, their_plain))
        if not options:
            assert torch.equal(found, generate(its_plain, None))
    assert not torch.equal(generate(mixture, expert), generate(base, mixture))
    with pytest.raises(UserError, match="assisted generation was asked for"):
        generate(mixture, expert, speculate=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "position_ids: a row's positions must go up by one"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search requires|contrastive search was asked for"),
        ({"dola_layers": "low"}, "Dola Generation requires|dola generation was asked for"),
        ({"force_words_ids": [[5]]}, "Constrained Beam Search requires|constrained beam search was asked for"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("speculate", [False, True])
def test_what_one_model_can_and_a_mixture_cannot_is_refused(options: dict[str, Any], words: str, speculate: bool) -> None:
    with pytest.raises(ValueError, match=words) as error:
        mixture_of("llama").generate(drawn(1, 6), speculate=speculate, **GREEDY, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("speculate", [False, True])
def test_the_pipeline_stops_where_it_is_told(speculate: bool) -> None:
    def answer(model: PreTrainedModel, **options: Any) -> str:
        generator = pipeline("text-generation", model=model, tokenizer=letters())
        return generator("abde", do_sample=False, max_new_tokens=10, eos_token_id=None, **options)[0]["generated_text"]

    mixture, plain = mixture_of("llama"), Plain(*models_of("llama"))
    whole = answer(plain)
    stop = whole[6:8]
    assert answer(mixture, stop_sequence=stop, speculate=speculate) == answer(plain, stop_sequence=stop) == whole[: whole.index(stop, 4) + 2] != whole


def test_a_tokenizer_without_padding() -> None:
    tokenizer = letters()
    tokenizer.pad_token = None
    members = {
        name: Member(copy.deepcopy(model), tokenizer) for name, model in zip(("base", "expert", "antiexpert"), models_of("llama"), strict=True)
    }
    for member in members.values():
        member.model.generation_config.pad_token_id = member.model.config.pad_token_id = None
    mixture, plain, ids = ProxyTunedForCausalLM(members, proxy_tuning(ALPHA)), Plain(*models_of("llama")), drawn(3, 6)
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": list(range(3, 12))}
    right = plain.generate(ids, **options, pad_token_id=3)
    for speculate in (False, True):
        # transformers then pads with the first end token.
        assert torch.equal(mixture.generate(ids, speculate=speculate, **options), right)
        assert mixture.generate(ids, speculate=speculate, **(options | {"eos_token_id": None})).shape == (3, 16)


def test_a_mask_is_read_off_whichever_padding_token_is_named() -> None:
    """Trap: a mask of ones, filled in because the config's own padding token does not occur."""
    mixture, plain, ids = mixture_of("llama"), Plain(*models_of("llama")), padded()["inputs"]
    ids[ids == 0] = 49
    options = GREEDY | {"pad_token_id": 49}
    right = plain.generate(ids, **options)
    for speculate in (False, True):
        assert torch.equal(mixture.generate(ids, speculate=speculate, **options), right)
    assert not torch.equal(right, plain.generate(ids, **(GREEDY | {"attention_mask": torch.ones_like(ids)})))
    mixture.mixture = proxy_tuning(lambda place: torch.full(place.position.shape, ALPHA))
    with pytest.raises(UserError, match="attention_mask"):
        mixture.generate(ids, **options)


@pytest.mark.parametrize("speculate", [False, True])
def test_functions_with_several_sequences_a_prompt(speculate: bool) -> None:
    """Trap: prompt lengths that are not repeated with their rows."""
    mixture = mixture_of("llama")
    mixture.mixture = proxy_tuning(lambda place: 2.0 - 0.7 * place.position)
    options = GREEDY | {"do_sample": True, "top_k": 1}
    apart = mixture.generate(**padded(), **options).repeat_interleave(3, 0)
    assert torch.equal(mixture.generate(**padded(), num_return_sequences=3, speculate=speculate, **options), apart)
    shifted = {"inputs": drawn(1, 6), "position_ids": torch.arange(6)[None] + 3}
    assert torch.equal(mixture.generate(**shifted, speculate=speculate, **GREEDY), by_hand(mixture, **shifted))
    assert not torch.equal(apart[::3], Plain(*models_of("llama")).generate(**padded(), **options))


def by_hand(mixture: ProxyTunedForCausalLM, inputs: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Greedy decoding of a mixture whose strength falls by 0.7 a token."""
    ids, positions = inputs, position_ids
    for step in range(10):
        token = Plain(*models_of("llama"), alpha=2.0 - 0.7 * step)(ids, position_ids=positions, use_cache=False).logits[:, -1:].argmax(-1)
        ids, positions = torch.cat([ids, token], dim=1), torch.cat([positions, positions[:, -1:] + 1], dim=1)
        if token == 2:
            break
    return ids
