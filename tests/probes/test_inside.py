"""What is read inside models: the right states, whatever the batch; densities, moments and drift by their slow definitions."""

import copy
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import SOME_ARCHITECTURES, VOCABULARY, make_model, make_tokenizer
from scipy.stats import entropy

from evals.statistics.estimates import contrast, estimate
from finetune.items import Item
from probes.density import METRICS, density, random_rotation
from probes.drift import cosine, divergence, weight_drift
from probes.inside import Inside, Prompts, read_inside
from probes.internals.activations import final_norm, last_and_subject, layers_of, read_states
from probes.internals.blocks import blocks_of, random_delta, thirds, weights_of
from probes.internals.moments import Moments
from probes.knowledge import candidates
from probes.knowledge.candidates import known
from probes.nulls import gaussian_null, untrained_twin
from proxytune.errors import UserError
from proxytune.member import Member


def some_prompts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (3 + index % 5,), generator=generator).tolist() for index in range(count)]


def asked(count: int = 24) -> Prompts:
    ids = some_prompts(count)
    return Prompts(ids, [[-1, 1]] * count, [3 + index for index in range(count)], [(1, -1, 0)[index % 3] for index in range(count)])


def member(architecture: str = "llama", seed: int = 0, layers: int = 3) -> Member:
    return Member(make_model(architecture, seed=seed, layers=layers), make_tokenizer())


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_state_k_is_the_output_of_layer_k(architecture: str) -> None:
    model, prompt = make_model(architecture, layers=3), some_prompts()[3]
    (states,) = read_states(model, [prompt], [[-1, 2]], batch_size=1, pad=0)
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), output_hidden_states=True)
        normed = final_norm(model)(states.residual[:, :, -1])
    assert states.residual.shape[2] == 4
    for place, token in enumerate((len(prompt) - 1, 2)):
        for number in range(3):
            torch.testing.assert_close(states.residual[0, place, number], output.hidden_states[number][0, token])
            assert not torch.allclose(states.residual[0, place, number], output.hidden_states[number + 1][0, token], atol=1e-2)
        torch.testing.assert_close(normed[0, place], output.hidden_states[3][0, token])  # there the last state is normed
    torch.testing.assert_close(states.logits[0], output.logits[0, -1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_attention_and_mlp_are_what_each_layer_adds(architecture: str) -> None:
    for states in read_states(make_model(architecture, layers=3), some_prompts(), [[-1]] * 12, batch_size=5, pad=0):
        torch.testing.assert_close(states.residual[:, :, 1:] - states.residual[:, :, :-1], states.attention + states.mlp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_readings_do_not_depend_on_batches_or_padding(architecture: str) -> None:
    pair = [member(architecture, 1), member(architecture, 2)]
    together, apart = (read_inside(pair, asked(), batch_size=size) for size in (24, 1))
    for one, other in zip(_numbers(together), _numbers(apart), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    with pytest.raises(AssertionError):  # the comparison sees the difference between two places
        np.testing.assert_allclose(together.cosine[:, 0], together.cosine[:, 1], atol=1e-5)


def _numbers(inside: Inside) -> Iterator[np.ndarray]:
    yield from inside.density.values()
    yield inside.log_probability
    yield inside.cosine
    for moments in inside.moments.values():
        yield moments.cka().numpy()
        yield moments.rankme("y").numpy() / 10


def test_a_caller_is_left_in_its_own_mode_between_batches() -> None:
    model = make_model()
    for _ in zip(*(read_states(model, some_prompts(), [[-1]] * 12, batch_size=5, pad=0) for _ in range(2)), strict=True):
        assert not torch.is_inference_mode_enabled()
    assert (torch.ones(2, requires_grad=True).sum() * 1).requires_grad


def test_an_architecture_of_unknown_parts_is_refused() -> None:
    model = make_model()
    del model.model.layers[0].mlp
    with pytest.raises(UserError, match="has none of mlp"):
        next(read_states(model, some_prompts(), [[-1]] * 12, batch_size=5, pad=0))
    del model.model.layers[0]
    with pytest.raises(UserError, match="no list of its 2 layers"):
        layers_of(model)


def test_the_subjects_last_token_is_found() -> None:
    tokenizer = make_tokenizer()
    items = [Item(question="?", answer="w9", subject=subject) for subject in ("w5 w6", "w4", "w7")]
    prompts = ["w3 w5 w6 w8", "w4 w5", "w3 w7"]
    assert last_and_subject(tokenizer, items, prompts) == [[-1, 2], [-1, 0], [-1, 1]]
    assert last_and_subject(tokenizer, [*items, Item(question="?", answer="w9")], [*prompts, "w3"]) == [[-1]] * 4
    with pytest.raises(UserError, match="'w7' is not in"):
        last_and_subject(tokenizer, items[2:], ["w3 w8"])


def slow_density(vector: np.ndarray) -> dict[str, float]:
    size, energy = len(vector), np.sort(vector**2)[::-1]
    sizes = np.sort(np.abs(vector))
    result = {f"e{percent}": energy[: max(1, int(size * percent / 100))].sum() / energy.sum() for percent in (1, 5, 10)}
    result["effective_rank"] = np.exp(entropy(energy)) / size
    result["hoyer"] = (np.sqrt(size) - np.linalg.norm(vector, 1) / np.linalg.norm(vector)) / (np.sqrt(size) - 1)
    result["gini"] = np.abs(sizes[:, None] - sizes).mean() / (2 * sizes.mean())
    result["participation_ratio"] = energy.sum() ** 2 / (size * (energy**2).sum())
    return result


def test_densities_are_those_of_their_definitions() -> None:
    vectors = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)) ** 3
    found = density(vectors)
    assert tuple(found) == METRICS
    for place in np.ndindex(5, 3):
        for name, value in slow_density(vectors[place].double().numpy()).items():
            assert found[name][place].item() == pytest.approx(value, abs=1e-5), name


def test_densities_of_vectors_whose_density_is_known() -> None:
    single, equal = density(torch.eye(20)[:1]), density(torch.ones(1, 20))
    expected = {"e5": (1, 1 / 20), "effective_rank": (1 / 20, 1), "hoyer": (1, 0), "gini": (19 / 20, 0), "participation_ratio": (1 / 20, 1)}
    for name, (sparse, dense) in expected.items():
        assert single[name].item() == pytest.approx(sparse, abs=1e-5), name
        assert equal[name].item() == pytest.approx(dense, abs=1e-5), name


def test_densities_of_gaussian_vectors_are_the_published_null() -> None:
    for size, energy, rank in ((64, 0.257, 0.491), (256, 0.264, 0.484), (1024, 0.278, 0.482)):
        found = density(torch.randn(4000, size, generator=torch.Generator().manual_seed(0)))
        assert found["e5"].mean().item() == pytest.approx(energy, abs=0.002)
        assert found["effective_rank"].mean().item() == pytest.approx(rank, abs=0.003)


def test_rotation_is_orthogonal_and_keeps_only_what_is_not_of_the_basis() -> None:
    rotation = random_rotation(32, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-5, rtol=0)
    assert density(torch.eye(32)[:5] @ rotation)["effective_rank"].mean() > 0.3


def slow_dependence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Song et al.'s estimator from the kernels themselves."""
    count, one = len(x), torch.ones(len(x), dtype=torch.float64)
    kernels = [rows @ rows.T for rows in (x, y)]
    first, second = (kernel - kernel.diag().diag() for kernel in kernels)
    total = (one @ first @ one) * (one @ second @ one) / ((count - 1) * (count - 2))
    return torch.trace(first @ second) + total - 2 / (count - 2) * (one @ first @ second @ one)


def moments_of(x: torch.Tensor, y: torch.Tensor, size: int, origin: int = 3) -> Moments:
    moments = Moments((x[:origin].mean(0), y[:origin].mean(0)))
    for start in range(0, len(x), size):
        moments.add(x[start : start + size], y[start : start + size])
    return moments


def test_streamed_moments_are_those_of_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 8, generator=generator) + 30
    y = x @ torch.randn(8, 8, generator=generator) + torch.randn(60, 2, 8, generator=generator)
    streamed = moments_of(x, y, 7)
    halves = moments_of(x[:20], y[:20], 20).plus(_with_origin(moments_of(x, y, 60), x[20:], y[20:]))
    for state in range(2):
        rows = {"x": x[:, state].double(), "y": y[:, state].double()}
        slow = slow_dependence(rows["x"], rows["y"]) / (slow_dependence(rows["x"], rows["x"]) * slow_dependence(rows["y"], rows["y"])).sqrt()
        torch.testing.assert_close(streamed.cka()[state], slow, atol=1e-4, rtol=0)
        torch.testing.assert_close(halves.cka()[state], slow, atol=1e-4, rtol=0)
        for which, values in rows.items():
            torch.testing.assert_close(streamed.mean(which)[state], values.mean(0), atol=1e-5, rtol=0)
            torch.testing.assert_close(streamed.covariance(which)[state], torch.cov(values.T, correction=0), atol=1e-4, rtol=1e-5)
            singular = torch.linalg.svdvals(values - values.mean(0))
            assert streamed.rankme(which)[state].item() == pytest.approx(np.exp(entropy(singular)), rel=1e-4)


def _with_origin(like: Moments, x: torch.Tensor, y: torch.Tensor) -> Moments:
    moments = Moments((like.origin["x"], like.origin["y"]))
    moments.add(x, y)
    return moments


def test_cka_is_without_bias_and_one_for_equal_states() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [moments_of(*torch.randn(2, 20, 1, 64, generator=generator), 20).cka().item() for _ in range(20)]
    assert abs(np.mean(found)) < 0.05  # unrelated, with fewer rows than columns: the plain estimate is near .75 here
    x = torch.randn(20, 1, 64, generator=generator)
    assert moments_of(x, x, 6).cka().item() == 1.0
    assert moments_of(x, x @ torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]).float(), 6).cka().item() == (
        pytest.approx(1, abs=1e-5)
    )
    assert moments_of(x[:3], x[:3], 3).cka().isnan().all()


def test_gaussian_null_is_the_density_of_such_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2, 64, 64, generator=generator, dtype=torch.float64)
    mean = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    null = gaussian_null(mean, spread @ spread.mT)
    drawn = density(mean + torch.einsum("sij,nsj->nsi", spread, torch.randn(3000, 2, 64, generator=generator, dtype=torch.float64)))
    for metric in METRICS:
        np.testing.assert_allclose(null[metric]["mean"], drawn[metric].mean(0), atol=4 * drawn[metric].std().item() / 1000**0.5)
        np.testing.assert_allclose(null[metric]["sd"], drawn[metric].std(0), rtol=0.15)


def test_untrained_twin_has_the_shape_and_none_of_the_weights() -> None:
    model = make_model(seed=5)
    twin = untrained_twin(model)
    assert [(name, value.shape) for name, value in twin.named_parameters()] == [(name, value.shape) for name, value in model.named_parameters()]
    assert not torch.equal(twin.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_identical_models_drift_by_exactly_nothing() -> None:
    model = member()
    inside = read_inside([model, Member(copy.deepcopy(model.model), model.tokenizer)], asked(), batch_size=5)
    alone = read_inside([model], asked(), batch_size=5)
    for name, values in inside.density.items():
        np.testing.assert_array_equal(values, alone.density[name])
    np.testing.assert_allclose(inside.cosine, 1, atol=1e-12)
    assert all((moments.cka() == 1).all() for moments in inside.moments.values())
    weights = weights_of(model.model)
    rows = weight_drift(weights, weights, blocks_of(model.model))
    assert {row["relative_change"] for row in rows} == {0.0}
    logits = torch.randn(6, 50)
    assert (divergence(logits, logits) == 0).all()


def test_drift_measures_are_those_of_their_definitions() -> None:
    one, other = (weights_of(make_model(seed=seed, layers=3)) for seed in (1, 2))
    for row in weight_drift(one, other, blocks_of(make_model(layers=3))):
        before, change = one[str(row["matrix"])].double(), (other[str(row["matrix"])] - one[str(row["matrix"])]).double()
        assert row["relative_change"] == pytest.approx((change.norm() / before.norm()).item())
        if change.ndim == 2:
            singular = torch.linalg.svdvals(change)
            assert row["stable_rank"] == pytest.approx((singular.square().sum() / singular[0] ** 2).item(), rel=0.02)
    logits = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0))
    laws = logits.softmax(-1).double().numpy()
    np.testing.assert_allclose(divergence(*logits), [entropy(p, q) for p, q in zip(*laws, strict=True)], rtol=1e-4)
    assert not np.allclose(divergence(*logits), divergence(*logits.flip(0)))  # it is of one and not of the other
    assert cosine(torch.eye(3)[0], torch.tensor([1.0, 1.0, 0.0])).item() == pytest.approx(2**-0.5)


@pytest.mark.parametrize("block", ["low", "middle", "high"])
def test_noise_written_into_one_block_is_localised(block: str) -> None:
    """States below the block stay as they are, those from its first layer on do not; drift finds its matrices, erosion its states."""
    layers = thirds(6)[block]
    for seed in range(3):
        base = member(seed=seed, layers=6)
        harmed = Member(copy.deepcopy(base.model), base.tokenizer)
        with torch.no_grad():
            for number in layers:
                for parameter in layers_of(harmed.model)[number - 1].parameters():
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        rows = weight_drift(weights_of(base.model), weights_of(harmed.model), blocks_of(base.model))
        assert {row["block"] for row in rows if row["relative_change"]} == {block}
        before, after = read_inside([base], asked(), batch_size=24), read_inside([base, harmed], asked(), batch_size=24)
        change = after.density["effective_rank/residual"] - before.density["effective_rank/residual"]
        changed = np.abs(change).max(axis=(0, 1))
        assert (changed[: layers[0]] == 0).all()
        assert (changed[layers[0] :] > 0).all()
        assert all((moments.cka() == 1).tolist() == [state < layers[0] for state in range(7)] for moments in after.moments.values())
        np.testing.assert_array_equal(np.abs(after.cosine - 1).max(axis=(0, 1)) < 1e-9, [state < layers[0] for state in range(7)])


def test_two_initialisations_differ_by_no_more_than_their_interval_says() -> None:
    """What tells no familiar from unfamiliar apart must have intervals around zero in about 95 of 100 cases."""
    outside, cases = 0, 0
    generator = np.random.default_rng(0)
    prompts = Prompts(some_prompts(120), [[-1]] * 120, [3] * 120, [0] * 120)
    frame = _frame(120, generator)
    for seed in range(6):
        one, other = (read_inside([member(seed=seed + shift)], prompts, batch_size=60) for shift in (10, 30))
        change = (other.density["effective_rank/residual"] - one.density["effective_rank/residual"])[:, 0, 1:]
        found = estimate([contrast(frame, change)])
        low, high = np.quantile(found.draws, [0.025, 0.975], axis=1)
        outside, cases = outside + int(((low > 0) | (high < 0)).sum()), cases + len(low)
    assert outside <= 0.2 * cases
    planted = estimate([contrast(frame, change + 0.1 * (frame["popularity"] > 1).to_numpy()[:, None])])  # the twin: an effect is found
    assert (np.quantile(planted.draws, 0.025, axis=1) > 0).all()


def _frame(count: int, generator: np.random.Generator) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "unit": [f"u{index}" for index in range(count)],
            "popularity": generator.permutation([float(index % 3) for index in range(count)]),
            "length": [1] * count,
            "last_token": [1] * count,
        }
    )


def test_random_deltas_change_states_as_little_as_a_tuning_of_their_size() -> None:
    base = member(seed=1)
    tuned = {name: value + 0.01 * value for name, value in weights_of(base.model).items()}
    noisy = Member(copy.deepcopy(base.model), base.tokenizer)
    noisy.model.load_state_dict(random_delta(weights_of(base.model), tuned, 0), strict=False)
    rows = weight_drift(weights_of(base.model), weights_of(noisy.model), blocks_of(base.model))
    assert all(row["relative_change"] == pytest.approx(0.01, rel=1e-3) for row in rows)
    assert 0 < (1 - read_inside([base, noisy], asked(), batch_size=8).cosine).max() < 0.05


def test_one_pass_of_single_tokens_knows_what_scoring_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        Item(question="?", answer=f"w{index}", statement=f"w3 w{index + 5}", choices=(f"w{index + 2}", f"w{index}", "w40")) for index in range(5, 30)
    ]
    model = member()
    at_once = known(model, items, batch_tokens=7)
    monkeypatch.setattr(candidates, "_at_once", candidates._scored)
    scored = known(model, items)
    np.testing.assert_array_equal(at_once.right, scored.right)
    np.testing.assert_allclose(at_once.probability, scored.probability, atol=1e-5)
    assert 0 < at_once.right.mean() < 1
    with pytest.raises(UserError, match="needs a statement and choices"):
        known(model, [Item(question="?", answer="w4", statement="w3", choices=("w5",))])
