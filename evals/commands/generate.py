"""`proxytune generate`: a mixture's answer to a prompt, streamed and, on request, explained token by token."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from evals.display.cells import Table
from finetune.encoding import chat_ids, prompt_ids
from proxytune.adapters import is_adapter
from proxytune.drafting import rounded_draft
from proxytune.errors import UserError
from proxytune.explanation import TokenExplanation
from proxytune.member import Member, Weights, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.printable import printable
from proxytune.token_map import map_tokens


@dataclass(frozen=True)
class Sources:
    """Which models, on which devices, and in which type."""

    base: str
    expert: str | None = None
    antiexpert: str | None = None
    device: str = "cpu"
    proxy_device: str | None = None
    dtype: torch.dtype = torch.float32
    map_tokens: bool = False


@dataclass(frozen=True)
class Chat:
    """Which members read the prompt in their chat template, with which system prompt and which beginning of the answer."""

    members: Sequence[str] = ()
    system: str | None = None
    response_prefix: str = ""


def weights_of(sources: Sources) -> dict[str, Weights]:
    """The members' weights. Raises `UserError` if only one of expert and anti-expert is given, and for a token map without them."""
    expert, antiexpert, proxy_device = sources.expert, sources.antiexpert, sources.proxy_device or sources.device
    if (expert is None) != (antiexpert is None):
        raise UserError("--expert and --antiexpert: give both or neither; the anti-expert is the expert before it was tuned")
    if sources.map_tokens and expert is None:
        raise UserError("--map-tokens: it maps the tokens of expert and anti-expert; give both or leave it out")
    weights = {"base": Weights(sources.base, device=sources.device, field="--base")}
    if expert is not None and antiexpert is not None:
        adapted = is_adapter(expert)
        weights["expert"] = Weights(antiexpert if adapted else expert, Path(expert) if adapted else None, proxy_device, "--expert")
        weights["antiexpert"] = Weights(antiexpert, device=proxy_device, field="--antiexpert")
    return weights


def load_mixture(sources: Sources, alpha: float, drafting: bool = False) -> tuple[ProxyTunedForCausalLM, dict[str, Member]]:
    """Loads base + alpha (expert - antiexpert). An expert that is a LoRA adapter is loaded on the anti-expert.

    With `drafting` on the CPU, the member 'draft' is an 8-bit copy of the expert. Raises what `weights_of` and loading raise.
    """
    members = load_members(weights_of(sources), dtype=sources.dtype, prepacked=True)
    if drafting and "expert" in members and (sources.proxy_device or sources.device) == "cpu" and not sources.map_tokens:
        members["draft"] = rounded_draft(members["expert"])
    maps = {}
    if sources.map_tokens and "expert" in members:
        base = members["base"]
        maps = {name: map_tokens(base.tokenizer, members[name].tokenizer, base.rows) for name in ("expert", "antiexpert")}
    return ProxyTunedForCausalLM(members, proxy_tuning(alpha) if sources.expert else {"base": 1.0}, maps), members


def read_prompts(members: Mapping[str, Member], prompt: str, chat: Chat) -> dict[str, list[int]]:
    """Each member's prompt ids. Raises `UserError` for a chat member that does not exist or whose tokenizer has no template."""
    for name in chat.members:
        if name not in members:
            raise UserError(f"--chat: '{name}' is no member; the members are {', '.join(members)}")
        if members[name].tokenizer.chat_template is None:
            raise UserError(f"--chat: the tokenizer of '{name}' has no chat template; leave it out")
    if not chat.members and (chat.system or chat.response_prefix):
        raise UserError("--system and --response-prefix: they belong to a chat template; say with --chat which member reads one")
    # The draft model has the same prompt as the expert.
    voices = {name: "expert" if name == "draft" else name for name in members}
    return {
        name: chat_ids(members[name].tokenizer, prompt, chat.system, chat.response_prefix)
        if voice in chat.members
        else prompt_ids(members[name].tokenizer, prompt)
        for name, voice in voices.items()
    }


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
