"""What readings read: `Outputs` (mixtures over loaded members) and `Pair` (the base beside a model tuned from it)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from probes.restoration import Restoration, restorations
from proxytune.member import Member, Weights
from proxytune.mixture import Mixture, active, bias_of
from proxytune.modeling import ProxyTunedForCausalLM


@dataclass(frozen=True)
class Outputs:
    """Members that are loaded together, their sources, and the mixtures over them by arm. The mixtures use the first member's tokenizer.

    `fitted` is where the mixtures' bias was fitted; None if there is none, or if it bans words.
    """

    members: Mapping[str, Member]
    sources: Mapping[str, Weights]
    mixtures: Mapping[str, Mixture]
    fitted: Weights | None = None

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
        """The same members with these mixtures only."""
        return replace(self, mixtures={label: self.mixtures[label] for label in labels})

    def causes(self, label: str) -> dict[str, Any]:
        """What decides an arm's records besides the protocol: part of the record's key.

        These are the members' fingerprints with their coefficients, without names, the bias if there is one, and the interface of the first member:
        the mixture uses its tokenizer and generation configuration even if it has no coefficient in the mixture.
        """
        weighted = [[self.members[name].fingerprint, coefficient] for name, coefficient in active(self.mixtures[label]).items()]
        return {"mixture": weighted, "interface": next(iter(self.members.values())).interface} | self._bias(label)

    def weights(self, label: str) -> dict[str, str]:
        """Fingerprints of the members with a coefficient in the arm's mixture, and the digest of its bias if there is one."""
        return {name: self.members[name].fingerprint for name in active(self.mixtures[label])} | self._bias(label)

    def _bias(self, label: str) -> dict[str, str]:
        bias = bias_of(self.mixtures[label])
        return {} if bias is None else {"bias": bias.digest}


@dataclass(frozen=True)
class Pair:
    """The base and a tuned model of the same shape, with any adapter merged; `tuned` is None for the base's own arm.

    `fingerprint` is that of the tuned model as it was loaded.
    """

    label: str
    base: Member
    tuned: Member | None = None
    fingerprint: str | None = None

    @cached_property
    def plan(self) -> dict[str, Restoration]:
        """The parts that are set back to the base's weights, by label."""
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
