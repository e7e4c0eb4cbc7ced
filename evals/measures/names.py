"""The reading of names: density at an entity's name and at the end of the sentence that carries it, at every site and layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from evals.measures.inputs import Inputs
from evals.measures.long import Names as ColumnNames
from evals.measures.long import long_frame
from evals.measures.measure import Frames, Progress, Reading
from evals.measures.subjects import Pair
from probes.names import PLACES, read_names
from probes.nulls import untrained_twin
from proxytune.member import Member

FROM_LAYER_1 = ("attention", "mlp", "neurons")  # the residual stream also has the embeddings, as state 0


@dataclass(frozen=True)
class Names(Reading):
    """The names that the study reads (`StudyData.entities`), of the base or of a model tuned from it.

    Frames: `names` has one row per entity: unit (the name), group, popularity, length in tokens, the model's log-probability of the name
    (`log_probability`, nats, summed over its tokens, a mean over sentences) and how common its tokens are (`frequency`): counted in a world, else
    minus the mean logarithm of their ranks in the vocabulary, which byte-pair training orders by frequency. `spread` is long (`long_frame`): metric,
    cut, site, place, state. The base also has `spread_untrained`: like `spread`, for an untrained model. Memory: a model and its twin.
    """

    name: str = "names"
    version: ClassVar[int] = 1
    subject: ClassVar[type[Pair]] = Pair

    def frames(self, subject: Pair, inputs: Inputs) -> tuple[str, ...]:
        return ("names", "spread", "spread_untrained") if subject.tuned is None else ("names", "spread")

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        entities, carried = inputs.entities
        return {"entities": [list(entity) for entity in entities], "sentences": [each.ids for of_name in carried for each in of_name]}

    def steps(self, subject: Pair, inputs: Inputs) -> int:
        return sum(map(len, inputs.entities[1])) * (2 if subject.tuned is None else 1)

    def read(self, subject: Pair, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        carried = inputs.entities[1]
        options: dict[str, Any] = {"batch_size": inputs.study.batch_size, "progress": progress}
        model = subject.base if subject.tuned is None else subject.tuned
        found = {"names": _names(inputs, model), "spread": _long(read_names(model, carried, **options))}
        if subject.tuned is None:
            found["spread_untrained"] = _long(read_names(Member(untrained_twin(model.model), model.tokenizer), carried, **options))
        return {subject.label: found}


def _names(inputs: Inputs, model: Member) -> pd.DataFrame:
    entities, carried = inputs.entities
    ids = [of_name[0].name_ids for of_name in carried]
    common = [-np.mean(np.log1p(each)) if entity.frequency is None else entity.frequency for entity, each in zip(entities, ids, strict=True)]
    return pd.DataFrame(
        {
            "unit": [entity.name for entity in entities],
            "group": [entity.group for entity in entities],
            "popularity": [entity.popularity for entity in entities],
            "length": [len(each) for each in ids],
            "log_probability": inputs.name_log_probability(model),
            "frequency": np.asarray(common, float),
        }
    )


def _long(found: Mapping[tuple[str, str, str], np.ndarray]) -> pd.DataFrame:
    return long_frame(_columns(found))


def _columns(found: Mapping[tuple[str, str, str], np.ndarray]) -> Iterator[tuple[ColumnNames, np.ndarray]]:
    for (metric, cut, site), values in found.items():
        first = 1 if site in FROM_LAYER_1 else 0
        for place, state in np.ndindex(values.shape[1:]):
            yield {"metric": metric, "cut": cut, "site": site, "place": PLACES[place], "state": state + first}, values[:, place, state]
