"""One cache for all members: beam search and cropping act on every member's keys and values."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from proxytune.errors import UserError


class MixtureCache(Cache):
    """Holds one cache per member and shares their layers, so that code that loops over layers reaches all of them.

    A member's cache must have all its layers from the start (build it from the member's config): a layer created later would
    not be shared. Offloading and quantised caches are not covered.
    """

    def __init__(self, members: Mapping[str, Cache]):
        self.members = dict(members)
        # For members with a vocabulary of their own: which of their columns hold tokens. Only these members have columns of their own.
        self.own_masks: dict[str, Int[Tensor, "rows _"]] = {}
        super().__init__(layers=[layer for cache in self.members.values() for layer in cache.layers])

    @property
    def is_compileable(self) -> bool:
        """Never: generation would build one attention mask from one config, and each member must build its own."""
        return False

    @property
    def is_static(self) -> bool:
        """Whether it is allocated at its full length from the start."""
        return any(isinstance(cache, StaticCache) for cache in self.members.values())

    @property
    def keeps_everything(self) -> bool:
        """Whether every layer keeps all positions: not so for sliding windows and recurrent states."""
        return all(type(layer) is DynamicLayer for layer in self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.own_masks = {name: mask.index_select(0, beam_idx.to(mask.device)) for name, mask in self.own_masks.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.own_masks = {name: mask.repeat_interleave(repeats, 0) for name, mask in self.own_masks.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.own_masks = {name: mask[indices] for name, mask in self.own_masks.items()}

    def crop(self, *arguments: Any, **options: Any) -> None:
        if self.own_masks:
            raise UserError(f"cache: {', '.join(self.own_masks)} read tokens of their own, which cannot be taken back; decode plainly")
        super().crop(*arguments, **options)

    def select_rows(self, rows: Int[Tensor, " rows"]) -> "MixtureCache":
        """A new cache of the given batch rows; a row may occur several times."""
        chosen = {}
        for name, cache in self.members.items():
            chosen[name] = copy.copy(cache)
            chosen[name].layers = [copy.copy(layer) for layer in cache.layers]
            for layer in chosen[name].layers:
                layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        selected = MixtureCache(chosen)
        selected.own_masks = {name: mask.index_select(0, rows.to(mask.device)) for name, mask in self.own_masks.items()}
        return selected


class StackedLayer(CacheLayerMixin):
    """One layer of several members' caches as if their rows were one batch; they keep their own keys and values.

    Lengths, masks and layer types are the same in all of them, so the first one is asked.
    """

    def __init__(self, layers: Sequence[CacheLayerMixin]):
        super().__init__()
        self._layers = list(layers)
        self.is_sliding = getattr(layers[0], "is_sliding", False)
        self.is_compileable = layers[0].is_compileable

    def update(self, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        count = len(self._layers)
        parts = [
            layer.update(own_keys, own_values, *arguments, **options)
            for layer, own_keys, own_values in zip(self._layers, keys.chunk(count), values.chunk(count), strict=True)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Does nothing: each member's own layer initialises itself in its update."""

    def get_mask_sizes(self, query_length: int) -> Any:
        return self._layers[0].get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:  # a number, or a tensor of a static layer
        return self._layers[0].get_seq_length()

    def get_max_length(self) -> Any:
        return self._layers[0].get_max_length()


def stacked(caches: Sequence[Cache]) -> Cache:
    """A cache for one pass over the rows of several members; it writes into their caches. See `can_stack`."""
    return Cache(layers=[StackedLayer(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)])


def can_stack(cache: Cache) -> bool:
    """Whether the cache has only keys and values: recurrent states are stored differently."""
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
