"""The cost of a forward pass: bytes of weights read, and seconds estimated from a few constants per device type.

For one token at a time, seconds are bytes over bandwidth, unless layers are so small that starting them takes longer. The
constants are round numbers. They decide how many tokens are drafted; only their ratios matter.
"""

from typing import Any, NamedTuple

from torch import nn


class Pace(NamedTuple):
    """Bytes of weights per second, the least seconds of a layer, and the cost of each further token as a share of a pass."""

    bytes_a_second: float
    layer: float
    token: float


PACE = {"cpu": Pace(3e10, 3e-4, 0.05), "cuda": Pace(2e12, 2e-4, 0.003)}


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that a pass over one token reads: all but the other rows of the embeddings (a head tied to them reads all rows)."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_seconds(model: Any, pace: Pace) -> float:
    """Estimated seconds of a pass over one token; each further token adds `pace.token` of that."""
    return max(bytes_read(model) / pace.bytes_a_second, pace.layer * model.config.get_text_config().num_hidden_layers)
