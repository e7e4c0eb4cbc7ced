import pytest
import torch
from helpers import make_tokenizer
from transformers import MistralConfig, MistralForCausalLM

import proxytune.scoring as scoring
from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import Mixture, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, cut_to_window, score

MIXTURES: dict[str, Mixture] = {"base": {"base": 1.0}, "expert": {"expert": 1.0}, "proxy": proxy_tuning(0.8), "strong": proxy_tuning(2.0)}


def some_requests() -> list[Request]:
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 50, (length,), generator=generator).tolist())

    prefixes = [draw(length) for length in (1, 4, 4, 9, 13)]
    continuations = [draw(length) for length in (1, 1, 2, 5)]
    return [Request(prefix, continuation) for prefix in prefixes for continuation in continuations]


def slow_score(model: ProxyTunedForCausalLM, request: Request, mixture: Mixture, shift: int = 0) -> float:
    """The obviously right way: each member by itself on the unpadded sequence."""
    ids = torch.tensor([request.prefix + request.continuation])
    with torch.no_grad():
        law = sum(coefficient * model.members[name](ids).logits[0] for name, coefficient in mixture.items()).log_softmax(-1)
    places = range(len(request.prefix) - 1 - shift, ids.shape[1] - 1 - shift)
    return float(sum(law[place, token] for place, token in zip(places, request.continuation, strict=True)))


def test_equals_the_slow_way_for_every_mixture(any_proxy: ProxyTunedForCausalLM) -> None:
    requests = some_requests()
    scores = score(any_proxy, requests, MIXTURES)
    for name, mixture in MIXTURES.items():
        slow = [slow_score(any_proxy, request, mixture) for request in requests]
        assert scores[name].tolist() == pytest.approx(slow, abs=1e-4)
        shifted = [slow_score(any_proxy, request, mixture, shift=1) for request in requests if len(request.prefix) > 1]
        assert max(abs(a - b) for a, b in zip(shifted, scores[name].tolist()[4:], strict=True)) > 0.1


@pytest.mark.parametrize("batch_tokens", [1, 17, 64, 10_000])
def test_does_not_depend_on_batches_or_order(proxy: ProxyTunedForCausalLM, batch_tokens: int) -> None:
    requests = some_requests()
    expected = score(proxy, requests, MIXTURES)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(1)).tolist()
    found = score(proxy, [requests[index] for index in order], MIXTURES, batch_tokens=batch_tokens)
    for name in MIXTURES:
        torch.testing.assert_close(found[name], expected[name][order], atol=1e-5, rtol=1e-5)


def test_mixtures_together_are_mixtures_apart(proxy: ProxyTunedForCausalLM) -> None:
    requests = some_requests()
    together = score(proxy, requests, MIXTURES)
    for name, mixture in MIXTURES.items():
        assert torch.equal(score(proxy, requests, {name: mixture})[name], together[name])


def few_shot_requests() -> tuple[list[Request], int]:
    """Six questions after one beginning of 20 tokens, four choices of three tokens each; and how many tokens differ."""
    beginning = tuple(range(3, 23))
    prefixes = [(*beginning, 30 + question, *range(3, 4 + question)) for question in range(6)]
    requests = [Request(prefix, (40 + choice, 5, 6)) for prefix in prefixes for choice in range(4)]
    return requests, 20 + sum(len(prefix) - 20 for prefix in prefixes) + 2 * len(requests)


def test_every_member_reads_every_token_once_and_unneeded_members_none(proxy: ProxyTunedForCausalLM) -> None:
    fed: dict[str, int] = {}

    def count(name: str) -> None:
        proxy.members[name].register_forward_hook(
            lambda module, args, kwargs, output: fed.update({name: fed.get(name, 0) + kwargs["input_ids"].numel()}), with_kwargs=True
        )

    for name in proxy.members:
        count(name)
    requests, needed = few_shot_requests()
    score(proxy, requests, MIXTURES, batch_tokens=1)
    assert fed == {"base": needed, "expert": needed, "antiexpert": needed}
    fed.clear()
    score(proxy, requests, {"base": {"base": 1.0}, "zero": proxy_tuning(0.0)}, batch_tokens=1)
    assert fed == {"base": needed}
    fed.clear()
    score(proxy, requests, {"base": {"base": 1.0}}, batch_tokens=1, share_prefixes=False)
    assert fed["base"] > 3 * needed


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_shared_prefixes_are_separate_rows(any_proxy: ProxyTunedForCausalLM, batch_tokens: int) -> None:
    for requests in (few_shot_requests()[0], some_requests()):
        shared = score(any_proxy, requests, MIXTURES, batch_tokens=batch_tokens)
        apart = score(any_proxy, requests, MIXTURES, batch_tokens=batch_tokens, share_prefixes=False)
        for name in MIXTURES:
            torch.testing.assert_close(shared[name], apart[name], atol=1e-4, rtol=1e-5)


def test_rows_of_a_cache_that_get_mixed_up_are_noticed(proxy: ProxyTunedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = few_shot_requests()[0]
    right = score(proxy, requests, MIXTURES)
    select = MixtureCache.select_rows
    monkeypatch.setattr(MixtureCache, "select_rows", lambda cache, rows: select(cache, rows.flip(0)))
    assert not torch.allclose(score(proxy, requests, MIXTURES)["proxy"], right["proxy"], atol=1e-2)


def test_sliding_windows_are_read_without_sharing_and_rightly() -> None:
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=4
    )
    config.initializer_range = 0.3
    torch.manual_seed(0)
    member = Member(MistralForCausalLM(config).eval(), make_tokenizer())
    model = ProxyTunedForCausalLM({"base": member}, {"base": 1.0})
    assert not model.new_cache(["base"]).keeps_everything
    requests = some_requests()
    scores = score(model, requests, {"base": {"base": 1.0}})["base"]
    assert scores.tolist() == pytest.approx([slow_score(model, request, {"base": 1.0}) for request in requests], abs=1e-4)


def test_one_token_choices_share_a_row(proxy: ProxyTunedForCausalLM) -> None:
    rows: list[int] = []
    proxy.members["base"].register_forward_hook(lambda module, args, kwargs, output: rows.append(len(output.logits)), with_kwargs=True)
    requests = [Request((5, 6, 7), (token,)) for token in range(3, 33)]
    scores = score(proxy, requests, {"base": {"base": 1.0}})["base"]
    assert rows == [1]
    assert scores.exp().sum() < 1
    assert scores.tolist() == pytest.approx([slow_score(proxy, request, {"base": 1.0}) for request in requests], abs=1e-4)


def test_scores_of_a_generated_text_are_those_of_generating_it(proxy: ProxyTunedForCausalLM) -> None:
    prompt = torch.tensor([[5, 9, 11]])
    made = proxy.generate(prompt, do_sample=False, max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    tokens = made.sequences[0, 3:]
    recorded = sum(float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, tokens, strict=True))
    scored = score(proxy, [Request((5, 9, 11), tuple(tokens.tolist()))], {"proxy": proxy.mixture})["proxy"]
    assert scored.item() == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize(
    ("request_", "word"), [(Request((), (5,)), "empty prefix"), (Request((5,), ()), "empty continuation"), (Request((5,) * 128, (6, 7)), "window")]
)
def test_bad_requests_are_refused(proxy: ProxyTunedForCausalLM, request_: Request, word: str) -> None:
    with pytest.raises(UserError, match=f"number 1 .*{word}"):
        score(proxy, [Request((5,), (6,)), request_], MIXTURES)


def test_long_texts_are_read_in_pieces_that_change_nothing(any_proxy: ProxyTunedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [tuple(torch.randint(3, 50, (length,), generator=generator).tolist()) for length in (100, 90, 61)]
    requests = [Request(text[:cut], text[cut:]) for text in texts for cut in (60, 20)]
    right = score(any_proxy, requests, MIXTURES)
    shapes: list[tuple[int, int]] = []
    any_proxy.members["base"].register_forward_hook(
        lambda module, args, kwargs, output: shapes.append((kwargs["input_ids"].numel(), output.logits.shape[1])), with_kwargs=True
    )
    monkeypatch.setattr(scoring, "LOGITS", 7 * 50)
    found = score(any_proxy, requests, MIXTURES, batch_tokens=16)
    assert max(fed for fed, _ in shapes) <= 16
    assert max(kept for _, kept in shapes) <= 7
    for name in MIXTURES:
        torch.testing.assert_close(found[name], right[name], atol=1e-4, rtol=1e-5)


def test_what_is_too_long_is_cut_on_the_left_and_counted(proxy: ProxyTunedForCausalLM) -> None:
    requests = [Request((5,) * 3, (6, 7)), Request(tuple(range(3, 43)) * 4, (6, 7), {"expert": (9,) * 200}), Request((5,) * 127, (6, 7))]
    fitting, cut = cut_to_window(requests, 128)
    assert cut == 1
    assert fitting[0] == requests[0]
    assert fitting[2] == requests[2]
    assert fitting[1].prefix == requests[1].prefix[-127:]
    assert len(fitting[1].prompts["expert"]) == 127
    score(proxy, fitting, MIXTURES)
    with pytest.raises(UserError, match="continuation of number 0 has 129 tokens"):
        cut_to_window([Request((5,), (6,) * 129)], 128)
