"""What a model knows of items, independent of the tuned format: the right candidate against the others after the item's statement.

One scoring pass of the statements and their candidates. Not covered: items without candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from finetune.encoding import continuation_ids, prompt_ids
from finetune.items import Item
from probes.knowledge.readouts import best_choices
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded, positions_of
from proxytune.scoring import Request, score

Ids = tuple[int, ...]


class Known(NamedTuple):
    """`right`: the right candidate alone has the highest mean log-probability per token. `probability`: its share among the candidates
    (softmax of these means), which changes long before the choice does."""

    right: Bool[np.ndarray, " items"]
    probability: Float[np.ndarray, " items"]


def known(member: Member, items: Sequence[Item], *, batch_tokens: int = 2048) -> Known:
    """Scores every item's candidates. Raises `UserError` for an item without a statement or choices, and for scores that are NaN.

    Where all candidates are single tokens, one pass over the statements is enough.
    """
    right, probability = [], []
    for item, means in zip(items, candidate_means(member, items, batch_tokens=batch_tokens), strict=True):
        name = member.model.name_or_path or type(member.model).__name__
        answer = item.choices.index(item.answer)
        right.append(best_choices(means.tolist(), f"knowledge: '{name}' at {item.question!r}") == [answer])
        probability.append(float(means.softmax(0)[answer]))
    return Known(np.array(right), np.array(probability))


def candidate_means(member: Member, items: Sequence[Item], *, batch_tokens: int = 2048) -> Sequence[Tensor]:
    """For every item, each candidate's mean log-probability per token after the statement. Raises `UserError` as `known` does."""
    for item in items:
        if item.statement is None or item.answer not in item.choices:
            raise UserError(f"knowledge: the item {item.question!r} needs a statement and choices with the answer among them")
    prefixes = [tuple(prompt_ids(member.tokenizer, str(item.statement))) for item in items]
    distinct = dict.fromkeys(choice for item in items for choice in item.choices)
    encoded = {choice: tuple(continuation_ids(member.tokenizer, choice)) for choice in distinct}
    candidates = [[encoded[choice] for choice in item.choices] for item in items]
    read = _at_once if all(len(ids) == 1 for ids in encoded.values()) else _scored
    return read(member, prefixes, candidates, batch_tokens)


def _scored(member: Member, prefixes: Sequence[Ids], candidates: Sequence[Sequence[Ids]], batch_tokens: int) -> Sequence[Tensor]:
    """For every item, each candidate's mean log-probability per token."""
    requests = [Request(prefix, ids) for prefix, those in zip(prefixes, candidates, strict=True) for ids in those]
    model = ProxyTunedForCausalLM({"model": member}, {"model": 1.0})
    totals = score(model, requests, {"model": {"model": 1.0}}, batch_tokens=batch_tokens)["model"]
    lengths = torch.tensor([len(request.continuation) for request in requests])
    return (totals / lengths).split([len(those) for those in candidates])


def _at_once(member: Member, prefixes: Sequence[Ids], candidates: Sequence[Sequence[Ids]], batch_tokens: int) -> Sequence[Tensor]:
    order = sorted(range(len(prefixes)), key=lambda index: -len(prefixes[index]))
    found: dict[int, Tensor] = {}
    while order:
        batch = order[: max(1, batch_tokens // len(prefixes[order[0]]))]
        order = order[len(batch) :]
        ids, mask = left_padded([prefixes[index] for index in batch], int(member.tokenizer.pad_token_id), member.model.device)
        with torch.inference_mode():
            logits = member.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False, logits_to_keep=1).logits
            rows = logits[:, -1].double().log_softmax(-1).cpu()
        found |= {index: row[[ids[0] for ids in candidates[index]]] for index, row in zip(batch, rows, strict=True)}
    return [found[index] for index in range(len(prefixes))]
