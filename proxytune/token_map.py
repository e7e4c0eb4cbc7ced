"""Members of another vocabulary: tokens are mapped through the bytes that they stand for. Used only where it is asked for.

The member's input is exact as text: each token of the mixture becomes the member's tokens of the same bytes. Its output is
exact where one token of the member has the same bytes as the mixture's token. Every other token counts as no evidence: expert
and anti-expert are assumed to agree on it. So a map is for pairs and not for single members, and `mass_covered` says how much
of the base's probability is on mapped tokens. ThinkLogit (2026) maps tokens the same way, but reads unmapped ones as unknown.

Text is split where the mixture's tokens end, which is not always where the member's own tokenizer would split it. Not covered:
marginalising over all tokenizations of a text (Hayase et al. 2025, arXiv 2506.14123).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from proxytune.errors import UserError
from proxytune.padding import left_padded


@dataclass(frozen=True)
class TokenMap:
    """For each id of the mixture: the member's ids of the same bytes, the first of them, and whether it is the only one."""

    pieces: list[list[int]]
    single: Int[Tensor, " ids"]
    exact: Bool[Tensor, " ids"]

    def read(
        self, ids: Int[Tensor, "rows time"], mask: Int[Tensor, "rows time"], pad: int
    ) -> tuple[Int[Tensor, "rows own_time"], Int[Tensor, "rows own_time"], Int[Tensor, "rows time"]]:
        """The rows in the member's ids, padded on the left; their attention mask; and the column where each of the mixture's tokens ends."""
        rows: list[list[int]] = []
        ends: list[list[int]] = []
        for tokens, used in zip(ids.tolist(), mask.tolist(), strict=True):
            row: list[int] = []
            end = []
            for token, is_used in zip(tokens, used, strict=True):
                row += self.pieces[token] if is_used else []
                end.append(len(row) - 1)
            rows.append(row)
            ends.append(end)
        own, own_mask = left_padded(rows, pad, ids.device)
        shift = own.shape[1] - torch.tensor([len(row) for row in rows], device=ids.device)
        return own, own_mask, (torch.tensor(ends, dtype=torch.long, device=ids.device) + shift[:, None]).clamp(min=0)

    def translate(self, logits: Float[Tensor, "*batch own_ids"]) -> Float[Tensor, "*batch ids"]:
        """Log-probabilities of the mixture's tokens; 0 where no single token stands for one, the same for every member."""
        own = logits.float().log_softmax(-1)
        return torch.where(self.exact.to(own.device), own[..., self.single.to(own.device)], 0.0)

    def probabilities(self, translated: Float[Tensor, "*batch ids"]) -> Float[Tensor, "*batch ids"]:
        """Probabilities from the result of `translate`; NaN where no single token stands for one."""
        return torch.where(self.exact.to(translated.device), translated.exp(), torch.nan)

    def mass_covered(self, logits: Float[Tensor, "*batch ids"]) -> Float[Tensor, "*batch"]:
        """The share of a member's probability that is on mapped tokens; the member has the mixture's own vocabulary."""
        return (logits.float().softmax(-1) * self.exact.to(logits.device)).sum(-1)


def map_tokens(shared: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, rows: int) -> TokenMap:
    """The map from the first `rows` ids of the mixture's tokenizer to those of a member's.

    Beginning, end, padding and unknown tokens are mapped by their role, other special ones by their text. A token
    that the member's tokens cannot spell is read as its unknown (or end) token. Raises `UserError` where no token has a counterpart.
    """
    theirs = token_bytes(own)
    by_bytes: dict[bytes, int] = {}
    for identifier, text in sorted(theirs.items(), reverse=True):
        by_bytes[text] = identifier
    roles = {
        getattr(shared, f"{role}_token_id"): getattr(own, f"{role}_token_id")
        for role in ("unk", "pad", "bos", "eos")
        if getattr(own, f"{role}_token_id") is not None
    }
    longest = max(map(len, by_bytes))
    unknown = own.unk_token_id if own.unk_token_id is not None else own.eos_token_id
    ours = token_bytes(shared)
    pieces, exact = [], []
    for identifier in range(rows):
        found = [roles[identifier]] if identifier in roles else _spelled(ours.get(identifier, b""), by_bytes, longest)
        exact.append(len(found) == 1)
        pieces.append(found or [unknown])
    if not any(exact):
        raise UserError("token map: no token of the one vocabulary has a counterpart in the other; mix models of one vocabulary")
    return TokenMap(pieces, torch.tensor([found[0] for found in pieces]), torch.tensor(exact))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes that each id stands for: byte-level vocabularies, those that mark spaces by ▁, and plain words."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = json.dumps([settings.get("decoder"), settings.get("pre_tokenizer")])
    back = {character: byte for byte, character in bytes_to_unicode().items()}
    found = {}
    for token, identifier in tokenizer.get_vocab().items():
        if "ByteLevel" in decoder and all(character in back for character in token):
            found[identifier] = bytes(back[character] for character in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[identifier] = bytes([int(token[3:5], 16)])
        else:
            found[identifier] = token.replace("▁", " ").encode()
    return found | {identifier: token.content.encode() for identifier, token in tokenizer.added_tokens_decoder.items()}


def _spelled(text: bytes, by_bytes: dict[bytes, int], longest: int) -> list[int]:
    """The text in the longest tokens possible, from the left; nothing where some byte has no token."""
    found: list[int] = []
    while text:
        size = next((size for size in range(min(longest, len(text)), 0, -1) if text[:size] in by_bytes), 0)
        if not size:
            return []
        found.append(by_bytes[text[:size]])
        text = text[size:]
    return found


def check_pairs(coefficients: Sequence[tuple[str, float]]) -> None:
    """Raises `UserError` unless the coefficients of mapped members sum to zero: a map only transfers differences."""
    if abs(sum(value for _, value in coefficients)) > 1e-9:
        names = ", ".join(name for name, _ in coefficients)
        raise UserError(f"mixture: {names} have another vocabulary, so their coefficients must sum to 0; give expert and anti-expert as a pair")
