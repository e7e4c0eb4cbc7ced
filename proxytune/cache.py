"""One cache for all members: what beam search or cropping does to it, it does to every member's keys and values."""

from collections.abc import Mapping

from transformers import Cache


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
