"""Keys of results, which are hashes of everything that decides them, and JSON."""

import hashlib
import json
import math
from typing import Any


def content_key(**causes: Any) -> str:
    """A hash of everything that decides a result: weights by their fingerprint, never a path or a name."""
    return hashlib.sha256(json.dumps(causes, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def as_json(value: Any) -> str:
    """Standard JSON: numbers that are not finite become null."""
    return json.dumps(_with_nulls(value), indent=1, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
