from made_summaries import HEADER, KINDS, block_drifts, distances, only, shown

from evals.measures.drift import Drift, Drifted


def test_drift_of_what_comes_out_is_for_all_arms_and_that_of_states_for_those_with_their_own() -> None:
    tables = Drift().tables(Drifted(distances(), block_drifts()), HEADER)
    table = only(tables, "Drift from")
    assert list(table.frame["arm"]) == list(KINDS)
    assert {shown(table, arm)["KL, familiar"] for arm in KINDS} == {"0.125 [0.123, 0.127]"}
    assert [shown(table, arm)["CKA, low"] for arm in ("proxy@1", "expert", "full")] == ["unchanged by construction", "", "0.987"]
    weights = shown(only(tables, "Drift of"), "full")
    assert (weights["change, low (%)"], weights["stable rank, high"]) == ("6.25", "n/a")
    assert "nats" in table.note
    assert not any(name.startswith("CKA") for name in only(Drift().tables(Drifted(distances(), ()), HEADER), "Drift from").frame)
