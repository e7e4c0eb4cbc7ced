"""Finding 7: proxy-tuning closes most of the gap, and keeps knowledge that direct tuning corrupts in lower layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evals.claims.claim import Beside, Claim, Evidence, Part, judge, row_of, verdicts_of
from evals.measures.dose import EROSION
from evals.measures.erosion import CLAIM as EROSION_CLAIM
from evals.released.rescore import rescore
from evals.results.summary import Results
from probes.verdict import SMALLEST_KNOWLEDGE, Clause

RELEASED = "released_generations"
ROLES = {"base": "llama2-13B*", "proxy": "dexperts-13B*", "direct": "llama2-chat-13B*"}
STEERED, DIRECT = "proxy-selected", "direct"  # rows of the study `world`, whose settings were selected for both camps alike
# The lower of the two mean gaps that the paper prints.
GAP = Clause("gap", "the proxy closes as much of the gap as was printed (88 %)", "above", 0.88, 0.88)
KEPT = Clause("kept", "the proxy keeps more knowledge than direct tuning", "above", 0.0, SMALLEST_KNOWLEDGE)
# Table 2 (base, proxy-tuned, directly tuned) as printed; toxicity is better where lower.
PRINTED: dict[str, dict[str, tuple[float, float, float]]] = {
    "13B": {
        "AlpacaFarm": (2.1, 83.4, 87.3),
        "GSM": (6.6, 26.4, 32.4),
        "ToxiGen": (70.4, 0.1, 0.0),
        "TruthfulQA, choice": (38.6, 57.4, 61.6),
        "TruthfulQA, open": (49.1, 82.0, 80.4),
    },
    "70B": {
        "AlpacaFarm": (3.7, 88.0, 90.4),
        "GSM": (9.6, 32.0, 51.8),
        "ToxiGen": (67.4, 0.0, 0.0),
        "TruthfulQA, choice": (42.3, 59.2, 68.3),
        "TruthfulQA, open": (53.9, 85.1, 79.6),
    },
}
MEANS = {"13B": 91.1, "70B": 88.1}  # as printed
TRIVIA = {"13B": (55.9, 59.5, 66.0), "70B": (62.7, 63.1, 75.3)}  # tables 5 and 15: proxy, full, LoRA


def _compared(results: Results) -> list[Part]:
    gap = row_of(results.compared["gap_closed"], arm=STEERED, direct=DIRECT, measure="task")
    kept = row_of(results.compared["against_direct"], arm=STEERED, direct=DIRECT, measure="knowledge")
    return [Part(judge(f"{STEERED} against {DIRECT}", rule, row, results.header.runs)) for rule, row in ((GAP, gap), (KEPT, kept))]


def _eroded(results: Results) -> list[Part]:
    return [Part(one) for one in verdicts_of(results, EROSION_CLAIM)]


def _eroded_names(results: Results) -> list[Part]:
    return [Part(one, decides=False) for claim in (EROSION_CLAIM, EROSION) for one in verdicts_of(results, claim)]


def gaps(printed: Mapping[str, tuple[float, float, float]]) -> np.ndarray:
    """The gap closed of every benchmark, in per cent."""
    return np.array([100 * (proxy - base) / (direct - base) for base, proxy, direct in printed.values()])


def _outside(folder: Path) -> Sequence[Beside]:
    found = []
    for size, printed in PRINTED.items():
        each, (proxy, full, lora) = gaps(printed), TRIVIA[size]
        found.append(
            Beside(
                f"mean gap closed, {size} (%)",
                f"{MEANS[size]}",
                f"{each.mean():.1f} from the printed table; {np.minimum(each, 100).mean():.1f} where more than 100 counts as 100; "
                f"least {each.min():.1f} ({list(printed)[int(each.argmin())]})",
            )
        )
        found.append(
            Beside(
                f"knowledge, proxy minus direct, {size} (points)",
                f"better at knowledge: TruthfulQA, open, {_minus(printed['TruthfulQA, open'])}",
                f"TruthfulQA, choice, {_minus(printed['TruthfulQA, choice'])}; TriviaQA {proxy - full:+.1f} against full tuning, "
                f"{proxy - lora:+.1f} against LoRA",
            )
        )
    place = _released(folder)
    if place is not None:
        for row in rescore(place, roles=[ROLES])["gap_summary"]:
            mean, capped, least = (f"{100 * row[name]:.1f}" for name in ("mean", "mean_capped", "minimum"))
            found.append(
                Beside(
                    f"mean gap closed, 13B, from the released answers, scored as by {row['reading']} (%)",
                    f"{MEANS['13B']}",
                    f"{mean}; {capped} where more than 100 counts as 100; least {least} ({row['at']})",
                )
            )
    found.append(
        Beside(
            "knowledge in lower layers",
            "direct tuning corrupts what lower layers hold",
            "not measured there: the paper looks at no layer, and what is cited for it compares prompts, not tunings",
        )
    )
    return found


def _minus(row: tuple[float, float, float]) -> str:
    return f"{row[1] - row[2]:+.1f}"


def _released(folder: Path) -> Path | None:
    """The released generations, in the folder or beside it."""
    return next((place for place in (folder / RELEASED, folder.parent / RELEASED) if place.is_dir()), None)


CLAIM = Claim(
    7,
    "proxy",
    "Proxy-tuning closes 88 to 91 % of the gap and keeps knowledge that direct tuning corrupts in lower layers.",
    "Liu et al. 2024, arXiv 2401.08565; on lower layers: as commonly summarized",
    "The proxy closes less of the gap than printed; or keeps no more than direct tuning; or direct tuning takes nothing from lower layers beyond its "
    "controls.",
    "Settings selected for both camps alike, on families in no table; random deltas, shuffled answers, as much change elsewhere, a frozen half.",
    (Evidence("world", _compared), Evidence("erosion", _eroded), Evidence("erosion-names", _eroded_names)),
    _outside,
)
