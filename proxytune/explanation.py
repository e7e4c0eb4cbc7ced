"""The probability of each token of a text under every member, and where the mixture chose another token than the base."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from proxytune.errors import UserError
from proxytune.mixture import active
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.prompts import own_prompts


class TokenExplanation(NamedTuple):
    """One token: its probability under every active member and under the mixture, and the base's own first choice.

    NaN under a member of another vocabulary without such a token.
    """

    token: int
    members: dict[str, float]
    mixture: float
    base_choice: int

    @property
    def changed(self) -> bool:
        """Whether the base alone would have chosen another token here."""
        return self.token != self.base_choice


@torch.inference_mode()
def explain(
    model: ProxyTunedForCausalLM,
    ids: Sequence[int],
    prompt_length: int,
    base: str = "base",
    prompts: Mapping[str, Sequence[int]] | None = None,
) -> list[TokenExplanation]:
    """Explains the tokens after the first `prompt_length` of `ids`, from one pass of each active member and the base.

    `prompts` are those that members read instead of the shared one. Raises `UserError` where the prompt is empty. Not
    covered: how sampling, top-p and similar options changed the distribution.
    """
    if not 0 < prompt_length <= len(ids):
        raise UserError(f"prompt_length: must be from 1 to {len(ids)}, not {prompt_length}")
    if prompt_length == len(ids):
        return []
    names = dict.fromkeys([base, *active(model.mixture)])
    input_ids = torch.tensor([list(ids[:-1])], device=model.device)
    pad = model.config.pad_token_id or 0
    given = {name: [prompt] for name, prompt in (prompts or {}).items()}
    own = own_prompts(given, prompt_length, 1, pad, input_ids.device) if given else None
    kept = len(ids) - prompt_length
    logits = model.member_logits(names, input_ids, torch.ones_like(input_ids), logits_to_keep=kept, prompts=own)
    positions, lengths = torch.arange(input_ids.shape[1], device=input_ids.device)[None], torch.tensor([prompt_length], device=input_ids.device)
    mixed = model.mixed({name: logits[name] for name in active(model.mixture)}, positions, lengths, kept)
    probabilities = {
        name: model.token_maps[name].probabilities(values[0]) if name in model.token_maps else values[0].float().softmax(-1)
        for name, values in logits.items()
    }
    choices = probabilities[base].argmax(-1)
    return [
        TokenExplanation(
            token,
            {name: float(probabilities[name][position, token]) for name in names},
            float(mixed[0, position].softmax(-1)[token]),
            int(choices[position]),
        )
        for position, token in enumerate(ids[prompt_length:])
    ]
