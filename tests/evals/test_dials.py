"""Arms with dials: their points, what is chosen among them and on which items, the frontier, and what it all costs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import place_world, run_in_process
from safetensors.torch import load_file
from scipy.stats import binomtest

from evals.arms import tuning_summary
from evals.data import material_for
from evals.display.render import make_tables, render
from evals.records import Record
from evals.results.costs import measured_costs
from evals.results.summary import summarize
from evals.running.costs import serving_cost
from evals.selection import choose_dials
from evals.statistics.frontier import on_frontier
from evals.study import Study
from finetune.items import hold_out
from proxytune.errors import UserError
from proxytune.member import Weights, load_members
from proxytune.prepacked import prepack_linear_layers

TUNING = {"method": "full", "learning_rate": 3e-3, "epochs": 1, "batch_size": 8}
LORA = TUNING | {"method": "lora", "rank": 4}
STUDY: dict[str, Any] = {
    "study": "dials",
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
        "lora-chosen": {"kind": "direct", "tuning": LORA, "sweep": {"learning_rate": [1e-3, 1e-2]}, "select": "best"},
        "matched": {"kind": "direct", "tuning": TUNING, "sweep": {"epochs": [0.5, 1]}, "select": {"match": "proxy@0.5"}},
    },
}
LABELS = ["base", "expert", "consistent", "proxy@0.5", "proxy@1", "other-proxy@1", "large", "large-proxy@0.5", "large-proxy@1"]
LABELS += ["lora@0.001", "lora@0.01", "lora-chosen", "matched"]


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Record], dict[str, Any]]:
    out = place_world(tiny_family, tmp_path_factory.mktemp("dials"))
    study = Study.model_validate(STUDY)
    records = run_in_process(study, out)
    return out, {(record.arm, record.measurement): record for record in records}, summarize(study, records)


def test_every_point_is_a_row(finished: Any) -> None:
    assert list(Study.model_validate(STUDY).points) == LABELS
    _, records, results = finished
    assert {row["arm"] for row in results["rows"]} == {entry["arm"] for entry in results["costs"]} == set(LABELS)
    assert {entry["arm"]: entry["family"] for entry in results["frontier"]}["lora@0.01"] == "lora"
    assert {arm for arm, _ in records} == set(LABELS)


def test_an_expert_as_large_as_the_base_is_the_direct_arm_at_strength_one(finished: Any) -> None:
    _, records, _ = finished
    for measurement in ("task", "statement"):
        same, other = (records[arm, measurement].items["text"].tolist() for arm in ("large-proxy@1", "large-proxy@0.5"))
        assert same == records["large", measurement].items["text"].tolist()
        assert other != same or measurement == "statement"


def test_two_experts_make_two_proxies(finished: Any) -> None:
    _, records, _ = finished
    assert records["proxy@1", "task"].items["text"].tolist() != records["other-proxy@1", "task"].items["text"].tolist()


def test_the_choice_is_made_on_held_out_items_and_tuned_with_all(finished: Any, tiny_family: Path) -> None:
    out, records, _ = finished
    study = Study.model_validate(STUDY)
    material = material_for(study, Path(), 0, out / "worlds")
    seen: list[tuple[Study, Any]] = []
    scores = {"lora-chosen@0.001": 0.2, "lora-chosen@0.01": 0.7, "matched@0.5": 0.1, "matched@1": 0.6, "proxy@0.5": 0.2, "proxy@1": 0.6}

    def measured(inner: Study, its: Any) -> list[Record]:
        seen.append((inner, its))
        frames = {label: records["base", "task"].items.assign(right=scores.get(label, 0.0)) for label in inner.points}
        return [Record(label, "task", 0, "", frame, {}) for label, frame in frames.items()]

    decided, choices = choose_dials(study, material, 0, measured)
    assert {name: choice.label for name, choice in choices.items()} == {"lora-chosen": "lora-chosen@0.01", "matched": "matched@0.5"}
    assert decided.arms["lora-chosen"].tuning.learning_rate == 1e-2
    assert decided.arms["matched"].tuning.epochs == 0.5
    (inner, its), *_ = seen
    assert set(inner.points) == {"base", "lora-chosen@0.001", "lora-chosen@0.01", "matched@0.5", "matched@1", "proxy@0.5", "proxy@1", "expert"}
    assert not {item.unit for item in its.train} & {item.unit for item in its.test}
    assert len(its.train) + len(its.test) == len(material.train)
    assert len(its.test) == pytest.approx(0.2 * len(material.train), abs=5)
    assert not {item.unit for item in its.test} & {item.unit for item in material.test}


def test_a_chosen_point_is_the_point_with_that_value(finished: Any) -> None:
    _, records, results = finished
    chosen = records["lora-chosen", "task"].items["text"].tolist()
    assert chosen in [records[label, "task"].items["text"].tolist() for label in ("lora@0.001", "lora@0.01")]
    costs = {entry["arm"]: entry for entry in results["costs"]}
    assert costs["lora-chosen"]["runs"] == 3
    assert costs["lora-chosen"]["stored_bytes"] == costs["lora@0.01"]["stored_bytes"]
    own, trials = costs["lora@0.01"]["flops"], costs["lora-chosen"]["flops"] - costs["lora@0.01"]["flops"]
    assert trials == pytest.approx(2 * 0.8 * own, rel=0.1)


def test_costs_are_those_of_the_cards_and_of_the_weights(finished: Any) -> None:
    out, records, results = finished
    costs = {entry["arm"]: entry for entry in results["costs"]}
    cards = [json.loads(path.read_text()) for path in (out / "checkpoints").glob("*/tuning.json")]
    assert costs["large"]["flops"] in [card["report"]["flops"] for card in cards]
    assert costs["proxy@1"]["flops"] == costs["expert"]["flops"] < costs["consistent"]["flops"] == costs["other-proxy@1"]["flops"]
    assert costs["base"]["flops"] == costs["base"]["stored_bytes"] == 0
    assert costs["base"]["flops_a_token"] == costs["large"]["flops_a_token"] < costs["lora@0.01"]["flops_a_token"]
    assert costs["proxy@1"]["flops_a_token"] == pytest.approx(costs["base"]["flops_a_token"] + 2 * costs["expert"]["flops_a_token"])
    measured = {entry["arm"]: entry for entry in measured_costs(Study.model_validate(STUDY), list(records.values()))}
    assert measured["lora-chosen"]["seconds"] > measured["lora@0.01"]["seconds"] > 0
    table = make_tables(results, list(measured.values()))[-1]
    assert table.title == "Cost"
    assert {"seconds", "TFLOP", "bytes a token, x base"} <= set(table.frame.columns)
    turned = make_tables(results | {"costs": results["costs"][::-1]})[-1].frame.set_index("arm")  # whichever arm the study names first
    assert turned.loc["base", "FLOPs a token, x base"] == "1.00"
    assert float(turned.loc["proxy@1", "FLOPs a token, x base"]) > 1
    assert "seconds" not in render(results, "json")


def test_a_second_run_ends_with_the_same_results_and_tunes_nothing(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, results = finished
    study = Study.model_validate(STUDY)
    monkeypatch.setattr("evals.arms.tune", lambda *_, **__: pytest.fail("tuned again"))
    assert summarize(study, run_in_process(study, out)) == results


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
        (changed("lora", dial={"learning_rate": [1e-3]}), "two or more different values"),
        (changed("lora", dial={"learning_rate": [1e-3, 1e-3]}), "two or more different values"),
        (changed("lora", dial={"learning_rate": [1e-3, 1e-2], "epochs": [1, 2]}), "one setting"),
        (changed("lora", dial={"learning_rate": [1e-3, -1]}), "greater than 0"),
        (changed("lora", tuning=LORA, dial={"rank": [4, 2.5]}), "valid integer"),
        (changed("matched", dial=None), "choose needs a dial"),
        (changed("matched", choose="lora-chosen"), "arms.matched.choose: it must be best or one of .*, not 'lora-chosen'"),
        (changed("proxy", expert="lora"), "arms.proxy: its expert must name one arm"),
        (changed("proxy", expert=None), "arms.proxy: its expert must name one arm"),
        (STUDY | {"direct": "lora"}, "with a dial: arm@value"),
        (changed("large", kind="expert", tuning=TUNING) | {"direct": "nothing"}, "direct must name"),
    ],
)
def test_contradictions_are_named(study: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Study.model_validate(study)


def test_too_few_items_to_choose_on_are_an_error(finished: Any) -> None:
    material = material_for(Study.model_validate(STUDY), Path(), 0, finished[0] / "worlds")
    with pytest.raises(UserError, match="too few to hold any out"):
        hold_out([item for item in material.train if item.unit == material.train[0].unit], 0.2, 0)
    assert tuning_summary(Weights("nothing-there")) is None


def test_contrasts_are_paired_differences_and_tested_where_items_are_independent(finished: Any) -> None:
    _, records, results = finished
    study = Study.model_validate(STUDY | {"contrasts": [["proxy@1", "base"], ["large", "proxy@1"], ["base", "base"]]})
    found = summarize(study, list(records.values()))
    assert found["rows"] == results["rows"]
    task = {entry["arm"]: entry for entry in found["contrasts"] if entry["measure"] == "task"}
    values = {row["arm"]: row["value"] for row in results["rows"] if row["measure"] == "task"}
    assert task["proxy@1"]["value"] == pytest.approx(values["proxy@1"] - values["base"], abs=1e-6)
    assert (task["base"]["value"], task["base"]["low"], task["base"]["high"]) == (0, 0, 0)
    assert all(entry["p"] is None for entry in found["contrasts"])  # three items a person
    alone = [replace(record, items=record.items.assign(unit=[str(place) for place in range(len(record.items))])) for record in records.values()]
    tested = {entry["arm"]: entry for entry in summarize(study, alone)["contrasts"] if entry["measure"] == "task"}
    exposed = [records[arm, "task"].items.query("popularity != 0")["right"].to_numpy(bool) for arm in ("large", "proxy@1")]
    gained, lost = int((exposed[0] & ~exposed[1]).sum()), int((~exposed[0] & exposed[1]).sum())
    assert gained + lost > 0
    assert tested["large"]["p"] == pytest.approx(binomtest(gained, gained + lost).pvalue, abs=1e-6)
    assert tested["large"]["p_holm"] >= tested["large"]["p"]
    assert tested["base"]["p"] == 1
    assert "p, task" in next(table for table in make_tables(summarize(study, alone)) if table.title == "Contrasts").frame.columns


def test_a_study_under_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a study runs in one process; start it without torchrun"):
        run_in_process(Study.model_validate(STUDY), tmp_path)
