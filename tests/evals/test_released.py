"""Released generations as they are read: answers out of texts, and trees of files that are not whole."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from helpers import CHOICE_PROMPT, choice_items, row_of, three_systems, write_math, write_rows

from evals.released.generations import chosen_option, read_tree
from evals.released.rescore import rescore
from probes.knowledge.readouts import last_number
from proxytune.errors import UserError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so $1,250.50.", "1250.50"),
        ("it is -6, then -3.", "-3"),
        ("16-3", "3"),
        ("(2)-3", "3"),
        ("a loss of -$12", "-12"),
        ("#### 72\n", "72"),
        ("a half is .5", ".5"),
        ("first 3, then none", "3"),
        ("nothing", None),
        ("", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("output", "loose", "alone"),
    [
        (" B", "B", "B"),
        ("\n\n\\begin{blockquote}\n\n C", "C", "C"),
        (" (A)", "A", "A"),
        ("America", "A", None),
        ("B.", "B", "B"),
        ("D", None, None),
        ("I cannot say", None, None),
        ("**A", "A", "A"),
        ("the answer is A", None, None),
        ("", None, None),
        # Markup that the published shares were read through, and any other.
        ("\n\n\\begin{code}\nA", "A", "A"),
        ("```\nB\n```", "B", "B"),
        (" **C**", "C", "C"),
        ("> B", "B", "B"),
        ("\n<blockquote>B", "B", "B"),
        ("```python\nC\n```", "C", "C"),
        ("~~~\nA", "A", "A"),
        ("\n\n\\strong{B", "B", "B"),
        ("$\\boxed{\\text{C}}$", "C", "C"),
        ("\\begin{enumerate}[a]\n\\item[B]", "B", "B"),
        ("<br>\n<b class='x'>A</b>", "A", "A"),
        ("{{< highlight javascript >}}\nB", "B", "B"),
        ("[quote]C[/quote]", "C", "C"),
        ('"A"', "A", "A"),
        ("\u201cB\u201d", "B", "B"),
        ("_C_", "C", "C"),
        ("[A]", "A", "A"),
        ("## B", "B", "B"),
        ("* A", "A", "A"),
        ("1. C", "C", "C"),
        # No word becomes an option, whatever opens it.
        ("**America**", "A", None),
        ("\\begin{code}\nBecause", "B", None),
        ("\\Alpha", "A", None),
        ("```C++ is", "C", None),
        ("<details><summary>Click", "C", None),
        ('<A href="x', None, None),
        ("- The A", None, None),
        ("**A's", "A", None),
        ("**D**", None, None),
    ],
)
def test_chosen_option(output: str, loose: str | None, alone: str | None) -> None:
    assert chosen_option(output, CHOICE_PROMPT, alone=False) == loose
    assert chosen_option(output, CHOICE_PROMPT, alone=True) == alone


@pytest.mark.parametrize("piece", ["<!--", "{{<", "\\begin{", "```", "**", " _", "<a ", "[quote"])
def test_no_output_takes_long_to_read(piece: str) -> None:
    start = time.perf_counter()
    assert chosen_option(piece * 20_000, CHOICE_PROMPT, alone=True) is None
    assert time.perf_counter() - start < 5


def test_answers_that_the_release_reads_otherwise_are_named(tmp_path: Path) -> None:
    items = [
        item | {"parsed_output": theirs} for item, theirs in zip(choice_items(["A", "**B", "> C", "B"], "ABCA"), ["A", "", "", "B"], strict=True)
    ]
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", items)
    write_rows(tmp_path / "facts" / "raw", "mc_metrics.json", {"acc": 0.5})
    assert rescore(tmp_path)["notes"][:2] == [
        "facts/raw, choice of the parsed: the release reads 2 of 4 answers otherwise, '' there and 'B' here: 2; '' there and 'C' here: 3"
        "; the share of right ones that the release parsed is 50.0000 %",
        "facts/raw, choice: the release reads 2 of 4 answers otherwise, '' there and 'B' here: 2; '' there and 'C' here: 3"
        "; the share of right ones that the release parsed is 50.0000 %",
    ]
    # The published mean leaves out what the release could not read; ours does not.
    parsed, whole = row_of(rescore(tmp_path), "choice of the parsed"), row_of(rescore(tmp_path), "choice")
    assert (parsed["ours"], parsed["n"], parsed["unparsed"], parsed["note"]) == (0.5, 2, 2, "")
    assert (whole["ours"], whole["n"], whole["unparsed"]) == (0.75, 4, 0)
    for item, theirs in zip(items, "ABCB", strict=True):
        item["parsed_output"] = theirs
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", items)
    assert not any("otherwise" in note for note in rescore(tmp_path)["notes"])
    for item, theirs in zip(items, [None, 3, ["A"], math.nan], strict=True):
        item["parsed_output"] = theirs
    write_rows(tmp_path / "facts" / "raw", "mc_results.jsonl", items)
    assert not any("otherwise" in note for note in rescore(tmp_path)["notes"])


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    three_systems(tmp_path / "tree")
    outside = tmp_path / "outside"
    write_math(outside, "secret", [True, False], published=0.5)
    for name, target in {
        "sums/raw/metrics.json": outside / "sums" / "secret" / "metrics.json",
        "sums/raw/predictions.jsonl": outside / "sums" / "secret" / "predictions.jsonl",
        "sums/linked": outside / "sums" / "secret",
        "linked": outside / "sums",
        "sums/raw/open_results.jsonl": tmp_path / "nowhere",
    }.items():
        link = tmp_path / "tree" / name
        kept = link.read_bytes() if link.exists() else None
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(UserError, match=rf"^results: '.*{name}' leads out of '.*tree' by a link; put a copy of the file in its place"):
            rescore(tmp_path / "tree")
        link.unlink()
        if kept is not None:
            link.write_bytes(kept)
    # A link to the whole folder, and links inside of it, lead nowhere else.
    (tmp_path / "tree" / "sums" / "again").symlink_to(tmp_path / "tree" / "sums" / "raw")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    assert row_of(rescore(tmp_path / "link"), "exact match", "again")["ours"] == 0.2


@pytest.mark.parametrize("name", ["predictions.jsonl", "metrics.json", "annotations.json"])
def test_pipes_and_devices_are_no_data(tmp_path: Path, name: str) -> None:
    three_systems(tmp_path)
    path = tmp_path / "sums" / "raw" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"^results: '.*{name}' is a pipe, a socket or a device, not a file"):
        rescore(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"^humaneval: '/dev/null' is a pipe, a socket or a device"):
        rescore(tmp_path, lambda programs: [], humaneval=Path("/dev/null"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q", "answer": "1", "model_output": "1"}\n{"question": ', r"predictions.jsonl:2: is not JSON"),
        ('{"question": "q", "answer": "1", "model_output": "1"}\n\n[1]', r"predictions.jsonl:3: needs a JSON object, not list"),
        (
            '{"question": "q", "answer": "1", "model_output": "1"}\n{"question": "q", "answer": "1"}',
            r"predictions.jsonl:2: model_output: Field required",
        ),
        ('{"question": "q", "answer": "one", "model_output": "1"}', r"predictions.jsonl:1: answer: .*needs a number"),
        ('{"question": "q", "answer": "1", "model_output": 3}', r"predictions.jsonl:1: model_output: .*not 3"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    write_rows(tmp_path / "sums" / "raw", "metrics.json", {"exact_match": 1.0})
    (tmp_path / "sums" / "raw" / "predictions.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        rescore(tmp_path)
    assert "\n" not in str(error.value)


def test_malformed_arrays_metrics_and_bytes_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "chat" / "raw"
    write_rows(folder, "annotations.json", [{"instruction": "i", "preference": 2}, 3])
    with pytest.raises(UserError, match=r"annotations.json, entry 2: needs a JSON object, not int"):
        rescore(tmp_path)
    write_rows(folder, "annotations.json", [{"instruction": "i", "preference": 7}])
    with pytest.raises(UserError, match=r"entry 1: preference: .*not 7"):
        rescore(tmp_path)
    (folder / "annotations.json").write_text('[\n{"instruction": "i",\n')
    with pytest.raises(UserError, match=r"annotations.json:3: is not JSON"):
        rescore(tmp_path)
    write_rows(folder, "annotations.json", [{"instruction": "i", "preference": 2}])
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match=r"metrics.json:1: needs a JSON object, not list"):
        rescore(tmp_path)
    (folder / "metrics.json").write_bytes(b'{"win_rate": "\xff"}')
    with pytest.raises(UserError, match=r"metrics.json:1: is not JSON \(UnicodeDecodeError\)"):
        rescore(tmp_path)


def test_no_folder_or_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        rescore(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no benchmark/system folder"):
        rescore(tmp_path)


def test_what_is_unknown_or_empty_is_a_note(tmp_path: Path) -> None:
    write_math(tmp_path, "raw", [True, False])
    write_rows(tmp_path / "trivia" / "raw", "predictions.jsonl", [{"question": "q", "guess": "g"}])
    write_rows(tmp_path / "sums" / "other", "metrics.json", {"exact_match": 0.25})
    (tmp_path / "sums" / "bare").mkdir()
    (tmp_path / "sums" / "empty").mkdir()
    (tmp_path / "sums" / "empty" / "predictions.jsonl").write_text("\n")
    (tmp_path / "sums" / ".hidden").mkdir()
    (tmp_path / "README").write_text("a file beside the benchmarks")
    sources, notes = read_tree(tmp_path)
    assert [(source.system, len(source.items)) for source in sources] == [("other", 0), ("raw", 2)]
    assert notes == [
        "sums/empty/predictions.jsonl: no items; left out",
        "sums/bare: nothing to score",
        "sums/empty: nothing to score",
        "sums/other: no predictions.jsonl; its published numbers stand unchecked",
        "trivia/raw/predictions.jsonl: fields of no known benchmark; left out",
        "trivia/raw: nothing to score",
    ]


def test_line_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    (tmp_path / "sums" / "raw").mkdir(parents=True)
    item = json.dumps({"question": "a\u2028b", "answer": "1", "model_output": "x\u2029 1"}, ensure_ascii=False)
    (tmp_path / "sums" / "raw" / "predictions.jsonl").write_text(item, encoding="utf-8")
    assert row_of(rescore(tmp_path), "equal number")["ours"] == 1
