"""Speculative decoding has the mixture's law: greedy token for token, sampled by a chi-squared test against enumeration."""

from collections.abc import Callable

import pytest
import torch
from helpers import make_members, make_model, make_tokenizer
from scipy.stats import chisquare
from transformers import TextIteratorStreamer

import proxytune.speculation as speculation
from proxytune.draft_length import DraftLength
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 2}


def close_members() -> dict[str, Member]:
    """An expert near the base, so that much is accepted and something refused."""
    members = make_members()
    expert = make_model(seed=1, layers=3, hidden=48)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return members | {"expert": Member(expert.eval(), make_tokenizer())}


MIXED = proxy_tuning(1.0)
MIXTURES = [MIXED, proxy_tuning(0.3), {"base": 1.0}, {"expert": 1.0}]


@pytest.mark.parametrize(
    ("mixture", "draft_tokens"),
    [
        pytest.param(mixture, tokens, marks=() if tokens == 4 or mixture is MIXED else pytest.mark.slow)
        for mixture in MIXTURES
        for tokens in (1, 4, 9)
    ],
)
def test_greedy_is_plain_greedy(random_ids: Ids, mixture: dict[str, float], draft_tokens: int) -> None:
    model = ProxyTunedForCausalLM(close_members(), mixture)
    for seed in range(4):
        prompt = random_ids(1, 1 + 2 * seed, seed=seed)
        plain = model.generate(prompt, **GREEDY)
        assert torch.equal(model.generate(prompt, speculate=True, draft_tokens=draft_tokens, **GREEDY), plain)


def test_greedy_on_other_architectures(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    prompt = random_ids(1, 6)
    assert torch.equal(any_proxy.generate(prompt, speculate=True, **GREEDY), any_proxy.generate(prompt, **GREEDY))


def test_rows_of_a_left_padded_batch_are_plain_rows(random_ids: Ids) -> None:
    model = ProxyTunedForCausalLM(close_members(), proxy_tuning(0.5))
    rows = [random_ids(length, seed=length) for length in (3, 8, 5, 1)]
    ids, mask = torch.zeros(4, 8, dtype=torch.long), torch.zeros(4, 8, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, 8 - len(row) :], mask[number, 8 - len(row) :] = row, 1
    for options in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        plain = model.generate(ids, attention_mask=mask, **GREEDY, **options)
        assert torch.equal(model.generate(ids, attention_mask=mask, speculate=True, **GREEDY, **options), plain), options
    assert model.speculation.emitted <= 80
    assert 0 < model.speculation.acceptance < 1
    assert model.speculation.tokens_per_pass > 1


def small_model() -> ProxyTunedForCausalLM:
    """Seven tokens, so that all sequences of three can be enumerated; members that disagree."""
    tokenizer = make_tokenizer(words=7)
    members = {
        name: Member(make_model(seed=seed, rows=7, layers=1, hidden=16), tokenizer) for seed, name in enumerate(("base", "expert", "antiexpert"))
    }
    for member in members.values():
        with torch.no_grad():
            member.model.get_output_embeddings().weight *= 0.6
    return ProxyTunedForCausalLM(members, proxy_tuning(0.8))


def p_value(count: int = 6000, draft_tokens: int | None = 2, **options: float) -> float:
    """Of the hypothesis that three speculated tokens have the mixture's law, after temperature or top-k."""
    model = small_model()
    prompt = torch.tensor([[3, 5]])
    expected = torch.zeros(7, 7, 7)
    warp = {"temperature": 1.0, "top_k": 0} | options

    def law(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids).logits[0, -1] / warp["temperature"]
        if warp["top_k"]:
            logits[logits < logits.topk(int(warp["top_k"])).values[-1]] = -torch.inf
        return logits.softmax(-1)

    first = law(prompt)
    for a in range(7):
        second = law(torch.cat([prompt, torch.tensor([[a]])], dim=1))
        for b in range(7):
            expected[a, b] = first[a] * second[b] * law(torch.cat([prompt, torch.tensor([[a, b]])], dim=1))
    torch.manual_seed(0)
    output = model.generate(
        prompt.expand(count, -1),
        speculate=True,
        draft_tokens=draft_tokens,
        do_sample=True,
        max_new_tokens=3,
        pad_token_id=0,
        eos_token_id=None,
        **warp,
    )
    found = torch.zeros(7, 7, 7)
    for a, b, c in output[:, 2:].tolist():
        found[a, b, c] += 1
    assert not found[expected == 0].any()
    # Cells of few expected counts are pooled into one.
    common = expected * count >= 5
    observed, wanted = found[common].tolist(), (expected[common] * count).tolist()
    pooled = [count - sum(observed)], [count - sum(wanted)]
    return (
        float(chisquare(observed + pooled[0], wanted + pooled[1]).pvalue)
        if pooled[1][0] > 1
        else float(chisquare(observed, [w * sum(observed) / sum(wanted) for w in wanted]).pvalue)
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3}], ids=str)
def test_samples_have_the_mixtures_law(options: dict[str, float]) -> None:
    assert p_value(**options) > 0.01


def test_samples_have_the_mixtures_law_where_the_draft_decides_when_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far it goes may depend on what it saw, but not on the token in question."""
    monkeypatch.setattr(DraftLength, "one_more", lambda length, confidence: bool(confidence[:, -1].mean() > 0.35))
    assert p_value(draft_tokens=None) > 0.01


def test_accepting_everything_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speculation,
        "verify",
        lambda mixed, drafted, tokens, sample: (torch.full((len(tokens),), tokens.shape[1]), torch.multinomial(mixed[:, -1].softmax(-1), 1)[:, 0]),
    )
    assert p_value() < 1e-6


def test_drawing_refused_tokens_from_the_law_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The common mistake: (p - q)+ forgotten."""
    exact = speculation.verify

    def forgetful(mixed: torch.Tensor, drafted: torch.Tensor, tokens: torch.Tensor, sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, _ = exact(mixed, drafted, tokens, sample)
        return accepted, torch.multinomial(mixed[torch.arange(len(tokens)), accepted].softmax(-1), 1)[:, 0]

    monkeypatch.setattr(speculation, "verify", forgetful)
    assert p_value() < 1e-6


def test_stopping_criteria_and_end_tokens_stop_each_row(random_ids: Ids) -> None:
    model = ProxyTunedForCausalLM(close_members(), proxy_tuning(0.5))
    prompt = random_ids(3, 5)
    plain = model.generate(prompt, **GREEDY)
    end = int(plain[0, 9])
    options = GREEDY | {"eos_token_id": end}
    assert torch.equal(model.generate(prompt, speculate=True, **options), model.generate(prompt, **options))


def test_tokens_are_streamed(random_ids: Ids) -> None:
    model = ProxyTunedForCausalLM(close_members(), proxy_tuning(0.5))
    prompt = random_ids(1, 5)
    streamer = TextIteratorStreamer(make_tokenizer(), skip_prompt=True, timeout=10)
    made = model.generate(prompt, speculate=True, streamer=streamer, **GREEDY)
    assert "".join(streamer).split() == make_tokenizer().decode(made[0, 5:]).split()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": "judge"}, "draft: 'judge' is not a member"),
        ({"num_beams": 2}, "num_beams"),
        ({"draft_tokens": 0}, "draft_tokens"),
        ({"return_dict_in_generate": True}, "return_dict"),
    ],
)
def test_what_cannot_be_speculated_is_refused(proxy: ProxyTunedForCausalLM, random_ids: Ids, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        proxy.generate(random_ids(1, 4), speculate=True, **(GREEDY | options))
