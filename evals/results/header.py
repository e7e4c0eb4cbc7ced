"""Whose results these are: what every table and figure needs besides a measure's summary."""

from collections.abc import Iterable
from dataclasses import dataclass

from evals.study import Study


@dataclass(frozen=True)
class Header:
    """The study's name, seeds and worlds (none where it has data of its own), the base's arm, the kind of every arm in the study's order, and the
    arm that closes the gap."""

    study: str
    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    base: str
    kinds: dict[str, str]
    direct: str | None = None

    @property
    def runs(self) -> int:
        """How many times everything was tuned and measured: once a seed and world."""
        return len(self.seeds) * max(1, len(self.worlds))

    @property
    def proxied(self) -> list[str]:
        """The arms whose weights are the base's, the base first."""
        return [self.base, *(arm for arm, kind in self.kinds.items() if kind == "proxy")]

    @property
    def title(self) -> str:
        return f"{self.study}, {self.runs} seed(s)"

    def ordered(self, arms: Iterable[str]) -> list[str]:
        """Each once, in the study's order; what is no arm (an untrained model) first."""
        order = {arm: place for place, arm in enumerate(self.kinds)}
        return sorted(dict.fromkeys(arms), key=lambda arm: order.get(arm, -1))


def header_of(study: Study) -> Header:
    kinds = {label: setting.kind for label, setting in study.arm_settings.items()}
    return Header(study.study, study.seeds, study.worlds, study.base_arm, kinds, study.direct_arm)
