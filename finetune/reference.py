"""Logits of reference models (which do not change) at training rows, computed once and kept.

Only the states before the output head are kept, and only at trained positions: one vector of the hidden width per position, not
one of the vocabulary's. The head is applied again at every step, so a step costs the small model's step and one product more.
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
    """A model's logits at the trained positions of rows that it has read."""

    def __init__(self, head: nn.Module, states: dict[tuple[int, ...], Tensor]):
        self._head, self._states = head.requires_grad_(False), states

    def logits(self, rows: Sequence[Sequence[int]], device: torch.device) -> Float[Tensor, "positions vocabulary"]:
        """The logits of rows of token ids, end to end. Raises KeyError for a row that was not read."""
        return next(self.pieces(rows, device, None))

    def pieces(self, rows: Sequence[Sequence[int]], device: torch.device, most: int | None) -> Iterator[Float[Tensor, "positions vocabulary"]]:
        """The same, at most so many positions at a time; None: all at once."""
        self._head.to(device)
        states = torch.cat([self._states[tuple(row)] for row in rows])
        for some in states.split(most or max(1, len(states))):
            with torch.no_grad():
                yield self._head(some.to(device)).float()


@contextmanager
def only_at(model: Any, positions: Bool[Tensor, "batch time"]) -> Iterator[list[Tensor]]:
    """Within the context the model's head sees only these positions: logits are [positions, vocabulary]. Yields the states before it."""
    entered: list[Tensor] = []

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entered.append(arguments[0][positions])
        return (entered[-1], *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield entered
    finally:
        handle.remove()


def read_reference(member: Member, rows: Sequence[Row], folder: Path, field: str) -> Reference:
    """The model's logits at the rows, from a file in `folder` if the same weights have read the same rows before.

    Several processes may do this at the same time in one folder. Raises `UserError` where the model's logits are not simply
    the product of its head.
    """
    distinct = list({tuple(row["input_ids"]): row for row in rows}.values())
    read = [[row["input_ids"], row["completion_mask"]] for row in distinct]
    file = folder / f"states-{content_key(model=member.fingerprint, rows=read)}.safetensors"
    states = _kept(file)
    if states is None:
        folder.mkdir(parents=True, exist_ok=True)
        states = torch.cat(_states(member, distinct, field))
        partial = file.with_suffix(f".{uuid4().hex}.partial")  # a name of its own: process ids are not unique where machines share a folder
        try:
            save_file({"states": states}, partial, metadata={"sha256": _digest(states)})
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    sizes = [sum(row["completion_mask"][1:]) for row in distinct]
    states_of_row = states.split(sizes)
    head = copy.deepcopy(member.model.get_output_embeddings())
    return Reference(head, {tuple(row["input_ids"]): states for row, states in zip(distinct, states_of_row, strict=True)})


def _kept(file: Path) -> Float[Tensor, "positions hidden"] | None:
    """The states in a file. None where there is no file, and, with a warning, where it is damaged."""
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
    """The states before the head at each row's trained positions, which come before the tokens that are trained on."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = max(1, TOKENS_AT_ONCE // longest)
    found = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in chosen], batch_first=True)
        mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in chosen], batch_first=True)
        positions = pad_sequence([torch.tensor([*row["completion_mask"][1:], 0], dtype=torch.bool) for row in chosen], batch_first=True)
        ids, mask, positions = (tensor.to(member.model.device) for tensor in (ids, mask, positions))
        with torch.inference_mode(), only_at(member.model, positions) as entered:
            logits = member.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with torch.inference_mode():
            again = member.model.get_output_embeddings()(entered[0])
        if not torch.allclose(logits, again, atol=1e-4):
            raise UserError(
                f"{field}: the model changes its head's logits afterwards (a soft cap, for example), which kl, consistent and logit_bias do not cover"
            )
        found.append(entered[0].cpu().clone())
    return found
