import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from helpers import SOME_ARCHITECTURES, VOCABULARY, make_model, make_tokenizer

from finetune.items import Item
from probes.density import random_rotation
from probes.internals.activations import final_norm, read_states
from probes.lens import RIDGES, Lens, Reading, Translators, first_tokens, fit_translators, read_lens, read_through
from probes.linear_probe import Probed, control_answers, linear_probe
from proxytune.errors import UserError

CANDIDATES = 10


def some_ids(count: int, shortest: int, longest: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (shortest + index % (longest - shortest + 1),), generator=generator).tolist() for index in range(count)]


def some_candidates(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(3 + torch.randperm(VOCABULARY - 3, generator=generator)[:CANDIDATES]).tolist() for _ in range(count)]


def states_of(model: transformers.PreTrainedModel, text: list[int]) -> torch.Tensor:
    """Every state at every token of one text: [tokens, states, hidden]."""
    (states,) = read_states(model, [text], [range(len(text))], batch_size=1, pad=0)
    return states.residual[0]


def logits_of(model: transformers.PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, -1]


def fitted(model: transformers.PreTrainedModel, count: int = 60, batch_size: int = 8) -> Translators:
    return fit_translators(model, some_ids(count, 8, 24, seed=9), tokens=10_000, batch_size=batch_size, pad=0)


def as_arrays(reading: Reading) -> np.ndarray:
    return np.stack([reading.log_probability, reading.share, reading.right])


@pytest.mark.parametrize("architecture", [*SOME_ARCHITECTURES, "gemma2", "cohere", "granite"])
def test_the_last_state_gives_the_models_own_probabilities_whatever_its_head_does(architecture: str) -> None:
    model = make_model(architecture)
    changes_logits = {"gemma2": ("final_logit_softcapping", 2.0), "cohere": ("logit_scale", 0.3), "granite": ("logits_scaling", 3.0)}
    if architecture in changes_logits:
        setattr(model.config, *changes_logits[architecture])
        model = type(model)(model.config).eval()
    prompts, candidates = some_ids(12, 3, 7), some_candidates(12)
    lenses = {"plain": Lens(model), "own": Lens(model, fitted(model, count=12))}
    readings = read_lens(model, prompts, candidates, lenses, batch_size=12, pad=0)
    with torch.inference_mode():
        logits = torch.stack([logits_of(model, prompt) for prompt in prompts])
        last = torch.stack([states_of(model, prompt)[-1, -1] for prompt in prompts])
        by_hand = model.get_output_embeddings()(final_norm(model)(last)).log_softmax(-1)
    own, right = logits.log_softmax(-1), [tokens[0] for tokens in candidates]
    share = torch.stack([row[tokens].softmax(0)[0] for row, tokens in zip(logits, candidates, strict=True)])
    first = [int(row[tokens].argmax()) == 0 for row, tokens in zip(logits, candidates, strict=True)]
    for reading in readings.values():
        np.testing.assert_allclose(reading.log_probability[:, -1], own[range(12), right], atol=1e-5)
        np.testing.assert_allclose(reading.share[:, -1], share, atol=1e-5)
        assert reading.right[:, -1].tolist() == first
    # The twin: norm and head by hand are the model's own law only where nothing is done to the logits afterwards.
    assert torch.allclose(by_hand, own, atol=1e-3) == (architecture not in changes_logits)


def test_a_norm_that_is_not_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr("probes.lens.final_norm", lambda model: model.base_model.layers[-1].input_layernorm)
    with pytest.raises(UserError, match="LlamaForCausalLM does not give its own probabilities"):
        read_lens(model, some_ids(4, 3, 5), some_candidates(4), {"plain": Lens(model)}, batch_size=4, pad=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_neither_batches_nor_padding_change_a_reading(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, candidates = make_model(architecture), some_ids(40, 3, 7), some_candidates(40)
    together, apart = fitted(model, batch_size=60), fitted(model, batch_size=1)
    torch.testing.assert_close(together.ridge, apart.ridge, atol=0, rtol=0)
    lenses = {"plain": Lens(model), "together": Lens(model, together), "apart": Lens(model, apart)}
    batched = read_lens(model, prompts, candidates, lenses, batch_size=16, pad=0)
    monkeypatch.setattr("probes.lens.ROWS_AT_ONCE", 2)
    single = read_lens(model, prompts, candidates, lenses, batch_size=1, pad=7)
    for name in ("plain", "together"):
        for found, expected in zip(batched[name][:2], single[name][:2], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(batched["together"].share, single["apart"].share, atol=1e-4)
    assert np.abs(batched["plain"].share - batched["plain"].share[::-1]).max() > 0.1


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_streamed_translators_are_one_least_squares_fit_on_everything(architecture: str) -> None:
    model, texts = make_model(architecture, layers=3), some_ids(21, 4, 12)
    beyond = [[5], texts[-1] + some_ids(1, 30, 30, seed=7)[0], *some_ids(5, 30, 40, seed=8)]
    found = fit_translators(model, [*texts[:-1], *beyond], tokens=1 + sum(map(len, texts)), batch_size=5, pad=0)
    # Without each text's first token; a text that has no other adds nothing.
    states = [states_of(model, text)[1:].double() for text in texts]

    def slow(rows: torch.Tensor, layer: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = rows[:, layer], rows[:, -1]
        centred = x - x.mean(0)
        strength = (len(x) * ridge * centred.square().mean()) ** 0.5
        stacked = torch.cat([centred, strength * torch.eye(x.shape[1])])
        weight = torch.linalg.lstsq(stacked, torch.cat([y - y.mean(0), torch.zeros_like(stacked[: x.shape[1]])])).solution
        return weight, y.mean(0) - x.mean(0) @ weight

    held_out, rest, everything = torch.cat(states[::5]), torch.cat([one for place, one in enumerate(states) if place % 5]), torch.cat(states)
    for layer in range(3):
        errors = []
        for ridge in RIDGES:
            weight, bias = slow(rest, layer, ridge)
            errors.append(float((held_out[:, layer] @ weight + bias - held_out[:, -1]).square().sum(-1).mean()))
        chosen = min(range(len(RIDGES)), key=errors.__getitem__)
        assert found.ridge[layer].item() == pytest.approx(RIDGES[chosen])
        variance = float((held_out[:, -1] - held_out[:, -1].mean(0)).square().sum(-1).mean())
        assert found.explained[layer].item() == pytest.approx(1 - errors[chosen] / variance, abs=1e-3)
        weight, bias = slow(everything, layer, RIDGES[chosen])
        torch.testing.assert_close(found.weight[layer].double(), weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.bias[layer].double(), bias, atol=1e-3, rtol=1e-3)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="1 seen within 5 tokens"):
        fit_translators(make_model(), some_ids(4, 6, 9), tokens=5, batch_size=4, pad=0)


def test_states_that_never_vary_are_translated_to_the_last_states_mean() -> None:
    model = make_model()
    translators = fit_translators(model, [[5] * 9, [5] * 6], tokens=100, batch_size=2, pad=0)
    reading = read_through(Lens(model, translators), states_of(model, [5] * 4)[-1:], [[7, 8, 9]])
    np.testing.assert_allclose(reading.share, reading.share[:, -1:].repeat(3, 1), atol=1e-4)


def in_another_basis(model: transformers.PreTrainedModel, layers: int) -> transformers.PreTrainedModel:
    """The same function, whose states before that of the last of so many layers are rotated (its norms, of weight one, let that through)."""
    other, rotation = copy.deepcopy(model), random_rotation(model.config.hidden_size, 0)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight @ rotation)
        for layer in other.model.layers[:layers]:
            attention, mlp = layer.self_attn, layer.mlp
            for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                reads.weight.copy_(reads.weight @ rotation)
            for writes in (attention.o_proj, mlp.down_proj):
                writes.weight.copy_(rotation.T @ writes.weight)
    other.model.layers[layers - 1].register_forward_hook(lambda module, arguments, output: output @ rotation.T)
    return other


def without_its_words(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with every word's embedding given to the next."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    return other


def test_what_is_rotated_is_lost_through_the_bases_lens_alone_and_what_is_erased_through_both() -> None:
    base, prompts = make_model(layers=3), some_ids(200, 3, 7)
    candidates = []
    for prompt, tokens in zip(prompts, some_candidates(200), strict=True):
        # What the base says is right, so that it knows all; guessing is right in a tenth, a little more for tokens it often says.
        said = tokens[int(logits_of(base, prompt)[tokens].argmax())]
        candidates.append([said, *(token for token in tokens if token != said)])
    bases_lens = Lens(base, fitted(base))
    readings = {}
    for name, model in {"base": base, "rotated": in_another_basis(base, 2), "erased": without_its_words(base)}.items():
        lenses = {"base's": bases_lens, "own": Lens(model, fitted(model))}
        readings[name] = read_lens(model, prompts, candidates, lenses, batch_size=50, pad=0)
    known = readings["base"]["own"].right.mean(0)
    assert known[3] == 1 and known[1] > 0.3
    np.testing.assert_array_equal(as_arrays(readings["base"]["own"]), as_arrays(readings["base"]["base's"]))
    rotated = readings["rotated"]
    np.testing.assert_allclose(rotated["own"].share, readings["base"]["own"].share, atol=2e-4)
    np.testing.assert_allclose(rotated["base's"].share[:, 2:], readings["base"]["own"].share[:, 2:], atol=2e-4)
    assert rotated["base's"].right[:, 1].mean() < 0.15
    assert all(reading.right.mean(0).max() < 0.22 for reading in readings["erased"].values())


def test_identical_models_give_equal_readings_and_another_one_does_not() -> None:
    base, prompts, candidates = make_model(), some_ids(20, 3, 7), some_candidates(20)
    found = []
    for model in (base, copy.deepcopy(base), make_model(seed=5)):
        lenses = {"base's": Lens(base, fitted(base, 15)), "own": Lens(model, fitted(model, 15)), "plain": Lens(model)}
        found.append(read_lens(model, prompts, candidates, lenses, batch_size=6, pad=0))
    for name in found[0]:
        np.testing.assert_array_equal(as_arrays(found[0][name]), as_arrays(found[1][name]))
        assert np.abs(found[0][name].share - found[2][name].share).max() > 0.1


def test_first_tokens_that_candidates_share() -> None:
    tokenizer, model = make_tokenizer(), make_model()
    answers = {"apart": "w5 w6", "shared by wrong ones": "w5", "shared by the right one": "w7 w5"}
    choices = {"apart": ("w5 w6", "w7"), "shared by wrong ones": ("w7 w3", "w7 w4", "w5"), "shared by the right one": ("w5", "w7 w4", "w7 w5")}
    items = [Item(question=name, answer=answers[name], choices=choices[name]) for name in answers]
    tokens = first_tokens(tokenizer, items)
    assert tokens == [[5, 7], [5, 7, 7], [7, 5, 7]]
    states = states_of(model, some_ids(1, 4, 4)[0])[-1:].expand(3, -1, -1)
    reading = read_through(Lens(model), states, tokens)
    np.testing.assert_array_equal(reading.share[0], reading.share[1])
    np.testing.assert_array_equal(reading.right[0], reading.right[1])
    assert not np.isnan(as_arrays(reading)[:, :2]).any()
    assert np.isnan(reading.share[2]).all() and np.isnan(reading.right[2]).all() and np.isfinite(reading.log_probability[2]).all()
    with pytest.raises(UserError, match="'alone' has only its answer"):
        first_tokens(tokenizer, [Item(question="alone", answer="w5", choices=("w5",))])


def test_items_with_more_and_fewer_candidates_are_read_as_they_are_alone() -> None:
    model, candidates = make_model(), [tokens[: 2 + place] for place, tokens in enumerate(some_candidates(6))]
    states = torch.stack([states_of(model, prompt)[-1] for prompt in some_ids(6, 3, 7)])
    alone = [as_arrays(read_through(Lens(model), states[place : place + 1], candidates[place : place + 1])) for place in range(6)]
    np.testing.assert_allclose(as_arrays(read_through(Lens(model), states, candidates)), np.concatenate(alone, 1), atol=1e-5)


def test_an_affine_image_of_the_last_state_is_read_as_the_last_state() -> None:
    model, candidates = make_model(), some_candidates(6)
    states = torch.stack([states_of(model, prompt)[-1] for prompt in some_ids(6, 3, 7)])
    rotation, bias = random_rotation(32, 0), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    states[:, 0] = (states[:, -1] - bias[0]) @ rotation.T
    translators = Translators(torch.stack([rotation, rotation]), bias, torch.zeros(2), torch.ones(2))
    reading = read_through(Lens(model, translators), states, candidates)
    np.testing.assert_allclose(reading.share[:, 0], reading.share[:, -1], atol=1e-5)
    plain = read_through(Lens(model), states, candidates)
    assert np.abs(plain.share[:, 0] - plain.share[:, -1]).max() > 0.1
    assert np.abs(reading.share[:, 1] - reading.share[:, -1]).max() > 0.1


def test_of_equals_none_is_right() -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[5] = model.lm_head.weight[7]
        model.lm_head.weight[9] = 0
    state = states_of(model, some_ids(1, 4, 4)[0])[-1:]
    larger = float(logits_of(model, some_ids(1, 4, 4)[0])[5]) > 0
    assert read_through(Lens(model), state, [[5, 7]]).right[0, -1] == 0
    assert read_through(Lens(model), state, [[5, 9] if larger else [9, 5]]).right[0, -1] == 1


ANSWERS = tuple(f"w{number}" for number in range(3, 11))
SURNAMES = 16


def people(count: int = 320, facts: int = 1) -> list[Item]:
    """`count` items, `facts` of them in a row about one person; the surname, the unit and the answer do not depend on each other."""
    generator = np.random.default_rng(3)
    items = []
    for person in range(count // facts):
        subject = f"p{person} s{generator.integers(SURNAMES)}"
        items += [
            Item(question=f"{subject} {fact}", answer=str(generator.choice(ANSWERS)), choices=ANSWERS, unit=f"unit {person}", subject=subject)
            for fact in range(facts)
        ]
    return items


def planted(items: Sequence[Item], *features: Sequence[str] | None, size: int = 24) -> torch.Tensor:
    """States of noise, each with a direction for every value of its feature."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(items), len(features), size, generator=generator)
    for state, values in enumerate(features):
        if values is not None:
            names = sorted(set(values))
            directions = 2 * torch.randn(len(names), size, generator=generator)
            states[:, state] += directions[[names.index(value) for value in values]]
    return states


def selectivity(probed: Probed | None) -> list[float]:
    assert probed is not None
    return (probed.probe.mean(0) - probed.control.mean(0)).tolist()


def test_a_planted_answer_is_selective_and_neither_noise_nor_a_name_is() -> None:
    items = people()
    answers = [item.answer for item in items]
    surnames = [str(item.subject).split()[-1] for item in items]
    both = [answer + surname for answer, surname in zip(answers, surnames, strict=True)]
    states = planted(items, None, answers, surnames, None)
    # One state has both side by side; the last has never varied.
    states = torch.cat([states, states[:, 1:2] + planted(items, surnames)[:, :1], torch.full_like(states[:, :1], 0.3)], 1)
    assert len(set(both)) > 100
    probed = linear_probe(states, items, seed=0)
    assert probed is not None
    found, chance = probed.probe.mean(0), 1 / len(ANSWERS)
    assert found[1] > 0.9 and found[4] > 0.9
    assert all(abs(found[state] - chance) < 0.07 for state in (0, 2, 3, 5))
    noise, answer, name, _, side_by_side, constant = selectivity(probed)
    assert answer > 0.7
    assert abs(noise) < 0.1 and abs(constant) < 0.1
    # The control can be learnt by held-out subjects, where the state says the surname.
    assert name < -0.7
    assert abs(side_by_side) < 0.15
    # Random labels in the place of the answers.
    shuffled = np.random.default_rng(0).permutation(answers)
    elsewhere = [item.model_copy(update={"answer": answer}) for item, answer in zip(items, shuffled.tolist(), strict=True)]
    assert abs(selectivity(linear_probe(states, elsewhere, seed=0))[1]) < 0.1


def test_no_unit_stands_on_both_sides() -> None:
    # Four items a person with nearly one state and one answer, which is noise: whoever has seen the person knows it.
    items = people(facts=4)
    items = [item.model_copy(update={"answer": items[place // 4 * 4].answer}) for place, item in enumerate(items)]
    states = planted(items, [str(item.unit) for item in items], size=96)
    probed = linear_probe(states, items, seed=0)
    leaking = linear_probe(states, [item.model_copy(update={"unit": None}) for item in items], seed=0)
    assert probed is not None and leaking is not None
    assert probed.probe.mean() < 0.25
    assert leaking.probe.mean() > 0.8


def test_the_control_is_dealt_by_surname_as_often_as_the_answers_occur_and_by_the_seed() -> None:
    items = people()
    dealt = control_answers(items, seed=0)
    of_surname = {(str(item.subject).split()[-1], answer) for item, answer in zip(items, dealt, strict=True)}
    assert len(of_surname) == SURNAMES
    counts = np.unique(dealt, return_counts=True)[1]
    assert len(counts) == len(ANSWERS) and counts.max() < 2 * len(items) / len(ANSWERS)
    assert control_answers(items, seed=0) == dealt != control_answers(items, seed=1)
    # A model's order of items changes nothing, nor does what each item's own answer is.
    assert control_answers(items[::-1], seed=0) == dealt[::-1]
    skewed = [item.model_copy(update={"answer": ANSWERS[0]}) if place % 2 else item for place, item in enumerate(items)]
    first = [item.subject for item in items].index(min((item.subject for item in items), key=lambda subject: str(subject).split()[-1]))
    assert len({control_answers(skewed, seed)[first] for seed in range(10)}) > 1
    same = np.mean([item.answer == answer for item, answer in zip(items, dealt, strict=True)])
    assert same < 0.2


def test_identical_states_are_probed_equally_and_groups_apart() -> None:
    items = people(160)
    states = planted(items, None, [item.answer for item in items])
    first, again = linear_probe(states, items, seed=0), linear_probe(states.clone(), items, seed=0)
    assert first is not None and again is not None
    np.testing.assert_array_equal(np.stack(first), np.stack(again))
    # Nor does the size of a coordinate count.
    scaled = linear_probe(states * 2.0 ** torch.arange(-12, 12), items, seed=0)
    assert scaled is not None
    np.testing.assert_array_equal(np.stack(first), np.stack(scaled))
    others = [item.model_copy(update={"choices": tuple(reversed((*ANSWERS, "w20")))}) for item in items]
    too_few = people(10)
    mixed = linear_probe(
        torch.cat([states, -states, states[:10]]), [*items, *others, *[item.model_copy(update={"choices": ()}) for item in too_few]], seed=0
    )
    assert mixed is not None
    np.testing.assert_array_equal(mixed.probe[:160], first.probe)
    np.testing.assert_array_equal(mixed.probe[160:320, 1], first.probe[:, 1])
    assert np.isnan(mixed.probe[320:]).all() and np.isnan(mixed.control[320:]).all()


def test_a_control_of_one_answer_is_guessed_by_everyone() -> None:
    items = [item.model_copy(update={"subject": "all s0"}) for item in people(64)]
    probed = linear_probe(planted(items, None), items, seed=0)
    assert probed is not None and (probed.control == 1).all() and probed.probe.mean() < 0.4


@pytest.mark.parametrize(
    "changed",
    [
        {"choices": ()},  # nothing to group by
        {"answer": ANSWERS[0]},  # one answer only
        {"unit": "one"},  # nobody to hold out
    ],
)
def test_without_a_group_there_is_no_reading(changed: dict[str, object]) -> None:
    items = people(64)
    assert linear_probe(planted(items, None), items, seed=0) is not None
    assert linear_probe(planted(items, None), [item.model_copy(update=changed) for item in items], seed=0) is None
    assert linear_probe(planted(items, None)[:24], items[:24], seed=0) is None
