"""Pretraining of small models from scratch on a list of documents, through transformers' trainer."""

import copy
import math
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
from trl import pack_dataset

from proxytune.digests import seal
from proxytune.errors import UserError

# Standard deviation of the weights before the first step. With transformers' 0.02 narrow models learn facts late or never.
INITIAL = 0.08
WARMUP = 200  # steps


@dataclass(frozen=True)
class Pretraining:
    """A Llama of `layers` layers and width `hidden`, and how it is pretrained. One row is up to `block` tokens of whole documents."""

    layers: int
    hidden: int
    heads: int
    learning_rate: float
    epochs: int
    block: int = 96
    batch_size: int = 10


def untrained(recipe: Pretraining, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """The model before its first step.

    What layers add to the residual stream is scaled down by the root of the number of additions (Radford et al. 2019, section 2.3). Without it,
    models of four layers learn a fraction of the facts that models of two layers do.
    """
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=4 * recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=2 * recipe.block,
            tie_word_embeddings=True,
            initializer_range=INITIAL,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            for added in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                added /= math.sqrt(2 * recipe.layers)
    return model


class KeepCheckpoints(TrainerCallback):
    """Keeps the model before the first step and after 100, 200, 400, 800, … steps, as model folders `folder`/step-N, in bf16.

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
        for part in (copy.deepcopy(model).to(torch.bfloat16), self._tokenizer):
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
    """Trains on the documents, `epochs` times over, in fp32; returns the model in bf16 and its losses, one every 50 steps.

    On the CPU and with one thread the same seed gives the same weights. Raises `UserError` for a document that is longer than a row.
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
            warmup_steps=WARMUP,
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
        train_dataset=_rows(recipe, documents, tokenizer, seed),
        data_collator=default_data_collator,
        callbacks=list(watchers),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.to(torch.bfloat16).eval(), [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry]


def _rows(recipe: Pretraining, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seed: int) -> Dataset:
    """All passes over the documents, packed into rows of whole documents; what is left of a row is padding.

    The padding stands on the right and has no loss, so that no attention mask is needed.
    """
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(documents))["input_ids"]]
    longest = max(map(len, encoded))
    if longest > recipe.block:
        raise UserError(f"block: the longest document has {longest} tokens, a row {recipe.block}; choose longer rows")
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(len(encoded)) for _ in range(recipe.epochs)])
    packed = pack_dataset(Dataset.from_dict({"input_ids": [encoded[place] for place in order]}), recipe.block)["input_ids"]
    padding = [recipe.block - len(row) for row in packed]
    return Dataset.from_dict(
        {
            "input_ids": [[*row, *[tokenizer.pad_token_id] * rest] for row, rest in zip(packed, padding, strict=True)],
            "labels": [[*row, *[-100] * rest] for row, rest in zip(packed, padding, strict=True)],
        }
    )
