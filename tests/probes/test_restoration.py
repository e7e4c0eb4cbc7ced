"""Restoring blocks of a tuned model: what is written is exact, and what was planted in a block is found there."""

import copy
import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers import VOCABULARY, equal, flat, items_about, make_model, member_of, noisy, tied
from torch import Tensor
from transformers import PreTrainedModel

from probes import restoration as restoration_module
from probes.drift import divergence
from probes.internals.blocks import BLOCKS, blocks_of, put, weights_of
from probes.knowledge.candidates import known
from probes.restoration import SHARES, block_label, count_evaluations, damage, recovery, restorations, restore, shapley
from proxytune import Member

EVERYTHING = block_label(BLOCKS)
TINY = {"layers": 3, "hidden": 16}


def fidelity(base: PreTrainedModel, prompts: int = 24) -> Callable[[Member], dict[str, np.ndarray]]:
    """Minus the divergence from the base's law after random prompts: nought for the base itself, and never more."""
    ids = torch.randint(3, VOCABULARY, (prompts, 5), generator=torch.Generator().manual_seed(0))

    def logits(model: PreTrainedModel) -> Tensor:
        with torch.inference_mode():
            return model(ids).logits[:, -1]

    law = logits(base)
    return lambda of: {"fidelity": -divergence(law, logits(of.model)).numpy()}


def capture(of: Member) -> dict[str, Tensor]:
    return weights_of(of.model)


def values_of(results: dict[str, dict[str, np.ndarray]], name: str = "fidelity") -> dict[str, np.ndarray]:
    return {label: result[name] for label, result in results.items()}


# Restoration: what is written


@pytest.fixture(scope="module")
def pair() -> tuple[Member, Member]:
    """A base and a model in which all blocks but `middle` were tuned, `unembedding` and `high` most."""
    base = make_model(layers=3)
    sizes = {"embeddings": 0.05, "low": 0.1, "high": 0.2, "unembedding": 0.3}
    return member_of(base), member_of(noisy(base, sizes))


@pytest.fixture(scope="module")
def written(pair: tuple[Member, Member]) -> dict[str, dict[str, Tensor]]:
    return restore(*pair, restorations(*pair), capture)


def test_blocks_are_the_bases_and_the_rest_is_the_tuned_models(pair: tuple[Member, Member], written: dict[str, dict[str, Tensor]]) -> None:
    base, tuned = (weights_of(one.model) for one in pair)
    blocks = blocks_of(pair[0].model)
    assert equal(written[EVERYTHING], base)
    assert equal(written["blocks/none"], tuned)
    for label, chosen in (("blocks/low", ["low"]), ("blocks/embeddings+high", ["embeddings", "high"]), ("blocks/middle+high", ["middle", "high"])):
        restored = {name for block in chosen for name in blocks[block]}
        assert equal(written[label], {name: base[name] if name in restored else tuned[name] for name in base})
    assert len([label for label in written if label.startswith("blocks/")]) == 32


def test_equal_restorations_are_measured_once_and_progress_counts_them(pair: tuple[Member, Member]) -> None:
    plan = restorations(*pair)
    done: list[int] = []
    results = restore(*pair, plan, lambda of: object(), progress=done.append)
    # Four blocks changed: 16 subsets, and the controls of three or four of them.
    controls = [label for label in plan if label.startswith("same-")]
    assert sum(done) == len(done) == count_evaluations(plan) == 16 + 2 * len(SHARES) + len(controls)
    assert results["blocks/low"] is results["blocks/low+middle"]
    assert results["blocks/low"] is not results["blocks/high"]


def test_the_top_share_is_what_changed_most_and_the_random_one_is_as_large(
    pair: tuple[Member, Member], written: dict[str, dict[str, Tensor]]
) -> None:
    base, tuned = (flat(weights_of(one.model)) for one in pair)
    change = (tuned - base).abs()
    for percent in SHARES:
        number = round(len(change) * percent / 100)
        restored = flat(written[f"top/{percent}"]) != tuned
        assert restored.sum() == min(number, int((change > 0).sum()))
        assert change[restored].min() >= change[~restored].max()
        drawn = flat(written[f"random/{percent}"]) != tuned
        # Drawn from all parameters, of which only some had changed.
        assert drawn.sum().item() == pytest.approx(number * (change > 0).double().mean().item(), rel=0.15)
        assert torch.equal(flat(written[f"random/{percent}"])[drawn], base[drawn])
        if percent < 60:
            assert change[drawn].mean() < change[restored].mean()


def test_draws_are_exact_in_number_and_outside_their_block() -> None:
    base = make_model(layers=3)
    pair = member_of(base), member_of(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
    written = restore(*pair, restorations(*pair, seed=2), capture)
    own, origin = (weights_of(one.model) for one in reversed(pair))
    change = {name: (own[name] - origin[name]).double() for name in own}
    blocks = blocks_of(base)
    for block in BLOCKS:
        inside = blocks[block]
        restored = {kind: {name: written[f"{kind}/{block}"][name] != own[name] for name in own} for kind in ("same-number", "same-norm")}
        for masks in restored.values():
            assert not any(masks[name].any() for name in inside)
            assert len([name for name in own if masks[name].any()]) > (len(own) - len(inside)) / 2
        assert sum(int(mask.sum()) for mask in restored["same-number"].values()) == sum(own[name].numel() for name in inside)
        wanted = sum(float(change[name].square().sum()) for name in inside)
        squares = torch.cat([change[name][mask].square() for name, mask in restored["same-norm"].items()])
        assert wanted <= squares.sum().item() < wanted + max(float(values.square().max()) for values in change.values())
    for percent in SHARES:
        drawn = flat(written[f"random/{percent}"]) != flat(own)
        assert drawn.sum() == round(len(drawn) * percent / 100)
    other = restore(*pair, {"random/5": restorations(*pair, seed=3)["random/5"]}, capture)
    assert not equal(other["random/5"], written["random/5"])


def test_of_equal_changes_no_more_are_restored_than_asked_for() -> None:
    """Trap: in half precision a few sizes of change are shared by all parameters."""
    base = make_model()
    tuned = copy.deepcopy(base)
    put(tuned, {name: torch.zeros_like(value) + 0.25 for name, value in weights_of(tuned).items()})
    put(base, {name: torch.zeros_like(value) for name, value in weights_of(base).items()})
    pair = member_of(base), member_of(tuned)
    plan = restorations(*pair)
    written = restore(*pair, {"top/5": plan["top/5"]}, capture)
    restored = flat(written["top/5"]) == 0
    assert restored.sum() == round(len(restored) * 0.05)


def test_what_outside_has_no_match_for_has_no_control() -> None:
    base = make_model(layers=2)  # no middle block
    plan = restorations(member_of(base), member_of(noisy(base, {"low": 0.01, "high": 1.0})))
    assert {label for label in plan if label.startswith("same-")} == {"same-number/low", "same-norm/low", "same-number/high"}
    wide = make_model("gpt2", rows=2000)  # more than half of its parameters are embeddings
    plan = restorations(member_of(wide), member_of(noisy(wide, {"embeddings": 0.01, "low": 1.0})))
    assert {label for label in plan if label.startswith("same-")} == {"same-norm/embeddings", "same-number/low"}


def test_thresholds_from_a_sample_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(layers=3)
    pair = member_of(base), member_of(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
    exact = restore(*pair, restorations(*pair), capture)
    monkeypatch.setattr(restoration_module, "SAMPLE", 6000)  # of 34,000
    sampled = restore(*pair, restorations(*pair), capture)
    own, origin = flat(weights_of(pair[1].model)), flat(weights_of(pair[0].model))
    change = (own - origin).square()
    for label in ("top/10", "top/40", "random/10", "random/40", "same-number/low", "same-norm/low"):
        masks = [flat(results[label]) != own for results in (exact, sampled)]
        assert masks[0].sum().item() == pytest.approx(masks[1].sum().item(), rel=0.1), label
        assert change[masks[0]].sum().item() == pytest.approx(change[masks[1]].sum().item(), rel=0.1), label
        assert not torch.equal(*masks)


@pytest.mark.parametrize("tie", [True, False])
def test_the_tuned_model_is_itself_again(tie: bool) -> None:
    base = tied("llama", tie)
    pair = member_of(base), member_of(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
    before, base_before, fingerprint = weights_of(pair[1].model), weights_of(base), pair[1].fingerprint
    plan = restorations(*pair)
    seen: list[str] = []

    def measure(of: Member) -> str:
        seen.append(of.fingerprint)
        if len(seen) == 40:
            raise RuntimeError("out of memory")
        return of.fingerprint

    with pytest.raises(RuntimeError, match="out of memory"):
        restore(*pair, plan, measure)
    assert equal(weights_of(pair[1].model), before)
    results = restore(*pair, plan, measure)
    assert equal(weights_of(pair[1].model), before)
    assert equal(weights_of(base), base_before)
    # Trap: a member remembers its fingerprint; that of every measurement is of the weights that were measured.
    assert results["blocks/none"] == fingerprint
    assert results[EVERYTHING] == member_of(base).fingerprint
    assert len(set(results.values())) == count_evaluations(plan)
    assert (pair[1].model.get_input_embeddings().weight is pair[1].model.get_output_embeddings().weight) == tie


# Restoration: what is found


def test_identical_models_give_exactly_zero() -> None:
    base = make_model(layers=3)
    plan = restorations(member_of(base), member_of(copy.deepcopy(base)))
    assert count_evaluations(plan) == 1
    values = values_of(restore(member_of(base), member_of(copy.deepcopy(base)), plan, fidelity(make_model(seed=9, layers=3))))
    assert np.all(values["blocks/none"] < -0.01)  # the measure itself is far from nought
    for found in (shapley(values), recovery(values), damage(values)):
        assert tuple(found) == BLOCKS
        assert all(np.all(of_block == 0) for of_block in found.values())
    for label, of_label in values.items():
        assert np.array_equal(of_label, values["blocks/none"]), label


def test_a_block_that_did_not_change_has_exactly_no_share() -> None:
    base = make_model(layers=3)
    pair = member_of(base), member_of(noisy(base, {"low": 0.2, "high": 0.2}))
    plan = {label: one for label, one in restorations(*pair).items() if label.startswith("blocks/")}
    assert count_evaluations(plan) == 4
    found = shapley(values_of(restore(*pair, plan, fidelity(base))))
    assert {block for block in BLOCKS if np.any(found[block] != 0)} == {"low", "high"}


def drawn_values(seed: int = 0, items: int = 7) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    subsets = [[block for place, block in enumerate(BLOCKS) if number >> place & 1] for number in range(32)]
    return {block_label(subset): generator.normal(size=items) for subset in subsets}


def test_shapley_values_are_the_average_over_all_orders() -> None:
    values = drawn_values()
    slow = {block: np.zeros(7) for block in BLOCKS}
    for order in permutations(BLOCKS):
        for place, block in enumerate(order):
            slow[block] += (values[block_label(order[: place + 1])] - values[block_label(order[:place])]) / math.factorial(5)
    found = shapley(values)
    for block in BLOCKS:
        np.testing.assert_allclose(found[block], slow[block], atol=1e-12, rtol=0)
    total = values[EVERYTHING] - values["blocks/none"]
    np.testing.assert_allclose(np.sum(list(found.values()), axis=0), total, atol=1e-12, rtol=0)
    assert np.abs(np.sum(list(recovery(values).values()), axis=0) - total).max() > 0.1  # which do not sum to it


def test_what_needs_two_blocks_is_shared_and_neither_recovered_nor_undamaged() -> None:
    values = {label: np.array(["low" in label and "high" in label]) for label in drawn_values()}
    assert {block: share.item() for block, share in shapley(values).items() if share.item()} == pytest.approx({"low": 0.5, "high": 0.5})
    assert all(share.item() == 0 for share in recovery(values).values())
    assert {block for block, share in damage(values).items() if share.item() == 1} == {"low", "high"}


def largest_shares(sizes: dict[str, float]) -> list[str]:
    """Of ten models with noise of these sizes, the block that has the largest Shapley value in each."""
    found = []
    for seed in range(10):
        base = make_model(seed=seed, **TINY)
        pair = member_of(base), member_of(noisy(base, sizes, seed=100 + seed))
        plan = {label: one for label, one in restorations(*pair).items() if label.startswith("blocks/")}
        shares = {block: share.mean() for block, share in shapley(values_of(restore(*pair, plan, fidelity(base)))).items()}
        found.append(max(shares, key=shares.__getitem__))
    return found


@pytest.mark.parametrize("planted", ["low", "middle", "high"])
def test_noise_planted_in_a_block_is_found_there(planted: str) -> None:
    """Positive control, on a background of weaker noise in all other blocks."""
    assert largest_shares(dict.fromkeys(BLOCKS, 0.02) | {planted: 0.2}).count(planted) >= 9


def test_equal_noise_is_found_lowest_down() -> None:
    """The control's twin: without more noise there, middle and high are not found. Trap: low is, and needs a null beside it."""
    found = largest_shares(dict.fromkeys(BLOCKS, 0.02))
    assert found.count("middle") + found.count("high") <= 2
    assert found.count("low") + found.count("embeddings") >= 8


def test_what_is_measured_of_all_blocks_is_the_base_and_of_none_the_tuned_model(pair: tuple[Member, Member]) -> None:
    items = items_about()
    results = restore(*pair, restorations(*pair), lambda of: known(of, items)._asdict())
    for label, one in ((EVERYTHING, pair[0]), ("blocks/none", pair[1])):
        np.testing.assert_array_equal(results[label]["probability"], known(one, items).probability)
    assert not np.array_equal(results[EVERYTHING]["probability"], results["blocks/none"]["probability"])
    found = shapley({label: result["right"] for label, result in results.items()})  # flags, not numbers
    total = results[EVERYTHING]["right"].astype(float) - results["blocks/none"]["right"]
    np.testing.assert_allclose(np.sum(list(found.values()), axis=0), total, atol=1e-12)
