"""How questions and answers become token ids.

Tuning and measuring encode a prompt with the same function, so a model is asked in the format that it was tuned on.
"""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from string import Formatter

from transformers import PreTrainedTokenizerBase

from finetune.items import Item, Turn
from proxytune.errors import UserError, brief
from proxytune.printable import one_line

Row = dict[str, list[int]]
CHAT = "chat"  # instead of a prompt template: the tokenizer's own chat template
CHAT_SECONDS = 10.0  # of processor time; a normal template takes a thousandth of it
CHAT_LONGEST = 10_000_000  # characters


def check_prompt(template: str) -> str:
    """Returns the template; raises ValueError unless its only placeholder is {question} or it is the word `chat`."""
    if template == CHAT:
        return template
    fields = [(name, form, conversion) for _, name, form, conversion in Formatter().parse(template) if name is not None]
    if fields != [("question", "", None)]:
        names = [f"{{{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}" for name, form, conversion in fields]
        raise ValueError(f"the only placeholder must be {{question}}, once and without a format, not {brief(', '.join(names))}")
    return template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's ids from the tokenizer, with a BOS if the tokenizer adds one, and without an end token.

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


def chat_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn]) -> str:
    """The turns in the tokenizer's own chat template, up to where the next answer begins; without the BOS that encoding adds.

    Raises `UserError` where the tokenizer has no chat template, and where the template fails, does not end or returns too long a text.
    """
    text = _templated(tokenizer, turns, add_generation_prompt=True)
    adds_bos = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos else text


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None, response_prefix: str = "") -> list[int]:
    """The prompt as a user's turn in the tokenizer's own chat template, up to where the answer begins.

    `response_prefix` is a given beginning of the answer. Raises `UserError` where the tokenizer has no chat template.
    """
    turns = [] if system is None else [Turn(role="system", content=system)]
    return prompt_ids(tokenizer, chat_text(tokenizer, [*turns, Turn(role="user", content=prompt)]) + response_prefix)


def prompt_text(item: Item, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The text that asks an item: its question in the template, or, where the template is the word `chat`, as a user's turn.

    Raises `UserError` for an item with earlier turns and a plain-text template.
    """
    if prompt == CHAT:
        return chat_text(tokenizer, [*item.turns, Turn(role="user", content=item.question)])
    if item.turns:
        raise UserError(f"prompt: {item.question!r} has earlier turns, which a plain-text prompt cannot hold; use prompt: {CHAT}")
    return prompt.format(question=item.question)


def answer_space(prompt: str) -> str:
    """The text between prompt and answer: nothing in a chat, one space in plain text."""
    return "" if prompt == CHAT else " "


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str, space: str = " ") -> list[int]:
    """The ids of an answer after its prompt: the text with one space before it, encoded by itself.

    Raises `UserError` where the text has no tokens.
    """
    ids = list(tokenizer(f"{space}{text}", add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"answer: {text!r} has no tokens; give some text")
    return ids


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], **options: bool) -> str:
    """The turns in the chat template. Not covered: how much memory the template takes."""
    if tokenizer.chat_template is None:
        raise UserError("chat: the tokenizer has no chat template; give the prompt as plain text")
    try:
        with _at_most(CHAT_SECONDS):
            text = str(tokenizer.apply_chat_template([turn.model_dump() for turn in turns], tokenize=False, **options))
    except Exception as error:  # a template is a program that comes with a model and may raise anything
        reason = one_line(str(error)) or type(error).__name__
        raise UserError(f"chat: the template refuses these turns ({reason}); change the data or use a plain prompt") from error
    if len(text) > CHAT_LONGEST:
        raise UserError(f"chat: the template makes {len(text):,} characters of these turns, {CHAT_LONGEST:,} at most are read; use a plain prompt")
    return text


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within the block after so many seconds of processor time. Only in the main thread: other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def _answer_ids(item: Item, answer: str, tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> list[int]:
    """The answer with its end: in a chat what the template writes after it, in plain text `ending` and the end token."""
    if prompt != CHAT:
        ids = continuation_ids(tokenizer, answer + ending)
        return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
    turns = [*item.turns, Turn(role="user", content=item.question)]
    before = _templated(tokenizer, turns, add_generation_prompt=True)
    whole = _templated(tokenizer, [*turns, Turn(role="assistant", content=answer)])
    after = whole.removeprefix(before).rstrip() if whole.startswith(before) else answer
    ids = continuation_ids(tokenizer, after, answer_space(prompt))
    return ids if ids[-1] in tokenizer.all_special_ids or tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def preview(row: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A training row as text with special tokens; the part that is trained on is between ⟦ and ⟧."""
    parts = []
    for trained, tokens in groupby(zip(row["input_ids"], row["completion_mask"], strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in tokens])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def encode_examples(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> list[Row]:
    """Training rows: `input_ids` = prompt, answer and its end; `completion_mask` = 1 on tokens that are trained on."""
    rows = []
    for item in items:
        before = prompt_ids(tokenizer, prompt_text(item, tokenizer, prompt))
        after = _answer_ids(item, item.said, tokenizer, prompt, ending)
        rows.append({"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)})
    return rows


def encode_pairs(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> list[Row]:
    """Preference rows: `prompt_ids`, `chosen_ids`, `rejected_ids`. Raises `UserError` for an item without a rejected answer."""
    rows = []
    for item in items:
        if item.rejected is None:
            raise UserError(f"train: the item {item.question!r} has no rejected answer; preference tuning needs one in every item")
        chosen, rejected = (_answer_ids(item, answer, tokenizer, prompt, ending) for answer in (item.said, item.rejected))
        rows.append({"prompt_ids": prompt_ids(tokenizer, prompt_text(item, tokenizer, prompt)), "chosen_ids": chosen, "rejected_ids": rejected})
    return rows


def row_length(row: Row) -> int:
    """Tokens of the row that a step reads; a preference pair's prompt counts twice."""
    return len(row["input_ids"]) if "input_ids" in row else 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def trained_share(rows: Sequence[Row]) -> float:
    """The share of tokens that the loss is taken on. Raises `UserError` where it is zero."""
    total = sum(map(row_length, rows))
    trained = sum(sum(row["completion_mask"]) if "completion_mask" in row else len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    if not trained:
        raise UserError(f"train: none of the {total} tokens would be trained on; give items with answers")
    return trained / total


def check_rows(rows: Sequence[Row], window: int | None, vocabulary: int) -> None:
    """Raises `UserError` for an example that is longer than the window, has an id outside the vocabulary or trains nothing."""
    trained_share(rows)
    for number, row in enumerate(rows, start=1):
        longest = len(row["input_ids"]) if "input_ids" in row else len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        if window is not None and longest > window:
            raise UserError(f"train: example {number} has {longest} tokens, but the window of the model is {window}; shorten it or leave it out")
        highest = max(max(ids) for name, ids in row.items() if name.endswith("ids"))
        if highest >= vocabulary:
            raise UserError(
                f"train: example {number} has the token id {highest} outside the vocabulary of {vocabulary}; use the model's own tokenizer"
            )
        if not any(row.get("completion_mask", [1])):
            raise UserError(f"train: nothing of example {number} would be trained on; give it an answer")
