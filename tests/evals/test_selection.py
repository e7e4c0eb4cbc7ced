"""Arms with swept settings: their rows, what is selected among them and on which items, the frontier, and what it all costs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import place_world, run_in_process
from safetensors.torch import load_file
from scipy.stats import binomtest

from evals.arms import tuning_summary
from evals.data import data_for
from evals.records import Record
from evals.results.costs import Costs
from evals.results.summary import Results, result_tables, summarize
from evals.running.costs import serving_cost
from evals.selection import choose, score_of, trial_data, trial_study
from evals.statistics.frontier import on_frontier
from evals.study import Run, Study
from finetune.items import hold_out
from proxytune.errors import UserError
from proxytune.member import Weights, load_members
from proxytune.prepacked import prepack_linear_layers

TUNING = {"method": "full", "learning_rate": 3e-3, "epochs": 1, "batch_size": 8}
LORA = TUNING | {"method": "lora", "rank": 4}
STUDY: dict[str, Any] = {
    "study": "sweeps",
    "worlds": ["tiny"],
    "batch_size": 100,
    "measures": ["task", "knowledge"],
    "direct": "large",
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING},
        "consistent": {"kind": "expert", "tuning": TUNING | {"consistent": 1}},
        "proxy": {"kind": "proxy", "expert": "expert", "alpha": [0.5, 1]},
        "other-proxy": {"kind": "proxy", "expert": "consistent", "alpha": [1]},
        "large": {"kind": "direct", "tuning": TUNING},
        "large-proxy": {"kind": "proxy", "expert": "large", "alpha": [0.5, 1]},
        "lora": {"kind": "direct", "tuning": {"method": "lora", "rank": 4, "epochs": 1, "batch_size": 8}, "sweep": {"learning_rate": [1e-3, 1e-2]}},
        "lora-selected": {"kind": "direct", "tuning": LORA, "sweep": {"learning_rate": [1e-3, 1e-2]}, "select": "best"},
        "matched": {"kind": "direct", "tuning": TUNING, "sweep": {"epochs": [0.5, 1]}, "select": {"match": "proxy@0.5"}},
    },
}
LABELS = ["base", "expert", "consistent", "proxy@0.5", "proxy@1", "other-proxy@1", "large", "large-proxy@0.5", "large-proxy@1"]
LABELS += ["lora@0.001", "lora@0.01", "lora-selected", "matched"]


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Record], Results, Costs]:
    out = place_world(tiny_family, tmp_path_factory.mktemp("sweeps"))
    study = Study.model_validate(STUDY)
    done = run_in_process(study, out)
    return out, {(record.arm, record.frame): record for record in done.records}, summarize(study, done.records, done.costs), done.costs


def test_every_setting_is_a_row(finished: Any) -> None:
    assert list(Study.model_validate(STUDY).arm_settings) == LABELS
    _, records, results, _ = finished
    assert {row["arm"] for row in results.rows} == {entry["arm"] for entry in results.costs} == set(LABELS)
    assert {entry["arm"]: entry["family"] for entry in results.compared["frontier"]}["lora@0.01"] == "lora"
    assert {arm for arm, _ in records} == set(LABELS)


def test_an_expert_as_large_as_the_base_is_the_direct_arm_at_strength_one(finished: Any) -> None:
    _, records, *_ = finished
    for frame in ("task", "knowledge"):
        same, other = (records[arm, frame].items["text"].tolist() for arm in ("large-proxy@1", "large-proxy@0.5"))
        assert same == records["large", frame].items["text"].tolist()
        assert other != same or frame == "knowledge"


def test_two_experts_make_two_proxies(finished: Any) -> None:
    _, records, *_ = finished
    assert records["proxy@1", "task"].items["text"].tolist() != records["other-proxy@1", "task"].items["text"].tolist()


def test_the_selection_is_made_on_held_out_items_and_tuned_with_all(finished: Any) -> None:
    out, records, *_ = finished
    study = Study.model_validate(STUDY)
    data = data_for(study, Path(), Run("tiny", 0), out / "worlds")
    scores = {"lora-selected@0.001": 0.2, "lora-selected@0.01": 0.7, "matched@0.5": 0.1, "matched@1": 0.6, "proxy@0.5": 0.2, "proxy@1": 0.6}

    inner, its = trial_study(study), trial_data(study, data, 0)
    given = {label: score_of(records["base", "task"].items.assign(right=scores.get(label, 0.0))) for label in inner.arm_settings}
    costs: dict[str, Mapping[str, Any]] = {label: {"of": label} for label in inner.arm_settings}
    choices = choose(study, given, costs)
    assert {name: choice.label for name, choice in choices.items()} == {"lora-selected": "lora-selected@0.01", "matched": "matched@0.5"}
    tunings = {name: choice.tuning for name, choice in choices.items() if choice.tuning is not None}
    assert tunings["lora-selected"].learning_rate == 1e-2
    assert tunings["matched"].epochs == 0.5
    assert [cost["of"] for cost in choices["matched"].trials] == ["matched@0.5", "matched@1"]
    assert str(choices["matched"]) == "matched: selected matched@0.5 by validation (matched@0.5 0.100, matched@1 0.600, proxy@0.5 0.200)"
    assert inner.measures == ("task",)
    assert set(inner.arm_settings) == {
        "base",
        "lora-selected@0.001",
        "lora-selected@0.01",
        "matched@0.5",
        "matched@1",
        "proxy@0.5",
        "proxy@1",
        "expert",
    }
    assert not {item.unit for item in its.train} & {item.unit for item in its.test}
    assert len(its.train) + len(its.test) == len(data.train)
    assert len(its.test) == pytest.approx(0.2 * len(data.train), abs=5)
    assert not {item.unit for item in its.test} & {item.unit for item in data.test}


def test_a_selected_setting_is_the_setting_with_that_value(finished: Any) -> None:
    _, records, results, _ = finished
    chosen = records["lora-selected", "task"].items["text"].tolist()
    assert chosen in [records[label, "task"].items["text"].tolist() for label in ("lora@0.001", "lora@0.01")]
    costs = {entry["arm"]: entry for entry in results.costs}
    assert costs["lora-selected"]["runs"] == 3
    assert costs["lora-selected"]["stored_bytes"] == costs["lora@0.01"]["stored_bytes"]
    own, trials = costs["lora@0.01"]["flops"], costs["lora-selected"]["flops"] - costs["lora@0.01"]["flops"]
    assert trials == pytest.approx(2 * 0.8 * own, rel=0.1)


def test_costs_are_those_of_the_cards_and_of_the_weights(finished: Any) -> None:
    out, _, results, _ = finished
    costs = {entry["arm"]: entry for entry in results.costs}
    cards = [json.loads(path.read_text()) for path in (out / "checkpoints").glob("*/tuning.json")]
    assert costs["large"]["flops"] in [card["report"]["flops"] for card in cards]
    assert costs["proxy@1"]["flops"] == costs["expert"]["flops"] < costs["consistent"]["flops"] == costs["other-proxy@1"]["flops"]
    assert costs["base"]["flops"] == costs["base"]["stored_bytes"] == 0
    assert costs["base"]["flops_a_token"] == costs["large"]["flops_a_token"] < costs["lora@0.01"]["flops_a_token"]
    assert costs["proxy@1"]["flops_a_token"] == pytest.approx(costs["base"]["flops_a_token"] + 2 * costs["expert"]["flops_a_token"])
    measured = {entry["arm"]: entry for entry in results.measured}
    assert measured["lora-selected"]["seconds"] > measured["lora@0.01"]["seconds"] > 0
    table = result_tables(results)[-1]
    assert table.title == "Cost"
    assert {"seconds", "TFLOP", "bytes a token, x base"} <= set(table.frame.columns)
    turned = result_tables(replace(results, costs=results.costs[::-1], measured=[]))[-1].frame.set_index("arm")  # whichever arm the study names first
    assert turned.loc["base", "FLOPs a token, x base"] == "1.00"
    assert float(turned.loc["proxy@1", "FLOPs a token, x base"]) > 1
    assert not {"seconds", "peak (MB)", "energy (kJ)"} & set(turned.columns)
    assert "seconds" not in results.json()


def test_a_second_run_ends_with_the_same_results_and_tunes_nothing(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, results, _ = finished
    study = Study.model_validate(STUDY)
    monkeypatch.setattr("evals.arms.tune", lambda *_, **__: pytest.fail("tuned again"))
    again = run_in_process(study, out)
    assert summarize(study, again.records, again.costs) == results


def test_the_frontier_is_what_brute_force_finds() -> None:
    generator = np.random.default_rng(0)
    task, known = generator.integers(0, 6, (2, 12, 40)).astype(float)
    found = on_frontier(task, known)
    for draw in range(40):
        points = list(zip(task[:, draw], known[:, draw], strict=True))
        for place, (x, y) in enumerate(points):
            assert found[place, draw] == (not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points))
    assert found.any(axis=0).all()
    assert not found.all(axis=0).any()


def test_members_on_one_set_of_weights_read_it_once(lora_family: Path) -> None:
    sources = {"expert": Weights(str(lora_family / "small"), lora_family / "polite"), "antiexpert": Weights(str(lora_family / "small"))}
    shared = load_members(sources)
    apart = {name: load_members({name: source})[name] for name, source in sources.items()}
    assert shared["expert"].model is shared["antiexpert"].model
    together, separate = (serving_cost(members, ["expert", "antiexpert"]) for members in (shared, apart))
    assert together["flops_a_token"] == separate["flops_a_token"]
    assert together["bytes_a_token"] < separate["bytes_a_token"]
    expert, alone = (serving_cost(apart, [name])["flops_a_token"] for name in sources)
    assert expert - alone == 2 * sum(tensor.numel() for tensor in load_file(lora_family / "polite" / "adapter_model.safetensors").values())
    before = serving_cost(apart, ["antiexpert"])
    prepack_linear_layers(apart["antiexpert"].model)
    assert serving_cost(apart, ["antiexpert"]) == before


def changed(arm: str, **changes: Any) -> dict[str, Any]:
    return STUDY | {"arms": STUDY["arms"] | {arm: {name: value for name, value in (STUDY["arms"][arm] | changes).items() if value is not None}}}


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (changed("lora", sweep={"learning_rate": [1e-3]}), "two or more different values"),
        (changed("lora", sweep={"learning_rate": [1e-3, 1e-3]}), "two or more different values"),
        (changed("lora", sweep={"learning_rate": [1e-3, 1e-2], "epochs": [1, 2]}), "one setting"),
        (changed("lora", sweep={"learning_rate": [1e-3, -1]}), "greater than 0"),
        (changed("lora", tuning=LORA, sweep={"rank": [4, 2.5]}), "valid integer"),
        (changed("matched", sweep=None), "select needs a sweep"),
        (changed("matched", select={"match": "nobody"}), "arms.matched.select.match: it must be one of expert, .*, not 'nobody'"),
        (changed("matched", select={"match": "base"}), "arms.matched.select.match: it must be one of .*, not 'base'"),
        (changed("matched", select="lora-selected"), "should be 'best'"),
        (changed("proxy", expert="base"), "arms.proxy: its expert must name one arm"),
        (changed("proxy", expert=None), "arms.proxy: its expert must name one arm"),
        (STUDY | {"direct": "lora"}, "with a sweep: arm@value"),
        (changed("large", kind="expert", tuning=TUNING) | {"direct": "nothing"}, "direct must name"),
    ],
)
def test_contradictions_are_named(study: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study.model_validate(study)


def test_too_few_items_to_select_on_are_an_error(finished: Any) -> None:
    data = data_for(Study.model_validate(STUDY), Path(), Run("tiny", 0), finished[0] / "worlds")
    with pytest.raises(UserError, match="too few to hold any out"):
        hold_out([item for item in data.train if item.unit == data.train[0].unit], 0.2, 0)
    assert tuning_summary(Weights("nothing-there")) is None


def test_contrasts_are_paired_differences_and_tested_where_items_are_independent(finished: Any) -> None:
    _, records, results, costs = finished
    study = Study.model_validate(STUDY | {"contrasts": [["proxy@1", "base"], ["large", "proxy@1"], ["base", "base"]]})
    found = summarize(study, list(records.values()), costs)
    assert found.rows == results.rows
    task = {entry["arm"]: entry for entry in found.compared["contrasts"] if entry["measure"] == "task"}
    values = {row["arm"]: row["value"] for row in results.rows if row["measure"] == "task"}
    assert task["proxy@1"]["value"] == pytest.approx(values["proxy@1"] - values["base"], abs=1e-6)
    assert (task["base"]["value"], task["base"]["low"], task["base"]["high"]) == (0, 0, 0)
    assert all(entry["p"] is None for entry in found.compared["contrasts"])  # three items a person
    alone = [replace(record, items=record.items.assign(unit=[str(place) for place in range(len(record.items))])) for record in records.values()]
    tested = {entry["arm"]: entry for entry in summarize(study, alone, costs).compared["contrasts"] if entry["measure"] == "task"}
    exposed = [records[arm, "task"].items.query("popularity != 0")["right"].to_numpy(bool) for arm in ("large", "proxy@1")]
    gained, lost = int((exposed[0] & ~exposed[1]).sum()), int((~exposed[0] & exposed[1]).sum())
    assert gained + lost > 0
    assert tested["large"]["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue, abs=1e-6)
    assert tested["large"]["p_holm"] >= tested["large"]["p"]
    assert tested["base"]["p"] == 1
    assert "p, task" in next(table for table in result_tables(summarize(study, alone, costs)) if table.title == "Contrasts").frame.columns


def test_a_study_under_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a study starts its own processes; start it without torchrun"):
        run_in_process(Study.model_validate(STUDY), tmp_path)
