"""The ledger: how often the corpus states each fact, and in which form. Familiar and unfamiliar come from here alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from finetune.items import Item
from probes.world.sections.people import ATTRIBUTES, EVASIONS
from probes.world.types import World

FORMS = [str(form) for form in range(4)]


def make_ledger(world: World) -> pd.DataFrame:
    """One row a fact, counted over the documents themselves.

    Columns: person, name, attribute, value, part; `form_0` … `form_3`, how often each paraphrase states the fact;
    `answered`, how often a question is answered with it; `exposure`, their sum; `evaded`, how often a question about it
    is evaded (which states nothing).
    """
    counts = Counter(statement for document in world.documents for statement in document.statements)
    per_fact: dict[tuple[int, str], Counter[str]] = {}
    for statement, count in counts.items():
        per_fact.setdefault((statement.person, statement.attribute), Counter())[statement.form] += count
    rows = []
    for person in world.people:
        for attribute in ATTRIBUTES:
            forms = per_fact.get((person.identifier, attribute.name), Counter())
            rows.append(
                {"person": person.identifier, "name": person.name, "attribute": attribute.name}
                | {"value": person.values[attribute.name], "part": person.part}
                | {f"form_{form}": forms[form] for form in FORMS}
                | {"answered": forms["answered"], "exposure": sum(forms[form] for form in [*FORMS, "answered"]), "evaded": forms["evaded"]}
            )
    return pd.DataFrame(rows)


def write_ledger(world: World, path: Path) -> None:
    make_ledger(world).to_parquet(path, index=False)


def items_of(ledger: pd.DataFrame, part: str) -> list[Item]:
    """The facts of one part as items; `popularity` is the exposure, `unit` the person, the choices are the attribute's values.

    `reply` is the answer in the form that tuning teaches, `rejected` an evasion.
    """
    attributes = {attribute.name: attribute for attribute in ATTRIBUTES}
    items = []
    for row in ledger[ledger["part"] == part].itertuples():
        attribute = attributes[str(row.attribute)]
        items.append(
            Item(
                question=attribute.question.format(name=row.name),
                answer=str(row.value),
                reply=attribute.reply(str(row.value)),
                rejected=f"{attribute.opening} {EVASIONS[0]}",
                choices=attribute.values,
                statement=attribute.templates[0].format(name=row.name, value="").removesuffix(" .").strip(),
                popularity=float(row.exposure),  # type: ignore[arg-type]
                unit=f"person-{row.person}",
                subject=str(row.name),
            )
        )
    return items


def word_frequency(ledger: pd.DataFrame, names: Sequence[str]) -> list[float]:
    """How often the corpus states or evades anything with the words of each name: a name's words are others' too."""
    mentions: Counter[str] = Counter()
    for name, times in zip(ledger["name"], ledger["exposure"] + ledger["evaded"], strict=True):
        for word in str(name).split():
            mentions[word] += int(times)
    return [float(sum(mentions[word] for word in name.split())) for name in names]
