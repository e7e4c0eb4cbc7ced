"""Rules are what their papers' formulas say, written out by hand, and the same in a pass, a generation and a score."""

import math
from collections.abc import Callable

import pytest
import torch

from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Context, Mixture, Rule, combine, pair, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.rules import by_entropy, contrastive, decaying, interpolation, per_row, realignment, when_unsure
from proxytune.scoring import Request, score

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}


def draw(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 3 * torch.randn(2, 4, 11, generator=generator) for name in ("base", "expert", "antiexpert", "other")}


def somewhere(logits: dict[str, torch.Tensor]) -> Context:
    return Context(logits, torch.arange(4).expand(2, 4), torch.arange(2)[:, None].expand(2, 4), 2)


def test_plausible_tokens_are_those_of_the_paper() -> None:
    logits = draw()
    law = combine(logits, contrastive(0.5, share=0.2)).softmax(-1)
    expert, amateur = logits["base"].softmax(-1), logits["antiexpert"].softmax(-1)
    right = torch.where(expert >= 0.2 * expert.amax(-1, keepdim=True), expert**1.5 / amateur**0.5, 0)
    torch.testing.assert_close(law, right / right.sum(-1, keepdim=True))
    assert (law == 0).any()
    assert not torch.allclose(law, combine(logits, {"base": 1.5, "antiexpert": -0.5}).softmax(-1), atol=1e-3)


def test_a_member_that_only_says_what_is_plausible_runs() -> None:
    logits = draw()
    masked = combine(logits, Rule({"expert": 1.0}, plausible=("base", 0.5)))
    assert torch.equal(masked.isneginf(), logits["base"].softmax(-1) < 0.5 * logits["base"].softmax(-1).amax(-1, keepdim=True))


def test_interpolation_averages_laws_and_not_logits() -> None:
    logits = draw()
    law = combine(logits, interpolation({"base": 0.7, "expert": 0.3})).softmax(-1)
    torch.testing.assert_close(law, 0.7 * logits["base"].softmax(-1) + 0.3 * logits["expert"].softmax(-1))
    assert not torch.allclose(law, combine(logits, {"base": 0.7, "expert": 0.3}).softmax(-1), atol=1e-2)


def test_rows_of_several_pairs_and_of_realignment() -> None:
    logits = draw()
    found = combine(logits, {"base": 1.0} | pair(0.5, "expert", "antiexpert") | {"other": 0.25})
    torch.testing.assert_close(found, logits["base"] + 0.5 * (logits["expert"] - logits["antiexpert"]) + 0.25 * logits["other"])
    torch.testing.assert_close(combine(logits, realignment(0.0)), logits["base"])
    torch.testing.assert_close(combine(logits, realignment(1.0)), logits["expert"])
    torch.testing.assert_close(combine(logits, realignment(1.5)), 1.5 * logits["expert"] - 0.5 * logits["base"])


@pytest.mark.parametrize(
    ("coefficient", "values"),
    [
        (per_row([0.5, 2.0]), torch.tensor([[0.5], [2.0]]).expand(2, 4)),
        (decaying(0.8, half_life=2.0), torch.tensor([0.8, 0.8 * 2**-0.5, 0.4, 0.4 * 2**-0.5]).expand(2, 4)),
    ],
)
def test_coefficients_that_are_functions(coefficient: Callable, values: torch.Tensor) -> None:
    logits = draw()
    right = logits["base"] + values[..., None] * (logits["expert"] - logits["antiexpert"])
    torch.testing.assert_close(combine(logits, proxy_tuning(coefficient), somewhere(logits)), right)


def test_coefficients_that_look_at_the_base() -> None:
    logits = draw()
    best = logits["base"].softmax(-1).amax(-1)
    delta = logits["expert"] - logits["antiexpert"]
    found = combine(logits, proxy_tuning(when_unsure(2.0, confidence=0.6)), somewhere(logits))
    assert 0 < (best < 0.6).sum() < best.numel()
    torch.testing.assert_close(found, torch.where((best < 0.6)[..., None], logits["base"] + 2 * delta, logits["base"]))
    law = logits["base"].softmax(-1)
    entropy = -(law * law.log()).sum(-1, keepdim=True) / math.log(11)
    torch.testing.assert_close(combine(logits, proxy_tuning(by_entropy(0.9)), somewhere(logits)), logits["base"] + 0.9 * entropy * delta)
    flat = logits | {"base": torch.zeros(2, 4, 11)}
    torch.testing.assert_close(combine(flat, proxy_tuning(by_entropy(0.9)), somewhere(flat)), 0.9 * delta)


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_forbidden_tokens_under_functions_are_those_under_numbers(sign: float) -> None:
    logits = draw()
    logits["expert"][..., 3] = logits["antiexpert"][..., 4] = logits["expert"][..., 5] = logits["antiexpert"][..., 5] = -torch.inf
    constant = per_row([sign, sign])
    for row in (proxy_tuning, lambda alpha: {"base": 1.0, "expert": alpha}):
        found = combine(logits, row(constant), somewhere(logits))
        assert not (found.isnan() | found.isposinf()).any()
        if sign >= 0:
            torch.testing.assert_close(found, combine(logits, row(sign)))


RULES: dict[str, Mixture] = {
    "number": proxy_tuning(0.7),
    "contrastive": contrastive(0.5),
    "interpolation": interpolation({"base": 0.6, "expert": 0.4}),
    "decaying": proxy_tuning(decaying(1.5, half_life=2.0)),
    "entropy": proxy_tuning(by_entropy(2.0)),
    "unsure": proxy_tuning(when_unsure(1.0)),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"speculate": True}], ids=str)
def test_a_generation_is_the_rule_step_by_step(proxy: ProxyTunedForCausalLM, random_ids: Ids, name: str, options: dict) -> None:
    """Left-padded rows of two lengths: positions count from each row's own first answered token."""
    proxy.mixture = RULES[name]
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    found = proxy.generate(ids, attention_mask=mask, **GREEDY, **options)[:, 6:]
    for number in range(2):
        prompt = ids[number][mask[number].bool()][None]
        text = prompt
        for step in range(8):
            with torch.no_grad():
                logits = {member: proxy.members[member](text).logits[:, -1] for member in ("base", "expert", "antiexpert")}
            place = Context(logits, torch.tensor([step]), torch.tensor([0]), 1)
            text = torch.cat([text, combine(logits, RULES[name], place).argmax(-1, keepdim=True)], dim=1)
        assert found[number].tolist() == text[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"speculate": True}], ids=str)
def test_positions_do_not_depend_on_padding(proxy: ProxyTunedForCausalLM, random_ids: Ids, options: dict) -> None:
    """Trap: `generate` gives no mask where nothing is padded."""
    proxy.mixture = proxy_tuning(decaying(3.0, half_life=1.5))
    ids = random_ids(1, 6)
    alone = proxy.generate(ids, **GREEDY, **options)[0, 6:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(proxy.generate(padded, attention_mask=(padded > 0).long(), **GREEDY, **options)[0, 9:], alone)


def test_a_score_is_the_rule_step_by_step(proxy: ProxyTunedForCausalLM) -> None:
    requests = [Request((5, 6, 7)[:length], (8, last, 9, 10)) for length in (1, 3) for last in (11, 12)]
    rules = RULES | {"own alpha": proxy_tuning(per_row([0.0, 0.5, 1.0, 2.0]))}
    scores = score(proxy, requests, rules)
    for name, rule in rules.items():
        for number, request in enumerate(requests):
            text = torch.tensor([request.prefix + request.continuation])
            with torch.no_grad():
                logits = {member: proxy.members[member](text).logits[0, len(request.prefix) - 1 : -1] for member in ("base", "expert", "antiexpert")}
            law = combine(logits, rule, Context(logits, torch.arange(4), torch.full((4,), number), 4)).log_softmax(-1)
            right = law[torch.arange(4), torch.tensor(request.continuation)].sum()
            assert scores[name][number].item() == pytest.approx(right.item(), abs=1e-4), (name, number)


def test_each_row_has_its_own_alpha_under_beams_and_samples(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 6)
    for options in ({"num_beams": 3}, {}, {"speculate": True}):
        proxy.mixture = proxy_tuning(per_row([0.0, 2.0]))
        together = proxy.generate(ids, **GREEDY, **options)
        for number, alpha in enumerate((0.0, 2.0)):
            proxy.mixture = proxy_tuning(alpha)
            assert torch.equal(proxy.generate(ids[number : number + 1], **GREEDY, **options)[0], together[number])
        assert not torch.equal(proxy.generate(ids[:1], **GREEDY, **options)[0], together[0])


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        (Rule({"base": 1.0}, plausible=("judge", 0.1)), "plausible: member 'judge'"),
        (Rule({"base": 1.0}, plausible=("base", 0.0)), r"plausible: the share .* not 0\.0"),
        (interpolation({"base": 0.9, "expert": 0.3}), "sum to 1"),
        (interpolation({"base": 1.5, "expert": -0.5}), "not be negative"),
        (proxy_tuning(math.inf), "finite number, not inf"),
    ],
)
def test_rules_that_are_none_are_refused(proxy: ProxyTunedForCausalLM, mixture: Mixture, words: str) -> None:
    with pytest.raises(UserError, match=words):
        proxy.mixture = mixture


def test_functions_that_cannot_be_evaluated_are_one_line(proxy: ProxyTunedForCausalLM, members: dict[str, Member], random_ids: Ids) -> None:
    proxy.mixture = proxy_tuning(per_row([0.1, 0.2, 0.3]))
    with pytest.raises(UserError, match="3 values for 2 rows"):
        proxy(random_ids(2, 4))
    proxy.mixture = {"expert": by_entropy(1.0)}
    with pytest.raises(UserError, match="looks at 'base'"):
        proxy(random_ids(2, 4))
    with pytest.raises(UserError, match="is a function, but its context is not known"):
        combine(draw(), proxy_tuning(decaying(1.0, 3.0)))
