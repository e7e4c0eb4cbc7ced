"""A bias: a vector over the vocabulary that is added to a mixture's logits at every step. -inf bans a token."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from proxytune.errors import UserError

LARGEST_BIAS = 1e30  # so small beside the largest number of fp32 that their sum does not overflow


@dataclass(frozen=True, eq=False)
class Bias:
    """The vector in fp32, a copy of what is given. Biases of equal values are equal and have one hash.

    Raises `UserError` for a number that is neither -inf nor within ±1e30, and where no token is left.
    """

    values: Float[Tensor, " vocabulary"]

    def __post_init__(self) -> None:
        values = self.values.detach().float().cpu() + 0.0  # -0.0 becomes 0.0
        wrong = ~(values.isneginf() | (values.abs() <= LARGEST_BIAS))
        if wrong.any():
            token = int(wrong.nonzero()[0])
            raise UserError(f"bias: token {token} has {float(values[token]):g}; give a number within ±{LARGEST_BIAS:g}, or -inf to ban the token")
        if not len(values) or values.isneginf().all():
            raise UserError(f"bias: all {len(values)} tokens are banned; leave some")
        object.__setattr__(self, "values", values)

    @classmethod
    def banning(cls, tokens: Sequence[int], vocabulary: int) -> "Bias":
        """-inf for these tokens and 0 for the others. Raises `UserError` for ids outside the vocabulary, and where all are banned."""
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise UserError(f"bias: {token} is no token; the vocabulary has the ids 0 to {vocabulary - 1}")
        values = torch.zeros(vocabulary)
        values[list(tokens)] = -torch.inf
        return cls(values)

    @property
    def bans(self) -> bool:
        """Whether some token is banned."""
        return bool(self.values.isneginf().any())

    @cached_property
    def digest(self) -> str:
        """A hash of the values. Computed once."""
        return hashlib.sha256(self.values.numpy().tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bias) and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self.digest)
