"""The trainer of a recipe: TRL's, on rows of token ids, with a loss that may also use the logits of reference models."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from finetune.encoding import Row, row_length
from finetune.flops import forward_flops
from finetune.recipe import Tuning, TuningRun
from finetune.reference import Reference, only_at, read_reference
from proxytune.errors import UserError, brief
from proxytune.member import Member, load_member
from proxytune.mixture import combine, proxy_tuning

FSDP = Path(__file__).parent / "fsdp.json"

Logits = Mapping[str, Float[Tensor, "positions vocabulary"]]  # of each reference model
Loss = Callable[[Float[Tensor, "positions vocabulary"], Int[Tensor, " positions"], Logits], Float[Tensor, " positions"]]


def near_start(weight: float) -> Loss:
    """Cross-entropy plus `weight` times KL(start || tuned) in nats, at each trained position."""

    def loss(logits: Float[Tensor, "positions vocabulary"], targets: Int[Tensor, " positions"], references: Logits) -> Float[Tensor, " positions"]:
        tuned, start = logits.log_softmax(-1), references["start"].log_softmax(-1)
        return cross_entropy(logits, targets, reduction="none") + weight * (start.exp() * (start - tuned)).sum(-1)

    return loss


def inside_the_mixture(strength: float) -> Loss:
    """Cross-entropy of base + `strength` (tuned - start): the mixture that the expert will be used in."""

    def loss(logits: Float[Tensor, "positions vocabulary"], targets: Int[Tensor, " positions"], references: Logits) -> Float[Tensor, " positions"]:
        rows = min(logits.shape[-1], *(member.shape[-1] for member in references.values()))
        members = {"base": references["base"], "expert": logits, "antiexpert": references["start"]}
        mixed = combine({name: member[..., :rows] for name, member in members.items()}, proxy_tuning(strength))
        return cross_entropy(mixed, targets, reduction="none")

    return loss


class ReferenceTrainer(SFTTrainer):
    """Supervised tuning whose loss at each trained position also uses the logits of reference models."""

    def __init__(self, *arguments: Any, position_loss: Loss, references: Mapping[str, Reference], **options: Any):
        super().__init__(*arguments, **options)
        self._position_loss, self._references = position_loss, references

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        labels = inputs["labels"]
        positions = torch.zeros_like(labels, dtype=torch.bool)
        positions[:, :-1] = labels[:, 1:] != -100
        targets = labels[:, 1:][positions[:, :-1]]
        rows = _rows_of(inputs)
        references = {name: member.logits(rows, labels.device) for name, member in self._references.items()}
        with only_at(self.accelerator.unwrap_model(model), positions):
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
        total = self._position_loss(logits.float(), targets, references).sum()
        if num_items_in_batch is None:
            return total / len(targets)
        # The count is that of all processes and micro-batches; distributed training takes the mean over processes.
        return total / num_items_in_batch * self.accelerator.num_processes


class PairsTrainer(DPOTrainer):
    """Preference tuning on rows that are token ids already."""

    def _prepare_dataset(self, dataset: Dataset, *_: object, **__: object) -> Dataset:
        return dataset


def _rows_of(inputs: Mapping[str, Tensor]) -> Sequence[Sequence[int]]:
    """The token ids of each example of a batch that is padded on the right, or all in one row without padding."""
    if "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
    (ids,), (positions,) = inputs["input_ids"].tolist(), inputs["position_ids"].tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    return [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]


def started_processes() -> int:
    """How many processes a launcher started to train together.

    Raises `UserError` under `accelerate launch` on a CPU, which starts only one process.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError("launcher: accelerate launch started a single process by itself; use torchrun --nproc_per_node N, or no launcher")
    return int(os.environ.get("WORLD_SIZE", 1))


def make_trainer(run: TuningRun, member: Member, rows: list[Row], held_out: list[Row], folder: Path, processes: int) -> tuple[Trainer, float]:
    """The trainer of the recipe, and the FLOPs of reference models before the first step.

    Raises `UserError` where a step's examples cannot be divided among the processes, where fewer processes train than were started,
    where a consistent expert has no base, and for targets that LoRA cannot adapt.
    """
    tuning = run.tuning
    if run.fsdp and processes == 1:
        raise UserError("fsdp: one process cannot shard a model; start several with torchrun --nproc_per_node N")
    options = _options(run, folder, processes)
    if tuning.preference is None:
        arguments = SFTConfig(**options, completion_only_loss=True, padding_free=tuning.padding_free)
    else:
        arguments = DPOConfig(**options, beta=tuning.preference, precompute_ref_log_probs=True)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs need torchrun; DataParallel would change the batch
    if arguments.world_size != processes:
        raise UserError(f"launcher: {processes} processes were started, but {arguments.world_size} would train; use torchrun --nproc_per_node N")
    _check_targets(tuning.targets or (), member.model)
    if tuning.frozen is not None:
        _freeze(member.model, tuning.frozen)
    common: dict[str, Any] = {
        "model": member.model,
        "args": arguments,
        "train_dataset": Dataset.from_list(rows),
        "eval_dataset": Dataset.from_list(held_out) if held_out else None,
        "processing_class": member.tokenizer,
        "callbacks": [] if tuning.early_stopping is None else [EarlyStoppingCallback(tuning.early_stopping.patience)],
    }
    everything = rows + held_out
    tokens = sum(map(row_length, everything))
    mean = tokens / len(everything)
    trainer: Trainer
    if tuning.preference is not None:
        before = forward_flops(member.model, tokens, mean / 2)  # the start model reads both answers
        trainer = PairsTrainer(**common, peft_config=_lora(tuning))
    elif tuning.kl is None and tuning.consistent is None:
        before = 0.0
        trainer = SFTTrainer(**common, peft_config=_lora(tuning))
    else:
        if tuning.consistent is not None and run.base is None:
            raise UserError("consistent: the base that the expert will be used with is missing; give it")
        with arguments.main_process_first(local=False):
            member.model.to(arguments.device)
            models = {"start": member}
            if tuning.consistent is not None:
                models["base"] = load_member(str(run.base), field="base", device=str(arguments.device))
            before = sum(forward_flops(model.model, tokens, mean) for model in models.values())
            references = {name: read_reference(model, everything, run.states or folder, run.field) for name, model in models.items()}
            del models
        loss = inside_the_mixture(tuning.consistent) if tuning.consistent is not None else near_start(float(tuning.kl or 0))
        trainer = ReferenceTrainer(**common, peft_config=_lora(tuning), position_loss=loss, references=references)
    trainer.add_callback(_Wrapped(trainer, run.fsdp, processes))
    return trainer, before


class _Wrapped(TrainerCallback):
    """Stops a run before its first step if the model is not wrapped for distributed training as asked."""

    def __init__(self, trainer: Trainer, fsdp: bool, processes: int):
        self._trainer, self._fsdp, self._processes = trainer, fsdp, processes

    def on_train_begin(self, *_: object, **__: object) -> None:
        model = self._trainer.model_wrapped
        sharded = isinstance(model, FSDPModule) or type(model).__name__ == "FullyShardedDataParallel"
        if self._fsdp and not sharded:
            raise UserError(f"fsdp: the model is wrapped as {type(model).__name__}, not sharded; FSDP needs GPUs and torchrun")
        if self._processes > 1 and not sharded and not isinstance(model, DistributedDataParallel):
            raise UserError(f"launcher: {self._processes} processes were started, but the model is a plain {type(model).__name__}")


def _freeze(model: PreTrainedModel, half: str) -> None:
    """Freezes everything except the layers of the other half."""
    count = model.config.get_text_config().num_hidden_layers
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    model.requires_grad_(False)
    for layer in layers[count // 2 :] if half == "lower" else layers[: count // 2]:
        layer.requires_grad_(True)


def _options(run: TuningRun, folder: Path, processes: int) -> dict[str, Any]:
    """The settings that TRL's configurations have in common."""
    tuning = run.tuning
    at_once = min(tuning.micro_batch_size or tuning.batch_size, max(1, tuning.batch_size // processes))
    if tuning.batch_size % (at_once * processes):
        raise UserError(f"batch_size: {tuning.batch_size} examples per step cannot be divided among {processes} processes; make it a multiple")
    saving: dict[str, Any] = {"save_strategy": "no"}
    if tuning.early_stopping is not None:
        every = tuning.early_stopping.every_steps
        saving = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
        saving |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return saving | {
        "output_dir": str(folder),
        "per_device_train_batch_size": at_once,
        "per_device_eval_batch_size": at_once,
        "gradient_accumulation_steps": tuning.batch_size // (at_once * processes),
        "learning_rate": tuning.learning_rate,
        **({"num_train_epochs": tuning.epochs} if tuning.steps is None else {"max_steps": tuning.steps}),
        "lr_scheduler_type": "linear",
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),  # without it gloo processes each train a model of their own
        "seed": run.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_backend": "gloo" if processes > 1 and not torch.cuda.is_available() else None,
        "ddp_find_unused_parameters": False if processes > 1 else None,
        "fsdp": True if run.fsdp else None,
        "fsdp_config": str(FSDP) if run.fsdp else None,
    }


def _lora(tuning: Tuning) -> LoraConfig | None:
    if tuning.rank is None:
        return None
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=2 * tuning.rank,
        target_modules=list(tuning.targets) if tuning.targets else "all-linear",
        use_dora=tuning.dora,
        use_rslora=tuning.rslora,
        task_type="CAUSAL_LM",
    )


def _check_targets(targets: Sequence[str], model: PreTrainedModel) -> None:
    """Raises `UserError` for a target that does not name a layer, or names one that LoRA cannot adapt: PEFT silently skips some of these."""
    modules = dict(model.named_modules())
    layers = {name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding | Conv1D)}
    for target in targets:
        called = {name for name in modules if name == target or name.endswith(f".{target}")}
        if not called or not called <= layers:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules if name in layers))
            raise UserError(f"targets: no layer that LoRA can adapt is called {brief(target)}; there are {known}")
