"""A mixture as a folder that transformers loads: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The folder holds a configuration, the tokenizer and a module of one import; the members stay where they are, and their
fingerprints are checked when they are loaded. Whoever loads it needs this package. Not covered: members on several devices.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from proxytune.errors import UserError
from proxytune.member import Weights, load_members
from proxytune.mixture import Coefficient, active
from proxytune.modeling import ProxyTunedForCausalLM

MODULE = (
    '"""A mixture of language models; its members are named in config.json."""\n\nfrom proxytune.exported import ExportedConfig, ExportedMixture\n'
)
NAMES = {"AutoConfig": "modeling_proxytune.ExportedConfig", "AutoModelForCausalLM": "modeling_proxytune.ExportedMixture"}


class ExportedConfig(PreTrainedConfig):
    """Members by name (see `Weights`), the mixture's row of numbers, and the members' fingerprints."""

    model_type = "proxytune"

    def __init__(self, **content: Any):
        self.members = content.pop("members", {})
        self.mixture = content.pop("mixture", {})
        self.fingerprints = content.pop("fingerprints", {})
        super().__init__(**content)


class ExportedMixture(ProxyTunedForCausalLM):
    """The mixture that a folder describes."""

    config_class = ExportedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *_: Any, config: Any = None, dtype: Any = None, **__: Any) -> Any:
        """Loads the members. Raises `UserError` where one is not the one that was exported."""
        config = config or ExportedConfig.from_pretrained(pretrained_model_name_or_path)
        sources = {name: Weights(member["path"], member["adapter"] and Path(member["adapter"])) for name, member in config.members.items()}
        members = load_members(sources, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
        for name, member in members.items():
            if dtype in (None, "auto", torch.float32) and member.fingerprint != config.fingerprints[name]:
                raise UserError(f"{name}: '{sources[name].path}' holds other weights than were exported; export again")
        return cls(members, config.mixture)


def export(sources: Mapping[str, Weights], mixture: Mapping[str, Coefficient], folder: Path) -> None:
    """Writes the folder.

    Raises `UserError` for one that is there, for coefficients that are functions, and for members that cannot be loaded.
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
        architectures=["ExportedMixture"],
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
    """Local places as absolute ones, hub names as they are."""
    return {
        name: None if value is None else str(Path(value).absolute()) if Path(value).exists() else str(value)
        for name, value in asdict(source).items()
        if name in ("path", "adapter")
    }
