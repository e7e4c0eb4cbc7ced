"""What models that do not change say about training rows, computed once.

Kept are the states that enter the output head, at the trained places only: a row of the hidden width for each place and not one
of the vocabulary's. The head is applied again at every step, so that a step costs a small model's step and one product.
"""

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from finetune.encoding import Row
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member

TOKENS_AT_ONCE = 4096
logger = logging.getLogger("proxytune")


class Reference:
    """A model's logits at the trained places of rows that it has read before."""

    def __init__(self, head: nn.Module, states: dict[tuple[int, ...], Tensor]):
        self._head, self._states = head.requires_grad_(False), states

    def logits(self, rows: Sequence[Sequence[int]], device: torch.device) -> Float[Tensor, "places vocabulary"]:
        """Of rows of token ids, end to end; a row that was never read raises KeyError."""
        self._head.to(device)
        with torch.no_grad():
            return self._head(torch.cat([self._states[tuple(row)] for row in rows]).to(device)).float()


@contextmanager
def only_at(model: Any, places: Bool[Tensor, "batch time"]) -> Iterator[list[Tensor]]:
    """Within it the model's head sees these places only, and its logits are [places, vocabulary]; gives what enters the head."""
    entered: list[Tensor] = []

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(arguments[0][places])
        return (entered[-1], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield entered
    finally:
        handle.remove()


def read_reference(member: Member, rows: Sequence[Row], folder: Path, field: str) -> Reference:
    """The model as it reads the rows now, from `folder` if the same weights have read the same rows before.

    Raises `UserError` where its logits are not simply its head's product.
    """
    distinct = list({tuple(row["input_ids"]): row for row in rows}.values())
    read = [[row["input_ids"], row["completion_mask"]] for row in distinct]
    file = folder / f"states-{content_key(model=member.fingerprint, rows=read)}.safetensors"
    states = _kept(file)
    if states is None:
        folder.mkdir(parents=True, exist_ok=True)
        states = torch.cat(_states(member, distinct, field))
        partial = file.with_suffix(f".{uuid4().hex}.partial")  # its own: a process id is not unique where machines share a folder
        try:
            save_file({"states": states}, partial, metadata={"sha256": _digest(states)})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    sizes = [sum(row["completion_mask"][1:]) for row in distinct]
    states_of_row = states.split(sizes)
    head = copy.deepcopy(member.model.get_output_embeddings())
    return Reference(head, {tuple(row["input_ids"]): states for row, states in zip(distinct, states_of_row, strict=True)})


def _kept(file: Path) -> Float[Tensor, "places hidden"] | None:
    """The states in a file; None where there is none or it is damaged, which a warning says."""
    try:
        with safe_open(file, framework="pt") as kept:
            states = kept.get_tensor("states")
            if (kept.metadata() or {}).get("sha256") == _digest(states):
                return states
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    logger.warning("'%s' is damaged; it is made again", file)
    return None


def _digest(states: Tensor) -> str:
    digest = hashlib.sha256(f"{states.dtype} {tuple(states.shape)}\n".encode())
    digest.update(states.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _states(member: Member, rows: Sequence[Row], field: str) -> list[Tensor]:
    """What enters the head at each row's trained places: those before the tokens that are trained on."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = max(1, TOKENS_AT_ONCE // longest)
    found = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in chosen], batch_first=True)
        mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in chosen], batch_first=True)
        places = pad_sequence([torch.tensor([*row["completion_mask"][1:], 0], dtype=torch.bool) for row in chosen], batch_first=True)
        ids, mask, places = (tensor.to(member.model.device) for tensor in (ids, mask, places))
        with torch.inference_mode(), only_at(member.model, places) as entered:
            logits = member.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with torch.inference_mode():
            again = member.model.get_output_embeddings()(entered[0])
        if not torch.allclose(logits, again, atol=1e-4):
            raise UserError(f"{field}: the model changes its head's logits afterwards (a soft cap, say), which kl and consistent do not cover")
        found.append(entered[0].cpu().clone())
    return found
