"""A fitted bias is the one solution of its convex problem: by its closed form, by its gradient in autograd, by a generic optimizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import items, make_tokenizer, save_models

from finetune import logit_bias
from finetune.encoding import encode_examples
from finetune.items import Item
from finetune.logit_bias import FILE, fit_logit_bias, fitted, read_bias, targets_of
from finetune.recipe import BiasTuning
from finetune.tuning import TuningReport
from proxytune import Rule, UserError, load_member, score
from proxytune.digests import find_damage
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request

VOCABULARY = 50


def draw(positions: int = 60, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(positions, 11, generator=generator), torch.randint(0, 6, (positions,), generator=generator)


def objective(logits: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.double() + bias, targets) + penalty / 2 * bias.square().sum()


def test_from_one_distribution_the_fit_is_the_frequency_of_the_answers_tokens() -> None:
    """The closed form: a base that always says the same, and almost no penalty. Twin: a strong penalty keeps the base."""
    logits, targets = draw(400)
    constant = logits[:1].expand(400, -1)
    frequency = targets.bincount(minlength=11) / 400
    found = fitted(lambda: [constant], targets, 11, 1e-8)
    torch.testing.assert_close((constant[0] + found.values).softmax(-1), frequency, atol=2e-5, rtol=0)
    assert found.after == pytest.approx(float(torch.special.entr(frequency).sum()), abs=1e-4)  # no bias does better
    kept = fitted(lambda: [constant], targets, 11, 1e3)
    torch.testing.assert_close((constant[0] + kept.values).softmax(-1), constant[0].softmax(-1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_the_gradient_vanishes_at_the_end_and_a_step_in_any_direction_is_uphill(penalty: float) -> None:
    logits, targets = draw()
    found = fitted(lambda: logits.split(7), targets, 11, penalty)
    bias = found.values.double().requires_grad_()
    best = objective(logits, targets, bias, penalty)
    (gradient,) = torch.autograd.grad(best, bias)
    assert gradient.abs().max() < 3e-6
    assert found.before == pytest.approx(float(objective(logits, targets, torch.zeros(11), penalty)), abs=1e-9)
    assert found.after == pytest.approx(float(objective(logits, targets, bias.detach(), 0.0)), abs=1e-6)
    assert found.after < found.before
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 0.05 * torch.randn(11, generator=generator, dtype=torch.float64)
        assert objective(logits, targets, bias + step, penalty) > best
    (start,) = torch.autograd.grad(objective(logits, targets, zeros := torch.zeros(11).double().requires_grad_(), penalty), zeros)
    assert start.abs().max() > 1e-2  # twin: where it began it does not vanish


def test_a_stronger_penalty_gives_a_shorter_vector_and_a_higher_loss() -> None:
    logits, targets = draw()
    fits = [fitted(lambda: [logits], targets, 11, penalty) for penalty in (1e-3, 1e-2, 1e-1, 1.0)]
    norms, losses = [float(fit.values.norm()) for fit in fits], [fit.after for fit in fits]
    assert norms == sorted(norms, reverse=True)
    assert losses == sorted(losses)


def fit(place: Path, name: str = "bias", some: list[Item] | None = None, **options: Any) -> TuningReport:
    asked: dict[str, Any] = {"prompt": "{question}", "ending": "", "out": place / name} | options
    return fit_logit_bias(place / "base", items() if some is None else some, asked.pop("tuning", BiasTuning()), **asked)


def mean_loss(place: Path, rule: Any) -> float:
    """The mean loss of the answers' tokens, as the mixture scores them."""
    member = load_member(place / "base")
    requests = []
    for row in encode_examples(items(), member.tokenizer, "{question}", ""):
        begins = row["completion_mask"].index(1)
        requests.append(Request(tuple(row["input_ids"][:begins]), tuple(row["input_ids"][begins:])))
    totals = score(ProxyTunedForCausalLM({"base": member}, {"base": 1.0}), requests, {"arm": rule})["arm"]
    return -float(totals.sum()) / sum(len(request.continuation) for request in requests)


def test_the_losses_that_are_reported_are_those_of_the_mixture(folder: Path) -> None:
    report = fit(folder)
    bias = read_bias(folder / "bias")
    assert mean_loss(folder, {"base": 1.0}) == pytest.approx(report.losses[0], abs=1e-4)
    assert mean_loss(folder, Rule({"base": 1.0}, bias=bias)) == pytest.approx(report.losses[1], abs=1e-4)
    assert report.losses[1] < report.losses[0] - 0.5
    said = targets_of(encode_examples(items(), make_tokenizer(), "{question}", "")).unique()
    assert 2 in said  # the end of an answer is fitted too
    unsaid = torch.ones(VOCABULARY, dtype=torch.bool).index_fill(0, said, False)
    assert (bias.values[unsaid] < 0).all()


def test_the_folder_is_whole_and_its_card_counts(folder: Path) -> None:
    report = fit(folder)
    card = json.loads((folder / "bias" / "tuning.json").read_text())
    assert TuningReport(**card["report"]) == report
    assert card["tuning"] == {"penalty": 1e-3}
    assert report.stored_bytes == (folder / "bias" / FILE).stat().st_size >= 4 * VOCABULARY
    assert (report.examples, report.parameters, report.steps > 5) == (24, VOCABULARY, True)
    assert find_damage(folder / "bias") is None
    assert sorted(path.name for path in folder.iterdir()) == ["base", "bias", "small"]  # nothing else is left
    whole = (folder / "bias" / FILE).read_bytes()
    (folder / "bias" / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"arms\.bias: .* is damaged"):
        read_bias(folder / "bias", "arms.bias")


def test_the_same_fit_gives_the_same_bits_and_another_penalty_others(folder: Path) -> None:
    for name, penalty in (("one", 1e-3), ("two", 1e-3), ("three", 1e-2)):
        fit(folder, name, tuning=BiasTuning(penalty=penalty), states=folder / "states")
    one, two, three = (read_bias(folder / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert len(list((folder / "states").iterdir())) == 1  # the base read the examples once


def test_without_room_for_the_logits_the_head_is_applied_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same vector up to rounding, at more operations; no piece holds more logits than may be in memory."""
    kept = fit(folder, "kept")
    monkeypatch.setattr(logit_bias, "KEPT", 0)
    monkeypatch.setattr(logit_bias, "AT_ONCE", 3 * VOCABULARY)
    sizes: list[int] = []
    before = logit_bias.fitted

    def watched(pieces: Any, *rest: Any) -> Any:
        sizes.extend(len(piece) for piece in pieces())
        return before(pieces, *rest)

    monkeypatch.setattr(logit_bias, "fitted", watched)
    again = fit(folder, "again")
    torch.testing.assert_close(read_bias(folder / "again").values, read_bias(folder / "kept").values, atol=1e-3, rtol=1e-3)
    assert max(sizes) == 3
    assert again.flops > kept.flops
    assert again.tokens == kept.tokens


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda place: fit(place, some=[]), "train: none of the 0 tokens would be trained on"),
        (lambda place: fit(place, some=[Item(question="w3 " * 150, answer="w4")]), "train: example 1 has .* tokens, but the window"),
        (lambda place: fit_logit_bias(place / "none", items(), BiasTuning(), prompt="{question}", ending="", out=place / "bias"), "base: no "),
        (lambda place: read_bias(place / "base", "arms.bias"), r"arms\.bias: '.*' holds no fitted bias"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, spoil: Any, words: str) -> None:
    save_models(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        spoil(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_named_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(logit_bias, "save_file", full)
        with pytest.raises(UserError, match=r"out: '.*' cannot be written \(No space left on device\); free some"):
            fit(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["base", "small"]
    fit(folder)  # twin


def test_a_fit_that_was_killed_or_stopped_leaves_nothing_that_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = folder / ".bias.partial" / "result"
    killed.mkdir(parents=True)
    (killed / "bias.safetensors").write_bytes(b"half")
    (killed / "junk").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(logit_bias, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(folder)
    assert not (folder / "bias").exists()
    killed.mkdir(parents=True)
    (killed / "junk").write_text("")
    fit(folder)
    assert sorted(path.name for path in (folder / "bias").iterdir()) == [FILE, "digests.json", "tuning.json"]


def test_a_fit_that_does_not_converge_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = draw()
    monkeypatch.setattr(logit_bias, "EVALUATIONS", 2)
    with pytest.raises(UserError, match=r"penalty: the fit with 1e-05 has a gradient of .* after \d+ evaluations; raise it"):
        fitted(lambda: [logits], targets, 11, 1e-5)


@pytest.mark.parametrize("penalty", [0, -1, float("inf"), float("nan"), "much"])
def test_bad_penalties_are_refused(penalty: Any) -> None:
    with pytest.raises(ValueError, match="penalty"):
        BiasTuning(penalty=penalty)
