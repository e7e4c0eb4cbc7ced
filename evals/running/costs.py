"""What every arm cost: to tune, by its cards, and to serve, by the weights that a token's pass reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from proxytune.cost import bytes_read
from proxytune.member import Member

COUNTED = ("tokens", "steps", "flops", "stored_bytes")
MEASURED = ("seconds", "peak_memory", "energy")


def tuning_cost(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum over tuned members' cards, of memory the most, and how many of them; energy is None where any machine told none."""
    reports = [card["report"] for card in cards]
    cost: dict[str, Any] = {name: sum(report[name] for report in reports) for name in (*COUNTED, "seconds")}
    for name, reduce in (("peak_memory", max), ("energy", sum)):
        known = [report[name] for report in reports]
        cost[name] = reduce(known) if known and None not in known else None
    return cost | {"runs": len(reports)}


def with_trials(cost: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost with that of the trials among which the arm was chosen; what is stored is the arm's own."""
    return tuning_cost([{"report": part} for part in (cost, *trials)]) | {
        "stored_bytes": cost["stored_bytes"],
        "runs": cost["runs"] + sum(trial["runs"] for trial in trials),
        **{name: cost[name] for name in ("flops_a_token", "bytes_a_token")},
    }


def serving_cost(members: Mapping[str, Member], names: Sequence[str]) -> dict[str, float]:
    """FLOPs (two for each weight that is multiplied by, attention left out) and bytes of weights read a token by these members.

    Members on one set of weights read it once and multiply by it each; an adapter counts where it is passed through.
    """
    chosen = [members[name] for name in names]
    models = {id(member.model): member.model for member in chosen}
    flops = 0.0
    for member in chosen:
        adapters = _adapter_weights(member.model)
        own = sum(adapters.values()) if member.adapter is None else adapters.get(member.adapter.name, 0)
        flops += 2.0 * (_weights(member.model) - sum(adapters.values()) + own)
    return {"flops_a_token": flops, "bytes_a_token": float(sum(map(bytes_read, models.values())))}


def _weights(model: torch.nn.Module) -> int:
    modules = [module for module in model.modules() if not isinstance(module, torch.nn.Embedding)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))]
    return sum(tensor.numel() for tensor in tensors if tensor.dim() == 2)  # the rest are norms, biases and tables


def _adapter_weights(model: torch.nn.Module) -> dict[str, int]:
    """Weights of every LoRA adapter, by its name."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        _, lora, rest = name.partition(".lora_")
        if lora:
            adapter = rest.split(".")[1]
            found[adapter] = found.get(adapter, 0) + parameter.numel()
    return found
