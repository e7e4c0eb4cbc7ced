"""Whether a linear classifier can predict the answer from a state, beside a control task with random labels.

Accuracy alone says little: a classifier may memorise answers from states that only identify the subject. So each classifier is
trained a second time on a control task (Hewitt & Liang 2019, arXiv 1909.03368): random answers, one for each last word of a
subject, with about the same frequencies as the right answers. Selectivity is the accuracy on right answers minus that on the
control. Above 0 the state says more about the answer than about the subject's identity; below 0 less, as at a name's own token.

Every item is predicted by a classifier that was trained on other units: five folds of whole units. So a right answer cannot be
memorised, while a control label can be learnt from other subjects with the same word. Read the accuracy beside the selectivity,
and both beside those of an untrained model with the same control. In a world of 20 last names and 24 answers, pure noise has a
selectivity of about -.04, because the control has fewer words of different frequency, which makes guessing easier. Where every
subject has a last word of its own, the control cannot be learnt.

The classifier is ridge regression onto the answers, on standardised states. Its strength is chosen by leave-one-out within the
training part; only this choice does not keep units together. Not covered: information that is encoded non-linearly. Costs a
second for hundreds of items of a small model; with n items and a hidden width d about min(n, d)^2 max(n, d) operations per state,
fold and task, on as many threads as torch may use.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from finetune.items import Item

FOLDS = 5
ITEMS_PER_ANSWER = 4  # on average; with fewer a failure of the probe would say nothing about the states
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # relative to a squared length of n of each standardised coordinate


class Probed(NamedTuple):
    """For every item and state: 1 where the probe predicts the item's answer, else 0; and the same for the control task.

    NaN for items without a group.
    """

    probe: Float[np.ndarray, "items states"]
    control: Float[np.ndarray, "items states"]


def linear_probe(states: Float[Tensor, "items states hidden"], items: Sequence[Item], seed: int) -> Probed | None:
    """Probes every state of every group of items. `seed` draws the control's answers: the same for every model.

    Items of a group have the same choices. A group needs at least two different answers, four items per answer on average and five
    units. Returns None where there is no such group.
    """
    values = states.double().cpu().numpy()
    found = Probed(np.full(values.shape[:2], np.nan), np.full(values.shape[:2], np.nan))
    units = np.array([item.unit or item.question for item in items])
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(tuple(sorted(item.choices)), []).append(index)
    for choices, members in groups.items():
        answers = [items[index].answer for index in members]
        if not choices or len(set(answers)) < 2 or len(members) < ITEMS_PER_ANSWER * len(set(answers)) or len(set(units[members])) < FOLDS:
            continue
        tasks = (answers, control_answers([items[index] for index in members], seed))
        # Numpy has its own thread count. On matrices this small, more threads than the caller allowed slow each other down.
        with threadpool_limits(torch.get_num_threads()):
            for state in range(values.shape[1]):
                for right, labels in zip(found, tasks, strict=True):
                    right[members, state] = _right(values[members, state], np.array(labels), units[members])
    return None if np.isnan(found.probe).all() else found


def control_answers(items: Sequence[Item], seed: int) -> list[str]:
    """The control task: one of the items' answers for each last word of a subject, the same for all subjects with that word.

    The words come in random order. Each gets the answer that is most below its frequency so far: with independent draws a few words
    would miss some answers and get others twice, which makes guessing easier than in the real task. An item without a subject
    uses its unit instead, and without a unit its question.
    """
    words = [item.subject.split()[-1] if item.subject else item.unit or item.question for item in items]
    missing, generator = Counter(item.answer for item in items), random.Random(seed)
    order, answers = sorted(set(words)), sorted(missing)
    generator.shuffle(order)
    generator.shuffle(answers)  # of equally missing answers the first is taken
    times, control = Counter(words), {}
    for word in order:
        control[word] = max(answers, key=lambda answer: missing[answer])
        missing[control[word]] -= times[word]
    return [control[word] for word in words]


def _right(values: Float[np.ndarray, "items hidden"], labels: np.ndarray, units: np.ndarray) -> Bool[np.ndarray, " items"]:
    """Whether each item's label is predicted by a classifier that was trained on other units."""
    predicted = np.empty_like(labels)
    for train, test in GroupKFold(FOLDS).split(values, labels, units):
        predicted[test] = make_pipeline(StandardScaler(), RidgeClassifierCV(STRENGTHS)).fit(values[train], labels[train]).predict(values[test])
    return predicted == labels
