import pytest
import torch

from proxytune.errors import UserError
from proxytune.mixture import Context, Mixture, Rule, check_mixture, combine, proxy_tuning


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
        check_mixture(mixture, ["base", "expert"], 11)


HUGE = (1e30, 1e38, 3e38, 1e39, 1e300)


def place_of(logits: dict[str, torch.Tensor]) -> Context:
    return Context(logits, torch.arange(4), torch.arange(4), 4)


def extreme(kind: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Logits of which some are the largest and the least that a type can hold, and some are forbidden."""
    logits = {name: law.to(kind) for name, law in laws(seed).items()}
    for shift, law in enumerate(logits.values()):
        law[:, shift] = torch.finfo(kind).max
        law[:, shift + 3] = torch.finfo(kind).min
        law[:, shift + 6] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [*HUGE, -1e38, 1.0, 0.5])
def test_no_size_of_coefficient_or_logit_makes_nan_or_infinity(alpha: float, kind: torch.dtype) -> None:
    at_limit = {name: law.masked_fill(law.isneginf(), 0) for name, law in extreme(kind).items()}
    signs, most = torch.tensor([1.0, -1.0, 0.0, 1.0]), min(alpha, 3e38)  # beyond that the function itself would give inf * 0
    mixtures: list[Mixture] = [
        proxy_tuning(alpha),
        {"base": 1e38, "expert": alpha, "antiexpert": -3e38},
        proxy_tuning(lambda place: most * signs),
        {"base": lambda place: most * signs, "expert": 1.0},
        Rule(proxy_tuning(alpha), plausible=("base", 0.1)),
        Rule({"base": 0.0, "expert": 1.0}, space="probabilities"),
        Rule({"base": lambda place: signs.abs(), "expert": lambda place: 1 - signs.abs()}, space="probabilities"),
    ]
    for logits in (laws(), at_limit, extreme(kind)):
        for mixture in mixtures:
            mixed = combine(logits, mixture, place_of(logits))
            assert not (mixed.isnan() | mixed.isposinf()).any()
            assert not mixed.log_softmax(-1).isnan().any()


@pytest.mark.parametrize("alpha", HUGE)
def test_a_huge_coefficient_keeps_the_signs_and_what_is_forbidden(alpha: float) -> None:
    logits = laws()
    logits["base"][:, 3] = -torch.inf
    logits["antiexpert"][:, 5] = logits["expert"][:, 5]
    mixed = combine(logits, proxy_tuning(alpha))
    expected = (logits["expert"] - logits["antiexpert"]).sign()
    others = [place for place in range(11) if place not in (3, 5)]
    assert torch.equal(mixed[:, others].sign(), expected[:, others])
    assert mixed[:, 3].isneginf().all()
    assert torch.equal(mixed[:, 5], logits["base"][:, 5])


def test_a_member_that_is_broken_stays_so() -> None:
    """The negative twin: saturation must not turn the infinity or NaN of a member into a firm preference."""
    for value in (torch.inf, torch.nan):
        logits = laws()
        logits["expert"][0, 2] = value
        broken = combine(logits, proxy_tuning(1.0)).log_softmax(-1).isnan().any(-1)
        assert broken.tolist() == [True, False, False, False]


def plainly(logits: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """The formula as it was before large values were saturated."""
    forbidden = logits["antiexpert"].isneginf()

    def lowest(law: torch.Tensor) -> torch.Tensor:
        return torch.where(law.isneginf(), torch.inf, law).amin(-1, keepdim=True)

    both = forbidden & logits["expert"].isneginf()
    plus = torch.where(both, lowest(logits["expert"]), logits["expert"])
    return logits["base"] + alpha * (plus - torch.where(forbidden, lowest(logits["antiexpert"]), logits["antiexpert"]))


@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1.0, 1.7, 1e4])
def test_ordinary_values_have_the_bits_of_the_plain_formula(alpha: float) -> None:
    for seed in range(5):
        logits = laws(seed)
        assert torch.equal(combine(logits, proxy_tuning(alpha)), plainly(logits, alpha))
        logits["base"][1, 3] = logits["expert"][2, 4] = logits["antiexpert"][2:, 4] = -torch.inf
        mixed = combine(logits, proxy_tuning(alpha))
        assert torch.equal(mixed, plainly(logits, alpha))
        # One token that overflows leaves the bits of all others.
        logits["expert"][3, 0] = 3e38
        one = combine(logits, {"base": 1.0, "expert": 10.0, "antiexpert": -10.0})
        other = plainly(logits, 10.0)
        assert torch.equal(one[other.isfinite()], other[other.isfinite()])
        assert one[3, 0] == torch.finfo(torch.float32).max


def test_an_integer_beyond_every_float_is_refused_as_no_finite_number() -> None:
    with pytest.raises(UserError, match="coefficient of 'base' must be a finite number"):
        check_mixture({"base": 10**400}, ["base"], 11)
