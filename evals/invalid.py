"""A mistake that pydantic found in a study file, in one line for the person who wrote it."""

import difflib
from collections.abc import Sequence

from pydantic import ValidationError

from proxytune.errors import brief, shortened


def explain(error: ValidationError, known: Sequence[str]) -> str:
    """The first mistake on one line: the field, the rule and the value seen, each shortened if it is long. `known` are the valid keys."""
    first = next((entry for entry in error.errors() if entry["type"] == "extra_forbidden"), error.errors()[0])
    location = [shortened(str(part), 80) for part in first["loc"]]
    # pydantic adds the tag of a discriminated union (the arm's kind) to the location; the file has no such level.
    if len(location) > 2 and location[0] == "arms" and location[2] in ("base", "expert", "proxy", "direct", "logit_bias"):
        del location[2]
    field = ".".join(location) or "study"
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such key; {did_you_mean(location[-1], list(known))}"
    message, seen = shortened(first["msg"].removeprefix("Value error, "), 800), brief(first["input"])
    if first["type"] == "literal_error":
        options = [option.strip("'") for option in str(first["ctx"]["expected"]).replace(" or ", ", ").split(", ")]
        return f"{field}: {message}, not {seen}; {did_you_mean(seen.strip(repr(chr(39))), options)}"
    value = "" if first["type"] in ("missing", "value_error") or isinstance(first["input"], dict) else f", not {seen}"
    return f"{field}: {message}{value}"


def did_you_mean(word: str, known: list[str]) -> str:
    """`did you mean 'seeds'?`, or all that is known where no word is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
