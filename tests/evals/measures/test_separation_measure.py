"""Density at names as a study has it: planted in records, read from tiny models, and without any file from the command line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import Unbroken, make_model, make_tokenizer, run_command
from planted_names import ARMS, GROUPS, records_of, study_of

from evals.data import StudyData
from evals.display.drawing import draw
from evals.entities import CITIES, Entities, entities_of
from evals.measures.density import Density, DensityFound
from evals.measures.inputs import Inputs
from evals.measures.names import Names
from evals.measures.separation import Separated
from evals.measures.subjects import Pair
from evals.results.header import header_of
from evals.results.recorded import Recorded
from probes.density import spread
from probes.internals.activations import layers_of
from probes.knowledge.entities import Entity, carry, length_in_tokens, matched_in_tokens
from proxytune.errors import UserError
from proxytune.member import Member


def found(shifts: dict[str, dict[str, float]], seeds: int = 1, confounded: bool = False) -> DensityFound:
    study = study_of(seeds=list(range(seeds)))
    return Density().summarize(Recorded(study, records_of(shifts, seeds, confounded)), study.settings_of("density"))


def one(summary: DensityFound, arm: str, groups: str, site: str, place: str = "entity", winsorised: bool = True) -> Separated:
    (row,) = [
        row
        for row in summary.auroc
        if (row.arm, row.groups, row.site, row.place, row.winsorised, row.metric) == (arm, groups, site, place, winsorised, "effective_rank")
    ]
    return row


PLANTED = {"residual": 1.5, "neurons": -1.5}


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_is_planted_is_found_with_its_sign_and_layer_and_nothing_else_is(seeds: int) -> None:
    summary = found({"base": PLANTED, "full": {}}, seeds)
    for site, sign in (("residual", 1), ("neurons", -1)):
        row = one(summary, "base", "big/fabricated", site)
        truth = 0.5 + sign * (0.5 * math.erf(1.5 / 2))
        assert row.low < row.auroc < row.high
        assert row.auroc == pytest.approx(truth, abs=0.09)
        assert not row.null_low < row.auroc < row.null_high
        assert row.layer in (3, 4)
        assert row.given_surprisal == pytest.approx(truth, abs=0.12)
        half = one(summary, "base", "small/fabricated", site)
        assert abs(half.auroc - 0.5) < abs(row.auroc - 0.5)
    nowhere = [("base", "attention", "entity"), ("base", "residual", "last"), ("full", "residual", "entity"), ("untrained", "neurons", "entity")]
    for arm, site, place in nowhere:
        row = one(summary, arm, "big/fabricated", site, place)
        assert row.null_low < row.auroc < row.null_high, (arm, site, place)
    correlations = {(row.arm, row.site): row.correlation for row in summary.auroc_graded}
    assert correlations["base", "residual"].low > 0 > correlations["base", "neurons"].high
    assert not correlations["untrained", "residual"].excludes_zero()


def test_what_only_follows_surprisal_is_gone_given_surprisal() -> None:
    row = one(found({"base": {"residual": 1.5}}, seeds=3, confounded=True), "base", "big/fabricated", "residual")
    assert row.auroc > row.null_high
    assert row.given_low < 0.5 < row.given_high
    assert row.given_surprisal < row.auroc - 0.1


def test_a_sign_that_other_layers_reverse_is_said_to_be_so() -> None:
    records = records_of({"base": {"residual": 3.0, "neurons": -3.0}})
    for record in records:
        if record.frame == "spread":
            late = (record.items["site"] == "neurons") & (record.items["state"] == 6) & (record.items["place"] == "entity")
            record.items.loc[late, "value"] += np.tile(np.repeat([3.0, 1.5, 0.0], 40), late.sum() // 120)
    study = study_of()
    summary = Density().summarize(Recorded(study, records), study.settings_of("density"))
    shown = Density().tables(summary, header_of(study))[0].frame.set_index("groups and site")["predicted"]
    assert shown["big/fabricated, neurons winsorised"] == "below .5: yes; reversed in other layers"
    assert shown["big/fabricated, residual winsorised"] == "above .5: yes"


def test_each_world_stands_by_itself_and_the_dose_and_its_emergence_are_shown(tmp_path: Path) -> None:
    arms = ARMS | {"full": None} | {f"step-{step}": {"kind": "direct", "path": f"checkpoints/step-{step}"} for step in (0, 100)}
    study = study_of(worlds=["recall", "later"], models=None, data=None, seeds=[0], arms={name: arm for name, arm in arms.items() if arm})
    exposures = {"100": 1.0, "30": 0.7, "3": 0.3, "0": 0.0}
    shifts: dict[str, dict[str, float]] = {"base": {"neurons": -2.0}, "step-0": {}, "step-100": {"neurons": -1.0}}
    records = records_of(shifts, groups=exposures, world="recall") + records_of({arm: {} for arm in shifts}, groups=exposures, world="later")
    summary, header = Density().summarize(Recorded(study, records), study.settings_of("density")), header_of(study)
    alone = study.model_copy(update={"worlds": ("recall",)})
    of_one = Density().summarize(Recorded(alone, [record for record in records if record.world == "recall"]), study.settings_of("density"))
    assert [row for row in summary.auroc if row.world == "recall"] == list(of_one.auroc)
    dose = next(table for table in Density().tables(summary, header) if "by exposure" in table.title).frame.set_index("where")
    assert list(dose) == ["3", "30", "100"]
    values = {where: [float(cell.split()[0]) for cell in row] for where, *row in dose.itertuples()}
    of_recall, of_later = (values[f"{world}: neurons, effective rank, at the name"] for world in ("recall", "later"))
    assert of_recall[0] > of_recall[1] > of_recall[2]
    assert of_recall[2] < 0.15
    assert min(of_later) > 0.35
    (chart,) = [chart for chart in Density().charts(summary, header) if chart.name == "density-emergence"]
    assert [tick for _, tick in chart.panels[0].x.ticks] == ["0", "100", "end"]
    line = next(series for series in next(panel for panel in chart.panels if panel.title == "recall: neurons").marks if series.label == "100")
    begun, half, end = (value.value for value in line.y)
    assert begun > half + 0.1 > end + 0.2
    (file,) = draw(chart, tmp_path)
    assert file.stat().st_size > 10_000
    assert not [table.title for table in Density().tables(found({"base": {}}), header_of(study_of())) if "by exposure" in table.title]


def test_the_change_by_arm_is_paired_and_exactly_zero_for_a_copy() -> None:
    summary = found({"base": PLANTED, "full": {"residual": 0.75, "neurons": -1.5}})
    changes = {(row.site, row.block): row.change for row in summary.auroc_changes if row.groups == "big/fabricated"}
    assert changes["residual", "middle"].high < 0  # eroded
    assert all(
        (value.value, value.low, value.high) == (0, 0, 0) for (site, block), value in changes.items() if (site, block) != ("residual", "middle")
    )
    copy = found({"base": PLANTED, "full": PLANTED})
    assert {(row.change.value, row.change.low, row.change.high) for row in copy.auroc_changes} == {(0, 0, 0)}
    assert [row.auroc for row in copy.auroc if row.arm == "full"] == [
        row.auroc for row in copy.auroc if row.arm == "base" and row.metric == "effective_rank"
    ]


def test_the_answer_comes_first_with_what_was_predicted(tmp_path: Path) -> None:
    summary, header = found({"base": PLANTED, "full": {}}), header_of(study_of())
    first, second, third = Density().tables(summary, header)
    assert third.title == "Does tuning erode density at names?"
    shown = first.frame.set_index("groups and site")
    assert shown["predicted"]["big/fabricated, residual winsorised"] == "above .5: yes"
    assert shown["predicted"]["big/fabricated, neurons winsorised"] == "below .5: yes"
    assert shown["untrained"].astype(float).between(0.35, 0.65).all()
    assert list(second.frame["arm"]) == ["base", "full"]
    reversed_ = Density().tables(found({"base": {"residual": -1.5, "neurons": 1.5}}), header)[0].frame.set_index("groups and site")
    assert "yes" not in "".join(reversed_["predicted"])
    assert "reversed" not in "".join(shown["predicted"])
    (chart,) = Density().charts(summary, header)
    (path,) = draw(chart, tmp_path)
    assert path.name == "density-names.png" and path.stat().st_size > 5_000


# --- entities ---


def entities(**counts: tuple[int, ...]) -> tuple[list[Entity], list[int]]:
    """So many names of each group at 1, 2, … tokens."""
    rows = [
        (Entity(f"{group}-{length}-{number}", group, 0.0), length)
        for group, of_lengths in counts.items()
        for length, count in enumerate(of_lengths, start=1)
        for number in range(count)
    ]
    return [entity for entity, _ in rows], [length for _, length in rows]


def test_groups_are_matched_in_tokens_at_the_lengths_that_have_most() -> None:
    chosen = matched_in_tokens(*entities(big=(90, 80, 30, 19), made=(0, 70, 45, 500)))
    counts = pd.Series([tuple(entity.name.split("-")[:2]) for entity in chosen]).value_counts()
    assert dict(counts) == {("big", "2"): 60, ("made", "2"): 60, ("big", "3"): 30, ("made", "3"): 30}
    assert chosen == matched_in_tokens(*entities(big=(90, 80, 30, 19), made=(0, 70, 45, 500)))
    assert chosen != matched_in_tokens(*entities(big=(90, 80, 30, 19), made=(0, 70, 45, 500)), seed=1)


def test_too_few_names_are_refused_with_their_numbers() -> None:
    with pytest.raises(UserError, match=r"at least 20 of each; the best length, 2, has 19 big, 70 made; give more names"):
        matched_in_tokens(*entities(big=(90, 19), made=(0, 70)))


def test_a_name_that_the_tokenizer_cannot_spell_has_no_length() -> None:
    tokenizer = make_tokenizer()
    assert [length_in_tokens(tokenizer, name, "w3 {name} w4") for name in ("w7 w8", "Paris")] == [2, 0]
    carried = carry(tokenizer, "w7 w8", "w3 w5 {name} w4")
    assert (carried.ids, carried.name_ids, carried.last) == ([3, 5, 7, 8, 4], [7, 8], 3)


def test_the_shipped_cities_are_whole() -> None:
    cities = entities_of(CITIES, Path()).all
    assert list(dict.fromkeys(city.group for city in cities)) == list(GROUPS)
    assert len({city.name for city in cities}) == len(cities) == 3400
    assert {city.popularity for city in cities if city.group == "fabricated"} == {0.0}
    assert all(15_000 <= city.popularity <= 20_000 for city in cities if city.group == "small")
    assert min(city.popularity for city in cities if city.group == "big") > 1_000_000


def test_a_file_of_entities_has_groups_or_popularity(tmp_path: Path) -> None:
    def read(*lines: Any) -> Entities:
        (tmp_path / "entities.jsonl").write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
        return entities_of("entities.jsonl", tmp_path)

    assert read({"name": "A", "group": "known"}, {"name": "B", "group": "new"}).all == [Entity("A", "known", 0.0), Entity("B", "new", -1.0)]
    by_popularity = read({"name": "A", "popularity": 0}, {"name": "B", "popularity": 7}).all
    assert [(entity.name, entity.group) for entity in by_popularity] == [("B", "7"), ("A", "0")]
    for lines, message in (
        (({"name": "A"}, {"name": "B"}), "needs a group, or every line a popularity"),
        (({"name": "A", "group": "x"}, {"name": "A", "group": "y"}), "'A' stands twice"),
        (({"name": "A", "group": "x"},), "two groups or more, not 1"),
        (("[1]\n",), r"line 1 of .* must be an object"),
    ):
        with pytest.raises(UserError, match=message):
            read(*lines)


# --- readings ---


def test_the_reading_is_the_spread_of_the_models_own_states_averaged_over_sentences() -> None:
    model, tokenizer = make_model(layers=3), make_tokenizer()
    all_ = [Entity(f"w{10 + number} w{20 + number}", GROUPS[number % 2], float(number)) for number in range(6)]
    carriers = ("w3 {name} w4", "w5 w6 {name} w7 w8")
    data = StudyData("base", None, [], [], [], "{question}", "", 12, False, entities=Entities(all_, carriers, drawn=False))
    inputs = Inputs(study_of(batch_size=5), data, 0)
    inputs.__dict__["tokenizer"] = tokenizer
    frames = Names().read(Pair("base", Member(model, tokenizer)), inputs, lambda _: None)["base"]
    assert set(frames) == {"names", "spread", "spread_untrained"}
    kept: list[Any] = []
    for layer in layers_of(model):
        layer.mlp.down_proj.register_forward_hook(lambda _, given, output: kept.append(given[0]))
    frame, total = frames["spread"], []
    model.requires_grad_(False)
    for sentence in (f"w3 {all_[4].name} w4", f"w5 w6 {all_[4].name} w7 w8"):
        kept.clear()
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        logits = model(ids).logits[0].double().log_softmax(-1)
        start = sentence.split().index("w14")
        total.append((float(spread(kept[1][0])["effective_rank", "winsorised"][start + 1]), float(logits[start - 1, 14] + logits[start, 24])))
    rows = frame[(frame["metric"] == "effective_rank") & (frame["cut"] == "winsorised") & (frame["site"] == "neurons") & (frame["place"] == "entity")]
    assert rows[rows["state"] == 2]["value"].iloc[4] == pytest.approx(np.mean([value for value, _ in total]), rel=1e-5)
    assert frames["names"]["log_probability"][4] == pytest.approx(np.mean([value for _, value in total]), rel=1e-5)
    assert frame["value"].notna().all()


def test_a_world_reads_its_people_against_names_that_are_no_ones(unbroken: Unbroken) -> None:
    (names,) = [record.items for record in unbroken.finished.records if (record.arm, record.frame) == ("base", "names")]
    assert list(dict.fromkeys(names["group"])) == ["30", "3", "0"]
    assert (names["group"].astype(float) == names["popularity"]).all()
    assert (names["group"] == "0").sum() > (names["group"] == "30").sum()
    rows = unbroken.results.measures["density"].auroc
    assert {row.groups for row in rows} == {"30/0", "3/0", "30/3"}
    assert {row.arm for row in rows} == {"base", "full", "lora", "untrained"}


def test_models_whose_tokenizer_cannot_spell_the_cities_are_refused_by_name(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    done = run_command("probe", "density", tmp_path / "base", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("proxytune: error: data.entities: names of every group are compared at equal lengths")
    refused = run_command("probe", "lens", tmp_path / "base", "--out", tmp_path / "out")
    assert "--knowledge" in refused.stderr
