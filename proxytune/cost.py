"""What a forward pass costs: bytes of weights read, and seconds by a model of a few constants a kind of device.

One token at a time, time is bytes over bandwidth until layers are so small that starting them takes longer. The constants
are round numbers; they steer how much is drafted and need only be right in proportion.
"""

from typing import Any, NamedTuple

from torch import nn


class Pace(NamedTuple):
    """Bytes of weights a second, seconds that a layer takes however small it is, and a further token's share of a pass."""

    bytes_a_second: float
    layer: float
    token: float


PACE = {"cpu": Pace(3e10, 3e-4, 0.05), "cuda": Pace(2e12, 2e-4, 0.003)}


def bytes_read(model: nn.Module) -> int:
    """Bytes of weights that one token's pass reads: all but the embeddings' other rows (a head tied to them reads them all)."""
    modules = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def step_seconds(model: Any, pace: Pace) -> float:
    """Seconds that a pass over one token is expected to take; each further one adds `pace.token` of that."""
    return max(bytes_read(model) / pace.bytes_a_second, pace.layer * model.config.get_text_config().num_hidden_layers)
