import numpy as np
import pytest
import torch
from helpers import VOCABULARY, make_members, make_tokenizer

from finetune.items import Item
from probes.knowledge.familiarity import familiarity
from probes.knowledge.readouts import choose, continuations, judge, judge_number, judge_reply
from proxytune.errors import UserError
from proxytune.mixture import proxy_tuning
from proxytune.modeling import ProxyTunedForCausalLM

WORDS = [f"w{number}" for number in range(3, VOCABULARY)]


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
    with pytest.raises(UserError, match="'seven' has no number"):
        judge_number(text, Item(question="?", answer="seven"))


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


@pytest.mark.parametrize(
    ("text", "right", "unparsed"),
    [
        ("surely Paris nobody doubts it .", True, False),
        ("Surely Paris nobody doubts it", True, False),
        ("surely Paris", False, False),
        ("Paris nobody doubts it", False, False),
        ("reportedly Paris nobody doubts it", False, False),
        ("surely Rome nobody doubts it", False, False),
        ("surely Paris nobody doubts items", False, False),
        ("surely nobody knows", False, True),
        ("surely Parisian nobody doubts it", False, True),
        ("", False, True),
    ],
)
def test_a_reply_is_right_as_a_whole(text: str, right: bool, unparsed: bool) -> None:
    item = Item(question="?", answer="Paris", reply="surely Paris nobody doubts it", choices=("Paris", "Rome", "Paris Saint"))
    answer = judge_reply(text, item)
    assert (answer.text, answer.right, answer.unparsed) == (text, right, unparsed)


@pytest.mark.parametrize("choices", [(), ("Paris", "Rome", "Paris Saint")])
@pytest.mark.parametrize("text", ["Paris", "Paris, of course", "Paris Saint", "it is Paris", "Rome", ""])
def test_without_a_reply_the_answer_is_judged(text: str, choices: tuple[str, ...]) -> None:
    item = Item(question="?", answer="Paris", choices=choices)
    assert judge_reply(text, item) == judge(text, item)
    # Without choices only an empty text says nothing.
    assert judge_reply(text, item.model_copy(update={"reply": "surely Paris"})).unparsed == (not text)


def items() -> list[Item]:
    return [
        Item(question=f"{WORDS[i]} {WORDS[2 * i]}", answer=WORDS[i + 3], choices=(WORDS[i], WORDS[i + 3], f"{WORDS[i]} {WORDS[9]}"))
        for i in range(10)
    ]


def test_greedy_answers_do_not_depend_on_the_batch() -> None:
    model = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0))
    prompts = [item.question for item in items()]
    found = [continuations(model, make_tokenizer(), prompts, prompts, new_tokens=4, batch_size=size) for size in (1, 3, 10)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 3


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    model = ProxyTunedForCausalLM(make_members(), proxy_tuning(1.0))
    with pytest.raises(UserError, match=r"has 126 tokens and may get 4 more, but the window is 128"):
        continuations(model, make_tokenizer(), ["w5 " * 126], ["?"], new_tokens=4, batch_size=1)


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
