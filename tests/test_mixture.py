import pytest
import torch

from proxytune import UserError, combine, proxy_tuning
from proxytune.mixture import check_mixture


def laws(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 11, generator=generator) for name in ("base", "expert", "antiexpert")}


def test_is_the_weighted_sum() -> None:
    logits = laws()
    expected = logits["base"] + 0.6 * (logits["expert"] - logits["antiexpert"])
    torch.testing.assert_close(combine(logits, proxy_tuning(0.6)), expected)
    torch.testing.assert_close(
        combine(logits, {"base": 0.5, "expert": 2, "antiexpert": -0.3}), 0.5 * logits["base"] + 2 * logits["expert"] - 0.3 * logits["antiexpert"]
    )


def test_alpha_zero_is_the_base_bitwise() -> None:
    logits = laws()
    assert torch.equal(combine(logits, proxy_tuning(0.0)), logits["base"])
    assert not torch.equal(combine(logits, proxy_tuning(1e-3)), logits["base"])


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_equal_expert_and_antiexpert_leave_the_base_bitwise(alpha: float) -> None:
    logits = laws()
    logits["antiexpert"] = logits["expert"].clone()
    assert torch.equal(combine(logits, proxy_tuning(alpha)), logits["base"])
    # The plain left-to-right sum would not: the pairing is what keeps the bits.
    assert not torch.equal(logits["base"] + alpha * logits["expert"] - alpha * logits["antiexpert"], logits["base"])


@pytest.mark.parametrize(
    "forbidding", [["base"], ["expert"], ["antiexpert"], ["base", "antiexpert"], ["expert", "antiexpert"], ["base", "expert", "antiexpert"]]
)
@pytest.mark.parametrize("alpha", [0.5, 1.0, -1.0])
def test_minus_infinity_never_makes_nan(forbidding: list[str], alpha: float) -> None:
    logits = laws()
    for name in forbidding:
        logits[name][:, 3] = -torch.inf
    mixed = combine(logits, proxy_tuning(alpha))
    assert not mixed.isnan().any()
    assert not mixed.isposinf().any()
    assert mixed.log_softmax(-1).exp().sum(-1) == pytest.approx([1.0] * 4, abs=1e-5)
    if "base" in forbidding:
        assert mixed[:, 3].isneginf().all()


def test_the_naive_sum_makes_nan_there() -> None:
    logits = laws()
    logits["expert"][:, 3] = logits["antiexpert"][:, 3] = -torch.inf
    assert (logits["base"] + logits["expert"] - logits["antiexpert"]).isnan().any()


def test_a_token_both_small_models_forbid_keeps_the_base() -> None:
    logits = laws()
    logits["expert"][:, 3] = -torch.inf
    logits["antiexpert"] = logits["expert"].clone()
    assert torch.equal(combine(logits, proxy_tuning(1.0)), logits["base"])


@pytest.mark.parametrize("forbidding", [[], ["antiexpert"], ["expert", "antiexpert"]])
def test_a_constant_added_to_a_member_changes_nothing(forbidding: list[str]) -> None:
    logits = laws()
    for name in forbidding:
        logits[name][:, 3] = -torch.inf
    shifted = {"base": logits["base"] + 3, "expert": logits["expert"] - 5, "antiexpert": logits["antiexpert"] + 7}
    mixture = proxy_tuning(0.8)
    torch.testing.assert_close(combine(shifted, mixture).softmax(-1), combine(logits, mixture).softmax(-1), atol=1e-5, rtol=1e-5)


def test_low_precision_is_added_in_fp32() -> None:
    logits = {name: law.bfloat16() for name, law in laws().items()}
    mixed = combine(logits, proxy_tuning(0.3))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, combine({name: law.float() for name, law in logits.items()}, proxy_tuning(0.3)), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("mixture", "word"),
    [
        ({"base": 1, "expert": float("nan")}, "finite"),
        ({"base": float("inf")}, "finite"),
        ({"base": 1, "judge": 1}, "judge"),
        ({"base": 0, "expert": -1}, "positive"),
    ],
)
def test_bad_mixtures_are_refused(mixture: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_mixture(mixture, ["base", "expert"])
