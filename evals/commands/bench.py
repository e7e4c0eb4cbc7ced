"""`proxytune bench`: the time of decoding and scoring with a mixture, beside the reference implementations, in one run.

All rows are measured in turn within each round and compared within it; medians over rounds are printed. The limit is computed: with
one token at a time, reading the weights dominates, so that a mixture takes at least the time of the base alone (as we run it)
times the bytes of all its weights over the bytes of the base's.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Int
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from evals.display.cells import Table
from finetune.encoding import continuation_ids, prompt_ids
from finetune.formats import read_items
from proxytune.adapters import UNTOUCHED, attach, is_adapter
from proxytune.cost import bytes_read
from proxytune.drafting import rounded_draft
from proxytune.errors import UserError
from proxytune.member import Adapter, Member, load_member
from proxytune.mixture import Mixture, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded, positions_of
from proxytune.prepacked import prepack_linear_layers, unpack_linear_layers
from proxytune.scoring import Request, score

PROMPTS = (
    "def quicksort(items):\n    ",
    "The three largest countries of Europe are",
    "# Read a CSV file and print the mean of each column\nimport",
    "class Stack:\n    def __init__(self):\n",
    "Question: What is seven times eight?\nAnswer:",
    "SELECT name, population FROM countries WHERE",
    "The following function reverses a linked list:\n\n",
    "for (int i = 0; i < n; i++) {\n",
)
SHOTS, ASKED, TEN = 5, 10, 10
HARNESS_BATCH = 4  # lm-eval keeps the logits of every position


@dataclass(frozen=True)
class Bench:
    """What to measure. `models` are base and small; without them a random pair is made. `expert` is a LoRA adapter on the small model."""

    models: tuple[str, str] | None = None
    expert: str | None = None
    alpha: float = 0.5
    tokens: int = 24
    rounds: int = 3
    threads: int = 2
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@torch.inference_mode()
def three_passes(
    models: Mapping[str, PreTrainedModel],
    mixture: Mapping[str, float],
    input_ids: Int[Tensor, "rows time"],
    mask: Int[Tensor, "rows time"],
    new_tokens: int,
) -> Int[Tensor, "rows longer_time"]:
    """The reference: greedy decoding as in the paper's code, with the members one after another, each with its own cache."""
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    fed = input_ids
    for _ in range(new_tokens):
        positions = positions_of(mask)[:, -fed.shape[1] :]
        logits = torch.tensor(0.0)
        for name, model in models.items():
            output = model(input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
            logits = logits + mixture[name] * output.logits[:, -1].float()
        fed = logits.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, fed], dim=1)
        mask = torch.cat([mask, torch.ones_like(fed)], dim=1)
    return input_ids


def run_bench(bench: Bench, folder: Path, say: Callable[[str], None], progress: Callable[[int], None]) -> dict[str, Any]:
    """Measures everything; models that have to be made go to `folder`. Raises `UserError` for an expert without models and if loading fails."""
    torch.set_num_threads(bench.threads)
    if bench.expert is not None and bench.models is None:
        raise UserError("--expert: it belongs to a small model; name base and small with --models")
    base, small = bench.models or _make_pair(folder)
    adapter = _adapter(bench, small, folder)
    members, apart = _load(bench, base, small, adapter)
    on_cpu = bench.device == "cpu" and bench.dtype == torch.float32
    ours = ProxyTunedForCausalLM(members | ({"draft": rounded_draft(members["expert"])} if on_cpu else {}), proxy_tuning(bench.alpha))
    full = ProxyTunedForCausalLM(members | apart, proxy_tuning(bench.alpha))
    say(f"base {base}: {_gigabytes(members['base'].model):.2f} GB a token; small {small}: {_gigabytes(apart['antiexpert'].model):.2f} GB")
    say(ours.extra_repr())
    tokenizer = members["base"].tokenizer
    seen: dict[tuple[str, str], list[float]] = {}
    found: dict[str, Any] = {}
    loaded = _Loaded(ours, full, tokenizer, _requests(tokenizer, bench.models is not None), _prompts(tokenizer, bench.models is not None))
    for _ in range(bench.rounds):
        for row, batch, run, tokens in _runs(bench, loaded, found):
            began = time.perf_counter()
            run()
            seen.setdefault((row, batch), []).append((time.perf_counter() - began) / tokens)
            progress(1)
    return _results(bench, ours, full, seen, found)


def steps(bench: Bench) -> int:
    """How many steps `run_bench` reports to its progress."""
    return bench.rounds * (2 * 6 + 5)


class _Loaded(NamedTuple):
    """The mixture as we run it, the same mixture of three whole models, and the requests and prompts for both."""

    ours: ProxyTunedForCausalLM
    full: ProxyTunedForCausalLM
    tokenizer: PreTrainedTokenizerBase
    requests: list[Request]
    prompts: list[list[int]]


def _runs(bench: Bench, loaded: _Loaded, found: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[], Any], int]]:
    """What one round measures, in order: a row's name, its batch, a function that runs it, and the number of units it produces."""
    ours, full, requests, count = loaded.ours, loaded.full, loaded.requests, bench.tokens
    base = ours.members["base"]
    reference = {name: full.members[name] for name in ("base", "expert", "antiexpert")}
    row: Any = proxy_tuning(bench.alpha)
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": count, "min_new_tokens": count}
    batches = {str(size): left_padded(loaded.prompts[:size], ours.config.pad_token_id or 0, ours.device) for size in (1, 8)}

    def decode(model: Any, batch: str, mixture: Mixture | None, name: str, **options: Any) -> Callable[[], None]:
        ids, mask = batches[batch]

        def run() -> None:
            if mixture is not None:
                model.mixture = mixture
            found[f"{name}/{batch}"] = model.generate(ids, attention_mask=mask, **greedy, **options)[:, ids.shape[1] :].tolist()
            if options.get("speculate"):
                found[f"speculation/{batch}"] = model.speculation

        return run

    def loop(batch: str) -> Callable[[], None]:
        return lambda: found.update({f"reference/{batch}": three_passes(reference, row, *batches[batch], count)[:, -count:].tolist()})

    for batch in batches:
        yield "base alone, transformers", batch, decode(base, batch, None, "theirs"), count
        yield "three passes, the reference loop", batch, loop(batch), count
    yield "lm-eval's HF model, base", "scoring", lambda: found.update(harness=_harness(loaded)), 1
    yield "ours, base, layers not packed", "scoring", lambda: score(ours, requests, {"base": {"base": 1.0}}), 1
    with _packed(ours, full):
        draft = {"speculate": True, "draft": "draft" if "draft" in ours.members else "expert"}
        for batch in batches:
            yield "base alone, ours", batch, decode(ours, batch, {"base": 1.0}, "base"), count
            yield "ours, three models", batch, decode(full, batch, row, "full"), count
            yield "ours, LoRA expert", batch, decode(ours, batch, row, "ours"), count
            yield "ours, LoRA expert, speculating", batch, decode(ours, batch, row, "speculated", **draft), count
        one: dict[str, Mixture] = {"base": {"base": 1.0}, "expert": {"expert": 1.0}, "proxy": proxy_tuning(1.0)}
        ten = {name: one[name] for name in ("base", "expert")} | {f"proxy@{step / 5:g}": proxy_tuning(step / 5) for step in range(1, TEN + 1)}
        yield "ours, base", "scoring", lambda: found.update(score=score(ours, requests, {"base": {"base": 1.0}})["base"].tolist()), 1
        yield "ours, base + expert + proxy", "scoring", lambda: score(ours, requests, one), 1
        yield f"ours, base + expert + proxy at {TEN} alphas", "scoring", lambda: score(ours, requests, ten), 1


@contextmanager
def _packed(*models: ProxyTunedForCausalLM) -> Iterator[None]:
    """Prepacks the layers of all members except the draft, and restores plain layers afterwards."""
    members = [member for model in models for name, member in model.members.items() if name != "draft"]
    prepack_linear_layers(*members)
    try:
        yield
    finally:
        unpack_linear_layers(*members)


def _results(
    bench: Bench, ours: ProxyTunedForCausalLM, full: ProxyTunedForCausalLM, seen: dict[tuple[str, str], list[float]], found: dict[str, Any]
) -> dict[str, Any]:
    base = bytes_read(ours.members["base"])
    read = {
        "base alone, transformers": base,
        "base alone, ours": base,
        "three passes, the reference loop": base + bytes_read(full.members["expert"]) + bytes_read(full.members["antiexpert"]),
        "ours, three models": base + bytes_read(full.members["expert"]) + bytes_read(full.members["antiexpert"]),
        "ours, LoRA expert": base + bytes_read(ours.members["expert"]),
    }

    def ratio(row: str, of: str, batch: str) -> float:
        """The median of the ratios within each round: noise of the machine affects both rows of a round."""
        return statistics.median(one / other for one, other in zip(seen[row, batch], seen[of, batch], strict=True))

    decoding, scoring = [], []
    for (row, batch), times in seen.items():
        entry: dict[str, Any] = {"row": row, "batch": batch, "seconds": statistics.median(times), "rounds": times}
        if batch == "scoring":
            entry["speedup"] = 1 / ratio(row, "lm-eval's HF model, base", batch)
            scoring.append(entry)
            continue
        entry["of_base_transformers"] = ratio(row, "base alone, transformers", batch)
        entry["of_base"] = ratio(row, "base alone, ours", batch)
        if row in read:
            entry |= {"gigabytes": read[row] / 1e9, "of_limit": entry["of_base"] / (read[row] / base)}
        if row.endswith("speculating"):
            report = found[f"speculation/{batch}"]
            entry |= {"acceptance": report.acceptance if report.drafted else None, "tokens_per_pass": report.tokens_per_pass}
        decoding.append(entry)
    ten = next(row for row, batch in seen if batch == "scoring" and "alphas" in row)
    return {
        "settings": {"alpha": bench.alpha, "tokens": bench.tokens, "rounds": bench.rounds, "threads": bench.threads, "device": bench.device},
        "decoding": decoding,
        "scoring": scoring,
        "ten_alphas_of_one": ratio(ten, "ours, base + expert + proxy", "scoring"),
        "largest_difference_from_harness": max(abs(one - other) for one, other in zip(found["harness"], found["score"], strict=True)),
        "same_tokens_as_reference": {
            name: {batch: found[f"{name}/{batch}"] == found[f"reference/{batch}"] for batch in ("1", "8")} for name in ("full", "ours", "speculated")
        },
    }


def bench_tables(results: dict[str, Any]) -> list[Table]:
    """The results as tables."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    decoding = pd.DataFrame(
        [
            {
                "decoding": entry["row"],
                "batch": entry["batch"],
                "ms a step": number(1000 * entry["seconds"], ".1f"),
                "x base, transformers": number(entry["of_base_transformers"]),
                "x base, ours": number(entry["of_base"]),
                "GB a step": number(entry.get("gigabytes")),
                "x limit": number(entry.get("of_limit")),
                "accepted": number(entry.get("acceptance")),
                "tokens a pass": number(entry.get("tokens_per_pass")),
            }
            for entry in sorted(results["decoding"], key=lambda entry: entry["batch"])
        ]
    )
    scoring = pd.DataFrame(
        [
            {"scoring": entry["row"], "seconds": number(entry["seconds"]), "x as fast as lm-eval": number(entry["speedup"])}
            for entry in results["scoring"]
        ]
    )
    settings, same = results["settings"], results["same_tokens_as_reference"]
    differing = [f"{name} at batch {batch}" for name, batches in same.items() for batch, equal in batches.items() if not equal]
    return [
        Table(
            "Decoding",
            decoding,
            f"Medians of {settings['rounds']} rounds, {settings['threads']} threads, {settings['device']}; a step is one token of every row, the "
            "prompt included. The limit is the time of the base alone, as we run it, times the bytes of weights over the base's. "
            + (f"Tokens differ from the reference loop's: {', '.join(differing)}." if differing else "All tokens are the reference loop's."),
        ),
        Table(
            "Scoring",
            scoring,
            f"{ASKED} questions after {SHOTS} examples, four choices each. Largest difference from lm-eval: "
            f"{results['largest_difference_from_harness']:.1e} nats per request. {TEN} alphas take {results['ten_alphas_of_one']:.2f} x one.",
        ),
    ]


def _prompts(tokenizer: PreTrainedTokenizerBase, real: bool) -> list[list[int]]:
    if real:
        return [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    return torch.randint(3, len(tokenizer), (len(PROMPTS), 12), generator=torch.Generator().manual_seed(0)).tolist()


def _requests(tokenizer: PreTrainedTokenizerBase, real: bool) -> list[Request]:
    """Few-shot requests with four choices: capitals or, for the random pair, random words of the same shape."""
    if not real:
        generator = torch.Generator().manual_seed(0)

        def draw(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, len(tokenizer), (length,), generator=generator).tolist())

        shots = draw(100)
        return [Request(shots + prefix, draw(3)) for prefix in (draw(20) for _ in range(ASKED)) for _ in range(4)]
    with resources.as_file(resources.files("evals") / "studies" / "capitals" / "knowledge.jsonl") as path:
        items = [item for item in read_items(path, "items").items if len(item.choices) == 4][: SHOTS + ASKED]
    shown = "".join(f"Question: {item.question}\nAnswer: {item.answer}\n\n" for item in items[:SHOTS])
    return [
        Request(tuple(prompt_ids(tokenizer, f"{shown}Question: {item.question}\nAnswer:")), tuple(continuation_ids(tokenizer, choice)))
        for item in items[SHOTS:]
        for choice in item.choices
    ]


def _harness(loaded: _Loaded) -> list[float]:
    model = HFLM(pretrained=loaded.ours.members["base"], tokenizer=loaded.tokenizer, batch_size=HARNESS_BATCH, device=str(loaded.ours.device))
    asked = [(("", ""), list(request.prefix), list(request.continuation)) for request in loaded.requests]
    return [float(answer[0]) for answer in model._loglikelihood_tokens(asked, disable_tqdm=True)]


def _load(bench: Bench, base: str, small: str, adapter: Path) -> tuple[dict[str, Member], dict[str, Member]]:
    """The members as we run them, and expert and anti-expert as separate models, as the published code needs them.

    The anti-expert has the same tensors in both: there are two copies of the small model, not three.
    """
    merged = load_member(small, adapter, field="--expert", dtype=bench.dtype, device=bench.device, merged=True)  # reports what is wrong with either
    plain = load_member(small, field="--models", dtype=bench.dtype, device=bench.device)
    tensors = {id(tensor): tensor for tensor in itertools.chain(plain.model.parameters(), plain.model.buffers())}
    antiexpert = Member(copy.deepcopy(plain.model, dict(tensors)), plain.tokenizer)
    attached = attach(plain.model, [adapter])
    if attached is None:
        raise UserError(f"--expert: rows with and without '{adapter}' cannot share a pass of '{small}'; choose another pair")
    switch, (name,) = attached
    members = {
        "base": load_member(base, field="--models", dtype=bench.dtype, device=bench.device),
        "expert": Member(plain.model, plain.tokenizer, Adapter(switch, name)),
        "antiexpert": Member(plain.model, plain.tokenizer, Adapter(switch, UNTOUCHED)),
    }
    return members, {"expert": merged, "antiexpert": antiexpert}


def _adapter(bench: Bench, small: str, folder: Path) -> Path:
    """The expert: the given adapter, or one that changes almost nothing and costs as much as a tuned one."""
    if bench.expert is not None:
        if not is_adapter(bench.expert):
            raise UserError(f"--expert: '{bench.expert}' holds no adapter_config.json; give a LoRA adapter on the small model")
        return Path(bench.expert)
    torch.manual_seed(0)
    model = get_peft_model(load_member(small, field="--models").model, LoraConfig(r=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-4)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def _make_pair(folder: Path) -> tuple[str, str]:
    """Two random models, large enough to be bound by memory bandwidth, that choose the same next token nine times out of ten.

    In the head each token's successor has the token's own embedding, and layers with the usual initial weights change it little;
    for a tenth of the tokens the small model has another successor. The acceptance rate is therefore built in, and not a finding.
    """
    words, others = 8192, 820
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(3, words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")
    torch.manual_seed(0)
    successor = torch.randperm(words)
    for name, hidden, layers in (("base", 1536, 12), ("small", 768, 8)):
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            embeddings = model.get_input_embeddings().weight.normal_()
            model.get_output_embeddings().weight[successor] = embeddings / hidden**0.5
        successor = successor.clone()
        successor[:others] = successor[:others].roll(1)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "small")


def _gigabytes(model: torch.nn.Module) -> float:
    return bytes_read(model) / 1e9
