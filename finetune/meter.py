"""The seconds, memory and energy of a run, as the machine reports them."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from proxytune.prepacked import return_memory

POWER_CAPPING = Path("/sys/class/powercap")  # where Linux shows the processor's energy counters


@dataclass
class Meter:
    """Counts from its creation, on top of what an interrupted run counted before.

    `seconds`. `peak_memory`: the most bytes in use, on the GPU where there is one, else by the process with its libraries; None
    where the system cannot reset its peak. `energy`: joules of all processors and GPUs of the machine, whoever used them; None
    where no counter is readable. Call `tick` at least every few minutes, because the counters wrap.
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
    """Resets the peak; returns whether the system supports that."""
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
    """Joules of every readable counter, and the value at which it wraps to zero."""
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
    except pynvml.NVMLError:  # no driver or no counter: there is no such figure
        pass
    return found
