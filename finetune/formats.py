"""Reads tuning and test data in the usual formats.

A source is JSON lines, Parquet or a data set on the hub. Its columns decide which of `SHAPES` it has. Every shape becomes `Item`s.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from pydantic import Field, TypeAdapter, ValidationError

from finetune.items import Item, Turn
from proxytune.errors import UserError, brief
from proxytune.files import check_readable

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.+-]+){0,2}")
FILE_ENDINGS = (".jsonl", ".json", ".parquet")
OBJECT = TypeAdapter(dict[str, Any])
TEXTS = TypeAdapter(dict[str, Annotated[str, Field(min_length=1)]])
CONVERSATIONS = TypeAdapter(dict[str, list[Turn]])
Row = Mapping[str, Any]


class Examples(NamedTuple):
    """The items of a source, and its shape. `ignored` are the columns that were not read."""

    items: list[Item]
    shape: str
    ignored: tuple[str, ...]


class Shape(NamedTuple):
    """The columns of a shape, their content in words, and the function from a row and its unit to items."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    words: str
    read: Callable[[Row, str], list[Item]]


def read_items(source: str | Path, field: str) -> Examples:
    """Reads a JSON lines or Parquet file, or a hub data set `owner/name[:split]` or `owner/name:configuration:split`.

    The source has the first of `SHAPES` whose columns exist. One leading space is removed from a completion, chosen or rejected
    text, because the encoder puts a space before every answer. Each assistant turn of a conversation becomes an item.

    Raises `UserError` naming `field`, the source, the line (of JSON) or row, and the rule: for a source that is missing,
    empty or cannot be read, for rows of an unknown shape or of two shapes, for a column that looks misspelt, and for invalid values.
    """
    shape, columns, items = "", set[str](), list[Item]()
    known = set[frozenset[str]]()
    for number, (where, row) in enumerate(_rows(source, field), start=1):
        try:
            if frozenset(row) not in known:
                shape = _shape_of(row, shape)
                known.add(frozenset(row))
                columns.update(row)
            items += SHAPES[shape].read(row, f"row-{number}")
        except ValidationError as error:
            raise UserError(f"{field}: '{source}' {where}{_explain(error)}; {shape} needs {SHAPES[shape].words}") from error
        except ValueError as error:
            raise UserError(f"{field}: '{source}' {where}, {error}") from error
    if not items:
        raise UserError(f"{field}: '{source}' holds no items; it needs one JSON object per line, or one row")
    return Examples(items, shape, tuple(sorted(columns.difference(SHAPES[shape].required, SHAPES[shape].optional))))


def _rows(source: str | Path, field: str) -> list[tuple[str, Row]]:
    """The rows, each with its line or row number for error messages."""
    path = Path(source)
    if not os.path.exists(path):
        if HUB_NAME.fullmatch(str(source)) and path.suffix not in FILE_ENDINGS:
            return _hub_rows(str(source), field)
        raise UserError(f"{field}: there is no file '{source}'; paths count from the study file's folder")
    check_readable(path, field)
    if path.suffix == ".parquet":
        try:
            # Streaming neither copies the file into a cache nor draws a progress bar.
            table = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            return [(f"row {number}", row) for number, row in enumerate(table, start=1)]
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise UserError(f"{field}: '{source}' cannot be read as Parquet ({_line(error)}); write it again or as JSON lines") from error
    try:
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: '{source}' cannot be read as UTF-8 text ({error}); save it as UTF-8 JSON lines") from error
    rows = list[tuple[str, Row]]()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", OBJECT.validate_json(line)))
            except ValidationError as error:
                raise UserError(f"{field}: '{source}' line {number}{_explain(error)}; a line is one JSON object") from error
    return rows


def _hub_rows(source: str, field: str) -> list[tuple[str, Row]]:
    name, *parts = source.split(":")
    configuration = parts[0] if len(parts) == 2 else None
    try:
        table = load_dataset(name, configuration, split=parts[-1] if parts else "train")
        return [(f"row {number}", row) for number, row in enumerate(table, start=1)]
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise UserError(
            f"{field}: '{source}' is neither a file nor a data set on the hub ({_line(error)}); "
            "write a path, owner/name, owner/name:split or owner/name:configuration:split"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: ValidationError) -> str:
    """The field in the row, the rule and the value of the first error."""
    first = error.errors()[0]
    location = ".".join(map(str, first["loc"]))
    value = "" if first["type"] in ("missing", "json_invalid") or isinstance(first["input"], dict) else f", not {brief(first['input'])}"
    return f"{f', {location}' if location else ''}: {first['msg'].removeprefix('Value error, ')}{value}"


def _shape_of(row: Row, expected: str) -> str:
    """The shape of a row. Raises ValueError where no shape fits, where earlier rows have another shape (`expected`), and for a misspelt column."""
    fitting = [name for name, shape in SHAPES.items() if row.keys() >= set(shape.required)]
    shape = expected or (fitting[0] if fitting else "")
    if expected and fitting and fitting[0] != expected:
        raise ValueError(f"columns: they have the shape {fitting[0]}, earlier rows have {expected}; keep one shape per file")
    readable = {column for name in ([shape] if shape else SHAPES) for column in SHAPES[name].required + SHAPES[name].optional}
    # A column is not misspelt if the column it resembles exists too, such as question beside question_id.
    absent = sorted(readable - row.keys())
    guesses = {column: difflib.get_close_matches(column.casefold(), absent, n=1, cutoff=0.8) for column in sorted(row.keys() - readable)}
    hint = next((f"{column}: did you mean '{close[0]}'?" for column, close in guesses.items() if close), "")
    if not shape:
        shapes = ", ".join(f"{name} ({known.words})" for name, known in SHAPES.items())
        raise ValueError(f"columns: no shape fits {', '.join(sorted(row)) or 'none'}; {hint and hint + ' '}known are {shapes}")
    if hint:
        raise ValueError(f"{hint} Rename the column, or take it out")
    missing = sorted(set(SHAPES[shape].required) - row.keys())
    if missing:
        raise ValueError(f"{missing[0]}: Field required; {shape} needs {SHAPES[shape].words}")
    return shape


def _question_answer(row: Row, unit: str) -> list[Item]:
    # Parquet has null where a line of JSON has no key.
    item = Item.model_validate({name: row[name] for name in Item.model_fields if name in ("question", "answer") or row.get(name) is not None})
    if item.choices and item.answer not in item.choices:
        raise ValueError(f"answer: {item.answer!r} is not among the choices; add it")
    if len(set(item.choices)) < len(item.choices):
        raise ValueError("choices: two are equal; make them differ")
    return [item]


def _instruction_output(row: Row, unit: str) -> list[Item]:
    texts = TEXTS.validate_python({name: row[name] for name in ("instruction", "input", "output") if name != "input" or row.get(name)})
    output = texts.pop("output")
    return [Item(question="\n".join(texts.values()), answer=output)]


def _prompt_completion(row: Row, unit: str) -> list[Item]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        if len(completion) != 1:
            raise ValueError(f"completion: it must be one assistant message, not {len(completion)} messages; see the shape messages for several")
        return [_last(_conversation("prompt", prompt) + _conversation("completion", completion), "completion")]
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("completion: one of prompt and completion is a list; make both texts or both lists of messages")
    if isinstance(row.get("label"), bool):
        raise ValueError("label: answers that are rated one by one are not supported; keep the good ones and remove the column")
    texts = TEXTS.validate_python({"prompt": prompt, "completion": _unspaced(completion)})
    return [Item(question=texts["prompt"], answer=texts["completion"])]


def _preference(row: Row, unit: str) -> list[Item]:
    prompt, answers = row.get("prompt"), {name: row[name] for name in ("chosen", "rejected")}
    lists = [isinstance(answer, list) for answer in answers.values()]
    if not any(lists) and isinstance(prompt, str):
        texts = TEXTS.validate_python({"prompt": prompt} | {name: _unspaced(answer) for name, answer in answers.items()})
        return [Item(question=texts["prompt"], answer=texts["chosen"], rejected=texts["rejected"])]
    if not all(lists):
        raise ValueError("chosen: prompt, chosen and rejected are of different kinds; make them all texts or all lists of messages")
    before = _conversation("prompt", [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or [])
    conversations = {name: _conversation(name, answer) for name, answer in answers.items()}
    for name, turns in conversations.items():
        # Some data sets give whole conversations and repeat the prompt.
        if len(turns) == 1:
            conversations[name] = before + turns
        elif not set(before) <= set(turns):
            raise ValueError(f"{name}: its {len(turns)} messages do not contain the prompt; give one assistant message, or the whole conversation")
    better, worse = (_last(turns, name) for name, turns in conversations.items())
    if conversations["chosen"][:-1] != conversations["rejected"][:-1]:
        raise ValueError("rejected: it differs from chosen before the last message; both must answer the same conversation")
    return [Item.model_validate(dict(better) | {"rejected": worse.answer})]


def _messages(row: Row, unit: str) -> list[Item]:
    turns = _conversation("messages", row["messages"])
    # An assistant's greeting before the first question is only context for later questions.
    opening = next((position for position, turn in enumerate(turns) if turn.role == "user"), len(turns))
    ends = [position + 1 for position, turn in enumerate(turns) if turn.role == "assistant" and position > opening]
    if not ends:
        raise ValueError("messages: no assistant turn follows a user turn, so there is nothing to learn; remove the row")
    return [_last(turns[:end], "messages").model_copy(update={"unit": unit}) for end in ends]


def _conversation(column: str, value: object) -> tuple[Turn, ...]:
    """A list of messages as turns; other keys must be empty. Raises ValueError for invalid messages and messages without content."""
    if isinstance(value, list):
        value = [
            {key: entry for key, entry in message.items() if key in Turn.model_fields or entry} if isinstance(message, dict) else message
            for message in value
        ]
    turns = CONVERSATIONS.validate_python({column: value})[column]
    for position, turn in enumerate(turns):
        if turn.role != "system" and not turn.content:
            raise ValueError(f"{column}.{position}.content: it is empty; give the {turn.role}'s text")
    return tuple(turns)


def _last(turns: tuple[Turn, ...], column: str) -> Item:
    """The item whose answer is the last turn."""
    if [turn.role for turn in turns[-2:]] != ["user", "assistant"]:
        roles = ", ".join(turn.role for turn in turns[-3:]) or "no message"
        raise ValueError(f"{column}: an assistant turn must come right after a user turn, not as {roles}; join or reorder the messages")
    return Item(question=turns[-2].content, answer=turns[-1].content, turns=turns[:-2])


def _unspaced(text: object) -> object:
    return text.removeprefix(" ") if isinstance(text, str) else text


# In order of precedence: preference data often repeat the chosen conversation as messages.
SHAPES = {
    "question-answer": Shape(
        ("question", "answer"),
        tuple(name for name in Item.model_fields if name not in ("question", "answer")),
        "question and answer as texts",
        _question_answer,
    ),
    "instruction-output": Shape(("instruction", "output"), ("input",), "instruction and output as texts, optionally input", _instruction_output),
    "prompt-completion": Shape(
        ("prompt", "completion"), (), "prompt and completion as texts, or both as lists of messages with role and content", _prompt_completion
    ),
    "preference": Shape(
        ("chosen", "rejected"), ("prompt",), "chosen, rejected and prompt as texts, or as lists of messages with role and content", _preference
    ),
    "messages": Shape(("messages",), (), "messages, each with a role (system, user, assistant) and content as a text", _messages),
}
