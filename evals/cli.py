"""The command line: compare, probe, items, tune, generate, and more. Each command imports only what it needs."""

import os
import signal
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

USAGE_ERROR: Any = typer.BadParameter.__base__  # also the base class for unknown options and commands
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
world = typer.Typer(no_args_is_help=True, help="The embedded world: a synthetic corpus, its ledger and its model family.")
app.add_typer(world, name="world")


class Format(StrEnum):
    table = "table"
    markdown = "markdown"
    latex = "latex"
    html = "html"
    csv = "csv"
    json = "json"


LARGEST_SEED = 2**32 - 1  # as in finetune/recipe.py, which is slow to import
MOST_THREADS = 1024
PROMPT = "Question: {question}\nAnswer:"


class Method(StrEnum):
    lora = "lora"
    full = "full"


class Half(StrEnum):
    LOWER = "lower"
    UPPER = "upper"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.callback()
def _proxytune() -> None:
    """Fine-tune a model, or steer its decoding with a small tuned proxy? Compares both, and what each one forgets."""


JOBS = typer.Option(min=1, max=MOST_THREADS, help="Number of processes. Default: one per core; one if models are large.", show_default=False)
SEEDS = typer.Option(min=1, help="On so many seeds: 2 for a quick look, more than the study has for narrower intervals.", show_default=False)
WAIT = typer.Option("--wait", help="Wait for another command that works in the same folder, instead of stopping.")


class _WithMeasures(TyperCommand):
    """A command whose help ends with the list of measures."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from evals.measures.registry import measures

        self.epilog = "**Measures**\n\n" + "\n\n".join(f"*{name}*: {measure.question}" for name, measure in sorted(measures().items()))
        super().format_help(ctx, formatter)


@app.command(cls=_WithMeasures)
def compare(
    study: Annotated[Path | None, typer.Argument(help="A study file; see evals/studies. Default: the embedded world.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of records, checkpoints and figures. Default: proxytune-runs/NAME.", show_default=False)
    ] = None,
    seeds: Annotated[int | None, SEEDS] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the jobs, what the rest will cost, and what the study can tell; run nothing.")] = False,
    jobs: Annotated[int | None, JOBS] = None,
    wait: Annotated[bool, WAIT] = False,
    full: Annotated[bool, typer.Option("--full", help="Print all tables instead of the answer in a few lines.")] = False,
    form: Annotated[
        Format | None, typer.Option("--format", help="Print all tables in this format, or json: results.json.", show_default=False)
    ] = None,
) -> None:
    """Runs a study (arms x measures x seeds) and prints its answer: what tuning and steering gain, keep and cost, and what cannot be told.

    All arms are measured with the same prompts; intervals are paired. Stop it at any time: the same command
    continues where it stopped and ends with the same results. Progress goes to standard error.
    """
    from evals.commands.compare import run_and_show, show_plan
    from evals.study import load_study, with_seeds

    whole, folder = load_study(study)
    loaded = with_seeds(whole, seeds or len(whole.seeds))
    place = out or Path("proxytune-runs") / whole.study
    if plan:
        show_plan(loaded, folder, place, form or Format.table)
    else:
        wanted = form or (Format.table if full else None)
        run_and_show(loaded, folder, place, place if loaded is whole else place / loaded.study, wanted, jobs, wait)


@app.command()
def select(
    study: Annotated[
        Path | None,
        typer.Argument(help="A study file of worlds in which arms have select, or direct is best. Default: as compare.", show_default=False),
    ] = None,
    seeds: Annotated[
        list[int], typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of a family to select on, not one of the study's; may be repeated.")
    ] = [100, 101, 102, 103],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Folder of families, records and checkpoints. Default: proxytune-runs/NAME.", show_default=False)
    ] = None,
    jobs: Annotated[int | None, JOBS] = None,
    wait: Annotated[bool, WAIT] = False,
) -> None:
    """Selects a study's settings beforehand, on families of other seeds, and prints what the study file is to say of them.

    With these lines in the file, `compare` takes the selected settings and runs no trials. Stop it at any time: the same
    command continues.
    """
    from evals.commands.select import select_and_show
    from evals.study import load_study

    loaded, folder = load_study(study, select_again=True)
    select_and_show(loaded, folder, out or Path("proxytune-runs") / loaded.study, seeds, jobs, wait)


@app.command(cls=_WithMeasures)
def probe(
    name: Annotated[str, typer.Argument(help="The measure; erosion is the verdict, with all measures that it is built on.")],
    target: Annotated[str | None, typer.Argument(help="A study file or a base model. Default: the embedded world.", show_default=False)] = None,
    tuned: Annotated[
        list[str] | None, typer.Argument(help="Models tuned from the base: folders, hub names or LoRA adapters.", show_default=False)
    ] = None,
    checkpoints: Annotated[
        list[str], typer.Option(help="Instead of models: a folder of a run's checkpoints, or one checkpoint; may be repeated. The last is the base.")
    ] = [],  # noqa: B006
    dynamics: Annotated[
        Path | None, typer.Option(help="With density, instead of models: a released file of training dynamics.", show_default=False)
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="With bias: a CSV matrix, one row a bias, one column a model (BACKBONE-DATA-Seed-N).", show_default=False),
    ] = None,
    leave_out: Annotated[list[str], typer.Option(help="With --scores: a row to leave out, such as MMLU; may be repeated.")] = [],  # noqa: B006
    from_step: Annotated[int, typer.Option(min=0, help="With --dynamics: means are over the evaluations from this step on.")] = 3000,
    knowledge: Annotated[
        str | None,
        typer.Option(help="Knowledge items: statement, answer, choices, popularity, perhaps subject. Density needs none.", show_default=False),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text in which subjects and answers are counted; the counts are then the popularity.", show_default=False)
    ] = None,
    test: Annotated[str | None, typer.Option(help="Task items, to measure what restoring a block costs at the task.", show_default=False)] = None,
    prompt: Annotated[str, typer.Option(help="Template of a task's question, or chat: the model's chat template.")] = PROMPT,
    teach: Annotated[
        bool, typer.Option("--teach", help="With density and a model: teach it made-up names as often as chance decides, and read them.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of records; results go to NAME in it. Default: proxytune-runs/STUDY.", show_default=False)
    ] = None,
    seeds: Annotated[int | None, SEEDS] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads; a study file has its own setting.")] = 2,
    jobs: Annotated[int | None, JOBS] = None,
    wait: Annotated[bool, WAIT] = False,
    form: Annotated[Format, typer.Option("--format", help="How the results go to standard output.")] = Format.table,
) -> None:
    """One measure, for a study or for models given by name: what tuning did to states, weights and knowledge.

    `proxytune probe density base` needs no file: it reads the names of cities, known, little known and made up (2 minutes for
    135M parameters); `proxytune probe density base tuned` shows what tuning changed, and with `--knowledge` it reads your statements, too.
    `proxytune probe erosion base tuned --knowledge items.jsonl` looks at your own models; `proxytune probe density --checkpoints run` at
    the folders step-100, step-200, … of a pretraining run; `proxytune probe bias --scores scores.csv` says whether released bias scores go
    with pretraining or with instruction data. Stop it at any time: the same command continues.
    """
    from evals.commands.compare import run_and_show
    from evals.commands.probe import Probe, probe_study, show_dynamics, show_scores
    from evals.study import with_seeds

    if scores is not None:
        show_scores(name, scores, leave_out, form)
        return
    if dynamics is not None:
        show_dynamics(dynamics, from_step, out, form)
        return
    whole, folder = probe_study(Probe(name, target, tuned or [], knowledge, corpus, test, prompt, threads, teach, checkpoints))
    loaded = with_seeds(whole, seeds or len(whole.seeds))
    place = out or Path("proxytune-runs") / whole.study
    shown = place / name if loaded is whole else place / name / loaded.study
    run_and_show(loaded, folder, place, shown, form, jobs, wait)


@app.command()
def items(
    folder: Annotated[Path, typer.Argument(help="The folder to which proxytune compare wrote its results.")],
    measure: Annotated[
        str | None, typer.Option(help="The reading whose answers are shown, such as task; an unknown name lists all. Default: the first.")
    ] = None,
    where: Annotated[str, typer.Option(help="Conditions: an arm and right, wrong or unparsed; 'full right, proxy@1 wrong'.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The largest number of items to print.")] = 20,
    form: Annotated[Format, typer.Option("--format", help="Format of the output.")] = Format.table,
) -> None:
    """Prints the answers of several arms to the same items side by side, such as items that one got right and another wrong."""
    from evals.display.render import draw
    from evals.results.items import read_items_of, side_by_side
    from proxytune.content import as_json

    table = side_by_side(read_items_of(folder), measure, where, limit)
    print(as_json(table.frame.to_dict("records")) if form is Format.json else draw([table], form))


@app.command()
def report(
    target: Annotated[str, typer.Argument(help="The folder to which proxytune compare wrote its results, or a base model.")],
    tuned: Annotated[
        list[str] | None, typer.Argument(help="Models tuned from the base: folders, hub names or LoRA adapters.", show_default=False)
    ] = None,
    expert: Annotated[str | None, typer.Option(help="The small tuned model of a mixture, or a LoRA adapter.", show_default=False)] = None,
    antiexpert: Annotated[str | None, typer.Option(help="The same small model, untuned.", show_default=False)] = None,
    data: Annotated[str | None, typer.Option(help="Task items: what was gained. Default: none.", show_default=False)] = None,
    knowledge: Annotated[
        str | None, typer.Option(help="Knowledge items with statement, answer and popularity. Default: capitals and cities.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Template of a task's question, or chat: the model's chat template.")] = PROMPT,
    out: Annotated[Path | None, typer.Option(help="Folder of records and page. Default: proxytune-runs/report-BASE.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    jobs: Annotated[int | None, JOBS] = None,
    wait: Annotated[bool, WAIT] = False,
) -> None:
    """One page, to open in a browser without a network: of a finished study's folder, or of models that are there already.

    `proxytune report base tuned` shows what tuning made a model forget: capitals, names of cities, ordinary text (minutes on a CPU for a
    small model). `--data` adds what it gained, `--expert` and `--antiexpert` what steering the base would do instead. Stop it at any
    time: the same command continues.
    """
    from evals.report.page import write_report

    if not tuned and expert is None and antiexpert is None:
        print(write_report(Path(target)))
        return
    from evals.commands.compare import run_and_show
    from evals.commands.report import missing, report_study

    study = report_study(target, tuned or [], expert, antiexpert, data, knowledge, prompt, threads)
    place = out or Path("proxytune-runs") / study.study
    run_and_show(study, Path(), place, place, None, jobs, wait)
    for what in missing(study):
        print(f"Not measured: {what}.")


@app.command()
def tables(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished studies, each as FOLDER or NAME=FOLDER; NAME is what the table calls it.")],
    arms: Annotated[list[str], typer.Option("--arm", help="An arm to show; may be repeated. Default: all.")] = [],  # noqa: B006
    form: Annotated[Format, typer.Option("--format", help="Format of the table; latex needs the package booktabs.")] = Format.table,
) -> None:
    """Several studies, such as those of several base sizes, in one table: base, proxy and direct, the gap closed, and what each costs.

    `proxytune tables 7B=runs/small 13B=runs/large --arm base --arm proxy@1 --arm full --format latex`
    """
    from evals.display.render import draw
    from evals.results.published import published_table, read_runs
    from proxytune.content import as_json

    table = published_table(read_runs(runs), arms)
    print(as_json(table.frame.to_dict("records")) if form is Format.json else draw([table], form))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt. Default: standard input.", show_default=False)] = None,
    base: Annotated[str, typer.Option(help="The large model: a local folder or a hub name.")] = ...,  # type: ignore[assignment]
    expert: Annotated[str | None, typer.Option(help="The small tuned model, or a LoRA adapter on the anti-expert.", show_default=False)] = None,
    antiexpert: Annotated[str | None, typer.Option(help="The same small model, untuned.", show_default=False)] = None,
    alpha: Annotated[float, typer.Option(help="Strength: base + alpha (expert - antiexpert).")] = 1.0,
    new_tokens: Annotated[int, typer.Option(min=1, help="The largest number of new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    speculate: Annotated[bool, typer.Option(help="Let the expert draft: the same distribution with fewer passes of the base.")] = False,
    explain: Annotated[bool, typer.Option(help="Show the probability of every token under each member.")] = False,
    chat: Annotated[list[str], typer.Option(help="A member that reads the prompt in its chat template; may be repeated.")] = [],  # noqa: B006
    system: Annotated[str | None, typer.Option(help="System prompt of the chat members.", show_default=False)] = None,
    response_prefix: Annotated[str, typer.Option(help="The beginning of the answer, for the chat members.", show_default=False)] = "",
    device: Annotated[str, typer.Option(help="Device of the base: cpu, cuda:0, or auto to spread it over all devices.")] = "cpu",
    proxy_device: Annotated[str | None, typer.Option(help="Device of expert and anti-expert. Default: the base's.", show_default=False)] = None,
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = DType.float32,
    map_tokens: Annotated[bool, typer.Option(help="Expert and anti-expert have another vocabulary: map its tokens by their bytes.")] = False,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
) -> None:
    """Answers a prompt with a mixture, or with the base alone if no expert is given.

    `proxytune generate "What is the capital of Mali?" --base large --expert small-lora --antiexpert small --chat expert`
    """
    import torch

    from evals.commands.generate import explanation_table
    from evals.commands.generate import generate as stream
    from evals.display.render import draw
    from evals.mixtures import Chat, Sources, load_mixture, read_prompts
    from evals.running.progress import quieten_libraries
    from proxytune.explanation import explain as explain_tokens

    quieten_libraries()
    torch.set_num_threads(threads)
    sources = Sources(base, expert, antiexpert, device, proxy_device, getattr(torch, dtype.value), map_tokens)
    model, members = load_mixture(sources, alpha, drafting=speculate)
    text = sys.stdin.read().rstrip("\n") if prompt is None else prompt
    prompts = read_prompts(members, text, Chat(chat, system, response_prefix))
    tokenizer = members["base"].tokenizer
    ids = stream(model, tokenizer, prompts, new_tokens, temperature, speculate)
    if explain:
        table = explanation_table(explain_tokens(model, ids, len(prompts["base"]), prompts=prompts), tokenizer)
        print(draw([table], "table"))
    if map_tokens:
        print(f"{model.mass_covered:.1%} of the base's probability stood on tokens that both vocabularies have", file=sys.stderr)
    if speculate:
        report = model.speculation
        print(f"{report.acceptance:.0%} of drafted tokens accepted, {report.tokens_per_pass:.2f} tokens a pass of the base", file=sys.stderr)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A local folder or a hub name.")],
    data: Annotated[str, typer.Argument(help="JSON lines, Parquet or a hub set: questions, instructions, prompts, messages or preferences.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; it must not exist yet.")],
    method: Annotated[Method, typer.Option(help="A LoRA adapter, or all weights.")] = Method.lora,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 2e-4 for LoRA, 2e-5 for all weights.", show_default=False)] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Examples per step, over all processes.")] = 16,
    micro_batch_size: Annotated[int | None, typer.Option(help="Examples in memory at a time. Default: all of a step.", show_default=False)] = None,
    padding_free: Annotated[bool, typer.Option(help="Examples of a batch in one row without padding: the same loss, less or more time.")] = False,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapter.")] = 16,
    target: Annotated[list[str], typer.Option(help="Name of layers that LoRA adapts; may be repeated. Default: all linear ones.")] = [],  # noqa: B006
    dora: Annotated[bool, typer.Option(help="LoRA with a learned magnitude.")] = False,
    rslora: Annotated[bool, typer.Option(help="LoRA scaled by the root of its rank.")] = False,
    frozen: Annotated[
        Half | None, typer.Option(help="With full: freeze this half of the layers, and embeddings and head.", show_default=False)
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of KL(untuned || tuned) in the loss.", show_default=False)] = None,
    preference: Annotated[float | None, typer.Option(help="DPO with this beta; needs data with rejected answers.", show_default=False)] = None,
    consistent: Annotated[float | None, typer.Option(help="Tune an expert inside --base + this (expert - MODEL).", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="The large model with which an expert will be used.", show_default=False)] = None,
    validation_share: Annotated[
        float | None, typer.Option(help="Hold out this share, keep the best weights, stop early.", show_default=False)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Template of a question, or chat: the model's chat template.")] = PROMPT,
    test: Annotated[str | None, typer.Option(help="Test data for a later comparison. Questions that are also tuned on are an error.")] = None,
    allow_overlap: Annotated[bool, typer.Option(help="Test questions may also be tuned on.")] = False,
    fsdp: Annotated[bool, typer.Option(help="Under torchrun on GPUs: shard the model as well.")] = False,
    checkpoint_minutes: Annotated[float, typer.Option(min=0, help="Minutes between checkpoints: what a stopped run loses at most.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the order of examples and of the adapter's first weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads of each process.")] = 2,
) -> None:
    """Tunes one model and prints the commands that use it.

    `proxytune tune small train.jsonl --out small-lora` makes the expert of a mixture; the small model is its anti-expert.
    Stop it at any time: the same command continues. Several processes: `torchrun --nproc_per_node 2 -m evals.cli tune …`.
    """
    import torch

    from evals.commands.tune import Run, tune_one
    from evals.running.progress import Display
    from finetune.checkpoints import is_main_process
    from proxytune.printable import printable

    torch.set_num_threads(threads)
    settings = {
        "method": method.value,
        "learning_rate": learning_rate,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "padding_free": padding_free,
        "rank": rank,
        "targets": tuple(target) or None,
        "dora": dora,
        "rslora": rslora,
        "frozen": None if frozen is None else frozen.value,
        "kl": kl,
        "preference": preference,
        "consistent": consistent,
        "early_stopping": None if validation_share is None else {"validation_share": validation_share},
    }
    with Display(quiet=not is_main_process()) as display:
        run = Run(model, data, out, settings, prompt, seed, base, test, allow_overlap, fsdp, 60 * checkpoint_minutes)
        print(printable(tune_one(run, display), keep="\n"), end="\n" if is_main_process() else "")


@app.command()
def rescore(
    folder: Annotated[Path, typer.Argument(help="Released generations: BENCHMARK/SYSTEM/predictions.jsonl and metrics.json.")],
    roles: Annotated[
        list[str],
        typer.Option(help="Systems for the gap closed: 'base=NAME proxy=NAME direct=NAME expert=NAME' (* and commas allowed); may be repeated."),
    ] = [],  # noqa: B006
    execute: Annotated[
        Path | None, typer.Option(help="Run code answers in a sandbox, with the prompts and tests of this HumanEval file.", show_default=False)
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="How the results go to standard output; json is the list of rows.")] = Format.table,
) -> None:
    """Scores released generations again: our metric beside the published one, intervals, the gap closed, exact tests.

    Nothing is executed unless --execute names the tests. Execution needs bubblewrap (bwrap) and is refused without it.
    """
    import json

    from evals.display.render import draw
    from evals.released.rescore import execute_in_sandbox, read_roles
    from evals.released.rescore import rescore as score
    from evals.released.tables import rescore_tables
    from evals.running.progress import Display
    from proxytune.printable import printable

    with Display() as display:
        code = None if execute is None else execute_in_sandbox(display)
        results = score(folder, code, display.say, humaneval=execute, roles=[read_roles(text) for text in roles])
    print(json.dumps(results["rows"], indent=1, allow_nan=False) if form is Format.json else draw(rescore_tables(results), form))
    for note in results["notes"]:
        print(printable(note), file=sys.stderr)


@app.command()
def corpus(
    folder: Annotated[Path, typer.Argument(help="Plain text, JSON lines or Parquet, or a folder of these: one document a line or row.")],
    items: Annotated[str, typer.Option(help="Items with subject and answer; with --model also statement and choices.")],
    model: Annotated[str | None, typer.Option(help="A local folder or a hub name: what does it say, and how sure is it?", show_default=False)] = None,
    confident: Annotated[float, typer.Option(min=0, max=1, help="With --model: a share among the choices from which an answer is confident.")] = 0.9,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    form: Annotated[Format, typer.Option("--format", help="Format of the output; json and csv have all items.")] = Format.table,
) -> None:
    """Counts in how many documents of a corpus an item's subject and answer stand, alone and together.

    With `--model` the answers are the model's: which signal tells the wrong ones, counts or the model's confidence, and what is it
    confident of although the corpus never says it?
    """
    from evals.commands.corpus import show_corpus

    show_corpus(folder, items, model, confident, form, threads)


@app.command()
def frontier(
    results: Annotated[Path, typer.Argument(help="A folder of PEFT's results (JSON), or a CSV file with the columns name, gain, loss and n.")],
    out: Annotated[Path, typer.Option(help="Folder of the figure.")] = Path("proxytune-runs/frontier-of-others"),
    form: Annotated[Format, typer.Option("--format", help="Format of the tables.")] = Format.table,
) -> None:
    """Draws gain against forgetting for numbers that were measured elsewhere: what is dominated, and what cannot be told apart.

    Read are the `method_comparison` results of Hugging Face PEFT, and any CSV file with name, gain (a share), loss (less is better) and
    n (items of the gain), perhaps loss_n and parameters.
    """
    from evals.commands.frontier import show_frontier

    show_frontier(results, out, form)


@app.command("claims")
def claims_(
    name: Annotated[str | None, typer.Argument(help="One finding, such as density or proxy. Default: all.", show_default=False)] = None,
    run: Annotated[bool, typer.Option("--run", help="Run the studies that judge it, in proxytune-runs, and rewrite its record.")] = False,
    folders: Annotated[list[Path], typer.Option("--from", help="Rewrite the records from a finished run of a shipped study; may be repeated.")] = [],  # noqa: B006
    outside: Annotated[
        Path | None, typer.Option(help="Folder of other people's files: recompute from them what was printed.", show_default=False)
    ] = None,
    jobs: Annotated[int | None, JOBS] = None,
    form: Annotated[Format, typer.Option("--format", help="Format of the output.")] = Format.table,
) -> None:
    """The ledger of seven findings of the literature: the claim, what would refute it, what the shipped studies say, and what was printed
    beside what comes out.

    It says supported, not supported, or cannot tell. Records are files that this command writes, with dates and hashes.
    """
    from evals.commands.claims import show, update

    update(name, run, folders, outside, jobs)
    show(name, form)


@app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line, with `--model proxytune` and our tasks.

    `proxytune lm-eval run --model proxytune --model_args base=large,expert=small-lora,antiexpert=small,alpha=0.5
    --tasks proxytune_capitals`; the argument `cache=answers.db` keeps answers on disk, keyed by the models' weights.
    """
    from evals.harness.model import run_harness

    run_harness(context.args)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet.")],
    base: Annotated[str, typer.Option(help="The large model: a local folder or a hub name.")],
    expert: Annotated[str, typer.Option(help="The small tuned model, or a LoRA adapter on the anti-expert.")],
    antiexpert: Annotated[str, typer.Option(help="The same small model, untuned.")],
    alpha: Annotated[float, typer.Option(help="Strength: base + alpha (expert - antiexpert).")] = 1.0,
) -> None:
    """Writes a folder that transformers loads as one model (with trust_remote_code, and this package installed).

    `lm-eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True --device cpu --tasks …` takes it, as do `transformers
    serve FOLDER --trust-remote-code` and any other tool that takes a causal language model. The members stay where they are. They are
    checked when they are loaded, and none of their own code is run.
    """
    from evals.mixtures import Sources, weights_of
    from proxytune.exported import export as write
    from proxytune.mixture import proxy_tuning
    from proxytune.printable import printable

    write(weights_of(Sources(base, expert, antiexpert)), proxy_tuning(alpha), folder)
    print(f"lm-eval run --model hf --model_args pretrained={printable(str(folder))},trust_remote_code=True,dtype=float32 --device cpu --tasks TASK")


@app.command()
def bench(
    models: Annotated[
        tuple[str, str] | None, typer.Option(metavar="BASE SMALL", help="Folders or hub names. Default: a random pair.", show_default=False)
    ] = None,
    expert: Annotated[str | None, typer.Option(help="A tuned LoRA adapter on SMALL. Default: one that changes little.", show_default=False)] = None,
    alpha: Annotated[float, typer.Option(help="Strength of the mixture.")] = 0.5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that each row decodes.")] = 24,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; figures are medians over them.")] = 3,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="A device, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[DType, typer.Option(help="Type of the weights.")] = DType.float32,
    form: Annotated[Format, typer.Option("--format", help="Format of the output.")] = Format.table,
) -> None:
    """Measures decoding and scoring with a mixture, beside the reference loop, the base alone, lm-eval, and the limit.

    Two copies of the small model, one of the base and lm-eval's logits must fit into memory. Stop other work first: it
    would change the times.
    """
    import tempfile

    import torch

    from evals.commands.bench import Bench, bench_tables, run_bench, steps
    from evals.display.render import draw
    from evals.running.progress import Display
    from proxytune.content import as_json

    wanted = Bench(models, expert, alpha, tokens, rounds, threads, device, getattr(torch, dtype.value))
    with Display() as display, tempfile.TemporaryDirectory() as folder, display.bar("measuring", steps(wanted)) as progress:
        results = run_bench(wanted, Path(folder), display.say, progress)
    print(as_json(results) if form is Format.json else draw(bench_tables(results), form))


@world.command()
def build(
    name: Annotated[str, typer.Argument(help="The world: a recipe of probes/world/recipes.py, such as default or tiny.")] = "default",
    seeds: Annotated[list[int], typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of a family; may be repeated.")] = [0],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of the families; a study finds those in the folder worlds of its own --out.")] = Path(
        "proxytune-runs/world/worlds"
    ),
    checkpoints: Annotated[
        bool, typer.Option(help="Keep the base before its first step and after 100, 200, 400, … as model folders checkpoints/step-N.")
    ] = False,
) -> None:
    """Draws a corpus, counts its ledger, and pretrains the base and the small model on it (about 3.5 minutes per seed on one core).

    A family that is already there is kept.
    """
    import torch

    from evals.running.progress import Display
    from probes.world.family import build_family

    torch.set_num_threads(1)
    with Display() as display:
        for seed in seeds:
            display.say(f"seed {seed}: {build_family(name, seed, out, display, checkpoints=checkpoints)}")


RESUMED = {"claims", "compare", "probe", "report", "select", "tune"}
_received: list[int] = []


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM. It is not an `Exception`, so that code that catches errors does not catch it."""


def _stop(number: int, _: object) -> None:
    _received.append(number)
    raise Stopped(128 + number)


def _send_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Python drops exceptions that are raised in a `__del__`: a signal that arrived there is sent again a moment later."""
    if isinstance(dropped.exc_value, Stopped):
        threading.Timer(0.05, os.kill, (os.getpid(), _received[-1])).start()
    else:
        sys.__unraisablehook__(dropped)


def main() -> None:
    """Runs the command line. A user's mistake prints one line on standard error, with exit code 2; so do Ctrl-C (130) and SIGTERM (143)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.unraisablehook = _send_again
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        sys.exit(app(standalone_mode=False))
    except BaseException as error:
        if _received:  # whatever exception it has become on the way
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            again = "; run the same command again, it continues" if {*sys.argv[1:2]} & RESUMED else ""
            print(f"proxytune: stopped{again}", file=sys.stderr)
            sys.exit(128 + _received[0])
        if isinstance(error, USAGE_ERROR):
            _fail(error.format_message())  # empty if there were no arguments: the help was printed
        from proxytune.errors import UserError

        # A full disk or a file without permission is not a fault in the program either.
        if not isinstance(error, UserError | OSError):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    from proxytune.printable import one_line

    if message:
        print(f"proxytune: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
