"""A study: arms x measures x seeds, written in one YAML file and validated before anything runs."""

import difflib
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from yaml.constructor import ConstructorError

from finetune.encoding import check_prompt
from finetune.recipe import LARGEST_SEED, EarlyStopping, Tuning
from proxytune.errors import UserError, brief, shortened
from proxytune.files import check_readable
from proxytune.printable import printable

STUDIES = Path(__file__).parent / "studies"
MOST_NODES = 100_000  # of a study file with every alias written out
MeasureName = Literal["task", "knowledge", "forgetting", "density", "drift", "lens", "restoration", "recoverability"]
DialName = Literal["learning_rate", "epochs", "rank", "kl", "preference"]


class _Loader(yaml.SafeLoader):
    """Plain YAML, without what would be read as something else than is written, or without end."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._check(node, {})
        return self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # such as a number of 5,000 digits, or a 13th month
            raise ConstructorError(problem=" ".join(str(error).split()), problem_mark=node.start_mark) from error

    def _check(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """The number of nodes with aliases written out. Raises `ConstructorError` for too many, and for a key that stands twice."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES  # an alias of what it stands in has no end
            inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            sizes[id(node)] = 1 + sum(self._check(part, sizes) for part in inside)
        if sizes[id(node)] > MOST_NODES:
            raise ConstructorError(problem=f"with its aliases written out it has more than {MOST_NODES:,} values", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            first: dict[Any, yaml.Node] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):  # lists as keys are refused when constructed
                name = key.value if key.tag.endswith(":merge") else self.construct_object(key)  # a merge key has no value of its own
                if name in first:
                    raise ConstructorError(
                        problem=f"the key {brief(name)} stands twice, first on line {first[name].start_mark.line + 1}; rename or remove one",
                        problem_mark=key.start_mark,
                    )
                first[name] = key
        return sizes[id(node)]


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
    """base + alpha (expert - what the expert was tuned from); one point for each alpha, named proxy@alpha."""

    kind: Literal["proxy"]
    alpha: tuple[FiniteFloat, ...] = Field(min_length=1)
    expert: str | None = Field(default=None, description="an arm of kind expert, or direct: an expert as large as the base; default: the only expert")

    @field_validator("alpha")
    @classmethod
    def _apart(cls, alpha: tuple[float, ...]) -> tuple[float, ...]:
        return check_labels("alpha", alpha)


class Direct(Strict):
    """The base itself tuned, by us or beforehand: `path` is a checkpoint folder, or a LoRA adapter on the base.

    With a `dial`, one setting takes several values: each is a point of its own, named arm@value, unless one is to be chosen
    on validation items that are held out of tuning: the `best` at the task, or the one whose task score is nearest to that
    of another point (`choose: proxy@1`). The chosen value is then tuned with all items; trials count among the arm's costs.
    """

    kind: Literal["direct"]
    tuning: Tuning | None = None
    path: str | None = None
    dial: dict[DialName, tuple[FiniteFloat, ...]] | None = None
    choose: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _dialled_settings_need_no_value(cls, content: Any) -> Any:
        try:
            first = {name: values[0] for name, values in content["dial"].items()}
            return content | {"tuning": first | content["tuning"]}
        except (KeyError, TypeError, AttributeError, IndexError):
            return content

    @model_validator(mode="after")
    def _one_origin_and_one_dial(self) -> "Direct":
        if (self.tuning is None) == (self.path is None):
            raise ValueError("give either tuning or path")
        if self.tuning is None and self.dial is not None:
            raise ValueError("dial turns a setting of tuning; what was tuned beforehand has none")
        if self.dial is not None and [len(set(values)) for values in self.dial.values()] != [max(2, *map(len, self.dial.values()))]:
            raise ValueError("dial turns one setting through two or more different values")
        for setting, values in (self.dial or {}).items():
            check_labels(f"dial.{setting}", values)
        if self.choose is not None and self.dial is None:
            raise ValueError("choose needs a dial to choose from")
        self.points("")
        return self

    def points(self, name: str) -> dict[str, tuple[float | None, Tuning | None]]:
        """Label, dial's value and tuning (none with a path) of every point, of those to be chosen from too."""
        if self.dial is None or self.tuning is None:
            return {name: (None, self.tuning)}
        ((setting, values),) = self.dial.items()
        return {proxy_name(name, value): (value, Tuning.model_validate(self.tuning.model_dump() | {setting: value})) for value in values}


ArmSpec = Annotated[Base | Expert | Proxy | Direct, Field(discriminator="kind")]


class Point(NamedTuple):
    """One row of the tables: an arm, at one value of its dial if it has one."""

    arm: str
    kind: str
    value: float | None = None


class Models(Strict):
    """Local folders (counted from the study file's folder, or absolute) or hub names."""

    base: str
    small: str | None = None


class Data(Strict):
    """Items: JSON lines or Parquet files, counted from the study file's folder, or hub sets; their shapes are those of `reading`.

    `train` is tuned on, `test` is the task; each is left out where nothing needs it. `knowledge` (statements with popularity)
    is what may be forgotten. `prompt` is how a question is asked in plain text, or the word chat: in the models' own chat
    template. `answer`: a generated text is right if it begins with the answer, or (number) if its last number is the answer's;
    or a choice is made.
    """

    train: str | None = None
    test: str | None = None
    knowledge: str | None = None
    corpus: str | None = Field(default=None, description="text in which statements are counted: that is then the items' popularity")
    prompt: str = "Question: {question}\nAnswer:"
    answer: Literal["generate", "choose", "number"] = "generate"
    new_tokens: int = Field(default=12, ge=1)
    allow_overlap: bool = Field(default=False, description="test questions may also be in train")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, template: str) -> str:
        return check_prompt(template)


class Relearning(Strict):
    """How knowledge is taught again, to see how soon it returns (see `probes/recoverability.py`)."""

    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    steps: int = Field(default=32, ge=1, description="at most; a fact not regained by then counts as not regained")
    batch_size: int = Field(default=16, ge=1)


class Study(Strict):
    """The whole study file. Either `world` (the embedded world, by size) or `models` and `data`."""

    study: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", description="also the name of the folder of its results")
    world: Literal["default", "tiny"] | None = None
    models: Models | None = None
    data: Data | None = None
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...] = Field(default=(0,), min_length=1)
    threads: int = Field(default=1, ge=1, le=1024, description="of the CPU; two are slower than one for models this side of 100M parameters")
    batch_size: int = Field(default=16, ge=1, description="items generated at a time")
    batch_tokens: int = Field(default=2048, ge=1, description="tokens scored at a time")
    arms: dict[str, ArmSpec]
    direct: str | None = Field(default=None, description="the point at which the gap counts as closed; default: the first direct one")
    contrasts: tuple[tuple[str, str], ...] = Field(default=(), description="pairs of points whose difference is wanted: the first less the second")
    validation_share: float = Field(default=0.2, gt=0, lt=1, description="share of the tuning units on which dials are chosen")
    measures: tuple[MeasureName, ...] = Field(min_length=1)
    relearning: Relearning = Relearning()
    lens_tokens: int = Field(default=8192, ge=1, description="of text on which the lens' translators are fitted, for each model")

    @model_validator(mode="after")
    def _coherent(self) -> "Study":
        if (self.world is None) == (self.models is None) or (self.models is None) != (self.data is None):
            raise ValueError("give either world, or models and data")
        kinds = [arm.kind for arm in self.arms.values()]
        if kinds.count("base") != 1:
            raise ValueError("arms needs exactly one arm of kind base: everything is compared with it")
        for name, arm in self.arms.items():
            if not name.strip() or name != printable(name):
                raise ValueError(f"arms: the name {name!r} must hold signs, and none that cannot be seen; rename the arm")
            if isinstance(arm, Proxy):
                expert = self.arms.get(self.expert_of(name))
                if not isinstance(expert, Expert | Direct) or (isinstance(expert, Direct) and expert.dial is not None):
                    raise ValueError(f"arms.{name}: its expert must name one arm of kind expert, or direct without a dial, not {arm.expert!r}")
            if isinstance(arm, Direct) and arm.choose not in (None, "best", *self.fixed_points):
                raise ValueError(f"arms.{name}.choose: it must be best or one of {', '.join(self.fixed_points)}, not {arm.choose!r}")
        if "expert" in kinds and self.models is not None and self.models.small is None:
            raise ValueError("an expert needs models.small")
        if len(self.points) < sum(len(self._points_of(name)) for name in self.arms):
            raise ValueError("two arms have a point of one name; rename an arm")
        if self.direct is not None and (self.direct not in self.points or self.points[self.direct].kind != "direct"):
            raise ValueError(f"direct must name an arm of kind direct (with a dial: arm@value), not {self.direct!r}")
        for label in (label for pair in self.contrasts for label in pair):
            if label not in self.points:
                raise ValueError(f"contrasts: there is no point {label!r}; there are {', '.join(self.points)}")
        twice = next((pair for place, pair in enumerate(self.contrasts) if pair in self.contrasts[:place]), None)
        if twice is not None:
            raise ValueError(f"contrasts: {list(twice)} stands there twice; leave one out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if self.data is not None and self.data.knowledge is None and set(self.measures) - {"task"}:
            raise ValueError("measures other than task need data.knowledge")
        tuned = [name for name, arm in self.arms.items() if isinstance(arm, Expert | Direct) and arm.tuning is not None]
        if self.data is not None and self.data.train is None and tuned:
            raise ValueError(f"arms.{tuned[0]}.tuning needs data.train; give it, or tune beforehand and give path")
        choosing = [f"arms.{name}.choose" for name, arm in self.arms.items() if isinstance(arm, Direct) and arm.choose is not None]
        if self.data is not None and self.data.test is None and ("task" in self.measures or choosing):
            raise ValueError(f"{'measure task' if 'task' in self.measures else choosing[0]} needs data.test; give it")
        return self

    @property
    def base_arm(self) -> str:
        return next(name for name, arm in self.arms.items() if arm.kind == "base")

    @property
    def same_items(self) -> bool:
        """Whether every seed asks the same items, so that seeds differ by tuning only: the user's. A world's seeds have people of their own."""
        return self.world is None

    @property
    def direct_arm(self) -> str | None:
        """The point whose gain over the base is the whole gap."""
        return self.direct or next(iter(self.direct_points), None)

    @cached_property
    def points(self) -> dict[str, Point]:
        """All rows of the tables in the study's order, by label."""
        return {label: point for name in self.arms for label, point in self._points_of(name).items()}

    @property
    def direct_points(self) -> list[str]:
        return [label for label, point in self.points.items() if point.kind == "direct"]

    @property
    def fixed_points(self) -> list[str]:
        """Points that need not be chosen first, the base apart."""
        return [label for label, point in self.points.items() if point.kind != "base" and getattr(self.arms[point.arm], "choose", None) is None]

    def expert_of(self, proxy: str) -> str:
        """The name of the arm whose tuned model is the proxy's expert; empty where there is none or more than one."""
        arm = self.arms[proxy]
        experts = [name for name, other in self.arms.items() if other.kind == "expert"]
        return (arm.expert if isinstance(arm, Proxy) else None) or (experts[0] if len(experts) == 1 else "")

    def _points_of(self, name: str) -> dict[str, Point]:
        arm = self.arms[name]
        if isinstance(arm, Proxy):
            return {proxy_name(name, alpha): Point(name, "proxy", alpha) for alpha in arm.alpha}
        if isinstance(arm, Direct) and arm.choose is None:
            return {label: Point(name, "direct", value) for label, (value, _) in arm.points(name).items()}
        return {name: Point(name, arm.kind)}


def proxy_name(name: str, alpha: float) -> str:
    """`proxy@0.5`: how a proxy of strength alpha, or an arm at a dial's value, is called in every table."""
    return f"{name}@{alpha:g}"


def check_labels(field: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the values; raises ValueError where two of them would be called the same."""
    seen: dict[str, float] = {}
    for value in values:
        label = proxy_name("", value)
        if label in seen:
            raise ValueError(f"{field}: {seen[label]!r} and {value!r} are equal to six digits, by which points are named; leave one out")
        seen[label] = value
    return values


def expanded(name: str) -> Path:
    """The path with the home folder in the place of ~; as it stands where there is no such home, so that it is missed by its own name."""
    return Path(os.path.expanduser(name))


def load_study(path: Path | None) -> tuple[Study, Path]:
    """Reads a study file (None: the world study) and gives it with the folder that its paths count from.

    Raises `UserError` with the field, the rule and the value for a file that is missing, is not YAML or breaks a rule.
    """
    path = path or STUDIES / "world.yaml"
    check_readable(path, "study")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise UserError(f"study: there is no file '{path}'; the shipped ones are in {STUDIES}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else shortened(" ".join(str(error).split()), 400)
        raise UserError(f"study: '{path}' cannot be read as YAML ({reason}); see evals/studies for examples") from error
    if not isinstance(content, dict):
        raise UserError(f"study: '{path}' must hold keys and values, not {type(content).__name__}; see evals/studies for examples")
    try:
        return Study.model_validate(content), path.parent
    except ValidationError as error:
        raise UserError(f"{path.name}: {explain_invalid(error)}") from error


def explain_invalid(error: ValidationError) -> str:
    """The first mistake on one line: the field, the rule, the value seen, each cut where it is long."""
    first = next((entry for entry in error.errors() if entry["type"] == "extra_forbidden"), error.errors()[0])
    location = [shortened(str(part), 80) for part in first["loc"]]
    # A discriminated union puts its tag (the arm's kind) into the location; the file has no such level.
    if len(location) > 2 and location[0] == "arms" and location[2] in ("base", "expert", "proxy", "direct"):
        del location[2]
    field = ".".join(location) or "study"
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such key; {_did_you_mean(location[-1], _known_keys())}"
    message, seen = shortened(first["msg"].removeprefix("Value error, "), 800), brief(first["input"])
    if first["type"] == "literal_error":
        known = [option.strip("'") for option in str(first["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        return f"{field}: {message}, not {seen}; {_did_you_mean(seen.strip(repr(chr(39))), known)}"
    value = "" if first["type"] in ("missing", "value_error") or isinstance(first["input"], dict) else f", not {seen}"
    return f"{field}: {message}{value}"


def _known_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (Study, Models, Data, Base, Expert, Proxy, Direct, Tuning, EarlyStopping, Relearning)
    return sorted({name for model in models for name in model.model_fields})


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
