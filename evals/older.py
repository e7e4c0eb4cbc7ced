"""Study files of older versions: keys under their old names are still read, and a warning names the new key."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("proxytune")
Hints = dict[str, str]  # the new spelling by the old one


def modernized(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a study file with every old key under its new name. An old key beside its new one is left for the validation to refuse."""
    study, hints = dict(content), Hints()
    if "world" in study and "worlds" not in study:
        study["worlds"] = [study.pop("world")]
        hints["world: NAME"] = "worlds: [NAME]"
    for old, path in (("relearning", ("recoverability",)), ("lens_tokens", ("lens", "tokens"))):
        settings = study.get("settings", {})
        if old in study and isinstance(settings, Mapping) and path[0] not in settings:
            value = study.pop(old)
            study["settings"] = {**settings, path[0]: {path[1]: value} if len(path) > 1 else value}
            hints[old] = f"settings.{'.'.join(path)}"
    if isinstance(study.get("arms"), Mapping):
        study["arms"] = {name: _arm(arm, hints) if isinstance(arm, Mapping) else arm for name, arm in study["arms"].items()}
    for old, new in hints.items():
        logger.warning("study: '%s' is now written '%s'; the old key will be refused later", old, new)
    return study


def _arm(arm: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    found = dict(arm)
    if "dial" in found and "sweep" not in found:
        found["sweep"] = found.pop("dial")
        hints["dial"] = "sweep"
    if "choose" in found and "select" not in found:
        chosen = found.pop("choose")
        found["select"] = chosen if chosen == "best" else {"match": chosen}
        hints["choose: best" if chosen == "best" else "choose: ARM"] = "select: best" if chosen == "best" else "select: {match: ARM}"
    tuning = found.get("tuning")
    if isinstance(tuning, Mapping) and "packing" in tuning and "padding_free" not in tuning:
        found["tuning"] = {"padding_free" if key == "packing" else key: value for key, value in tuning.items()}
        hints["packing"] = "padding_free"
    return found
