"""The reading of hidden states: density at every site, place and layer, geometry, drift of the weights, and null models, from shared passes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from evals.measures.inputs import Inputs, as_content, common_columns
from evals.measures.long import Names, long_frame
from evals.measures.measure import Frames, Progress, Reading
from evals.measures.subjects import Pair
from probes.drift import weight_drift
from probes.inside import Inside, read_inside
from probes.internals.blocks import blocks_of, put, random_delta, weights_of
from probes.internals.moments import Moments
from probes.nulls import gaussian_null, untrained_twin
from proxytune.member import Member

RANDOM_DELTAS = 3
PLACES = ("last", "subject")


@dataclass(frozen=True)
class States(Reading):
    """The states of the base, or of a tuned model beside the base.

    Frames: `prompts` has one row per item. `states` is long (`long_frame`): metric, site, place, state. It includes the log-probability of the right
    answer's first token (site `output`) and, for a tuned model, the cosine with the base's residual stream. `geometry` has one row per group of items
    and state. The base also has `untrained`: like `states`, for an untrained model. A tuned model also has `random`: like `states`, with a column
    `draw`, under random deltas of the same norm; and `weights`: one row per matrix. Memory: both models, a copy of both models' weights, and the
    moments of `probes/internals/moments.py`.
    """

    name: str = "states"
    version: ClassVar[int] = 1
    subject: ClassVar[type[Pair]] = Pair

    def frames(self, subject: Pair, inputs: Inputs) -> tuple[str, ...]:
        both = ("prompts", "states", "geometry")
        return (*both, "untrained") if subject.tuned is None else (*both, "random", "weights")

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"items": as_content(inputs.data.knowledge), "frequency": inputs.data.frequency, "random_deltas": RANDOM_DELTAS}

    def steps(self, subject: Pair, inputs: Inputs) -> int:
        return len(inputs.data.knowledge) * (2 if subject.tuned is None else 1 + RANDOM_DELTAS)

    def read(self, subject: Pair, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        options: dict[str, Any] = {"batch_size": inputs.study.batch_size, "progress": progress}
        base, tuned = subject.base, subject.tuned
        if tuned is None:
            inside = read_inside([base], inputs.inside, **options)
            untrained = read_inside([Member(untrained_twin(base.model), base.tokenizer)], inputs.inside, **options)
            found = {"states": _long(inside), "untrained": _long(untrained), "geometry": _geometry(inside, nulls=True)}
        else:
            inside = read_inside([base, tuned], inputs.inside, **options)
            before, after = weights_of(base.model), weights_of(tuned.model)
            drawn = []
            try:
                for draw in range(RANDOM_DELTAS):
                    put(tuned.model, random_delta(before, after, draw))
                    drawn.append(_long(read_inside([tuned], inputs.inside, **options)).assign(draw=draw))
            finally:
                put(tuned.model, after)
            found = {
                "states": _long(inside, cosine=True),
                "random": pd.concat(drawn, ignore_index=True),
                "geometry": _geometry(inside, nulls=False),
                "weights": pd.DataFrame(weight_drift(before, after, blocks_of(tuned.model))),
            }
        return {subject.label: found | {"prompts": _prompts(inputs)}}


def layers_of(frame: pd.DataFrame) -> int:
    """The number of layers in a long frame. States are counted from 0, which is the embeddings."""
    return int(frame.loc[frame["site"] == "residual", "state"].max())


def _prompts(inputs: Inputs) -> pd.DataFrame:
    ids, items = inputs.inside.ids, inputs.data.knowledge
    frame = common_columns(items).assign(length=[len(each) for each in ids], last_token=[each[-1] for each in ids])
    return frame if inputs.data.frequency is None else frame.assign(frequency=list(inputs.data.frequency))


def _long(inside: Inside, cosine: bool = False) -> pd.DataFrame:
    return long_frame(_columns(inside, cosine))


def _columns(inside: Inside, cosine: bool) -> Iterator[tuple[Names, np.ndarray]]:
    """The outputs of attention and MLP in layer k have state k, like the residual stream after layer k."""
    arrays = {(*name.split("/"),): values for name, values in inside.density.items()} | ({("cosine", "residual"): inside.cosine} if cosine else {})
    for (metric, site), values in arrays.items():
        first = 1 if site in ("attention", "mlp") else 0
        for place, state in np.ndindex(values.shape[1:]):
            yield {"metric": metric, "site": site, "place": PLACES[place], "state": state + first}, values[:, place, state]
    last = next(iter(arrays.values())).shape[2] - 1
    yield {"metric": "log_probability", "site": "output", "place": "last", "state": last}, inside.log_probability


def _geometry(inside: Inside, nulls: bool) -> pd.DataFrame:
    """One row for every state of the familiar items, the unfamiliar items and `both`: `rankme` of the last model, `cka` with the first.

    With `nulls` also the density of Gaussian vectors with the moments of all items' states. Base and tuned models have the same items in these
    groups, since RankMe grows with their number.
    """
    groups = {name: inside.moments[name] for name in ("familiar", "unfamiliar")}
    groups["both"] = groups["familiar"].plus(groups["unfamiliar"])
    frame = pd.DataFrame([row for name, moments in groups.items() for row in _matrices(name, moments)])
    if nulls:
        together = groups["both"].plus(inside.moments["other"])
        for metric, entry in gaussian_null(together.mean(), together.covariance()).items():
            for name, values in entry.items():
                frame[f"gaussian_{name}_{metric}"] = frame["state"].map(dict(enumerate(values)))
    return frame


def _matrices(group: str, moments: Moments) -> list[dict[str, Any]]:
    if moments.count < 4:
        return []
    numbers = zip(moments.rankme("y").tolist(), moments.cka().tolist(), strict=True)
    return [{"group": group, "state": state, "prompts": moments.count, "rankme": rank, "cka": cka} for state, (rank, cka) in enumerate(numbers)]
