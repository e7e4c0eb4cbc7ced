"""Summaries of every measure that looks inside models, made up: for tests of what is shown of them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from evals.display.cells import Table
from evals.measures.density import Change, DensityFound, Exposure
from evals.measures.drift import BlockDrift, Distance, Drifted
from evals.measures.erosion import CLAIM, ErosionFound
from evals.measures.lens import LensFound, LensRow
from evals.measures.recoverability import RecoverabilityFound, Recovered
from evals.measures.restoration import Part, Patched, RestorationFound
from evals.results.comparison import PARTS
from evals.results.header import Header
from evals.results.summary import Results
from evals.statistics.judged import Verdict, judged
from evals.statistics.value import UNKNOWN, Value
from probes.internals.blocks import BLOCKS
from probes.verdict import Clause, measured

KINDS = {"base": "base", "expert": "expert", "proxy@1": "proxy", "full": "direct", "lora": "direct"}
HEADER = Header("small", (0,), ("tiny",), "base", KINDS, ("full",))
STATES, LAYERS = 5, 4
EMPTY: dict[str, Any] = {
    "density": DensityFound((), (), (), (), ()),
    "drift": Drifted((), ()),
    "lens": LensFound(()),
    "restoration": RestorationFound((), ()),
    "recoverability": RecoverabilityFound(()),
    "erosion": ErosionFound(()),
}


def some(value: float, width: float = 0.002) -> Value:
    """A value with its interval."""
    return Value(value, value - width, value + width)


def density(**parts: Any) -> DensityFound:
    """What density found, of the parts given only."""
    return replace(EMPTY["density"], **{name: tuple(rows) for name, rows in parts.items()})


def exposures(contrast: Any = lambda site, number: some(0.0012 * number)) -> list[Exposure]:
    return [
        Exposure(arm, metric, site, "last", number, contrast(site, number), some(0.034), UNKNOWN)
        for arm in ("untrained", "base", "full")
        for metric in ("e5", "effective_rank")
        for site in ("residual", "normed")
        for number in range(STATES)
    ]


def changes(matched: int = 120) -> list[Change]:
    return [
        Change(arm, block, site, place, some(value), some(0.0), some(value - 0.0031), 150, matched)
        for arm in ("full", "lora")
        for site, place in (("residual", "last"), ("residual", "subject"), ("rotated", "last"))
        for block, value in (("low", -0.0042), ("middle", 0.001), ("high", 0.002))
    ]


def distances() -> tuple[Distance, ...]:
    return tuple(Distance(arm, group, some(0.125)) for arm in KINDS for group in ("familiar", "unfamiliar"))


def block_drifts() -> tuple[BlockDrift, ...]:
    values = (
        ("relative_change", "", 0.0625),
        ("stable_rank", "", None),
        ("cka", "familiar", 0.987),
        ("cosine", "familiar", 0.91),
        ("cka", "unfamiliar", 0.5),
    )
    return tuple(BlockDrift("full", block, what, group, Value(value)) for block in BLOCKS for what, group, value in values)


def lens_rows(spread: int = 1) -> LensFound:
    """Of every `spread`-th state."""
    lenses = {"base": ("plain", "base"), "full": ("plain", "base", "own")}
    rows = [
        LensRow(arm, lens, "share", spread * number, some(0.1 * number + (0.01 if lens == "base" else 0.0)))
        for arm, shown in lenses.items()
        for lens in shown
        for number in range(STATES)
    ]
    rows += [LensRow("full", "plain", "log_probability", spread * number, some(-3.0)) for number in range(STATES)]
    rows += [LensRow("full", "linear", what, spread * number, some(0.25)) for what in ("accuracy", "selectivity") for number in range(STATES)]
    return LensFound(tuple(rows))


def parts(arm: str = "full", lost: bool = True) -> tuple[Part, ...]:
    share = some(0.25) if lost else None
    rows = [Part(arm, "loss", "all", some(0.1), share)]
    for what in ("shapley", "recovery", "damage", "same-number", "same-norm"):
        rows += [Part(arm, what, block, some(0.025), share) for block in BLOCKS if (what, block) != ("same-norm", "high")]
    rows += [Part(arm, what, part, some(0.01 * float(part)), share) for what in ("top", "random") for part in ("10", "5")]
    rows += [Part(arm, "task", block, some(-0.5), None) for block in ("all", *BLOCKS)]
    return tuple(rows)


def patched(states: int = STATES) -> tuple[Patched, ...]:
    return (*(Patched("full", number, some(0.01 * min(number, 3))) for number in range(states)), Patched("full", None, some(0.1)))


RELEARNED = (
    Recovered("full", some(0.2), some(0.94), some(0.4), ("at least",), (1.75,), (None,), ()),
    Recovered("lora", some(0.0), None, None, ("exact",), (0.0,), (8.0,), ()),
)


def clause(name: str, ends: tuple[float, float] | None, needs: int | None = None, note: str = "", runs: int = 8) -> Clause:
    return measured(name, None if ends is None else (sum(ends) / 2, *ends), runs, needs, note)


def a_verdict(verdict: str = "not supported") -> Verdict:
    clauses = (
        clause("density", (-0.006, -0.003)),
        clause("density/random", (-0.006, 0.003), needs=505),
        clause("density/shuffled", None, note="no arm is the same with shuffled: true"),
        clause("restoration", (-0.006, 0.004)),
    )
    return Verdict("full", CLAIM, verdict, judged(clauses))


def whole() -> dict[str, Any]:
    """Of every measure something."""
    return {
        "density": density(exposure=exposures(), changes=changes()),
        "drift": Drifted(distances(), block_drifts()),
        "lens": lens_rows(),
        "restoration": RestorationFound(parts(), patched()),
        "recoverability": RecoverabilityFound(RELEARNED),
        "erosion": ErosionFound((a_verdict(),)),
    }


def results_of(summaries: dict[str, Any], costs: list[dict[str, Any]] | None = None, header: Header = HEADER) -> Results:
    return Results(header, summaries, [], {part: [] for part in PARTS}, costs or [])


def only(tables: Iterable[Table], title: str) -> Table:
    """The one table whose title begins so."""
    (table,) = [table for table in tables if table.title.startswith(title)]
    return table


def shown(table: Table, *arms: str) -> dict[str, Any]:
    """The row of these first cells."""
    chosen = np.logical_and.reduce([table.frame.iloc[:, place] == arm for place, arm in enumerate(arms)])
    (row,) = table.frame[chosen].to_dict("records")
    return {str(name): value for name, value in row.items()}
