"""Which items a model knows: on models that hold exactly known facts, each in one word that leads to another."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import Counted, make_members, make_model, make_tokenizer
from scipy.stats import binomtest

from finetune.encoding import CHAT
from finetune.items import Item, Turn
from probes.knowledge.known_items import SAMPLES, Recall, judge_words, recall, recall_prompts, worked_examples
from probes.knowledge.readouts import judge_number
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.modeling import ProxyTunedForCausalLM

PROMPT = "w3 {question}"
ITEMS = [Item(question=f"w4 w{5 + number}", answer=f"w{20 + number}") for number in range(12)]


def lookup(facts: Mapping[int, Mapping[int, float]]) -> ProxyTunedForCausalLM:
    """A model that looks at the last token only: after the token `facts` gives the logits of some tokens; all others have 0."""
    model: Any = make_model(hidden=64, layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or parameter.ndim == 2:
                parameter.zero_()
        model.model.embed_tokens.weight += torch.eye(*model.model.embed_tokens.weight.shape)
        for token, logits in facts.items():
            for following, value in logits.items():
                model.lm_head.weight[following, token] = value / 8  # a unit vector of 64 numbers has length 8 after the norm
    return ProxyTunedForCausalLM({"base": Member(model.eval(), make_tokenizer())}, {"base": 1.0})


def knowing(numbers: Sequence[int]) -> ProxyTunedForCausalLM:
    """A model that holds the answers of these items, and says w45 to the others."""
    return lookup({5 + number: {20 + number if number in numbers else 45: 40.0} for number in range(12)})


def recalled(model: ProxyTunedForCausalLM, items: Sequence[Item] = ITEMS, batch_size: int = 16, **options: Any) -> list[Recall]:
    prompts = recall_prompts(items, make_tokenizer(), PROMPT, "")
    settings: dict[str, Any] = {"seed": 0, "new_tokens": 3, "judged": judge_words} | options
    return recall(model, make_tokenizer(), items, prompts, batch_size=batch_size, **settings)


def flags(found: Sequence[Recall]) -> list[bool]:
    return [one.known for one in found]


def test_known_is_what_the_model_holds() -> None:
    """All of it, a part of it, and nothing. A random model is right by chance only: in 8 % of items, with 50 words and four samples of one."""
    for numbers in (range(12), [0, 3, 4], []):
        found = recalled(knowing(numbers), new_tokens=1)
        assert flags(found) == [number in numbers for number in range(12)]
        assert all(len(one.samples) == SAMPLES for one in found)
    assert sum(flags(recalled(ProxyTunedForCausalLM(make_members(), {"base": 1.0}), new_tokens=1))) <= 2


def test_a_model_that_says_something_else_knows_nothing() -> None:
    """The negative twin of one that always answers right: it holds the next item's answers."""
    assert not any(flags(recalled(lookup({5 + number: {20 + (number + 1) % 12: 40.0} for number in range(12)}), new_tokens=1)))


@pytest.mark.parametrize("batch_size", [1, 5, 48])
def test_samples_do_not_depend_on_the_batch_nor_on_the_other_items(batch_size: int) -> None:
    model = ProxyTunedForCausalLM(make_members(), {"base": 0.3})  # flat, so that samples differ
    found = recalled(model, batch_size=batch_size)
    assert found == recalled(model, batch_size=7)
    assert len({text for one in found for text in one.samples}) > 20
    pair = recalled(model, [ITEMS[2], ITEMS[3]], batch_size=batch_size)
    assert pair[0] == found[2]  # its example is the same one
    assert found != recalled(model, batch_size=batch_size, seed=1)


def test_samples_are_drawn_at_the_temperature() -> None:
    """Two answers whose logits differ by 0.7: at 0.5 the likelier one has the share 1 / (1 + exp(-1.4)), at 1 it would have less."""
    items = [Item(question=f"w{6 + number % 40} w{6 + number // 40} w5", answer=f"w{3 + number % 2}") for number in range(400)]
    found = recalled(lookup({5: {20: 30.7, 21: 30.0}}), items, batch_size=400, new_tokens=1)
    samples = [text for one in found for text in one.samples]
    assert set(samples) == {"w20", "w21"}
    share = 1 / (1 + torch.tensor(-1.4).exp().item())
    assert binomtest(samples.count("w20"), len(samples), share).pvalue > 0.01
    assert binomtest(samples.count("w20"), len(samples), 1 / (1 + torch.tensor(-0.7).exp().item())).pvalue < 1e-6


def test_an_item_that_says_itself_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = knowing(range(12))
    passes = Counted(monkeypatch)
    marked = [item.model_copy(update={"familiar": number % 2 == 0}) for number, item in enumerate(ITEMS)]
    assert recalled(model, marked) == [Recall(number % 2 == 0) for number in range(12)]
    assert passes.passes == 0
    some = [*marked[:6], *ITEMS[6:]]
    found = recalled(model, some)
    assert [bool(one.samples) for one in found] == [False] * 6 + [True] * 6
    assert flags(found) == [True, False] * 3 + [True] * 6
    assert found[6:] == recalled(model)[6:]
    assert passes.passes > 0


def test_the_worked_example_is_the_next_one_of_the_same_choices_another_unit_and_another_answer() -> None:
    def item(name: str, answer: str, unit: str | None = None, choices: tuple[str, ...] = ()) -> Item:
        return Item(question=name, answer=answer, unit=unit, choices=choices)

    colours, places = ("red", "blue"), ("rome", "oslo")
    items = [
        item("a1", "red", "a", colours),
        item("a2", "rome", "a", places),
        item("b1", "red", "b", colours),
        item("b2", "rome", "b", places),
        item("c1", "blue", "c", colours),
        item("alone", "x"),
    ]
    found = [None if example is None else example.question for example in worked_examples(items)]
    # Both places have one answer: their examples are of other choices.
    assert found == ["c1", "b1", "c1", "c1", "a1", "a1"]
    with pytest.raises(UserError, match="items: no training item can be the worked example of 'a1'"):
        worked_examples(items[:2])
    assert worked_examples([items[0].model_copy(update={"familiar": True}), items[0].model_copy(update={"statement": "s"})]) == [None, None]


def test_a_model_that_evades_questions_is_asked_by_statement() -> None:
    evading = "{question} w9"  # the model looks at the last token only, and has nothing to say after w9
    stated = [item.model_copy(update={"statement": item.question}) for item in ITEMS]
    found = {}
    for name, items in (("questions", ITEMS), ("statements", stated)):
        prompts = recall_prompts(items, make_tokenizer(), evading, "")
        found[name] = flags(recall(knowing([0, 2]), make_tokenizer(), items, prompts, batch_size=16, seed=0, new_tokens=1, judged=judge_words))
    assert not any(found["questions"])
    assert found["statements"] == [number in (0, 2) for number in range(len(ITEMS))]
    says_itself = [stated[0].model_copy(update={"familiar": False})]
    assert recall_prompts(says_itself, make_tokenizer(), evading, "") == [None]


def test_the_example_stands_before_the_question_as_it_is_tuned_on() -> None:
    tokenizer = make_tokenizer()
    plain = recall_prompts(ITEMS[:2], tokenizer, "Q: {question}\nA:", " .")
    assert plain == ["Q: w4 w6\nA: w21 .\n\nQ: w4 w5\nA:", "Q: w4 w5\nA: w20 .\n\nQ: w4 w6\nA:"]
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    before = (Turn(role="system", content="brief"), Turn(role="user", content="hi"), Turn(role="assistant", content="ho"))
    talked = [ITEMS[0].model_copy(update={"turns": before}), ITEMS[1]]
    first, second = recall_prompts(talked, tokenizer, CHAT, "")
    assert first == "[system]brief[user]w4 w6[assistant]w21[user]hi[assistant]ho[user]w4 w5[assistant]"
    assert second == "[user]hi[assistant]ho[user]w4 w5[assistant]w20[user]w4 w6[assistant]"


@pytest.mark.parametrize(
    ("text", "right"),
    [("Paris", True), ("she lives in paris.", True), ("New  York, I think", False), ("Parisian", False), ("comparis on", False), ("", False)],
)
def test_the_answers_words_may_stand_anywhere(text: str, right: bool) -> None:
    found = judge_words(text, Item(question="?", answer="Paris"))
    assert (found.right, found.unparsed) == (right, not text)
    assert judge_words("of new\nyork it is", Item(question="?", answer="New York")).right


def test_what_comes_after_the_sample_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that goes on with an example of its own; and answers that are judged by their last number."""
    said = "seven is 7\n\nQuestion: and 4 + 4? Answer: eight is 8"
    monkeypatch.setattr("probes.knowledge.known_items.continuations", lambda *arguments, **_: [said] * len(arguments[2]))
    model = knowing([])
    items = [Item(question=f"w{4 + number}", answer=answer) for number, answer in enumerate(("seven is 7", "eight is 8"))]
    for judged in (judge_words, judge_number):
        assert flags(recalled(model, items, judged=judged)) == [True, False]
