"""The mixture that a command names: where its members are, how they are loaded, and each member's prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.encoding import chat_ids, prompt_ids
from proxytune.adapters import is_adapter
from proxytune.drafting import rounded_draft
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
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
