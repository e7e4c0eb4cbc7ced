"""Every sentence of the headline, on results where it is true and on results where its opposite is."""

from itertools import product
from typing import Any

import pytest

from evals.results.comparison import PARTS
from evals.results.header import Header
from evals.results.headline import ANSWERS, MOST_ARMS, MOST_LINES, Sign, headline, steered_arm

HEADER = Header("small", (0, 1, 2), ("tiny",), "base", {"base": "base", "proxy@0.5": "proxy", "proxy@1": "proxy", "full": "direct"}, ("full",))
NUMBERS: dict[Sign, tuple[float, float, float]] = {"more": (0.1, 0.05, 0.15), "less": (-0.1, -0.15, -0.05), "open": (0.02, -0.03, 0.07)}
BEGINNINGS = {
    ("more", "more"): "Steer",
    ("more", "open"): "Steer",
    ("open", "more"): "Steer",
    ("less", "less"): "Tune",
    ("less", "open"): "Tune",
    ("open", "less"): "Tune",
    ("less", "more"): "It depends",
    ("more", "less"): "It depends",
    ("open", "open"): "Cannot tell",
}


def numbers(sign: Sign) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), NUMBERS[sign], strict=True))


def compared(gain: Sign = "less", kept: Sign = "more", arms: int = 3, **parts: Any) -> dict[str, list[dict[str, Any]]]:
    against = [
        {"arm": arm, "direct": "full", "measure": measure, "needs": {"number": 7, "of": "seeds"} if sign == "open" else None} | numbers(sign)
        for arm in ("proxy@0.5", "proxy@1")
        for measure, sign in (("task", gain), ("knowledge", kept))
    ]
    frontier = [
        {"arm": arm, "on_frontier": place < 2, "share_of_draws": 0.5}
        | {"gain": {"measure": "task"} | numbers("more"), "kept": {"measure": "knowledge"} | numbers("open")}
        for place, arm in enumerate(["base", *([f"arm-{number}" for number in range(arms - 2)]), "proxy@1", "full"][: arms + 1])
    ]
    gap = [{"arm": "proxy@1", "direct": "full", "measure": "task", "value": 0.8, "low": 0.7, "high": 0.9}]
    return {part: [] for part in PARTS} | {"against_direct": against, "frontier": frontier, "gap_closed": gap} | parts


COSTS = [{"arm": "base", "flops": 0.0, "flops_a_token": 100.0}, {"arm": "proxy@1", "flops": 3.2e9, "flops_a_token": 113.0}]


def lines(header: Header = HEADER, **options: Any) -> list[str]:
    return headline(header, {}, compared(**options), COSTS)


@pytest.mark.parametrize(("gain", "kept"), product(NUMBERS, NUMBERS))
def test_the_answer_follows_from_the_two_intervals(gain: Sign, kept: Sign) -> None:
    answer = lines(gain=gain, kept=kept)[1]
    assert answer.split(":")[0] == BEGINNINGS[gain, kept]
    assert set(ANSWERS) == set(BEGINNINGS)
    for words, sign in (("gain", gain), ("keep", kept)):
        claims = [f"{arm} {words}s more" for arm in ("proxy@1", "full")]
        said = [claim for claim in claims if claim in answer or f"and {claim.split()[0]} {words}s more" in answer]
        if sign == "open":
            assert not said
            assert "cannot be told apart" in answer
        elif gain == kept or "open" in (gain, kept):
            assert (f"{words}s more" in answer) == (sign != "open")
    assert ("task +10.0 [5.0, 15.0]" in answer) is (gain == "more")
    assert ("knowledge -10.0 [-15.0, -5.0]" in answer) is (kept == "less")


@pytest.mark.parametrize(
    ("kinds", "selected", "steered"),
    [
        (HEADER.kinds, [], "proxy@1"),
        (HEADER.kinds, ["proxy@0.5"], "proxy@0.5"),
        (HEADER.kinds, ["full"], "proxy@1"),  # only a proxy's own selection counts
        ({"base": "base", "proxy@0.5": "proxy", "proxy@2": "proxy"}, [], "proxy@0.5"),
        ({"base": "base", "bias": "logit_bias", "full": "direct"}, [], "bias"),
        ({"base": "base", "full": "direct"}, [], None),
    ],
)
def test_the_arm_that_stands_for_steering_is_not_the_one_with_the_best_score(kinds: dict[str, str], selected: list[str], steered: str | None) -> None:
    header = Header("small", (0,), (), "base", kinds)
    assert steered_arm(header, compared(selections=[{"arm": arm} for arm in selected])) == steered


def test_a_study_without_one_of_the_camps_or_of_the_measures_says_so() -> None:
    nobody = Header("small", (0, 1), (), "base", {"base": "base", "full": "direct"}, ("full",))
    assert "has no steered arm, so it does not say" in "\n".join(lines(nobody))
    untuned = Header("small", (0, 1), (), "base", {"base": "base", "proxy@1": "proxy"})
    assert "has no direct arm, so it does not say" in "\n".join(lines(untuned))
    assert "does not say" not in "\n".join(lines())
    half = [row for row in compared("more", "open")["against_direct"] if row["measure"] == "task"]
    said = lines(against_direct=half, frontier=[])[1]
    assert said.startswith("Half an answer: proxy@1 has more right than full (task +10.0")
    assert said.endswith("The study has no measure of what is kept.")


def test_one_seed_decides_nothing_and_says_so() -> None:
    one = Header("small", (0,), (), "base", HEADER.kinds, ("full",))
    assert "one seed, which describes" in lines(one)[0]
    assert lines()[0].startswith("small: 3 seeds.")


def test_what_cannot_be_told_has_the_number_that_would_decide_it() -> None:
    (line,) = [line for line in lines(gain="open") if line.startswith("Cannot be told yet")]
    assert "proxy@1 against full at task (7 seeds)" in line
    assert "knowledge" not in line
    assert not [line for line in lines() if line.startswith("Cannot be told")]


def test_arms_stand_with_what_they_cost_and_those_on_the_frontier_first() -> None:
    shown = lines(arms=4)
    rows = [line for line in shown if "closes" not in line and line.split()[0] in ("arm-0", "arm-1", "proxy@1", "full")]
    assert rows[0].startswith("arm-0")
    assert [" *" in row for row in rows] == [True, False, False, False]
    (proxy,) = [row for row in rows if row.startswith("proxy@1")]
    assert proxy.split()[-2:] == ["3.2e+09", "1.13"]
    assert not [line for line in shown if line.startswith("base")]


def test_there_are_at_most_twenty_lines_however_many_arms_and_verdicts() -> None:
    shown = lines(arms=40, gain="open")
    assert len(shown) <= MOST_LINES
    assert f"{40 - MOST_ARMS} arms more, none of them on it" in "\n".join(shown)


def test_the_gap_is_told_only_where_there_is_one() -> None:
    assert any("closes 80.0 [70.0, 90.0] % of the gap between base and full at task" in line for line in lines())
    within_noise = [{"arm": "proxy@1", "direct": "full", "measure": "task", "value": None, "low": None, "high": None}]
    assert not any("closes" in line for line in lines(gap_closed=within_noise))


@pytest.mark.parametrize(
    ("sign", "words"), [("more", "has more right than base"), ("less", "has less right than base"), ("open", "cannot be told apart")]
)
def test_without_a_frontier_the_contrasts_with_the_base_are_said(sign: Sign, words: str) -> None:
    contrast = {"arm": "full", "minus": "base", "measure": "knowledge", "needs": None} | numbers(sign)
    said = lines(frontier=[], against_direct=[], gap_closed=[], contrasts=[contrast])
    assert [line for line in said if words in line and "full" in line]
    assert "Not measured: what an arm gained, as the study has no task." in said
    assert not any("no knowledge items" in line for line in said)
    assert not any(words in line and "full" in line for line in lines(contrasts=[contrast]))  # twin: the frontier shows it
