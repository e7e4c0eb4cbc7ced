"""proxytune corpus: counts of items, and what a model is confident of although the corpus never says it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import make_model, make_tokenizer
from typer.testing import CliRunner

from evals.cli import app
from finetune.formats import read_items
from probes import cooccurrence
from probes.knowledge.candidates import candidate_means, known
from proxytune.errors import UserError
from proxytune.member import load_member


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cooccurrence, "DRAWS", 20)
    items = [
        {"question": f"q w{number}", "statement": f"w3 w{10 + number} w9", "subject": f"w{10 + number}", "answer": f"w{30 + number % 3}"}
        | {"choices": ["w30", "w31", "w32"], "unit": str(number)}
        for number in range(12)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("w10 is w30\nw10 and w31\nw11\n")
    make_model(seed=1, layers=3).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def run(place: Path, *options: str) -> str:
    given = ["corpus", str(place / "corpus"), "--items", str(place / "items.jsonl"), "--threads", "1", *options]
    return CliRunner().invoke(app, given, catch_exceptions=False).stdout


def test_every_item_has_its_counts(place: Path) -> None:
    rows = json.loads(run(place, "--format", "json"))["items"]
    assert [(row["in_documents"], row["answer_in_documents"], row["together"]) for row in rows[:2]] == [(2, 1, 1), (1, 1, 0)]
    assert all(row["confidence"] is None for row in rows)
    assert len(list(csv.reader(run(place, "--format", "csv").splitlines()))) == 13


def test_a_model_s_answers_are_counted_and_its_confident_ones_flagged(place: Path) -> None:
    found: dict[str, Any] = json.loads(run(place, "--model", str(place / "model"), "--confident", "0.4", "--format", "json"))
    member = load_member(place / "model")
    items = list(read_items(place / "items.jsonl", "items").items)
    shares = [means.softmax(0) for means in candidate_means(member, items)]
    for row, item, of, right in zip(found["items"], items, shares, known(member, items).right, strict=True):
        assert row["answer"] == item.choices[int(of.argmax())]
        assert row["confidence"] == pytest.approx(float(of.max()), abs=1e-6)
        assert row["right"] == bool(right)
        assert row["flagged"] == (row["confidence"] >= 0.4 and row["together"] == 0)
    assert {row["flagged"] for row in found["items"]} == {True, False}
    assert set(found["signals"]["the model's confidence"]) == {"auroc", "precision", "risk", "against"}
    nobody = json.loads(run(place, "--model", str(place / "model"), "--confident", "1", "--format", "json"))
    assert not any(row["flagged"] for row in nobody["items"])


def test_the_tables_say_how_many_of_the_flagged_are_right(place: Path) -> None:
    said = run(place, "--model", str(place / "model"), "--confident", "0")
    assert "Which signal tells wrong answers?" in said
    assert "Confident, and never said together in the corpus" in said
    assert "of these right" in said
    assert "none" in run(place, "--model", str(place / "model"), "--confident", "1")


def test_items_without_choices_are_one_line(place: Path) -> None:
    (place / "items.jsonl").write_text(json.dumps({"question": "q", "answer": "w30", "subject": "w3", "statement": "w3"}) + "\n")
    assert json.loads(run(place, "--format", "json"))["items"][0]["together"] == 0
    with pytest.raises(UserError, match="needs a statement and choices"):
        run(place, "--model", str(place / "model"))
