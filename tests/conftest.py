"""Tiny random models of real architectures and a tiny tokenizer; no download, no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from probes.world.family import build_family
from proxytune import Member, ProxyTunedForCausalLM, proxy_tuning

VOCABULARY = 50
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma", "mistral")

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


def make_model(architecture: str = "llama", seed: int = 0, layers: int = 2, hidden: int = 32, rows: int = VOCABULARY) -> transformers.PreTrainedModel:
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


@pytest.fixture
def members() -> dict[str, Member]:
    return make_members()


@pytest.fixture
def proxy(members: dict[str, Member]) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(members, proxy_tuning(1.0))


@pytest.fixture(params=ARCHITECTURES)
def any_proxy(request: pytest.FixtureRequest) -> ProxyTunedForCausalLM:
    return ProxyTunedForCausalLM(make_members(request.param), proxy_tuning(0.7))


@pytest.fixture(scope="session")
def lora_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a small model of its vocabulary and two LoRA adapters on the small one, as users have them."""
    folder = tmp_path_factory.mktemp("family")
    for name, model in (("base", make_model(seed=1, layers=3, hidden=48)), ("small", make_model(seed=2))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for name, rank, seed in (("polite", 4, 3), ("terse", 2, 4)):
        torch.manual_seed(seed)
        settings = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "small"), settings).save_pretrained(folder / name)
    return folder


@pytest.fixture
def random_ids() -> Callable[..., torch.Tensor]:
    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_family("tiny", 0, tmp_path_factory.mktemp("worlds"))
