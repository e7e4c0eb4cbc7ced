import pytest
from made_summaries import HEADER, a_verdict, clause, only

from evals.measures.erosion import CLAIM, Erosion, ErosionFound
from evals.results.header import Header
from evals.statistics.judged import Verdict, clauses_of, judged
from probes.verdict import RULE, measured, states, verdict


def tables(row: Verdict, header: Header = HEADER) -> list:
    return Erosion().tables(ErosionFound((row,)), header)


def test_a_verdict_is_in_the_title_and_each_clause_says_what_counts_and_what_is_needed() -> None:
    table = only(tables(a_verdict()), "Verdict")
    assert table.title == "Verdict, full: 'direct tuning erodes what lower layers hold' is not supported"
    first, second, third, fourth = table.frame.to_dict("records")
    assert (first["value"], first["in"], first["state"], first["needed"]) == ("-4.5 [-6.0, -3.0]", "thousandths of effective rank", "holds", "")
    assert (second["state"], second["needed"]) == ("cannot tell", "505 seeds")
    assert (third["value"], third["needed"], third["note"]) == ("n/a", "n/a", "no arm is the same with shuffled: true")
    assert (fourth["value"], fourth["in"], fourth["counts if"]) == ("-0.1 [-0.6, 0.4]", "points of probability", "above 1.0")
    assert (fourth["p"], fourth["needed"], third["p"]) == ("0.0019", "", "")
    assert table.note.startswith("Failed: 4; held: 1; cannot tell: 2, 3.")


def test_the_clauses_of_a_verdict_are_judged_again_as_they_were() -> None:
    (row,) = Erosion().verdicts(ErosionFound((a_verdict(),)))
    found = clauses_of(row)
    assert [clause.name for clause in found] == ["density", "density/random", "density/shuffled", "restoration"]
    assert [(clause.low, clause.high, clause.needs) for clause in found[:2]] == [(-0.006, -0.003, None), (-0.006, 0.003, 505)]
    assert states(found) == [clause.state for clause in a_verdict().clauses] == ["holds", "cannot tell", "cannot tell", "fails"]
    assert verdict(found) == a_verdict().verdict


def test_one_seed_is_no_verdict_and_every_note_says_of_what_it_is() -> None:
    table = only(tables(a_verdict("cannot tell: one seed")), "Verdict")
    assert table.title == "Verdict, full: 'direct tuning erodes what lower layers hold': cannot tell: one seed"
    assert "of this model and this run" in table.note
    several = only(tables(a_verdict(), Header("small", (0, 1, 2), ("tiny",), "base", HEADER.kinds)), "Verdict")
    assert "over units of one seed" not in several.note


@pytest.mark.parametrize("name", RULE)
def test_the_sides_that_a_verdict_names_are_those_of_the_rule(name: str) -> None:
    """Intervals that just keep to the named sides, or just do not, are judged by the rule as the table says."""
    row = Verdict("full", CLAIM, "underpowered", judged([clause(name, None)]))
    (cells,) = only(tables(row), "Verdict").frame.to_dict("records")
    scale = {"thousandths of effective rank": 1000, "share of the steps": 1, "AUROC": 1}.get(cells["in"], 100)
    (_, threshold), (side, boundary) = ((words.split()[0], float(words.split()[1]) / scale) for words in (cells["counts if"], cells["holds if all"]))
    step = -1e-4 if side == "below" else 1e-4

    def judged_as(*ends: float) -> str:
        (state,) = states([measured(name, (ends[0], min(ends), max(ends)), 8)])
        return state

    assert cells["counts if"].startswith(side)
    assert judged_as(boundary + step, threshold + 100 * step) == "holds"
    assert judged_as(boundary - step, threshold + 100 * step) == "cannot tell"
    assert judged_as(boundary - 2 * step, threshold - step) == "fails"
    if boundary != threshold:
        assert judged_as(boundary + step, threshold - step) == "fails"  # certain, but too small to count
