from made_summaries import HEADER, lens_rows, only, shown

from evals.measures.lens import LensMeasure


def test_the_lens_is_read_at_the_ends_of_blocks_with_the_base_beside_the_arm() -> None:
    tables = LensMeasure().tables(lens_rows(), HEADER)
    table = only(tables, "What the layers")
    columns = ["layer 1 (low block's end)", "layer 3 (middle block's end, before the last)", "layer 4 (last)"]
    assert list(table.frame.columns) == ["lens", "arm", *columns]
    assert shown(table, "plain", "full")[columns[1]] == "30.0 [29.8, 30.2]"
    assert shown(table, "own", "base")[columns[0]] == shown(table, "base's", "base")[columns[0]] == "11.0 [10.8, 11.2]"
    assert list(table.frame["arm"]) == ["base", "full"] * 3
    probed = only(tables, "What a linear")
    assert list(probed.frame.iloc[:, 0]) == ["accuracy", "selectivity"]
    assert "nats" not in table.title + table.note
    many = only(LensMeasure().tables(lens_rows(spread=6), HEADER), "What the layers")
    assert [name.split(" ")[1] for name in many.frame.columns[2:]] == ["8", "16", "23", "24"]
