"""Familiarity from a corpus, for items without a popularity: the number of documents with both subject and answer of an item.

Source: the pair counts of Min et al. 2025, arXiv 2512.19134 (QuCo-RAG). Costs one pass over the corpus: on one core about 20 MB of
text per second for a hundred items, 5 for ten thousand. Memory holds the items and a few megabytes, or one document if it is longer.

Occurring together is not the same as being stated: a document that says "Lagos is not the capital of Nigeria" counts, and so does
one that has both on different pages. A subject within its answer (Mexico, Mexico City) occurs wherever the answer does. Not covered:
aliases and other spellings (the count is then too low), inflection, and scripts without spaces between words.

For a corpus that is too large to store, such as the trillions of tokens of an open model, use the infini-gram index (Liu et al.
2024, arXiv 2401.17377): write its count of "SUBJECT AND ANSWER" into the items as their `popularity`, which every probe uses as
familiarity. It counts occurrences of both within a number of tokens, not documents; it estimates counts of very frequent terms;
and it compares exact tokens, so ask for every case and spelling that should count.
"""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow.parquet import ParquetFile

from finetune.items import Item
from proxytune.errors import UserError

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
CHUNK = 2**20  # bytes of text in memory at a time, plus the rest of the last document
ROWS = 256  # of Parquet in memory at a time
WORD = re.compile(r"\w+")

Progress = Callable[[int], None]


class Counts(NamedTuple):
    """For each item the number of documents with its subject and its answer, with its subject, and with its answer.

    The last two are covariates of a correlation with the first: a rare name is in few documents together with anything.
    """

    together: list[float]
    subject: list[float]
    answer: list[float]


def count_statements(corpus: Path, items: Sequence[Item], progress: Progress = lambda bytes_read: None) -> list[float]:
    """For each item the number of documents with both subject and answer; see `count_documents`."""
    return count_documents(corpus, items, progress).together


def count_documents(corpus: Path, items: Sequence[Item], progress: Progress = lambda bytes_read: None) -> Counts:
    """Counts documents; a document with a term twice counts once.

    A document is a line of plain text, or the `text` of a line of JSON (.jsonl, .json) or of a row of Parquet (.parquet); a folder
    is all of its files. A document has a term if the term occurs literally, without a letter, digit or underscore right before or
    after it. Case, the amount of white space between words, the form of the apostrophe and Unicode composition do not matter.
    `progress` is called with the number of bytes read of the files of `corpus_files`.

    Raises `UserError` for an item without a subject, a term without a letter or digit, a corpus that is missing, empty or cannot be read.
    """
    subjects, answers = zip(*(_terms(item) for item in items), strict=True) if items else ((), ())
    answers_of = defaultdict[str, set[str]](set)
    for subject, answer in zip(subjects, answers, strict=True):
        answers_of[subject].add(answer)
    find, asked = _finder({*subjects, *answers}), set(subjects)
    alone, together = Counter[str](), Counter[tuple[str, str]]()
    documents = 0
    for texts, size in _read(corpus):
        documents += len(texts)
        for text in texts:
            present = find(text)
            alone.update(present)
            for subject in present & asked:
                together.update((subject, answer) for answer in answers_of[subject] & present)
        progress(size)
    if not documents:
        raise UserError(f"corpus: '{corpus}' has no documents; it needs one per line, or one per row")
    return Counts(
        [float(together[pair]) for pair in zip(subjects, answers, strict=True)],
        [float(alone[subject]) for subject in subjects],
        [float(alone[answer]) for answer in answers],
    )


def corpus_files(corpus: Path) -> list[Path]:
    """The file itself, or all files with a known ending in a folder and its subfolders, sorted by name; hidden ones are left out.

    Raises `UserError` where there is none.
    """
    if corpus.is_file():
        return [corpus]
    if not corpus.is_dir():
        raise UserError(f"corpus: there is no file or folder '{corpus}'; give plain text, JSON lines, Parquet or a folder of these")
    found = sorted(path for path in corpus.rglob("*") if path.suffix in ENDINGS and path.is_file() and not _hidden(path.relative_to(corpus)))
    if not found:
        raise UserError(f"corpus: the folder '{corpus}' has no file that ends in {', '.join(ENDINGS)}; add one")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _terms(item: Item) -> tuple[str, str]:
    if item.subject is None:
        raise UserError(f"subject: the item {item.question!r} has none; counting needs the subject of every item")
    found = {"subject": item.subject, "answer": item.answer}
    for name, term in found.items():
        if not WORD.search(term):
            raise UserError(f"{name}: {term!r} of the item {item.question!r} has no letter or digit; counting needs words")
    return " ".join(_folded(item.subject).split()), " ".join(_folded(item.answer).split())


def _folded(text: str) -> str:
    folded = text.casefold()
    return folded if folded.isascii() else unicodedata.normalize("NFC", folded).replace("\u2019", "'")


def _finder(terms: Iterable[str]) -> Callable[[str], set[str]]:
    """The function from a document to those of the folded terms that occur in it."""
    words_of = {term: frozenset(WORD.findall(term)) for term in terms}
    # A term that is a single word is found by comparing words.
    single = {term for term, words in words_of.items() if term in words}
    # Any other term is searched only in documents with all its words, and checked only where its longest, rarest word occurs.
    longer = defaultdict[str, list[tuple[str, frozenset[str], re.Pattern[str]]]](list)
    for term in sorted(words_of.keys() - single):
        literal = r"\s+".join(map(re.escape, term.split()))
        longer[max(words_of[term], key=lambda word: (len(word), word))].append((term, words_of[term], re.compile(rf"(?<!\w){literal}(?!\w)")))
    keys = set(longer)

    def find(text: str) -> set[str]:
        folded = _folded(text)
        words = set(WORD.findall(folded))
        present = words & single
        for key in words & keys:
            present.update(term for term, needed, pattern in longer[key] if needed <= words and pattern.search(folded))
        return present

    return find


def _read(corpus: Path) -> Iterator[tuple[list[str], int]]:
    """Some documents at a time, with the number of bytes read for them."""
    for path in corpus_files(corpus):
        yield from _read_parquet(path) if path.suffix == ".parquet" else _read_lines(path)


def _read_lines(path: Path) -> Iterator[tuple[list[str], int]]:
    text_of = _text_of_json if path.suffix in (".jsonl", ".json") else str
    number = 0
    # Read as bytes, where lines end only at a line feed and not at other separators that a text may contain.
    with path.open("rb") as file:
        while lines := file.readlines(CHUNK):
            texts = []
            for line in lines:
                number += 1
                try:
                    decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    if decoded.strip():
                        texts.append(text_of(decoded))
                except ValueError as error:
                    raise UserError(f"corpus: '{path}' line {number}, {' '.join(str(error).split())}; correct or remove the line") from error
            yield texts, sum(map(len, lines))


def _text_of_json(line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError("text: a line must be one JSON object with a text")
    return row["text"]


def _read_parquet(path: Path) -> Iterator[tuple[list[str], int]]:
    try:
        # Buffered: otherwise a whole column of a row group is read at once.
        with ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            kinds = {field.name: field.type for field in file.schema_arrow}
            if kinds.get("text") not in (pyarrow.string(), pyarrow.large_string()):
                raise UserError(f"corpus: '{path}', text: there is no such column of strings, only {', '.join(kinds) or 'none'}; rename one")
            size, rows, read = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=ROWS, columns=["text"], use_threads=False):
                before, read = size * read // rows, read + batch.num_rows
                yield [text for text in batch.column(0).to_pylist() if text], size * read // rows - before
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"corpus: '{path}' cannot be read as Parquet ({' '.join(str(error).split())}); write it again") from error
