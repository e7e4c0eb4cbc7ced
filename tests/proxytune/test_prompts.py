"""Members with prompts of their own: what each reads is its prompt and the common answer, whatever the lengths."""

from collections.abc import Callable

import pytest
import torch

from proxytune.errors import UserError
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
SHARED = [[5, 6, 7], [8, 9, 10, 11, 12]]
OWN = {"expert": [[20, 21, 5, 6, 7, 22], [20, 21, 8, 22]], "antiexpert": [[30], [31, 32]]}


def batch() -> dict[str, torch.Tensor]:
    return {"inputs": torch.tensor([[0, 0, *SHARED[0]], SHARED[1]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5])}


def slow_greedy(model: ProxyTunedForCausalLM, row: int) -> list[int]:
    """The obviously right way: every member by itself on its own prompt and the answer so far."""
    answer: list[int] = []
    for _ in range(8):
        total = 0.0
        for name, coefficient in model.mixture.items():
            with torch.no_grad():
                total += coefficient * model.members[name](torch.tensor([OWN.get(name, SHARED)[row] + answer])).logits[0, -1]
        answer.append(int(total.argmax()))
    return answer


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"speculate": True}], ids=str)
def test_generation_is_the_slow_loop(any_proxy: ProxyTunedForCausalLM, options: dict) -> None:
    expected = [slow_greedy(any_proxy, row) for row in range(2)]
    assert any_proxy.generate(**batch(), prompts=OWN, **GREEDY, **options)[:, 5:].tolist() == expected
    assert any_proxy.generate(**batch(), **GREEDY, **options)[:, 5:].tolist() != expected


def test_beams_and_samples_read_their_rows_prompts(proxy: ProxyTunedForCausalLM) -> None:
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        found = [proxy.generate(**batch(), prompts=OWN, use_cache=use_cache, **(GREEDY | options)) for use_cache in (True, False)]
        assert torch.equal(*found)
        alone = proxy.generate(torch.tensor([SHARED[1]]), prompts={name: rows[1:] for name, rows in OWN.items()}, **(GREEDY | options))
        assert torch.equal(found[0][-len(alone) :], alone)


def test_the_same_prompt_as_everybodys_changes_nothing(proxy: ProxyTunedForCausalLM) -> None:
    same = {"expert": SHARED}
    assert torch.equal(proxy.generate(**batch(), prompts=same, **GREEDY), proxy.generate(**batch(), **GREEDY))


def test_scores_read_each_members_prefix(any_proxy: ProxyTunedForCausalLM) -> None:
    answers = [(3, 4, 5), (3, 9), (7,)]
    requests = [Request(tuple(SHARED[row]), answer, {name: tuple(rows[row]) for name, rows in OWN.items()}) for row in range(2) for answer in answers]
    requests.append(Request((5, 6), (7, 8)))
    right = []
    for request in requests:
        total = 0.0
        for name, coefficient in any_proxy.mixture.items():
            prefix = request.prefix_of(name)
            with torch.no_grad():
                total += coefficient * any_proxy.members[name](torch.tensor([prefix + request.continuation])).logits[0, len(prefix) - 1 : -1]
        right.append(float(total.log_softmax(-1)[torch.arange(len(request.continuation)), torch.tensor(request.continuation)].sum()))
    for batch_tokens in (1, 7, 1000):
        for share in (True, False):
            found = score(any_proxy, requests, {"proxy": any_proxy.mixture}, batch_tokens=batch_tokens, share_prefixes=share)["proxy"]
            assert found.tolist() == pytest.approx(right, abs=1e-4)
    plain = score(any_proxy, [Request(request.prefix, request.continuation) for request in requests], {"proxy": any_proxy.mixture})["proxy"]
    assert abs(plain[0].item() - right[0]) > 0.1


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ({"expert": [[5]]}, {}, "'expert' has 1 for 2 rows"),
        ({"expert": [[5], []]}, {}, "one of 'expert' is empty"),
        ({"expert": [[5], [6] * 129]}, {}, "expert: the prompt has 129 tokens, its window only 128"),
        ({"expert": [[5], [6]]}, {"prefill_chunk_size": 2}, "leave prefill_chunk_size out"),
    ],
)
def test_prompts_that_do_not_fit_are_one_line(proxy: ProxyTunedForCausalLM, prompts: dict, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        proxy.generate(**batch(), prompts=prompts, **GREEDY, **options)


def test_a_prompt_longer_than_the_window_is_one_line(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    with pytest.raises(UserError, match="base: the prompt has 130 tokens, its window only 128"):
        proxy.generate(random_ids(1, 130), **GREEDY)
