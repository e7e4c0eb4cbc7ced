"""Lens: what a layer's state already encodes of the right answer. Mathematics: `probes/lens.py`, `probes/linear_probe.py`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from evals.display.cells import Table, cell, over
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.inputs import Inputs, as_content, common_columns
from evals.measures.long import Names, long_frame, matrix
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Pair
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import exposed, intervals, means_by_unit, over_seeds
from evals.statistics.intervals import Estimate
from evals.statistics.value import Value, value_of, values_of
from finetune.encoding import prompt_ids
from probes.internals.activations import States
from probes.internals.blocks import thirds
from probes.lens import Lens, Translators, first_tokens, fit_translators, read_lens
from probes.linear_probe import linear_probe
from proxytune.member import Member

LENSES = {"plain": "plain", "base": "base's", "own": "own"}


class LensSettings(Settings):
    tokens: int = Field(default=8192, ge=1, description="tokens of text on which the translators of each model are fitted")


@dataclass(frozen=True, kw_only=True)
class ThroughLens(Reading):
    """Each model through the plain lens, the base's lens and its own, and linear probes of the same states.

    Frames: `lens/items` (one row per item), `lens/states` (long: lens, what, state; one value per item), `lens/translators` (one row per layer).
    """

    tokens: int
    name: str = "lens"
    version: ClassVar[int] = 1
    subject: ClassVar[type[Pair]] = Pair

    def frames(self, subject: Pair, inputs: Inputs) -> tuple[str, ...]:
        return ("lens/items", "lens/states", "lens/translators")

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"items": as_content(inputs.data.knowledge), "texts": inputs.texts, "tokens": self.tokens}

    def steps(self, subject: Pair, inputs: Inputs) -> int:
        return 3

    def read(self, subject: Pair, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        member, items = subject.tuned or subject.base, inputs.data.knowledge
        of_base = inputs.once(("translators", self, subject.base.fingerprint), lambda: self._translators(subject.base, inputs))
        lenses = {"plain": Lens(member.model), "base": Lens(subject.base.model, of_base)}
        if subject.tuned is not None:
            lenses["own"] = Lens(member.model, self._translators(member, inputs))
        progress(1)
        pad, ids = int(member.tokenizer.pad_token_id), inputs.inside.ids
        order, last = list[int](), list[torch.Tensor]()

        def keep(states: States) -> None:
            order.extend(states.indices)
            last.append(states.residual[:, 0].cpu())

        candidates = first_tokens(member.tokenizer, items)
        readings = read_lens(member.model, ids, candidates, lenses, batch_size=inputs.study.batch_size, pad=pad, watch=keep)
        progress(1)
        probed = linear_probe(torch.cat(last)[np.argsort(order)], items, inputs.seed)
        progress(1)
        columns: list[tuple[Names, np.ndarray]] = []
        for lens, reading in {**readings, "linear": probed}.items():
            for what, values in () if reading is None else reading._asdict().items():
                columns += [({"lens": lens, "what": what, "state": state}, values[:, state].astype(float)) for state in range(values.shape[1])]
        explained = lenses["own" if "own" in lenses else "base"].translators
        assert explained is not None
        quality = pd.DataFrame(
            {"state": range(len(explained.explained)), "explained": explained.explained.tolist(), "ridge": explained.ridge.tolist()}
        )
        return {subject.label: {"lens/items": common_columns(items), "lens/states": long_frame(columns), "lens/translators": quality}}

    def _translators(self, member: Member, inputs: Inputs) -> Translators:
        window = member.model.config.get_text_config().max_position_embeddings
        texts = [prompt_ids(inputs.tokenizer, text)[:window] for text in inputs.texts]
        pad = int(member.tokenizer.pad_token_id)
        return fit_translators(member.model, texts, tokens=self.tokens, batch_size=inputs.study.batch_size, pad=pad)


@dataclass(frozen=True)
class LensRow:
    """One lens and one state, over exposed items: `log_probability` of the right answer's first token, its `share` among the candidates, and how
    often it is the most probable candidate (`right`). `explained` is the share of the last state's variance that the arm's own translator explains.
    For the `linear` probe: `accuracy`, and `selectivity`, which is accuracy minus the accuracy on randomly assigned answers."""

    arm: str
    lens: str
    what: str
    state: int
    value: Value


@dataclass(frozen=True)
class LensFound:
    rows: tuple[LensRow, ...]


class LensMeasure(Measure[LensFound]):
    name = "lens"
    question = "What do the layers already encode of the right answer?"
    controls = "The base's own lens on the tuned model; linear probes of randomly assigned answers."
    needs = frozenset({"knowledge.statement", "knowledge.choices", "knowledge.popularity"})
    settings = LensSettings
    summary = LensFound

    def readings(self, inputs: Inputs, settings: LensSettings) -> list[Reading]:
        return [ThroughLens(tokens=settings.tokens)]

    def summarize(self, records: Recorded, settings: LensSettings) -> LensFound:
        return LensFound(tuple(row for arm in records.arms("lens/states") for row in _rows(records, arm)))

    def tables(self, summary: LensFound, header: Header) -> list[Table]:
        return [*_lens_table(summary, header), *_probe_table(summary, header)]

    def charts(self, summary: LensFound, header: Header) -> Iterable[Chart]:
        rows = [row for row in summary.rows if row.what == "share"]
        panels = []
        for arm in [arm for arm in header.ordered(_arms(rows)) if arm != header.base]:
            bands = []
            for of, dashed in ((arm, False), (header.base, True)):
                for lens, words in LENSES.items():
                    chosen = sorted((row for row in rows if row.arm == of and row.lens == lens), key=lambda row: row.state)
                    values, states = all_scaled([row.value for row in chosen], 100), tuple(float(row.state) for row in chosen)
                    if chosen:
                        bands.append(Series("band", values, states, label=f"{'base' if dashed else 'arm'}, {words} lens", group=lens, dashed=dashed))
            x = Axis("residual stream after layer (0: embeddings)", integers=True)
            panels.append(Panel(tuple(bands), arm, x, Axis("right candidate's share (%)")))
        if panels:
            title = f"{header.title}: what the layers already encode of the right answer, with 95 % bands"
            yield Chart("lens", title, tuple(panels), shared=True)


# What is concluded


def _rows(records: Recorded, arm: str) -> Iterator[LensRow]:
    frames, items = records("lens/states", arm), records("lens/items", arm)
    of_lenses = [matrix(frame, len(each), lens=list(LENSES)) for frame, each in zip(frames, items, strict=True)]
    names = of_lenses[0][1]
    whole = records.estimate([_exposed_means(each, values) for each, (values, _) in zip(items, of_lenses, strict=True)])
    for position, (lens, what, state) in enumerate(names[["lens", "what", "state"]].itertuples(index=False)):
        bounds = (-np.inf, 0.0) if what == "log_probability" else (0.0, 1.0)
        (value,) = values_of(intervals(Estimate(whole.value[position : position + 1], whole.draws[position : position + 1]), bounds))
        yield LensRow(arm, str(lens), str(what), int(state), value)
    translators = records("lens/translators", arm)
    for layer in range(len(translators[0])):
        explained = [float(frame["explained"][layer]) for frame in translators]
        yield LensRow(arm, "own", "explained", layer, value_of(over_seeds(explained, (-np.inf, 1.0))))
    probed = [
        [matrix(frame, len(each), lens="linear", what=what)[0] for what in ("probe", "control")] for frame, each in zip(frames, items, strict=True)
    ]
    states = probed[0][0].shape[1]
    if states:
        parts = [_exposed_means(each, np.hstack([probe, probe - control])) for each, (probe, control) in zip(items, probed, strict=True)]
        for position, value in enumerate(values_of(intervals(records.estimate(parts)))):
            yield LensRow(arm, "linear", "accuracy" if position < states else "selectivity", position % states, value)


def _exposed_means(items: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    chosen = exposed(items)
    return means_by_unit(chosen, values[chosen.index.to_numpy()])


# What is shown


def _arms(rows: Sequence[LensRow]) -> list[str]:
    return list(dict.fromkeys(row.arm for row in rows))


def _lens_table(summary: LensFound, header: Header) -> list[Table]:
    rows = [row for row in summary.rows if row.what == "share"]
    # For the base, the own lens and the base's lens are the same.
    rows += [replace(row, lens="own") for row in rows if row.arm == header.base and row.lens == "base"]
    note = (
        "The right candidate's share among the candidates, after the statement, in exposed items. Plain: the model's own final norm and head. "
        "Base's: states first pass the linear translator fitted on the base. Own: the one fitted on the model itself. What is lost through the "
        f"base's lens but not through the own lens is rotated, not erased. 95 % intervals, {over(header.runs)}."
    )
    title = "What the layers already encode of the right answer, through a lens (per cent)"
    return _by_layer(header, rows, "lens", LENSES, title, note)


def _probe_table(summary: LensFound, header: Header) -> list[Table]:
    rows = [row for row in summary.rows if row.lens == "linear"]
    note = (
        "Accuracy: how often a linear probe names the right answer for people it was not trained on. Selectivity: accuracy minus the accuracy on "
        "randomly assigned answers; near or below zero, the states encode who is meant, and not the answer. "
        f"95 % intervals, {over(header.runs)}."
    )
    title = "What a linear probe finds of the right answer (per cent; selectivity in percentage points)"
    return _by_layer(header, rows, "what", {"accuracy": "accuracy", "selectivity": "selectivity"}, title, note)


def _by_layer(header: Header, rows: Sequence[LensRow], key: str, names: dict[str, str], title: str, note: str) -> list[Table]:
    """One row for each of `names` and each arm, and one column for each selected layer."""
    if not rows:
        return []
    found = {(getattr(row, key), row.arm, row.state): row.value for row in rows}
    lines = [(value, arm) for value in names for arm in header.ordered(_arms(rows)) if any(kind == value and of == arm for kind, of, _ in found)]
    frame = pd.DataFrame({key if key == "lens" else "probe's": [names[value] for value, _ in lines], "arm": [arm for _, arm in lines]}, dtype=str)
    for state, words in _landmarks(max(row.state for row in rows)).items():
        frame[words] = [cell(found.get((value, arm, state)), 100) for value, arm in lines]
    return [Table(title, frame, note)]


def _landmarks(layers: int) -> dict[int, str]:
    """The states that get a column, with its title: ends of blocks, the last but one, the last."""
    ends = [(block[-1], f"{name} block's end") for name, block in thirds(layers).items() if len(block) and name != "high"]
    words: dict[int, list[str]] = {}
    for state, name in [*ends, (layers - 1, "before the last"), (layers, "last")]:
        words.setdefault(state, []).append(name)
    return {state: f"layer {state} ({', '.join(words[state])})" for state in sorted(words)}


register(LensMeasure())
