"""Questions and answers: how they are read, and how they become token ids.

One file format for tuning, testing and knowledge: JSON lines. Tuning and measuring encode a prompt with the same
function, so what a model was tuned on is what it is asked.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Formatter

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from proxytune.errors import UserError


class Item(BaseModel):
    """One thing that is asked. `question` is asked in the tuned format, `statement` is its beginning in plain text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    choices: tuple[str, ...] = ()
    statement: str | None = None
    popularity: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="stands in for exposure on real models")
    unit: str | None = Field(default=None, description="items of one unit are resampled together; default: each item by itself")


def read_items(path: Path, field: str) -> list[Item]:
    """Reads a JSONL file of items.

    Raises `UserError` naming `field`, the line and the rule for a file that is missing, empty, not UTF-8 or not JSON,
    for an unknown or missing key, an answer that is not among its choices, and two equal choices.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{field}: there is no file '{path}'; paths count from the study file's folder") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: '{path}' cannot be read as UTF-8 text ({error}); save it as UTF-8 JSON lines") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = Item.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "line"
            raise UserError(
                f"{field}: '{path}' line {number}, {place}: {first['msg']}; a line is one JSON object with question and answer"
            ) from error
        if item.choices and item.answer not in item.choices:
            raise UserError(f"{field}: '{path}' line {number}, answer: {item.answer!r} is not among the choices; add it")
        if len(set(item.choices)) < len(item.choices):
            raise UserError(f"{field}: '{path}' line {number}, choices: two are equal; make them differ")
        items.append(item)
    if not items:
        raise UserError(f"{field}: '{path}' holds no items; it needs one JSON object a line")
    return items


def check_prompt(template: str) -> str:
    """Returns the template; raises ValueError unless its only placeholder is {question}."""
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    if names != ["question"]:
        raise ValueError(f"the only placeholder must be {{question}}, once, not {names}")
    return template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's ids as the tokenizer makes them, with the BOS that it adds, if it adds one, and no end token.

    Raises `UserError` for an empty prompt and for two BOS in a row.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    if not ids:
        raise UserError(f"prompt: {prompt!r} has no tokens; give some text")
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise UserError(f"prompt: {prompt!r} begins with two BOS tokens (ids {ids[:2]}); leave the BOS out of the text")
    return ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, response_prefix: str = "") -> list[int]:
    """The prompt as a user's turn in the tokenizer's own chat template, up to where the answer begins.

    A `response_prefix` is the answer's given beginning. Raises `UserError` where the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError("chat: the tokenizer has no chat template; give the prompt as plain text")
    turns = [] if system is None else [{"role": "system", "content": system}]
    text = tokenizer.apply_chat_template([*turns, {"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(str(text) + response_prefix, add_special_tokens=False)["input_ids"])


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of an answer after its prompt: the text with one space before it, encoded by itself.

    Raises `UserError` where the text has no tokens.
    """
    ids = list(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"answer: {text!r} has no tokens; give some text")
    return ids


def preview(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A training row as text, special tokens and all, with what is trained on between ⟦ and ⟧."""
    parts = []
    for trained, places in groupby(zip(row["input_ids"], row["completion_mask"], strict=True), key=lambda place: place[1]):
        text = tokenizer.decode([token for token, _ in places])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def encode_examples(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> list[dict[str, list[int]]]:
    """Training rows: `input_ids` = prompt, answer with `ending`, end token; `completion_mask` = 1 where it is trained on."""
    rows = []
    for item in items:
        before = prompt_ids(tokenizer, prompt.format(question=item.question))
        after = continuation_ids(tokenizer, item.answer + ending)
        if tokenizer.eos_token_id is not None:
            after = [*after, tokenizer.eos_token_id]
        rows.append({"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)})
    return rows
