"""What was hidden comes back sooner than what was never there; what is unchanged needs nothing; what was never learnt saves nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.items import Item
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import tune
from probes.knowledge.candidates import Known, known
from probes.recoverability import FORGOTTEN, NEVER, UNRELATED, Curve, Relearning, brought_back, log_steps, relearn, savings, spurious, steps_to
from probes.world.family import find_family
from probes.world.ledger import items_of
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_member, load_members
from proxytune.prepacked import PrepackedLinear

# --- the shipped world, whose base knows most facts that were stated 60 times and none that never was ---


@pytest.fixture(scope="module")
def family() -> Path:
    folder = find_family("default", 0, Path())
    assert folder is not None
    return folder


def facts(family: Path, part: str, people: dict[int, int]) -> list[Item]:
    """Three of each of so many people, by how often they were stated."""
    found, counts = [], Counter[float]()
    for item in items_of(pd.read_parquet(family / "ledger.parquet"), part):
        if item.popularity is not None and counts[item.popularity] < 3 * people.get(int(item.popularity), 0):
            counts[item.popularity] += 1
            found.append(item)
    return found


@pytest.fixture(scope="module")
def base(family: Path) -> tuple[Member, list[Item], Known]:
    member, items = load_member(family / "base"), facts(family, "test", {0: 8, 60: 16})
    return member, items, known(member, items)


def curves_of(member: Member, base: tuple[Member, list[Item], Known], **options: Any) -> dict[str, Curve]:
    settings = {"learning_rate": 1e-3, "steps": 16, "batch_size": 24, "ending": " .", "seed": 0} | options
    return relearn(member, base[1], base[2], Relearning(**settings))


def test_an_unchanged_model_has_nothing_to_relearn(base: tuple[Member, list[Item], Known]) -> None:
    curves = curves_of(base[0], base)
    for curve in curves.values():
        assert np.allclose(curve.probability[0], base[2].probability[curve.indices], atol=1e-6)
    assert curves[FORGOTTEN].right[0].mean() > 0.95
    assert savings(curves, base[2]) == (None, "exact", 0.0, 0.0)
    assert spurious(curves, base[1], base[2]) is None


def test_what_was_hidden_returns_sooner_than_new_facts_and_by_itself(base: tuple[Member, list[Item], Known], family: Path, tmp_path: Path) -> None:
    """Other people are all said to have the first of the candidates: a habit that overlays what is known and erases none of it."""
    habit = [Item(question=str(item.statement), answer=item.choices[0]) for item in facts(family, "tune", {0: 8, 60: 8})]
    recipe = Tuning(method="full", learning_rate=1e-3, epochs=5, batch_size=16)
    tune(TuningRun(family / "base", habit, recipe, prompt="{question}", ending=" .", seed=0, out=tmp_path / "hidden"))
    curves = curves_of(load_member(tmp_path / "hidden"), base)
    assert curves[FORGOTTEN].right[0].mean() < 0.5
    found, share = savings(curves, base[2]), spurious(curves, base[1], base[2])
    assert found.value is not None
    assert found.value > 0.6
    assert share is not None
    assert share > 0.3


def test_what_was_never_learnt_saves_nothing_and_does_not_return(base: tuple[Member, list[Item], Known]) -> None:
    torch.manual_seed(0)
    untrained = Member(AutoModelForCausalLM.from_config(base[0].model.config).eval(), base[0].tokenizer)
    curves = curves_of(untrained, base, steps=128)
    found, share = savings(curves, base[2]), spurious(curves, base[1], base[2])
    assert found.value is not None
    assert abs(found.value) < 0.2
    assert share is not None
    assert abs(share) < 0.1


# --- how it is done, on random models ---


def random_items(never: int = 12) -> list[Item]:
    """Two items a unit; the first `never` were never stated."""
    choices = tuple(f"w{number}" for number in range(3, 9))
    return [
        Item(
            question="w3",
            statement=f"w{10 + number // 8} w{20 + number % 8}",
            answer=choices[number % 5],
            choices=choices,
            popularity=0 if number < never else 7,
            unit=f"unit {number // 2}",
        )
        for number in range(42)
    ]


def small(items: list[Item], seed: int = 0, **options: Any) -> dict[str, Curve]:
    member = options.pop("member", None) or Member(make_model(seed=2), make_tokenizer())
    right = options.pop("right", np.ones(len(items), bool))
    settings = {"learning_rate": 1e-2, "steps": 5, "batch_size": 4, "ending": "", "seed": seed} | options
    progress = settings.pop("progress", lambda _: None)
    return relearn(member, items, Known(right, np.zeros(len(items))), Relearning(**settings), progress)


def same(one: dict[str, Curve], other: dict[str, Curve]) -> bool:
    return all(
        one[name].indices == other[name].indices and np.array_equal(one[name].probability, other[name].probability)
        for name in one.keys() | other.keys()
    )


@pytest.fixture(scope="module")
def curves() -> dict[str, Curve]:
    return small(random_items())


def test_the_same_seed_gives_the_same_curves_and_nothing_stays(curves: dict[str, Curve], tmp_path: Path) -> None:
    member, steps = Member(make_model(seed=2), make_tokenizer()), list[int]()
    before = member.fingerprint
    assert same(curves, small(random_items(), member=member, scratch=tmp_path, progress=steps.append))
    assert not same(curves, small(random_items(), seed=1))
    del member.fingerprint
    assert member.fingerprint == before
    assert not list(tmp_path.iterdir())
    assert sum(steps) == 3 * 5


def test_both_curves_learn_as_many_items_and_the_unrelated_are_of_other_units(curves: dict[str, Curve]) -> None:
    items = random_items()
    popularities = {name: {items[index].popularity for index in curve.indices} for name, curve in curves.items()}
    assert popularities == {FORGOTTEN: {7.0}, NEVER: {0.0}, UNRELATED: {7.0}}
    assert len(curves[FORGOTTEN].indices) == len(curves[NEVER].indices) == 12
    shown = {index for index, item in enumerate(items) if item.popularity == 7} - set(curves[UNRELATED].indices)
    assert len(shown) == 10
    assert not {items[index].unit for index in shown} & {items[index].unit for index in curves[UNRELATED].indices}
    assert all(curve.steps == [0, 1, 2, 4, 5] and curve.right.shape == (5, len(curve.indices)) for curve in curves.values())


def test_a_step_of_the_curve_is_a_step_of_the_tuning(curves: dict[str, Curve], tmp_path: Path) -> None:
    """The last reading is that of the model which the same tuning leaves."""
    items = random_items()
    curve = curves[FORGOTTEN]
    measured = [items[index] for index in curve.indices]
    make_model(seed=2).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    sentences = [Item(question=str(item.statement), answer=item.answer) for item in measured]
    for out, epochs in (("all", 5 / 3), ("less", 4 / 3)):
        recipe = Tuning(method="full", learning_rate=1e-2, batch_size=4, epochs=epochs)
        tune(TuningRun(tmp_path / "start", sentences, recipe, prompt="{question}", ending="", seed=0, out=tmp_path / out))
    assert np.allclose(known(load_member(tmp_path / "all"), measured).probability, curve.probability[-1], atol=1e-6)
    assert not np.allclose(known(load_member(tmp_path / "less"), measured).probability, curve.probability[-1], atol=1e-3)


def test_where_everything_was_stated_facts_that_the_base_has_wrong_are_dealt_other_answers() -> None:
    items, right = random_items(never=0), np.arange(42) % 3 > 0
    curves = small(items, right=right, steps=64)
    assert set(curves[NEVER].indices) <= set(np.nonzero(~right)[0].tolist())
    assert curves[NEVER].right[-1].mean() > 0.9
    member = Member(make_model(seed=2), make_tokenizer())
    for name, true in ((FORGOTTEN, True), (NEVER, False)):
        before = known(member, [items[index] for index in curves[name].indices]).probability
        assert np.allclose(curves[name].probability[0], before, atol=1e-6) == true
    few = small(items, right=np.arange(42) > 8)
    assert set(few) == {FORGOTTEN, UNRELATED}
    assert savings(few, Known(np.ones(42, bool), np.zeros(42))).value is None


def test_adapters_on_packed_layers_are_tuned_as_what_they_are_together(tmp_path: Path) -> None:
    make_model(seed=2, hidden=256, layers=1).save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), settings).save_pretrained(tmp_path / "adapter")
    member = load_member(tmp_path / "plain", tmp_path / "adapter", prepacked=True)
    assert any(isinstance(module, PrepackedLinear) for module in member.model.modules())
    items, before = random_items(), member.fingerprint
    curve = small(items, member=member, steps=1)[FORGOTTEN]
    measured = [items[index] for index in curve.indices]
    assert np.allclose(curve.probability[0], known(member, measured).probability, atol=1e-4)
    assert not np.allclose(curve.probability[0], known(load_member(tmp_path / "plain"), measured).probability, atol=1e-2)
    assert any(isinstance(module, PrepackedLinear) for module in member.model.modules())
    del member.fingerprint
    assert member.fingerprint == before


def test_what_cannot_be_relearnt_is_refused(lora_family: Path) -> None:
    shared = load_members({name: Weights(str(lora_family / "small"), lora_family / name) for name in ("polite", "terse")})["polite"]
    with pytest.raises(UserError, match="member: its adapter is on weights that other members share"):
        small(random_items(), member=shared)
    with pytest.raises(UserError, match="knowledge: 12 items with exposure leave 2 to measure"):
        small(random_items(never=30))
    with pytest.raises(UserError, match="needs a statement and choices"):
        small([item.model_copy(update={"statement": None}) for item in random_items()])


# --- what is read off curves ---


def curve(*accuracies: float, steps: tuple[int, ...] = (0, 1, 2, 4, 8), items: int = 100) -> Curve:
    right = np.stack([np.arange(items) < round(accuracy * items) for accuracy in accuracies])
    return Curve(list(steps[: len(accuracies)]), list(range(items)), right, right.astype(float))


def test_steps_lie_on_a_straight_line_over_their_logarithm() -> None:
    accuracies = np.array([0.0, 0.2, 0.6, 0.6, 1.0])
    steps = [0, 1, 3, 7, 15]
    assert steps_to(steps, accuracies, 0.4) == pytest.approx(2**1.5 - 1)
    assert [steps_to(steps, accuracies, level) for level in (0.0, 0.2, 0.6, 1.0, 1.01)] == [0.0, 1.0, 3.0, 15.0, None]


def test_savings_are_bounded_where_the_budget_ends() -> None:
    base = Known(np.ones(100, bool), np.ones(100))
    quick, slow, never = curve(0, 0.5, 0.95, 1, 1), curve(0, 0, 0, 0, 0.95), curve(0, 0, 0, 0, 0.1)
    for forgotten, new, expected in (
        (quick, slow, (0.75, "exact", 2.0, 8.0)),
        (slow, quick, (-3.0, "exact", 8.0, 2.0)),
        (quick, never, (0.75, "at least", 2.0, None)),
        (never, quick, (-3.0, "at most", None, 2.0)),
        (never, never, (None, "exact", None, None)),
        (curve(1, 1, 1, 1, 1), curve(1, 1, 1, 1, 1), (None, "exact", 0.0, 0.0)),
    ):
        assert tuple(savings({FORGOTTEN: forgotten, NEVER: new}, base)) == pytest.approx(expected)


def test_what_was_never_lost_is_not_saved() -> None:
    base = Known(np.ones(100, bool), np.ones(100))
    hardly_lost, new = curve(0.9, 0.92, 0.95, 1, 1), curve(0, 0.05, 0.1, 0.5, 0.95)
    # New facts take 8 steps to the level and 1 to gain as much as was lost.
    assert tuple(savings({FORGOTTEN: hardly_lost, NEVER: new}, base)) == pytest.approx((-1.0, "exact", 2.0, 1.0))


def test_noise_brings_nothing_back_but_would_where_the_step_is_chosen_on_the_items_themselves() -> None:
    generator = np.random.default_rng(0)
    items = [item.model_copy(update={"unit": f"unit {number}"}) for number, item in enumerate(random_items()[:20])]
    fair, unfair = [], []
    for _ in range(400):
        right = generator.random((9, 20)) < 0.3
        noise = Curve(log_steps(128), list(range(20)), right, right.astype(float))
        fair.append(brought_back(noise, items).mean() - 0.3)
        unfair.append(right.mean(axis=1).max() - 0.3)
    assert abs(np.mean(fair)) < 3 * np.std(fair) / 20
    assert np.mean(unfair) > 0.1


def test_all_that_returns_is_spurious_and_half_is_half() -> None:
    items = [item.model_copy(update={"unit": f"unit {number}"}) for number, item in enumerate(random_items() * 3)][:100]
    base = Known(np.ones(100, bool), np.ones(100))
    assert spurious({UNRELATED: curve(0, 0.4, 1, 0.2, 0)}, items, base) == pytest.approx(1)
    assert spurious({UNRELATED: curve(0.2, 0.6, 0.4)}, items, base) == pytest.approx(0.5)
    assert spurious({UNRELATED: curve(0.2, 0.1, 0)}, items, base) == 0
    assert spurious({UNRELATED: curve(1, 1, 1)}, items, base) is None


def test_steps_are_doubled_up_to_the_last() -> None:
    assert [log_steps(steps) for steps in (1, 2, 8, 11)] == [[0, 1], [0, 1, 2], [0, 1, 2, 4, 8], [0, 1, 2, 4, 8, 11]]
