"""`proxytune generate`: a mixture's answer to a prompt, streamed, and on request explained token by token."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TextStreamer

from finetune.data import prompt_ids
from proxytune.adapters import is_adapter
from proxytune.errors import UserError
from proxytune.explanation import TokenExplanation
from proxytune.member import Weights, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM


def load_mixture(base: str, expert: str | None, antiexpert: str | None, alpha: float) -> tuple[ProxyTunedForCausalLM, PreTrainedTokenizerBase]:
    """Loads base + alpha (expert - antiexpert) and the base's tokenizer; an expert that is a LoRA adapter goes on the anti-expert.

    Raises `UserError` where only one of expert and anti-expert is given.
    """
    if (expert is None) != (antiexpert is None):
        raise UserError("--expert and --antiexpert: give both or neither; the anti-expert is the expert before it was tuned")
    weights = {"base": Weights(base, field="--base")}
    if expert is not None and antiexpert is not None:
        adapted = is_adapter(expert)
        weights["expert"] = Weights(antiexpert if adapted else expert, Path(expert) if adapted else None, field="--expert")
        weights["antiexpert"] = Weights(antiexpert, field="--antiexpert")
    members = load_members(weights, packed=True)
    return ProxyTunedForCausalLM(members, proxy_tuning(alpha) if expert else {"base": 1.0}), members["base"].tokenizer


def generate(
    model: ProxyTunedForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, temperature: float, speculate: bool
) -> tuple[list[int], int]:
    """Streams the answer to standard output; returns prompt and answer as ids, and the prompt's length. Greedy at 0."""
    ids = prompt_ids(tokenizer, prompt)
    law = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    input_ids = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    made = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        streamer=streamer,
        speculate=speculate,
        **law,
    )
    sys.stdout.flush()
    return made[0].tolist(), len(ids)


def print_explanation(explanations: list[TokenExplanation], tokenizer: PreTrainedTokenizerBase) -> None:
    """A table on standard output; tokens that the base alone would not have chosen are marked with what it would have."""
    names = list(explanations[0].members) if explanations else []
    table = Table("token", *names, "mixture", "the base alone", title="Probability of each token", title_justify="left")
    for entry in explanations:
        instead = escape(repr(tokenizer.decode([entry.base_choice]))) if entry.changed else ""
        table.add_row(
            escape(repr(tokenizer.decode([entry.token]))), *(f"{entry.members[name]:.3f}" for name in names), f"{entry.mixture:.3f}", instead
        )
    changed = sum(entry.changed for entry in explanations)
    Console(highlight=False).print(table, f"{changed} of {len(explanations)} tokens are not the base's own choice.")
