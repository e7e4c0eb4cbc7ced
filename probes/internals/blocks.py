"""A model's parameters in five blocks, from the embeddings to the head; how to copy them out and write them back.

`embeddings` (of tokens and positions), `low`, `middle` and `high` (the first, middle and last third of the layers) and `unembedding`
(the final norm, and the head where it has weights of its own; a tied head belongs to the embeddings, once). Also the null of a
tuned model: noise of the same norm in every matrix. Costs one copy of the weights. Not covered, and refused with an error: LoRA
adapters that are not merged, prepacked or quantised weights, and architectures with other parts.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from probes.internals.activations import final_norm, layers_of
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.prepacked import PrepackedLinear

BLOCKS = ("embeddings", "low", "middle", "high", "unembedding")


def thirds(layers: int) -> dict[str, range]:
    """The layers 1 to `layers` as `low`, `middle` and `high`. Layer k's output is state k, so these are also the blocks' states.

    A third is rounded down, but has at least one layer: of one layer it is low, of two they are low and high.
    """
    width = max(1, layers // 3)
    first_high = max(width, layers - width) + 1
    return {"low": range(1, width + 1), "middle": range(width + 1, first_high), "high": range(first_high, layers + 1)}


def blocks_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """The names of the parameters in each of `BLOCKS`: every parameter in exactly one, a shared one under its first name.

    Raises `UserError` for a parameter that belongs to none of the blocks.
    """
    layers = layers_of(model)
    embeddings = [module for name, module in model.base_model.named_children() if isinstance(module, nn.Embedding) or "embed" in name]
    # Later entries override earlier ones: a tied head belongs to the embeddings, an embedding inside a layer to the layer.
    parts: list[tuple[str, nn.Module]] = [("unembedding", final_norm(model)), ("unembedding", model.get_output_embeddings())]
    parts += [("embeddings", module) for module in [*embeddings, model.get_input_embeddings()]]
    parts += [(block, layers[number - 1]) for block, numbers in thirds(len(layers)).items() for number in numbers]
    owner = {id(parameter): block for block, module in parts for parameter in module.parameters()}
    blocks: dict[str, list[str]] = {block: [] for block in BLOCKS}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            raise UserError(
                f"model: '{name}' of {type(model).__name__} is neither in its embeddings nor in its layers, final norm or head; "
                "its blocks cannot be told apart"
            )
        blocks[owner[id(parameter)]].append(name)
    return blocks


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """A copy of every parameter, under the names of `blocks_of`."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@torch.no_grad()
def put(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Writes the given weights into the model, in place; other weights stay."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


def check_same_shape(base: Member, tuned: Member) -> None:
    """Raises `UserError` unless both have plain parameters of the same names, shapes and dtypes, so that weights can be exchanged."""
    found = []
    for field, member in (("base", base), ("tuned", tuned)):
        if member.adapter is not None or any(".lora_" in name for name, _ in member.model.named_parameters()):
            raise UserError(f"{field}: it has a LoRA adapter that is not merged; merge it first")
        if any(isinstance(module, PrepackedLinear) for module in member.model.modules()):
            raise UserError(f"{field}: its layers are prepacked, so they cannot be written to; load it with prepacked=False")
        shapes = {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in member.model.named_parameters()}
        for name, (_, dtype) in shapes.items():
            if not dtype.is_floating_point:
                raise UserError(f"{field}: '{name}' is of {dtype}, not a floating-point type; load it without quantisation")
        found.append(shapes)
    before, after = found
    for name in [*before, *after]:
        if before.get(name) != after.get(name):
            one, other = (" of ".join(map(str, shapes[name])) if name in shapes else "missing" for shapes in found)
            raise UserError(f"tuned: '{name}' is {other}, in the base {one}; give two models of the same shape and dtype")


def random_delta(base_weights: dict[str, Tensor], tuned_weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The base plus Gaussian noise; in every matrix the noise has the Frobenius norm of tuned - base.

    The same seed gives the same noise, whatever the order of the dictionaries. In half precision the norm is exact up to the
    rounding of the weights.
    """
    noisy = {}
    for number, name in enumerate(sorted(base_weights)):
        base = base_weights[name]
        change = change_of(base, tuned_weights[name])
        noise = torch.from_numpy(np.random.default_rng([seed, number]).standard_normal(base.numel())).to(change).view_as(base)
        scale = frobenius(change) / frobenius(noise)
        noisy[name] = (base + scale * noise).to(base.dtype)
    return noisy


def change_of(base: Tensor, tuned: Tensor) -> Tensor:
    """tuned - base, in at least fp32, on the tuned model's device."""
    wide = torch.promote_types(tuned.dtype, torch.float32)
    return tuned.to(wide) - base.to(tuned.device, wide)


def frobenius(tensor: Tensor) -> float:
    """The Frobenius norm, summed in fp64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
