"""The benchmark's ratios are of runs that give the same tokens and the same scores."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_members, run_command

from evals.commands.bench import Bench, bench_tables, run_bench, steps, three_passes
from evals.display.render import draw
from proxytune.errors import UserError
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM


def test_the_reference_loop_is_generate() -> None:
    members = make_members()
    model = ProxyTunedForCausalLM(members, proxy_tuning(0.8))
    ids, mask = torch.randint(3, 50, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0
    made = three_passes({name: member.model for name, member in members.items()}, proxy_tuning(0.8), ids, mask, 8)
    assert torch.equal(made, model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=None))


def test_a_run_gives_every_figure(lora_family: Path, tmp_path: Path) -> None:
    threads, done = torch.get_num_threads(), []
    bench = Bench((str(lora_family / "base"), str(lora_family / "small")), str(lora_family / "polite"), tokens=4, rounds=2, threads=1)
    results = run_bench(bench, tmp_path, lambda line: None, done.append)
    torch.set_num_threads(threads)
    assert sum(done) == steps(bench)
    assert results["same_tokens_as_reference"] == {name: {"1": True, "8": True} for name in ("full", "ours", "speculated")}
    assert results["largest_difference_from_harness"] < 1e-4
    rows = {(entry["row"], entry["batch"]): entry for entry in results["decoding"]}
    assert rows["base alone, ours", "1"]["of_base"] == rows["base alone, ours", "1"]["of_limit"] == 1
    assert rows["ours, three models", "8"]["gigabytes"] > rows["ours, LoRA expert", "8"]["gigabytes"] > rows["base alone, ours", "8"]["gigabytes"]
    assert rows["ours, LoRA expert, speculating", "8"]["tokens_per_pass"] >= 1
    drawn = draw(bench_tables(json.loads(json.dumps(results))), "markdown", 160)
    assert "All tokens are the reference loop's." in drawn
    assert all(entry["row"] in drawn for entry in results["decoding"] + results["scoring"])


@pytest.mark.parametrize(
    ("bench", "words"),
    [(Bench(expert="somewhere"), "name base and small with --models"), (Bench(("base", "small"), "small"), "holds no adapter_config.json")],
)
def test_mistakes_are_one_line(lora_family: Path, tmp_path: Path, bench: Bench, words: str) -> None:
    if bench.models:
        bench = Bench((str(lora_family / "base"), str(lora_family / "small")), str(lora_family / "small"))
    with pytest.raises(UserError, match=words):
        run_bench(bench, tmp_path, lambda line: None, lambda steps_done: None)


def test_the_help_teaches() -> None:
    shown = run_command("bench", "--help").stdout
    assert "BASE SMALL" in shown
