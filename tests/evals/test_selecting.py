"""Settings selected for experts, proxies and the row `direct`: in every run on validation items, or beforehand on families of other seeds."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml
from helpers import load, place_world, run_command, run_in_process

from evals.arms import groups
from evals.commands.select import family_study, selected_block
from evals.results.comparison import comparison_charts
from evals.results.summary import Results, read_results, result_tables, summarize
from evals.running.plan import plan
from evals.running.runner import Finished
from evals.selection import choose, recorded, trial_study
from evals.study import Study
from proxytune.errors import UserError

FULL = {"method": "full", "learning_rate": 6e-3, "epochs": 1, "batch_size": 8}
RATES = {"learning_rate": [1e-4, 3e-3]}
CONTENT: dict[str, Any] = {
    "study": "selecting",
    "worlds": ["tiny"],
    "batch_size": 100,
    "measures": ["task", "knowledge"],
    "direct": ["best", "full@0.0001"],
    "contrasts": [["direct", "proxy-chosen"]],
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": FULL, "sweep": RATES},
        "expert-chosen": {"kind": "expert", "tuning": FULL, "sweep": {"epochs": [0.5, 1]}, "select": "best"},
        "proxy": {"kind": "proxy", "expert": "expert", "alpha": [0.5, 1]},
        "proxy-chosen": {"kind": "proxy", "expert": "expert", "alpha": [0.5, 1], "select": "best"},
        "proxy-over-chosen": {"kind": "proxy", "expert": "expert-chosen", "alpha": [0.5, 1]},
        "proxy-matched": {"kind": "proxy", "expert": "expert-chosen", "alpha": [0.5, 1], "select": {"match": "proxy-over-chosen@0.5"}},
        "full": {"kind": "direct", "tuning": FULL, "sweep": RATES},
        "full-chosen": {"kind": "direct", "tuning": FULL, "sweep": {"epochs": [0.5, 1]}, "select": "best"},
    },
}
STUDY = Study.model_validate(CONTENT)
LATER = CONTENT | {"seeds": [1]}  # family 0 is then in no table
PAIRS = [f"proxy@{rate}@{alpha}" for rate in ("0.0001", "0.003") for alpha in ("0.5", "1")]
LABELS = ["base", "expert@0.0001", "expert@0.003", "expert-chosen", *PAIRS, "proxy-chosen", "proxy-over-chosen@0.5", "proxy-over-chosen@1"]
LABELS += ["proxy-matched", "full@0.0001", "full@0.003", "full-chosen", "direct"]


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CONTENT) | changes


def with_arm(name: str, **arm: Any) -> dict[str, Any]:
    return changed(arms=CONTENT["arms"] | {name: CONTENT["arms"].get(name, {}) | arm})


def scores(**best: float) -> dict[str, float]:
    """A score for every row of the trials, those named higher than the rest."""
    return dict.fromkeys(trial_study(STUDY).rows, 0.1) | {label.replace("_", "-"): value for label, value in best.items()}


# --- what is selected, by scores ---


def test_every_setting_is_a_row_and_a_selected_arm_is_one() -> None:
    assert list(STUDY.arm_settings) == LABELS
    assert STUDY.references == ("direct", "full@0.0001")
    rows = set(trial_study(STUDY).rows)
    assert rows >= {"expert-chosen@0.5", "proxy-chosen@0.003@1", "proxy-matched@1@0.5", "full-chosen@0.5", "full@0.003"}
    assert not rows & {*PAIRS, "direct", "proxy-chosen", "proxy-over-chosen@0.5"}


def test_a_proxy_takes_the_best_pair_or_the_best_strength_over_the_selected_expert() -> None:
    given = scores() | {"proxy-chosen@0.003@0.5": 0.9, "expert-chosen@1": 0.4, "proxy-over-chosen@1@0.5": 0.3, "proxy-matched@1@1": 0.31}
    given |= {"proxy-matched@0.5@1": 0.3}  # nearer, but over the other expert
    chosen = choose(STUDY, given)
    assert {name: choice.label for name, choice in chosen.items()} == {
        "expert-chosen": "expert-chosen@1",
        "proxy-chosen": "proxy-chosen@0.003@0.5",
        "proxy-matched": "proxy-matched@1@1",
        "full-chosen": "full-chosen@0.5",
        "direct": "full@0.0001",
    }
    assert set(chosen["proxy-matched"].scores) == {"proxy-matched@1@0.5", "proxy-matched@1@1", "proxy-over-chosen@0.5"}


@pytest.mark.parametrize(
    ("score", "expert", "proxy", "direct"),
    [
        ({}, "expert-chosen@0.5", "proxy-chosen@0.0001@0.5", "full@0.0001"),  # nothing differs: the first
        ({"expert-chosen@1": 0.5}, "expert-chosen@1", "proxy-chosen@0.0001@0.5", "full@0.0001"),
        ({"proxy-chosen@0.003@1": 0.5}, "expert-chosen@0.5", "proxy-chosen@0.003@1", "full@0.0001"),
        ({"full-chosen@1": 0.5}, "expert-chosen@0.5", "proxy-chosen@0.0001@0.5", "full-chosen"),
        ({"full@0.003": 0.5, "full-chosen@1": 0.4}, "expert-chosen@0.5", "proxy-chosen@0.0001@0.5", "full@0.003"),
        ({"base": 0.9, "expert@0.003": 0.9, "proxy@0.003@1": 0.9}, "expert-chosen@0.5", "proxy-chosen@0.0001@0.5", "full@0.0001"),  # no candidates
    ],
)
def test_another_score_is_another_choice_and_only_where_it_counts(score: dict[str, float], expert: str, proxy: str, direct: str) -> None:
    chosen = choose(STUDY, scores() | score)
    assert (chosen["expert-chosen"].label, chosen["proxy-chosen"].label, chosen["direct"].label) == (expert, proxy, direct)


def test_costs_count_every_trial_tuning_of_an_arms_candidates_once() -> None:
    costs: dict[str, dict[str, Any]] = {label: {"of": label} for label in trial_study(STUDY).rows}
    chosen = choose(STUDY, scores(), costs)
    of = {name: [cost["of"] for cost in choice.trials] for name, choice in chosen.items()}
    assert of["expert-chosen"] == of["proxy-matched"] == ["expert-chosen@0.5", "expert-chosen@1"]
    assert of["proxy-chosen"] == ["expert@0.0001", "expert@0.003"]  # all that was tuned to select a pair
    assert of["direct"] == ["full@0.0001", "full@0.003", "full-chosen@0.5", "full-chosen@1"]
    same = Study.model_validate(with_arm("twin", kind="direct", tuning=FULL, sweep={"learning_rate": [1e-4, 3e-3]}))
    costs |= {label: {"of": label} for label in trial_study(same).rows}
    again = choose(same, scores() | dict.fromkeys(trial_study(same).rows, 0.1), costs)
    assert [cost["of"] for cost in again["direct"].trials] == [*of["direct"]]  # both rates of the twin are tuned in other arms


# --- the plan ---


def test_trials_are_one_tuning_for_each_candidate_and_only_what_is_selected_waits_for_them() -> None:
    jobs = {job.name.removeprefix("tiny, seed 0 · "): job for job in plan(STUDY)}
    tuned = [name for name in jobs if name.startswith("trial · tune")]
    assert tuned == [f"trial · tune {label}" for label in ("expert@0.0001", "expert@0.003", "expert-chosen@0.5", "expert-chosen@1")] + [
        f"trial · tune {label}" for label in ("full@0.0001", "full@0.003", "full-chosen@0.5", "full-chosen@1")
    ]
    waiting = {name for name, job in jobs.items() if "tiny, seed 0 · select" in job.waits}
    assert waiting == {"tune expert-chosen", "tune full-chosen", "read expert@0.0001", "read expert@0.003", "read expert-chosen"}
    assert jobs["select"].waits == tuple(job.name for job in jobs.values() if job.trial and job.kind == "read")
    assert (
        {job.group.label for job in jobs.values() if job.kind == "read" and not job.trial and job.group}
        == {group.label for group in groups(STUDY)}
        == {"base", "expert@0.0001", "expert@0.003", "expert-chosen", "full@0.0001", "full@0.003", "full-chosen"}
    )


# --- a whole study ---


class Whole(NamedTuple):
    out: Path
    finished: Finished
    results: Results


@pytest.fixture(scope="module")
def whole(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    out = place_world(tiny_family, tmp_path_factory.mktemp("selecting"))
    done = run_in_process(STUDY, out)
    return Whole(out, done, summarize(STUDY, done.records, done.costs, done.choices, done.prompts))


def texts(finished: Finished, arm: str, frame: str = "task") -> list[str]:
    (record,) = [record for record in finished.records if (record.arm, record.frame) == (arm, frame)]
    return record.items["text"].tolist()


def test_every_row_is_that_of_the_setting_that_was_selected(whole: Whole) -> None:
    (chosen,) = whole.finished.choices.values()
    assert {row["arm"] for row in whole.results.rows} == {entry["arm"] for entry in whole.results.costs} == set(LABELS)
    for frame in ("task", "knowledge"):
        pair = "proxy" + chosen["proxy-chosen"].label.removeprefix("proxy-chosen")
        assert texts(whole.finished, "proxy-chosen", frame) == texts(whole.finished, pair, frame)
        alpha = chosen["proxy-matched"].label.rpartition("@")[2]
        assert texts(whole.finished, "proxy-matched", frame) == texts(whole.finished, f"proxy-over-chosen@{alpha}", frame)
    others = [label for label in PAIRS if label != pair]
    assert any(texts(whole.finished, "proxy-chosen") != texts(whole.finished, other) for other in others)


def test_the_row_direct_is_the_chosen_arms_row_exactly(whole: Whole) -> None:
    ((run, chosen),) = whole.finished.choices.items()
    label, shown = chosen["direct"].label, chosen["direct"].scores
    assert shown[label] == max(shown.values()) > min(shown.values())
    rows = {name: [row | {"arm": ""} for row in whole.results.rows if row["arm"] == name] for name in ("direct", label)}
    assert rows["direct"] == rows[label] != []
    taught = next(record.items for record in whole.finished.records if (record.arm, record.frame) == (label, "task")).assign(right=True)
    planted = [replace(r, items=taught) if r.arm in (label, "direct") and r.frame == "task" else r for r in whole.finished.records]
    compared = summarize(STUDY, planted, whole.finished.costs).compared
    against, gaps = (
        next(row for row in compared[part] if (row["arm"], row["direct"], row["measure"]) == (label, "direct", "task"))
        for part in ("against_direct", "gap_closed")
    )
    assert (against["value"], against["low"], against["high"]) == (0, 0, 0)
    assert (gaps["value"], gaps["low"], gaps["high"]) == (1, 1, 1)
    (selection,) = [row for row in whole.results.compared["selections"] if row["arm"] == "direct"]
    assert selection == {"arm": "direct", "chosen": label, "worlds": ["tiny"], "seeds": [run.seed], "beforehand": False, "scores": dict(shown)}
    other = summarize(STUDY, whole.finished.records, whole.finished.costs, {run: choose(STUDY, scores(**{"full-chosen@1": 1.0}))})
    assert {row["arm"]: row["chosen"] for row in other.compared["selections"]}["direct"] == "full-chosen"


def test_the_row_direct_changes_no_other_row_and_no_arm_on_the_frontier(whole: Whole) -> None:
    plain = Study.model_validate(changed(direct="full@0.0001", contrasts=[]))
    assert plain.references == ("full@0.0001",)
    records = [record for record in whole.finished.records if record.arm != "direct"]
    alone = summarize(plain, records, {arm: costs for arm, costs in whole.finished.costs.items() if arm != "direct"})
    assert alone.rows == [row for row in whole.results.rows if row["arm"] != "direct"]
    assert alone.compared["frontier"] == whole.results.compared["frontier"]
    assert [chart.panels for chart in comparison_charts(alone.compared, alone.header)] == [
        chart.panels for chart in comparison_charts(whole.results.compared, whole.results.header)
    ]
    families = {row["arm"]: row["family"] for row in alone.compared["frontier"]}
    assert families["proxy@0.003@1"] == families["proxy@0.003@0.5"] == "proxy@0.003" != families["proxy@0.0001@1"]
    second = [row for row in whole.results.compared["gap_closed"] if row["direct"] == "full@0.0001" and row["arm"] != "direct"]
    assert second == alone.compared["gap_closed"]


def test_the_main_reference_comes_first_in_results_and_tables(whole: Whole) -> None:
    for part in ("gap_closed", "against_direct"):
        named = [row["direct"] for row in whole.results.compared[part]]
        assert named == sorted(named, key=["direct", "full@0.0001"].index)
        assert set(named) == {"direct", "full@0.0001"}
    tables = {table.title: table for table in result_tables(whole.results)}
    columns = [name for name in tables["Task"].frame.columns if name != "to decide Δ"]
    assert columns[-4:] == ["gap closed (vs direct)", "Δ vs direct", "gap closed (vs full@0.0001)", "Δ vs full@0.0001"]
    assert [name for name in tables["Knowledge"].frame.columns if name != "to decide Δ"][-2:] == ["Δ vs direct", "Δ vs full@0.0001"]
    selected = tables["Selected on validation items"]
    assert list(selected.frame["arm"]) == [*STUDY.selecting, "direct"]
    assert "test items were not used" in selected.note
    assert "The trials are among the costs" in selected.note


def test_what_selecting_costs_is_counted(whole: Whole) -> None:
    runs = {entry["arm"]: entry["runs"] for entry in whole.results.costs}
    assert (runs["expert@0.003"], runs["proxy@0.003@1"], runs["full@0.003"]) == (1, 1, 1)
    assert runs["expert-chosen"] == runs["proxy-over-chosen@1"] == runs["proxy-matched"] == runs["proxy-chosen"] == runs["full-chosen"] == 3
    assert runs["direct"] == 1 + 4
    stored = {entry["arm"]: entry["stored_bytes"] for entry in whole.results.costs}
    assert stored["direct"] == stored["full@0.003"] == stored["full-chosen"]


def test_a_study_that_was_stopped_ends_with_the_same_bytes_and_the_same_items(
    whole: Whole, tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, study = place_world(tiny_family, tmp_path / "out"), tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    shutil.copytree(whole.out / "checkpoints", out / "checkpoints")
    for record in sorted((whole.out / "records").glob("*.parquet"))[::2]:  # half of the trials' and of the study's
        (out / "records").mkdir(exist_ok=True)
        shutil.copy(record, out / "records")
    monkeypatch.setattr("evals.arms.tune", lambda *_, **__: pytest.fail("tuned again"))
    done = run_command("compare", study, "--out", out, "--jobs", 1, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == whole.results.json()
    assert read_results(out / "results.json").json() == whole.results.json()
    planned = run_command("compare", study, "--out", out, "--plan", "--format", "json")
    assert {row["there"] for row in json.loads(planned.stdout)["jobs"]} == {"all"}
    items = pd.read_parquet(out / "items.parquet")
    (chosen,) = whole.finished.choices.values()
    same = [items[items["arm"] == arm].drop(columns="arm").reset_index(drop=True) for arm in ("direct", chosen["direct"].label)]
    pd.testing.assert_frame_equal(*same)
    shown = run_command("items", out, "--where", f"direct right, {chosen['direct'].label} wrong", "--format", "json")
    assert json.loads(shown.stdout) == []


# --- what was selected beforehand ---


@pytest.fixture(scope="module")
def beforehand(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a study whose settings `proxytune select` selected, and the block that it printed."""
    folder = tmp_path_factory.mktemp("beforehand")
    shutil.copytree(whole.out, folder / "out")
    (folder / "study.yaml").write_text(yaml.safe_dump(LATER, sort_keys=False))
    done = run_command("select", folder / "study.yaml", "--seed", 0, "--out", folder / "out", "--jobs", 1)
    assert done.returncode == 0, done.stderr
    block: dict[str, Any] = yaml.safe_load(done.stdout)
    assert list(block) == ["selected"]
    return folder, block


def test_the_trials_are_tuned_with_all_items_and_scored_on_all_test_items_of_other_families(beforehand: Any, whole: Whole) -> None:
    folder, block = beforehand
    study = Study.model_validate(LATER)
    inner = family_study(study, [0])
    assert (inner.seeds, inner.measures) == ((0,), ("task",))
    done = run_in_process(inner, folder / "out")
    task = {row["arm"]: row["value"] for row in summarize(inner, done.records, done.costs).rows}
    assert block["selected"]["scores"] == pytest.approx(task, abs=5e-5)
    assert task["full@0.003"] == next(row["value"] for row in whole.results.rows if row["arm"] == "full@0.003")  # what a table of that family says
    assert yaml.safe_load(selected_block(study, [0], done.records)) == block


def test_with_the_block_no_trial_is_planned_and_what_is_selected_is_known(beforehand: Any, tmp_path: Path) -> None:
    _, block = beforehand
    study = load(tmp_path, LATER | block)
    assert not [job.name for job in plan(study) if job.trial or job.kind == "select"]
    assert len(plan(study)) == len([job for job in plan(STUDY) if not job.trial]) - 1
    tunings = {job.group.label: job.tuning for job in plan(study) if job.kind == "tune" and job.group}
    epochs = float(block["selected"]["chosen"]["full-chosen"].partition("@")[2])
    assert tunings["full-chosen"] is not None and tunings["full-chosen"].epochs == epochs


@pytest.mark.slow  # another family is built
def test_with_the_block_every_run_takes_what_stands_there(beforehand: Any, tmp_path: Path) -> None:
    folder, block = beforehand
    study = load(tmp_path, LATER | block)
    done = run_in_process(study, folder / "out")
    results = summarize(study, done.records, done.costs, done.choices)
    assert {row["arm"]: row["chosen"] for row in results.compared["selections"]} == block["selected"]["chosen"]
    assert all(row["seeds"] == [0] and row["beforehand"] for row in results.compared["selections"])
    assert {row["runs"] for row in results.costs} == {0, 1}
    assert texts(done, "direct") == texts(done, block["selected"]["chosen"]["direct"])
    note = next(table for table in result_tables(results) if table.title == "Selected on validation items").note
    assert "beforehand, on families of tiny with the seeds 0, which are in no table" in note
    assert "not among the costs" in note


def test_another_score_in_the_block_is_another_choice(beforehand: Any, tmp_path: Path) -> None:
    _, block = beforehand
    selected = copy.deepcopy(block["selected"])
    selected["scores"]["full-chosen@0.5"], selected["scores"]["full-chosen@1"] = 0.99, 0.0
    selected["chosen"] |= {"full-chosen": "full-chosen@0.5", "direct": "full-chosen"}
    chosen = recorded(load(tmp_path, LATER | {"selected": selected}))
    assert chosen is not None and (chosen["direct"].label, chosen["full-chosen"].label) == ("full-chosen", "full-chosen@0.5")


def spoiled(block: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"selected": copy.deepcopy(block["selected"]) | changes}


AGAIN = "; run again: proxytune select STUDY --seed 0$"


def test_a_block_that_does_not_fit_is_one_line(beforehand: Any, tmp_path: Path) -> None:
    _, block = beforehand
    old = block["selected"]
    other_sweep = with_arm("full", sweep={"learning_rate": [1e-4, 1e-3]})["arms"]
    other_tuning = with_arm("full-chosen", tuning=FULL | {"batch_size": 16})["arms"]
    mistakes = [
        (LATER | spoiled(block, seeds=[0, 1]), r"selected.seeds: 1 is one of the study's seeds; select on families of other seeds$"),
        (LATER | spoiled(block, seeds=[]), "selected.seeds: "),
        (LATER | spoiled(block, chosen=old["chosen"] | {"nobody": "x"}), f"selected.chosen: 'nobody' is no arm with select{AGAIN}"),
        (LATER | spoiled(block, chosen={"direct": old["chosen"]["direct"]}), f"selected.chosen: 'expert-chosen' is missing{AGAIN}"),
        (
            LATER | spoiled(block, chosen=old["chosen"] | {"full-chosen": "full-chosen@7"}),
            f"selected.chosen.full-chosen: .* not 'full-chosen@7'{AGAIN}",
        ),
        (LATER | spoiled(block, scores=old["scores"] | {"full@7": 0.1}), f"selected.scores: 'full@7' is no candidate{AGAIN}"),
        (LATER | block | {"arms": other_sweep, "direct": ["best"]}, f"selected.scores: 'full@0.001' is missing{AGAIN}"),
        (LATER | block | {"arms": other_tuning}, f"selected: the candidates or the worlds have changed since they were scored{AGAIN}"),
        (LATER | spoiled(block, worlds=["default"]), f"selected: the candidates or the worlds have changed since they were scored{AGAIN}"),
        (LATER | {"selected": {"seed": 1}}, "selected.seed: there is no such key; did you mean"),
    ]
    assert plan(load(tmp_path, LATER | block))  # as it was printed
    for study, words in mistakes:
        with pytest.raises(UserError, match=words) as raised:
            plan(load(tmp_path, study))
        assert "\n" not in str(raised.value)


def test_a_block_that_no_longer_fits_can_be_made_again(beforehand: Any, tmp_path: Path) -> None:
    folder, block = beforehand
    stale = LATER | spoiled(block, key="0" * 16)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(stale, sort_keys=False))
    done = run_command("select", tmp_path / "study.yaml", "--seed", 0, "--out", folder / "out", "--jobs", 1)
    assert yaml.safe_load(done.stdout) == block
    assert "from its record" in done.stderr


# --- mistakes ---


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (with_arm("direct", kind="direct", tuning=FULL), "direct: best makes a row of its own, 'direct'; rename the arm 'direct'"),
        (with_arm("best", kind="direct", tuning=FULL), "direct: best makes a row of its own, 'direct'; rename the arm 'best'"),
        (changed(direct=["best", "full"]), "direct must name an arm of kind direct .*, or best, not 'full'"),
        (changed(direct=["best", "best"]), "direct names an arm twice"),
        (changed(direct=5), "direct: .*, not 5"),
        (with_arm("proxy-matched", alpha=[1]), "arms.proxy-matched: select needs two or more values of alpha"),
        (
            with_arm("full-chosen", select={"match": "full-chosen"}),
            "arms.full-chosen.select.match: what it is to match is itself selected by this arm",
        ),
        (with_arm("expert-chosen", select={"match": "proxy-over-chosen@1"}), "arms.expert-chosen.select.match: what it is to match is itself"),
        (with_arm("full@0.5", kind="direct", tuning=FULL), None),
        (with_arm("full-chosen@0.5", kind="direct", tuning=FULL), "two arms have a row of one name"),  # in the trials
        (with_arm("expert", select="worst"), "arms.expert.select.*'best'.*"),
        (with_arm("expert", sweep={"learning_rate": [1e-3, -1]}), "arms.expert: sweep: tuning.learning_rate: .*greater than 0, not -1"),
        (with_arm("expert", sweep={"learning_rat": [1e-3, 1]}), "arms.expert.tuning.learning_rat: there is no such key"),
    ],
)
def test_contradictions_are_one_line(tmp_path: Path, study: dict[str, Any], words: str | None) -> None:
    if words is None:  # the negative twin: names that are alike but stand for different rows
        assert load(tmp_path, study).references == ("direct", "full@0.0001")
        assert plan(load(tmp_path, study))
        return
    with pytest.raises(UserError, match=words) as raised:
        plan(load(tmp_path, study))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("study", "seeds", "words"),
    [
        (CONTENT, [0], "--seed: 0 is one of the study's seeds"),
        (CONTENT, [1, 1], "--seed: the seeds must differ"),
        (
            changed(
                direct="full@0.003",
                arms={name: arm for name, arm in CONTENT["arms"].items() if "chosen" not in name and "select" not in arm},
                contrasts=[],
            ),
            [1],
            "nothing to select",
        ),
        (changed(worlds=[], models={"base": "b", "small": "s"}, data={"train": "t", "test": "t", "knowledge": "k"}), [1], "it has data of its own"),
    ],
)
def test_what_cannot_be_selected_beforehand_is_one_line(tmp_path: Path, study: dict[str, Any], seeds: list[int], words: str) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    done = run_command("select", tmp_path / "study.yaml", *(part for seed in seeds for part in ("--seed", seed)), "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_of_its_own_needs_items_to_select_on(tmp_path: Path) -> None:
    arms = {"base": {"kind": "base"}, "expert": {"kind": "expert", "path": "e"}, "proxy": {"kind": "proxy", "alpha": [0.5, 1], "select": "best"}}
    study = {"study": "own", "models": {"base": "b", "small": "s"}, "data": {"test": "t"}, "measures": ["task"], "arms": arms}
    with pytest.raises(UserError, match=r"arms.proxy.select needs data.train; give it"):
        load(tmp_path, study)
    assert load(tmp_path, study | {"data": {"train": "t", "test": "t"}}).selecting == ["proxy"]
