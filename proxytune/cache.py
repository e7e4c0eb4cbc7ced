"""One cache for all members: what beam search or cropping does to it, it does to every member's keys and values."""

import copy
from collections.abc import Mapping

from jaxtyping import Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class MixtureCache(Cache):
    """Holds one cache a member and shares their layers, so that whatever loops over layers reaches all of them.

    A member's cache must have its layers from the start (build it from the member's config): a layer made later would
    not be shared. Offloading and quantised caches are not covered.
    """

    def __init__(self, members: Mapping[str, Cache]):
        self.members = dict(members)
        super().__init__(layers=[layer for cache in self.members.values() for layer in cache.layers])

    @property
    def is_compileable(self) -> bool:
        """Never: generation would build one attention mask from one config, and each member must build its own."""
        return False

    @property
    def keeps_everything(self) -> bool:
        """Whether every layer keeps all positions as they came: not so for sliding windows and recurrent states."""
        return all(type(layer) is DynamicLayer for layer in self.layers)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "MixtureCache":
        """A cache of the given batch rows, each as often as it is named; this one stays as it is."""
        chosen = {}
        for name, cache in self.members.items():
            chosen[name] = copy.copy(cache)
            chosen[name].layers = [copy.copy(layer) for layer in cache.layers]
            for layer in chosen[name].layers:
                layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        return MixtureCache(chosen)
