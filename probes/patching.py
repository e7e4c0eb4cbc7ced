"""Cross-model patching: the tuned model continues from the base's state of the subject, and its answer is read.

For every state k (0 is the input of the first layer, L the output of the last) the tuned model reads a statement while its residual
stream after layer k, at the subject's last token, is replaced by the base's. If the answer comes back at k, it was lost in what layers
1 to k compute for the subject, and the layers above can still read it. After causal tracing (Meng et al. 2022, arXiv 2202.05262) and
its use across base and tuned models (Du et al. 2025, arXiv 2504.02904).

The result is the right candidate's share among the candidates' first tokens, so that one pass of short prompts is enough. A first token
that several wrong candidates share counts once; an item whose right answer begins with the same token as a wrong one is NaN, as in `lens`.

Where the subject is not the last token, state L is a control: no later layer reads it, so nothing may change. Costs one pass of the
base and L + 2 of the tuned model. Not covered: the subject's other tokens, attention and MLP outputs by themselves, and models whose
states are too far apart: a heavily tuned model may not be able to use the base's states, whatever they contain.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.encoding import prompt_ids
from finetune.items import Item
from probes.internals.activations import check_logits, last_and_subject, layers_of, read_states
from probes.internals.blocks import check_same_shape
from probes.lens import first_tokens
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.padding import left_padded, positions_of


class Patched(NamedTuple):
    """The right candidate's share (0 to 1) for both models as they are, and for the tuned one patched at each state."""

    base: Float[np.ndarray, " items"]
    tuned: Float[np.ndarray, " items"]
    states: Float[np.ndarray, "items states"]


def patch_subject(
    base: Member, tuned: Member, items: Sequence[Item], *, batch_size: int, progress: Callable[[int], None] = lambda items_done: None
) -> Patched:
    """Patches the subject's state in every item's statement. Apart from rounding the result does not depend on the batch size.

    Raises `UserError` for models that are not of one shape and for an item without statement, subject or a wrong candidate.
    """
    check_same_shape(base, tuned)
    tokenizer, model = tuned.tokenizer, tuned.model
    statements = []
    for item in items:
        if item.statement is None or item.subject is None:
            raise UserError(f"patching: the item {item.question!r} needs a statement and its subject as written there; give both")
        statements.append(item.statement)
    candidates = first_tokens(tokenizer, items)
    prompts = [prompt_ids(tokenizer, statement) for statement in statements]
    positions = [[subject] for _, subject in last_and_subject(tokenizer, items, statements)]
    pad = int(tokenizer.pad_token_id)
    found = Patched(*(np.full((len(items), *more), np.nan) for more in ((), (), (len(layers_of(model)) + 1,))))
    for states in read_states(base.model, prompts, positions, batch_size=batch_size, pad=pad):
        indices = states.indices
        chosen = [candidates[index] for index in indices]
        found.base[indices] = _shares(states.logits, chosen)
        ids, mask = left_padded([prompts[index] for index in indices], pad, model.device)
        # Padding is on the left, so positions are counted from the end.
        columns = torch.tensor([positions[index][0] - len(prompts[index]) for index in indices]).remainder(ids.shape[1])
        found.tuned[indices] = _shares(_logits(model, ids, mask, indices), chosen)
        for state in range(found.states.shape[1]):
            with replaced(model, state, columns, states.residual[:, 0, state]):
                found.states[indices, state] = _shares(_logits(model, ids, mask, indices, f" with the base's state {state}"), chosen)
        progress(len(indices))
    return found


@contextmanager
def replaced(model: PreTrainedModel, state: int, columns: Int[Tensor, " batch"], vectors: Float[Tensor, "batch hidden"]) -> Iterator[None]:
    """Within the context, the given state of the residual stream is replaced in every row by its vector, at its column."""
    layers = layers_of(model)

    def patched(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[torch.arange(len(hidden), device=hidden.device), columns.to(hidden.device)] = vectors.to(hidden)
        return hidden

    def before(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (patched(arguments[0]), *arguments[1:]), options
        return arguments, options | {"hidden_states": patched(options["hidden_states"])}

    def after(_: nn.Module, arguments: Any, output: Any) -> Any:
        return (patched(output[0]), *output[1:]) if isinstance(output, tuple) else patched(output)

    hook = layers[state - 1].register_forward_hook(after) if state else layers[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _shares(logits: Float[Tensor, "batch vocabulary"], candidates: Sequence[Sequence[int]]) -> Float[np.ndarray, " batch"]:
    """The share of the right candidate, which is first in each row, among the distinct tokens."""
    pairs = [(row.double(), list(dict.fromkeys(tokens)), tokens[0] in tokens[1:]) for row, tokens in zip(logits, candidates, strict=True)]
    return np.array([np.nan if shared else float(row[distinct].softmax(0)[0]) for row, distinct, shared in pairs])


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, ids: Int[Tensor, "batch time"], mask: Int[Tensor, "batch time"], indices: Sequence[int], when: str = ""
) -> Float[Tensor, "batch vocabulary"]:
    """The logits after the last token, in fp32."""
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, logits_to_keep=1)
    logits = output.logits[:, -1].float()
    check_logits(model, logits, lambda row: f"item {indices[row] + 1}", when)
    return logits
