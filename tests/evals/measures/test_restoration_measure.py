from made_summaries import HEADER, only, parts, patched, shown

from evals.measures.restoration import Restoration, RestorationFound
from probes.internals.blocks import BLOCKS


def test_restoration_has_shares_where_something_was_lost_and_controls_beside_each_block() -> None:
    tables = Restoration().tables(RestorationFound(parts(), patched()), HEADER)
    table = only(tables, "Restoration:")
    assert shown(table, "full")["low"] == "2.5 [2.3, 2.7], 25 %"
    assert shown(table, "full")["lost"] == "10.0 [9.8, 10.2]"
    nothing = Restoration().tables(RestorationFound(parts(lost=False), ()), HEADER)
    assert shown(only(nothing, "Restoration:"), "full")["low"] == "2.5 [2.3, 2.7]"
    blocks = only(tables, "Restoration, block")
    assert list(blocks.frame["block"]) == list(BLOCKS)
    assert shown(blocks, "full", "high")["as much change elsewhere"] == "n/a"
    assert shown(blocks, "full", "low")["as much change elsewhere"] == "2.5 [2.3, 2.7]"
    assert shown(blocks, "full", "low")["task (nats a token)"] == "-0.500 [-0.502, -0.498]"
    most = only(tables, "Restoration of")
    assert list(most.frame.columns[2:]) == ["5 %", "10 %"]
    assert shown(most, "full", "at random")["5 %"] == "5.0 [4.8, 5.2]"


def test_patching_shows_all_states_when_few_and_the_best_of_many() -> None:
    few = shown(only(Restoration().tables(RestorationFound((), patched()), HEADER), "Patching"), "full")
    assert (few["lost"], few["embeddings"], few["layer 3"]) == ("10.0 [9.8, 10.2]", "0.0 [-0.2, 0.2]", "3.0 [2.8, 3.2]")
    many = only(Restoration().tables(RestorationFound((), patched(states=30)), HEADER), "Patching")
    assert shown(many, "full") == {"arm": "full", "lost": "10.0 [9.8, 10.2]", "brought back": "3.0 [2.8, 3.2]", "after layer": "3"}
    assert "30" in many.note
