"""How many tokens to draft before the mixture checks them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proxytune.cost import Pace

LONGEST_DRAFT = 12


class DraftLength:
    """Decides whether to draft one more token: when its chance to be accepted, times the seconds a token takes, exceeds its cost.

    The chance is that of all tokens before it times its own: 1 - k (1 - c) where the draft's best token has probability c,
    at most .95; k is learned from what was refused. The decision depends only on what came before the token, so the
    distribution stays exact. Seconds are estimates of `cost` and not measured: the same seed gives the same tokens.

    `together` members share the draft's pass. `draft` and `verify` are seconds of a pass over one token: of that shared pass, and of
    all other members. `fixed` is a number of tokens to draft always.
    """

    def __init__(self, pace: Pace, together: int, draft: float, verify: float, fixed: int | None):
        self._pace, self._together, self._draft, self._verify, self._fixed = pace, together, draft, verify, fixed
        self._refused = self._doubts = 0.5  # the prior: k = 1
        self._seconds = self._tokens = 0.0

    def one_more(self, confidence: Float[Tensor, "running drafted"]) -> bool:
        """`confidence` is the best token's probability before each token drafted so far and before the next one, of the running rows."""
        ahead = confidence.shape[1] - 1
        if self._fixed is not None or ahead >= LONGEST_DRAFT:
            return ahead < min(self._fixed or LONGEST_DRAFT, LONGEST_DRAFT)
        running = len(confidence)
        chance = (1 - self._refused / self._doubts * _doubt(confidence)).clamp(0, 1).prod(1).sum()
        # Before the first round: the seconds of a token without a draft.
        alone = self._one_round(0, running) / running
        a_token = self._seconds / self._tokens if self._tokens else alone
        return bool(chance * a_token > self._one_round(ahead + 1, running) - self._one_round(ahead, running))

    def learn(self, confidence: Float[Tensor, "running drafted"], accepted: Int[Tensor, " running"]) -> None:
        """After a round: the confidence before each drafted token, and how many of them each running row accepted."""
        running, ahead = confidence.shape
        verified = torch.arange(ahead, device=accepted.device) <= accepted[:, None]
        self._refused = 0.9 * self._refused + float((accepted < ahead).sum())
        self._doubts = 0.9 * self._doubts + float((_doubt(confidence) * verified).sum())
        self._seconds = 0.9 * self._seconds + self._one_round(ahead, running)
        self._tokens = 0.9 * self._tokens + float((accepted + 1).sum())

    def _one_round(self, ahead: int, rows: int) -> float:
        further = self._pace.token
        drafting = (ahead + 1) * self._draft * (1 + further * (rows * self._together - 1))
        return drafting + self._verify * (1 + further * (rows * (ahead + 1) - 1))


def _doubt(confidence: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return (1 - confidence).clamp(min=0.05)
