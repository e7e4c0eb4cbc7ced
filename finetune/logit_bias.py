"""A logit bias fitted on questions and answers: the cheapest steering, one vector over the vocabulary for every step.

The vector b minimizes the mean cross-entropy of the answers' tokens (those that a tuning is trained on) under the base's logits + b, plus
penalty * |b|^2 / 2. The problem is strictly convex and has one solution. L-BFGS finds it in fp64, deterministically and without a learning
rate. The base reads every example once. Its logits at the answers' tokens are kept if they have at most `KEPT` numbers (1 GiB in fp32);
otherwise the states before its head are kept, and every evaluation multiplies them by the head again, `AT_ONCE` logits at a time. Not
covered: models that change their head's logits afterwards (a soft cap).
"""

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from torch import Tensor

from finetune.checkpoints import workplace
from finetune.encoding import Row, check_rows, encode_examples, row_length, trained_share
from finetune.flops import forward_flops
from finetune.items import Item
from finetune.meter import Meter
from finetune.recipe import BiasTuning
from finetune.reference import read_reference
from finetune.tuning import TuningReport
from proxytune.bias import Bias
from proxytune.content import as_json, content_key
from proxytune.digests import check_whole, publish
from proxytune.errors import UserError
from proxytune.member import load_member

FILE = "bias.safetensors"
KEPT = 2**28  # most logits that are kept, in numbers
AT_ONCE = 2**22  # logits that are in memory in fp64 at a time
STEEPEST = 1e-6  # of the gradient's numbers where the fit ends
EVALUATIONS = 10_000
OPERATIONS = 4  # for each logit and evaluation: adding the bias, the exponential, and the sums over tokens and over positions

Pieces = Callable[[], Iterable[Float[Tensor, "positions vocabulary"]]]


class Fit(NamedTuple):
    """The vector, the mean cross-entropy of the answers' tokens (nats) before and after, and how often it was evaluated."""

    values: Float[Tensor, " vocabulary"]
    before: float
    after: float
    evaluations: int


def fit_logit_bias(
    model: str | Path,
    items: Sequence[Item],
    tuning: BiasTuning,
    *,
    prompt: str,
    ending: str,
    out: Path,
    field: str = "base",
    states: Path | None = None,
) -> TuningReport:
    """Fits the vector for the model in `model` (a folder or hub name) and writes it to the folder `out`, which `read_bias` reads.

    `prompt` is the template of a question, or the word `chat`; `ending` follows each answer in plain text. `field` is the name of `model` in
    error messages. `states` is a folder where the base's states are kept for other fits (default: none are kept). In the report, steps are
    evaluations, and losses the cross-entropy before and after. The folder holds the vector, `tuning.json` (recipe and report) and the
    digests of both; it appears complete or not at all. Raises `UserError` where no token would be trained on, where an example does not
    fit the model, where the fit does not converge, where the disk is full, and where `model` is not a model.
    """
    meter = Meter()
    member = load_member(model, field=field)
    rows = encode_examples(items, member.tokenizer, prompt, ending)
    check_rows(rows, getattr(member.model.config.get_text_config(), "max_position_embeddings", None), member.rows)
    key = content_key(start=member.fingerprint, rows=rows, tuning=tuning.model_dump())
    with workplace(out, key) as folder:
        try:
            reference = read_reference(member, rows, states or folder, field)
            targets = targets_of(rows)
            ids = [row["input_ids"] for row in rows]
            at_once = max(1, AT_ONCE // member.rows)
            pieces: Pieces = functools.partial(reference.pieces, ids, member.model.device, at_once)
            tokens, keeps = sum(map(row_length, rows)), len(targets) * member.rows <= KEPT
            kept = list(pieces()) if keeps else None
            fit = fitted(pieces if kept is None else lambda: kept, targets, member.rows, tuning.penalty)
            result = folder / "result"
            shutil.rmtree(result, ignore_errors=True)  # left by a fit that was killed here
            result.mkdir()
            save_file({"bias": fit.values.contiguous()}, result / FILE)
            evaluated = OPERATIONS * member.rows + (0 if keeps else 2 * member.model.get_output_embeddings().weight.numel())
            meter.tick()
            report = TuningReport(
                examples=len(rows),
                steps=fit.evaluations,
                tokens=tokens,
                trained_share=trained_share(rows),
                parameters=member.rows,
                losses=[fit.before, fit.after],
                validation_losses=[],
                flops=forward_flops(member.model, tokens, tokens / len(rows)) + float(fit.evaluations) * len(targets) * evaluated,
                stored_bytes=(result / FILE).stat().st_size,
                processes=1,
                wrapped=type(member.model).__name__,
                **asdict(meter),
            )
            (result / "tuning.json").write_text(as_json({"tuning": tuning.model_dump(), "report": asdict(report)}) + "\n")
            publish(result, out)
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"out: '{folder}' cannot be written ({reason}); free some space and run the same again") from error
    return report


def targets_of(rows: Sequence[Row]) -> Int[Tensor, " positions"]:
    """The tokens that are trained on, of all rows end to end. A row's first token follows nothing and is none of them."""
    return torch.tensor(
        [token for row in rows for token, trained in zip(row["input_ids"][1:], row["completion_mask"][1:], strict=True) if trained], dtype=torch.long
    )


def fitted(pieces: Pieces, targets: Int[Tensor, " positions"], vocabulary: int, penalty: float) -> Fit:
    """The vector that minimizes the penalized mean cross-entropy of the targets under logits + vector.

    `pieces` gives the logits of all positions end to end, whenever it is called. Raises `UserError` where the fit does not converge.
    """
    counts = torch.bincount(targets, minlength=vocabulary).double()
    own = sum(float(logits.gather(1, some[:, None].to(logits.device)).double().sum()) for logits, some in _beside(pieces(), targets))

    def losses(values: np.ndarray) -> tuple[float, float, np.ndarray]:
        """The mean cross-entropy, the same with its penalty, and the gradient of the latter."""
        bias = torch.from_numpy(values)
        total, expected = 0.0, torch.zeros(vocabulary, dtype=torch.float64)
        for logits in pieces():
            scores = logits.double() + bias.to(logits.device)
            normalizers = scores.logsumexp(-1, keepdim=True)
            total += float(normalizers.sum())
            expected += (scores - normalizers).exp().sum(0).cpu()
        loss = (total - own - float(counts @ bias)) / len(targets)
        gradient = (expected - counts) / len(targets) + penalty * bias
        return loss, loss + penalty / 2 * float(bias @ bias), gradient.numpy()

    start = np.zeros(vocabulary)
    options = {"gtol": STEEPEST / 10, "ftol": 0.0, "maxiter": EVALUATIONS, "maxfun": EVALUATIONS, "maxcor": 20}
    found = minimize(lambda values: losses(values)[1:], start, jac=True, method="L-BFGS-B", options=options)
    steepest = float(np.abs(found.jac).max())
    if not steepest <= STEEPEST:  # NaN is not at most anything
        raise UserError(f"penalty: the fit with {penalty:g} has a gradient of {steepest:.1g} after {found.nfev} evaluations; raise it")
    return Fit(torch.from_numpy(found.x).float(), losses(start)[0], losses(found.x)[0], int(found.nfev))


def _beside(pieces: Iterable[Tensor], targets: Int[Tensor, " positions"]) -> Iterable[tuple[Tensor, Tensor]]:
    """Each piece with the targets of its positions."""
    done = 0
    for logits in pieces:
        yield logits, targets[done : done + len(logits)]
        done += len(logits)


def read_bias(folder: str | Path, field: str = "bias") -> Bias:
    """The vector that `fit_logit_bias` wrote. Raises `UserError` naming `field` where the folder holds none, or is damaged."""
    check_whole(folder, field)
    try:
        return Bias(load_file(Path(folder) / FILE)["bias"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{field}: '{folder}' holds no fitted bias ({type(error).__name__}); fit it again") from error
