"""What each member thought of a text, token by token, and where the mixture chose otherwise than the base."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from proxytune.errors import UserError
from proxytune.mixture import active, combine
from proxytune.modeling import ProxyTunedForCausalLM


class TokenExplanation(NamedTuple):
    """One token: its probability under every active member and under the mixture, and the base's own first choice."""

    token: int
    members: dict[str, float]
    mixture: float
    base_choice: int

    @property
    def changed(self) -> bool:
        """Whether the base alone would have chosen another token here."""
        return self.token != self.base_choice


@torch.inference_mode()
def explain(model: ProxyTunedForCausalLM, ids: Sequence[int], prompt_length: int, base: str = "base") -> list[TokenExplanation]:
    """Explains the tokens after the first `prompt_length` of `ids`, from one pass of each active member and the base.

    Raises `UserError` where the prompt is empty. Not covered: what sampling, top-p and the like did to the law.
    """
    if not 0 < prompt_length <= len(ids):
        raise UserError(f"prompt_length: must be from 1 to {len(ids)}, not {prompt_length}")
    if prompt_length == len(ids):
        return []
    names = dict.fromkeys([base, *active(model.mixture)])
    logits = model.member_logits(names, torch.tensor([list(ids[:-1])], device=model.device), logits_to_keep=len(ids) - prompt_length)
    mixed = combine({name: logits[name] for name in active(model.mixture)}, model.mixture)
    laws = {name: law[0].float().softmax(-1) for name, law in logits.items()}
    choices = laws[base].argmax(-1)
    return [
        TokenExplanation(
            token, {name: float(laws[name][place, token]) for name in names}, float(mixed[0, place].softmax(-1)[token]), int(choices[place])
        )
        for place, token in enumerate(ids[prompt_length:])
    ]
