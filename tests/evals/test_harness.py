"""lm-eval with a mixture: the same numbers as its own model class, answers that are kept for one model only, and export."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Counted, make_members
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from evals.harness.model import TASKS, ProxyLM, run_harness
from evals.harness.responses import Responses
from proxytune.errors import UserError
from proxytune.exported import export
from proxytune.member import Member, Weights, load_member, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

pytestmark = pytest.mark.usefixtures("no_report_of_the_machine")

CHOICES = """
task: words_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
TEXTS = (
    CHOICES.split("output_type")[0].replace("words_choice", "words_text")
    + """
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: w9
generation_kwargs: {{until: ["w7"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
)
LAST = (
    CHOICES.split("output_type")[0].replace("words_choice", "words_last")
    + """
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list: [{{metric: acc, aggregation: mean}}, {{metric: perplexity, aggregation: perplexity}}]
"""
)
ROLLING = (
    CHOICES.split("output_type")[0].replace("words_choice", "words_rolling")
    + """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
)
NAMES = ["words_choice", "words_text", "words_last", "words_rolling"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in torch.randint(3, 50, (count,), generator=generator).tolist())

    rows = [{"text": words(4 + number % 9), "choices": [words(1 + place % 3) for place in range(4)]} for number in range(14)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text in (CHOICES, TEXTS, LAST, ROLLING):
        content = text.format(folder=folder)
        (folder / f"{content.split('task: ')[1].split()[0]}.yaml").write_text(content)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: Any, tasks: TaskManager, names: list[str] = NAMES, **options: Any) -> dict[str, Any]:
    return simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0, log_samples=True, **options)


def answers(results: dict[str, Any], name: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])]


# The harness adds up in fp32, which for a long text rounds by more than 1e-5; ours adds up in fp64.
def same(one: dict[str, Any], other: dict[str, Any], names: list[str] = NAMES) -> bool:
    for name in names:
        for first, second in zip(answers(one, name), answers(other, name), strict=True):
            for mine, yours in zip(first, second, strict=True):
                mine, yours = (answer[0] if isinstance(answer, list) else answer for answer in (mine, yours))
                if isinstance(mine, str) and mine.replace(".", "").replace("-", "").isdigit():
                    mine, yours = float(mine), float(yours)
                numbers = list(zip(mine, yours, strict=True)) if isinstance(mine, tuple | list) else [(mine, yours)]
                for a, b in numbers:
                    if a != b and not (isinstance(a, float) and abs(a - b) < 1e-5 + 4e-7 * abs(a)):
                        return False
    return True


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}], ids=["zero-shot", "few-shot"])
def test_at_strength_zero_every_request_is_answered_as_by_the_harness(tasks: TaskManager, options: dict[str, Any]) -> None:
    members = make_members()
    theirs = evaluate(HFLM(pretrained=members["base"].model, tokenizer=members["base"].tokenizer, device="cpu", batch_size=4), tasks, **options)
    assert same(evaluate(ProxyLM.of(members, proxy_tuning(0.0)), tasks, **options), theirs)
    assert not same(evaluate(ProxyLM.of(members, proxy_tuning(1.0)), tasks, **options), theirs)


def test_a_proxy_is_answered_as_the_harness_answers_for_the_mixture_as_a_model(tasks: TaskManager) -> None:
    members = make_members()
    whole = ProxyTunedForCausalLM(members, proxy_tuning(0.7))
    theirs = HFLM(pretrained=whole, tokenizer=members["base"].tokenizer, device="cpu", batch_size=4, backend="causal")
    assert same(evaluate(ProxyLM.of(members, proxy_tuning(0.7)), tasks), evaluate(theirs, tasks))


def test_what_is_too_long_is_cut_as_the_harness_cuts_it_and_said(tasks: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    members = make_members()
    theirs = HFLM(pretrained=members["base"].model, tokenizer=members["base"].tokenizer, device="cpu", batch_size=4, max_length=8)
    ours = ProxyLM.of(members, {"base": 1.0}, max_length=8)
    names = ["words_choice", "words_last", "words_rolling"]
    assert same(evaluate(ours, tasks, names), evaluate(theirs, tasks, names), names)
    assert "longer than the window of 8 tokens" in caplog.text


def test_kept_answers_are_given_again_and_never_for_another_model(tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, counted = str(tmp_path / "answers.db"), Counted(monkeypatch)
    few = functools.partial(evaluate, tasks=tasks, limit=4)
    first = few(ProxyLM.of(make_members(), proxy_tuning(0.5), cache=cache))
    assert counted.passes > 0
    for hit in ({"batch_size": 2}, {"batch_tokens": 50}):
        counted.passes = 0
        assert same(few(ProxyLM.of(make_members(), proxy_tuning(0.5), cache=cache, **hit)), first)
        assert counted.passes == 0
    other = make_members("qwen2")
    changed = make_members()
    with torch.no_grad():
        next(changed["expert"].model.parameters()).view(-1)[0] += 1.0
    swapped = make_members()
    swapped["expert"], swapped["antiexpert"] = swapped["antiexpert"], swapped["expert"]
    for members, mixture in (
        (make_members(), proxy_tuning(0.6)),
        (make_members(), {"base": 1.0}),
        (make_members(), {"expert": 1.0}),
        (other, proxy_tuning(0.5)),
        (changed, proxy_tuning(0.5)),
        (swapped, proxy_tuning(0.5)),
    ):
        counted.passes = 0
        kept = few(ProxyLM.of(members, mixture, cache=cache))
        assert counted.passes > 0
        assert same(kept, few(ProxyLM.of(members, mixture)))
    counted.passes = 0
    few(ProxyLM.of(make_members(), proxy_tuning(0.5), cache=cache, max_length=7), names=["words_choice"])
    assert counted.passes > 0


def test_further_mixtures_are_answered_in_the_same_passes(tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, counted = str(tmp_path / "answers.db"), Counted(monkeypatch)
    names = ["words_choice", "words_last"]
    more = {"base": {"base": 1.0}, "strong": proxy_tuning(1.5)}
    evaluate(ProxyLM.of(make_members(), proxy_tuning(0.5), cache=cache, mixtures=more), tasks, names)
    counted.passes = 0
    for mixture in more.values():
        assert same(
            evaluate(ProxyLM.of(make_members(), mixture, cache=cache), tasks, names),
            evaluate(ProxyLM.of(make_members(), mixture), tasks, names),
            names,
        )
        passes, counted.passes = counted.passes, 0
        assert passes > 0  # of the uncached twin
    kept = ProxyLM.of(make_members(), more["strong"], cache=cache)
    evaluate(kept, tasks, names)
    assert counted.passes == 0


def test_the_harness_cache_is_refused(tasks: TaskManager, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use_cache: its answers are kept by request alone"):
        evaluate(ProxyLM.of(make_members(), proxy_tuning(0.5)), tasks, use_cache=str(tmp_path / "theirs"))


def test_sampled_texts_are_not_kept(tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, counted = ProxyLM.of(make_members(), proxy_tuning(0.5), cache=str(tmp_path / "answers.db")), Counted(monkeypatch)
    drawn = {"gen_kwargs": {"do_sample": True, "temperature": 1.0}}
    for _ in range(2):
        counted.passes = 0
        evaluate(lm, tasks, ["words_text"], **drawn)
        assert counted.passes > 0


def test_empty_texts_zero_and_infinity_are_answers(tmp_path: Path) -> None:
    kept = Responses(tmp_path / "answers.db")
    kept.put({"a": "", "b": [0.0, False], "c": [float("-inf"), True]})
    again = Responses(tmp_path / "answers.db")
    assert [again.get(key) for key in "abcd"] == ["", [0.0, False], [float("-inf"), True], None]
    (tmp_path / "not.db").write_bytes(b"something else that is no database" * 99)
    with pytest.raises(UserError, match="cannot be opened as a file of answers"):
        Responses(tmp_path / "not.db")


@pytest.mark.slow  # imports all of the harness in a process of its own
def test_the_harness_own_command_line_knows_the_model_and_the_tasks(tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, small = tiny_family / "base", tiny_family / "small"
    options = ["--tasks", "proxytune_world_choice", "--limit", "8", "--output_path", str(tmp_path / "out")]
    model = f"base={base},expert={small},antiexpert={small},alpha=0.5"
    monkeypatch.setattr(sys, "argv", [])
    run_harness(["run", "--model", "proxytune", "--model_args", model, *options])
    (written,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert config["mixture"][0][:2] == ["base", load_member(base).fingerprint]
    # As a process of its own: typer's context is not of the class that its annotation names, which a checked call within this one refuses.
    command = [sys.executable, "-m", "evals.cli", "lm-eval", "run", "--model", "proxytune", "--model_args", "alpha=1", *options]
    wrong = subprocess.run(command, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.strip().splitlines()[-1].startswith("proxytune: error: model_args: the base is missing")


@pytest.mark.parametrize("name", ["world_question", "world_choice", "capitals"])
def test_the_tasks_that_need_no_download_run(name: str, tiny_family: Path) -> None:
    member = load_member(tiny_family / "small")
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        model=ProxyLM.of({"base": member}, {"base": 1.0}), tasks=[f"proxytune_{name}"], task_manager=manager, limit=6, bootstrap_iters=0
    )
    found = {key.split(",")[0]: value for key, value in results["results"][f"proxytune_{name}"].items() if isinstance(value, float)}
    assert found
    assert all(0 <= value <= 1 for value in found.values())


STORED: dict[str, dict[str, list[dict[str, Any]]]] = {
    "gsm8k": {"train": [{"question": "w4 w5", "answer": "w6 #### 7"}], "test": [{"question": "w5 w6", "answer": "so #### 1,234"}]},
    "triviaqa": {"test": [{"question": "w5 w6", "answer": {"value": "w7", "aliases": ["W7", "The w8!"]}}]},
    "truthfulqa": {
        "test": [
            {
                "question": "w5 w6",
                "mc1_targets": {"choices": ["w7", "w8"], "labels": [1, 0]},
                "mc2_targets": {"choices": ["w7", "w8", "w9"], "labels": [1, 0, 1]},
            }
        ]
    },
    "mmlu": {
        "test": [{"question": "w5", "choices": ["w6", "w7", "w8", "w9"], "answer": 2}],
        "dev": [{"question": "w6", "choices": ["w6", "w7", "w8", "w9"], "answer": 1}],
    },
}


@pytest.mark.parametrize("name", STORED)
def test_stored_sets_are_read_from_a_folder_or_named_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXYTUNE_DATA", str(tmp_path))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    lm = ProxyLM.of({"base": make_members()["base"]}, {"base": 1.0}, max_gen_toks=4, max_length=128)
    options: dict[str, Any] = {"model": lm, "tasks": [f"proxytune_{name}"], "task_manager": manager, "bootstrap_iters": 0}
    with pytest.raises(UserError, match=f"{name}: .*set PROXYTUNE_DATA to a folder that holds {name}/test.jsonl"):
        simple_evaluate(**options)
    for split, rows in STORED[name].items():
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = {"gen_kwargs": {"max_gen_toks": 4}} if name in ("gsm8k", "triviaqa") else {}
    results = simple_evaluate(**options, **short)["results"][f"proxytune_{name}"]
    assert any(isinstance(value, float) for value in results.values())
    assert {place.name for place in (tmp_path / name).iterdir()} == {f"{split}.jsonl" for split in STORED[name]}  # nothing is put beside the data


def test_answer_rules_of_the_tasks() -> None:
    from evals.harness.tasks.sources import calibration_error, choose, name_one, read_rightly, solve, truth

    gold = STORED["gsm8k"]["test"][0]
    for text, right, unparsed in (
        ("it is 1234.", 1, 0),
        ("1,234 dollars", 1, 0),
        ("1234 and 5", 0, 0),
        ("none", 0, 1),
        ("-1234", 0, 0),
        ("1234.0", 1, 0),
    ):
        assert solve(gold, [text]) == {"exact_match": right, "unparsed": unparsed}
    trivia = STORED["triviaqa"]["test"][0]
    for text, right, unparsed in (("w8", 1, 0), (" the W7.\nmore", 1, 0), ("w7 w8", 0, 0), ("\nw7", 0, 1)):
        assert name_one(trivia, [text]) == {"exact_match": right, "unparsed": unparsed}
    item = {"question": "q", "answer": "red", "reply": "", "choices": ["red", "blue"]}
    for text, right, unparsed in (("Red.", 1, 0), ("reddish", 0, 1), ("blue", 0, 0)):
        assert read_rightly(item, [text]) == {"exact_match": right, "unparsed": unparsed}
    for text, right, unparsed in (("it is Red.", 1, 0), ("red", 0, 0), ("it is blue", 0, 0), ("it is", 0, 1)):
        assert read_rightly(item | {"reply": "it is red"}, [text]) == {"exact_match": right, "unparsed": unparsed}
    found = choose({"gold": 1}, [(-3.0, False), (-1.0, True), (-2.0, False)])
    sure = float(torch.tensor([-3.0, -1.0, -2.0]).softmax(0)[1])
    assert found["acc"] == 1
    assert found["brier"] == pytest.approx((1 - sure) ** 2, abs=1e-6)
    assert found["calibration_error"] == (pytest.approx(sure, abs=1e-6), True)
    assert choose({"gold": 0}, [(-3.0, False), (-1.0, True)])["acc"] == 0
    assert calibration_error([(0.95, True), (0.95, False), (0.55, True)]) == pytest.approx((0.9 + 0.45) / 3)
    logs = [-1.0, -2.0, -1.0, -2.0, -3.0]
    share = (torch.tensor(logs[2:]).exp() / torch.tensor(logs[2:]).exp().sum())[[0, 2]].sum()
    found = truth(STORED["truthfulqa"]["test"][0], [(log, False) for log in logs])
    assert found["mc1"] == 1
    assert found["mc2"] == pytest.approx(float(share), abs=1e-6)


def test_an_exported_mixture_is_loaded_by_transformers_and_the_stock_harness(lora_family: Path, tasks: TaskManager, tmp_path: Path) -> None:
    small = str(lora_family / "small")
    sources = {"base": Weights(str(lora_family / "base")), "expert": Weights(small, lora_family / "polite"), "antiexpert": Weights(small)}
    export(sources, proxy_tuning(0.5), tmp_path / "exported")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = ProxyTunedForCausalLM(load_members(sources), proxy_tuning(0.5))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    assert loaded.generate(ids, max_new_tokens=6, do_sample=False).tolist() == ours.generate(ids, max_new_tokens=6, do_sample=False).tolist()
    stock = HFLM(pretrained=str(tmp_path / "exported"), trust_remote_code=True, device="cpu", max_length=100, dtype="float32")
    assert same(
        evaluate(stock, tasks, ["words_choice", "words_last"]),
        evaluate(ProxyLM.of(load_members(sources), proxy_tuning(0.5)), tasks, ["words_choice", "words_last"]),
        ["words_choice", "words_last"],
    )
    with pytest.raises(UserError, match="is there already"):
        export(sources, proxy_tuning(0.5), tmp_path / "exported")
    member = load_member(small)
    with torch.no_grad():
        next(member.model.parameters()).view(-1)[0] += 1.0
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    member.model.save_pretrained(tmp_path / "other")
    member.tokenizer.save_pretrained(tmp_path / "other")
    config["members"]["antiexpert"]["path"] = str(tmp_path / "other")
    (tmp_path / "exported" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"antiexpert: .* holds other weights than were exported"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    assert isinstance(member, Member)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_code_tasks_are_judged_in_the_sandbox_and_only_when_confirmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.harness.tasks.sources import complete_function, write_program

    doc = {
        "prompt": "def f(x):\n    'Doubles.'\n",
        "test": "def check(g):\n    assert g(2) == 4\n",
        "entry_point": "f",
        "canonical_solution": "    return 2 * x\n",
    }
    verdicts = [complete_function(doc, [text])["pass_at_1"] for text in ("    return 2 * x", "    return x", "    import os; os._exit(0)", "  oh")]
    assert verdicts == [1, 0, 0, 0]
    asked = {"text": "Double.", "code": "", "test_setup_code": "", "test_list": ["assert twice(2) == 4", "assert twice(0) == 0"]}
    written = [
        write_program(asked, [text])["pass_at_1"] for text in ("def twice(x):\n    return x + x", "def twice(x):\n    return 4", "twice = None")
    ]
    assert written == [1, 0, 0]
    wrapped = asked | {"test_list": ["assert set(twice([1])) == {2}"]}
    assert write_program(wrapped, ["def twice(xs):\n    return [2 * x for x in xs]"])["pass_at_1"] == 1
    monkeypatch.setenv("PROXYTUNE_DATA", str(tmp_path))
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "test.jsonl").write_text(json.dumps(doc) + "\n")
    lm = ProxyLM.of({"base": make_members()["base"]}, {"base": 1.0}, max_length=128)
    options: dict[str, Any] = {"model": lm, "tasks": ["proxytune_humaneval"], "bootstrap_iters": 0, "gen_kwargs": {"max_gen_toks": 4}}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    with pytest.raises(ValueError, match="unsafe"):
        simple_evaluate(**options, task_manager=manager)
    found = simple_evaluate(**options, task_manager=manager, confirm_run_unsafe_code=True)["results"]["proxytune_humaneval"]
    assert found["pass_at_1,none"] == 0
