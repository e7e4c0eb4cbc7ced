import copy
import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, VOCABULARY, make_model, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from finetune.encoding import prompt_ids
from finetune.items import Item
from probes import restoration as restoration_module
from probes.drift import divergence
from probes.internals.activations import final_norm, layers_of, read_states
from probes.internals.blocks import BLOCKS, blocks_of, check_same_shape, put, random_delta, thirds, weights_of
from probes.knowledge.candidates import known
from probes.patching import patch_subject, replaced
from probes.restoration import SHARES, block_label, count_evaluations, damage, recovery, restorations, restore, shapley
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.padding import left_padded, positions_of
from proxytune.prepacked import PrepackedLinear

EVERYTHING = block_label(BLOCKS)
TINY = {"layers": 3, "hidden": 16}


def member(model: PreTrainedModel) -> Member:
    return Member(model, make_tokenizer())


def noisy(model: PreTrainedModel, sizes: dict[str, float], seed: int = 0) -> PreTrainedModel:
    """A copy with noise in the blocks named, in units of each matrix's own size."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    with torch.no_grad():
        for block, size in sizes.items():
            for name, parameter in result.named_parameters():
                if name in blocks[block]:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter += size * parameter.square().mean().sqrt() * noise
    return result


def tied(architecture: str, tie: bool) -> PreTrainedModel:
    config = copy.deepcopy(make_model(architecture, layers=4).config)
    config.tie_word_embeddings = tie
    return AutoModelForCausalLM.from_config(config).eval()


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


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


# Blocks


@pytest.mark.parametrize(("layers", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (4, (1, 2, 1)), (6, (2, 2, 2)), (32, (10, 12, 10))])
def test_thirds_part_the_layers(layers: int, sizes: tuple[int, ...]) -> None:
    parts = thirds(layers)
    assert tuple(map(len, parts.values())) == sizes
    assert [number for numbers in parts.values() for number in numbers] == list(range(1, layers + 1))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_block(architecture: str, tie: bool) -> None:
    model = tied(architecture, tie)
    blocks = blocks_of(model)
    assert tuple(blocks) == BLOCKS
    owner = {name: block for block, names in blocks.items() for name in names}
    assert sorted(name for names in blocks.values() for name in names) == sorted(weights_of(model))
    # The head's own matrix is counted where there is one, and never twice.
    head = [name for name in blocks["unembedding"] if model.get_parameter(name) is model.get_output_embeddings().weight]
    assert len(head) == (0 if tie else 1)
    assert sum(map(torch.numel, weights_of(model).values())) == sum(parameter.numel() for parameter in model.parameters())
    layers = [owner[name] for layer in layers_of(model) for name, parameter in model.named_parameters() if parameter is next(layer.parameters())]
    assert layers == ["low", "middle", "middle", "high"]
    if architecture == "gpt2":
        assert owner["transformer.wpe.weight"] == "embeddings"


def test_a_parameter_of_no_block_is_refused() -> None:
    model = make_model()
    model.base_model.bridge = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'model.bridge.weight' of LlamaForCausalLM is neither in its embeddings"):
        blocks_of(model)


def test_weights_are_copies_and_are_put_back() -> None:
    model = make_model()
    kept = weights_of(model)
    name = blocks_of(model)["low"][0]
    put(model, {name: kept[name] + 1})
    assert [other for other, value in weights_of(model).items() if not torch.equal(value, kept[other])] == [name]
    put(model, kept)
    assert equal(weights_of(model), kept)


def test_models_that_cannot_stand_for_each_other_are_refused() -> None:
    base = member(make_model())
    check_same_shape(base, member(make_model(seed=5)))
    with pytest.raises(UserError, match=r"tuned: 'model.layers.2.\S+' is .*float32, in the base missing"):
        check_same_shape(base, member(make_model(layers=3)))
    with pytest.raises(UserError, match=r"is \(50, 48\) of torch.float32, in the base \(50, 32\)"):
        check_same_shape(base, member(make_model(hidden=48)))
    with pytest.raises(UserError, match=r"of torch\.bfloat16, in the base"):
        check_same_shape(base, member(make_model().bfloat16()))
    adapted = make_model()
    adapted.base_model.layers[0].mlp.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="tuned: it has a LoRA adapter that is not merged"):
        check_same_shape(base, member(adapted))
    packed = make_model()
    packed.base_model.layers[0].mlp.up_proj = PrepackedLinear(torch.nn.Linear(32, 64))
    with pytest.raises(UserError, match="base: its layers are prepacked"):
        check_same_shape(member(packed), base)


def test_noise_of_the_null_is_as_large_as_the_change_matrix_by_matrix() -> None:
    model = make_model()
    base, tuned = weights_of(model), weights_of(noisy(model, {"low": 0.01, "high": 0.3}))
    null = random_delta(base, tuned, 3)
    for name in base:
        size = (tuned[name] - base[name]).norm().item()
        assert (null[name] - base[name]).norm().item() == pytest.approx(size, rel=1e-4)
    assert torch.equal(null["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    change, noise = flat(tuned) - flat(base), flat(null) - flat(base)
    assert abs(torch.nn.functional.cosine_similarity(change, noise, dim=0).item()) < 0.05
    again = random_delta(dict(reversed(base.items())), tuned, 3)
    assert equal(again, null)
    assert not equal(random_delta(base, tuned, 4), null)


# Restoration: what is written


@pytest.fixture(scope="module")
def pair() -> tuple[Member, Member]:
    """A base and a model in which all blocks but `middle` were tuned, `unembedding` and `high` most."""
    base = make_model(layers=3)
    sizes = {"embeddings": 0.05, "low": 0.1, "high": 0.2, "unembedding": 0.3}
    return member(base), member(noisy(base, sizes))


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
    pair = member(base), member(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
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
    pair = member(base), member(tuned)
    plan = restorations(*pair)
    written = restore(*pair, {"top/5": plan["top/5"]}, capture)
    restored = flat(written["top/5"]) == 0
    assert restored.sum() == round(len(restored) * 0.05)


def test_what_outside_has_no_match_for_has_no_control() -> None:
    base = make_model(layers=2)  # no middle block
    plan = restorations(member(base), member(noisy(base, {"low": 0.01, "high": 1.0})))
    assert {label for label in plan if label.startswith("same-")} == {"same-number/low", "same-norm/low", "same-number/high"}
    wide = make_model("gpt2", rows=2000)  # more than half of its parameters are embeddings
    plan = restorations(member(wide), member(noisy(wide, {"embeddings": 0.01, "low": 1.0})))
    assert {label for label in plan if label.startswith("same-")} == {"same-norm/embeddings", "same-number/low"}


def test_thresholds_from_a_sample_are_close(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(layers=3)
    pair = member(base), member(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
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
    pair = member(base), member(noisy(base, dict.fromkeys(BLOCKS, 0.1)))
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
    assert results[EVERYTHING] == member(base).fingerprint
    assert len(set(results.values())) == count_evaluations(plan)
    assert (pair[1].model.get_input_embeddings().weight is pair[1].model.get_output_embeddings().weight) == tie


# Restoration: what is found


def test_identical_models_give_exactly_zero() -> None:
    base = make_model(layers=3)
    plan = restorations(member(base), member(copy.deepcopy(base)))
    assert count_evaluations(plan) == 1
    values = values_of(restore(member(base), member(copy.deepcopy(base)), plan, fidelity(make_model(seed=9, layers=3))))
    assert np.all(values["blocks/none"] < -0.01)  # the measure itself is far from nought
    for found in (shapley(values), recovery(values), damage(values)):
        assert tuple(found) == BLOCKS
        assert all(np.all(of_block == 0) for of_block in found.values())
    for label, of_label in values.items():
        assert np.array_equal(of_label, values["blocks/none"]), label


def test_a_block_that_did_not_change_has_exactly_no_share() -> None:
    base = make_model(layers=3)
    pair = member(base), member(noisy(base, {"low": 0.2, "high": 0.2}))
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
        pair = member(base), member(noisy(base, sizes, seed=100 + seed))
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
    items = some_items()
    results = restore(*pair, restorations(*pair), lambda of: known(of, items)._asdict())
    for label, one in ((EVERYTHING, pair[0]), ("blocks/none", pair[1])):
        np.testing.assert_array_equal(results[label]["probability"], known(one, items).probability)
    assert not np.array_equal(results[EVERYTHING]["probability"], results["blocks/none"]["probability"])
    found = shapley({label: result["right"] for label, result in results.items()})  # flags, not numbers
    total = results[EVERYTHING]["right"].astype(float) - results["blocks/none"]["right"]
    np.testing.assert_allclose(np.sum(list(found.values()), axis=0), total, atol=1e-12)


# Patching


def some_items(count: int = 9) -> list[Item]:
    """Statements of several lengths about w7 or w8, whose name is in the middle."""
    drawn = torch.randint(10, VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    items = []
    for number, row in enumerate(drawn):
        before, after = (" ".join(f"w{word}" for word in words) for words in (row[: 1 + number % 2], row[1 : 2 + number % 3]))
        subject = f"w{7 + number % 2}"
        choices = tuple(f"w{3 + (number + other) % 6}" for other in range(4))
        items.append(Item(question=f"q{number}", answer=choices[2], choices=choices, statement=f"{before} {subject} {after}", subject=subject))
    return items


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_models_own_states_change_nothing(architecture: str) -> None:
    base = make_model(architecture, layers=3)
    found = patch_subject(member(base), member(copy.deepcopy(base)), some_items(), batch_size=4)
    np.testing.assert_array_equal(found.base, found.tuned)
    np.testing.assert_allclose(found.states, found.tuned[:, None].repeat(4, 1), atol=1e-6)
    other = patch_subject(member(make_model(architecture, seed=7, layers=3)), member(base), some_items(), batch_size=4)
    np.testing.assert_array_equal(other.tuned, found.tuned)
    assert np.abs(other.states[:, :-1] - other.tuned[:, None]).max(0).min() > 1e-3  # another model's do
    np.testing.assert_allclose(other.states[:, -1], other.tuned, atol=1e-6)  # unless no layer reads them any more


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_patching_does_not_depend_on_the_batch(architecture: str) -> None:
    pair = member(make_model(architecture, seed=7, layers=3)), member(make_model(architecture, layers=3))
    done: list[int] = []
    together, apart = (patch_subject(*pair, some_items(), batch_size=size, progress=done.append) for size in (9, 1))
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert done == [9] + 9 * [1]


def test_state_0_is_what_the_embeddings_give() -> None:
    """Patched there, a model reads the base's embedding of the subject; by hand, it is given it."""
    base, tuned = make_model(seed=7, layers=3), make_model(layers=3)
    items = some_items()
    found = patch_subject(member(base), member(tuned), items, batch_size=3)
    tokenizer = make_tokenizer()
    for number, item in enumerate(items):
        ids = prompt_ids(tokenizer, str(item.statement))
        place = ids.index(tokenizer.convert_tokens_to_ids(item.subject))
        with torch.no_grad():
            embedded = tuned.get_input_embeddings()(torch.tensor([ids])).clone()
            embedded[0, place] = base.get_input_embeddings().weight[ids[place]]
            logits = tuned(inputs_embeds=embedded).logits[0, -1]
        candidates = tokenizer.convert_tokens_to_ids(list(item.choices))
        share = logits[candidates].softmax(0)[item.choices.index(item.answer)].item()
        assert found.states[number, 0] == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_bases_last_state_at_the_last_token_is_read_by_the_tuned_head(architecture: str) -> None:
    base, tuned = make_model(architecture, seed=7, layers=3), make_model(architecture, layers=3)
    prompts = [[5, 6, 7, 8], [9, 4]]
    (states,) = read_states(base, prompts, [[-1]] * 2, batch_size=2, pad=0)
    ids, mask = left_padded([prompts[index] for index in states.indices], 0, torch.device("cpu"))
    last = torch.tensor([3, 3])
    with torch.inference_mode(), replaced(tuned, 3, last, states.residual[:, 0, 3]):
        patched = tuned(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1]
    with torch.inference_mode():
        by_hand = tuned.get_output_embeddings()(final_norm(tuned)(states.residual[:, 0, 3]))
        unpatched = tuned(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1]
    torch.testing.assert_close(patched, by_hand, atol=1e-5, rtol=1e-5)
    assert (unpatched - by_hand).abs().max() > 0.1


def test_layers_may_return_tuples() -> None:
    tuned = make_model(layers=3)
    ids, vectors = torch.tensor([[5, 6, 7]]), torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), replaced(tuned, 2, torch.tensor([1]), vectors):
        plain = tuned(ids).logits
    layer = layers_of(tuned)[1]
    wrapping = layer.register_forward_hook(lambda module, given, output: (output, "weights"))
    with torch.inference_mode(), replaced(tuned, 2, torch.tensor([1]), vectors):
        seen: list[str] = []
        unwrapping = layer.register_forward_hook(lambda module, given, output: seen.append(output[1]) or output[0])
        assert torch.equal(tuned(ids).logits, plain)
    assert seen == ["weights"]
    wrapping.remove()
    unwrapping.remove()
    with torch.inference_mode():
        assert not torch.equal(tuned(ids).logits, plain)  # and nothing stays patched


def test_a_subject_whose_embedding_was_lost_comes_back_from_state_0() -> None:
    """Positive control: only the row of w7 was changed, and w7 is only ever the subject."""
    base = make_model(layers=3)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[7] += 1.0
    items = some_items()
    found = patch_subject(member(base), member(tuned), items, batch_size=4)
    about = np.array([item.subject == "w7" for item in items])
    np.testing.assert_allclose(found.states[:, 0], found.base, atol=1e-6)
    assert np.all(np.abs(found.tuned - found.base)[about] > 1e-4)
    np.testing.assert_array_equal(found.tuned[~about], found.base[~about])
    # Higher up, the tokens after the subject have read the changed one already: less and less comes back.
    errors = np.abs(found.states - found.base[:, None])[about].mean(0)
    assert errors[0] < 1e-6 < errors[1] < errors[-1]


@pytest.mark.parametrize("planted", ["low", "middle", "high"])
def test_a_statement_that_is_its_subject_comes_back_above_the_changed_layers(planted: str) -> None:
    """Positive control: of a single token, everything passes through the patched state."""
    base = make_model(layers=6)
    tuned = noisy(base, {planted: 0.3})
    items = [Item(question="?", answer="w3", choices=("w3", "w4", "w5"), statement=f"w{word}", subject=f"w{word}") for word in range(10, 30)]
    found = patch_subject(member(base), member(tuned), items, batch_size=7)
    changed = thirds(6)[planted]
    lost = np.abs(found.tuned - found.base).mean()
    errors = np.abs(found.states - found.base[:, None]).mean(0)
    assert lost > 0.01
    assert np.all(errors[changed.stop - 1 :] < 1e-6)
    assert np.all(errors[: changed.stop - 1] > 0.1 * lost)
    np.testing.assert_allclose(found.states[:, : changed.start], found.tuned[:, None].repeat(changed.start, 1), atol=1e-6)


def test_candidates_that_begin_alike() -> None:
    pair = member(make_model(seed=7, layers=3)), member(make_model(layers=3))
    shared = {"question": "?", "statement": "w20 w7 w21", "subject": "w7"}
    plain = Item(answer="w5", choices=("w5", "w9"), **shared)
    wrong_alike = Item(answer="w5", choices=("w9 w10", "w5", "w9 w11"), **shared)
    right_alike = Item(answer="w5", choices=("w5", "w5 w6", "w9"), **shared)
    found = patch_subject(*pair, [plain, wrong_alike, right_alike], batch_size=3)
    assert found.tuned[0] == pytest.approx(found.tuned[1], abs=1e-6)
    assert np.isnan(found.tuned[2])
    assert np.isnan(found.states).tolist() == [[False] * 4, [False] * 4, [True] * 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subject": None}, "needs a statement and its subject"),
        ({"statement": None}, "needs a statement and its subject"),
        ({"subject": "w9"}, "is not in the statement"),
        ({"choices": ()}, "has only its answer"),
    ],
)
def test_items_that_cannot_be_patched_are_refused(change: dict, words: str) -> None:
    item = some_items(1)[0].model_copy(update=change)
    with pytest.raises(UserError, match=words):
        patch_subject(member(make_model()), member(make_model()), [item], batch_size=1)
    with pytest.raises(UserError, match="same shape"):
        patch_subject(member(make_model()), member(make_model(layers=3)), some_items(1), batch_size=1)
