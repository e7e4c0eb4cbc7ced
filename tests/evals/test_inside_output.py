"""Tables and figures of what tuning did inside: they say what was measured, in the unit they name, and nothing that was not."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evals.findings import Found
from evals.inside_figures import draw_inside, relearning_curves
from evals.inside_tables import inside_tables
from matplotlib.figure import Figure

from evals import inside_figures
from evals.display.cells import Table, cell
from evals.display.drawing import PANELS
from evals.display.render import draw, make_tables
from evals.measures.density import density_change
from evals.records import Record
from evals.study import Study
from probes.internals.blocks import BLOCKS
from probes.knowledge.familiarity import familiarity
from probes.verdict import RULE, measured, state

KINDS = {"base": "base", "expert": "expert", "proxy@1": "proxy", "full": "direct", "lora": "direct"}
SECTIONS = ("exposure", "erosion", "law", "drift", "lens", "restoration", "patching", "recoverability", "verdicts")
STATES, LAYERS = 5, 4


def some(value: float | None, width: float = 0.002) -> dict[str, float | None]:
    """A value with its interval; none of a None."""
    return {"value": value, "low": None if value is None else value - width, "high": None if value is None else value + width}


def exposure_rows() -> list[dict[str, Any]]:
    names = [
        (arm, metric, site, number)
        for arm in ("untrained", "base", "full")
        for metric in ("e5", "effective_rank")
        for site in ("residual", "normed")
        for number in range(STATES)
    ]
    return [
        {"arm": arm, "metric": metric, "site": site, "place": "last", "state": number}
        | {"contrast": some(0.0012 * number), "slope": some(0.034), "partial": some(None), "something new": 1}
        for arm, metric, site, number in names
    ]


def erosion_rows(matched: int = 120) -> list[dict[str, Any]]:
    rows = []
    for arm in ("full", "lora"):
        for site, place in (("residual", "last"), ("residual", "subject"), ("rotated", "last")):
            for block, value in (("low", -0.0042), ("middle", 0.001), ("high", 0.002)):
                row = {"arm": arm, "block": block, "site": site, "place": place} | some(value)
                rows.append(row | {"random": some(0.0), "less_random": some(value - 0.0031), "n": 150, "matched": matched})
    return rows


def drift_rows() -> list[dict[str, Any]]:
    values = {"relative_change": 0.0625, "stable_rank": None, "cka/familiar": 0.987, "cosine/familiar": 0.91, "cka/unfamiliar": 0.5}
    return [
        {"arm": "full", "block": block, "what": what, "value": value, "low": None, "high": None} for block in BLOCKS for what, value in values.items()
    ]


def lens_rows() -> list[dict[str, Any]]:
    lenses = {"base": ("plain", "base"), "full": ("plain", "base", "own")}
    rows = [
        {"arm": arm, "lens": lens, "what": "share", "state": number} | some(0.1 * number + (0.01 if lens == "base" else 0.0))
        for arm, shown in lenses.items()
        for lens in shown
        for number in range(STATES)
    ]
    rows += [{"arm": "full", "lens": "plain", "what": "log_probability", "state": number} | some(-3.0) for number in range(STATES)]
    return rows + [
        {"arm": "full", "lens": "linear", "what": what, "state": number} | some(0.25)
        for what in ("accuracy", "selectivity")
        for number in range(STATES)
    ]


def restoration_rows(arm: str = "full", lost: bool = True) -> list[dict[str, Any]]:
    share = some(0.25) if lost else None
    rows = [{"arm": arm, "what": "loss", "part": "all"} | some(0.1) | {"share": share}]
    for what in ("shapley", "recovery", "damage", "same-number", "same-norm"):
        rows += [
            {"arm": arm, "what": what, "part": block} | some(0.025) | {"share": share} for block in BLOCKS if (what, block) != ("same-norm", "high")
        ]
    rows += [
        {"arm": arm, "what": what, "part": part} | some(0.01 * float(part)) | {"share": share} for what in ("top", "random") for part in ("10", "5")
    ]
    return rows + [{"arm": arm, "what": "task", "part": block} | some(-0.5) | {"share": None} for block in ("all", *BLOCKS)]


def patching_rows(states: int = STATES) -> list[dict[str, Any]]:
    values = [0.01 * min(number, 3) for number in range(states)]
    return [{"arm": "full", "state": number} | some(value) for number, value in enumerate(values)] + [{"arm": "full", "state": None} | some(0.1)]


RELEARNT = [
    {"arm": "full", "lost": some(0.2), "savings": some(0.94), "brought_back": some(0.4), "bound": ["at least"], "relearnt": [1.75], "learnt": [None]},
    {"arm": "lora", "lost": some(0.0), "savings": None, "brought_back": None, "bound": ["exact"], "relearnt": [0.0], "learnt": [8.0]},
]


def clause(name: str, low: float | None, high: float | None, needs: int | None = None, note: str = "") -> dict[str, Any]:
    found = measured(name, None if low is None or high is None else ((low + high) / 2, low, high), 3, needs, note)
    return {"clause": name, "claim": found.claim, "state": state(found)} | {
        key: getattr(found, key) for key in ("value", "low", "high", "threshold", "needs", "note")
    }


def verdict_rows() -> list[dict[str, Any]]:
    clauses = [
        clause("density", -0.006, -0.003),
        clause("density/random", -0.006, 0.003, needs=505),
        clause("density/shuffled", None, None, note="no arm is the same with shuffled: true"),
        clause("restoration", -0.004, 0.006),
    ]
    return [{"arm": "full", "claim": "direct tuning erodes what lower layers hold", "verdict": "not supported", "clauses": clauses}]


def make_results(**sections: Any) -> dict[str, Any]:
    """Results with only these sections."""
    empty: dict[str, Any] = {section: [] for section in (*SECTIONS, "rows", "gap_closed", "against_direct", "contrasts", "frontier", "costs")}
    return {"study": "small", "seeds": [0], "base": "base", "kinds": KINDS} | empty | sections


def law_rows() -> list[dict[str, Any]]:
    return [{"arm": arm, "group": group} | some(0.125) for arm in KINDS for group in ("familiar", "unfamiliar")]


def whole() -> dict[str, Any]:
    return make_results(
        exposure=exposure_rows(),
        erosion=erosion_rows(),
        law=law_rows(),
        drift=drift_rows(),
        lens=lens_rows(),
        restoration=restoration_rows(),
        patching=patching_rows(),
        recoverability=RELEARNT,
        verdicts=verdict_rows(),
    )


def only(results: dict[str, Any], title: str) -> Table:
    (table,) = [table for table in inside_tables(results) if table.title.startswith(title)]
    return table


def shown(table: Table, *arms: str) -> dict[str, Any]:
    """The row of these first cells."""
    chosen = np.logical_and.reduce([table.frame.iloc[:, place] == arm for place, arm in enumerate(arms)])
    (row,) = table.frame[chosen].to_dict("records")
    return {str(name): value for name, value in row.items()}


def test_a_cell_is_the_scaled_value_with_its_interval_or_says_that_there_is_none() -> None:
    assert cell(some(-0.0042, 0.0018), 1000) == "-4.2 [-6.0, -2.4]"
    assert cell({"value": 0.5, "low": None, "high": None}, 100) == "50.0"
    assert cell({"value": None, "low": None, "high": None}, 100) == cell(None, 100) == "n/a"
    assert cell({"value": 0.5, "low": 0.4, "high": 0.6, "note": "by hand"}, 100) == cell({"value": None, "note": "by hand"}) == "by hand"
    assert cell(pd.Series({"value": 0.5, "low": 0.4, "high": 0.6, "note": np.nan}), 1, 2) == "0.50 [0.40, 0.60]"


TITLES = {
    "exposure": {"How density"},
    "erosion": {"Erosion"},
    "law": {"Drift from"},
    "drift": {"Drift from", "Drift of"},
    "lens": {"What the", "What a"},
    "restoration": {"Restoration:", "Restoration,", "Restoration of"},
    "patching": {"Patching:"},
    "recoverability": {"Recoverability:"},
    "verdicts": {"Verdict,"},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_table_is_there_where_it_has_rows_and_nowhere_else(section: str) -> None:
    tables = inside_tables(make_results(**{section: whole()[section]}))
    assert {next(title for title in TITLES[section] if table.title.startswith(title)) for table in tables} == TITLES[section]
    assert len(tables) == len(TITLES[section])
    assert all(len(table.frame) and table.note for table in tables)
    assert inside_tables(make_results()) == []


def test_every_table_is_drawn_in_every_form_before_the_costs() -> None:
    costs = [{"arm": "base"} | dict.fromkeys(("runs", "steps", "tokens", "flops", "stored_bytes", "flops_a_token", "bytes_a_token"), 1.0)]
    tables = make_tables(whole() | {"costs": costs})
    assert len(tables) == 1 + sum(map(len, TITLES.values())) - 1  # law and drift share a table
    assert tables[-1].title == "Cost"
    for form in ("table", "markdown", "latex"):
        text = draw(tables, form, 160)
        assert max(map(len, text.splitlines())) <= 160 or form != "table"
        assert "unchanged by construction" in text
    titled = draw([Table("100 % of full_kl", tables[0].frame, "")], "latex", 160)
    assert r"100 \% of full\_kl" in titled


def test_words_stand_left_and_numbers_right() -> None:
    lines = draw([Table("", pd.DataFrame({"arm": ["a"], "state of it": ["holds"], "value of it": ["1.0"]}), "")], "table", 160).splitlines()
    (row,) = [line for line in lines if "holds" in line]
    assert "│ holds       │" in row
    assert "│         1.0 │" in row


def test_density_by_exposure_is_of_the_last_layer_after_the_final_norm_and_starts_untrained() -> None:
    rows = exposure_rows()
    for row in rows:
        row["contrast"] = some(0.0072 if (row["site"], row["state"]) == ("normed", LAYERS) else 0.5)
    table = only(make_results(exposure=rows), "How density")
    assert list(table.frame["model"]) == ["untrained", "base", "full"]
    assert shown(table, "full")["E5: contrast"] == shown(table, "base")["effective rank: contrast"] == "7.2 [5.2, 9.2]"
    assert shown(table, "full")["E5: slope"] == "3.4 [3.2, 3.6]"
    assert shown(table, "full")["E5: partial slope"] == "n/a"
    assert "layer 4" in table.title and "thousandths" in table.note and "hundredths" in table.note


def test_erosion_has_every_block_beside_its_null_and_says_what_cannot_change() -> None:
    table = only(make_results(erosion=erosion_rows()), "Erosion")
    full = shown(table, "full")
    assert (full["low"], full["middle"], full["low, less random"]) == ("-4.2 [-6.2, -2.2]", "1.0 [-1.0, 3.0]", "-7.3 [-9.3, -5.3]")
    assert list(table.frame["arm"]) == ["base", "proxy@1", "full", "lora"]  # an expert is another model
    assert {arm for arm in table.frame["arm"] if shown(table, arm)["low"] == "unchanged by construction"} == {"base", "proxy@1"}
    assert "120 of 150" in table.note
    assert "as they are" in only(make_results(erosion=erosion_rows(matched=0)), "Erosion").note
    unknown = {name: value for name, value in make_results(erosion=erosion_rows()).items() if name != "kinds"}
    assert list(only(unknown, "Erosion").frame["arm"]) == ["base", "full", "lora"]


def test_drift_of_what_comes_out_is_for_all_arms_and_that_of_states_for_those_with_their_own() -> None:
    table = only(whole(), "Drift from")
    assert list(table.frame["arm"]) == list(KINDS)
    assert {shown(table, arm)["KL, familiar"] for arm in KINDS} == {"0.125 [0.123, 0.127]"}
    assert [shown(table, arm)["CKA, low"] for arm in ("proxy@1", "expert", "full")] == ["unchanged by construction", "", "0.987"]
    weights = shown(only(whole(), "Drift of"), "full")
    assert (weights["change, low (%)"], weights["stable rank, high"]) == ("6.25", "n/a")
    assert "nats" in table.note
    assert not any(name.startswith("CKA") for name in only(make_results(law=law_rows()), "Drift from").frame)


def test_the_lens_is_read_at_the_ends_of_blocks_with_the_base_beside_the_arm() -> None:
    table = only(whole(), "What the layers")
    columns = ["layer 1 (low block's end)", "layer 3 (middle block's end, before the last)", "layer 4 (last)"]
    assert list(table.frame.columns) == ["lens", "arm", *columns]
    assert shown(table, "plain", "full")[columns[1]] == "30.0 [29.8, 30.2]"
    assert shown(table, "own", "base")[columns[0]] == shown(table, "base's", "base")[columns[0]] == "11.0 [10.8, 11.2]"
    assert list(table.frame["arm"]) == ["base", "full"] * 3
    probed = only(whole(), "What a linear")
    assert list(probed.frame.iloc[:, 0]) == ["accuracy", "selectivity"]
    assert "nats" not in table.title + table.note
    many = [row | {"state": 6 * row["state"]} for row in lens_rows()]
    assert [name.split(" ")[1] for name in only(make_results(lens=many), "What the layers").frame.columns[2:]] == ["8", "16", "23", "24"]


def test_restoration_has_shares_where_something_was_lost_and_controls_beside_each_block() -> None:
    table = only(whole(), "Restoration:")
    assert shown(table, "full")["low"] == "2.5 [2.3, 2.7], 25 %"
    assert shown(table, "full")["lost"] == "10.0 [9.8, 10.2]"
    assert shown(only(make_results(restoration=restoration_rows(lost=False)), "Restoration:"), "full")["low"] == "2.5 [2.3, 2.7]"
    blocks = only(whole(), "Restoration, block")
    assert list(blocks.frame["block"]) == list(BLOCKS)
    assert shown(blocks, "full", "high")["as much change elsewhere"] == "n/a"
    assert shown(blocks, "full", "low")["as much change elsewhere"] == "2.5 [2.3, 2.7]"
    assert shown(blocks, "full", "low")["task (nats a token)"] == "-0.500 [-0.502, -0.498]"
    most = only(whole(), "Restoration of")
    assert list(most.frame.columns[2:]) == ["5 %", "10 %"]
    assert shown(most, "full", "at random")["5 %"] == "5.0 [4.8, 5.2]"


def test_patching_shows_all_states_when_few_and_the_best_of_many() -> None:
    few = shown(only(whole(), "Patching"), "full")
    assert (few["lost"], few["embeddings"], few["layer 3"]) == ("10.0 [9.8, 10.2]", "0.0 [-0.2, 0.2]", "3.0 [2.8, 3.2]")
    many = only(make_results(patching=patching_rows(states=30)), "Patching")
    assert shown(many, "full") == {"arm": "full", "lost": "10.0 [9.8, 10.2]", "brought back": "3.0 [2.8, 3.2]", "after layer": "3"}
    assert "30" in many.note


def test_what_was_not_relearnt_in_time_has_no_number() -> None:
    table = only(whole(), "Recoverability")
    full, lora = shown(table, "full"), shown(table, "lora")
    assert (full["steps, relearnt"], full["steps, learnt anew"], full["savings"]) == ("1.8", "n/a", "at least 0.94 [0.94, 0.94]")
    assert (lora["savings"], lora["unrelated facts bring back (% of the loss)"]) == ("n/a", "n/a")
    assert full["unrelated facts bring back (% of the loss)"] == "40.0 [39.8, 40.2]"
    assert full["lost (points of probability)"] == "20.0 [19.8, 20.2]"


def test_a_verdict_is_in_the_title_and_each_clause_says_what_counts_and_what_is_needed() -> None:
    table = only(whole(), "Verdict")
    assert table.title == "Verdict, full: 'direct tuning erodes what lower layers hold' is not supported"
    first, second, third, fourth = table.frame.to_dict("records")
    assert (first["value"], first["in"], first["state"], first["needed"]) == ("-4.5 [-6.0, -3.0]", "thousandths of effective rank", "holds", "")
    assert (second["state"], second["needed"]) == ("cannot tell", "505 seeds")
    assert (third["value"], third["needed"], third["note"]) == ("n/a", "n/a", "no arm is the same with shuffled: true")
    assert (fourth["value"], fourth["in"], fourth["fails if all"]) == ("0.1 [-0.4, 0.6]", "points of probability", "below 1.0")
    assert table.note.startswith("Failed: 4; held: 1; cannot tell: 2, 3.")


def test_one_seed_is_no_verdict_and_every_note_says_of_what_it_is() -> None:
    rows = [verdict_rows()[0] | {"verdict": "cannot tell: one seed"}]
    table = only(make_results(verdicts=rows), "Verdict")
    assert table.title == "Verdict, full: 'direct tuning erodes what lower layers hold': cannot tell: one seed"
    assert "of this model and this run" in table.note
    several = only(make_results(verdicts=verdict_rows(), seeds=[0, 1, 2]), "Verdict")
    assert "over units of one seed" not in several.note


@pytest.mark.parametrize("name", RULE)
def test_the_sides_that_a_verdict_names_are_those_of_the_rule(name: str) -> None:
    """Intervals that just keep to the named sides, or just do not, are judged by the rule as the table says."""
    rows = [{"arm": "full", "claim": "it", "verdict": "underpowered", "clauses": [clause(name, None, None)]}]
    (row,) = only(make_results(verdicts=rows), "Verdict").frame.to_dict("records")
    scale = {"thousandths of effective rank": 1000, "share of the steps": 1}.get(row["in"], 100)
    (_, threshold), (side, boundary) = (
        (words.split()[0], float(words.split()[1]) / scale) for words in (row["fails if all"], row["else holds if all"])
    )
    step = -1e-4 if side == "below" else 1e-4

    def judged(*ends: float) -> str:
        return state(measured(name, (ends[0], min(ends), max(ends)), 3))

    assert row["fails if all"].startswith("above" if side == "below" else "below")
    assert judged(boundary + step, threshold + step) == "holds"
    assert judged(boundary - step, threshold + step) == "cannot tell"
    assert judged(boundary - 2 * step, threshold - step) == "fails"
    if boundary != threshold:
        assert judged(boundary + step, threshold - step) == "fails"  # certain, but too small to count


# --- figures ---

TUNING = {"method": "full", "learning_rate": 1e-3, "epochs": 1, "batch_size": 8}


def make_study(*tuned: str, seeds: tuple[int, ...] = (0,)) -> Study:
    arms = {"base": {"kind": "base"}} | {arm: {"kind": "direct", "tuning": TUNING} for arm in tuned}
    return Study.model_validate({"study": "small", "worlds": ["tiny"], "seeds": list(seeds), "arms": arms, "measures": ["density"]})


def states_record(arm: str, seed: int, changed: np.ndarray | None = None) -> Record:
    """Two items of every unit; the base's densities are the same for every arm, `changed` [items, states] is added."""
    generator = np.random.default_rng([7, seed])
    popularity = np.repeat([0.0, 3.0, 30.0], 10)
    values = generator.normal(0.5, 0.02, (len(popularity), STATES)) + (0 if changed is None else changed)
    frame = pd.DataFrame({"unit": [f"u{place // 2}" for place in range(len(popularity))], "popularity": popularity})
    columns = pd.DataFrame({f"effective_rank/residual/last/{number}": values[:, number] for number in range(STATES)})
    return Record(arm, "states", seed, "", pd.concat([frame, columns], axis=1), {})


def recoverability_record(arm: str, seed: int, curves: tuple[str, ...] = ("forgotten", "never exposed", "unrelated")) -> Record:
    generator = np.random.default_rng([3, seed])
    rows = [
        {
            "unit": f"u{item // 2}",
            "popularity": 3.0,
            "base_right": item % 3 > 0,
            "curve": curve,
            "step": step,
            "item": item,
            "right": False,
            "base_probability": 0.9 * (item % 3 > 0),
            "probability": 0.2 + 0.1 * generator.random() * step,
        }
        for curve in curves
        for step in (0, 1, 2, 4)
        for item in range(12)
    ]
    return Record(arm, "recoverability", seed, "", pd.DataFrame(rows), {})


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_heat_map_is_the_mean_change_of_each_bucket(seeds: tuple[int, ...]) -> None:
    changes = {seed: np.random.default_rng([9, seed]).normal(0, 0.01, (30, STATES)) for seed in seeds}
    records = [states_record("base", seed) for seed in seeds] + [states_record("full", seed, changes[seed]) for seed in seeds]
    found = density_change(Found(make_study("full", seeds=seeds), records), "full")
    buckets = familiarity(np.repeat([0.0, 3.0, 30.0], 10).tolist()).buckets
    assert found.buckets == ["k=0", "k=3", "k=30"]
    for number in range(STATES):
        for place, bucket in enumerate(found.buckets):
            slow = [np.mean([changes[seed][item, number] for item in range(30) if buckets[item] == bucket]) for seed in seeds]
            assert found.value[number, place] == pytest.approx(np.mean(slow), abs=1e-12)


def test_a_planted_change_is_seen_where_it_is_and_identical_models_change_by_exactly_zero() -> None:
    planted = np.zeros((30, STATES))
    planted[20:, 1] = -0.02
    found = density_change(Found(make_study("full"), [states_record("base", 0), states_record("full", 0, planted)]), "full")
    assert found.value[1, 2] == pytest.approx(-0.02)
    assert np.argwhere(found.certain).tolist() == [[1, 2]]
    same = density_change(Found(make_study("full"), [states_record("base", 0), states_record("full", 0)]), "full")
    assert not same.value.any() and not same.certain.any()


def test_the_heat_maps_share_one_scale_that_is_centred_on_zero_and_state_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    save = inside_figures.save
    monkeypatch.setattr(inside_figures, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    strong = np.zeros((30, STATES))
    strong[:10, 3] = 0.05
    records = [states_record("base", 0), states_record("full", 0, 0.1 * strong), states_record("lora", 0, -strong)]
    draw_inside(make_study("full", "lora"), make_results(erosion=erosion_rows()), Found(make_study("full", "lora"), records), tmp_path)
    (figure,) = kept
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert {axes.images[0].get_clim() for axes in panels.values()} == {(-50.0, 50.0)}
    texts = {arm: {text.get_position(): text.get_text() for text in axes.texts} for arm, axes in panels.items()}
    assert (texts["full"][0, 3], texts["lora"][0, 3], texts["lora"][1, 3]) == ("5.0", "-50.0", "0.0")


def test_relearning_curves_are_plain_means_and_those_that_a_seed_lacks_are_left_out() -> None:
    records = [recoverability_record("full", 0), recoverability_record("full", 1, curves=("forgotten", "unrelated"))]
    curves = relearning_curves(Found(make_study("full", seeds=(0, 1)), records), "full")
    assert list(curves) == ["forgotten", "unrelated"]
    for name, curve in curves.items():
        assert curve.steps == [0, 1, 2, 4]
        frames = [record.items[record.items["curve"] == name] for record in records]
        for point, step in enumerate(curve.steps):
            assert curve.value[point] == pytest.approx(np.mean([frame[frame["step"] == step]["probability"].mean() for frame in frames]))
        assert curve.base == pytest.approx(0.9 * 8 / 12)
        assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()
        assert (curve.low >= 0).all() and (curve.high <= 1).all()
    assert list(relearning_curves(Found(make_study("full"), records[:1]), "full")) == ["forgotten", "never exposed", "unrelated"]


def test_layers_stand_beside_their_nulls_and_of_many_some() -> None:
    def with_states(count: int) -> dict[str, Any]:
        nulls = [
            {"metric": metric, "state": state, "base": 0.5 + state, "gaussian": 0.4, "gaussian_sd": 0.04, "untrained": None}
            for metric in ("e5", "effective_rank")
            for state in range(count)
        ]
        rankme = [{"arm": "base", "group": "both", "state": state} | some(10.0 + state) for state in range(count)]
        return {section: [] for section in SECTIONS} | {"base": "base", "seeds": [0], "kinds": {"base": "base"}, "nulls": nulls, "rankme": rankme}

    beside, rankme = inside_tables(with_states(3))
    last = beside.frame.set_index("after layer").loc["2"]
    assert (last["E5: base"], last["E5: Gaussian (sd)"], last["effective rank: untrained"]) == ("2.500", "0.400 (0.040)", "n/a")
    assert rankme.frame.set_index("arm").loc["base", "layer 1"].startswith("11.0")
    many, _ = inside_tables(with_states(31))
    assert list(many.frame["after layer"]) == ["0", "7", "15", "23", "30"]
    assert "some layers" in many.note.lower()
    assert "some layers" not in beside.note.lower()


def test_what_was_measured_is_drawn_the_same_way_twice_and_nothing_else(tmp_path: Path) -> None:
    study = make_study("full", "lora")
    measured_there = [
        states_record("base", 0),
        states_record("full", 0, np.full((30, STATES), 0.01)),
        states_record("lora", 0),
        recoverability_record("full", 0),
    ]
    drawn = {}
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        drawn[run] = draw_inside(study, whole(), Found(study, measured_there), tmp_path / run)
    names = {"density-change.png", "density-by-layer.png", "drift.png", "restoration.png", "lens.png", "recoverability.png"}
    assert {path.name for path in drawn["one"]} == names
    for one, two in zip(drawn["one"], drawn["two"], strict=True):
        assert one.stat().st_size > 10_000
        assert one.read_bytes() == two.read_bytes()
    assert draw_inside(study, make_results(), Found(study, []), tmp_path) == []
    assert [path.name for path in draw_inside(study, make_results(law=law_rows()), Found(study, []), tmp_path)] == ["drift.png"]


def test_more_arms_than_a_page_holds_go_on_to_the_next(tmp_path: Path) -> None:
    rows = [row for number in range(PANELS + 1) for row in restoration_rows(f"full@{number}")]
    drawn = draw_inside(make_study("full"), make_results(restoration=rows), Found(make_study("full"), []), tmp_path)
    assert [path.name for path in drawn] == ["restoration.png", "restoration-2.png"]
