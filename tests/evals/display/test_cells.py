from made_summaries import some

from evals.display.cells import cell
from evals.statistics.value import UNKNOWN, Value


def test_a_cell_is_the_scaled_value_with_its_interval_or_says_that_there_is_none() -> None:
    assert cell(some(-0.0042, 0.0018), 1000) == "-4.2 [-6.0, -2.4]"
    assert cell(Value(0.5), 100) == "50.0"
    assert cell(UNKNOWN, 100) == cell(None, 100) == "n/a"
    assert cell(Value(0.5, 0.4, 0.6, "by hand"), 100) == cell(Value(None, note="by hand")) == "by hand"
    assert cell(Value(0.5, 0.4, 0.6), 1, 2) == "0.50 [0.40, 0.60]"
