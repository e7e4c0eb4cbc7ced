"""A mixture as a folder that transformers loads: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The folder holds a configuration, the tokenizer and a module with one import. The members stay where they are; their
fingerprints are checked when they are loaded. Loading needs this package and trust in the folder's module, which is only
that import; no code of the members is run. Not covered: members on different devices.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from proxytune.arguments import read_dtype, unknown_name
from proxytune.errors import UserError, brief
from proxytune.member import Weights, load_members
from proxytune.mixture import Coefficient, active
from proxytune.modeling import ProxyTunedForCausalLM

MODULE = (
    '"""A mixture of language models; its members are named in config.json."""\n\nfrom proxytune.exported import ExportedConfig, ExportedMixture\n'
)
NAMES = {"AutoConfig": "modeling_proxytune.ExportedConfig", "AutoModelForCausalLM": "modeling_proxytune.ExportedMixture"}
HONOURED = ("dtype", "torch_dtype", "device_map", "attn_implementation", "mixture", "trust_remote_code")
SEARCHING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")  # for the folder itself
PASSED = (
    "code_revision",
    "adapter_kwargs",
    "tqdm_class",
    "use_safetensors",
    "_from_auto",
    "_commit_hash",
)  # passed by transformers, or without effect


class ExportedConfig(PreTrainedConfig):
    """Members by name (see `Weights`), the mixture's coefficients, and the members' fingerprints."""

    model_type = "proxytune"

    def __init__(self, **content: Any):
        self.members = content.pop("members", {})
        self.mixture = content.pop("mixture", {})
        self.fingerprints = content.pop("fingerprints", {})
        for name in ("dtype", "torch_dtype"):
            if isinstance(content.get(name), str):
                content[name] = read_dtype(content[name])
        super().__init__(**content)


class ExportedMixture(ProxyTunedForCausalLM):
    """The mixture that a folder describes."""

    config_class = ExportedConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *arguments: Any,
        config: ExportedConfig | None = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **options: Any,
    ) -> Any:
        """Loads the members: in fp32 unless `dtype` is given, on one device, with one attention implementation.

        `device_map` is a device, {"": device} or a plan for several ('auto'). `mixture` may be set in the configuration. Members
        are checked in fp32, as they were exported; for another dtype they are then loaded again. Raises `UserError` for an
        option that has no effect here, for a folder that does not describe a mixture, and where a member is not the one that
        was exported.
        """
        folder = pretrained_model_name_or_path
        _check_options(arguments, options)
        stored = ExportedConfig.from_pretrained(folder, **{name: options[name] for name in SEARCHING if options.get(name)})
        config = stored if config is None else config
        _check_config(config, stored, folder)
        attn_implementation = attn_implementation or config._attn_implementation
        named = [word for word in (dtype, torch_dtype, config.dtype) if word not in (None, "auto")]
        wanted = read_dtype(named[0]) if named else torch.float32
        device = _device(device_map)
        sources = {
            name: Weights(member["path"], member["adapter"] and Path(member["adapter"]), device, name) for name, member in config.members.items()
        }
        members = load_members(sources)
        for name, member in members.items():
            if member.fingerprint != config.fingerprints[name]:
                raise UserError(f"{name}: '{sources[name].path}' holds other weights than were exported; export again")
        if wanted != torch.float32:
            del members, member  # frees the memory of those that were checked
            members = load_members(sources, dtype=wanted)
        if attn_implementation is not None:
            for member in members.values():
                _attend(member.model, attn_implementation)
        return cls(members, config.mixture)


def _check_options(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    if arguments:
        raise UserError(f"from_pretrained: an exported mixture takes options by name, not {brief(arguments[0])}; leave it out")
    for name, value in options.items():
        if name not in (*HONOURED, *SEARCHING, *PASSED) and value is not None:
            raise UserError(f"{name}: an exported mixture has no such option; {unknown_name(name, HONOURED)}")
    if options.get("use_safetensors") is False:
        raise UserError("use_safetensors: members are read from safetensors alone; leave it out")
    if extra := (options.get("adapter_kwargs") or {}).keys() - {"revision", "token"}:
        raise UserError(f"adapter_kwargs: an exported mixture has its adapters already, so {min(extra)} has no effect; leave it out")


def _check_config(config: PreTrainedConfig, stored: ExportedConfig, folder: str | Path) -> None:
    """Raises `UserError` unless the configuration describes a mixture and, apart from options that can be set, equals the stored one."""
    where = f"'{folder}/config.json'"
    for name in ("members", "mixture", "fingerprints"):
        content = getattr(config, name, None)
        if not isinstance(content, Mapping) or not content:
            raise UserError(f"{name}: {where} must give them by name, not {brief(content)}; export again")
    for name, member in config.members.items():
        whole = isinstance(member, Mapping) and member.keys() == {"path", "adapter"}
        if not whole or not isinstance(member["path"], str) or not isinstance(member["adapter"], str | None):
            raise UserError(f"members: {where} must give a path and an adapter (or null) for '{name}', not {brief(member)}; export again")
        if not isinstance(config.fingerprints.get(name), str):
            raise UserError(f"fingerprints: {where} has none for '{name}'; export again")
    for name, value in config.mixture.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"mixture: {where} must give a number for '{name}', not {brief(value)}; export again")
    given, kept = config.to_dict(), stored.to_dict()
    changed = sorted(name for name in given.keys() | kept.keys() if given.get(name) != kept.get(name))
    for name in changed:
        if name not in ("mixture", "dtype", "_name_or_path"):
            raise UserError(f"{name}: an exported mixture has no such option; {unknown_name(name, HONOURED)}")


def _device(given: Any) -> str:
    """The device of all members. Raises `UserError` for a map of several."""
    if isinstance(given, Mapping) and list(given) == [""]:
        given = given[""]
    if given is None:
        return "cpu"
    if isinstance(given, str | torch.device):
        return str(given)
    if type(given) is int and given >= 0:
        return f"cuda:{given}"
    raise UserError(f"device_map: an exported mixture goes to one device, or to several by 'auto', not {brief(given)}")


def _attend(model: Any, kind: str) -> None:
    try:
        model.set_attn_implementation(kind)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"attn_implementation: {type(model).__name__} cannot take {kind!r} ({' '.join(str(error).split())[:200]})") from error


def export(sources: Mapping[str, Weights], mixture: Mapping[str, Coefficient], folder: Path) -> None:
    """Writes the folder.

    Raises `UserError` for a folder that exists, for coefficients that are functions, and for members that cannot be loaded.
    """
    if not all(isinstance(value, int | float) for value in mixture.values()):
        raise UserError("mixture: a coefficient that is a function cannot be written down; export numbers")
    if folder.exists():
        raise UserError(f"folder: '{folder}' is there already; choose another or remove it")
    members = load_members(sources)
    model = ProxyTunedForCausalLM(members, mixture)
    config = ExportedConfig(
        members={name: _plain(source) for name, source in sources.items()},
        mixture=dict(active(mixture)),
        fingerprints={name: member.fingerprint for name, member in members.items()},
        auto_map=NAMES,
        architectures=["AutoModelForCausalLM"],  # a class of transformers: some tools, its own server among them, look it up there
        vocab_size=model.config.vocab_size,
        max_position_embeddings=model.config.max_position_embeddings,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"auto_map": NAMES}, indent=1, default=str) + "\n")
    (folder / "modeling_proxytune.py").write_text(MODULE)
    next(iter(members.values())).tokenizer.save_pretrained(folder)


def _plain(source: Weights) -> dict[str, str | None]:
    """Local paths are made absolute, hub names stay as they are."""
    return {
        name: None if value is None else str(Path(value).absolute()) if Path(value).exists() else str(value)
        for name, value in asdict(source).items()
        if name in ("path", "adapter")
    }
