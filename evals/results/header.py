"""The study that results belong to: what every table and figure needs besides a measure's summary."""

from collections.abc import Iterable
from dataclasses import dataclass

from evals.study import Study


@dataclass(frozen=True)
class Header:
    """The study's name, seeds and worlds (none if it has its own data), the base's arm, the kind of every arm in the study's order, and the arms at
    which the gap is closed, the main one first."""

    study: str
    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    base: str
    kinds: dict[str, str]
    direct: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """How many times everything was tuned and measured: once per seed and world."""
        return len(self.seeds) * max(1, len(self.worlds))

    @property
    def proxied(self) -> list[str]:
        """The arms with the base's weights (the base itself, proxies and biases), the base first."""
        return [self.base, *(arm for arm, kind in self.kinds.items() if kind in ("proxy", "logit_bias"))]

    @property
    def title(self) -> str:
        return f"{self.study}, {self.runs} seed(s)"

    def ordered(self, arms: Iterable[str]) -> list[str]:
        """Each arm once, in the study's order; names that are not arms (an untrained model) come first."""
        order = {arm: place for place, arm in enumerate(self.kinds)}
        return sorted(dict.fromkeys(arms), key=lambda arm: order.get(arm, -1))


def header_of(study: Study) -> Header:
    kinds = {label: setting.kind for label, setting in study.arm_settings.items()}
    return Header(study.study, study.seeds, study.worlds, study.base_arm, kinds, study.references)
