"""Templates, states and folders that are broken or hostile give one line that names what is wrong, and no traceback or number."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_model, make_tokenizer

from evals import cli
from evals.harness.model import run_harness
from finetune import encoding
from finetune.encoding import CHAT, chat_ids, encode_examples, prompt_ids, prompt_text
from finetune.items import Item, Turn
from probes.inside import Prompts, read_inside
from probes.internals.activations import check_logits, last_and_subject, read_states
from probes.knowledge.candidates import known
from probes.lens import Lens, first_tokens, fit_translators, read_lens
from probes.patching import patch_subject
from probes.restoration import restorations, restore
from proxytune.errors import UserError
from proxytune.member import Member

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
    "loops for ever": (NESTED, r"did not end within 0\.5 s"),
    "calls itself twice": (MACRO, r"did not end within 0\.5 s"),
    "a long text": ("{{ 'a' * 20000000 }}", r"makes 20,000,000 characters"),
    "a text that doubles": ("{% set n = namespace(t='a') %}{% for i in range(25) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}", "characters"),
    "a text beyond memory": ("{{ 'a' * 10 ** 17 }}", "refuses these turns"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_chat_template_that_fails_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "CHAT_SECONDS", 0.5)
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
    monkeypatch.setattr(encoding, "CHAT_SECONDS", 0.05)
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
    others = {"patching": "the logits of item ", "known": "at 'q", "restoration": "at 'q"}
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


SLOW = [
    "probe density small nothing --knowledge items.jsonl --out p2",
    "probe density small broken --knowledge items.jsonl --out p4",
    "probe recoverability small broken --knowledge items.jsonl --out p8",
]  # measure the base first; their fast twins are above
MISTAKES = """
items nothing
items items.jsonl
items base
items empty
items --limit 0 empty
items
rescore nothing
rescore items.jsonl
rescore empty
rescore latin
compare nothing.yaml
compare number.yaml
compare list.yaml
compare bytes.yaml
compare object.yaml
compare empty
compare dots.yaml
compare escape.yaml
compare hidden.yaml
compare surrogate.yaml
compare nameless.yaml
compare threads.yaml
compare nothing.yaml --format xml
probe
probe nothing
probe density small
probe density small small small --knowledge items.jsonl
probe density small base --knowledge items.jsonl --out p1
probe density small nothing --knowledge items.jsonl --out p2
probe density empty --knowledge items.jsonl --out p3
probe density small broken --knowledge items.jsonl --out p4
probe drift broken --knowledge items.jsonl --out p5
probe lens broken --knowledge items.jsonl --out p6
probe restoration small broken --knowledge items.jsonl --out p7
probe recoverability small broken --knowledge items.jsonl --out p8
probe density small --knowledge bytes.jsonl --out p9
probe density small --knowledge items.jsonl --corpus empty --out p10
probe density small --knowledge items.jsonl --prompt x --out p11
probe density small --knowledge items.jsonl --threads 0
generate w3
generate w3 --base nothing
generate w3 --base empty
generate w3 --base items.jsonl
generate w3 --base small --expert small
generate w3 --base small --expert empty --antiexpert small
generate w3 --base small --expert base --antiexpert small --alpha nan
generate w3 --base small --temperature nan
generate w3 --base small --temperature inf
generate w3 --base small --temperature 1e-300
generate w3 --base small --temperature -1
generate w3 --base broken --temperature 1
generate w3 --base small --new-tokens 0
generate w3 --base small --device meta
generate w3 --base small --device nothing
generate w3 --base small --dtype int8
generate w3 --base small --threads 99999999999999999999
generate w3 --base small --chat base
generate w3 --base small --chat nobody
generate w3 --base chatty --chat base
generate w3 --base small --system x
generate w3 --base small --speculate
generate w3 --base small --map-tokens
generate w3 --bose small
tune
tune small nothing.jsonl --out u
tune small bytes.jsonl --out u
tune small none.jsonl --out u
tune small torn.jsonl --out u
tune small list.jsonl --out u
tune small deep.jsonl --out u
tune small surrogate.jsonl --out u
tune small bytes.parquet --out u
tune small empty.jsonl/x --out u
tune small nothing/set:train --out u
tune nothing items.jsonl --out u
tune empty items.jsonl --out u
tune small items.jsonl --out base
tune small items.jsonl --out items.jsonl/u
tune small items.jsonl --out u --learning-rate nan
tune small items.jsonl --out u --epochs nan
tune small items.jsonl --out u --batch-size 0
tune small items.jsonl --out u --rank 0
tune small items.jsonl --out u --kl nan
tune small items.jsonl --out u --preference 0.1
tune small items.jsonl --out u --consistent 1
tune small items.jsonl --out u --validation-share 2
tune small items.jsonl --out u --prompt chat
tune chatty items.jsonl --out u --prompt chat
tune small items.jsonl --out u --prompt {x}
tune small items.jsonl --out u --test items.jsonl
tune small items.jsonl --out u --frozen lower
tune small items.jsonl --out u --checkpoint-minutes -1
export e
export e --base nothing --expert small --antiexpert small
export base --base base --expert small --antiexpert small
export e --base base --expert empty --antiexpert small
bench --tokens 1
bench --models base nothing
bench --models small small --device nothing
world build nothing
nothing
"""
STUDY = "study: {name}\nmodels: {{base: small}}\ndata: {{test: items.jsonl}}\nmeasures: [task]\narms:\n  base: {{kind: base}}\n"
TEXTS = {
    "number.yaml": "5",
    "list.yaml": "- 1",
    "object.yaml": "study: !!python/object/apply:os.system [ls]",
    "dots.yaml": STUDY.format(name="'..'"),
    "escape.yaml": STUDY.format(name='"a\\x1b[2J"'),
    "hidden.yaml": STUDY.format(name="a") + '  "x\\u202e": {kind: direct, path: small}\n',
    "surrogate.yaml": STUDY.format(name="a") + '  "\\ud800": {kind: direct, path: small}\n',
    "nameless.yaml": STUDY.format(name="a") + '  " ": {kind: direct, path: small}\n',
    "threads.yaml": STUDY.format(name="a") + "threads: 99999999999999999999\n",
    "none.jsonl": "",
    "torn.jsonl": '{"question": "a"',
    "list.jsonl": "[1]\n",
    "deep.jsonl": '{"question": ' + "[" * 100_000,
    "surrogate.jsonl": '{"question": "\\ud800", "answer": "w3"}\n',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    tokenizer, chatty = make_tokenizer(), make_tokenizer()
    chatty.chat_template = "{{ raise_exception('\x1b[2J') }}"
    for name, model in (("small", make_model(layers=3)), ("base", make_model(hidden=48)), ("chatty", make_model()), ("broken", overflowing().model)):
        model.save_pretrained(folder / name)
        (chatty if name == "chatty" else tokenizer).save_pretrained(folder / name)
    (folder / "empty").mkdir()
    latin = os.fsencode(folder) + b"/latin/b\xff/s\xfe"
    os.makedirs(latin)
    with open(latin + b"/predictions.jsonl", "w") as file:
        file.write(json.dumps({"question": "q", "answer": "7", "model_output": "7"}))
    rows = [
        ITEMS[0].model_copy(update={"question": f"w{n}", "statement": f"w9 w{n} w7", "subject": f"w{n}", "popularity": n % 4}) for n in range(10, 40)
    ]
    (folder / "items.jsonl").write_text("\n".join(row.model_dump_json(exclude={"turns", "unit", "rejected"}) for row in rows))
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    for name in ("bytes.yaml", "bytes.jsonl", "bytes.parquet"):
        (folder / name).write_bytes(b"PAR1\xff\xfe\0PAR1")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", [pytest.param(line, marks=pytest.mark.slow if line in SLOW else ()) for line in MISTAKES.strip().splitlines()])
def test_a_mistake_is_one_line(command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["proxytune", *command.split()])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    torch.set_num_threads(threads)
    said = capfd.readouterr()
    assert stopped.value.code == 2
    *before, last = said.err.splitlines()
    assert last.startswith("proxytune: error: ") and last.isprintable() and len(last) < 2100
    assert not any("Error" in line or "Traceback" in line or "\x1b" in line for line in before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command",
    [
        "generate w3 --base small --new-tokens 2 --explain",
        "generate w3 --base small --new-tokens 2 --temperature 1e30",
        "generate w3 --base small --expert broken --antiexpert broken --alpha 0 --new-tokens 2",
        "--help",
        "items --help",
    ],
)
def test_what_is_no_mistake_is_done(command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["proxytune", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr()
    assert said.out and "error" not in said.err


@pytest.mark.filterwarnings("ignore")
def test_no_arguments_are_answered_by_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["proxytune"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "Usage" in said.out + said.err and "error" not in said.err


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("Tasks not found: x"), "lm-eval: Tasks not found: x"), (UserError("base: no"), "^base: no")]
)
def test_what_the_harness_finds_wrong_is_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> None:
        raise error

    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    with pytest.raises(UserError, match=words):
        run_harness(["run", "--tasks", "x"])
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: None)
    run_harness(["run", "--tasks", "x"])
