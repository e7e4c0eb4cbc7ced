"""LoRA and full fine-tuning on questions and answers, through TRL's trainer and PEFT.

Loss on the answer only. The result is a folder of safetensors with its tokenizer and `tuning.json`, the card of what was
done; the folder appears whole or not at all. It finetunes; it never scores.
"""

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune.data import Item, encode_examples
from proxytune.errors import UserError
from proxytune.member import load_member


class EarlyStopping(BaseModel):
    """Keep the weights of the lowest validation loss; stop when it has not fallen for `patience` evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_share: float = Field(default=0.1, gt=0, lt=1, description="share of the units held out from tuning")
    every_steps: int = Field(default=10, ge=1)
    patience: int = Field(default=3, ge=1)


class Tuning(BaseModel):
    """How a model is tuned. The learning rate falls linearly to zero."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["full", "lora"]
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    epochs: float = Field(default=3, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=16, ge=1)
    rank: int | None = Field(default=None, ge=1, description="LoRA only; every linear layer but the head is adapted")
    early_stopping: EarlyStopping | None = None

    @model_validator(mode="after")
    def _rank_belongs_to_lora(self) -> "Tuning":
        if (self.method == "lora") != (self.rank is not None):
            raise ValueError("rank must be given with method lora, and only then")
        return self


@dataclass(frozen=True)
class TuningReport:
    """What tuning took: counts, the share of tokens in the loss, and the losses by step."""

    examples: int
    steps: int
    tokens: int
    trained_share: float
    parameters: int
    seconds: float
    losses: list[float]
    validation_losses: list[float]


def tune(
    model_path: str | Path,
    items: Sequence[Item],
    tuning: Tuning,
    *,
    prompt: str,
    ending: str,
    seed: int,
    out: Path,
    field: str = "base",
    watcher: TrainerCallback | None = None,
) -> TuningReport:
    """Tunes the model in `model_path` on the items and writes the result to `out` (a full model, or a LoRA adapter).

    The same seed gives the same weights on one machine with one thread count. Raises `UserError` where nothing would be
    trained on, where the loss is not finite, and where `model_path` holds no model. Not covered: mixed precision,
    resuming inside a run.
    """
    began = time.perf_counter()
    member = load_member(model_path, field=field)
    train, validation = _split(items, tuning.early_stopping, seed)
    rows = encode_examples(train, member.tokenizer, prompt, ending)
    share = trained_share(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        trainer = SFTTrainer(
            model=member.model,
            args=_arguments(tuning, seed, scratch),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(encode_examples(validation, member.tokenizer, prompt, ending)) if validation else None,
            processing_class=member.tokenizer,
            peft_config=_lora(tuning),
            callbacks=_callbacks(tuning, watcher),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history
        losses = [float(entry["loss"]) for entry in history if "loss" in entry]
        if not all(torch.isfinite(torch.tensor(losses))):
            raise UserError(f"learning_rate: the loss is not finite at step {_first_bad(losses)} with {tuning.learning_rate:g}; lower it")
        trained = trainer.model
        report = TuningReport(
            examples=len(rows),
            steps=trainer.state.global_step,
            tokens=round(sum(len(row["input_ids"]) for row in rows) * float(trainer.state.epoch or 0)),
            trained_share=share,
            parameters=sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad),
            seconds=time.perf_counter() - began,
            losses=losses,
            validation_losses=[float(entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        )
        _save(trained, member.tokenizer, report, tuning, seed, Path(scratch) / "result", out)
    del trainer, trained
    gc.collect()  # a trainer refers to itself, and its model may be half of the machine's memory
    return report


def trained_share(rows: Sequence[dict[str, list[int]]]) -> float:
    """The share of tokens that the loss is taken on. Raises `UserError` where it is zero."""
    total = sum(len(row["completion_mask"]) for row in rows)
    trained = sum(sum(row["completion_mask"]) for row in rows)
    if not trained:
        raise UserError(f"train: none of the {total} tokens would be trained on; give items with answers")
    return trained / total


def _split(items: Sequence[Item], early_stopping: EarlyStopping | None, seed: int) -> tuple[list[Item], list[Item]]:
    """Holds out whole units for validation, so that no fact stands on both sides."""
    if early_stopping is None:
        return list(items), []
    units = sorted({item.unit or item.question for item in items})
    count = max(1, round(len(units) * early_stopping.validation_share))
    if count >= len(units):
        raise UserError(f"early_stopping: {len(units)} units are too few to hold any out; give more items or leave it off")
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    held_out = {units[position] for position in order[:count].tolist()}
    validation = [item for item in items if (item.unit or item.question) in held_out]
    return [item for item in items if (item.unit or item.question) not in held_out], validation


def _arguments(tuning: Tuning, seed: int, scratch: str) -> SFTConfig:
    options: dict[str, Any] = {}
    if tuning.early_stopping is not None:
        options = {
            "eval_strategy": "steps",
            "eval_steps": tuning.early_stopping.every_steps,
            "save_strategy": "steps",
            "save_steps": tuning.early_stopping.every_steps,
            "save_total_limit": 1,
            "save_only_model": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=tuning.batch_size,
        per_device_eval_batch_size=tuning.batch_size,
        learning_rate=tuning.learning_rate,
        num_train_epochs=tuning.epochs,
        lr_scheduler_type="linear",
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        completion_only_loss=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **({"save_strategy": "no"} | options),
    )


def _lora(tuning: Tuning) -> LoraConfig | None:
    if tuning.rank is None:
        return None
    return LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _callbacks(tuning: Tuning, watcher: TrainerCallback | None) -> list[TrainerCallback]:
    callbacks: list[TrainerCallback] = [] if watcher is None else [watcher]
    if tuning.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(tuning.early_stopping.patience))
    return callbacks


def _first_bad(losses: list[float]) -> int:
    return next(step for step, loss in enumerate(losses, start=1) if not torch.isfinite(torch.tensor(loss)))


def _save(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, report: TuningReport, tuning: Tuning, seed: int, scratch: Path, out: Path
) -> None:
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / "tuning.json").write_text(json.dumps({"tuning": tuning.model_dump(), "seed": seed, "report": asdict(report)}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
