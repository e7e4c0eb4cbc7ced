"""LoRA and full fine-tuning on questions and answers, through TRL's trainers and PEFT.

The loss is on the answers only. The result is a folder with safetensors, the tokenizer, `tuning.json` (the card: recipe, seed
and report) and the digests of all files; the folder appears complete or not at all. A run that is stopped leaves its checkpoints
beside the folder. The same run continues from the last complete one and gives the same result; paths do not matter for that.
This module scores nothing.
"""

import gc
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from finetune.checkpoints import STEPS, Checkpoints, KeepSteps, is_main_process, last_whole, workplace
from finetune.encoding import Row, check_rows, encode_examples, encode_pairs, row_length, trained_share
from finetune.flops import training_flops
from finetune.items import Item, hold_out, items_to_tune_on, shuffle_answers
from finetune.recipe import Tuning, TuningRun, passes_of
from finetune.trainers import make_trainer, started_processes
from proxytune.content import as_json, content_key
from proxytune.digests import publish
from proxytune.errors import UserError
from proxytune.member import Member, load_member


@dataclass(frozen=True)
class TuningReport:
    """What a tuning took: counts, the share of tokens in the loss, the losses by step, and the costs (see `flops` and `meter`).

    `tokens` are those of forward and backward passes; `flops` include the forward passes of reference models. `stored_bytes` are the
    bytes of the result's weights. `wrapped` is the class that distributed training put around the model.
    """

    examples: int
    steps: int
    tokens: int
    trained_share: float
    parameters: int
    losses: list[float]
    validation_losses: list[float]
    flops: float
    stored_bytes: int
    processes: int
    wrapped: str
    seconds: float
    peak_memory: int | None
    energy: float | None


def tune(run: TuningRun, watcher: TrainerCallback | None = None) -> TuningReport:
    """Tunes the model on the items that the recipe asks for, and writes the result to `run.out` (a full model, or a LoRA adapter).

    `watcher` sees every step. The same seed gives the same weights on one machine with one thread count, however often the run was
    stopped. Under torchrun the processes share a step's examples; where these do not divide evenly, the last step of an epoch repeats
    some. Raises `UserError` where no token would be trained on, where an example does not fit the model, where the loss is not finite,
    where the disk is full, where fewer processes train than were started, where `run.model` is not a model, and what
    `items_to_tune_on` raises. Not covered: mixed precision.
    """
    processes = started_processes()
    tuning, seed, out = run.tuning, run.seed, run.out
    member = load_member(run.model, field=run.field)
    items = items_to_tune_on(run.items, tuning.items)
    items = shuffle_answers(items, seed) if tuning.shuffled else items
    train, validation = (items, []) if tuning.early_stopping is None else hold_out(items, tuning.early_stopping.validation_share, seed)
    rows, held_out = (_encode(part, member, run) for part in (train, validation))
    window = getattr(member.model.config.get_text_config(), "max_position_embeddings", None)
    check_rows(rows + held_out, window, member.model.get_input_embeddings().weight.shape[0])
    base = None if run.base is None else load_member(run.base, field="base").fingerprint
    key = content_key(start=member.fingerprint, base=base, rows=rows, held_out=held_out, tuning=tuning.model_dump(), seed=seed)
    with workplace(out, key) as folder:
        if is_main_process():
            shutil.rmtree(folder / "result", ignore_errors=True)  # left by a run that was killed while saving
        checkpoint, meter = last_whole(folder)
        try:
            trainer, flops = make_trainer(run, member, rows, held_out, folder, processes)
            trainer.remove_callback(PrinterCallback)
            for callback in (Checkpoints(run.checkpoint_seconds, meter), KeepSteps(folder / STEPS, tuning.keep, member), watcher):
                if callback is not None:
                    trainer.add_callback(callback)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            _check_alive(member.model, tuning)
            trainer.save_model(str(folder / "result"))
            meter.tick()
            passes = passes_of(trainer.state.global_step, len(rows), tuning.batch_size)
            tokens = round(sum(map(row_length, rows)) * passes)
            history = trainer.state.log_history
            report = TuningReport(
                examples=len(rows),
                steps=trainer.state.global_step,
                tokens=tokens,
                trained_share=trained_share(rows),
                parameters=sum(parameter.numel() for parameter in member.model.parameters() if parameter.requires_grad),
                losses=[float(entry["loss"]) for entry in history if "loss" in entry],
                validation_losses=[float(entry["eval_loss"]) for entry in history if "eval_loss" in entry],
                flops=flops + training_flops(member.model, tokens, tokens / max(1.0, len(rows) * passes)),
                stored_bytes=sum(file.stat().st_size for file in (folder / "result").glob("*.safetensors")),
                processes=processes,
                wrapped=type(trainer.model_wrapped).__name__,
                **asdict(meter),
            )
            if trainer.is_world_process_zero():
                _finish(folder / "result", member, report, run)
        except UnpicklingError as error:
            raise UserError(f"out: the checkpoint '{checkpoint}' cannot be read as plain tensors; remove it") from error
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"out: '{folder}' cannot be written ({reason}); free some space and run the same again; it continues") from error
    del trainer
    gc.collect()  # a trainer refers to itself, and its model may fill half of the memory
    return report


def _encode(items: Sequence[Item], member: Member, run: TuningRun) -> list[Row]:
    encode = encode_examples if run.tuning.preference is None else encode_pairs
    return encode(items, member.tokenizer, run.prompt, run.ending)


def _check_alive(model: nn.Module, tuning: Tuning) -> None:
    """Raises `UserError` for weights that are not finite after the last step, and for a LoRA adapter that is zero."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"learning_rate: the weights are not finite after the last step with {tuning.learning_rate:g}; lower it")
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    if layers and not any(weights.weight.any() for layer in layers for weights in layer.lora_B.values()):
        raise UserError(f"learning_rate: after tuning with {tuning.learning_rate:g} the adapter is dead (B = 0 everywhere); raise it or train longer")


def _finish(result: Path, member: Member, report: TuningReport, run: TuningRun) -> None:
    member.tokenizer.save_pretrained(result)
    card: dict[str, Any] = {"tuning": run.tuning.model_dump(), "seed": run.seed, "report": asdict(report)}
    (result / "tuning.json").write_text(as_json(card) + "\n")
    (result / "training_args.bin").unlink(missing_ok=True)  # a pickle; nothing reads it
    if run.tuning.keep:
        (result.parent / STEPS).rename(result / STEPS)
    publish(result, run.out)
