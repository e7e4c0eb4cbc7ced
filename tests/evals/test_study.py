from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import GOOD, PLAIN_TUNING, changed, load, run_in_process

from evals.arms import given_weights, groups, members_of, mixtures_of, tuning_summary
from evals.data import StudyData, data_for
from evals.running.plan import plan
from evals.selection import Choices
from evals.study import STUDIES, Study, load_study, with_seeds
from finetune.pretraining import Pretraining
from probes.world.family import build_family
from probes.world.recipes import RECIPES
from proxytune.errors import UserError
from proxytune.member import Weights, load_member


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    study, folder = load_study(path)
    assert study.references
    if study.data is not None:
        assert all((folder / name).exists() for name in (study.data.train, study.data.test, study.data.knowledge) if name)


def test_arms_are_named_by_their_alpha(tmp_path: Path) -> None:
    assert list(load(tmp_path, GOOD).arm_settings) == ["base", "expert", "proxy@0.5", "proxy@1", "full"]


def test_a_study_on_another_number_of_seeds_takes_its_first_ones_or_the_next_that_are_free(tmp_path: Path) -> None:
    study = load(tmp_path, changed("seeds", value=[4, 0, 2]))
    assert with_seeds(study, 3) is study
    assert (with_seeds(study, 2).seeds, with_seeds(study, 2).study) == ((4, 0), f"{study.study}-2-seeds")
    assert with_seeds(study, 6).seeds == (4, 0, 2, 1, 3, 5)
    shipped, _ = load_study(None)  # families on which its settings were selected are in no table
    assert shipped.selected is not None
    many = with_seeds(shipped, 110).seeds
    assert len(set(many)) == 110
    assert not {*many} & {*shipped.selected.seeds}


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (changed("meassures", value=[]), "study.yaml: meassures: there is no such key; did you mean 'measures'"),
        (
            changed("arms", "full", "tuning", "learning_rat", value=1),
            "arms.full.tuning.learning_rat: there is no such key; did you mean 'learning_rate'",
        ),
        (changed("measures", value=["tasks"]), "measures: there is no measure 'tasks'; did you mean 'task'"),
        (changed("arms", "proxy", "alpha", value=[float("nan")]), "arms.proxy.alpha.0: .*finite number, not nan"),
        (changed("arms", "proxy", "alpha", value=["x"]), "arms.proxy.alpha.0: .*, not 'x'"),
        (changed("arms", "full", "tuning", "learning_rate", value=-1), "arms.full.tuning.learning_rate: .*greater than 0, not -1"),
        (changed("arms", "full", "tuning", "rank", value=4), "arms.full.tuning: rank must be given with method lora"),
        (changed("arms", "full", "kind", value="direkt"), "arms.full: .*direkt"),
        (changed("arms", "second", value={"kind": "base"}), "exactly one arm of kind base"),
        (changed("arms", "expert", value={"kind": "expert"}), "either tuning or path"),
        (changed("arms", "full", value={"kind": "direct"}), "arms.full: give either tuning or path"),
        (changed("arms", "full", "path", value="x"), "arms.full: give either tuning or path"),
        (changed("arms", "full", value={"kind": "direct", "path": "x", "sweep": {"kl": [1, 2]}}), "arms.full: sweep varies a setting of tuning"),
        (changed("arms", "full", value={"kind": "direct", "path": "x", "select": "best"}), "arms.full: select needs a sweep"),
        (changed("direct", value="lora"), "direct must name an arm of kind direct .*, not 'lora'"),
        (changed("models", value={"base": "x"}), "either worlds, or models and data"),
        (changed("seeds", value=[1, 1]), "seeds must differ"),
        (changed("study", value="../x"), "study: .*, not '../x'"),
        ("study: [", "cannot be read as YAML"),
        ("- a", "must hold keys and values, not list"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_mistakes_name_the_field_and_the_rule(tmp_path: Path, study: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, study)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_study(tmp_path / "none.yaml")


def test_a_prompt_needs_its_placeholder(tmp_path: Path) -> None:
    study = changed("models", value={"base": "x", "small": "y"}) | {"data": {"train": "a", "test": "b", "prompt": "Q:"}}
    del study["worlds"]
    with pytest.raises(UserError, match=r"data.prompt: the only placeholder must be"):
        load(tmp_path, study)


GIVEN: dict[str, Any] = {
    "base": {"kind": "base"},
    "large": {"kind": "direct", "path": "x"},
    "proxy": {"kind": "proxy", "alpha": [1], "expert": "large"},
}
SWEPT = {"kind": "direct", "tuning": dict(PLAIN_TUNING), "sweep": {"learning_rate": [1e-3, 1e-4]}, "select": "best"}


def on_data(data: dict[str, str], measures: list[str], **arms: Any) -> dict[str, Any]:
    return {"study": "given", "models": {"base": "x"}, "data": data, "measures": measures, "arms": GIVEN | arms}


def test_what_was_tuned_beforehand_needs_no_training_data_and_can_be_an_expert(tmp_path: Path) -> None:
    study = load(tmp_path, on_data({"knowledge": "k"}, ["knowledge"]))
    assert (study.data.train, study.data.test) == (None, None)
    assert list(study.arm_settings) == ["base", "large", "proxy@1"]
    assert study.references == ("large",)


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (
            on_data({"test": "t"}, ["task"], full={"kind": "direct", "tuning": dict(PLAIN_TUNING)}),
            "study: arms.full.tuning needs data.train; give it",
        ),
        (on_data({"train": "t", "knowledge": "k"}, ["task"]), "study: measure task needs data.test; give it"),
        (on_data({"train": "t", "knowledge": "k"}, ["knowledge"], full=SWEPT), "study: arms.full.select needs data.test; give it"),
    ],
)
def test_data_that_an_arm_or_a_measure_needs_is_asked_for(tmp_path: Path, study: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, study)
    everything = study | {"data": {"train": "t", "test": "t", "knowledge": "k"}}
    assert load(tmp_path, everything).arm_settings


def test_a_direct_arm_is_taken_from_its_folder_or_as_an_adapter_on_the_base(tmp_path: Path, lora_family: Path) -> None:
    """Counted from the study file's folder, as an expert's is; nothing is tuned, and a proxy can have it as its expert."""
    arms = {"adapter": {"kind": "direct", "path": "polite"}, "proxy": {"kind": "proxy", "alpha": [1], "expert": "adapter"}}
    study = load(tmp_path, on_data({"knowledge": "k"}, ["knowledge"], **arms, large={"kind": "direct", "path": str(lora_family / "small")}))
    data = StudyData(str(lora_family / "small"), None, [], [], [], "{question}", "", 1, choose=False)
    assert [job.kind for job in plan(study)] == ["read"] * 3
    found = {}
    for group in groups(study):
        tuned = None if group.kind == "base" else given_weights(study, group, data, lora_family)
        members = members_of(group, mixtures_of(study, group, Choices()), data, tuned, beside_base=False)
        found |= {label: [members[name] for name in mixture if mixture[name]] for label, mixture in mixtures_of(study, group, Choices()).items()}
    base = Weights(data.base)
    assert found == {
        "base": [base],
        "large": [base],
        "adapter": [Weights(data.base, adapter=lora_family / "polite")],
        "proxy@1": [base, Weights(data.base, adapter=lora_family / "polite"), base],
    }
    assert found["adapter"][0].field == "arms.adapter.path"
    assert tuning_summary(found["adapter"][0]) is None


def test_a_checkpoint_of_pretraining_can_be_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = Pretraining(layers=1, hidden=8, heads=1, learning_rate=1e-2, epochs=1, block=24, batch_size=20)
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], people=12, base=pretraining, small=None))
    build_family("tiny", 0, tmp_path / "worlds")  # without checkpoints: it is built again
    arms = {"base": {"kind": "base"}, "at-0": {"kind": "direct", "path": "checkpoints/step-0"}}
    study = Study.model_validate({"study": "steps", "worlds": ["tiny"], "measures": ["knowledge"], "arms": arms})
    finished = run_in_process(study, tmp_path)
    family = tmp_path / "worlds" / "tiny" / "seed-0"
    given = given_weights(study, groups(study)[1], data_for(study, Path(), study.runs[0], tmp_path / "worlds"), Path())
    assert Path(given.path) == family / "checkpoints" / "step-0"
    assert load_member(given.path).fingerprint != load_member(str(family / "base")).fingerprint
    assert {record.arm for record in finished.records} == {"base", "at-0"}
    assert not study.model_copy(update={"arms": {"base": study.arms["base"]}}).reads_checkpoints
