"""A study: arms x measures x seeds, written in one YAML file and validated before anything runs."""

import difflib
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from finetune.data import check_prompt
from finetune.recipe import EarlyStopping, Tuning
from proxytune.errors import UserError

STUDIES = Path(__file__).parent / "studies"
MeasureName = Literal["task", "knowledge", "forgetting", "density"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(Strict):
    """The base model, untouched."""

    kind: Literal["base"]


class Expert(Strict):
    """The small model tuned, by us or beforehand: the proxy's expert, and an arm by itself."""

    kind: Literal["expert"]
    tuning: Tuning | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "Expert":
        if (self.tuning is None) == (self.path is None):
            raise ValueError("give either tuning or path")
        return self


class Proxy(Strict):
    """base + alpha (expert - small model); one arm for each alpha, named proxy@alpha."""

    kind: Literal["proxy"]
    alpha: tuple[FiniteFloat, ...] = Field(min_length=1)


class Direct(Strict):
    """The base itself tuned."""

    kind: Literal["direct"]
    tuning: Tuning


ArmSpec = Annotated[Base | Expert | Proxy | Direct, Field(discriminator="kind")]


class Models(Strict):
    """Local folders (counted from the study file's folder, or absolute) or hub names."""

    base: str
    small: str | None = None


class Data(Strict):
    """JSONL files of items, counted from the study file's folder.

    `train` is tuned on; `test` is the task; `knowledge` (statements with popularity) is what may be forgotten.
    """

    train: str
    test: str
    knowledge: str | None = None
    prompt: str = "Question: {question}\nAnswer:"
    answer: Literal["generate", "choose"] = "generate"
    new_tokens: int = Field(default=12, ge=1)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, template: str) -> str:
        return check_prompt(template)


class Study(Strict):
    """The whole study file. Either `world` (the embedded world, by size) or `models` and `data`."""

    study: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    world: Literal["default", "tiny"] | None = None
    models: Models | None = None
    data: Data | None = None
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    threads: int = Field(default=1, ge=1, description="of the CPU; two are slower than one for models this side of 100M parameters")
    batch_size: int = Field(default=16, ge=1, description="items generated at a time")
    batch_tokens: int = Field(default=2048, ge=1, description="tokens scored at a time")
    arms: dict[str, ArmSpec]
    direct: str | None = Field(default=None, description="the arm at which the gap counts as closed; default: the first direct one")
    measures: tuple[MeasureName, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _coherent(self) -> "Study":
        if (self.world is None) == (self.models is None) or (self.models is None) != (self.data is None):
            raise ValueError("give either world, or models and data")
        kinds = [arm.kind for arm in self.arms.values()]
        if kinds.count("base") != 1:
            raise ValueError("arms needs exactly one arm of kind base: everything is compared with it")
        if kinds.count("expert") > 1 or kinds.count("proxy") > 1:
            raise ValueError("arms takes at most one expert and one proxy (with as many alphas as you like)")
        if "proxy" in kinds and "expert" not in kinds:
            raise ValueError("a proxy needs an arm of kind expert")
        if "expert" in kinds and self.models is not None and self.models.small is None:
            raise ValueError("an expert needs models.small")
        if self.direct is not None and (self.direct not in self.arms or self.arms[self.direct].kind != "direct"):
            raise ValueError(f"direct must name an arm of kind direct, not {self.direct!r}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if self.data is not None and self.data.knowledge is None and set(self.measures) - {"task"}:
            raise ValueError("measures other than task need data.knowledge")
        return self

    @property
    def base_arm(self) -> str:
        return next(name for name, arm in self.arms.items() if arm.kind == "base")

    @property
    def direct_arm(self) -> str | None:
        """The arm whose gain over the base is the whole gap."""
        return self.direct or next((name for name, arm in self.arms.items() if arm.kind == "direct"), None)


def load_study(path: Path | None) -> tuple[Study, Path]:
    """Reads a study file (None: the world study) and gives it with the folder that its paths count from.

    Raises `UserError` with the field, the rule and the value for a file that is missing, is not YAML or breaks a rule.
    """
    path = path or STUDIES / "world.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"study: there is no file '{path}'; the shipped ones are in {STUDIES}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"study: '{path}' cannot be read as YAML ({reason}); see evals/studies for examples") from error
    if not isinstance(content, dict):
        raise UserError(f"study: '{path}' must hold keys and values, not {type(content).__name__}; see evals/studies for examples")
    try:
        return Study.model_validate(content), path.parent
    except ValidationError as error:
        raise UserError(f"{path.name}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    first = next((entry for entry in error.errors() if entry["type"] == "extra_forbidden"), error.errors()[0])
    location = [str(part) for part in first["loc"]]
    # A discriminated union puts its tag (the arm's kind) into the location; the file has no such level.
    if len(location) > 2 and location[0] == "arms" and location[2] in ("base", "expert", "proxy", "direct"):
        del location[2]
    field = ".".join(location) or "study"
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such key; {_did_you_mean(location[-1], _known_keys())}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        known = [option.strip("'") for option in str(first["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        return f"{field}: {message}, not {first['input']!r}; {_did_you_mean(str(first['input']), known)}"
    value = "" if first["type"] in ("missing", "value_error") or isinstance(first["input"], dict) else f", not {first['input']!r}"
    return f"{field}: {message}{value}"


def _known_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (Study, Models, Data, Base, Expert, Proxy, Direct, Tuning, EarlyStopping)
    return sorted({name for model in models for name in model.model_fields})


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
