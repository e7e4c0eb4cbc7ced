"""The overlap of two sets of items: a test question that was tuned on tests nothing."""

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from finetune.items import Item

RUN = 13  # words in a row; two questions rarely share so many by chance


class Overlap(NamedTuple):
    """`duplicates` within the training items; `shared` test questions; `near` pairs of a test and a training question."""

    duplicates: int
    shared: list[str]
    near: list[tuple[str, str]]


def overlap(train: Sequence[Item], test: Sequence[Item]) -> Overlap:
    """The questions that occur twice, compared without case, punctuation, white space and Unicode's compatibility forms.

    `duplicates` counts training items whose turns, question and answer came earlier. `shared` has the question of each
    test item that with its turns is also a training item's. `near` has each other test question that shares 13 words in
    a row with a training question, together with the first such question; turns are not compared here, because many items share a
    system prompt.
    """
    asked = [_asked(item) for item in train]
    duplicates = len(train) - len({(key, _plain(item.answer)) for key, item in zip(asked, train, strict=True)})
    known = set(asked)
    shared, others = list[str](), list[Item]()
    holders = dict[str, list[int]]()
    for item in test:
        key = _asked(item)
        if key in known:
            shared.append(item.question)
            continue
        for run in _runs(key[-1]):
            holders.setdefault(run, []).append(len(others))
        others.append(item)
    first = dict[int, str]()
    for key, item in zip(asked, train, strict=True):
        for run in _runs(key[-1]):
            # Removed when found, so that a phrase in every question costs no more than a phrase in two.
            for position in holders.pop(run, ()):
                first.setdefault(position, item.question)
    return Overlap(duplicates, shared, [(others[position].question, question) for position, question in sorted(first.items())])


def describe(overlap: Overlap) -> str:
    """The overlap in one readable line, with the beginning of the first shared question."""
    duplicates, shared, near = overlap.duplicates, len(overlap.shared), len(overlap.near)
    parts = [
        f"{duplicates} {'duplicate' if duplicates == 1 else 'duplicates'} in train",
        f"{shared} {'test question is' if shared == 1 else 'test questions are'} also in train",
        f"{near} {'more shares' if near == 1 else 'more share'} {RUN} words in a row",
    ]
    if overlap.shared:
        question = " ".join(overlap.shared[0].split())
        parts[1] += f" ('{question if len(question) <= 60 else question[:59] + '…'}')"
    found = [part for part, count in zip(parts, (duplicates, shared, near), strict=True) if count]
    return "; ".join(found) or "nothing in common"


def _asked(item: Item) -> tuple[str, ...]:
    return (*(_plain(turn.content) for turn in item.turns), _plain(item.question))


def _plain(text: str) -> str:
    """The text as it is compared: NFKC, casefolded, words separated by one space. Signs of arithmetic are kept."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    # "7 - 3" and "7 * 3" are two questions: beside a number these signs are not punctuation.
    signed = re.sub(r"(?<=\d)\s*[-*/]+(?=[\s\d])|(?<![^\s(])[-*/]+(?=\s*\d)", lambda sign: f" {sign[0].strip().translate(SIGNS)} ", folded)
    return " ".join(signed.translate(_punctuation()).split()) or folded


def _runs(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


@cache
def _punctuation() -> dict[int, str]:
    return {code: " " for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}


SIGNS = str.maketrans("-*/", "−×÷")  # noqa: RUF001
