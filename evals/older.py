"""Study files of older versions: keys under their old names are still read, and a warning names the new key."""

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("proxytune")


def modernized(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a study file with every old key under its new name; anything unexpected is left for the validation to refuse."""
    study = dict(content)
    if "world" in study and "worlds" not in study:
        study["worlds"] = [study.pop("world")]
        _say("world: NAME", "worlds: [NAME]")
    for old, path in (("relearning", ("recoverability",)), ("lens_tokens", ("lens", "tokens"))):
        if old in study and isinstance(study.get("settings", {}), Mapping):
            value = study.pop(old)
            of_measure = {path[1]: value} if len(path) > 1 else value
            study["settings"] = {path[0]: of_measure, **study.get("settings", {})}
            _say(old, f"settings.{'.'.join(path)}")
    if isinstance(study.get("arms"), Mapping):
        study["arms"] = {name: _arm(arm) if isinstance(arm, Mapping) else arm for name, arm in study["arms"].items()}
    return study


def _arm(arm: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(arm)
    if "dial" in found and "sweep" not in found:
        found["sweep"] = found.pop("dial")
        _say("dial", "sweep")
    if "choose" in found and "select" not in found:
        chosen = found.pop("choose")
        found["select"] = chosen if chosen == "best" else {"match": chosen}
        _say("choose: ARM", "select: {match: ARM}")
    if isinstance(found.get("tuning"), Mapping) and "packing" in found["tuning"]:
        found["tuning"] = {"padding_free" if key == "packing" else key: value for key, value in found["tuning"].items()}
        _say("packing", "padding_free")
    return found


def _say(old: str, new: str) -> None:
    logger.warning("study: '%s' is now written '%s'; the old key will be refused later", old, new)
