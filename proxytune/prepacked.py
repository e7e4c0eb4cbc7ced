"""Linear layers with their weights laid out for the CPU (oneDNN), so that decoding reads them at memory speed.

For `nn.Linear` in fp32, torch calls a BLAS that copies the whole weight for every product of a few rows. Here the copy is
made once, into the blocks that oneDNN multiplies. A step of one to sixteen tokens then costs about the same, which makes
speculation, batches and members that share weights pay off. `proxytune bench` measures it on your machine.

Prepacked layers are for inference only: they have no gradient. A head tied to the embeddings gets a copy of its
own. Not covered: types other than fp32, devices other than the CPU.
"""

import ctypes
import sys

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

SMALLEST = 2**16  # weights; for smaller layers the call costs more than the product
ROWS = 8  # of the product that the blocks are chosen for


class PrepackedLinear(nn.Module):
    """A linear layer whose `weight` is opaque (`is_mkldnn`); `weight.to_dense()` gives it back bit for bit."""

    weight: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS))
        self.bias = linear.bias

    def forward(self, states: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


def prepack_linear_layers(*models: nn.Module) -> int:
    """Replaces the models' large fp32 linear layers on the CPU by prepacked ones, in place; returns how many.

    Layers that share a weight share the prepacked one. Returns 0 where torch was built without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    # Dictionaries hold the two factors of a LoRA layer, which PEFT needs plain.
    parents = dict.fromkeys(module for model in models for module in model.modules() if not isinstance(module, nn.ModuleDict))
    children = [(parent, name, child) for parent in parents for name, child in parent.named_children()]
    # Exactly nn.Linear: subclasses (quantised layers, for example) store their weights differently.
    found = [(parent, name, child) for parent, name, child in children if type(child) is nn.Linear and fits(child.weight)]
    count, prepacked = len(found), {}
    del parents, children  # they keep the plain layers alive
    # By identity, and one layer at a time: a plain weight is freed once its prepacked one exists.
    while found:
        parent, name, child = found.pop()
        if id(child.weight) not in prepacked:
            prepacked[id(child.weight)] = PrepackedLinear(child)
        setattr(parent, name, prepacked[id(child.weight)])
        del child
        return_memory()  # otherwise the model would take twice its memory meanwhile
    return count


def unpack_linear_layers(*models: nn.Module) -> None:
    """Puts plain layers back, bit for bit; layers that shared a prepacked one share the plain one, and a tied head is the embeddings again."""
    found = [
        (parent, name) for model in models for parent in model.modules() for name, child in parent.named_children() if type(child) is PrepackedLinear
    ]
    plain: dict[int, nn.Linear] = {}
    for parent, name in dict.fromkeys(found):
        prepacked = getattr(parent, name)
        if id(prepacked) not in plain:
            layer = plain[id(prepacked)] = nn.Linear(prepacked.in_features, prepacked.out_features, device="meta")
            layer.bias = prepacked.bias
            layer.weight = nn.Parameter(prepacked.weight.to_dense(), requires_grad=False)
        setattr(parent, name, plain[id(prepacked)])
        del prepacked
        return_memory()
    for model in models:
        if isinstance(model, PreTrainedModel):
            model.tie_weights()


def return_memory() -> None:
    """Returns freed memory to the system, which glibc does not do by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fits(weight: Tensor) -> bool:
    """Whether a weight is on the CPU, in fp32 and large enough for another layout to pay off."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST
