"""Generation that speculates sees, counts, stops and draws as plain generation does, whatever was asked for."""

from typing import Any

import pytest
import torch
import transformers
from helpers import DICTIONARY, GREEDY, Plain, StopsByRow, drawn, letters, make_model, make_tokenizer, mixture_of, models_of, padded
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from proxytune import Member, ProxyTunedForCausalLM, UserError, proxy_tuning


class Keeps(BaseStreamer):
    def __init__(self) -> None:
        self.kept: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.kept.append(value.flatten().tolist())

    def end(self) -> None:
        self.kept.append([])


def test_what_speculation_would_drop_is_refused() -> None:
    mixture, ids = mixture_of("llama"), drawn(1, 6)
    for options, words in (
        ({"labels": ids}, "labels: speculation does not support it"),
        ({"custom_generate": print}, "custom_generate: speculation"),
    ):
        with pytest.raises(UserError, match=words):
            mixture.generate(ids, speculate=True, **GREEDY, **options)


def test_criteria_and_streamers_see_what_they_see_in_plain_decoding() -> None:
    mixture, seen = mixture_of("llama"), {}
    for speculate in (False, True):
        criterion, streamer = StopsByRow([10, 15, 13]), Keeps()
        mixture.generate(**padded(), **GREEDY, stopping_criteria=StoppingCriteriaList([criterion]), streamer=streamer, speculate=speculate)
        seen[speculate] = criterion.widths, streamer.kept
    assert seen[False] == seen[True]
    assert seen[True][0] == [9, 10, 11, 12, 13, 14, 15]


def test_a_row_that_is_ahead_waits_for_its_end_and_goes_on_where_the_criteria_let_it() -> None:
    """Trap: an end token that was accepted among others leaves in the cache what the row, as it turns out, goes on without."""

    class EndsLate(transformers.EosTokenCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return super().__call__(input_ids, scores) & (input_ids.shape[1] >= 14)

    mixture = mixture_of("llama")
    options = GREEDY | {"stopping_criteria": StoppingCriteriaList([EndsLate(list(range(3, 30)))])}
    right = Plain(*models_of("llama")).generate(**padded(), **options)
    assert torch.equal(mixture.generate(**padded(), speculate=True, draft_tokens=4, **options), right)
    assert right.shape[1] >= 14


def law_of(plain: Plain, prompt: list[int], options: dict[str, Any]) -> torch.Tensor:
    """Of every three tokens after the prompt, from the scores of one plain step after each beginning."""
    rows, law = torch.tensor([prompt]), torch.ones(1)
    positions = options.get("position_ids")
    for _ in range(3):
        settings = GREEDY | {"do_sample": True, "top_k": 0} | options | {"max_new_tokens": 1, "num_return_sequences": 1}
        if positions is not None:
            settings["position_ids"] = positions
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
        scores = plain.generate(rows, attention_mask=torch.ones_like(rows), **settings, **DICTIONARY).scores[0]
        count = scores.shape[1]
        rows = torch.cat([rows.repeat_interleave(count, 0), torch.arange(count).repeat(len(rows))[:, None]], dim=1)
        law = (law[:, None] * scores.softmax(-1)).flatten()
    return law


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.4, "top_p": 0.9},
        {"num_return_sequences": 4, "min_p": 0.05},
        {"repetition_penalty": 1.8, "typical_p": 0.9},
        {"watermarking_config": WatermarkingConfig(bias=2.0, seeding_scheme="lefthash")},
        {"position_ids": torch.tensor([[4, 5, 6]])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_speculated_samples_have_the_plain_models_law(options: dict[str, Any]) -> None:
    models, rows = [make_model("gpt2", seed=seed, rows=7, layers=1, hidden=16) for seed in range(3)], 2000
    mixture = ProxyTunedForCausalLM(
        {name: Member(model, make_tokenizer(words=7)) for name, model in zip(("base", "expert", "antiexpert"), models, strict=True)},
        proxy_tuning(0.5),
    )
    prompt = [3, 5, 6]
    torch.manual_seed(0)
    settings = GREEDY | {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "eos_token_id": None} | options
    found = mixture.generate(torch.tensor([prompt] * rows), speculate=True, draft_tokens=2, **settings)[:, 3:]
    seen = torch.bincount(found @ torch.tensor([49, 7, 1]), minlength=343)
    values = []
    for alpha in (0.5, 0.0):
        expected = law_of(Plain(*models, alpha=alpha), prompt, options | {"eos_token_id": None}) * len(found)
        common = expected >= 5
        observed = torch.cat([seen[common], seen[~common].sum()[None]]).double()
        wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
        values.append(chisquare(observed[wanted > 0], wanted[wanted > 0] * observed.sum() / wanted.sum()).pvalue)
        assert alpha == 0.0 or not seen[expected == 0].any()
    assert values[0] > 0.01
    assert values[1] < 1e-6


def test_what_was_speculated_can_be_trained_on() -> None:
    mixture = mixture_of("llama")
    rollout = mixture.generate(drawn(1, 6), speculate=True, **GREEDY)
    assert not rollout.is_inference()
    student = make_model(seed=9)
    student(rollout, labels=rollout).loss.backward()
    assert student.get_input_embeddings().weight.grad.abs().sum() > 0
    with torch.inference_mode():
        assert mixture.generate(drawn(1, 6), speculate=True, **GREEDY).is_inference()


def test_rows_are_counted_until_they_end() -> None:
    mixture, ids = mixture_of("llama"), drawn(4, 6)
    options = GREEDY | {"max_new_tokens": 60, "eos_token_id": list(range(3, 9)), "draft_tokens": 4, "speculate": True}
    apart, lengths = [], []
    for row in ids:
        lengths.append(mixture.generate(row[None], **options).shape[1])
        apart.append(mixture.speculation)
    assert 8 < max(lengths) < 40 and len(set(lengths)) > 2
    mixture.generate(ids, **options)
    assert mixture.speculation == tuple(map(sum, zip(*apart, strict=True)))


def test_a_batch_may_fill_the_window() -> None:
    """Trap: positions of tokens that are drafted behind the last that a row will have."""
    members = {}
    for name, seed in (("base", 1), ("expert", 1), ("antiexpert", 3)):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=24, initializer_range=0.3, pad_token_id=0)
        members[name] = Member(AutoModelForCausalLM.from_config(config).eval(), letters())
    mixture = ProxyTunedForCausalLM(members, proxy_tuning(0.4))
    options = GREEDY | {"max_new_tokens": 18, "eos_token_id": None}
    ids = drawn(6, 6)
    assert torch.equal(mixture.generate(ids, speculate=True, draft_tokens=4, **options), mixture.generate(ids, **options))
    assert 0 < mixture.speculation.acceptance < 1
