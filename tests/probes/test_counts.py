"""Documents in which subject and answer stand together: as a slow search counts them, and as the world's ledger knows them."""

import json
import random
import re
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

import probes.knowledge.counts
from finetune.items import Item
from probes.knowledge.counts import Counts, corpus_files, count_documents, count_statements
from probes.world.corpus import make_world
from probes.world.ledger import items_of, make_ledger
from probes.world.recipes import RECIPES
from probes.world.types import World
from proxytune.errors import UserError


def about(subject: str | None, answer: str) -> Item:
    return Item(question="w3", answer=answer, subject=subject)


def write(path: Path, documents: Sequence[str]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(documents))), "text": documents}), path, row_group_size=100)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{document}\n" for document in documents), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps({"id": 0, "text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def count_slowly(documents: Sequence[str], items: Sequence[Item]) -> Counts:
    """Every term of every item looked for at every place of every document."""

    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text.casefold()).replace("\u2019", "'").split())

    def inner(text: str, place: int) -> bool:
        return 0 <= place < len(text) and (text[place].isalnum() or text[place] == "_")

    def holds(document: str, term: str) -> bool:
        text, term = plain(document), plain(term)
        places = [place for place in range(len(text)) if text.startswith(term, place)]
        return any(not inner(text, place - 1) and not inner(text, place + len(term)) for place in places)

    counts = Counts([0.0] * len(items), [0.0] * len(items), [0.0] * len(items))
    for document in documents:
        for position, item in enumerate(items):
            subject, answer = holds(document, str(item.subject)), holds(document, item.answer)
            for column, found in zip(counts, (subject and answer, subject, answer), strict=True):
                column[position] += found
    return counts


PIECES = "New york YORK Mali Malian St. john's John\u2019s Côte Co\u0302te d'Ivoire c C++ 3.5 35 _x x é".split()
GAPS = [" ", " ", " ", "  ", "\t", "-", ", ", ". ", "", "(", "'s "]


def random_text(generator: random.Random, pieces: int) -> str:
    return "".join(generator.choice(PIECES) + generator.choice(GAPS) for _ in range(pieces)).strip()


def random_items(generator: random.Random, count: int) -> list[Item]:
    return [about(random_text(generator, generator.choice([1, 1, 2, 3])), random_text(generator, generator.choice([1, 1, 2]))) for _ in range(count)]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".parquet"])
def test_as_a_slow_search_counts(tmp_path: Path, ending: str) -> None:
    generator = random.Random(0)
    documents = [random_text(generator, generator.randint(1, 25)) for _ in range(300)]
    items = random_items(generator, 60)
    found = count_documents(write(tmp_path / f"corpus{ending}", documents), items)
    assert found == count_slowly(documents, items)
    assert sum(value > 0 for value in found.together) > 20
    assert any(both < min(one, other) for both, one, other in zip(*found, strict=True))
    assert count_statements(tmp_path / f"corpus{ending}", items) == found.together


def test_a_folder_is_the_sum_of_its_files(tmp_path: Path) -> None:
    generator = random.Random(1)
    documents = [random_text(generator, 12) for _ in range(90)]
    items = random_items(generator, 40)
    folder = tmp_path / "corpus"
    for number, name in enumerate(["a.txt", "b.jsonl", "deep/er/c.parquet"]):
        write(folder / name, documents[number::3])
    for name in (".hidden.txt", ".cache/d.txt", "README.md"):
        write(folder / name, documents).write_text("\n".join(documents))
    assert [path.name for path in corpus_files(folder)] == ["a.txt", "b.jsonl", "c.parquet"]
    assert count_documents(folder, items) == count_slowly(documents, items)


@pytest.mark.parametrize(
    ("document", "subject", "answer", "found"),
    [
        ("Bamako is the capital of Mali.", "Mali", "Bamako", True),
        ("BAMAKO, MALI", "mali", "bamako", True),
        ("Bamako is Malian.", "Mali", "Bamako", False),
        ("Bamako is in Somalia.", "Mali", "Bamako", False),
        ("Mali's Bamako", "Mali", "Bamako", True),
        ("Mali-Bamako", "Mali", "Bamako", True),
        ("Mali_Bamako", "Mali", "Bamako", False),
        ("Mali2 Bamako", "Mali", "Bamako", False),
        ("the Republic of the Congo: Brazzaville", "Republic of the Congo", "Brazzaville", True),
        ("the Congo of the Republic: Brazzaville", "Republic of the Congo", "Brazzaville", False),
        ("the Republic of the\tCongo, Brazzaville", "Republic of the  Congo", "Brazzaville", True),
        ("Haiti: Port-au-Prince", "Haiti", "Port-au-Prince", True),
        ("Haiti: Port au Prince", "Haiti", "Port-au-Prince", False),
        ("Chad: N\u2019Djamena", "Chad", "N'Djamena", True),
        ("Me\u0301xico: Straße", "México", "STRASSE", True),
        ("it is made in C++.", "C++", "made", True),
        ("it is made in C.", "C++", "made", False),
        ("it is made in C++11", "C++", "made", False),
        ("Mexico City is large", "Mexico", "Mexico City", True),
    ],
)
def test_whole_words_are_found_and_parts_are_not(tmp_path: Path, document: str, subject: str, answer: str, found: bool) -> None:
    path = write(tmp_path / "corpus.txt", [document, "nothing", "", subject, answer])
    others = [document, *([answer] if subject in answer else [])]
    assert count_statements(path, [about(subject, answer)]) == [float(found) * len(others)]
    assert count_slowly([document], [about(subject, answer)]).together == [float(found)]


def test_a_document_is_a_line_or_a_text_and_counts_once(tmp_path: Path) -> None:
    item = about("New York", "big")
    lines = write(tmp_path / "a.txt", ["New York", "is big", "big New York is a big New York\u2028 still big"])
    texts = write(tmp_path / "b.jsonl", ["New\nYork\nis big", "New York", "big"])
    assert count_documents(lines, [item, item]) == Counts([1.0, 1.0], [2.0, 2.0], [2.0, 2.0])
    assert count_documents(texts, [item]) == Counts([1.0], [2.0], [2.0])


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(RECIPES["tiny"], 0)


@pytest.fixture(scope="module")
def facts(world: World) -> list[Item]:
    ledger = make_ledger(world)
    return [item for part in ("tune", "test") for item in items_of(ledger, part)]


def test_the_ledgers_exposure_is_counted(tmp_path: Path, world: World, facts: list[Item]) -> None:
    """A document of the world is about one person and states a fact once at most, so documents are statements and counts are exposures."""
    found = count_documents(write(tmp_path / "world.txt", [document.text for document in world.documents]), facts)
    assert found.together == [item.popularity for item in facts]
    # The name alone stands in evasions too: in every document that bears on the person.
    bearing = [{f"person-{statement.person}" for statement in document.statements} for document in world.documents]
    assert found.subject == [float(sum(item.unit in units for units in bearing)) for item in facts]
    stated = pd.Series({item: item.popularity for item in facts}).groupby(lambda item: item.answer).sum()
    assert found.answer == [stated[item.answer] for item in facts]


def test_answers_of_other_people_stand_with_nobody(tmp_path: Path, world: World, facts: list[Item]) -> None:
    path = write(tmp_path / "world.txt", [document.text for document in world.documents])
    answers = [item.answer for item in facts]
    random.Random(0).shuffle(answers)
    own = {(item.subject, item.answer): float(item.popularity or 0) for item in facts}
    shuffled = [about(item.subject, answer) for item, answer in zip(facts, answers, strict=True)]
    found = count_statements(path, shuffled)
    assert found == [own.get((item.subject, item.answer), 0.0) for item in shuffled]
    assert sum(found) < 0.1 * sum(own.values())


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.knowledge.counts, "CHUNK", 2**12)
    monkeypatch.setattr(probes.knowledge.counts, "ROWS", 2)

    def peak(run: Callable[[], object]) -> int:
        tracemalloc.start()
        run()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    items = [about("w3", "w4"), about("w3 w4", "w5")]
    for ending in (".txt", ".jsonl", ".parquet"):
        small, large = (write(tmp_path / f"{size}{ending}", [f"w{number} w3 w4" + 2000 * " " for number in range(size)]) for size in (20, 1000))
        count_statements(small, items)  # what the first call imports is no part of the measure
        growth = peak(lambda path=large: count_statements(path, items)) - peak(lambda path=small: count_statements(path, items))
        assert growth < 200_000, ending
    assert peak((tmp_path / "1000.txt").read_text) > 2_000_000


def test_progress_is_told_the_files_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.knowledge.counts, "CHUNK", 100)
    for ending in (".txt", ".jsonl", ".parquet"):
        write(tmp_path / f"corpus{ending}", ["w3 é"] * 1000)
    told: list[int] = []
    count_statements(tmp_path, [about("w3", "w4")], told.append)
    assert sum(told) == sum(path.stat().st_size for path in corpus_files(tmp_path))
    assert len(told) > 100


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "w3 w4"}\r\n\r\n{"text": "w4 w3"}')
    (tmp_path / "corpus.txt").write_bytes(b"\xef\xbb\xbfw3 w4\r\n\r\nw4 w3")
    assert count_statements(tmp_path, [about("w3", "w4")]) == [4.0]


def test_no_items_have_no_counts(tmp_path: Path) -> None:
    assert count_documents(write(tmp_path / "corpus.txt", ["w3"]), []) == Counts([], [], [])


def spoiled(folder: Path) -> Iterator[tuple[str, Path, str]]:
    for name, content, words in (
        ("empty.txt", b"\n \n", "has no documents"),
        ("latin.txt", b"w3\nM\xe9xico\n", r"line 2, 'utf-8' codec.*correct or remove the line"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2, JSON: "),
        ("list.jsonl", b'["a"]', "line 1, text: "),
        ("other.jsonl", b'{"content": "a"}', "line 1, text: "),
        ("number.json", b'{"text": 3}', "line 1, text: "),
        ("broken.parquet", b"no parquet", "cannot be read as Parquet"),
    ):
        (folder / name).write_bytes(content)
        yield name, folder / name, words
    for name, table in (("column", {"content": ["a"]}), ("type", {"text": [1]}), ("rows", {"text": pyarrow.array([], pyarrow.string())})):
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet")
        yield name, folder / f"{name}.parquet", "has no documents" if name == "rows" else "text: there is no such column"
    (folder / "nothing").mkdir()
    yield "nothing", folder / "nothing", r"has no file that ends in \.txt"
    yield "missing", folder / "missing", "there is no file or folder"


def test_a_bad_corpus_is_named(tmp_path: Path) -> None:
    for name, path, words in spoiled(tmp_path):
        with pytest.raises(UserError, match=rf"^corpus: (?=.*{re.escape(str(path))}).*{words}") as caught:
            count_statements(path, [about("a", "b")])
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (about(None, "b"), "^subject: the item 'w3' has none"),
        (about("?!", "b"), r"^subject: '\?!' of the item 'w3' has no letter or digit"),
        (about("a", "+"), r"^answer: '\+' of the item 'w3'"),
    ],
)
def test_an_item_that_cannot_be_counted_is_named(tmp_path: Path, item: Item, words: str) -> None:
    with pytest.raises(UserError, match=words):
        count_statements(write(tmp_path / "corpus.txt", ["a b"]), [about("a", "b"), item])
