"""LoRA members on one set of weights: each row of a batch through the adapter named for it, or through none.

An expert that is a LoRA adapter on its anti-expert needs the anti-expert's weights and little more. Here both are rows
of one pass, so that weights are in memory once and read once a step; PEFT's mixed batches do the arithmetic.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

UNTOUCHED = "__base__"  # PEFT's word for rows that pass through no adapter


class AdapterSwitch:
    """Tells every LoRA layer of a model which adapter each row of the batch passes through."""

    def __init__(self, model: PreTrainedModel):
        self._names: list[str] | None = None
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _tell(self, module: Any, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return None if self._names is None else (arguments, options | {"adapter_names": self._names})

    @contextmanager
    def rows(self, names: Sequence[str]) -> Iterator[None]:
        """Within it the model's batch rows pass through these adapters, `UNTOUCHED` for none."""
        self._names = list(names)
        try:
            yield
        finally:
            self._names = None


def is_adapter(path: str | Path) -> bool:
    """Whether a local folder holds a PEFT adapter and not a model."""
    return (Path(path) / "adapter_config.json").exists()


def mixes_in_batches(adapter: str | Path) -> bool:
    """Whether rows with and without the adapter can share a pass, by what its configuration says.

    PEFT does so for plain LoRA; DoRA it refuses, other methods it silently ignores, and adapters that begin from a part of
    the weights (PiSSA, OLoRA and their kind) leave a base behind that is not the one without them.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    return (
        type(config) is LoraConfig
        and not (config.use_dora or config.modules_to_save or config.lora_bias or config.target_parameters or config.trainable_token_indices)
        and config.alora_invocation_tokens is None
        and config.bias == "none"
        and (isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian")
    )


def attach(model: PreTrainedModel, adapters: Sequence[str | Path]) -> tuple[AdapterSwitch, list[str]] | None:
    """Puts adapters on the model side by side; returns the switch and the adapters' names in it.

    None, and the model unusable for it, where the architecture hands its layers something else than rows of the batch.
    """
    names = [f"adapter{number}" for number in range(len(adapters))]
    peft = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        peft.load_adapter(str(adapter), adapter_name=name)
    switch = AdapterSwitch(model.eval())
    try:
        with torch.inference_mode(), switch.rows([*names, UNTOUCHED]):
            model(input_ids=torch.zeros(len(names) + 1, 2, dtype=torch.long, device=model.get_input_embeddings().weight.device))
    except ValueError:
        return None
    return switch, names
