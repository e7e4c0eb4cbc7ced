"""LoRA members on one set of weights are the members loaded apart, to rounding; each way to get the rows wrong is noticed."""

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import proxytune.prepacked as prepacked
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_member, load_members
from proxytune.mixture import pair, proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2}
MIXTURE = {"base": 1.0} | pair(0.8, "polite", "small") | {"terse": -0.3}


def sources(folder: Path) -> dict[str, Weights]:
    small = str(folder / "small")
    return {
        "base": Weights(str(folder / "base")),
        "polite": Weights(small, folder / "polite"),
        "small": Weights(small),
        "terse": Weights(small, folder / "terse"),
    }


def loaded_apart(folder: Path) -> dict[str, Member]:
    return {name: load_member(weights.path, weights.adapter) for name, weights in sources(folder).items()}


@pytest.fixture
def together(lora_family: Path) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(load_members(sources(lora_family)), MIXTURE)


@pytest.fixture
def apart(lora_family: Path) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(loaded_apart(lora_family), MIXTURE)


def count_passes(model: ProxyTunedForCausalLM, name: str) -> list[int]:
    rows: list[int] = []
    model.members[name].register_forward_hook(lambda module, args, kwargs, output: rows.append(len(output.logits)), with_kwargs=True)
    return rows


def test_weights_are_loaded_and_read_once(together: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    assert together.members["polite"] is together.members["small"] is together.members["terse"]
    assert "polite + small + terse on one set of weights" in repr(together)
    rows = count_passes(together, "small")
    with torch.no_grad():
        together(random_ids(2, 5))
    assert rows == [6]


def test_logits_are_those_of_members_loaded_apart(together: ProxyTunedForCausalLM, apart: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(3, 9)
    with torch.no_grad():
        for names in (list(MIXTURE), ["polite"], ["small"], ["terse", "small"]):
            found, right = together.member_logits(names, ids), apart.member_logits(names, ids)
            for name in names:
                torch.testing.assert_close(found[name], right[name], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(right["terse"], right["small"], atol=1e-1)
        torch.testing.assert_close(together(ids).logits, apart(ids).logits, atol=1e-5, rtol=1e-5)


def test_rows_that_get_the_wrong_adapter_are_noticed(
    together: ProxyTunedForCausalLM, apart: ProxyTunedForCausalLM, random_ids: Ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = together._readers["small"].adapter.switch
    rows = switch.rows
    monkeypatch.setattr(switch, "rows", lambda names: rows(names[::-1]))
    with torch.no_grad():
        assert not torch.allclose(together(random_ids(1, 6)).logits, apart(random_ids(1, 6)).logits, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prefill_chunk_size": 2},
        {"speculate": True, "draft": "polite"},
    ],
    ids=str,
)
def test_generation_is_that_of_members_loaded_apart(
    together: ProxyTunedForCausalLM, apart: ProxyTunedForCausalLM, random_ids: Ids, options: dict
) -> None:
    ids = random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    found = together.generate(ids, attention_mask=mask, **(GREEDY | options))
    assert torch.equal(found, apart.generate(ids, attention_mask=mask, **(GREEDY | plain)))


def test_members_that_share_weights_with_the_draft_read_along(together: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    rows = count_passes(together, "small")
    together.generate(random_ids(1, 5), speculate=True, draft="polite", draft_tokens=3, **(GREEDY | {"max_new_tokens": 5, "eos_token_id": None}))
    assert set(rows) == {3}


def test_scores_are_those_of_members_loaded_apart(together: ProxyTunedForCausalLM, apart: ProxyTunedForCausalLM) -> None:
    requests = [Request((3, 4, 5, first), (6, second, 9)) for first in (7, 8) for second in (10, 11, 12)]
    mixtures = {"mixture": MIXTURE, "polite": {"polite": 1.0}, "small": {"small": 1.0}}
    found, right = score(together, requests, mixtures), score(apart, requests, mixtures)
    for name in mixtures:
        torch.testing.assert_close(found[name], right[name], atol=1e-5, rtol=1e-5)


def test_fingerprints_are_those_of_members_loaded_apart(lora_family: Path) -> None:
    found = {name: member.fingerprint for name, member in load_members(sources(lora_family)).items()}
    assert found == {name: member.fingerprint for name, member in loaded_apart(lora_family).items()}
    assert len(set(found.values())) == 4


def test_packed_layers_under_adapters(lora_family: Path, apart: ProxyTunedForCausalLM, random_ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SMALLEST", 0)
    members = load_members(sources(lora_family), prepacked=True)
    assert any(isinstance(module, prepacked.PrepackedLinear) for module in members["small"].model.modules())
    with torch.inference_mode():
        found = ProxyTunedForCausalLM(members, MIXTURE)(random_ids(2, 5)).logits
        torch.testing.assert_close(found, apart(random_ids(2, 5)).logits, atol=1e-5, rtol=1e-5)
    assert members["polite"].fingerprint == load_member(lora_family / "small", lora_family / "polite").fingerprint
    assert members["small"].fingerprint == load_member(lora_family / "small").fingerprint


def test_the_scale_of_an_adapter_is_in_its_fingerprint(lora_family: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_family / "polite", tmp_path / "louder")
    settings = json.loads((tmp_path / "louder" / "adapter_config.json").read_text())
    (tmp_path / "louder" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))
    one, other = (load_member(lora_family / "small", adapter).fingerprint for adapter in (lora_family / "polite", tmp_path / "louder"))
    assert one != other


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_adapters_that_cannot_share_are_loaded_apart(lora_family: Path, tmp_path: Path, settings: dict, random_ids: Ids) -> None:
    """Traps: PEFT refuses DoRA in mixed batches, and PiSSA changes the weights under the adapter."""
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(lora_family / "small"), LoraConfig(r=4, target_modules="all-linear", **settings))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter += 0.1
    tuned.save_pretrained(tmp_path / "odd")
    small = str(lora_family / "small")
    weights = {"base": Weights(str(lora_family / "base")), "expert": Weights(small, tmp_path / "odd"), "antiexpert": Weights(small)}
    model = ProxyTunedForCausalLM(load_members(weights), proxy_tuning(1.0))
    assert model.members["expert"] is not model.members["antiexpert"]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(lora_family / "small")(random_ids(1, 5)).logits
        torch.testing.assert_close(model.member_logits(["antiexpert"], random_ids(1, 5))["antiexpert"], plain)
        assert not torch.allclose(model.member_logits(["expert"], random_ids(1, 5))["expert"], plain, atol=1e-2)


def test_an_adapter_of_another_model_is_one_line(lora_family: Path) -> None:
    base = str(lora_family / "base")
    with pytest.raises(UserError, match=r"^--expert: .*polite.* could not be put on .*base"):
        load_members({"base": Weights(base), "expert": Weights(base, lora_family / "polite", field="--expert")})


def test_threads_run_at_the_same_time_each_through_its_own_adapters(together: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    """Four threads generate and score at once; each gets what it gets alone."""
    prompts = [random_ids(1, 4, seed=seed) for seed in range(8)]
    requests = [Request(tuple(ids[0].tolist()), (5, 6, 7)) for ids in prompts]
    mixtures = {"all": MIXTURE, "polite": {"polite": 1.0}, "small": {"small": 1.0}}

    def work(ids: torch.Tensor) -> tuple[list[list[int]], list[float]]:
        said = together.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()
        return said, [float(score(together, requests, mixtures, batch_tokens=16)[name].sum()) for name in mixtures]

    alone = [work(ids) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, prompts)) == alone


def test_one_name_list_for_all_threads_would_be_noticed(together: ProxyTunedForCausalLM, random_ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin: a switch whose rows another thread has put out gives other logits."""
    ids = random_ids(1, 4)
    with torch.no_grad():
        right = together(ids).logits
        switch = together._readers["small"].adapter.switch
        monkeypatch.setattr(switch, "rows", lambda names: contextlib.nullcontext())
        assert not torch.allclose(together(ids).logits, right, atol=1e-2)
