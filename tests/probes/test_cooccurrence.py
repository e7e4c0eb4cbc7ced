"""Signals of wrong answers: areas against their definitions, planted signals, and intervals by entity."""

from itertools import permutations

import numpy as np
import pytest

from probes import cooccurrence
from probes.cooccurrence import compare, measures, risk_coverage


def test_risk_and_coverage_is_the_mean_over_all_orders_of_ties() -> None:
    doubt, wrong = np.array([0.1, 0.5, 0.5, 0.5, 0.9]), np.array([False, True, False, False, True])
    orders = [[0, *tied, 4] for tied in permutations((1, 2, 3))]
    means = np.mean([np.cumsum(wrong[order]) / np.arange(1, 6) for order in orders], axis=0)
    assert risk_coverage(doubt, wrong) == pytest.approx(means)


def test_a_perfect_signal_and_its_opposite() -> None:
    wrong = np.array([False] * 6 + [True] * 4)
    best, worst = measures(wrong.astype(float), wrong), measures(-wrong.astype(float), wrong)
    assert best[:2].tolist() == [1.0, 1.0]
    assert worst[0] == 0.0
    assert best[2] < measures(np.zeros(10), wrong)[2] < worst[2]
    assert np.isnan(measures(np.arange(3.0), np.ones(3, bool))).all()


def test_intervals_cover_one_half_where_a_signal_is_about_entities_but_not_about_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three answers an entity, which are wrong together and have one count. Twin: items taken as independent cover far less often."""
    monkeypatch.setattr(cooccurrence, "DRAWS", 100)
    draw = np.random.default_rng(0)
    by_entity = by_item = 0
    trials = 24
    for _ in range(trials):
        wrong = np.repeat(draw.random(40) < 0.4, 3)
        doubt = {"count": np.repeat(draw.standard_normal(40), 3)}
        for names, is_entity in ((np.repeat(np.arange(40), 3).astype(str), True), (np.arange(120).astype(str), False)):
            found = compare(doubt, wrong, names.tolist(), "count")["count"].auroc
            covered = found[1] <= 0.5 <= found[2]
            by_entity += covered and is_entity
            by_item += covered and not is_entity
    assert by_entity / trials >= 0.8
    assert by_item < by_entity


def test_a_planted_difference_between_two_signals_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cooccurrence, "DRAWS", 100)
    draw = np.random.default_rng(1)
    wrong = draw.random(300) < 0.3
    doubt = {"count": 2.0 * wrong + draw.standard_normal(300), "confidence": 0.2 * wrong + draw.standard_normal(300)}
    entities = [str(number) for number in range(300)]
    found = compare(doubt, wrong, entities, "confidence")
    assert found["count"].against[1] > 0
    assert found["confidence"].against == (0.0, 0.0, 0.0)
    none = compare({"count": doubt["confidence"].copy(), "confidence": doubt["confidence"]}, wrong, entities, "confidence")
    assert none["count"].against == (0.0, 0.0, 0.0)  # twin
