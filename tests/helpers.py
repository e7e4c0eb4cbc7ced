"""Tiny random models of real architectures and a tiny tokenizer; no download, no hub."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from proxytune.member import Member

VOCABULARY = 50
TESTS = Path(__file__).parent
PATHS = [str(path) for path in (TESTS.parent, TESTS, TESTS / "finetune", TESTS / "evals")]  # for scripts that tests start
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
