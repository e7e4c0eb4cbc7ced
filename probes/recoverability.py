"""Was knowledge erased or only hidden? How fast it returns when the tuned model is fine-tuned again on plain sentences.

Three curves of what the model knows (`candidates.known`) over the steps of a short tuning on statements with their answers:
`forgotten` learns facts of the corpus again; `never exposed` learns as many facts that were never in the corpus, in batches of the same
size; `unrelated` sees ten facts and is asked the others. Hidden knowledge returns sooner than new facts are learnt
(savings: Ebbinghaus 1885; Jain et al. 2024, arXiv 2311.12786), and knowledge that other facts bring back was never lost (spurious
forgetting: Zheng et al. 2025, arXiv 2501.13453). Knowledge is measured as the right candidate's probability, which changes before the
choice does.

Unlike every other probe it trains, because the speed of learning can only be measured by learning. It trains in a temporary folder and
keeps only the curves; the member is not changed. Costs three tunings of `steps` steps with a scoring pass at about log2(steps) of them,
the memory of a full tuning beside the member, and disk space for two copies of the weights. Not covered: items without candidates; loss
on the statement itself (it is on the answer only); other learning rates and numbers of steps, which change the result; many steps on
ten unrelated facts, which damage the others (hence the best step, chosen on other items: `brought_back`).
"""

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.items import Item, shuffle_answers
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import tune
from probes.knowledge.candidates import Known, known
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.prepacked import PrepackedLinear, prepack_linear_layers, unpack_linear_layers

FORGOTTEN, NEVER, UNRELATED = CURVES = ("forgotten", "never exposed", "unrelated")
ENOUGH = 10  # items: so many unrelated ones are shown, and a curve needs at least as many
REGAINED = 0.95  # of the base's knowledge


class Curve(NamedTuple):
    """What was known after each of `steps`, of which the first is 0; `indices` are the numbers of the measured items."""

    steps: list[int]
    indices: list[int]
    right: Bool[np.ndarray, "points items"]
    probability: Float[np.ndarray, "points items"]


class Savings(NamedTuple):
    """S = 1 - relearnt / learnt: 1 where knowledge returns at once, 0 where it takes as long as new facts, below 0 where longer.

    `relearnt` is the number of steps until the forgotten items reach 95 % of what the base knows of them; `learnt` the number in which
    never exposed facts gain as much. (With the same level for both, S would count what was never lost as saved.) A number is None where
    the steps do not suffice; the number of steps then replaces it, which makes S a `bound` ("at least" or "at most"). S is None where
    both are None, and where there is nothing to regain.
    """

    value: float | None
    bound: Literal["exact", "at least", "at most"]
    relearnt: float | None
    learnt: float | None


@dataclass(frozen=True)
class Relearning:
    """How facts are taught again: `steps` steps of `batch_size` examples, at a rate that falls linearly to zero.

    `ending` follows an answer in the corpus (" ." in the world). `seed` draws the items and orders them. `batch_tokens` are scored at a
    time. `scratch` is where the temporary folder is made (default: the system's).
    """

    learning_rate: float
    steps: int
    batch_size: int
    ending: str
    seed: int
    batch_tokens: int = 2048
    scratch: Path | None = None


def relearn(
    member: Member, items: Sequence[Item], base: Known, how: Relearning, progress: Callable[[int], None] = lambda steps_done: None
) -> dict[str, Curve]:
    """The three curves of a tuned member, at 0, 1, 2, 4, 8, … and `how.steps` steps.

    `base` is what the base knows of the items. Exposed are items with a popularity other than zero. Never exposed are those of
    popularity zero; where there are fewer than ten, exposed items that the base gets wrong, with their answers shuffled:
    such names are not new and the right answer may be half known, which slows their learning and makes S too high. Where there
    are fewer than ten of these too, there is no such curve. Both curves have as many items, drawn from the larger set by the
    seed. The unrelated ten are exposed, and no item of their units is measured in that curve. The same seed gives the same
    curves on one machine with one thread count. `progress` is called after every step of every curve.

    Raises `UserError` for an item without a statement or choices, for too few exposed items, for a member that shares its weights
    with others, and whatever `tune` raises.
    """
    if member.adapter is not None:
        raise UserError("member: its adapter is on weights that other members share; load it by itself")
    exposed = [index for index, item in enumerate(items) if item.popularity != 0]
    shown, asked = _apart(items, exposed, how.seed)
    plans = {FORGOTTEN: (exposed, items), NEVER: _never_exposed(items, exposed, base, how.seed), UNRELATED: (asked, items)}
    count = min((len(indices) for indices, _ in (plans[FORGOTTEN], plans[NEVER]) if len(indices) >= ENOUGH), default=0)
    curves = {}
    with tempfile.TemporaryDirectory(dir=how.scratch) as folder:
        start = Path(folder) / "start"
        _save(member.model, start)
        member.tokenizer.save_pretrained(start)
        for name, (indices, facts) in plans.items():
            if len(indices) < ENOUGH:
                continue
            measured = indices if name == UNRELATED else _draw(indices, count, how.seed)
            learned = [items[index] for index in shown] if name == UNRELATED else [facts[index] for index in measured]
            watcher = _Reader([facts[index] for index in measured], member, how.steps, how.batch_tokens, progress)
            size = min(how.batch_size, len(learned))
            # Half a step less than asked for: the trainer rounds up to whole steps.
            tuning = Tuning(
                method="full", learning_rate=how.learning_rate, batch_size=size, epochs=(how.steps - 0.5) / math.ceil(len(learned) / size)
            )
            run = TuningRun(
                start,
                [_sentence(item) for item in learned],
                tuning,
                prompt="{question}",
                ending=how.ending,
                seed=how.seed,
                out=Path(folder) / "result",  # each overwrites the last
                field="recoverability",
                checkpoint_seconds=math.inf,
            )
            tune(run, watcher)
            right, probability = (np.stack(column) for column in zip(*watcher.found, strict=True))
            curves[name] = Curve(watcher.steps, measured, right, probability)
    return curves


def savings(curves: Mapping[str, Curve], base: Known) -> Savings:
    """Steps to regain lost knowledge, compared with steps to gain as much new knowledge. See `Savings`.

    Meaningless where the loss of the tuned model is within noise, which the caller must check.
    """
    forgotten = curves[FORGOTTEN]
    budget, known = float(forgotten.steps[-1]), forgotten.probability.mean(axis=1)
    level = REGAINED * float(base.probability[forgotten.indices].mean())
    relearnt, learnt = steps_to(forgotten.steps, known, level), None
    if NEVER in curves:
        new = curves[NEVER].probability.mean(axis=1)
        learnt = steps_to(curves[NEVER].steps, new, new[0] + max(0.0, level - known[0]))
    if NEVER not in curves or relearnt == 0 or (learnt is None and relearnt is None):
        return Savings(None, "exact", relearnt, learnt)
    value = 1 - (budget if relearnt is None else relearnt) / (budget if learnt is None else learnt)
    return Savings(value, "at most" if relearnt is None else "at least" if learnt is None else "exact", relearnt, learnt)


def steps_to(steps: Sequence[int], accuracies: Float[np.ndarray, " points"], level: float) -> float | None:
    """The first step at which the accuracy reaches `level`, interpolated linearly over log2(step + 1); None if it never does."""
    (reached,) = np.nonzero(accuracies >= level - 1e-9)
    if not len(reached):
        return None
    after = int(reached[0])
    if after == 0:
        return float(steps[0])
    share = (level - accuracies[after - 1]) / (accuracies[after] - accuracies[after - 1])
    low, high = (math.log2(steps[point] + 1) for point in (after - 1, after))
    return float(2 ** (low + min(1.0, share) * (high - low)) - 1)


def brought_back(curve: Curve, items: Sequence[Item]) -> Float[np.ndarray, " measured"]:
    """Each measured item's probability at the curve's best step, which is chosen on the other half of the units.

    If it were chosen on the items themselves, noise alone would bring some back. Step 0 is among the steps: a model that does not
    change gives exactly what it knew before.
    """
    _, numbers = np.unique([_unit(items[index]) for index in curve.indices], return_inverse=True)
    found = curve.probability[0].copy()
    for half in (0, 1):
        chosen = numbers % 2 == half
        if not chosen.all():
            found[chosen] = curve.probability[int(curve.probability[:, ~chosen].mean(axis=1).argmax())][chosen]
    return found


def spurious(curves: Mapping[str, Curve], items: Sequence[Item], base: Known) -> float | None:
    """The share of the lost knowledge (base minus tuned) that ten unrelated examples bring back; None where nothing was lost.

    1 where all of it returns: then it was not knowledge that was lost. Unstable where the loss is within noise, which the caller must check.
    """
    curve = curves[UNRELATED]
    tuned = float(curve.probability[0].mean())
    lost = float(base.probability[curve.indices].mean()) - tuned
    return (float(brought_back(curve, items).mean()) - tuned) / lost if lost > 0 else None


def log_steps(steps: int) -> list[int]:
    """0, 1, 2, 4, 8, … and the last."""
    return [0, *(2**power for power in range(steps.bit_length()) if 2**power < steps), steps]


class _Reader(TrainerCallback):
    """Measures what is known at log-spaced steps of a tuning."""

    def __init__(self, items: Sequence[Item], member: Member, steps: int, batch_tokens: int, progress: Callable[[int], None]):
        self.steps, self.found = log_steps(steps), list[Known]()
        self._items, self._tokenizer, self._batch_tokens, self._progress = items, member.tokenizer, batch_tokens, progress

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        self._read(options["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        if state.global_step in self.steps:
            self._read(options["model"])
        self._progress(1)

    def _read(self, model: PreTrainedModel) -> None:
        training = model.training
        self.found.append(known(Member(model, self._tokenizer), self._items, batch_tokens=self._batch_tokens))
        model.train(training)


def _sentence(item: Item) -> Item:
    """The item as its plain sentence."""
    return Item(question=str(item.statement), answer=item.answer)


def _unit(item: Item) -> str:
    return item.unit or item.question


def _draw(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the indices in a random order."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    return [indices[number] for number in order[:count]]


def _apart(items: Sequence[Item], exposed: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Ten exposed items of units drawn at random, and the exposed items of all other units."""
    units = list(dict.fromkeys(_unit(items[index]) for index in _draw(exposed, len(exposed), seed)))
    taken: set[str] = set()
    while units and sum(_unit(items[index]) in taken for index in exposed) < ENOUGH:
        taken.add(units.pop(0))
    asked = [index for index in exposed if _unit(items[index]) not in taken]
    if len(asked) < ENOUGH:
        raise UserError(
            f"knowledge: {len(exposed)} items with exposure leave {len(asked)} to measure outside the units of the {ENOUGH} that are shown; "
            f"recoverability needs {ENOUGH}, give more"
        )
    return [index for index in exposed if _unit(items[index]) in taken][:ENOUGH], asked


def _never_exposed(items: Sequence[Item], exposed: Sequence[int], base: Known, seed: int) -> tuple[list[int], Sequence[Item]]:
    """The items that were never in the corpus, and all items with the answers that they are to learn."""
    never = [index for index, item in enumerate(items) if item.popularity == 0]
    if len(never) >= ENOUGH:
        return never, items
    wrong = [index for index in exposed if not base.right[index]]
    facts = list(items)
    for index, item in zip(wrong, shuffle_answers([items[index] for index in wrong], seed), strict=True):
        facts[index] = item
    return [index for index in wrong if facts[index].answer != items[index].answer], facts


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Saves a model with plain layers and merged adapters. The model is unchanged afterwards."""
    prepacked = any(isinstance(module, PrepackedLinear) for module in model.modules())
    unpack_linear_layers(model)
    (_merged(model) if any(isinstance(module, LoraLayer) for module in model.modules()) else model).save_pretrained(folder)
    if prepacked:
        prepack_linear_layers(model)


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            copied.set_submodule(name, layer.get_base_layer())
    return copied
