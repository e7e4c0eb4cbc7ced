import json
from pathlib import Path

import pytest
import torch

from finetune.encoding import check_prompt, encode_examples, prompt_ids, trained_share
from finetune.items import Item
from finetune.recipe import EarlyStopping, Tuning, TuningRun
from finetune.tuning import tune
from probes.world.corpus import make_world
from probes.world.family import build_tokenizer
from probes.world.ledger import items_of, make_ledger
from probes.world.recipes import RECIPES
from probes.world.sections.people import QUESTION
from proxytune.errors import UserError
from proxytune.member import load_member

FULL = Tuning(method="full", learning_rate=1e-3, epochs=2, batch_size=8)
LORA = Tuning(method="lora", rank=4, learning_rate=1e-2, epochs=2, batch_size=8)


def world_items() -> list[Item]:
    return items_of(make_ledger(make_world(RECIPES["tiny"], 0)), "tune")


def run(family: Path, out: Path, tuning: Tuning, seed: int = 0) -> str:
    tune(TuningRun(family / "small", world_items(), tuning, prompt=QUESTION, ending=" .", seed=seed, out=out))
    adapter = out if tuning.method == "lora" else None
    return load_member(family / "small" if adapter else out, adapter).fingerprint


def test_loss_is_taken_on_the_answer_only() -> None:
    tokenizer = build_tokenizer(RECIPES["tiny"])
    item = world_items()[0]
    assert item.answer in item.said != item.answer
    (row,) = encode_examples([item], tokenizer, QUESTION, " .")
    trained = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
    assert tokenizer.decode(trained) == f"{item.said} . <eos>"
    prompt = row["input_ids"][: -len(trained)]
    assert prompt == prompt_ids(tokenizer, QUESTION.format(question=item.question))


def test_the_first_loss_is_that_of_a_reference_loop(tiny_family: Path, tmp_path: Path) -> None:
    everything = Tuning(method="full", learning_rate=1e-9, epochs=1, batch_size=1000)
    report = tune(TuningRun(tiny_family / "small", world_items(), everything, prompt=QUESTION, ending=" .", seed=0, out=tmp_path / "out"))
    model = load_member(tiny_family / "small").model
    losses = []
    for row in encode_examples(world_items(), build_tokenizer(RECIPES["tiny"]), QUESTION, " ."):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            law = model(ids).logits[0, :-1].log_softmax(-1)
        losses += [-law[place, ids[0, place + 1]] for place in range(ids.shape[1] - 1) if row["completion_mask"][place + 1]]
    assert report.losses[0] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    assert report.trained_share == pytest.approx(
        len(losses) / sum(len(row["input_ids"]) for row in encode_examples(world_items(), build_tokenizer(RECIPES["tiny"]), QUESTION, " ."))
    )


@pytest.mark.parametrize("tuning", [FULL, LORA], ids=["full", "lora"])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(tiny_family: Path, tmp_path: Path, tuning: Tuning) -> None:
    first, again, other = (run(tiny_family, tmp_path / name, tuning, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first == again != other


def test_the_base_on_disk_is_untouched_and_nothing_is_pickled(tiny_family: Path, tmp_path: Path) -> None:
    before = load_member(tiny_family / "small").fingerprint
    for tuning in (FULL, LORA):
        assert run(tiny_family, tmp_path / tuning.method, tuning) != before
    assert load_member(tiny_family / "small").fingerprint == before
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".safetensors", ".json", ".md"}
    assert {place.name for place in tmp_path.iterdir()} == {"full", "lora"}


def test_lora_leaves_the_base_weights_as_they_are(tiny_family: Path, tmp_path: Path) -> None:
    run(tiny_family, tmp_path / "lora", LORA)
    base = load_member(tiny_family / "small").model.state_dict()
    adapted = load_member(tiny_family / "small", tmp_path / "lora").model.state_dict()
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in adapted.items() if "lora_" not in name}
    assert kept.keys() == base.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in adapted.items() if "lora_B" in name)


def test_tuning_lowers_the_loss_and_the_card_says_so(tiny_family: Path, tmp_path: Path) -> None:
    run(tiny_family, tmp_path / "out", FULL)
    card = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert card["report"]["losses"][-1] < card["report"]["losses"][0]
    assert card["tuning"]["learning_rate"] == 1e-3


def test_early_stopping_keeps_the_best_weights_and_holds_out_whole_units(tiny_family: Path, tmp_path: Path) -> None:
    ruinous = Tuning(
        method="full", learning_rate=0.05, epochs=20, batch_size=8, early_stopping=EarlyStopping(validation_share=0.2, every_steps=2, patience=2)
    )
    report = tune(TuningRun(tiny_family / "small", world_items(), ruinous, prompt=QUESTION, ending=" .", seed=0, out=tmp_path / "out"))
    assert report.steps < 20 * -(-report.examples // 8)
    assert report.examples % 3 == 0
    assert report.validation_losses[-1] > min(report.validation_losses)


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 3 tokens"):
        trained_share([{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 0]}])


def test_a_loss_that_is_not_finite_is_an_error(tiny_family: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learning_rate: the (loss|gradient) is not finite"):
        run(tiny_family, tmp_path / "out", Tuning(method="full", learning_rate=1e30, epochs=3, batch_size=8))
    assert not (tmp_path / "out").exists()


def test_two_bos_are_refused() -> None:
    with pytest.raises(UserError, match="two BOS"):
        prompt_ids(build_tokenizer(RECIPES["tiny"]), "<bos> anna adler")


@pytest.mark.parametrize("template", ["no placeholder", "{question} {question}", "{question} {name}"])
def test_prompts_need_one_placeholder(template: str) -> None:
    with pytest.raises(ValueError, match="only placeholder"):
        check_prompt(template)
