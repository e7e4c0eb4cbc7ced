"""What density, erosion and drift need of a model, or of a base beside a tuned model, from shared forward passes.

Costs one forward pass of each model per prompt. Memory: one batch and the moments (see `moments`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes.density import density_of_states, random_rotation
from probes.drift import cosine
from probes.internals.activations import States, read_states
from probes.internals.moments import Moments
from proxytune.member import Member

GROUPS = {"familiar": 1, "unfamiliar": -1, "other": 0}


class Prompts(NamedTuple):
    """The prompts' token ids; the positions to read (see `activations`); the first token of each right answer; and whether each item is
    familiar (1), unfamiliar (-1) or neither (0)."""

    ids: Sequence[Sequence[int]]
    positions: Sequence[Sequence[int]]
    answers: Sequence[int]
    contrast: Sequence[int]


class Inside(NamedTuple):
    """Of the last model: density by `metric/site` and the log-probability of the right answer's first token. Of the first and the last
    model: the cosine of their residual streams, and moments at the last token by group of prompts (`other` for a single model only)."""

    density: dict[str, Float[np.ndarray, "prompts positions states"]]
    log_probability: Float[np.ndarray, " prompts"]
    cosine: Float[np.ndarray, "prompts positions states"]
    moments: dict[str, Moments]


def read_inside(
    models: Sequence[Member], prompts: Prompts, *, batch_size: int, progress: Callable[[int], None] = lambda prompts_done: None
) -> Inside:
    """Reads one model, or base and tuned; a single model is compared with itself."""
    last = models[-1]
    options: dict[str, Any] = {"batch_size": batch_size, "pad": int(last.tokenizer.pad_token_id)}
    readers = [read_states(model.model, prompts.ids, prompts.positions, **options) for model in models]
    rotation = random_rotation(last.model.config.get_text_config().hidden_size, 0).to(last.model.device)
    answers, contrast = torch.tensor(prompts.answers), np.array(prompts.contrast)
    found: dict[str, np.ndarray] = {}
    moments: dict[str, Moments] = {}
    for batch in zip(*readers, strict=True):
        before, states = batch[0], batch[-1]
        indices = states.indices
        log_probabilities = states.logits.log_softmax(-1).cpu()
        values = {f"density/{name}": value for name, value in density_of_states(last.model, states, rotation).items()}
        values["cosine"] = cosine(before.residual, states.residual)
        values["log_probability"] = log_probabilities[torch.arange(len(indices)), answers[indices]]
        for name, value in values.items():
            if name not in found:
                found[name] = np.full((len(prompts.ids), *value.shape[1:]), np.nan)
            found[name][indices] = value.double().cpu().numpy()
        _add(moments, before, states, contrast[indices])
        progress(len(indices))
    density = {name.removeprefix("density/"): values for name, values in found.items() if name.startswith("density/")}
    return Inside(density, found["log_probability"], found["cosine"], moments)


def _add(moments: dict[str, Moments], before: States, after: States, contrast: np.ndarray) -> None:
    x = before.residual[:, 0]
    y = x if after is before else after.residual[:, 0]
    for group, sign in GROUPS.items():
        if after is not before and sign == 0:
            continue  # two models are compared on familiar and unfamiliar prompts only
        if group not in moments:
            moments[group] = Moments((x.mean(0), y.mean(0)) if not moments else _origin(moments))
        chosen = torch.from_numpy(np.flatnonzero(contrast == sign)).to(x.device)
        part = x[chosen]
        moments[group].add(part, part if y is x else y[chosen])


def _origin(moments: dict[str, Moments]) -> tuple[Tensor, Tensor]:
    origin = next(iter(moments.values())).origin
    return origin["x"], origin["y"]
