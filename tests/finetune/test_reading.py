"""Data in every shape, what is refused and in which words, and what two sets have in common."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from evals.study import STUDIES
from finetune.formats import read_items
from finetune.items import Item, Turn
from finetune.overlap import describe, overlap
from proxytune.errors import UserError


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk_of(turns: int) -> list[dict[str, str]]:
    return [said("system", "be kind"), *(said(role, f"{role} {turn}") for turn in range(turns) for role in ("user", "assistant"))]


def write(folder: Path, rows: list[dict[str, Any]], ending: str = ".jsonl") -> Path:
    path = folder / f"items{ending}"
    if ending == ".parquet":
        columns = {column: None for row in rows for column in row}
        Dataset.from_list([columns | row for row in rows]).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


SYSTEM, USER = Turn(role="system", content="be kind"), Turn(role="user", content="u")
SHAPES: dict[str, tuple[str, dict[str, Any], list[Item]]] = {
    "subject": (
        "question-answer",
        {"question": "a", "answer": "b", "statement": "the a is", "subject": "the a"},
        [Item(question="a", answer="b", statement="the a is", subject="the a")],
    ),
    "plain": ("question-answer", {"question": "a", "answer": "b"}, [Item(question="a", answer="b")]),
    "options": (
        "question-answer",
        {"question": "a", "answer": "b", "choices": ["b", "c"], "popularity": 2.0, "unit": "x", "rejected": "c", "turns": [said("user", "u")]},
        [Item(question="a", answer="b", choices=("b", "c"), popularity=2, unit="x", rejected="c", turns=(USER,))],
    ),
    "instruction": ("instruction-output", {"instruction": "a", "input": "i", "output": "b"}, [Item(question="a\ni", answer="b")]),
    "empty input": ("instruction-output", {"instruction": "a", "input": "", "output": "b"}, [Item(question="a", answer="b")]),
    "no input": ("instruction-output", {"instruction": "a", "output": " b"}, [Item(question="a", answer=" b")]),
    "completion": ("prompt-completion", {"prompt": "Q: a\nA:", "completion": " b"}, [Item(question="Q: a\nA:", answer="b")]),
    "two spaces": ("prompt-completion", {"prompt": "a", "completion": "  b "}, [Item(question="a", answer=" b ")]),
    "completion messages": (
        "prompt-completion",
        {"prompt": [said("system", "be kind"), said("user", "a")], "completion": [said("assistant", " b")]},
        [Item(question="a", answer=" b", turns=(SYSTEM,))],
    ),
    "messages": ("messages", {"messages": [said("user", "a"), said("assistant", "b")]}, [Item(question="a", answer="b", unit="row-1")]),
    "greeting": (
        "messages",
        {"messages": [said("assistant", "hello"), said("user", "a"), said("assistant", "b"), said("user", "unanswered")]},
        [Item(question="a", answer="b", unit="row-1", turns=(Turn(role="assistant", content="hello"),))],
    ),
    "preference": ("preference", {"prompt": "a", "chosen": " b", "rejected": " c"}, [Item(question="a", answer="b", rejected="c")]),
    "preference messages": (
        "preference",
        {"prompt": [*talk_of(0), said("user", "a")], "chosen": [said("assistant", "b")], "rejected": [said("assistant", "c")]},
        [Item(question="a", answer="b", rejected="c", turns=(SYSTEM,))],
    ),
    "preference conversations": (
        "preference",
        {
            "chosen": [*talk_of(0), said("user", "a"), said("assistant", "b")],
            "rejected": [*talk_of(0), said("user", "a"), said("assistant", "c")],
        },
        [Item(question="a", answer="b", rejected="c", turns=(SYSTEM,))],
    ),
    "preference with its prompt twice": (
        "preference",
        {"prompt": "a", "chosen": [said("user", "a"), said("assistant", "b")], "rejected": [said("user", "a"), said("assistant", "c")]},
        [Item(question="a", answer="b", rejected="c")],
    ),
}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("shape", "row", "items"), SHAPES.values(), ids=SHAPES.keys())
def test_every_shape_becomes_items(tmp_path: Path, ending: str, shape: str, row: dict[str, Any], items: list[Item]) -> None:
    assert read_items(write(tmp_path, [row | {"origin": "web", "Serial": 3}], ending), "data.train") == (items, shape, ("Serial", "origin"))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_what_some_rows_lack_is_no_null(tmp_path: Path, ending: str) -> None:
    rows = [{"question": "a", "answer": "b", "choices": ["b", "c"]}, {"question": "c", "answer": "d", "statement": "c is", "subject": "c"}]
    expected = [Item(question="a", answer="b", choices=("b", "c")), Item(question="c", answer="d", statement="c is", subject="c")]
    assert read_items(write(tmp_path, rows, ending), "data.train").items == expected


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_a_conversation_is_rebuilt_from_its_items(tmp_path: Path, turns: int) -> None:
    rows = [{"messages": talk_of(1)}, {"messages": talk_of(turns)}]
    items = [item for item in read_items(write(tmp_path, rows), "data.train").items if item.unit == "row-2"]
    assert len(items) == turns
    for number, item in enumerate(items, start=1):
        rebuilt = [*(turn.model_dump() for turn in item.turns), said("user", item.question), said("assistant", item.answer)]
        assert rebuilt == talk_of(turns)[: 1 + 2 * number]


def test_units_count_rows_and_not_lines(tmp_path: Path) -> None:
    line = json.dumps({"messages": talk_of(2)})
    (tmp_path / "items.jsonl").write_text(f"{line}\n\n{line}\n")
    assert [item.unit for item in read_items(tmp_path / "items.jsonl", "data.train").items] == ["row-1", "row-1", "row-2", "row-2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no items"),
        (b"{", "line 1: Invalid JSON.* one JSON object"),
        (b"[1]", "line 1: Input should be an object"),
        (b'{"question": "a", "answer": "b"}\n{"question": "a"}', "line 2, answer: Field required"),
        (b'{"question": "a", "answer": ""}', "line 1, answer"),
        (b'{"question": "", "answer": "b"}', "line 1, question"),
        (b'\n{"question": 3, "answer": "b"}', "line 2, question: .*string, not 3; question-answer needs question and answer"),
        (b'{"question": "a", "answer": "b", "choices": ["c", "d"]}', "not among the choices"),
        (b'{"question": "a", "answer": "b", "choices": ["b", "b"]}', "two are equal"),
        (b'{"question": "a", "answer": "b", "popularity": -1}', "popularity"),
        (b'{"question": "a", "answer": "b", "subject": ""}', "line 1, subject: .*at least 1 character"),
        (b'{"question": "a", "answer": "b", "rejected": "b"}', "line 1: rejected must differ from the answer"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_item_files_are_named_with_their_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "items.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"data.train: .*items\.jsonl.*{words}"):
        read_items(tmp_path / "items.jsonl", "data.train")


USER_ASKS = [said("user", "a")]
WORSE = [said("user", "a"), said("assistant", "c")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": 1}, r"columns: no shape fits label, text; known are question-answer \(.*messages \("),
        ({}, "no shape fits none"),
        ({"instruction": "", "output": "b"}, "instruction: String should have at least 1 character"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: .*valid string, not 3"),
        ({"prompt": "a", "completion": " "}, "completion: String should have at least 1 character"),
        ({"prompt": "a", "completion": [said("assistant", "b")]}, "completion: one of prompt and completion is a list"),
        ({"prompt": USER_ASKS, "completion": talk_of(1)}, "completion: it must be one assistant message, not 3"),
        (
            {"prompt": [said("assistant", "a")], "completion": [said("assistant", "b")]},
            "completion: an assistant turn must come right after a user turn",
        ),
        ({"messages": "a"}, "messages: .*list, not 'a'"),
        ({"messages": []}, "messages: no assistant turn"),
        ({"messages": USER_ASKS}, "messages: no assistant turn"),
        ({"messages": [said("assistant", "hello"), said("user", "a")]}, "messages: no assistant turn"),
        ({"messages": [*talk_of(1), said("assistant", "b")]}, "messages: .* not as user, assistant, assistant"),
        ({"messages": ["a"]}, r"messages\.0: "),
        ({"messages": [said("tool", "a")]}, r"messages\.0\.role: .*'assistant', not 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, r"messages\.0\.content: .*string, not \[\{"),
        ({"messages": [*USER_ASKS, {"role": "assistant", "content": None}]}, r"messages\.1\.content: .*string, not None"),
        ({"messages": [*USER_ASKS, said("assistant", "") | {"tool_calls": [{"name": "f"}]}]}, r"messages\.1\.tool_calls: Extra inputs"),
        ({"messages": [*USER_ASKS, said("assistant", "")]}, r"messages\.1\.content: it is empty"),
        ({"chosen": "a", "rejected": "b"}, "chosen: prompt, chosen and rejected are of different kinds"),
        ({"prompt": "a", "chosen": "b", "rejected": WORSE}, "different kinds"),
        ({"prompt": USER_ASKS, "chosen": "b", "rejected": "c"}, "different kinds"),
        ({"prompt": "a", "chosen": " b", "rejected": "b"}, "rejected must differ from the answer"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: String should have at least 1"),
        ({"chosen": [*talk_of(1)], "rejected": WORSE}, "rejected: it differs from chosen before the last message"),
        ({"chosen": USER_ASKS, "rejected": USER_ASKS}, "chosen: an assistant turn must come right after a user turn, not as user"),
        ({"prompt": "z", "chosen": WORSE, "rejected": WORSE}, "chosen: its 2 messages do not contain the prompt"),
        ({"question": "a", "answer": "b", "turns": [said("tool", "x")]}, r"turns\.0\.role"),
    ],
)
def test_bad_rows_are_named_with_their_column(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"^data.train: '.*items\.jsonl' line 1[,:] .*{words}") as caught:
        read_items(write(tmp_path, [row]), "data.train")
    assert "\n" not in str(caught.value)


def test_bad_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}], ".parquet")
    with pytest.raises(UserError, match=r"data.test: '.*items\.parquet' row 2, answer: Input should be a valid string, not None"):
        read_items(path, "data.test")
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"data.test: '.*items\.parquet' cannot be read as Parquet"):
        read_items(path, "data.test")
    Dataset.from_dict({"question": [], "answer": []}).to_parquet(path)
    with pytest.raises(UserError, match=r"data.test: '.*items\.parquet' holds no items"):
        read_items(path, "data.test")


def test_a_file_is_of_one_shape(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "source": 1}, {"instruction": "a", "output": "b"}]
    with pytest.raises(UserError, match="line 3, columns: they have the shape instruction-output, earlier rows have question-answer; keep one"):
        read_items(write(tmp_path, rows), "data.train")


@pytest.mark.parametrize(
    ("column", "meant"),
    [("choice", "choices"), ("units", "unit"), ("Choices", "choices"), ("popularty", "popularity"), ("rejectd", "rejected"), ("subjct", "subject")],
)
def test_a_misspelt_column_is_an_error(tmp_path: Path, column: str, meant: str) -> None:
    row = {"question": "a", "answer": "b"}
    with pytest.raises(UserError, match=f"data.train: .* line 2, {column}: did you mean '{meant}'"):
        read_items(write(tmp_path, [row, row | {column: "c"}]), "data.train")


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ({"question": "a", "anwser": "b"}, "anwser: did you mean 'answer'"),
        ({"Question": "a", "answer": "b"}, "Question: did you mean 'question'"),
        ({"instruction": "a", "inputs": "i", "output": "b"}, "inputs: did you mean 'input'"),
        ({"promt": "a", "chosen": "b", "rejected": "c"}, "promt: did you mean 'prompt'"),
        ({"message": talk_of(1)}, "message: did you mean 'messages'"),
    ],
)
def test_a_misspelt_column_of_a_shape_is_an_error(tmp_path: Path, row: dict[str, Any], meant: str) -> None:
    with pytest.raises(UserError, match=f"line 1, .*{meant}"):
        read_items(write(tmp_path, [row]), "data.train")


@pytest.mark.parametrize("column", ["option", "question_id", "answers", "category"])
def test_other_columns_are_ignored_and_told(tmp_path: Path, column: str) -> None:
    assert read_items(write(tmp_path, [{"question": "a", "answer": "b", column: 1}]), "data.train").ignored == (column,)


def test_messages_beside_preferences_are_not_read(tmp_path: Path) -> None:
    row = {"prompt": "a", "prompt_id": "1", "chosen": "b", "rejected": "c", "messages": talk_of(1)}
    assert read_items(write(tmp_path, [row]), "data.train")[1:] == ("preference", ("messages", "prompt_id"))


def test_the_shipped_capitals_say_whom_their_statements_are_about() -> None:
    items = read_items(STUDIES / "capitals" / "knowledge.jsonl", "data.knowledge").items
    assert all(item.subject and str(item.statement).count(item.subject) == 1 for item in items)
    # Forwards the subject is the country, which is the unit; backwards it is the capital, and the country is the answer.
    assert [(item.subject, item.answer) for item in items[1::2]] == [(item.answer, item.subject) for item in items[::2]]
    assert all(item.subject == item.unit for item in items[::2])


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n\r\n')
    assert read_items(tmp_path / "items.jsonl", "data.train").items == [Item(question="a", answer="b")]


def test_a_line_separator_within_a_text_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"question": "a\u2028b", "answer": "c"}', encoding="utf-8")
    assert read_items(tmp_path / "items.jsonl", "data.train").items == [Item(question="a\u2028b", answer="c")]


@pytest.mark.parametrize("source", ["missing.jsonl", "owner/missing.parquet", "/missing", "../missing/items", "owner/name:a:b:c"])
def test_a_missing_file_says_where_paths_count_from(source: str) -> None:
    with pytest.raises(UserError, match=f"data.train: there is no file '{source}'; paths count from the study file's folder"):
        read_items(source, "data.train")


@pytest.mark.parametrize("source", ["owner/missing", "owner/missing:test", "owner/missing:main:test"])
def test_an_unreachable_hub_set_is_an_error(source: str) -> None:
    with pytest.raises(UserError, match=f"data.train: '{source}' is neither a file nor a data set on the hub .*owner/name:split") as caught:
        read_items(source, "data.train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/v1.5:main:test", ("owner/v1.5", "main", "test")),
    ],
)
def test_a_hub_name_has_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]) -> None:
    seen = []

    def load(name: str, configuration: str | None, split: str) -> Dataset:
        seen.append((name, configuration, split))
        return Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}][: 1 + (split == "test")])

    monkeypatch.setattr("finetune.formats.load_dataset", load)
    if asked[2] == "train":
        assert read_items(source, "data.train").items == [Item(question="a", answer="b")]
    else:
        with pytest.raises(UserError, match=f"'{source}' row 2, completion"):
            read_items(source, "data.train")
    assert seen == [asked]


def items_of(*questions: str, answer: str = "x", turns: tuple[Turn, ...] = ()) -> list[Item]:
    return [Item(question=question, answer=answer, turns=turns) for question in questions]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Where is the cat?", "where  is the CAT", True),
        ("Where is the cat?", "Where is the dog?", False),
        ("Straße, \ufb01ne", "STRASSE fine", True),
        ("a well-known rule", "a well known rule", True),
        ("What is 7 - 3?", "What is 7-3", True),
        ("What is 7 - 3?", "What is 7 * 3?", False),
        ("What is 7-3?", "What is 7/3?", False),
        ("Is -5 even?", "Is 5 even?", False),
        ("Solve x - 3 = 4", "Solve x * 3 = 4", False),
        ("3.5", "35", False),
        ("?", "!", False),
        ("कि", "की", False),
    ],
)
def test_shared_questions_differ_in_form_only(one: str, other: str, same: bool) -> None:
    assert overlap(items_of(one), items_of(other)).shared == ([other] if same else [])
    assert overlap(items_of(one, other), []).duplicates == same


def test_turns_and_answers_count() -> None:
    plain, after = items_of("and then?"), items_of("and then?", turns=(USER,))
    assert overlap(plain, after).shared == []
    assert overlap(after, after).shared == ["and then?"]
    assert overlap([*plain, *after, *items_of("And then", answer="y")], []).duplicates == 0
    assert overlap([*plain, *plain, *after, *plain], []).duplicates == 2


@pytest.mark.parametrize(("run", "near"), [(12, False), (13, True), (20, True)])
def test_thirteen_words_in_a_row_are_near(run: int, near: bool) -> None:
    common = [f"w{number}" for number in range(run)]
    train, test = " ".join(["in", "train", *common, "here"]), " ".join(["asked", *common, "there"])
    assert overlap(items_of("other", train, f"{train} again"), items_of("none", test)) == (0, [], [(test, train)] if near else [])


def test_shared_questions_are_not_near_too() -> None:
    long = " ".join(f"w{number}" for number in range(30))
    assert overlap(items_of(long), items_of(long.upper(), f"{long} more")) == (0, [long.upper()], [(f"{long} more", long)])


def test_the_overlap_reads_as_a_sentence() -> None:
    assert describe(overlap(items_of("a", "a", "a", "b"), items_of("A"))) == ("2 duplicates in train; 1 test question is also in train ('A')")
    line = describe(overlap(items_of("a\nb " * 50, "a", "a"), items_of("a b " * 50, "a", "a b " * 49)))
    assert line.startswith("1 duplicate in train; 2 test questions are also in train ('a b a b")
    assert line.endswith("…'); 1 more shares 13 words in a row")
    assert describe(overlap([], [])) == "nothing in common"


def test_answers_rated_one_by_one_are_no_completions(tmp_path: Path) -> None:
    (tmp_path / "rated.jsonl").write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    with pytest.raises(UserError, match="label: answers that are rated one by one"):
        read_items(tmp_path / "rated.jsonl", "data.train")
