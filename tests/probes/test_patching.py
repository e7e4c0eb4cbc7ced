"""Patching a subject's states: a model's own change nothing, the base's bring back what was changed below them."""

import copy

import numpy as np
import pytest
import torch
from helpers import SOME_ARCHITECTURES, items_about, make_model, make_tokenizer, member_of, noisy

from finetune.encoding import prompt_ids
from finetune.items import Item
from probes.internals.activations import final_norm, layers_of, read_states
from probes.internals.blocks import thirds
from probes.patching import patch_subject, replaced
from proxytune import UserError
from proxytune.padding import left_padded, positions_of


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_a_models_own_states_change_nothing(architecture: str) -> None:
    base = make_model(architecture, layers=3)
    found = patch_subject(member_of(base), member_of(copy.deepcopy(base)), items_about(), batch_size=4)
    np.testing.assert_array_equal(found.base, found.tuned)
    np.testing.assert_allclose(found.states, found.tuned[:, None].repeat(4, 1), atol=1e-6)
    other = patch_subject(member_of(make_model(architecture, seed=7, layers=3)), member_of(base), items_about(), batch_size=4)
    np.testing.assert_array_equal(other.tuned, found.tuned)
    assert np.abs(other.states[:, :-1] - other.tuned[:, None]).max(0).min() > 1e-3  # another model's do
    np.testing.assert_allclose(other.states[:, -1], other.tuned, atol=1e-6)  # unless no layer reads them any more


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_patching_does_not_depend_on_the_batch(architecture: str) -> None:
    pair = member_of(make_model(architecture, seed=7, layers=3)), member_of(make_model(architecture, layers=3))
    done: list[int] = []
    together, apart = (patch_subject(*pair, items_about(), batch_size=size, progress=done.append) for size in (9, 1))
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert done == [9] + 9 * [1]


def test_state_0_is_what_the_embeddings_give() -> None:
    """Patched there, a model reads the base's embedding of the subject; by hand, it is given it."""
    base, tuned = make_model(seed=7, layers=3), make_model(layers=3)
    items = items_about()
    found = patch_subject(member_of(base), member_of(tuned), items, batch_size=3)
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
    items = items_about()
    found = patch_subject(member_of(base), member_of(tuned), items, batch_size=4)
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
    found = patch_subject(member_of(base), member_of(tuned), items, batch_size=7)
    changed = thirds(6)[planted]
    lost = np.abs(found.tuned - found.base).mean()
    errors = np.abs(found.states - found.base[:, None]).mean(0)
    assert lost > 0.01
    assert np.all(errors[changed.stop - 1 :] < 1e-6)
    assert np.all(errors[: changed.stop - 1] > 0.1 * lost)
    np.testing.assert_allclose(found.states[:, : changed.start], found.tuned[:, None].repeat(changed.start, 1), atol=1e-6)


def test_candidates_that_begin_alike() -> None:
    pair = member_of(make_model(seed=7, layers=3)), member_of(make_model(layers=3))
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
    item = items_about(1)[0].model_copy(update=change)
    with pytest.raises(UserError, match=words):
        patch_subject(member_of(make_model()), member_of(make_model()), [item], batch_size=1)
    with pytest.raises(UserError, match="of the same shape"):
        patch_subject(member_of(make_model()), member_of(make_model(layers=3)), items_about(1), batch_size=1)
