"""Packed layers are the layers, to rounding, and go back to them bit for bit."""

import pytest
import torch
from helpers import make_model, make_tokenizer
from torch import nn

import proxytune.prepacked as prepacked
from proxytune.member import Member, fingerprint
from proxytune.prepacked import PrepackedLinear, prepack_linear_layers, unpack_linear_layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_packed_is_unpacked(bias: bool, rows: int) -> None:
    layer = nn.Linear(300, 400, bias=bias)
    states = torch.randn(2, rows, 300)
    with torch.inference_mode():
        torch.testing.assert_close(PrepackedLinear(layer)(states), layer(states), atol=1e-5, rtol=1e-5)
    assert torch.equal(PrepackedLinear(layer).weight.to_dense(), layer.weight)


def test_a_packed_model_is_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALLEST", 0)
    ids = torch.randint(3, 50, (2, 9))
    for architecture, linear_layers in (("llama", 15), ("gpt2", 1)):
        model = make_model(architecture)
        with torch.inference_mode():
            right = model(ids).logits
        before = fingerprint(model)
        assert prepack_linear_layers(model) == linear_layers
        assert prepack_linear_layers(model) == 0
        with torch.inference_mode():
            torch.testing.assert_close(model(ids).logits, right, atol=1e-5, rtol=1e-5)
        assert fingerprint(model) == before
        assert Member(model, make_tokenizer()).rows == 50


def test_other_types_and_small_layers_stay() -> None:
    half = nn.Sequential(nn.Linear(600, 600).to(torch.bfloat16))
    assert prepack_linear_layers(half) == 0
    assert prepack_linear_layers(nn.Sequential(nn.Linear(100, 100))) == 0
    assert prepack_linear_layers(nn.Sequential(nn.Linear(600, 600))) == 1


def test_layers_that_share_a_weight_share_it_packed_and_again_when_unpacked() -> None:
    one, other = nn.Sequential(nn.Linear(600, 600)), nn.Sequential(nn.Linear(600, 600), nn.Linear(300, 300))
    other[0].weight = one[0].weight
    before = one[0].weight.detach().clone()
    assert prepack_linear_layers(one, other) == 3
    assert one[0] is other[0]
    assert isinstance(other[1], PrepackedLinear)
    unpack_linear_layers(one, other)
    assert one[0] is other[0]
    assert torch.equal(one[0].weight, before)
    assert [type(layer) for layer in other] == [nn.Linear, nn.Linear]


def test_a_tied_head_is_tied_again_when_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALLEST", 0)
    model = make_model("gemma")
    before = [name for name, _ in model.named_parameters()]
    prepack_linear_layers(model)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight  # what the test is about
    unpack_linear_layers(model)
    assert [name for name, _ in model.named_parameters()] == before
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
