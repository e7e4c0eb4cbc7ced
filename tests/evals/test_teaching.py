"""Arms that are tuned on what the base knows, or on what it does not: the classification is made once, and every such arm follows it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
from helpers import Counted, load, place_world, run_command, run_in_process, save_models, words

from evals.arms import tuning_summary
from evals.data import data_for
from evals.measures.inputs import Inputs
from evals.measures.novelty import Level, Novel, Novelty, Recalled, item_key, marked
from evals.records import Record
from evals.results.header import header_of
from evals.results.recorded import Recorded
from evals.results.summary import Results, read_results, result_tables, summarize
from evals.running.jobs import Place
from evals.running.outlook import look_at
from evals.running.progress import Display
from evals.running.runner import Finished
from evals.selection import trial_data
from evals.study import Run, Study
from proxytune.errors import UserError
from proxytune.member import Weights

TUNING = {"method": "full", "learning_rate": 3e-3, "steps": 5, "batch_size": 16}
KNOWN, UNKNOWN = TUNING | {"items": "known"}, TUNING | {"items": "unknown"}
STUDY: dict[str, Any] = {
    "study": "teaching",
    "worlds": ["tiny"],
    "batch_size": 100,
    "measures": ["task"],
    "arms": {
        "base": {"kind": "base"},
        "known": {"kind": "direct", "tuning": KNOWN},
        "unknown": {"kind": "direct", "tuning": UNKNOWN},
        "all": {"kind": "direct", "tuning": TUNING},
        "expert": {"kind": "expert", "tuning": UNKNOWN},
        "proxy": {"kind": "proxy", "alpha": [1]},
        "swept": {"kind": "direct", "tuning": KNOWN, "sweep": {"learning_rate": [1e-3, 3e-3]}, "select": "best"},
    },
}


class Ran(NamedTuple):
    out: Path
    study: Study
    finished: Finished
    results: Results
    frame: pd.DataFrame


@pytest.fixture(scope="module", autouse=True)
def many_samples() -> Iterator[None]:
    """The tiny base evades nearly every question: in four samples at 0.5 it would know hardly anything."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("probes.knowledge.known_items.SAMPLES", 24)
        patched.setattr("probes.knowledge.known_items.TEMPERATURE", 1.0)
        yield


@pytest.fixture(scope="module")
def ran(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = place_world(tiny_family, tmp_path_factory.mktemp("teaching"))
    study = Study.model_validate(STUDY)
    finished = run_in_process(study, out)
    (frame,) = [record.items for record in finished.records if record.frame == "novelty"]
    return Ran(out, study, finished, summarize(study, finished.records, finished.costs), frame)


def cards(out: Path) -> Iterator[dict[str, Any]]:
    for folder in sorted((out / "checkpoints").iterdir()):
        if folder.is_dir():
            card = tuning_summary(Weights(str(folder)))
            assert card is not None
            yield card


def test_every_arm_takes_the_same_steps_on_the_items_that_it_asks_for(ran: Ran) -> None:
    known, count = int(ran.frame["known"].sum()), len(ran.frame)
    assert 0 < known < count
    wanted = {"known": known, "unknown": count - known, "all": count}
    found = [(card["tuning"].get("items", "all"), card["tuning"]["learning_rate"], card["report"]) for card in cards(ran.out)]
    assert {report["steps"] for *_, report in found} == {5}
    # The trials tune on the known ones among the items that are not held out.
    trials = [report["examples"] for which, _, report in found if which == "known" and report["examples"] != known]
    assert len(trials) == 2
    assert all(0 < examples < known for examples in trials)
    assert {which for which, _, report in found if report["examples"] == wanted[which]} == {"known", "unknown", "all"}


def test_items_are_held_out_from_all_of_them(ran: Ran) -> None:
    data = data_for(ran.study, Path(), Run("tiny", 0), ran.out / "worlds")
    held_out = marked(trial_data(ran.study, data, 0).test, ran.frame)
    assert {item.familiar for item in held_out} == {True, False}


def test_what_is_known_is_more_familiar_and_stands_in_the_results(ran: Ran, tmp_path: Path) -> None:
    assert list(ran.results.measures) == ["task", "novelty"]
    levels = {level.exposure: level for level in ran.results.measures["novelty"].levels}
    assert list(levels) == ["all", "k=0", "k=3", "k=30"]
    assert levels["all"].known == (int(ran.frame["known"].sum()),)
    assert sum(levels[f"k={k}"].known[0] for k in (0, 3, 30)) == levels["all"].known[0]
    assert levels["k=30"].known[0] > levels["k=0"].known[0]
    (table,) = [table for table in result_tables(ran.results) if table.title == "Novelty"]
    assert table.frame["known"].tolist() == [str(level.known[0]) for level in levels.values()]
    (tmp_path / "results.json").write_text(ran.results.json())
    assert read_results(tmp_path / "results.json").measures["novelty"] == ran.results.measures["novelty"]
    assert json.loads(ran.results.json())["measures"]["novelty"]["levels"][0]["exposure"] == "all"


def test_the_base_is_asked_once_and_a_study_that_asks_too_finds_the_record(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Counted(monkeypatch)
    again = run_in_process(Study.model_validate(STUDY | {"measures": ["task", "novelty"]}), ran.out)
    assert passes.passes == 0
    assert [record.frame for record in again.records].count("novelty") == 1
    assert summarize(ran.study, again.records, again.costs).json() == ran.results.json()


def test_the_plan_knows_what_is_classified(ran: Ran, tiny_family: Path, tmp_path: Path) -> None:
    with Display(quiet=True) as display:
        there = look_at(Place(ran.study, Path(), ran.out), display)
        fresh = look_at(Place(ran.study, Path(), place_world(tiny_family, tmp_path)), display)
    assert {one.there for one in there} == {"all"}
    found = {one.job.name: one.there for one in fresh}
    assert found["tiny, seed 0 · classify the tuning items"] == "0 of 1 records"
    assert found["tiny, seed 0 · tune known"] == "none"


def test_a_study_without_such_arms_asks_nobody(ran: Ran) -> None:
    """The negative twin."""
    arms = {name: STUDY["arms"][name] for name in ("base", "all")}
    finished = run_in_process(Study.model_validate(STUDY | {"arms": arms}), ran.out)
    assert {record.frame for record in finished.records} == {"task"}


def test_a_record_made_again_is_the_same(ran: Ran, tiny_family: Path, tmp_path: Path) -> None:
    """In other batches, and without the arms: the measure by itself."""
    study = STUDY | {"measures": ["novelty"], "arms": {"base": {"kind": "base"}}, "batch_size": 7}
    finished = run_in_process(Study.model_validate(study), place_world(tiny_family, tmp_path))
    assert [(record.arm, record.frame) for record in finished.records] == [("base", "novelty")]
    pd.testing.assert_frame_equal(finished.records[0].items, ran.frame)


def test_rows_are_found_by_their_item_and_by_nothing_else(ran: Ran) -> None:
    data = data_for(ran.study, Path(), Run("tiny", 0), ran.out / "worlds")
    backwards = marked(data.train[::-1], ran.frame)
    assert [item.familiar for item in backwards] == ran.frame["known"].tolist()[::-1]
    assert item_key(data.train[0]) != item_key(data.train[0].model_copy(update={"familiar": True}))


def test_items_that_differ_in_exposure_are_counted_by_it(ran: Ran) -> None:
    frame = ran.frame.assign(popularity=float("nan"))
    study = Study.model_validate(STUDY | {"seeds": [0, 1]})
    records = [Record("base", "novelty", "tiny", seed, "p", given) for seed, given in enumerate((frame, ran.frame))]
    found = Novelty().summarize(Recorded(study, records), study.settings_of("novelty"))
    known, unknown = (int((ran.frame["known"] == flag).sum()) for flag in (True, False))
    assert found.levels[0] == Level("all", (known, known), (unknown, unknown))
    assert [level.known[0] for level in found.levels[1:]] == [0, 0, 0]
    (table,) = Novelty().tables(Novel(found.levels[:1]), header_of(study))
    assert table.frame.to_dict("records")[0] == {
        "tuning items": "all",
        "known": str(2 * known),
        "unknown": str(2 * unknown),
        "known (%)": f"{100 * known / len(ran.frame):.1f}",
        "known, each run": f"{known}, {known}",
    }


# --- the user's own items ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with models and data; the study's arms are tuned on known and on unknown items."""
    save_models(tmp_path)
    rows = [{"question": words(3 + number, 5 + number), "answer": words(20 + number)} for number in range(12)]
    write(tmp_path, "train", [row | {"familiar": number % 3 == 0} for number, row in enumerate(rows)])
    write(tmp_path, "test", [{"question": words(30 + number), "answer": words(20 + number)} for number in range(4)])
    return tmp_path


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def own_study(**arms: Any) -> dict[str, Any]:
    return {
        "study": "own",
        "models": {"base": "base", "small": "small"},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "prompt": "{question}", "new_tokens": 2},
        "measures": ["task"],
        "arms": {"base": {"kind": "base"}, **arms},
    }


def test_what_the_users_file_says_is_taken_and_nothing_is_sampled(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load(own, own_study(known={"kind": "direct", "tuning": KNOWN}, unknown={"kind": "direct", "tuning": UNKNOWN}))
    monkeypatch.setattr("probes.knowledge.known_items._Noise", None)  # nothing can be sampled
    finished = run_in_process(study, own / "out", own)
    (frame,) = [record.items for record in finished.records if record.frame == "novelty"]
    assert frame["known"].tolist() == [number % 3 == 0 for number in range(12)]
    assert not any(map(len, frame["samples"]))
    assert sorted(card["report"]["examples"] for card in cards(own / "out")) == [4, 8]
    assert {level.exposure for level in summarize(study, finished.records, finished.costs).measures["novelty"].levels} == {"all"}


def test_only_what_the_users_file_leaves_open_is_sampled(own: Path) -> None:
    rows = [json.loads(line) for line in (own / "train.jsonl").read_text().splitlines()]
    write(own, "train", [{name: value for name, value in row.items() if number < 6 or name != "familiar"} for number, row in enumerate(rows)])
    study = load(own, own_study())
    inputs = Inputs(study, data_for(study, own, Run(None, 0), own), 0)
    assert [prompt is not None for prompt in Recalled()._prompts(inputs)] == [False] * 6 + [True] * 6
    assert json.loads((own / "train.jsonl").read_text().splitlines()[0])["familiar"] is True


@pytest.mark.parametrize(
    ("which", "familiar", "line"),
    [
        ("unknown", True, "arms.full.tuning, items: none of the 12 training items is unknown to the model; give others, or tune on all"),
        ("known", False, "arms.full.tuning, items: none of the 12 training items is known to the model; give others, or tune on all"),
    ],
)
def test_a_choice_that_leaves_nothing_is_one_line(own: Path, which: str, familiar: bool, line: str) -> None:
    rows = [json.loads(text) for text in (own / "train.jsonl").read_text().splitlines()]
    write(own, "train", [row | {"familiar": familiar} for row in rows])
    load(own, own_study(full={"kind": "direct", "tuning": TUNING | {"items": which}}))
    found = run_command("compare", own / "study.yaml", "--out", own / "out", "--jobs", 1)
    assert found.returncode == 2
    assert line in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"kind": "direct", "tuning": TUNING, "sweep": {"epochs": [1, 2]}}, "arms.full.tuning: epochs and steps both say how long to tune; give one"),
        ({"kind": "direct", "tuning": TUNING | {"epochs": 2}}, "arms.full.tuning: epochs and steps both say how long to tune; give one"),
        ({"kind": "direct", "tuning": TUNING | {"items": "knwon"}}, "arms.full.tuning.items: .*did you mean 'known'"),
        ({"kind": "direct", "tuning": TUNING | {"steps": 2.5}}, "arms.full.tuning.steps: .*integer"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, own_study(full=arm))
