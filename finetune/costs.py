"""What tuning costs: FLOPs by formula; seconds, memory and energy as the machine reports them.

Let N be the weights of all linear layers (the head among them, tied or not), L the layers, d the width of all heads
together and T the tokens of a row. A token's forward pass takes 2N + 4LdT FLOPs. Its backward pass takes as much for the
inputs' gradients (attention twice that) in the layers from the lowest trained one upwards, and 2 for each trained weight. So
full tuning takes 6N + 12LdT a token, LoRA about 4N + 12LdT, and frozen lower layers are passed forwards only. Not counted:
normalisations, activation functions, the optimizer. Attention is counted as if no token were masked.
"""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from proxytune.packing import return_memory

POWER_CAPPING = Path("/sys/class/powercap")  # where Linux shows the processor's energy counters


def forward_flops(model: Any, tokens: int, length: float) -> float:
    """FLOPs of a forward pass over `tokens` tokens in rows of `length` tokens on average (0: without attention)."""
    return tokens * (2.0 * sum(map(_numel, _linear_layers(model))) + _attention(model, length))


def training_flops(model: Any, tokens: int, length: float) -> float:
    """FLOPs of forward and backward passes over `tokens` tokens, by which parameters ask for a gradient."""
    layers = _linear_layers(model)
    trained = [_numel(layer) if layer.weight.requires_grad else 0 for layer in layers]
    embedded = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    lowest = 0 if embedded else next((place for place, count in enumerate(trained) if count), len(layers))
    through = sum(map(_numel, layers[lowest:]))
    share = through / max(1, sum(map(_numel, layers)))
    backward = 2.0 * through + 2.0 * share * _attention(model, length) + 2.0 * sum(trained)
    return forward_flops(model, tokens, length) + tokens * backward


def _linear_layers(model: nn.Module) -> list[Any]:
    """All layers that multiply by a matrix of weights, in the model's order; the parts of a LoRA layer among them."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def _attention(model: Any, length: float) -> float:
    config = model.config.get_text_config()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 4.0 * config.num_hidden_layers * width * length


def _numel(layer: Any) -> int:
    return int(layer.weight.numel())


@dataclass
class Meter:
    """Counts from when it is made, on top of what an interrupted run counted before.

    `seconds`; `peak_memory`, the most bytes held (of the GPU where there is one, else by the process, its libraries included;
    None where the system cannot tell for a part of a process's life); `energy` in joules of all processors and GPUs of the
    machine, whoever used them (None where it shows no counter that may be read). Call `tick` at least every few minutes:
    counters wrap.
    """

    seconds: float = 0.0
    peak_memory: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        self._time = time.perf_counter()
        self._joules = _energy_counters()
        self._knows_peak = _reset_peak()

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._time
        self._time = now
        if self._knows_peak:
            self.peak_memory = max(self.peak_memory or 0, _peak())
        counters = _energy_counters()
        if counters:
            used = sum((value - self._joules[name][0]) % wrap for name, (value, wrap) in counters.items() if name in self._joules)
            self.energy = (self.energy or 0.0) + used
            self._joules = counters


def _reset_peak() -> bool:
    """Forgets the peak so far; returns whether the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    return_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _energy_counters() -> dict[str, tuple[float, float]]:
    """Joules of every counter that may be read, and where it begins again from zero."""
    found = {}
    for folder in sorted(POWER_CAPPING.glob("intel-rapl:[0-9]")):
        try:
            joules, wrap = (int((folder / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj"))
        except (OSError, ValueError):
            continue
        found[folder.name] = (joules, wrap)
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return found
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(index))
            found[f"gpu-{index}"] = (millijoules / 1e3, 2.0**64 / 1e3)
    except pynvml.NVMLError:  # no driver or no counter: then there is no such figure
        pass
    return found
