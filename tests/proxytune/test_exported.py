"""The exported folder: options are honoured or refused, members are checked in every type, and tools that look classes up load it."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
from transformers.cli.serving.model_manager import ModelManager

from proxytune.errors import UserError
from proxytune.exported import ExportedMixture, export
from proxytune.member import Weights, load_members
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 5]])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Of two architectures, one of which keeps rotary frequencies in fp32 in every type."""
    folder = tmp_path_factory.mktemp("members")
    kinds = {"base": make_model("llama", seed=1, layers=3), "expert": make_model("gpt2", seed=2), "antiexpert": make_model("gpt2", seed=3)}
    for name, model in kinds.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: Weights(str(folder / name)) for name in kinds}


@pytest.fixture(scope="module")
def exported(sources: dict[str, Weights], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "mixture"
    export(sources, proxy_tuning(0.5), folder)
    return folder


NONE_SUCH = {
    "load_in_8bit": True, "load_in_4bit": False, "quantization_config": {"load_in_8bit": True}, "max_memory": {0: "1GB"}, "offload_folder": "x",
    "low_cpu_mem_usage": True, "output_loading_info": True, "state_dict": {}, "tp_plan": "auto", "ignore_mismatched_sizes": True, "variant": "fp16",
    "use_cache": False, "vocab_size": 7, "return_dict": False, "eos_token_id": 5, "max_position_embeddings": 4, "device": "cpu",
}  # fmt: skip


def load(folder: Path, **options: Any) -> ProxyTunedForCausalLM:
    model: ProxyTunedForCausalLM = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model


def rewritten(exported: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the folder with another config.json."""
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("word", [None, "auto", "float32", "bfloat16", "torch.float16", torch.bfloat16, torch.float64], ids=str)
def test_a_type_is_that_of_members_loaded_in_it(word: Any, exported: Path, sources: dict[str, Weights]) -> None:
    dtype = torch.float32 if word in (None, "auto") else getattr(torch, str(word).removeprefix("torch."))
    ours = ProxyTunedForCausalLM(load_members(sources, dtype=dtype), proxy_tuning(0.5))
    for loaded in (load(exported, dtype=word), load(exported, torch_dtype=word), load(exported, config=_config(exported, word))):
        assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
            name: tensor.dtype for name, tensor in ours.state_dict().items()
        }
        assert loaded.dtype == dtype
        assert torch.equal(loaded(IDS).logits, ours(IDS).logits)


def _config(folder: Path, word: Any) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=True, **({} if word in (None, "auto") else {"dtype": word}))


@pytest.mark.parametrize("word", [None, "float32", "bfloat16", torch.bfloat16, torch.float16, "auto"], ids=str)
def test_another_member_is_seen_in_every_type(word: Any, exported: Path, sources: dict[str, Weights], tmp_path: Path) -> None:
    shutil.copytree(sources["expert"].path, tmp_path / "other")
    moved = rewritten(exported, tmp_path / "x", lambda config: config["members"]["expert"].update(path=str(tmp_path / "other")))
    load(moved, dtype=word)  # the same weights in another place
    model = make_model("gpt2", seed=2)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6  # too little for bf16 to show
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"expert: '.*other' holds other weights than were exported; export again"):
        load(moved, dtype=word)


def test_devices_attention_and_the_mixture_are_honoured(exported: Path) -> None:
    for device in (None, "cpu", torch.device("cpu"), {"": "cpu"}, "auto"):
        assert load(exported, device_map=device).device == torch.device("cpu")
    for kind in ("eager", "sdpa"):
        loaded = load(exported, attn_implementation=kind)
        assert {member.config._attn_implementation for member in loaded.members.values()} == {kind}
        assert torch.allclose(loaded(IDS).logits, load(exported)(IDS).logits, atol=1e-5)
    alone = load(exported, mixture={"base": 1.0})
    assert alone.mixture == {"base": 1.0}
    assert not torch.equal(alone(IDS).logits, load(exported)(IDS).logits)
    assert load(exported, revision="main", use_safetensors=True, local_files_only=True).mixture == proxy_tuning(0.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dytpe": "float32"}, "dytpe: .*did you mean 'dtype'"),
        ({"alpha": 0.1}, "alpha: an exported mixture has no such option; .*there are attn_implementation"),
        *(({name: value}, f"{name}: an exported mixture has no such option") for name, value in NONE_SUCH.items()),
        *(({name: {"x": 1}}, f"{name}: .*; ") for name in ("members", "fingerprints")),
        *(({"dtype": word}, "dtype: weights are loaded in float32") for word in ("float99", "int8", torch.int8, "load", {"": "float32"}, 32)),
        *(({"device_map": word}, "device") for word in ("toaster", {"base": "cpu"}, {"base": "cpu", "expert": "cpu"}, -1, 5, "cuda:99", 1.5)),
        ({"attn_implementation": "none_such"}, "attn_implementation: .* cannot take 'none_such'"),
        ({"use_safetensors": False}, "use_safetensors: members are read from safetensors alone"),
        ({"adapter_kwargs": {"subfolder": "x"}}, "adapter_kwargs: .*subfolder has no effect"),
        ({"mixture": {"other": 1.0}}, "mixture: member 'other' is not loaded"),
        ({"mixture": {"base": "1"}}, "mixture: .* must give a number for 'base'"),
        ({"mixture": 1}, "mixture: .* must give them by name"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused_in_one_line(options: dict[str, Any], said: str, exported: Path) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load(exported, **options)
    assert "\n" not in str(raised.value)


def test_further_arguments_without_names_are_refused(exported: Path) -> None:
    with pytest.raises(UserError, match="takes options by name, not 5"):
        ExportedMixture.from_pretrained(exported, 5)
    assert isinstance(ExportedMixture.from_pretrained(exported), ExportedMixture)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.pop("members"), "members: .*config.json' must give them by name, not {}; export again"),
        (lambda config: config.update(members=[1, 2]), "members: .* must give them by name"),
        (lambda config: config.update(members="x" * 10**6), "members: .* must give them by name"),
        (lambda config: config["members"].update(base="x"), "members: .* must give a path and an adapter .* for 'base'"),
        (lambda config: config["members"].update(base={"path": 5, "adapter": None}), "members: .* for 'base'"),
        (lambda config: config["members"].update(base={"path": "x"}), "members: .* for 'base'"),
        (lambda config: config["members"]["base"].update(device="cuda"), "members: .* for 'base'"),
        (lambda config: config["members"]["base"].update(path="/no/such/folder"), "base: .*'/no/such/folder'"),
        (lambda config: config["members"]["base"].update(adapter="/no/such/folder"), "base: .*/no/such/folder"),
        (lambda config: config.pop("mixture"), "mixture: .* must give them by name"),
        (lambda config: config["mixture"].update(base=None), "mixture: .* must give a number for 'base'"),
        (lambda config: config["mixture"].update(base=float("nan")), "mixture: the coefficient of 'base' must be a finite number"),
        (lambda config: config.pop("fingerprints"), "fingerprints: .* must give them by name"),
        (lambda config: config["fingerprints"].pop("expert"), "fingerprints: .* has none for 'expert'"),
        (lambda config: config["fingerprints"].update(expert="0" * 64), "expert: .* holds other weights than were exported"),
    ],
)
def test_a_damaged_config_is_one_line(change: Any, said: str, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load(rewritten(exported, tmp_path / "x", change))
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)
    load(rewritten(exported, tmp_path / "same", lambda config: config))


def test_of_members_no_code_is_run(exported: Path, sources: dict[str, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trust in the exported folder is not one in its members: theirs is refused, also where somebody says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    shutil.copytree(sources["base"].path, tmp_path / "base")
    written = tmp_path / "ran"
    classes = "from transformers import LlamaConfig\n\n\nclass C(LlamaConfig):\n    model_type = 'foreign'\n"
    (tmp_path / "base" / "theirs.py").write_text(f"open({str(written)!r}, 'w').close()\n{classes}")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    names = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoTokenizer": ["theirs.T", "theirs.T"]}
    moved = rewritten(exported, tmp_path / "x", lambda config: config["members"]["base"].update(path=str(tmp_path / "base")))
    load(moved)
    for model_type in ("llama", "foreign"):
        (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": model_type}))
        with pytest.raises(UserError, match="base: "):
            load(moved)
        assert not written.exists()
    AutoConfig.from_pretrained(tmp_path / "base", trust_remote_code=True)
    assert written.exists()  # it would have been


def test_tools_that_look_the_class_up_by_its_name_load_it(exported: Path, sources: dict[str, Weights]) -> None:
    ours = ProxyTunedForCausalLM(load_members(sources), proxy_tuning(0.5))
    text = make_tokenizer().decode(ours.generate(IDS[:1], max_new_tokens=5, do_sample=False)[0, 4:])
    answering = pipeline("text-generation", model=str(exported), trust_remote_code=True, device="cpu")
    assert answering("w5 w6 w7 w8", max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"] == text
    manager = ModelManager(device="cpu", trust_remote_code=True, model_timeout=-1)
    try:
        model, tokenizer = manager.load_model_and_processor(f"{exported}@main")
        assert torch.equal(model(IDS).logits, ours(IDS).logits)
        assert tokenizer("w5 w6").input_ids == [5, 6]
        assert manager.get_model_modality(model, tokenizer).name == "LLM"
    finally:
        manager.shutdown()
