"""Hidden states at the last prompt token, one batch at a time.

State k is the residual stream after layer k, with the embeddings as state 0, as in transformers; unlike there the last
state is taken before the final norm too. Memory is bounded by one batch, however many prompts there are.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from proxytune.errors import UserError
from proxytune.padding import left_padded, positions_of

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head. Raises `UserError` for an architecture that keeps it elsewhere."""
    for name in FINAL_NORMS:
        norm = getattr(model.base_model, name, None)
        if norm is not None:
            return norm
    raise UserError(f"density: {type(model).__name__} has none of {', '.join(FINAL_NORMS)}; its final norm is not known here")


def last_token_states(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], batch_size: int, pad: int
) -> Iterator[Float[Tensor, "batch states hidden"]]:
    """Yields the states of each batch of prompts (token ids), in their order, before any final norm, in fp32."""
    last: list[Tensor] = []
    hook = final_norm(model).register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            input_ids, mask = left_padded(batch, pad, model.device)
            last.clear()
            # Entered here and not around the generator: between two batches the caller's own mode is in force.
            with torch.inference_mode():
                output = model.base_model(
                    input_ids=input_ids, attention_mask=mask, position_ids=positions_of(mask), output_hidden_states=True, use_cache=False
                )
                states = torch.stack([state[:, -1] for state in [*output.hidden_states[:-1], last[0]]], dim=1).float()
            yield states
    finally:
        hook.remove()
