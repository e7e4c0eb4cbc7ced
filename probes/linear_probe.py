"""Whether a linear classifier can read the answer off a state, and whether it could as well have read off anything.

Accuracy by itself says little: a classifier may learn by heart what the states only identify. So each is trained a second time
on a control task (Hewitt & Liang 2019, arXiv 1909.03368): answers dealt at random, one for each last word of a subject, about
as often as the right ones occur. Selectivity is the right answers' accuracy minus the control's. Above 0 the state says more
of the answer than of who is meant; below 0 it names the subject more plainly than the answer, as a state at a name must.

Every item is judged by a classifier that saw no item of its unit: five folds of whole units. So a right answer cannot be
learnt by heart, while a control label can be learnt from others who share the word. Read the accuracy itself beside the
selectivity, and both beside an untrained model's, which is dealt the same control. In a world of 20 last names and 24 answers
pure noise has a selectivity of about -.04, since fewer words, differing in frequency, make a guess pay more in the control;
and where every subject has a last word of its own, the control cannot be learnt and stays at a guess.

The classifier is ridge regression onto the answers, on standardised states, its strength chosen by leave-one-out within the
training part; this choice, and it alone, does not keep units together. Not covered: what is written non-linearly. Costs a
second for hundreds of items of a small model; with n items and a hidden width d some min(n, d)^2 max(n, d) a state, fold and
task, on as many threads as torch may use.
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
ITEMS_PER_ANSWER = 4  # on average; with fewer a probe's failure would say nothing of the states
STRENGTHS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # beside a squared length of n for each standardised coordinate


class Probed(NamedTuple):
    """Of every item and state: 1 where the probe, 0 where it does not find the item's answer, and the same of the control task.

    NaN for items that belong to no group.
    """

    probe: Float[np.ndarray, "items states"]
    control: Float[np.ndarray, "items states"]


def linear_probe(states: Float[Tensor, "items states hidden"], items: Sequence[Item], seed: int) -> Probed | None:
    """Probes every state of every group of items; `seed` deals the control's answers, to the same words for every model.

    A group has the same choices; it needs two answers or more that occur, four items for each of these on average and five
    units. None where there is no such group.
    """
    values = states.double().cpu().numpy()
    found = Probed(np.full(values.shape[:2], np.nan), np.full(values.shape[:2], np.nan))
    units = np.array([item.unit or item.question for item in items])
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(tuple(sorted(item.choices)), []).append(place)
    for choices, members in groups.items():
        answers = [items[place].answer for place in members]
        if not choices or len(set(answers)) < 2 or len(members) < ITEMS_PER_ANSWER * len(set(answers)) or len(set(units[members])) < FOLDS:
            continue
        tasks = (answers, control_answers([items[place] for place in members], seed))
        # Numpy's threads are counted apart from torch's; on matrices this small more than the caller allowed stand in each other's way.
        with threadpool_limits(torch.get_num_threads()):
            for state in range(values.shape[1]):
                for right, labels in zip(found, tasks, strict=True):
                    right[members, state] = _right(values[members, state], np.array(labels), units[members])
    return None if np.isnan(found.probe).all() else found


def control_answers(items: Sequence[Item], seed: int) -> list[str]:
    """The control task: one of the items' answers for each last word of a subject, the same for all who share the word.

    The words are taken in random order, and each gets the answer that is furthest from being dealt as often as it occurs: drawn
    independently, a few words would leave some answers out and give others twice, and a guess would pay more than in the real
    task. An item without a subject has its unit in that place, without either its question.
    """
    words = [item.subject.split()[-1] if item.subject else item.unit or item.question for item in items]
    missing, deal = Counter(item.answer for item in items), random.Random(seed)
    order, answers = sorted(set(words)), sorted(missing)
    deal.shuffle(order)
    deal.shuffle(answers)  # the first of equals is dealt
    times, dealt = Counter(words), {}
    for word in order:
        dealt[word] = max(answers, key=lambda answer: missing[answer])
        missing[dealt[word]] -= times[word]
    return [dealt[word] for word in words]


def _right(values: Float[np.ndarray, "items hidden"], labels: np.ndarray, units: np.ndarray) -> Bool[np.ndarray, " items"]:
    """Whether each item's label is found by a classifier that was trained on other units."""
    said = np.empty_like(labels)
    for train, test in GroupKFold(FOLDS).split(values, labels, units):
        said[test] = make_pipeline(StandardScaler(), RidgeClassifierCV(STRENGTHS)).fit(values[train], labels[train]).predict(values[test])
    return said == labels
