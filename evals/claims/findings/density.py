"""Finding 1: representational density is familiarity."""

from collections.abc import Sequence
from pathlib import Path

import torch

from evals.claims.claim import Beside, Claim, Evidence, Part, verdicts_of
from evals.measures.dose import CLAIMS
from evals.released.dynamics import read_dynamics, settle
from evals.results.summary import Results
from probes.density import density

FROM_STEP = 3000
VECTORS = 20_000
FILES = {1024: "density/dynamics_llama-16-16_5000steps.json", 2048: "density/dynamics_llama-32-32_5000steps.json"}


def _parts(results: Results) -> list[Part]:
    """The residual stream is where the source reads; neurons, with the other sign, are a prediction of our own."""
    return [
        *(Part(one) for one in verdicts_of(results, CLAIMS["residual"])),
        *(Part(one, decides=False) for one in verdicts_of(results, CLAIMS["neurons"])),
    ]


def _outside(folder: Path) -> Sequence[Beside]:
    found = []
    for width, file in FILES.items():
        frame = read_dynamics(folder / file)
        settled = {(row.group, row.metric): row for row in settle(frame, file, FROM_STEP).settled}
        start = frame[(frame["step"] == frame["step"].min()) & (frame["metric"] == "top5pct_energy") & (frame["group"] == "id")]["value"].item()
        null = density(torch.randn(VECTORS, width, generator=torch.Generator().manual_seed(0)))["e5"].mean().item()
        means = {group: settled[group, "top5pct_energy"] for group in ("id", "ood_medium", "ood_hard")}
        hard = means["ood_hard"]
        found.append(
            Beside(
                f"top-5 % energy in distribution, medium, hard (width {width}, steps from {FROM_STEP})",
                "the farther the shift, the sparser the representation",
                f"{', '.join(f'{row.mean:.5f}' for row in means.values())}: hard is sparser by {100 * hard.difference / means['id'].mean:.2f} %",
            )
        )
        found.append(
            Beside(
                f"the same before training (width {width})",
                "dense representations are learned, sparse ones are the default",
                f"{start:.3f}, that of random Gaussian vectors is {null:.3f}: nothing is sparse by default",
            )
        )
    return found


CLAIM = Claim(
    1,
    "density",
    "Representations of what is familiar from pretraining are dense; those of what is not are sparse.",
    "Jin et al. 2026, arXiv 2603.03415",
    "Exposure, drawn at random, does not move density; or moves it as much in an untrained model; or only through the name's surprisal.",
    "Exposures drawn at random in a counted corpus; names never stated; the same layers, fixed beforehand; an untrained twin.",
    (Evidence("exposure", _parts),),
    _outside,
    tuple(FILES.values()),
)
