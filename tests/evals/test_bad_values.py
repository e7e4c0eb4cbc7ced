"""Values that nobody means: each is one line that names it, and is never echoed whole; what is beside it still works."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import GOOD, changed, load, make_model
from typer.testing import CliRunner

from evals.cli import app
from evals.commands.tune import Run, tune_one
from evals.kinds import check_labels
from evals.released.rescore import PASS
from evals.results.comparison import PARTS
from evals.results.header import Header
from evals.results.items import FILE, read_items_of
from evals.results.summary import Results
from evals.running.progress import Display
from evals.study import Study, expanded
from evals.yaml_file import MOST_NODES
from finetune.encoding import check_prompt
from finetune.recipe import LARGEST_RANK, LARGEST_SEED, Tuning
from finetune.trainers import _check_targets
from proxytune.content import as_json
from proxytune.errors import LONGEST, UserError, brief, shortened

TEXT = yaml.safe_dump(GOOD, sort_keys=False)
LONG = "x" * 1_000_000
DIGITS = "9" * 5000


def refusal(tmp_path: Path, study: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(tmp_path, study)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 3000
    return message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT.replace("  full:", "  proxy:"), "the key 'proxy' stands twice, first on line 14; rename or remove one"),
        (TEXT + "seeds: [1]\nseeds: [2]\n", "the key 'seeds' stands twice"),
        ("x: 1\n&a y: 1\n*a : 2\n", "the key 'y' stands twice, first on line 2"),
        (TEXT + "? 0x10\n: 1\n? 16\n: 2\n", "the key 16 stands twice"),
        (TEXT.replace("learning_rate: 0.001", "learning_rate: 0.001\n      learning_rate: 0.002", 1), "the key 'learning_rate' stands twice"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path: Path, text: str, words: str) -> None:
    message = refusal(tmp_path, text)
    assert words in message
    assert " line " in message
    assert load(tmp_path, TEXT + "seeds: [1]\n").seeds == (1,)


def test_aliases_are_read_and_merged_as_long_as_they_end(tmp_path: Path) -> None:
    shared = TEXT.replace("tuning:\n      method", "tuning: &t\n      method", 1)
    place = shared.rindex("tuning:\n")
    again = load(tmp_path, shared[:place] + "tuning:\n      <<: *t\n      learning_rate: 0.5\n" + shared[shared.index("measures") :] * 0)
    assert again.arms["full"].tuning == Tuning(method="full", learning_rate=0.5)
    bomb = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(30))
    assert f"more than {MOST_NODES:,} values" in refusal(tmp_path, bomb)
    assert f"more than {MOST_NODES:,} values" in refusal(tmp_path, "a: &a [*a]\n")
    assert f"more than {MOST_NODES:,} values" in refusal(tmp_path, "a: &a {b: *a}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000, "nested too deeply"),
        ("a: " + "{b: " * 2000, "nested too deeply"),
        (f"seeds: [{DIGITS}]", "cannot be read as YAML"),
        (f"seeds: {{{DIGITS}: 1}}", "cannot be read as YAML"),
        ("study: 2020-13-01", "cannot be read as YAML"),
        ("study: !!int ''", "cannot be read as YAML"),
        ("study: !!bool perhaps", "cannot be read as YAML"),
        ("study: !!timestamp x", "cannot be read as YAML"),
        ("[a]: 1", "cannot be read as YAML"),
        ("", "must hold keys and values, not NoneType"),
        (f"{LONG}: 1", "cannot be read as YAML|there is no such key"),
        (f"? {LONG[:9000]}\n: 1", "there is no such key"),
        (f"study: {LONG}!", "study: .*pattern"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_short_line(tmp_path: Path, text: str, words: str) -> None:
    message = refusal(tmp_path, text)
    assert any(word.split(".*")[0] in message for word in words.split("|"))


@pytest.mark.parametrize(
    ("study", "words"),
    [
        (
            changed("arms", "proxy", "alpha", value=[0.3333333, 0.33333331]),
            "arms.proxy.alpha: alpha: 0.3333333 and 0.33333331 are equal to six digits",
        ),
        (changed("arms", "proxy", "alpha", value=[1, 0.5, 1]), "1.0 and 1.0 are equal to six digits"),
        (
            changed("arms", "full", "sweep", value={"learning_rate": [1e-3, 1.0000001e-3]}),
            "arms.full: sweep.learning_rate: 0.001 and 0.0010000001 are equal to six digits",
        ),
        (changed("seeds", value=[-1]), "seeds.0: .*greater than or equal to 0, not -1"),
        (changed("seeds", value=[2**70]), "seeds.0: .*less than or equal to 4294967295"),
        (changed("seeds", value=[10**4000]), "seeds.0: "),
        (changed("threads", value=10**4000), "threads: "),
        (changed("arms", "proxy", "alpha", value=[10**400]), "arms.proxy.alpha.0: "),
        (changed("contrasts", value=[["full", "base"], ["proxy@1", "base"], ["full", "base"]]), "contrasts: ['full', 'base'] stands there twice"),
        (changed("arms", "full", "tuning", value={"method": "lora", "learning_rate": 1, "rank": 10**7}), "arms.full.tuning.rank: "),
        (changed("arms", "full", "kind", value=LONG), "arms.full: "),
        (changed("arms", "proxy", "alpha", value=[LONG]), "arms.proxy.alpha.0: "),
        (changed("measures", value=[LONG]), "measures: there is no measure "),
        (changed("direct", value=LONG), "direct must name an arm"),
        (changed("contrasts", value=[[LONG, "base"]]), "contrasts: there is no arm"),
        (changed("arms", LONG, value={"kind": "expert"}), "arms."),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_study_values_that_nobody_means(tmp_path: Path, study: Any, words: str) -> None:
    message = refusal(tmp_path, study)
    assert all(part in message for part in words.split(".*"))
    assert LONG[:4000] not in message


def test_study_values_beside_them_are_taken(tmp_path: Path) -> None:
    assert list(load(tmp_path, changed("arms", "proxy", "alpha", value=[0.333333, 0.333334])).arm_settings)[2:4] == [
        "proxy@0.333333",
        "proxy@0.333334",
    ]
    assert load(tmp_path, changed("seeds", value=[0, LARGEST_SEED])).seeds == (0, LARGEST_SEED)
    assert len(load(tmp_path, changed("contrasts", value=[["full", "base"], ["base", "full"]])).contrasts) == 2
    assert Tuning(method="lora", learning_rate=1, rank=LARGEST_RANK).rank == LARGEST_RANK
    assert check_labels("x", (1e-3, 1e-4)) == (1e-3, 1e-4)


@pytest.mark.parametrize(
    "template",
    [
        "{question:>1000000000}",
        "{question.__class__}",
        "{question!r}",
        "{question!r:>9}",
        "{question[0]}",
        "{question:{question}}",
        "{}",
        "{0}",
        "{",
        "Q",
        "{question}{question}",
        "{" + LONG + "}",
        "{question:" + LONG + "}",
    ],
    ids=lambda value: value[:24],
)
def test_prompts_take_the_question_as_it_is(template: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        check_prompt(template)
    assert len(str(refused.value)) < 300
    for good in ("{question}", "{{a}} {question}: {{}}", "chat"):
        assert check_prompt(good) == good


def run(tmp_path: Path, **changes: Any) -> Run:
    settings = {"method": "lora", "rank": 2} | changes.pop("settings", {})
    return Run("nothing", "nothing.jsonl", tmp_path / "out", settings, changes.pop("prompt", "{question}"), 0, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"rank": 10**7}}, "--rank: .*less than or equal to 16384, not 10000000"),
        ({"settings": {"rank": 10**5000}}, "--rank: "),
        ({"settings": {"epochs": 1e300}}, "--epochs: .*less than or equal to"),
        ({"settings": {"batch_size": 10**30}}, "--batch-size: .*less than or equal to"),
        ({"settings": {"learning_rate": LONG}}, "--learning-rate: "),
        ({"prompt": "{question:>9}"}, "--prompt: the only placeholder must be .*, not '{question:>9}'"),
        ({"prompt": "{question:" + LONG + "}"}, "--prompt: the only placeholder must be "),
    ],
)
def test_tune_refuses_them_in_one_short_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        tune_one(run(tmp_path, **changes), Display())
    assert len(str(refused.value)) < 500
    with pytest.raises(UserError, match=r"there is no file 'nothing\.jsonl'"):  # what is beside them goes on to the data
        tune_one(run(tmp_path), Display())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_targets_are_layers_of_the_model(architecture: str) -> None:
    model = make_model(architecture)
    good = ["q_proj", "mlp.up_proj", "embed_tokens", "lm_head"] if architecture == "llama" else ["c_attn", "attn.c_proj", "wte"]
    _check_targets(good, model)
    for wrong in ("q_porj", "mlp", "proj", "ln_1", "norm", "", LONG):
        with pytest.raises(UserError, match=f"targets: no layer that LoRA can adapt is called .*; there are .*{good[0]}") as refused:
            _check_targets([good[0], wrong], model)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "m", "d", "--out", "o", "--seed", "-1"],
        ["tune", "m", "d", "--out", "o", "--seed", str(2**70)],
        ["tune", "m", "d", "--out", "o", "--seed", DIGITS],
        ["tune", "m", "d", "--out", "o", "--rank", DIGITS],
        ["world", "build", "tiny", "--seed", "-1"],
        ["world", "build", "tiny", "--seed", "1", "--seed", str(2**70)],
        ["items", "x", "--limit", DIGITS],
        ["generate", "x", "--base", "m", "--threads", str(2**70)],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_numbers_on_the_command_line_have_bounds(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "Invalid value for '--" in done.output
    assert DIGITS[:1000] not in done.output


def test_a_home_that_is_not_there_is_part_of_the_name() -> None:
    assert expanded("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    assert expanded("~/x") == Path.home() / "x"
    assert expanded("a/~/x") == Path("a/~/x")


def test_a_study_that_names_such_a_home_misses_its_file(tmp_path: Path) -> None:
    study = {key: value for key, value in GOOD.items() if key != "worlds"} | {"models": {"base": "~nobody-of-this-name/b", "small": "s"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"data": {"train": "~nobody-of-this-name/t.jsonl", "test": "t.jsonl"}}))
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError)
    assert "data.train: there is no file" in str(done.exception)


def test_only_numbers_stand_after_pass() -> None:
    for name in ("pass@²", "pass@", "pass@0", "pass@-1", "pass@1.0", "pass@" + DIGITS, "pass@x", "xpass@1"):
        assert PASS.fullmatch(name) is None
    assert [PASS.fullmatch(name)[1] for name in ("pass@1", "pass@100")] == ["1", "100"]  # type: ignore[index]


def test_items_of_other_columns_are_refused(tmp_path: Path) -> None:
    good = pd.DataFrame(
        {"reading": ["task"], "world": [None], "seed": [0], "arm": ["base"], "unit": ["u"], "question": ["q"], "answer": ["a"], "text": ["t"]}
        | {"right": [True], "unparsed": [False]}
    )
    good.to_parquet(tmp_path / FILE)
    assert read_items_of(tmp_path)["right"].tolist() == [1.0]  # of an earlier version: a bool, and no column tied
    for frame, words in (
        (pd.DataFrame(), "lacks the columns reading, world, seed, arm, question"),
        (pd.DataFrame({"a": [1]}), "lacks the columns reading"),
        (good.drop(columns="text"), "lacks the columns text; give the folder"),
        (good.assign(right=["perhaps"]), "holds other values than proxytune compare writes"),
        (good.assign(right=[[1]]), "holds other values than proxytune compare writes"),
    ):
        frame.to_parquet(tmp_path / FILE)
        with pytest.raises(UserError, match=words):
            read_items_of(tmp_path)
        done = CliRunner().invoke(app, ["items", str(tmp_path), "--format", "json"])
        assert isinstance(done.exception, UserError)
    (tmp_path / FILE).write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"holds no items\.parquet"):
        read_items_of(tmp_path)
    good.to_parquet(tmp_path / FILE)
    done = CliRunner().invoke(app, ["items", str(tmp_path), "--format", "json"])
    assert json.loads(done.stdout) == [{"seed": "0", "question": "q", "answer": "a", "base": "✓ t"}]


def test_json_has_null_for_what_is_no_number() -> None:
    values = {"a": math.nan, "b": [math.inf, -math.inf, np.float64("nan"), 1.5, 2], "c": ({"d": math.nan},), "e": "NaN", "f": None, "g": True}
    text = as_json(values)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, None, None, 1.5, 2],
        "c": [{"d": None}],
        "e": "NaN",
        "f": None,
        "g": True,
    }
    results = Results(Header("s", (0,), (), "base", {"base": "base"}), {}, [{"value": math.nan}], {part: [] for part in PARTS}, [])
    assert json.loads(results.json(), parse_constant=pytest.fail)["rows"] == [{"value": None}]
    plain = {"a": [1, 2.5, {"b": "c"}], "d": {}}
    assert as_json(plain) == json.dumps(plain, indent=1)


def test_messages_are_cut_in_the_middle() -> None:
    assert str(UserError("field: short; do this")) == "field: short; do this"
    message = str(UserError(f"field: {LONG}; do this"))
    assert len(message) < LONGEST + 10
    assert message.startswith("field: x")
    assert message.endswith("x; do this")
    assert shortened("abcd", 4) == "abcd"
    assert len(brief(LONG)) < 100
    assert len(brief([LONG] * 50)) < 700
    assert len(brief(10**9999)) < 100
    assert brief("red") == "'red'"
    assert brief(0.5) == "0.5"
    assert Study.model_validate(GOOD).study == "good"
