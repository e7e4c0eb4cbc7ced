"""Tables of what tuning did inside: density by exposure, erosion, drift, lens, restoration, patching, relearning, and the verdict.

Numbers come from the results object alone (see `findings` and `verdicts`); a table is there where it has rows. A value that could
not be measured is n/a, with the reason in the note. A proxied base has the base's own weights: what could only change with them is
`unchanged by construction`, and no finding. That needs `kinds` in the results (label to kind of arm); without it such arms are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from evals.cells import Table, cell, over
from probes.internals.blocks import BLOCKS, thirds
from probes.verdict import RULE

UNCHANGED = "unchanged by construction"
LEFT_OUT = " Some layers of many; all are in the JSON."
FEW_STATES = 7  # so many columns fit a page; of more, the best is shown
SCALES = {  # of each clause: what its numbers are multiplied by, their digits, and what they are then
    "density": (1000.0, 1, "thousandths of effective rank"),
    "restoration": (100.0, 1, "points of probability"),
    "freezing": (100.0, 1, "points right"),
    "savings": (1.0, 2, "share of the steps"),
}
STATES = {"fails": "Failed", "holds": "held", "cannot tell": "cannot tell"}
Row = dict[str, Any]
Columns = dict[str, dict[str, str]]


def inside_tables(results: dict[str, Any]) -> list[Table]:
    """The tables of all that was measured inside, in the order of the evidence: the verdicts last."""
    parts: list[Callable[[dict[str, Any]], list[Table]]] = [_exposure, _nulls, _rankme, _erosion, _drift, _weights, _lens, _linear]
    parts += [_shapley, _blocks, _most_changed, _patching, _recoverability, _verdicts]
    return [table for part in parts for table in part(results)]


def _by_arm(rows: Iterable[Row], **wanted: Any) -> dict[str, Row]:
    return {row["arm"]: row for row in rows if all(row[name] == value for name, value in wanted.items())}


def _column(rows: Iterable[Row], scale: int | float, digits: int = 1, inner: str | None = None, **wanted: Any) -> dict[str, str]:
    """Cells by arm: of the rows themselves, or of an inner entry that has an interval of its own."""
    return {arm: cell(row if inner is None else row[inner], scale, digits) for arm, row in _by_arm(rows, **wanted).items()}


def _table(title: str, arms: Sequence[str], columns: Columns, note: str, first: str = "arm") -> list[Table]:
    shown = [arm for arm in arms if any(arm in cells for cells in columns.values())]
    frame = pd.DataFrame({first: shown} | {name: [cells.get(arm, "") for arm in shown] for name, cells in columns.items()}, dtype=str)
    return [Table(title, frame, note)] if shown else []


def _arms(results: dict[str, Any], rows: Iterable[Row]) -> list[str]:
    """In the study's order, as far as it is known; an untrained model first."""
    found = dict.fromkeys(row["arm"] for row in rows)
    order = {arm: place for place, arm in enumerate(["untrained", *results.get("kinds", {})])}
    return sorted(found, key=lambda arm: order.get(arm, len(order)))


def _proxied(results: dict[str, Any]) -> list[str]:
    """The arms whose weights are the base's, the base itself among them."""
    return [results["base"], *(arm for arm, kind in results.get("kinds", {}).items() if kind == "proxy")]


def _exposure(results: dict[str, Any]) -> list[Table]:
    rows = [row for row in results["exposure"] if (row["site"], row["place"]) == ("normed", "last")]
    last = max((row["state"] for row in rows), default=0)
    columns: Columns = {}
    for metric, name in (("e5", "E5"), ("effective_rank", "effective rank")):
        for part, words, scale in (("contrast", "contrast", 1000), ("slope", "slope", 100), ("partial", "partial slope", 100)):
            columns[f"{name}: {words}"] = _column(rows, scale, inner=part, metric=metric, state=last)
    note = (
        "Contrast: familiar less unfamiliar, in thousandths, matched for length and last token. Slope: Spearman's correlation with exposure, in "
        "hundredths; partial slope: less what the model's own log-probability of the answer and the words' frequency explain. E5 (energy in the top "
        f"5 % of coordinates): higher is sparser; effective rank: higher is denser. 95 % intervals, {over(results)}."
    )
    return _table(
        f"How density goes with exposure (last token, after layer {last} and the final norm)", _arms(results, rows), columns, note, first="model"
    )


def _nulls(results: dict[str, Any]) -> list[Table]:
    rows = results.get("nulls", [])
    columns: Columns = {}
    for metric, name in (("e5", "E5"), ("effective_rank", "effective rank")):
        chosen = [row for row in rows if row["metric"] == metric]
        columns[f"{name}: base"] = {str(row["state"]): _plain(row["base"]) for row in chosen}
        columns[f"{name}: Gaussian (sd)"] = {str(row["state"]): f"{_plain(row['gaussian'])} ({_plain(row['gaussian_sd'])})" for row in chosen}
        columns[f"{name}: untrained"] = {str(row["state"]): _plain(row["untrained"]) for row in chosen}
    states = _some_states(rows)
    note = (
        "Density of one state, averaged over items (residual stream, last token). Gaussian: of vectors with the states' own mean and covariance, "
        f"with the standard deviation of one vector. Means over seeds.{LEFT_OUT if len(states) < len({row['state'] for row in rows}) else ''}"
    )
    return _table("Density by layer beside its nulls", [str(state) for state in states], columns, note, first="after layer")


def _rankme(results: dict[str, Any]) -> list[Table]:
    rows = [row for row in results.get("rankme", []) if row["group"] == "both"]
    columns: Columns = {f"layer {state}": _column(rows, 1, state=state) for state in _some_states(rows)}
    note = (
        "Exp of the entropy of the singular values of the states of all familiar and unfamiliar items (residual stream, last token): how many "
        "directions they share, at most the width. Intervals are over seeds; a single seed has none."
    )
    return _table("RankMe", _arms(results, rows), columns, note)


def _some_states(rows: Sequence[Row]) -> list[int]:
    """All of few, else five from first to last."""
    states = sorted({row["state"] for row in rows})
    return states if len(states) <= FEW_STATES else [states[len(states) * part // 4 - (part == 4)] for part in range(5)]


def _plain(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _erosion(results: dict[str, Any]) -> list[Table]:
    rows = results["erosion"]
    if not rows:
        return []
    columns: Columns = {block: _column(rows, 1000, block=block, site="residual", place="last") for block in ("low", "middle", "high")}
    columns["low, less random"] = _column(rows, 1000, inner="less_random", block="low", site="residual", place="last")
    columns["low, at the subject"] = _column(rows, 1000, block="low", site="residual", place="subject")
    columns["low, rotated"] = _column(rows, 1000, block="low", site="rotated", place="last")
    columns = {name: cells for name, cells in columns.items() if cells}
    columns["low"] |= dict.fromkeys(_proxied(results), UNCHANGED)
    note = (
        "Effective rank of the residual stream, arm less base, familiar less unfamiliar; below zero is erosion. Blocks: thirds of the layers. Less "
        "random: less the same under random deltas of the same norm. At the subject: at its last token in place of the statement's. "
        f"Rotated: in another basis. {_matched(rows[0])} 95 % intervals, {over(results)}."
    )
    arms = _arms(results, [*({"arm": arm} for arm in _proxied(results)), *rows])
    return _table("Erosion: change of density (thousandths)", arms, columns, note)


def _matched(row: Row) -> str:
    if row["matched"]:
        return (
            f"{row['matched']} of {row['n']} familiar and unfamiliar items have a counterpart of the same length and last token; these are compared."
        )
    return f"None of the {row['n']} familiar and unfamiliar items has a counterpart of the same length and last token; they are compared as they are."


def _drift(results: dict[str, Any]) -> list[Table]:
    law, rows = results["law"], results["drift"]
    columns: Columns = {f"KL, {group}": _column(law, 1, 3, group=group) for group in ("familiar", "unfamiliar")}
    for what, name in (("cka", "CKA"), ("cosine", "cosine")):
        for block in ("low", "high"):
            columns[f"{name}, {block}"] = _column(rows, 1, 3, block=block, what=f"{what}/familiar")
    if rows:
        columns["CKA, low"] |= dict.fromkeys(_proxied(results), UNCHANGED)
    else:
        columns = {name: cells for name, cells in columns.items() if name.startswith("KL")}
    note = (
        "KL(base || arm) after the statement, in nats, familiar and unfamiliar: the drift that is fair to all arms. CKA (of states as a whole) and "
        "cosine (prompt by prompt) with the base's states of familiar statements at the last token: 1 is unmoved; an expert has another shape. "
        f"95 % intervals, {over(results)}; CKA and cosine have them over seeds only."
    )
    arms = _arms(results, [*law, *({"arm": arm} for arm in _proxied(results)), *rows]) if law or rows else []
    return _table("Drift from the base: what comes out, and the states", arms, columns, note)


def _weights(results: dict[str, Any]) -> list[Table]:
    rows = results["drift"]
    columns: Columns = {}
    for what, name, scale in (("relative_change", "change, {} (%)", 100), ("stable_rank", "stable rank, {}", 1)):
        columns |= {name.format(block): _column(rows, scale, 2, block=block, what=what) for block in ("low", "middle", "high")}
    note = (
        "Change: Frobenius norm of tuned less base over the base's, in per cent; stable rank: of that change, 1 is a single direction (means over "
        "matrices, weighted by size); n/a where nothing changed. Intervals are over seeds; a single seed has none."
    )
    return _table("Drift of the weights", _arms(results, rows), {name: cells for name, cells in columns.items() if cells}, note)


def _landmarks(layers: int) -> dict[int, str]:
    """The states worth a column, in words: ends of blocks, the last but one, the last."""
    ends = [(block[-1], f"{name} block's end") for name, block in thirds(layers).items() if len(block) and name != "high"]
    words: dict[int, list[str]] = {}
    for state, name in [*ends, (layers - 1, "before the last"), (layers, "last")]:
        words.setdefault(state, []).append(name)
    return {state: f"layer {state} ({', '.join(words[state])})" for state in sorted(words)}


def _lens(results: dict[str, Any]) -> list[Table]:
    rows = [row for row in results["lens"] if row["what"] == "share"]
    # The base's own lens is the base's.
    rows += [row | {"lens": "own"} for row in rows if row["arm"] == results["base"] and row["lens"] == "base"]
    note = (
        "The right candidate's share among the candidates, after the statement, in exposed items. Plain: the model's own final norm and head. "
        "Base's: states first translated linearly as the base's are. Own: as the model's own are. Lost through the base's lens but not "
        f"through the own one means rotated, not erased. 95 % intervals, {over(results)}."
    )
    names = {"plain": "plain", "base": "base's", "own": "own"}
    return _by_layer(results, rows, "lens", names, "What the layers already say of the right answer, through a lens (per cent)", note)


def _linear(results: dict[str, Any]) -> list[Table]:
    rows = [row for row in results["lens"] if row["lens"] == "linear"]
    note = (
        "Accuracy: how often a linear probe names the answer of people it was not trained on. Selectivity: less its accuracy on answers dealt at "
        f"random; near or below zero the states say who is meant, and not the answer. 95 % intervals, {over(results)}."
    )
    names = {"accuracy": "accuracy", "selectivity": "selectivity"}
    return _by_layer(results, rows, "what", names, "What a linear probe finds of the right answer (per cent; selectivity in points)", note)


def _by_layer(results: dict[str, Any], rows: Sequence[Row], key: str, names: dict[str, str], title: str, note: str) -> list[Table]:
    """A row for each of `names` and arm, the base's first, and a column for each landmark among the layers."""
    if not rows:
        return []
    landmarks = _landmarks(max(row["state"] for row in rows))
    found = {(row[key], row["arm"], row["state"]): row for row in rows}
    lines = [(value, arm) for value in names for arm in _arms(results, rows) if any(kind == value and of == arm for kind, of, _ in found)]
    frame = pd.DataFrame({key if key == "lens" else "probe's": [names[value] for value, _ in lines], "arm": [arm for _, arm in lines]}, dtype=str)
    for state, words in landmarks.items():
        frame[words] = [cell(found.get((value, arm, state)), 100) for value, arm in lines]
    return [Table(title, frame, note)]


def _shapley(results: dict[str, Any]) -> list[Table]:
    rows = results["restoration"]
    columns: Columns = {"lost": _column(rows, 100, what="loss")}
    columns |= {block: {arm: _with_share(row) for arm, row in _by_arm(rows, what="shapley", part=block).items()} for block in BLOCKS}
    note = (
        "Probability of the right candidate, exposed items. Lost: base less arm. Each block's Shapley value: what setting it back to the base brings "
        "back, averaged over every order in which the blocks could be; they add up to the loss, and the per cent are of it (left out where "
        f"the loss is within noise). 95 % intervals, {over(results)}."
    )
    return _table("Restoration: which block holds the loss (points of probability)", _arms(results, rows), columns, note)


def _with_share(row: Row) -> str:
    share = row.get("share")
    return cell(row, 100) + ("" if share is None or share["value"] is None else f", {share['value'] * 100:.0f} %")


def _blocks(results: dict[str, Any]) -> list[Table]:
    """Each block by itself, beside its controls and what it does to the task."""
    rows = results["restoration"]
    found = {(row["arm"], row["what"], row["part"]): row for row in rows}
    lines = [(arm, block) for arm in _arms(results, rows) for block in BLOCKS]
    frame = pd.DataFrame({"arm": [arm for arm, _ in lines], "block": [block for _, block in lines]}, dtype=str)
    for name, what in (("restored alone", "recovery"), ("as many elsewhere", "same-number"), ("as much change elsewhere", "same-norm")):
        frame[name] = [cell(found.get((arm, what, block)), 100) for arm, block in lines]
    frame["tuned alone"] = [cell(found.get((arm, "damage", block)), 100) for arm, block in lines]
    frame["task (nats a token)"] = [cell(found.get((arm, "task", block)), 1, 3) for arm, block in lines]
    note = (
        "Restored alone: what comes back when this block is the base's again, in points of probability of the right candidate. Its controls: as many "
        "parameters drawn outside it, and as much of the change's squared norm (n/a: nothing changed in it, or not enough outside); a block that "
        "brings back no more is no special place. Tuned alone: what the base loses with this block tuned. Task: change of the log-probability of the "
        f"task's answers when the block is restored; below zero is the task's price. 95 % intervals, {over(results)}."
    )
    return [Table("Restoration, block by block (points of probability)", frame, note)] if lines else []


def _most_changed(results: dict[str, Any]) -> list[Table]:
    rows = results["restoration"]
    names = {"top": "changed most", "random": "at random"}
    found = {(row["arm"], row["what"], row["part"]): row for row in rows if row["what"] in names}
    shares = sorted({part for _, _, part in found}, key=float)
    lines = [(arm, what) for arm in _arms(results, rows) for what in names if any(key[:2] == (arm, what) for key in found)]
    frame = pd.DataFrame({"arm": [arm for arm, _ in lines], "restored": [names[what] for _, what in lines]}, dtype=str)
    for share in shares:
        frame[f"{share} %"] = [cell(found.get((arm, what, share)), 100) for arm, what in lines]
    note = f"Of all parameters: those that changed most, and as many drawn at random, set back to the base. 95 % intervals, {over(results)}."
    return [Table("Restoration of so many parameters (points of probability brought back)", frame, note)] if lines else []


def _patching(results: dict[str, Any]) -> list[Table]:
    rows = results["patching"]
    states = sorted({row["state"] for row in rows if row["state"] is not None})
    columns: Columns = {"lost": _column(rows, 100, state=None)}
    note = "Lost: base less arm in the right candidate's share. "
    if len(states) <= FEW_STATES:
        columns |= {f"layer {state}" if state else "embeddings": _column(rows, 100, state=state) for state in states}
        note += "Then what comes back when the arm goes on from the base's state of the subject's last token after that layer."
    else:
        best = {
            arm: max((row for row in rows if row["arm"] == arm and row["state"] is not None), key=lambda row: row["value"] or 0)
            for arm in _arms(results, rows)
        }
        columns["brought back"] = {arm: cell(row, 100) for arm, row in best.items()}
        columns["after layer"] = {arm: str(row["state"]) for arm, row in best.items()}
        note += (
            "Brought back: most that comes back when the arm goes on from the base's state of the subject's last token after one layer, out of "
            f"{len(states)}; the largest of so many is a little too large, and its interval does not say so."
        )
    return _table(
        "Patching: the base's state of the subject in the arm (points)", _arms(results, rows), columns, f"{note} 95 % intervals, {over(results)}."
    )


def _recoverability(results: dict[str, Any]) -> list[Table]:
    rows = results["recoverability"]
    arms = _by_arm(rows)
    columns: Columns = {"lost (points of probability)": _column(rows, 100, inner="lost")}
    columns["steps, relearnt"] = {arm: _steps(row["relearnt"]) for arm, row in arms.items()}
    columns["steps, learnt anew"] = {arm: _steps(row["learnt"]) for arm, row in arms.items()}
    columns["savings"] = {arm: _savings(row) for arm, row in arms.items()}
    columns["unrelated facts bring back (% of the loss)"] = _column(rows, 100, inner="brought_back")
    note = (
        "Steps of tuning on plain statements: until facts that were exposed have 95 % of the probability that the base gives them, and until facts "
        "that never were have gained as much; n/a: not within the steps given. Savings: 1 less their ratio; 1 is nothing to relearn, 0 as slow as "
        "new facts. What ten unrelated facts bring back "
        f"was never lost. Both n/a where the loss is within noise. 95 % intervals, {over(results)}."
    )
    return _table("Recoverability: how soon what was lost returns", _arms(results, rows), columns, note)


def _steps(of_seeds: Sequence[float | None]) -> str:
    return ", ".join("n/a" if steps is None else f"{steps:.1f}" for steps in of_seeds)


def _savings(row: Row) -> str:
    bound = "" if row["savings"] is None or row["bound"] == ["exact"] else f"{' / '.join(row['bound'])} "
    return bound + cell(row["savings"], 1, 2)


def _verdicts(results: dict[str, Any]) -> list[Table]:
    """A table for every judged arm: its verdict, the clauses, and what would have refuted them."""
    tables = []
    for row in results["verdicts"]:
        frame = pd.DataFrame([_clause(place, clause) for place, clause in enumerate(row["clauses"], start=1)], dtype=str)
        places = {state: [str(place) for place, clause in enumerate(row["clauses"], start=1) if clause["state"] == state] for state in STATES}
        found = "; ".join(f"{words}: {', '.join(places[state]) or 'none'}" for state, words in STATES.items())
        note = (
            f"{found}. A clause fails if its whole 95 % interval ({over(results)}) is on the side named first, and holds if it does not fail and its "
            "whole interval is on the second. The claim is supported if every clause holds, and refuted (not supported) if any one fails; else too "
            "little is known: underpowered. One seed describes this model and this run, and judges nothing. Needed: so many seeds would decide "
            "the clause four times in five, were the effect the least that counts or none."
        )
        judged = f": {row['verdict']}" if row["verdict"].startswith("cannot tell") else f" is {row['verdict']}"
        tables.append(Table(f"Verdict, {row['arm']}: '{row['claim']}'{judged}", frame, note))
    return tables


def _clause(place: int, clause: Row) -> dict[str, str]:
    scale, digits, unit = SCALES[clause["clause"].partition("/")[0]]
    rule = RULE[clause["clause"]]
    boundary, threshold = (f"{number * scale:.{digits}f}" for number in (rule.boundary, clause["threshold"]))
    other = "above" if rule.side == "below" else "below"
    needs = "" if clause["state"] != "cannot tell" else "n/a" if clause["needs"] is None else f"{clause['needs']} seeds"
    return {
        "claimed": f"{place}. {clause['claim']}",
        "value": cell(clause | {"note": None}, scale, digits),
        "in": unit,
        "fails if all": f"{other} {threshold}",
        "else holds if all": f"{rule.side} {boundary}",
        "state": clause["state"],
        "needed": needs,
        "note": clause["note"],
    }
