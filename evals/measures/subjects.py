"""What readings look at: `Outputs`, mixtures over loaded members, and `Pair`, the base beside a model tuned from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from probes.restoration import Restoration, restorations
from proxytune.member import Member, Weights
from proxytune.mixture import Mixture, active
from proxytune.modeling import ProxyTunedForCausalLM


@dataclass(frozen=True)
class Outputs:
    """Members that are loaded together, where they come from, and the mixtures over them by arm. The first member's tokenizer is the mixtures'."""

    members: Mapping[str, Member]
    sources: Mapping[str, Weights]
    mixtures: Mapping[str, Mixture]

    @cached_property
    def model(self) -> ProxyTunedForCausalLM:
        return ProxyTunedForCausalLM(dict(self.members), next(iter(self.mixtures.values())))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return next(iter(self.members.values())).tokenizer

    @property
    def labels(self) -> list[str]:
        return list(self.mixtures)

    def only(self, labels: Sequence[str]) -> "Outputs":
        """The same members with some of the mixtures."""
        return replace(self, mixtures={label: self.mixtures[label] for label in labels})

    def causes(self, label: str) -> dict[str, Any]:
        """What decides an arm's records besides how it is asked.

        These are the members with their coefficients, without the names they go by, and the first of all members, whose tokenizer and
        generation configuration are the mixture's even where it has no part in it.
        """
        weighted = [[self.members[name].fingerprint, coefficient] for name, coefficient in active(self.mixtures[label]).items()]
        return {"mixture": weighted, "interface": next(iter(self.members.values())).interface}

    def weights(self, label: str) -> dict[str, str]:
        """Fingerprints of the members that have a part in the arm's mixture."""
        return {name: self.members[name].fingerprint for name in active(self.mixtures[label])}


@dataclass(frozen=True)
class Pair:
    """The base, and beside it a tuned model of its shape with any adapter merged; None for the base's own arm.

    `fingerprint` is that of the tuned model as it was loaded.
    """

    label: str
    base: Member
    tuned: Member | None = None
    fingerprint: str | None = None

    @cached_property
    def plan(self) -> dict[str, Restoration]:
        """What is set back to the base's, part by part."""
        assert self.tuned is not None
        return restorations(self.base, self.tuned)

    @property
    def labels(self) -> list[str]:
        return [self.label]

    def only(self, labels: Sequence[str]) -> "Pair":
        return self

    def causes(self, label: str) -> dict[str, Any]:
        return {"weights": list(self.weights(label).values())}

    def weights(self, label: str) -> dict[str, str]:
        tuned = {} if self.tuned is None else {"tuned": self.fingerprint or self.tuned.fingerprint}
        return {"base": self.base.fingerprint} | tuned
