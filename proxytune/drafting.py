"""A copy of a member with its weights in 8 bits, for drafting on a CPU: it reads a quarter of the bytes.

Speculative decoding keeps the mixture's distribution whatever the draft is, so rounding only lowers acceptance a little.
Weights have one scale per output. Activations are not rounded: activations in 8 bits break models with outliers.
"""

import copy
import itertools

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from proxytune.adapters import UNTOUCHED
from proxytune.member import Member
from proxytune.prepacked import PrepackedLinear, fits

ROWS = 8  # up to so many, the product is computed from the 8-bit weights directly


class RoundedLinear(nn.Module):
    """A linear layer whose `weight` is in 8 bits with one `scale` per output."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Float[Tensor, "out_features in_features"], bias: Tensor | None):
        super().__init__()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(torch.bfloat16))
        self.bias = bias

    def forward(self, states: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        rows = states.reshape(-1, states.shape[-1])
        if len(rows) <= ROWS:
            product = torch.ops.aten._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale).to(states.dtype)
        else:
            product = rows @ (self.weight.to(states.dtype) * self.scale.to(states.dtype)[:, None]).t()
        product = product if self.bias is None else product + self.bias
        return product.reshape(*states.shape[:-1], -1)


def rounded_draft(member: Member) -> Member:
    """A member for drafting: large linear layers in 8 bits with adapters merged in; everything else is shared with the member."""
    adapter = None if member.adapter is None else member.adapter.name
    # `deepcopy` takes what is in the memo for the copy.
    memo: dict[int, object] = {id(tensor): tensor for tensor in itertools.chain(member.model.parameters(), member.model.buffers())}
    merged: set[int] = set()
    for module in member.model.modules():
        # The parts of a LoRA layer are in its rounded layer already.
        weight = None if id(module) in merged else _effective_weight(module, adapter)
        if weight is not None and fits(weight):
            memo[id(module)] = RoundedLinear(weight, _plain(module).bias)  # type: ignore[arg-type]
            merged |= {id(part) for part in module.modules()}
    return Member(copy.deepcopy(member.model, memo), member.tokenizer)


def _plain(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


@torch.no_grad()
def _effective_weight(module: nn.Module, adapter: str | None) -> Tensor | None:
    """The weight of a linear layer with its adapters merged; None for another module."""
    plain = _plain(module)
    if not (type(plain) is nn.Linear or isinstance(plain, PrepackedLinear)):
        return None
    weight = plain.weight.to_dense() if plain.weight.is_mkldnn else plain.weight.detach()
    if isinstance(module, LoraLayer) and adapter != UNTOUCHED:
        for name in module.active_adapters if adapter is None else [adapter]:
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight
