"""Records of names' densities with planted effects, and studies that have such records."""

from typing import Any

import numpy as np
import pandas as pd

from evals.measures.long import long_frame
from evals.measures.separation import SPREADS
from evals.records import Record
from evals.study import Study

GROUPS = ("big", "small", "fabricated")
LAYERS = 6
SITES = ("residual", "attention", "mlp", "neurons", "rotated")
ARMS: dict[str, Any] = {"base": {"kind": "base"}, "full": {"kind": "direct", "path": "full"}}


def study_of(**changes: Any) -> Study:
    content = {"study": "names", "models": {"base": "base"}, "data": {}, "seeds": [0], "arms": ARMS, "measures": ["density"]}
    return Study.model_validate(content | changes)


def records_of(
    shifts: dict[str, dict[str, float]],
    seeds: int = 1,
    confounded: bool = False,
    groups: dict[str, float] | None = None,
    world: str | None = None,
    first: int = 0,
) -> list[Record]:
    """40 names a group. `shifts`: by arm and site, what is added in layers 3 and 4 to big names, and half of that to small ones (or so much of it as
    `groups` says); with `confounded` it follows the name's surprisal, which differs between groups, instead of the group."""
    groups = groups or dict(zip(GROUPS, (1.0, 0.5, 0.0), strict=True))
    size = 40 * len(groups)
    records = []
    for seed in range(first, seeds):
        generator = np.random.default_rng(seed)
        familiar = np.repeat(list(groups.values()), 40)
        surprisal = generator.normal(size=size) + 1.5 * familiar
        names = pd.DataFrame(
            {"unit": [f"n{place}" for place in range(size)], "group": np.repeat(list(groups), 40), "popularity": familiar}
            | {"length": np.arange(size) % 2 + 2}
            | {"log_probability": surprisal if confounded else generator.normal(size=size), "frequency": generator.normal(size=size)}
        )
        noise = {site: generator.normal(size=(size, LAYERS)) for site in SITES}
        of_frames = [*((arm, "spread", by_site) for arm, by_site in shifts.items()), ("base", "spread_untrained", {})]
        for arm, frame, by_site in of_frames:
            columns = []
            for site in SITES:
                for state in range(1, LAYERS + 1):
                    added = by_site.get(site, 0.0) * (surprisal if confounded else familiar) * (state in (3, 4))
                    for metric, cut in SPREADS:
                        for place in ("entity", "last"):
                            value = noise[site][:, state - 1] + (added if place == "entity" else 0)
                            columns.append(({"metric": metric, "cut": cut, "site": site, "place": place, "state": state}, value))
            records.append(Record(arm, frame, world, seed, "", long_frame(columns)))
            if frame == "spread":
                records.append(Record(arm, "names", world, seed, "", names))
    return records
