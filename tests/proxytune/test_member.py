"""Loading says in one line what cannot be loaded, and shares what is the same."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model, make_tokenizer, run_command
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from proxytune.adapters import is_adapter
from proxytune.errors import UserError
from proxytune.member import Weights, load_member, load_members


def test_the_same_weights_are_loaded_once(lora_family: Path) -> None:
    small = str(lora_family / "small")
    members = load_members({"expert": Weights(small, field="--expert"), "antiexpert": Weights(small, field="--antiexpert")})
    assert members["expert"] is members["antiexpert"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_those_asked_for(lora_family: Path, dtype: torch.dtype) -> None:
    member = load_member(lora_family / "small", dtype=dtype)
    with torch.inference_mode():
        assert member.model(torch.tensor([[3, 4]])).logits.dtype == dtype


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:99"}, r"--base: the device 'cuda:99' cannot compute in torch\.float32"),
        ({"device": "toaster"}, "--base: the device 'toaster' cannot compute"),
        ({"dtype": torch.float8_e4m3fn}, r"--base: weights are loaded in .*, not torch\.float8_e4m3fn"),
    ],
)
def test_devices_and_types_that_are_not_there_are_one_line(lora_family: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        load_member(lora_family / "small", field="--base", **options)
    assert "\n" not in str(raised.value)


def test_a_folder_with_two_gguf_files_is_no_model(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_member(tmp_path)


def changed_copy(folder: Path, out: Path, file: str = "config.json", **settings: Any) -> Path:
    """The folder again, with some settings of a JSON file changed."""
    shutil.copytree(folder, out)
    content = json.loads((out / file).read_text()) if (out / file).exists() else {}
    (out / file).write_text(json.dumps(content | settings))
    return out


def with_weights(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **settings: Any) -> Path:
    """The folder again, with other weights in its one safetensors file."""
    (file,) = changed_copy(folder, out, "adapter_config.json" if is_adapter(folder) else "config.json", **settings).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return out


def all_but_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != sorted(tensors)[2]}


def one_misnamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name if name != sorted(tensors)[2] else f"{name}s": tensor for name, tensor in tensors.items()}


def as_they_are(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (all_but_one, {}, "1 weights are missing, 'model.layers.0.input_layernorm.weight' first"),
        (one_misnamed, {}, "1 weights are missing, .* first and 1 do not belong to the model, 'model.layers.0.input_layernorm.weights' first"),
        (lambda tensors: {}, {}, "21 weights are missing"),
        (as_they_are, {"num_hidden_layers": 3}, "9 weights are missing, 'model.layers.2"),
        (as_they_are, {"num_hidden_layers": 1}, "9 do not belong to the model, 'model.layers.1"),
        (as_they_are, {"model_type": "qwen2"}, r"6 weights are missing, 'model.layers.0.self_attn.k_proj.bias' first"),
        (as_they_are, {"vocab_size": 60}, "no causal language model could be loaded"),
        (lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, {}, "'lm_head.weight' first"),
        (lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] * torch.nan}, {}, "'lm_head.weight' .* hold NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(lora_family: Path, tmp_path: Path, change: Any, settings: dict, words: str) -> None:
    """Otherwise the gaps would be filled with random numbers."""
    with pytest.raises(UserError, match=words) as raised:
        load_member(with_weights(lora_family / "small", tmp_path / "changed", change, **settings), field="--base")
    assert str(raised.value).startswith("--base: ")
    assert "\n" not in str(raised.value)
    whole = load_member(with_weights(lora_family / "small", tmp_path / "whole", as_they_are))
    assert whole.fingerprint == load_member(lora_family / "small").fingerprint


def test_what_an_architecture_declares_ignorable_is_no_error(tmp_path: Path) -> None:
    for place in ("gpt2", "mask"):
        make_model("gpt2").save_pretrained(tmp_path / place)
        make_tokenizer().save_pretrained(tmp_path / place)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)}  # older checkpoints hold the causal mask
    (file,) = (tmp_path / "mask").glob("*.safetensors")
    save_file(load_file(file) | mask, file, metadata={"format": "pt"})
    assert load_member(tmp_path / "mask").fingerprint == load_member(tmp_path / "gpt2").fingerprint


def only_half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for place, (name, tensor) in enumerate(sorted(tensors.items())) if place % 2}


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (all_but_one, {}, "1 weights are missing"),
        (only_half, {}, "14 weights are missing"),
        (lambda tensors: {}, {}, "28 weights are missing"),
        (lambda tensors: {name.replace("layers.", "blocks."): tensor for name, tensor in tensors.items()}, {}, "do not belong to the model"),
        (lambda tensors: tensors | {"base_model.model.other.lora_A.weight": torch.ones(4, 4)}, {}, "1 do not belong to the model"),
        (lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()}, {}, "hold NaN or infinity"),
        (as_they_are, {"lora_alpha": float("nan")}, "hold NaN or infinity"),
        (as_they_are, {"lora_alpha": "much"}, "could not be put on|could be loaded"),
        (as_they_are, {"r": 3}, "could not be put on|could be loaded"),
    ],
)
def test_adapters_that_are_not_whole_are_refused_alone_and_on_shared_weights(
    lora_family: Path, tmp_path: Path, change: Any, settings: dict, words: str
) -> None:
    small, adapter = str(lora_family / "small"), with_weights(lora_family / "polite", tmp_path / "changed", change, **settings)
    for load in (
        lambda adapter: load_member(small, adapter),
        lambda adapter: load_members({"expert": Weights(small, adapter), "antiexpert": Weights(small)})["expert"],
    ):
        with pytest.raises(UserError, match=words) as raised:
            load(adapter)
        assert "\n" not in str(raised.value)
        assert load(with_weights(lora_family / "polite", tmp_path / f"whole-{len(list(tmp_path.iterdir()))}", as_they_are)).fingerprint


def test_a_pickled_adapter_is_not_read(lora_family: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_family / "polite", tmp_path / "pickled")
    file = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    assert (
        load_member(lora_family / "small", tmp_path / "pickled").fingerprint == load_member(lora_family / "small", lora_family / "polite").fingerprint
    )
    file.unlink()
    for weights in ({"expert": Weights(str(lora_family / "small"), tmp_path / "pickled")},):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
            load_members(weights)


def test_an_adapter_that_holds_embeddings_does_not_change_its_antiexpert(tmp_path: Path, lora_family: Path) -> None:
    small = lora_family / "small"
    embeddings = load_file(small / "model.safetensors")["model.embed_tokens.weight"]
    own = {"base_model.model.model.embed_tokens.weight": embeddings + 1}
    adapter = with_weights(lora_family / "polite", tmp_path / "embeddings", lambda tensors: tensors | own)
    members = load_members({"expert": Weights(str(small), adapter), "antiexpert": Weights(str(small))})
    assert torch.equal(members["antiexpert"].model.get_input_embeddings().weight, embeddings)
    assert torch.equal(members["expert"].model.get_input_embeddings().weight, embeddings + 1)


def test_an_adapter_is_no_model(lora_family: Path) -> None:
    with pytest.raises(UserError, match="holds an adapter and no model"):
        load_member(lora_family / "polite")


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("config.json", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
        ("config.json", {"rms_norm_eps": 0.1}),
        ("config.json", {"hidden_act": "gelu"}),
        ("config.json", {"max_position_embeddings": 64}),
        ("generation_config.json", {"suppress_tokens": [5]}),
        ("generation_config.json", {"no_repeat_ngram_size": 2}),
        ("generation_config.json", {"eos_token_id": 7}),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer_config.json", {"pad_token": "w9"}),
    ],
)
def test_settings_that_change_what_is_said_change_the_fingerprint(lora_family: Path, tmp_path: Path, file: str, settings: dict) -> None:
    small = lora_family / "small"
    assert load_member(changed_copy(small, tmp_path / "other", file, **settings)).fingerprint != load_member(small).fingerprint


def test_tokens_and_their_rules_change_the_fingerprint(lora_family: Path, tmp_path: Path) -> None:
    members = []
    for place, tokenizer in enumerate((make_tokenizer(), make_tokenizer(swapped=True), make_tokenizer())):
        shutil.copytree(lora_family / "small", tmp_path / str(place))
        tokenizer.save_pretrained(tmp_path / str(place))
        members.append(load_member(tmp_path / str(place)))
    bos = json.loads((tmp_path / "2" / "tokenizer.json").read_text())
    bos["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<bos>", "type_id": 0}})
    bos["post_processor"]["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}}
    (tmp_path / "2" / "tokenizer.json").write_text(json.dumps(bos))
    assert len({member.fingerprint for member in (*members[:2], load_member(tmp_path / "2"))}) == 3
    assert members[0].interface != members[1].interface
    # A token may have the name of a setting that does not count.
    named = json.loads((tmp_path / "0" / "tokenizer.json").read_text().replace('"w7"', '"dtype"'))
    (tmp_path / "0" / "tokenizer.json").write_text(json.dumps(named))
    first = load_member(tmp_path / "0").fingerprint
    vocabulary = named["model"]["vocab"]
    vocabulary["dtype"], vocabulary["w8"] = vocabulary["w8"], vocabulary["dtype"]
    (tmp_path / "0" / "tokenizer.json").write_text(json.dumps(named))
    assert load_member(tmp_path / "0").fingerprint not in (first, members[0].fingerprint)


def test_paths_versions_and_use_do_not_change_the_fingerprint(lora_family: Path, tmp_path: Path) -> None:
    small = lora_family / "small"
    first = load_member(small)
    settings = {"transformers_version": "4.0.0", "torch_dtype": "float32", "_name_or_path": "elsewhere", "dtype": "float32"}
    other = load_member(changed_copy(small, tmp_path / "elsewhere", **settings))
    other.tokenizer(["w3 w4", "w5"], padding=True, truncation=True, max_length=2)  # leaves its padding behind in the tokenizer
    assert other.fingerprint == first.fingerprint
    again = load_member(small)
    again.model.save_pretrained(tmp_path / "saved")
    again.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_member(tmp_path / "saved").fingerprint == first.fingerprint
    assert load_member(small, dtype=torch.bfloat16).fingerprint != first.fingerprint


def test_a_damaged_generation_configuration_is_no_missing_one(lora_family: Path, tmp_path: Path) -> None:
    place = changed_copy(lora_family / "small", tmp_path / "other", "generation_config.json")
    load_member(place)
    (place / "generation_config.json").write_text((place / "generation_config.json").read_text()[:-5])
    with pytest.raises(UserError, match=r"no causal language model could be loaded .*JSON"):
        load_member(place)
    (place / "generation_config.json").unlink()
    load_member(place)


CODE = """
import pathlib
pathlib.Path({trace!r}).write_text("ran")
from transformers import {kind}
class Other({kind}): ...
"""


@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_code_in_a_folder_is_not_run_whatever_standard_input_says(lora_family: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    if kind == "model":
        settings = {"model_type": "other", "auto_map": {"AutoConfig": "other.Other", "AutoModelForCausalLM": "other.Other"}}
        place = changed_copy(lora_family / "small", tmp_path / "other", "config.json", **settings)
    else:
        settings = {"tokenizer_class": "Other", "auto_map": {"AutoTokenizer": ["other.Other", None]}}
        place = changed_copy(lora_family / "small", tmp_path / "other", "tokenizer_config.json", **settings)
    parent = "PreTrainedConfig" if kind == "model" else "PreTrainedTokenizerFast"
    (place / "other.py").write_text(CODE.format(trace=str(trace), kind=parent))
    done = run_command("generate", "--base", place, "--new-tokens", 1, given="y\n" * 9)
    assert not trace.exists()
    assert "Traceback" not in done.stderr
    if kind == "model":
        assert done.returncode == 2
        assert done.stderr.startswith("proxytune: error: --base: ")
    # The twin: the same code runs where it is asked for.
    automatic = AutoConfig if kind == "model" else AutoTokenizer
    automatic.from_pretrained(place, trust_remote_code=True)
    assert trace.exists()


def damaged(content: bytes, number: int) -> bytes:
    """The content cut off somewhere, or with one bit turned over."""
    place = random.Random(number).randrange(len(content))
    return content[:place] if number % 2 else content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]


@pytest.mark.parametrize("cases", [6, pytest.param(120, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_another_identity(lora_family: Path, tmp_path: Path, cases: int) -> None:
    """Of folders that are not ours: never a traceback, and never other numbers under the same fingerprint."""
    small, ids = tmp_path / "small", torch.tensor([[3, 4, 5]])
    adapter = tmp_path / "polite"
    for place in (small, adapter):
        shutil.copytree(lora_family / place.name, place)
    load_member(small).model.generation_config.save_pretrained(small)
    whole = load_member(small, adapter)
    outcomes, lines = Counter[str](), list[str]()
    with torch.inference_mode():
        right = whole.model(ids).logits
        for file in [*small.iterdir(), *(file for file in adapter.iterdir() if file.name != "README.md")]:
            content = file.read_bytes()
            for number in range(cases):
                file.write_bytes(damaged(content, number))
                try:
                    member = load_member(small, adapter)
                    same = member.fingerprint == whole.fingerprint
                    outcomes["the same" if same else "another"] += 1
                    if same:
                        assert torch.equal(member.model(ids).logits, right), (file.name, number)
                        assert member.tokenizer("w3 w4")["input_ids"] == [3, 4]
                except UserError as error:
                    outcomes["refused"] += 1
                    lines.append(str(error))
            file.write_bytes(content)
    assert outcomes["refused"] > outcomes["another"] > 0
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING acts outside"),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING acts outside"),
        (LoraConfig(r=2, target_modules="all-linear", alora_invocation_tokens=[5], task_type="CAUSAL_LM"), "LORA acts outside"),
        (IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, task_type="CAUSAL_LM"), None),
        (VeraConfig(r=4, target_modules=["q_proj", "o_proj"], save_projection=True, task_type="CAUSAL_LM"), None),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_adapters_outside_of_layers_are_refused_and_others_are_themselves(
    lora_family: Path, tmp_path: Path, settings: Any, refused: str | None
) -> None:
    """A prefix would be lost without a word: the member is the model that PEFT wraps."""
    torch.manual_seed(0)
    adapted = get_peft_model(load_member(lora_family / "small").model, settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lambda_b" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    if refused is not None:
        with pytest.raises(UserError, match=refused):
            load_member(lora_family / "small", tmp_path / "adapter")
        return
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        right = adapted(ids).logits
        torch.testing.assert_close(load_member(lora_family / "small", tmp_path / "adapter").model(ids).logits, right)
        assert not torch.allclose(load_member(lora_family / "small").model(ids).logits, right)
