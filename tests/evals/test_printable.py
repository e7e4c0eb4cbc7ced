"""What a model, a data file or a name says acts nowhere: not on a terminal, not in Markdown, LaTeX or a figure."""

import csv
import io
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from helpers import make_tokenizer
from rich.console import Console

from evals import cli
from evals.commands.generate import explanation_table, generate
from evals.display.cells import Table
from evals.display.drawing import drawn_name, save
from evals.display.render import draw
from evals.records import Record
from evals.released.rescore import rescore
from evals.released.tables import rescore_tables
from evals.results.items import all_items, side_by_side
from evals.running.progress import Display
from proxytune.errors import LONGEST
from proxytune.explanation import TokenExplanation
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.printable import one_line, printable

ESC = "\x1b"
HOSTILE = (
    f"a{ESC}[2J{ESC}]8;;http://evil{ESC}\\b{ESC}]52;c;aGk=\x07 \r\b\x9b1m \u202e\u2066 \u200b\ufeff \u2028 \ud800 \0 "
    "| \\input{/etc/passwd} <script> $x^$ [red] [x](http://evil) &#124; `rm` \n next :smile: \U000e0041"
)
ORDINARY = "Zoë größer 東京 カタカナ 👩\u200d💻 😄 می\u200cخ names_like_this 3,5 % U.S. 10\u00a0km"
ACTING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0041]")
ENCODED = HOSTILE.replace("\ud800", "")  # what a file or a table can hold
FORMS = ("table", "markdown", "latex", "html", "csv")


def hostile_table() -> Table:
    return Table(ENCODED, pd.DataFrame({"first": [ENCODED, "plain"], ENCODED: ["1.5 [1.0, 2.0]", ENCODED]}), ENCODED)


def test_what_acts_is_shown_as_its_escape() -> None:
    shown = printable(HOSTILE)
    assert not ACTING.search(shown) and "\n" not in shown
    assert r"\x1b[2J" in shown and r"\u202e" in shown and r"\ud800" in shown and r"\x00" in shown and r"\n next" in shown
    assert printable("a\tb\nc\rd", keep="\n\t") == "a\tb\nc\\rd"
    assert printable("ba\u200dse") == "ba\\u200dse"  # between ASCII letters a joiner only hides


def test_ordinary_text_stays_as_it_is() -> None:
    assert printable(ORDINARY) == ORDINARY
    table = Table(ORDINARY, pd.DataFrame({ORDINARY: [ORDINARY]}), ORDINARY)
    for form in ("table", "markdown"):
        assert draw([table], form, 400).count(ORDINARY) == 4
    assert draw([table], "latex", 400).count(ORDINARY.replace("_", r"\_").replace("%", r"\%")) == 3 + 1


@pytest.mark.parametrize("form", FORMS)
def test_no_text_acts_in_a_table(form: str) -> None:
    drawn = draw([hostile_table()], form, 2000)
    assert not ACTING.search(drawn)
    assert r"\x1b" in drawn.replace(r"\textbackslash{}", "\\")
    lines = drawn.splitlines()
    if form == "table":
        assert "[red]" in drawn and ":smile:" in drawn and r"\input{/etc/passwd}" in drawn  # neither markup nor an emoji's name
    if form == "markdown":
        cells = [re.findall(r"(?<!\\)(?:\\\\)*\|", line) for line in lines if line.startswith("|")]
        assert {len(found) for found in cells} == {3}
        assert not re.search(r"(?<!\\)(?:\\\\)*[<`$]|\]\(|(?<!\\)&#", drawn)
    if form == "latex":
        commands = set(re.findall(r"\\([a-z]+)", drawn))
        assert commands <= set("begin end caption toprule midrule bottomrule textbackslash ensuremath textasciitilde".split())
        assert not re.search(r"(?<!\\)[$#]", drawn)
    if form == "html":
        assert set(re.findall(r"<(/?\w+)", drawn)) <= {f"{end}{tag}" for tag in "h2 table thead tbody tr th td p".split() for end in ("", "/")}
    if form == "csv":
        assert {len(row) for row in csv.reader(lines)} == {2}


def test_a_cell_of_csv_is_no_formula() -> None:
    """Twin: numbers with a sign stay numbers."""
    said, kept = ["=1+1", "+cmd|' /C calc'!A0", "-1+cmd|' /C calc'!A0", "@SUM(A1)", "-x"], ["-1.5 [-2.0, -1.0]", "+3", "1e5", "a=b"]
    frame = pd.DataFrame({"text": said + kept})
    assert [row[0] for row in csv.reader(draw([Table("", frame, "")], "csv", 80).splitlines()[1:])] == [f"'{text}" for text in said] + kept


def test_a_cell_is_a_text_and_no_number() -> None:
    table = Table("t", pd.DataFrame({"arm": ["[5pt]", "*"], "answer": ["007", "1e5"]}), "")
    assert "007" in draw([table], "markdown", 80) and "1e5" in draw([table], "markdown", 80)
    assert "\n{}[5pt] & 007" in draw([table], "latex", 80) and "\n{}* & 1e5" in draw([table], "latex", 80)


@pytest.mark.parametrize("form", FORMS)
def test_items_show_what_questions_answers_arms_and_models_say(form: str) -> None:
    arms = ("base", ENCODED)
    frame = pd.DataFrame({"unit": ["u"], "question": [ENCODED], "answer": [ENCODED], "text": [ENCODED], "right": [True], "unparsed": [False]})
    table = side_by_side(all_items([Record(arm, "task", None, 0, "", frame) for arm in arms]), "task", "", 5)
    drawn = draw([table], form, 3000)
    assert not ACTING.search(drawn)
    assert not ACTING.search(json.dumps(table.frame.to_dict("records")))


@pytest.mark.parametrize("form", FORMS)
def test_names_of_folders_and_published_keys_do_not_act(tmp_path: Path, form: str) -> None:
    name = ENCODED.replace("/", "").replace("\0", "").replace("|", "¦")
    folder = tmp_path / f"b{name}" / f"s{name}"
    folder.mkdir(parents=True)
    item = {"question": ENCODED, "answer": "7", "model_output": f"{ENCODED} 7"}
    (folder / "predictions.jsonl").write_text(json.dumps(item) + "\n")
    (folder / "metrics.json").write_text(json.dumps({"exact_match": 1.0, ENCODED: 1.0}))
    drawn = draw(rescore_tables(rescore(tmp_path)), form, 2000)
    assert not ACTING.search(drawn)
    assert "[2J" in drawn  # the name is there


def error_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("sys.argv", ["proxytune", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0]


def test_an_error_is_one_printable_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = HOSTILE.replace("\0", "").replace("\ud800", "")
    for arguments in (["generate", "w5", "--base", str(tmp_path / name)], ["items", str(tmp_path / name)], ["rescore", str(tmp_path / name)]):
        line = error_of(arguments, monkeypatch, capsys)
        assert line.startswith("proxytune: error: ") and not ACTING.search(line) and "[2J" in line
    assert "größer 東京" in error_of(["rescore", str(tmp_path / "größer 東京")], monkeypatch, capsys)


def test_a_long_line_keeps_its_ends() -> None:
    line = one_line(f"field: must be short, not {'x' * 10**6}; shorten\nit")
    assert len(line) < LONGEST + 9 and line.startswith("field: must") and line.endswith("; shorten it")
    assert one_line("x" * LONGEST) == "x" * LONGEST


def test_what_is_said_while_a_study_runs_is_one_printable_line() -> None:
    display = Display()
    display._console = display._progress.live.console = Console(file=io.StringIO(), force_terminal=True, width=3000, highlight=False)
    display._progress.disable = False
    display.say(HOSTILE)
    display.say(ORDINARY)
    with display, display.bar(HOSTILE, 3) as progress:
        progress(1)
        display._progress.refresh()
    drawn = display._console.file.getvalue()  # type: ignore[attr-defined]
    said, ordinary, *_ = drawn.splitlines()
    assert not ACTING.search(said) and "[red]" in said and ":smile:" in said
    assert ordinary == ORDINARY
    assert f"{ESC}[2J" not in drawn and f"{ESC}]" not in drawn and "\u202e" not in drawn


def test_a_generated_text_does_not_act(proxy: ProxyTunedForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    ids = {"prompts": {name: [3, 4] for name in proxy.members}, "new_tokens": 3, "temperature": 0.0, "speculate": False}
    for text, wanted in ((f"{HOSTILE}\n\tzwei ", printable(HOSTILE, keep="\n\t") + "\n\tzwei"), (f"{ORDINARY}\n\tzwei ", f"{ORDINARY}\n\tzwei")):
        monkeypatch.setattr(tokenizer, "decode", lambda *_, said=text, **__: said)
        generate(proxy, tokenizer, **ids)
        out = capsys.readouterr().out
        assert wanted in out
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x80-\x9f\u202e]", out)


def test_a_token_does_not_act(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", lambda ids: HOSTILE if ids == [3] else "é")
    rows = [TokenExplanation(3, {"base": 0.5}, 0.25, 4), TokenExplanation(4, {"base": float("nan")}, 0.25, 4)]
    table = explanation_table(rows, tokenizer)
    drawn = draw([table], "table", 2000)
    assert not ACTING.search(drawn) and ":smile:" in drawn
    assert "'é'" in drawn and "none" in drawn and table.note.startswith("1 of 2")


def test_a_name_in_a_figure_is_no_formula(tmp_path: Path) -> None:
    for name in (HOSTILE, r"$x^$", r"$\frac{$", "_arm", "größer"):
        figure, axes = plt.subplots()
        axes.plot([1, 2], label=drawn_name(name))
        axes.set_title(drawn_name(name))
        axes.set_yticks([1, 2], [drawn_name(name)] * 2)
        legend = axes.legend()
        assert len(legend.get_texts()) == 1
        save(figure, tmp_path / "figure.png")
    assert drawn_name("größer") == "größer"
