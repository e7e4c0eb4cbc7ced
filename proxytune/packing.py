"""Linear layers in the layout of oneDNN: on a CPU, decoding then reads the weights at the speed of the memory.

torch hands `nn.Linear` in fp32 to a BLAS that copies the whole weight for every product of a few rows. Here the copy is
made once, into the blocks that oneDNN multiplies from, and a step of one to sixteen tokens costs about the same: which
is what speculation, batches and members that share weights live on. `proxytune bench` measures it where you are.

Packed layers are for inference: nothing is differentiated through them. A head tied to the embeddings gets a copy of its
own. Not covered: types other than fp32, devices other than the CPU.
"""

import ctypes
import sys

import torch
from jaxtyping import Float
from torch import Tensor, nn

SMALLEST = 2**16  # weights; below, the call costs more than the product
ROWS = 8  # of the products to choose the blocks for


class PackedLinear(nn.Module):
    """A linear layer whose `weight` is opaque (`is_mkldnn`); `weight.to_dense()` gives it back bit for bit."""

    weight: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS))
        self.bias = linear.bias

    def forward(self, states: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


def pack_linear_layers(*models: nn.Module) -> int:
    """Replaces the models' large fp32 linear layers on the CPU by packed ones, in place; returns how many.

    Layers that share a weight share the packed one. None where torch was built without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return 0
    # The two factors of a LoRA layer stand in dictionaries; PEFT computes with them.
    parents = dict.fromkeys(module for model in models for module in model.modules() if not isinstance(module, nn.ModuleDict))
    children = [(parent, name, child) for parent in parents for name, child in parent.named_children()]
    # Exactly nn.Linear: subclasses (quantised layers, say) keep their weights in ways of their own.
    found = [(parent, name, child) for parent, name, child in children if type(child) is nn.Linear and fits(child.weight)]
    count, packed = len(found), {}
    del parents, children  # they hold the plain layers, too
    # By identity, and one layer at a time: a plain weight goes when its packed one has come.
    while found:
        parent, name, child = found.pop()
        if id(child.weight) not in packed:
            packed[id(child.weight)] = PackedLinear(child)
        setattr(parent, name, packed[id(child.weight)])
        del child
        return_memory()  # or the model would take twice its memory while its layers are replaced
    return count


def unpack_linear_layers(*models: nn.Module) -> None:
    """Puts plain layers back, bit for bit; those that shared a packed one share the plain one."""
    found = [
        (parent, name) for model in models for parent in model.modules() for name, child in parent.named_children() if type(child) is PackedLinear
    ]
    plain: dict[int, nn.Linear] = {}
    for parent, name in dict.fromkeys(found):
        packed = getattr(parent, name)
        if id(packed) not in plain:
            layer = plain[id(packed)] = nn.Linear(packed.in_features, packed.out_features, device="meta")
            layer.bias = packed.bias
            layer.weight = nn.Parameter(packed.weight.to_dense(), requires_grad=False)
        setattr(parent, name, plain[id(packed)])
        del packed
        return_memory()


def return_memory() -> None:
    """Gives what was freed back to the system, which glibc does not do by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def fits(weight: Tensor) -> bool:
    """Whether a weight is on the CPU, in fp32 and large enough for another layout to pay off."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST
