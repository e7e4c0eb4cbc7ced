"""`proxytune report`: the page of a finished study again, or a study of models that are there already."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.entities import CITIES
from evals.given import absolute, direct_arms, study_of
from evals.study import STUDIES, Study
from proxytune.errors import UserError

KNOWLEDGE = STUDIES / "capitals" / "knowledge.jsonl"
STRENGTHS = (0.5, 1.0)


def report_study(
    base: str, tuned: Sequence[str], expert: str | None, antiexpert: str | None, test: str | None, knowledge: str | None, prompt: str, threads: int
) -> Study:
    """The study of a base and of models tuned from it, with a mixture if there is an expert: what each forgot and, with task items, gained.

    Without knowledge items these are the shipped ones about capitals and cities. Raises `UserError` for a model given twice, or an expert without its
    anti-expert.
    """
    if (expert is None) != (antiexpert is None):
        raise UserError("report: --expert and --antiexpert belong together; give both, or neither")
    arms: dict[str, dict[str, Any]] = {"base": {"kind": "base"}} | direct_arms("report", tuned)
    direct = list(arms)[1:]
    if expert is not None:
        arms |= {"expert": {"kind": "expert", "path": absolute(expert)}, "proxy": {"kind": "proxy", "alpha": list(STRENGTHS)}}
    content = {
        "study": f"report-{Path(base).name}",
        "models": {"base": absolute(base)} | ({} if antiexpert is None else {"small": absolute(antiexpert)}),
        "data": {
            "knowledge": str(KNOWLEDGE) if knowledge is None else absolute(knowledge),
            "test": None if test is None else absolute(test),
            "entities": CITIES if knowledge is None else None,
            "prompt": prompt,
        },
        "arms": arms,
        "direct": direct[:1],
        "contrasts": [[arm, "base"] for arm in [*direct, *(["proxy@1"] if expert is not None else [])]],
        "measures": [*(["task"] if test is not None else []), "knowledge", "forgetting", "text", *(["density"] if knowledge is None else [])],
        "settings": {"density": {"statements": False}} if knowledge is None else {},
        "threads": threads,
    }
    return study_of("report", content)


def missing(study: Study) -> list[str]:
    """What the study does not measure, in words."""
    data = study.data
    found = []
    if data is not None and data.test is None:
        found.append("what was gained (no task items: --data)")
    if data is not None and data.knowledge == str(KNOWLEDGE):
        found.append("what you care about in particular (no knowledge items of yours: --knowledge; these are capitals)")
    if study.models is None or study.models.small is None:
        found.append("steering (no expert: --expert and --antiexpert)")
    return found
