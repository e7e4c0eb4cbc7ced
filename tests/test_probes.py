import numpy as np
import pytest
import torch
from conftest import VOCABULARY, make_members, make_model, make_tokenizer

from finetune import Item
from probes import answer_greedily, choose, density, erosion_verdict, familiarity, gaussian_null
from probes.activations import last_token_states
from probes.density import METRICS, random_rotation, thirds
from probes.readouts import judge, judge_number
from proxytune import ProxyTunedForCausalLM, UserError, proxy_tuning

WORDS = [f"w{number}" for number in range(3, VOCABULARY)]


def some_prompts(count: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (3 + index % 5,), generator=generator).tolist() for index in range(count)]


@pytest.mark.parametrize(
    ("text", "right", "unparsed"),
    [
        ("3 + 4 = 7", True, False),
        ("so 7.0 dollars.", True, False),
        ("7, or rather 8", False, False),
        ("-7", False, False),
        ("10-7", True, False),
        ("none", False, True),
    ],
)
def test_worked_answers_are_judged_by_their_last_number(text: str, right: bool, unparsed: bool) -> None:
    answer = judge_number(text, Item(question="?", answer="3 + 4 is 7 #### 7"))
    assert (answer.right, answer.unparsed) == (right, unparsed)
    with pytest.raises(UserError, match="'seven' holds no number"):
        judge_number(text, Item(question="?", answer="seven"))


def test_metrics_on_vectors_whose_density_is_known() -> None:
    single, equal = torch.eye(20)[:1], torch.ones(1, 20)
    expected = {"e5": (1, 1 / 20), "effective_rank": (1 / 20, 1), "hoyer": (1, 0), "participation_ratio": (1 / 20, 1)}
    for name, (sparse, dense) in expected.items():
        assert METRICS[name](single).item() == pytest.approx(sparse, abs=1e-5), name
        assert METRICS[name](equal).item() == pytest.approx(dense, abs=1e-5), name


def test_metrics_of_gaussian_vectors_are_the_published_null() -> None:
    for size, energy, rank in ((64, 0.257, 0.491), (256, 0.264, 0.484), (1024, 0.278, 0.482)):
        vectors = torch.randn(4000, size, generator=torch.Generator().manual_seed(0))
        assert METRICS["e5"](vectors).mean().item() == pytest.approx(energy, abs=0.002)
        assert METRICS["effective_rank"](vectors).mean().item() == pytest.approx(rank, abs=0.003)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_state_k_is_the_output_of_layer_k(architecture: str) -> None:
    model = make_model(architecture, layers=3)
    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    outputs: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output))
    prompt = some_prompts()[3]
    (states,) = last_token_states(model, [prompt], 1, 0)
    assert states.shape[1] == 4
    for number, output in enumerate(outputs, start=1):
        torch.testing.assert_close(states[0, number], output[0, -1])
    if architecture != "gpt2":  # its state 0 holds the position's embedding too
        torch.testing.assert_close(states[0, 0], model.get_input_embeddings().weight[prompt[-1]].detach())


def test_density_does_not_depend_on_batches_or_padding() -> None:
    model, prompts = make_model(), some_prompts()
    together, apart = (density(model, prompts, batch_size=size, pad=0) for size in (12, 1))
    for name, values in together.items():
        np.testing.assert_allclose(values, apart[name], atol=1e-5)


def test_rotation_is_orthogonal_and_keeps_only_what_is_not_of_the_basis() -> None:
    rotation = random_rotation(32, 0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-5, rtol=0)
    sparse = torch.eye(32)[:5]
    assert METRICS["effective_rank"](sparse @ rotation).mean() > 0.3


def test_gaussian_null_has_the_states_scale() -> None:
    model, prompts = make_model(), some_prompts(200)
    null = gaussian_null(model, prompts, batch_size=50, pad=0)
    batched = gaussian_null(model, prompts, batch_size=7, pad=0)
    for metric in METRICS:
        assert null[metric]["sd"] == pytest.approx(batched[metric]["sd"], rel=1e-3)
        assert all(0 < sd < 0.5 for sd in null[metric]["sd"])


def test_thirds() -> None:
    assert thirds(5) == {"lower": range(1, 2), "upper": range(4, 5)}
    assert thirds(31) == {"lower": range(1, 11), "upper": range(21, 31)}


def test_a_planted_erosion_is_supported_and_identical_models_are_not() -> None:
    assert erosion_verdict((-0.02, -0.03, -0.01), (-0.02, -0.03, -0.01)) == "supported"
    assert erosion_verdict((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)) == "not supported"
    assert erosion_verdict((-0.02, -0.03, -0.01), (0.02, 0.01, 0.03)) == "not supported"
    assert erosion_verdict((-0.001, -0.02, 0.02), (0.0, -0.02, 0.02)) == "underpowered"


def test_familiarity_by_levels_and_by_thirds() -> None:
    levels = familiarity([0.0, 30.0, 100.0, 1.0, 3.0, 10.0, 0.0])
    assert levels.labels == ("k=0", "k=1", "k=3", "k=10", "k=30", "k=100")
    assert levels.buckets == ("k=0", "k=30", "k=100", "k=1", "k=3", "k=10", "k=0")
    assert levels.contrast == (-1, 1, 1, 0, 0, 0, -1)
    many = familiarity([float(value) for value in range(30)])
    assert many.labels == ("popularity=low", "popularity=middle", "popularity=high")
    assert [many.contrast.count(sign) for sign in (-1, 0, 1)] == [10, 10, 10]
    with pytest.raises(UserError, match="every knowledge item"):
        familiarity([1.0, float("nan")])
    with pytest.raises(UserError, match="have 3"):
        familiarity([3.0, 3.0])


@pytest.mark.parametrize(
    ("text", "right", "unparsed"),
    [
        ("Paris", True, False),
        ("paris, of course", True, False),
        ("Parisian", False, True),
        ("", False, True),
        ("Rome", False, False),
        ("it is Paris", False, True),
        ("Paris Saint", False, False),
    ],
)
def test_answers_are_judged_by_how_they_begin(text: str, right: bool, unparsed: bool) -> None:
    answer = judge(text, Item(question="?", answer="Paris", choices=("Paris", "Rome", "Paris Saint")))
    assert (answer.right, answer.unparsed) == (right, unparsed)


def items() -> list[Item]:
    return [
        Item(question=f"{WORDS[i]} {WORDS[2 * i]}", answer=WORDS[i + 3], choices=(WORDS[i], WORDS[i + 3], f"{WORDS[i]} {WORDS[9]}"))
        for i in range(10)
    ]


def test_greedy_answers_do_not_depend_on_the_batch() -> None:
    model = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0))
    prompts = [item.question for item in items()]
    found = [answer_greedily(model, make_tokenizer(), items(), prompts, new_tokens=4, batch_size=size) for size in (1, 3, 10)]
    assert found[0] == found[1] == found[2]
    assert len({answer.text for answer in found[0]}) > 3


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    model = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0))
    with pytest.raises(UserError, match=r"has 126 tokens and may get 4 more, but the window is 128"):
        answer_greedily(model, make_tokenizer(), items()[:1], ["w5 " * 126], new_tokens=4, batch_size=1)


def test_choices_are_those_of_the_slow_way() -> None:
    members = make_members()
    model = ProxyTunedForCausalLM(members, proxy_tuning(1.0))
    tokenizer = make_tokenizer()
    mixtures = {"base": {"base": 1.0}, "proxy": proxy_tuning(1.5)}
    found = choose(model, tokenizer, items(), [item.question for item in items()], mixtures, batch_tokens=64)
    for name, mixture in mixtures.items():
        for item, answer in zip(items(), found[name], strict=True):
            means = []
            for choice in item.choices:
                prompt, ending = tokenizer(item.question)["input_ids"], tokenizer(choice)["input_ids"]
                ids = torch.tensor([prompt + ending])
                with torch.no_grad():
                    law = sum(coefficient * members[member].model(ids).logits[0] for member, coefficient in mixture.items()).log_softmax(-1)
                means.append(sum(law[len(prompt) - 1 + place, token].item() for place, token in enumerate(ending)) / len(ending))
            assert answer.text == item.choices[int(np.argmax(means))]
    assert found["base"] != found["proxy"]
