"""The kinds of arms that a study file may hold, their sweeps, and the rows that they are in the tables."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from evals.invalid import explain
from finetune.recipe import BiasTuning, Tuning
from probes.knowledge.lesson import Facts

SweptName = Literal["learning_rate", "epochs", "rank", "kl", "preference"]
S = TypeVar("S", bound="Swept")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(Strict):
    """The base model, untouched."""

    kind: Literal["base"]


class Match(Strict):
    """Selects the setting whose task score is nearest to that of another row."""

    match: str


class Selecting(Strict):
    """An arm that has several settings. With `select`, only one of them is a row, named as the arm: the `best` at the task, or the one whose task
    score is nearest to that of another row (`select: {match: proxy@1}`). It is selected on validation items that are held out of tuning; the trials
    count among the arm's costs."""

    select: Literal["best"] | Match | None = None

    @property
    def matched(self) -> str | None:
        """The row whose task score is to be matched, or None."""
        return self.select.match if isinstance(self.select, Match) else None


class Swept(Selecting):
    """An arm that is tuned by us (`tuning`), or made otherwise: subclasses say how, in the field that `otherwise` names.

    One setting of `tuning` may take several values (`sweep`). Each value is one row, named arm@value; with `select`, one is.
    """

    otherwise: ClassVar[str]
    tuning: Tuning | BiasTuning | None = None
    sweep: dict[str, tuple[FiniteFloat, ...]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _swept_settings_need_no_value(cls, content: Any) -> Any:
        try:
            first = {name: values[0] for name, values in content["sweep"].items()}
            return content | {"tuning": first | content["tuning"]}
        except (KeyError, TypeError, AttributeError, IndexError):
            return content

    @model_validator(mode="after")
    def _one_origin(self) -> "Swept":
        if (self.tuning is None) == (getattr(self, self.otherwise) is None):
            raise ValueError(f"give either tuning or {self.otherwise}")
        if self.tuning is None and self.sweep is not None:
            raise ValueError(f"sweep varies a setting of tuning; with {self.otherwise} there is none")
        return self

    @model_validator(mode="after")
    def _one_sweep(self) -> "Swept":
        if self.sweep is not None and [len(set(values)) for values in self.sweep.values()] != [max(2, *map(len, self.sweep.values()))]:
            raise ValueError("sweep takes one setting through two or more different values")
        for setting, values in (self.sweep or {}).items():
            check_labels(f"sweep.{setting}", values)
        if self.select is not None and self.sweep is None:
            raise ValueError("select needs a sweep to select from")
        try:
            self.settings("")
        except ValidationError as error:
            raise ValueError(f"sweep: {explain(error, sorted({*Tuning.model_fields, *BiasTuning.model_fields}))}") from error
        return self

    def settings(self: S, name: str) -> dict[str, tuple[float | None, S]]:
        """The swept value, and the arm at this value alone, of every setting by label; including those from which one is selected."""
        own = self.model_dump(exclude={"sweep", "select"})
        if self.sweep is None or own["tuning"] is None:
            return {name: (None, self)}
        ((setting, values),) = self.sweep.items()
        found: dict[str, tuple[float | None, S]] = {}
        for value in values:
            changed = own | {"tuning": own["tuning"] | {setting: value}}
            found[label_of(name, value)] = (value, type(self).model_validate(changed))
        return found


class Tuned(Swept):
    """A model that is tuned, by us (`tuning`) or elsewhere (`path`). A setting that is selected is tuned again with all items."""

    otherwise = "path"
    tuning: Tuning | None = None
    path: str | None = None
    sweep: dict[SweptName, tuple[FiniteFloat, ...]] | None = None  # type: ignore[assignment]


class Expert(Tuned):
    """The small model tuned: the proxy's expert, and an arm by itself. `path` is a checkpoint folder, or a LoRA adapter on the small model.

    With `select: best` it is selected by what it is for: the best score of a proxy over it with `select: best`; without one by its own score.
    """

    kind: Literal["expert"]


class Direct(Tuned):
    """The base itself tuned. `path` is a checkpoint folder, or a LoRA adapter on the base.

    With `teach` it is tuned on a lesson about made-up cities instead of data.train (`probes/knowledge/lesson.py`). With `step` it is the model as it
    was after so many steps of its tuning, which must be among those that the tuning keeps.
    """

    kind: Literal["direct"]
    teach: Facts | None = Field(default=None, description="the lesson: facts kept, facts drawn anew in every sentence, or others: other names")
    step: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _of_a_tuning(self) -> "Direct":
        if self.teach is not None and self.tuning is None:
            raise ValueError("teach needs tuning: how the lesson is taught")
        if self.step is not None and (self.tuning is None or self.step not in self.tuning.keep):
            raise ValueError(f"step must be one of tuning.keep, not {self.step}; add it there")
        return self


class Proxy(Selecting):
    """base + alpha (expert - anti-expert), where the anti-expert is the model that the expert was tuned from. One row for each alpha: proxy@alpha.

    Over an expert that is swept and not selected there is a row for each of its values and each alpha: proxy@value@alpha. Over an expert with
    `select`, the selected one is used. With `select` of its own, the strength is selected by the proxy's own validation score, and the expert's value
    with it where the expert does not select. The costs of its trials are those of the expert's trial tunings, once for each of the expert's values.
    """

    kind: Literal["proxy"]
    alpha: tuple[FiniteFloat, ...] = Field(min_length=1)
    expert: str | None = Field(default=None, description="an arm of kind expert, or direct: an expert as large as the base; default: the only expert")

    @field_validator("alpha")
    @classmethod
    def _apart(cls, alpha: tuple[float, ...]) -> tuple[float, ...]:
        return check_labels("alpha", alpha)


class LogitBias(Swept):
    """The base with a vector over the vocabulary added to its logits at every step: fitted on data.train (`tuning`, which may be empty: {}), or one
    that forbids words (`banned`), each of which must be one token of the base after a space."""

    kind: Literal["logit_bias"]
    otherwise = "banned"
    tuning: BiasTuning | None = None
    banned: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    sweep: dict[Literal["penalty"], tuple[FiniteFloat, ...]] | None = None  # type: ignore[assignment]


ArmSpec = Annotated[Base | Expert | Proxy | Direct | LogitBias, Field(discriminator="kind")]


class ArmSetting(NamedTuple):
    """One row of the tables: an arm, at one value of its sweep (or alpha) if it has one.

    `family` names the rows that differ from this one by that value only. `expert` is the row of a proxy's expert, empty if it is selected with it.
    """

    arm: str
    kind: str
    family: str
    value: float | None = None
    expert: str = ""


def label_of(name: str, alpha: float) -> str:
    """`proxy@0.5`: the name in every table of a proxy with strength alpha, or of an arm at one value of its sweep."""
    return f"{name}@{alpha:g}"


def check_labels(field: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Returns the values. Raises ValueError if two of them would have the same label."""
    seen: dict[str, float] = {}
    for value in values:
        label = label_of("", value)
        if label in seen:
            raise ValueError(f"{field}: {seen[label]!r} and {value!r} are equal to six digits, by which arms are named; leave one out")
        seen[label] = value
    return values
