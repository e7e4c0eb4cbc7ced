"""The arguments of `ProxyLM` and of its generations, checked before anything is loaded. Each mistake is one line."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, InstanceOf, ValidationError, field_validator, model_validator
from transformers import GenerationConfig

from proxytune.arguments import read_dtype, unknown_name
from proxytune.errors import UserError, brief
from proxytune.member import Member
from proxytune.mixture import Mixture, Rule, depends_on_context

Place = str | Path
MEANT = {"pretrained": "base", "peft": "expert"}  # names in lm-eval's own class
ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Arguments that the harness passes by itself, and arguments that would change the shape of the answers.
SET_BY_HARNESS = {
    *("use_cache", "pad_token_id", "stop_strings", "token_healing", "num_return_sequences", "return_dict_in_generate", "is_assistant"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "continuous_batching_config", "transformers_version"),
}


class Arguments(BaseModel):
    """The arguments of `ProxyLM`: those of the mixture, and those of lm-eval's class that have an effect on a mixture.

    The models are either named (`base`, perhaps `expert` and `antiexpert` with a strength `alpha`, devices and a type) or
    given as `members` with a `mixture`. `mixtures` are further mixtures that are answered in the same passes, into the `cache`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)

    base: Place | None = None
    expert: Place | None = None
    antiexpert: Place | None = None
    alpha: FiniteFloat | None = None
    device: str | None = None
    proxy_device: str | None = None
    dtype: torch.dtype | None = None
    members: dict[str, InstanceOf[Member]] | None = None
    mixture: InstanceOf[Mapping] | InstanceOf[Rule] | None = None
    mixtures: dict[str, InstanceOf[Mapping] | InstanceOf[Rule]] | None = None
    batch_size: int | str = Field(default=8, description="number of texts generated together, or auto, or auto:N")
    max_batch_size: int | None = Field(default=None, ge=1, description="the largest batch that batch_size=auto tries")
    batch_tokens: int = Field(default=2048, ge=1, description="number of tokens scored together")
    cache: Place | None = None
    threads: int | None = Field(default=None, ge=1, le=1024)
    max_length: int | None = Field(default=None, ge=1, description="tokens of a request; default: the members' shortest window")
    max_gen_toks: int = Field(default=256, ge=1, description="tokens of an answer if the task does not say")
    add_bos_token: bool | None = None
    prefix_token_id: int | None = Field(default=None, ge=0, description="the token before a text without a context")
    think_end_token: int | str | None = Field(default=None, description="the answer is the text after this token")
    enable_thinking: bool | None = None
    chat_template_args: dict[str, Any] | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> torch.dtype | None:
        return None if value is None else read_dtype(value)

    @field_validator("base", "expert", "antiexpert", "cache")
    @classmethod
    def _named(cls, value: Place | None) -> Place | None:
        if value is not None and (not str(value).strip() or "\0" in str(value)):
            raise ValueError("a folder, file or hub name")
        return value

    @field_validator("device", "proxy_device")
    @classmethod
    def _device(cls, value: str | None) -> str | None:
        if value in ("", "meta"):
            raise ValueError("a device that computes: cpu, cuda:0, or auto for several")
        return value

    @field_validator("batch_size")
    @classmethod
    def _batch_size(cls, value: int | str) -> int | str:
        if not re.fullmatch(r"auto(:0*[1-9][0-9]*)?|0*[1-9][0-9]*", str(value)):
            raise ValueError("a whole number from 1, or auto, or auto:N")
        return value if str(value).startswith("auto") else int(value)

    @field_validator("think_end_token")
    @classmethod
    def _think_end_token(cls, value: int | str | None) -> int | str | None:
        if value == "" or (isinstance(value, int) and value < 0):
            raise ValueError("a token's text or its id")
        return value

    @model_validator(mode="after")
    def _whole(self) -> "Arguments":
        beside = {name for name in ("base", "expert", "antiexpert", "alpha", "device", "proxy_device", "dtype") if getattr(self, name) is not None}
        if self.members is None:
            self._check_named(beside)
        elif beside:
            raise ValueError(f"{min(beside)}: members that are loaded have it already; leave it out, or name the models instead")
        elif not self.members:
            raise ValueError("members: at least one is needed")
        elif self.mixture is None:
            raise ValueError("mixture: members need one; give proxy_tuning(0.5), say, or {'base': 1.0}")
        if "" in (self.mixtures or {}):
            raise ValueError("mixtures: the empty name is that of the mixture in force; give it another")
        if self.mixtures and self.cache is None:
            raise ValueError("mixtures: their answers go into the cache; give cache=FILE")
        if isinstance(self.batch_size, int) and self.max_batch_size is not None and self.batch_size > self.max_batch_size:
            raise ValueError(f"batch_size: {self.batch_size} is above max_batch_size {self.max_batch_size}; leave one out")
        if self.enable_thinking and self.think_end_token is None:
            raise ValueError("enable_thinking: the answer begins after a token; say with think_end_token which")
        if self.cache is not None and any(depends_on_context(mixture) for mixture in self.rows.values()):
            raise ValueError("cache: a coefficient that is a function has no name to keep answers under; leave the cache out")
        return self

    def _check_named(self, given: set[str]) -> None:
        if self.base is None:
            raise ValueError("model_args: the base is missing; give base=FOLDER, and for a proxy expert=… and antiexpert=…")
        if self.mixture is not None or self.mixtures is not None:
            raise ValueError("mixture: it is over members that are loaded; give members=…, or alpha for models that are named")
        if (self.expert is None) != (self.antiexpert is None):
            raise ValueError("expert and antiexpert: give both or neither; the anti-expert is the expert before it was tuned")
        if self.expert is None and (without := given & {"alpha", "proxy_device"}):
            raise ValueError(f"{min(without)}: it belongs to an expert and an anti-expert, and there are none; give both, or leave it out")

    @property
    def rows(self) -> dict[str, Mixture]:
        """The mixture in use ('') and the further ones; empty if models are named."""
        return ({} if self.mixture is None else {"": self.mixture}) | (self.mixtures or {})


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """The validated arguments. Raises `UserError` for an unknown argument, with a suggestion, and for an invalid value."""
    try:
        return Arguments.model_validate(dict(given))
    except ValidationError as error:
        first = next((entry for entry in error.errors() if entry["type"] == "extra_forbidden"), error.errors()[0])
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{field}: a mixture in lm-eval has no such argument; {unknown_name(field, Arguments.model_fields, MEANT.get(field))}"
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{field}: {message}, not {brief(given[field])}" if field else message) from error


def check_generation(given: Mapping[str, Any], max_gen_toks: int, max_length: int) -> dict[str, Any]:
    """A request's generation arguments, completed as lm-eval does. Raises `UserError` for an unknown argument or an invalid value."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - SET_BY_HARNESS | {"until", *ALIASES}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"gen_kwargs: {name} is no argument of a generation here; {unknown_name(name, known)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"gen_kwargs: {name} must be a finite number, not {value}")
        if name in ALIASES and value is not None and (type(value) is not int or value < 1):
            raise UserError(f"gen_kwargs: {name} must be a whole number from 1, not {brief(value)}")
    until = given.get("until")
    if not (until is None or isinstance(until, str) or (isinstance(until, list) and all(isinstance(word, str) for word in until))):
        raise UserError(f"gen_kwargs: until must be a text or a list of texts, not {brief(until)}")
    try:
        found = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    except (ValueError, TypeError) as error:
        raise UserError(f"gen_kwargs: temperature must be a number, not {brief(given.get('temperature'))}") from error
    if found["max_gen_toks"] >= max_length:
        raise UserError(
            f"gen_kwargs: an answer of max_gen_toks {found['max_gen_toks']} leaves no room for a prompt in the window of {max_length} tokens; "
            "give a smaller max_gen_toks"
        )
    return found
