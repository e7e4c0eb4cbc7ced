"""Benchmarks of the harness in a study: the harness's own scores, for every arm from shared passes, paired."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import (
    CHOICE_TASK,
    STUDY,
    Counted,
    Unbroken,
    changed,
    load,
    make_members,
    make_model,
    make_tokenizer,
    run_in_process,
    save_models,
    write_choice_task,
)
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from evals.harness.benchmarks import Benchmark, answer_benchmark, load_benchmark
from evals.results.summary import result_tables, summarize
from evals.study import Study
from probes.world.ledger import items_of
from proxytune.errors import UserError
from proxytune.mixture import Mixture, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

pytestmark = pytest.mark.usefixtures("no_report_of_the_machine")
ITEMS = 23
MIXTURES: dict[str, Mixture] = {"base": {"base": 1.0}, "proxy": proxy_tuning(0.8), "expert": {"expert": 1.0}}
TEXTS = """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["w7"], max_gen_toks: 3}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of choices, the same as texts, one group of both halves of it, and tasks that are refused."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(3, 50, (count,), generator=generator).tolist())

    rows = [{"text": words(4 + number % 9), "choices": [words(1 + place % 3) for place in range(4)], "gold": number % 4} for number in range(ITEMS)]
    place = tmp_path_factory.mktemp("benchmarks") / "tasks"
    write_choice_task(place, "choices", rows)
    write_choice_task(place, "first", rows[:11])
    write_choice_task(place, "second", rows[11:])
    (place / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    head = CHOICE_TASK.format(name="{name}", file=place / "choices.jsonl").split("output_type")[0]
    (place / "texts.yaml").write_text(head.replace("{name}", "texts") + TEXTS)
    (place / "rolling.yaml").write_text(
        head.replace("{name}", "rolling") + 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}]\n"
    )
    (place / "code.yaml").write_text(head.replace("{name}", "code") + "unsafe_code: true" + TEXTS)
    return place


def asked(folder: Path, name: str, **options: Any) -> Benchmark:
    return load_benchmark(name, folder=folder, **options)


def answered(benchmark: Benchmark, mixtures: dict[str, Mixture] = MIXTURES, batch_size: int = 8, batch_tokens: int = 2048) -> dict[str, pd.DataFrame]:
    return answer_benchmark(benchmark, make_members(), mixtures, batch_size=batch_size, batch_tokens=batch_tokens)


def of_the_harness(folder: Path, name: str, mixture: Mixture, metric: str, **options: Any) -> float:
    """The harness's own score, by its own model class."""
    members = make_members()
    model = HFLM(pretrained=ProxyTunedForCausalLM(members, mixture), tokenizer=members["base"].tokenizer, device="cpu", backend="causal")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, **options)
    return float(found["results"][name][f"{metric},none"])


@pytest.mark.parametrize(("name", "metric"), [("choices", "acc"), ("choices", "acc_norm"), ("texts", "exact_match")])
def test_scores_are_those_of_the_harness(folder: Path, name: str, metric: str) -> None:
    found = answered(asked(folder, name, metric=metric))
    scores = {arm: frame["right"].mean() for arm, frame in found.items()}
    assert scores == {arm: pytest.approx(of_the_harness(folder, name, mixture, metric)) for arm, mixture in MIXTURES.items()}
    if name == "choices":  # twin: another mixture scores otherwise, in some item
        assert any(found["base"]["right"] != found["proxy"]["right"])
        assert any(found["base"]["text"] != found["expert"]["text"])


@pytest.mark.parametrize("options", [{"shots": 2}, {"limit": 7}], ids=["few-shot", "limit"])
def test_examples_and_a_limit_are_the_harness_s(folder: Path, options: dict[str, int]) -> None:
    loaded = asked(folder, "choices", **options)
    theirs = {"num_fewshot": options["shots"]} if "shots" in options else {"samples": {"choices": [number * ITEMS // 7 for number in range(7)]}}
    whole = answered(asked(folder, "choices"))["base"]
    frame = answered(loaded)["base"]
    assert frame["right"].mean() == pytest.approx(of_the_harness(folder, "choices", MIXTURES["base"], "acc", **theirs))
    if "limit" in options:
        assert len(frame) == 7
        pd.testing.assert_frame_equal(frame, whole[whole["unit"].isin(frame["unit"])].reset_index(drop=True))
    else:
        assert not frame["text"].equals(whole["text"])
        assert loaded.first_prompt.count("\n\n") == 2


def test_a_group_is_the_items_of_its_tasks(folder: Path) -> None:
    group, whole = (answered(asked(folder, name))["proxy"] for name in ("both", "choices"))
    assert group["right"].tolist() == whole["right"].tolist()
    assert group["unit"].iloc[[0, 11]].tolist() == ["first/0", "second/0"]


@pytest.mark.parametrize("name", ["choices", "texts"])
def test_batches_do_not_matter(folder: Path, name: str) -> None:
    whole, single = answered(asked(folder, name)), answered(asked(folder, name), batch_size=1, batch_tokens=1)
    for arm in MIXTURES:
        pd.testing.assert_frame_equal(whole[arm], single[arm])


def test_one_pass_of_the_members_serves_every_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    loaded = asked(folder, "choices")
    alone = answered(loaded, {"proxy": MIXTURES["proxy"]})
    passes, counted.passes = counted.passes, 0
    together = answered(loaded, {"proxy": MIXTURES["proxy"], "base": MIXTURES["base"], "stronger": proxy_tuning(1.5)})
    assert counted.passes == passes > 0
    pd.testing.assert_frame_equal(alone["proxy"], together["proxy"])
    counted.passes = 0
    answered(asked(folder, "texts"), {"proxy": MIXTURES["proxy"], "base": MIXTURES["base"]})
    assert counted.passes > passes  # twin: texts differ, and are each arm's own


def test_what_decides_the_answers_is_in_the_key_and_paths_are_not(folder: Path, tmp_path: Path) -> None:
    rows = pd.read_json(folder / "choices.jsonl", lines=True).to_dict("records")
    moved = write_choice_task(tmp_path / "moved", "choices", rows)
    key = asked(folder, "choices").content
    assert asked(moved, "choices").content == key
    for options in ({"limit": 7}, {"shots": 1}, {"metric": "acc_norm"}):
        assert asked(folder, "choices", **options).content != key
    rows[3]["gold"] = (rows[3]["gold"] + 1) % 4
    assert asked(write_choice_task(tmp_path / "other", "choices", rows), "choices").content != key


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param("choice", {}, "the harness has no task 'choice'; did you mean 'choices'", marks=pytest.mark.slow),  # indexes all of its tasks
        ("rolling", {}, "'rolling' has no right answers"),
        ("code", {}, "'code' runs the model's code without a sandbox; take proxytune_humaneval"),
        ("choices", {"metric": "exact"}, "'choices' has no metric 'exact'; known are acc, acc_norm"),
    ],
)
def test_what_cannot_be_asked_is_one_line(folder: Path, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        asked(folder, name, **options)


def test_a_folder_or_data_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"benchmark.folder: '.*absent' is no folder"):
        asked(tmp_path / "absent", "choices")
    write_choice_task(tmp_path / "lost", "lost", []).joinpath("lost.jsonl").unlink()
    with pytest.raises(UserError, match=r"benchmark.tasks: 'lost' cannot be loaded \(.*lost.jsonl"):
        asked(tmp_path / "lost", "lost")


def test_a_metric_that_is_no_share_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "choices.yaml").read_text().replace("{metric: acc}", "{metric: brier_score}")
    (tmp_path / "brier.yaml").write_text(text.replace("task: choices", "task: brier"))
    with pytest.raises(UserError, match=r"'brier_score' of 'brier' is .* no number from 0 to 1; name another of its metrics: .*acc"):
        answered(asked(tmp_path, "brier"))


def study_of(folder: Path, **settings: Any) -> Study:
    arms = {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "path": str(folder / "small-tuned")},
        "proxy": {"kind": "proxy", "alpha": [0, 1]},
        "full": {"kind": "direct", "path": str(folder / "tuned")},
    }
    models = {"base": str(folder / "base"), "small": str(folder / "small")}
    study = {"study": "mine", "models": models, "data": {}, "arms": arms, "measures": ["benchmark"], "contrasts": [["full", "proxy@1"]]}
    return Study.model_validate(study | {"settings": {"benchmark": {"tasks": ["choices", "texts"], "folder": "tasks"} | settings}})


def test_every_arm_of_a_study_is_compared_by_it(folder: Path, tmp_path: Path) -> None:
    save_models(tmp_path)
    for name, seed, hidden in (("tuned", 3, 48), ("small-tuned", 4, 32)):
        make_model(seed=seed, layers=4, hidden=hidden).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    shutil.copytree(folder, tmp_path / "tasks")
    study = study_of(tmp_path)
    finished = run_in_process(study, tmp_path / "out", tmp_path)
    results = summarize(study, finished.records, finished.costs)
    frames = {record.arm: record.items for record in finished.records if record.frame == "benchmark/choices"}
    rows = {row["arm"]: row for row in results.rows if row["measure"] == "benchmark/choices"}
    assert {arm: row["value"] for arm, row in rows.items()} == {arm: pytest.approx(frame["right"].mean()) for arm, frame in frames.items()}
    assert rows["base"]["value"] == rows["proxy@0"]["value"] != rows["full"]["value"]
    (contrast,) = [row for row in results.compared["contrasts"] if row["measure"] == "benchmark/choices"]
    assert contrast["value"] == pytest.approx((frames["full"]["right"] - frames["proxy@1"]["right"]).mean(), abs=1e-6)
    assert contrast["low"] < contrast["value"] < contrast["high"]
    assert contrast["p"] is not None
    against = {(row["measure"], row["arm"]) for row in results.compared["against_direct"]}
    assert against == {(f"benchmark/{task}", arm) for task in ("choices", "texts") for arm in ("base", "expert", "proxy@0", "proxy@1")}
    tables = {table.title: table.frame for table in result_tables(results)}
    for task in ("choices", "texts"):
        shown = tables[f"Benchmark {task}"]
        assert shown["arm"].tolist() == list(frames)
        assert {task, "unparsed", "Δ vs full"} <= set(shown.columns)
    changes = {one.arm: one.change for one in results.measures["benchmark"].scores if one.task == "choices"}
    assert changes["base"] is None
    assert changes["full"].value == pytest.approx(rows["full"]["value"] - rows["base"]["value"], abs=1e-6)


def test_a_study_with_a_task_has_a_frontier_of_both(folder: Path, unbroken: Unbroken, tmp_path: Path) -> None:
    """Task against benchmark, where no other measure says what tuning may lose; twin: with knowledge, that is the second axis."""
    out = tmp_path / "out"
    shutil.copytree(unbroken.out, out)
    words = Path(out / "worlds" / "tiny" / "seed-0" / "ledger.parquet")
    known = [item for item in items_of(pd.read_parquet(words), "test") if item.popularity][:20]
    rows = [{"text": item.statement, "choices": item.choices, "gold": item.choices.index(item.answer)} for item in known]
    write_choice_task(tmp_path / "tasks", "people", rows)
    settings = {"benchmark": {"tasks": ["people"], "folder": "tasks"}}
    for measures, kept in ((["task", "benchmark"], "benchmark/people"), (["task", "knowledge", "benchmark"], "knowledge")):
        study = Study.model_validate(STUDY | {"measures": measures, "settings": settings})
        finished = run_in_process(study, out, tmp_path)
        found = summarize(study, finished.records, finished.costs)
        assert {row["kept"]["measure"] for row in found.compared["frontier"]} == {kept}
        assert {row["arm"] for row in found.compared["frontier"]} == set(study.rows)


def test_a_metric_of_a_task_that_is_not_asked_is_refused(tmp_path: Path) -> None:
    study = changed("measures", value=["task", "benchmark"]) | {"settings": {"benchmark": {"tasks": ["a"], "metrics": {"b": "acc"}}}}
    with pytest.raises(UserError, match=r"settings: benchmark.*metrics: 'b' is not among the tasks \(a\)"):
        load(tmp_path, study)
