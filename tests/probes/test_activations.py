"""The neurons of an MLP: what goes into its last projection, and density once the largest coordinates are cut."""

import numpy as np
import pytest
import torch
import transformers
from helpers import VOCABULARY, make_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from probes.density import density, spread, winsorised
from probes.internals.activations import States, read_states
from proxytune.errors import UserError

PROJECTIONS = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "c_proj", "gpt_neox": "dense_4h_to_h", "gemma3_text": "down_proj"}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21, 22]]
POSITIONS = [[-1, 2], [-1, 1], [-1, 0], [-1, 3]]


def model_of(architecture: str) -> PreTrainedModel:
    if architecture != "gemma3_text":
        return make_model(architecture)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.CONFIG_MAPPING[architecture](vocab_size=VOCABULARY, sliding_window=64, max_position_embeddings=128, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def read(model: PreTrainedModel, batch_size: int, neurons: bool = True) -> dict[int, tuple[torch.Tensor, ...]]:
    found = {}
    for states in read_states(model, PROMPTS, POSITIONS, batch_size=batch_size, pad=0, neurons=neurons):
        for row, index in enumerate(states.indices):
            found[index] = tuple(part[row] for part in (states.residual, states.neurons) if part is not None)
    return found


@pytest.mark.parametrize("architecture", PROJECTIONS)
def test_neurons_are_what_goes_into_the_last_projection(architecture: str) -> None:
    model, kept = model_of(architecture), []
    modules = [module for name, module in model.named_modules() if name.endswith(f"mlp.{PROJECTIONS[architecture]}")]
    assert len(modules) == 2
    found = read(model, batch_size=4)
    for module in modules:
        module.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0]))
    for index, (prompt, positions) in enumerate(zip(PROMPTS, POSITIONS, strict=True)):
        kept.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([prompt]))
        alone = torch.stack([layer[0, positions] for layer in kept], dim=1)
        torch.testing.assert_close(found[index][1], alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[index][1][0], found[index][1][1])  # the twin: another position


def test_neither_padding_nor_the_batch_nor_asking_for_neurons_matters() -> None:
    model = model_of("llama")
    together, alone, without = read(model, 4), read(model, 1), read(model, 4, neurons=False)
    for index in range(len(PROMPTS)):
        for one, other in zip(together[index], alone[index], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert torch.equal(together[index][0], without[index][0])
        assert len(without[index]) == 1


def test_an_unknown_mlp_is_refused_in_one_line_where_its_neurons_are_asked_for() -> None:
    model = model_of("llama")
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(nn.Linear(32, 32))
    assert len(read(model, 4, neurons=False)) == len(PROMPTS)
    with pytest.raises(UserError, match=r"model: Sequential of LlamaForCausalLM has none of down_proj, c_proj, .*; its states cannot be probed"):
        read(model, 4)


def test_neurons_that_are_not_finite_are_named() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0] = float("inf")
    with pytest.raises(UserError, match="layer 2"):
        read(model, 4)


def test_the_cut_is_at_each_vectors_own_quantile() -> None:
    vectors = torch.randn(5, 3, 301, generator=torch.Generator().manual_seed(0))
    vectors[..., 7] *= 1000
    sizes = vectors.abs().double().numpy()
    wanted = np.minimum(sizes, np.quantile(sizes, 0.99, axis=-1, keepdims=True))
    np.testing.assert_allclose(winsorised(vectors).numpy(), wanted, rtol=1e-6)
    assert torch.equal(winsorised(vectors[:, :, :1]), vectors[:, :, :1].abs())


def test_spread_is_density_of_raw_and_of_cut_vectors() -> None:
    vectors = torch.randn(40, 256, generator=torch.Generator().manual_seed(1))
    vectors[:, 3] = 50
    found = spread(vectors)
    for cut, sizes in (("raw", vectors), ("winsorised", winsorised(vectors))):
        for metric in ("effective_rank", "participation_ratio"):
            torch.testing.assert_close(found[metric, cut], density(sizes)[metric], rtol=1e-4, atol=1e-6)
    assert (found["effective_rank", "winsorised"] > 5 * found["effective_rank", "raw"]).all()  # one massive coordinate decides the raw one
    torch.testing.assert_close(found["norm", "raw"], vectors.square().sum(-1).sqrt())
    assert States._field_defaults == {"neurons": None}
