from pathlib import Path

from made_summaries import HEADER, parts

from evals.display.drawing import PANELS, draw
from evals.measures.registry import measures
from evals.measures.restoration import RestorationFound


def test_more_panels_than_a_page_holds_go_on_to_the_next(tmp_path: Path) -> None:
    found = RestorationFound(tuple(part for number in range(PANELS + 1) for part in parts(f"full@{number}")), ())
    (chart,) = measures()["restoration"].charts(found, HEADER)
    assert [path.name for path in draw(chart, tmp_path)] == ["restoration.png", "restoration-2.png"]
