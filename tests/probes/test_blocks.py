"""Blocks part a model's parameters, and models of one shape only can lend them to each other."""

import pytest
import torch
from helpers import SOME_ARCHITECTURES, equal, flat, make_model, member_of, noisy, tied

from probes.internals.activations import layers_of
from probes.internals.blocks import BLOCKS, blocks_of, check_same_shape, put, random_delta, thirds, weights_of
from proxytune import UserError
from proxytune.prepacked import PrepackedLinear


@pytest.mark.parametrize(("layers", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)), (6, (2, 2, 2)), (32, (10, 12, 10))])
def test_thirds_part_the_layers(layers: int, sizes: tuple[int, ...]) -> None:
    parts = thirds(layers)
    assert tuple(map(len, parts.values())) == sizes
    assert [number for numbers in parts.values() for number in numbers] == list(range(1, layers + 1))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_block(architecture: str, tie: bool) -> None:
    model = tied(architecture, tie)
    blocks = blocks_of(model)
    assert tuple(blocks) == BLOCKS
    owner = {name: block for block, names in blocks.items() for name in names}
    assert sorted(name for names in blocks.values() for name in names) == sorted(weights_of(model))
    # The head's own matrix is counted where there is one, and never twice.
    head = [name for name in blocks["unembedding"] if model.get_parameter(name) is model.get_output_embeddings().weight]
    assert len(head) == (0 if tie else 1)
    assert sum(map(torch.numel, weights_of(model).values())) == sum(parameter.numel() for parameter in model.parameters())
    layers = [owner[name] for layer in layers_of(model) for name, parameter in model.named_parameters() if parameter is next(layer.parameters())]
    assert layers == ["low", "middle", "middle", "high"]
    if architecture == "gpt2":
        assert owner["transformer.wpe.weight"] == "embeddings"


def test_a_parameter_of_no_block_is_refused() -> None:
    model = make_model()
    model.base_model.bridge = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'model.bridge.weight' of LlamaForCausalLM is neither in its embeddings"):
        blocks_of(model)


def test_weights_are_copies_and_are_put_back() -> None:
    model = make_model()
    kept = weights_of(model)
    name = blocks_of(model)["low"][0]
    put(model, {name: kept[name] + 1})
    assert [other for other, value in weights_of(model).items() if not torch.equal(value, kept[other])] == [name]
    put(model, kept)
    assert equal(weights_of(model), kept)


def test_models_that_cannot_stand_for_each_other_are_refused() -> None:
    base = member_of(make_model())
    check_same_shape(base, member_of(make_model(seed=5)))
    with pytest.raises(UserError, match=r"tuned: 'model.layers.2.\S+' is .*float32, in the base missing"):
        check_same_shape(base, member_of(make_model(layers=3)))
    with pytest.raises(UserError, match=r"is \(50, 48\) of torch.float32, in the base \(50, 32\)"):
        check_same_shape(base, member_of(make_model(hidden=48)))
    with pytest.raises(UserError, match=r"of torch\.bfloat16, in the base"):
        check_same_shape(base, member_of(make_model().bfloat16()))
    adapted = make_model()
    adapted.base_model.layers[0].mlp.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="tuned: it has a LoRA adapter that is not merged"):
        check_same_shape(base, member_of(adapted))
    packed = make_model()
    packed.base_model.layers[0].mlp.up_proj = PrepackedLinear(torch.nn.Linear(32, 64))
    with pytest.raises(UserError, match="base: its layers are packed"):
        check_same_shape(member_of(packed), base)


def test_noise_of_the_null_is_as_large_as_the_change_matrix_by_matrix() -> None:
    model = make_model()
    base, tuned = weights_of(model), weights_of(noisy(model, {"low": 0.01, "high": 0.3}))
    null = random_delta(base, tuned, 3)
    for name in base:
        size = (tuned[name] - base[name]).norm().item()
        assert (null[name] - base[name]).norm().item() == pytest.approx(size, rel=1e-4)
    assert torch.equal(null["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    change, noise = flat(tuned) - flat(base), flat(null) - flat(base)
    assert abs(torch.nn.functional.cosine_similarity(change, noise, dim=0).item()) < 0.05
    again = random_delta(dict(reversed(base.items())), tuned, 3)
    assert equal(again, null)
    assert not equal(random_delta(base, tuned, 4), null)
