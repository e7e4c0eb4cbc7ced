"""Pretraining: rows hold whole documents, every pass over them is there, padding has no loss, and the result is bf16."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_tokenizer, words
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune.pretraining import Pretraining, pretrain, untrained
from proxytune.errors import UserError
from proxytune.member import load_member

RECIPE = Pretraining(layers=2, hidden=8, heads=1, learning_rate=1e-2, epochs=3, block=12, batch_size=4)
DOCUMENTS = [words(*range(3 + number, 4 + number + number % 11)) for number in range(30)]  # of 1 to 11 tokens


class Watcher(TrainerCallback):
    """Keeps the rows that are trained on and the weights after the last step."""

    def on_train_begin(self, *_: Any, **given: Any) -> None:
        self.rows = list(given["train_dataloader"].dataset)

    def on_train_end(self, *_: Any, **given: Any) -> None:
        self.weights = {name: weight.clone() for name, weight in given["model"].state_dict().items()}


def watched(documents: list[str], scratch: Path) -> tuple[Watcher, torch.nn.Module]:
    watcher = Watcher()
    model, _ = pretrain(RECIPE, documents, make_tokenizer(), seed=0, scratch=scratch, watchers=[watcher])
    return watcher, model


def test_rows_are_whole_documents_of_every_pass(tmp_path: Path) -> None:
    tokenizer, read, several = make_tokenizer(), Counter[str](), 0
    for row in watched(DOCUMENTS, tmp_path)[0].rows:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        assert len(ids) == len(labels) == RECIPE.block
        filled = sum(label != -100 for label in labels)
        assert (labels[:filled], ids[filled:]) == (ids[:filled], [tokenizer.pad_token_id] * (RECIPE.block - filled))
        # What ends a row is the end of a document, and so no document goes on in another row.
        *whole, rest = tokenizer.decode(ids[:filled]).split(" <eos>")
        assert not rest
        read.update(text.strip() for text in whole)
        several += len(whole) > 1
    assert read == Counter(DOCUMENTS * RECIPE.epochs)
    assert several


def test_a_document_longer_than_a_row_is_refused(tmp_path: Path) -> None:
    fits = words(*range(3, 14))  # with the end token as long as a row
    assert len(watched([fits], tmp_path)[0].rows) == RECIPE.epochs
    with pytest.raises(UserError, match=r"^block: the longest document has 13 tokens, a row 12; choose longer rows$"):
        watched([fits, f"{fits} w14"], tmp_path)


def test_the_result_is_what_was_trained_rounded_to_bf16(tmp_path: Path) -> None:
    watcher, model = watched(DOCUMENTS, tmp_path)
    assert {weight.dtype for weight in watcher.weights.values()} == {torch.float32}
    model.save_pretrained(tmp_path / "saved")
    make_tokenizer().save_pretrained(tmp_path / "saved")
    assert {weight.dtype for weight in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}
    loaded = load_member(tmp_path / "saved").model.state_dict()
    assert loaded.keys() == watcher.weights.keys()
    for name, weight in watcher.weights.items():
        assert torch.equal(loaded[name], weight.bfloat16().float()), name
    assert any(not torch.equal(loaded[name], weight) for name, weight in watcher.weights.items())


def test_what_layers_add_begins_smaller_the_more_of_them_there_are() -> None:
    model = untrained(Pretraining(layers=8, hidden=64, heads=4, learning_rate=1e-2, epochs=1), make_tokenizer(), 0)
    for layer in model.model.layers:
        added, other = layer.mlp.down_proj.weight.std(), layer.mlp.up_proj.weight.std()
        assert (added / other).item() == pytest.approx(1 / 4, rel=0.05)  # sixteen additions
