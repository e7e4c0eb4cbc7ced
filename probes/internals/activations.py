"""Hidden states, attention and MLP outputs and MLP neurons at chosen tokens, one batch at a time, from one pass for all probes.

State k is the residual stream after layer k; state 0 is the input of the first layer. This is as in transformers, except that
the last state too is taken before the final norm. Only states at the chosen tokens are kept, so memory is bounded by one batch
and does not depend on the number of prompts. Costs a plain forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.encoding import prompt_ids
from finetune.items import Item
from proxytune.errors import UserError
from proxytune.padding import left_padded, positions_of

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
ATTENTIONS = ("self_attn", "attn", "attention")
MLPS = ("mlp", "feed_forward", "block_sparse_moe")
LAST_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "wo")


class States(NamedTuple):
    """The states of one batch, in fp32. `indices` are the prompts' numbers; `logits` are the model's, after the last token.

    `neurons` are the inputs of the MLPs' last projections (after SwiGLU's product, or after GELU); None if they were not asked for.
    """

    indices: list[int]
    residual: Float[Tensor, "batch positions states hidden"]
    attention: Float[Tensor, "batch positions layers hidden"]
    mlp: Float[Tensor, "batch positions layers hidden"]
    logits: Float[Tensor, "batch vocabulary"]
    neurons: Float[Tensor, "batch positions layers neurons"] | None = None


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head. Raises `UserError` for an architecture with other names."""
    return _child(model.base_model, FINAL_NORMS, model)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers from first to last. Raises `UserError` for an architecture without one list of them."""
    count = model.config.get_text_config().num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise UserError(f"model: {type(model).__name__} has no list of its {count} layers; its states cannot be probed")


def read_states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]],
    *,
    batch_size: int,
    pad: int,
    neurons: bool = False,
) -> Iterator[States]:
    """Yields the states of each batch of prompts (token ids), longest prompts first, so that there is little padding.

    `positions` has the same number of token positions for every prompt; negative ones count from the end: -1 is the last token. Two
    models that read the same prompts yield the same batches. With `neurons` also the MLPs' neurons, which a mixture of experts does not
    have in one place. Raises `UserError` for an architecture whose parts are unknown here, and for states and logits that are not finite.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    layers = layers_of(model)
    parts = {"attention": [_child(layer, ATTENTIONS, model) for layer in layers], "mlp": [_child(layer, MLPS, model) for layer in layers]}
    projections = [_child(mlp, LAST_PROJECTIONS, model) for mlp in parts["mlp"]] if neurons else []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = [prompts[index] for index in indices]
        input_ids, mask = left_padded(batch, pad, model.device)
        # Padding is on the left: a position counted from the end is the same column in every row.
        columns = [[at if at < 0 else at - len(prompt) for at in positions[index]] for index, prompt in zip(indices, batch, strict=True)]
        chosen = torch.tensor(columns, device=model.device).remainder(input_ids.shape[1])
        # Entered here and not around the generator, so that the caller's mode applies between two batches.
        with torch.inference_mode(), ExitStack() as hooks:
            kept: dict[str, list[Tensor]] = {"residual": [], **{name: [] for name in parts}, **({"neurons": []} if neurons else {})}
            hooks.callback(layers[0].register_forward_pre_hook(_keep_input(kept["residual"], chosen), with_kwargs=True).remove)
            for layer in layers:
                hooks.callback(layer.register_forward_hook(_keep_output(kept["residual"], chosen)).remove)
            for name, modules in parts.items():
                for module in modules:
                    hooks.callback(module.register_forward_hook(_keep_output(kept[name], chosen)).remove)
            for module in projections:
                hooks.callback(module.register_forward_pre_hook(_keep_input(kept["neurons"], chosen), with_kwargs=True).remove)
            logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, logits_to_keep=1).logits
            stacked = {name: torch.stack(tensors, dim=2).float() for name, tensors in kept.items()}
            states = States(indices, **stacked, logits=logits[:, -1].float())
            _check(model, states)
        yield states


def check_states(model: PreTrainedModel, states: Sequence[Float[Tensor, "items hidden"]], named: Callable[[int], str], part: str = "") -> None:
    """Raises `UserError` naming the model, the lowest layer and the item where a state or its squared norm is not finite.

    `named` gives the name of a row's item. `part` is empty for the residual stream, else attention, mlp or neurons, of which each layer has one.
    """
    for number, state in enumerate(states):
        broken = ~state.float().square().sum(-1).isfinite()
        if broken.any():
            where = f"the output of {part} in layer {number + 1}" if part else f"the state after layer {number}" if number else "the embedding"
            raise UserError(_not_finite(model, where, named(int(broken.nonzero()[0]))))


def check_logits(model: PreTrainedModel, logits: Float[Tensor, "items vocabulary"], named: Callable[[int], str], when: str = "") -> None:
    """Raises `UserError` naming the model and the item for logits that are not a distribution; some may be -inf."""
    broken = ~logits.logsumexp(-1).isfinite()
    if broken.any():
        raise UserError(_not_finite(model, f"the logits{when}", named(int(broken.nonzero()[0]))))


def _not_finite(model: PreTrainedModel, what: str, item: str) -> str:
    name = model.name_or_path or type(model).__name__
    return f"model: in '{name}' {what} of {item} holds NaN, infinity or a number too large to square; use a model with finite weights"


def _check(model: PreTrainedModel, states: States) -> None:
    def named(row: int) -> str:
        return f"item {states.indices[row] + 1}"

    tensors = [("", states.residual), ("attention", states.attention), ("mlp", states.mlp)]
    for part, tensor in tensors if states.neurons is None else [*tensors, ("the neurons", states.neurons)]:
        for of_position in tensor.unbind(1):
            check_states(model, of_position.unbind(1), named, part)
    check_logits(model, states.logits, named)


def last_and_subject(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], prompts: Sequence[str]) -> list[list[int]]:
    """For every prompt the positions of its last token (-1) and of its subject's last token; only -1 where some item has no subject.

    Raises `UserError` for a subject that is not in the prompt.
    """
    if any(item.subject is None for item in items):
        return [[-1] for _ in items]
    positions = []
    for item, prompt in zip(items, prompts, strict=True):
        start = prompt.find(str(item.subject))
        if start < 0:
            raise UserError(f"subject: {item.subject!r} is not in the statement {prompt!r}; write it as it is there")
        # The first token that reaches the subject's end. The ids are those of `prompt_ids`, which may only drop an end token.
        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"][: len(prompt_ids(tokenizer, prompt))]
        end = start + len(str(item.subject))
        positions.append([-1, next(index for index, (_, stop) in enumerate(offsets) if stop >= end)])
    return positions


def _child(parent: nn.Module, names: Sequence[str], model: PreTrainedModel) -> nn.Module:
    for name in names:
        child = getattr(parent, name, None)
        if child is not None:
            return child
    raise UserError(f"model: {type(parent).__name__} of {type(model).__name__} has none of {', '.join(names)}; its states cannot be probed")


def _at(tensor: Tensor, chosen: Tensor) -> Tensor:
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], chosen]


def _keep_input(kept: list[Tensor], chosen: Tensor) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kept.append(_at(arguments[0] if arguments else options["hidden_states"], chosen))

    return hook


def _keep_output(kept: list[Tensor], chosen: Tensor) -> Any:
    def hook(_: nn.Module, arguments: Any, output: Any) -> None:
        kept.append(_at(output[0] if isinstance(output, tuple) else output, chosen))

    return hook
