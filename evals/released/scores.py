"""A released matrix of bias scores: one row an item or bias, one column a model, named BACKBONE-DATA-Seed-N (a missing seed part means seed 0).

Mathematics: `probes/bias.py`. Rows are not scaled.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Table
from evals.invalid import did_you_mean
from probes.bias import INDICES, LABELS, Clustering, clusters, components, shares, spread
from proxytune.errors import UserError, brief
from proxytune.files import check_readable

COLUMN = re.compile(r"(?P<pretraining>.+?)-(?P<instruction>[^-]+?)(?:-Seed[-_](?P<seed>\d+))?", re.IGNORECASE)
FEWEST = 2  # models of a backbone, or of an instruction set


@dataclass(frozen=True)
class Matrix:
    """`profiles` [models, rows]; `labels` of the models; `left_out` are columns, each with the reason."""

    rows: list[str]
    profiles: np.ndarray
    labels: dict[str, np.ndarray]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Scored:
    matrix: Matrix
    clustering: Clustering
    shares: dict[str, float]
    components: dict[str, float] | None


def read_scores(path: Path, leave_out: Sequence[str] = ()) -> Matrix:
    """Raises `UserError` for a file that is no such matrix, for a row that is not there, and where fewer than two backbones or instruction sets with
    two models each are left."""
    check_readable(path, "--scores")
    try:
        frame = pd.read_csv(path, index_col=0)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise UserError(f"--scores: '{path}' cannot be read as CSV ({str(error).splitlines()[0]}); give another file") from error
    frame.index = frame.index.map(str)
    for name in leave_out:
        if name not in frame.index:
            raise UserError(f"--leave-out: '{path}' has no row {name!r}; {did_you_mean(name, list(frame.index))}")
    frame = frame.drop(index=list(leave_out))
    twice = frame.index[frame.index.duplicated()]
    if len(twice):
        raise UserError(f"--scores: '{path}' has two rows named {twice[0]!r}; give each a name of its own")
    parsed = {str(column): COLUMN.fullmatch(str(column)) for column in frame.columns}
    models = {column: found.groupdict() for column, found in parsed.items() if found is not None}
    left_out = {column: "its name is not BACKBONE-DATA-Seed-N" for column, found in parsed.items() if found is None}
    while True:
        single: dict[str, str] = {}
        for label in LABELS:
            names = [str(model[label]) for model in models.values()]
            single |= {column: f"{model[label]} occurs once" for column, model in models.items() if names.count(str(model[label])) < FEWEST}
        if not single:
            break
        left_out |= single
        models = {column: model for column, model in models.items() if column not in single}
    labels: dict[str, np.ndarray] = {label: np.array([str(model[label]) for model in models.values()]) for label in LABELS}
    for label, what in zip(LABELS, ("backbones", "instruction sets"), strict=True):
        if len(np.unique(labels[label])) < 2:
            raise UserError(
                f"--scores: '{path}' needs two {what} with {FEWEST} models each in columns named BACKBONE-DATA-Seed-N; {len(models)} are left"
            )
    if frame.empty:
        raise UserError(f"--scores: '{path}' has no rows left; leave out fewer")
    values = frame[list(models)].apply(pd.to_numeric, errors="coerce")
    bad = np.argwhere(~np.isfinite(values.to_numpy(float)))
    if len(bad):
        row, column = frame.index[bad[0][0]], list(models)[bad[0][1]]
        said = brief(frame.loc[row, column])
        raise UserError(f"--scores: row {row!r}, column {column!r} of '{path}' is {said}, no number; mend it, or --leave-out the row")
    return Matrix(list(frame.index), values.to_numpy(float).T, labels, left_out)


def score_matrix(matrix: Matrix, progress: Callable[[int], None] = lambda done: None) -> Scored:
    found = clusters(matrix.profiles, matrix.labels, progress)
    return Scored(matrix, found, shares(matrix.profiles, matrix.labels), components(matrix.profiles, matrix.labels))


def plain(scored: Scored) -> dict[str, Any]:
    """As JSON, unrounded: indices and their p, how many permutations (of the label with fewer), shares, and means and standard deviations over seeds
    (None for one seed)."""
    names, means, stds = spread(scored.matrix.profiles, scored.matrix.labels)
    found: dict[str, Any] = {index: scored.clustering.values[index] for index in INDICES}
    found |= {"p": scored.clustering.p, "permutations": min(scored.clustering.permutations.values()), "shares": scored.shares}
    return found | {
        part: {name: dict(zip(scored.matrix.rows, map(_known, values), strict=True)) for name, values in zip(names, of_part.tolist(), strict=True)}
        for part, of_part in (("means", means), ("stds", stds))
    }


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def score_tables(scored: Scored, name: str) -> list[Table]:
    clustering, matrix = scored.clustering, scored.matrix
    rows = [
        {"index": f"{index.replace('_', '-').capitalize()} ({'higher' if higher else 'lower'} is closer)"}
        | {label: f"{clustering.values[index][label]:.3f} (p {clustering.p[index][label]:.3f})" for label in LABELS}
        for index, (_, higher) in INDICES.items()
    ]
    counts = ", ".join(f"{clustering.permutations[label]} {'(all)' if clustering.exact[label] else '(drawn)'} of {label}" for label in LABELS)
    out = f" Left out: {'; '.join(f'{column} ({why})' for column, why in matrix.left_out.items())}." if matrix.left_out else ""
    tables = [
        Table(
            f"{name}: do {len(matrix.profiles)} models cluster by pretraining or by instruction data?",
            pd.DataFrame(rows, dtype=str),
            f"{len(matrix.rows)} rows, not scaled. p: the share of permutations as close or closer, within strata of the other label; {counts}.{out}",
        )
    ]
    sources = pd.DataFrame({"source": list(scored.shares), "share of squares (%)": [f"{100 * share:.1f}" for share in scored.shares.values()]})
    if scored.components is not None:
        sources["variance component"] = [f"{scored.components[source]:.4g}" for source in scored.shares]
    note = "Two-way analysis of variance with the seed as error, summed over rows (type II). A label with few levels has a share by chance alone."
    return [*tables, Table("Where the differences come from", sources.astype(str), note)]
