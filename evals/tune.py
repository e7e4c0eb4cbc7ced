"""`proxytune tune`: one model, tuned from the command line, with the first example shown and the next command said."""

import shlex
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evals.progress import Display
from finetune.data import check_prompt, encode_examples, preview
from finetune.reading import read_items
from finetune.recipe import Tuning
from finetune.tuning import tune
from proxytune.errors import UserError
from proxytune.member import load_tokenizer

LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}


def tune_one(model: str, data: Path, out: Path, settings: dict[str, Any], prompt: str, seed: int, display: Display) -> str:
    """Tunes `model` on the items of `data` into `out`; returns what to do with it. `settings` are those of `Tuning`.

    Raises `UserError` for settings and prompts that are none, for an `out` that is there, and whatever reading and tuning raise.
    """
    if out.exists():
        raise UserError(f"--out: '{out}' is there already; choose another folder or remove it")
    method = settings["method"]
    rate = settings["learning_rate"] or LEARNING_RATE[method]
    try:
        tuning = Tuning(**(settings | {"learning_rate": rate, "rank": settings["rank"] if method == "lora" else None}))
        check_prompt(prompt)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{str(first['loc'][-1]).replace('_', '-')}: {first['msg']}, not {first['input']!r}") from error
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error
    items = read_items(data, "data").items
    tokenizer = load_tokenizer(model, "model")
    display.say(f"{len(items)} examples; the first, with what is trained on between brackets:")
    display.say(preview(encode_examples(items[:1], tokenizer, prompt, "")[0], tokenizer))
    report = tune(model, items, tuning, prompt=prompt, ending="", seed=seed, out=out, field="model", watcher=display)
    display.say(
        f"{report.steps} steps, {report.parameters:,} parameters, {report.tokens:,} tokens, {report.seconds:.0f} s, "
        f"loss {report.losses[0]:.3f} to {report.losses[-1]:.3f}; the card is {out / 'tuning.json'}"
    )
    question = shlex.quote(prompt.format(question=items[0].question))
    return f"proxytune generate {question} --base LARGE --expert {shlex.quote(str(out))} --antiexpert {shlex.quote(model)}"
