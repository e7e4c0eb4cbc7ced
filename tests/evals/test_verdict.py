import math

import numpy as np
import pytest
from scipy.stats import norm

from evals.measures.erosion import _clause
from evals.results.recorded import Recorded
from evals.study import Study
from probes.knowledge.exposure import needed_seeds
from probes.verdict import RULE, Clause, State, measured, state, verdict, worst

HOLDS = {
    "density": (-0.006, -0.009, -0.003),
    "density/random": (-0.005, -0.009, -0.001),
    "density/shuffled": (-0.004, -0.0075, -0.0005),
    "restoration": (0.06, 0.02, 0.10),
    "restoration/elsewhere": (0.05, 0.01, 0.09),
    "freezing": (0.03, 0.01, 0.05),
    "savings": (0.2, 0.1, 0.3),
}
FAILS = {
    "density": (0.003, 0.001, 0.005),
    "density/random": (0.0, -0.001, 0.001),
    "density/shuffled": (-0.001, -0.0015, -0.0005),
    "restoration": (-0.05, -0.08, -0.02),
    "restoration/elsewhere": (0.005, 0.001, 0.009),
    "freezing": (0.0, -0.005, 0.005),
    "savings": (0.8, 0.7, 0.9),
}
CANNOT_TELL = {
    "density": (-0.006, -0.013, 0.001),
    "density/random": (-0.001, -0.009, 0.007),
    "density/shuffled": (0.0, -0.0021, 0.0021),
    "restoration": (-0.01, -0.04, 0.02),
    "restoration/elsewhere": (0.01, -0.002, 0.022),
    "freezing": (0.02, -0.001, 0.041),
    "savings": (0.45, 0.3, 0.6),
}


def clauses(**changed: tuple[float, float, float] | None) -> list[Clause]:
    return [measured(name, interval, 3) for name, interval in (HOLDS | {name.replace("_", "/"): value for name, value in changed.items()}).items()]


@pytest.mark.parametrize("name", RULE)
def test_state_of_a_clause(name: str) -> None:
    assert state(measured(name, HOLDS[name], 3)) == "holds"
    assert state(measured(name, FAILS[name], 3)) == "fails"
    assert state(measured(name, CANNOT_TELL[name], 3)) == "cannot tell"
    assert state(measured(name, None, 3)) == "cannot tell"
    value, low, high = HOLDS[name]
    for unknown in ((value, math.nan, high), (value, low, math.nan), (value, -math.inf, math.inf)):
        assert state(measured(name, unknown, 3)) == "cannot tell"


@pytest.mark.parametrize("name", RULE)
def test_one_clause_is_enough_against(name: str) -> None:
    others = {key: value for key, value in HOLDS.items() if key != name}
    rest = [measured(key, value, 3) for key, value in others.items()]
    assert verdict([*rest, measured(name, HOLDS[name], 3)]) == "supported"
    assert verdict([*rest, measured(name, FAILS[name], 3)]) == "not supported"
    assert verdict([*rest, measured(name, CANNOT_TELL[name], 3)]) == "underpowered"
    assert verdict([*rest, measured(name, None, 3, needs=12, note="nothing was forgotten")]) == "underpowered"
    assert verdict(rest) == "underpowered"


def test_a_refutation_outweighs_what_is_not_known() -> None:
    assert verdict([]) == "underpowered"
    assert verdict([measured("savings", FAILS["savings"], 3)]) == "not supported"
    assert verdict([measured("savings", HOLDS["savings"], 3)]) == "underpowered"


def test_worst_of_several_intervals() -> None:
    assert worst(["holds", "holds"]) == "holds"
    assert worst(["holds", "cannot tell"]) == "cannot tell"
    assert worst(["cannot tell", "fails", "holds"]) == "fails"
    assert worst([]) == "cannot tell"


def test_an_effect_that_is_certain_but_too_small_fails() -> None:
    assert state(measured("density", (-0.001, -0.0019, -0.0001), 3)) == "fails"
    assert state(measured("density", (-0.001, -0.0021, -0.0001), 3)) == "holds"
    assert state(measured("freezing", (0.005, 0.001, 0.009), 3)) == "fails"


def test_identical_models_refute_rather_than_support() -> None:
    assert verdict(clauses(density=(0.0, 0.0, 0.0), density_random=(0.0, 0.0, 0.0), restoration=None)) == "not supported"


def test_the_opposite_of_the_claim_is_not_supported() -> None:
    for name, (value, low, high) in HOLDS.items():
        around = 2 * RULE[name].boundary
        assert state(measured(name, (around - value, around - high, around - low), 3)) == "fails", name


def test_needs_and_note_are_kept_and_names_are_those_of_the_rule() -> None:
    clause = measured("freezing", (0.02, -0.01, 0.05), 3, needs=9, note="3 seeds")
    assert (clause.value, clause.low, clause.high, clause.needs, clause.note) == (0.02, -0.01, 0.05, 9, "3 seeds")
    assert RULE["freezing"].value is None
    with pytest.raises(KeyError):
        measured("frozen", (0.02, -0.01, 0.05), 3)


def shares(effects: dict[str, float], spread: float, studies: int = 400) -> dict[str, float]:
    """How often each verdict falls when the clauses have these effects and standard errors of `spread` times what counts."""
    generator, found = np.random.default_rng(0), {"supported": 0.0, "not supported": 0.0, "underpowered": 0.0}
    for _ in range(studies):
        study = []
        for name, effect in effects.items():
            error = spread * (0.1 if name == "savings" else abs(RULE[name].threshold))
            value = float(generator.normal(effect, error))
            study.append(measured(name, (value, value - 1.96 * error, value + 1.96 * error), 3))
        found[verdict(study)] += 1 / studies
    return found


def test_verdicts_of_studies_large_and_small() -> None:
    true = {name: value for name, (value, _, _) in HOLDS.items()}
    absent = true | {"freezing": 0.0}
    assert shares(true, 0.2)["supported"] > 0.99
    assert shares(absent, 0.2)["not supported"] > 0.9
    assert shares(true, 5.0)["underpowered"] > 0.8
    assert shares(absent, 0.2)["supported"] < 0.04
    barely = {name: clause.threshold for name, clause in RULE.items()}
    for spread in (0.1, 1.0, 5.0):
        assert shares(barely, spread)["not supported"] < 0.18


UNITS = 8


def clause_of(seeds: list[np.ndarray], same_items: bool = False) -> Clause:
    """The clause on freezing of seeds whose units gain so much."""
    study = Study.model_validate(
        {"study": "s", "measures": ["task"], "arms": {"base": {"kind": "base"}}}
        | ({"models": {"base": "b"}, "data": {"test": "t"}} if same_items else {"worlds": ["tiny"]})
    )
    return _clause(Recorded(study, []), "freezing", [seed[:, None] for seed in seeds], 0, None, runs=len(seeds))


def exactly(mean: float, sd: float, count: int) -> np.ndarray:
    """Numbers of a normal law that have just this mean and sd."""
    drawn = norm.ppf((np.arange(count) + 0.5) / count)
    return mean + sd * (drawn - drawn.mean()) / drawn.std(ddof=1)


def decided(seeds: int, effect: float, between: float, within: float, expected: State, studies: int) -> float:
    """How often a study of so many seeds of a few units comes to this state."""
    generator = np.random.default_rng(seeds)
    states = []
    for _ in range(studies):
        of_seeds = effect + between * generator.normal(size=(seeds, 1)) + within * generator.normal(size=(seeds, UNITS))
        states.append(state(clause_of(list(of_seeds))))
    return states.count(expected) / studies


FEW_OR_MANY = pytest.mark.parametrize(("studies", "power"), [(60, 0.7), pytest.param(600, 0.77, marks=pytest.mark.slow)])


@FEW_OR_MANY
def test_the_seeds_that_are_promised_decide_four_times_in_five(studies: int, power: float) -> None:
    """Seeds whose means have an sd of .012, for effects of .01 and none. Twin: a promise for the effect that was seen keeps it not."""
    seen = clause_of([np.full(UNITS, mean) for mean in exactly(0.012, 0.012, 6)])
    assert (state(seen), seen.needs) == ("cannot tell", needed_seeds(2.571 * 0.012 / 6**0.5, 6, 0.01))
    less = clause_of([np.full(UNITS, mean) for mean in exactly(0.005, 0.012, 6)])
    assert less.needs == seen.needs == 14
    assert decided(14, 0.01, 0.012, 0.0, "holds", studies) > power
    assert decided(14, 0.0, 0.012, 0.0, "fails", studies) > power
    for_seen = needed_seeds(2.571 * 0.012 / 6**0.5, 6, 0.012)
    assert decided(for_seen, 0.01, 0.012, 0.0, "holds", studies) < 0.72


@FEW_OR_MANY
def test_seeds_that_agree_by_luck_promise_no_fewer_than_their_people_allow(studies: int, power: float) -> None:
    lucky = clause_of([exactly(0.005, 0.012 * UNITS**0.5, UNITS) for _ in range(3)])
    assert state(lucky) == "cannot tell"
    assert lucky.needs is not None
    assert 13 <= lucky.needs <= 16
    assert decided(lucky.needs, 0.01, 0.0, 0.012 * UNITS**0.5, "holds", studies) > power


def test_no_number_of_seeds_is_promised_where_the_same_items_are_too_few() -> None:
    few = clause_of([exactly(0.005 + shift, 0.085, 50) for shift in (-0.001, 0.0, 0.001)], same_items=True)
    assert (state(few), few.needs) == ("cannot tell", None)
    assert "units needed, whatever the seeds" in few.note
    many = clause_of([exactly(0.005 + shift, 0.085, 2000) for shift in (-0.01, 0.0, 0.01)], same_items=True)
    assert state(many) == "cannot tell"
    assert many.needs is not None
    assert many.note == ""


@pytest.mark.parametrize("name", RULE)
def test_one_run_is_never_judged(name: str) -> None:
    for interval in (HOLDS[name], FAILS[name], CANNOT_TELL[name], None):
        once = measured(name, interval, 1, note="less other")
        assert (state(once), once.note) == ("cannot tell", "less other; one seed")
        assert verdict([*(measured(key, value, 1) for key, value in HOLDS.items() if key != name), once]) == "cannot tell: one seed"
    assert state(measured(name, HOLDS[name], 2)) == "holds"


def test_verdicts_of_no_effect_with_ordinary_noise_between_seeds() -> None:
    """Nothing but tuning noise: one run is never judged, where its units alone would refute the claim; of eight runs few are wrong."""
    generator = np.random.default_rng(0)
    once, by_units, supported = [], [], []
    for _ in range(100):
        off = generator.normal(0, 0.02, 8)
        seeds = [shift + 0.01 * generator.normal(size=UNITS) for shift in off]
        one = clause_of(seeds[:1])
        once.append((state(one), verdict([one])))
        by_units.append(state(one._replace(runs=2)) != "cannot tell")
        supported.append(state(clause_of(seeds)) == "holds")
    assert set(once) == {("cannot tell", "cannot tell: one seed")}
    assert np.mean(by_units) > 0.7  # the twin: what would have been judged
    assert np.mean(supported) <= 0.05
