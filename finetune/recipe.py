"""The recipe of a tuning (which weights are trained, on which loss, and how fast), and one run of it on a model and items."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finetune.items import Item

LARGEST_SEED = 2**32 - 1  # numpy's global generator takes no larger seed
LARGEST_RANK = 16384  # the width of the widest models; memory grows with it

MOST_EPOCHS = 1e6  # more are a typing error, and counting their steps would take minutes
MOST_STEPS = 10**9


# Fields that recipes did not always have are left out of a recipe's content where they are not used: its checkpoints keep their keys.
def _is_none(value: object) -> bool:
    return value is None


def _is_empty(value: object) -> bool:
    return value == ()


def _is_all(value: object) -> bool:
    return value == "all"


class EarlyStopping(BaseModel):
    """Keeps the weights of the lowest validation loss; stops when it has not fallen for `patience` evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    validation_share: float = Field(default=0.1, gt=0, lt=1, description="share of the units held out from tuning")
    every_steps: int = Field(default=10, ge=1)
    patience: int = Field(default=3, ge=1)


class Tuning(BaseModel):
    """How a model is tuned, for so many epochs or for exactly so many steps. The learning rate falls linearly to zero.

    The loss is the mean cross-entropy of the answers' tokens. One of three options changes it: `kl` adds its weight times
    KL(start || tuned) at the same positions; `consistent` tunes an expert inside the mixture that it will be used in,
    base + consistent (expert - start) (consistent proxy-tuning: He et al. 2024, arXiv 2410.03111); `preference` is the
    beta of DPO (Rafailov et al. 2023, eq. 7), which needs a rejected answer in every item.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["full", "lora"]
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    epochs: float | None = Field(default=3, gt=0, le=MOST_EPOCHS, description="passes over the examples; None where steps are given")
    steps: int | None = Field(default=None, ge=1, le=MOST_STEPS, exclude_if=_is_none, description="optimizer steps, instead of epochs")
    items: Literal["all", "known", "unknown"] = Field(
        default="all", exclude_if=_is_all, description="only the items whose answer the model to be tuned knows, or does not know: `Item.familiar`"
    )
    batch_size: int = Field(default=16, ge=1, le=2**31 - 1, description="examples per step, over all processes")
    micro_batch_size: int | None = Field(default=None, ge=1, description="examples in memory at a time; default: all of a step")
    padding_free: bool = Field(default=False, description="the examples of a batch in one row without padding; the same loss")
    rank: int | None = Field(default=None, ge=1, le=LARGEST_RANK, description="LoRA only")
    targets: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="LoRA only: names of layers; default: all linear ones but the head"
    )
    dora: bool = Field(default=False, description="LoRA only: with a learned magnitude")
    rslora: bool = Field(default=False, description="LoRA only: scaled by the root of the rank")
    frozen: Literal["lower", "upper"] | None = Field(
        default=None, description="full only: this half of the layers is frozen, and so are embeddings and head"
    )
    kl: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    consistent: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    preference: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    shuffled: bool = Field(default=False, description="answers shuffled among questions: a control that learns the form but not the content")
    early_stopping: EarlyStopping | None = None
    keep: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), exclude_if=_is_empty, description="also keep the model after these steps, as folders steps/step-N in the result"
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_need_no_epochs(cls, content: Any) -> Any:
        return {"epochs": None} | content if isinstance(content, dict) and content.get("steps") is not None else content

    @model_validator(mode="after")
    def _coherent(self) -> "Tuning":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("epochs and steps both say how long to tune; give one of them")
        if (self.method == "lora") != (self.rank is not None):
            raise ValueError("rank must be given with method lora, and only then")
        if self.method == "full" and (self.targets or self.dora or self.rslora):
            raise ValueError("targets, dora and rslora belong to method lora")
        if self.method == "lora" and self.frozen:
            raise ValueError("frozen belongs to method full; name LoRA's layers with targets")
        if sum(option is not None for option in (self.kl, self.consistent, self.preference)) > 1:
            raise ValueError("kl, consistent and preference are three losses; give one of them")
        if self.preference is not None and self.padding_free:
            raise ValueError("padding_free is not for preference pairs; leave one out")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}")
        return self

    def passes(self, examples: int) -> float:
        """How often so many examples are passed over, if nothing stops the tuning early."""
        return passes_of(self.steps, examples, self.batch_size) if self.steps is not None else float(self.epochs or 0)


def passes_of(steps: int, examples: int, batch_size: int) -> float:
    """How often so many optimizer steps pass over the examples. The last step of each pass takes what is left of them."""
    whole, rest = divmod(steps, -(-examples // batch_size))
    return whole + rest * batch_size / examples


class BiasTuning(BaseModel):
    """How a logit bias is fitted (see `logit_bias`): `penalty` times half the vector's squared norm is added to the mean cross-entropy (nats)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    penalty: float = Field(default=1e-3, gt=0, allow_inf_nan=False)


@dataclass(frozen=True)
class TuningRun:
    """One tuning: the model in `model`, a folder or hub name, on the items by the recipe; the result goes to the folder `out`.

    `prompt` is the template of a question, or the word `chat`; `ending` follows each answer in plain text. `base` is the large model
    of a consistent expert. `states` is a folder where states of reference models are kept for other runs (default: none are kept). A
    checkpoint is made every `checkpoint_seconds`. `fsdp` shards the model over several processes. `field` is the name of `model` in
    error messages.
    """

    model: str | Path
    items: Sequence[Item]
    tuning: Tuning
    _: KW_ONLY
    prompt: str
    ending: str
    seed: int
    out: Path
    field: str = "base"
    base: str | Path | None = None
    states: Path | None = None
    checkpoint_seconds: float = 300.0
    fsdp: bool = False
