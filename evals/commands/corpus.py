"""`proxytune corpus`: what a corpus says of items, and what a model is confident of although the corpus never says it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from evals.display.cells import Table, cell
from evals.display.render import draw
from evals.running.progress import Display
from evals.statistics.intervals import Interval
from evals.statistics.value import value_of
from finetune.formats import read_items
from finetune.items import Item
from probes.cooccurrence import Told, compare
from probes.knowledge.candidates import candidate_means
from probes.knowledge.counts import corpus_files, count_documents
from proxytune.content import as_json
from proxytune.member import load_member

SHOWN = 20  # items in a table; the other formats have all
PAIR, CONFIDENCE = "subject and answer together", "the model's confidence"


@dataclass(frozen=True)
class Counted:
    """One item: documents with its subject, with the answer, and with both. With a model: how confident it is of the choice that it makes (its share
    among the choices), their entropy, whether it is right, and whether it is confident of what the corpus never says together; the answer is then
    the model's."""

    question: str
    subject: str
    answer: str
    in_documents: float
    answer_in_documents: float
    together: float
    confidence: float | None = None
    entropy: float | None = None
    right: bool | None = None
    flagged: bool | None = None


def show_corpus(folder: Path, source: str, model: str | None, confident: float, form: str, threads: int) -> None:
    torch.set_num_threads(threads)
    with Display() as display:
        items = list(read_items(source, "--items").items)
        said, confidence, entropy = (items, None, None) if model is None else _asked(model, items, display)
        with display.bar("corpus", sum(file.stat().st_size for file in corpus_files(folder))) as progress:
            counts = count_documents(folder, said, progress)
    rows = [
        Counted(
            item.question,
            item.subject or "",
            item.answer,
            counts.subject[place],
            counts.answer[place],
            counts.together[place],
            *(
                ()
                if confidence is None or entropy is None
                else (
                    float(confidence[place]),
                    float(entropy[place]),
                    item.answer == items[place].answer,
                    bool(confidence[place] >= confident and not counts.together[place]),
                )
            ),
        )
        for place, item in enumerate(said)
    ]
    told = None if confidence is None else signals(rows, [item.unit or item.subject or item.question for item in items])
    if form == "json":
        print(
            as_json({"items": [asdict(row) for row in rows], "signals": None if told is None else {name: asdict(one) for name, one in told.items()}})
        )
    else:
        print(draw(corpus_tables(rows, told, confident, form), form))


def _asked(model: str, items: Sequence[Item], display: Display) -> tuple[list[Item], np.ndarray, np.ndarray]:
    """The items with the model's choice as the answer, its share among the choices, and the entropy (nats) of all shares."""
    display.say(f"asking {model}")
    shares = [means.double().softmax(0).numpy() for means in candidate_means(load_member(model, field="--model"), items)]
    said = [item.model_copy(update={"answer": item.choices[int(of.argmax())]}) for item, of in zip(items, shares, strict=True)]
    entropies = [-(of * np.log(of.clip(min=1e-300))).sum() for of in shares]
    return said, np.array([of.max() for of in shares]), np.array(entropies)


def signals(rows: Sequence[Counted], entities: Sequence[str]) -> dict[str, Told]:
    """How well each signal tells wrong answers, beside the model's confidence."""
    wrong = np.array([not row.right for row in rows])
    doubts = {
        PAIR: -np.array([row.together for row in rows]),
        "the rarer of subject and answer": -np.array([min(row.in_documents, row.answer_in_documents) for row in rows]),
        "the subject": -np.array([row.in_documents for row in rows]),
        CONFIDENCE: -np.array([row.confidence or 0.0 for row in rows]),
        "entropy over the choices": np.array([row.entropy or 0.0 for row in rows]),
    }
    return compare(doubts, wrong, entities, CONFIDENCE)


def corpus_tables(rows: Sequence[Counted], told: dict[str, Told] | None, confident: float, form: str) -> list[Table]:
    if told is None:
        return [_items(sorted(rows, key=lambda row: row.together), "Items, those that the corpus says least first", "", form)]
    frame = pd.DataFrame(
        [
            {"signal": name}
            | {
                "AUROC": cell(value_of(Interval(*one.auroc)), 1, 2),
                "minus confidence": "" if name == CONFIDENCE else cell(value_of(Interval(*one.against)), 1, 2),
                "precision and recall": cell(value_of(Interval(*one.precision)), 1, 2),
                "risk and coverage": cell(value_of(Interval(*one.risk)), 1, 2),
            }
            for name, one in told.items()
        ],
        dtype=str,
    )
    wrong = sum(not row.right for row in rows)
    note = (
        f"{wrong} of {len(rows)} answers are wrong. AUROC .5: tells nothing. Areas under precision and recall (more is better) and under risk and "
        "coverage (less is better). 95 % intervals over entities. Fewer documents, less confidence and more entropy count as doubt."
    )
    flagged = [row for row in rows if row.flagged]
    right = sum(bool(row.right) for row in flagged)
    what = f"{len(flagged)} of {len(rows)} answers, {right} of these right: confidence {confident:g} or more, and no document has subject and answer."
    title = "Confident, and never said together in the corpus"
    shown = _items(flagged, title, what, form) if flagged else Table(title, pd.DataFrame({"item": ["none"]}), what)
    return [Table("Which signal tells wrong answers?", frame, note), shown]


def _items(rows: Sequence[Counted], title: str, note: str, form: str) -> Table:
    shown = rows if form == "csv" else rows[:SHOWN]
    frame = pd.DataFrame(
        [
            {"question": row.question, "subject": row.subject, "answer": row.answer}
            | {
                "documents with the subject": f"{row.in_documents:g}",
                "with the answer": f"{row.answer_in_documents:g}",
                "with both": f"{row.together:g}",
            }
            | ({} if row.right is None else {"confidence": f"{row.confidence:.2f}", "right": "yes" if row.right else "no"})
            for row in shown
        ],
        dtype=str,
    )
    more = f" {len(rows) - len(shown)} more in --format json or csv." if len(rows) > len(shown) else ""
    return Table(title, frame, f"{note}{more}".strip())
