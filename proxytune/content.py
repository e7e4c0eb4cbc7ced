"""Results as text: their names, which are hashes of everything that decides them, and JSON."""

import hashlib
import json
import math
from typing import Any


def content_key(**causes: Any) -> str:
    """A hash of everything that decides a result; of weights by their fingerprint, never of a path or a name."""
    return hashlib.sha256(json.dumps(causes, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def as_json(value: Any) -> str:
    """JSON as every reader takes it: null for what is not a finite number."""
    return json.dumps(_nulled(value), indent=1, allow_nan=False)


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
