"""Members of another vocabulary: a map to the same vocabulary changes nothing, and another one is what its formula says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from proxytune.errors import UserError
from proxytune.explanation import explain
from proxytune.member import Member
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score
from proxytune.token_map import map_tokens, token_bytes

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
TEXT = "The mixture's law, naïve or not: def f(x):\n    return x + 1  # 12 345"


def byte_level(size: int, specials: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([(Path(__file__).parent / "test_modeling.py").read_text(), TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], eos_token=specials[-1])


@pytest.fixture(scope="module")
def mapped() -> ProxyTunedForCausalLM:
    """A base of 400 tokens, and a pair of 300 others whose ids mean something else."""
    base, own = byte_level(400, ["<pad>", "<eos>"]), byte_level(300, ["<none>", "<bos>", "<end>"])
    members = {
        "base": Member(make_model(seed=1, layers=3, hidden=48, rows=len(base)), base),
        "expert": Member(make_model("gpt2", seed=2, rows=len(own)), own),
        "antiexpert": Member(make_model("gpt2", seed=3, rows=len(own)), own),
    }
    token_map = map_tokens(base, own, len(base))
    return ProxyTunedForCausalLM(members, proxy_tuning(0.8), {"expert": token_map, "antiexpert": token_map})


def slow_law(model: ProxyTunedForCausalLM, ids: list[int], own_prompt: list[int] | None = None, columns: int = 0) -> torch.Tensor:
    """The obviously right way: base log-law plus the pair's difference on tokens of the same bytes, for one unpadded text."""
    token_map = model.token_maps["expert"]
    own = (own_prompt or []) + [piece for token in ids[columns:] for piece in token_map.pieces[token]]
    with torch.no_grad():
        total = model.members["base"](torch.tensor([ids])).logits[0, -1]
        laws = [model.members[name](torch.tensor([own])).logits[0, -1].log_softmax(-1) for name in ("expert", "antiexpert")]
    for token in range(len(total)):
        if token_map.exact[token]:
            (piece,) = token_map.pieces[token]
            total[token] += 0.8 * (laws[0][piece] - laws[1][piece])
    return total.log_softmax(-1)


def prompts(model: ProxyTunedForCausalLM) -> list[list[int]]:
    tokenizer = byte_level(400, ["<pad>", "<eos>"])
    return [tokenizer(text)["input_ids"] for text in ("def test_", TEXT[:20])]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    return {
        "inputs": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }


def test_pieces_have_the_bytes_of_their_token() -> None:
    base, own = byte_level(400, ["<pad>", "<eos>"]), byte_level(300, ["<none>", "<bos>", "<end>"])
    token_map, ours, theirs = map_tokens(base, own, len(base) + 2), token_bytes(base), token_bytes(own)
    assert token_map.pieces[0] == [0]
    assert token_map.pieces[1] == [2]
    for token in range(2, len(base)):
        assert b"".join(theirs[piece] for piece in token_map.pieces[token]) == ours[token]
        assert bool(token_map.exact[token]) == (ours[token] in theirs.values())
    assert 250 < token_map.exact.sum() < len(base)
    assert not token_map.exact[-2:].any()
    text = b"".join(ours[token] for token in base(TEXT)["input_ids"])
    assert text == TEXT.encode()


def test_a_map_to_the_same_vocabulary_changes_nothing(random_ids: Ids) -> None:
    tokenizer = byte_level(400, ["<pad>", "<eos>"])
    members = {name: Member(make_model(seed=seed, rows=400), tokenizer) for seed, name in enumerate(("base", "expert", "antiexpert"))}
    token_map = map_tokens(tokenizer, tokenizer, 400)
    plain = ProxyTunedForCausalLM(members, proxy_tuning(0.8))
    mapped = ProxyTunedForCausalLM(members, proxy_tuning(0.8), {"expert": token_map, "antiexpert": token_map})
    batch = padded(prompts(plain))
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        assert torch.equal(mapped.generate(**batch, **(GREEDY | options)), plain.generate(**batch, **(GREEDY | options)))
    assert mapped.mass_covered == pytest.approx(1.0, abs=1e-5)


def test_generation_is_the_slow_loop(mapped: ProxyTunedForCausalLM) -> None:
    rows = prompts(mapped)
    found = mapped.generate(**padded(rows), **GREEDY)[:, max(map(len, rows)) :]
    for row, answer in zip(rows, found.tolist(), strict=True):
        text = list(row)
        for _ in range(8):
            text.append(int(slow_law(mapped, text).argmax()))
        assert answer == text[len(row) :]
    assert 0.5 < mapped.mass_covered < 1


def test_caches_and_beams_read_the_same(mapped: ProxyTunedForCausalLM) -> None:
    batch = padded(prompts(mapped))
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        found = [mapped.generate(**batch, use_cache=use_cache, **(GREEDY | options)) for use_cache in (True, False)]
        assert torch.equal(*found)


def test_own_prompts_are_in_the_members_own_ids(mapped: ProxyTunedForCausalLM) -> None:
    rows, own = prompts(mapped), [[5, 6, 7], [40, 41]]
    found = mapped.generate(**padded(rows), prompts={"expert": own, "antiexpert": own}, **GREEDY)[:, max(map(len, rows)) :]
    for row, prompt, answer in zip(rows, own, found.tolist(), strict=True):
        text = list(row)
        for _ in range(8):
            text.append(int(slow_law(mapped, text, prompt, len(row)).argmax()))
        assert answer == text[len(row) :]


def test_scores_are_the_slow_laws(mapped: ProxyTunedForCausalLM) -> None:
    requests = [Request(tuple(row[:length]), tuple(row[length : length + 3])) for row in prompts(mapped) for length in (1, 2)]
    right = []
    for request in requests:
        texts = [list(request.prefix + request.continuation[:place]) for place in range(len(request.continuation))]
        right.append(sum(float(slow_law(mapped, text)[token]) for text, token in zip(texts, request.continuation, strict=True)))
    for batch_tokens in (1, 1000):
        for share in (True, False):
            found = score(mapped, requests, {"proxy": proxy_tuning(0.8)}, batch_tokens=batch_tokens, share_prefixes=share)["proxy"]
            assert found.tolist() == pytest.approx(right, abs=1e-4)


def test_what_a_map_cannot_do_is_one_line(mapped: ProxyTunedForCausalLM) -> None:
    batch = padded(prompts(mapped))
    with pytest.raises(UserError, match="coefficients must sum to 0"):
        mapped.mixture = {"base": 1.0, "expert": 0.5}
    for options, words in (({"speculate": True}, "decode plainly"), ({"cache_implementation": "static"}, "leave it out")):
        with pytest.raises(UserError, match=words):
            mapped.generate(**batch, **GREEDY, **options)


def test_an_explanation_shows_the_members_own_probabilities(mapped: ProxyTunedForCausalLM) -> None:
    mapped.mixture, token_map = proxy_tuning(0.8), mapped.token_maps["expert"]
    row = prompts(mapped)[1]
    several = next(token for token in range(400) if not token_map.exact[token])
    ids = [*row, several, *row[:2]]
    for place, entry in enumerate(explain(mapped, ids, len(row))):
        own = torch.tensor([[piece for token in ids[: len(row) + place] for piece in token_map.pieces[token]]])
        with torch.no_grad():
            law = mapped.members["expert"](own).logits[0, -1].softmax(-1)
        right = float(law[token_map.pieces[entry.token][0]]) if token_map.exact[entry.token] else float("nan")
        assert entry.members["expert"] == pytest.approx(right, abs=1e-6, nan_ok=True)
