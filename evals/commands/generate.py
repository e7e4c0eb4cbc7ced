"""`proxytune generate`: a mixture's answer to a prompt, streamed and, on request, explained token by token."""

import math
import sys
from collections.abc import Mapping

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from evals.display.cells import Table
from proxytune.errors import UserError
from proxytune.explanation import TokenExplanation
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.printable import printable


class _Printed(TextStreamer):
    """Prints text with control characters escaped: a model may generate terminal commands."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text, keep="\n\t"), stream_end)


def generate(
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, list[int]],
    new_tokens: int,
    temperature: float,
    speculate: bool,
) -> list[int]:
    """Streams the answer to standard output; returns the base's prompt and the answer as ids. Greedy at temperature 0.

    Raises `UserError` for a temperature that is not finite, and if no token has a finite probability.
    """
    if not math.isfinite(temperature):
        raise UserError(f"--temperature: it must be a finite number, not {temperature}; 0 is greedy")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    input_ids = torch.tensor([prompts["base"]], device=model.device)
    own = {name: [ids] for name, ids in prompts.items() if name in model.token_maps or ids != prompts["base"]}
    try:
        made = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            prompts=own or None,
            max_new_tokens=new_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            streamer=_Printed(tokenizer, skip_prompt=True, skip_special_tokens=True),
            speculate=speculate,
            draft="draft" if "draft" in model.members else "expert",
            **sampling,
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"--temperature: at {temperature} no token has a finite probability; raise it, or use models that are not broken") from error
    sys.stdout.flush()
    return made[0].tolist()


def explanation_table(explanations: list[TokenExplanation], tokenizer: PreTrainedTokenizerBase) -> Table:
    """One row per token. A token that the base alone would not have chosen is shown beside the base's choice."""
    names = list(explanations[0].members) if explanations else []
    frame = pd.DataFrame({"token": [repr(tokenizer.decode([entry.token])) for entry in explanations]}, dtype=str)
    for name in names:
        frame[name] = ["none" if math.isnan(entry.members[name]) else f"{entry.members[name]:.3f}" for entry in explanations]
    frame["mixture"] = [f"{entry.mixture:.3f}" for entry in explanations]
    frame["the base alone"] = [repr(tokenizer.decode([entry.base_choice])) if entry.changed else "" for entry in explanations]
    changed = sum(entry.changed for entry in explanations)
    return Table("Probability of each token", frame, f"{changed} of {len(explanations)} tokens are not the base's own choice.")
