"""Bytes are those of the weights that a token's pass reads, packed, rounded or shared."""

import pytest
import torch
from helpers import make_model

import proxytune.prepacked as prepacked
from proxytune.cost import PACE, bytes_read, step_seconds


def test_embeddings_are_looked_up_and_heads_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALLEST", 0)
    model = make_model("llama")
    every = sum(4 * parameter.numel() for parameter in model.parameters())
    table = 4 * model.get_input_embeddings().weight.numel()
    rotary = 4 * sum(buffer.numel() for buffer in model.buffers())
    assert bytes_read(model) == every - table + rotary
    prepacked.prepack_linear_layers(model)
    assert bytes_read(model) == every - table + rotary
    tied = make_model("gpt2")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    positions = 4 * tied.transformer.wpe.weight.numel()
    assert bytes_read(tied) == sum(4 * parameter.numel() for parameter in tied.parameters()) - positions + sum(b.nbytes for b in tied.buffers())


def test_time_is_bytes_until_layers_are_too_small() -> None:
    model, pace = make_model("llama", layers=3), PACE["cpu"]
    assert step_seconds(model, pace) == pytest.approx(3 * pace.layer)
    assert step_seconds(model, pace._replace(bytes_a_second=1.0)) == bytes_read(model)
    with torch.no_grad():
        assert step_seconds(model.half(), pace._replace(bytes_a_second=1.0)) < bytes_read(make_model("llama", layers=3))
