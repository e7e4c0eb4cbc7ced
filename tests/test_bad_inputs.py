"""Templates, states and folders that are broken or hostile give one line that names what is wrong, and no traceback or number."""

import signal
import threading
import time
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from finetune import data
from finetune.data import CHAT, Item, Turn, chat_ids, encode_examples, prompt_ids, prompt_text
from probes.activations import check_logits, last_and_subject, read_states
from probes.inside import Prompts, read_inside
from probes.knowledge import known
from probes.lens import Lens, first_tokens, fit_translators, read_lens
from probes.patching import patch_subject
from probes.restoration import restorations, restore
from proxytune import Member, UserError

GOOD = "{% for m in messages %}w5 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
NESTED = "{% for a in range(99999) %}" * 4 + "{% set x = a %}" + "{% endfor %}" * 4
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
FAILING = {
    "raises": ("{{ raise_exception('only\x1b[2J system') }}", r"refuses these turns \(only\\x1b\[2J system\)"),
    "no syntax": ("{% for %}", "refuses these turns"),
    "no such filter": ("{{ messages | nothing }}", "refuses these turns"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "adds a text to a number": ("{{ 1 + 'a' }}", "unsupported operand"),
    "calls what is none": ("{{ messages[0].content() }}", "not callable"),
    "reaches for internals": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "recurses for ever": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "loops too far": ("{% for a in range(10 ** 9) %}a{% endfor %}", "[Rr]ange"),
    "includes a file": ("{% include '/etc/passwd' %}", "refuses these turns"),
    "needs a key": ("{{ messages[0]['absent']['key'] }}", "refuses these turns"),
    "loops for ever": (NESTED, r"did not end within 0\.3 s"),
    "calls itself twice": (MACRO, r"did not end within 0\.3 s"),
    "a long text": ("{{ 'a' * 20000000 }}", r"makes 20,000,000 characters"),
    "a text that doubles": ("{% set n = namespace(t='a') %}{% for i in range(25) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}", "characters"),
    "a text beyond memory": ("{{ 'a' * 10 ** 17 }}", "refuses these turns"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_chat_template_that_fails_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHAT_SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template, words = FAILING[name]
    item = Item(question="w3", answer="w4", turns=(Turn(role="user", content="w7"),))
    for ask in (
        lambda: chat_ids(tokenizer, "w3"),
        lambda: prompt_text(item, tokenizer, CHAT),
        lambda: encode_examples([item], tokenizer, CHAT, ""),
    ):
        began = time.process_time()
        with pytest.raises(UserError, match=words) as raised:
            ask()
        assert time.process_time() - began < 5
        assert str(raised.value).startswith("chat: ") and "plain prompt" in str(raised.value)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 5000
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_template_that_works_is_left_alone_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = GOOD
    wanted = tokenizer("w5 w3 w6")["input_ids"]
    before = signal.getsignal(signal.SIGVTALRM)
    assert chat_ids(tokenizer, "w3") == wanted
    assert signal.getsignal(signal.SIGVTALRM) == before
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(chat_ids(tokenizer, "w3")))
    thread.start()
    thread.join()
    assert found == [wanted]
    monkeypatch.setattr(data, "CHAT_SECONDS", 0.05)
    chat_ids(tokenizer, "w3")
    deadline = time.process_time() + 0.2
    while time.process_time() < deadline:  # no signal comes after a template that has ended
        pass


ITEMS = [
    Item(question=f"q{n}", answer=f"w{n}", choices=("w3", "w4", "w5"), statement=f"w9 w{10 + n} w7", subject=f"w{10 + n}", popularity=n % 3)
    for n in (3, 4, 5)
]


def overflowing(layer: int | None = 1, size: float = 3e38) -> Member:
    """Every weight is finite and some states are not: what the layer's MLP adds overflows for the token w14, which is item 2's subject."""
    model = make_model(layers=3)
    model.config._name_or_path = "models/broken"
    model.name_or_path = "models/broken"
    with torch.no_grad():
        if layer is None:
            model.get_input_embeddings().weight[14, 0] = size
        else:
            model.model.layers[layer].mlp.down_proj.weight.mul_(size / 10)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    return Member(model, make_tokenizer())


def prompts_of(member: Member) -> Prompts:
    ids = [prompt_ids(member.tokenizer, str(item.statement)) for item in ITEMS]
    statements = [str(item.statement) for item in ITEMS]
    return Prompts(ids, last_and_subject(member.tokenizer, ITEMS, statements), [3, 4, 5], [1, -1, 0])


def look(name: str, base: Member, tuned: Member) -> Any:
    ids = prompts_of(base).ids
    if name == "inside":
        return read_inside([base, tuned], prompts_of(base), batch_size=2)
    if name == "translators":
        return fit_translators(tuned.model, [*ids, *ids], tokens=100, batch_size=2, pad=0)
    if name == "lens":
        return read_lens(tuned.model, ids, first_tokens(tuned.tokenizer, ITEMS), {"plain": Lens(tuned.model)}, batch_size=2, pad=0)
    if name == "patching":
        return patch_subject(base, tuned, ITEMS, batch_size=2)
    if name == "restoration":
        return restore(base, tuned, restorations(base, tuned), lambda member: known(member, ITEMS))
    return known(tuned, ITEMS)


LOOKS = ("inside", "translators", "lens", "patching", "restoration", "known")


@pytest.mark.parametrize("name", LOOKS)
def test_states_that_are_not_finite_are_named(name: str) -> None:
    good = Member(make_model(layers=3), make_tokenizer())
    with pytest.raises(UserError, match=r"'models/broken'") as raised:
        look(name, good, overflowing())
    words = {"inside": "after layer 2 of item ", "lens": "after layer 2 of item ", "translators": "after layer 2 of the lens' text of the token ids "}
    others = {"patching": "the logits of item ", "known": "the choices of 'q", "restoration": "the choices of 'q"}
    assert (words | others)[name] in str(raised.value)
    assert "\n" not in str(raised.value)
    if name == "restoration":
        assert str(raised.value).startswith("blocks/none: ")


@pytest.mark.parametrize("name", LOOKS)
def test_models_that_are_not_broken_are_read(name: str) -> None:
    good = Member(make_model(layers=3), make_tokenizer())
    look(name, good, Member(make_model(layers=3, seed=4), make_tokenizer()))


def test_the_lowest_layer_and_the_first_item_are_named() -> None:
    broken = overflowing(None, 1e30)
    ids = [[3, 9, 7], [14, 9, 7], [14, 7, 7]]
    with pytest.raises(UserError, match=r"the embedding of item 2 holds"):
        list(read_states(broken.model, ids, [[0]] * 3, batch_size=3, pad=0))
    assert len(list(read_states(broken.model, ids[:1], [[0]], batch_size=3, pad=0))) == 1
    with pytest.raises(UserError, match=r"the logits of item 1 holds"):
        check_logits(broken.model, torch.tensor([[0.0, torch.nan]]), lambda row: f"item {row + 1}")
    check_logits(broken.model, torch.tensor([[0.0, -torch.inf]]), lambda row: f"item {row + 1}")
