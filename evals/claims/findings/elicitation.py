"""Finding 3: base models already contain hidden reasoning, and tuning elicits it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from evals.claims.claim import Beside, Claim, Evidence, Part, judge, row_of
from evals.results.summary import Results
from evals.statistics.scores import pass_at_k
from probes.verdict import SMALLEST_KNOWLEDGE, Clause

RECOVERED, ROWS = "elicitation/venhoff_gap_recovered.csv", "elicitation/rlvr_repro_estimator_rows.csv"
KNOWN = Clause("known", "tuned only on items that the base knows, a model gains as much as on all items", "above", -SMALLEST_KNOWLEDGE, 0.0)


def _parts(results: Results) -> list[Part]:
    row = row_of(results.compared["contrasts"], arm="full-known", minus="full-all", measure="task")
    return [Part(judge("full-known minus full-all", KNOWN, row, results.header.runs), decides=False)]


def _outside(folder: Path) -> Sequence[Beside]:
    pairs = pd.read_csv(folder / RECOVERED)
    plain = 100 * (pairs["hybrid_mean_pct"] - pairs["base_mean_pct"]) / (pairs["thinking_mean_pct"] - pairs["base_mean_pct"])
    found = []
    for kind, name in (("RL", "tuned by RL"), ("SFT", "distilled by SFT")):
        chosen = pairs["kind"] == kind
        found.append(
            Beside(
                f"gap recovered by the hybrid, pairs {name} (mean of {int(chosen.sum())}, %)",
                f"{pairs['published_gap_recovered_pct'][chosen].mean():.2f}, with what is below zero set to zero",
                f"{plain[chosen].mean():.2f} without that; lowest {plain[chosen].min():.1f}, highest {plain[chosen].max():.1f}",
            )
        )
    rows = pd.read_csv(folder / ROWS)
    apart = max(float(np.abs(pass_at_k(rows["n"].to_numpy(), rows["correct"].to_numpy(), k) - rows[f"pass_{k}"]).max()) for k in (8, 16, 32))
    printed = rows["pass_8"][rows["correct"] == 17].iloc[0]
    found.append(
        Beside(
            f"pass@k of {len(rows)} problems (n = 128, k = 8, 16, 32)",
            f"pass@8 of 17 right: {printed:.10f}",
            f"{float(pass_at_k(128, 17, 8)):.10f}; the largest difference of all is {apart:.0e}",
        )
    )
    return found


CLAIM = Claim(
    3,
    "elicitation",
    "Base models already contain the reasoning; tuning (RL, steering, critiques, one example, decoding) only elicits it.",
    "Venhoff et al. 2025, arXiv 2510.07364; Yue et al. 2025, arXiv 2504.13837; Wang and Zhou 2024, arXiv 2402.10200; and others",
    "A tuned model solves in many tries what the base never does; or a base that never saw the procedure is elicited just as well.",
    "A control base without any exposure; format-only tuning; random directions; a lenient reading of answers; pass@k of both.",
    (Evidence("teaching", _parts),),
    _outside,
    (RECOVERED, ROWS),
    "There is no probe of elicited reasoning here yet. What is measured is nearby: what tuning on facts that the base knows already gains.",
)
