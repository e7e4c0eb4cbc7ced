from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_summaries import HEADER, LAYERS, STATES, changes, density, exposures, only, shown, some
from matplotlib.figure import Figure

from evals.display import drawing
from evals.display.cells import Table
from evals.measures.density import BucketChange, Density, DensityFound, Null, Rank, _bucket_changes
from evals.measures.long import long_frame
from evals.records import Record
from evals.results.recorded import Recorded
from evals.statistics.value import UNKNOWN, Value
from evals.study import Study
from probes.knowledge.familiarity import familiarity

TUNING = {"method": "full", "learning_rate": 1e-3, "epochs": 1, "batch_size": 8}
POPULARITY = np.repeat([0.0, 3.0, 30.0], 10)


def tables(summary: DensityFound) -> list[Table]:
    return Density().tables(summary, HEADER)


def test_density_by_exposure_is_of_the_last_layer_after_the_final_norm_and_starts_untrained() -> None:
    rows = exposures(lambda site, number: some(0.0072 if (site, number) == ("normed", LAYERS) else 0.5))
    table = only(tables(density(exposure=rows)), "How density")
    assert list(table.frame["model"]) == ["untrained", "base", "full"]
    assert shown(table, "full")["E5: contrast"] == shown(table, "base")["effective rank: contrast"] == "7.2 [5.2, 9.2]"
    assert shown(table, "full")["E5: correlation"] == "3.4 [3.2, 3.6]"
    assert shown(table, "full")["E5: partial correlation"] == "n/a"
    assert "layer 4" in table.title and "thousandths" in table.note and "hundredths" in table.note


def test_erosion_has_every_block_beside_its_null_and_says_what_cannot_change() -> None:
    table = only(tables(density(changes=changes())), "Erosion")
    full = shown(table, "full")
    assert (full["low"], full["middle"], full["low, beyond random"]) == ("-4.2 [-6.2, -2.2]", "1.0 [-1.0, 3.0]", "-7.3 [-9.3, -5.3]")
    assert list(table.frame["arm"]) == ["base", "proxy@1", "full", "lora"]  # an expert is another model
    assert {arm for arm in table.frame["arm"] if shown(table, arm)["low"] == "unchanged by construction"} == {"base", "proxy@1"}
    assert "120 of 150" in table.note
    assert "as they are" in only(tables(density(changes=changes(matched=0))), "Erosion").note


def test_layers_stand_beside_their_nulls_and_of_many_some() -> None:
    def with_states(count: int) -> DensityFound:
        nulls = [
            Null(metric, state, Value(0.5 + state), Value(0.4), Value(0.04), UNKNOWN) for metric in ("e5", "effective_rank") for state in range(count)
        ]
        return density(nulls=nulls, ranks=[Rank("base", "both", state, some(10.0 + state)) for state in range(count)])

    beside, rankme = tables(with_states(3))
    last = beside.frame.set_index("after layer").loc["2"]
    assert (last["E5: base"], last["E5: Gaussian (sd)"], last["effective rank: untrained"]) == ("2.500", "0.400 (0.040)", "n/a")
    assert rankme.frame.set_index("arm").loc["base", "layer 1"].startswith("11.0")
    many, _ = tables(with_states(31))
    assert list(many.frame["after layer"]) == ["0", "7", "15", "23", "30"]
    assert "some layers" in many.note.lower()
    assert "some layers" not in beside.note.lower()


# --- change by layer and exposure ---


def make_study(*tuned: str, seeds: tuple[int, ...] = (0,)) -> Study:
    arms = {"base": {"kind": "base"}} | {arm: {"kind": "direct", "tuning": TUNING} for arm in tuned}
    return Study.model_validate({"study": "small", "worlds": ["tiny"], "seeds": list(seeds), "arms": arms, "measures": ["density"]})


def states_records(arm: str, seed: int, changed: np.ndarray | None = None) -> list[Record]:
    """Two items of every unit; the base's densities are the same for every arm, `changed` [items, states] is added."""
    generator = np.random.default_rng([7, seed])
    values = generator.normal(0.5, 0.02, (len(POPULARITY), STATES)) + (0 if changed is None else changed)
    names = {"metric": "effective_rank", "site": "residual", "place": "last"}
    states = long_frame([(names | {"state": number}, values[:, number]) for number in range(STATES)])
    prompts = pd.DataFrame({"unit": [f"u{place // 2}" for place in range(len(POPULARITY))], "popularity": POPULARITY})
    return [Record(arm, "states", "tiny", seed, "", states), Record(arm, "prompts", "tiny", seed, "", prompts)]


def bucket_changes(study: Study, records: list[Record], arm: str) -> list[BucketChange]:
    return list(_bucket_changes(Recorded(study, records), arm))


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_heat_map_is_the_mean_change_of_each_bucket(seeds: tuple[int, ...]) -> None:
    changed = {seed: np.random.default_rng([9, seed]).normal(0, 0.01, (30, STATES)) for seed in seeds}
    records = [record for seed in seeds for record in states_records("base", seed) + states_records("full", seed, changed[seed])]
    found = {(row.state, row.bucket): row.change.value for row in bucket_changes(make_study("full", seeds=seeds), records, "full")}
    buckets = familiarity(POPULARITY.tolist()).buckets
    assert list(dict.fromkeys(bucket for _, bucket in found)) == ["k=0", "k=3", "k=30"]
    assert len(found) == 3 * STATES
    for (number, bucket), value in found.items():
        slow = [np.mean([changed[seed][item, number] for item in range(30) if buckets[item] == bucket]) for seed in seeds]
        assert value == pytest.approx(np.mean(slow), abs=1e-12)


def test_a_planted_change_is_seen_where_it_is_and_identical_models_change_by_exactly_zero() -> None:
    planted = np.zeros((30, STATES))
    planted[20:, 1] = -0.02
    rows = bucket_changes(make_study("full"), states_records("base", 0) + states_records("full", 0, planted), "full")
    (certain,) = [row for row in rows if row.change.excludes_zero()]
    assert (certain.state, certain.bucket) == (1, "k=30")
    assert certain.change.value == pytest.approx(-0.02)
    same = bucket_changes(make_study("full"), states_records("base", 0) + states_records("full", 0), "full")
    assert len(same) == 3 * STATES
    assert not any(row.change.value or row.change.excludes_zero() for row in same)


def test_the_heat_maps_share_one_scale_that_is_centred_on_zero_and_state_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    strong = np.zeros((30, STATES))
    strong[:10, 3] = 0.05
    records = states_records("base", 0) + states_records("full", 0, 0.1 * strong) + states_records("lora", 0, -strong)
    study = make_study("full", "lora")
    summary = density(buckets=[row for arm in ("full", "lora") for row in bucket_changes(study, records, arm)])
    (chart,) = Density().charts(summary, HEADER)
    assert [path.name for path in drawing.draw(chart, tmp_path)] == ["density-change.png"]
    (figure,) = kept
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(panels) == {"full", "lora"}
    assert {axes.images[0].get_clim() for axes in panels.values()} == {(-50.0, 50.0)}
    texts = {arm: {text.get_position(): text.get_text() for text in axes.texts} for arm, axes in panels.items()}
    assert (texts["full"][0, 3], texts["lora"][0, 3], texts["lora"][1, 3]) == ("5.0", "-50.0", "0.0")
