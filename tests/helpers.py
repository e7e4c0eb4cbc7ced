"""What several test modules share: tiny random models and a tiny tokenizer, a tuning, a study, the command line. No download, no hub.

What needs `evals` imports it within: scripts that tests start as processes of their own import this file, too.
"""

import contextlib
import copy
import functools
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TrainerCallback,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from finetune.items import Item
from finetune.recipe import EarlyStopping, Tuning, TuningRun
from finetune.tuning import TuningReport, tune
from probes.internals.blocks import blocks_of
from proxytune import Member, ProxyTunedForCausalLM, load_member, proxy_tuning

if TYPE_CHECKING:
    from evals.results.summary import Results
    from evals.running.runner import Finished
    from evals.sandbox import Verdict
    from evals.study import Study

VOCABULARY = 50
TESTS = Path(__file__).parent
PATHS = [str(TESTS.parent), str(TESTS)]  # for scripts that tests start
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma", "mistral")
# One with rotary positions, one with learned ones and one whose blocks are parallel; the others by hand.
SOME_ARCHITECTURES = [name if name in ("llama", "gpt2", "gpt_neox") else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def make_tokenizer(words: int = VOCABULARY, swapped: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{number}": number for number in range(3, words)}
    if swapped:
        vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


def make_model(architecture: str = "llama", seed: int = 0, layers: int = 2, hidden: int = 32, rows: int = VOCABULARY) -> PreTrainedModel:
    """A random model whose logits are spread enough for greedy decoding to be decided."""
    kind = transformers.CONFIG_MAPPING[architecture]
    common = {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    if architecture == "gpt2":
        config = kind(n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common)
    else:
        sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
        if architecture != "gpt_neox":
            sizes["num_key_value_heads"] = 2
        if architecture in ("qwen3", "gemma"):
            sizes["head_dim"] = hidden // 4
        if architecture == "mistral":
            sizes["sliding_window"] = None
        config = kind(max_position_embeddings=128, **sizes, **common)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def make_members(architecture: str = "llama") -> dict[str, Member]:
    tokenizer = make_tokenizer()
    return {
        "base": Member(make_model(architecture, seed=1, layers=3, hidden=48), tokenizer),
        "expert": Member(make_model(architecture, seed=2), tokenizer),
        "antiexpert": Member(make_model(architecture, seed=3), tokenizer),
    }


# --- tuning ---


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def items(count: int = 24) -> list[Item]:
    """Questions and answers of uneven lengths."""
    return [
        Item(
            question=words(*range(3 + number % 7, 8 + number % 7 + number % 5)),
            answer=words(*range(20 + number % 9, 21 + number % 9 + number % 4)),
            rejected=words(40 + number % 5),
        )
        for number in range(count)
    ]


def save_models(place: Path) -> None:
    """A base and a small model of one vocabulary."""
    for name, seed, hidden in (("base", 1, 48), ("small", 2, 32)):
        make_model(seed=seed, layers=4, hidden=hidden).save_pretrained(place / name)
        make_tokenizer().save_pretrained(place / name)


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora", "rank": 2},
    "micro-batches": {"micro_batch_size": 2, "padding_free": True},
    "consistent": {"consistent": 1.0},
    "preference": {"preference": 0.1},
    "steps": {"epochs": None, "steps": 12},
    "early-stopped": {"early_stopping": EarlyStopping(validation_share=0.2, every_steps=2, patience=3)},
}


class Stop(TrainerCallback):
    """Stops the run as Ctrl-C would, at the end of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run_tuning(
    place: Path, name: str, watcher: TrainerCallback | None = None, every: float = 0.0, fsdp: bool = False, **options: Any
) -> TuningReport:
    """Tunes the small model of a folder (fixture `folder`) into its subfolder `name`, with a checkpoint every `every` seconds."""
    settings = {"method": "full", "learning_rate": 1e-2, "epochs": 2.0, "batch_size": 4} | options
    base = place / "base" if "consistent" in settings else None
    run = TuningRun(
        place / "small",
        items(20),
        Tuning(**settings),
        prompt="{question}",
        ending="",
        seed=0,
        out=place / name,
        base=base,
        checkpoint_seconds=every,
        fsdp=fsdp,
    )
    return tune(run, watcher)


@functools.cache
def unbroken_tuning(recipe: str = "full", epochs: float = 2.0, learning_rate: float = 1e-2) -> tuple[TuningReport, str]:
    """What an uninterrupted run of that recipe gives on the models of the fixture `folder`: its report and its result's fingerprint."""
    with tempfile.TemporaryDirectory() as place:
        save_models(Path(place))
        options = {"epochs": epochs, "learning_rate": learning_rate} | TUNINGS[recipe]
        report = run_tuning(Path(place), "unbroken", every=1e9, **options)
        return report, fingerprint(Path(place), "unbroken")


def fingerprint(place: Path, name: str) -> str:
    lora = (place / name / "adapter_config.json").exists()
    return load_member(place / "small", place / name).fingerprint if lora else load_member(place / name).fingerprint


# --- studies ---

TUNING = {"method": "full", "learning_rate": 3e-3, "epochs": 1, "batch_size": 8}
STUDY: dict[str, Any] = {
    "study": "small",
    "worlds": ["tiny"],
    "seeds": [0],
    "batch_size": 100,
    "measures": ["task", "knowledge", "forgetting", "density"],
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING},
        "proxy": {"kind": "proxy", "alpha": [0, 1]},
        "full": {"kind": "direct", "tuning": TUNING},
        "lora": {"kind": "direct", "tuning": TUNING | {"method": "lora", "rank": 4}},
    },
}


CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def write_choice_task(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """A task of the harness in a folder of its own: rows of text, choices and gold (the right one's place)."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICE_TASK.format(name=name, file=file))
    return folder


class Unbroken(NamedTuple):
    """A study that ran from beginning to end: its folder, which no test may change, and what came out."""

    out: Path
    finished: "Finished"
    results: "Results"


def place_world(tiny_family: Path, out: Path) -> Path:
    shutil.copytree(tiny_family, out / "worlds" / "tiny" / "seed-0")
    return out


def run_in_process(study: "Study", out: Path, folder: Path = Path()) -> "Finished":
    """All of a study in this process."""
    from evals.running.progress import Display
    from evals.running.runner import run_study

    with Display() as display:
        return run_study(study, folder, out, display, jobs=1)


PLAIN_TUNING = {"method": "full", "learning_rate": 1e-3}
GOOD: dict[str, Any] = {
    "study": "good",
    "worlds": ["tiny"],
    "measures": ["task"],
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": dict(PLAIN_TUNING)},
        "proxy": {"kind": "proxy", "alpha": [0.5, 1]},
        "full": {"kind": "direct", "tuning": dict(PLAIN_TUNING)},
    },
}


def changed(*path: str, value: Any) -> dict[str, Any]:
    """The good study with another value at a path of keys."""
    study = copy.deepcopy(GOOD)
    place = study
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return study


def load(folder: Path, study: Any) -> "Study":
    """A study, given as values or as YAML, read from a file of the folder."""
    from evals.study import load_study

    (folder / "study.yaml").write_text(study if isinstance(study, str) else yaml.safe_dump(study, sort_keys=False))
    return load_study(folder / "study.yaml")[0]


class Counted:
    """Counts how often a model is run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.passes = 0
        forward = ProxyTunedForCausalLM.member_logits

        def counting(*arguments: Any, **options: Any) -> Any:
            self.passes += 1
            return forward(*arguments, **options)

        monkeypatch.setattr(ProxyTunedForCausalLM, "member_logits", counting)


# --- the command line ---


def run_command(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    """`proxytune ARGUMENTS` within this process, as far as standard input, output, error and the exit code go; what it sets is set back."""
    from evals import cli

    argv, hook, threads = sys.argv, sys.unraisablehook, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out, error, stdin = io.StringIO(), io.StringIO(), sys.stdin
    sys.argv, sys.stdin, code = ["proxytune", *map(str, arguments)], io.StringIO(given), None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv, sys.stdin, sys.unraisablehook = argv, stdin, hook
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code is not None, "the command line did not exit"
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), error.getvalue())


# --- signals ---


def send(number: int) -> None:
    """A signal to this process."""
    os.kill(os.getpid(), number)
    for _ in range(1000):
        pass  # a handler runs between two steps of the interpreter


class Cycle:
    """Collected by `gc` alone; the signal comes while it is being deleted."""

    def __init__(self, number: int):
        self.itself, self.number = self, number

    def __del__(self) -> None:
        send(self.number)


def while_collecting(number: int) -> None:
    Cycle(number)
    gc.collect()


def once(before: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """The function, which acts first when it is called for the first time."""
    left = iter([act])

    def call(*arguments: Any, **options: Any) -> Any:
        next(left, lambda: None)()
        return before(*arguments, **options)

    return call


# --- models that were changed ---


def member_of(model: PreTrainedModel) -> Member:
    return Member(model, make_tokenizer())


def noisy(model: PreTrainedModel, sizes: dict[str, float], seed: int = 0) -> PreTrainedModel:
    """A copy with noise in the blocks named, in units of each matrix's own size."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    blocks = blocks_of(model)
    with torch.no_grad():
        for block, size in sizes.items():
            for name, parameter in result.named_parameters():
                if name in blocks[block]:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter += size * parameter.square().mean().sqrt() * noise
    return result


def tied(architecture: str, tie: bool) -> PreTrainedModel:
    config = copy.deepcopy(make_model(architecture, layers=4).config)
    config.tie_word_embeddings = tie
    return AutoModelForCausalLM.from_config(config).eval()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flat(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def items_about(count: int = 9) -> list[Item]:
    """Statements of several lengths about w7 or w8, whose name is in the middle."""
    drawn = torch.randint(10, VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    items = []
    for number, row in enumerate(drawn):
        before, after = (" ".join(f"w{word}" for word in words) for words in (row[: 1 + number % 2], row[1 : 2 + number % 3]))
        subject = f"w{7 + number % 2}"
        choices = tuple(f"w{3 + (number + other) % 6}" for other in range(4))
        items.append(Item(question=f"q{number}", answer=choices[2], choices=choices, statement=f"{before} {subject} {after}", subject=subject))
    return items


# --- a mixture as a plain model: the slow, obviously right one ---

ALPHA = 0.8
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNO"
TOKENS = ["<pad>", "<bos>", "<eos>", *LETTERS, "ab", "abc", "de", "def", "xy", "z!"]
LETTERED = {token: number for number, token in enumerate(TOKENS)}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 2}
DICTIONARY = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


class Plain(PreTrainedModel, GenerationMixin):
    """base + alpha * (expert - antiexpert), from each model's own pass over the whole text."""

    config_class = PreTrainedConfig

    def __init__(self, base: PreTrainedModel, expert: PreTrainedModel, antiexpert: PreTrainedModel, alpha: float = ALPHA):
        rows = base.config.vocab_size
        super().__init__(PreTrainedConfig(vocab_size=rows, num_hidden_layers=1, hidden_size=1, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        self.models = torch.nn.ModuleList([base, expert, antiexpert])
        self.weights = [1, alpha, -alpha]

    def init_weights(self) -> None:
        pass

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True, logits_to_keep=0, **_: Any
    ) -> CausalLMOutputWithPast:
        """Its cache has one layer, whose keys are tokens and whose values are positions."""
        read = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(read, read + input_ids.shape[1])[None]
        ids, positions = input_ids, position_ids.expand_as(input_ids)
        if use_cache:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            ids, positions = past_key_values.update(ids.float()[:, None, :, None], positions.float()[:, None, :, None], 0)
            ids, positions = ids[:, 0, :, 0].long(), positions[:, 0, :, 0].long()
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        logits = 0
        for weight, model in zip(self.weights, self.models, strict=True):
            where = {} if model.config.model_type == "bloom" else {"position_ids": positions}
            logits = logits + weight * model(ids, attention_mask=mask, use_cache=False, **where).logits
        kept = logits_to_keep or input_ids.shape[1]
        return CausalLMOutputWithPast(logits=logits[:, -kept:], past_key_values=past_key_values if use_cache else None)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters and a few pairs, as stop strings and token healing need one."""
    tokenizer = Tokenizer(models.BPE(LETTERED, [("a", "b"), ("ab", "c"), ("d", "e"), ("de", "f"), ("x", "y")], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


def model_of(architecture: str, seed: int, layers: int) -> PreTrainedModel:
    if architecture != "bloom":
        return make_model(architecture, seed=seed, layers=layers)
    torch.manual_seed(seed)
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=layers, n_head=4, initializer_range=0.3, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


@functools.cache
def models_of(architecture: str) -> list[PreTrainedModel]:
    """An expert near the base, so that much is accepted and something refused."""
    base, antiexpert = model_of(architecture, 1, 3), model_of(architecture, 3, 2)
    expert = model_of(architecture, 1, 3)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    return [base, expert, antiexpert]


def mixture_of(architecture: str) -> ProxyTunedForCausalLM:
    members = {name: Member(model, letters()) for name, model in zip(("base", "expert", "antiexpert"), models_of(architecture), strict=True)}
    return ProxyTunedForCausalLM(members, proxy_tuning(ALPHA))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    ids, mask = drawn(3, 8), torch.ones(3, 8, dtype=torch.long)
    for row, padding in enumerate((5, 0, 2)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


class StopsByRow(StoppingCriteria):
    """Knows which row is which, and how often it was asked."""

    def __init__(self, limits: Sequence[int]):
        self.limits, self.widths = torch.tensor(limits), []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.widths.append(input_ids.shape[1])
        return input_ids.shape[1] >= self.limits


# --- released generations ---

CHOICE_PROMPT = "Which?\nA. This.\nB. That.\nC. Neither.\n\nThe answer is:"


def write_rows(folder: Path, name: str, rows: Sequence[Any] | Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = name.endswith(".jsonl")
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n" if lines else json.dumps(rows))


def math_items(outputs: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"question": f"q{place}", "answer": answer, "model_output": output, "prediction": "not to be trusted"}
        for place, (output, answer) in enumerate(zip(outputs, answers, strict=True))
    ]


def write_math(root: Path, system: str, right: Sequence[bool], published: float | None = None) -> None:
    write_rows(root / "sums" / system, "predictions.jsonl", math_items(["so 7." if value else "so 8." for value in right], ["7"] * len(right)))
    if published is not None:
        write_rows(root / "sums" / system, "metrics.json", {"exact_match": published})


def choice_items(outputs: Sequence[str], answers: str) -> list[dict[str, Any]]:
    return [
        {"Question": f"q{place}", "mc_prompt": CHOICE_PROMPT, "mc_answer_idx": answer, "mc_output": output, "parsed_output": "A", "correct": True}
        for place, (output, answer) in enumerate(zip(outputs, answers, strict=True))
    ]


def row_of(results: Mapping[str, Any], metric: str, system: str = "raw") -> dict[str, Any]:
    (row,) = [row for row in results["rows"] if (row["metric"], row["system"]) == (metric, system)]
    return dict(row)


def patterned(*parts: tuple[bool, int]) -> list[bool]:
    return [value for value, times in parts for _ in range(times)]


def three_systems(root: Path) -> dict[str, list[bool]]:
    """Shares .2, .5 and .8 of 40: half of the gap is closed."""
    systems = {"raw": patterned((True, 8), (False, 32)), "steered-1": patterned((True, 20), (False, 20)), "tuned": patterned((False, 8), (True, 32))}
    for name, right in systems.items():
        write_math(root, name, right, published=sum(right) / 40)
    return systems


# --- sandboxes ---

try:
    import pyseccomp
except RuntimeError:  # libseccomp is missing
    pyseccomp = None

needs_bubblewrap = pytest.mark.skipif(
    shutil.which("bwrap") is None or pyseccomp is None, reason="bubblewrap or libseccomp is not installed: no program can be run"
)


def cases(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


def verdict(solution: str, test: str = "assert f() == 'refused'", entry_point: str = "f", setup: str = "", **options: Any) -> "Verdict":
    from evals.sandbox import Program, run_programs

    return run_programs([Program(solution, test, entry_point, setup)], **options)[0]
