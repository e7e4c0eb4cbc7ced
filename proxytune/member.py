"""A member: one causal language model of a mixture, with its tokenizer and the fingerprint of its weights."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from proxytune.errors import UserError


@dataclass
class Member:
    """A model and the tokenizer it was trained with. Not covered: models that are not causal, remote code, pickled weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights themselves (names, types, shapes, bytes; adapters too), never of a path. Taken once."""
        return fingerprint(self.model)

    @property
    def rows(self) -> int:
        """Rows of the output head: the width of the model's logits."""
        return self.model.get_output_embeddings().weight.shape[0]


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the model's tensors in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_adapter(path: str | Path) -> bool:
    """Whether a local folder holds a PEFT adapter and not a model."""
    return (Path(path) / "adapter_config.json").exists()


def load_tokenizer(path: str | Path, field: str = "base") -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder or a hub name, without remote code.

    Raises `UserError` naming `field` where there is none; a missing padding token is set to the end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{field}: no tokenizer could be loaded from '{path}' ({_first_line(error)}); save one beside the weights") from error
    if not len(tokenizer):
        raise UserError(f"{field}: the tokenizer of '{path}' is empty; save one beside the weights")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def load_member(path: str | Path, adapter: str | Path | None = None, *, field: str = "base", dtype: torch.dtype = torch.float32) -> Member:
    """Loads a member from a local folder or a hub name, with a LoRA adapter on top where one is given.

    `field` is the word that an error names. Only safetensors are read. Raises `UserError` for a folder that is missing
    or holds no causal language model, for one without a tokenizer, and for weights that are not finite.
    """
    tokenizer = load_tokenizer(path, field)
    where = path if adapter is None else f"{path}' with the adapter '{adapter}"
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).get_base_model()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{field}: no causal language model could be loaded from '{where}' ({_first_line(error)}); check the folder or name"
        ) from error
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{field}: the weights '{name}' of '{where}' hold NaN or infinity; save the model again before it broke")
    return Member(model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
