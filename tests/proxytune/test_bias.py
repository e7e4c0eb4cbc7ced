"""A bias on the vocabulary is added at every step, in a pass, a generation, a speculation and a score alike; what it bans is never said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from proxytune.bias import LARGEST_BIAS, Bias
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Mixture, Rule, check_mixture, combine, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score, score_greedily

Ids = Callable[..., torch.Tensor]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
VOCABULARY = 50


def drawn(seed: int = 0, vocabulary: int = VOCABULARY) -> Bias:
    return Bias(3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)))


def draw(*shape: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: 3 * torch.randn(*shape, VOCABULARY, generator=generator) for name in ("base", "expert", "antiexpert")}


@pytest.mark.parametrize("row", [{"base": 1.0}, proxy_tuning(0.7)], ids=["base", "proxy"])
def test_a_bias_is_added_to_the_sum_and_zeros_change_no_bit(row: Mixture) -> None:
    logits, bias = draw(2, 3), drawn()
    assert torch.equal(combine(logits, Rule(row, bias=Bias(torch.zeros(VOCABULARY)))), combine(logits, row))
    assert torch.equal(combine(logits, Rule(row, bias=bias)), combine(logits, row) + bias.values)


def test_a_banned_token_has_no_probability_in_any_space() -> None:
    logits, banned = draw(6), Bias.banning([3, 7], VOCABULARY)
    for rule in (Rule({"base": 1.0}), Rule({"base": 0.5, "expert": 0.5}, space="probabilities"), Rule({"base": 1.0}, plausible=("expert", 0.3))):
        before = combine(logits, rule).softmax(-1)
        after = combine(logits, Rule(rule.row, rule.plausible, rule.space, banned)).softmax(-1)
        assert (after[:, [3, 7]] == 0).all()
        if rule.plausible is None:
            assert (before[:, [3, 7]] > 0).all()
            rest = before.index_fill(-1, torch.tensor([3, 7]), 0)
            torch.testing.assert_close(after, rest / rest.sum(-1, keepdim=True))


def test_the_best_plausible_token_is_one_that_is_not_banned() -> None:
    """Trap: where all others are implausible beside a banned one, nothing would be left."""
    judge = torch.zeros(1, VOCABULARY)
    judge[0, 3], judge[0, 4] = 100.0, 50.0
    logits = {"base": torch.zeros(1, VOCABULARY), "judge": judge}
    rule = Rule({"base": 1.0}, plausible=("judge", 0.1), bias=Bias.banning([3], VOCABULARY))
    assert combine(logits, rule).softmax(-1)[0].nonzero().tolist() == [[4]]


def test_the_largest_bias_and_the_largest_logits_stay_finite() -> None:
    logits = {"base": torch.full((1, 2), torch.finfo(torch.float32).max)}
    for sign in (1, -1):
        assert combine({"base": sign * logits["base"]}, Rule({"base": 1.0}, bias=Bias(torch.full((2,), sign * LARGEST_BIAS)))).isfinite().all()


def test_equal_values_are_one_bias_and_a_later_change_of_the_tensor_is_none() -> None:
    values = torch.tensor([0.0, 1.0, -torch.inf])
    bias, same, other = Bias(values), Bias(torch.tensor([-0.0, 1.0, -torch.inf], dtype=torch.float64)), Bias(torch.tensor([0.0, 1.0, -2.0]))
    values[1] = 5
    assert bias == same and hash(bias) == hash(same) and bias.digest == same.digest
    assert bias != other and bias.digest != other.digest
    assert bias.bans and not other.bans
    assert Rule({"base": 1.0}, bias=bias) == Rule({"base": 1.0}, bias=same) != Rule({"base": 1.0}, bias=other)
    assert Rule({"base": 1.0}, bias=bias) != Rule({"base": 1.0})


@pytest.mark.parametrize("speculate", [False, True])
def test_a_generation_adds_the_bias_at_every_step(proxy: ProxyTunedForCausalLM, random_ids: Ids, speculate: bool) -> None:
    """Left-padded rows of two lengths. Twin: without the bias the texts are others."""
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    options = GREEDY | {"attention_mask": mask, "speculate": speculate}
    for row in ({"base": 1.0}, proxy_tuning(0.8)):
        proxy.mixture = row
        plain = proxy.generate(ids, **options)
        proxy.mixture = Rule(row, bias=drawn())
        found = proxy.generate(ids, **options)
        assert not torch.equal(found, plain)
        for number in range(2):
            text = ids[number][mask[number].bool()][None]
            for _ in range(GREEDY["max_new_tokens"]):
                with torch.no_grad():
                    logits = {name: member(text).logits[:, -1] for name, member in proxy.members.items()}
                text = torch.cat([text, (combine(logits, row) + drawn().values).argmax(-1, keepdim=True)], dim=1)
            assert found[number, 6:].tolist() == text[0, int(mask[number].sum()) :].tolist()


@pytest.mark.parametrize("options", [{}, {"speculate": True}, {"do_sample": True}, {"do_sample": True, "speculate": True}, {"num_beams": 2}], ids=str)
def test_a_banned_token_is_never_generated(proxy: ProxyTunedForCausalLM, random_ids: Ids, options: dict[str, Any]) -> None:
    """Twin: without the ban it is."""
    torch.manual_seed(0)
    ids = random_ids(8, 5)
    proxy.mixture = {"base": 1.0}
    texts = proxy.generate(ids, **GREEDY | options)[:, 5:]
    often = texts.flatten().bincount(minlength=VOCABULARY).argsort(descending=True)[:3].tolist()
    proxy.mixture = Rule({"base": 1.0}, bias=Bias.banning(often, VOCABULARY))
    banned = proxy.generate(ids, **GREEDY | options)[:, 5:]
    assert torch.isin(texts, torch.tensor(often)).any()
    assert not torch.isin(banned, torch.tensor(often)).any()


def test_speculation_draws_from_the_distribution_with_the_bias(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    """The first two tokens of 4,000 texts against their exact distribution, which is not the one without the bias."""
    ids = random_ids(1, 5)
    allowed = [3, 4, 5]
    bias = Bias(torch.full((VOCABULARY,), -torch.inf).index_copy(0, torch.tensor(allowed), torch.tensor([0.5, -0.5, 1.0])))
    proxy.mixture = Rule(proxy_tuning(0.3), bias=bias)
    torch.manual_seed(0)
    options = {"do_sample": True, "max_new_tokens": 2, "pad_token_id": 0, "eos_token_id": None, "top_k": 0, "temperature": 4.0}
    found = proxy.generate(ids.expand(4000, -1), speculate=True, draft_tokens=2, **options)[:, 5:]
    with torch.no_grad():
        first = (proxy(ids).logits[0, -1] / 4).softmax(-1)
        exact = {a: first[a] * (proxy(torch.cat([ids, torch.tensor([[a]])], 1)).logits[0, -1] / 4).softmax(-1) for a in allowed}
    assert set(found.flatten().tolist()) == set(allowed)
    for a in allowed:
        for b in allowed:
            share = float(((found[:, 0] == a) & (found[:, 1] == b)).float().mean())
            assert share == pytest.approx(float(exact[a][b]), abs=4 * (0.25 / 4000) ** 0.5)


def test_scores_add_the_bias_whether_batched_or_alone(proxy: ProxyTunedForCausalLM) -> None:
    bias, banned = drawn(), Bias.banning([9], VOCABULARY)
    requests = [Request((5, 6, 7)[:length], (8, last, 10)) for length in (1, 3) for last in (9, 11)]
    mixtures: dict[str, Mixture] = {"plain": {"base": 1.0}, "bias": Rule({"base": 1.0}, bias=bias), "banned": Rule({"base": 1.0}, bias=banned)}
    together = score_greedily(proxy, requests, mixtures)
    apart = score_greedily(proxy, requests, mixtures, batch_tokens=1, share_prefixes=False)
    for number, request in enumerate(requests):
        with torch.no_grad():
            logits = proxy.members["base"](torch.tensor([request.prefix + request.continuation])).logits[0, len(request.prefix) - 1 : -1]
        for name, vector in (("plain", 0), ("bias", bias.values), ("banned", banned.values)):
            right = (logits + vector).log_softmax(-1)[torch.arange(3), torch.tensor(request.continuation)].sum().item()
            for scores in (together, apart, score_greedily(proxy, [request], mixtures)):
                place = number if len(scores[name].total) > 1 else 0
                assert scores[name].total[place].item() == pytest.approx(right, abs=1e-4), (name, number)
    assert together["banned"].total.isneginf().tolist() == [True, False, True, False]
    zeros = score(proxy, requests, {"zeros": Rule({"base": 1.0}, bias=Bias(torch.zeros(VOCABULARY))), "plain": {"base": 1.0}})
    assert torch.equal(zeros["zeros"], zeros["plain"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Bias(torch.tensor([0.0, torch.nan])), "bias: token 1 has nan"),
        (lambda: Bias(torch.tensor([torch.inf, 0.0])), "bias: token 0 has inf"),
        (lambda: Bias(torch.tensor([0.0, 1e31])), "bias: token 1 has 1.* within ±1e"),
        (lambda: Bias(torch.tensor([-torch.inf, -torch.inf])), "bias: all 2 tokens are banned"),
        (lambda: Bias.banning([0, 1], 2), "bias: all 2 tokens are banned"),
        (lambda: Bias.banning([2], 2), "bias: 2 is no token; the vocabulary has the ids 0 to 1"),
        (lambda: check_mixture(Rule({"base": 1.0}, bias=drawn(vocabulary=49)), ["base"], 50), "bias: it must have one number for each of the 50"),
    ],
)
def test_bad_biases_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_model_takes_no_bias_of_another_length(members: dict[str, Member], proxy: ProxyTunedForCausalLM) -> None:
    wrong = Rule({"base": 1.0}, bias=drawn(vocabulary=49))
    with pytest.raises(UserError, match="each of the 50 tokens, not 49"):
        proxy.mixture = wrong
    with pytest.raises(UserError, match="each of the 50 tokens, not 49"):
        score(proxy, [Request((5,), (6,))], {"wrong": wrong})
    with pytest.raises(UserError, match="each of the 50 tokens, not 49"):
        ProxyTunedForCausalLM(members, wrong)
