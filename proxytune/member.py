"""A member: one causal language model of a mixture, with its tokenizer, and the fingerprint of all that decides its output."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME, find_adapter_config_file

from proxytune.adapters import UNTOUCHED, AdapterSwitch, attach, describe_keys, mixes_in_batches, put_on
from proxytune.content import content_key
from proxytune.digests import check_whole
from proxytune.errors import UserError
from proxytune.prepacked import prepack_linear_layers

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Adapter(NamedTuple):
    """The LoRA adapter that a member's rows pass through on weights it shares, or `adapters.UNTOUCHED`."""

    switch: AdapterSwitch
    name: str


@dataclass
class Member:
    """A model and the tokenizer it was trained with. Not covered: models that are not causal, remote code, pickled weights.

    With an `adapter`, `model` is shared with other members; without the adapter it is none of them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides the member's output, never of a path. Computed once.

        It covers the weights (see `fingerprint`), the model's class and configuration, and the `interface`. Library versions
        are left out, and so is the configuration's dtype: the hash of the weights has their own dtypes.
        """
        weights = fingerprint(self.model, None if self.adapter is None else self.adapter.name)
        return content_key(weights=weights, kind=type(self.model).__name__, config=_settings(self.model.config.to_dict()), interface=self.interface)

    @cached_property
    def interface(self) -> str:
        """A hash of the tokenizer and the generation configuration. Computed once. A mixture uses those of its first member."""
        generation = self.model.generation_config.to_dict() if self.model.can_generate() else {}
        return content_key(tokenizer=_tokenizer_settings(self.tokenizer), generation=_settings(generation))

    @property
    def rows(self) -> int:
        """Rows of the output head: the width of the model's logits."""
        return self.model.get_output_embeddings().weight.shape[0]


@dataclass(frozen=True)
class Weights:
    """Where a member's weights are: a local folder or a hub name, perhaps a LoRA adapter on it, and the device they go to.

    `device` is one device ('cpu', 'cuda:1') or a plan for several ('auto', 'balanced'). `field` is the name in error messages.
    """

    path: str
    adapter: Path | None = None
    device: str = "cpu"
    field: str = field(default="base", compare=False)


def fingerprint(model: torch.nn.Module, adapter: str | None = None) -> str:
    """SHA-256 over the model's tensors in the order of their names, and the scale of every LoRA layer.

    `adapter` selects one of several adapters, or `adapters.UNTOUCHED` for the model without any.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model, adapter)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.to_dense() if tensor.is_mkldnn else tensor.detach().cpu()
        digest.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    if adapter != UNTOUCHED:
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                digest.update(f"{name} {[scale for which, scale in module.scaling.items() if adapter in (None, which)]}\n".encode())
    return digest.hexdigest()


# Settings of a model or tokenizer that do not count: where it was loaded from, library versions, and dtypes, which the weights have.
UNREAD = {"_name_or_path", "name_or_path", "is_local", "local_files_only", "transformers_version", "dtype", "torch_dtype", "architectures"}


def _settings(content: Any) -> Any:
    """The settings that decide the output, as JSON: without `UNREAD` and without those that are not set."""
    if isinstance(content, Mapping):
        return {str(key): _settings(value) for key, value in content.items() if key not in UNREAD and value is not None}
    if isinstance(content, list | tuple):
        return [_settings(value) for value in content]
    return content if isinstance(content, bool | int | str) else repr(content)


def _tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as it would be saved: its vocabulary, rules, special tokens and templates."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}
    kept: dict[str, Any] = {name: hashlib.sha256(content).hexdigest() for name, content in saved.items()}
    if "tokenizer.json" in saved:
        # Hashed whole: a token of the vocabulary may be called like a setting in `UNREAD`. Padding and truncation are those of the last batch.
        kept["tokenizer.json"] = content_key(**json.loads(saved["tokenizer.json"]) | {"padding": None, "truncation": None})
    return kept | {"tokenizer_config.json": _settings(json.loads(saved["tokenizer_config.json"]))}


def _tensors(model: torch.nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in _weights(model).items():
        if adapter == UNTOUCHED:
            if ".lora_" not in name:
                yield name.replace(".base_layer.", "."), tensor
        elif adapter is None or ".lora_" not in name:
            yield name, tensor
        elif f".{adapter}." in f"{name}.":
            yield f"{name}.".replace(f".{adapter}.", ".default.").removesuffix("."), tensor


def load_tokenizer(path: str | Path, field: str = "base") -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a local folder (a GGUF file's too) or a hub name, without remote code.

    Raises `UserError` naming `field` where there is none; a missing padding token becomes the end token.
    """
    with _explained(f"{field}: no tokenizer could be loaded from '{path}'", "save one beside the weights"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **_gguf(path))
    if not len(tokenizer):
        raise UserError(f"{field}: the tokenizer of '{path}' is empty; save one beside the weights")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    return tokenizer


def load_member(
    path: str | Path,
    adapter: str | Path | None = None,
    *,
    field: str = "base",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    quantization: Any = None,
    prepacked: bool = False,
    merged: bool = False,
) -> Member:
    """Loads a member from a local folder or a hub name, with a PEFT adapter on top where one is given.

    `field` is the name in error messages. `device` is as in `Weights`. `quantization` is one of transformers' configurations
    (for example `BitsAndBytesConfig(load_in_8bit=True)`, with the package it needs). `prepacked` lays weights out for the CPU, for
    inference only (see the module `prepacked`). `merged` adds the adapter to the weights, so the result is a plain model. Only
    safetensors are read, or the one GGUF file of a folder without a config; code in a folder is never run. Raises `UserError`
    for a folder that is missing or has no causal language model or no tokenizer, where the model or the adapter lacks weights
    or has unexpected ones, for weights that are not finite, and for a device that is missing or cannot compute in `dtype`. A
    folder with digests (see `digests`) must match them.
    """
    for folder in (path, adapter):
        if folder is not None:
            check_whole(folder, field)
    _check_device(device, dtype, field)
    with _explained(f"{field}: no causal language model could be loaded from '{path}'", "check the folder or name"):
        only_adapter = find_adapter_config_file(str(path)) is not None
    if only_adapter:
        raise UserError(f"{field}: '{path}' holds an adapter and no model; give the model that it was tuned from, and this as its adapter")
    tokenizer = load_tokenizer(path, field)
    where = path if adapter is None else f"{path}' with the adapter '{adapter}"
    placed = {} if device == "cpu" else {"device_map": device}
    with _explained(f"{field}: no causal language model could be loaded from '{where}'", "check the folder or name"):
        if (Path(path) / GENERATION_CONFIG_NAME).exists():
            GenerationConfig.from_pretrained(path)  # raises for a damaged file, which loading a model ignores
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            quantization_config=quantization,
            **placed,
            **_gguf(path),
        )
        if found["missing_keys"] or found["unexpected_keys"]:
            # Missing weights would be random.
            raise ValueError(f"its configuration and its weights do not fit: {describe_keys(found['missing_keys'], found['unexpected_keys'])}")
        if adapter is not None:
            adapted = put_on(model, [adapter], ["default"])
            model = adapted.merge_and_unload() if merged else adapted.get_base_model()
    _check_finite(model, field, str(where))
    if prepacked:
        prepack_linear_layers(model)
    return Member(model.eval(), tokenizer)


def load_members(weights: Mapping[str, Weights], *, dtype: torch.dtype = torch.float32, prepacked: bool = False) -> dict[str, Member]:
    """Loads members for one mixture; equal sources are loaded once, and LoRA adapters on one model share its weights.

    Options and errors are those of `load_member`.
    """
    on_weights: dict[tuple[str, str], list[Weights]] = {}
    for wanted in dict.fromkeys(weights.values()):
        on_weights.setdefault((wanted.path, wanted.device), []).append(wanted)
    loaded: dict[Weights, Member] = {}
    for sources in on_weights.values():
        adapted = [wanted for wanted in sources if wanted.adapter is not None and _mixes_in_batches(wanted)]
        together = [wanted for wanted in sources if wanted.adapter is None or wanted in adapted]
        if len(together) > 1:
            loaded |= _load_shared(together, adapted, dtype, prepacked)
        for wanted in sources:
            if wanted not in loaded:
                loaded[wanted] = load_member(wanted.path, wanted.adapter, field=wanted.field, dtype=dtype, device=wanted.device, prepacked=prepacked)
    return {name: loaded[wanted] for name, wanted in weights.items()}


def _load_shared(together: Sequence[Weights], adapted: Sequence[Weights], dtype: torch.dtype, prepacked: bool) -> dict[Weights, Member]:
    first = together[0]
    member = load_member(first.path, field=first.field, dtype=dtype, device=first.device)
    for other in adapted:
        check_whole(str(other.adapter), other.field)
    with _explained(*_adapter_error(adapted[0], ", ".join(str(other.adapter) for other in adapted))):
        attached = attach(member.model, [str(other.adapter) for other in adapted])
    if attached is None:
        return {}
    _check_finite(member.model, adapted[0].field, ", ".join(str(other.adapter) for other in adapted))
    if prepacked:
        prepack_linear_layers(member.model)  # only now: adapters cannot be put on prepacked layers
    switch, names = attached
    named = dict(zip(adapted, names, strict=True))
    return {other: Member(member.model, member.tokenizer, Adapter(switch, named.get(other, UNTOUCHED))) for other in together}


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state dictionary, with the weights of a model that accelerate offloads between passes."""
    tensors = model.state_dict()
    return get_state_dict_offloaded_model(model) if any(tensor.is_meta for tensor in tensors.values()) else tensors


def _mixes_in_batches(wanted: Weights) -> bool:
    assert wanted.adapter is not None
    with _explained(*_adapter_error(wanted, str(wanted.adapter))):
        return mixes_in_batches(wanted.adapter)


def _adapter_error(wanted: Weights, adapters: str) -> tuple[str, str]:
    return f"{wanted.field}: '{adapters}' could not be put on '{wanted.path}'", "check the adapter"


@contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    """Turns any exception of a library that reads a user's folder into a one-line `UserError`: a damaged file may raise anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({_first_line(error)}); {remedy}") from error


def _check_finite(model: PreTrainedModel, field: str, where: str) -> None:
    """Raises `UserError` for weights, or an adapter's scale, that hold NaN or infinity."""
    scales = {
        f"{name} of {adapter}": torch.tensor(scale)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for adapter, scale in module.scaling.items()
    }
    for name, tensor in (_weights(model) | scales).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{field}: the weights '{name}' of '{where}' hold NaN or infinity; use weights saved before that")


def _gguf(path: str | Path) -> dict[str, str]:
    """The options for a folder whose model is one GGUF file."""
    folder = Path(path)
    files = sorted(folder.glob("*.gguf")) if folder.is_dir() and not (folder / "config.json").exists() else []
    return {"gguf_file": files[0].name} if len(files) == 1 else {}


def _check_device(device: str, dtype: torch.dtype, field: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"{field}: weights are loaded in {', '.join(map(str, DTYPES))}, not {dtype}; quantise for less")
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        (torch.ones(1, 1, device=device, dtype=dtype) @ torch.ones(1, 1, device=device, dtype=dtype)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{field}: the device '{device}' cannot compute in {dtype} ({_first_line(error)}); choose another device or dtype") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
