"""The command line: `proxytune compare` and `proxytune world build`. Thin; heavy imports wait until a command runs."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
world = typer.Typer(no_args_is_help=True, help="The embedded world: a synthetic corpus, its ledger and its model family.")
app.add_typer(world, name="world")


class Format(StrEnum):
    table = "table"
    markdown = "markdown"
    latex = "latex"
    json = "json"


class Size(StrEnum):
    default = "default"
    tiny = "tiny"


@app.callback()
def _proxytune() -> None:
    """Fine-tune a model, or steer its decoding with a small tuned proxy? Compares both, and what each forgets."""


@app.command()
def compare(
    study: Annotated[
        Path | None, typer.Argument(help="A study file; see evals/studies. Without one: the embedded world.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of records, checkpoints and figures. Default: proxytune-runs/NAME.", show_default=False)
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How the results go to standard output.")] = Format.table,
) -> None:
    """Runs a study (arms x measures x seeds) and prints its table.

    Every arm is measured by the same prompts; intervals are a paired bootstrap. Stop it at any time: the same command
    goes on where it was and ends with the same table. Progress goes to standard error.
    """
    from evals.compare import run_study
    from evals.figures import draw_figures
    from evals.progress import Display
    from evals.results import summarize
    from evals.study import load_study
    from evals.tables import render

    loaded, folder = load_study(study)
    place = out or Path("proxytune-runs") / loaded.study
    with Display() as display:
        records = run_study(loaded, folder, place, display)
        with display.bar("intervals and figures", None):
            results = summarize(loaded, records)
            files = [place / "results.json", *draw_figures(loaded, records, place)]
            files[0].write_text(render(results, "json") + "\n")
        print(render(results, form))
        display.say(f"Files: {', '.join(map(str, files))}; items, one file a record: {place / 'records'}")


@world.command()
def build(
    size: Annotated[Size, typer.Option(help="How large a world.")] = Size.default,
    seeds: Annotated[list[int], typer.Option("--seed", help="Once for each family.")] = [0],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Where the families go; a study finds those in the folder worlds of its own --out.")] = Path(
        "proxytune-runs/world/worlds"
    ),
) -> None:
    """Draws a corpus, counts its ledger, and pretrains base and small model on it (about three minutes a seed and core)."""
    import torch

    from evals.progress import Display
    from probes.world.family import build_family

    torch.set_num_threads(1)
    with Display() as display:
        for seed in seeds:
            display.say(f"seed {seed}: {build_family(size.value, seed, out, display)}")


def main() -> None:
    """Runs the command line; a user's mistake is one line on standard error and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, OSError) as error:
        from proxytune.errors import UserError

        # A full disk or a forbidden file is the machine's state and no fault in the program either.
        if not isinstance(error, UserError | OSError):
            raise
        print(f"proxytune: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
