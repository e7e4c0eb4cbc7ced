"""Loading says in one line what cannot be loaded, and shares what is the same."""

from pathlib import Path

import pytest
import torch

from proxytune import UserError, Weights, load_member, load_members


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
