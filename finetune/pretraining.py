"""Pretraining of small models from scratch on a list of documents, through transformers' trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from proxytune.digests import seal


@dataclass(frozen=True)
class Pretraining:
    """A Llama of `layers` layers and width `hidden`, and how it is pretrained. One row is `block` tokens of documents that are joined end to end."""

    layers: int
    hidden: int
    heads: int
    learning_rate: float
    epochs: int
    block: int = 64
    batch_size: int = 32


def untrained(recipe: Pretraining, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The model before its first step."""
    set_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=4 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=2 * recipe.block,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class KeepCheckpoints(TrainerCallback):
    """Keeps the model before the first step and after 100, 200, 400, 800, … steps, as model folders `folder`/step-N.

    After the last step none is kept: that is the model itself. Training is the same as without this callback.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self._folder, self._tokenizer = folder, tokenizer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._keep(state.global_step, given["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        hundreds, rest = divmod(state.global_step, 100)
        # A power of two has one bit.
        if rest == 0 and hundreds.bit_count() == 1 and state.global_step < state.max_steps:
            self._keep(state.global_step, given["model"])

    def _keep(self, step: int, model: LlamaForCausalLM) -> None:
        for part in (model, self._tokenizer):
            part.save_pretrained(self._folder / f"step-{step}")
        seal(self._folder / f"step-{step}")


def pretrain(
    recipe: Pretraining,
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    scratch: Path,
    watchers: Sequence[TrainerCallback] = (),
) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains on the documents, `epochs` times over; returns the model and its losses, one every 50 steps.

    Every pass joins the documents in a new order. On the CPU and with one thread the same seed gives the same weights.
    """
    model = untrained(recipe, tokenizer, seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            num_train_epochs=1,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            weight_decay=0.01,
            adam_beta2=0.95,
            seed=seed,
            use_cpu=True,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=_blocks(recipe, documents, tokenizer, seed),
        data_collator=default_data_collator,
        callbacks=list(watchers),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval(), [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]


def _blocks(recipe: Pretraining, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(documents))["input_ids"]]
    generator = np.random.default_rng(seed)
    passes = [np.concatenate([encoded[position] for position in generator.permutation(len(encoded))]) for _ in range(recipe.epochs)]
    stream = torch.from_numpy(np.concatenate(passes))
    rows = stream[: len(stream) // recipe.block * recipe.block].view(-1, recipe.block).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
