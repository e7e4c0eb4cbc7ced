"""The composite behaves as any causal language model; each silent trap of wrapping several models is a test."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from datasets import Dataset
from helpers import make_members, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, StoppingCriteria, TextIteratorStreamer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from proxytune.cache import MixtureCache
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.passes import at_once

Ids = Callable[..., torch.Tensor]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 2}


def slow_logits(model: ProxyTunedForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The obviously right way: every member by itself, no cache, no padding."""
    with torch.no_grad():
        return sum(coefficient * model.members[name](ids).logits for name, coefficient in model.mixture.items())


def slow_greedy(model: ProxyTunedForCausalLM, prompt: torch.Tensor, steps: int) -> list[int]:
    ids = prompt
    for _ in range(steps):
        token = slow_logits(model, ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == 2:
            break
    return ids[0, prompt.shape[1] :].tolist()


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def test_forward_is_the_sum_of_the_members(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        right = slow_logits(any_proxy, ids)
        torch.testing.assert_close(any_proxy(ids).logits, right, atol=1e-5, rtol=1e-5)
        any_proxy.mixture = {"base": 1.0, "expert": -0.7, "antiexpert": 0.7}
        assert not torch.allclose(any_proxy(ids).logits, right, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(any_proxy: ProxyTunedForCausalLM, random_ids: Ids, side: str) -> None:
    """Trap: a bare forward counts positions from the first column, padding or not."""
    rows = [random_ids(length, seed=length) for length in (4, 9, 7)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = any_proxy(ids, attention_mask=mask).logits
        for number, row in enumerate(rows):
            torch.testing.assert_close(logits[number][mask[number].bool()], any_proxy(row[None]).logits[0], atol=1e-5, rtol=1e-5)
        if side == "left":
            naive = any_proxy(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1]).expand_as(ids)).logits
            learned_positions = any_proxy.members["base"].config.model_type == "gpt2"
            assert torch.allclose(naive[0, -4:], logits[0, -4:], atol=1e-4) != learned_positions


def test_logits_to_keep(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        everything = proxy(ids).logits
        torch.testing.assert_close(proxy(ids, logits_to_keep=3).logits, everything[:, -3:])
        torch.testing.assert_close(proxy(ids, logits_to_keep=torch.tensor([1, 4])).logits, everything[:, [1, 4]])


def test_alpha_zero_is_the_base_bitwise(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    proxy.mixture = proxy_tuning(0.0)
    with torch.no_grad():
        assert torch.equal(proxy(ids).logits, proxy.members["base"](ids).logits)


def test_expert_equal_to_antiexpert_is_the_base_bitwise(random_ids: Ids) -> None:
    members = make_members()
    members["antiexpert"] = members["expert"]
    model = ProxyTunedForCausalLM(members, proxy_tuning(1.3))
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model.members["base"](ids).logits)


def test_loss_is_the_mixtures(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        output = proxy(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_greedy_is_the_slow_loop(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    prompt = random_ids(1, 6)
    expected = slow_greedy(any_proxy, prompt, 12)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}):
        assert any_proxy.generate(prompt, **GREEDY, **options)[0, 6:].tolist() == expected, options


def test_left_padded_batches_are_their_rows(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    rows = [random_ids(length, seed=length) for length in (3, 8, 5, 6)]
    ids, mask = padded(rows, "left")
    for options in ({}, {"cache_implementation": "static"}):
        output = any_proxy.generate(ids, attention_mask=mask, **GREEDY, **options)[:, ids.shape[1] :]
        for row, generated in zip(rows, output, strict=True):
            expected = slow_greedy(any_proxy, row[None], 12)
            assert generated[: len(expected)].tolist() == expected


def test_beams_and_seeded_samples_do_not_depend_on_the_cache(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    rows = [random_ids(length, seed=length) for length in (3, 8)]
    ids, mask = padded(rows, "left")
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            found.append(any_proxy.generate(ids, attention_mask=mask, use_cache=use_cache, **(GREEDY | options)))
        assert torch.equal(*found)


def test_beams_reorder_every_members_cache(random_ids: Ids, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap: reordering only the base's keys and values gives wrong beams without an error."""

    def beams() -> torch.Tensor:
        model = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0))
        return model.generate(random_ids(3, 6), num_beams=4, **GREEDY)

    right = beams()
    monkeypatch.setattr(MixtureCache, "reorder_cache", lambda cache, order: cache.members["base"].reorder_cache(order))
    assert not torch.equal(right, beams())


def windowed(architecture: str, **settings: object) -> ProxyTunedForCausalLM:
    """Members that do not keep every position: windows of four tokens, in all layers or every other, or recurrent states."""
    kind = CONFIG_MAPPING[architecture]
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    members = {}
    for seed, name in enumerate(("base", "expert", "antiexpert")):
        config = kind(**(sizes | {"num_hidden_layers": 4, "initializer_range": 0.3, "max_position_embeddings": 128} | settings))
        torch.manual_seed(seed)
        members[name] = Member(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    return ProxyTunedForCausalLM(members, proxy_tuning(0.8))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    ],
)
def test_windows_and_hybrid_caches_are_right(architecture: str, settings: dict, random_ids: Ids) -> None:
    model = windowed(architecture, **settings)
    rows = [random_ids(length, seed=length) for length in (3, 9)]
    ids, mask = padded(rows, "left")
    output = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, generated in zip(rows, output, strict=True):
        expected = slow_greedy(model, row[None], 12)
        assert generated[: len(expected)].tolist() == expected
    beams = [model.generate(rows[1][None], num_beams=3, use_cache=use_cache, **GREEDY) for use_cache in (True, False)]
    assert torch.equal(*beams)
    with pytest.raises(UserError, match="does not keep every position"):
        model.generate(ids, attention_mask=mask, speculate=True, **GREEDY)


def test_models_without_a_cache_are_refused() -> None:
    """Trap: one that ignores the cache it is given reads each token as the first, and its part of the mixture is noise."""
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    member = Member(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    with pytest.raises(UserError, match="antiexpert: OpenAIGPTLMHeadModel does not take a cache"):
        ProxyTunedForCausalLM(make_members() | {"antiexpert": member}, proxy_tuning(1.0))


def test_devices_run_at_the_same_time_and_each_in_its_order() -> None:
    meeting, order = threading.Barrier(2, timeout=10), []

    def run(name: str, meets: bool) -> Callable[[], dict[str, torch.Tensor]]:
        def at_work() -> dict[str, torch.Tensor]:
            assert torch.is_inference_mode_enabled()
            if meets:
                meeting.wait()
            order.append(name)
            return {name: torch.tensor(len(name))}

        return at_work

    devices = [torch.device("cpu"), torch.device("meta"), torch.device("cpu")]
    with torch.inference_mode():
        found = at_once([run("base", True), run("expert", True), run("antiexpert", False)], devices)
    assert [list(part) for part in found] == [["base"], ["expert"], ["antiexpert"]]
    assert order.index("base") < order.index("antiexpert")


def test_members_stay_causal(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    """Trap: a config given as a part of another loses its attention implementation, and the model sees the future."""
    ids = random_ids(1, 8)
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1 - 3) % 47 + 3
    with torch.no_grad():
        before, after = proxy(ids).logits, proxy(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_construction_leaves_the_members_alone() -> None:
    """Traps: configs are changed, and weights that transformers does not know (LoRA) are initialised again."""
    base = make_model(seed=1)
    adapted = get_peft_model(make_model(seed=2), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).get_base_model()
    members = {"base": Member(base, make_tokenizer()), "expert": Member(adapted, make_tokenizer())}
    weights = {name: copy.deepcopy(member.model.state_dict()) for name, member in members.items()}
    attention = {name: member.model.config._attn_implementation for name, member in members.items()}
    model = ProxyTunedForCausalLM(members, {"base": 1.0, "expert": 1.0})
    assert any("lora_A" in name for name in weights["expert"])
    for name in members:
        assert model.members[name].config._attn_implementation == attention[name] is not None
        assert all(torch.equal(tensor, weights[name][key]) for key, tensor in model.members[name].state_dict().items())


def test_continuous_batching_is_refused(proxy: ProxyTunedForCausalLM) -> None:
    """Trap: it builds one paged cache from one config and returns empty answers without an error."""
    with pytest.raises(UserError, match="generate_batch"):
        proxy.generate_batch([[3, 4, 5]])


def test_mixtures_change_without_reloading(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    prompt = random_ids(1, 6)
    for mixture in (proxy_tuning(2.0), {"expert": 1.0}, {"antiexpert": 0.5, "base": 0.5}, proxy_tuning(0.0)):
        proxy.mixture = mixture
        assert proxy.generate(prompt, **GREEDY)[0, 6:].tolist() == slow_greedy(proxy, prompt, 12)


def test_a_cache_of_another_mixture_is_refused(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    proxy.mixture = {"base": 1.0}
    cache = proxy(random_ids(1, 4), use_cache=True).past_key_values
    proxy.mixture = proxy_tuning(1.0)
    with pytest.raises(UserError, match="lacks antiexpert, expert"):
        proxy(random_ids(1, 1), past_key_values=cache)


def test_continuing_from_a_returned_cache(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        first = proxy(ids[:, :5], use_cache=True)
        second = proxy(ids[:, 5:], past_key_values=copy.deepcopy(first.past_key_values), attention_mask=torch.ones_like(ids))
        torch.testing.assert_close(second.logits, proxy(ids).logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_streaming_and_stopping(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    prompt = random_ids(1, 6)
    expected = slow_greedy(proxy, prompt, 12)
    streamer = TextIteratorStreamer(make_tokenizer(), skip_prompt=True, timeout=10)
    proxy.generate(prompt, streamer=streamer, **GREEDY)
    assert "".join(streamer).split() == make_tokenizer().decode(expected).split()

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    assert proxy.generate(prompt, stopping_criteria=[AfterThree()], **GREEDY)[0, 6:].tolist() == expected[:3]


def test_assisted_by_the_expert_is_greedy(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    prompt = random_ids(1, 6)
    assistant = ProxyTunedForCausalLM({"expert": Member(proxy.members["expert"], make_tokenizer())}, {"expert": 1.0})
    assert proxy.generate(prompt, assistant_model=assistant, **GREEDY)[0, 6:].tolist() == slow_greedy(proxy, prompt, 12)


def test_saving_is_refused(proxy: ProxyTunedForCausalLM, tmp_path: object) -> None:
    with pytest.raises(UserError, match="save its members"):
        proxy.save_pretrained(tmp_path)


def test_a_cache_comes_back_as_of_every_library_model(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        for model in (proxy, proxy.members["base"]):
            output = model(ids[:, :5])
            assert output.past_key_values.get_seq_length() == 5
            torch.testing.assert_close(
                model(ids[:, 5:], past_key_values=output.past_key_values).logits, model(ids).logits[:, 5:], atol=1e-5, rtol=1e-5
            )
            assert model(ids, use_cache=False).past_key_values is None
            model.config.use_cache = False
            assert model(ids).past_key_values is None
            assert model(ids, use_cache=True).past_key_values is not None


def test_tuples_come_back_where_they_are_asked_for(proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        for model in (proxy, proxy.members["base"]):
            output = model(ids, labels=ids)
            loss, logits, cache = model(ids, labels=ids, return_dict=False)
            assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits) and cache.get_seq_length() == 9
            (alone,) = model(ids, use_cache=False, return_dict=False)
            assert torch.equal(alone, output.logits)
        proxy.config.return_dict = False
        assert isinstance(proxy(ids), tuple)
        assert isinstance(proxy(ids, return_dict=True), dict)


@pytest.mark.parametrize("options", [{"inputs_embeds": torch.zeros(1, 4, 32)}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_what_forward_would_not_heed_is_refused(options: dict, proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    ids = None if "inputs_embeds" in options else random_ids(1, 4)
    with pytest.raises(UserError, match=next(iter(options))):
        proxy(ids, **options)
    proxy(random_ids(1, 4), **dict.fromkeys(options))


def test_texts_packed_into_a_row_are_read_apart(any_proxy: ProxyTunedForCausalLM, random_ids: Ids) -> None:
    """Trap: with a cache, transformers reads them as one text."""
    ids, positions = random_ids(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        apart = torch.cat([slow_logits(any_proxy, ids[:, :4]), slow_logits(any_proxy, ids[:, 4:])], dim=1)
        packed = any_proxy(ids, position_ids=positions)
        torch.testing.assert_close(packed.logits, apart, atol=1e-5, rtol=1e-5)
        assert packed.past_key_values is None
        assert not torch.allclose(any_proxy(ids).logits, apart, atol=1e-2)
        both = ids.expand(3, -1)
        torch.testing.assert_close(any_proxy(both, position_ids=positions).logits, apart.expand(3, -1, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bloom", "falcon", "mpt"])
def test_biases_reckoned_from_the_mask_reach_over_a_static_cache(kind: str, random_ids: Ids) -> None:
    """ALiBi: bare Falcon fails here."""
    sizes = {
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False},
        "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    }
    members = {}
    for seed, name in enumerate(("base", "expert", "antiexpert")):
        torch.manual_seed(seed)
        config = CONFIG_MAPPING[kind](vocab_size=50, initializer_range=0.3, pad_token_id=0, **sizes[kind])
        members[name] = Member(AutoModelForCausalLM.from_config(config).eval(), make_tokenizer())
    model = ProxyTunedForCausalLM(members, proxy_tuning(0.8))
    ids, mask = padded([random_ids(length, seed=length) for length in (3, 8)], "left")
    for batch in ({"inputs": ids, "attention_mask": mask}, {"inputs": ids[1:]}):
        right = model.generate(**batch, **GREEDY, use_cache=False)
        for options in ({"cache_implementation": "static"}, {}, {"speculate": True}):
            assert torch.equal(model.generate(**batch, **GREEDY, **options), right)
    assert not torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY), model.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_members_that_accelerate_keeps_elsewhere(where: str, random_ids: Ids, tmp_path: Path) -> None:
    """Trap: their weights are on no device between passes."""
    ids, members = random_ids(2, 6), make_members()
    right = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0)).generate(ids, **GREEDY)
    for name in ("base", "expert"):
        if where == "cpu":
            accelerate.cpu_offload(members[name].model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(members[name].model, tmp_path / name, execution_device=torch.device("cpu"))
        assert members[name].model.device.type == "meta"
        assert members[name].fingerprint == make_members()[name].fingerprint
    model = ProxyTunedForCausalLM(members, proxy_tuning(1.0))
    assert model.device.type == "cpu"
    for options in ({}, {"speculate": True}, {"num_beams": 1, "cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **GREEDY, **options), right)
    with torch.no_grad():
        assert model(ids, labels=ids).loss.isfinite()


PAIRS = [{"prompt": "w5 w6", "chosen": " w7 w8", "rejected": " w9 w10"}] * 2


@pytest.mark.parametrize("method", ["DPO", "GRPO", "RLOO"])
def test_trainers_that_need_one_head_are_told_so(method: str, proxy: ProxyTunedForCausalLM, lora_family: Path, tmp_path: Path) -> None:
    policy, data = AutoModelForCausalLM.from_pretrained(lora_family / "small"), Dataset.from_list(PAIRS)
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 2, "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": []}
    if method == "DPO":
        trainer = DPOTrainer(policy, ref_model=proxy, args=DPOConfig(**options), train_dataset=data, processing_class=make_tokenizer())
    else:
        kind, settings = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[method]
        trainer = kind(
            policy,
            reward_funcs=lambda completions, **_: [float(len(completion)) for completion in completions],
            args=settings(**options, num_generations=2, max_completion_length=4, beta=0.1),
            train_dataset=data.select_columns(["prompt"]),
            processing_class=make_tokenizer(),
        )
        trainer.ref_model = proxy
    with pytest.raises(UserError, match=r"last_hidden_state: .*DPO, GRPO and RLOO .* distil from it \(GKD\)") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    output = ProxyTunedForCausalLM.forward(proxy, torch.tensor([[3, 4]]))
    assert not hasattr(output, "last_hidden_state") and hasattr(output, "logits")


def test_a_mixture_is_distilled_by_gkd(proxy: ProxyTunedForCausalLM, lora_family: Path, tmp_path: Path) -> None:
    data = Dataset.from_list([{"messages": [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]}] * 2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    student = AutoModelForCausalLM.from_pretrained(lora_family / "small")
    before = {name: copy.deepcopy(model.state_dict()) for name, model in proxy.members.items()}
    settings = GKDConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, use_cpu=True, bf16=False, report_to=[], lmbda=0.5, max_new_tokens=4
    )
    trainer = GKDTrainer(student, teacher_model=proxy, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not torch.equal(student.lm_head.weight, AutoModelForCausalLM.from_pretrained(lora_family / "small").lm_head.weight)
    for name, weights in before.items():
        assert all(torch.equal(tensor, weights[key]) for key, tensor in proxy.members[name].state_dict().items())


@pytest.mark.parametrize("options", [{}, {"speculate": True}, {"num_beams": 3}, {"do_sample": True}])
def test_logits_that_are_no_numbers_are_no_text(options: dict, random_ids: Ids) -> None:
    """Greedy decoding would take the first NaN for the best token."""
    members, ids = make_members(), random_ids(2, 5)
    whole = ProxyTunedForCausalLM(members, proxy_tuning(0.5)).generate(ids, **GREEDY | options)
    assert whole.shape[1] > ids.shape[1]
    with torch.no_grad():
        members["expert"].model.lm_head.weight[:, 0] = torch.nan
    broken = ProxyTunedForCausalLM(members, proxy_tuning(0.5))
    with pytest.raises(UserError, match=r"the logits of base \+ expert \+ antiexpert after 5 tokens hold NaN"):
        broken.generate(ids, **GREEDY | options)
    broken.mixture = {"base": 1.0}  # the broken one has no part in it
    broken.generate(ids, **GREEDY | options | {"draft": "antiexpert"} if "speculate" in options else GREEDY | options)
