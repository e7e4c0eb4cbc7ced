"""What a layer's state already says about the right answer: the state is mapped to a last state and read by final norm and head.

Without a translator this is the logit lens (`plain`). A translator is an affine map from state k to the last state of the same
token, fitted by ridge regression: the linear shortcut of Din et al. 2023 (arXiv 2303.09435). It replaces the tuned lens (Belrose
et al. 2023, arXiv 2303.08112), whose maps have the same form and are trained to minimise the KL to the model's own distribution.
Least squares has a closed form: no training loop, no step size, no seed, and sums that can be streamed. The disadvantage: it
weights all directions of the last state equally, also those that the head does not use, so its distribution is further from the
model's than the tuned lens', mainly in low layers. `explained` says how far a translator can be trusted.

Two models are compared through two lenses. The base's translators, norm and head on the tuned model's states show what is still
readable in the base's way; the tuned model's own lens shows what is still readable at all. A loss in low layers that the base's
lens shows and the model's own lens does not means that the states were rotated, not that the information was erased.

Only first tokens are read: the beginning of an answer of several tokens. What no affine map can extract is not found, even if
later layers could use it. Costs one forward pass of the text for the fit, with two square matrices of the hidden width per state
in fp64 (twice, to choose the ridge), and one forward pass of the prompts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.encoding import continuation_ids
from finetune.items import Item
from probes.internals.activations import States, check_states, final_norm, layers_of, read_states
from proxytune.errors import UserError
from proxytune.padding import left_padded, positions_of

# Relative to the state's mean variance per coordinate. A few large coordinates can raise that far above most: hence the weak ones.
RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)
HELD_OUT = 5  # one of so many texts is held out to choose the ridge
ROWS_AT_ONCE = 256  # states that go through the head together: bounds the memory of its logits


class Translators(NamedTuple):
    """From every state but the last to the last one: state @ weight + bias. The last state's translator is the identity.

    `ridge` is the chosen strength, one of `RIDGES`. `explained` is the share of the last state's variance that is explained on
    held-out texts: 1 is all of it, 0 is as good as the mean.
    """

    weight: Float[Tensor, "layers hidden hidden"]
    bias: Float[Tensor, "layers hidden"]
    ridge: Float[Tensor, " layers"]
    explained: Float[Tensor, " layers"]


class Lens(NamedTuple):
    """The lens uses the final norm and head of `model`; without translators it is the plain one."""

    model: PreTrainedModel
    translators: Translators | None = None


class Reading(NamedTuple):
    """What one lens reads of every item at every state.

    `log_probability`: of the right answer's first token, over the whole vocabulary. `share`: its probability among the
    candidates' distinct first tokens. `right`: 1 where it is the single most likely of these, else 0. `share` and `right` are NaN
    for an item whose right answer begins with the same token as a wrong one.
    """

    log_probability: Float[np.ndarray, "items states"]
    share: Float[np.ndarray, "items states"]
    right: Float[np.ndarray, "items states"]


class _Sums(NamedTuple):
    """Sums over tokens, of each state but the last (x) and of the last state (y), in fp64."""

    tokens: int
    x: Float[Tensor, "layers hidden"]
    y: Float[Tensor, " hidden"]
    xx: Float[Tensor, "layers hidden hidden"]
    xy: Float[Tensor, "layers hidden hidden"]
    yy: Float[Tensor, ""]

    def plus(self, other: "_Sums") -> "_Sums":
        pairs: Any = zip(self, other, strict=True)
        return _Sums(*(one + another for one, another in pairs))

    def centred(self) -> tuple[Float[Tensor, "layers hidden hidden"], Float[Tensor, "layers hidden hidden"], Float[Tensor, ""]]:
        """Covariances of x with itself and with y, and the variance of y, summed over its coordinates."""
        x, y = self.x / self.tokens, self.y / self.tokens
        within = self.xx / self.tokens - torch.einsum("ki,kj->kij", x, x)
        across = self.xy / self.tokens - torch.einsum("ki,j->kij", x, y)
        return within, across, self.yy / self.tokens - y.square().sum()


def fit_translators(model: PreTrainedModel, texts: Sequence[Sequence[int]], *, tokens: int, batch_size: int, pad: int) -> Translators:
    """The translators of a model, fitted on the first `tokens` tokens of the texts (token ids, each within the model's window).

    Each text's first token is left out: in many models its state is hundreds of times longer than any other and would be most of
    the variance, and no prompt of two or more tokens ends with it. The ridge of each state is the one of `RIDGES` with the
    smallest error on every fifth text; the returned fit is on all texts. Memory does not depend on the amount of text. Raises
    `UserError` for fewer than two texts of two tokens, and for an architecture whose parts are unknown here.
    """
    chosen = list(_first(texts, tokens))
    if len(chosen) < 2:
        raise UserError(
            f"texts: translators need two of two tokens or more, {len(chosen)} seen within {tokens} tokens; give more texts or shorter ones"
        )
    fitted, held_out = (
        _sums(model, [text for index, text in enumerate(chosen) if (index % HELD_OUT == 0) == validates], batch_size, pad)
        for validates in (False, True)
    )
    strengths = torch.tensor(RIDGES, dtype=fitted.x.dtype, device=fitted.x.device)[:, None].expand(-1, len(fitted.x))
    errors = torch.stack([_error(held_out, *_solve(fitted, strength)) for strength in strengths])
    smallest = errors.min(0)
    ridge = strengths[:, 0][smallest.indices]
    weight, bias = _solve(fitted.plus(held_out), ridge)
    return Translators(weight.float(), bias.float(), ridge.float(), (1 - smallest.values / held_out.centred()[2]).float())


def read_through(lens: Lens, states: Float[Tensor, "items states hidden"], candidates: Sequence[Sequence[int]]) -> Reading:
    """Reads the states of `activations`: from the input of the first layer to the last state before the final norm.

    `candidates` has the first token of every candidate of each item, that of the right answer first (see `first_tokens`).
    """
    distinct = [list(dict.fromkeys(tokens)) for tokens in candidates]
    longest = max(map(len, distinct))
    # Rows are padded with the right token; the padding is masked below.
    tokens = torch.tensor([row + row[:1] * (longest - len(row)) for row in distinct], device=states.device)
    padding = torch.tensor([[column >= len(row) for column in range(longest)] for row in distinct], device=states.device)
    with torch.inference_mode():
        translated = states if lens.translators is None else _translate(lens.translators, states)
        of_state = tokens[:, None].expand(-1, states.shape[1], -1).flatten(0, 1)
        parts = zip(translated.flatten(0, 1).split(ROWS_AT_ONCE), of_state.split(ROWS_AT_ONCE), strict=True)
        found = torch.cat([_head(lens.model, rows).log_softmax(-1).gather(1, columns) for rows, columns in parts])
        found = found.unflatten(0, states.shape[:2])
        among = found.masked_fill(padding[:, None], -torch.inf)
        share = among.softmax(-1)[..., 0]
        right = (among[..., :1] > among[..., 1:]).all(-1).float()
        shared = torch.tensor([row[0] in row[1:] for row in candidates], device=states.device)[:, None]
        kept = (found[..., 0], *(values.masked_fill(shared, torch.nan) for values in (share, right)))
        return Reading(*(values.cpu().numpy() for values in kept))


def read_lens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    candidates: Sequence[Sequence[int]],
    lenses: Mapping[str, Lens],
    *,
    batch_size: int,
    pad: int,
    watch: Callable[[States], None] = lambda states: None,
) -> dict[str, Reading]:
    """Reads the model's states at each prompt's last token through every lens, in one pass of the prompts (token ids).

    `candidates` as in `read_through`. `watch` is called with each batch's states, for other readers of the same pass. Raises
    `UserError` where a lens of the same model does not give the model's own probabilities at the last state: then this module does
    not handle the model's states or head correctly.
    """
    parts: dict[str, list[Reading]] = {name: [] for name in lenses}
    order: list[int] = []
    for batch in read_states(model, prompts, [[-1]] * len(prompts), batch_size=batch_size, pad=pad):
        order += batch.indices
        watch(batch)
        asked = [candidates[index] for index in batch.indices]
        own = batch.logits.log_softmax(-1).cpu().numpy()[range(len(asked)), [tokens[0] for tokens in asked]]
        for name, lens in lenses.items():
            reading = read_through(lens, batch.residual[:, 0], asked)
            if lens.model is model and not np.allclose(reading.log_probability[:, -1], own, rtol=0, atol=_tolerance(model, batch.logits)):
                raise UserError(
                    f"lens: the last state of {type(model).__name__} does not give its own probabilities; the lens does not support this model"
                )
            parts[name].append(reading)
    back = np.argsort(order)
    return {name: Reading(*(np.concatenate(arrays)[back] for arrays in zip(*found, strict=True))) for name, found in parts.items()}


def first_tokens(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[list[int]]:
    """For every item the first token of each candidate after the statement, that of the right answer first.

    Raises `UserError` for an item without a wrong candidate.
    """
    found = []
    for item in items:
        candidates = list(dict.fromkeys((item.answer, *item.choices)))
        if len(candidates) < 2:
            raise UserError(f"choices: the item {item.question!r} has only its answer; the lens needs a wrong one in every item")
        found.append([continuation_ids(tokenizer, candidate)[0] for candidate in candidates])
    return found


def _first(texts: Sequence[Sequence[int]], tokens: int) -> Iterator[Sequence[int]]:
    """The texts up to a total number of tokens; the last one is cut, texts of a single token are left out."""
    for text in texts:
        if len(text[: max(0, tokens)]) > 1:
            yield text[:tokens]
        tokens -= len(text)


def _sums(model: PreTrainedModel, texts: Sequence[Sequence[int]], batch_size: int, pad: int) -> _Sums:
    """Sums over all tokens except each text's first; longest texts first, so that there is little padding."""
    ordered = sorted(texts, key=len, reverse=True)
    total: _Sums | None = None
    for start in range(0, len(ordered), batch_size):
        *states, last = _states(model, ordered[start : start + batch_size], pad)
        y = last.double()
        # One state at a time is converted to fp64 and moved to one device.
        of_state = [(x.sum(0), x.T @ x, x.T @ y) for x in (state.to(y) for state in states)]
        x, xx, xy = map(torch.stack, zip(*of_state, strict=True))
        sums = _Sums(len(y), x, y.sum(0), xx, xy, y.square().sum())
        total = sums if total is None else total.plus(sums)
    assert total is not None
    return total


def _states(model: PreTrainedModel, texts: Sequence[Sequence[int]], pad: int) -> list[Float[Tensor, "tokens hidden"]]:
    """Every state at every token except padding and each row's first token: the inputs of the layers and of the final norm."""
    entered: list[Tensor] = []
    input_ids, mask = left_padded(texts, pad, model.device)
    kept = (mask * (mask.cumsum(-1) > 1)).bool()

    def keep(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        state = arguments[0] if arguments else options["hidden_states"]
        entered.append(state[kept.to(state.device)])

    hooked = [*layers_of(model), final_norm(model)]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in hooked]
    try:
        with torch.inference_mode():
            model.base_model(input_ids=input_ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    owners = kept.nonzero()[:, 0]
    check_states(model, entered, lambda row: f"the lens' text of the token ids {list(texts[int(owners[row])][:8])}, …")
    return entered


def _solve(sums: _Sums, ridge: Float[Tensor, " layers"]) -> tuple[Float[Tensor, "layers hidden hidden"], Float[Tensor, "layers hidden"]]:
    within, across, _ = sums.centred()
    variance, square = (matrix.diagonal(dim1=-2, dim2=-1).mean(-1) for matrix in (within, sums.xx / sums.tokens))
    # A state that only varies by rounding is mapped to the last state's mean.
    strength = torch.maximum(ridge * variance, 1e-12 * square).clamp(min=torch.finfo(square.dtype).tiny)
    # Cholesky, which a ridge makes safe, takes half the work of a general solver.
    factor = torch.linalg.cholesky(within + strength[:, None, None] * torch.eye(within.shape[-1]).to(within))
    weight = torch.cholesky_solve(across, factor)
    return weight, (sums.y - torch.einsum("ki,kij->kj", sums.x, weight)) / sums.tokens


def _error(sums: _Sums, weight: Float[Tensor, "layers hidden hidden"], bias: Float[Tensor, "layers hidden"]) -> Float[Tensor, " layers"]:
    """The mean squared error per token, summed over coordinates."""
    within, across, variance = sums.centred()
    spread = variance - 2 * (weight * across).sum((-2, -1)) + (weight * (within @ weight)).sum((-2, -1))
    offset = (sums.y - torch.einsum("ki,kij->kj", sums.x, weight)) / sums.tokens - bias
    return spread + offset.square().sum(-1)


def _translate(translators: Translators, states: Float[Tensor, "items states hidden"]) -> Float[Tensor, "items states hidden"]:
    weight, bias = translators.weight.to(states), translators.bias.to(states)
    return torch.cat([torch.einsum("nki,kij->nkj", states[:, :-1], weight) + bias, states[:, -1:]], 1)


def _head(model: PreTrainedModel, states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocabulary"]:
    """The model's logits if these were its last states, computed by its own code, with soft caps and scales.

    The model reads one token, and the input of its final norm is replaced by the states: one step for all rows together.
    """

    def exchange(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (states[:, None].to(arguments[0]), *arguments[1:])

    handle = final_norm(model).register_forward_pre_hook(exchange)
    try:
        one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        return model(input_ids=one, attention_mask=one + 1, use_cache=False).logits[:, -1].float().to(states.device)
    finally:
        handle.remove()


def _tolerance(model: PreTrainedModel, logits: Tensor) -> float:
    """Rounding error of the model's dtype for logits of this size; in fp32 about 1e-4."""
    return max(1e-4, 8 * torch.finfo(model.dtype).eps * float(logits.abs().max()))
