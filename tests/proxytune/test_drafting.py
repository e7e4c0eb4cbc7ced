"""A rounded draft is nearly its member, shares what it does not round, and never changes what is generated."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import proxytune.prepacked as prepacked
from proxytune.drafting import RoundedLinear, rounded_draft
from proxytune.member import Weights, load_member, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def every_layer_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALLEST", 0)


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("bias", [None, torch.randn(40)])
def test_a_rounded_layer_is_off_by_its_rounding(rows: int, bias: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(40, 64), torch.randn(2, rows, 64)
    right = torch.nn.functional.linear(states, weight, bias)
    error = RoundedLinear(weight, bias)(states) - right
    assert 0 < error.abs().max() < 0.05 * right.abs().max()


@pytest.mark.parametrize("packed", [True, False])
def test_a_draft_of_an_adapter_is_the_expert_and_not_what_is_under_it(lora_family: Path, random_ids: Ids, packed: bool) -> None:
    small = str(lora_family / "small")
    weights = {"base": Weights(str(lora_family / "base")), "expert": Weights(small, lora_family / "polite"), "antiexpert": Weights(small)}
    members = load_members(weights, prepacked=packed)
    drafts = {name: rounded_draft(members[name]) for name in ("expert", "antiexpert")}
    drafts["alone"] = rounded_draft(load_member(small, lora_family / "polite"))
    assert drafts["expert"].model.get_input_embeddings().weight is members["expert"].model.get_input_embeddings().weight
    model = ProxyTunedForCausalLM(members | {f"{name} draft": draft for name, draft in drafts.items()}, proxy_tuning(1.0))
    with torch.inference_mode():
        laws = {name: law.softmax(-1) for name, law in model.member_logits(list(model.members), random_ids(3, 12)).items()}

    def distance(one: str, other: str) -> float:
        return float((laws[one] - laws[other]).abs().sum(-1).mean() / 2)

    for draft, right, wrong in (
        ("expert draft", "expert", "antiexpert"),
        ("antiexpert draft", "antiexpert", "expert"),
        ("alone draft", "expert", "antiexpert"),
    ):
        assert 0 < distance(draft, right) < 0.3 * distance(draft, wrong)
    prompt = random_ids(2, 5)
    assert torch.equal(model.generate(prompt, speculate=True, draft="expert draft", **GREEDY), model.generate(prompt, **GREEDY))
