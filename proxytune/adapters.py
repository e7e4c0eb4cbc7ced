"""LoRA members on one set of weights: each row of a batch passes through the adapter named for it, or through none.

An expert that is a LoRA adapter on its anti-expert shares nearly all weights with it. Here both are rows of one pass, so the
weights are in memory once and read once per step. PEFT's mixed batches do the computation.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import cached_file

OUTSIDE_LAYERS = {PeftType.POLY, PeftType.XLORA}  # in addition to methods that learn a prompt
UNTOUCHED = "__base__"  # PEFT's name for rows that pass through no adapter


class AdapterSwitch:
    """Tells every LoRA layer of a model which adapter each row of the batch passes through.

    Several threads may run the model at the same time, each with rows of its own.
    """

    def __init__(self, model: PreTrainedModel):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(self, module: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        switch, names = _RUNNING.get()
        return (arguments, options | {"adapter_names": names}) if switch is self else None

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Within the context, in this thread, the model's batch rows pass through these adapters; `UNTOUCHED` means none."""
        before = _RUNNING.set((self, list(names)))
        try:
            yield
        finally:
            _RUNNING.reset(before)


# The switch whose model runs in this thread, with its rows. A module variable: an attribute of the switch could not be copied with its model.
_RUNNING: ContextVar[tuple[AdapterSwitch | None, list[str]]] = ContextVar("running", default=(None, []))


def is_adapter(path: str | Path) -> bool:
    """Whether a local folder holds a PEFT adapter and not a model."""
    return (Path(path) / "adapter_config.json").exists()


def mixes_in_batches(adapter: str | Path) -> bool:
    """Whether rows with and without the adapter can share a pass, according to its configuration.

    PEFT supports this for plain LoRA. It refuses DoRA and silently ignores other methods. Adapters that start from a part of
    the weights (PiSSA, OLoRA and similar) change the base under them, so the rows without an adapter would be wrong; so do
    adapters that hold weights of the model itself, such as embeddings for new tokens.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    with safe_open(_weights_file(adapter), "pt") as file:
        own = all(".lora_" in name for name in file.keys())  # noqa: SIM118 (it is no dictionary)
    return (
        own
        and type(config) is LoraConfig
        and not (config.use_dora or config.modules_to_save or config.lora_bias or config.target_parameters or config.trainable_token_indices)
        and config.alora_invocation_tokens is None
        and config.bias == "none"
        and (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian")
    )


def put_on(model: PreTrainedModel, adapters: Sequence[str | Path], names: Sequence[str]) -> PeftModel:
    """The model with PEFT adapters on it, under these names; the first is active.

    Raises ValueError for an adapter that lacks weights or has weights that do not belong to the model (PEFT only warns about
    missing ones), and for one that acts outside of the model's layers; OSError for one without safetensors: pickles are not read.
    """
    peft: PeftModel | None = None
    for adapter, name in zip(adapters, names, strict=True):
        _weights_file(adapter)
        _check_acts_in_layers(PeftConfig.from_pretrained(str(adapter)))
        if peft is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
                peft = PeftModel.from_pretrained(model, str(adapter), adapter_name=name)
        # Only this call reports missing and unexpected keys.
        result = peft.load_adapter(str(adapter), adapter_name=name)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(describe_keys(result.missing_keys, result.unexpected_keys))
    assert peft is not None
    return peft


def _check_acts_in_layers(config: PeftConfig) -> None:
    """Raises ValueError for an adapter that acts in PEFT's wrapper: a member is the model without it, so its effect would be lost silently."""
    if config.is_prompt_learning or config.peft_type in OUTSIDE_LAYERS or getattr(config, "alora_invocation_tokens", None) is not None:
        raise ValueError(f"{config.peft_type.value} acts outside of the model's layers; only adapters that change layers can be members")


def describe_keys(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The weights that a file lacks, and those it should not have, in words."""
    parts = [(missing, "weights are missing"), (unexpected, "do not belong to the model")]
    return " and ".join(f"{len(names)} {words}, '{min(names)}' first" for names, words in parts if names)


def attach(model: PreTrainedModel, adapters: Sequence[str | Path]) -> tuple[AdapterSwitch, list[str]] | None:
    """Puts several adapters on the model; returns the switch and the adapters' names in it.

    Returns None, with the model unusable for this, where the architecture passes something other than batch rows to its
    layers. Raises what `put_on` raises.
    """
    names = [f"adapter{number}" for number in range(len(adapters))]
    put_on(model, adapters, names)
    switch = AdapterSwitch(model.eval())
    try:
        with torch.inference_mode(), switch.rows([*names, UNTOUCHED]):
            model(input_ids=torch.zeros(len(names) + 1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device))
    except ValueError:
        return None
    return switch, names


def _weights_file(adapter: str | Path) -> str:
    return str(cached_file(str(adapter), SAFETENSORS_WEIGHTS_NAME))
