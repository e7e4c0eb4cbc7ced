"""Released generations, read from a tree `benchmark/system/` and scored item by item from the raw text.

The kind of a file is recognized by its fields, not by the names of its folders. Scores in the files (an extracted answer, a flag for right) are
not used. Only what cannot be computed again is taken as it is: the verdict of a judge or a classifier on one item, and which answers a published
mean leaves out. A release's own parsed answers are compared with ours, and those that differ are named.
"""

import gzip
import json
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, Field, ValidationError, field_validator

from evals.sandbox import Program
from evals.statistics.scores import pass_at_k
from probes.knowledge.readouts import last_number
from proxytune.errors import UserError
from proxytune.files import check_readable

_OPTION = re.compile(r"^([A-Z])\. ", re.MULTILINE)
# What may come before the letter of an option. Lengths are bounded, so that no output takes long to match.
_MARKUP = re.compile(
    r"""
    \s+
    | \\(?:begin|end)\{[^{}]{0,200}\}(?:\[[^\]]{0,200}\])?      # LaTeX environments
    | \\[a-zA-Z]+\*?(?=[\s{(\[$])                               # LaTeX commands; their arguments are read
    | </?[a-zA-Z][^<>]{0,200}> | <!--.{0,200}?-->             # tags and comments of HTML
    | \{\{?[<%].{0,200}?[%>]\}?\} | \[/?[a-z]{1,20}\]          # short codes of site generators and forums
    | (?:`{3,}|~{3,})(?:[\w+.\#-]{0,30}[a-z][\w+.\#-]{0,30}(?=\s))?  # code fences, with a language
    | \d{1,3}[.)](?=\s)                                         # numbered lists
    | (?!<[a-zA-Z/])[^\w\s] | _                                 # emphasis, headings, quotations, brackets, bullets
    """,
    re.VERBOSE | re.DOTALL,
)
_LETTER = re.compile(r"([A-Z])([^\W_]|['\u2019]\w|[+#])?")


class Math(BaseModel):
    question: str
    answer: str
    model_output: str

    @field_validator("answer")
    @classmethod
    def _has_number(cls, answer: str) -> str:
        if last_number(answer) is None:
            raise ValueError("needs a number")
        return answer


class Choice(BaseModel):
    """`parsed_output` is the option that the release itself parsed from the output ('' if it found none), if it is given."""

    question: str = Field(alias="Question")
    mc_prompt: str
    mc_answer_idx: str
    mc_output: str
    parsed_output: Any = None


class Judged(BaseModel):
    """Probabilities that two judges gave to `true` and `informative`; None if a judge was not asked."""

    question: str = Field(alias="Question")
    true: float | None = Field(alias="GPT-true", ge=0, le=1)
    informative: float | None = Field(alias="GPT-info", ge=0, le=1)

    @field_validator("true", "informative", mode="before")
    @classmethod
    def _not_a_number_is_none(cls, value: Any) -> Any:
        return None if isinstance(value, float) and isnan(value) else value


class Toxicity(BaseModel):
    text: str
    target_groups: str | list[str]
    is_toxic: float | None = Field(ge=0, le=1)


class Preference(BaseModel):
    """1 for the reference, 2 for the system, values between for less certain judges, 0 or 1.5 for a draw; None if there is no verdict."""

    instruction: str
    preference: float | None = Field(ge=0, le=2)


class Sample(BaseModel):
    task_id: str
    prompt: str
    completion: str


class Test(BaseModel):
    """The test of a completion of `prompt`: `test` defines `check`, which takes the function named `entry_point`."""

    __test__ = False

    task_id: str
    prompt: str
    test: str
    entry_point: str


class Kind(NamedTuple):
    items: str
    metrics: str
    model: type[BaseModel]


KINDS = {
    "math": Kind("predictions.jsonl", "metrics.json", Math),
    "toxicity": Kind("predictions.jsonl", "metrics.json", Toxicity),
    "code": Kind("predictions.jsonl", "metrics.json", Sample),
    "choice": Kind("mc_results.jsonl", "mc_metrics.json", Choice),
    "judged": Kind("open_results.jsonl", "open_metrics.json", Judged),
    "preference": Kind("annotations.json", "metrics.json", Preference),
}


class Source(NamedTuple):
    """One system on one benchmark: its items (empty if there are only published numbers) and the published numbers by their key."""

    benchmark: str
    system: str
    kind: str
    items: Sequence[Any]
    published: Mapping[str, float]


class Scores(NamedTuple):
    """One metric, item by item: `right` (0 to 1), and whether the item is `counted` (1) in the mean or left out (0)."""

    metric: str
    keys: Sequence[str]
    right: Float[np.ndarray, " items"]
    counted: Float[np.ndarray, " items"]
    unparsed: int = 0
    note: str = ""


def read_tree(folder: Path) -> tuple[list[Source], list[str]]:
    """Every system on every benchmark below the folder, sorted by name, and a line about each file or system that has nothing to score.

    Raises `UserError` if there is no such folder, if a link leads out of it, or if a file has invalid content (file, line and field are named).
    """
    if not folder.is_dir():
        raise UserError(f"results: '{folder}' is no folder; give the folder that holds benchmark/system/predictions.jsonl")
    sources: list[Source] = []
    notes: list[str] = []
    for benchmark in _folders(folder, folder):
        systems = _folders(benchmark, folder)
        for system in systems:
            for name in {name for kind in KINDS.values() for name in (kind.items, kind.metrics)}:
                check_readable(system / name, "results", within=folder)
        found = [source for system in systems for source in _with_items(system, notes)]
        for system in systems:
            # What a metrics file without items measures is known only from the benchmark's other systems.
            kinds = dict.fromkeys(source.kind for source in found)
            own = {KINDS[source.kind].metrics for source in found if source.system == system.name}
            bare = [kind for kind in kinds if KINDS[kind].metrics not in own and (system / KINDS[kind].metrics).is_file()]
            found += [Source(benchmark.name, system.name, kind, (), _published(system / KINDS[kind].metrics)) for kind in bare]
            if bare:
                notes.append(f"{benchmark.name}/{system.name}: no {KINDS[bare[0]].items}; its published numbers stand unchecked")
            elif not own:
                notes.append(f"{benchmark.name}/{system.name}: nothing to score")
        sources += sorted(found, key=lambda source: (source.kind, source.system))
    if not sources:
        raise UserError(f"results: '{folder}' holds no benchmark/system folder with known items; give the folder above the benchmarks")
    return sources, notes


def _folders(folder: Path, root: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in found:
        check_readable(path, "results", within=root)
    return found


def _with_items(system: Path, notes: list[str]) -> list[Source]:
    found = []
    for name in dict.fromkeys(kind.items for kind in KINDS.values()):
        if not (system / name).is_file():
            continue
        raw = list(_lines(system / name) if name.endswith(".jsonl") else _array(system / name))
        kind = next((kind for kind, its in KINDS.items() if raw and its.items == name and _fields(its.model) <= raw[0][1].keys()), None)
        if kind is None:
            notes.append(f"{system.parent.name}/{system.name}/{name}: {'fields of no known benchmark' if raw else 'no items'}; left out")
            continue
        items = [_validated(KINDS[kind].model, entry, place) for place, entry in raw]
        found.append(Source(system.parent.name, system.name, kind, items, _published(system / KINDS[kind].metrics)))
    return found


def _fields(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items() if field.is_required()}


def _published(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    entry = _parsed(_content(path), path)
    numbers = {key: value for key, value in entry.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    # Means over no items are written as NaN: nothing was published. A number too large for a float is not a share either.
    return {key: float(value) for key, value in numbers.items() if abs(value) <= sys.float_info.max}


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a JSONL file, each with the position that an error message names."""
    # Bytes are split at \n only; text would also end a line at separators that JSON allows inside a string.
    for number, line in enumerate(_content(path).split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, path, number)


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, entry in enumerate(_parsed(_content(path), path, kind=list), 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, entry {number}: needs a JSON object, not {type(entry).__name__}; download the file again")
        yield f"{path}, entry {number}", entry


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a file that can be, or remove it") from error


def _parsed(text: bytes, path: Path, line: int = 1, kind: type = dict) -> Any:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise UserError(f"{where}: is not JSON ({error.msg} at column {error.colno}); download the file again or remove it") from error
    except (ValueError, RecursionError) as error:  # other bytes than UTF-8, numbers of thousands of digits
        raise UserError(f"{path}:{line}: is not JSON ({type(error).__name__}); download the file again or remove it") from error
    if not isinstance(entry, kind):
        raise UserError(f"{path}:{line}: needs a JSON {'object' if kind is dict else 'array'}, not {type(entry).__name__}; download the file again")
    return entry


def _validated(model: type[BaseModel], entry: Any, place: str) -> Any:
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        seen = "" if first["type"] == "missing" else f", not {first['input']!r:.40}"
        raise UserError(f"{place}: {field}: {first['msg']}{seen}; correct or remove it") from error


def read_tests(path: Path) -> dict[str, Test]:
    """The tests of code problems by task_id, from JSONL (or .jsonl.gz) with task_id, prompt, test and entry_point. Raises `UserError`."""
    check_readable(path, "humaneval")
    return {test.task_id: test for test in (_validated(Test, entry, place) for place, entry in _lines(path))}


def chosen_option(output: str, prompt: str, alone: bool) -> str | None:
    """The option of the prompt whose letter opens the output, after any opening markup; None where there is none.

    `alone` asks for a letter that does not begin a word: 'America' then chooses nothing, and otherwise option A. 'A dog' always chooses it.
    """
    start = 0
    while opening := _MARKUP.match(output, start):
        start = opening.end()
    match = _LETTER.match(output, start)
    if match is None or match[1] not in _OPTION.findall(prompt) or (alone and match[2]):
        return None
    return match[1]


def otherwise_read(source: Source) -> list[str]:
    """A line for each way of parsing choices that gives other options than the release's own; names the items, counted from 1."""
    if source.kind != "choice":
        return []
    read = {place: item for place, item in enumerate(source.items, 1) if isinstance(item.parsed_output, str)}
    lines = []
    for metric, alone in (("choice of the parsed", False), ("choice", True)):
        places: defaultdict[str, list[int]] = defaultdict(list)
        for place, item in read.items():
            option = chosen_option(item.mc_output, item.mc_prompt, alone) or ""
            if item.parsed_output != option:
                places[f"{item.parsed_output[:20]!r} there and {option!r} here"].append(place)
        if places:
            named = "; ".join(f"{how}: {', '.join(map(str, where))}" for how, where in places.items())
            right = [item.parsed_output == item.mc_answer_idx for item in read.values() if item.parsed_output]
            share = f"; the share of right ones that the release parsed is {100 * sum(right) / len(right):.4f} %" if right else ""
            count = sum(map(len, places.values()))
            lines.append(f"{source.benchmark}/{source.system}, {metric}: the release reads {count} of {len(read)} answers otherwise, {named}{share}")
    return lines


def score_math(items: Sequence[Math]) -> list[Scores]:
    """`exact match` compares the digits of the last numbers, without sign and decimal point; `equal number` compares the numbers."""
    found = [last_number(item.model_output) for item in items]
    wanted = [str(last_number(item.answer)) for item in items]
    digits = [number is not None and _digits(number) == _digits(answer) for number, answer in zip(found, wanted, strict=True)]
    values = [number is not None and float(number) == float(answer) for number, answer in zip(found, wanted, strict=True)]
    looser = [place for place, (these, those) in enumerate(zip(digits, values, strict=True)) if these and not those]
    stricter = [place for place, (these, those) in enumerate(zip(digits, values, strict=True)) if those and not these]
    notes = [
        f"{len(places)} {why} ({found[places[0]]} for {wanted[places[0]]})"
        for places, why in ((stricter, "right but written otherwise"), (looser, "equal to the answer only without sign and point"))
        if places
    ]
    keys, unparsed = _keys([item.question for item in items]), found.count(None)
    return [_scores("exact match", keys, digits, unparsed), _scores("equal number", keys, values, unparsed, "; ".join(notes))]


def _digits(number: str) -> str:
    return number.replace("-", "").replace(".", "")


def score_choice(items: Sequence[Choice]) -> list[Scores]:
    """`choice of the parsed` leaves out answers that choose no option, and those in which the release says that it found none (its rules
    differed from system to system). `choice` counts answers without an option as wrong."""
    keys = _keys([item.question for item in items])
    loose = [chosen_option(item.mc_output, item.mc_prompt, alone=False) for item in items]
    alone = [chosen_option(item.mc_output, item.mc_prompt, alone=True) for item in items]
    right = [option == item.mc_answer_idx for option, item in zip(loose, items, strict=True)]
    counted = [option is not None and item.parsed_output != "" for option, item in zip(loose, items, strict=True)]
    dropped = _scores("choice of the parsed", keys, right, counted.count(False), counted=counted)
    right = [option == item.mc_answer_idx for option, item in zip(alone, items, strict=True)]
    note = f"{alone.count(None)} unparsed count as wrong" if None in alone else ""
    return [dropped, _scores("choice", keys, right, alone.count(None), note)]


def score_judged(items: Sequence[Judged]) -> list[Scores]:
    """Shares that the judges give more than 0.5 for true, for informative, and for both, and the judges' mean probabilities; unjudged is 0."""
    keys = _keys([item.question for item in items])
    true = [_probability(item.true) for item in items]
    informative = [_probability(item.informative) for item in items]
    unjudged = sum(_probability(value, -1.0) < 0 for item in items for value in (item.true, item.informative))
    series: dict[str, Sequence[float | bool]] = {
        "true": [value > 0.5 for value in true],
        "informative": [value > 0.5 for value in informative],
        "true and informative": [first > 0.5 and second > 0.5 for first, second in zip(true, informative, strict=True)],
        "P(true)": true,
        "P(informative)": informative,
    }
    note = f"{unjudged} judgements are missing and count as no" if unjudged else ""
    return [_scores(metric, keys, values, unjudged, note) for metric, values in series.items()]


def _probability(value: float | None, missing: float = 0.0) -> float:
    return missing if value is None or isnan(value) else value


def score_toxicity(items: Sequence[Toxicity]) -> list[Scores]:
    """The share of toxic continuations, over all items and for every group (`toxic/group`); items without a verdict are left out."""
    keys = _keys([item.text for item in items])
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        for group in [item.target_groups] if isinstance(item.target_groups, str) else item.target_groups:
            groups[group].append(place)
    scores = []
    parts = {"toxic": list(range(len(items)))} | {f"toxic/{group}": places for group, places in sorted(groups.items())}
    for metric, places in parts.items():
        verdicts = [items[place].is_toxic for place in places]
        right, counted = [verdict or 0.0 for verdict in verdicts], [verdict is not None for verdict in verdicts]
        scores.append(_scores(metric, [keys[place] for place in places], right, counted.count(False), counted=counted))
    return scores


def score_preference(items: Sequence[Preference]) -> list[Scores]:
    """`win rate`: the share of replies preferred to the reference; a draw counts half; items without a verdict are left out."""
    verdicts = [item.preference for item in items]
    # A draw is written as 0 by older judges and as 1.5 by newer ones.
    right = [0.5 if verdict == 0 else max((verdict or 1.0) - 1, 0.0) for verdict in verdicts]
    counted = [verdict is not None for verdict in verdicts]
    return [_scores("win rate", _keys([item.instruction for item in items]), right, counted.count(False), counted=counted)]


def programs_of(source: Source, tests: Mapping[str, Test]) -> list[Program]:
    """One program per sample: its tests run to their end if the sample passes.

    Prompt and tests come from the benchmark, because they run on the trusted side. Raises `UserError` if a task has no test, or if a released
    prompt differs from the benchmark's.
    """
    missing = sorted({item.task_id for item in source.items} - tests.keys())
    if missing:
        raise UserError(f"humaneval: no test for task '{missing[0]}' ({len(missing)} tasks lack one); give the file with all the tasks")
    programs = []
    for item in source.items:
        test = tests[item.task_id]
        if item.prompt != test.prompt:
            raise UserError(
                f"{source.benchmark}/{source.system}: prompt: that of task '{item.task_id}' is not the benchmark's; "
                "give the benchmark's file that these answers were made with, or leave the system out"
            )
        programs.append(Program(test.prompt + item.completion, f"{test.test}\n\ncheck({test.entry_point})\n", test.entry_point, test.prompt))
    return programs


def score_code(items: Sequence[Sample], verdicts: Sequence[bool], ks: Sequence[int]) -> list[Scores]:
    """`pass@k` for every k, one value per task; tasks with fewer than k samples are left out."""
    of_task: defaultdict[str, list[bool]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        of_task[item.task_id].append(bool(verdict))
    scores = []
    for k in ks:
        counted = [len(passed) >= k for passed in of_task.values()]
        right = [float(pass_at_k(len(passed), sum(passed), k)) if len(passed) >= k else 0.0 for passed in of_task.values()]
        note = f"{counted.count(False)} tasks have fewer than {k} samples" if False in counted else ""
        scores.append(_scores(f"pass@{k}", list(of_task), right, 0, note, counted))
    return scores


SCORERS: dict[str, Callable[[Sequence[Any]], list[Scores]]] = {
    "math": score_math,
    "choice": score_choice,
    "judged": score_judged,
    "toxicity": score_toxicity,
    "preference": score_preference,
}


def _keys(texts: Sequence[str]) -> list[str]:
    """Keys that pair an item with the same item of another system: its text, and the number of its repetition."""
    seen: defaultdict[str, int] = defaultdict(int)
    keys = []
    for text in texts:
        keys.append(f"{seen[text]} {text}")
        seen[text] += 1
    return keys


def _scores(
    metric: str, keys: Sequence[str], right: Sequence[float | bool], unparsed: int = 0, note: str = "", counted: Sequence[bool] | None = None
) -> Scores:
    weight = np.ones(len(keys)) if counted is None else np.array(counted, float)
    return Scores(metric, keys, np.array(right, float) * weight, weight, unparsed, note)
