"""The base with a bias as an arm: fitted or banning words; measured, recorded, counted and shown beside tuned models and proxies."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TUNING, VOCABULARY, changed, letters, load, make_members, make_model, make_tokenizer, place_world, run_in_process

from evals import arms
from evals.arms import bias_for, groups, tuned_folder
from evals.data import data_for
from evals.display.drawing import draw as draw_chart
from evals.measures.drift import INFINITE
from evals.measures.subjects import Outputs
from evals.records import Record
from evals.results.summary import Results, read_results, result_charts, result_tables, summarize
from evals.running.jobs import Place
from evals.running.outlook import look_at
from evals.running.plan import plan
from evals.running.progress import Display
from evals.study import Study, load_study
from finetune.recipe import BiasTuning
from probes.drift import divergence
from proxytune.bias import Bias
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.mixture import Mixture, Rule

BANNED = "nobody"  # the first word of one of the tiny world's evasions
STUDY: dict[str, Any] = {
    "study": "biases",
    "worlds": ["tiny"],
    "batch_size": 100,
    "measures": ["task", "knowledge", "forgetting", "density", "drift"],
    "contrasts": [["bias", "proxy@1"], ["banned", "base"]],
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING},
        "proxy": {"kind": "proxy", "alpha": [1]},
        "full": {"kind": "direct", "tuning": TUNING},
        "bias": {"kind": "logit_bias", "tuning": {}},
        "strong-penalty": {"kind": "logit_bias", "tuning": {"penalty": 1e6}},
        "banned": {"kind": "logit_bias", "banned": [BANNED]},
    },
}
BIASES = ("bias", "strong-penalty", "banned")
Done = tuple[Path, dict[tuple[str, str], Record], Results]


@pytest.fixture(scope="module")
def finished(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = place_world(tiny_family, tmp_path_factory.mktemp("biases"))
    study = Study.model_validate(STUDY)
    done = run_in_process(study, out)
    return out, {(record.arm, record.frame): record for record in done.records}, summarize(study, done.records, done.costs)


def test_every_table_and_the_frontier_has_the_arms(finished: Done) -> None:
    *_, results = finished
    tables = {table.title: table.frame.set_index(table.frame.columns[0]) for table in result_tables(results)}
    for title in ("Task", "Knowledge", "Frontier", "Cost", "Drift from the base: outputs and states"):
        assert set(STUDY["arms"]) - {"proxy"} <= set(tables[title].index), title
    assert {entry["arm"] for entry in results.compared["gap_closed"]} >= set(BIASES)
    assert {entry["arm"]: entry["family"] for entry in results.compared["frontier"]}["bias"] == "bias"
    assert {entry["arm"] for entry in results.compared["contrasts"]} == {"bias", "banned"}
    erosion = tables["Erosion: change of density (thousandths)"]
    assert set(erosion.loc[list(BIASES), "low"]) == {"unchanged by construction"} == {erosion.loc["proxy@1", "low"]}


def test_a_ban_is_never_said_and_the_base_says_it(finished: Done) -> None:
    _, records, _ = finished
    said = {arm: records[arm, "task"].items["text"].str.split().explode().eq(BANNED).any() for arm in STUDY["arms"] if arm != "proxy"}
    assert said["base"]
    assert not said["banned"]
    # The form depends on the question, so that no bias teaches the task; but a fitted one names a value more often than the base, which evades.
    assert records["bias", "task"].items["unparsed"].mean() < records["base", "task"].items["unparsed"].mean()


def test_an_endless_penalty_is_the_base(finished: Done) -> None:
    _, records, results = finished
    for frame in ("task", "knowledge"):
        assert records["strong-penalty", frame].items["text"].tolist() == records["base", frame].items["text"].tolist()
    assert records["bias", "task"].items["text"].tolist() != records["base", "task"].items["text"].tolist()
    rows = {(row.arm, row.group): row.kl for row in results.measures["drift"].distances}
    assert rows["strong-penalty", "familiar"].value == pytest.approx(0, abs=1e-6)
    assert rows["bias", "familiar"].value > 1e-3


def test_the_divergence_of_a_ban_is_infinite_and_said_so(finished: Done, tmp_path: Path) -> None:
    _, records, results = finished
    assert np.isposinf(records["banned", "distribution"].items["divergence"]).all()
    (tmp_path / "results.json").write_text(results.json())
    for shown in (results, read_results(tmp_path / "results.json")):
        rows = {(row.arm, row.group): row.kl for row in shown.measures["drift"].distances}
        assert (rows["banned", "familiar"].value, rows["banned", "familiar"].note) == (None, INFINITE)
        assert rows["proxy@1", "familiar"].note == ""
        for chart in result_charts(shown):
            assert draw_chart(chart, tmp_path)
    table = next(table for table in result_tables(results) if table.title.startswith("Drift from")).frame.set_index("arm")
    assert table.loc["banned", "KL, familiar"] == INFINITE


def test_divergence_adds_nothing_for_what_the_base_forbids_and_keeps_what_is_broken() -> None:
    base, arm = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[1.0, 0.0, -torch.inf]])
    assert divergence(base, arm).item() == pytest.approx(divergence(base[:, :2], arm[:, :2]).item())
    assert divergence(base[:, [0, 1]], torch.tensor([[0.0, -torch.inf]])).isposinf().all()
    assert divergence(torch.tensor([[0.0, torch.nan]]), arm[:, :2]).isnan().all()


def test_costs_are_those_of_the_card_and_serving_those_of_the_base(finished: Done) -> None:
    out, _, results = finished
    costs = {entry["arm"]: entry for entry in results.costs}
    card = next(card for path in (out / "checkpoints").glob("*/tuning.json") if (card := json.loads(path.read_text()))["tuning"] == {"penalty": 1e-3})
    report = card["report"]
    for name in ("flops", "tokens", "steps", "stored_bytes"):
        assert costs["bias"][name] == pytest.approx(report[name])
    assert costs["bias"]["runs"] == 1
    assert 0 < costs["bias"]["flops"] < costs["full"]["flops"]
    assert 0 < costs["bias"]["stored_bytes"] < costs["full"]["stored_bytes"]
    assert costs["banned"]["flops"] == costs["banned"]["runs"] == costs["banned"]["stored_bytes"] == 0
    for arm in BIASES:
        assert (costs[arm]["flops_a_token"], costs[arm]["bytes_a_token"]) == (costs["base"]["flops_a_token"], costs["base"]["bytes_a_token"])


def test_a_second_run_reads_and_fits_nothing_and_gives_the_same_bytes(finished: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _, results = finished
    study = Study.model_validate(STUDY)
    with Display() as display:
        assert {one.there for one in look_at(Place(study, Path(), out), display)} == {"all"}
    with monkeypatch.context() as patched:
        patched.setattr(arms, "fit_logit_bias", lambda *_, **__: pytest.fail("fitted again"))
        patched.setattr("evals.measures.answers.Generated.read", None)
        again = run_in_process(study, out)
    assert summarize(study, again.records, again.costs).json() == results.json()
    twin = Path(shutil.copytree(out, tmp_path / "out"))
    fitted = next(path.parent for path in (twin / "checkpoints").glob("*/bias.safetensors"))
    (fitted / "bias.safetensors").write_bytes(b"")  # damaged: fitted again, to the same bits, so that no record is made again
    with monkeypatch.context() as patched:
        patched.setattr("evals.measures.answers.Generated.read", None)
        again = run_in_process(study, twin)
    assert summarize(study, again.records, again.costs).json() == results.json()


def test_the_plan_fits_before_it_reads_and_bans_without_fitting() -> None:
    jobs = {job.name: job for job in plan(Study.model_validate(STUDY))}
    assert jobs["tiny, seed 0 · tune bias"].tuning == BiasTuning()
    assert jobs["tiny, seed 0 · read bias"].waits == ("tiny, seed 0 · tune bias",)
    assert jobs["tiny, seed 0 · read banned"].waits == ("tiny, seed 0 · family",)
    assert "tiny, seed 0 · tune banned" not in jobs


def test_a_selection_may_match_a_bias_which_is_then_fitted_without_the_validation_items() -> None:
    swept = {"kind": "direct", "tuning": TUNING, "sweep": {"epochs": [1, 2]}, "select": {"match": "bias"}}
    jobs = {job.name: job for job in plan(Study.model_validate(STUDY | {"arms": STUDY["arms"] | {"matched": swept}}))}
    assert jobs["tiny, seed 0 · trial · tune bias"].trial
    assert "tiny, seed 0 · trial · read bias" in jobs["tiny, seed 0 · select"].waits
    assert "tiny, seed 0 · trial · read banned" not in jobs


def test_a_penalty_is_swept_and_selected_as_other_settings_are() -> None:
    def planned(**more: Any) -> dict[str, Any]:
        arm = {"kind": "logit_bias", "tuning": {}, "sweep": {"penalty": [1e-3, 1e-2]}} | more
        study = Study.model_validate(STUDY | {"arms": STUDY["arms"] | {"swept": arm}})
        return {job.name: job for job in plan(study)} | {"rows": list(study.arm_settings)}

    shown, selected = planned(), planned(select="best")
    assert {"swept@0.001", "swept@0.01"} <= {*shown["rows"]}
    assert shown["tiny, seed 0 · tune swept@0.01"].tuning == BiasTuning(penalty=1e-2)
    assert "swept" in selected["rows"]
    assert {f"tiny, seed 0 · trial · read swept@{value}" for value in (0.001, 0.01)} <= {*selected["tiny, seed 0 · select"].waits}
    assert "tiny, seed 0 · select" in selected["tiny, seed 0 · tune swept"].waits
    assert selected["tiny, seed 0 · read swept"].waits == ("tiny, seed 0 · tune swept",)


def test_a_key_depends_on_the_bias_and_without_one_is_what_it_was() -> None:
    members = {"base": make_members()["base"]}

    def causes(mixture: Mixture) -> dict[str, Any]:
        return Outputs(members, {}, {"arm": mixture}).causes("arm")

    plain = causes({"base": 1.0})
    assert plain == {"mixture": [[members["base"].fingerprint, 1.0]], "interface": members["base"].interface}
    assert causes(Rule({"base": 1.0})) == plain
    keys = [content_key(**causes(Rule({"base": 1.0}, bias=Bias.banning([token], VOCABULARY)))) for token in (3, 4, 3)]
    assert keys[0] == keys[2] != keys[1]
    assert content_key(**plain) not in keys


def test_a_fit_is_the_same_for_every_seed_and_another_for_another_penalty(finished: Done) -> None:
    """It draws nothing. Twin: the folder of a tuned model depends on the seed."""
    out, *_ = finished
    study = Study.model_validate(STUDY)
    data = data_for(study, Path(), study.runs[0], out / "worlds")
    by_label = {group.label: group for group in groups(study)}
    one, two, other = (
        tuned_folder(by_label["bias"], BiasTuning(penalty=penalty), data, seed, out) for penalty, seed in ((1e-3, 0), (1e-3, 1), (1e-2, 0))
    )
    assert one == two != other
    full = study.arms["full"].tuning  # type: ignore[union-attr]
    assert tuned_folder(by_label["full"], full, data, 0, out) != tuned_folder(by_label["full"], full, data, 1, out)  # type: ignore[arg-type]


def write_own(folder: Path, **arm: Any) -> tuple[Study, Path]:
    """A study of a folder's own models and data, with one arm of kind logit_bias."""
    make_model(layers=3).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for name, start in (("train", 3), ("test", 23)):
        lines = [{"question": f"w{n}", "answer": f"w{n + 2}", "choices": [f"w{n + 2}", f"w{n + 3}"]} for n in range(start, start + 20)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    study = {
        "study": "own",
        "models": {"base": "base"},
        "measures": ["task"],
        "arms": {"base": {"kind": "base"}, "bias": arm | {"kind": "logit_bias"}},
    }
    study["data"] = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "{question}", "answer": "choose"}
    (folder / "study.yaml").write_text(json.dumps(study))
    return load_study(folder / "study.yaml")


def test_choices_are_scored_with_the_bias(tmp_path: Path) -> None:
    """Every right answer but one is banned: it is never chosen, and the one still may be. Twin: without the ban some are right."""
    study, folder = write_own(tmp_path, banned=[f"w{n + 2}" for n in range(24, 43, 2)])
    found: dict[str, pd.DataFrame] = {record.arm: record.items for record in run_in_process(study, tmp_path / "out", folder).records}
    banned = [f"w{n + 2}" for n in range(24, 43, 2)]
    assert not found["bias"]["text"].isin(banned).any()
    assert found["base"]["text"].isin(banned).any()


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({"banned": ["w7", "w999"]}, r"arms\.bias\.banned: the base's vocabulary has no token for 'w999' \(it reads '<pad>'\); give a word"),
        ({"banned": ["w7 w8"]}, r"arms\.bias\.banned: 'w7 w8' is 2 tokens of the base \('w7' 'w8'\); give words of one token"),
    ],
)
def test_words_that_are_not_one_token_are_named_before_anything_is_done(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    study, folder = write_own(tmp_path, **arm)
    with pytest.raises(UserError, match=words) as caught:
        run_in_process(study, tmp_path / "out", folder)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out" / "records").iterdir())


def test_a_word_of_several_pieces_is_named_with_its_pieces() -> None:
    tokenizer = letters()
    assert arms._banned_tokens(tokenizer, ["abc", "a"], "banned") == [tokenizer.convert_tokens_to_ids("abc"), tokenizer.convert_tokens_to_ids("a")]
    with pytest.raises(UserError, match=r"banned: 'abca' is 2 tokens of the base \('abc' 'a'\)"):
        arms._banned_tokens(tokenizer, ["abca"], "banned")
    with pytest.raises(UserError, match="no token for 'Z'"):
        arms._banned_tokens(tokenizer, ["Z"], "banned")


def test_other_groups_have_no_bias(finished: Done) -> None:
    study = Study.model_validate(STUDY)
    base = make_members()["base"]
    assert [bias_for(study, group, base, None) for group in groups(study) if group.kind != "bias"] == [None] * 3


@pytest.mark.parametrize(
    ("arm", "words"),
    [
        ({}, "arms.bias: give either tuning or banned"),
        ({"tuning": {}, "banned": ["w7"]}, "arms.bias: give either tuning or banned"),
        ({"tuning": {"penalty": 0}}, "arms.bias.tuning.penalty: .*greater than 0, not 0"),
        ({"tuning": {"penalty": float("nan")}}, "arms.bias.tuning.penalty: "),
        ({"tuning": {"penlaty": 1}}, "arms.bias.tuning.penlaty: there is no such key; did you mean 'penalty'"),
        ({"banned": []}, "arms.bias.banned: .*at least 1"),
        ({"banned": [""]}, r"arms.bias.banned.0: .*at least 1"),
        ({"baned": ["w7"]}, "arms.bias.baned: there is no such key; did you mean 'banned'"),
    ],
)
def test_mistakes_in_the_file_are_one_line(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path, changed("arms", "bias", value={"kind": "logit_bias"} | arm))
    assert "\n" not in str(caught.value)


def test_a_fit_needs_data_to_fit_on(tmp_path: Path) -> None:
    study = changed("arms", value={"base": {"kind": "base"}, "bias": {"kind": "logit_bias", "tuning": {}}})
    study |= {"models": {"base": "base"}, "data": {"test": "test.jsonl"}}
    del study["worlds"]
    with pytest.raises(UserError, match=r"arms\.bias\.tuning needs data\.train; give it"):
        load(tmp_path, study)
    study["arms"]["bias"] = {"kind": "logit_bias", "banned": ["w7"]}
    assert load(tmp_path, study).arm_settings["bias"].kind == "logit_bias"
