"""Names for results: a hash of everything that decides them."""

import hashlib
import json
from typing import Any


def content_key(**causes: Any) -> str:
    """A hash of everything that decides a result; of weights by their fingerprint, never of a path or a name."""
    return hashlib.sha256(json.dumps(causes, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]
