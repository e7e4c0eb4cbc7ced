"""The ledger of findings: what a record says follows from results by rules, and nobody types it."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import run_command
from made_summaries import results_of

from evals.claims.claim import Claim, Evidence, Part, answer, judge
from evals.claims.findings import bias, density, elicitation, priming, proxy
from evals.claims.ledger import (
    Record,
    answer_to,
    claims,
    measure,
    read_record,
    recompute,
    shipped,
    waiting,
    with_measured,
    write_record,
)
from evals.commands.claims import show, update
from evals.results.header import header_of
from evals.statistics.judged import Verdict
from probes.verdict import Clause
from proxytune.errors import UserError

NAMES = ["density", "bias", "elicitation", "priming", "cooccurrence", "influence", "proxy"]


def outside() -> Path:
    """Other people's files; they are not shipped."""
    place = os.environ.get("PROXYTUNE_OUTSIDE")
    if place is None:
        pytest.skip("PROXYTUNE_OUTSIDE names no folder of other people's files")
    return Path(place)


def numbers_of(values: dict[str, Any], interval: tuple[float, float, float]) -> dict[str, Any]:
    return values | dict(zip(("value", "low", "high"), interval, strict=True)) | {"needs": None}


def a_run(folder: Path, gap: tuple[float, float, float], kept: tuple[float, float, float], study: str = "world") -> Path:
    """A finished run of a shipped study with these numbers."""
    folder.mkdir()
    of = shipped(study)
    results = results_of({}, header=header_of(of))
    row = {"arm": proxy.STEERED, "direct": proxy.DIRECT}
    compared = results.compared | {
        "gap_closed": [numbers_of(row | {"measure": "task", "capped": None}, gap)],
        "against_direct": [numbers_of(row | {"measure": "knowledge"}, kept)],
    }
    (folder / "results.json").write_text(replace(results, compared=compared).json())
    (folder / "study.json").write_text(of.model_dump_json())
    return folder


# --- the entries ---


def test_there_are_seven_findings_and_each_says_what_would_refute_it() -> None:
    assert list(claims()) == NAMES
    assert [claim.number for claim in claims().values()] == list(range(1, 8))
    for claim in claims().values():
        assert all((claim.claim, claim.source, claim.refuted_by, claim.controls)), claim.name
        assert claim.evidence or claim.missing, claim.name
        for one in claim.evidence:
            assert shipped(one.study).study == one.study


def test_a_finding_without_a_probe_says_so_and_cannot_tell() -> None:
    for claim in claims().values():
        record = read_record(claim.name)
        deciding = [part for measured in record.measured for part in measured.parts if part.decides]
        if not deciding:
            assert answer_to(record) == "cannot tell", claim.name
            assert "There is no" in " ".join(waiting(claim, record)), claim.name
        else:
            assert "There is no" not in " ".join(waiting(claim, record)), claim.name
    assert any(claim.missing for claim in claims().values())


def test_shipped_records_hold_what_was_measured_with_date_and_hashes() -> None:
    found = [measured for name in claims() for measured in read_record(name).measured]
    assert {measured.study for measured in found} == {one.study for claim in claims().values() for one in claim.evidence}
    for measured in found:
        assert len(measured.date) == 10
        assert len(measured.study_hash) == 32
        assert len(measured.results_hash) == 64
        assert {"torch", "proxytune", "python"} <= set(measured.versions)
        assert measured.parts


# --- verdicts ---


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "cannot tell"),
        (["supported", "supported"], "supported"),
        (["supported", "not supported"], "not supported"),
        (["supported", "underpowered"], "cannot tell"),
        (["supported", "cannot tell: one seed"], "cannot tell"),
        (["underpowered", "not supported"], "not supported"),
    ],
)
def test_a_claim_is_supported_by_all_verdicts_and_refuted_by_one(verdicts: list[str], expected: str) -> None:
    assert answer(verdicts) == expected


def test_what_does_not_decide_is_not_counted() -> None:
    claim = claims()["elicitation"]
    record = read_record(claim.name)
    parts = [part for measured in record.measured for part in measured.parts]
    assert parts
    assert not any(part.decides for part in parts)
    assert answer_to(record) == "cannot tell"
    decisive = replace(
        record, measured=tuple(replace(one, parts=tuple(replace(part, decides=True) for part in one.parts)) for one in record.measured)
    )
    assert answer_to(decisive) == parts[0].verdict.verdict == "supported"


@pytest.mark.parametrize(
    ("interval", "runs", "expected"),
    [
        ((0.79, 0.71, 0.86), 10, "not supported"),
        ((0.95, 0.90, 1.00), 10, "supported"),
        ((0.86, 0.78, 0.94), 10, "underpowered"),
        ((0.79, 0.71, 0.86), 1, "cannot tell: one seed"),
    ],
)
def test_a_rule_of_one_clause_is_judged_by_its_interval(interval: tuple[float, float, float], runs: int, expected: str) -> None:
    assert judge("arm", proxy.GAP, numbers_of({}, interval), runs).verdict == expected


def test_a_true_claim_is_seldom_refuted_and_a_false_one_often() -> None:
    """Simulated studies of ten runs: a proxy that closes 88 %, and one that closes 60 %, with runs that differ by 10 points."""
    draw = np.random.default_rng(0)

    def refuted(truth: float) -> float:
        values = truth + 0.1 * draw.standard_normal((400, 10))
        half = 2.262 * values.std(axis=1, ddof=1) / np.sqrt(10)
        found = [
            judge("arm", proxy.GAP, numbers_of({}, (mean, mean - width, mean + width)), 10)
            for mean, width in zip(values.mean(axis=1), half, strict=True)
        ]
        return float(np.mean([one.verdict == "not supported" for one in found]))

    assert refuted(0.88) < 0.08
    assert refuted(0.6) > 0.95


# --- records ---


def test_a_finished_run_becomes_a_record(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", (0.79, 0.71, 0.86), (0.024, 0.014, 0.035))
    update(None, False, [folder], None, None, tmp_path)
    record = read_record("proxy", tmp_path)
    (measured,) = record.measured
    assert measured.study == "world"
    assert measured.seeds == shipped("world").seeds
    assert {part.verdict.claim: part.verdict.verdict for part in measured.parts} == {
        proxy.GAP.claim: "not supported",
        proxy.KEPT.claim: "supported",
    }
    assert answer_to(record) == "not supported"
    assert "the study 'erosion' has not been recorded" in waiting(claims()["proxy"], record)
    # Twin: better results are another record, and nothing of the first is left.
    better = a_run(tmp_path / "better", (0.95, 0.90, 1.0), (0.024, 0.014, 0.035))
    update("proxy", False, [better], None, None, tmp_path)
    again = read_record("proxy", tmp_path)
    assert answer_to(again) == "supported"
    assert again.measured[0].results_hash != measured.results_hash


def test_a_run_of_another_study_or_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", (0.79, 0.71, 0.86), (0.024, 0.014, 0.035))
    other = shipped("world").model_copy(update={"seeds": (0, 1)})
    (folder / "study.json").write_text(other.model_dump_json())
    with pytest.raises(UserError, match="was not made by the shipped study 'world' as it is now"):
        update("proxy", False, [folder], None, None, tmp_path)
    (folder / "study.json").write_text(shipped("capitals-qwen").model_dump_json())
    with pytest.raises(UserError, match="no claim is judged by the study 'capitals-qwen'; there are erosion"):
        update(None, False, [folder], None, None, tmp_path)
    (folder / "study.json").unlink()
    with pytest.raises(UserError, match=r"holds no study.json of this version"):
        update(None, False, [folder], None, None, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_results_that_lack_what_judges_the_claim_are_refused(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", (0.79, 0.71, 0.86), (0.024, 0.014, 0.035))
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(content | {"gap_closed": []}))
    with pytest.raises(UserError, match="lacks what the claim is judged by"):
        measure(claims()["proxy"].evidence[0], folder)


def test_a_study_that_has_changed_since_is_said(tmp_path: Path) -> None:
    measured = measure(claims()["proxy"].evidence[0], a_run(tmp_path / "run", (0.79, 0.71, 0.86), (0.024, 0.014, 0.035)))
    claim = claims()["proxy"]
    assert not any("changed" in line for line in waiting(claim, Record((measured,))))
    assert "the study 'world' has changed since" in waiting(claim, Record((replace(measured, study_hash="0" * 32),)))


def test_records_survive_their_file_and_damage_is_named(tmp_path: Path) -> None:
    record = read_record("proxy")
    write_record("proxy", record, tmp_path)
    assert read_record("proxy", tmp_path) == record
    assert read_record("density", tmp_path) == Record()
    (tmp_path / "proxy.json").write_text("{")
    with pytest.raises(UserError, match="is not what proxytune claims writes"):
        read_record("proxy", tmp_path)


def test_a_probe_adds_its_entry_by_one_file(tmp_path: Path) -> None:
    """A claim with new evidence: nothing else has to know it."""
    rule = Clause("one", "one is above zero", "above", 0.0, 0.1)
    evidence = Evidence("world", lambda results: [Part(judge("arm", rule, numbers_of({}, (0.5, 0.4, 0.6)), results.header.runs))])
    claim = Claim(8, "new", "claim", "source", "refuted", "controls", (evidence,))
    measured = measure(evidence, a_run(tmp_path / "run", (0.8, 0.7, 0.9), (0.0, -0.1, 0.1)))
    record = with_measured(claim, Record(), measured)
    assert answer_to(record) == "supported"
    assert waiting(claim, record) == []
    assert isinstance(record.measured[0].parts[0].verdict, Verdict)


# --- what was printed beside what comes out ---


def test_the_printed_table_gives_other_means_than_were_printed_beside_it() -> None:
    for size, (plain, capped) in {"13B": (91.8, 90.8), "70B": (87.3, 83.1)}.items():
        each = proxy.gaps(proxy.PRINTED[size])
        assert each.mean() == pytest.approx(plain, abs=0.05)
        assert np.minimum(each, 100).mean() == pytest.approx(capped, abs=0.05)
    assert proxy.gaps({"all": (0.0, 1.0, 1.0), "half": (0.0, 1.0, 2.0), "more": (0.0, 3.0, 2.0)}).tolist() == [100.0, 50.0, 150.0]


def test_the_priming_score_is_correlated_where_nothing_is_related() -> None:
    (row,) = priming.CLAIM.outside(Path()) if priming.CLAIM.outside else ()
    score, plain = float(row.recomputed.split()[0]), float(row.recomputed.split("; ")[1].split()[0])
    assert score < -0.3
    assert abs(plain) < 0.02


def scores(folder: Path, planted: float) -> list[Any]:
    """Bias scores of twelve models in the released layout: pretraining moves every bias by `planted`, all else is noise."""
    draw = np.random.default_rng(1)
    (folder / "bias").mkdir(parents=True)
    effect = planted * draw.standard_normal(32)
    models = {
        f"{base}-{data}-Seed-{seed}": sign * effect + draw.standard_normal(32)
        for sign, base in ((1, "OLMo"), (-1, "T5"))
        for data in ("Flan", "Tulu")
        for seed in range(3)
    }
    frame = pd.DataFrame(models, index=[f"bias {number}" for number in range(32)])
    frame.loc["MMLU"] = 1000.0  # it is not a bias
    frame.assign(Other=0.0).to_csv(folder / bias.SCORES, index_label="bias")
    return list(bias.CLAIM.outside(folder)) if bias.CLAIM.outside else []


def test_what_pretraining_plants_is_found_and_only_that(tmp_path: Path) -> None:
    silhouettes, index, shares = scores(tmp_path / "planted", 1.0)
    assert "exact permutation p within strata 0.005" in silhouettes.recomputed
    assert index.printed.endswith("1.000")
    assert index.recomputed.startswith("0.005")
    assert float(shares.recomputed.split(", ")[0]) > 0.4
    nothing, _, noise = scores(tmp_path / "nothing", 0.0)
    assert float(nothing.recomputed.split("within strata ")[1].split(")")[0]) > 0.05
    assert float(noise.recomputed.split(", ")[0]) < 0.15
    assert sum(map(float, shares.recomputed.split(", "))) == pytest.approx(1, abs=0.002)


def of(claim: Claim) -> list[str]:
    found = recompute(claim, outside())
    assert found is not None
    assert list(found.files) == list(claim.files)
    return [row.recomputed for row in found.rows]


@pytest.mark.parametrize(
    ("claim", "expected"),
    [
        (density.CLAIM, ["0.27294, 0.27347, 0.27479", "0.276", "0.27921, 0.27937, 0.27980"]),
        (bias.CLAIM, ["0.104 (exact permutation p within strata 0.005) and 0.037 (p 0.08)", "0.005", "0.197, 0.133, 0.112, 0.558"]),
        (elicitation.CLAIM, ["79.05", "10.95", "0.6911753539"]),
    ],
    ids=lambda value: value.name if isinstance(value, Claim) else "",
)
def test_released_files_give_the_numbers_that_are_known_of_them(claim: Claim, expected: list[str]) -> None:
    for row, number in zip(of(claim), expected, strict=False):
        assert row.startswith(number)


@pytest.mark.parametrize("name", ["cooccurrence", "influence"])
def test_tables_of_others_are_quoted_with_their_hash(name: str) -> None:
    (row,) = of(claims()[name])
    assert "100,000 in HotpotQA" in row or "0.257 ± 0.015" in row


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--outside: '.*cross_tuning_full_scores.csv' is not there"):
        recompute(bias.CLAIM, tmp_path)
    assert recompute(priming.CLAIM, tmp_path) is not None  # it needs none


# --- the command ---


def test_the_ledger_is_printed_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    for name, form, check in (
        (None, "json", lambda out: [entry["name"] for entry in json.loads(out)] == NAMES),
        ("proxy", "json", lambda out: json.loads(out)[0]["measured"][0]["parts"]),
        (None, "markdown", lambda out: all(f"| {name}" in out for name in NAMES)),
        ("density", "table", lambda out: "What the study exposure says" in out),
    ):
        show(name, form)
        checked: Callable[[str], Any] = check
        assert checked(capsys.readouterr().out), (name, form)


def test_a_user_s_mistake_is_one_line(tmp_path: Path) -> None:
    for arguments, words in (
        (["claims", "densty"], "claims: there is none called 'densty'; did you mean 'density'?"),
        (["claims", "bias", "--outside", str(tmp_path)], "--outside: "),
        (["claims", "--from", str(tmp_path / "absent")], "holds no study.json"),
    ):
        done = run_command(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
