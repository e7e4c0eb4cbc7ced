import pandas as pd

from evals.display.cells import Table
from evals.display.render import draw


def test_words_stand_left_and_numbers_right() -> None:
    lines = draw([Table("", pd.DataFrame({"arm": ["a"], "state of it": ["holds"], "value of it": ["1.0"]}), "")], "table", 160).splitlines()
    (row,) = [line for line in lines if "holds" in line]
    assert "│ holds       │" in row
    assert "│         1.0 │" in row


def test_latex_titles_hold_no_commands() -> None:
    titled = draw([Table("100 % of full_kl", pd.DataFrame({"arm": ["a"]}), "")], "latex", 160)
    assert r"100 \% of full\_kl" in titled
