"""`proxytune tune`: tunes one model, shows the first example, and prints the commands that use the result."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evals.running.progress import Display
from finetune.checkpoints import is_main_process
from finetune.encoding import check_prompt, encode_examples, encode_pairs, preview
from finetune.formats import read_items
from finetune.items import Item
from finetune.overlap import describe, overlap
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import TuningReport, tune
from proxytune.errors import UserError, brief
from proxytune.member import load_tokenizer

LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}


@dataclass(frozen=True)
class Run:
    """What is tuned, on which data, and where the result goes. `settings` are those of `Tuning`; `base` is the large model of an expert."""

    model: str
    data: str
    out: Path
    settings: dict[str, Any]
    prompt: str
    seed: int
    base: str | None = None
    test: str | None = None
    allow_overlap: bool = False
    fsdp: bool = False
    checkpoint_seconds: float = field(default=300.0)


def tune_one(run: Run, display: Display) -> str:
    """Tunes one model; returns the commands that use it.

    Raises `UserError` for invalid settings and prompts, for an `out` that exists, for test questions that are also tuned on, and for
    everything that reading and tuning raise.
    """
    if run.out.exists():
        raise UserError(f"--out: '{run.out}' is there already; choose another folder or remove it")
    tuning = _recipe(run)
    train = read_items(run.data, "data")
    _look_at(run, train.items, display)
    display.say(f"{len(train.items)} examples ({train.shape}{'; not read: ' if train.ignored else ''}{', '.join(train.ignored)}); {_asked(run)}")
    for line in _first(run, train.items[0], tuning).split("\n"):
        display.say(line)
    tuning_run = TuningRun(
        run.model,
        train.items,
        tuning,
        prompt=run.prompt,
        ending="",
        seed=run.seed,
        out=run.out,
        field="model",
        base=run.base if tuning.consistent is not None else None,
        checkpoint_seconds=run.checkpoint_seconds,
        fsdp=run.fsdp,
    )
    report = tune(tuning_run, _Losses(display))
    if not is_main_process():
        return ""
    display.say(f"{_numbers(report)}; the card is {run.out / 'tuning.json'}")
    return _following(run, train.items[0])


class _Losses(TrainerCallback):
    """A line at every tenth of the run, beside the bar."""

    def __init__(self, display: Display):
        self._display = display

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: object) -> None:
        self._display.on_train_begin(args, state, control, **options)
        if state.global_step:
            self._display.say(f"continues after step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: object) -> None:
        self._display.on_step_end(args, state, control, **options)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: object) -> None:
        for name, word in (("loss", "loss"), ("eval_loss", "validation loss")):
            tenth = state.global_step * 10 // state.max_steps != (state.global_step - 1) * 10 // state.max_steps
            if logs and name in logs and (tenth or name == "eval_loss"):
                self._display.say(f"step {state.global_step} of {state.max_steps}: {word} {logs[name]:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: object) -> None:
        self._display.on_train_end(args, state, control, **options)


def _recipe(run: Run) -> Tuning:
    given = {name: value for name, value in run.settings.items() if value is not None}
    if given["method"] != "lora":
        given.pop("rank", None)
    try:
        check_prompt(run.prompt)
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error
    try:
        tuning = Tuning(**({"learning_rate": LEARNING_RATE[given["method"]]} | given))
    except ValidationError as error:
        first = error.errors()[0]
        option = "".join(f"--{str(part).replace('_', '-')}: " for part in first["loc"][-1:])
        value = f", not {brief(first['input'])}" if option else ""
        raise UserError(f"{option}{first['msg'].removeprefix('Value error, ')}{value}") from error
    if tuning.consistent is not None and run.base is None:
        raise UserError("--consistent: an expert is tuned for a base that it will serve; give --base")
    return tuning


def _look_at(run: Run, train: list[Item], display: Display) -> None:
    common = overlap(train, read_items(run.test, "--test").items if run.test else [])
    if common.duplicates or common.shared or common.near:
        display.say(f"data: {describe(common)}")
    if common.shared and not run.allow_overlap:
        raise UserError(f"--test: {describe(common)}; take them out of one, or say --allow-overlap")


def _asked(run: Run) -> str:
    return "in the model's chat template" if run.prompt == "chat" else f"asked as {run.prompt!r}"


def _first(run: Run, item: Item, tuning: Tuning) -> str:
    tokenizer = load_tokenizer(run.model, "model")
    if tuning.preference is None:
        rows = encode_examples([item], tokenizer, run.prompt, "")
        return f"the first, with what is trained on between brackets:\n{preview(rows[0], tokenizer)}"
    (pair,) = encode_pairs([item], tokenizer, run.prompt, "")
    asked, chosen, rejected = (tokenizer.decode(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return f"the first, with the preferred and the other answer between brackets:\n{asked}⟦{chosen}⟧ over ⟦{rejected}⟧"


def _numbers(report: TuningReport) -> str:
    parts = [
        f"{report.steps} steps in {report.processes} process(es) ({report.wrapped})",
        f"{report.parameters:,} parameters",
        f"{report.tokens:,} tokens ({report.trained_share:.0%} trained on)",
        f"{report.seconds:.0f} s",
        f"{report.flops / 1e12:.3g} TFLOP",
        f"{report.stored_bytes / 1e6:.3g} MB",
        f"loss {report.losses[0]:.3f} to {report.losses[-1]:.3f}",
    ]
    return ", ".join(parts)


def _following(run: Run, item: Item) -> str:
    """The commands that use the result: generate, and compare if there is a test, with a study file that is written beside the result."""
    out, large = str(run.out), run.base or "LARGE"
    how = ["--chat", "expert"] if run.prompt == "chat" else []
    question = item.question if run.prompt == "chat" else run.prompt.format(question=item.question)
    lines = [shlex.join(["proxytune", "generate", question, "--base", large, "--expert", out, "--antiexpert", run.model, *how])]
    if run.test is not None:
        path = run.out / "study.yaml"
        base = run.base or run.model
        worked = all("####" in other.answer for other in read_items(run.test, "--test").items)  # GSM8K's form: the number at the end counts
        study = {
            "study": f"{run.out.name}",
            "models": {"base": _absolute(base), "small": _absolute(run.model)},
            "data": {"train": _absolute(run.data), "test": _absolute(run.test), "prompt": run.prompt}
            | ({"answer": "number", "new_tokens": 256} if worked else {"new_tokens": 64})
            | ({"allow_overlap": True} if run.allow_overlap else {}),
            "measures": ["task"],
            "arms": {
                "base": {"kind": "base"},
                "expert": {"kind": "expert", "path": str(run.out.absolute())},
                "proxy": {"kind": "proxy", "alpha": [0.5, 1.0]},
            },
        }
        path.write_text(yaml.safe_dump(study, sort_keys=False, allow_unicode=True))
        lines.append(shlex.join(["proxytune", "compare", str(path)]))
    return "\n".join(lines)


def _absolute(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).exists() else name
