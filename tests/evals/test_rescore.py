"""Released generations scored again: metrics known by hand, gaps, pairs, tables."""

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import choice_items, math_items, patterned, row_of, run_command, three_systems, write_math, write_rows
from scipy.stats import beta

from evals.display.render import draw
from evals.released.rescore import execute_in_sandbox, read_roles, rescore
from evals.released.tables import rescore_tables
from evals.running.progress import Display
from evals.sandbox import Program
from evals.statistics.intervals import bootstrap_means, gap_closed
from proxytune.errors import UserError

ROLES = {"base": "raw", "proxy": "steered*", "direct": "tuned"}
FULL = {"base": "raw", "proxy": "steered*", "direct": "tuned", "expert": "small"}


def test_math_reads_the_text_in_both_ways(tmp_path: Path) -> None:
    outputs = ["12.00", "so 7.5", "-3 degrees", "1,000", "no idea", "4 or 5"]
    write_rows(tmp_path / "sums" / "raw", "predictions.jsonl", math_items(outputs, ["12", "75", "-3", "1000", "1", "4"]))
    write_rows(tmp_path / "sums" / "raw", "metrics.json", {"exact_match": 3 / 6, "comment": "text", "flag": True})
    results = rescore(tmp_path)
    exact, equal = row_of(results, "exact match"), row_of(results, "equal number")
    assert exact["ours"] == exact["published"] == 0.5  # 7.5 for 75, -3 and 1000: sign and point are dropped, so that 12.00 is 1200
    assert (exact["difference"], exact["note"], exact["n"], exact["unparsed"]) == (0, "", 6, 1)
    assert equal["ours"] == 0.5  # 12.00, -3 and 1000
    assert equal["note"] == "1 right but written otherwise (12.00 for 12); 1 equal to the answer only without sign and point (7.5 for 75)"
    assert equal["low"] <= 0.5 <= equal["high"]


def test_a_wrong_extraction_changes_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "sums" / "raw", "predictions.jsonl", math_items(["4 and then 5", "9, so 2"], ["5", "2"]))
    assert row_of(rescore(tmp_path), "exact match")["ours"] == 1
    monkeypatch.setattr("evals.released.generations.last_number", lambda text: text[0])
    assert row_of(rescore(tmp_path), "exact match")["ours"] == 0


def test_a_published_number_that_no_reading_gives_is_said_to_differ(tmp_path: Path) -> None:
    write_math(tmp_path, "raw", [True, False], published=0.75)
    row = row_of(rescore(tmp_path), "exact match")
    assert (row["ours"], row["difference"]) == (0.5, -0.25)
    assert "no reading" in row["note"]


def test_choice_drops_the_unparsed_or_counts_them_as_wrong(tmp_path: Path) -> None:
    items = choice_items([" A", " (B", "C", "dunno", "America"], "ABABB")
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", items)
    write_rows(tmp_path / "facts" / "raw", "mc_metrics.json", {"acc": 0.5, "num_invalid_predictions": 1, "tot": 5})
    results = rescore(tmp_path)
    parsed, all_of_them = row_of(results, "choice of the parsed"), row_of(results, "choice")
    assert (parsed["ours"], parsed["published"], parsed["n"], parsed["unparsed"], parsed["note"]) == (0.5, 0.5, 4, 1, "")
    assert (all_of_them["ours"], all_of_them["n"], all_of_them["unparsed"]) == (0.4, 5, 2)
    assert all_of_them["difference"] == pytest.approx(-0.1)
    assert all_of_them["note"] == "2 unparsed count as wrong"


def test_nothing_parsed_is_no_share(tmp_path: Path) -> None:
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", choice_items(["dunno", "?"], "AB"))
    results = rescore(tmp_path)
    assert row_of(results, "choice of the parsed")["ours"] is None
    assert row_of(results, "choice")["ours"] == 0
    json.dumps(results, allow_nan=False)


def test_judgements(tmp_path: Path) -> None:
    judged = [(0.9, 0.8), (0.9, 0.1), (0.2, 0.7), (None, math.nan)]
    items = [{"Question": f"q{place}", "GPT-true": true, "GPT-info": info} for place, (true, info) in enumerate(judged)]
    write_rows(tmp_path / "facts" / "raw", "open_results.jsonl", items)
    write_rows(tmp_path / "facts" / "raw", "open_metrics.json", {"GPT-true acc": 0.5, "GPT-true-info acc": 0.25})
    results = rescore(tmp_path)
    values = {row["metric"]: row["ours"] for row in results["rows"]}
    expected = {"true": 0.5, "informative": 0.5, "true and informative": 0.25, "P(true)": 0.5, "P(informative)": 0.4}
    assert values == pytest.approx(expected)
    assert row_of(results, "true")["published"] == 0.5
    assert row_of(results, "informative")["published"] is None
    assert row_of(results, "true")["note"] == "2 judgements are missing and count as no"


def test_toxicity_overall_and_by_group(tmp_path: Path) -> None:
    verdicts = [("x", ["a"], 1), ("x", ["a"], 0), ("y", "b", 1), ("z", ["b"], None)]
    items = [{"text": text, "target_groups": groups, "is_toxic": verdict} for text, groups, verdict in verdicts]
    write_rows(tmp_path / "hate" / "raw", "predictions.jsonl", items)
    write_rows(tmp_path / "hate" / "raw", "metrics.json", {"a": 0.5, "b": 1.0, "overall": 2 / 3})
    results = rescore(tmp_path)
    for metric, share in {"toxic": 2 / 3, "toxic/a": 0.5, "toxic/b": 1.0}.items():
        assert row_of(results, metric)["ours"] == row_of(results, metric)["published"] == share
    assert row_of(results, "toxic")["unparsed"] == 1
    (parts,) = [table for table in rescore_tables(results) if table.title == "hate, by part"]
    assert parts.frame["raw"].tolist() == ["50.0 (50.0)", "100.0 (100.0)"]


def test_win_rate_counts_draws_as_half(tmp_path: Path) -> None:
    items = [{"instruction": f"i{place}", "preference": value} for place, value in enumerate([1, 2, 1.5, 0, 2, None])]
    write_rows(tmp_path / "chat" / "raw", "annotations.json", items)
    write_rows(tmp_path / "chat" / "raw", "metrics.json", {"win_rate": 60.0, "n_total": 5})
    row = row_of(rescore(tmp_path), "win rate")
    assert (row["ours"], row["published"], row["n"], row["unparsed"]) == (0.6, 0.6, 5, 1)


def code_tree(root: Path) -> Path:
    completions = {"t/0": ["    return 1", "    return 2", "    return 1"], "t/1": ["    return 3", "    return 3", "    oh no"]}
    items = [{"task_id": task, "prompt": "def f():\n", "completion": text} for task, texts in completions.items() for text in texts]
    write_rows(root / "programs" / "raw", "predictions.jsonl", items)
    write_rows(root / "programs" / "raw", "metrics.json", {"pass@2": 0.5})
    lines = [
        json.dumps({"task_id": task, "prompt": "def f():\n", "test": f"def check(f):\n    assert f() == {value}\n", "entry_point": "f"})
        for task, value in {"t/0": 1, "t/1": 2}.items()
    ]
    path = root.parent / "tests.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_code_runs_only_where_a_runner_is_given(tmp_path: Path) -> None:
    tests = code_tree(tmp_path / "tree")
    seen: list[Program] = []

    def run(programs: Sequence[Program]) -> list[bool]:
        seen.extend(programs)
        verdicts = []
        for program in programs:
            try:
                exec(f"{program.solution}\n{program.test}", {})  # these six are written above
                verdicts.append(True)
            except (AssertionError, SyntaxError):
                verdicts.append(False)
        return verdicts

    results = rescore(tmp_path / "tree", run, humaneval=tests)
    assert len(seen) == 4  # different programs only
    assert row_of(results, "pass@1")["ours"] == pytest.approx((2 / 3 + 0) / 2)
    assert row_of(results, "pass@2")["ours"] == row_of(results, "pass@2")["published"] == 0.5
    for given, note in ((None, "not executed"), (run, "not executed: no tests were given")):
        row = row_of(rescore(tmp_path / "tree", given), "pass@2")
        assert (row["ours"], row["published"], row["note"]) == (None, 0.5, note)


def test_code_errors(tmp_path: Path) -> None:
    tests = code_tree(tmp_path / "tree")
    with pytest.raises(UserError, match="3 verdicts on 4 programs"):
        rescore(tmp_path / "tree", lambda programs: [True] * 3, humaneval=tests)
    tests.write_bytes(gzip.compress(json.dumps({"task_id": "t/0", "prompt": "", "test": "", "entry_point": "f"}).encode()))
    with pytest.raises(UserError, match="no test for task 't/1'"):
        rescore(tmp_path / "tree", lambda programs: [True] * len(programs), humaneval=tests)
    tests.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        rescore(tmp_path / "tree", lambda programs: [True] * len(programs), humaneval=tests)


def test_the_prompt_is_the_benchmarks_own(tmp_path: Path) -> None:
    """A released prompt runs nowhere: on the tests' side it could redefine what they compare with."""
    tests = code_tree(tmp_path / "tree")
    path = tmp_path / "tree" / "programs" / "raw" / "predictions.jsonl"
    released = path.read_text()
    path.write_text(released.replace("def f():\\n", "class Equal:\\n    pass\\ndef f():\\n"))
    with pytest.raises(UserError, match=r"^programs/raw: prompt: that of task 't/0' is not the benchmark's; give the benchmark's file"):
        rescore(tmp_path / "tree", lambda programs: [True] * len(programs), humaneval=tests)
    path.write_text(released)
    seen: list[Program] = []

    def run(programs: Sequence[Program]) -> list[bool]:
        seen.extend(programs)
        return [True] * len(programs)

    assert row_of(rescore(tmp_path / "tree", run, humaneval=tests), "pass@1")["ours"] == 1
    assert {program.setup for program in seen} == {"def f():\n"}


def code_pair(root: Path, prompt: str, test: str) -> Path:
    """A right and a wrong answer to one task; what is given is the benchmark's."""
    items = [{"task_id": "t/0", "prompt": prompt, "completion": f"    return {value}"} for value in (1, 2)]
    write_rows(root / "tree" / "programs" / "raw", "predictions.jsonl", items)
    write_rows(root, "tests.jsonl", [{"task_id": "t/0", "prompt": prompt, "test": test, "entry_point": "f"}])
    return root / "tests.jsonl"


@pytest.mark.parametrize(
    ("prompt", "test"),
    [
        ("import nothing_such\n\ndef f():\n    'One.'\n", "def check(f):\n    assert f() == 1\n"),
        ("def f(:\n", "def check(f):\n    assert f() == 1\n"),
        ("def f():\n    'One.'\n", "def check(f:\n"),
    ],
)
def test_a_benchmark_that_fails_by_itself_is_no_failed_answer(tmp_path: Path, prompt: str, test: str) -> None:
    run = execute_in_sandbox(Display())
    with pytest.raises(UserError, match="the benchmark's prompt or tests of 'f' fail before any answer is tried"):
        rescore(tmp_path / "tree", run, humaneval=code_pair(tmp_path, prompt, test))
    tests = code_pair(tmp_path, "def f():\n    'One.'\n", "def check(f):\n    assert f() == 1\n")
    assert row_of(rescore(tmp_path / "tree", run, humaneval=tests), "pass@1")["ours"] == 0.5


def test_gap_closed_is_the_house_statistic(tmp_path: Path) -> None:
    systems = three_systems(tmp_path)
    results = rescore(tmp_path, roles=ROLES)
    (row,) = [row for row in results["gap_closed"] if row["metric"] == "equal number"]
    assert (row["role"], row["base"], row["arm"], row["direct"], row["n"]) == ("proxy", "raw", "steered-1", "tuned", 40)
    right = np.stack([systems[name] for name in ("raw", "steered-1", "tuned")]).astype(float)
    expected = gap_closed(bootstrap_means([right], shares=True), 1, 0, 2)
    assert expected is not None
    assert row["value"] == pytest.approx(0.5)
    assert row["published"] == pytest.approx(0.5)
    assert row["capped"] == row["value"]
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_intervals_are_those_of_compare(tmp_path: Path) -> None:
    """Beta(x + 1, n - x + 1) for x of n right: an interval also where all are right, as a plain bootstrap has not."""
    for right, wrong in ((1, 0), (5, 0), (30, 10)):
        write_math(tmp_path / str(right), "raw", patterned((True, right), (False, wrong)))
        row = row_of(rescore(tmp_path / str(right)), "equal number")
        low, high = beta.ppf([0.025, 0.975], right + 1, wrong + 1)
        assert row["ours"] == right / (right + wrong)
        assert row["low"] == pytest.approx(low, abs=0.02)
        assert row["high"] == (pytest.approx(high, abs=0.02) if wrong else 1)
    assert row["low"] < row["ours"] < row["high"]


def test_what_is_left_out_of_the_mean_is_not_resampled(tmp_path: Path) -> None:
    """99 answers without a letter do not narrow the interval of the one that has one."""
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", choice_items(["A"] + ["dunno"] * 99, "A" * 100))
    parsed = row_of(rescore(tmp_path), "choice of the parsed")
    assert (parsed["ours"], parsed["n"], parsed["high"]) == (1, 1, 1)
    assert parsed["low"] == pytest.approx(beta.ppf(0.025, 2, 1), abs=0.02)


def test_systems_with_other_items_left_out_keep_their_own_means(tmp_path: Path) -> None:
    outputs = {"raw": ["A"] * 10 + ["B"] * 30, "steered": ["A"] * 20 + ["B"] * 20, "tuned": ["A"] * 30 + ["B"] * 10}
    outputs["steered"][0] = outputs["tuned"][1] = "dunno"
    for system, said in outputs.items():
        write_rows(tmp_path / "facts" / system, "mc_results.jsonl", choice_items(said, "A" * 40))
    results = rescore(tmp_path, roles=ROLES)
    (gap,) = [row for row in results["gap_closed"] if row["metric"] == "choice of the parsed"]
    shares = {system: row_of(results, "choice of the parsed", system)["ours"] for system in outputs}
    assert shares == {"raw": 10 / 40, "steered": 19 / 39, "tuned": 29 / 39}
    assert gap["value"] == pytest.approx((shares["steered"] - shares["raw"]) / (shares["tuned"] - shares["raw"]))
    assert gap["low"] < gap["value"] < gap["high"]
    for system in ("raw", "tuned"):
        outputs[system][2:] = ["dunno"] * 38
        write_rows(tmp_path / "facts" / system, "mc_results.jsonl", choice_items(outputs[system], "A" * 40))
    outputs["steered"][1] = "dunno"
    write_rows(tmp_path / "facts" / "steered", "mc_results.jsonl", choice_items(outputs["steered"], "A" * 40))
    (gap,) = [row for row in rescore(tmp_path, roles=ROLES)["gap_closed"] if row["metric"] == "choice of the parsed"]
    assert (gap["value"], gap["note"]) == (None, "no item in common could be scored")


def test_numbers_that_json_does_not_know_are_nowhere(tmp_path: Path) -> None:
    three_systems(tmp_path)
    for system, published in {"raw": math.nan, "steered-1": math.inf, "tuned": 10**400}.items():
        (tmp_path / "sums" / system / "metrics.json").write_text(json.dumps({"exact_match": published}))
    results = rescore(tmp_path, roles=ROLES)
    json.dumps(results, allow_nan=False)
    assert {row["published"] for row in results["rows"]} == {None}
    for system, published in {"raw": 0.0, "steered-1": 1.0, "tuned": 5e-324}.items():
        (tmp_path / "sums" / system / "metrics.json").write_text(json.dumps({"exact_match": published}))
    results = rescore(tmp_path, roles=ROLES)
    json.dumps(results, allow_nan=False)
    assert [row["published"] for row in results["gap_closed"]] == [None, None]
    assert row_of(results, "exact match", "steered-1")["published"] == 1
    (tmp_path / "sums" / "raw" / "metrics.json").write_text(f'{{"exact_match": {"9" * 5000}}}')
    with pytest.raises(UserError, match=r"metrics.json:1: is not JSON \(ValueError\)"):
        rescore(tmp_path)
    write_rows(tmp_path / "facts" / "raw", "open_results.jsonl", [{"Question": "q", "GPT-true": math.inf, "GPT-info": 0.5}])
    (tmp_path / "sums" / "raw" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"open_results.jsonl:1: GPT-true: .*not inf"):
        rescore(tmp_path)


def test_gap_is_capped_or_not_available(tmp_path: Path) -> None:
    write_math(tmp_path, "raw", patterned((True, 8), (False, 32)))
    write_math(tmp_path, "tuned", patterned((True, 24), (False, 16)))
    write_math(tmp_path, "steered", patterned((True, 32), (False, 8)))
    (row,) = [row for row in rescore(tmp_path, roles=ROLES)["gap_closed"] if row["metric"] == "exact match"]
    assert (row["value"], row["capped"]) == (pytest.approx(1.5), 1.0)
    write_math(tmp_path, "tuned", patterned((False, 1), (True, 8), (False, 31)))
    results = rescore(tmp_path, roles=ROLES)
    (row,) = [row for row in results["gap_closed"] if row["metric"] == "exact match"]
    assert (row["value"], row["capped"], row["within_noise"]) == (None, None, True)
    assert results["gap_summary"] == []
    assert "n/a" in draw(rescore_tables(results), "table", 200)


def test_summary_has_the_smallest_gap_and_stands_on_published_numbers_where_items_are_missing(tmp_path: Path) -> None:
    three_systems(tmp_path)
    write_math(tmp_path, "small", patterned((True, 14), (False, 26)), published=14 / 40)
    for system, published in {"raw": 10.0, "steered-1": 18.0, "tuned": 20.0}.items():
        write_rows(tmp_path / "chat" / system, "metrics.json", {"win_rate": published})
    write_rows(
        tmp_path / "chat" / "tuned", "annotations.json", [{"instruction": str(place), "preference": 2 if place < 2 else 1} for place in range(10)]
    )
    results = rescore(tmp_path, roles=FULL)
    row = row_of(results, "win rate")
    assert (row["ours"], row["published"], row["note"]) == (None, 0.1, "published only, no items")
    (summary,) = [row for row in results["gap_summary"] if (row["role"], row["reading"]) == ("proxy", "ours")]
    assert (summary["gaps"], summary["unchecked"], summary["at"]) == (2, 1, "sums, equal number")
    assert (summary["minimum"], summary["mean"]) == (pytest.approx(0.5), pytest.approx(0.65))
    (summary,) = [row for row in results["gap_summary"] if (row["role"], row["reading"]) == ("expert", "authors")]
    assert summary["minimum"] == pytest.approx(0.25)
    assert "chat/raw: no annotations.json; its published numbers stand unchecked" in results["notes"]


def test_every_triple_and_every_mapping(tmp_path: Path) -> None:
    three_systems(tmp_path)
    write_math(tmp_path, "steered-2", [True] * 40)
    results = rescore(tmp_path, roles=[ROLES, {"base": "raw", "proxy": "tuned", "direct": "steered-1,steered-2"}])
    triples = [(row["roles"], row["arm"], row["direct"]) for row in results["gap_closed"] if row["metric"] == "exact match"]
    assert triples == [(0, "steered-1", "tuned"), (0, "steered-2", "tuned"), (1, "tuned", "steered-1"), (1, "tuned", "steered-2")]
    pairs = [(row["system"], row["other"]) for row in results["mcnemar"]]
    assert len(pairs) == len(set(pairs)) == 6


def test_arms_are_paired_by_item_and_not_by_line(tmp_path: Path) -> None:
    three_systems(tmp_path)
    before = rescore(tmp_path, roles=ROLES)["gap_closed"]
    path = tmp_path / "sums" / "tuned" / "predictions.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)))
    assert rescore(tmp_path, roles=ROLES)["gap_closed"] == before
    path.write_text("\n".join(lines[:30]))
    (row,) = [row for row in rescore(tmp_path, roles=ROLES)["gap_closed"] if row["metric"] == "equal number"]
    assert (row["n"], row["note"]) == (30, "on the 30 items in common")


def test_pairs_are_tested_on_the_items_that_one_alone_has(tmp_path: Path) -> None:
    three_systems(tmp_path)
    (row,) = [row for row in rescore(tmp_path)["mcnemar"] if (row["system"], row["other"]) == ("raw", "tuned")]
    assert (row["metric"], row["n"], row["only_system"], row["only_other"]) == ("equal number", 40, 8, 32)
    assert row["p"] == pytest.approx(2 * sum(math.comb(40, place) for place in range(9)) / 2**40)
    assert row["holm"] >= row["p"]


def test_without_roles_all_pairs_are_tested_and_no_gap_is_closed(tmp_path: Path) -> None:
    three_systems(tmp_path)
    results = rescore(tmp_path)
    assert len(results["mcnemar"]) == 3
    assert results["gap_closed"] == results["gap_summary"] == []
    assert results == rescore(tmp_path, roles={})
    assert any("no roles" in note for note in results["notes"])


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"base": "raw", "proxy": "nobody", "direct": "tuned"}, "no system matches 'nobody'"),
        ({"base": "raw", "chief": "tuned"}, "'chief' is none of"),
        ({"base": "raw", "proxy": "tuned"}, "direct is not given"),
        ({"base": "raw", "direct": "tuned"}, "proxy or expert is not given"),
    ],
)
def test_roles_are_checked(tmp_path: Path, roles: dict[str, str], message: str) -> None:
    three_systems(tmp_path)
    with pytest.raises(UserError, match=message):
        rescore(tmp_path, roles=roles)


def test_tables_in_every_form_and_the_same_twice(tmp_path: Path) -> None:
    three_systems(tmp_path)
    lines: list[str] = []
    results = rescore(tmp_path, progress=lines.append, roles=ROLES)
    assert lines == ["sums/raw", "sums/steered-1", "sums/tuned"]
    assert results == rescore(tmp_path, roles=ROLES)
    titles = [table.title for table in rescore_tables(results)]
    assert titles == ["sums", "Gap closed", "Gap closed over benchmarks", "Systems against each other"]
    for form in ("table", "markdown", "latex"):
        drawn = draw(rescore_tables(results), form, 200)
        assert "steered-1" in drawn
        assert "50.0" in drawn


@pytest.mark.parametrize(
    ("text", "words"), [("base", "--roles: 'base' must be parts"), ("base= proxy=x", "must be parts of the form role=NAME"), ("=x", "must be parts")]
)
def test_roles_are_written_with_names(text: str, words: str) -> None:
    assert read_roles("base=a* proxy=b,c direct=d") == {"base": "a*", "proxy": "b,c", "direct": "d"}
    with pytest.raises(UserError, match=words):
        read_roles(text)


def test_the_command_line_prints_rows_and_names_mistakes_in_one_line(tmp_path: Path) -> None:
    three_systems(tmp_path)

    done = run_command("rescore", tmp_path, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(rescore(tmp_path)["rows"]))
    assert {"benchmark", "system", "metric", "ours", "published", "n", "unparsed", "low", "high"} <= set(json.loads(done.stdout)[0])
    for arguments, words in (((tmp_path, "--roles", "base"), "--roles: 'base' must be parts"), ((tmp_path / "none",), "is no folder")):
        wrong = run_command("rescore", *arguments)
        assert wrong.returncode == 2
        assert words in wrong.stderr.strip().splitlines()[-1]
        assert "Traceback" not in wrong.stderr
