"""FLOPs of a forward pass and of training, by formula.

Let N be the number of weights of all linear layers (including the head, tied or not), L the number of layers, d the width of
all attention heads together and T the tokens of a row. A token's forward pass takes 2N + 4LdT FLOPs. Its backward pass takes as much for the
gradients of the inputs (attention twice as much) in the layers from the lowest trained one upwards, and 2 per trained weight. So
full tuning takes 6N + 12LdT per token and LoRA about 4N + 12LdT; frozen lower layers only have a forward pass. Not counted:
normalisations, activation functions, the optimizer. Attention is counted without masking.
"""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def forward_flops(model: Any, tokens: int, length: float) -> float:
    """FLOPs of a forward pass over `tokens` tokens in rows of `length` tokens on average (0: without attention)."""
    return tokens * (2.0 * sum(map(_numel, _linear_layers(model))) + _attention(model, length))


def training_flops(model: Any, tokens: int, length: float) -> float:
    """FLOPs of forward and backward passes over `tokens` tokens; trained are the parameters that require a gradient."""
    layers = _linear_layers(model)
    trained = [_numel(layer) if layer.weight.requires_grad else 0 for layer in layers]
    embedded = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    lowest = 0 if embedded else next((index for index, count in enumerate(trained) if count), len(layers))
    through = sum(map(_numel, layers[lowest:]))
    share = through / max(1, sum(map(_numel, layers)))
    backward = 2.0 * through + 2.0 * share * _attention(model, length) + 2.0 * sum(trained)
    return forward_flops(model, tokens, length) + tokens * backward


def _linear_layers(model: nn.Module) -> list[Any]:
    """All layers that multiply by a weight matrix, in the model's order, including the parts of LoRA layers."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def _attention(model: Any, length: float) -> float:
    config = model.config.get_text_config()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 4.0 * config.num_hidden_layers * width * length


def _numel(layer: Any) -> int:
    return int(layer.weight.numel())
