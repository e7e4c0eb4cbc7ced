"""What every arm costs: to tune (from the tuning reports) and to serve (from the weights that a token's pass reads)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from proxytune.cost import bytes_read
from proxytune.member import Member

COUNTED = ("tokens", "steps", "flops", "stored_bytes")
MEASURED = ("seconds", "peak_memory", "energy")


def tuning_cost(cards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum over the tuned members' cards, and their number (`runs`); the maximum for memory. None where a card does not report a quantity."""
    reports = [card["report"] for card in cards]
    cost: dict[str, Any] = {name: sum(report[name] for report in reports) for name in (*COUNTED, "seconds")}
    for name, reduce in (("peak_memory", max), ("energy", sum)):
        known = [report[name] for report in reports]
        cost[name] = reduce(known) if known and None not in known else None
    return cost | {"runs": len(reports)}


def with_trials(cost: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arm's cost plus that of the trials from which it was selected; stored bytes are those of the arm alone."""
    return tuning_cost([{"report": part} for part in (cost, *trials)]) | {
        "stored_bytes": cost["stored_bytes"],
        "runs": cost["runs"] + sum(trial["runs"] for trial in trials),
        **{name: cost[name] for name in ("flops_a_token", "bytes_a_token")},
    }


def serving_cost(members: Mapping[str, Member], names: Sequence[str]) -> dict[str, float]:
    """FLOPs (two per weight in a multiplication, without attention) and bytes of weights read per token by these members.

    Members that share weights read them once, but each multiplies by them. An adapter counts for the members that use it.
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
    """The number of weights of every LoRA adapter, by its name."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        _, lora, rest = name.partition(".lora_")
        if lora:
            adapter = rest.split(".")[1]
            found[adapter] = found.get(adapter, 0) + parameter.numel()
    return found
