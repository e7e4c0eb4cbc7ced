"""A study (arms x measures x seeds): one YAML file, validated before anything runs. `run` is the entry point from Python."""

import itertools
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator, model_validator

from evals.invalid import did_you_mean, explain
from evals.kinds import ArmSetting, ArmSpec, Base, Direct, Expert, LogitBias, Match, Proxy, Selecting, Strict, Swept, Tuned, label_of
from evals.measures.registry import measures
from evals.older import modernized
from evals.yaml_file import read_yaml
from finetune.encoding import check_prompt
from finetune.recipe import LARGEST_SEED, BiasTuning, EarlyStopping, Tuning
from probes.knowledge.lesson import Facts
from probes.world.family import CHECKPOINTS
from probes.world.recipes import RECIPES
from proxytune.errors import UserError
from proxytune.printable import printable

if TYPE_CHECKING:
    from evals.results.summary import Results

STUDIES = Path(__file__).parent / "studies"
BEST = "best"  # `direct: best`
DIRECT = "direct"  # its row
TAUGHT = "taught"  # `data.entities`: the names of the lesson that arms with `teach` are tuned on


class Run(NamedTuple):
    """One world (None if the study has its own data), one seed, and the number of the tuning: the family of a seed may be tuned several times."""

    world: str | None
    seed: int
    tuning: int = 0

    def __str__(self) -> str:
        place = f"seed {self.seed}" if self.world is None else f"{self.world}, seed {self.seed}"
        return place if self.tuning == 0 else f"{place}, tuning {self.tuning}"

    @property
    def first(self) -> "Run":
        """The seed's first tuning. What is not tuned (the family, its data, the base) is that of this run."""
        return self._replace(tuning=0)

    @property
    def tuning_seed(self) -> int:
        """The seed of the tuning. The first tuning has the run's own seed; later ones are drawn from the upper half of the seeds, where studies
        have none of their own."""
        if self.tuning == 0:
            return self.seed
        half = (LARGEST_SEED + 1) // 2
        return half + int(np.random.SeedSequence([self.seed, self.tuning]).generate_state(1)[0]) % half


class Models(Strict):
    """Local folders (relative to the study file's folder, or absolute) or hub names."""

    base: str
    small: str | None = None


class Data(Strict):
    """Items: JSON lines or Parquet files, relative to the study file's folder, or hub sets; their shapes are those of `finetune.formats`.

    `train` is tuned on, `test` is the task; each may be left out if nothing needs it. `knowledge` (statements with popularity) is what may be
    forgotten. `prompt` is the template of a question in plain text, or the word chat: the models' own chat template. `answer`: with `generate`
    a text is right if it begins with the answer, with `number` if its last number is the answer's; with `choose` the most probable choice counts.
    """

    train: str | None = None
    test: str | None = None
    knowledge: str | None = None
    entities: str | None = Field(
        default=None,
        description="names whose states are read: a file of JSON lines, cities, or taught (those of arms with teach); default: cities it spells",
    )
    corpus: str | None = Field(default=None, description="text in which statements are counted; the counts are then the items' popularity")
    prompt: str = "Question: {question}\nAnswer:"
    answer: Literal["generate", "choose", "number"] = "generate"
    new_tokens: int = Field(default=12, ge=1)
    allow_overlap: bool = Field(default=False, description="test questions may also be in train")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, template: str) -> str:
        return check_prompt(template)


class Selected(Strict):
    """Settings that were selected beforehand by `proxytune select`, on the families of other seeds, which are in no table.

    `chosen` is the setting of every arm that selects, `scores` the candidates' task scores there (means over the families), and `key` a hash of the
    candidates and of the worlds' recipes.
    """

    worlds: tuple[str, ...]
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...] = Field(min_length=1)
    key: str
    chosen: dict[str, str]
    scores: dict[str, FiniteFloat]


class Study(Strict):
    """The whole study file. Either `worlds` (embedded worlds, by their recipes' names) or `models` and `data`."""

    study: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", description="also the name of the folder of its results")
    worlds: tuple[str, ...] = ()
    models: Models | None = None
    data: Data | None = None
    seeds: tuple[Annotated[int, Field(ge=0, le=LARGEST_SEED)], ...] = Field(default=(0,), min_length=1)
    tuning_seeds: int = Field(default=1, ge=1, le=1000, description="how many times every arm is tuned on each seed's family, to tell both apart")
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads per job; two are slower than one for models below 100M parameters")
    batch_size: int = Field(default=16, ge=1, description="items generated at a time")
    batch_tokens: int = Field(default=2048, ge=1, description="tokens scored at a time")
    arms: dict[str, ArmSpec]
    direct: tuple[str, ...] = Field(
        default=(), description="what closes the gap by definition: a direct arm, or best (what validation selects); several: the main one first"
    )
    contrasts: tuple[tuple[str, str], ...] = Field(default=(), description="pairs of arms to compare: the first minus the second")
    selected: Selected | None = Field(default=None, description="settings that proxytune select has selected beforehand")
    validation_share: float = Field(default=0.2, gt=0, lt=1, description="share of the tuning units on which settings are selected")
    measures: tuple[str, ...] = Field(min_length=1)
    settings: dict[str, Any] = Field(default={}, description="settings of measures, by the measures' names")

    @field_validator("direct", mode="before")
    @classmethod
    def _several(cls, content: Any) -> Any:
        return () if content is None else (content,) if isinstance(content, str) else content

    @field_validator("measures")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        known = measures()
        for name in names:
            if name not in known:
                raise ValueError(f"there is no measure {name!r}; {did_you_mean(name, list(known))}")
        return tuple(dict.fromkeys(names))

    @field_validator("settings")
    @classmethod
    def _of_measures(cls, settings: dict[str, Any]) -> dict[str, Any]:
        known = measures()
        for name, content in settings.items():
            if name not in known:
                raise ValueError(f"there is no measure {name!r}; {did_you_mean(name, list(known))}")
            try:
                known[name].settings.model_validate(content)
            except ValidationError as error:
                raise ValueError(f"{name}.{explain(error, list(known[name].settings.model_fields))}") from error
        return settings

    @model_validator(mode="after")
    def _coherent(self) -> "Study":
        if bool(self.worlds) == (self.models is not None) or (self.models is None) != (self.data is None):
            raise ValueError("give either worlds, or models and data")
        for world in self.worlds:
            if world not in RECIPES:
                raise ValueError(f"worlds: there is no recipe {world!r}; {did_you_mean(world, list(RECIPES))}")
        if len(set(self.worlds)) < len(self.worlds):
            raise ValueError("worlds must differ")
        kinds = [arm.kind for arm in self.arms.values()]
        if kinds.count("base") != 1:
            raise ValueError("arms needs exactly one arm of kind base: everything is compared with it")
        for name, arm in self.arms.items():
            if not name.strip() or name != printable(name):
                raise ValueError(f"arms: the name {name!r} must hold signs, and none that cannot be seen; rename the arm")
            if isinstance(arm, Proxy):
                expert = self.arms.get(self.expert_of(name))
                if not isinstance(expert, Tuned):
                    raise ValueError(f"arms.{name}: its expert must name one arm of kind expert or direct, not {arm.expert!r}")
                if arm.select is not None and len(arm.alpha) == 1 and (expert.sweep is None or expert.select is not None):
                    raise ValueError(f"arms.{name}: select needs two or more values of alpha to select from")
        if "expert" in kinds and self.models is not None and self.models.small is None:
            raise ValueError("an expert needs models.small")
        if len(self.rows) < sum(len(self.rows_of(name)) for name in self.arms):
            raise ValueError("two arms have a row of one name; rename an arm")
        self._check_references()
        self._check_matches()
        for label in (label for pair in self.contrasts for label in pair):
            if label not in self.arm_settings:
                raise ValueError(f"contrasts: there is no arm {label!r}; there are {', '.join(self.arm_settings)}")
        twice = next((pair for place, pair in enumerate(self.contrasts) if pair in self.contrasts[:place]), None)
        if twice is not None:
            raise ValueError(f"contrasts: {list(twice)} stands there twice; leave one out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must differ")
        if self.tuning_seeds > 1 and self.data is not None:
            raise ValueError("tuning_seeds: with your own data every seed is a tuning of the same models on the same items; give more seeds")
        inside = [name for name in self.measures if not measures()[name].of_answers]
        if self.tuning_seeds > 1 and inside:
            raise ValueError(f"tuning_seeds: {inside[0]} looks inside one tuned model; leave it out of measures, or have one tuning a seed")
        if any(map(self.lesson_of, self.arms)) != self.teaches:
            raise ValueError(f"data.entities: {TAUGHT} and arms with teach belong together; give both or neither")
        if self.teaches and self.data is not None and self.data.knowledge is not None:
            raise ValueError(f"data.knowledge: with data.entities: {TAUGHT} the lesson's own facts are asked; leave it out")
        for name in self.measures if self.data is not None else ():
            for field in sorted(need.partition(".")[0] for need in measures()[name].needs):
                if getattr(self.data, field) is None and not (self.teaches and field == "knowledge"):
                    raise ValueError(f"measure {name} needs data.{field}; give it")
        tuned = [name for name, arm in self.arms.items() if isinstance(arm, Swept) and arm.tuning is not None and not self.lesson_of(name)]
        if self.data is not None and self.data.train is None and tuned:
            raise ValueError(f"arms.{tuned[0]}.tuning needs data.train; give it, or tune beforehand and give path")
        selecting = [*(f"arms.{name}.select" for name in self.selecting), *(["direct: best"] if self.selects_direct else [])]
        for field in ("train", "test") if self.data is not None and selecting else ():
            if getattr(self.data, field) is None:
                raise ValueError(f"{selecting[0]} needs data.{field}; give it")
        if self.selected is not None:
            if not self.worlds:
                raise ValueError("selected: only worlds have families that are in no table; remove it, and settings are selected in every run")
            if not selecting:
                raise ValueError("selected: no arm has select; remove it")
            if common := sorted({*self.selected.seeds} & {*self.seeds}):
                raise ValueError(f"selected.seeds: {common[0]} is one of the study's seeds; select on families of other seeds")
        return self

    def _check_references(self) -> None:
        if self.selects_direct:
            for name in (BEST, DIRECT):
                if name in self.rows:
                    raise ValueError(f"direct: best makes a row of its own, '{DIRECT}'; rename the arm {name!r}")
            if not any(isinstance(arm, Direct) and arm.tuning is not None for arm in self.arms.values()):
                raise ValueError("direct: best needs an arm of kind direct with a tuning to select from")
        for label in self.direct:
            if label != BEST and (label not in self.rows or self.rows[label].kind != "direct"):
                raise ValueError(f"direct must name an arm of kind direct (with a sweep: arm@value), or best, not {label!r}")
        if len(set(self.direct)) < len(self.direct):
            raise ValueError("direct names an arm twice; leave one out")

    def _check_matches(self) -> None:
        targets = [label for label, setting in self.rows.items() if setting.kind != "base"]
        for name in self.selecting:
            label = getattr(self.arms[name], "matched", None)
            if label not in (None, *targets):
                raise ValueError(f"arms.{name}.select.match: it must be one of {', '.join(targets)}, not {label!r}")
        for name in self.selecting:
            waiting = list(self._selected_after(name))
            seen = set(waiting)
            while waiting:
                found = set(self._selected_after(waiting.pop())) - seen
                waiting += found
                seen |= found
            if name in seen:
                raise ValueError(f"arms.{name}.select.match: what it is to match is itself selected by this arm; match another one")

    def _selected_after(self, name: str) -> Iterator[str]:
        """The arms whose settings must be known before this one's can be selected."""
        arm = self.arms[name]
        if isinstance(arm, Selecting) and arm.matched is not None:
            yield self.rows[arm.matched].arm
        if isinstance(arm, Proxy):
            yield self.expert_of(name)

    @property
    def base_arm(self) -> str:
        return next(name for name, arm in self.arms.items() if arm.kind == "base")

    @property
    def same_items(self) -> bool:
        """Whether every seed has the same items, so that seeds differ by tuning only. True for the user's data; every seed of a world has its own
        people, and every seed of a lesson its own names and exposures."""
        return not self.worlds and not self.teaches

    @property
    def teaches(self) -> bool:
        """Whether made-up cities are taught and read."""
        return self.data is not None and self.data.entities == TAUGHT

    @property
    def runs(self) -> list["Run"]:
        """Every tuning of every seed of every world. In each run everything is tuned and measured once."""
        return [Run(world, seed, tuning) for world in (self.worlds or (None,)) for seed in self.seeds for tuning in range(self.tuning_seeds)]

    def settings_of(self, measure: str) -> Any:
        """The settings of a measure, with defaults for those that the file leaves out."""
        return measures()[measure].settings.model_validate(self.settings.get(measure, {}))

    def lesson_of(self, arm: str) -> Facts | None:
        """The lesson that an arm is taught, or None."""
        spec = self.arms[arm]
        return spec.teach if isinstance(spec, Direct) else None

    def chooses_items(self, arm: str) -> bool:
        """Whether an arm is tuned on known or on unknown items only."""
        tuning = getattr(self.arms[arm], "tuning", None)
        return isinstance(tuning, Tuning) and tuning.items != "all"

    @property
    def shown(self) -> tuple[str, ...]:
        """The measures, with novelty where an arm is tuned on known or unknown items only: which these are belongs to the results."""
        return tuple(dict.fromkeys((*self.measures, *("novelty" for arm in self.arms if self.chooses_items(arm)))))

    @property
    def selects_direct(self) -> bool:
        """Whether there is a row `direct`: in every run the direct arm with the best validation score."""
        return BEST in self.direct

    @property
    def reads_checkpoints(self) -> bool:
        """Whether arms are the base as it was during pretraining: the families of the worlds are then built with checkpoints."""
        paths = (getattr(arm, "path", None) for arm in self.arms.values())
        return bool(self.worlds) and any(path is not None and Path(path).parts[:1] == (CHECKPOINTS,) for path in paths)

    @property
    def direct_arm(self) -> str | None:
        """The main reference."""
        return next(iter(self.references), None)

    @property
    def references(self) -> tuple[str, ...]:
        """The rows whose gain over the base is the whole gap, the main one first; empty without direct arms."""
        return tuple(DIRECT if label == BEST else label for label in self.direct) or tuple(self.direct_settings[:1])

    @cached_property
    def rows(self) -> dict[str, ArmSetting]:
        """The rows of all arms by label, in the study's order."""
        return {label: setting for name in self.arms for label, setting in self.rows_of(name).items()}

    @cached_property
    def arm_settings(self) -> dict[str, ArmSetting]:
        """All rows of the tables by label, in the study's order: those of the arms, then `direct` if it is selected among them."""
        return self.rows | ({DIRECT: ArmSetting(DIRECT, "direct", DIRECT)} if self.selects_direct else {})

    @property
    def direct_settings(self) -> list[str]:
        """The rows of arms of kind direct."""
        return [label for label, setting in self.rows.items() if setting.kind == "direct"]

    @property
    def selecting(self) -> list[str]:
        """The arms with `select`."""
        return [name for name, arm in self.arms.items() if isinstance(arm, Selecting) and arm.select is not None]

    def expert_of(self, proxy: str) -> str:
        """The name of the arm whose tuned model is the proxy's expert; empty if there is none, or more than one candidate."""
        arm = self.arms[proxy]
        experts = [name for name, other in self.arms.items() if other.kind == "expert"]
        return (arm.expert if isinstance(arm, Proxy) else None) or (experts[0] if len(experts) == 1 else "")

    def rows_of(self, name: str) -> dict[str, ArmSetting]:
        """The rows of one arm by label."""
        arm = self.arms[name]
        if isinstance(arm, Selecting) and arm.select is not None:
            return {name: ArmSetting(name, arm.kind, name)}
        if isinstance(arm, Swept):
            return {label: ArmSetting(name, arm.kind, name, value) for label, (value, _) in arm.settings(name).items()}
        if isinstance(arm, Proxy):
            expert = self.expert_of(name)
            families = {row: name + row.removeprefix(expert) for row in self.rows_of(expert)}
            return {label_of(family, alpha): ArmSetting(name, "proxy", family, alpha, row) for row, family in families.items() for alpha in arm.alpha}
        return {name: ArmSetting(name, arm.kind, name)}


def with_seeds(study: Study, count: int) -> Study:
    """The study on so many seeds, under a name of its own: its first ones, or all of them and the next whole numbers.

    Seeds on which settings were selected beforehand are not taken.
    """
    if count == len(study.seeds):
        return study
    taken = {*study.seeds, *(() if study.selected is None else study.selected.seeds)}
    others = (seed for seed in itertools.count() if seed not in taken)
    seeds = (*study.seeds[:count], *itertools.islice(others, max(0, count - len(study.seeds))))
    return study.model_copy(update={"seeds": seeds, "study": f"{study.study}-{count}-seeds"})


def expanded(name: str) -> Path:
    """The path with ~ replaced by the home folder. It stays as it is if there is no such home, so that errors show the name as written."""
    return Path(os.path.expanduser(name))


def load_study(path: Path | None, *, select_again: bool = False) -> tuple[Study, Path]:
    """Reads a study file (None: the default study) and returns it with the folder that its paths are relative to. With `select_again` without what
    was selected beforehand, which may no longer fit.

    Raises `UserError` with the field, the rule and the value for a file that is missing, is not YAML or breaks a rule.
    """
    path = path or STUDIES / "world.yaml"
    content = read_yaml(path, "study", f"the shipped ones are in {STUDIES}")
    if select_again:
        content.pop("selected", None)
    try:
        return Study.model_validate(modernized(content)), path.parent
    except ValidationError as error:
        raise UserError(f"{path.name}: {explain_invalid(error)}") from error


def explain_invalid(error: ValidationError) -> str:
    """The first mistake in a study file, on one line."""
    models: tuple[type[BaseModel], ...] = (
        *(Study, Models, Data, Base, Expert, Proxy, Direct, Match, LogitBias, Selected, Tuning, BiasTuning, EarlyStopping),
    )
    return explain(error, sorted({name for model in models for name in model.model_fields}))


def run(study: "Study | Path", out: Path, *, jobs: int | None = 1) -> "Results":
    """Runs a study, or the study in a file, and returns its results: the entry point for comparison scripts.

    The folder `out` keeps records and checkpoints: a second call continues where the first one stopped. Paths in a `Study` are relative to the
    working directory, paths in a file to the file's folder. `jobs` is the number of processes (None: one per core); a script that uses more than
    one must call this under `if __name__ == "__main__":`. Raises `UserError` for mistakes that a user can fix.
    """
    from evals.results.summary import summarize
    from evals.running.progress import Display
    from evals.running.runner import run_study

    loaded, folder = (study, Path()) if isinstance(study, Study) else load_study(study)
    with Display() as display:
        finished = run_study(loaded, folder, out, display, jobs=jobs)
    return summarize(loaded, finished.records, finished.costs, finished.choices)
