"""The headline: in a few lines what a study answers, what it cannot tell, what each arm costs, and where the rest is.

Everything follows from `Results` by rules, so that the same lines stand in results.json, on the terminal and in the report. No line says more than
an interval does: "more" and "less" are said where the paired 95 % interval excludes zero, and "cannot be told" where it does not.

The answer compares the direct arm (what the study names as its reference, or what validation selects) with one steered arm: the one whose
strength was selected on validation items, else a proxy at strength 1, else the first proxy, else a logit bias. It is never the one with the best
test score. Not covered: arms of other kinds, which have their line among the arms only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tabulate import tabulate

from evals.display.cells import cell
from evals.measures.registry import measures
from evals.results.header import Header
from evals.statistics.power import Needs
from evals.statistics.value import value_in

Row = dict[str, Any]
Sign = Literal["more", "less", "open"]
MOST_LINES = 20
MOST_ARMS = 7
MOST_OPEN = 4

# What a steered arm does against the direct one, at the task and in what is kept, and the answer.
ANSWERS: dict[tuple[Sign, Sign], str] = {
    ("more", "more"): "Steer: {steered} gains more than {direct} ({gain}) and keeps more ({kept}).",
    ("more", "open"): "Steer: {steered} gains more than {direct} ({gain}); what they keep cannot be told apart ({kept}).",
    ("open", "more"): "Steer: {steered} keeps more than {direct} ({kept}); what they gain cannot be told apart ({gain}).",
    ("less", "less"): "Tune: {direct} gains more than {steered} ({gain}) and keeps more ({kept}).",
    ("less", "open"): "Tune: {direct} gains more than {steered} ({gain}); what they keep cannot be told apart ({kept}).",
    ("open", "less"): "Tune: {direct} keeps more than {steered} ({kept}); what they gain cannot be told apart ({gain}).",
    ("less", "more"): "It depends: {direct} gains more than {steered} ({gain}), and {steered} keeps more ({kept}).",
    ("more", "less"): "It depends: {steered} gains more than {direct} ({gain}), and {direct} keeps more ({kept}).",
    ("open", "open"): "Cannot tell: {steered} and {direct} cannot be told apart, neither in what they gain ({gain}) nor in what they keep ({kept}).",
}
HALVES: dict[Sign, str] = {
    "more": "Half an answer: {steered} has more right than {direct}",
    "less": "Half an answer: {direct} has more right than {steered}",
    "open": "Half an answer: {steered} and {direct} cannot be told apart",
}

ROLES = {"gain": "what an arm gained, as the study has no task", "kept": "what an arm forgot, as the study has no knowledge items"}
BESIDE_BASE: dict[Sign, str] = {
    "more": "{arm} has more right than {base}: {difference}.",
    "less": "{arm} has less right than {base}: {difference}.",
    "open": "{arm} and {base} cannot be told apart: {difference}.",
}


def headline(header: Header, summaries: Mapping[str, Any], compared: Mapping[str, Sequence[Row]], costs: Sequence[Row]) -> list[str]:
    """At most twenty lines."""
    lines = [_study(header), *_answer(header, compared), *_beside_base(header, compared), *_arms(header, compared, costs), *_open(compared)]
    lines += [f"Verdict: {line}" for name, summary in summaries.items() for line in _verdicts(name, summary)]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"And {len(lines) - MOST_LINES + 1} lines more: --full prints all tables."]
    return lines


def _study(header: Header) -> str:
    over = f" in {len(header.worlds)} worlds" if len(header.worlds) > 1 else ""
    seeds = f"{len(header.seeds)} seeds{over}" if len(header.seeds) > 1 else f"one seed{over}, which describes and decides nothing about others"
    return f"{header.study}: {seeds}. Numbers are percentage points with 95 % intervals, from the same items for every arm."


def steered_arm(header: Header, compared: Mapping[str, Sequence[Row]]) -> str | None:
    """The arm that stands for steering; None if nothing is steered."""
    proxies = [arm for arm, kind in header.kinds.items() if kind == "proxy"]
    selected = [row["arm"] for row in compared["selections"]]
    for candidates in ([arm for arm in proxies if arm in selected], [arm for arm in proxies if arm.endswith("@1")], proxies):
        if candidates:
            return candidates[0]
    return next((arm for arm, kind in header.kinds.items() if kind == "logit_bias"), None)


def _answer(header: Header, compared: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    steered, direct = steered_arm(header, compared), next(iter(header.direct), None)
    rows = [row for row in compared["against_direct"] if (row["arm"], row["direct"]) == (steered, direct)]
    if steered is None or direct is None:
        if compared["frontier"]:
            yield f"Tune or steer? The study has no {'steered' if steered is None else 'direct'} arm, so it does not say."
        return
    of_role = {measures()[row["measure"].split("/")[0]].role: row for row in reversed(rows)}
    gain, kept = of_role.get("gain"), of_role.get("kept")
    names = {"steered": steered, "direct": direct}
    if gain is not None and kept is not None:
        yield ANSWERS[_sign(gain), _sign(kept)].format(**names, gain=_named(gain), kept=_named(kept))
    elif gain is not None or kept is not None:
        missing = "kept" if kept is None else "gained"
        yield from (
            f"{HALVES[_sign(row)].format(**names)} ({_named(row)}). The study has no measure of what is {missing}." for row in of_role.values()
        )
    for row in compared["gap_closed"]:
        if (row["arm"], row["direct"]) == (steered, direct) and row["value"] is not None:
            yield f"{steered} closes {cell(value_in(row), 100)} % of the gap between base and {direct} at {row['measure']}."


def _beside_base(header: Header, compared: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """The contrasts with the base and what is not measured, where there is no frontier, which shows the first and has both."""
    if compared["frontier"]:
        return
    for row in compared["contrasts"]:
        if row["minus"] == header.base:
            yield BESIDE_BASE[_sign(row)].format(arm=row["arm"], base=header.base, difference=_named(row))
    roles = {measures()[row["measure"].split("/")[0]].role for row in compared["contrasts"]}
    if roles:
        yield from (f"Not measured: {what}." for role, what in ROLES.items() if role not in roles)


def _arms(header: Header, compared: Mapping[str, Sequence[Row]], costs: Sequence[Row]) -> Iterator[str]:
    """A row for each arm, those on the frontier first: its gain and loss against base and direct arm, and its counted costs."""
    rows = sorted(compared["frontier"], key=lambda row: (not row["on_frontier"], -row["share_of_draws"]))
    rows = [row for row in rows if row["arm"] != header.base]
    if not rows:
        return
    direct = next(iter(header.direct), None)
    against = {(row["arm"], row["measure"]): row for row in compared["against_direct"] if row["direct"] == direct}
    cost = {row["arm"]: row for row in costs}
    cells = [_cells(row, header, against, cost) for row in rows[:MOST_ARMS]]
    yield from tabulate(cells, headers="keys", tablefmt="plain", disable_numparse=True).splitlines()
    on, left = sum(row["on_frontier"] for row in rows[MOST_ARMS:]), max(0, len(rows) - MOST_ARMS)
    more = f"; {left} arms more, {on or 'none'} of them on it" if left else ""
    yield f"* on the frontier: no other arm is at least as good at both and better at one{more}"


def _cells(row: Row, header: Header, against: Mapping[tuple[str, str], Row], cost: Mapping[str, Row]) -> dict[str, str]:
    found = {"": f"{row['arm']}{' *' if row['on_frontier'] else ''}"}
    for role in ("gain", "kept"):
        measure = row[role]["measure"]
        found[f"{measure}, against {header.base}"] = _points(row[role])
        if header.direct:
            other = against.get((row["arm"], measure))
            found[f"against {header.direct[0]}{' ' * (role == 'kept')}"] = "" if other is None else _points(other)
    own, base = cost.get(row["arm"]), cost.get(header.base)
    if own is not None and base is not None:
        found["FLOPs to make"] = f"{own['flops']:.2g}" if own["flops"] else "0"
        found["a token, x base"] = f"{own['flops_a_token'] / base['flops_a_token']:.2f}"
    return found


def _open(compared: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Differences from the main direct arm, and contrasts, that are not decided; those that fewest seeds would decide first."""
    main = next((row["direct"] for row in compared["against_direct"]), None)
    rows = [*(row | {"minus": main} for row in compared["against_direct"] if row["direct"] == main), *compared["contrasts"]]
    once = {(frozenset((row["arm"], row["minus"])), row["measure"]): row for row in rows if row["needs"]}
    undecided = sorted(once.values(), key=lambda row: (row["needs"]["of"] != "seeds", row["needs"]["number"]))
    told = [f"{row['arm']} against {row['minus']} at {row['measure']} ({Needs(**row['needs'])})" for row in undecided[:MOST_OPEN]]
    if told:
        rest = f", and {len(undecided) - MOST_OPEN} differences more" if len(undecided) > MOST_OPEN else ""
        yield f"Cannot be told yet, and what would decide it four times in five: {'; '.join(told)}{rest}."


def _verdicts(name: str, summary: Any) -> Iterator[str]:
    for verdict in measures()[name].verdicts(summary):
        yield f"'{verdict.claim}', {verdict.arm}: {verdict.verdict}."


def _sign(row: Row) -> Sign:
    return "open" if not value_in(row).excludes_zero() else "more" if row["value"] > 0 else "less"


def _named(row: Row) -> str:
    return f"{row['measure']} {_points(row)}"


def _points(row: Row) -> str:
    """A difference in percentage points, with its sign."""
    value = value_in(row)
    text = cell(value, 100)
    return f"+{text}" if value.value is not None and value.value > 0 else text
