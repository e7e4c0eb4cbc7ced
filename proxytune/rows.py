"""Rows of tokens that grow by several tokens at a time, each at its own pace."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, StoppingCriteriaList

from proxytune.errors import UserError


class Rows:
    """Rows of tokens that grow at their own pace.

    Stopping criteria and streamer see what they see in plain decoding: all rows, one token longer at each call, ended rows padded.
    So a row that is ahead waits until the criteria have seen it, and may be cut back then.
    """

    def __init__(self, input_ids: Int[Tensor, "rows time"], criteria: StoppingCriteriaList, settings: GenerationConfig, streamer: Any):
        self.tokens = [row.tolist() for row in input_ids]
        self._device, self._width = input_ids.device, input_ids.shape[1]
        self._criteria, self._streamer = criteria, streamer
        self._seen = self._width  # the length up to which the criteria have seen the rows
        self._unfinished = torch.ones(len(self.tokens), dtype=torch.bool, device=self._device)
        self.longest = int(criteria.max_length or settings.max_length)
        self._ends = {int(end) for criterion in criteria if isinstance(criterion, EosTokenCriteria) for end in criterion.eos_token_id}
        # Without an end token, `generate` continues a stopped row until all are stopped.
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = getattr(settings, "_pad_token_tensor", None)
        if self._pads and pad is None:
            raise UserError("pad_token_id: rows that end early are filled up with it; give one")
        self._pad = 0 if pad is None else int(pad)

    @property
    def _open(self) -> list[bool]:
        return self._unfinished.tolist() if self._pads else [bool(self._unfinished.any())] * len(self.tokens)

    @property
    def running(self) -> Bool[Tensor, " rows"]:
        """The rows that need more tokens now: not stopped, and not waiting for the criteria."""
        wants = [runs and (len(row) == self._seen or not self._is_full(row)) for row, runs in zip(self.tokens, self._open, strict=True)]
        return torch.tensor(wants, device=self._device)

    @property
    def room(self) -> int:
        """How many tokens may be drafted for the shortest running row, with one left for the token that follows."""
        return self.longest - 1 - min(len(row) for row, runs in zip(self.tokens, self.running.tolist(), strict=True) if runs)

    @property
    def pending(self) -> Int[Tensor, "rows 1"]:
        return torch.tensor([row[-1:] for row in self.tokens], device=self._device)

    @property
    def emitted(self) -> int:
        return sum(len(row) - self._width for row in self.tokens)

    def _is_full(self, row: list[int]) -> bool:
        return len(row) >= self.longest or row[-1] in self._ends

    def extend(self, proposed: Int[Tensor, "rows drafted"], accepted: Int[Tensor, " rows"], following: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Appends to each running row its accepted tokens and the one that follows, then calls the criteria. Returns how many each row took."""
        before = [len(row) for row in self.tokens]
        for number in self.running.nonzero()[:, 0].tolist():
            row = self.tokens[number]
            for token in [*proposed[number, : int(accepted[number])].tolist(), int(following[number])]:
                row.append(token)
                if self._is_full(row):
                    break
        taken = [len(row) - length for row, length in zip(self.tokens, before, strict=True)]
        while any(self._open) and all(len(row) > self._seen for row, runs in zip(self.tokens, self._open, strict=True) if runs):
            self._seen += 1
            shown = self.shown()
            self._unfinished &= ~self._criteria(shown, None)
            if self._streamer is not None:
                self._streamer.put(shown[:, -1].cpu())
            for row, runs in zip(self.tokens, self._open, strict=True):
                if not runs:
                    del row[self._seen :]
        return torch.tensor(taken, device=self._device)

    def shown(self) -> Int[Tensor, "rows seen"]:
        """The rows up to the length that the criteria have seen."""
        rows = [row[: self._seen] + [self._pad] * (self._seen - len(row)) for row in self.tokens]
        return torch.tensor(rows, device=self._device)
