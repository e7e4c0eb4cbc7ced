"""Each recipe against what it says: equal batches, padding-free rows, frozen layers, losses that see models that do not change."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import PATHS, SOME_ARCHITECTURES, items, make_model, make_tokenizer, words
from peft import PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.encoding import encode_examples, encode_pairs
from finetune.flops import forward_flops, training_flops
from finetune.items import Item, items_to_tune_on, shuffle_answers
from finetune.meter import Meter
from finetune.recipe import EarlyStopping, Tuning, TuningRun
from finetune.reference import read_reference
from finetune.trainers import _freeze, _lora, inside_the_mixture, near_start
from finetune.tuning import TuningReport, tune
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member, load_member

PROMPT = "{question}"


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if not self.first:
            self.first = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    def distance(self, other: "Gradients") -> float:
        return max(float((self.first[name] - gradient).abs().max()) for name, gradient in other.first.items())


def run(folder: Path, name: str, model: str = "small", count: int = 24, watcher: TrainerCallback | None = None, **options: Any) -> TuningReport:
    settings = {"method": "full", "learning_rate": 1e-3, "epochs": 1.0, "batch_size": 8} | options
    base = folder / "base" if "consistent" in settings else None
    return tune(TuningRun(folder / model, items(count), Tuning(**settings), prompt=PROMPT, ending="", seed=0, out=folder / name, base=base), watcher)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(load_member(path).model.state_dict())


def distance(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("options", [{}, {"kl": 0.5}, {"consistent": 1.0}], ids=["plain", "kl", "consistent"])
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(folder: Path, options: dict[str, Any]) -> None:
    whole = Gradients()
    losses = run(folder, "whole", watcher=whole, **options).losses
    for size in (4, 2, 1):
        cut = Gradients()
        assert run(folder, f"cut-{size}", watcher=cut, micro_batch_size=size, **options).losses == pytest.approx(losses, abs=1e-5)
        assert cut.distance(whole) < 1e-5
    other = Gradients()
    run(folder, "other", watcher=other, batch_size=4, **options)
    assert other.distance(whole) > 1e-3


@pytest.mark.parametrize("architecture", SOME_ARCHITECTURES)
def test_padding_free_rows_equal_padded_rows(architecture: str) -> None:
    model = make_model(architecture)
    rows = [
        {"input_ids": row["input_ids"], "labels": [token if mask else -100 for token, mask in zip(*row.values(), strict=True)]}
        for row in encode_examples(items(8), make_tokenizer(), PROMPT, "")
    ]
    found = []
    for padding_free in (False, True):
        model.zero_grad()
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (padded, expected), (packed_loss, gradients) = found
    assert torch.allclose(packed_loss, padded, atol=1e-5)
    assert all(torch.allclose(gradients[name], gradient, atol=1e-5) for name, gradient in expected.items())


@pytest.mark.parametrize("options", [{}, {"kl": 0.5}, {"consistent": 1.0}], ids=["plain", "kl", "consistent"])
def test_padding_free_tuning_equals_padded_tuning(folder: Path, options: dict[str, Any]) -> None:
    padded, padding_free = Gradients(), Gradients()
    losses = run(folder, "padded", watcher=padded, **options).losses
    assert run(folder, "padding_free", watcher=padding_free, padding_free=True, **options).losses == pytest.approx(losses, abs=1e-5)
    assert padding_free.distance(padded) < 1e-5


def test_padding_free_rows_without_positions_would_not(folder: Path) -> None:
    """The negative twin: examples end to end that see each other have another loss."""
    tokenizer, model = make_tokenizer(), load_member(folder / "small").model
    rows = encode_examples(items(8), tokenizer, PROMPT, "")
    joined = torch.tensor([[token for row in rows for token in row["input_ids"]]])
    labels = torch.tensor([token if mask else -100 for row in rows for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True)])
    seen = cross_entropy(model(joined).logits[0, :-1], labels[1:], ignore_index=-100)
    assert abs(float(seen.detach()) - run(folder, "out", count=8).losses[0]) > 1e-2


def laws(folder: Path, name: str) -> torch.Tensor:
    """The logits of a model at all trained places."""
    rows = encode_examples(items(), make_tokenizer(), PROMPT, "")
    return read_reference(load_member(folder / name), rows, folder / "states", name).logits([row["input_ids"] for row in rows], torch.device("cpu"))


def reference_step(folder: Path, options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """One example after another, plain torch: the loss and the gradient of one batch."""
    tokenizer, model = make_tokenizer(), load_member(folder / "small").model
    start, base = load_member(folder / "small").model, load_member(folder / "base").model
    total, places = torch.tensor(0.0), 0
    for row in encode_examples(items(8), tokenizer, PROMPT, ""):
        ids = torch.tensor([row["input_ids"]])
        trained = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
        logits = model(ids).logits[0, :-1][trained]
        with torch.no_grad():
            before, large = start(ids).logits[0, :-1][trained], base(ids).logits[0, :-1][trained]
        if "consistent" in options:
            total = total + cross_entropy(large + options["consistent"] * (logits - before), ids[0, 1:][trained], reduction="sum")
        else:
            total = total + cross_entropy(logits, ids[0, 1:][trained], reduction="sum")
        if "kl" in options:
            law = before.log_softmax(-1)
            total = total + options["kl"] * torch.nn.functional.kl_div(logits.log_softmax(-1), law, log_target=True, reduction="sum")
        places += int(trained.sum())
    (total / places).backward()
    return float((total / places).detach()), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("options", [{}, {"kl": 0.5}, {"consistent": 1.0}, {"consistent": 0.5}], ids=str)
def test_a_step_is_that_of_a_reference_loop(folder: Path, options: dict[str, Any]) -> None:
    loss, gradients = reference_step(folder, options)
    report = run(folder, "out", count=8, **options)
    assert report.losses[0] == pytest.approx(loss, abs=1e-5)
    before, after = weights(folder / "small"), weights(folder / "out")
    for name, gradient in gradients.items():  # AdamW's first step goes by the learning rate against the gradient's sign
        clear = gradient.abs() > 1e-4
        assert torch.equal((after[name] - before[name])[clear].sign(), -gradient[clear].sign()), name
    if options:
        assert loss != pytest.approx(reference_step(folder, {})[0], abs=1e-3) or "kl" in options


def test_kl_holds_the_model_near_its_start(folder: Path) -> None:
    plain, held = run(folder, "plain", epochs=4.0), run(folder, "held", epochs=4.0, kl=5.0)
    assert plain.losses[0] == pytest.approx(held.losses[0], abs=1e-5)  # at the start the divergence is zero
    start, *tuned = (laws(folder, name).log_softmax(-1) for name in ("small", "plain", "held"))
    free, kept = ((start.exp() * (start - law)).sum(-1).mean() for law in tuned)
    assert kept < 0.8 * free


def test_a_consistent_expert_serves_its_base_better_than_a_plain_one(folder: Path) -> None:
    run(folder, "plain", epochs=8.0)
    run(folder, "consistent", epochs=8.0, consistent=1.0)
    rows = encode_examples(items(), make_tokenizer(), PROMPT, "")
    targets = torch.tensor([token for row in rows for token, mask in zip(*row.values(), strict=True) if mask])
    read = {name: laws(folder, name) for name in ("base", "small", "plain", "consistent")}
    mixed = inside_the_mixture(1.0)
    losses = {name: float(mixed(read[name], targets, {"base": read["base"], "start": read["small"]}).mean()) for name in ("plain", "consistent")}
    assert losses["consistent"] < losses["plain"]


def test_losses_with_nothing_to_hold_on_to_are_the_plain_one() -> None:
    logits, other = torch.randn(5, 9), torch.randn(5, 9)
    targets = torch.arange(5)
    plain = cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(near_start(3.0)(logits, targets, {"start": logits}), plain, atol=1e-6)
    assert not torch.allclose(near_start(3.0)(logits, targets, {"start": other}), plain, atol=1e-2)
    assert torch.allclose(inside_the_mixture(1.0)(logits, targets, {"base": other, "start": other}), plain, atol=1e-5)


def test_what_frozen_models_say_is_read_once_and_is_what_they_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = load_member(folder / "base")
    rows = encode_examples(items(9), make_tokenizer(), PROMPT, "")
    read = read_reference(member, rows, folder / "states", "base")
    ids = [rows[4]["input_ids"], rows[1]["input_ids"]]
    expected = torch.cat(
        [
            member.model(torch.tensor([rows[place]["input_ids"]])).logits[0, :-1][torch.tensor(rows[place]["completion_mask"][1:]) == 1]
            for place in (4, 1)
        ]
    )
    assert torch.allclose(read.logits(ids, torch.device("cpu")), expected, atol=1e-5)
    monkeypatch.setattr("finetune.reference._states", lambda *_: pytest.fail("was read again"))
    assert torch.equal(
        read_reference(load_member(folder / "base"), rows, folder / "states", "base").logits(ids, torch.device("cpu")),
        read.logits(ids, torch.device("cpu")),
    )
    with pytest.raises(KeyError):
        read.logits([[3, 4, 5]], torch.device("cpu"))


WRITER = """
import os, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import finetune.reference as reference
import torch
from helpers import items, make_tokenizer
from finetune.encoding import encode_examples
from proxytune.member import load_member

folder, number = Path({folder!r}), int(sys.argv[1])
if {one_id}:
    os.getpid = lambda: 1
save = reference.save_file

def save_and_wait(*arguments, **options):
    save(*arguments, **options)
    (folder / f"written-{{number}}").touch()
    while len(list(folder.glob("written-*"))) < 2:
        time.sleep(0.01)

reference.save_file = save_and_wait
rows = encode_examples(items(5), make_tokenizer(), "{{question}}", "")
read = reference.read_reference(load_member(folder / "base"), rows, folder / "states", "base")
torch.save(read.logits([row["input_ids"] for row in rows], torch.device("cpu")), folder / f"logits-{{number}}.pt")
"""


@pytest.mark.slow  # two more processes
@pytest.mark.parametrize(
    "one_id",
    [pytest.param(False, marks=pytest.mark.slow, id="one machine"), pytest.param(True, id="one process id, as in two containers")],
)
def test_two_processes_that_read_a_reference_at_once_each_write_a_file_of_their_own(folder: Path, one_id: bool) -> None:
    """Both have written before either publishes; with one shared file the second would find it gone."""
    script = WRITER.format(paths=PATHS, folder=str(folder), one_id=one_id)
    processes = [subprocess.Popen([sys.executable, "-c", script, str(number)], stderr=subprocess.PIPE, text=True) for number in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    (file,) = (folder / "states").iterdir()
    assert file.suffix == ".safetensors"
    rows = encode_examples(items(5), make_tokenizer(), PROMPT, "")
    alone = read_reference(load_member(folder / "base"), rows, folder / "alone", "base").logits(
        [row["input_ids"] for row in rows], torch.device("cpu")
    )
    assert all(torch.equal(torch.load(folder / f"logits-{number}.pt"), alone) for number in range(2))


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path: Path) -> None:
    member = Member(make_model("gemma"), make_tokenizer())
    member.model.get_output_embeddings().register_forward_hook(lambda module, _, output: output)
    forward = member.model.forward

    def capped(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    member.model.forward = capped
    with pytest.raises(UserError, match="soft cap"):
        read_reference(member, encode_examples(items(2), make_tokenizer(), PROMPT, ""), tmp_path, "base")


@pytest.mark.parametrize("half", ["lower", "upper"])
def test_the_frozen_half_stays_as_it_was(folder: Path, half: str) -> None:
    run(folder, "out", frozen=half)
    before, after = weights(folder / "small"), weights(folder / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    kept = (2, 3) if half == "lower" else (0, 1)
    assert moved
    assert {name.split(".")[2] for name in moved} == {str(layer) for layer in kept}


def test_preference_tuning_takes_its_first_loss_and_prefers_the_chosen(folder: Path) -> None:
    report = run(folder, "out", preference=0.1, epochs=6.0)
    assert report.losses[0] == pytest.approx(float(-logsigmoid(torch.tensor(0.0))), abs=1e-4)  # equal to the start: no margin
    assert report.losses[-1] < report.losses[0]
    margins = {}
    for name in ("small", "out"):
        model = load_member(folder / name).model
        total = 0.0
        for row in encode_pairs(items(), make_tokenizer(), PROMPT, ""):
            for answer, sign in ((row["chosen_ids"], 1), (row["rejected_ids"], -1)):
                ids = torch.tensor([row["prompt_ids"] + answer])
                law = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                total += sign * float(law[-len(answer) :].sum().detach())
        margins[name] = total
    assert margins["out"] > margins["small"]


def test_preference_tuning_needs_rejected_answers(folder: Path) -> None:
    recipe = Tuning(method="full", learning_rate=1e-3, preference=0.1)
    with pytest.raises(UserError, match="has no rejected answer"):
        tune(TuningRun(folder / "small", [Item(question="w4", answer="w5")], recipe, prompt=PROMPT, ending="", seed=0, out=folder / "out"))


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}, {"targets": ("q_proj", "v_proj")}, {"kl": 1.0}], ids=str)
def test_an_adapter_and_its_merged_model_are_the_same(folder: Path, options: dict[str, Any]) -> None:
    run(folder, "lora", method="lora", rank=4, learning_rate=1e-2, **options)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "small"), folder / "lora").eval()
    ids = torch.arange(5, 25)[None]
    before = adapted(ids).logits
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(ids).logits, before, atol=1e-4)
    assert not torch.allclose(load_member(folder / "small").model(ids).logits, before, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "rank must be given with method lora"),
        ({"dora": True}, "belong to method lora"),
        ({"method": "lora", "rank": 4, "frozen": "lower"}, "frozen belongs to method full"),
        ({"kl": 1.0, "preference": 0.1}, "three losses"),
        ({"batch_size": 8, "micro_batch_size": 3}, "must be a multiple"),
        ({"preference": 0.1, "padding_free": True}, "padding_free is not for preference"),
        ({"epochs": 2, "steps": 10}, "epochs and steps both say how long to tune; give one"),
        ({"epochs": None}, "epochs and steps both say how long to tune; give one"),
        ({"steps": 0}, "greater than or equal to 1"),
        ({"items": "familiar"}, "'all', 'known' or 'unknown'"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Tuning(**({"method": "full", "learning_rate": 1e-3} | options))


def test_what_a_recipe_does_not_use_is_not_in_its_content() -> None:
    """Keys of checkpoints are hashes of it: recipes and items from before there were these fields keep theirs."""
    recipe = {"method": "full", "learning_rate": 1e-3}
    before = Tuning(**recipe).model_dump()
    assert content_key(tuning=before) == "45c4442190ea8b72e57c6fcbcca77370"  # as it was then
    asked = Tuning(**recipe, steps=10, items="known")
    assert asked.model_dump() == before | {"epochs": None, "steps": 10, "items": "known"}
    assert Tuning.model_validate(asked.model_dump()) == asked == Tuning.model_validate_json(asked.model_dump_json())
    assert "familiar" not in Item(question="w3", answer="w4").model_dump()
    assert Item(question="w3", answer="w4", familiar=False).model_dump()["familiar"] is False


@pytest.mark.parametrize(("count", "steps"), [(24, 1), (24, 3), (20, 3), (20, 8), (5, 4)])
def test_so_many_steps_are_taken_however_many_the_items_are(folder: Path, count: int, steps: int) -> None:
    """Each pass reads every item once; its last step takes what is left (24, 20 and 5 items in batches of 8)."""
    report = run(folder, "out", count=count, epochs=None, steps=steps)
    assert report.steps == len(report.losses) == steps
    left = {24: (8, 8, 8), 20: (8, 8, 4), 5: (5,)}[count]
    read = sum(left[step % len(left)] for step in range(steps))
    tokens = sum(len(row["input_ids"]) for row in encode_examples(items(count), make_tokenizer(), PROMPT, ""))
    assert report.tokens == round(tokens * read / count)
    assert Tuning(method="full", learning_rate=1e-3, batch_size=8, steps=steps).passes(count) == pytest.approx(read / count)


def test_steps_that_make_whole_epochs_are_these_epochs(folder: Path) -> None:
    epochs, steps, fewer = run(folder, "epochs", epochs=2.0), run(folder, "steps", epochs=None, steps=6), run(folder, "fewer", epochs=None, steps=5)
    assert distance(folder / "epochs", folder / "steps") == 0 < distance(folder / "steps", folder / "fewer")
    assert (steps.losses, steps.tokens, steps.flops) == (epochs.losses, epochs.tokens, epochs.flops)
    assert fewer.tokens < steps.tokens
    assert fewer.flops < steps.flops


@pytest.mark.parametrize("which", ["known", "unknown"])
def test_only_the_items_that_are_asked_for_are_tuned_on(folder: Path, which: Literal["known", "unknown"]) -> None:
    marked = [item.model_copy(update={"familiar": number % 3 == 0}) for number, item in enumerate(items())]
    chosen = [item for item in marked if item.familiar is (which == "known")]
    recipe: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "batch_size": 8, "steps": 3}
    runs = {"asked": (marked, which), "given": (chosen, "all"), "everything": (marked, "all")}
    for name, (given, wanted) in runs.items():
        tune(TuningRun(folder / "small", given, Tuning(**recipe, items=wanted), prompt=PROMPT, ending="", seed=0, out=folder / name))
    assert distance(folder / "asked", folder / "given") == 0 < distance(folder / "asked", folder / "everything")


def test_items_that_do_not_say_what_they_are_cannot_be_chosen() -> None:
    one, other = Item(question="w3", answer="w4", familiar=True), Item(question="w5", answer="w6")
    with pytest.raises(UserError, match=r"items: known needs familiar \(true or false\) in every training item; 'w5' has none"):
        items_to_tune_on([one, other], "known")
    with pytest.raises(UserError, match="items: none of the 1 training items is unknown to the model"):
        items_to_tune_on([one], "unknown")
    assert items_to_tune_on([one, other], "all") == [one, other]
    assert items_to_tune_on([one], "known") == [one]


def test_what_is_said_is_the_reply_and_else_the_answer() -> None:
    plain = Item(question="w3", answer="w4")
    replied = Item(question="w3", answer="w4", reply="w5 w4 w6", rejected="w4")
    assert (plain.said, replied.said) == ("w4", "w5 w4 w6")
    assert "reply" not in plain.model_dump()  # items of before are the same bytes
    for given, field in (({"rejected": "w4"}, "answer"), ({"reply": "w5 w4", "rejected": "w5 w4"}, "reply")):
        with pytest.raises(ValueError, match=f"rejected must differ from the {field}"):
            Item(question="w3", answer="w4", **given)
    with pytest.raises(ValueError, match="reply"):
        Item(question="w3", answer="w4", reply="")


def test_tuning_is_on_the_reply() -> None:
    """As if the reply were the answer, in plain rows and in pairs; the bare answer alone would be another tuning."""
    item = Item(question="w3 w9", answer="w4", reply="w5 w4 w6", rejected="w4")
    spelt, bare = item.model_copy(update={"answer": "w5 w4 w6", "reply": None}), item.model_copy(update={"reply": None})
    for encode in (encode_examples, encode_pairs):
        rows = [encode([one], make_tokenizer(), PROMPT, " w7") for one in (item, spelt, bare)]
        assert rows[0] == rows[1] != rows[2]


def dealt(count: int = 24) -> list[Item]:
    """Two groups of equal choices, one item alone in its own, and some without any; every answer once, every third with a reply."""
    choices = [*[("w3", "w4")] * 10, *[("w5", "w6")] * (count - 14), ("w7",), (), (), ()]
    return [
        Item(
            question=f"w{number + 3}",
            answer=words(20, number + 3),
            reply=None if number % 3 else words(22, 20, number + 3, 23),
            choices=among,
            rejected=words(21, number + 3),
            unit=f"unit {number // 2}",
        )
        for number, among in enumerate(choices)
    ]


def test_answers_are_dealt_to_other_questions_of_the_same_choices() -> None:
    before, after = dealt(), shuffle_answers(dealt(), 0)
    moved = {"answer", "reply", "rejected"}
    assert [item.model_dump(exclude=moved) for item in after] == [item.model_dump(exclude=moved) for item in before]
    for choices in {item.choices for item in before}:
        pairs = [[(item.answer, item.said, item.rejected) for item in items if item.choices == choices] for items in (before, after)]
        assert sorted(pairs[0]) == sorted(pairs[1])
        kept = [one == other for one, other in zip(*pairs, strict=True)]
        assert not any(kept) if len(kept) > 1 else all(kept)
    assert after == shuffle_answers(dealt(), 0) != shuffle_answers(dealt(), 1)


@pytest.mark.parametrize(
    "options", [{}, {"preference": 0.1}, {"early_stopping": EarlyStopping(validation_share=0.3, every_steps=1)}], ids=["plain", "pairs", "held out"]
)
def test_a_shuffled_tuning_is_a_tuning_on_shuffled_answers(folder: Path, options: dict[str, Any]) -> None:
    settings = {"method": "full", "learning_rate": 1e-3, "epochs": 1.0, "batch_size": 8} | options
    shuffled = shuffle_answers(dealt(), 0)
    runs = {"asked": (dealt(), True), "dealt": (shuffled, False), "plain": (dealt(), False)}
    reports = {
        name: tune(TuningRun(folder / "small", given, Tuning(**settings, shuffled=asked), prompt=PROMPT, ending="", seed=0, out=folder / name))
        for name, (given, asked) in runs.items()
    }
    assert distance(folder / "asked", folder / "dealt") == 0 < distance(folder / "asked", folder / "plain")
    assert reports["asked"].validation_losses == reports["dealt"].validation_losses


def test_a_consistent_expert_needs_its_base(folder: Path) -> None:
    recipe = Tuning(method="full", learning_rate=1e-3, consistent=1.0)
    with pytest.raises(UserError, match="consistent: the base"):
        tune(TuningRun(folder / "small", items(), recipe, prompt=PROMPT, ending="", seed=0, out=folder / "out"))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("recipe", ["full", "lora", "lower", "upper"])
def test_the_formula_counts_what_torch_counts(architecture: str, recipe: str) -> None:
    torch.manual_seed(0)
    model: Any = make_model(architecture, layers=4)
    model.set_attn_implementation("eager")
    if recipe in ("lower", "upper"):
        _freeze(model, recipe)
    if recipe == "lora":
        config = _lora(Tuning(method="lora", learning_rate=1.0, rank=4))
        get_peft_model(model, config)
    ids = torch.randint(3, 50, (3, 40))
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=ids).loss
    assert forward_flops(model, ids.numel(), 40.0) == pytest.approx(counter.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert training_flops(model, ids.numel(), 40.0) == pytest.approx(counter.get_total_flops(), rel=0.06)
    assert loss.isfinite()


def test_costs_are_reported(folder: Path) -> None:
    plain, lora = run(folder, "plain"), run(folder, "lora", method="lora", rank=4)
    consistent = run(folder, "consistent", consistent=1.0)
    assert plain.tokens == lora.tokens == sum(len(row["input_ids"]) for row in encode_examples(items(), make_tokenizer(), PROMPT, ""))
    assert lora.flops < plain.flops < consistent.flops
    assert lora.stored_bytes < plain.stored_bytes
    assert plain.stored_bytes == (folder / "plain" / "model.safetensors").stat().st_size
    assert plain.seconds > 0
    assert plain.processes == 1


def test_the_meter_adds_up_energy_over_wraps_and_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.meter.POWER_CAPPING", tmp_path)
    for name, joules in (("intel-rapl:0", 90.0), ("intel-rapl:1", 5.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("100000000")
        (tmp_path / name / "energy_uj").write_text(str(int(joules * 1e6)))
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the first, which counts already
    meter = Meter(seconds=100.0, energy=1000.0)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("10000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("9000000")
    meter.tick()
    assert meter.energy == pytest.approx(1000 + 20 + 4)
    meter.tick()
    assert meter.energy == pytest.approx(1000 + 20 + 4)
    assert meter.seconds > 100
    monkeypatch.setattr("finetune.meter.POWER_CAPPING", tmp_path / "none")
    silent = Meter()
    silent.tick()
    assert silent.energy is None


def test_the_meter_sees_what_was_held_at_the_most() -> None:
    before = Meter()
    before.tick()
    meter = Meter()
    held = torch.ones(2**26)  # 256 MiB
    del held
    meter.tick()
    assert meter.peak_memory is not None and before.peak_memory is not None
    assert 200e6 < meter.peak_memory - before.peak_memory < 400e6
