"""The two base classes: a reading says what is recorded of models, a measure says what is concluded from records.

A reading is expensive and keyed by its content; a measure is cheap and pure. To add a measure, write one module in this folder that ends with
`register(...)`. The study file, the command line, records, tables, figures and results.json then include it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import pandas as pd
from pydantic import BaseModel, ConfigDict

from evals.display.cells import Table
from evals.display.chart import Chart
from evals.measures.inputs import Inputs
from evals.measures.subjects import Outputs, Pair
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.intervals import Estimate
from evals.statistics.judged import Verdict
from proxytune.content import content_key

Progress = Callable[[int], None]
Frames = dict[str, pd.DataFrame]
S = TypeVar("S")


@dataclass(frozen=True)
class Reading(ABC):
    """What is recorded. Equal readings that two measures ask for are made once.

    `name` is shown in progress bars and used by `proxytune items`. Each frame of each label (arm) is one record. The record's key is a hash of the
    weights, the mixture, the seed, the frame's name, `version` and `decides`. If a reading changes what it records, it needs a new `version`; the
    records of other readings stay valid. `subject` is what is loaded: `Outputs` (members and mixtures over them) or `Pair` (the base and a model
    tuned from it). `beside_base` says that `Outputs` must also hold the base.
    """

    name: str
    version: ClassVar[int]
    subject: ClassVar[type[Outputs] | type[Pair]]
    beside_base: ClassVar[bool] = False

    @abstractmethod
    def decides(self, inputs: Inputs) -> dict[str, Any]:
        """Everything that decides the frames besides weights, mixture and seed, as JSON values."""

    @abstractmethod
    def frames(self, subject: Any, inputs: Inputs) -> tuple[str, ...]:
        """The names of the frames that `read` returns for each label; empty if this subject cannot be read."""

    @abstractmethod
    def steps(self, subject: Any, inputs: Inputs) -> int:
        """How many steps `read` reports to `progress`."""

    @abstractmethod
    def read(self, subject: Any, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        """The frames of every label of the subject, by label and frame name."""

    def first_prompt(self, inputs: Inputs) -> str | None:
        """The first prompt and its answer, to be shown before the reading starts; None if there is nothing to show."""
        return None

    def protocol(self, inputs: Inputs) -> str:
        """A hash of everything that decides how arms are asked. Rows with different protocols cannot be in one table."""
        return content_key(reading=type(self).__name__, version=self.version, **self.decides(inputs))


class Settings(BaseModel):
    """A measure's settings in the study file; subclasses add fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(NamedTuple):
    """What a measure contributes to the comparison across measures: the arms' shares with joint draws, and the items' frames by seed and arm."""

    estimate: Estimate
    frames: Sequence[Sequence[pd.DataFrame]]


class Measure(ABC, Generic[S]):
    """What is concluded.

    `name` is the word in the study file, the module's name, the argument of `proxytune probe` and the key in the results. `question` is the
    help text. `controls` says what the measure controls for. `needs` names the data that the measure requires (`test`, `knowledge`, and attributes
    of items such as `knowledge.choices`); `reads` names what it uses where a study has it. `role` says how gap closed, contrasts and frontier use
    its share: `gain` is what tuning is for, `kept` is what tuning may lose. `built_on` names the measures whose conclusions it uses. `of_answers`
    says that its frames hold one row an item, whose numbers may be averaged over several tunings of one family.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    controls: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()
    settings: ClassVar[type[Settings]] = Settings
    role: ClassVar[Literal["gain", "kept"] | None] = None
    built_on: ClassVar[tuple[str, ...]] = ()
    of_answers: ClassVar[bool] = False

    @abstractmethod
    def readings(self, inputs: Inputs, settings: Any) -> list[Reading]:
        """The readings that the measure needs."""

    @abstractmethod
    def summarize(self, records: Recorded, settings: Any) -> S:
        """The conclusions: frozen dataclasses whose numbers are `Value`s."""

    @property
    @abstractmethod
    def summary(self) -> type[S]:
        """The class of the summary, with which it is read back from JSON."""

    def tables(self, summary: S, header: Header) -> list[Table]:
        return []

    def charts(self, summary: S, header: Header) -> Iterable[Chart]:
        return []

    def verdicts(self, summary: S) -> Sequence[Verdict]:
        """Verdicts whose rules are fixed beforehand: of an arm, perhaps at one site, or of a world."""
        return ()

    def rows(self, summary: S) -> list[dict[str, Any]]:
        """Rows of the results' long table: `arm`, `measure`, `value`, `low`, `high`, `n`, `unparsed`, and `tied` where choices were made."""
        return []

    def shares(self, records: Recorded) -> Mapping[str, Share]:
        """The arms' shares by the `measure` of their rows, for a measure with a `role`; empty for other measures."""
        return {}
