"""Released generations scored again, beside the published numbers: the gap closed with its interval, and exact tests between systems.

Shares are between 0 and 1. Two ways of scoring are shown side by side where they differ: `authors` (as the published numbers were computed, so that
they can be reproduced to all digits) and `ours` (unparsed answers are wrong, numbers are compared as numbers). See `generations` for the files.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import combinations, product
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.released.generations import SCORERS, Scores, Source, Test, otherwise_read, programs_of, read_tests, read_tree, score_code
from evals.running.progress import Display
from evals.sandbox import SETUP_FAILED, Program, run_programs
from evals.statistics.intervals import Estimate, bootstrap_means, gap_closed, interval
from evals.statistics.significance import mcnemar
from probes.significance import holm
from proxytune.errors import UserError

CodeRunner = Callable[[Sequence[Program]], list[bool]]
ROLES = ("base", "proxy", "direct", "expert")
READINGS = ("ours", "authors")
PASS = re.compile(r"pass@([1-9][0-9]{0,5})")
SAME = 1e-9  # published means of probabilities were stored with ten digits per item


class Metric(NamedTuple):
    """The kind of items, the key in the published file, the factor of its value there, and the ways of scoring whose headline metric it is."""

    kind: str
    key: str
    scale: float = 1.0
    readings: Sequence[str] = ()


# The published mean gap closed is over the headline metrics; the others are their parts.
METRICS = {
    "exact match": Metric("math", "exact_match", readings=("authors",)),
    "equal number": Metric("math", "exact_match", readings=("ours",)),
    "choice of the parsed": Metric("choice", "acc", readings=("authors",)),
    "choice": Metric("choice", "acc", readings=("ours",)),
    "true": Metric("judged", "GPT-true acc"),
    "informative": Metric("judged", "GPT-info acc"),
    "true and informative": Metric("judged", "GPT-true-info acc", readings=READINGS),
    "P(true)": Metric("judged", "GPT-true"),
    "P(informative)": Metric("judged", "GPT-info"),
    "toxic": Metric("toxicity", "overall", readings=READINGS),
    "win rate": Metric("preference", "win_rate", 0.01, READINGS),
}


class Scored(NamedTuple):
    """A metric of one system on one benchmark, with the items if there are any."""

    source: Source
    metric: str
    scores: Scores | None
    published: float | None
    note: str


def rescore(
    folder: Path,
    code: CodeRunner | None = None,
    progress: Callable[[str], object] = lambda line: None,
    *,
    humaneval: Path | None = None,
    roles: Mapping[str, str] | Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """The results: `rows`, `gap_closed`, `gap_summary`, `mcnemar`, `notes` (a line for everything that was left out or is parsed differently).

    A row is benchmark, system, metric, ours, published, difference, n (items in the mean), unparsed, low, high, note; `ours` is None if there is
    nothing to score. Code is executed only by `code`, which takes programs and returns their verdicts in order, with the prompts and tests of
    `humaneval` (JSONL with task_id, prompt, test, entry_point). `roles` gives each of base, proxy, direct and expert a pattern of system names (`*`
    matches anything, commas separate alternatives). The gap closed is computed for every matching triple of base, proxy or expert, and direct on one
    benchmark; several mappings are handled separately. Without roles there is no gap, and the exact tests are between all systems. Calls `progress`
    with a line for each system. Raises `UserError` if a file is malformed or missing, if a link leads out of the folder, if a released prompt
    differs from the benchmark's, if a role is unknown, or if a pattern matches no system.
    """
    sources, notes = read_tree(folder)
    for name in (name for source in sources for name in (source.benchmark, source.system)):
        if not name.isascii() and any("\ud800" <= sign <= "\udfff" for sign in name):
            raise UserError(f"results: the folder '{name}' has a name that is not UTF-8; rename it")
    mappings = [mapping for mapping in ([roles] if isinstance(roles, Mapping) else roles) if mapping]
    _check_roles(mappings, {source.system for source in sources})
    tests = read_tests(humaneval) if humaneval is not None and code is not None else None
    scored = []
    for source in sources:
        progress(f"{source.benchmark}/{source.system}")
        scored += _scored(source, code, tests)
        notes += otherwise_read(source)
    results: dict[str, Any] = {"rows": [_row(entry) for entry in scored], "gap_closed": [], "gap_summary": [], "mcnemar": [], "notes": notes}
    if not mappings:
        notes.append("no roles were given: no gap closed, and exact tests between all systems")
    for number, mapping in enumerate(mappings):
        results["gap_closed"] += _gaps(scored, mapping, number, notes)
    results["gap_summary"] = _summary(results["gap_closed"])
    results["mcnemar"] = _mcnemar(scored, mappings)
    return results


def execute_in_sandbox(display: Display) -> CodeRunner:
    """A runner for `rescore` that isolates every program (see `sandbox`) and shows its progress.

    It raises `UserError` if the benchmark's own code (prompt or tests) fails by itself: that is not a wrong answer.
    """

    def run(programs: Sequence[Program]) -> list[bool]:
        with display.bar("running code answers", len(programs)) as progress:
            verdicts = run_programs(programs, progress=progress)
        for program, verdict in zip(programs, verdicts, strict=True):
            if verdict.reason == SETUP_FAILED:
                raise UserError(
                    f"code: the benchmark's prompt or tests of '{program.entry_point}' fail before any answer is tried; correct the file of tests"
                )
        return [verdict.passed for verdict in verdicts]

    return run


def read_roles(text: str) -> dict[str, str]:
    """`base=NAME proxy=NAME direct=NAME` as a mapping. Raises `UserError` for a part without a name."""
    parts = [part.partition("=") for part in text.split()]
    for role, sign, names in parts:
        if not (role and sign and names):
            raise UserError(f"--roles: '{text}' must be parts of the form role=NAME with spaces between; the roles are {', '.join(ROLES)}")
    return {role: names for role, _, names in parts}


def _check_roles(mappings: Sequence[Mapping[str, str]], systems: set[str]) -> None:
    for mapping in mappings:
        for role, pattern in mapping.items():
            if role not in ROLES:
                raise UserError(f"role: '{role}' is none of {', '.join(ROLES)}; write base=PATTERN, for example")
            if not any(_matches(system, pattern) for system in systems):
                raise UserError(f"role {role}: no system matches '{pattern}'; there are {', '.join(sorted(systems))}")
        missing = [role for role in ("base", "direct") if role not in mapping]
        if missing or not {"proxy", "expert"} & mapping.keys():
            raise UserError(
                f"role: {missing[0] if missing else 'proxy or expert'} is not given; the gap needs a base, a direct and a proxy or an expert"
            )


def _matches(system: str, patterns: str) -> bool:
    return any(fnmatchcase(system, pattern.strip()) for pattern in patterns.split(","))


def _scored(source: Source, code: CodeRunner | None, tests: Mapping[str, Test] | None) -> list[Scored]:
    ks = sorted({int(found[1]) for key in source.published if (found := PASS.fullmatch(key))})
    if not source.items:
        names = [name for name, metric in METRICS.items() if metric.kind == source.kind and metric.key in source.published]
        return [_beside(source, name, None, "published only, no items") for name in names or [f"pass@{k}" for k in ks if source.kind == "code"]]
    if source.kind != "code":
        return [_beside(source, scores.metric, scores, scores.note) for scores in SCORERS[source.kind](source.items)]
    ks = sorted({1, *ks})
    if code is None or tests is None:
        return [_beside(source, f"pass@{k}", None, "not executed" if code is None else "not executed: no tests were given") for k in ks]
    programs = programs_of(source, tests)
    different = list(dict.fromkeys(programs))
    verdicts = code(different)
    if len(verdicts) != len(different):
        raise UserError(f"code: the runner gave {len(verdicts)} verdicts on {len(different)} programs; it must give one for each, in their order")
    passed = dict(zip(different, verdicts, strict=True))
    return [_beside(source, scores.metric, scores, scores.note) for scores in score_code(source.items, [passed[program] for program in programs], ks)]


def _metric(name: str) -> Metric:
    """A known metric, or a metric with a key of its own: `pass@10`, `toxic/group`."""
    return METRICS.get(name) or Metric("", name.rpartition("/")[2], readings=READINGS if name == "pass@10" else ())


def _beside(source: Source, name: str, scores: Scores | None, note: str) -> Scored:
    metric = _metric(name)
    published = source.published.get(metric.key)
    return Scored(source, name, scores, None if published is None else published * metric.scale, note)


def _row(entry: Scored) -> dict[str, Any]:
    row: dict[str, Any] = {"benchmark": entry.source.benchmark, "system": entry.source.system, "metric": entry.metric, "ours": None}
    row |= {"published": entry.published, "difference": None, "n": 0, "unparsed": 0, "low": None, "high": None, "note": entry.note}
    if entry.scores is None:
        return row
    row |= {"n": int(entry.scores.counted.sum()), "unparsed": entry.scores.unparsed}
    if not row["n"]:
        return row | {"note": "no item could be scored"}
    estimate = _estimate([entry.scores])
    share = interval(estimate.value[0], estimate.draws[0], (0.0, 1.0))
    row |= {"ours": share.value, "low": share.low, "high": share.high}
    if entry.published is not None:
        row["difference"] = share.value - entry.published
        if abs(row["difference"]) > SAME and not entry.note:
            row["note"] = "no reading of these items gives the published number"
    return row


def _estimate(scores: Sequence[Scores]) -> Estimate:
    """Means over the counted items of metrics that have the same items, resampled together as in compare.

    Every mean is over its own counted items. The items that all metrics count (at least one) are resampled.
    """
    both = np.all([entry.counted > 0 for entry in scores], axis=0)
    common = bootstrap_means([np.stack([entry.right[both] for entry in scores])], shares=True)
    value = np.array([entry.right.mean() / entry.counted.mean() for entry in scores])
    return Estimate(value, common.draws + (value - common.value)[:, None])


def _paired(scores: Sequence[Scores]) -> list[Scores]:
    """The same metrics on the items that all of them have, in the same order."""
    places = [{key: place for place, key in enumerate(entry.keys)} for entry in scores]
    common = [key for key in scores[0].keys if all(key in of_one for of_one in places)]
    order = [np.array([of_one[key] for key in common], int) for of_one in places]
    return [entry._replace(keys=common, right=entry.right[these], counted=entry.counted[these]) for entry, these in zip(scores, order, strict=True)]


def _of_metrics(scored: Sequence[Scored]) -> dict[tuple[str, str], list[Scored]]:
    """The systems of every benchmark and metric; parts of a metric are too small to compare."""
    found: dict[tuple[str, str], list[Scored]] = {}
    for entry in scored:
        if "/" not in entry.metric:
            found.setdefault((entry.source.benchmark, entry.metric), []).append(entry)
    return found


def _gaps(scored: Sequence[Scored], mapping: Mapping[str, str], number: int, notes: list[str]) -> list[dict[str, Any]]:
    rows = []
    silent: dict[str, None] = {}
    for (benchmark, metric), entries in _of_metrics(scored).items():
        of_role = {role: [entry for entry in entries if _matches(entry.source.system, pattern)] for role, pattern in mapping.items()}
        arms = [(role, entry) for role in ("proxy", "expert") for entry in of_role.get(role, [])]
        for base, (role, arm), direct in product(of_role["base"], arms, of_role["direct"]):
            if len({base.source.system, arm.source.system, direct.source.system}) == 3:
                names = {"base": base.source.system, "arm": arm.source.system, "direct": direct.source.system}
                rows.append({"roles": number, "benchmark": benchmark, "metric": metric, "role": role} | names | _gap(base, arm, direct))
        if not (of_role["base"] and arms and of_role["direct"]):
            silent[benchmark] = None
    notes += [f"{benchmark}: not every one of {_roles_named(mapping)} is there; no gap closed" for benchmark in silent]
    return rows


def _roles_named(mapping: Mapping[str, str]) -> str:
    return ", ".join(f"{role}={pattern}" for role, pattern in mapping.items())


def _gap(base: Scored, arm: Scored, direct: Scored) -> dict[str, Any]:
    row: dict[str, Any] = {"value": None, "low": None, "high": None, "capped": None, "published": None, "n": 0, "within_noise": False, "note": ""}
    if base.published is not None and arm.published is not None and direct.published is not None and direct.published != base.published:
        published = (arm.published - base.published) / (direct.published - base.published)
        row["published"] = published if isfinite(published) else None
    scores = [entry.scores for entry in (base, arm, direct) if entry.scores is not None]
    if len(scores) < 3:
        return row | {"note": "not every arm has items"}
    paired = _paired(scores)
    row["n"] = len(paired[0].keys)
    if not np.all([entry.counted > 0 for entry in paired], axis=0).any():
        return row | {"note": "no item in common could be scored"}
    if row["n"] < max(len(entry.keys) for entry in scores):
        row["note"] = f"on the {row['n']} items in common"
    gap = gap_closed(_estimate(paired), 1, 0, 2)
    if gap is None:
        return row | {"within_noise": True, "note": "n/a: direct - base is within noise"}
    return row | {"value": gap.value, "low": gap.low, "high": gap.high, "capped": min(gap.value, 1.0)}


def _summary(gaps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The smallest gap closed and the mean over benchmarks' headline metrics. Published numbers are used if an arm has no items."""
    rows = []
    for number, role, reading in dict.fromkeys((gap["roles"], gap["role"], reading) for reading in READINGS for gap in gaps):
        chosen = [gap for gap in gaps if (gap["roles"], gap["role"]) == (number, role) and reading in _metric(gap["metric"]).readings]
        values = {place: gap["published"] if gap["value"] is None else gap["value"] for place, gap in enumerate(chosen) if not gap["within_noise"]}
        known = {place: value for place, value in values.items() if value is not None}
        if not known:
            continue
        least = min(known, key=lambda place: known[place])
        row = {"roles": number, "role": role, "reading": reading, "gaps": len(known), "minimum": known[least]}
        row |= {"at": f"{chosen[least]['benchmark']}, {chosen[least]['metric']}", "mean": float(np.mean(list(known.values())))}
        row |= {"mean_capped": float(np.mean([min(value, 1.0) for value in known.values()]))}
        rows.append(
            row | {"unchecked": sum(chosen[place]["value"] is None for place in known), "within_noise": sum(gap["within_noise"] for gap in chosen)}
        )
    return rows


def _mcnemar(scored: Sequence[Scored], mappings: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Exact McNemar tests on the items that both systems have; `holm` is p adjusted for all pairs of that benchmark and metric."""
    rows = []
    for (benchmark, metric), entries in _of_metrics(scored).items():
        if _metric(metric).readings == ("authors",):
            continue
        pairs: dict[tuple[str, str], tuple[Scored, Scored]] = {}
        for mapping in mappings or ({"any": "*"},):
            playing = [entry for entry in entries if any(_matches(entry.source.system, pattern) for pattern in mapping.values())]
            pairs |= {(one.source.system, other.source.system): (one, other) for one, other in combinations(playing, 2)}
        tested: list[dict[str, Any]] = []
        for names, (one, other) in pairs.items():
            if one.scores is None or other.scores is None:
                continue
            first, second = _paired([one.scores, other.scores])
            both = (first.counted > 0) & (second.counted > 0)
            right = np.stack([first.right[both], second.right[both]])
            if both.any() and np.isin(right, (0, 1)).all():  # shares of an item (a draw, pass@k) are neither right nor wrong
                row: dict[str, Any] = {"benchmark": benchmark, "metric": metric, "system": names[0], "other": names[1], "n": int(both.sum())}
                alone = {"only_system": int((right[0] > right[1]).sum()), "only_other": int((right[0] < right[1]).sum())}
                tested.append(row | alone | {"p": float(mcnemar(right[0] > 0, right[1] > 0))})
        for row, adjusted in zip(tested, holm(np.array([row["p"] for row in tested])) if tested else (), strict=True):
            rows.append(row | {"holm": float(adjusted)})
    return rows
