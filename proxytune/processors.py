"""Logits processors of `generate`: one that stops at NaN, and those that speculation may use."""

import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from proxytune.errors import UserError


class NumbersOnly(LogitsProcessor):
    """Raises `UserError` for logits that are NaN, from which `generate` would pick an arbitrary token. `whose` is the mixture in words."""

    def __init__(self, whose: str):
        self._whose = whose

    def __call__(self, input_ids: Int[Tensor, "rows time"], scores: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows vocabulary"]:
        if scores.isnan().any():
            raise UserError(
                f"mixture: the logits of {self._whose} after {input_ids.shape[1]} tokens hold NaN; look at its weights, or take a wider dtype"
            )
        return scores


# Processors that are functions of the text and its scores. Others count their calls or keep a cache.
STATELESS = frozenset(
    {
        transformers.EncoderNoRepeatNGramLogitsProcessor,
        transformers.EncoderRepetitionPenaltyLogitsProcessor,
        transformers.EpsilonLogitsWarper,
        transformers.EtaLogitsWarper,
        transformers.ExponentialDecayLengthPenalty,
        transformers.ForcedBOSTokenLogitsProcessor,
        transformers.ForcedEOSTokenLogitsProcessor,
        transformers.InfNanRemoveLogitsProcessor,
        transformers.LogitNormalization,
        transformers.MinLengthLogitsProcessor,
        transformers.MinNewTokensLengthLogitsProcessor,
        transformers.MinPLogitsWarper,
        transformers.NoBadWordsLogitsProcessor,
        transformers.NoRepeatNGramLogitsProcessor,
        transformers.PrefixConstrainedLogitsProcessor,
        transformers.RepetitionPenaltyLogitsProcessor,
        transformers.SequenceBiasLogitsProcessor,
        transformers.SuppressTokensAtBeginLogitsProcessor,
        transformers.SuppressTokensLogitsProcessor,
        transformers.TemperatureLogitsWarper,
        transformers.TopKLogitsWarper,
        transformers.TopPLogitsWarper,
        transformers.TypicalLogitsWarper,
        transformers.WatermarkLogitsProcessor,
        NumbersOnly,
    }
)
