"""Task gained against what was forgotten, for settings that were measured elsewhere: which of them no other dominates, and which one seed cannot
tell apart.

Read are a folder of results of the `method_comparison` of Hugging Face PEFT (one JSON file a setting), a table of them, or any CSV with the columns
name, gain (a share of right answers), loss (of anything; less is better) and n (items of the gain), perhaps loss_n (then the loss is a share of so
many items) and parameters (that were trained). Draws of a share are from its Beta distribution under Jeffreys' prior, settings independent of
each other: answers to the same items are positively correlated, so that real differences are known somewhat better. Not covered: how results would
vary with the seed of the tuning, which is in no such table; a loss without loss_n is taken as exact.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from scipy.stats import bootstrap, spearmanr

from evals.display.cells import Table, cell
from evals.display.chart import Axis, Chart, Panel, Series, scaled
from evals.statistics.frontier import on_frontier
from evals.statistics.value import Value
from proxytune.errors import UserError
from proxytune.files import check_readable

GSM8K = 1319  # test questions, all of which PEFT asks
DRAWS = 4000
FEW = 10  # settings
GAIN, LOSS = "gain (% right)", "loss (less is better)"
PEFT = ("test_accuracy", "forgetting")


class Row(BaseModel):
    """A setting, as a file has it."""

    name: str
    gain: float = Field(ge=0, le=1)
    loss: float = Field(allow_inf_nan=False)
    n: int = Field(ge=1)
    loss_n: int | None = Field(default=None, ge=1)
    parameters: float | None = Field(default=None, ge=0)


ROWS = TypeAdapter(list[Row])


@dataclass(frozen=True)
class Setting:
    """`dominated_by` are the settings that are at least as good at both and better at one, those with the largest gain first; `alike` is the number
    of others from whose gain this one's cannot be told apart by the items (95 %, each pair by itself)."""

    name: str
    gain: Value
    loss: Value
    parameters: float | None
    dominated_by: tuple[str, ...]
    share_of_draws: float
    alike: int


@dataclass(frozen=True)
class Frontier:
    """All settings, those with the largest gain first, and rank correlations over them, by name."""

    settings: tuple[Setting, ...]
    correlations: Mapping[str, Value]
    left_out: int = 0

    @property
    def best(self) -> list[Setting]:
        return [setting for setting in self.settings if not setting.dominated_by]


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The settings of a folder or a CSV file, and how many were left out because they did not finish or have no forgetting. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"frontier: '{path}' is not there; give a folder of PEFT's results, or a CSV file with the columns name, gain, loss, n")
    records = _from_folder(path) if path.is_dir() else _from_csv(path)
    known = [record for record in records if record is not None]
    if not known:
        raise UserError(f"frontier: '{path}' holds no finished result with test accuracy and forgetting; give another folder or file")
    try:
        rows = ROWS.validate_python(known)
    except ValidationError as error:
        (place, *field), said, given = error.errors()[0]["loc"], error.errors()[0]["msg"], error.errors()[0]["input"]
        raise UserError(f"frontier: {'.'.join(map(str, field))} of row {int(place) + 1} of '{path}': {said}, not {given!r}; mend the file") from error
    names = [row.name for row in rows]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"frontier: '{path}' has two rows named {twice!r}; give each a name of its own")
    return rows, len(records) - len(known)


def find_frontier(rows: Sequence[Row], left_out: int = 0) -> Frontier:
    draw = np.random.default_rng(0)
    rows = sorted(rows, key=lambda row: (-row.gain, row.loss, row.name))
    gain, loss = np.array([row.gain for row in rows]), np.array([row.loss for row in rows])
    gains = np.stack([_draws(draw, row.gain, row.n) for row in rows])
    losses = np.stack([np.full(DRAWS, row.loss) if row.loss_n is None else _draws(draw, row.loss, row.loss_n) for row in rows])
    share = on_frontier(gains, -losses).mean(axis=1)
    settings = []
    for place, row in enumerate(rows):
        better = (gain >= gain[place]) & (loss <= loss[place]) & ((gain > gain[place]) | (loss < loss[place]))
        low, high = np.quantile(gains - gains[place], (0.025, 0.975), axis=1)
        settings.append(
            Setting(
                row.name,
                _value(row.gain, gains[place]),
                Value(row.loss) if row.loss_n is None else _value(row.loss, losses[place]),
                row.parameters,
                tuple(rows[other].name for other in np.flatnonzero(better)),
                float(share[place]),
                int(((low <= 0) & (high >= 0)).sum()) - 1,
            )
        )
    return Frontier(tuple(settings), _correlations(rows), left_out)


def _correlations(rows: Sequence[Row]) -> dict[str, Value]:
    found = {"gain and loss": _correlation([row.gain for row in rows], [row.loss for row in rows])}
    counted = [row for row in rows if row.parameters]
    if counted:
        sizes = [float(np.log(row.parameters)) for row in counted if row.parameters]
        found["gain and log parameters"] = _correlation([row.gain for row in counted], sizes)
        found["loss and log parameters"] = _correlation([row.loss for row in counted], sizes)
    return found


def _correlation(one: Sequence[float], other: Sequence[float]) -> Value:
    """Spearman's, with an interval over settings where there are ten or more; no value with fewer than three, or where one of them does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return Value(None)
    if len(one) < FEW:
        return Value(float(spearmanr(one, other).statistic))

    def statistic(x: Float[np.ndarray, " rows"], y: Float[np.ndarray, " rows"]) -> float:
        return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)

    ends = bootstrap(
        (one, other), statistic, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Value(statistic(np.array(one), np.array(other)), float(ends.low), float(ends.high))


def _draws(draw: np.random.Generator, share: float, count: int) -> Float[np.ndarray, " draws"]:
    right = share * count
    return draw.beta(right + 0.5, count - right + 0.5, DRAWS)


def _value(value: float, draws: Float[np.ndarray, " draws"]) -> Value:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Value(value, min(value, float(low)), max(value, float(high)))


# What files hold


def _from_csv(path: Path) -> list[dict[str, Any] | None]:
    check_readable(path, "frontier")
    try:
        frame = pd.read_csv(path)
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(f"frontier: '{path}' cannot be read as CSV ({str(error).splitlines()[0]}); give another file") from error
    if set(PEFT) <= set(frame.columns):
        frame = frame.rename(columns={"test_accuracy": "gain", "forgetting": "loss", "trainable_params": "parameters", "file": "name"}).assign(
            n=GSM8K
        )
        if "status" in frame:
            frame["gain"] = frame["gain"].where(frame["status"] == "success")
    lacking = [column for column in ("name", "gain", "loss", "n") if column not in frame]
    if lacking:
        raise UserError(f"frontier: '{path}' has no column {lacking[0]}; it must have name, gain, loss and n, or be a table of PEFT's results")
    known = [column for column in Row.model_fields if column in frame]
    rows = frame[known].astype(object).where(frame[known].notna(), None).to_dict("records")
    return [None if row["gain"] is None or row["loss"] is None else {str(name): value for name, value in row.items()} for row in rows]


def _from_folder(path: Path) -> list[dict[str, Any] | None]:
    found = []
    for file in sorted(path.glob("*.json")):
        check_readable(file, "frontier")
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            trained = result["train_info"]
            last = trained["metrics"][-1] if trained["metrics"] else {}
            finished = trained["status"] == "success" and {"test accuracy", "forgetting"} <= set(last)
            row = {"name": file.stem, "gain": last.get("test accuracy"), "loss": last.get("forgetting"), "n": GSM8K}
            found.append(row | {"parameters": trained.get("num_trainable_params")} if finished else None)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"frontier: '{file}' is no result of PEFT's method_comparison ({error!r}); take it out of the folder") from error
    return found


# What is shown


def frontier_tables(found: Frontier, name: str) -> list[Table]:
    left_out = f" {found.left_out} did not finish or have no forgetting, and are left out." if found.left_out else ""
    note = (
        "Intervals and draws are over the items, 95 %; a loss without an interval is taken as exact. Not told apart from: so many others whose gain "
        "may be the same by the items alone, settings taken as independent. Each setting is one tuning: another seed would move it further, by an "
        f"amount that no such table says.{left_out}"
    )
    tables = []
    for title, dominated in (("none", False), ("another", True)):
        chosen = [setting for setting in found.settings if bool(setting.dominated_by) == dominated]
        rows = [_row(setting, len(found.settings) - 1) for setting in chosen]
        if rows:
            tables.append(Table(f"{name}: dominated by {title}, {len(rows)} of {len(found.settings)}", pd.DataFrame(rows, dtype=str), note))
    pairs = pd.DataFrame({"of": list(found.correlations), "rank correlation": [cell(one, 1, 3) for one in found.correlations.values()]}, dtype=str)
    return [*tables, Table("Over all settings", pairs, "Spearman's; 95 % intervals, bootstrap over settings.")]


def _row(setting: Setting, others: int) -> dict[str, str]:
    row = {"setting": setting.name, "gain (%)": cell(setting.gain, 100), "loss": cell(setting.loss, 1, 4)}
    row |= {"on the frontier in % of draws": f"{100 * setting.share_of_draws:.0f}", "not told apart from": f"{setting.alike} of {others}"}
    if not setting.dominated_by:
        return row
    more = f", and {len(setting.dominated_by) - 1} more" if len(setting.dominated_by) > 1 else ""
    return row | {"dominated by": f"{setting.dominated_by[0]}{more}"}


def frontier_chart(found: Frontier, name: str) -> Chart:
    """All settings, and those near the frontier, which alone are named."""
    best = sorted(found.best, key=lambda setting: setting.gain.value or 0.0)
    step = Series("step", tuple(Value(setting.loss.value) for setting in best), tuple(100 * (setting.gain.value or 0.0) for setting in best))
    near = 1.5 * max(setting.loss.value or 0.0 for setting in best)
    middle = float(np.median([100 * (setting.gain.value or 0.0) for setting in best]))
    lowest = min(middle - 15, 100 * (best[-1].gain.value or 0.0) - 5)
    everything = _marks(found, named=False)
    panels = [Panel((step, *everything), "all settings; filled: dominated by none", Axis(GAIN), Axis(LOSS))]
    if near and len(best) > 1:
        limits = (lowest - 2, 100 * (best[-1].gain.value or 0.0) + 6), (-near / 30, near)
        panels.append(Panel((step, *_marks(found, named=True)), "near the frontier", Axis(GAIN, limits=limits[0]), Axis(LOSS, limits=limits[1])))
    return Chart("frontier", f"{name}: gain against loss, 95 % intervals over items", tuple(panels), across=2)


def _marks(found: Frontier, named: bool) -> list[Series]:
    return [
        _points([setting for setting in found.settings if bool(setting.dominated_by) == dominated], named and not dominated, dominated)
        for dominated in (True, False)
    ]


def _points(settings: Sequence[Setting], named: bool, dominated: bool) -> Series:
    return Series(
        "point",
        tuple(setting.loss for setting in settings),
        across=tuple(scaled(setting.gain, 100) for setting in settings),
        group="dominated" if dominated else "dominated by none",
        filled=(not dominated,) * len(settings),
        names=tuple(setting.name if named else "" for setting in settings),
    )
