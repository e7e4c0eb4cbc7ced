"""Where results come from: hashes of the study and of what was asked, versions of the packages, and first prompts."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from evals.records import Record
from evals.study import Study
from proxytune.content import content_key

PACKAGES = ("proxytune", "torch", "transformers", "peft", "trl", "numpy", "scipy")


def study_hash(study: Study) -> str:
    return content_key(study=study.model_dump(mode="json"))


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES} | {"python": platform.python_version()}


def provenance_of(study: Study, records: Sequence[Record], prompts: Mapping[str, str]) -> dict[str, Any]:
    """`prompts`: the first prompt of each frame, as text and ids. Hashes by frame: of all that decides how arms are asked, in the first run."""
    asked: dict[str, str] = {}
    for record in records:
        asked.setdefault(record.frame, record.protocol)
    return {"study_hash": study_hash(study), "versions": versions(), "asked": asked, "first_prompts": dict(prompts)}
